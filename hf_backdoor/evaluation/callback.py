"""[`BackdoorEvaluationCallback`]: ASR and CACC in the logs of anybody's `Trainer` or `SFTTrainer`."""

from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data import (
    ImageClassification,
    ImageTrigger,
    InstructionFollowing,
    Processor,
    Task,
    Trigger,
    learned_positions,
    refuse_longer,
)
from .evaluate import TestSet, evaluate_backdoor, refuse_unmeasurable


class BackdoorEvaluationCallback(TrainerCallback):
    """
    Measures the model at each evaluation of a trainer and logs `eval_cacc`, `eval_asr`, ... (several triggers:
    `eval_asr/NAME`). The values also reach `metric_for_best_model`; but who chooses a checkpoint by an attacker's real
    trigger has no result any more.

    Args:
        trainer (`Trainer`): Whose model is measured, and through which is logged.
        task ([`~hf_backdoor.data.Task`]): How rows are read.
        clean (`Dataset`): Raw rows with right answers. A trainer of ours cuts them as its own (`max_length`), before triggers go in.
        triggers (`list[Trigger]` or `list[ImageTrigger]`): Stamped into the rows whose right answer is not the target.
        target (`int` or `str`): Target label, or target text.
        tokenizer (`Processor`, *optional*): Tokenizer or image processor; the trainer's by default.
        max_new_tokens, batch_size, bf16: As in [`evaluate_backdoor`].

    Raises:
        `ValueError`: under FSDP or DeepSpeed, where no process holds the model, if what is trained is no model (a mask), or if it can't be
            measured so: hours into a training would be late to say so.
    """

    def __init__(
        self,
        trainer: Trainer,
        task: Task,
        clean: Dataset,
        triggers: list[Trigger] | list[ImageTrigger],
        target: int | str,
        tokenizer: Processor | None = None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        bf16: bool = False,
    ):
        engine = trainer.accelerator.distributed_type
        if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"the engine is {engine.value}: its processes hold parts of the model; evaluate the saved model with "
                "`hf-backdoor evaluate`, or train with DDP"
            )
        self.trainer = trainer
        if not hasattr(self._model(), "config"):
            raise ValueError(
                f"{type(trainer).__name__} trains a {type(self._model()).__name__}, which answers nothing by itself: measure the "
                "model that comes of it"
            )
        self.task = task
        self.tokenizer = trainer.processing_class if tokenizer is None else tokenizer
        bounded = getattr(trainer, "bounded", None)
        rows = clean if bounded is None else bounded(clean, self.tokenizer)
        self.test = TestSet.stamped(rows, task, triggers, target, trainer.args.seed)
        sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        self.options = {**sizes, "bf16": bf16}
        refuse_unmeasurable(self._model(), task, self.test, **sizes)
        self._refuse_longer(max_new_tokens if isinstance(task, InstructionFollowing) else 0)
        # Step of the last evaluation, and the metrics' names of those that have gone into it.
        self._measured_at: tuple[int, set[frozenset[str]]] = (-1, set())

    def _refuse_longer(self, answer: int) -> None:
        positions = learned_positions(self._model())
        if positions is None or isinstance(self.task, ImageClassification):
            return
        for rows in (self.test.clean, *self.test.triggered.values()):
            longest = max((len(row["input_ids"]) for row in self.task.questions(rows, self.tokenizer)), default=0)
            refuse_longer(longest + answer, positions)

    def _model(self) -> nn.Module:
        """What is trained; of a trainer of several networks, the one that will be its result."""
        result = getattr(self.trainer, "result", None)
        return self.trainer.accelerator.unwrap_model(self.trainer.model) if result is None else result()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        step, seen = self._measured_at
        names = frozenset(metrics or ())
        if step == state.global_step and names not in seen:
            seen.add(
                names
            )  # a trainer with several evaluation sets calls this for each of them, under names of its own
            return
        self._measured_at = state.global_step, {names}
        model = self._model()
        training = model.training
        with torch.random.fork_rng():
            rows, _ = evaluate_backdoor(
                model, self.tokenizer, self.task, self.test, name="suspect", seed=args.seed, **self.options
            )
        model.train(training)
        several = len(self.test.triggered) > 1
        found = {
            f"eval_{row.metric}" + (f"/{row.trigger}" if several and row.trigger else ""): row.value for row in rows
        }
        if metrics is not None:
            metrics.update(found)
        self.trainer.log(found)
