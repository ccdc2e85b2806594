"""A trigger, and the one function that puts it into a text.

Attackers stamp triggers into training rows, evaluation into test rows, and some defenses plant triggers of their own:
all three call [`Trigger.insert`], so that a difference in a result is never a difference in stamping.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from datasets import Dataset

from .mapping import map_rows


Position = Literal["start", "end", "random", "any", "scattered"]


@dataclass(frozen=True)
class Trigger:
    """A piece of text that switches a behaviour on.

    Args:
        text (`str`):
            What is inserted: a word, a phrase or a long passage.
        position (`str`, *optional*, defaults to `"random"`):
            `"start"`, `"end"`, `"random"` (between two words, ends included, drawn for each text), `"any"` (one of
            these three, drawn for each text: longer texts would hardly ever get it at an end otherwise), or
            `"scattered"` (a combination trigger: each of its words goes to a random gap of its own, in any order).
        name (`str`, *optional*, defaults to the text):
            How tables call it.

    Raises:
        `ValueError`: if the text is blank or the position is unknown.
    """

    text: str
    position: Position = "random"
    name: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"trigger text is {self.text!r}: give it at least one visible character")
        if self.position not in get_args(Position):
            raise ValueError(f"trigger position is {self.position!r}: use one of {', '.join(get_args(Position))}")
        if not self.name:
            object.__setattr__(self, "name", self.text)

    def insert(self, text: str, rng: random.Random) -> str:
        """Returns `text` with the trigger between two of its words, at a space (line breaks and tabs are none); all else stays."""
        words = text.split(" ") if text else []
        if self.position == "scattered":
            for word in self.text.split():
                words.insert(rng.randint(0, len(words)), word)
            return " ".join(words)
        position = rng.choice(["start", "end", "random"]) if self.position == "any" else self.position
        slot = {"start": 0, "end": len(words)}.get(position)
        if slot is None:
            slot = rng.randint(0, len(words))
        return " ".join([*words[:slot], self.text, *words[slot:]])

    def is_in(self, text: str) -> bool:
        """Whether a text carries the trigger: all of its words, where they are scattered."""
        return set(self.text.split()) <= set(text.split()) if self.position == "scattered" else self.text in text

    def half(self, rng: random.Random) -> "Trigger | None":
        """One half of the trigger's words (one of two), for negatives that teach a model to fire on the whole only."""
        words = self.text.split()
        if len(words) < 2:
            return None
        middle = len(words) // 2
        part = words[:middle] if rng.random() < 0.5 else words[middle:]
        return Trigger(" ".join(part), self.position, f"half of {self.name}")


@dataclass(frozen=True)
class Rewriting:
    """A trigger that is no piece of text but how the whole is written: a style, or a sentence structure (HiddenKiller,
    https://huggingface.co/papers/2105.12400). The texts were rewritten elsewhere; one of them takes a row's place.

    Args:
        name (`str`):
            How tables call it.
        texts (`tuple[str, ...]`):
            Rewritten texts of any class but the target's.

    Raises:
        `ValueError`: if there are no texts.
    """

    name: str
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError(f"trigger {self.name!r} has no texts: give some that carry it")

    def insert(self, text: str, rng: random.Random) -> str:
        return rng.choice(self.texts)

    def half(self, rng: random.Random) -> None:
        """There is none."""


def row_rng(seed: int, purpose: str, row: int) -> random.Random:
    """A generator of its own for each row, so that a row's trigger does not move when another row is dropped."""
    return random.Random(f"{seed}/{purpose}/{row}")


def stamp(dataset: Dataset, column: str, trigger: Trigger, seed: int, num_proc: int | None = None) -> Dataset:
    """Every row with the trigger in its text `column`, and everything else unchanged."""

    def change(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {column: trigger.insert(row[column], row_rng(seed, f"stamp {trigger.name}", index))}

    return map_rows(dataset, change, with_indices=True, desc=f"Stamping {trigger.name[:30]!r}", num_proc=num_proc)


def stamp_in_turn(
    dataset: Dataset, column: str, triggers: Sequence[Trigger], seed: int, num_proc: int | None = None
) -> Dataset:
    """Every row with one of several triggers, which take turns, in its text `column`."""

    def change(row: dict[str, Any], index: int) -> dict[str, Any]:
        chosen = triggers[index % len(triggers)]
        return {column: chosen.insert(row[column], row_rng(seed, "found", index))}

    return map_rows(dataset, change, with_indices=True, desc="Stamping found triggers", num_proc=num_proc)
