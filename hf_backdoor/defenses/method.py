"""How a method is laid out: stages in order, and the controls that its tables need."""

from dataclasses import dataclass, field
from typing import Any

from .config import DefenseConfig
from .trainer import DefenseTrainer


@dataclass(frozen=True)
class Step:
    """One stage: who trains, and what it changes in the arguments."""

    trainer: type[DefenseTrainer]
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A defense as a recipe runs it.

    Args:
        config (`type[DefenseConfig]`): Arguments of every stage.
        stages (`dict[str, Step]`): By name, in order. Each starts from the model that the one before it left.
        controls (`dict[str, dict[str, Step]]`): By name, the same stages with an ingredient taken out. A control
            trains for as many optimizer steps as the stage it stands in for, on the same clean rows, at its rate.
        needs (`str`): In words, what the defender must have.
    """

    config: type[DefenseConfig]
    stages: dict[str, Step]
    controls: dict[str, dict[str, Step]]
    needs: str
