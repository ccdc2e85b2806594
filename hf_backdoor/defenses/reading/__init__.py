"""What a defender reads off a suspect before it is changed, for any method to use: stages that train nothing, and training that takes
what they found."""

from ..method import Step
from .answers import OwnAnswers, OwnAnswersTrainer
from .config import ReadingConfig
from .fresh_half import FreshHalfTrainer
from .informed import InformedTrainer
from .reader import SuspectReader, found_file
from .searcher import PLACES, Tokens, TriggerSearcher
from .soft import SoftTriggers, SoftTriggerTrainer


# The stages of any method whose trainer is informed, and what it takes from them.
READING = {
    "contrast": Step(FreshHalfTrainer, starts_from="suspect", only_with="contrast"),
    "soft_search": Step(
        SoftTriggerTrainer,
        starts_from="suspect",
        inputs={"clean_model": "contrast"},
        makes_model=False,
        only_with="soft_triggers",
    ),
    "answers": Step(OwnAnswersTrainer, starts_from="suspect", makes_model=False, only_with="own_answers"),
}
FOUND = {"found_soft_triggers": "soft_search", "found_answers": "answers"}

__all__ = [
    "FOUND",
    "PLACES",
    "READING",
    "FreshHalfTrainer",
    "InformedTrainer",
    "OwnAnswers",
    "OwnAnswersTrainer",
    "ReadingConfig",
    "SoftTriggerTrainer",
    "SoftTriggers",
    "SuspectReader",
    "Tokens",
    "TriggerSearcher",
    "found_file",
]
