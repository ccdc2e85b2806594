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


MASK = Step(FeatureMaskTrainer, starts_from="suspect", makes_model=False)
TEACHER = {"teacher_model": "suspect", **FOUND}
MASKED = {**TEACHER, "feature_mask": "mask"}


def distil(inputs: dict[str, str] = MASKED, **overrides: Any) -> dict[str, Step]:
    return {"distil": Step(RobustKDTrainer, overrides, starts_from="student", inputs=inputs)}


# Without what is ours.
PUBLISHED = {"soft_triggers": 0, "own_answers": 0.0}

METHOD = Method(
    config=RobustKDConfig,
    stages={"mask": MASK, **READING, **distil()},
    controls={
        "vanilla_distillation": distil(TEACHER, **PUBLISHED),
        "logit_distillation": distil(TEACHER, **PUBLISHED, feature_weight=0.0, logit_weight=1.0),
        "as_published": distil(**PUBLISHED),
        "distillation_without_soft_triggers": distil(soft_triggers=0),
        "distillation_by_right_answers": distil(own_answers=0.0),
        "student_alone": {"distil": Step(DefenseTrainer, starts_from="student")},
        "mask_without_variance": {
            "mask": Step(FeatureMaskTrainer, {"variance_weight": 0.0}, starts_from="suspect", makes_model=False),
            **distil(),
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
