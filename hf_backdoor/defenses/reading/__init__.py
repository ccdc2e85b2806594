"""What a defender reads off a suspect before it is changed: stages that train nothing, for any method to use."""

from ..method import Step
from .config import SoftTriggerConfig
from .reader import SuspectReader
from .searcher import PLACES, Tokens, TriggerSearcher, refuse_other_than_texts
from .soft import SoftTriggers, SoftTriggerTrainer, check_soft_triggers, soft_triggers_read


# The stage of any method that plants what it finds.
SOFT_SEARCH = Step(SoftTriggerTrainer, starts_from="suspect", makes_model=False, only_with="soft_triggers")

__all__ = [
    "PLACES",
    "SOFT_SEARCH",
    "SoftTriggerConfig",
    "SoftTriggerTrainer",
    "SoftTriggers",
    "SuspectReader",
    "Tokens",
    "TriggerSearcher",
    "check_soft_triggers",
    "refuse_other_than_texts",
    "soft_triggers_read",
]
