"""Arguments that all defenses share, on top of `TrainingArguments`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from .field_types import check_types


AUGMENTATIONS = ("none", "shift", "shift_and_mirror")


@dataclass
class DefenseConfig(TrainingArguments):
    r"""
    Configuration of [`DefenseTrainer`], and base of every method's configuration.

    Args:
        label_words (`list[str]`, *optional*):
            One answer for each label, in the order of the labels, for causal LMs that classify (`[" negative",
            " positive"]`). Not read for models with a classification head.
        prompt_template (`str`, *optional*):
            Prompt of such a model, with `{text}` in it.
        system_prompt (`str`, *optional*):
            For instructions: what the system says before every prompt; what the chat template has by itself by default.
        max_length (`int`, *optional*):
            Tokens of a raw row's text (or prompt) that are kept, counted before template, answer and triggers are put to it; all by
            default.
        dataset_num_proc (`int`, *optional*):
            Processes that tokenize (and split, and stamp) the rows.
        pad_to_multiple_of (`int`, *optional*):
            Rounds the length of every batch up, for example to 8: GPUs multiply such shapes faster, and `torch_compile`
            meets fewer of them.

        augmentation (`str`, *optional*, defaults to `"none"`):
            What training pictures go through in each step, and no others: `"none"`, `"shift"` (moved by up to 2 pixels
            either way) or `"shift_and_mirror"` (and half of them mirrored; not where left and right tell classes apart).

    NOTE: `bf16` stays off by default, so that a run means the same on every machine.
    """

    label_words: list[str] | None = field(
        default=None, metadata={"help": "One answer word for each label, for causal LMs that classify."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Prompt of a causal LM that classifies, with {text} in it."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "Instructions: what the system says before every prompt."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a raw row's text that are kept; all by default."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the rows."})
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Rounds the length of every batch up to a multiple of this."}
    )
    augmentation: str = field(
        default="none", metadata={"help": "What training pictures go through: none, shift or shift_and_mirror."}
    )

    def __post_init__(self) -> None:
        check_types(self, TrainingArguments)
        self.check()
        super().__post_init__()

    def check(self) -> None:
        """What the values must be, beyond their types. A method's configuration looks at its own, and calls this.

        Raises:
            `ValueError`: with one line that names the field, the value and the fix.
        """
        choose("augmentation", self.augmentation, AUGMENTATIONS)
        for name in ("max_length", "pad_to_multiple_of", "dataset_num_proc"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, and the losses here know none: leave it at 0"
            )

    def refuse_negative(self, *names: str) -> None:
        """Of weights; one that is not set is none."""
        for name in names:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: choose 0, which leaves it out, or more")

    def refuse_unwatched(self, *names: str) -> None:
        """Of what goes by evaluations, where there are none."""
        for name in names:
            if getattr(self, name) is not None and self.eval_strategy == "no":
                raise ValueError(
                    f"{name} is {getattr(self, name)}, and eval_strategy is 'no', so nothing would look at it: set eval_strategy (and "
                    "pass an eval_dataset), or leave it out"
                )

    @property
    def reentrant(self) -> bool:
        """Whether blocks are run again in the backward pass in the old way, without a graph in the forward pass."""
        kwargs = self.activation_checkpointing_kwargs or {}
        return bool(self.activation_checkpointing and kwargs.get("use_reentrant"))

    @property
    def rows_factor(self) -> int:
        """Rows that the first stage trains on for each row it is given."""
        return 1

    @classmethod
    def takes(cls, arguments: dict[str, Any], stage: dict[str, Any], usual: "type[DefenseConfig]") -> dict[str, Any]:
        """What a stage takes of the arguments it has: its own, and of the whole run's those for which it has no default other
        than its method's (a mask is fitted at another rate than models are trained)."""
        defaults = {f.name: f.default for f in fields(usual)}
        known = {f.name: f.name not in defaults or f.default == defaults[f.name] for f in fields(cls)}
        shared = {name: value for name, value in arguments.items() if known.get(name)}
        return shared | {name: value for name, value in stage.items() if name in known}


def choose(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: use one of {', '.join(allowed)}")
