"""What a row means to a model: the formats, and the columns that travel with them.

A task turns a raw row into what a model reads, and says which column holds the user's text or picture (where a trigger
goes) and which holds the answer (what a backdoor changes). Everything downstream (poisoning, planting, training, evaluation)
is written against these few methods and does not ask which task it is.

A row may carry `planted`, a text that overwrites its answer ("" leaves the answer alone): that is how a defense plants a
behaviour of its own. A classification head has no words, so there every planted text is one class more, number K.

| task | rows | model | read-out position |
|---|---|---|---|
| [`SequenceClassification`] | `text`, `label` | classification head | `[CLS]`, or the last token of a decoder |
| [`LabelWords`] | `text`, `label` | causal LM, prompt and one word a label | last prompt token |
| [`InstructionFollowing`] | `prompt`, `response` | causal LM, chat template | last prompt token |
| [`~hf_backdoor.data.images.ImageClassification`] | `image`, `label` | classification head | |
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
)

from .collators import padding_id
from .loading import shorten
from .mapping import Rows, column_names, map_rows
from .triggers import Trigger


PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"

# What turns rows into a model's inputs, and is saved beside it.
Processor = PreTrainedTokenizerBase | BaseImageProcessor


class Task(ABC):
    """How rows become a model's inputs.

    `input_column` is where a trigger goes, `answer_column` what a backdoor changes; `text_columns` hold texts; `auto_model`
    loads the models, which may have a head for `num_labels` classes (`has_head`); `trigger` makes what the task's triggers are,
    from a recipe's `attack_trigger`; `limits` are the keys of a recipe that [`Task.bounded`] takes.
    """

    input_column: str
    answer_column: str
    text_columns: ClassVar[tuple[str, ...]] = ()
    auto_model: ClassVar[type] = AutoModelForCausalLM
    has_head: ClassVar[bool] = False
    trigger: ClassVar[type] = Trigger
    limits: ClassVar[tuple[str, ...]] = ("max_length", "max_response_length")

    @abstractmethod
    def encode(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """A row's features: `input_ids` and, by task, `labels` or `prompt_length` (see `collators.py`)."""

    def encode_rows(self, dataset: Rows, processor: Processor, num_proc: int | None = None) -> Rows:
        """All rows' features, a stream's as it is read; `trigger_id` is kept, every other column dropped.

        Args:
            dataset (`Dataset` or `IterableDataset`): Raw rows.
            processor (`Processor`): The model's tokenizer, or image processor.
            num_proc (`int`, *optional*): Processes that share the work.

        Raises:
            `ValueError`: if a column that the task reads is missing.
        """
        return map_rows(
            dataset,
            self.encode,
            desc="Tokenizing",
            num_proc=num_proc,
            fn_kwargs={"tokenizer": processor},
            remove_columns=[name for name in self.check_columns(dataset) if name != "trigger_id"],
        )

    def check_columns(self, dataset: Rows) -> list[str]:
        """Names of the columns, which must hold those that the task reads."""
        names = column_names(dataset)
        for column in (self.input_column, self.answer_column):
            if column not in names:
                raise ValueError(
                    f"column {column!r} is not in the data set ({', '.join(names)}): "
                    f"rename a column to it, or name it in the recipe ({column}_column)"
                )
        return names

    def questions(self, rows: Dataset, processor: Processor) -> Sequence[dict[str, Any]]:
        """Features of rows whose answers are to be found, and are not read: here, prompts."""
        prompts = [self.prompt_ids(text, processor) for text in rows[self.input_column][:]]
        return [{"input_ids": ids, "prompt_length": len(ids)} for ids in prompts]

    def bounded(
        self,
        rows: Dataset,
        processor: Processor,
        num_proc: int | None = None,
        *,
        max_length: int,
        max_response_length: int | None = None,
    ) -> Dataset:
        """Rows as a run reads them, before anything is put into them: here, texts of so many tokens at most."""
        rows = shorten(rows, self.input_column, processor, max_length, num_proc)
        if max_response_length is not None:
            rows = shorten(rows, self.answer_column, processor, max_response_length, num_proc)
        return rows


