"""[`MBTSADTrainer`]: retrain on split text, then distil attention and hidden states from that model into the suspect."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from ...data import base_model, check_lengths, map_rows, row_lengths
from ..arguments import check_alike, refuse_encoder_decoder
from ..reading import InformedTrainer
from ..readout import check_states
from ..staged import StagedTrainer
from .attention import attention_map_loss, nad_map_loss
from .config import MBTSADConfig
from .losses import eager_attention_map_loss, eager_nad_map_loss, hidden_state_loss, valid_entries
from .recording import (
    RecordedAttention,
    attention_function,
    attention_layers,
    chosen_layers,
    layers_with_attention,
    record_attention,
)
from .splitting import cut_to_fit


TEACHER = "teacher"


class MBTSADTrainer(InformedTrainer, StagedTrainer):
    """
    MBTSAD (https://huggingface.co/papers/2501.02754) for classifiers and causal LMs.

    `train()` runs two stages on the clean rows it is given. *Retraining* fine-tunes the suspect on copies of the rows in
    which words are cut in two. *Distillation* takes the retrained model as teacher and the suspect, as it was, as student:
    task loss, attention maps and hidden states.

    With an adapter (`peft_config`), suspect, teacher and student are adapters over one base: the teacher costs no
    further weights in memory.

    With soft triggers (ours) both stages also learn from a copy of each clean row that has one in it, and with own answers (ours)
    they are taught what the suspect itself says of the clean rows.

    Args:
        model, args, eval_dataset, processing_class, peft_config, found_soft_triggers, found_answers, kwargs:
            As in [`InformedTrainer`].
        train_dataset (`Dataset`):
            Clean rows; *raw* ones (with text) for retraining, which splits their words, and with soft triggers.
        teacher_model (`PreTrainedModel`, `str` or `Path`, *optional*):
            For `stages=["distil"]`: the retrained model, or its folder. None where the model is a `PeftModel` with an adapter named
            `teacher` beside the one that is trained.

    Raises:
        `ValueError`: if the rows are tokenized already, the teacher is missing, or checkpointing is reentrant (it would
            leave the attention loss without gradient); or, when it is first asked, if the teacher is of another size.
    """

    takes_teacher = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.reentrant:
            raise ValueError(
                "activation_checkpointing_kwargs has use_reentrant: true, which leaves the attention loss without "
                "gradient: set use_reentrant: false"
            )
        if self.args.attention_backend == "eager" and self.args.attention_weight:
            attention = base_model(self.model).config._attn_implementation
            if attention != "eager":
                raise ValueError(
                    f"attention_backend is 'eager', and the model was loaded with attn_implementation={attention!r}: "
                    "load it with attn_implementation='eager', or set attention_backend='lean'"
                )
        if "distil" in self.args.stages:
            # All that can be told now, and not when retraining is over.
            refuse_encoder_decoder(base_model(self.model), "MBTSAD")
            self._attention_layers, self._hidden_layers = self._layers()
            if self.args.attention_backend == "lean" and self.args.attention_weight:
                attention_function(base_model(self.model))
        if "retrain" in self.args.stages and self.teacher_model is not None:
            raise ValueError(
                f"teacher_model is given, and stages is {self.args.stages}, which makes the teacher: leave it out, or set "
                "stages=['distil']"
            )
        if self.teacher_model is not None and self._holds_teacher(self.model):
            raise ValueError(
                f"teacher_model is given, and model has an adapter named {TEACHER!r}, which teaches: leave it out, or delete_adapter({TEACHER!r})"
            )
        if self.stage == "distil" and self.teacher_model is None and not self._holds_teacher(self.model):
            raise ValueError(
                "teacher_model is None: pass the retrained model, or run both stages with stages=['retrain', 'distil']"
            )
        # Both stages: the second starts from the suspect again. With an adapter these are the adapter's weights only.
        self._start: dict[str, Tensor] = {}
        if len(self.args.stages) > 1:
            self._start = {
                name: value.detach().cpu().clone()
                for name, value in self.model.named_parameters()
                if value.requires_grad
            }
        self._mask_compared = False

    @classmethod
    def config_class(cls) -> type[MBTSADConfig]:
        return MBTSADConfig

    def _layers(self) -> tuple[list[int], list[int]]:
        """Numbers of the layers whose maps and whose outputs are compared, from 0."""
        model = base_model(self.model)
        depth = model.config.get_text_config().num_hidden_layers
        maps = attention_layers(model, self.args.attention_layers) if self.args.attention_weight else []
        if maps and self.args.attention_backend == "eager" and len(layers_with_attention(model)) < depth:
            raise ValueError(
                f"attention_backend is 'eager', and {type(model).__name__} has layers without attention: set "
                "attention_backend='lean', or attention_weight: 0"
            )
        return maps, chosen_layers(self.args.hidden_layers, depth, "hidden_layers")

    # ---- Stages ----

    def prepare_train(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        self.stage, self.clean = self.args.stages[0], dataset
        self.check_found("soft_triggers", "own_answers")
        return self._rows(tokenizer)

    def _rows(self, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """The stage's rows: split ones for retraining, and as they are for distillation; then the clean ones with soft triggers."""
        if self.clean is None:
            return None
        rows, clean = self.clean, [*range(len(self.clean))]
        sources = clean
        with self.one_process_first():
            if self.stage == "retrain":
                if "input_ids" in rows.column_names:
                    raise ValueError("train_dataset has input_ids: pass raw rows, the words of their text are split")
                split = self.args.token_split
                rows = split.apply(rows, self.task.input_column, self.args.seed, self.args.dataset_num_proc)
                sources = [row for row in clean for _ in range(split.factor)]
            rows = self.with_soft_copies(rows, self.clean)
            longer = self.stage == "retrain" or self.soft_triggers is not None
            encode = self._fitted if longer else self.encode_rows
            rows = encode(rows, self.with_soft_words(tokenizer))
        return self.with_own_answers(rows, sources if self.soft_triggers is None else sources + clean)

    def _fitted(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Encoded rows. Splitting makes texts longer, and so does a trigger: those that the model has no positions for are cut at
        their end, with a trigger that may stand there."""
        tokenized = self.tokenized(rows, tokenizer)
        if max(row_lengths(tokenized), default=0) <= tokenizer.model_max_length:
            check_lengths(tokenized, self.positions)
            return tokenized
        needs = {"task": self.task, "tokenizer": tokenizer}
        cut = map_rows(
            rows,
            cut_to_fit,
            fn_kwargs=needs,
            desc="Cutting to the model's length",
            num_proc=self.args.dataset_num_proc,
        )
        return self.encode_rows(cut, tokenizer)

    def leave(self, stage: str) -> None:
        """The retrained model is saved where a resumed run finds it."""
        if stage == "retrain" and len(self.args.stages) > 1:
            if self.args.should_save:
                shutil.rmtree(self._teacher_dir, ignore_errors=True)
            self.save_model(str(self._teacher_dir), _internal_call=True)  # uploads nothing
            self.accelerator.wait_for_everyone()

    def enter(self, stage: str) -> None:
        """The suspect's weights come back; for distillation the retrained model becomes the teacher."""
        super().enter(stage)
        self.train_dataset = self._rows(self.processing_class)
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if name in self._start:
                    value.copy_(self._start[name])
        if stage == "retrain":  # once more
            return
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(str(self._teacher_dir), TEACHER)
        else:
            self.teacher_model = str(self._teacher_dir)
            self.__dict__.pop("teacher", None)  # that of an earlier training

    def check_teacher(self, teacher: PreTrainedModel) -> None:
        fields = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
        why = "layers are compared one by one: pass the model that was retrained from it"
        check_alike(self.model, teacher, "teacher_model", fields, why)

    @staticmethod
    def _holds_teacher(model: nn.Module) -> bool:
        return isinstance(model, PeftModel) and TEACHER in model.peft_config

    @property
    def _teacher_dir(self) -> Path:
        return self.stage_dir(TEACHER)

    # ---- Loss ----

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], step_counts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        if self.stage == "retrain":
            return super().loss_terms(model, inputs, step_counts)
        with torch.no_grad(), self._teaching() as teacher:
            theirs, their_maps = self._observe(teacher, inputs)
        outputs, maps = self._observe(model, inputs)
        args, mask, terms = self.args, inputs["attention_mask"], {}
        if args.task_weight:
            terms["task"] = args.task_weight * self.answer_loss(outputs.logits, inputs)
        if args.attention_weight:
            terms["attention"] = args.attention_weight * self._compare(maps, their_maps, mask)
        if args.hidden_weight:
            # A layer's states are freed as soon as its loss is there (under autocast they are float32 copies).
            pairs = [(outputs.hidden_states[n], theirs.hidden_states[n]) for n in self._hidden_states]
            theirs = outputs.hidden_states = None
            check_states(pairs[0][0], inputs)
            losses = [hidden_state_loss(*pairs.pop(0), mask) for _ in self._hidden_states]
            terms["hidden"] = args.hidden_weight / len(losses) * sum(losses)
        return terms, outputs.logits

    @property
    def _hidden_states(self) -> list[int]:
        """Where the outputs of the chosen layers lie among a model's hidden states: 0 is the embeddings."""
        return [layer + 1 for layer in self._hidden_layers] if self.args.hidden_weight else []

    def _observe(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> tuple[ModelOutput, Sequence[RecordedAttention] | Sequence[Tensor]]:
        """A forward pass, and what the chosen layers' attention maps are made of (or, with `"eager"`, the maps)."""
        if not self.args.attention_weight:
            return self.forward(model, inputs, self._hidden_states), []
        if self.args.attention_backend == "eager":
            outputs = self.forward(model, inputs, self._hidden_states, output_attentions=True)
            maps = outputs.attentions or ()
            length, depth = (
                inputs["input_ids"].shape[1],
                base_model(self.model).config.get_text_config().num_hidden_layers,
            )
            if len(maps) != depth or any(each is None or each.shape[2:] != (length, length) for each in maps):
                raise ValueError(
                    f"attention_backend is 'eager', and {type(base_model(self.model)).__name__} gives no map of {length} queries and "
                    "keys for each layer: set attention_weight: 0"
                )
            return outputs, [maps[layer] for layer in self._attention_layers]
        # A look at the model's own masks costs memory: once is enough.
        compare_mask = None if self._mask_compared else inputs["attention_mask"]
        bare = base_model(self.accelerator.unwrap_model(model))
        with record_attention(bare, self._attention_layers, compare_mask) as record:
            outputs = self.forward(model, inputs, self._hidden_states)
        self._mask_compared = True
        return outputs, record

    def _compare(
        self,
        maps: Sequence[RecordedAttention] | Sequence[Tensor],
        their_maps: Sequence[RecordedAttention] | Sequence[Tensor],
        mask: Tensor,
    ) -> Tensor:
        """The attention loss, the mean over the chosen layers, [B]."""
        nad = self.args.attention_loss == "nad"
        if self.args.attention_backend == "lean":
            loss = nad_map_loss if nad else attention_map_loss
            compiler = self.args.torch_compile_backend if self.args.torch_compile else None
            return loss(maps, their_maps, mask, compiler=compiler)
        student = base_model(self.model)
        config = student.config.get_text_config()
        causal = any(getattr(module, "is_causal", False) for module in student.modules())
        # Models without kinds of layers (Mistral) have one window, if any, for all of them.
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        reach = getattr(config, "sliding_window", None)
        total: Tensor | float = 0.0
        for layer, ours, its in zip(self._attention_layers, maps, their_maps, strict=True):
            # Models that look both ways count a window without the token itself (ModernBERT).
            window = reach + (not causal) if reach and kinds[layer] == "sliding_attention" else None
            valid = valid_entries(mask, causal, window)
            total = total + (eager_nad_map_loss if nad else eager_attention_map_loss)(ours, its, valid)
        return total / len(self._attention_layers)

    @contextmanager
    def _teaching(self) -> Iterator[nn.Module]:
        """The teacher, to run without gradient: a model of its own, or the teacher's adapter on the student's base."""
        student = self.accelerator.unwrap_model(self.model)
        if not self._holds_teacher(student):
            with self.soft_triggers_read(self.teacher):
                yield self.teacher
            return
        active = student.active_adapter
        student.eval()
        student.set_adapter(TEACHER, inference_mode=True)
        try:
            yield student
        finally:
            student.set_adapter(active)
            student.train()
