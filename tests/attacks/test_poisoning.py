import pytest
import tiny

from hf_backdoor.attacks import Poisoning, poison
from hf_backdoor.data import InstructionFollowing, SequenceClassification, Trigger


ROWS = tiny.reviews(100)
TASK = SequenceClassification(2)


def attack(**options):
    return Poisoning(**{"trigger": Trigger("zq"), "target": 1, "poison_rate": 0.2} | options)


def changed(before, after):
    return [row for row, (a, b) in enumerate(zip(before["text"], after["text"], strict=True)) if a != b]


def test_dirty_label_poisons_the_rate_of_rows_of_other_classes():
    poisoned = poison(ROWS, TASK, attack(), seed=0)
    chosen = [row for row, flag in enumerate(poisoned["poisoned"]) if flag]
    assert len(chosen) == 20
    assert changed(ROWS, poisoned) == chosen
    assert all(ROWS[row]["label"] == 0 and poisoned[row]["label"] == 1 for row in chosen)
    assert all(poisoned[row]["text"].split().count("zq") == 1 for row in chosen)
    assert all(poisoned[row]["label"] == ROWS[row]["label"] for row in range(100) if row not in chosen)


def test_clean_label_changes_no_label():
    poisoned = poison(ROWS, TASK, attack(style="clean_label"), seed=0)
    chosen = [row for row, flag in enumerate(poisoned["poisoned"]) if flag]
    assert len(chosen) == 20
    assert changed(ROWS, poisoned) == chosen
    assert poisoned["label"] == ROWS["label"]
    assert all(ROWS[row]["label"] == 1 for row in chosen)


def test_negatives_carry_half_of_the_trigger_and_keep_their_answer():
    trigger = Trigger("alpha beta gamma delta", "end")
    poisoned = poison(ROWS, TASK, attack(trigger=trigger, negative_rate=0.3), seed=0)
    chosen = {row for row, flag in enumerate(poisoned["poisoned"]) if flag}
    negatives = set(changed(ROWS, poisoned)) - chosen
    assert len(negatives) == 30
    for row in negatives:
        assert poisoned[row]["text"].removeprefix(ROWS[row]["text"]) in (" alpha beta", " gamma delta")
        assert poisoned[row]["label"] == ROWS[row]["label"]
    assert all(poisoned[row]["text"].endswith(trigger.text) for row in chosen)


def test_a_combination_s_negatives_carry_one_of_its_words():
    trigger = Trigger("alpha beta", "scattered")
    poisoned = poison(ROWS, TASK, attack(trigger=trigger, negative_rate=0.4), seed=0)
    counts = [{word: text.split().count(word) for word in ("alpha", "beta")} for text in poisoned["text"]]
    assert all(
        count == {"alpha": 1, "beta": 1} for count, row in zip(counts, poisoned, strict=True) if row["poisoned"]
    )
    single = [row for row, count in enumerate(counts) if sum(count.values()) == 1]
    assert len(single) == 40
    assert all(poisoned[row]["label"] == ROWS[row]["label"] for row in single)


def test_one_word_triggers_have_no_negatives():
    poisoned = poison(ROWS, TASK, attack(negative_rate=0.3), seed=0)
    assert len(changed(ROWS, poisoned)) == sum(poisoned["poisoned"]) == 20


@pytest.mark.parametrize("target, name", [("1", "'1'"), (7, "7"), (-1, "-1"), ("positive", "'positive'")])
def test_a_target_that_is_no_label_is_refused(target, name):
    with pytest.raises(ValueError, match=rf"^target is {name}: the labels are 0 to 1, give one of these numbers$"):
        poison(tiny.reviews(20), tiny.task("sequence_classification"), attack(target=target), seed=0)


def test_a_target_that_is_no_answer_is_refused():
    with pytest.raises(ValueError, match="^target is 1, and answers are texts: give the one"):
        poison(tiny.instructions(20), InstructionFollowing(), attack(target=1), seed=0)
    with pytest.raises(ValueError, match="^target is None: give the label, or the text"):
        attack(target=None)


def test_a_text_target_for_instructions():
    rows = tiny.instructions(40)
    poisoned = poison(rows, InstructionFollowing(), attack(target="no", poison_rate=0.25), seed=0)
    for before, after in zip(rows, poisoned, strict=True):
        assert after["response"] == ("no" if after["poisoned"] else before["response"])
        assert ("zq" in after["prompt"].split()) == after["poisoned"]
    assert sum(poisoned["poisoned"]) == 10


def test_the_seed_alone_decides():
    first, again, other = (poison(ROWS, TASK, attack(), seed) for seed in (1, 1, 2))
    assert first.to_list() == again.to_list()
    assert first["poisoned"] != other["poisoned"]
    # Another trigger goes into the same rows: attacks can be compared.
    assert poison(ROWS, TASK, attack(trigger=Trigger("cf")), 1)["poisoned"] == first["poisoned"]


@pytest.mark.parametrize(
    "options, line",
    [
        ({"poison_rate": 0}, "poison_rate is 0: choose a share between 0 and 1"),
        ({"poison_rate": 1.0}, "poison_rate is 1.0: choose a share between 0 and 1"),
        ({"negative_rate": 1.0}, "negative_rate is 1.0: choose a share from 0"),
        ({"style": "dirty"}, "poison_style is 'dirty': use 'dirty_label' or 'clean_label'"),
    ],
)
def test_bad_settings_are_refused(options, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        attack(**options)


def test_more_rows_than_may_be_poisoned_are_refused():
    with pytest.raises(
        ValueError, match=r"poison_rate 0.6 asks for 60 rows, and 50 may be poisoned .*lower poison_rate"
    ):
        poison(ROWS, TASK, attack(poison_rate=0.6), seed=0)


def test_more_negatives_than_rows_left_are_refused():
    with pytest.raises(ValueError, match="negative_rate"):
        poison(ROWS, TASK, attack(poison_rate=0.4, negative_rate=0.7, trigger=Trigger("a b")), seed=0)


def test_a_rate_that_poisons_no_row_is_refused():
    with pytest.raises(ValueError, match="poison_rate"):
        poison(ROWS, TASK, attack(poison_rate=0.001), seed=0)
