"""Which rows lie, by the states of a network that has learnt the backdoor. Ours in NT-ML, after Activation Clustering
(https://arxiv.org/abs/1811.03728): a network comes to the attacker's label in two ways, by what rows say and by their trigger, and
its last states show which.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from scipy.stats import binom
from torch import Tensor


# Of one variance, what cutting a normal distribution in halves explains.
ONE_GROUP = 2 / math.pi
# What a class must reach to count as falling apart: one group reaches it in less than one of a hundred draws.
FALLS_APART = 1.0
# Below which a probability is taken for chance no more.
CHANCE = 0.05
# The table in which a run keeps what was found, and its file.
TABLE = "rows_apart"


@dataclass(frozen=True)
class SplitClass:
    """A class whose rows fall in two groups, one of which clean rows avoid.

    Args:
        label (`int`): The class.
        apart (`Tensor`): [N] of booleans, rows in the group that is the attacker's.
        separation (`float`): How far its rows fall apart: 0 for one group of normally distributed states.
        clean (`tuple[int, int]`): Clean rows of the class in that group, and in all.
    """

    label: int
    apart: Tensor
    separation: float
    clean: tuple[int, int]


def as_table(split: SplitClass | None, rows: int) -> Dataset:
    """Of all rows, whether each is apart, and what is known of the class; the same of no class where nothing fell apart."""
    label, separation, clean = (-1, 0.0, (0, 0)) if split is None else (split.label, split.separation, split.clean)
    apart = [False] * rows if split is None else split.apart.tolist()
    of_the_class = {"label": label, "separation": separation, "clean_apart": clean[0], "clean": clean[1]}
    return Dataset.from_dict({"apart": apart, **{name: [value] * rows for name, value in of_the_class.items()}})


def split_in(folder: str | Path, rows: int) -> SplitClass | None:
    """What [`as_table`] was made of, in the folder of the stage that found it.

    Raises:
        `ValueError`: if it is not there, or of other rows.
    """
    file = Path(folder, f"{TABLE}.parquet")
    if not file.is_file():
        raise ValueError(
            f"found_split is {str(folder)!r}, where no {file.name} is: pass the folder of a relabelling stage"
        )
    table = Dataset.from_parquet(str(file), keep_in_memory=True)
    refuse_other_rows(len(table), rows)
    first = table[0]
    if first["label"] < 0:
        return None
    clean = (first["clean_apart"], first["clean"])
    return SplitClass(first["label"], torch.tensor(table["apart"][:]), first["separation"], clean)


def refuse_other_rows(found: int, rows: int) -> None:
    """Raises `ValueError` for what was found in another number of rows."""
    if found != rows:
        raise ValueError(f"found_split is of {found} rows, and train_dataset has {rows}: pass what was found in these")


def split_class(
    states: Tensor, given: Tensor, likelihood: Tensor, clean_states: Tensor, clean_labels: Tensor
) -> SplitClass | None:
    """The class that falls apart most, of those where clean rows avoid one of two groups.

    Each class is cut in two along the direction in which its states differ most. How clear a cut is counts the more, the more rows
    there are: a cut through a few may explain much by chance. Of a class without clean rows the group is taken that the network is
    surer of: a trigger is learnt better than what rows say.

    Args:
        states (`Tensor`): [N, D], of the suspect rows.
        given (`Tensor`): [N], labels that they came with.
        likelihood (`Tensor`): [N], their probability by the network whose states they are.
        clean_states (`Tensor`): [M, D], of clean rows.
        clean_labels (`Tensor`): [M].

    Returns:
        `SplitClass`, or `None` if there is no such class.
    """
    mean, spread = states.mean(dim=0), states.std(dim=0).clamp(min=1e-6)
    states, clean_states = (states - mean) / spread, (clean_states - mean) / spread
    found = []
    for label in given.unique().tolist():
        rows, clean = (given == label).nonzero()[:, 0], clean_states[clean_labels == label]
        if len(rows) < 2:
            continue
        center = states[rows].mean(dim=0)
        axis = main_direction(states[rows] - center)
        places, clean_places = (states[rows] - center) @ axis, (clean - center) @ axis
        threshold, explained = best_cut(places)
        separation = (explained - ONE_GROUP) * math.sqrt(len(rows))
        if separation <= FALLS_APART:
            continue
        surer = likelihood[rows][places > threshold].mean() > likelihood[rows][places <= threshold].mean()
        for upper in (True, False):
            group, clean_group = (places > threshold) == upper, (clean_places > threshold) == upper
            inside, share = int(clean_group.sum()), group.float().mean().item()
            if avoided(inside, len(clean), share) if len(clean) else bool(surer) == upper:
                apart = torch.zeros_like(given, dtype=torch.bool)
                apart[rows[group]] = True
                found.append(SplitClass(label, apart, separation, (inside, len(clean))))
    return max(found, key=lambda split: split.separation, default=None)


def avoided(inside: int, clean: int, share: float) -> bool:
    """Whether clean rows avoid a group: fewer are in it than its share of the class would have, by more than chance where there
    are enough to tell, and not by more than chance more than half as many.

    Args:
        inside, clean (`int`): Clean rows in the group, and in the class.
        share (`float`): Of the class's suspect rows, those in the group.
    """

    told = binom.pmf(0, clean, share) >= CHANCE or binom.cdf(inside, clean, share) < CHANCE
    return bool(inside < share * clean and told and binom.sf(inside - 1, clean, share / 2) >= CHANCE)


def main_direction(centred: Tensor) -> Tensor:
    """[D], of length 1: where rows [n, D] of mean 0 vary most."""
    return torch.linalg.eigh((centred.T @ centred).double()).eigenvectors[:, -1].float()


def best_cut(places: Tensor) -> tuple[float, float]:
    """The cut of numbers in two that leaves the least variance within the parts (two-means, exactly), and the share of the
    variance that it explains.

    Args:
        places (`Tensor`): [n], two or more.
    """
    ordered = places.double().sort().values
    sizes = torch.arange(1, len(ordered), dtype=torch.float64)
    sums = (ordered - ordered.mean()).cumsum(dim=0)[:-1]
    between = sums.square() / sizes + sums.square() / (len(ordered) - sizes)
    cut = int(between.argmax())
    total = (ordered - ordered.mean()).square().sum().clamp(min=1e-12)
    return float(ordered[cut] + ordered[cut + 1]) / 2, float(between[cut] / total)