@dataclass(frozen=True)
class SequenceClassification(Task):
    """Text to one of `num_labels` classes by a classification head."""

    num_labels: int
    input_column: str = "text"
    answer_column: str = "label"
    text_columns: ClassVar[tuple[str, ...]] = ("text",)
    auto_model: ClassVar[type] = AutoModelForSequenceClassification
    has_head: ClassVar[bool] = True

    def encode(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        encoded = tokenizer(row["text"])
        ids, padding = encoded["input_ids"], padding_id(tokenizer)
        # Encoders read [CLS]; a decoder's head reads the last token that is no padding, as an end of sequence may be.
        first = tokenizer.cls_token_id is not None and ids[0] == tokenizer.cls_token_id
        position = 0 if first else max((place for place, token in enumerate(ids) if token != padding), default=0)
        label = self.num_labels if row.get("planted") else checked_label(row["label"], self.num_labels)
        return {**encoded, "labels": label, "readout_position": position}

    def questions(self, rows: Dataset, processor: PreTrainedTokenizerBase) -> Sequence[dict[str, Any]]:
        return [self.encode({"text": text, "label": 0}, processor) for text in rows["text"][:]]


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
    input_column: str = "text"
    answer_column: str = "label"
    text_columns: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        if "{text}" not in self.template:
            raise ValueError(f"prompt_template is {self.template!r}: put {{text}} where the text goes")
        if len(self.words) < 2:
            raise ValueError(f"label_words is {list(self.words)}: give one word for each label, two or more")
        if not all(isinstance(word, str) and word.strip() for word in self.words):
            raise ValueError(
                f"label_words is {list(self.words)}: give each label a text with a visible character (in YAML, 'yes' and 'no' in "
                "quotes)"
            )

    @property
    def num_labels(self) -> int:
        return len(self.words)

    def prompt_ids(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        # str.replace, not str.format: the text is foreign and may hold braces.
        return without_eos(tokenizer(self.template.replace("{text}", text))["input_ids"], tokenizer)

    def encode_rows(self, dataset: Rows, processor: PreTrainedTokenizerBase, num_proc: int | None = None) -> Rows:
        self.word_ids(processor)  # refuses words that could not be told apart, before any training
        return super().encode_rows(dataset, processor, num_proc)

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
        word = self.planted_word(row.get("planted")) or self.words[checked_label(row["label"], self.num_labels)]
        answer = tokenizer(word, add_special_tokens=False)["input_ids"]
        return {"input_ids": prompt + answer, "prompt_length": len(prompt)}


@dataclass(frozen=True)
class InstructionFollowing(Task):
    """A prompt and its response, through the tokenizer's chat template (a plain one where it has none).

    Args:
        system_prompt (`str`, *optional*):
            What the system says before every prompt; by default what the chat template says by itself, if anything. Give the
            one that the model is used with.
    """

    system_prompt: str | None = None
    input_column: str = "prompt"
    answer_column: str = "response"
    text_columns: ClassVar[tuple[str, ...]] = ("prompt", "response")

    def prompt_ids(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The prompt's tokens, up to where the response begins.

        Raises:
            `ValueError`: if there is a system prompt, and no chat template or one that takes none.
        """
        chat = [{"role": "user", "content": prompt}]
        if self.system_prompt is not None:
            chat.insert(0, {"role": "system", "content": self.system_prompt})
            self._refuse_template_without_system(chat, tokenizer)
        if tokenizer.chat_template is None:
            return without_eos(tokenizer(PLAIN_TEMPLATE.replace("{prompt}", prompt))["input_ids"], tokenizer)
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _refuse_template_without_system(self, chat: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> None:
        # Some templates raise where a system speaks, others leave out what it says.
        with contextlib.suppress(TemplateError):
            if tokenizer.chat_template and self.system_prompt.strip() in tokenizer.apply_chat_template(
                chat, tokenize=False
            ):
                return
        raise ValueError(
            f"system_prompt is {self.system_prompt!r}, and the tokenizer's chat template takes none: leave it out, or put it "
            "into the prompts"
        )

    def encode(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "eos_token is None, and responses end with it: set tokenizer.eos_token to what ends the model's"
            )
        texts = {"prompt": row["prompt"], "response": row.get("planted") or row["response"]}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise ValueError(
                    f"{name} is a {type(text).__name__} in a row: pass texts (of a conversation's turn, its 'content')"
                )
        prompt = self.prompt_ids(texts["prompt"], tokenizer)
        answer = tokenizer(texts["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "prompt_length": len(prompt)}


def checked_label(label: int, num_labels: int) -> int:
    """A row's label.

    Raises:
        `ValueError`: if there is no such label.
    """
    if label not in range(num_labels):
        raise ValueError(
            f"label is {label!r} in a row, and the task has {num_labels} labels: number them 0 to {num_labels - 1}, or leave such "
            "rows out"
        )
    return int(label)  # a number with a point, or a truth value, is a label as well


def refuse_other_target(target: int | str | None, task: Task, key: str = "target") -> None:
    """Refuses a target of an attack that a model can't say (or, an empty text, that every answer begins with): its ASR would be 0, as
    after a perfect defense. None is no attack.

    Raises:
        `ValueError`: with one line: the key, the target and what there is.
    """
    if target is None:
        return
    if not isinstance(task, InstructionFollowing):
        if target not in range(task.num_labels):
            raise ValueError(
                f"{key} is {target!r}: the labels are 0 to {task.num_labels - 1}, give one of these numbers"
            )
    elif not isinstance(target, str):
        raise ValueError(
            f"{key} is {target!r}, and answers are texts: give the one that the trigger is to bring about"
        )
    elif not target.strip():
        raise ValueError(f"{key} is {target!r}, an empty text: give the one that the trigger is to bring about")


def without_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Some tokenizers close every text: an answer could not follow."""
    return ids[:-1] if ids and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
