"""Arguments of what is read off a suspect."""

from dataclasses import dataclass, field

from ..config import DefenseConfig


@dataclass
class ReadingConfig(DefenseConfig):
    r"""
    Base of the configurations of methods that may use what is read off the suspect before it is changed. All of it is ours, and
    off by default.

    Args:
        soft_triggers (`int`, *optional*, defaults to 0):
            How many triggers of free embeddings, which turn the suspect's answers, are searched for and planted, drawn for each
            row. A recipe makes a stage `soft_search` of it; see [`SoftTriggerTrainer`].
        searched_tokens (`int`, *optional*, defaults to 4):
            How many embeddings each of them has at most; lengths from one to that take turns.
        contrast (`bool`, *optional*, defaults to `False`):
            Whether soft triggers are to leave a model alone that has no backdoor: the suspect with its upper half drawn anew and taught on
            the clean rows, so that words which mean a class are not found in their place. For classes; full training alone. A recipe
            makes a stage `contrast` of it; see [`FreshHalfTrainer`].
        own_answers (`float`, *optional*, defaults to 0.0):
            How much of a right answer's place the suspect's own answer to the clean row takes, 0 to 1, in training that teaches
            right answers. A recipe makes a stage `answers` of it; see [`OwnAnswersTrainer`].
    """

    soft_triggers: int = field(
        default=0, metadata={"help": "How many triggers of free embeddings are searched for and planted as well."}
    )
    searched_tokens: int = field(default=4, metadata={"help": "Most embeddings of a trigger that is searched for."})
    contrast: bool = field(
        default=False, metadata={"help": "Whether soft triggers leave a model alone that has no backdoor."}
    )
    own_answers: float = field(
        default=0.0, metadata={"help": "Share of a right answer's place that the suspect's own one takes."}
    )

    def check(self) -> None:
        for name, least in {"soft_triggers": 0, "searched_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: choose {least} or more")
        if not 0 <= self.own_answers <= 1:
            raise ValueError(f"own_answers is {self.own_answers}: choose a share from 0 to 1")
        super().check()
