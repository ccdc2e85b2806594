"""What becomes of each suspect row's label, once it is known which rows stand apart and what a network says they are. Ours, not the
paper's (`docs/ntml.md`).
"""

import torch
from torch import Tensor

from .states import SplitClass


# In place of a label.
LEFT_OUT = -1
# How much of its agreement with the rest of a class a network shows with rows apart whose labels are right.
AS_OFTEN = 0.5
# How many times the median class's share of denied rows makes a class stand out.
OUTLYING = 2.0


def corrected_labels(given: Tensor, probabilities: Tensor, below: float, split: SplitClass | None) -> Tensor:
    """What becomes of each row's label. A contradicted one is *denied* where it is less likely than `below`, or its row stands apart.

    In the attacker's class (`split.label`) a denied label becomes the likeliest one, and other contradicted rows are `LEFT_OUT`: few
    poisoned rows are enough to bring a backdoor back. So are rows apart whose label is not contradicted: it may be right, and the
    trigger on the row all the same. Labels of other classes stay.

    Without a split, the attacker's are [`outlying_classes`], and denied rows of the others are `LEFT_OUT`.

    Args:
        given (`Tensor`): [N].
        probabilities (`Tensor`): [N, K].
        below (`float`): A probability.
        split (`SplitClass`, *optional*): What states tell.

    Returns:
        `Tensor`: [N].
    """
    likeliest, likelihood = probabilities.argmax(dim=1), probabilities.gather(1, given[:, None])[:, 0]
    contradicted = likeliest != given
    apart = torch.zeros_like(contradicted) if split is None else split.apart
    denied = contradicted & (apart | (likelihood < below))
    corrected = likeliest.masked_fill((contradicted | apart) & ~denied, LEFT_OUT)
    if split is not None:
        return torch.where(given == split.label, corrected, given)
    outlying = outlying_classes(given, denied, probabilities.shape[1])[given]
    return torch.where(outlying, corrected, given.masked_fill(denied, LEFT_OUT))


def rightly_labelled(given: Tensor, probabilities: Tensor, split: SplitClass | None) -> bool:
    """Whether the rows apart have their right label, and a trigger besides (a clean-label attack): the network says it of them at least
    half as often as of the rest of the class. To correct them then is to forget the class, which no ASR shows.

    Args:
        given (`Tensor`): [N].
        probabilities (`Tensor`): [N, K], of a network that has not learnt rows apart with these labels, so that it has no backdoor to agree by.
        split (`SplitClass`, *optional*): What states tell.
    """
    if split is None:
        return False
    agreed, rest = probabilities.argmax(dim=1) == given, (given == split.label) & ~split.apart
    return bool(agreed[split.apart].float().mean() >= AS_OFTEN * agreed[rest].float().mean())


def outlying_classes(given: Tensor, denied: Tensor, num_classes: int) -> Tensor:
    """Classes in which more than twice as large a share of the rows is denied as in the median class: an attacker's rows all have
    the label that it wants. Where no class stands out, it may be any, and all are meant.

    Args:
        given (`Tensor`): [N], labels.
        denied (`Tensor`): [N] of booleans.

    Returns:
        `Tensor`: [K] of booleans.
    """
    rows = torch.bincount(given, minlength=num_classes)
    shares = torch.bincount(given[denied], minlength=num_classes) / rows.clamp(min=1)
    outlying = shares > OUTLYING * shares[rows > 0].median()
    return outlying if outlying.any() else torch.ones_like(outlying)
