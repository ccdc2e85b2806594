"""The last training: which rows get another label, and what is learnt of them."""

from dataclasses import replace

import engines
import pytest
import tiny
import topics
import torch
from datasets import IterableDataset

from hf_backdoor.defenses import DefenseTrainer
from hf_backdoor.defenses.ntml.correction import LEFT_OUT, corrected_labels
from hf_backdoor.defenses.ntml.likeness import look_alikes
from hf_backdoor.defenses.ntml.states import SplitClass, split_class


# Of a network of two layers: its embeddings, a third, two thirds and all of its layers.
DEPTHS = (0, 1, 1, 2)


@torch.no_grad()
def said_alone(name, model, rows):
    """Given label, class probabilities, last state and looks of each row, one row at a time."""
    task, said = topics.TASKS[name], []
    for row in rows:
        if name == "images":
            given, batch = row["labels"], {"pixel_values": torch.tensor([row["pixel_values"]])}
        elif name == "label_words":
            given, batch = (
                row["label"],
                {"input_ids": torch.tensor([task.prompt_ids(row["text"], tiny.tokenizer("llama"))])},
            )
        else:
            given, batch = row["label"], dict(tiny.tokenizer("bert")(row["text"], return_tensors="pt"))
        outputs = model.eval()(**batch, output_hidden_states=True)
        last = outputs.hidden_states[-1][0]
        seen = torch.cat([outputs.hidden_states[layer][0].mean(dim=0) for layer in DEPTHS])
        if name == "label_words":
            logits, state = outputs.logits[0, -1, task.word_ids(tiny.tokenizer("llama"))], last[-1]
        else:
            logits, state = outputs.logits[0], last.mean(dim=0) if name == "images" else last[0]
        said.append((given, logits.softmax(dim=0), state, seen))
    given, *found = zip(*said, strict=True)
    return torch.tensor(given), *map(torch.stack, found)


def halfway(row, number):
    """A text of the class that does not stand apart, and looks more like those that do than like others."""
    return {"text": "was i say yes good"} if number == 4 and "text" in row else row


@pytest.mark.parametrize(
    ("teacher", "alike"),
    [(True, False), (False, False), (False, True)],
    ids=["by a teacher's word", "by states alone", "by states and looks"],
)
@pytest.mark.parametrize("name", topics.FORMATS)
def test_it_trains_as_plain_training_does_on_the_corrected_rows(name, teacher, alike, tmp_path):
    rows, clean = topics.planted(name, 64).map(halfway, with_indices=True), topics.clean_rows(name)
    given, _, states, _ = said_alone(name, topics.network(name, topics.POISONED), rows)
    clean_labels, _, clean_states, _ = said_alone(name, topics.network(name, topics.POISONED), clean)
    split = split_class(states, given, torch.ones(64), clean_states, clean_labels)
    assert split.label == 0 and split.apart.nonzero()[:, 0].tolist() == list(range(0, 64, 8))
    if alike:
        seen, clean_seen = (said_alone(name, topics.network(name, 0), each)[3] for each in (rows, clean))
        split = replace(split, apart=split.apart | look_alikes(split, given, seen, clean_seen))
        assert split.apart[4].item() == (name != "images")
    if teacher:
        _, probabilities, *_ = said_alone(name, topics.sharpen(topics.network(name, 7)), rows)
        labels = corrected_labels(given, probabilities, 0.2, split)
    else:
        labels = given.masked_fill(split.apart, LEFT_OUT)
    assert 8 <= (labels != given).sum() <= 16
    column = "labels" if name == "images" else "label"
    corrected = rows.remove_columns(column).add_column(column, labels.tolist())
    options = {"look_alikes": alike} | ({} if teacher else {"teacher_model": None})
    trainer = topics.trainer(name, "relabel", tmp_path, max_steps=3, relabel_below=0.2, train_dataset=rows, **options)
    trainer.train()
    plain = DefenseTrainer(
        model=topics.network(name, 0), args=trainer.args, processing_class=trainer.processing_class, task=trainer.task,
        train_dataset=corrected.select((labels != LEFT_OUT).nonzero()[:, 0].tolist()),
        data_collator=topics.collate_pixels if name == "images" else None,
    )  # fmt: skip
    plain.train()
    assert tiny.largest_difference(tiny.parameters(trainer.model), tiny.parameters(plain.model)) == 0
    listed = trainer.findings(None)["relabelled"]
    changed = (labels != given).nonzero()[:, 0].tolist()
    assert listed["row"][:] == changed and listed["given_label"][:] == given[changed].tolist()
    assert listed["left_out"][:] == [labels[row].item() == LEFT_OUT for row in changed]
    assert listed["apart"][:] == split.apart[changed].tolist()


# Fresh networks too tell planted pictures by their pixels.
@pytest.mark.parametrize("name", [name for name in topics.FORMATS if name != "images"])
def test_the_network_in_which_a_class_falls_apart_more_tells(name, tmp_path):
    """The attacker's rows are every eighth, and the network that has learnt them may be either of the two."""
    rows, found = topics.planted(name, 64), []
    for poisoned, teacher in ((topics.POISONED, 7), (7, topics.POISONED), (7, 7)):
        networks = {"poisoned_model": topics.network(name, poisoned), "teacher_model": topics.network(name, teacher)}
        trainer = topics.trainer(name, "relabel", tmp_path, max_steps=1, train_dataset=rows, **networks)
        trainer.train()
        found.append(trainer.split)
    assert found[0].label == 0 and found[0].apart.nonzero()[:, 0].tolist() == list(range(0, 64, 8))
    assert torch.equal(found[1].apart, found[0].apart) and found[1].separation == pytest.approx(found[0].separation)
    assert found[2] is None or found[2].separation < found[0].separation


