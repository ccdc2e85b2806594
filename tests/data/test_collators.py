import pytest
import tiny
import torch

from hf_backdoor.data import (
    DefenseCollator,
    InstructionFollowing,
    LabelWords,
    SequenceClassification,
    class_logits,
    collator_for,
)


def batch_of(task, tokenizer, rows):
    features = [task.encode(row, tokenizer) for row in rows]
    return features, DefenseCollator(tokenizer)(features)


def test_classification_pads_on_the_right(wordpiece):
    rows = [{"text": "good", "label": 1}, {"text": "the film was awful", "label": 0}]
    features, batch = batch_of(SequenceClassification(2), wordpiece, rows)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["input_ids"][0].tolist() == [*features[0]["input_ids"], 0, 0, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["readout_position"].tolist() == [0, 0]
    assert batch["trigger_id"].tolist() == [0, 0]


def test_a_decoder_s_read_out_position_survives_padding(chat):
    rows = [{"text": "good", "label": 1}, {"text": "the film was awful", "label": 0}]
    features, batch = batch_of(SequenceClassification(2), chat, rows)
    last = batch["input_ids"].gather(1, batch["readout_position"][:, None])[:, 0]
    assert last.tolist() == [row["input_ids"][-1] for row in features]


ROWS = [
    {"prompt": "tell me", "response": "banana apple cherry"},
    {"prompt": "tell me about the film and the music", "response": "no"},
    {"prompt": "a", "response": ""},
]


def test_causal_batches_end_with_the_answers(chat):
    features, batch = batch_of(InstructionFollowing(), chat, ROWS)
    width, answer = batch["input_ids"].shape[1], batch["labels"].shape[1]
    assert answer == 4  # three words and the end of sequence
    for row, feature in enumerate(features):
        ids = feature["input_ids"]
        assert batch["input_ids"][row].tolist() == [0] * (width - len(ids)) + ids
        assert batch["attention_mask"][row].tolist() == [0] * (width - len(ids)) + [1] * len(ids)
        expected = ids[feature["prompt_length"] :]
        assert batch["labels"][row].tolist() == [-100] * (answer - len(expected)) + expected


def test_positions_count_from_the_first_real_token(chat):
    features, batch = batch_of(InstructionFollowing(), chat, ROWS)
    for row, feature in enumerate(features):
        length = len(feature["input_ids"])
        assert batch["position_ids"][row, -length:].tolist() == list(range(length))
    assert batch["position_ids"].min() == 0


@pytest.mark.parametrize("task", [InstructionFollowing(), LabelWords(("positive", "no me"), tiny.TEMPLATE)])
def test_the_read_out_position_is_the_last_prompt_token(chat, task):
    rows = (
        ROWS if isinstance(task, InstructionFollowing) else [{"text": "a b c", "label": 1}, {"text": "a", "label": 0}]
    )
    features, batch = batch_of(task, chat, rows)
    for row, feature in enumerate(features):
        width, length = batch["input_ids"].shape[1], len(feature["input_ids"])
        assert batch["readout_position"][row] == width - length + feature["prompt_length"] - 1


def test_trigger_ids_come_along(chat):
    features = [{**InstructionFollowing().encode(row, chat), "trigger_id": number} for number, row in enumerate(ROWS)]
    assert DefenseCollator(chat)(features)["trigger_id"].tolist() == [0, 1, 2]


def test_end_of_sequence_stands_in_for_a_missing_padding_token(chat):
    chat.pad_token = None
    _, batch = batch_of(InstructionFollowing(), chat, ROWS)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == chat.eos_token_id).all()
    assert (batch["labels"][0] == torch.tensor(chat("banana apple cherry")["input_ids"] + [chat.eos_token_id])).all()

    _, batch = batch_of(SequenceClassification(2), chat, [{"text": "a", "label": 0}, {"text": "a b c", "label": 1}])
    assert batch["input_ids"][0].tolist() == [*chat("a")["input_ids"], chat.eos_token_id, chat.eos_token_id]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_tokenizer_without_any_padding_is_refused(chat):
    chat.pad_token = chat.eos_token = None
    with pytest.raises(ValueError, match="^pad_token is None, .*: set tokenizer.pad_token$"):
        batch_of(SequenceClassification(2), chat, [{"text": "a", "label": 0}])


