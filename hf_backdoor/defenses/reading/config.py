"""Arguments of a search for triggers made of free vectors."""

from dataclasses import dataclass, field

from ..config import DefenseConfig


@dataclass
class SoftTriggerConfig(DefenseConfig):
    r"""
    Configuration of [`SoftTriggerTrainer`], and base of the configurations of methods that plant what it finds.

    Args:
        soft_triggers (`int`, *optional*, defaults to 0):
            Ours: how many triggers of free vectors, which turn the suspect's answers, are searched for and planted, drawn
            for each row. A recipe makes a stage `soft_search` of it; see [`SoftTriggerTrainer`].
        searched_tokens (`int`, *optional*, defaults to 2):
            How many vectors each of them has.
        soft_depth (`float`, *optional*, defaults to 0.0):
            Where the vectors enter the model, as a share of its blocks: 0.0 stands for the embeddings, 0.5 for half-way up, where a
            trigger of many words has been put together and has not yet become an answer.
    """

    soft_triggers: int = field(
        default=0, metadata={"help": "How many triggers of free vectors are searched for and planted as well."}
    )
    searched_tokens: int = field(
        default=2, metadata={"help": "Vectors (or tokens) of a trigger that is searched for."}
    )
    soft_depth: float = field(
        default=0.0, metadata={"help": "Share of the model's blocks below the place where soft triggers enter it."}
    )

    def __post_init__(self) -> None:
        for name, least in {"soft_triggers": 0, "searched_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: choose {least} or more")
        if not 0 <= self.soft_depth < 1:
            raise ValueError(
                f"soft_depth is {self.soft_depth}: choose a share of the blocks from 0 to below 1, for example 0.5"
            )
        super().__post_init__()
