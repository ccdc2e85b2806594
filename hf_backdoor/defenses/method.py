"""How a method is laid out: stages in order, and the controls that its tables need."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..data import Task
from .config import DefenseConfig
from .trainer import DefenseTrainer


@dataclass(frozen=True)
class Step:
    """One stage: who trains what on which rows.

    Models are named by the stage that made them; `"suspect"`, `"base"` (what the suspect was trained from) and `"student"`
    (a smaller model, where the user gives one) are there before the first.

    Args:
        trainer (`type[DefenseTrainer]`): Who trains.
        overrides (`dict[str, Any]`): What it changes in the arguments.
        starts_from (`str`, *optional*): The model it trains: by default the one that the stage before it left.
        inputs (`dict[str, str]`): Further models that the trainer takes, as folders: argument to name.
        rows (`str`, defaults to `"clean"`): What it trains on: the defender's `clean` rows, or the `suspect` rows that
            the suspect was trained on.
        with_clean (`bool`, defaults to `False`): Whether the trainer takes the clean rows beside these, as `clean_dataset`.
        makes_model (`bool`, defaults to `True`): Whether what comes out is a model, which can be measured.
        only_with (`str`, *optional*): An argument of the method; where it is 0 the step is left out. A later step for which it is 0
            takes nothing of what was made.
    """

    trainer: type[DefenseTrainer]
    overrides: dict[str, Any] = field(default_factory=dict)
    starts_from: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    rows: Literal["clean", "suspect"] = "clean"
    with_clean: bool = False
    makes_model: bool = True
    only_with: str | None = None


@dataclass(frozen=True)
class Method:
    """A defense as a recipe runs it.

    Args:
        config (`type[DefenseConfig]`): Arguments of every stage.
        stages (`dict[str, Step]`): By name, in order. The last one that is not left out makes the cleaned model.
        controls (`dict[str, dict[str, Step]]`): By name, the same stages with an ingredient taken out. A control
            trains for as many optimizer steps as the stage it stands in for, on the same clean rows, at its rate. It may
            leave out stages whose models it takes over from the method.
        needs (`str`): In words, what the defender must have.
        images (`bool`, defaults to `False`): Whether it cleans image classifiers too.
        refuse (`Callable`, *optional*): Given the task, raises `ValueError` if the method can't do it.
    """

    config: type[DefenseConfig]
    stages: dict[str, Step]
    controls: dict[str, dict[str, Step]]
    needs: str
    images: bool = False
    refuse: Callable[[Task], None] | None = None

    @property
    def trains_on_suspect_rows(self) -> bool:
        """Whether the defender must hold the rows that the suspect was trained on."""
        return any(step.rows == "suspect" for step in self.stages.values())


def asked_for(
    steps: dict[str, Step], known: dict[str, Step], arguments: Callable[[str, Step], dict[str, Any]]
) -> dict[str, Step]:
    """The steps that are not left out (`Step.only_with`), each with the inputs that its own arguments ask for.

    Args:
        steps (`dict[str, Step]`): Of a method or of a control.
        known (`dict[str, Step]`): All that inputs may come from.
        arguments (`Callable`): A step's name and the step to its arguments.

    Raises:
        `ValueError`: if a step asks for what nothing makes.
    """
    reasons = {name: step.only_with for name, step in known.items() if step.only_with}
    idle = {name for name, reason in reasons.items() if not arguments(name, known[name]).get(reason)}
    kept = {}
    for name, step in steps.items():
        if name in idle:
            continue
        values = arguments(name, step)
        inputs = {
            key: made_by
            for key, made_by in step.inputs.items()
            if made_by not in reasons or values.get(reasons[made_by])
        }
        if missing := [made_by for made_by in inputs.values() if made_by in idle]:
            reason = reasons[missing[0]]
            raise ValueError(
                f"{reason} is {values[reason]} in stage {name}, and 0 in stage {missing[0]}, which makes it: set {reason} for the whole run"
            )
        kept[name] = replace(step, inputs=inputs)
    return kept
