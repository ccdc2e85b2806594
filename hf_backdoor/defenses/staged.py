"""[`StagedTrainer`]: several trainings in a row behind one `train()`."""

from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .checkpoints import last_checkpoint
from .engines import SHARDED
from .trainer import DefenseTrainer


class StagedTrainer(DefenseTrainer):
    """
    A trainer whose `train()` runs the stages of `args.stages` in order.

    With two stages or more, checkpoints lie in a folder for each (`output_dir/checkpoint-STAGE`), and `resume_from_checkpoint=True`
    goes on from the one that was written last (transformers' `get_last_checkpoint(output_dir)` looks into no stage's folder, and finds
    none of them). `state.log_history` holds the logs of all stages: each entry names its `stage`, for
    steps are counted anew in each.

    Raises:
        `ValueError`: for several stages under FSDP or DeepSpeed, or with an optimizer of the user's own.
    """

    takes_streams = False  # each stage makes rows of its own out of all the clean ones
    # The stage whose rows and losses are in place.
    stage: str

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # What the stages before this one have logged.
        self._logged: list[dict[str, Any]] = []
        if len(self.args.stages) > 1 and any(kwargs.get("optimizers") or ()):
            raise ValueError(
                f"optimizers is given, and stages is {list(self.args.stages)}, each of which needs one of its own: pass "
                "optimizer_cls_and_kwargs, or make a trainer for each stage"
            )
        if len(self.args.stages) > 1 and self.accelerator.distributed_type in SHARDED:
            raise ValueError(
                f"stages is {list(self.args.stages)}, and the engine is {self.accelerator.distributed_type.value}, which takes "
                "one model through one training: make a trainer for each stage (a recipe's run does)"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Runs the stages of `args.stages` in order, from that of the checkpoint on if there is one.

        Raises:
            `ValueError`: if a checkpoint's path does not tell its stage, or the training diverges.
        """
        stages = list(self.args.stages)
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = self._last_written() if len(stages) > 1 else last_checkpoint(self.args.output_dir)
        if checkpoint is not None and len(stages) > 1:
            stages = stages[self._stage_of(checkpoint) :]
        self._logged = []
        for stage in stages:
            if stage != self.stage:
                self.enter(stage)
            set_seed(self.args.seed)
            output = super().train(checkpoint, **kwargs)
            checkpoint = None
            self._logged = self.state.log_history
            self.leave(stage)
        return output

    def _last_written(self) -> str | None:
        """The whole checkpoint that was written last. By time, not by number: an older training in the same folder has left some of
        later stages and steps than this one has come to."""
        folders = [self.stage_dir(stage) for stage in self.args.stages]
        found = [
            state for folder in folders for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        ]
        return str(max(found, key=lambda state: state.stat().st_mtime_ns).parent) if found else None

    def _stage_of(self, checkpoint: str) -> int:
        """The number of the stage that a checkpoint is from."""
        folders = [self.stage_dir(stage).name for stage in self.args.stages]
        if (name := Path(checkpoint).absolute().parent.name) not in folders:
            raise ValueError(
                f"resume_from_checkpoint is {str(checkpoint)!r}, which tells no stage: pass a checkpoint in {' or '.join(folders)}, "
                "or set stages to the one that it is from"
            )
        return folders.index(name)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The log goes on from that of the stages before, in checkpoints too."""
        begun = super()._init_training_state(*args, **kwargs)
        self.state.log_history = [*self._logged, *self.state.log_history]
        return begun

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        self.state.log_history[-1]["stage"] = self.stage

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Of the last stage: a card reads one training's log, and numbers alone."""
        log = self.state.log_history
        own = [entry for entry in log if entry.get("stage") == self.stage]
        self.state.log_history = [{name: value for name, value in entry.items() if name != "stage"} for entry in own]
        super().create_model_card(*args, **kwargs)
        self.state.log_history = log

    def enter(self, stage: str) -> None:
        """Before a stage other than the first: an optimizer and a schedule that start afresh. Override for rows and model."""
        self.stage = stage
        self.optimizer, self.lr_scheduler, self.model_wrapped = None, None, self.model
        # Workers that are kept alive would go on with the rows of the stage before.
        self._eval_dataloaders = {}

    def leave(self, stage: str) -> None:
        """After a stage, when it has run to its end."""

    def stage_dir(self, stage: str) -> Path:
        """Where a stage's checkpoints lie. `Trainer.push_to_hub` uploads nothing of a folder with this name."""
        several = len(self.args.stages) > 1
        return Path(self.args.output_dir, f"checkpoint-{stage}") if several else Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.stage_dir(self.stage))
