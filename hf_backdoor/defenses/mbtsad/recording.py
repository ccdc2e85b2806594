"""Recording queries and keys while a fast attention function computes the output.

For the time of a `with` block the model's attention function (`sdpa`, `flash_attention_2`, `flex_attention`) is
wrapped in transformers' `AttentionInterface`, under its own name. So neither the model nor its configuration changes,
masks are made as ever, and nothing can be left behind in a saved model. A forward pass that non-reentrant activation
checkpointing repeats in the backward pass runs outside of the block and is not recorded again.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface, PreTrainedModel

from .losses import valid_entries


# What changes the scores beyond queries, keys and a mask: the arguments by which transformers passes it.
UNSUPPORTED = {
    "softcap": "caps its attention scores (softcap)",
    "s_aux": "has attention sinks (s_aux)",
    "position_bias": "adds a position bias to its attention scores",
    "cu_seq_lens_q": "packs several samples in one row (cu_seq_lens_q)",
}


@dataclass
class RecordedAttention:
    """What the attention map of one layer is made of: softmax(scaling * query @ key^T) over the keys in reach.

    Args:
        query (`Tensor`): [B, H, T, d], after the rotary embedding.
        key (`Tensor`): [B, H / G, T, d]; each key head serves G query heads.
        scaling (`float`): Of the scores.
        causal (`bool`): Whether a query sees no later keys.
        sliding_window (`int`, *optional*): A query sees its own position and `sliding_window - 1` before it (and as
            many behind it if not causal).
    """

    query: Tensor
    key: Tensor
    scaling: float
    causal: bool
    sliding_window: int | None = None

    @property
    def reach(self) -> tuple[int, int]:
        """How many positions back and ahead of its own a query sees."""
        back = self.query.shape[2] if self.sliding_window is None else self.sliding_window - 1
        return back, 0 if self.causal else back


@contextmanager
def record_attention(
    model: PreTrainedModel,
    layers: Sequence[int] | None = None,
    compare_mask: Tensor | None = None,
) -> Iterator[list[RecordedAttention]]:
    """Records queries and keys of the one forward pass that runs in the block.

    ```python
    with record_attention(model, layers=[-2, -1]) as record:
        outputs = wrapped_model(**batch)
    ```

    Args:
        model (`PreTrainedModel`): The model itself, without DDP or FSDP around it (an adapter may be).
        layers (`Sequence[int]`, *optional*): Numbers of the layers to keep; negative ones count from the end. All by
            default.
        compare_mask (`Tensor`, *optional*): [B, T], the batch's attention mask. If given, the masks that the model
            makes have to equal what padding, causality and sliding window say. It takes a look at B * T^2 entries, so
            do it on a first batch.

    Yields:
        `list[RecordedAttention]`: Filled as layers run, in their order.

    Raises:
        `ValueError`: if the model's attention can't be recorded, or its maps are not made of q, k and a plain mask.
    """
    name = model.config.get_text_config()._attn_implementation
    attention = attention_function(model)
    wanted, calling = attention_layers(model, layers), layers_with_attention(model)
    record: list[RecordedAttention] = []
    calls = 0

    def recorded_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal calls
        if calls < len(calling) and calling[calls] in wanted:
            layer = _recorded(module, query, key, kwargs)
            if compare_mask is not None:
                _compare(layer, attention_mask, compare_mask, module, flash="flash" in name)
            record.append(layer)
        calls += 1
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    AttentionInterface.register(name, recorded_attention)
    try:
        yield record
    finally:
        AttentionInterface.register(name, attention)
    if calls != len(calling):
        raise ValueError(
            f"{type(model).__name__} called its attention function {calls} times in {len(calling)} layers, so queries and keys "
            "can't be told by layer: run one forward pass, and set attention_backend='eager' if that is what ran"
        )


def attention_function(model: PreTrainedModel) -> Callable:
    """What a model computes its attention with.

    Raises:
        `ValueError`: if that gives no queries and keys.
    """
    name = model.config.get_text_config()._attn_implementation
    attention = AttentionInterface().get(name)
    # A class may say nothing of it (`_supports_attention_backend`) and go by the interface (Jamba).
    files = [sys.modules[each.__module__] for each in type(model).__mro__ if ".models." in each.__module__]
    if files and not any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files):
        raise ValueError(
            f"{type(model).__name__} computes its attention by itself, which gives no queries and keys: load it with "
            "attn_implementation='eager' and set attention_backend='eager', or set attention_weight: 0"
        )
    if attention is None:
        raise ValueError(
            f"attn_implementation is {name!r}, which gives no queries and keys: load the model with "
            "attn_implementation='sdpa', or set attention_backend='eager'"
        )
    return attention


def layers_with_attention(model: PreTrainedModel) -> list[int]:
    """Numbers of the layers that have attention maps; hybrid models have others between them (state spaces, convolutions)."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    return [number for number, kind in enumerate(kinds) if "attention" in kind and "linear" not in kind]


