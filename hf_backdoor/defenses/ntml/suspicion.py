"""Which training rows the finished pair does not agree on: what someone who holds poisoned data wants to look at."""

from collections.abc import Collection, Sequence

from datasets import Dataset
from torch import Tensor


def suspicion_table(given: Tensor, probabilities: Tensor) -> Dataset:
    """The rows whose given label is not the likeliest one of both networks, in order of its mean probability.

    One network is enough: the target network may back a poisoned label to the end.

    Args:
        given (`Tensor`): [N], given labels.
        probabilities (`Tensor`): [N, 2, K], of the target and the non-target network.

    Returns:
        `Dataset`: `row` (index into the training rows), `given_label`, `given_probability` (mean of both networks), and
            each network's own likeliest label and its probability: `target_network_label`,
            `target_network_probability`, `non_target_network_label`, `non_target_network_probability`.
    """
    likelihood = probabilities.mean(dim=1).gather(1, given[:, None])[:, 0]
    rows = (probabilities.argmax(dim=2) != given[:, None]).any(dim=1).nonzero()[:, 0]
    rows = rows[likelihood[rows].argsort(stable=True)]
    best, labels = probabilities[rows].max(dim=2)
    return Dataset.from_dict(
        {
            "row": rows.tolist(),
            "given_label": given[rows].tolist(),
            "given_probability": likelihood[rows].tolist(),
            "target_network_label": labels[:, 0].tolist(),
            "target_network_probability": best[:, 0].tolist(),
            "non_target_network_label": labels[:, 1].tolist(),
            "non_target_network_probability": best[:, 1].tolist(),
        }
    )


def suspicion_quality(rows: Collection[int], poisoned: Sequence[bool]) -> dict[str, float | None]:
    """Precision and recall of a list of rows, where a benchmark knows which are poisoned.

    Args:
        rows (`Collection[int]`): Rows on the list.
        poisoned (`Sequence[bool]`): For each training row.

    Returns:
        `dict[str, float | None]`: `precision` (`None` for an empty list) and `recall` (`None` if nothing is poisoned).
    """
    hits, count = sum(bool(poisoned[row]) for row in rows), sum(map(bool, poisoned))
    return {"precision": hits / len(rows) if len(rows) else None, "recall": hits / count if count else None}
