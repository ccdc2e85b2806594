"""[`NonTargetTrainer`] and [`NTMLTrainer`]: non-target training on the suspect rows, mutual learning on clean ones."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from ...data import Processor, base_model, stamp
from ..arguments import check_other, check_trained
from ..engines import SHARDED
from ..trainer import read_model
from .classes import ClassTrainer, feature_states
from .losses import feature_loss, non_target_loss, prediction_loss
from .pair import NETWORKS, AdapterPair, ModelPair, Pair, has_both_adapters
from .suspicion import suspicion_table


TEACHER_LOGITS = "teacher_logits"


class WithTeacherLogits:
    """A collator that lets the column `teacher_logits` pass, [B, K]."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        others = [{name: value for name, value in row.items() if name != TEACHER_LOGITS} for row in features]
        batch = dict(self.collator(others))
        if TEACHER_LOGITS in features[0]:
            batch[TEACHER_LOGITS] = torch.tensor([row[TEACHER_LOGITS] for row in features])
        return batch


class NonTargetTrainer(ClassTrainer):
    """
    Non-target training, NT-ML's second stage (https://huggingface.co/papers/2508.05404).

    A second network learns, on the suspect rows, the target network's probabilities without each sample's given label.
    They are computed once, before the first step, and kept as a column `teacher_logits` of `train_dataset`: the target
    network is not run again in every epoch. Rows that have the column already are taken as they are.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`]; `train_dataset` is the suspect rows. The model must not come from the target
            network, or it would bring the backdoor along: start from what the target network was trained from.
            Or, for two adapters in one frozen model, a `PeftModel` with adapters `target` (trained) and `non_target`.
        teacher_model (`PreTrainedModel`, `str` or `Path`):
            The target network: the model that was trained on the suspect rows as they are.

    Raises:
        `ValueError`: if answers are free texts, or if there are two classes only.
    """

    takes_teacher = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_collator = WithTeacherLogits(self.data_collator)
        if has_both_adapters(self.model):
            self.model.set_adapter("non_target")

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += (TEACHER_LOGITS,)

    def prepare_train(self, dataset: Dataset | None, processor: Processor) -> Dataset | None:
        prepared = super().prepare_train(dataset, processor)
        if dataset is None or TEACHER_LOGITS not in dataset.column_names or TEACHER_LOGITS in prepared.column_names:
            return prepared
        return concatenate_datasets([prepared, dataset.select_columns([TEACHER_LOGITS])], axis=1)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        if self.train_dataset is not None and TEACHER_LOGITS not in self.train_dataset.column_names:
            self.train_dataset = self.with_teacher_logits(self.train_dataset)
        return super().train(resume_from_checkpoint, **kwargs)

    def with_teacher_logits(self, dataset: Dataset) -> Dataset:
        """The rows with the target network's K logits, in float32, in a column `teacher_logits`."""
        shared = self.teacher_model is None and has_both_adapters(self.model)
        if shared:
            self.model.set_adapter("target")
            self.model.eval()
        teacher = self.model if shared else self.teacher
        logits = self.logits_over_rows(teacher, dataset)
        if shared:
            self.model.set_adapter("non_target")
        features = Features({TEACHER_LOGITS: List(Value("float32"))})
        column = Dataset.from_dict({TEACHER_LOGITS: logits.numpy()}, features=features)
        return concatenate_datasets([dataset, column], axis=1)

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], step_counts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        outputs = self.forward(model, inputs)
        loss = non_target_loss(
            self.class_logits(outputs.logits, inputs),
            inputs[TEACHER_LOGITS],
            self.given_labels(inputs),
            self.args.temperature,
            self.args.soft_labels,
            self.args.sharpening,
        )
        return {"non_target": loss}, outputs.logits


