"""The module that is trained: a student, and beside it the connectors that its features go through."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from .features import captured


@dataclass
class StudentOutput(ModelOutput):
    """Logits, and a connected feature for each of the student's layers that learn."""

    logits: Tensor | None = None
    features: tuple[Tensor, ...] | None = None


class StudentWithConnectors(nn.Module):
    """
    A student and its connectors as one module, so that one forward pass uses all that is trained: under
    `DistributedDataParallel` gradients of parameters that it has not seen in use would not be averaged.

    Args:
        student (`nn.Module`): With or without an adapter.
        connectors (`nn.ModuleList`): One for each layer.
        layers (`Sequence[str]`): Names of the student's modules.
    """

    def __init__(self, student: nn.Module, connectors: nn.ModuleList, layers: Sequence[str]):
        super().__init__()
        self.student = student
        self.connectors = connectors
        self.layers = list(layers)
        # What FSDP shards by itself.
        self._no_split_modules = getattr(student, "_no_split_modules", None)

    def forward(self, **inputs: Any) -> StudentOutput:
        with captured(self.student, self.layers) as features:
            outputs = self.student(**inputs)
        connected = [connect(features[name]) for connect, name in zip(self.connectors, self.layers, strict=True)]
        return StudentOutput(logits=outputs.logits, features=tuple(connected))


def connector(student: Tensor, teacher: Tensor) -> nn.Module:
    """A linear layer and a layer norm from a student's feature to a teacher's; a 1 x 1 convolution and a batch norm for images.

    Args:
        student, teacher (`Tensor`): One feature of each, [B, T, D] or [B, C, H, W].

    Raises:
        `ValueError`: if they have not the same positions.
    """
    if student.dim() == teacher.dim() == 4 and student.shape[2:] == teacher.shape[2:]:
        made = nn.Sequential(
            nn.Conv2d(student.shape[1], teacher.shape[1], kernel_size=1, bias=False), nn.BatchNorm2d(teacher.shape[1])
        )
    elif student.dim() == teacher.dim() == 3 and student.shape[1] == teacher.shape[1]:
        made = nn.Sequential(nn.Linear(student.shape[2], teacher.shape[2]), nn.LayerNorm(teacher.shape[2]))
    else:
        raise ValueError(
            f"student_feature_layers and teacher_feature_layers give features of {list(student.shape)} and {list(teacher.shape)}: "
            "choose layers with the same positions (and a student that reads the teacher's tokens)"
        )
    return made.to(student)


def make_connectors(pairs: Sequence[tuple[Tensor, Tensor]], seed: int) -> nn.ModuleList:
    """Connectors whose first weights the seed decides, and that leave torch's generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.ModuleList([connector(student, teacher) for student, teacher in pairs])
