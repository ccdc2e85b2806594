"""Models that a task's answers can be read from: all others would be measured as something that they are not."""

from torch import nn
from transformers import PreTrainedModel

from ..data import Task, base_model, names_classifier, reads_both_ways


def refuse_other_kind(model: nn.Module, task: Task) -> None:
    """Networks that transformers does not have are taken as they are: who writes one knows what it answers.

    Raises:
        `ValueError`: with one line, for a model without the head that the task reads, or one that sees the answer it is to give.
    """
    bare = base_model(model)
    kind = type(bare)
    if not isinstance(bare, PreTrainedModel) or not kind.__module__.startswith("transformers."):
        return
    if task.has_head:
        fits = names_classifier(kind.__name__)
    else:
        fits = bare.can_generate() and not bare.config.is_encoder_decoder and not reads_both_ways(bare.config)
    if not fits:
        raise ValueError(
            f"model is a {kind.__name__}, and task is {type(task).__name__}, which is measured on "
            f"{'models with a classification head' if task.has_head else 'causal LMs'}: load it by {task.auto_model.__name__}, or "
            "use another model"
        )
