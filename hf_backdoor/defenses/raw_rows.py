"""[`RawRowsTrainer`]: rows as they came, and how they become what a model reads."""

from contextlib import AbstractContextManager
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from ..data import Processor, Rows, Task, check_lengths, check_raw, encoded
from .arguments import check_tokens
from .checkpoints import CheckpointTrainer
from .config import DefenseConfig
from .streams import refuse_stream


class RawRowsTrainer(CheckpointTrainer):
    """Cuts and encodes raw rows, whenever they come; rows that are a model's inputs already stay as they are."""

    args: DefenseConfig
    # How rows become the model's inputs; nothing where they are already, and tokens that the model has positions for.
    task: Task | None
    positions: int | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        check_tokens(self.model, self.processing_class, self.train_dataset, *held_out)

    def bounded(
        self, dataset: Rows | dict[str, Dataset] | None, processor: Processor
    ) -> Rows | dict[str, Dataset] | None:
        """Raw rows with their texts cut to `max_length`, before anything is put into them: no trigger is ever cut away.

        Raises:
            `ValueError`: if they can't be trained on.
        """
        if isinstance(dataset, dict):
            return {name: self.bounded(rows, processor) for name, rows in dataset.items()}
        if dataset is None or self.task is None or encoded(dataset):
            return dataset
        check_raw(dataset, self.task)
        if self.args.max_length is None:
            return dataset
        with self.one_process_first():
            return self.task.bounded(dataset, processor, self.args.dataset_num_proc, max_length=self.args.max_length)

    def encode_rows(self, dataset: Rows | None, processor: Processor) -> Rows | None:
        """Rows as the model reads them.

        Raises:
            `ValueError`: if it can't read one to its end.
        """
        rows = self.tokenized(dataset, processor)
        check_lengths(rows, self.positions)
        return rows

    def tokenized(self, dataset: Rows | None, processor: Processor) -> Rows | None:
        if dataset is None or self.task is None or encoded(dataset):
            return dataset
        with self.one_process_first():
            return self.task.encode_rows(dataset, processor, self.args.dataset_num_proc)

    @staticmethod
    def one_process_first() -> AbstractContextManager[None]:
        """One process of each machine makes the maps in it, and the others find them in the cache. It may be nested."""
        return PartialState().local_main_process_first()

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer` makes it.

        Raises:
            `ValueError`: if it has no batch: Trainer would ask for `max_steps`, as of a stream.
        """
        loader = super().get_train_dataloader()
        if self.args.dataloader_drop_last and isinstance(self.train_dataset, Dataset) and not len(loader):
            raise ValueError(
                f"dataloader_drop_last is True, and train_dataset has {len(self.train_dataset)} rows, fewer than one batch of "
                f"{self.args.train_batch_size} on each of {self.args.world_size} processes: set dataloader_drop_last: false, or lower "
                "per_device_train_batch_size"
            )
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if isinstance(eval_dataset, str) and eval_dataset not in named:
            raise ValueError(
                f"eval_dataset is {eval_dataset!r}: pass the rows, or one of the trainer's own names ({list(named)})"
            )
        raw = isinstance(eval_dataset, Dataset | IterableDataset | list)
        return super().get_eval_dataloader(self.encode_new(eval_dataset) if raw else eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return super().get_test_dataloader(self.encode_new(test_dataset))

    def encode_new(self, dataset: Dataset) -> Dataset:
        """Rows that come after training has been set up, looked through as those before were."""
        refuse_stream(self, "the data set", dataset)
        rows = self.encode_rows(self.bounded(dataset, self.processing_class), self.processing_class)
        check_tokens(self.model, self.processing_class, rows)
        return rows
