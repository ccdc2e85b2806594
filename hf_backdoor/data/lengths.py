"""Rows that a model can't read to their end, found before it reads the first."""

import re

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from .mapping import Rows, row_lengths


def learned_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model has learned positions for, and fails beyond; nothing where positions are computed."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if known and isinstance(module, nn.Embedding) and re.search("position|wpe", name.rpartition(".")[2]):
            # RoBERTa counts from behind the padding's own position.
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(known, module.num_embeddings - taken)
    return None


def check_lengths(rows: Rows | None, positions: int | None) -> None:
    """
    Args:
        rows (`Dataset`, *optional*): Encoded rows. A stream can't be looked through.
        positions (`int`, *optional*): Tokens that the model has positions for, if they end.

    Raises:
        `ValueError`: if a row is longer.
    """
    if positions is None or not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return
    refuse_longer(max(row_lengths(rows), default=0), positions)


def refuse_longer(longest: int, positions: int | None) -> None:
    """
    Args:
        longest (`int`): Tokens of the longest row, answer included.
        positions (`int`, *optional*): As in [`check_lengths`].

    Raises:
        `ValueError`: if it is longer.
    """
    if positions is not None and longest > positions:
        raise ValueError(
            f"a row has {longest} tokens, and the model positions for {positions}: cut the texts, by a max_length at least "
            f"{longest - positions} lower (special tokens, template, answer and trigger come on top of it)"
        )
