"""Locphylax / Backdoor Collapse (https://huggingface.co/papers/2510.10265)."""

from ..method import Method, Step
from ..trainer import DefenseTrainer
from .config import STAGES, LocphylaxConfig
from .trainer import LocphylaxTrainer


INJECT = Step(LocphylaxTrainer, {"stages": ["inject"]})
RECOVER = Step(LocphylaxTrainer, {"stages": ["recover"]})

METHOD = Method(
    config=LocphylaxConfig,
    stages={"inject": INJECT, "recover": RECOVER},
    controls={
        "fine_tuning": dict.fromkeys(STAGES, Step(DefenseTrainer)),
        "recovery_without_injection": dict.fromkeys(STAGES, RECOVER),
        "injection_without_clustering": {
            "inject": Step(LocphylaxTrainer, {"stages": ["inject"], "cluster_weight": 0.0}),
            "recover": RECOVER,
        },
    },
    needs="a suspect model and clean rows of its task",
)

__all__ = ["METHOD", "LocphylaxConfig", "LocphylaxTrainer"]
