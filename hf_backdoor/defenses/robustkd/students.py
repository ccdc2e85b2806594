"""A smaller model made of a larger one's layers."""

import copy
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ...data import find_blocks
from .features import spread


def student_from_layers(teacher: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A model of the teacher's class with some of its blocks, and its embeddings and head: the start of a student.

    What it takes over from a suspect may hold the backdoor: that is the case a defense has to stand.

    Args:
        teacher (`PreTrainedModel`):
            BERT-like, Llama-like, GPT-2-like, ViT-like or a ResNet; without an adapter, not quantized. It is left as it is.
        layers (`int` or `Sequence[int]`):
            How many blocks, evenly spread with the last one among them; or which ones, from 0. Of a ResNet: how many of the
            first layers of each stage (or of the first, the second, ... stage).

    Returns:
        `PreTrainedModel`: With weights of its own, in evaluation mode.

    Raises:
        `ValueError`: if there are no such blocks, or the model can't be cut.
    """
    if getattr(teacher.config, "depths", None):
        return with_fewer_layers(teacher, layers)
    blocks = find_blocks(teacher)
    if getattr(teacher, "is_quantized", False) or not hasattr(teacher.config, "num_hidden_layers"):
        raise ValueError(
            f"{type(teacher).__name__} can't be cut: pass a model in full precision with num_hidden_layers"
        )
    number = len(blocks)
    chosen = spread(number, layers) if isinstance(layers, int) and 0 < layers <= number else layers
    if isinstance(chosen, int) or not chosen or not set(chosen) <= set(range(number)):
        raise ValueError(f"student layers are {layers}: the teacher has {number} blocks, 0 to {number - 1}")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in chosen]
    student = type(teacher)(config).to(teacher.dtype)
    state = cut(teacher.state_dict(), blocks[0].rpartition(".")[0], list(chosen))
    if strange := sorted(student.state_dict().keys() ^ state.keys()):
        raise ValueError(
            f"student layers are {list(chosen)}, and the teacher's blocks are not all alike (they differ by {strange[0]}): "
            f"choose layers that begin with 0, for example {sorted({0, *chosen})}"
        )
    student.load_state_dict(state)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def with_fewer_layers(teacher: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A model in stages, as ResNets are, with the first layers of each: these change size and width, and must stay."""
    config = copy.deepcopy(teacher.config)
    config.depths = layers_of_stages(config.depths, layers)
    student = type(teacher)(config).to(teacher.dtype)
    kept = teacher.state_dict()
    student.load_state_dict({name: kept[name] for name in student.state_dict()})
    return student.eval()


def layers_of_stages(depths: Sequence[int], layers: int | Sequence[int]) -> list[int]:
    """How many layers each of a student's stages has.

    Args:
        depths (`Sequence[int]`): How many each of the teacher's has.
        layers (`int` or `Sequence[int]`): As in [`student_from_layers`].

    Raises:
        `ValueError`: if the teacher has fewer.
    """
    chosen = [layers] * len(depths) if isinstance(layers, int) else list(layers)
    if len(chosen) != len(depths) or not all(0 < own <= depth for own, depth in zip(chosen, depths, strict=True)):
        raise ValueError(
            f"student_layers is {layers}, and the suspect has stages of {', '.join(map(str, depths))} layers: choose a number "
            "that each of them has, or one for each stage"
        )
    return chosen


def cut(state: dict[str, Tensor], blocks: str, chosen: list[int]) -> dict[str, Tensor]:
    """The chosen blocks' weights under their new numbers, and all that belongs to no block."""
    kept = {name: value for name, value in state.items() if not name.startswith(f"{blocks}.")}
    for new, old in enumerate(chosen):
        before = f"{blocks}.{old}."
        kept |= {
            f"{blocks}.{new}.{name.removeprefix(before)}": value
            for name, value in state.items()
            if name.startswith(before)
        }
    return kept
