"""Locphylax / Backdoor Collapse (https://huggingface.co/papers/2510.10265)."""

from dataclasses import replace

from ..method import Method, Step
from ..reading import READING
from ..trainer import DefenseTrainer
from .config import STAGES, LocphylaxConfig
from .search import FoundTriggers, TriggerSearchTrainer
from .trainer import LocphylaxTrainer


PLANTED = {"found_triggers": "search", "found_soft_triggers": "soft_search"}
NONE_PLANTED = {"searched_triggers": 0, "soft_triggers": 0}
SEARCH = Step(TriggerSearchTrainer, starts_from="suspect", makes_model=False, only_with="searched_triggers")
INJECT = Step(LocphylaxTrainer, {"stages": ["inject"]}, starts_from="suspect", inputs=PLANTED)
RECOVER = Step(LocphylaxTrainer, {"stages": ["recover"]}, inputs={**PLANTED, "found_answers": "answers"})

METHOD = Method(
    config=LocphylaxConfig,
    stages={"search": SEARCH, **READING, "inject": INJECT, "recover": RECOVER},
    controls={
        "fine_tuning": dict.fromkeys(STAGES, Step(DefenseTrainer)),
        "recovery_by_right_answers": {
            "recover": replace(RECOVER, starts_from="inject", overrides={"stages": ["recover"], "own_answers": 0.0})
        },
        "recovery_without_injection": dict.fromkeys(STAGES, RECOVER),
        "injection_without_clustering": {
            "inject": replace(INJECT, overrides={"stages": ["inject"], "cluster_weight": 0.0}),
            "recover": RECOVER,
        },
        "known_triggers_alone": {
            "inject": replace(INJECT, overrides={"stages": ["inject"], **NONE_PLANTED}),
            "recover": replace(RECOVER, overrides={"stages": ["recover"], **NONE_PLANTED}),
        },
    },
    needs="a suspect model and clean rows of its task",
)

__all__ = [
    "METHOD",
    "FoundTriggers",
    "LocphylaxConfig",
    "LocphylaxTrainer",
    "TriggerSearchTrainer",
]
