"""The task that a model and a data set go together in, the class that loads such models, and what they must be told."""

from collections.abc import Sequence

from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .collators import padding_id
from .heads import refuse_last_column
from .images import ImageClassification
from .mapping import column_names
from .tasks import InstructionFollowing, LabelWords, Processor, SequenceClassification, Task


def auto_class(model: PreTrainedModel) -> type:
    """The auto class that loads models for what this one does."""
    kinds = {
        "SequenceClassification": AutoModelForSequenceClassification,
        "ImageClassification": AutoModelForImageClassification,
    }
    return kinds.get(type(model).__name__.rpartition("For")[2], AutoModelForCausalLM)


def tell_padding(model: PreTrainedModel, processor: Processor | None) -> None:
    """Tells a model with a classification head what its texts are padded with: a decoder's finds their last token by it.

    Raises:
        `ValueError`: for a head that reads padding.
    """
    refuse_last_column(model)
    padding = padding_id(processor) if isinstance(processor, PreTrainedTokenizerBase) else None
    if padding is not None and auto_class(model) is AutoModelForSequenceClassification:
        model.config.get_text_config().pad_token_id = padding


def infer_task(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    label_words: Sequence[str] | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
) -> Task:
    """The task that a model and a data set leave open, or one clear line about what is missing.

    Raises:
        `ValueError`: if the columns fit no task, or a causal LM is to classify and has no label words.
    """
    columns = set(column_names(dataset))
    if {"prompt", "response"} <= columns:
        return InstructionFollowing(system_prompt)
    if "label" in columns and auto_class(model) is not AutoModelForCausalLM and model.config.num_labels < 2:
        raise ValueError(
            f"num_labels is {model.config.num_labels} in the model's config, and a classifier has two or more: load it with "
            "num_labels=2"
        )
    if {"image", "label"} <= columns:
        return ImageClassification(model.config.num_labels)
    if not {"text", "label"} <= columns:
        raise ValueError(
            f"the data set has columns {sorted(columns)}: name them 'text' and 'label' (classification), 'image' and 'label' "
            "(images) or 'prompt' and 'response' (instructions)"
        )
    if auto_class(model) is AutoModelForSequenceClassification:
        return SequenceClassification(model.config.num_labels)
    if not label_words:
        raise ValueError(
            "label_words is not set: a causal LM classifies by one word a label, for example "
            "label_words=[' negative', ' positive'], in the order of the labels"
        )
    if isinstance(label_words, str):
        raise ValueError(f"label_words is {label_words!r}: give a list of words, one for each label")
    return LabelWords(tuple(label_words), prompt_template or LabelWords.default_template)
