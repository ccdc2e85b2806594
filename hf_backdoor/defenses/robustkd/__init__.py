"""RobustKD (https://doi.org/10.1016/j.asoc.2024.111907)."""

from typing import Any

from ..method import Method, Step
from ..reading import FOUND, READING
from ..trainer import DefenseTrainer
from .config import FeatureMaskConfig, RobustKDConfig
from .fitting import FeatureMaskTrainer
from .mask import FeatureMask
from .students import student_from_layers
from .trainer import RobustKDTrainer


TEACHER = {"teacher_model": "suspect"}
MASK = Step(FeatureMaskTrainer, starts_from="suspect", makes_model=False)
LEARNT = {**TEACHER, "feature_mask": "mask"}
DISTIL = Step(RobustKDTrainer, starts_from="student", inputs={**LEARNT, **FOUND})


def distil(inputs: dict[str, str], **overrides: Any) -> dict[str, Step]:
    """Distillation on the rows as they are, without soft triggers."""
    return {"distil": Step(RobustKDTrainer, {"soft_triggers": 0, **overrides}, starts_from="student", inputs=inputs)}


METHOD = Method(
    config=RobustKDConfig,
    stages={"mask": MASK, **READING, "distil": DISTIL},
    controls={
        "vanilla_distillation": distil(TEACHER, own_answers=0.0),
        "logit_distillation": distil(TEACHER, own_answers=0.0, feature_weight=0.0, logit_weight=1.0),
        "as_published": distil(LEARNT, own_answers=0.0),
        "distillation_without_soft_triggers": distil({**LEARNT, "found_answers": "answers"}),
        "student_alone": {"distil": Step(DefenseTrainer, starts_from="student")},
        "mask_without_variance": {
            "mask": Step(FeatureMaskTrainer, {"variance_weight": 0.0}, starts_from="suspect", makes_model=False),
            "distil": DISTIL,
        },
    },
    needs="a suspect teacher, a smaller student and clean rows of its task",
    images=True,
)

__all__ = [
    "METHOD",
    "FeatureMask",
    "FeatureMaskConfig",
    "FeatureMaskTrainer",
    "RobustKDConfig",
    "RobustKDTrainer",
    "student_from_layers",
]
