"""Two networks that are trained together: one module for the optimizer, the engine and the checkpoint."""

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..checkpoints import load_saved


NETWORKS = ("target", "non_target")


@dataclass
class PairOutput(ModelOutput):
    """What both networks say of one batch.

    Args:
        logits (`Tensor`): Of the network that evaluation looks at.
        target, non_target (`ModelOutput`): Of each network.
    """

    logits: Tensor | None = None
    target: ModelOutput | None = None
    non_target: ModelOutput | None = None


class Pair(nn.Module, abc.ABC):
    """Both networks in one forward pass, as DDP and FSDP want it.

    Args:
        evaluated (`str`): The network whose logits evaluation looks at, one of `NETWORKS`.
    """

    def __init__(self, evaluated: str):
        super().__init__()
        self.evaluated = evaluated

    @abc.abstractmethod
    def network(self, name: str) -> PreTrainedModel | PeftModel:
        """One of the two, ready for a forward pass."""

    def forward(self, **inputs: Any) -> PairOutput:
        outputs = {name: self.network(name)(**inputs) for name in NETWORKS}
        return PairOutput(logits=outputs[self.evaluated].logits, **outputs)

    @abc.abstractmethod
    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes each network into a folder of its own, `folder/target` and `folder/non_target`.

        Args:
            state (`dict[str, Tensor]`, *optional*): The pair's weights, where an engine has gathered them.
        """

    @abc.abstractmethod
    def load(self, folder: Path) -> None:
        """Takes back what [`save`] wrote."""


class ModelPair(Pair):
    """Two whole models, or two models with an adapter each."""

    def __init__(self, target: PreTrainedModel | PeftModel, non_target: PreTrainedModel | PeftModel, evaluated: str):
        super().__init__(evaluated)
        self.target, self.non_target = target, non_target
        # What FSDP shards by itself.
        self._no_split_modules = target._no_split_modules

    def network(self, name: str) -> PreTrainedModel | PeftModel:
        return self.target if name == "target" else self.non_target

    def activation_checkpointing_enable(self, **options: Any) -> None:
        for name in NETWORKS:
            self.network(name).activation_checkpointing_enable(**options)

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        for name in NETWORKS:
            own = None if state is None else {
                key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")
            }  # fmt: skip
            self.network(name).save_pretrained(folder / name, state_dict=own)

    def load(self, folder: Path) -> None:
        for name in NETWORKS:
            network = self.network(name)
            if isinstance(network, PeftModel):
                set_peft_model_state_dict(network, load_peft_weights(str(folder / name), device="cpu"))
            else:
                load_saved(network, folder / name)


class AdapterPair(Pair):
    """Two adapters, named `target` and `non_target`, in one frozen model."""

    def __init__(self, model: PeftModel, evaluated: str):
        super().__init__(evaluated)
        self.model = model
        self.network("target")

    def network(self, name: str) -> PeftModel:
        self.model.set_adapter(name)
        # `set_adapter` freezes the other one, and half of the training would be lost without a word.
        self.model.set_requires_grad(list(NETWORKS))
        return self.model

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        own = None if state is None else {key.removeprefix("model."): value for key, value in state.items()}
        self.model.save_pretrained(folder, state_dict=own)

    def load(self, folder: Path) -> None:
        for name in NETWORKS:
            weights = load_peft_weights(str(folder / name), device="cpu")
            set_peft_model_state_dict(self.model, weights, adapter_name=name)


def has_both_adapters(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and set(NETWORKS) <= set(model.peft_config)
