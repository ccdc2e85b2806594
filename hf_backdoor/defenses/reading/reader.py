"""[`SuspectReader`]: a stage that reads something off a suspect, and trains nothing; and where what it found lies."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from ...data import base_model
from ..divergence import count_broken
from ..engines import zero3_launched
from ..trainer import DefenseTrainer


class SuspectReader(DefenseTrainer):
    """
    A trainer that trains nothing: its `train()` reads something off the suspect, and [`found`] holds it afterwards. Its
    `save_model` writes it into a folder, from where later stages take it.

    Args:
        model, args, train_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`]; `train_dataset` is clean rows, raw.
        peft_config (`PeftConfig`, *optional*):
            Not used: nothing is trained.

    Raises:
        `ValueError`: under DeepSpeed ZeRO-3, or if the rows are tokenized already.
    """

    takes_streams = False
    # The argument that asks for the stage.
    asked_by: str

    def __init__(self, *args: Any, peft_config: PeftConfig | None = None, **kwargs: Any):
        self.check_launch(zero3_launched())
        super().__init__(*args, **kwargs)
        # Something that has `save_pretrained`.
        self.found: Any = None

    @classmethod
    def check_launch(cls, zero3: bool) -> None:
        """Refuses an engine that leaves nothing to read.

        Raises:
            `ValueError`: under DeepSpeed ZeRO-3.
        """
        if zero3:
            raise ValueError(
                f"{cls.asked_by} is set, and DeepSpeed ZeRO-3 leaves no process the whole model to read from: use "
                f"accelerate_configs/zero2.yaml, fsdp2.yaml or ddp.yaml, or set {cls.asked_by}: 0"
            )

    @abstractmethod
    def read(self) -> Any:
        """What is read off the model, which is in evaluation mode."""

    def prepare_train(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        if dataset is not None and "input_ids" in dataset.column_names:
            raise ValueError("train_dataset has input_ids: pass raw rows, their text is read")
        self.clean = dataset
        return super().prepare_train(dataset, tokenizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Reads.

        Raises:
            `ValueError`: if a weight of the suspect is not finite, or there are no rows.
        """
        if self.clean is None:
            raise ValueError("train_dataset is None: pass clean rows to read the suspect on")
        if count_broken(self.model.parameters(), self.accelerator):
            raise ValueError(
                f"the suspect {base_model(self.model).name_or_path!r} holds weights that are not finite: it is broken, and nothing "
                "can be read off it"
            )
        if self.model.device != self.args.device:  # FSDP2 and DeepSpeed place a model when they begin to train it
            self.model.to(self.args.device)
        training = self.model.training
        self.model.eval()
        self.found = self.read()
        self.model.train(training)
        return TrainOutput(0, 0.0, {})

    def result(self) -> Any:
        return self.found

    def gather(self) -> None:
        """Nothing was shared out."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            self.found.save_pretrained(output_dir or self.args.output_dir)


def found_file(folder: str | Path, name: str, argument: str) -> Path:
    """The file in which a folder keeps what was found.

    Raises:
        `ValueError`: if it is not there.
    """
    file = Path(folder, name)
    if not file.is_file():
        raise ValueError(
            f"{argument} is {str(folder)!r}, where no {name} is: pass the folder that the trainer which found them has saved, or its found"
        )
    return file