def attention_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> list[int]:
    """Numbers of the layers whose maps are compared, from 0: by default all that have one.

    Raises:
        `ValueError`: if one has none, or there is no such layer.
    """
    able, depth = layers_with_attention(model), model.config.get_text_config().num_hidden_layers
    if not able:
        raise ValueError(f"{type(model).__name__} has no attention: set attention_weight: 0")
    chosen = chosen_layers(able if layers is None else layers, depth)
    if unable := sorted({*chosen} - {*able}):
        raise ValueError(
            f"attention_layers is {list(layers)}, and layer {unable[0]} of {type(model).__name__} has no attention: name some of "
            f"{able}"
        )
    return chosen


def chosen_layers(layers: Sequence[int] | None, depth: int, argument: str = "attention_layers") -> list[int]:
    """Layer numbers from 0, in order, of a model with `depth` layers; `argument` is what they were given as.

    Raises:
        `ValueError`: if one lies outside, or there is none.
    """
    layers = range(depth) if layers is None else layers
    outside = [number for number in layers if not -depth <= number < depth]
    if outside or not layers:
        raise ValueError(
            f"{argument} is {list(layers)}, and the model has {depth}: name at least one from {-depth} to {depth - 1}"
        )
    return sorted({number % depth for number in layers})


def _recorded(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> RecordedAttention:
    name = type(module).__name__
    for option, what in UNSUPPORTED.items():
        if options.get(option) is not None:
            raise ValueError(f"{name} {what}: set attention_backend='eager'")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{name} has {query.shape[2]} queries and {key.shape[2]} keys: pass neither past_key_values nor a static cache"
        )
    causal, scaling = options.get("is_causal"), options.get("scaling")
    return RecordedAttention(
        query=query,
        key=key,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=getattr(module, "is_causal", True) if causal is None else causal,
        sliding_window=options.get("sliding_window"),
    )


@torch.no_grad()
def _compare(layer: RecordedAttention, made: Any, attention_mask: Tensor, module: nn.Module, flash: bool) -> None:
    """Raises if the mask that the model made is another than the one that the loss is going to assume."""
    batch, _, length, _ = layer.query.shape
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, and attention runs on {(batch, length)}: pass one "
            "value for each token"
        )
    real = attention_mask.bool()
    if made is not None and not isinstance(made, Tensor):
        # flex_attention's BlockMask: its rule gives the mask itself.
        made = create_mask(made.mask_mod, batch, None, length, length, device=str(real.device))
    if flash:
        # Padding is all it is given; the rest it makes from the same is_causal and sliding_window.
        equal = bool(real.all()) if made is None else torch.equal(made.bool(), real)
    elif made is None:
        equal = bool(real.all()) and layer.reach[0] >= length - 1
    else:
        seen = made if made.dtype == torch.bool else made == 0
        expected = valid_entries(real, layer.causal, layer.sliding_window)[:, None]
        equal = bool(((seen[..., :length] == expected) | ~real[:, None, :, None]).all())
    if not equal:
        raise ValueError(
            f"{type(module).__name__} masks its attention by more than padding, causality and a sliding window (packed "
            "samples, chunks?): set attention_backend='eager'"
        )
