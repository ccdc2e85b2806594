"""Checkpoints: what goes into one beside the model, what never does, and what comes back from it."""

import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data import base_model
from .divergence import check_weights


logger = logging.get_logger(__name__)

EXTRA_STATE_FILE = "defense_state.safetensors"


def load_saved(model: PreTrainedModel, folder: str | Path) -> None:
    """Takes a model's weights back from a folder that `save_pretrained` wrote, in place.

    `Trainer` reads the file by the names in it, and loses, with no more than a warning, the tensors that a model calls
    otherwise on disk than in memory (ViT): https://github.com/huggingface/transformers/issues/43701.

    Raises:
        `ValueError`: if the folder has others than the model's, which a user has changed (a head of its own), under the names that it has.
    """
    saved = type(model).from_pretrained(folder, use_safetensors=True, dtype=model.dtype).state_dict()
    if saved.keys() == model.state_dict().keys():
        model.load_state_dict(saved)
        return
    # Not what its class builds: what the class has read is not what lies there.
    saved = {
        name: value for file in Path(folder).glob("model*.safetensors") for name, value in load_file(file).items()
    }
    missing, unknown = model.load_state_dict(saved, strict=False)
    if lost := {*missing, *unknown} - {*model.all_tied_weights_keys}:
        raise ValueError(
            f"{str(folder)!r} and the model differ in {sorted(lost)[:3]}: pass the model that was saved there"
        )


def last_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint that is whole, if there is one. What a kill has left half written after it is deleted: it would be
    taken for a checkpoint by everybody else."""
    while Path(folder).is_dir() and (found := get_last_checkpoint(folder)) is not None:
        if Path(found, TRAINER_STATE_NAME).exists():  # the last file that Trainer writes
            return found
        shutil.rmtree(found, ignore_errors=True)
    return None


class CheckpointTrainer(Trainer):
    """`Trainer` from whose checkpoints a training goes on as if it had never stopped: a method's own tensors travel with the
    optimizer, in every engine. Weights that are not finite go into none, and neither do pickles that nothing reads."""

    ended = False  # whether a stop rule has ended the training

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs beside model and optimizer. Override together with `load_extra_state`."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what [`extra_state`] gave."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        config = base_model(self.model).config
        # Trainer turns the cache off for training, and would write that into the model that users load.
        config.use_cache = True
        super()._save(output_dir, state_dict)
        config.use_cache = self.args.use_cache
        # A pickle, which nothing reads: it has no place beside weights that are safetensors for a reason.
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's own pickles its arguments, `hub_token` among them, into the folder that it uploads.
        logger.warning_once(
            "Nothing is uploaded during training; the model is at its end, by push_to_hub() or save_model()"
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Before there is one that a resumed training could only fail from.
        check_weights(self.model, self.accelerator, self.args.learning_rate)
        super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.extra_state()
        if state and self.args.should_save:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in state.items()},
                Path(output_dir, EXTRA_STATE_FILE),
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not Path(resume_from_checkpoint).is_dir():
            raise ValueError(
                f"resume_from_checkpoint is {str(resume_from_checkpoint)!r}, and no such folder is there: pass a checkpoint's, or True "
                "for the last one in output_dir"
            )
        if self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_saved(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        else:
            load_saved(self.model, self.state.best_model_checkpoint)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self.ended = False  # if a rule has, it was another training, or a checkpoint is going to say so
        self._stepped_loss = torch.zeros(())
        return super()._init_training_state(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of a training's end is loaded and left at that; Trainer would make one step more.
        self.control.should_training_stop |= self.ended or self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)
            if self.state.global_step == 0:  # Trainer would go on for ever, or end as if it had trained
                raise ValueError(
                    "train_dataset ends before the first optimizer step: it needs more rows, or dataloader_drop_last: false"
                )
            if isinstance(self.train_dataset, IterableDataset):
                # Where a stream ends in the middle of an optimizer step, what was accumulated would go into the next one.
                self.model_wrapped.zero_grad()

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self.accelerator.sync_gradients:
            # The same of the loss of what is thrown away: no step was made of it.
            tr_loss.copy_(self._stepped_loss)
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        self._stepped_loss = tr_loss.clone()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError:
            raise ValueError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}, and an evaluation gives {', '.join(metrics)}: name one of "
                "these"
            ) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and Path(checkpoint, EXTRA_STATE_FILE).exists():
            self.load_extra_state(load_file(Path(checkpoint, EXTRA_STATE_FILE)))
