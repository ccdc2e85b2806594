"""Rows that come as a stream (`datasets.IterableDataset`): what trains on them, and what can't."""

from typing import TYPE_CHECKING, Any

from datasets import IterableDataset


if TYPE_CHECKING:
    from .trainer import DefenseTrainer


def check_streams(trainer: "DefenseTrainer", train: Any, evaluation: Any) -> None:
    """Refuses streams where all rows are needed at once, and lets each process read its own share of one.

    Args:
        trainer ([`DefenseTrainer`]): Before its rows are prepared, with its `args`.
        train, evaluation: The data sets as they were passed.

    Raises:
        `ValueError`: with the fix.
    """
    sets = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    whole = {f"eval_dataset {name}".strip(): rows for name, rows in sets.items()}
    if not trainer.takes_streams:
        whole["train_dataset"] = train
    for name, rows in whole.items():
        refuse_stream(trainer, name, rows)
    if isinstance(train, IterableDataset):
        if trainer.args.max_steps < 1:
            raise ValueError(
                f"max_steps is {trainer.args.max_steps} and train_dataset a stream, which has no length: set max_steps"
            )
        # The default, one process that reads for all, joins batches of different lengths, and fails.
        trainer.args.accelerator_config.dispatch_batches = False


def refuse_stream(trainer: "DefenseTrainer", name: str, rows: Any) -> None:
    """Raises `ValueError` for rows of that name that come as a stream."""
    if isinstance(rows, IterableDataset):
        raise ValueError(
            f"{name} is a stream, and {type(trainer).__name__} needs all of its rows at once: take some, "
            "hf_backdoor.data.take_rows(stream, n)"
        )
