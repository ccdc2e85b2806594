"""A tiny model of each family that people use: what `test_families.py` and `docs/models.md` go through."""

from typing import Any

import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel


SHARED = {
    "vocab_size": len(tiny.VOCABULARY), "pad_token_id": 0, "bos_token_id": tiny.VOCABULARY.index("<bos>"),
    "eos_token_id": tiny.VOCABULARY.index("<eos>"),
}  # fmt: skip
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = SIZES | {"max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MODERN = SIZES | {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}
RELATIVE = ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

# By name: the model type, and what makes it tiny.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", ENCODER),
    "distilbert": ("distilbert", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "roberta": ("roberta", ENCODER),
    "xlm-roberta": ("xlm-roberta", ENCODER),
    "electra": ("electra", ENCODER | {"embedding_size": 16}),
    "albert": ("albert", ENCODER | {"embedding_size": 16}),
    "deberta-v2": ("deberta-v2", RELATIVE),
    "mpnet": ("mpnet", ENCODER),
    "modernbert": ("modernbert", MODERN),
    "modernbert, mean": ("modernbert", MODERN | {"classifier_pooling": "mean"}),
    "eurobert": ("eurobert", GROUPED | {"mask_token_id": 1}),
    "longformer": ("longformer", ENCODER | {"attention_window": 8, "sep_token_id": 3}),
    "funnel": ("funnel", {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT),
    "llama": ("llama", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", WIDE),
    "qwen3-moe": ("qwen3_moe", WIDE | EXPERTS | {"num_experts": 4}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE | {"query_pre_attn_scalar": 8, "sliding_window": 6}),
    "gemma3": ("gemma3_text", WIDE | MIXED | {"query_pre_attn_scalar": 8}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 6}),
    "phi": ("phi", SIZES),
    "phi3": ("phi3", GROUPED),
    "opt": ("opt", ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt-neox": ("gpt_neox", SIZES),
    "gpt-neo": (
        "gpt_neo",
        {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6,
            "max_position_embeddings": 64,
        },
    ),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", SIZES | {"ffn_hidden_size": 48}),
    "stablelm": ("stablelm", GROUPED),
    "olmo2": ("olmo2", GROUPED),
    "cohere": ("cohere", GROUPED),
    "smollm3": ("smollm3", GROUPED | {"no_rope_layers": [1, 0]}),
    "granite": ("granite", GROUPED),
    "deepseek-v3": (
        "deepseek_v3",
        SIZES | EXPERTS | {
            "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 8,
            "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1,
        },
    ),
    "gpt-oss": ("gpt_oss", WIDE | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-next": (
        "qwen3_next", WIDE | LINEAR | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "jamba": (
        "jamba",
        GROUPED | {
            "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2,
            "mamba_d_state": 8, "mamba_dt_rank": 4,
        },
    ),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "recurrent-gemma": (
        "recurrent_gemma",
        SIZES | {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    ),
}  # fmt: skip
# Whose classification heads are tried as well: the others' are the same class in transformers.
DECODER_HEADS = (
    "gpt2",
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "phi3",
    "opt",
    "gpt-neox",
    "bloom",
    "falcon",
    "jamba",
)


def heads(family: str) -> bool:
    return family in ENCODERS


def model(family: str, head: bool, seed: int = 0, attention: str | None = None) -> PreTrainedModel:
    """With weights so large that what goes wrong shows, in evaluation mode."""
    kind, sizes = (ENCODERS | DECODERS)[family]
    auto = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    options = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(seed)
    made = auto.from_config(AutoConfig.for_model(kind, **SHARED, **sizes), dtype=torch.float32, **options)
    with torch.no_grad():
        for module in made.modules():
            for weight in module.parameters(recurse=False):
                if weight.dim() > 1 and not isinstance(module, nn.Conv1d):
                    weight.normal_(std=0.15)
    return made.eval()
