"""NT-ML (https://huggingface.co/papers/2508.05404): a clean model out of poisoned rows and a few clean ones."""

from typing import Any

from ..method import Method, Step
from ..trainer import DefenseTrainer
from .classes import refuse_run, refuse_unfit
from .config import NTMLConfig
from .pair import NETWORKS
from .relabelling import RelabellingTrainer
from .suspicion import suspicion_quality, suspicion_table
from .trainer import NonTargetTrainer, NTMLTrainer


# Trained on the same rows, from the same model and by the same seed, the second network would be the first.
OTHER_SEED = 104729


# The target network in its first half epoch: it has not yet forgotten what a poisoned row says besides its trigger.
EARLY_TARGET = Step(DefenseTrainer, starts_from="base", rows="suspect")


def non_target(teacher: str = "early_target", **overrides: Any) -> Step:
    return Step(NonTargetTrainer, overrides, starts_from="base", inputs={"teacher_model": teacher}, rows="suspect")


def mutual(target: str = "early_target") -> Step:
    return Step(NTMLTrainer, inputs={"target_model": target})


def relabel(teacher: str | None, found_by: str | None = None, **overrides: Any) -> Step:
    """Rows apart are looked for by early T, the teacher and the clean rows, or taken from the stage that has found them."""
    teachers = {} if teacher is None else {"teacher_model": teacher}
    told_by = {"poisoned_model": "early_target"} if found_by is None else {"found_split": found_by}
    return Step(
        RelabellingTrainer,
        overrides,
        starts_from="base",
        inputs={**told_by, **teachers},
        rows="suspect",
        with_clean=found_by is None,
        only_with="relabel_below",
    )


# Ours. The network that comes of the first training knows the task better than mutual learning's did, and so what rows are.
CORRECTED = {"relabel": relabel("mutual"), "relabel_again": relabel("relabel", "relabel")}

METHOD = Method(
    config=NTMLConfig,
    stages={"early_target": EARLY_TARGET, "non_target": non_target(), "mutual": mutual(), **CORRECTED},
    controls={
        "fine_tuning": {"mutual": Step(DefenseTrainer, starts_from="suspect")},
        "clean_only": {"mutual": Step(DefenseTrainer, starts_from="base")},
        "distillation_with_all_classes": {
            "non_target": non_target(soft_labels="all_classes"),
            "mutual": mutual(),
            **CORRECTED,
        },
        "without_look_alikes": {
            "relabel": relabel("mutual", look_alikes=False),
            "relabel_again": relabel("relabel", "relabel", look_alikes=False),
        },
        # Of T: what mutual learning ends with tells in all others.
        "states_alone": {"relabel_again": relabel(None)},
        "soft_labels_of_the_suspect": {"non_target": non_target("suspect"), "mutual": mutual("suspect"), **CORRECTED},
        "mutual_without_non_target": {
            "non_target": Step(DefenseTrainer, {"seed": OTHER_SEED}, starts_from="base", rows="suspect"),
            "mutual": mutual(),
            **CORRECTED,
        },
    },
    needs="the rows that the suspect was trained on, and a few clean rows (1% of them or more)",
    images=True,
    refuse=refuse_run,
)

__all__ = [
    "METHOD",
    "NETWORKS",
    "NTMLConfig",
    "NTMLTrainer",
    "NonTargetTrainer",
    "RelabellingTrainer",
    "refuse_unfit",
    "suspicion_quality",
    "suspicion_table",
]
