"""What a classification head reads of a text, where that is not the state at one position."""

from transformers import PreTrainedModel


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
