"""[`FeatureMaskTrainer`]: fits a [`FeatureMask`] to a suspect teacher, on clean rows."""

from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import EarlyStoppingCallback
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_utils import TrainOutput

from ..trainer import DefenseTrainer
from .config import FeatureMaskConfig
from .features import captured, clean_batches, valid_tokens
from .losses import feature_variance
from .mask import FeatureMask


class FeatureMaskTrainer(DefenseTrainer):
    """
    First stage of RobustKD: trains a mask, and nothing else, so that the masked teacher is right on clean rows while its
    features vary little: cross-entropy + lambda * variance.

    `trainer.model` is the mask, once the trainer is made: it is what is optimized, saved and given back. The teacher is
    frozen, and in evaluation mode. `eval_loss` is the masked teacher's clean loss; to stop on it, give `mask_patience`
    and an `eval_strategy`, or an `EarlyStoppingCallback` of your own.

    Args:
        model (`PreTrainedModel`):
            The suspect teacher.
        args ([`FeatureMaskConfig`]):
            Training arguments.
        train_dataset, eval_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`]; clean rows, and held-out clean rows. Without text: rows of any kind, a
            `data_collator`, and no `processing_class`.
        peft_config (`PeftConfig`, *optional*):
            Not used: nothing of the teacher is trained.

    Raises:
        `ValueError`: if there are no training rows, a layer is unknown, or patience is asked for and nothing is evaluated.
    """

    takes_streams = False  # the mean clean feature is taken over rows from all over the set

    def __init__(self, *args: Any, peft_config: PeftConfig | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.args.refuse_unwatched("mask_patience")
        # The rows are the teacher's: its signature says which columns they keep.
        self._set_signature_columns_if_needed()
        self.teacher_model = self.model
        settings = self.args
        self.model = self.model_wrapped = FeatureMask.for_model(
            self.teacher,
            next(clean_batches(self)),
            settings.mask_layers,
            threshold=settings.mask_threshold,
            form=settings.mask_form,
            shape=settings.mask_shape,
            positions=settings.mask_positions,
        ).to(settings.device)
        # A model in evaluation mode checkpoints nothing, and a mask has nothing to checkpoint.
        settings.activation_checkpointing = settings.gradient_checkpointing = False
        self.neftune_noise_alpha = None  # nor has it embeddings to put noise on
        self._stopper: EarlyStoppingCallback | None = None
        if settings.mask_patience is not None:
            self._stopper = EarlyStoppingCallback(settings.mask_patience)
            self.add_callback(self._stopper)

    @classmethod
    def config_class(cls) -> type[FeatureMaskConfig]:
        return FeatureMaskConfig

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Sets p to the mean clean feature, and fits from there (or goes on from a checkpoint, or an earlier training)."""
        if self.state.global_step == 0:
            with self.accelerator.autocast():
                self.model.initialize(self.teacher, clean_batches(self))
        return super().train(*args, **kwargs)

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], step_counts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        settings, layers = self.args, self.model.layers
        with captured(self.teacher, layers) as features:
            outputs = self.forward(model, inputs)
        terms = {"task": self.task_loss(outputs.logits, inputs["labels"])}
        if settings.variance_weight:
            valid = valid_tokens(inputs)
            variances = [
                feature_variance(features[name], valid, settings.variance_axes, settings.variance_place)
                for name in layers
            ]
            terms["variance"] = settings.variance_weight * sum(variances) / len(variances)
        return terms, outputs.logits

    def forward(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **more: Any) -> ModelOutput:
        """Runs the masked teacher; `model` is the mask, wrapped."""

        def masked(**arguments: Any) -> ModelOutput:
            return model(self.teacher, inputs.get("readout_position"), **arguments)

        return super().forward(masked, inputs, *args, **more)

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self._stopper is None else {"waited": torch.tensor(self._stopper.early_stopping_patience_counter)}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self._stopper is not None:
            self._stopper.early_stopping_patience_counter = int(state["waited"])
            self.ended = self._stopper.early_stopping_patience_counter >= self._stopper.early_stopping_patience

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir, state_dict)
