"""NT-ML (https://huggingface.co/papers/2508.05404): a clean model out of poisoned rows and a few clean ones."""

from typing import Any

from ..method import Method, Step
from ..trainer import DefenseTrainer
from .agreed import AgreedRowsTrainer
from .classes import refuse_run, refuse_unfit
from .config import NTMLConfig
from .pair import NETWORKS
from .suspicion import suspicion_quality, suspicion_table
from .trainer import NonTargetTrainer, NTMLTrainer


# Trained on the same rows, from the same model and by the same seed, the second network would be the first.
OTHER_SEED = 104729


# The target network, stopped in its first half epoch: it has not yet forgotten what a poisoned row says besides its trigger.
TARGET = "early_target"
EARLY_TARGET = Step(DefenseTrainer, starts_from="base", rows="suspect")


def non_target(target: str = TARGET, **overrides: Any) -> Step:
    return Step(NonTargetTrainer, overrides, starts_from="base", inputs={"teacher_model": target}, rows="suspect")


def mutual(target: str = TARGET) -> Step:
    return Step(NTMLTrainer, inputs={"target_model": target})


# Ours.
AGREED = Step(
    AgreedRowsTrainer,
    starts_from="base",
    inputs={"teacher_model": "mutual"},
    rows="suspect",
    only_with="train_on_agreed_rows",
)

METHOD = Method(
    config=NTMLConfig,
    stages={"early_target": EARLY_TARGET, "non_target": non_target(), "mutual": mutual(), "agreed": AGREED},
    controls={
        "fine_tuning": {"mutual": Step(DefenseTrainer, starts_from="suspect")},
        "clean_only": {"mutual": Step(DefenseTrainer, starts_from="base")},
        "distillation_with_all_classes": {
            "non_target": non_target(soft_labels="all_classes"),
            "mutual": mutual(),
            "agreed": AGREED,
        },
        # The target network is trained out, as the paper has it.
        "suspect_as_target": {
            "non_target": non_target("suspect"),
            "mutual": mutual("suspect"),
            "agreed": AGREED,
        },
        "mutual_without_non_target": {
            "non_target": Step(DefenseTrainer, {"seed": OTHER_SEED}, starts_from="base", rows="suspect"),
            "mutual": mutual(),
            "agreed": AGREED,
        },
    },
    needs="the rows that the suspect was trained on, and a few clean rows (1% of them or more)",
    images=True,
    refuse=refuse_run,
)

__all__ = [
    "METHOD",
    "NETWORKS",
    "AgreedRowsTrainer",
    "NTMLConfig",
    "NTMLTrainer",
    "NonTargetTrainer",
    "refuse_unfit",
    "suspicion_quality",
    "suspicion_table",
]
