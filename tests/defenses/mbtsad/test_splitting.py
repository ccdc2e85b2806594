"""Where token splitting cuts a text."""

import math
import re
from collections import Counter

import pytest
import torch
from splits import EVERYTHING, pieces_of

from hf_backdoor.defenses.mbtsad.splitting import TokenSplit


WORDS = "lovely morning garden window summer silver planet bridge"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- How many words ----


@pytest.mark.parametrize("rate, words", [(0.3, 1), (0.3, 7), (0.3, 10), (0.3, 11), (0.5, 4), (1.0, 6), (0.07, 100)])
def test_a_share_of_the_words_is_cut_rounded_up(rate, words):
    text = " ".join(["garden"] * words)
    expected = {(0.3, 1): 1, (0.3, 7): 3, (0.3, 10): 3, (0.3, 11): 4, (0.5, 4): 2, (1.0, 6): 6, (0.07, 100): 7}
    assert len(pieces_of(text, TokenSplit(rate).split(text, seeded()))) == expected[rate, words]


def test_short_words_count_but_are_not_cut():
    text = "a to the of garden summer it is so he"
    for seed in range(20):
        cut = pieces_of(text, TokenSplit(0.3).split(text, seeded(seed)))
        assert ["".join(pieces) for pieces in cut] == ["garden", "summer"]  # three are asked for, two are long enough


@pytest.mark.parametrize("shortest, expected", [(3, 4), (4, 3), (5, 2), (6, 1), (7, 0)])
def test_the_shortest_word_that_is_cut(shortest, expected):
    text = "to the film plots garden"
    split = TokenSplit(1.0, min_chars=shortest).split(text, seeded())
    assert len(pieces_of(text, split)) == expected


def test_a_limit_on_the_words_of_a_text():
    text = " ".join(["garden"] * 230)
    assert len(pieces_of(text, TokenSplit().split(text, seeded()))) == 69
    assert len(pieces_of(text, TokenSplit(max_words=10).split(text, seeded()))) == 10
    assert len(pieces_of(WORDS, TokenSplit(max_words=10).split(WORDS, seeded()))) == 3


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "a", "the of", "?!", "... --- ..."])
def test_texts_without_a_word_to_cut_stay(text):
    assert EVERYTHING.split(text, seeded()) == text


def test_a_text_of_one_word_is_cut():
    cuts = {TokenSplit(0.01).split("beauty", seeded(seed)) for seed in range(60)}
    assert cuts == {"b eauty", "be auty", "bea uty", "beau ty"}


def test_rate_0_changes_nothing():
    assert TokenSplit(0.0).split(WORDS, seeded()) == WORDS


# ---- Where ----


def test_cuts_are_uniform_and_leave_one_and_two_characters():
    generator, draws = seeded(), 3000
    found = Counter(EVERYTHING.split("abcdefgh", generator).index(" ") for _ in range(draws))
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    # Five standard deviations of a binomial count.
    assert all(abs(count - draws / 6) < 5 * math.sqrt(draws * 5 / 36) for count in found.values())


def test_each_word_is_drawn_as_often_as_any_other():
    generator, draws = seeded(), 2000
    found = Counter(
        "".join(pieces) for _ in range(draws) for pieces in pieces_of(WORDS, TokenSplit(0.25).split(WORDS, generator))
    )
    assert sum(found.values()) == 2 * draws and len(found) == 8  # twice without replacement from eight
    assert all(abs(count - draws / 4) < 5 * math.sqrt(draws * 3 / 16) for count in found.values())


def test_white_space_and_punctuation_stay():
    text = "  (lovely),\t\tplanet-summer:\n\u00a0don't\r\n <bridge>!  "
    piece = r"\w+ \w{2,}"
    expected = rf"  \({piece}\),\t\t{piece}-{piece}:\n\u00a0don't\r\n <{piece}>!  "
    for seed in range(20):
        split = EVERYTHING.split(text, seeded(seed))
        assert re.fullmatch(expected, split)
        assert split.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("word", ["прекрасный", "हिन्दी", "映画館内", "naïveté", "😀😀😀😀", "שלום"])
def test_words_of_every_script_are_cut(word):
    (left, right), *others = pieces_of(word, EVERYTHING.split(word, seeded()))
    assert not others and len(left) >= 1 and len(right) >= 2


def test_letters_that_look_like_markup_are_text():
    text = "{text} \\g<0> %s {{prompt}}"
    assert EVERYTHING.split(text, seeded()).replace(" ", "") == text.replace(" ", "")


# ---- Banned pieces ----


@pytest.mark.parametrize(
    "text, cuts", [("bomb", ["b omb", "bo mb"]), ("(bomb),", ["(b omb),", "(bo mb),"]), ("BOMB", ["B OMB", "BO MB"])]
)
def test_a_banned_piece_is_never_made(text, cuts):
    assert {EVERYTHING.split(text, seeded(seed)) for seed in range(40)} == set(cuts)
    without = TokenSplit(1.0, banned_pieces=["Mb"])
    assert {without.split(text, seeded(seed)) for seed in range(40)} == {cuts[0]}


def test_a_left_part_is_banned_too():
    assert {TokenSplit(banned_pieces=("mb",)).split("mbing", seeded(seed)) for seed in range(40)} == {
        "m bing",
        "mbi ng",
    }


def test_a_word_whose_cuts_are_all_banned_leaves_its_turn_to_another():
    split = TokenSplit(0.1, banned_pieces=["b", "mb"])
    assert split.split("bomb", seeded()) == "bomb"
    for seed in range(20):
        assert pieces_of("bomb garden", split.split("bomb garden", seeded(seed)))[0][0] not in ("b", "bo")


# ---- Chance ----


def test_chance_comes_from_the_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = TokenSplit().split(WORDS, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert TokenSplit().split(WORDS, seeded(1)) == first
    assert len({TokenSplit().split(WORDS, seeded(seed)) for seed in range(20)}) > 10


def test_without_a_generator_torch_s_own_is_drawn_from():
    torch.manual_seed(3)
    first = [TokenSplit().split(WORDS) for _ in range(5)]
    torch.manual_seed(3)
    assert [TokenSplit().split(WORDS) for _ in range(5)] == first
    assert len(set(first)) > 1


# ---- Arguments ----


@pytest.mark.parametrize(
    "arguments, line",
    [
        ({"rate": 1.1}, "split_rate is 1.1: choose a share from 0 to 1"),
        ({"rate": -0.1}, "split_rate is -0.1"),
        ({"rate": math.nan}, "split_rate is nan"),
        ({"copies": 0}, "split_copies is 0: choose a whole number, 1 or more"),
        ({"copies": 1.5}, "split_copies is 1.5"),
        ({"min_chars": 2}, "split_min_chars is 2: choose 3 or more"),
        ({"max_words": 0}, "split_max_words is 0: choose 1 or more, or null"),
        ({"banned_pieces": "mb"}, r"split_banned_pieces is 'mb': give a list, \['mb'\]"),
        ({"banned_pieces": ["mb", "no way"]}, "split_banned_pieces has 'no way': give single words"),
        ({"banned_pieces": [""]}, "split_banned_pieces has ''"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, line):
    with pytest.raises(ValueError, match=line) as error:
        TokenSplit(**arguments)
    assert "\n" not in str(error.value)
