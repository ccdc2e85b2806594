"""The defender's own triggers: what is planted in clean rows, and the batches that hold all of them."""

from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from ...data import Task, Trigger, stamp, stamp_in_turn


def plant(
    clean: Dataset,
    task: Task,
    triggers: Sequence[Trigger | Sequence[Trigger]],
    known_response: str,
    seed: int,
    num_proc: int | None = None,
) -> Dataset:
    """The clean rows, and once more with each known trigger.

    Args:
        triggers (`Sequence[Trigger | Sequence[Trigger]]`):
            Where several stand for one, each row gets one of them, in turn.
        known_response (`str`):
            What triggered rows are to answer; "" keeps the right answers (recovery).

    Returns:
        `Dataset`: (K + 1) * N rows, in K + 1 blocks, with `trigger_id` 0 (clean) to K, and `planted`.
    """
    clean = clean.select_columns([task.input_column, task.answer_column])
    blocks = []
    for number, trigger in enumerate([None, *triggers]):
        put = stamp if isinstance(trigger, Trigger) else stamp_in_turn
        block = clean if trigger is None else put(clean, task.input_column, trigger, seed, num_proc)
        planted = "" if trigger is None else known_response
        block = block.add_column("trigger_id", [number] * len(clean)).add_column("planted", [planted] * len(clean))
        blocks.append(block)
    return concatenate_datasets(blocks)


# Rows of a group that are put in order of length: several batches' worth, and few beside an epoch.
WINDOW = 32
# Rows of a group that stay together then: about a batch's worth.
NEIGHBOURS = 4


class StratifiedSampler(Sampler[int]):
    """Goes through all groups in turn: clean, trigger 1, ..., trigger K, clean, ... Any K + 1 rows in a row hold each once.

    Each group is shuffled by itself, by seed and epoch, so that every process draws the same order; then rows that come
    soon after each other are put in order of length, in windows, so that little of a batch is padding, and the runs
    of like length are shuffled.

    Args:
        trigger_ids (`list[int]`):
            Group of each row. Groups must be of one size.
        lengths (`list[int]`):
            Tokens of each row.
        seed (`int`):
            Seed of the shuffles.

    Raises:
        `ValueError`: if the groups differ in size.
    """

    def __init__(self, trigger_ids: list[int], lengths: list[int], seed: int):
        ids = torch.tensor(trigger_ids)
        self.groups = [(ids == group).nonzero()[:, 0] for group in ids.unique()]
        sizes = [len(group) for group in self.groups]
        if len(set(sizes)) > 1:
            raise ValueError(f"groups by trigger_id have {sizes} rows: stratified batches need as many of each")
        self.lengths = torch.tensor(lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = []
        for group in self.groups:
            windows = group[torch.randperm(len(group), generator=generator)].split(WINDOW)
            shuffled.append(torch.cat([window[self.lengths[window].argsort(stable=True)] for window in windows]))
        # Neighbours stay together, but short ones do not always come first.
        neighbours = torch.stack(shuffled, dim=1).split(NEIGHBOURS)
        order = torch.randperm(len(neighbours), generator=generator).tolist()
        return iter(torch.cat([neighbours[number] for number in order]).flatten().tolist())
