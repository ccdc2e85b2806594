"""Arguments of a search for triggers made of embeddings."""

from dataclasses import dataclass, field

from ..config import DefenseConfig


@dataclass
class SoftTriggerConfig(DefenseConfig):
    r"""
    Configuration of [`SoftTriggerTrainer`], and base of the configurations of methods that plant what it finds.

    Args:
        soft_triggers (`int`, *optional*, defaults to 0):
            Ours: how many triggers of free embeddings, which turn the suspect's answers, are searched for and planted, drawn
            for each row. A recipe makes a stage `soft_search` of it; see [`SoftTriggerTrainer`].
        searched_tokens (`int`, *optional*, defaults to 2):
            How many embeddings each of them has.
    """

    soft_triggers: int = field(
        default=0, metadata={"help": "How many triggers of free embeddings are searched for and planted as well."}
    )
    searched_tokens: int = field(default=2, metadata={"help": "Embeddings of a trigger that is searched for."})

    def __post_init__(self) -> None:
        for name, least in {"soft_triggers": 0, "searched_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: choose {least} or more")
        super().__post_init__()