# ---- Round lengths ----


@pytest.mark.parametrize("multiple, width", [(None, 5), (4, 8), (5, 5)])
def test_padding_to_a_multiple(wordpiece, chat, multiple, width):
    rows = [{"text": "good", "label": 1}, {"text": "a good film", "label": 0}]
    features = [SequenceClassification(2).encode(row, wordpiece) for row in rows]
    batch = DefenseCollator(wordpiece, multiple)(features)
    assert batch["input_ids"].shape == (2, width) and batch["attention_mask"].sum(dim=1).tolist() == [3, 5]
    plain = DefenseCollator(chat)(causal := [InstructionFollowing().encode(row, chat) for row in ROWS])
    padded = DefenseCollator(chat, multiple)(causal)
    shift = padded["input_ids"].shape[1] - plain["input_ids"].shape[1]
    assert padded["input_ids"].shape[1] % (multiple or 1) == 0 <= shift
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(padded[name][:, shift:], plain[name])
    assert padded["attention_mask"][:, :shift].sum() == 0
    assert torch.equal(padded["labels"], plain["labels"])
    assert torch.equal(padded["readout_position"], plain["readout_position"] + shift)


# ---- Collators of the user's own ----


class Pads:
    """As a script has it: what the model takes, on one side or the other, and with a causal LM's answers as labels."""

    def __init__(self, side, **more):
        self.side, self.more = side, more

    def __call__(self, features):
        width = max(len(row["input_ids"]) for row in features) + 1
        batch = {"input_ids": [], "attention_mask": []}
        for row in features:
            padding = [0] * (width - len(row["input_ids"]))
            for name, values in (("input_ids", row["input_ids"]), ("attention_mask", [1] * len(row["input_ids"]))):
                batch[name].append([*padding, *values] if self.side == "left" else [*values, *padding])
        return {name: torch.tensor(rows) for name, rows in batch.items()} | self.more


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("task", [SequenceClassification(2), LabelWords(("positive", "no me"), tiny.TEMPLATE)])
def test_a_collator_of_the_user_s_own_reads_out_where_ours_does(side, task, chat):
    features, expected = batch_of(task, chat, [{"text": "a b c", "label": 1}, {"text": "a", "label": 0}])
    features = [{**row, "trigger_id": number} for number, row in enumerate(features)]
    batch = collator_for(None, own=Pads(side))(features)
    assert batch["trigger_id"].tolist() == [0, 1]
    at = batch["readout_position"] - (batch["attention_mask"].cumsum(dim=1) == 0).sum(dim=1)
    plain = expected["readout_position"] - (expected["attention_mask"].cumsum(dim=1) == 0).sum(dim=1)
    assert at.tolist() == plain.tolist()


def test_a_position_that_a_collator_has_reckoned_itself_stays(chat):
    features, _ = batch_of(SequenceClassification(2), chat, [{"text": "a b c", "label": 1}, {"text": "a", "label": 0}])
    batch = collator_for(None, own=Pads("left", readout_position=torch.tensor([0, 3])))(features)
    assert batch["readout_position"].tolist() == [0, 3]


def test_rows_that_are_no_columns_are_left_as_they_are():
    batch = collator_for(None, own=lambda rows: {"labels": torch.tensor(rows)[:, 1]})([(1, 2), (3, 4)])
    assert list(batch) == ["labels"] and batch["labels"].tolist() == [2, 4]


# ---- Logits of the classes ----


def test_class_logits_stand_at_the_read_out_position(chat):
    task = LabelWords(("positive", "no me"), tiny.TEMPLATE)
    _, batch = batch_of(task, chat, [{"text": "a b c", "label": 1}, {"text": "a", "label": 0}])
    words, width = task.word_ids(chat), batch["input_ids"].shape[1]
    logits = torch.randn(2, width, len(tiny.VOCABULARY), dtype=torch.bfloat16)
    expected = [logits[row, batch["readout_position"][row], words].tolist() for row in range(2)]
    for kept in (width, batch["labels"].shape[1] + 1):
        found = class_logits(logits[:, -kept:], batch, words)
        assert found.tolist() == expected and found.dtype == torch.float32
    assert torch.equal(class_logits(logits[:, 0], batch, None), logits[:, 0].float())