@pytest.mark.parametrize("missing", ["poisoned_model", "clean_dataset"])
def test_what_tells_rows_apart_must_be_there(missing, tmp_path):
    with pytest.raises(ValueError, match=f"^{missing} is None: pass .* to tell by which of them lie"):
        topics.trainer("label_words", "relabel", tmp_path, **{missing: None})


def test_clean_rows_are_no_stream(tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(topics.texts(8)))
    with pytest.raises(ValueError, match="^clean_dataset is a stream, and RelabellingTrainer needs all of its rows"):
        topics.trainer("label_words", "relabel", tmp_path, clean_dataset=rows)


@pytest.mark.parametrize("name", topics.FORMATS)
@pytest.mark.parametrize("falls_apart", [True, False], ids=["a class falls apart", "none does"])
def test_what_was_found_once_is_taken_over(name, falls_apart, tmp_path):
    """It changes the same rows, and no network but the teacher goes over them again."""
    # A network that does not agree with the rows apart as with others.
    teacher = topics.sharpen(topics.network(name, {"label_words": 8, "images": 13}.get(name, 7)))
    options = {"max_steps": 2, "relabel_below": 0.2, "teacher_model": teacher}
    options |= {"train_dataset": topics.planted(name, 64)} if falls_apart else {}
    first = topics.trainer(name, "relabel", tmp_path, look_alikes=True, **options)
    first.train()
    assert (first.split is not None) == falls_apart
    folder = tmp_path / "found"
    folder.mkdir()
    for table, listed in first.findings(None).items():
        listed.to_parquet(folder / f"{table}.parquet")
    for found in (str(folder), first.split) if falls_apart else (str(folder),):
        again = topics.trainer(name, "relabel", tmp_path, found_split=found, **options)
        again.train()
        assert again.changes.to_dict() == first.changes.to_dict() and again.poisoned_model is None
        assert list(again.findings(None)) == ["relabelled"]
        assert tiny.largest_difference(tiny.parameters(again.model), tiny.parameters(first.model)) == 0


@pytest.mark.parametrize("name", ["label_words", "images"])
def test_labels_that_an_earlier_training_finds_right_stay(name, tmp_path):
    """Rows apart are left out then, though the teacher contradicts them and others of their class."""
    rows, teacher = topics.planted(name, 64), topics.sharpen(topics.network(name, 7))
    options = {"max_steps": 1, "relabel_below": 0.2, "train_dataset": rows, "teacher_model": teacher}
    first = topics.trainer(name, "relabel", tmp_path, **options)
    first.train()
    again = topics.trainer(name, "relabel", tmp_path, found_split=first.split, **options)
    again.train()
    apart = first.split.apart.nonzero()[:, 0].tolist()
    assert again.changes["row"][:] == apart and all(again.changes["left_out"][:])
    assert again.changes["likeliest_label"][:] != again.changes["given_label"][:]
    assert set(apart) < set(first.changes["row"][:]) and not all(first.changes["left_out"][:])


def test_what_was_found_is_of_the_same_rows_and_there(tmp_path):
    first = topics.trainer("sequence_classification", "relabel", tmp_path, max_steps=1)
    first.train()
    first.findings(None)["rows_apart"].to_parquet(tmp_path / "rows_apart.parquet")

    def again(folder, **options):
        return topics.trainer("sequence_classification", "relabel", tmp_path, found_split=folder, **options)

    for found in (tmp_path, SplitClass(0, torch.zeros(16, dtype=torch.bool), 5.0, (0, 4))):
        with pytest.raises(
            ValueError, match="^found_split is of 16 rows, and train_dataset has 8: pass what was found in"
        ):
            again(found, train_dataset=topics.texts(8)).train()
    with pytest.raises(
        ValueError, match=f"^found_split is '{tmp_path}/none', where no rows_apart.parquet is: pass the"
    ):
        again(tmp_path / "none").train()
    for name in ("poisoned_model", "clean_dataset"):
        with pytest.raises(ValueError, match=f"^{name} is given, and found_split, which tells by itself"):
            again(
                tmp_path, **{name: topics.texts(8) if name == "clean_dataset" else tiny.model("bert", 3, num_labels=4)}
            )


def test_looks_need_a_whole_model(tmp_path):
    def work():
        with pytest.raises(
            ValueError, match="^look_alikes is True, and DeepSpeed ZeRO-3 leaves no process the whole"
        ) as caught:
            topics.trainer("label_words", "relabel", tmp_path, look_alikes=True, **engines.arguments("zero3"))
        return str(caught.value)

    assert "\n" not in engines.in_engine("zero3", work, tmp_path)


def test_answers_that_are_tokens_are_refused(tmp_path):
    rows = topics.TASKS["label_words"].encode_rows(topics.texts(8), tiny.tokenizer("llama"))
    with pytest.raises(ValueError, match="^train_dataset has input_ids: pass raw rows"):
        topics.trainer("label_words", "relabel", tmp_path, train_dataset=rows)


def test_where_no_class_falls_apart_the_teacher_alone_says_what_changes(tmp_path, caplog):
    trainer = topics.trainer("sequence_classification", "relabel", tmp_path, max_steps=1, relabel_below=0.2)
    trainer.train()
    assert trainer.split is None and trainer.changes.num_rows > 0 and not any(trainer.changes["apart"])
    assert "labels change by the teacher's word alone" in caplog.text
