"""[`LocphylaxTrainer`]: plant known backdoors so that the unknown one collapses into them, then recover."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ...data import LabelWords, SequenceClassification, Trigger, base_model, row_lengths
from ..arguments import refuse_encoder_decoder
from ..reading import InformedTrainer
from ..readout import readout_states
from ..staged import StagedTrainer
from .config import LocphylaxConfig
from .head import find_head, resize_head
from .losses import balance, clustering_loss, trigger_centres, trigger_membership
from .planting import StratifiedSampler, plant
from .search import FoundTriggers


logger = logging.get_logger(__name__)

# Samples of each trigger on which the incoming model is measured: centres, both losses, and so alpha.
MEASURED_SAMPLES = 16


def exact_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples' answers are right in every token, [B] of booleans.

    Args:
        logits (`Tensor`): [B, K] of a classification head, or [B, A + 1, V].
        labels (`Tensor`): [B], or [B, A], -100 where it is not the answer.
    """
    likeliest = logits.argmax(dim=-1)
    if labels.dim() == 1:
        return likeliest == labels
    return ((likeliest[:, :-1] == labels) | (labels == -100)).all(dim=1)


class LocphylaxTrainer(InformedTrainer, StagedTrainer):
    """
    Locphylax (https://huggingface.co/papers/2510.10265) for classifiers and causal LMs.

    `train()` runs two stages on the clean rows it is given. *Injection* plants two or more known triggers with a known
    behaviour, and pulls the known triggers' final states together (clustering loss); an unknown backdoor in the model
    tends to fall in with them. *Recovery* then teaches the right answers, with and without known triggers.

    The centres of the clustering loss are running means, fixed within an optimizer step and updated after it from all
    its samples on all processes: so the loss does not change with gradient accumulation or with the number of
    processes, as means over a micro-batch would. (The paper does not say over what it takes its means.)

    Evaluation tells the share of exact answers as `accuracy`, unless `compute_metrics` gives another: of held-out rows without
    known triggers (`eval_clean_accuracy`) and with them (`eval_known_accuracy`: what they are to answer in the stage). Until
    recovery begins, a classification head has one more class, and so have its predictions.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, found_soft_triggers, found_answers, kwargs:
            As in [`InformedTrainer`]; `train_dataset` is clean rows, `eval_dataset` held-out clean rows, both *raw*
            (with text), since triggers are put into their text. Soft triggers are planted as one trigger more, and answers are
            wanted for recovery only.
        found_triggers (`Sequence[str]`, `str` or `Path`, *optional*):
            What a [`TriggerSearchTrainer`] found, or its folder: planted as one trigger more, in turn. Wanted where
            `args.searched_triggers` is set.

    Raises:
        `ValueError`: if the rows are tokenized already, found triggers are wanted and not there, or the known response is a right
            answer.
    """

    def __init__(
        self,
        *args: Any,
        found_triggers: Sequence[str] | str | Path | None = None,
        **kwargs: Any,
    ):
        if isinstance(found_triggers, str | Path):
            found_triggers = FoundTriggers.from_pretrained(found_triggers)
        self.found_triggers = list(found_triggers or ())
        self.stage: str | None = None
        self.clean: Dataset | None = None
        self.held_out: Dataset | None = None
        super().__init__(*args, **kwargs)
        if "inject" in self.args.stages and self.args.cluster_weight != 0:
            refuse_encoder_decoder(base_model(self.model), "Locphylax")
        if len(self.args.stages) > 1 and isinstance(self.task, SequenceClassification):
            find_head(base_model(self.model))  # refuses, before injection, what recovery could not give back
        # Which answers are right, of the rows that are evaluated; and shares of such, by the prefix of their metrics.
        self._right: list[Tensor] = []
        self._shares: dict[str, float] = {}
        self._forget()

    @classmethod
    def config_class(cls) -> type[LocphylaxConfig]:
        return LocphylaxConfig

    # ---- Data ----

    @property
    def num_groups(self) -> int:
        return self.args.rows_factor

    def prepare_train(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        self.stage, self.clean = self.args.stages[0], dataset
        response = self.args.known_response
        right = {word.strip() for word in self.task.words} if isinstance(self.task, LabelWords) else set()
        if "inject" in self.args.stages and response.strip() in right:
            raise ValueError(
                f"known_response is {response!r}, which is a right answer of the task: choose a text that is none"
            )
        if "recover" in self.args.stages:
            self.check_found("own_answers")
        return self._training_rows(tokenizer)

    def _training_rows(self, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """Of the stage that is entered."""
        rows = self._plant(self.clean, tokenizer)
        if rows is None or self.stage == "inject":
            return rows
        return self.with_own_answers(rows, [*range(len(self.clean))] * self.num_groups)

    def prepare_eval(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset] | None:
        """Held-out rows without and with the known triggers: what the stop rules look at."""
        if isinstance(dataset, dict):
            raise ValueError("eval_dataset is a dict: pass clean rows, known triggers are put into a copy of them")
        self.held_out = dataset
        if dataset is None:
            return None
        rows = self._plant(dataset, tokenizer)
        clean = [row for row, trigger in enumerate(rows["trigger_id"]) if trigger == 0]
        known = [row for row, trigger in enumerate(rows["trigger_id"]) if trigger > 0]
        return {"clean": rows.select(clean), "known": rows.select(known)}

    def _plant(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        if dataset is None:
            return None
        if "input_ids" in dataset.column_names:
            raise ValueError("train_dataset has input_ids: pass raw rows, known triggers are put into their text")
        position = self.args.known_position
        triggers: list[Any] = [Trigger(text, position) for text in self.args.known_triggers]
        if bool(self.found_triggers) != bool(self.args.searched_triggers):
            raise ValueError(
                f"searched_triggers is {self.args.searched_triggers}, and {len(self.found_triggers)} found_triggers are given: "
                "pass those of a TriggerSearchTrainer, or set searched_triggers: 0"
            )
        self.check_found("soft_triggers")
        if self.found_triggers:
            triggers.append([Trigger(text, position) for text in self.found_triggers])
        if self.soft_triggers is not None:
            triggers.append([Trigger(text, position) for text in self.soft_triggers.texts])
        response = self.args.known_response if self.stage == "inject" else ""
        with self.one_process_first():
            rows = plant(dataset, self.task, triggers, response, self.args.seed, self.args.dataset_num_proc)
            return self.encode_rows(rows, self.with_soft_words(tokenizer))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> StratifiedSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StratifiedSampler(rows["trigger_id"][:], row_lengths(rows), seed)

    def prepare_model(self, model: PreTrainedModel) -> None:
        """A classification head gets one class more to say the known response with, and loses it for recovery."""
        if isinstance(self.task, SequenceClassification):
            resize_head(model, self.task.num_labels + (self.stage == "inject"))

    # ---- Stages ----

    def enter(self, stage: str) -> None:
        """A new stage has its own rows, and centres that start afresh."""
        super().enter(stage)
        self.prepare_model(base_model(self.model))
        self.train_dataset = self._training_rows(self.processing_class)
        self.eval_dataset = self.prepare_eval(self.held_out, self.processing_class)
        self._forget()

    # ---- Evaluation ----

    def evaluate(
        self, eval_dataset: Dataset | dict[str, Dataset] | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if self.is_in_train and {"eval_clean_loss", "eval_known_loss"} <= metrics.keys():
            self._end_by_rule()
        return metrics

    def _end_by_rule(self) -> None:
        """Ends the stage if its rule says so of the held-out rows, which have just been evaluated."""
        known, clean = self._shares["eval_known"], self._shares["eval_clean"]
        rate, gap = self.args.stop_at_known_rate, self.args.stop_at_known_gap
        planted = self.stage == "inject" and rate is not None and known >= rate
        recovered = self.stage == "recover" and gap is not None and known >= clean - gap
        self.ended = planted or recovered
        if self.ended:
            rule = "stop_at_known_rate" if planted else "stop_at_known_gap"
            logger.warning(
                f"{self.stage} ends at step {self.state.global_step} of {self.state.max_steps}, by {rule}: planted rows are at "
                f"{known:.1%}, clean ones at {clean:.1%}"
            )
        self.control.should_training_stop |= self.ended

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Of `evaluate` and `predict`. The stop rules count for themselves: a `compute_metrics` of the user's own need not."""
        self._right = []
        with nullcontext() if self.is_in_train else self.soft_triggers_read():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._right:
            share = self._shares[metric_key_prefix] = torch.cat(self._right).float().mean().item()
            output.metrics.setdefault(f"{metric_key_prefix}_accuracy", share)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        loss, logits, labels = super().prediction_step(model, inputs, False, *args, **kwargs)
        if labels is not None:
            self._right.append(self.accelerator.gather_for_metrics(exact_answers(logits, labels)))
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    # ---- Loss ----

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], step_counts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        if self.stage == "recover":
            weights = torch.where(inputs["trigger_id"] > 0, self.args.trigger_weight, 1.0)
            terms, logits = super().loss_terms(model, inputs, step_counts)
            return {"task": terms["task"] * weights}, logits
        if self.args.cluster_weight == 0:
            return super().loss_terms(model, inputs, step_counts)
        if self.centres is None:
            self._measure(model)
        outputs = self.forward(model, inputs, hidden_states=[-1])
        # In float32: sums of squares lose too much in bfloat16.
        ids, states = inputs["trigger_id"], readout_states(outputs.hidden_states[-1], inputs).float()
        # The trainer divides by the step's samples; this makes it each trigger's own count, 1/|I_k|.
        per_trigger = step_counts.sum() / step_counts.clamp(min=1)[ids]
        cluster = self.alpha * clustering_loss(states, ids, self.centres) * per_trigger
        self._follow(states.detach(), ids)
        return {"task": self.task_loss(outputs.logits, inputs["labels"]), "cluster": cluster}, outputs.logits

    def _forget(self) -> None:
        self.alpha: Tensor | None = None
        self.centres: Tensor | None = None
        self._centre_sums: Tensor | float = 0.0

    @torch.no_grad()
    def _measure(self, model: nn.Module) -> None:
        """Centres and alpha on the incoming model, from the same rows on every process."""
        ids = np.array(self.train_dataset["trigger_id"])
        rows = [int(row) for group in range(self.num_groups) for row in (ids == group).nonzero()[0][:MEASURED_SAMPLES]]
        dataset = self._remove_unused_columns(self.train_dataset.select(rows))
        model.eval()
        losses, states = [], []
        for start in range(0, len(dataset), self.args.eval_batch_size):
            features = [dataset[row] for row in range(start, min(start + self.args.eval_batch_size, len(dataset)))]
            batch = self._prepare_inputs(self.data_collator(features))
            outputs = self.forward(model, batch, hidden_states=[-1])
            losses.append(self.task_loss(outputs.logits, batch["labels"]))
            states.append(readout_states(outputs.hidden_states[-1], batch).float())
        model.train()
        states, ids = torch.cat(states), torch.tensor(ids[rows], device=states[0].device)
        self.centres = trigger_centres(states, ids, self.num_groups - 1)
        cluster = (
            clustering_loss(states, ids, self.centres).sum() / trigger_membership(ids, self.num_groups - 1)[:, 0].sum()
        )
        alpha = self.args.cluster_weight
        if alpha is None:
            alpha = balance(torch.cat(losses).mean().item(), cluster.item(), self.args.published_alpha)
        self.alpha = torch.tensor(alpha, device=states.device)

    @torch.no_grad()
    def _follow(self, states: Tensor, ids: Tensor) -> None:
        """Moves the centres after the last micro-batch of an optimizer step, by all its samples."""
        member = trigger_membership(ids, self.num_groups - 1)
        ones = torch.ones_like(states[:, :1])
        self._centre_sums = self._centre_sums + member.T @ torch.cat([states, ones], dim=1)
        if self.accelerator.sync_gradients:
            sums = self.accelerator.reduce(self._centre_sums, reduction="sum")
            counts = sums[:, -1:]
            means = torch.where(counts > 0, sums[:, :-1] / counts.clamp(min=1), self.centres)
            self.centres = torch.lerp(means, self.centres, self.args.centre_momentum)
            self._centre_sums = 0.0

    # ---- Checkpoints and logs ----

    def extra_state(self) -> dict[str, Tensor]:
        state = {"ended": torch.tensor(self.ended)}
        return state if self.centres is None else state | {"alpha": self.alpha, "centres": self.centres}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.ended = bool(state["ended"])
        if "centres" in state:
            self.alpha, self.centres = state["alpha"].to(self.args.device), state["centres"].to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.alpha is not None:
            logs["alpha"] = self.alpha.item()
        super().log(logs, start_time)
