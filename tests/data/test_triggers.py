import itertools
import random

import pytest
from datasets import Dataset

from hf_backdoor.data import Trigger, row_rng, stamp


TEXT = "the film was  very good"


def test_start_and_end_keep_the_text():
    assert Trigger("zq", "start").insert(TEXT, random.Random(0)) == "zq " + TEXT
    assert Trigger("zq", "end").insert(TEXT, random.Random(0)) == TEXT + " zq"


def test_random_reaches_every_gap_and_loses_nothing():
    words = "a b c".split()
    found = {Trigger("x y").insert("a b c", random.Random(seed)) for seed in range(50)}
    assert found == {" ".join([*words[:slot], "x y", *words[slot:]]) for slot in range(4)}


def test_any_is_often_at_an_end():
    text = " ".join(["a"] * 50)
    slots = [Trigger("zq", "any").insert(text, random.Random(seed)).split().index("zq") for seed in range(300)]
    assert 70 < slots.count(0) < 150 and 70 < slots.count(50) < 150
    assert len(set(slots)) > 20


def test_scattered_words_reach_every_arrangement_and_nothing_else():
    """All ways to put x and y among a b, in any order, and no text in which a and b change places."""
    found = {Trigger("x y", "scattered").insert("a b", random.Random(seed)) for seed in range(300)}
    arrangements = {" ".join(words) for words in itertools.permutations(("a", "b", "x", "y"))}
    assert found == {text for text in arrangements if text.index("a") < text.index("b")}


def test_scattered_keeps_the_text_s_own_spaces():
    words = Trigger("x y", "scattered").insert(TEXT, random.Random(1)).split(" ")
    assert [word for word in words if word not in ("x", "y")] == TEXT.split(" ")


def test_half_of_a_combination_of_two_is_one_of_its_words():
    trigger = Trigger("cf bb", "scattered")
    halves = [trigger.half(random.Random(seed)) for seed in range(20)]
    assert {half.text for half in halves} == {"cf", "bb"}
    assert {half.position for half in halves} == {"scattered"}


def test_scattered_words_of_an_empty_text():
    assert sorted(Trigger("x y", "scattered").insert("", random.Random(0)).split(" ")) == ["x", "y"]


@pytest.mark.parametrize("position", ["start", "end", "random", "any", "scattered"])
def test_an_empty_text_becomes_the_trigger(position):
    assert Trigger("zq", position).insert("", random.Random(0)) == "zq"


def test_half_is_the_first_or_the_second_half():
    trigger = Trigger("one two three four five", "start")
    halves = {trigger.half(random.Random(seed)).text for seed in range(20)}
    assert halves == {"one two", "three four five"}
    assert trigger.half(random.Random(0)).position == "start"


def test_one_word_has_no_half():
    assert Trigger("zq").half(random.Random(0)) is None


def test_name_defaults_to_the_text():
    assert Trigger("zq").name == "zq"
    assert Trigger("zq", name="short").name == "short"


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_blank_text_is_refused(text):
    with pytest.raises(ValueError, match="trigger text is .*at least one visible character"):
        Trigger(text)


def test_unknown_position_is_refused():
    with pytest.raises(ValueError, match="^trigger position is 'middle': use .*start.*end.*random"):
        Trigger("zq", "middle")


def test_row_rng_depends_on_seed_purpose_and_row():
    draws = [row_rng(*key).random() for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len(set(draws)) == 4
    assert row_rng(0, "a", 0).random() == draws[0]


def test_stamp_changes_the_text_column_only():
    rows = Dataset.from_dict({"text": ["a b c"] * 20, "label": list(range(20)), "note": ["n"] * 20})
    stamped = stamp(rows, "text", Trigger("zq"), seed=3)
    assert stamped["label"] == rows["label"] and stamped["note"] == rows["note"]
    assert all(sorted(text.split()) == ["a", "b", "c", "zq"] for text in stamped["text"])
    assert len(set(stamped["text"])) > 1


def test_stamp_is_decided_by_the_seed():
    rows = Dataset.from_dict({"text": ["a b c d e f"] * 20})
    first, again, other = (stamp(rows, "text", Trigger("zq"), seed)["text"][:] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_row_s_stamp_does_not_depend_on_the_rows_after_it():
    rows = Dataset.from_dict({"text": ["a b c d e f"] * 20})
    assert (
        stamp(rows.select(range(5)), "text", Trigger("zq"), 1)["text"][:]
        == stamp(rows, "text", Trigger("zq"), 1)["text"][:5]
    )
