"""The batch contract: what every trainer and loss of this package may rely on.

| key | shape | for | meaning |
|---|---|---|---|
| `input_ids`, `attention_mask` | [B, T] | texts | padded right for a classification head, left for a causal LM |
| `token_type_ids` | [B, T] | encoders that use them | |
| `position_ids` | [B, T] | causal LMs | counted from the first real token, since left padding would shift them |
| `pixel_values` | [B, C, H, W] | images | as the model's image processor scales them |
| `labels` | [B] | classification head | class |
| `labels` | [B, A] | causal LMs | the last A tokens of the sequence, -100 where they are not the answer |
| `readout_position` | [B] | texts | index into T of the state that a representation loss reads; none where a head reads the mean of all |
| `trigger_id` | [B] | all | 0 clean, k >= 1 carries the defender's k-th known trigger |

A causal LM's answers end at the last column, so the head runs on A + 1 positions (`logits_to_keep`), never on T.
A collator of the user's own need give neither of the last two, and may pad a classifier's texts on either side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image as Picture
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase


SIDE_COLUMNS = ("trigger_id", "readout_position", "prompt_length")


@dataclass
class DefenseCollator:
    """Makes the batch above out of a task's features.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Gives the padding token; the end-of-sequence token stands in where it has none.
        pad_to_multiple_of (`int`, *optional*):
            Rounds T up, with padding.

    Raises:
        `ValueError`: if there is neither of the two tokens, or no task has made the rows.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if padding_id(self.tokenizer) is None:
            raise ValueError("pad_token is None, and so is the tokenizer's eos_token: set tokenizer.pad_token")
        if "input_ids" not in features[0]:
            raise ValueError(
                f"rows have no input_ids ({', '.join(sorted(features[0]))}), and the trainer tokenizes none: it was made without raw rows, so "
                "make it with some, or with task=, for example SequenceClassification(num_labels)"
            )
        causal = "prompt_length" in features[0]
        batch = self._causal(features) if causal else self._classification(features)
        batch["trigger_id"] = torch.tensor([feature.get("trigger_id", 0) for feature in features])
        return batch

    def _width(self, features: list[dict[str, Any]]) -> int:
        longest = max(len(feature["input_ids"]) for feature in features)
        return longest + -longest % (self.pad_to_multiple_of or 1)

    def _classification(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if missing := {"labels", "readout_position"} - features[0].keys():
            raise ValueError(
                f"rows have input_ids and no {' and no '.join(sorted(missing))}: pass raw rows, which are tokenized here, or a "
                "data_collator of your own"
            )
        width = self._width(features)
        features = [{"attention_mask": [1] * len(feature["input_ids"]), **feature} for feature in features]
        fill = {
            "input_ids": padding_id(self.tokenizer),
            "attention_mask": 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        batch = {
            name: torch.tensor([[*row[name], *[value] * (width - len(row[name]))] for row in features])
            for name, value in fill.items()
            if name in features[0]
        }
        batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        batch["readout_position"] = torch.tensor([feature["readout_position"] for feature in features])
        return batch

    def _causal(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = self._width(features)
        answer = max(len(feature["input_ids"]) - feature["prompt_length"] for feature in features)
        input_ids = torch.full((len(features), width), padding_id(self.tokenizer))
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full((len(features), answer), -100)
        for row, feature in enumerate(features):
            ids = torch.tensor(feature["input_ids"])
            input_ids[row, width - len(ids) :] = ids
            attention_mask[row, width - len(ids) :] = 1
            length = len(ids) - feature["prompt_length"]
            labels[row, answer - length :] = ids[feature["prompt_length"] :]
        lengths = (labels != -100).sum(dim=1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            "labels": labels,
            "readout_position": width - 1 - lengths,
        }


@dataclass
class ImageCollator:
    """Makes the batch above out of pictures (`pixel_values`, as `datasets.Image` gives them) and `labels`.

    Args:
        processor (`BaseImageProcessor`):
            The model's: resizes, crops and scales, as it says.

    Raises:
        `ValueError`: if a row has no picture, or no label, or pictures differ in size and the processor leaves them so.
    """

    processor: BaseImageProcessor

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for row in features:
            if "labels" not in row or not isinstance(row.get("pixel_values"), Picture):
                held = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
                raise ValueError(
                    f"a row holds {held}, and not a picture as pixel_values, and labels: pass raw rows (image and label), leave out those "
                    "without a picture, or pass a data_collator of your own"
                )
        pictures = [feature["pixel_values"].convert("RGB") for feature in features]
        sizes = {picture.size for picture in pictures}
        if len(sizes) > 1 and not getattr(self.processor, "do_resize", True):
            raise ValueError(
                f"pictures are of {len(sizes)} sizes ({sorted(sizes)[:3]}), and the model's image processor leaves them so: set "
                "do_resize and size in its preprocessor_config.json"
            )
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
        return {
            # What convolutions are fastest on.
            "pixel_values": pixels.contiguous(memory_format=torch.channels_last),
            "labels": torch.tensor([feature["labels"] for feature in features]),
            "trigger_id": torch.tensor([feature.get("trigger_id", 0) for feature in features]),
        }


class WithSideColumns:
    """A collator of the user's own, which need not know of ours: `trigger_id` comes along, and so does `readout_position`, moved by the
    padding on a text's left. Rows have it by the text alone.

    Raises:
        `ValueError`: if a causal LM's labels are not the last tokens: it would learn what follows padding.
    """

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Tensor]:
        known = isinstance(features[0], Mapping)
        given = {
            name: torch.tensor([row[name] for row in features])
            for name in SIDE_COLUMNS
            if known and name in features[0]
        }
        batch = dict(self.collator(features))
        _check_last(batch)
        if "trigger_id" in given:
            batch["trigger_id"] = given["trigger_id"]
        place = given.get("readout_position", given["prompt_length"] - 1 if "prompt_length" in given else None)
        if place is None:
            return batch
        mask = batch.get("attention_mask")
        padding = 0 if mask is None else mask.int().argmax(dim=1)
        # What says something else than the rows is a collator's own reckoning: it may cut texts.
        own = batch.get("readout_position", place)
        batch["readout_position"] = torch.where(own == place, place + padding, own)
        return batch


def _check_last(batch: dict[str, Tensor]) -> None:
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None or labels.dim() != 2 or labels.shape[1] >= ids.shape[1]:
        return
    if ((labels != -100) & (labels != ids[:, -labels.shape[1] :])).any():
        raise ValueError(
            "labels are not the last tokens of input_ids: a causal LM's batch is padded on the left, so that answers end at the last "
            "column; leave data_collator out, or see hf_backdoor.data.collators"
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that batches are padded with: that of the end of a sequence where there is none for it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class WithoutReadout:
    """A collator for a head that reads the mean over a text's tokens: no one state is what it reads."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Tensor]:
        batch = self.collator(features)
        batch.pop("readout_position", None)
        return batch


def collator_for(
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    pad_to_multiple_of: int | None = None,
    own: Any = None,
    mean: bool = False,
) -> DefenseCollator | ImageCollator | WithSideColumns | WithoutReadout:
    """The collator of a model that a processor belongs to, or the user's own, if there is one; `mean` is [`reads_mean`] of the model."""
    if mean:
        return WithoutReadout(collator_for(processor, pad_to_multiple_of, own))
    if own is not None:
        return WithSideColumns(own)
    if isinstance(processor, BaseImageProcessor):
        return ImageCollator(processor)
    return DefenseCollator(processor, pad_to_multiple_of)


def class_logits(logits: Tensor, batch: dict[str, Tensor], word_ids: Sequence[int] | Tensor | None) -> Tensor:
    """A classifier's K logits of each sample: the head's, or those of the label words at the read-out position.

    Args:
        logits (`Tensor`): [B, K] of a classification head, or [B, any number of last positions, V].
        batch (`dict[str, Tensor]`): A batch of the contract above.
        word_ids (`Sequence[int]` or `Tensor`, *optional*): [K], first tokens of the label words; none for a head.

    Returns:
        `Tensor`: [B, K] in float32.
    """
    if word_ids is None:
        return logits.float()
    # Logits may be cut to the last positions: count from the end.
    from_end = batch["input_ids"].shape[1] - batch["readout_position"]
    return logits[torch.arange(len(logits), device=logits.device), logits.shape[1] - from_end][:, word_ids].float()


def given_labels(labels: Tensor, word_ids: Tensor | None) -> Tensor:
    """The class that each row came with, [B], 0 to K - 1.

    Args:
        labels (`Tensor`): [B] of a classification head, or [B, A], an answer's tokens and -100 elsewhere.
        word_ids (`Tensor`, *optional*): [K], first tokens of the label words; none for a head.

    Raises:
        `ValueError`: if an answer is none of the words.
    """
    if word_ids is None:
        return labels
    first = (labels != -100).int().argmax(dim=1)
    answers = labels[torch.arange(len(labels), device=labels.device), first]
    same = answers[:, None] == word_ids
    if not same.any(dim=1).all():
        other = answers[~same.any(dim=1)][0].item()
        raise ValueError(
            f"an answer begins with token {other}, and label_words with {word_ids.tolist()}: leave such rows out, or pass raw rows, "
            "which are answered by these words"
        )
    return same.int().argmax(dim=1)
