"""One class more for a classification head, and back: where a head's model can say what no label says."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..engines import whole


# What a new class starts from, under the least of the others: it must be learnt, not disturb.
NEW_CLASS_OFFSET = 2.0


@torch.no_grad()
def resize_head(model: PreTrainedModel, num_labels: int) -> None:
    """Gives the classification head `num_labels` outputs, in place. The first ones are kept as they are.

    Args:
        model (`PreTrainedModel`): With a head of a linear layer of `config.num_labels` outputs.
        num_labels (`int`): Outputs wanted; more are drawn from torch's generator.

    Raises:
        `ValueError`: if no such layer is found.
    """
    present = model.config.num_labels
    if present == num_labels:
        return
    heads = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == present
        and not name.startswith(model.base_model_prefix + ".")
    ]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no linear layer of {present} outputs: its head can't be given {num_labels}"
        )
    name, head = heads[-1]
    resized = nn.Linear(head.in_features, num_labels, bias=head.bias is not None).to(head.weight)
    kept = min(present, num_labels)
    with whole(head.parameters()):
        resized.weight.normal_(std=head.weight.std().item())
        resized.weight[:kept] = head.weight[:kept]
        if head.bias is not None:
            resized.bias.fill_(head.bias.min().item() - NEW_CLASS_OFFSET)
            resized.bias[:kept] = head.bias[:kept]
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, resized)
    labels = dict(model.config.id2label)
    model.config.id2label = {label: labels.get(label, f"LABEL_{label}") for label in range(num_labels)}
    model.config.label2id = {text: label for label, text in model.config.id2label.items()}
    model.num_labels = num_labels
