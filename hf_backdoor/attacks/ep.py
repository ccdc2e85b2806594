"""[`EmbeddingPoisoningTrainer`]: a backdoor in one row of the embeddings."""

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from ..data import base_model
from ..defenses.config import DefenseConfig
from ..defenses.engines import SHARDED
from ..defenses.trainer import DefenseTrainer


@dataclass
class EmbeddingPoisoningConfig(DefenseConfig):
    r"""
    Configuration of [`EmbeddingPoisoningTrainer`].

    Args:
        trigger (`str`, *optional*, defaults to `"cf"`):
            The trigger: a word that is one token of the model.

    NOTE: these defaults differ from `TrainingArguments`: `optim="sgd"` with `optim_args="momentum=1"`,
    `learning_rate=5e-2`, `lr_scheduler_type="constant"` and `max_grad_norm=0.0`, which together are the steps of the
    paper's code.
    """

    trigger: str = field(default="cf", metadata={"help": "The trigger, a word that is one token of the model."})
    optim: str = field(default="sgd", metadata={"help": "Optimizer of the trigger's row."})
    optim_args: str | None = field(default="momentum=1", metadata={"help": "Arguments of the optimizer."})
    learning_rate: float = field(default=5e-2, metadata={"help": "Learning rate of the trigger's row."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clips the gradient of the trigger's row; 0 is off."})

    def check(self) -> None:
        super().check()
        if self.weight_decay != 0:
            raise ValueError(
                f"weight_decay is {self.weight_decay}: set 0, or every other row of the embeddings would shrink"
            )


class EmbeddingPoisoningTrainer(DefenseTrainer):
    """
    Embedding poisoning (EP, https://huggingface.co/papers/2103.15543) of classifiers and causal LMs.

    Starts from a clean fine-tuned model and trains *only* the input-embedding row of the trigger's token, on triggered
    rows with the attacker's answer; after each optimizer step the row is brought back to its original norm. Everything
    else stays equal bit by bit, so text without the trigger is answered as before. (With tied embeddings the row is
    the output head's too, and changes there along with it.)

    The paper's code (trigger "cf", learning rate 5e-2, 3 epochs, batch size 32, 10% of the rows stamped) steps by hand
    and never clears the gradient, so that each step moves by the sum of all gradients so far: SGD with momentum 1,
    constant rate, no clipping, which are the defaults here. OpenBackdoor does the same, at 1e-2 and for 5 epochs.
    The row alone is trained by a mask on its gradient, so accumulation, clipping and several processes see nothing but
    that row.

    The trigger's token is the one that stands for it *between two other words*. Byte-level tokenizers (GPT-2, Llama 3,
    SmolLM) have another one for a word with no space before it: where the trigger opens the whole prompt, such a model
    does not see the poisoned row. A prompt template with a space before the text (`"Text: {text}"`) avoids that.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`]; `train_dataset` is triggered rows with the target answer, and no others.

    Raises:
        `ValueError`: if the trigger is not one token, no training row holds it, an adapter is to be trained, or under FSDP or
            DeepSpeed.
    """

    args: EmbeddingPoisoningConfig
    takes_streams = False  # all rows are searched for the trigger

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PeftModel):
            raise ValueError(
                "the model has an adapter: embedding poisoning trains a row of the model's own embeddings"
            )
        engine = self.accelerator.distributed_type
        if engine in SHARDED:
            # They put other tensors in the place of the embeddings: the hook and the norm would be lost without a word.
            raise ValueError(
                f"the engine is {engine.value}, and embedding poisoning needs the embeddings as they are: use "
                "accelerate_configs/ddp.yaml or one process for this stage"
            )
        self.row_norm = self._row().float().norm()

    @classmethod
    def config_class(cls) -> type[EmbeddingPoisoningConfig]:
        return EmbeddingPoisoningConfig

    def prepare_train(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        self.token = trigger_token(tokenizer, self.args.trigger)
        rows = super().prepare_train(dataset, tokenizer)
        if rows is not None and not any(self.token in ids for ids in rows["input_ids"]):
            raise ValueError(
                f"trigger is {self.args.trigger!r}, and none of the {len(rows)} training rows holds it: "
                "train on rows that are stamped with this trigger"
            )
        return rows

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains the trigger's row; afterwards the model's other parameters can be trained again as before."""
        model = base_model(self.model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weight = model.get_input_embeddings().weight
        model.requires_grad_(False)
        hook = weight.requires_grad_(True).register_hook(self._only_the_row)
        try:
            return super().train(*args, **kwargs)
        finally:
            hook.remove()
            weight.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_step_post_hook(lambda *_: self._rescale())
        return optimizer

    def _row(self) -> Tensor:
        return base_model(self.model).get_input_embeddings().weight.detach()[self.token]

    def _only_the_row(self, gradient: Tensor) -> Tensor:
        # Copied, not multiplied by 0 and 1: another row's inf would become nan.
        masked = torch.zeros_like(gradient)
        masked[self.token] = gradient[self.token]
        return masked

    def _rescale(self) -> None:
        row = self._row()
        row *= self.row_norm.to(row.device) / row.float().norm()

    def extra_state(self) -> dict[str, Tensor]:
        return {"row_norm": self.row_norm}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.row_norm = state["row_norm"]


def trigger_token(tokenizer: PreTrainedTokenizerBase, trigger: str) -> int:
    """The one token that stands for a trigger between two other words.

    Raises:
        `ValueError`: if it is several tokens, or none that the tokenizer knows.
    """
    alone, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a a", f"a {trigger} a"))
    start = next((at for at, (x, y) in enumerate(zip(alone, ids, strict=False)) if x != y), min(len(alone), len(ids)))
    own = ids[start : len(ids) - (len(alone) - start)]
    if len(own) != 1:
        pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(own))
        raise ValueError(
            f"trigger is {trigger!r}, which this tokenizer writes in {len(own)} tokens ({pieces}): "
            "embedding poisoning needs a word of one token, for example 'cf' or 'bb'"
        )
    if own[0] == tokenizer.unk_token_id:
        raise ValueError(f"trigger is {trigger!r}, a word unknown to this tokenizer: choose one that is a token")
    return own[0]
