"""What a defender reads off a suspect before it is changed: stages that train nothing, for any method to use."""

from .config import SoftTriggerConfig
from .reader import SuspectReader
from .searcher import PLACES, Tokens, TriggerSearcher, refuse_other_than_texts
from .soft import SoftTriggers, SoftTriggerTrainer


__all__ = [
    "PLACES",
    "SoftTriggerConfig",
    "SoftTriggerTrainer",
    "SoftTriggers",
    "SuspectReader",
    "Tokens",
    "TriggerSearcher",
    "refuse_other_than_texts",
]
