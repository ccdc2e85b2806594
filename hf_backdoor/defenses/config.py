"""Arguments that all defenses share, on top of `TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


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

    NOTE: `bf16` stays off by default, so that a run means the same on every machine.
    """

    label_words: list[str] | None = field(
        default=None, metadata={"help": "One answer word for each label, for causal LMs that classify."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Prompt of a causal LM that classifies, with {text} in it."}
    )

    @property
    def rows_factor(self) -> int:
        """Rows that the first stage trains on for each row it is given."""
        return 1
