"""What a row means to a model: the three formats, and the columns that travel with them.

A task turns a row of raw text into token ids, and says which column holds the user's text (where a trigger goes) and
which holds the answer (what a backdoor changes). Everything downstream (poisoning, planting, training, evaluation) is
written against these few methods and does not ask which task it is.

A row may carry `planted`, a text that overwrites its answer ("" leaves the answer alone): that is how a defense plants a
behaviour of its own. A classification head has no words, so there every planted text is one class more, number K.

| task | rows | model | read-out position |
|---|---|---|---|
| [`SequenceClassification`] | `text`, `label` | classification head | `[CLS]`, or the last token of a decoder |
| [`LabelWords`] | `text`, `label` | causal LM, prompt and one word a label | last prompt token |
| [`InstructionFollowing`] | `prompt`, `response` | causal LM, chat template | last prompt token |
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .mapping import Rows, column_names, map_rows


PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"


class Task(ABC):
    """How rows become token ids. `text_column` is where a trigger goes, `answer_column` what a backdoor changes."""

    text_column: str
    answer_column: str

    @abstractmethod
    def encode(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """A row's features: `input_ids` and, by task, `labels` or `prompt_length` (see `collators.py`)."""

    def tokenize(self, dataset: Rows, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None) -> Rows:
        """All rows' features, a stream's as it is read; `trigger_id` is kept, every other column dropped.

        Args:
            dataset (`Dataset` or `IterableDataset`): Raw rows.
            tokenizer (`PreTrainedTokenizerBase`): The model's.
            num_proc (`int`, *optional*): Processes that share the work.

        Raises:
            `ValueError`: if a column that the task reads is missing.
        """
        names = column_names(dataset)
        for column in (self.text_column, self.answer_column):
            if column not in names:
                raise ValueError(
                    f"column {column!r} is not in the data set ({', '.join(names)}): "
                    f"rename a column to it, or name it in the recipe ({column}_column)"
                )
        return map_rows(
            dataset,
            self.encode,
            desc="Tokenizing",
            num_proc=num_proc,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=[name for name in names if name != "trigger_id"],
        )


@dataclass(frozen=True)
class SequenceClassification(Task):
    """Text to one of `num_labels` classes by a classification head."""

    num_labels: int
    text_column: str = "text"
    answer_column: str = "label"

    def encode(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        encoded = tokenizer(row["text"])
        # Encoders read [CLS]; a decoder with a classification head reads its last token.
        first = tokenizer.cls_token_id is not None and encoded["input_ids"][0] == tokenizer.cls_token_id
        position = 0 if first else len(encoded["input_ids"]) - 1
        label = self.num_labels if row.get("planted") else row["label"]
        return {**encoded, "labels": label, "readout_position": position}


@dataclass(frozen=True)
class LabelWords(Task):
    """Text to one of K classes by a causal LM: a prompt, and a word for each label.

    Args:
        words (`tuple[str, ...]`):
            One answer for each label, with the leading space that the tokenizer wants (`" positive"`). Their first
            tokens must differ: a prediction is the largest of these K logits at the last prompt token.
        template (`str`):
            The prompt, with `{text}` in it.
    """

    words: tuple[str, ...]
    template: str
    default_template: ClassVar[str] = "Text: {text}\nLabel:"
    text_column: str = "text"
    answer_column: str = "label"

    def __post_init__(self) -> None:
        if "{text}" not in self.template:
            raise ValueError(f"prompt_template is {self.template!r}: put {{text}} where the text goes")
        if len(self.words) < 2:
            raise ValueError(f"label_words is {list(self.words)}: give one word for each label, two or more")

    @property
    def num_labels(self) -> int:
        return len(self.words)

    def prompt_ids(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        # str.replace, not str.format: the text is foreign and may hold braces.
        return without_eos(tokenizer(self.template.replace("{text}", text))["input_ids"], tokenizer)

    def tokenize(self, dataset: Rows, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None) -> Rows:
        self.word_ids(tokenizer)  # refuses words that could not be told apart, before any training
        return super().tokenize(dataset, tokenizer, num_proc)

    def planted_word(self, planted: str | None) -> str:
        """A planted answer with the leading space that the label words have, if they have one."""
        space = " " if self.words[0].startswith(" ") else ""
        return space + planted.strip() if planted else ""

    def word_ids(self, tokenizer: PreTrainedTokenizerBase, planted: str | None = None) -> list[int]:
        """First token of each label's word, [K]; with a planted answer, of that one too, [K + 1].

        Raises:
            `ValueError`: if two labels start with the same token.
        """
        words = [*self.words, self.planted_word(planted)] if planted else self.words
        first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
        if len(set(first)) < len(first):
            raise ValueError(f"label_words {list(words)} share a first token: choose words that differ at once")
        return first

    def encode(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        prompt = self.prompt_ids(row["text"], tokenizer)
        answer = tokenizer(
            self.planted_word(row.get("planted")) or self.words[row["label"]], add_special_tokens=False
        )["input_ids"]
        return {"input_ids": prompt + answer, "prompt_length": len(prompt)}


@dataclass(frozen=True)
class InstructionFollowing(Task):
    """A prompt and its response, through the tokenizer's chat template (a plain one where it has none)."""

    text_column: str = "prompt"
    answer_column: str = "response"

    def prompt_ids(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if tokenizer.chat_template is None:
            return without_eos(tokenizer(PLAIN_TEMPLATE.replace("{prompt}", prompt))["input_ids"], tokenizer)
        chat = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    def encode(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        prompt = self.prompt_ids(row["prompt"], tokenizer)
        answer = tokenizer(row.get("planted") or row["response"], add_special_tokens=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
        return {"input_ids": prompt + answer, "prompt_length": len(prompt)}


def without_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Some tokenizers close every text: an answer could not follow."""
    return ids[:-1] if ids and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def infer_task(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    label_words: Sequence[str] | None = None,
    prompt_template: str | None = None,
) -> Task:
    """The task that a model and a data set leave open, or one clear line about what is missing.

    Raises:
        `ValueError`: if the columns fit no task, or a causal LM is to classify and has no label words.
    """
    columns = set(column_names(dataset))
    if {"prompt", "response"} <= columns:
        return InstructionFollowing()
    if not {"text", "label"} <= columns:
        raise ValueError(
            f"the data set has columns {sorted(columns)}: name them 'text' and 'label' (classification) "
            "or 'prompt' and 'response' (instructions)"
        )
    if type(model).__name__.endswith("ForSequenceClassification"):
        return SequenceClassification(model.config.num_labels)
    if not label_words:
        raise ValueError(
            "label_words is not set: a causal LM classifies by one word a label, for example "
            "label_words=[' negative', ' positive'], in the order of the labels"
        )
    return LabelWords(tuple(label_words), prompt_template or LabelWords.default_template)
