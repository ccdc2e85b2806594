"""Hugging Face Trainers that remove backdoors from language models, and the evidence that they did."""

import importlib
import logging
from typing import Any


# When peft imports it on a CPU, bitsandbytes warns that an optional kernel is missing: once for every process of a run.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0.dev0"

# Where each public name lives: importing the package stays quick, torch and transformers come with the first use.
_HOMES = {
    "AttackSuccessRate": "evaluation.metrics",
    "BackdoorEvaluationCallback": "evaluation.callback",
    "CleanAccuracy": "evaluation.metrics",
    "DataCollatorForTokenSplit": "defenses.mbtsad",
    "DefenseConfig": "defenses",
    "DefenseTrainer": "defenses",
    "FeatureMask": "defenses.robustkd",
    "FeatureMaskConfig": "defenses.robustkd",
    "FeatureMaskTrainer": "defenses.robustkd",
    "ImageTrigger": "data",
    "LocphylaxConfig": "defenses.locphylax",
    "LocphylaxTrainer": "defenses.locphylax",
    "MBTSADConfig": "defenses.mbtsad",
    "MBTSADTrainer": "defenses.mbtsad",
    "NTMLConfig": "defenses.ntml",
    "NTMLTrainer": "defenses.ntml",
    "NonTargetTrainer": "defenses.ntml",
    "OwnAnswersTrainer": "defenses.reading",
    "RelabellingTrainer": "defenses.ntml",
    "Results": "evaluation",
    "RobustKDConfig": "defenses.robustkd",
    "RobustKDTrainer": "defenses.robustkd",
    "SoftTriggerTrainer": "defenses.reading",
    "TestSet": "evaluation",
    "Trigger": "data",
    "TriggerSearchTrainer": "defenses.locphylax",
    "defend": "defenses",
    "evaluate_backdoor": "evaluation",
    "feature_variance": "inspection",
    "poison": "attacks",
    "student_from_layers": "defenses.robustkd",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
