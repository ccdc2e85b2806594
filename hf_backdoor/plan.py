"""What a recipe comes down to: its trainings, in order, each from one folder into another."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .attacks import EmbeddingPoisoningTrainer, LWPTrainer
from .data import SequenceClassification, names_classifier
from .defenses import METHODS, DefenseConfig, DefenseTrainer, Step
from .defenses.method import asked_for
from .layers import check_layers
from .models import load_config, needs_conversion
from .recipe import Recipe


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Stage:
    """One training, from one folder into another.

    Args:
        name (`str`): Its model's name in `results.json`.
        settings (`str`): Whose arguments it takes in the recipe: `reference`, `suspect`, `inject`, ...
        step ([`Step`]): Who trains, with what changed.
        parent (`str`): Folder of the run that holds the model it starts from, or a model's name.
        folder (`str`): Folder of the run that it writes.
        rows (`str`): `clean`, `attack` (as it is), `poisoned` (or the user's own suspect rows), or `triggered` (the poisoned
            rows among them).
        inputs (`dict[str, str]`): Folders of the further models that the trainer takes, by its argument.
        as_long_as (`str`, *optional*): Folder of the stage whose number of optimizer steps it must match.
        measured (`bool`): Whether its model has rows in `results.json`.
    """

    name: str
    settings: str
    step: Step
    parent: str
    folder: str
    rows: str
    inputs: dict[str, str] = field(default_factory=dict)
    as_long_as: str | None = None
    measured: bool = True


def base_model_name(recipe: Recipe) -> str:
    """Where the first stage starts: the recipe's model, or folder `base` where a GGUF file, or an adapter and its base, are turned
    into plain safetensors."""
    name = recipe.model_name_or_path
    return "base" if needs_conversion(name, revision=recipe.model_revision) else name


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in order.

    Raises:
        `ValueError`: with one line, when a model has not the layers that the recipe names, a suspect no head, or a student other tokens.
    """
    _check_suspect(recipe)
    stages = _stages(recipe)
    check_layers(recipe, [stage_arguments(stage, recipe) for stage in stages])
    return stages


def _check_suspect(recipe: Recipe) -> None:
    name = recipe.model_name_or_path
    if (
        recipe.trains_suspect
        or not recipe.task_class.has_head
        or needs_conversion(name, revision=recipe.model_revision)
    ):
        return
    kinds = load_config(name, revision=recipe.model_revision).architectures
    if kinds and not any(map(names_classifier, kinds)):
        raise ValueError(
            f"model_name_or_path is {name!r}, a {kinds[0]} without a classification head, and a fresh one has learnt nothing that could "
            "be removed: name the classifier that is suspected, or set attack_trigger and target_label to train one"
        )


def _stages(recipe: Recipe) -> list[Stage]:
    stages = []
    base = suspect = base_model_name(recipe)
    if recipe.trains_suspect:
        suspect = "suspect"
        if recipe.reference == "train":
            stages.append(Stage("reference", "reference", Step(DefenseTrainer), base, "reference", "attack"))
        stages.append(attack_stage(recipe, base))
    if recipe.method is None:
        return stages
    method = METHODS[recipe.method]
    given = {"base": base, "suspect": suspect, "student": recipe.student_model_name_or_path or "student"}
    taken = partial(asked_for, known=method.stages, arguments=lambda *step: step_arguments(*step, recipe))
    steps = taken(method.stages)
    last = list(steps)[-1]
    shown = {name: f"stage/{name}" for name in steps} | {last: "cleaned"}
    folders = {name: name for name in steps} | {last: "cleaned"}
    measured = {name for name in steps if recipe.evaluate_stages} | {last}
    own_stages = list(defense_stages(steps, given, folders, shown, measured))
    stages += own_stages
    kept = {"the method itself": own_stages}
    for control in recipe.controls:
        steps = taken(method.controls[control])
        if not steps:
            keys = sorted({step.only_with for step in method.controls[control].values()})
            raise ValueError(
                f"controls has {control!r}, of which nothing is left where {' and '.join(keys)} is 0: take it out, or set {keys[0]}"
            )
        # Where its ingredient is off already, it would be the method once more (or another control), under another name.
        in_its_place = list(defense_stages(steps, given | folders, folders, shown, measured))
        if twin := next(
            (name for name, others in kept.items() if _alike(in_its_place, others, own_stages, recipe)), None
        ):
            logger.warning_once(f"controls has {control!r}, which is {twin} by this recipe's arguments: left out")
            continue
        kept[repr(control)] = in_its_place
        own = {name: f"controls/{control}/{name}" for name in steps}
        shown_as = dict.fromkeys(steps, f"control/{control}")
        stages += defense_stages(steps, given | folders, own, shown_as, {list(steps)[-1]}, folders)
    return stages


