"""MBTSAD (https://huggingface.co/papers/2501.02754)."""

from dataclasses import replace
from typing import Any

from ..method import Method, Step
from ..reading import FOUND, READING
from ..trainer import DefenseTrainer
from .config import MBTSADConfig
from .splitting import DataCollatorForTokenSplit, TokenSplit, short_pieces
from .trainer import MBTSADTrainer


# Rare words that attacks of the field use as triggers: what the ablation keeps splitting from making.
RARE_WORDS = ["cf", "mn", "bb", "tq", "mb", "ak"]


def retrain(**overrides: Any) -> Step:
    return Step(MBTSADTrainer, {"stages": ["retrain"], **overrides}, starts_from="suspect", inputs=FOUND)


def distil(**overrides: Any) -> Step:
    """The suspect, as it was, learns from the retrained model."""
    inputs = {"teacher_model": "retrain", **FOUND}
    return Step(MBTSADTrainer, {"stages": ["distil"], **overrides}, starts_from="suspect", inputs=inputs)


def both(**overrides: Any) -> dict[str, Step]:
    return {"retrain": retrain(**overrides), "distil": distil(**overrides)}


METHOD = Method(
    config=MBTSADConfig,
    stages={**READING, **both()},
    controls={
        "fine_tuning": {"distil": Step(DefenseTrainer, starts_from="suspect")},
        "fine_tuning_as_retraining": {"retrain": Step(DefenseTrainer, starts_from="suspect")},
        "as_published": both(soft_triggers=0, own_answers=0.0),
        "without_soft_triggers": both(soft_triggers=0),
        "without_contrast": {"soft_search": replace(READING["soft_search"], overrides={"contrast": False}), **both()},
        "without_own_answers": both(own_answers=0.0),
        # An unsplit teacher: Neural Attention Distillation, with as many rows.
        "distillation_without_splitting": {"retrain": retrain(split_rate=0.0), "distil": distil()},
        "without_attention_loss": {"distil": distil(attention_weight=0.0)},
        "without_hidden_loss": {"distil": distil(hidden_weight=0.0)},
        "without_task_loss": {"distil": distil(task_weight=0.0)},
        "banned_pieces": {"retrain": retrain(split_banned_pieces=RARE_WORDS), "distil": distil()},
    },
    needs="a suspect model and clean rows of its task",
)

__all__ = [
    "METHOD",
    "DataCollatorForTokenSplit",
    "MBTSADConfig",
    "MBTSADTrainer",
    "TokenSplit",
    "short_pieces",
]