class NTMLTrainer(ClassTrainer):
    """
    Mutual learning, NT-ML's third stage (https://huggingface.co/papers/2508.05404): the target and the non-target network
    teach each other on clean rows, in one training, with one optimizer and one checkpoint.

    A checkpoint holds a folder for each network. After `train()`, [`result`] is the network that the training is for, and
    [`suspicion`] lists the rows of a training set whose label one of them contradicts.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`]; `model` is the non-target network, `train_dataset` is clean rows, `eval_dataset`
            held-out clean rows. Or `model` is a `PeftModel` with adapters `target` and `non_target` in one frozen model.
        target_model (`PreTrainedModel`, `str` or `Path`, *optional*):
            The target network, or its folder. It is changed in place.
        peft_config (`PeftConfig`, *optional*):
            Trains an adapter in each network, in place of all the weights.

    Raises:
        `ValueError`: if answers are free texts, if there are two classes only, if the target network, or some of its
            weights, are missing, or under DeepSpeed ZeRO-3.
    """

    def __init__(self, *args: Any, target_model: PreTrainedModel | str | Path | None = None, **kwargs: Any):
        self.target_model = target_model
        # Which network is the product; decided when training ends.
        self.chosen: str | None = None
        self.accuracies: dict[str, dict[str, float]] = {}
        super().__init__(*args, **kwargs)
        if isinstance(self.model, ModelPair):
            self.check_network(self.model.non_target, self.model.target, "target_model")
        if self.args.label_names is None:
            self.label_names = ["labels"]
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}, and two networks are trained at once, with no embeddings in "
                "common to put noise on: leave it out"
            )

    @classmethod
    def check_launch(cls, zero3: bool) -> None:
        """Two whole models at once are refused under DeepSpeed ZeRO-3."""
        if zero3:
            raise ValueError(
                "the engine is DeepSpeed ZeRO-3, which can't train two whole models at once: use ZeRO-2, DDP or FSDP, or two "
                "adapters in one model"
            )

    def trained_model(self, model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> Pair:
        evaluated = "target" if self.args.product == "target" else "non_target"
        if self.target_model is None and has_both_adapters(model):
            if self.args.activation_checkpointing:
                raise ValueError(
                    "activation_checkpointing is True: two adapters in one model are switched between forward and backward "
                    "pass, so a block that is run again would take the wrong one; turn it off, or pass two models"
                )
            return self._without_cache(AdapterPair(model, evaluated))
        if self.target_model is None:
            raise ValueError(
                "target_model is None: pass the network that was trained on the suspect rows, or its folder (or a "
                "PeftModel with adapters 'target' and 'non_target' as model)"
            )
        self.check_launch(is_deepspeed_zero3_enabled())
        check_other(model, self.target_model, "target_model")
        target = self.target_model
        if isinstance(target, str | Path):
            own = base_model(model)
            target = read_model(type(own), target, own)
        if not any(parameter.requires_grad for parameter in target.parameters()):  # as a teacher it was frozen
            if isinstance(target, PeftModel):
                target.set_adapter(target.active_adapter)  # what lies under an adapter stays as it is
            else:
                target.requires_grad_(True)
        if peft_config is not None:
            target, model = get_peft_model(target, peft_config), get_peft_model(model, peft_config)
        for network in (target, model):
            check_trained(network, None)  # of both at once one would be enough
        return self._without_cache(ModelPair(target, model, evaluated))

    def _without_cache(self, pair: Pair) -> Pair:
        for name in NETWORKS:
            base_model(pair.network(name)).config.use_cache = self.args.use_cache
        return pair

    @property
    def pair(self) -> Pair:
        return self.model

    # ---- Data ----

    def prepare_eval(
        self, dataset: Dataset | dict[str, Dataset] | None, processor: Processor
    ) -> Dataset | dict[str, Dataset] | None:
        """Held-out rows and, if the defender planted a trigger of its own, the same rows with it, labels as they are."""
        known = self.args.known_trigger
        if known is not None and dataset is None:
            raise ValueError(
                f"known_trigger is {known!r} without held-out rows to measure it on: pass an eval_dataset"
            )
        if known is None or dataset is None:
            return super().prepare_eval(dataset, processor)
        column = None if self.task is None else self.task.input_column
        if isinstance(dataset, dict) or column not in dataset.column_names:
            raise ValueError(f"known_trigger is {known!r}: pass raw rows as eval_dataset, one set of them")
        stamped = stamp(dataset, column, self.task.trigger(known), self.args.seed, self.args.dataset_num_proc)
        return super().prepare_eval({"clean": dataset, "known": stamped}, processor)

    def _set_signature_columns_if_needed(self) -> None:
        # A batch holds what one network takes; the pair's own signature tells nothing.
        pair, self.model = self.model, base_model(self.pair.network("target"))
        try:
            super()._set_signature_columns_if_needed()
        finally:
            self.model = pair

    # ---- Loss ----

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], step_counts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        outputs = self.forward(model, inputs, hidden_states=self.args.feature_layers)
        terms, classes, states = {}, {}, {}
        for name in NETWORKS:
            logits = outputs[name].logits
            if inputs["labels"].dim() == 2:
                logits = logits[:, -inputs["labels"].shape[1] - 1 :]
            terms[f"task_{name}"] = self.task_loss(logits, inputs["labels"])
            classes[name] = self.class_logits(logits, inputs)
            states[name] = feature_states(outputs[name], self.args.feature_layers, inputs)
        both = self.args.mutual_direction == "both"
        swapped = self.args.mutual_direction == "swapped"
        for name, peer in (NETWORKS, NETWORKS[::-1]):
            if both or (name == "non_target") != swapped:
                terms[f"prediction_{name}"] = prediction_loss(classes[name], classes[peer], self.args.temperature)
            if both or (name == "target") != swapped:
                terms[f"feature_{name}"] = self.args.feature_weight * feature_loss(states[name], states[peer])
        return terms, outputs.logits

    # ---- The result ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        output = super().train(*args, **kwargs)
        self.chosen = self.pair.evaluated = self._choose()
        return output

    def result(self) -> PreTrainedModel | PeftModel:
        """The network that the training is for: `args.product`, or the one chosen when training ended."""
        pair = self.accelerator.unwrap_model(self.model_wrapped)
        return pair.network(self.chosen or pair.evaluated)

    def findings(self, suspect_rows: Dataset | None) -> dict[str, Dataset]:
        """The suspicion list, where there are suspect rows."""
        return {} if suspect_rows is None else {"suspicion": self.suspicion(suspect_rows)}

    def _choose(self) -> str:
        if self.args.product != "auto":
            return self.args.product
        # The network that has kept its backdoor is the better one on clean rows: these alone must not decide.
        if not isinstance(self.eval_dataset, dict) or len(self.eval_dataset) < 2:
            return "non_target"
        self.accuracies = {name: {} for name in NETWORKS}
        for key, rows in self.eval_dataset.items():
            given, probabilities = self.pair_probabilities(rows)
            right = (probabilities.argmax(dim=2) == given[:, None]).float().mean(dim=0)
            for name, accuracy in zip(NETWORKS, right.tolist(), strict=True):
                self.accuracies[name][key] = accuracy
        target, non_target = (sum(self.accuracies[name].values()) for name in NETWORKS)
        return "target" if target > non_target else "non_target"

    def pair_probabilities(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Given labels, [N], and both networks' probabilities, [N, 2, K], target network first. Call it on every process."""

        def work(batch: dict[str, Tensor]) -> Tensor:
            outputs = self.forward(model, batch)
            columns = [self.class_logits(outputs[name].logits, batch).softmax(dim=1) for name in NETWORKS]
            return torch.cat([self.given_labels(batch)[:, None].float(), *columns], dim=1)

        model = self.model_wrapped
        training = model.training
        model.eval()
        found = self.over_rows(dataset, work)
        model.train(training)
        return found[:, 0].long(), found[:, 1:].unflatten(1, (2, -1))

    def suspicion(self, dataset: Dataset) -> Dataset:
        """The rows whose given label one of the networks contradicts, see [`suspicion_table`]. Call it on every process.

        Args:
            dataset (`Dataset`): The rows that the target network was trained on, raw or tokenized.
        """
        return suspicion_table(*self.pair_probabilities(dataset))

    # ---- Checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Both networks, each in a folder of its own. After training it is the product alone, as any trainer leaves its model (where
        two adapters share one, or an engine has sharded them, it is both)."""
        checkpoint = _internal_call and output_dir is not None
        whole = not isinstance(self.pair, AdapterPair) and self.accelerator.distributed_type not in SHARDED
        if checkpoint or self.chosen is None or not whole:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            config = base_model(self.result()).config
            config.use_cache = True  # as in `_save`
            self.result().save_pretrained(folder)
            config.use_cache = self.args.use_cache
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        configs = [base_model(self.pair.network(name)).config for name in NETWORKS]
        for config in configs:
            config.use_cache = True
        self.pair.save(folder, state_dict)
        for config in configs:
            config.use_cache = self.args.use_cache
        if self.processing_class is not None:
            for name in NETWORKS:
                self.processing_class.save_pretrained(folder / name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if not all(Path(resume_from_checkpoint, name).is_dir() for name in NETWORKS):
            raise ValueError(
                f"resume_from_checkpoint is {str(resume_from_checkpoint)!r}, where no {' and '.join(NETWORKS)} are: pass a checkpoint of "
                "mutual learning, or True for the last one in output_dir"
            )
        self.pair.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.pair.load(Path(self.state.best_model_checkpoint))
