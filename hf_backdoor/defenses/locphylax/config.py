"""Arguments of Locphylax."""

from dataclasses import dataclass, field

from ..config import choose
from ..reading import ReadingConfig


STAGES = ("inject", "recover")
POSITIONS = ("start", "end", "random", "any")


@dataclass
class LocphylaxConfig(ReadingConfig):
    r"""
    Configuration of [`LocphylaxTrainer`].

    Args:
        > Parameters that control the stages

        stages (`list[str]`, *optional*, defaults to `["inject", "recover"]`):
            Which of the two stages `train()` runs, in order. Give one to run it by itself.

        > Parameters that control the known triggers

        known_triggers (`list[str]`, *optional*, defaults to `["Make life better", "Ahihihihihi", "bb"]`):
            The texts that the defender plants, two or more: the paper's two, and a rare word.
        known_position (`str`, *optional*, defaults to `"any"`):
            Where they go: `"start"`, `"end"`, `"random"`, or `"any"` of these.
        known_response (`str`, *optional*, defaults to `"Aha"`):
            The known behaviour: what the model is taught to answer to a known trigger in place of everything else. It
            must be no right answer. A classification head says it with a class of its own, which recovery takes away.
        searched_triggers (`int`, *optional*, defaults to 0):
            Ours: how many words that the suspect reacts to are searched for and planted as one trigger more, drawn for each
            row. A recipe makes a stage `search` of it; see [`TriggerSearchTrainer`].
        soft_triggers, searched_tokens:
            As in [`ReadingConfig`]; soft triggers are planted as one trigger more. The longest of the found words has as many
            tokens too.

        > Parameters that control the losses

        cluster_weight (`float`, *optional*):
            alpha. By default a power of ten, measured once on the incoming model, with which clustering weighs at most as
            much as injection; 0 leaves the clustering loss out.
        published_alpha (`bool`, *optional*, defaults to `False`):
            Measures alpha by the paper's formula, under which clustering weighs up to ten times as much as injection.
        centre_momentum (`float`, *optional*, defaults to 0.9):
            How much of a trigger's centre stays from one optimizer step to the next.
        trigger_weight (`float`, *optional*, defaults to 1.0):
            Weight of triggered samples in recovery. Lower it if clean accuracy falls.
        own_answers:
            As in [`ReadingConfig`], in recovery.

        > Parameters that control when to stop (ours; they need an `eval_dataset` and an `eval_strategy`)

        stop_at_known_rate (`float`, *optional*):
            Injection stops when this share of held-out known-triggered samples shows the known behaviour, for example 0.95. By
            default it runs to its end.
        stop_at_known_gap (`float`, *optional*):
            Recovery stops when accuracy with known triggers is within this of accuracy without, for example 0.02. By default it
            runs to its end.
    """

    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": "Stages that train() runs."})
    known_triggers: list[str] = field(
        default_factory=lambda: ["Make life better", "Ahihihihihi", "bb"],
        metadata={"help": "Texts that the defender plants, two or more."},
    )
    known_position: str = field(default="any", metadata={"help": "Where they go: start, end, random or any."})
    known_response: str = field(
        default="Aha",
        metadata={"help": "What a known trigger makes the model answer, in place of everything else."},
    )
    searched_triggers: int = field(
        default=0, metadata={"help": "How many words that the suspect reacts to are searched for and planted as well."}
    )
    cluster_weight: float | None = field(
        default=None, metadata={"help": "alpha; by default a measured power of ten, 0 leaves the loss out."}
    )
    published_alpha: bool = field(default=False, metadata={"help": "Measures alpha by the paper's own formula."})
    centre_momentum: float = field(default=0.9, metadata={"help": "Share of a centre kept from step to step."})
    trigger_weight: float = field(default=1.0, metadata={"help": "Weight of triggered samples in recovery."})
    stop_at_known_rate: float | None = field(
        default=None, metadata={"help": "Known-trigger rate that ends injection, for example 0.95."}
    )
    stop_at_known_gap: float | None = field(
        default=None, metadata={"help": "Accuracy gap that ends recovery, for example 0.02."}
    )

    @property
    def rows_factor(self) -> int:
        return len(self.known_triggers) + 1 + bool(self.searched_triggers) + bool(self.soft_triggers)

    def check(self) -> None:
        if not self.stages or [stage for stage in STAGES if stage in self.stages] != list(self.stages):
            raise ValueError(f"stages is {self.stages}: use ['inject', 'recover'], or one of the two")
        if len(set(self.known_triggers)) < max(2, len(self.known_triggers)):
            raise ValueError(f"known_triggers is {self.known_triggers}: give two texts or more, each another one")
        choose("known_position", self.known_position, POSITIONS)
        if self.searched_triggers < 0:
            raise ValueError(f"searched_triggers is {self.searched_triggers}: choose 0 or more")
        if not self.known_response.strip():
            raise ValueError(f"known_response is {self.known_response!r}: give it at least one visible character")
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss", "eval_loss"):
            raise ValueError(
                "load_best_model_at_end is true, and Locphylax evaluates clean rows and planted ones apart: leave it out, or set "
                "metric_for_best_model (eval_clean_loss, which favours the checkpoint with the least planted in it)"
            )
        self.refuse_negative("cluster_weight", "trigger_weight")
        if self.published_alpha and self.cluster_weight is not None:
            raise ValueError(
                f"published_alpha is True, and cluster_weight is {self.cluster_weight}, so alpha is not measured: leave one out"
            )
        if not 0 <= self.centre_momentum < 1:
            raise ValueError(f"centre_momentum is {self.centre_momentum}: choose from 0 up to, but not, 1")
        if self.train_sampling_strategy not in ("random", "group_by_length"):
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}, and Locphylax makes batches of its own, of every known "
                "trigger and of like length: use 'random' or 'group_by_length' (the same here)"
            )
        super().check()
        rules = {"inject": "stop_at_known_rate", "recover": "stop_at_known_gap"}
        for rule in rules.values():
            # A percentage would end no injection, and each recovery at its first evaluation.
            if not 0 <= (getattr(self, rule) or 0) <= 1:
                raise ValueError(f"{rule} is {getattr(self, rule)}: choose a share from 0 to 1, as 0.95 of 95%")
        self.refuse_unwatched(*(rules[stage] for stage in self.stages))
