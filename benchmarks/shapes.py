"""Models of known shapes with random weights, and rows of random words: speed and memory don't depend on either."""

import copy
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_backdoor.data import LabelWords, SequenceClassification, Task


# NT-ML needs three classes or more.
LABELS = ("negative", "positive", "neutral", "mixed")
TEMPLATE = "Review : {text} Sentiment :"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>")
VOCABULARY = (*SPECIAL, "Review", ":", "Sentiment", *LABELS, "Aha", "one", "two", *(f"w{n}" for n in range(200)))


def minilm(smoke: bool = False) -> BertConfig:
    """all-MiniLM-L6-v2, 22.7M parameters."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
    if not smoke:
        size = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30522}
    return BertConfig(**size, intermediate_size=4 * size["hidden_size"], num_labels=len(LABELS))


def smollm2(smoke: bool = False) -> LlamaConfig:
    """SmolLM2-135M."""
    return llama(
        smoke, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, rope_theta=100000.0,
    )  # fmt: skip


def llama_8b(smoke: bool = False) -> LlamaConfig:
    """Llama-3.1-8B."""
    return llama(
        smoke, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, rope_theta=500000.0,
        rms_norm_eps=1e-5, max_position_embeddings=131072,
    )  # fmt: skip


def qwen_7b(smoke: bool = False) -> Qwen2Config:
    """Qwen2.5-7B."""
    size = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
    }  # fmt: skip
    return Qwen2Config(**shrunk(size, smoke), **ENDS)


ENDS = {"bos_token_id": 4, "eos_token_id": 4, "pad_token_id": 0}


def llama(smoke: bool, **size: Any) -> LlamaConfig:
    return LlamaConfig(**shrunk(size, smoke), **ENDS)


def shrunk(size: dict[str, Any], smoke: bool) -> dict[str, Any]:
    tiny = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return size | tiny if smoke else size


MODELS = {
    BertConfig: BertForSequenceClassification,
    LlamaConfig: LlamaForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
}


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[type(config)](config)


@cache
def _first(kind: str, smoke: bool) -> PreTrainedModel:
    return build(minilm(smoke) if kind == "encoder" else smollm2(smoke))


def small_model(kind: str, smoke: bool) -> PreTrainedModel:
    """MiniLM's shape (`"encoder"`), SmolLM2-135M's (`"causal_lm"`), or tiny ones; a new model at each call."""
    return copy.deepcopy(_first(kind, smoke))


def tokenizer(encoder: bool, size: int = len(VOCABULARY)) -> PreTrainedTokenizerFast:
    """A word, a token; `size` of them."""
    words = (*VOCABULARY, *(f"x{number}" for number in range(size - len(VOCABULARY))))
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if encoder else {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def task(kind: str) -> Task:
    return SequenceClassification(len(LABELS)) if kind == "encoder" else LabelWords(LABELS, TEMPLATE)


def rows(count: int, words: int, shortest: int | None = None, seed: int = 0) -> Dataset:
    """Texts of `words` words (or of `shortest` to `words`), with labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(200, (count, words), generator=generator).tolist()
    lengths = torch.randint(shortest or words, words + 1, (count,), generator=generator).tolist()
    return Dataset.from_list(
        [
            {"text": " ".join(f"w{word}" for word in line[:length]), "label": n % len(LABELS)}
            for n, (line, length) in enumerate(zip(texts, lengths, strict=True))
        ]
    )
