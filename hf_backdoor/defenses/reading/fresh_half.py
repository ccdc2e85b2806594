"""[`FreshHalfTrainer`]: a model that knows the suspect's words and not its backdoor. Ours, not a paper's."""

from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ...data import find_blocks
from ..trainer import DefenseTrainer
from .config import ReadingConfig
from .searcher import refuse_free_answers


class FreshHalfTrainer(DefenseTrainer):
    """
    Draws the upper half of a suspect's blocks anew, with its pooler and classification head, and trains the whole on clean rows.

    The lower half keeps what the suspect knows of words and sentences; whatever led from a trigger to the attacker's answer is cut, and
    clean rows do not bring it back. What turns this model's answer means a class, so that a search for triggers leaves it alone
    ([`SoftTriggerTrainer`]).

    Args:
        model, args, train_dataset, kwargs:
            As in [`DefenseTrainer`]; `train_dataset` is clean rows. The model is changed in place.

    Raises:
        `ValueError`: if there is an adapter, or weights are quantized (what is drawn anew has to be trained as a whole), or if answers
            have no classes.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, peft_config: PeftConfig | None = None, **kwargs: Any):
        wrapped = isinstance(model, PeftModel) or peft_config is not None
        if wrapped or getattr(model, "is_quantized", False):
            raise ValueError(
                "contrast is True, and an adapter is trained, or weights are quantized: half of the model is drawn anew there, which has to "
                "be trained as a whole; set contrast: false"
            )
        super().__init__(model, *args, **kwargs)

    @classmethod
    def config_class(cls) -> type[ReadingConfig]:
        return ReadingConfig

    def prepare_model(self, model: PreTrainedModel) -> None:
        refuse_free_answers(self.task)
        drawn = type(model)(model.config).state_dict()
        names = fresh_names(model)
        model.load_state_dict({name: value for name, value in drawn.items() if name.startswith(names)}, strict=False)


def fresh_names(model: PreTrainedModel) -> tuple[str, ...]:
    """How the names of the weights begin that are drawn anew. A language model's head stays: it says what tokens are."""
    blocks = find_blocks(model)
    upper = [f"{name}." for name in blocks[len(blocks) // 2 :]]
    if model.can_generate():
        return tuple(upper)
    body = model.base_model_prefix
    return (*upper, f"{body}.pooler.", *(f"{name}." for name, _ in model.named_children() if name != body))
