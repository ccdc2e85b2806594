"""A data collator of the user's own, which need not know of our columns."""

import pytest
import tiny
import torch
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification

from hf_backdoor.data import SequenceClassification
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.locphylax import LocphylaxConfig, LocphylaxTrainer


def decoder():
    """Its positions are relative: where a text is padded changes nothing of its states."""
    config = tiny.model("llama").config
    config.num_labels, config.pad_token_id = 2, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def injected(folder, collator):
    args = LocphylaxConfig(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", stages=["inject"], max_steps=1,
    )  # fmt: skip
    trainer = LocphylaxTrainer(
        decoder(), args, data_collator=collator, train_dataset=tiny.reviews(8), processing_class=tiny.causal_tokenizer(),
        task=SequenceClassification(2),
    )  # fmt: skip
    trainer.train()
    return trainer


class WithoutOurs:
    """Makes what the model takes, and no more."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, features):
        names = ("input_ids", "attention_mask", "labels")
        return self.collator([{name: row[name] for name in names} for row in features])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wrap", [lambda collator: collator, WithoutOurs], ids=["passes all", "passes its own"])
def test_states_are_read_where_the_text_lies(side, wrap, tmp_path):
    tokenizer = tiny.causal_tokenizer()
    tokenizer.padding_side = side
    trainer = injected(tmp_path / "own", wrap(DataCollatorWithPadding(tokenizer)))
    expected = injected(tmp_path / "ours", None)
    torch.testing.assert_close(trainer.centres, expected.centres, atol=1e-5, rtol=1e-5)
    assert trainer.alpha == expected.alpha


class Answers:
    """A causal LM's rows, padded on one side, with the answers as labels."""

    def __init__(self, side):
        self.side = side

    def _padded(self, rows, fill):
        width = max(map(len, rows))
        padding = [[fill] * (width - len(row)) for row in rows]
        pairs = zip(rows, padding, strict=True)
        return torch.tensor([more + row if self.side == "left" else row + more for row, more in pairs])

    def __call__(self, features):
        ids = [row["input_ids"] for row in features]
        return {
            "input_ids": self._padded(ids, 0),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0),
            "labels": self._padded([row["input_ids"][row["prompt_length"] :] for row in features], -100),
        }


def answered(folder, collator):
    args = DefenseConfig(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=1
    )
    trainer = DefenseTrainer(
        tiny.model("llama"), args, data_collator=collator, train_dataset=tiny.instructions(8), processing_class=tiny.causal_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer


def test_a_causal_lm_s_answers_end_at_the_last_column(tmp_path):
    found = tiny.parameters(answered(tmp_path, Answers("left")).model)
    assert tiny.largest_difference(found, tiny.parameters(answered(tmp_path, None).model)) < 1e-5
    with pytest.raises(ValueError, match="^labels are not the last tokens of input_ids: .*; leave data_collator out"):
        answered(tmp_path, Answers("right"))
