"""What is read of a text: by a classification head, where that is not the state at one position, and by a language model."""

from pathlib import Path

from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def reads_mean(model: PreTrainedModel) -> bool:
    """Whether a head reads the mean over a text's tokens, as ModernBERT's and EuroBERT's may: it has no read-out position."""
    return getattr(model.config, "classifier_pooling", None) in ("mean", "late")


def refuse_last_column(model: PreTrainedModel) -> None:
    """
    Raises:
        `ValueError`: for a head that reads the last column of a batch, be it padding (XLNet's): texts are padded on the right.
    """
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    # GPT-2's configuration has the field as well, for a head of another kind, and another value in it.
    if classifies and getattr(model.config, "summary_type", None) == "last":
        raise ValueError(
            f"summary_type is 'last' in the config, so {type(model).__name__} reads the last column of a batch, which is padding "
            "where texts differ in length: use another model"
        )


def names_classifier(kind: str) -> bool:
    """Whether models of a class of this name have the classification head that tasks read."""
    return "ForSequenceClassification" in kind or "ForImageClassification" in kind


def reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether a model sees the tokens after a position too, as encoders do unless their configuration makes decoders of them."""
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decodes


def refuse_missing(name_or_path: str | Path, missing: set[str], auto_model: type) -> None:
    """A causal LM, and a teacher, is taken as it was trained: what its checkpoint lacks (of one saved by `AutoModel`, the head) would be
    drawn at random.

    Args:
        missing (`set[str]`): As `from_pretrained` tells it.
        auto_model (`type`): What the checkpoint is read by.

    Raises:
        `ValueError`: with one line that names the weights.
    """
    if missing:
        first, count = min(missing), len(missing)
        kind = "a causal LM" if auto_model is AutoModelForCausalLM else "a model"
        raise ValueError(
            f"model {str(name_or_path)!r} has no weights for {first}{f' and {count - 1} more' if count > 1 else ''}, which would be random: "
            f"give {kind} that was saved whole, by {auto_model.__name__}"
        )
