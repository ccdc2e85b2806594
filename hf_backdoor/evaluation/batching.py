"""Batches of like length, shared out over processes, and put back in order."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel


def by_length(texts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Indices in batches of texts of about the same length, so that little of a batch is padding."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def in_order(batches: list[list[int]], results: list[list[Any]]) -> list[Any]:
    """The batches' results, back in the order of the texts."""
    placed = {
        row: value
        for batch, values in zip(batches, results, strict=True)
        for row, value in zip(batch, values, strict=True)
    }
    return [placed[row] for row in range(len(placed))]


def across_processes(items: Sequence[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Runs `work` on each process's share of the items; every process gets all results, in order."""
    state = PartialState()
    with state.split_between_processes(list(items)) as share:
        results = work(share) if share else []
    return gather_object(results) if state.num_processes > 1 else results


def precision(model: PreTrainedModel, bf16: bool) -> contextlib.AbstractContextManager:
    """bfloat16 autocast on the model's device, or nothing."""
    return torch.autocast(model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
