"""[`StagedTrainer`]: several trainings in a row behind one `train()`."""

from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.trainer_utils import TrainOutput

from .checkpoints import last_checkpoint
from .engines import SHARDED
from .trainer import DefenseTrainer


class StagedTrainer(DefenseTrainer):
    """
    A trainer whose `train()` runs the stages of `args.stages` in order.

    With two stages or more, checkpoints lie in a folder for each (`output_dir/checkpoint-STAGE`), and `resume_from_checkpoint=True`
    goes on in the last stage that has one.

    Raises:
        `ValueError`: for several stages under FSDP or DeepSpeed.
    """

    takes_streams = False  # each stage makes rows of its own out of all the clean ones
    # The stage whose rows and losses are in place.
    stage: str

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if len(self.args.stages) > 1 and self.accelerator.distributed_type in SHARDED:
            raise ValueError(
                f"stages is {list(self.args.stages)}, and the engine is {self.accelerator.distributed_type.value}, which takes "
                "one model through one training: make a trainer for each stage (a recipe's run does)"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Runs the stages of `args.stages` in order."""
        stages = list(self.args.stages)
        checkpoint = resume_from_checkpoint
        if resume_from_checkpoint is True:
            found = [(stage, last_checkpoint(self.stage_dir(stage))) for stage in stages]
            reached, checkpoint = next(((s, c) for s, c in reversed(found) if c is not None), (stages[0], None))
            stages = stages[stages.index(reached) :]
        for stage in stages:
            if stage != self.stage:
                self.enter(stage)
            set_seed(self.args.seed)
            output = super().train(checkpoint, **kwargs)
            checkpoint = None
            self.leave(stage)
        return output

    def enter(self, stage: str) -> None:
        """Before a stage other than the first: an optimizer and a schedule that start afresh. Override for rows and model."""
        self.stage = stage
        self.optimizer, self.lr_scheduler, self.model_wrapped = None, None, self.model
        self.ended = False

    def leave(self, stage: str) -> None:
        """After a stage, when it has run to its end."""

    def stage_dir(self, stage: str) -> Path:
        """Where a stage's checkpoints lie. `Trainer.push_to_hub` uploads nothing of a folder with this name."""
        several = len(self.args.stages) > 1
        return Path(self.args.output_dir, f"checkpoint-{stage}") if several else Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.stage_dir(self.stage))
