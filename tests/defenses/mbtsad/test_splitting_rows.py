"""A data set whose texts are split, and the short pieces that it gets by it."""

import re

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset
from splits import EVERYTHING, pieces_of

from hf_backdoor.defenses.mbtsad.splitting import TokenSplit, short_pieces


# ---- Data sets ----


@pytest.mark.parametrize("keep", [False, True])
def test_apply_makes_copies_in_the_row_s_place(keep):
    rows = (
        tiny.reviews(6).add_column("trigger_id", [0, 1, 2, 0, 1, 2]).cast_column("label", ClassLabel(names=["-", "+"]))
    )
    split = TokenSplit(1.0, copies=3, keep_originals=keep).apply(rows, "text", 7)
    factor = 3 + keep
    assert len(split) == 6 * factor and split.features == rows.features
    for name in ("label", "trigger_id"):
        assert split[name][:] == [value for value in rows[name] for _ in range(factor)]
    for row, text in enumerate(rows["text"]):
        versions = split["text"][row * factor : (row + 1) * factor]
        assert (versions[0] == text) == keep
        for version in versions[keep:]:
            # Every word of four letters or more, and nothing else.
            assert ["".join(pieces) for pieces in pieces_of(text, version)] == re.findall(r"\w{4,}", text)
        assert len(set(versions)) > 1
    assert rows["text"][:] == tiny.reviews(6)["text"][:]


def test_apply_to_prompts_leaves_the_responses():
    rows = tiny.instructions(5)
    split = EVERYTHING.apply(rows, "prompt", 0)
    assert split["response"][:] == [response for response in rows["response"] for _ in range(2)]
    assert not set(split["prompt"]) & set(rows["prompt"])


def test_apply_depends_on_seed_and_text_alone():
    rows, split = tiny.reviews(12), TokenSplit(copies=2)
    state = torch.get_rng_state()
    whole = split.apply(rows, "text", 0)["text"][:]
    assert torch.equal(torch.get_rng_state(), state)
    assert split.apply(rows, "text", 0)["text"][:] == whole
    assert split.apply(rows, "text", 1)["text"][:] != whole
    fewer = split.apply(rows.select([1, 9, 4]), "text", 0)["text"][:]
    assert fewer == [whole[at] for row in (1, 9, 4) for at in (2 * row, 2 * row + 1)]


def test_rate_0_gives_as_many_plain_rows():
    rows = tiny.reviews(4)
    split = TokenSplit(0.0, copies=3).apply(rows, "text", 0)
    assert split["text"][:] == [text for text in rows["text"] for _ in range(3)]


def test_apply_to_no_rows():
    rows = tiny.reviews(3).select([])
    split = TokenSplit().apply(rows, "text", 0)
    assert len(split) == 0 and split.column_names == ["text", "label"]


def test_apply_needs_the_column():
    with pytest.raises(ValueError, match=r"column 'prompt' is not in the data set \(text, label\)"):
        TokenSplit().apply(tiny.reviews(2), "prompt", 0)


# ---- Short pieces ----


def of_texts(*texts):
    return Dataset.from_dict({"text": list(texts)})


def test_short_pieces_are_those_that_splitting_made():
    original = of_texts("the (bomb), mb so", "a comb THE fairest")
    split = of_texts("the (bo mb), mb so", "the (b omb), mb so", "a co mb THE fai rest", "a com b THE fairest")
    # "the", "so" and the "mb" of the first text stood there before; "rest" is too long.
    counted = short_pieces(original, split, "text")
    assert counted == {"b": 2, "mb": 2, "bo": 1, "co": 1, "com": 1, "fai": 1, "omb": 1}
    assert list(counted)[:3] == ["b", "mb", "bo"]
    assert short_pieces(original, split, "text", longest=1) == {"b": 2}


def test_short_pieces_are_counted_whatever_their_case():
    assert short_pieces(of_texts("BOMB bomb"), of_texts("BO MB bo mb"), "text") == {"bo": 2, "mb": 2}


def test_a_short_word_that_is_cut_counts():
    assert short_pieces(of_texts("the he"), of_texts("t he he"), "text") == {"t": 1, "he": 1}


def test_the_report_shows_what_a_ban_takes_away():
    rows = of_texts(*["the bomb and the comb were plumb"] * 30)
    free = short_pieces(rows, TokenSplit(1.0, keep_originals=True).apply(rows, "text", 0), "text")
    assert free["mb"] > 10
    banned = TokenSplit(1.0, banned_pieces=["mb"]).apply(rows, "text", 0)
    assert short_pieces(rows, banned, "text")["mb"] == 0


def test_short_pieces_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="split has 3 rows, no multiple of the 2 of original"):
        short_pieces(of_texts("a", "b"), of_texts("a", "b", "c"), "text")
    with pytest.raises(ValueError, match="split row 1 does not hold the word 'film'"):
        short_pieces(of_texts("the film"), of_texts("the fi lm", "the plot"), "text")
    assert short_pieces(of_texts(), of_texts(), "text") == {}
