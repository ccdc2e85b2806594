"""What a recipe comes down to: its trainings, in order, each from one folder into another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .defenses import METHODS, DefenseConfig, DefenseTrainer, Step
from .models import resolve
from .recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One training, from one folder into another.

    Args:
        name (`str`): Its model's name in `results.json`.
        settings (`str`): Whose arguments it takes in the recipe: `reference`, `suspect`, `inject`, ...
        step ([`Step`]): Who trains, with what changed.
        parent (`str`): Folder of the run that holds the model it starts from, or a model's name.
        folder (`str`): Folder of the run that it writes.
        rows (`str`): `clean`, `attack` (as it is) or `poisoned`.
        as_long_as (`str`, *optional*): Folder of the stage whose number of optimizer steps it must match.
        measured (`bool`): Whether its model has rows in `results.json`.
    """

    name: str
    settings: str
    step: Step
    parent: str
    folder: str
    rows: str
    as_long_as: str | None = None
    measured: bool = True


def base_model_name(recipe: Recipe) -> str:
    """Where the first stage starts: the recipe's model, or folder `base` where a GGUF file is turned into safetensors."""
    return "base" if resolve(recipe.model_name_or_path)[1] else recipe.model_name_or_path


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in order."""
    stages = []
    base = suspect = base_model_name(recipe)
    if recipe.attack_trigger is not None:
        suspect = "suspect"
        if recipe.reference == "train":
            stages.append(Stage("reference", "reference", Step(DefenseTrainer), base, "reference", "attack"))
        stages.append(Stage("suspect", "suspect", Step(DefenseTrainer), base, "suspect", "poisoned"))
    if recipe.method is None:
        return stages
    method = METHODS[recipe.method]
    last = list(method.stages)[-1]
    parent = suspect
    for name, step in method.stages.items():
        folder = "cleaned" if name == last else name
        shown = "cleaned" if name == last else f"stage/{name}"
        stages.append(
            Stage(shown, name, step, parent, folder, "clean", measured=name == last or recipe.evaluate_stages)
        )
        parent = folder
    for control in recipe.controls:
        parent = suspect
        for name, step in method.controls[control].items():
            folder = f"controls/{control}/{name}"
            twin = "cleaned" if name == last else name
            stages.append(
                Stage(
                    f"control/{control}", name, step, parent, folder, "clean", as_long_as=twin, measured=name == last
                )
            )
            parent = folder
    return stages


def stage_arguments(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Training arguments of a stage: the recipe's, and over them what makes the stage what it is."""
    return recipe.arguments(stage.settings, stage.step.trainer.config_class()) | stage.step.overrides


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
