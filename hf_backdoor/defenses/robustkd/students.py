"""A smaller model made of a larger one's layers."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...data import find_blocks
from .features import spread


# Lists of a configuration with a value for each layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_window")
# What is set otherwise in a layer of the same kind: its number, and how it is run.
INCIDENTAL = re.compile("^training$|gradient_checkpointing|layer_(idx|id|number|index)$")


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
    if number != teacher.config.num_hidden_layers:
        raise ValueError(
            f"{type(teacher).__name__} can't be cut: it has num_hidden_layers {teacher.config.num_hidden_layers} in {number} "
            "blocks, which several layers share; pass another student"
        )
    chosen = spread(number, layers) if isinstance(layers, int) and 0 < layers <= number else layers
    if (
        isinstance(chosen, int)
        or not chosen
        or not set(chosen) <= set(range(number))
        or len(set(chosen)) < len(chosen)
    ):
        raise ValueError(
            f"student layers are {layers}: the teacher has {number} blocks, 0 to {number - 1}, name some of them, each once"
        )
    student = type(teacher)(with_layers(teacher.config, list(chosen))).to(teacher.dtype)
    state = cut(teacher.state_dict(), blocks[0].rpartition(".")[0], list(chosen))
    shapes, wanted = ({name: value.shape for name, value in each.items()} for each in (state, student.state_dict()))
    if strange := sorted({name for name, _ in shapes.items() ^ wanted.items()}):
        raise ValueError(
            f"student layers are {list(chosen)}, and the teacher's blocks are not all alike (they differ by {strange[0]}): "
            f"choose layers that begin with 0, for example {sorted({0, *chosen})}"
        )
    student.load_state_dict(state)
    refuse_other_kinds(teacher, student, list(chosen))
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def with_layers(config: PreTrainedConfig, chosen: list[int]) -> PreTrainedConfig:
    """The configuration of a model of these layers: in lists of a value for each layer, theirs.

    Raises:
        `ValueError`: if the configuration fixes the number of layers, or could not be loaded again.
    """
    cut = copy.deepcopy(config)
    lists = {name: value for name, value in vars(config).items() if name in PER_LAYER and isinstance(value, list)}
    try:
        cut.num_hidden_layers = len(chosen)
        for name, value in lists.items():
            setattr(cut, name, [value[layer] for layer in chosen])
        type(cut).from_dict(cut.to_dict())
    except Exception as error:  # configurations check themselves, each in its own way
        why = " ".join(str(error).split())
        raise ValueError(
            f"{type(config).__name__} can't be cut to layers {chosen}: pass another student ({why})"
        ) from None
    return cut


def refuse_other_kinds(teacher: PreTrainedModel, student: PreTrainedModel, chosen: list[int]) -> None:
    """Where a layer's kind follows from its number (every fourth one ...), another number makes another layer of the same weights.

    Raises:
        `ValueError`: if a student's block is set otherwise than the teacher's that it is to be.
    """
    blocks = find_blocks(teacher)
    for new, old in enumerate(chosen):
        its = teacher.get_submodule(blocks[old])
        for name, module in student.get_submodule(blocks[new]).named_modules():
            own, other = settings(module), settings(its.get_submodule(name))
            if differing := sorted(key for key in own if own[key] != other.get(key)):
                raise ValueError(
                    f"student layers are {chosen}, and layer {old} would be of another kind in place {new} ({differing[0]} is "
                    f"{own[differing[0]]}, and {other.get(differing[0])} in the teacher): choose layers that keep their kinds' order, "
                    f"for example {[*range(len(chosen))]}"
                )


def settings(module: nn.Module) -> dict[str, Any]:
    """What a module was made with, [`INCIDENTAL`] aside."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith("_")
        and not INCIDENTAL.search(name)
    }


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
