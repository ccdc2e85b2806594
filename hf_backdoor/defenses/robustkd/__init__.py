"""RobustKD (https://doi.org/10.1016/j.asoc.2024.111907)."""

from ..method import Method, Step
from ..trainer import DefenseTrainer
from .config import FeatureMaskConfig, RobustKDConfig
from .fitting import FeatureMaskTrainer
from .mask import FeatureMask
from .students import student_from_layers
from .trainer import RobustKDTrainer


TEACHER = {"teacher_model": "suspect"}
MASK = Step(FeatureMaskTrainer, starts_from="suspect", makes_model=False)
DISTIL = Step(RobustKDTrainer, starts_from="student", inputs={**TEACHER, "feature_mask": "mask"})

METHOD = Method(
    config=RobustKDConfig,
    stages={"mask": MASK, "distil": DISTIL},
    controls={
        "vanilla_distillation": {"distil": Step(RobustKDTrainer, starts_from="student", inputs=TEACHER)},
        "logit_distillation": {
            "distil": Step(
                RobustKDTrainer, {"feature_weight": 0.0, "logit_weight": 1.0}, starts_from="student", inputs=TEACHER
            )
        },
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
