"""Arguments of MBTSAD."""

from dataclasses import dataclass, field
from typing import Literal

from ..config import choose
from ..reading import ReadingConfig
from .splitting import TokenSplit


STAGES = ("retrain", "distil")


@dataclass
class MBTSADConfig(ReadingConfig):
    r"""
    Configuration of [`MBTSADTrainer`].

    Args:
        > Parameters that control the stages

        stages (`list[str]`, *optional*, defaults to `["retrain", "distil"]`):
            Which of the two stages `train()` runs, in order. Give one to run it by itself: the paper's learning rates
            differ (2e-5 and 5e-4), and `learning_rate` holds for all stages of a trainer.

        > Parameters that control token splitting (first stage)

        split_rate (`float`, *optional*, defaults to 0.3):
            Share of a text's words that are cut in two.
        split_copies (`int`, *optional*, defaults to 3):
            Split versions of each row.
        split_min_chars (`int`, *optional*, defaults to 4):
            Characters of the shortest word that is cut.
        split_max_words (`int`, *optional*):
            Most words of a text that are cut; the tool the paper most likely used stops at 10.
        split_keep_originals (`bool`, *optional*, defaults to `False`):
            Whether each row also stays as it was.
        split_banned_pieces (`list[str]`, *optional*):
            Words that no cut may make.

        > Parameters that control what is read off the suspect (ours)

        soft_triggers, searched_tokens, own_answers:
            As in [`ReadingConfig`], for both stages: each clean row has a copy with a soft trigger in it. 0 leaves them out, as the
            paper does.

        > Parameters that control distillation (second stage)

        attention_weight (`float`, *optional*, defaults to 100.0):
            Weight of the attention loss; 0 leaves it out.
        hidden_weight (`float`, *optional*, defaults to 1.0):
            Weight of the hidden-state loss; 0 leaves it out.
        task_weight (`float`, *optional*, defaults to 1.0):
            Weight of the classification (or answer) loss; 0 leaves it out.
        attention_loss (`str`, *optional*, defaults to `"maps"`):
            What is compared: `"maps"`, the attention maps entry by entry, or `"nad"`, their sums of squares over the heads,
            normalised (as in Neural Attention Distillation).
        attention_layers (`list[int]`, *optional*):
            Layers whose maps are compared, from 0; negative ones count from the end. All by default.
        hidden_layers (`list[int]`, *optional*):
            Layers whose output is compared, counted in the same way. All by default.
        attention_backend (`str`, *optional*, defaults to `"lean"`):
            `"lean"` works from queries and keys and never builds a map, with any attention implementation; `"eager"`
            compares the maps that the model gives (it must be loaded with `attn_implementation="eager"`), at a memory of
            layers x heads x length squared.
    """

    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": "Stages that train() runs."})
    split_rate: float = field(default=0.3, metadata={"help": "Share of a text's words that are cut in two."})
    split_copies: int = field(default=3, metadata={"help": "Split versions of each row."})
    split_min_chars: int = field(default=4, metadata={"help": "Characters of the shortest word that is cut."})
    split_max_words: int | None = field(default=None, metadata={"help": "Most words of a text that are cut."})
    split_keep_originals: bool = field(default=False, metadata={"help": "Whether each row also stays as it was."})
    split_banned_pieces: list[str] = field(default_factory=list, metadata={"help": "Words that no cut may make."})
    attention_weight: float = field(default=100.0, metadata={"help": "Weight of the attention loss."})
    hidden_weight: float = field(default=1.0, metadata={"help": "Weight of the hidden-state loss."})
    task_weight: float = field(default=1.0, metadata={"help": "Weight of the classification loss."})
    attention_loss: Literal["maps", "nad"] = field(default="maps", metadata={"help": "What is compared: maps or nad."})
    attention_layers: list[int] | None = field(default=None, metadata={"help": "Layers whose maps are compared."})
    hidden_layers: list[int] | None = field(default=None, metadata={"help": "Layers whose output is compared."})
    attention_backend: Literal["lean", "eager"] = field(
        default="lean", metadata={"help": "lean works from queries and keys, eager from the model's maps."}
    )

    @property
    def token_split(self) -> TokenSplit:
        return TokenSplit(
            rate=self.split_rate,
            copies=self.split_copies,
            min_chars=self.split_min_chars,
            max_words=self.split_max_words,
            keep_originals=self.split_keep_originals,
            banned_pieces=self.split_banned_pieces,
        )

    @property
    def rows_factor(self) -> int:
        return (self.token_split.factor if self.stages[0] == "retrain" else 1) + bool(self.soft_triggers)

    def check(self) -> None:
        if not self.stages or [stage for stage in STAGES if stage in self.stages] != list(self.stages):
            raise ValueError(f"stages is {self.stages}: use ['retrain', 'distil'], or one of the two")
        choose("attention_loss", self.attention_loss, ("maps", "nad"))
        choose("attention_backend", self.attention_backend, ("lean", "eager"))
        self.refuse_negative("attention_weight", "hidden_weight", "task_weight")
        if "distil" in self.stages and not (self.attention_weight or self.hidden_weight):
            raise ValueError(
                "attention_weight and hidden_weight are both 0: there is nothing to learn from the teacher; raise one, or set "
                "stages=['retrain']"
            )
        _ = self.token_split
        super().check()
