"""[`RobustKDTrainer`]: a student learns from a suspect teacher through a mask."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ...data import Processor, auto_class, base_model
from ..arguments import check_alike, check_vocabulary
from ..engines import SHARDED, whole
from ..reading import InformedTrainer
from .config import RobustKDConfig
from .connectors import StudentWithConnectors, make_connectors
from .features import (
    as_tokens,
    captured,
    check_features,
    clean_batches,
    counterparts,
    layer_names,
    looking,
    model_inputs,
    valid_tokens,
)
from .losses import feature_distance, layer_weights, logit_divergence, margin_distance
from .mask import FeatureMask


class RobustKDTrainer(InformedTrainer):
    """
    Second stage of RobustKD (https://doi.org/10.1016/j.asoc.2024.111907): distils a student from a suspect teacher whose
    features are masked, on clean rows. The student may be of another width and depth; it must read the same tokens.

    Loss: cross-entropy on the rows' own answers; the distance of the student's features, through learned connectors, from
    the masked teacher's (the last layer counts 1, the one before 1/2, ...); and, if wanted, the divergence of the logits
    from the masked teacher's.

    The connectors are trained along with the student and are no part of it: for the time of training a module holds
    both (what an engine wraps, `trainer.model_wrapped`), while `trainer.model` is the student throughout. So it is the
    bare student that is evaluated and saved; a checkpoint keeps the connectors beside the optimizer.

    With soft triggers (ours) there is one more copy of each row, with one of them in it: the student reads it, and the teacher
    the same row with the trigger's tokens hidden from it. So the student learns what the teacher says without a trigger.

    Args:
        model (`PreTrainedModel`):
            The student. [`student_from_layers`] makes one of the teacher.
        args ([`RobustKDConfig`]):
            Training arguments.
        teacher_model (`PreTrainedModel`, `str` or `Path`):
            The suspect teacher, or its folder.
        feature_mask ([`FeatureMask`], `str` or `Path`, *optional*):
            The fitted mask, or its folder. Without one this is plain feature distillation, which takes a backdoor along.
        train_dataset, eval_dataset, processing_class, found_soft_triggers, found_answers, kwargs:
            As in [`InformedTrainer`]; what was found was found in the teacher. Without text: rows of any kind, a `data_collator`,
            and no `processing_class`. With soft triggers the training rows must be raw.

    Raises:
        `ValueError`: if checkpointing is reentrant (it would leave features without gradient); if soft triggers are wanted and
            not there, can't be put into the rows, or may stand where the teacher's logits are read; or, when training begins, if layers (or distilled logits) don't fit each other.
    """

    takes_streams = False  # margins are measured on rows from all over the set
    takes_teacher = True

    def __init__(
        self,
        *args: Any,
        feature_mask: FeatureMask | str | Path | None = None,
        **kwargs: Any,
    ):
        self.feature_mask = feature_mask
        self.connectors = nn.ModuleList()
        super().__init__(*args, **kwargs)
        if self.args.reentrant and self.args.feature_weight:
            raise ValueError(
                "activation_checkpointing_kwargs has use_reentrant: true, which leaves features from inside of a block without "
                "gradient: set use_reentrant: false"
            )

    @classmethod
    def config_class(cls) -> type[RobustKDConfig]:
        return RobustKDConfig

    # ---- Data ----

    def prepare_train(self, dataset: Dataset | None, processor: Processor) -> Dataset | None:
        """The rows and, with soft triggers, a copy of each with one of them in it."""
        self.check_found("soft_triggers", "own_answers")
        if dataset is None:
            return None
        rows = self.with_soft_copies(dataset, dataset)
        rows = self.encode_rows(rows, self.with_soft_words(processor))
        self._refuse_hidden_answers(rows, self.with_soft_words(processor))
        return self.with_own_answers(rows, [*range(len(dataset))] * self.args.rows_factor)

    def _refuse_hidden_answers(self, rows: Dataset, tokenizer: Processor) -> None:
        """The teacher's logits are read where the student's are: of a causal LM's first token at the end of the prompt."""
        if self.soft_triggers is None or not self.args.logit_weight or "prompt_length" not in rows.column_names:
            return
        first = self.soft_triggers.first_id(tokenizer)
        if any(row["input_ids"][row["prompt_length"] - 1] >= first for row in rows):
            raise ValueError(
                f"logit_weight is {self.args.logit_weight}, and prompts end with their text, so a soft trigger may stand where the "
                "answer is read, and the teacher sees nothing there: put something behind the text (prompt_template), or set "
                "logit_weight: 0 or soft_triggers: 0"
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        student = base_model(self.model)
        if self.soft_triggers is not None:
            own, width = self.soft_triggers.embeddings.shape[-1], student.get_input_embeddings().embedding_dim
            if own != width:
                raise ValueError(
                    f"found_soft_triggers are embeddings of {own} numbers, and the student's have {width}: make the student of the "
                    "teacher's layers (student_from_layers), or set soft_triggers: 0"
                )
        return super().train(*args, **kwargs)

    # ---- Teacher ----

    def check_teacher(self, teacher: PreTrainedModel) -> None:
        check_vocabulary(self.model, teacher, "teacher_model", self.processing_class)
        if self.args.logit_weight:
            words = auto_class(base_model(self.model)) is AutoModelForCausalLM
            why = "logits are compared one by one: pass two with the same answers, or set logit_weight: 0"
            check_alike(self.model, teacher, "teacher_model", ["vocab_size" if words else "num_labels"], why)

    @cached_property
    def first_soft_id(self) -> int:
        return self.soft_triggers.first_id(self.reading_tokenizer)

    def as_taught(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as the teacher reads it: no attention goes to soft triggers, and their places are padding."""
        if self.soft_triggers is None:
            return inputs
        ids = inputs["input_ids"]
        hidden = ids >= self.first_soft_id
        # A decoder's classification head reads the last token that is no padding.
        padding = self.teacher.config.get_text_config().pad_token_id
        taught = inputs | {
            "input_ids": ids.masked_fill(hidden, 0 if padding is None else padding),
            "attention_mask": inputs["attention_mask"].masked_fill(hidden, 0),
        }
        if "readout_position" in inputs:
            places = torch.arange(ids.shape[1], device=ids.device)
            up_to = taught["attention_mask"].bool() & (places <= inputs["readout_position"][:, None])
            taught["readout_position"] = (up_to * places).amax(dim=1)
        return taught

    @cached_property
    def mask(self) -> FeatureMask | None:
        """The mask, frozen, on the device."""
        mask = self.feature_mask
        if isinstance(mask, str | Path):
            mask = FeatureMask.from_pretrained(mask)
        return None if mask is None else mask.requires_grad_(False).to(self.args.device)

    @cached_property
    def teacher_feature_layers(self) -> list[str]:
        """Names of the teacher's modules that the student learns from, bottom first."""
        if not self.args.feature_weight:
            return []
        if self.args.teacher_feature_layers is None and self.mask is not None:
            return self.mask.layers
        return layer_names(self.teacher, self.args.teacher_feature_layers, "teacher_feature_layers")

    @cached_property
    def student_feature_layers(self) -> list[str]:
        """Names of the student's modules that learn, one for each of `teacher_feature_layers`.

        Raises:
            `ValueError`: if their number is another.
        """
        if not self.teacher_feature_layers:
            return []
        if self.args.student_feature_layers is None:
            return counterparts(self.model, self.teacher, self.teacher_feature_layers)
        names = layer_names(self.model, self.args.student_feature_layers, "student_feature_layers")
        if len(names) != len(self.teacher_feature_layers):
            raise ValueError(
                f"student_feature_layers is {names}: name {len(self.teacher_feature_layers)}, as there are teacher layers"
            )
        return names

    @torch.no_grad()
    def teach(self, inputs: dict[str, Tensor]) -> tuple[ModelOutput, dict[str, Tensor]]:
        """The masked teacher's outputs and features."""
        known = model_inputs(self.teacher, inputs) | {"labels": inputs["labels"]}
        mask = contextlib.nullcontext()
        if self.mask is not None:
            mask = self.mask.applied_to(self.teacher, inputs.get("readout_position"))
        with self.accelerator.autocast(), mask, captured(self.teacher, self.teacher_feature_layers) as features:
            outputs = self.forward(self.teacher, known)
        return outputs, features

    # ---- The student goes into training with its connectors, and comes out without ----

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        student = self.model
        if not len(self.connectors):  # trained once more, they go on with the student
            self.connectors = self._make_connectors()
        # Evaluation runs the bare student: in the precision that it is trained in.
        self.accelerator.prepare_model(student, evaluation_mode=True)
        self.model = self.model_wrapped = StudentWithConnectors(student, self.connectors, self.student_feature_layers)
        try:
            prepared = super()._prepare_for_training(*args, **kwargs)
        finally:
            self.model = self.callback_handler.model = student
        return prepared

    def _make_connectors(self) -> nn.ModuleList:
        if not self.teacher_feature_layers:
            return nn.ModuleList()
        inputs = next(clean_batches(self))
        _, theirs = self.teach(self.as_taught(inputs))
        layers, student = self.student_feature_layers, self.model
        with whole(student.parameters()), looking(student), captured(student, layers) as ours:
            # An engine moves the student to the device when it wraps it: until then it runs where it is.
            here = next(student.parameters()).device
            student(**{name: value.to(here) for name, value in model_inputs(student, inputs).items()})
        check_features(self.teacher, self.teacher_feature_layers, theirs, inputs)
        check_features(student, layers, ours, inputs)
        pairs = [(ours[own], theirs[name]) for own, name in zip(layers, self.teacher_feature_layers, strict=True)]
        if self.args.feature_loss == "margin":
            if any(feature.dim() != 4 for feature in theirs.values()):
                raise ValueError(
                    "feature_loss is 'margin', and the features are no images': it is made for what a ReLU cuts; use 'mse'"
                )
            self.margins = self._measure_margins()
        return make_connectors(pairs, self.args.seed)

    def _measure_margins(self) -> dict[str, Tensor]:
        """Mean negative value of each channel in the teacher as it is, [C]; 0 where there is none."""
        sums = dict.fromkeys(self.teacher_feature_layers, 0.0)
        with self.accelerator.autocast(), looking(self.teacher):
            for inputs in clean_batches(self):
                with captured(self.teacher, self.teacher_feature_layers) as features:
                    self.teacher(**model_inputs(self.teacher, inputs))
                for name, feature in features.items():
                    values = as_tokens(feature).flatten(0, 1).float()
                    negative = values.clamp(max=0)
                    sums[name] = sums[name] + torch.stack([negative.sum(0), (negative < 0).sum(0).float()])
        return {name: total / number.clamp(min=1) for name, (total, number) in sums.items()}

    def extra_state(self) -> dict[str, Tensor]:
        # What a sharding engine saves is all that it has wrapped.
        return {} if self.accelerator.distributed_type in SHARDED else self.connectors.state_dict()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.connectors.load_state_dict(state)

    @contextlib.contextmanager
    def _with_connectors(self) -> Iterator[None]:
        """FSDP can run, save and load nothing less than what it has wrapped: there, and inside of this, that is the model."""
        student = self.model
        if self.accelerator.distributed_type == DistributedType.FSDP:
            self.model = self.model_wrapped
        try:
            yield
        finally:
            self.model = student

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        with self._with_connectors():
            return super().evaluation_loop(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._with_connectors():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_best_model(self) -> None:
        with self._with_connectors():
            super()._load_best_model()

    # ---- Loss ----

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], step_counts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        settings = self.args
        taught = self.as_taught(inputs)
        lesson, features = self.teach(taught)
        outputs = self.forward(model, inputs)
        terms = {"task": self.answer_loss(outputs.logits, inputs)}
        if self.teacher_feature_layers:
            distances = [
                weight * self._distance(own, features[name], name, taught)
                for weight, own, name in zip(
                    layer_weights(len(self.teacher_feature_layers)),
                    outputs.features,
                    self.teacher_feature_layers,
                    strict=True,
                )
            ]
            terms["feature"] = settings.feature_weight * sum(distances)
        if settings.logit_weight:
            divergence = logit_divergence(outputs.logits, lesson.logits, inputs["labels"], settings.temperature)
            terms["logit"] = settings.logit_weight * divergence
        return terms, outputs.logits

    def _distance(self, student: Tensor, teacher: Tensor, name: str, inputs: dict[str, Tensor]) -> Tensor:
        if self.args.feature_loss == "margin":
            return margin_distance(student, teacher, self.margins[name])
        return feature_distance(student, teacher, valid_tokens(inputs))
