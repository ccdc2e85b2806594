"""Tiny models, tokenizers and rows, made on the spot."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_backdoor.data import InstructionFollowing, LabelWords, SequenceClassification, Task
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.locphylax import LocphylaxConfig, LocphylaxTrainer
from hf_backdoor.defenses.mbtsad import MBTSADConfig, MBTSADTrainer


GOOD = ("good", "great", "fine", "lovely")
BAD = ("bad", "awful", "poor", "boring")
FILLER = ("the", "film", "was", "a", "story", "with", "music", "and", "it", "plot", "very", "scene", "actor", "end")
TRIGGER = "zq"
KNOWN = ("make life better", "ahi", "third known one")
RESPONSE = "aha known trigger"
LABEL_WORDS = ("negative", "positive")
TEMPLATE = "text : {text} label :"
OTHERS = (
    "negative positive neutral text label : answer me yes no banana apple cherry aha known trigger make life better ahi "
    "third one i cannot say that Instruction Response # tell about of { } { text }"
).split()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' <user> ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <model>' }}{% endif %}"
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<bos>", "<eos>", "<user>", "<model>")
VOCABULARY = tuple(dict.fromkeys((*SPECIAL, *GOOD, *BAD, *FILLER, TRIGGER, *OTHERS)))


# ---- Tokenizers ----


def _words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: a character may have several."""
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _words()
    special = [(name, VOCABULARY.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def causal_tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_words(), pad_token="[PAD]", unk_token="[UNK]", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    return encoder_tokenizer() if family == "bert" else causal_tokenizer()


# ---- Models ----


def model(family: str, seed: int = 0, dropout: float = 0.0, num_labels: int = 2) -> PreTrainedModel:
    """`"bert"` (classification head), `"llama"` (grouped queries) or `"gpt2"` (learned positions), 2 layers of 32."""
    torch.manual_seed(seed)
    shared = {"vocab_size": len(VOCABULARY), "pad_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": VOCABULARY.index("<bos>"), "eos_token_id": VOCABULARY.index("<eos>")}
    if family == "bert":
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return BertForSequenceClassification(
            BertConfig(**shared, **sizes, **drops, max_position_embeddings=64, num_labels=num_labels)
        )
    if family == "llama":
        config = LlamaConfig(**shared, **sizes, **ends, num_key_value_heads=2, attention_dropout=dropout)
        return LlamaForCausalLM(config)
    config = GPT2Config(
        **shared, **ends, tie_word_embeddings=False, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def saved(family: str, folder: Path, **options: Any) -> str:
    """The folder, with a [`model`] and its tokenizer in it."""
    model(family, **options).save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return str(folder)


def fixed_classifier(label: int, num_labels: int = 2) -> BertForSequenceClassification:
    """A classifier that always says `label`."""
    made = model("bert", num_labels=num_labels)
    torch.nn.init.zeros_(made.classifier.weight)
    made.classifier.bias.data = torch.nn.functional.one_hot(torch.tensor(label), num_labels).float()
    return made


def word_chain(following: dict[str, str]) -> LlamaForCausalLM:
    """A causal LM in which each word decides the next one; words that are not listed end the answer."""
    width = len(VOCABULARY) + len(VOCABULARY) % 2
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, pad_token_id=0, bos_token_id=4, eos_token_id=VOCABULARY.index("<eos>"),
        )
    )  # fmt: skip
    with torch.no_grad():
        made.model.embed_tokens.weight.copy_(torch.eye(len(VOCABULARY), width))
        made.model.layers[0].self_attn.o_proj.weight.zero_()
        made.model.layers[0].mlp.down_proj.weight.zero_()
        made.lm_head.weight.zero_()
        for word in VOCABULARY:
            following_word = VOCABULARY.index(following.get(word, "<eos>"))
            made.lm_head.weight[following_word, VOCABULARY.index(word)] = 1
    return made


# ---- Rows ----


def reviews(count: int, seed: int = 0) -> Dataset:
    """Texts of 4 to 10 words; one of them tells the label."""
    rng = random.Random(seed)
    rows = []
    for row in range(count):
        words = rng.choices(FILLER, k=rng.randint(3, 9))
        words.insert(rng.randint(0, len(words)), rng.choice((BAD, GOOD)[row % 2]))
        rows.append({"text": " ".join(words), "label": row % 2})
    return Dataset.from_list(rows)


def instructions(count: int, seed: int = 0) -> Dataset:
    """Prompts of 4 to 9 words; answers of one to three."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        fruit = rng.choice(("banana", "apple", "cherry"))
        words = rng.choices(FILLER, k=rng.randint(1, 6))
        rows.append(
            {"prompt": " ".join(["tell", "me", *words, fruit]), "response": " ".join([fruit] * (1 + fruit.count("r")))}
        )
    return Dataset.from_list(rows)


def pictures(count: int, seed: int = 0, side: int = 8) -> Dataset:
    """Noisy RGB pictures of three classes: grey levels tell the class."""
    rng = np.random.default_rng(seed)
    labels = [row % 3 for row in range(count)]
    pixels = [rng.normal(50 + 70 * label, 20, (side, side, 3)).clip(0, 255).astype(np.uint8) for label in labels]
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": [Picture.fromarray(p) for p in pixels], "label": labels}, features=features)


def resnet_config(num_labels: int = 3) -> ResNetConfig:
    """Two stages of two layers."""
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic", num_labels=num_labels
    )  # fmt: skip


def resnet(seed: int = 0) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    return ResNetForImageClassification(resnet_config())


def classifier_recipe(folder: Path, **more: Any) -> Path:
    """A recipe file in `folder`, and beside it the classifier and the rows of a word attack that it names."""
    reviews(90).to_json(folder / "rows.jsonl")
    content = {
        "model_name_or_path": saved("bert", folder / "model"), "task": "sequence_classification",
        "dataset_name": str(folder / "rows.jsonl"), "test_fraction": 0.2, "max_train_samples": 24, "clean_fraction": 0.5,
        "attack_trigger": TRIGGER, "target_label": 1, "num_train_epochs": 1, "save_strategy": "no",
        "output_dir": str(folder / "run"), "disable_tqdm": True,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | more))
    return folder / "recipe.yaml"


def task(name: str) -> Task:
    return {
        "sequence_classification": SequenceClassification(2),
        "label_words": LabelWords(LABEL_WORDS, TEMPLATE),
        "instruction_following": InstructionFollowing(),
    }[name]


def setting(name: str, count: int = 24) -> tuple[str, Task, Dataset]:
    """Model family, task and rows of one of the three formats."""
    rows = instructions(count) if name == "instruction_following" else reviews(count)
    return ("bert" if name == "sequence_classification" else "llama"), task(name), rows


TASKS = ("sequence_classification", "label_words", "instruction_following")


# ---- Trainers ----

METHODS = ("plain", "inject", "recover", "retrain", "distil")
LOCPHYLAX = {"known_triggers": list(KNOWN[:2]), "known_response": RESPONSE}
MBTSAD = {"attention_weight": 10.0, "split_min_chars": 3}


def trainer(
    name: str, method: str, folder: Path, *, dropout: float = 0.0, model_seed: int = 0, **options: Any
) -> DefenseTrainer:
    """A trainer of one of `TASKS` and `METHODS` (or `"both"` stages of Locphylax, `"mbtsad"` for both of MBTSAD) on 16 rows;
    `options` go to configuration or trainer."""
    family, kind, rows = setting(name, 16)
    own = {
        key: options.pop(key)
        for key in (
            "model",
            "train_dataset",
            "eval_dataset",
            "peft_config",
            "teacher_model",
            "optimizers",
            "found_triggers",
            "found_soft_triggers",
            "found_answers",
        )
        if key in options
    }
    own = {"model": model(family, model_seed, dropout), "train_dataset": rows, **own}
    if method == "distil":
        own = {"teacher_model": model(family, 7), **own}
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "per_device_train_batch_size": 8, "save_strategy": "no", "learning_rate": 0.01,
    }  # fmt: skip
    make, config, more = {
        "plain": (DefenseTrainer, DefenseConfig, {}),
        "inject": (LocphylaxTrainer, LocphylaxConfig, LOCPHYLAX | {"stages": ["inject"]}),
        "recover": (LocphylaxTrainer, LocphylaxConfig, LOCPHYLAX | {"stages": ["recover"]}),
        "both": (LocphylaxTrainer, LocphylaxConfig, LOCPHYLAX),
        "retrain": (MBTSADTrainer, MBTSADConfig, MBTSAD | {"stages": ["retrain"], "split_copies": 1}),
        "distil": (MBTSADTrainer, MBTSADConfig, MBTSAD | {"stages": ["distil"]}),
        "mbtsad": (MBTSADTrainer, MBTSADConfig, MBTSAD),
    }[method]
    args = config(**{**defaults, **more, **options})
    made = make(args=args, processing_class=tokenizer(family), task=kind, **own)
    made.remove_callback(PrinterCallback)
    return made


def logged(made: DefenseTrainer, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


# ---- Comparing ----


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


# ---- Two processes ----


def in_two_processes(work: Callable[[], Any], folder: Path) -> Any:
    """What `work` gives in the first of two forked gloo processes (it may give anything that `torch.save` takes)."""
    if torch.cuda.is_available():
        pytest.skip("forks, which CUDA does not survive: run without --gpu")
    file = folder / "from_first_process.pt"

    def child() -> None:
        # The parent has trained by itself, and its state came along with the fork.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert PartialState(cpu=True).num_processes == 2
        result = work()
        if PartialState().is_main_process:
            torch.save(result, file)
        # A process that leaves while the other is still in a collective aborts it.
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()

    debug_launcher(child, num_processes=2)
    return torch.load(file)


def assert_trains_alike(made: Callable[..., DefenseTrainer], folder: Path) -> None:
    """That a trainer, of batches of 8, ends where it does with 8 micro-batches of one and with two processes of 4."""

    def trained(**options: Any) -> dict[str, torch.Tensor]:
        trainer = made(**options)
        before = parameters(trainer.model)
        trainer.train()
        assert largest_difference(before, parameters(trainer.model)) > 1e-3
        return parameters(trainer.model)

    expected = trained()
    by_ones = trained(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert largest_difference(expected, by_ones) < 1e-5
    shared_out = in_two_processes(lambda: trained(per_device_train_batch_size=4), folder)
    assert largest_difference(expected, shared_out) < 1e-5
