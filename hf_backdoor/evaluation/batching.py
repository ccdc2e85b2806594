"""Batches of like length, shared out over processes, and put back in order."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel


def in_batches(
    items: Sequence[Any],
    work: Callable[[list[Any]], list[Any]],
    *,
    batch_size: int,
    length: Callable[[Any], int],
    desc: str,
) -> list[Any]:
    """Runs `work` on batches of items of about the same length, so that little of a batch is padding.

    Args:
        items (`Sequence`): What is worked on. Each process takes a share.
        work (`Callable`): A batch of items to as many results.
        batch_size (`int`): Items in a batch.
        length (`Callable`): An item's length, in any unit.
        desc (`str`): Name of the progress bar.

    Returns:
        `list`: The results in the order of the items, the same on every process.
    """
    state = PartialState()
    with state.split_between_processes(list(items)) as share:
        order = sorted(range(len(share)), key=lambda row: length(share[row]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        found: dict[int, Any] = {}
        for batch in tqdm(batches, desc=desc, disable=not state.is_main_process, leave=False):
            found.update(zip(batch, work([share[row] for row in batch]), strict=True))
    results = [found[row] for row in range(len(share))]
    return gather_object(results) if state.num_processes > 1 else results


def tokens(features: dict[str, Any]) -> int:
    """Length of a row's features."""
    return len(features["input_ids"])


def precision(model: PreTrainedModel, bf16: bool) -> contextlib.AbstractContextManager:
    """bfloat16 autocast on the model's device, or nothing."""
    return torch.autocast(model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
