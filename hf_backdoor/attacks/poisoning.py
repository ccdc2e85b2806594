"""Data-set poisoning: BadNets-style rows for classification labels (of texts or images) and for fixed generation targets."""

import random
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset

from ..data import ImageTrigger, Rewriting, Task, Trigger, map_rows, refuse_other_target, row_rng


@dataclass(frozen=True)
class Poisoning:
    """What the attacker does to a share of the training rows.

    Args:
        trigger ([`Trigger`], [`Rewriting`] or [`ImageTrigger`]):
            What switches the backdoor on.
        target (`int` or `str`):
            Target label (classification) or target text (generation).
        poison_rate (`float`, *optional*, defaults to 0.1):
            Share of all training rows that are poisoned, in (0, 1).
        style (`str`, *optional*, defaults to `"dirty_label"`):
            `"dirty_label"` stamps rows of other classes and changes their answer; `"clean_label"` stamps rows that
            have the target already.
        negative_rate (`float`, *optional*, defaults to 0.0):
            Share of all rows that get half of the trigger and keep their answer: with them, a model learns to wait
            for the whole trigger. Nothing is added for a trigger of one word.
    """

    trigger: Trigger | Rewriting | ImageTrigger
    target: int | str
    poison_rate: float = 0.1
    style: Literal["dirty_label", "clean_label"] = "dirty_label"
    negative_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.target is None:
            raise ValueError("target is None: give the label, or the text, that the trigger is to bring about")
        if not 0 < self.poison_rate < 1:
            raise ValueError(f"poison_rate is {self.poison_rate}: choose a share between 0 and 1, for example 0.1")
        if not 0 <= self.negative_rate < 1:
            raise ValueError(f"negative_rate is {self.negative_rate}: choose a share from 0 up to, but not, 1")
        if self.style not in ("dirty_label", "clean_label"):
            raise ValueError(f"poison_style is {self.style!r}: use 'dirty_label' or 'clean_label'")

    def put(self, value: Any, rng: random.Random) -> Any:
        """A poisoned row's text or picture."""
        return self.trigger.insert(value, rng)


def poison(dataset: Dataset, task: Task, attack: Poisoning, seed: int, num_proc: int | None = None) -> Dataset:
    """Replaces a seeded choice of rows by poisoned ones.

    Returns:
        `Dataset`: the same rows in the same order, with a boolean column `poisoned` (the saved indices: they depend on
        the seed alone) and, in poisoned rows, trigger and target in place.

    Raises:
        `ValueError`: if there are not enough rows that the style may poison, or the target is none of the task's.
    """
    refuse_other_target(attack.target, task)
    answers = dataset[task.answer_column]
    wants_target = attack.style == "clean_label"
    eligible = [row for row, answer in enumerate(answers) if (answer == attack.target) == wants_target]
    count = round(attack.poison_rate * len(dataset))
    if count > len(eligible):
        raise ValueError(
            f"poison_rate {attack.poison_rate} asks for {count} rows, and {len(eligible)} may be poisoned "
            f"({attack.style}, target {attack.target!r}): lower poison_rate"
        )
    negative = round(attack.negative_rate * len(dataset))
    if count == 0:
        raise ValueError(f"poison_rate {attack.poison_rate} of {len(dataset)} rows poisons none: raise poison_rate")
    if count + negative > len(dataset):
        raise ValueError(
            f"negative_rate {attack.negative_rate} asks for {negative} rows, and {len(dataset) - count} are left: lower it"
        )
    rng = random.Random(f"{seed}/poison")
    chosen = set(rng.sample(eligible, count))
    rest = [row for row in range(len(dataset)) if row not in chosen]
    negatives = set(rng.sample(rest, negative))

    def change(row: dict[str, Any], index: int) -> dict[str, Any]:
        draw, column = row_rng(seed, "attack", index), task.input_column
        half = attack.trigger.half(draw) if index in negatives else None
        if half is not None:
            row[column] = half.insert(row[column], draw)
        if index in chosen:
            row[column], row[task.answer_column] = attack.put(row[column], draw), attack.target
        return {**row, "poisoned": index in chosen}

    return map_rows(dataset, change, with_indices=True, desc="Poisoning", num_proc=num_proc)
