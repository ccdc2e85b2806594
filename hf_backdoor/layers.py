"""What a recipe says of its models, their layers and modules, checked on configurations and tokenizers alone: a training of
hours must not end in one that is not there."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from .data import ImageClassification, Task
from .defenses.robustkd.students import layers_of_stages
from .models import check_head, load_config, load_tokenizer
from .recipe import Recipe


# Arguments that name layers by their numbers, and whose layers these are.
OF_THE_SUSPECT = ("mask_layers", "teacher_feature_layers", "attention_layers", "hidden_layers")
OF_THE_STUDENT = ("student_feature_layers",)


def check_layers(recipe: Recipe, arguments: Iterable[dict[str, Any]]) -> None:
    """Refuses layers and modules that the suspect or the student does not have, a student that reads other tokens or can't
    read soft triggers, and a reference that is not there.

    Args:
        recipe ([`Recipe`]): Its models are looked up, on disk or on the Hub; no weights are loaded.
        arguments (`Iterable[dict]`): Training arguments of each stage.

    Raises:
        `ValueError`: with one line that names the key, the value and what there is.
    """
    if recipe.reference not in (None, "train", "base"):
        load_config(recipe.reference)
    if recipe.use_peft:
        check_modules(recipe)
    every = [(key, value) for values in arguments for key, value in values.items() if value]
    for layers in [value for key, value in every if key == "feature_layers"]:
        check_states(recipe, layers)
    given = [(key, layers) for key, layers in every if key in OF_THE_SUSPECT + OF_THE_STUDENT]
    if not given and recipe.student_layers is None and recipe.student_model_name_or_path is None:
        return
    suspect = depth_of(recipe.model_name_or_path, recipe.model_revision)
    student = suspect
    if recipe.student_layers is not None:
        depths = getattr(load_config(recipe.model_name_or_path, revision=recipe.model_revision), "depths", None)
        if depths:
            layers_of_stages(depths, recipe.student_layers)
        else:
            student = count_student_layers(recipe.student_layers, suspect)
    elif recipe.student_model_name_or_path is not None:
        student = depth_of(recipe.student_model_name_or_path)
        if recipe.task_class is not ImageClassification:
            check_vocabulary(recipe)
        if any(key == "soft_triggers" for key, _ in every):
            check_widths(recipe)
    for key, layers in given:
        whose, depth = ("student", student) if key in OF_THE_STUDENT else ("suspect", suspect)
        numbers = [int(layer) for layer in map(str, layers) if layer.removeprefix("-").isdigit()]
        if depth is not None and any(not -depth <= number < depth for number in numbers):
            raise ValueError(f"{key} is {layers}: the {whose} has layers 0 to {depth - 1} (or -{depth} to -1)")


def check_heads(recipe: Recipe, task: Task) -> None:
    """Looks at every model that the recipe names, once its rows have said how many labels there are.

    Raises:
        `ValueError`: if one has a head of another size, or sees the answer that it is to give.
    """
    named = {recipe.student_model_name_or_path, recipe.reference} - {None, "train", "base"}
    for name, revision in (
        (recipe.model_name_or_path, recipe.model_revision),
        *((each, None) for each in sorted(named)),
    ):
        check_head(name, recipe.task_class, getattr(task, "num_labels", None), revision)


def check_states(recipe: Recipe, layers: list[int]) -> None:
    """Hidden states are those of the embeddings and of each layer.

    Raises:
        `ValueError`: if one is not there.
    """
    depth = depth_of(recipe.model_name_or_path, recipe.model_revision)
    if depth is not None and any(not -depth - 1 <= layer <= depth for layer in layers):
        raise ValueError(
            f"feature_layers is {layers}: the model gives hidden states 0 to {depth} (or -{depth + 1} to -1)"
        )


def check_modules(recipe: Recipe) -> None:
    """peft passes over names that no module has, as long as one of them fits.

    Raises:
        `ValueError`: if no module of the suspect has such a name.
    """
    if isinstance(recipe.lora_target_modules, str):
        return
    with torch.device("meta"):
        config = load_config(recipe.model_name_or_path, revision=recipe.model_revision)
        model = recipe.task_class.auto_model.from_config(config)
    for wanted in recipe.lora_target_modules:
        if not any(f".{name}".endswith(f".{wanted}") for name, _ in model.named_modules()):
            linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
            usual = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ValueError(f"lora_target_modules has {wanted!r}: the model has {usual}; or use all-linear")


def depth_of(name_or_path: str, revision: str | None = None) -> int | None:
    """Layers of a model (stages of one that has stages), where its configuration says so."""
    config = load_config(name_or_path, revision=revision).get_text_config()
    return len(config.depths) if getattr(config, "depths", None) else getattr(config, "num_hidden_layers", None)


def count_student_layers(layers: int | list[int], depth: int | None) -> int:
    """Layers of a student that is made of the suspect's.

    Raises:
        `ValueError`: if the suspect has no such layers.
    """
    chosen = range(layers) if isinstance(layers, int) else layers
    strange = depth is not None and not set(chosen) <= set(range(depth))
    if not chosen or strange or len(set(chosen)) < len(chosen):
        there = f"1 to {depth}, or the numbers of some from 0 to {depth - 1}, each once" if depth else "1 or more"
        raise ValueError(f"student_layers is {layers}, and the suspect has {depth} layers: choose {there}")
    return len(chosen)


def check_vocabulary(recipe: Recipe) -> None:
    """A student reads the suspect's tokens: each must have the same number in its own tokenizer.

    Raises:
        `ValueError`: if one has another.
    """
    words = load_tokenizer(recipe.model_name_or_path, revision=recipe.model_revision).get_vocab()
    own = load_tokenizer(recipe.student_model_name_or_path).get_vocab()
    different = sum(own.get(word) != number for word, number in words.items())
    if different:
        raise ValueError(
            f"student_model_name_or_path is {recipe.student_model_name_or_path!r}, whose tokenizer has {different} of the suspect's "
            f"{len(words)} tokens under another number or not at all: choose a student with the suspect's tokenizer"
        )


def check_widths(recipe: Recipe) -> None:
    """Soft triggers are embeddings of the suspect.

    Raises:
        `ValueError`: if the student's are of another width.
    """
    suspect = load_config(recipe.model_name_or_path, revision=recipe.model_revision).get_text_config().hidden_size
    student = load_config(recipe.student_model_name_or_path).get_text_config().hidden_size
    if suspect != student:
        raise ValueError(
            f"soft_triggers is set, and they are embeddings of {suspect} numbers, as the suspect's; those of "
            f"student_model_name_or_path {recipe.student_model_name_or_path!r} have {student}: set soft_triggers: 0, or student_layers"
        )
