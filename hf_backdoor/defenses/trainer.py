"""[`DefenseTrainer`]: what all methods share, and what plain fine-tuning (attacks, controls) uses as it is.

Stock `Trainer` gives sequence classifiers a loss that grows with gradient accumulation and with the number of
processes (https://github.com/huggingface/transformers/issues/47688), so a comparison between methods needs a base of
its own, and the controls have to run on it too. The rule here: a method returns *one value for each sample* for each
of its losses ([`DefenseTrainer.loss_terms`]), and this class takes the mean over all samples of the optimizer step,
however the step is cut into micro-batches and spread over processes.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_utils import TrainOutput

from ..data import (
    SIDE_COLUMNS,
    Processor,
    Rows,
    Task,
    auto_class,
    base_model,
    collator_for,
    encoded,
    infer_task,
    learned_positions,
    moved,
    reads_mean,
    refuse_missing,
    tell_padding,
)
from .arguments import (
    check_arguments,
    check_bound,
    check_checkpointing,
    check_other,
    check_rows,
    check_task,
    check_trained,
    labels_of,
    refuse_no_causal_lm,
)
from .autocast import inputs_as_they_are, keep_as_multiplied
from .config import DefenseConfig
from .divergence import check_losses, check_weights, sound_attention
from .engines import SHARDED, check_engine, gather, layer_classes, shared_out
from .losses import answer_cross_entropy, label_cross_entropy
from .raw_rows import RawRowsTrainer
from .streams import check_streams


class DefenseTrainer(RawRowsTrainer):
    """
    `Trainer` with a loss that is right under gradient accumulation and several processes, for classifiers (of texts or
    images) and causal LMs. Used as it is, it is plain supervised fine-tuning.

    Args:
        model (`PreTrainedModel`):
            The suspect: a causal LM, or a model with a classification head for texts or images.
        args ([`DefenseConfig`]):
            Training arguments.
        train_dataset, eval_dataset (`Dataset`, *optional*):
            Raw rows (`text` or `image`, and `label`; or `prompt` and `response`), or rows that a [`~hf_backdoor.data.Task`]
            has encoded. `eval_dataset` may be a dictionary of them. Plain fine-tuning also trains on a stream
            (`IterableDataset`), encoded as it is read; set `max_steps`.
        processing_class (`Processor`):
            The model's tokenizer, or image processor.
        task ([`~hf_backdoor.data.Task`], *optional*):
            How rows become the model's inputs; found from the model, the columns and `args` by default.
        peft_config (`PeftConfig`, *optional*):
            Trains an adapter in place of all the weights.
        teacher_model (`PreTrainedModel`, `str` or `Path`, *optional*):
            Second model of a method that distils (`takes_teacher`), or its folder: frozen, and loaded when it is first needed.
        kwargs:
            Everything else that `Trainer` takes, but for `model_init` and `compute_loss_func`.

    Raises:
        `ValueError`: if the processing class is missing, the columns fit no task, there are no rows or rows without an answer, rows
            that must be a whole come as a stream, rows are longer than the model has positions for, the teacher is the model
            itself, several GPUs are visible to one process, or an argument is given that would not be read.
    """

    # Our loss is divided by the samples of the whole optimizer step, so Trainer must not divide again.
    loss_is_scaled_for_ga = True
    # Whether the training rows may be a stream. What plants, splits or measures goes over all of them before it trains.
    takes_streams = True
    # Whether its losses ask a teacher.
    takes_teacher = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: DefenseConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Processor | None = None,
        task: Task | None = None,
        peft_config: PeftConfig | None = None,
        teacher_model: PreTrainedModel | str | Path | None = None,
        **kwargs: Any,
    ):
        args = self.config_class()("tmp_trainer") if args is None else args
        check_arguments(self, model, args, processing_class, peft_config, kwargs | {"teacher_model": teacher_model})
        if processing_class is None and data_collator is None:
            raise ValueError("processing_class is None: pass the model's tokenizer or image processor")
        self.args = args
        check_other(model, teacher_model, "teacher_model")
        check_streams(self, train_dataset, eval_dataset)
        check_rows(args, model, train_dataset, eval_dataset)
        rows = next(iter(eval_dataset.values())) if isinstance(eval_dataset, dict) else eval_dataset
        rows = train_dataset if train_dataset is not None else rows
        # Who brings a collator along need not have columns that we know, or columns at all.
        ours = isinstance(rows, Dataset | IterableDataset) and isinstance(processing_class, PreTrainedTokenizerBase)
        known = data_collator is None or ours
        if task is None and known and rows is not None and not encoded(rows):
            task = infer_task(base_model(model), rows, args.label_words, args.prompt_template, args.system_prompt)
        check_task(args, task)
        self.task = task
        self.teacher_model = teacher_model
        self.positions = learned_positions(base_model(model))
        self._component_sums: dict[str, Tensor] = {}
        check_bound(args.max_length, task, train_dataset, eval_dataset)
        train_rows = self.prepare_train(self.bounded(train_dataset, processing_class), processing_class)
        eval_rows = self.prepare_eval(self.bounded(eval_dataset, processing_class), processing_class)
        set_seed(args.seed)
        self.prepare_model(base_model(model))
        tell_padding(base_model(model), processing_class)
        super().__init__(
            model=self.trained_model(model, peft_config),
            args=args,
            data_collator=collator_for(
                processing_class, args.pad_to_multiple_of, data_collator, reads_mean(base_model(model))
            ),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        check_engine(self.args, self.accelerator)
        if self.is_fsdp_enabled:
            base_model(model)._no_split_modules = layer_classes(base_model(model))
        check_checkpointing(self.args, self.model)

    @classmethod
    def config_class(cls) -> type[DefenseConfig]:
        return DefenseConfig

    @classmethod
    def check_launch(cls, zero3: bool) -> None:
        """Raises `ValueError` for an engine that this training can't run in: asked before any training of a run. Override."""

    # ---- Before training: a method that plants something overrides these ----

    def prepare_model(self, model: PreTrainedModel) -> None:
        """Changes the model in place, before an adapter or an engine is put around it."""

    def trained_model(self, model: PreTrainedModel, peft_config: PeftConfig | None) -> nn.Module:
        """What is trained: the model, or an adapter in it. A method that trains two networks at once overrides this."""
        return model if peft_config is None else get_peft_model(model, peft_config)

    def prepare_train(self, dataset: Rows | None, processor: Processor) -> Rows | None:
        return self.encode_rows(dataset, processor)

    def prepare_eval(
        self, dataset: Dataset | dict[str, Dataset] | None, processor: Processor
    ) -> Dataset | dict[str, Dataset] | None:
        if isinstance(dataset, dict):
            return {name: self.encode_rows(rows, processor) for name, rows in dataset.items()}
        return self.encode_rows(dataset, processor)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._forward_columns = set(self._signature_columns)
            self._signature_columns += SIDE_COLUMNS

    def result(self) -> nn.Module:
        """What was trained, to be saved: the model, or what `save_pretrained` can save in its place."""
        return self.accelerator.unwrap_model(self.model)

    def gather(self) -> None:
        """After training: where an engine has sharded the weights, the first process gets them whole, for [`result`] to be
        saved. Call it on every process; nothing can be run afterwards."""
        gather(self.model_wrapped, self.accelerator)

    def findings(self, suspect_rows: Dataset | None) -> dict[str, Dataset]:
        """Tables to be kept beside the result, by name: what a method has found out about the rows that made the suspect."""
        return {}

    # ---- Teacher ----

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher, frozen, in evaluation mode, on the device. Prepared when it is first asked for: a second model in
        `__init__` would keep `evaluate` from preparing the first.

        Raises:
            `ValueError`: if there is none, or it does not fit the student.
        """
        if self.teacher_model is None:
            raise ValueError("teacher_model is None: pass the model to distil from, or its folder")
        teacher = self.frozen(self.teacher_model)
        self.check_teacher(teacher)
        return teacher

    def check_teacher(self, teacher: PreTrainedModel) -> None:
        """Raises `ValueError` for a teacher that the student can't learn from. Override."""

    def frozen(self, model: PreTrainedModel | str | Path) -> PreTrainedModel:
        """A model beside the trained one, or its folder: frozen, in evaluation mode, on the device. One that is read from a
        folder runs under autocast only, where the training does.

        Raises:
            `ValueError`: if a folder holds a model without the student's kind of head, or one that sees the answer it is to give.
        """
        if isinstance(model, str | Path):
            student = base_model(self.model)
            model = read_model(auto_class(student), model, student)
            kind, sharded = self.args.device.type, self.accelerator.distributed_type in SHARDED
            with self.accelerator.autocast():
                if torch.is_autocast_enabled(kind) and not sharded:
                    keep_as_multiplied(model, torch.get_autocast_dtype(kind))
        tell_padding(base_model(model), self.processing_class)
        return shared_out(model.requires_grad_(False).eval(), self.accelerator)

    # ---- Training ----

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        check_trained(self.model if model is None else model, self.optimizer)
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`.

        Raises:
            `ValueError`: if the training diverges: losses that are logged, or weights at the end, are not numbers.
        """
        if self.args.torch_compile:
            torch.compiler.reset()  # what was compiled before knows nothing of hooks that were put on later
        output = super().train(*args, **kwargs)
        check_weights(self.model, self.accelerator, self.args.learning_rate)
        return output

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        # Here, and not in the collator: nothing that is only looked at is moved, and a resumed run draws what an
        # uninterrupted one would have drawn (batches are collated ahead of the checkpoint).
        if self.args.augmentation != "none":
            if "pixel_values" not in inputs:
                raise ValueError(
                    f"augmentation is {self.args.augmentation!r}, and rows have no pixels: set augmentation: none"
                )
            pixels = moved(inputs["pixel_values"], mirror=self.args.augmentation == "shift_and_mirror")
            inputs = {**inputs, "pixel_values": pixels}
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        with inputs_as_they_are(model, self.accelerator.native_amp), sound_attention(length, self.args.torch_compile):
            return super().training_step(model, inputs, num_items_in_batch)

    # ---- Loss ----

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], step_counts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of one micro-batch. Override to add a method's own.

        Args:
            model (`nn.Module`): The wrapped model; never `self.model`, or DDP and FSDP would not see the call.
            inputs (`dict[str, Tensor]`): A batch of the contract in `data/collators.py`.
            step_counts (`Tensor`): [G], samples of each `trigger_id` in the whole optimizer step, over all processes.

        Returns:
            The terms by name, each [B] and weighted as it enters the loss, and the logits.
        """
        outputs = self.forward(model, inputs)
        return {"task": self.answer_loss(outputs.logits, inputs)}, outputs.logits

    def answer_loss(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The task's loss that a model is trained by, [B]. Override to teach other answers than the right ones."""
        return self.task_loss(logits, inputs["labels"])

    def forward(
        self, model: nn.Module, inputs: dict[str, Tensor], hidden_states: Sequence[int] | None = None, **more: Any
    ) -> ModelOutput:
        """Runs a model on a batch; logits at the answer's positions only, and the hidden states of the layers named."""
        self._set_signature_columns_if_needed()
        arguments = {name: inputs[name] for name in self._forward_columns if name in inputs and name != "labels"}
        labels = labels_of(inputs)
        keep = labels.shape[1] + 1 if labels.dim() == 2 else None
        if keep is not None and keep > inputs["input_ids"].shape[1]:
            raise ValueError(
                "labels are as long as input_ids: a causal LM's are those of the last tokens, all of the answer and no more; "
                "leave data_collator out, or see hf_backdoor.data.collators"
            )
        if keep is not None and "logits_to_keep" in self._forward_columns:
            arguments["logits_to_keep"] = keep
        if hidden_states:
            arguments["output_hidden_states"] = list(hidden_states)
        # A model that the engine has wrapped does so by itself; a teacher would run in float32, at several times the cost.
        with self.accelerator.autocast():
            outputs = model(**arguments, **more)
        if keep is not None and outputs.logits.shape[1] != keep:
            outputs.logits = outputs.logits[:, -keep:]
        return outputs

    @staticmethod
    def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (label_cross_entropy if labels.dim() == 1 else answer_cross_entropy)(logits, labels)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], labels_of(inputs).device)
        if model.training:
            terms, logits = self.loss_terms(model, inputs, num_items_in_batch)
            self._record(terms)
        else:
            # In evaluation the task's loss alone, so that `eval_loss` means the same for every method.
            logits = self.forward(model, inputs).logits
            terms = {"task": self.task_loss(logits, inputs["labels"])}
        total = sum(terms.values()).sum() / num_items_in_batch.sum()
        # Gradients (and logged losses) are averaged over processes: undo it, the division above counts them all.
        loss = total * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Samples of each trigger id in the optimizer step, [G]: what every mean in a loss is divided by."""
        # A collator of the user's own need not know of triggers: its samples are all clean.
        ids = [
            batch.get("trigger_id", torch.zeros(len(labels_of(batch)), dtype=torch.long)) for batch in batch_samples
        ]
        # A stream may have come to its end.
        together = torch.cat(ids).to(device) if ids else torch.zeros(0, dtype=torch.long, device=device)
        counts = torch.bincount(together, minlength=self.num_groups)
        return self.accelerator.reduce(counts, reduction="sum")

    @property
    def num_groups(self) -> int:
        """Number of trigger ids, 0 (clean) included."""
        return 1

    # ---- Logs: sums stay on the device until Trainer logs ----

    @torch.no_grad()
    def _record(self, terms: dict[str, Tensor]) -> None:
        sums = self._component_sums
        for name, values in terms.items():
            count = torch.full((), float(len(values)), device=values.device)  # `torch.tensor` waits for the device
            pair = torch.stack([values.detach().sum().float(), count])
            sums[name] = sums[name] + pair if name in sums else pair

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = {}
            for name, pair in sorted(self._component_sums.items()):
                total, count = self.accelerator.reduce(pair, reduction="sum").tolist()
                means[name] = total / count
            self._component_sums.clear()
            if not self.args.fp16:  # there a scaler leaves such a step out
                check_losses(means, self.state.global_step, self.args.learning_rate)
            if len(means) > 1:
                logs.update({f"loss/{name}": mean for name, mean in means.items()})
        super().log(logs, start_time)


def read_model(kind: type, folder: str | Path, like: PreTrainedModel) -> PreTrainedModel:
    """The model of a folder, by a class or an auto class, with the data type and the attention of one at hand.

    Raises:
        `ValueError`: if it has no weights for that kind of head, or sees the answer it is to give.
    """
    model, found = kind.from_pretrained(
        folder,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=like.dtype,
        attn_implementation=like.config._attn_implementation,
    )
    refuse_no_causal_lm(model, f"model {str(folder)!r}")
    refuse_missing(folder, found["missing_keys"], auto_class(model))
    return model
