"""Suspect rows that look like those which stand apart. Ours in NT-ML.

The two groups of [`split_class`] tell rows whose label is wrong: what they say and their trigger draw a network to different answers. A
row that carries the trigger and is labelled rightly is drawn to one, stays with the genuine rows of the class, and teaches the
trigger all the same. So does one whose trigger the network has not learnt yet. But both look like the others to a network that has
learnt no answer at all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import labels_of
from ..readout import readout_states
from .states import SplitClass


# Weight of the ridge, in units of the variance of a feature.
RIDGE = 0.1
# Parts in which the rest of the class is cut, and times that it is asked.
PARTS, ROUNDS = 5, 2


def looks(hidden_states: Sequence[Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """What a network sees in a row: the means of its states over tokens or pixels, at the embeddings and after a third, two thirds and
    all of its layers. An answer in the row is not looked at.

    Args:
        hidden_states (`Sequence[Tensor]`): Of all layers, [B, T, D] each, or [B, D, H, W] of a convolutional network.
        inputs (`dict[str, Tensor]`): The batch.

    Returns:
        `Tensor`: [B, the sum of the four D], in float32.
    """
    # Without a read-out position a state is the mean over all of the row.
    inputs, labels = {name: value for name, value in inputs.items() if name != "readout_position"}, labels_of(inputs)
    if labels.dim() == 2:
        mask = inputs["attention_mask"]
        answer = torch.nn.functional.pad(labels != -100, (mask.shape[1] - labels.shape[1], 0))
        inputs["attention_mask"] = mask.masked_fill(answer, 0)
    depths = [round(third * (len(hidden_states) - 1) / 3) for third in range(4)]
    return torch.cat([readout_states(hidden_states[depth].float(), inputs) for depth in depths], dim=1)


def look_alikes(split: SplitClass, given: Tensor, looks: Tensor, clean_looks: Tensor) -> Tensor:
    """Rows of the attacker's class that look like those apart.

    A linear classifier, by least squares, with a ridge and both sides weighed alike, learns to tell the rows apart from all others,
    and is asked of the rest of the class. The rest is among the others, or what the class is about would count: rows apart are about
    what the other classes are. So that no row is asked of a classifier that has learnt it, the rest is cut in parts, and each is
    asked of one that learnt from the others. A second time, what was found is left out of what they learn from.

    Args:
        split ([`SplitClass`]): The class, and its rows apart.
        given (`Tensor`): [N], labels.
        looks (`Tensor`): [N, D], of the suspect rows.
        clean_looks (`Tensor`): [M, D], of clean rows.

    Returns:
        `Tensor`: [N] of booleans; none of them is apart.
    """
    mean, spread = looks.mean(dim=0), looks.std(dim=0).clamp(min=1e-6)
    looks, clean_looks = (looks - mean) / spread, (clean_looks - mean) / spread
    rest = (given == split.label) & ~split.apart
    part = torch.full_like(given, -1)
    part[rest] = torch.arange(int(rest.sum())) % PARTS
    found = torch.zeros_like(rest)
    for _ in range(ROUNDS):
        score = torch.full(given.shape, -1.0)
        for number in range(PARTS):
            asked = part == number
            outside = torch.cat([looks[~(split.apart | found | asked)], clean_looks])
            weights, constant = ridge(looks[split.apart], outside)
            score[asked] = looks[asked] @ weights + constant
        found = score > 0
    return found


def ridge(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [D] and constant of the linear function that is nearest 1 on rows inside and -1 outside, each side weighing a half.

    Args:
        inside, outside (`Tensor`): [n, D] and [m, D].
    """
    centers = inside.double().mean(dim=0), outside.double().mean(dim=0)
    middle = (centers[0] + centers[1]) / 2
    scatter = RIDGE * torch.eye(inside.shape[1], dtype=torch.float64)
    for rows in (inside, outside):
        centred = rows.double() - middle
        scatter += centred.T @ centred / (2 * len(rows))
    weights = torch.linalg.solve(scatter, (centers[0] - centers[1]) / 2)
    return weights.float(), -(middle @ weights).float()
