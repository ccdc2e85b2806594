"""One class more for a classification head, and back: where a head's model can say what no label says."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
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
        `ValueError`: as [`find_head`].
    """
    present = model.config.num_labels
    if present == num_labels:
        return
    name = find_head(model)
    head = model.get_submodule(name)
    resized = nn.Linear(head.in_features, num_labels, bias=head.bias is not None).to(head.weight)
    resized.requires_grad_(head.weight.requires_grad)  # a frozen one would be trained, and saved with no adapter
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


def find_head(model: PreTrainedModel) -> str:
    """Name of the linear layer of `config.num_labels` outputs that a classification ends with.

    Raises:
        `ValueError`: if there is none, or an adapter is in it, which would be left with as many outputs as it has.
    """
    labels, body = model.config.num_labels, f"{model.base_model_prefix}."
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == labels and not name.startswith(body)
    ]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no linear layer of {labels} outputs: its head can't be given one more"
        )
    if adapted := [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and heads[-1].startswith(f"{name}.")
    ]:
        raise ValueError(
            f"{adapted[0]} is the head, and has an adapter in it: take it out of target_modules (modules_to_save trains it as a whole)"
        )
    return heads[-1]