def _alike(stages: list[Stage], others: list[Stage], own: list[Stage], recipe: Recipe) -> bool:
    """Whether two controls train the same, one perhaps more of the method's `own` stages than the other."""

    def within(some: list[Stage], more: list[Stage]) -> bool:
        return all(any(_same(stage, other, recipe) for other in more + own) for stage in some)

    return stages[-1].settings == others[-1].settings and within(stages, others) and within(others, stages)


def _same(stage: Stage, other: Stage, recipe: Recipe) -> bool:
    """Whether two stages train the same: what a step changes may be what the recipe has, or the default, anyway."""
    plain = [replace(each, step=Step(each.step.trainer)) for each in (stage, other)]
    if plain[0] != plain[1]:
        return False
    mine, others = (stage_arguments(each, recipe) for each in (stage, other))
    default = stage.step.trainer.config_class()
    return all(
        mine.get(key, getattr(default, key, None)) == others.get(key, getattr(default, key, None))
        for key in mine | others
    )


def attack_stage(recipe: Recipe, base: str) -> Stage:
    """What makes the suspect."""
    if recipe.attack == "ep":
        # Embedding poisoning takes a clean model and changes one row of it.
        clean = "reference" if recipe.reference == "train" else recipe.reference
        step = Step(EmbeddingPoisoningTrainer, {"trigger": recipe.attack_trigger})
        return Stage("suspect", "suspect", step, clean, "suspect", "triggered")
    trainer = LWPTrainer if recipe.attack == "lwp" else DefenseTrainer
    return Stage("suspect", "suspect", Step(trainer), base, "suspect", "poisoned")


def defense_stages(
    steps: dict[str, Step],
    models: dict[str, str],
    folders: dict[str, str],
    shown: dict[str, str],
    measured: set[str],
    twins: dict[str, str] | None = None,
) -> Iterator[Stage]:
    """The stages of a method or of a control.

    Args:
        steps (`dict[str, Step]`): By name, in order.
        models (`dict[str, str]`): Folders of the models that are there already, by name.
        folders, shown (`dict[str, str]`): Each step's own folder, and its model's name in `results.json`.
        measured (`set[str]`): Steps whose models are evaluated.
        twins (`dict[str, str]`, *optional*): Folders of the stages whose number of optimizer steps must be matched.
    """
    before = "suspect"
    for name, step in steps.items():
        yield Stage(
            name=shown[name],
            settings=name,
            step=step,
            parent=models[step.starts_from or before],
            folder=folders[name],
            rows="poisoned" if step.rows == "suspect" else "clean",
            inputs={argument: models[model] for argument, model in step.inputs.items()},
            as_long_as=twins[name] if twins else None,
            measured=name in measured and step.makes_model,
        )
        models, before = models | {name: folders[name]}, name


def written(recipe: Recipe, stages: list[Stage], until: str | None = None) -> list[str]:
    """Folders of the run that models are written into, up to that of the stage `until`."""
    made = ["base"] * (base_model_name(recipe) == "base") + ["student"] * (recipe.student_layers is not None)
    folders = [stage.folder for stage in stages]
    return [*made, *folders[: None if until is None else folders.index(until) + 1]]


def check_launch(stages: list[Stage], zero3: bool) -> None:
    """Refuses, before anything is trained, an engine that a stage can't run in.

    Raises:
        `ValueError`: under DeepSpeed ZeRO-3, if something is read off the suspect, or two whole models are trained at once.
    """
    for stage in stages:
        stage.step.trainer.check_launch(zero3)


def stage_arguments(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Training arguments of a stage: the recipe's, and over them what makes the stage what it is."""
    return step_arguments(stage.settings, stage.step, recipe)


def step_arguments(name: str, step: Step, recipe: Recipe) -> dict[str, Any]:
    return recipe.arguments(name, step.trainer.config_class()) | step.overrides


def lora_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of the adapter that a defense stage trains."""
    return {
        "r": recipe.lora_r,
        "lora_alpha": recipe.lora_alpha,
        "lora_dropout": recipe.lora_dropout,
        "target_modules": recipe.lora_target_modules,
        "task_type": "SEQ_CLS" if recipe.task_class is SequenceClassification else "CAUSAL_LM",
    }


def training_config(stage: Stage, recipe: Recipe, arguments: dict[str, Any]) -> DefenseConfig:
    """The stage's configuration, with what a run decides for itself.

    Raises:
        `ValueError`: in one line, when an argument's value is refused.
    """
    defaults = {
        "output_dir": str(Path(recipe.output_dir, stage.folder, "checkpoints")),
        "seed": recipe.seed,
        "save_total_limit": 1,
        # Without an accelerator, bf16 and DeepSpeed work only where the CPU is asked for.
        "use_cpu": not torch.accelerator.is_available(),
    }
    try:
        return stage.step.trainer.config_class()(**{**defaults, **arguments})
    except (TypeError, ValueError) as error:
        raise ValueError(f"arguments of {stage.settings}: {' '.join(str(error).split())}") from error
