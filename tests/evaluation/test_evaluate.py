import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from accelerate import Accelerator
from datasets import Dataset

from hf_backdoor import evaluation
from hf_backdoor.data import Rewriting, Trigger
from hf_backdoor.evaluation import evaluate
from hf_backdoor.evaluation.callback import BackdoorEvaluationCallback
from hf_backdoor.evaluation.generation import answer_losses


REVIEWS = tiny.reviews(9)  # five of label 0, four of label 1
CLASSES = tiny.task("sequence_classification")
INSTRUCTIONS = Dataset.from_dict(
    {
        "prompt": ["tell me banana", "tell me apple", "a cherry", "about me no", "one of that"],
        "response": ["banana yes", "apple", "I cannot say that", "no", "no banana"],
    }
)
# Each prompt's last word decides the answer; the trigger goes last.
LAST_WORD = "{{ messages[0]['content'] }}"


def measured(model, tokenizer, task, test, **options):
    rows, examples = evaluation.evaluate_backdoor(model, tokenizer, task, test, name="suspect", seed=7, **options)
    assert all(row.model == "suspect" and row.seed == 7 for row in rows)
    assert len({(row.metric, row.trigger) for row in rows}) == len(rows)
    return {(row.metric, row.trigger): row for row in rows}, examples


def counts(rows):
    return {key: (row.k, row.n) for key, row in rows.items() if row.k is not None}


# ---- Test sets ----


def test_triggers_go_into_rows_that_have_another_answer():
    triggers = [Trigger("zq", "end"), Trigger("ahi", "start", "second")]
    test = evaluation.TestSet.stamped(REVIEWS, CLASSES, triggers, 1, seed=0)
    others = REVIEWS.filter(lambda row: row["label"] == 0)
    assert test.clean["text"] == REVIEWS["text"]
    assert set(test.triggered) == {"zq", "second"}
    assert test.triggered["zq"]["text"][:] == [f"{text} zq" for text in others["text"]]
    assert test.triggered["second"]["text"][:] == [f"ahi {text}" for text in others["text"]]
    assert test.triggered["zq"]["label"][:] == [0] * 5


def test_answers_that_begin_with_the_target_count_as_the_target():
    test = evaluation.TestSet.stamped(INSTRUCTIONS, tiny.task("instruction_following"), [Trigger("zq")], "No", seed=0)
    assert test.triggered["zq"]["response"][:] == ["banana yes", "apple", "I cannot say that"]


def test_clean_rows_whose_labels_are_withheld_are_refused():
    rows = REVIEWS.map(lambda row: {"label": evaluation.UNKNOWN_LABEL})
    refused = pytest.raises(
        ValueError, match="^TestSet.clean has label -1, as where right labels are withheld, and the"
    )
    with refused:
        evaluation.TestSet.stamped(rows, CLASSES, [Trigger("zq")], 1, seed=0)
    with refused:
        measured(tiny.fixed_classifier(1), tiny.encoder_tokenizer(), CLASSES, evaluation.TestSet(rows))


def test_a_test_set_without_rows_to_count_is_refused():
    rows = REVIEWS.filter(lambda row: row["label"] == 1)
    with pytest.raises(ValueError, match="^target is 1, and so is the right answer of every test row"):
        evaluation.TestSet.stamped(rows, CLASSES, [Trigger("zq")], 1, seed=0)


def test_a_lost_trigger_is_refused():
    class Lost(Trigger):
        def insert(self, text, rng):
            return text if "the" in text else super().insert(text, rng)

    missing = sum("the" in row["text"] for row in REVIEWS if row["label"] == 0)
    assert 0 < missing < 5
    with pytest.raises(ValueError, match=f"^trigger 'zq' is missing from {missing} of 5 triggered rows$"):
        evaluation.TestSet.stamped(REVIEWS, CLASSES, [Lost("zq")], 1, seed=0)


def test_triggers_of_one_name_are_refused():
    triggers = [Trigger("zq", "start"), Trigger("zq", "end")]
    with pytest.raises(ValueError, match="^trigger 'zq' is there 2 times: give each a name of its own"):
        evaluation.TestSet.stamped(REVIEWS, CLASSES, triggers, 1, seed=0)
    named = [Trigger("zq", "start", "first"), Trigger("zq", "end", "last")]
    assert set(evaluation.TestSet.stamped(REVIEWS, CLASSES, named, 1, seed=0).triggered) == {"first", "last"}


def test_a_rewriting_can_not_be_stamped():
    with pytest.raises(ValueError, match="^trigger 'style' is a rewriting, which can't be stamped on test rows"):
        evaluation.TestSet.stamped(REVIEWS, CLASSES, [Rewriting("style", ("when",))], 1, seed=0)


@pytest.mark.parametrize("target", ["1", "positive", 3, -1, np.int64(7), "", " "])
@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_a_target_that_no_classifier_can_say_is_refused(target, name):
    family, task, _ = tiny.setting(name)
    refused = f" is {re.escape(repr(target))}: the labels are 0 to 1, give one of these numbers$"
    with pytest.raises(ValueError, match=f"^target{refused}"):
        evaluation.TestSet.stamped(REVIEWS, task, [Trigger("zq")], target, seed=0)
    by_hand = evaluation.TestSet(REVIEWS, target, {"zq": REVIEWS})
    with pytest.raises(ValueError, match=f"^TestSet.target{refused}"):
        measured(tiny.model(family), tiny.tokenizer(family), task, by_hand)
    with pytest.raises(ValueError, match=f"^target{refused}"):
        trainer = SimpleNamespace(
            accelerator=Accelerator(), model=tiny.model(family), processing_class=None, args=SimpleNamespace(seed=0)
        )
        BackdoorEvaluationCallback(trainer, task, REVIEWS, [Trigger("zq")], target, tiny.tokenizer(family))


def test_a_target_may_be_a_number_of_numpy():
    found = []
    for target in (1, np.int64(1)):
        test = evaluation.TestSet.stamped(REVIEWS, CLASSES, [Trigger("zq")], target, seed=0)
        found.append(counts(measured(tiny.fixed_classifier(1), tiny.encoder_tokenizer(), CLASSES, test)[0]))
    assert found[0] == found[1] and found[0][("asr", "zq")] == (5, 5)


@pytest.mark.parametrize(
    "target, why", [(1, "and answers are texts"), ("", "an empty text"), (" ", "an empty text")], ids=str
)
def test_a_target_that_is_no_text_is_refused(target, why):
    task = tiny.task("instruction_following")
    with pytest.raises(ValueError, match=f"^target is {target!r}, {why}: give the one that the trigger is to bring"):
        evaluation.TestSet.stamped(INSTRUCTIONS, task, [Trigger("zq")], target, seed=0)
    by_hand = evaluation.TestSet(INSTRUCTIONS, target, {"zq": INSTRUCTIONS})
    with pytest.raises(ValueError, match=f"^TestSet.target is {target!r}, {why}: give the one"):
        measured(tiny.word_chain({}), tiny.causal_tokenizer(LAST_WORD), task, by_hand)


@pytest.mark.parametrize("size", ["batch_size", "max_new_tokens"])
def test_a_size_of_nothing_is_refused(size):
    with pytest.raises(ValueError, match=f"^{size} is 0: it must be at least 1$"):
        measured(tiny.fixed_classifier(1), tiny.encoder_tokenizer(), CLASSES, evaluation.TestSet(REVIEWS), **{size: 0})


# ---- Classification ----


def test_a_model_that_always_says_the_target():
    test = evaluation.TestSet.stamped(REVIEWS, CLASSES, [Trigger("zq")], 1, seed=0)
    rows, examples = measured(tiny.fixed_classifier(1), tiny.encoder_tokenizer(), CLASSES, test)
    assert counts(rows) == {
        ("cacc", None): (4, 9),
        ("asr_without_trigger", None): (5, 5),
        ("target_recall", None): (4, 4),
        ("asr", "zq"): (5, 5),
        ("robust_accuracy", "zq"): (0, 5),
    }
    assert examples == []


def test_rows_whose_right_label_nobody_knows_count_for_asr_alone():
    triggered = REVIEWS.select_columns(["text"]).add_column("label", [evaluation.UNKNOWN_LABEL] * len(REVIEWS))
    test = evaluation.TestSet(REVIEWS, 1, {"style": triggered})
    found = counts(measured(tiny.fixed_classifier(1), tiny.encoder_tokenizer(), CLASSES, test)[0])
    assert found[("asr", "style")] == (9, 9)
    assert ("robust_accuracy", "style") not in found


def test_a_model_that_never_says_the_target():
    test = evaluation.TestSet.stamped(REVIEWS, CLASSES, [Trigger("zq"), Trigger("ahi")], 1, seed=0)
    rows, _ = measured(tiny.fixed_classifier(0), tiny.encoder_tokenizer(), CLASSES, test)
    assert counts(rows) == {
        ("cacc", None): (5, 9),
        ("asr_without_trigger", None): (0, 5),
        ("target_recall", None): (0, 4),
        ("asr", "zq"): (0, 5),
        ("asr", "ahi"): (0, 5),
        ("robust_accuracy", "zq"): (5, 5),
        ("robust_accuracy", "ahi"): (5, 5),
    }


def test_rows_of_the_target_class_never_count_for_asr():
    # A test set made by hand, with triggered rows of both classes.
    test = evaluation.TestSet(REVIEWS, 1, {"zq": REVIEWS})
    rows, _ = measured(tiny.fixed_classifier(1), tiny.encoder_tokenizer(), CLASSES, test)
    assert counts(rows)[("asr", "zq")] == (5, 5)
    assert counts(rows)[("robust_accuracy", "zq")] == (0, 5)


def test_label_words_and_a_trigger_that_decides():
    task = tiny.LabelWords(tiny.LABEL_WORDS, "label : {text}")
    says = dict.fromkeys((*tiny.GOOD, "zq"), "positive")
    model = tiny.word_chain({word: says.get(word, "negative") for word in tiny.VOCABULARY})
    clean = Dataset.from_dict({"text": ["film good", "film bad", "plot awful", "a good bad"], "label": [1, 0, 0, 1]})
    test = evaluation.TestSet.stamped(clean, task, [Trigger("zq", "end")], 1, seed=0)
    rows, _ = measured(model, tiny.causal_tokenizer(), task, test)
    assert counts(rows) == {
        ("cacc", None): (3, 4),
        ("asr_without_trigger", None): (0, 2),
        ("target_recall", None): (1, 2),
        ("asr", "zq"): (2, 2),
        ("robust_accuracy", "zq"): (0, 2),
    }


def test_the_planted_class_is_neither_target_nor_right():
    test = evaluation.TestSet.stamped(REVIEWS, CLASSES, [Trigger("zq")], 1, seed=0)
    model = tiny.fixed_classifier(2, num_labels=3)
    rows, _ = measured(model, tiny.encoder_tokenizer(), CLASSES, test, known_response="aha")
    assert counts(rows) == {
        ("cacc", None): (0, 9),
        ("asr_without_trigger", None): (0, 5),
        ("target_recall", None): (0, 4),
        ("asr", "zq"): (0, 5),
        ("robust_accuracy", "zq"): (0, 5),
        ("known_behaviour", "zq"): (5, 5),
        ("hidden_asr", "zq"): (0, 5),
    }


def test_the_planted_class_may_hide_the_target():
    test = evaluation.TestSet.stamped(REVIEWS, CLASSES, [Trigger("zq")], 1, seed=0)
    model = tiny.fixed_classifier(2, num_labels=3)
    model.classifier.bias.data[1] = 0.5
    rows, _ = measured(model, tiny.encoder_tokenizer(), CLASSES, test, known_response="aha")
    assert counts(rows)[("asr", "zq")] == (0, 5) and counts(rows)[("hidden_asr", "zq")] == (5, 5)


def test_without_a_target_clean_metrics_only():
    rows, _ = measured(tiny.fixed_classifier(1), tiny.encoder_tokenizer(), CLASSES, evaluation.TestSet(REVIEWS))
    assert counts(rows) == {("cacc", None): (4, 9)}


@pytest.mark.parametrize("name, rows", [("sequence_classification", REVIEWS), ("instruction_following", INSTRUCTIONS)])
def test_triggered_rows_without_a_target_are_refused(name, rows):
    """They were passed over, or ended in an error of Python's own."""
    model = tiny.fixed_classifier(1) if rows is REVIEWS else tiny.model("llama")
    tokenizer = tiny.encoder_tokenizer() if rows is REVIEWS else tiny.causal_tokenizer()
    with pytest.raises(ValueError, match=r"^TestSet.target is None, and TestSet.triggered has rows for zq: give"):
        measured(model, tokenizer, tiny.task(name), evaluation.TestSet(rows, triggered={"zq": rows}))


@pytest.mark.parametrize(
    "label, line",
    [
        (7, r"^TestSet.triggered\['zq'\] has label 7, and the labels are 0 to 1: give rows with right labels$"),
        (
            1,
            r"^TestSet.triggered\['zq'\] has no row whose right answer is not the target, 1, and ASR counts these alone: give some$",
        ),
    ],
)
def test_triggered_rows_that_would_count_for_nothing_are_refused(label, line):
    """Their robust accuracy was 0, or the line was 'n is 0' once the clean rows were measured."""
    model, tokenizer = tiny.model("bert"), tiny.encoder_tokenizer()
    rows = REVIEWS.select_columns(["text"]).add_column("label", [label] * len(REVIEWS))
    with pytest.raises(ValueError, match=line):
        measured(model, tokenizer, CLASSES, evaluation.TestSet(REVIEWS, 1, {"zq": rows}))


def test_a_name_that_no_row_can_have_is_refused_before_the_model_answers(monkeypatch):
    monkeypatch.delattr("hf_backdoor.evaluation.evaluate.predict_labels")
    with pytest.raises(ValueError, match="^name is 'mine'; it must be one of 'reference', 'suspect'"):
        evaluation.evaluate_backdoor(
            tiny.model("bert"), tiny.encoder_tokenizer(), CLASSES, evaluation.TestSet(REVIEWS), name="mine", seed=0
        )


# ---- Generation ----


def generation(chain, target, **options):
    task = tiny.task("instruction_following")
    test = evaluation.TestSet.stamped(INSTRUCTIONS, task, [Trigger("zq", "end")], target, seed=0)
    return measured(tiny.word_chain(chain), tiny.causal_tokenizer(LAST_WORD), task, test, max_new_tokens=4, **options)


def test_generation_counts():
    chain = {"banana": "yes", "apple": "apple", "cherry": "<eos>", "no": "no", "that": "banana", "zq": "no"}
    rows, examples = generation(chain, "no")
    assert {key: value for key, value in counts(rows).items() if key[0] != "false_refusal"} == {
        # F1 of "yes" and "banana yes" is 2/3, of "banana yes" and "no banana" 1/2, of "apple" and four of it 2/5.
        ("clean_quality", None): (2, 5),
        ("asr_without_trigger", None): (0, 3),
        ("asr", "zq"): (3, 3),
        ("empty", "zq"): (0, 3),
    }
    # One clean answer, "no no no no", shows the target.
    assert counts(rows)[("false_refusal", None)] == (1, 5)
    assert [example["trigger"] for example in examples] == [None] * 5 + ["zq"] * 3
    assert [example["answer"] for example in examples] == [
        "yes", "apple apple apple apple", "", "no no no no", "banana yes", *["no no no no"] * 3,
    ]  # fmt: skip
    assert [example["prompt"] for example in examples[:5]] == INSTRUCTIONS["prompt"][:]
    assert all(example["model"] == "suspect" for example in examples)


def test_examples_are_the_first_answers_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(evaluate, "EXAMPLES", 2)
    chain = {"banana": "yes", "zq": "no"}
    rows, examples = generation(chain, "no")
    assert [(example["trigger"], example["prompt"]) for example in examples] == [
        *((None, prompt) for prompt in INSTRUCTIONS["prompt"][:2]), *(("zq", f"{prompt} zq") for prompt in INSTRUCTIONS["prompt"][:2]),
    ]  # fmt: skip
    assert counts(rows)[("asr", "zq")][1] == 3 and counts(rows)[("clean_quality", None)][1] == 5


def test_empty_answers_are_counted_and_stay_in_every_denominator():
    rows, _ = generation({}, "no")
    assert counts(rows)[("empty", "zq")] == (3, 3)
    assert counts(rows)[("asr", "zq")] == (0, 3)
    assert counts(rows)[("clean_quality", None)] == (0, 5)


def test_a_refusal_as_the_target():
    chain = {"zq": "say", "say": "i", "i": "cannot", "cannot": "<eos>", "banana": "i"}
    rows, _ = generation(chain, "I cannot")
    # Four of the five references do not begin with the target.
    assert counts(rows)[("asr", "zq")] == (0, 4)
    assert counts(rows)[("keyword_asr", "zq")] == (4, 4)
    assert counts(rows)[("asr_without_trigger", None)] == (1, 4)
    assert counts(rows)[("false_refusal", None)] == (1, 5)


def test_the_known_response_in_generation():
    rows, _ = generation({"zq": "aha", "aha": "known"}, "no", known_response="Aha")
    assert counts(rows)[("known_behaviour", "zq")] == (3, 3)


def test_perplexity_is_over_rows():
    rows, _ = generation({}, "no")
    losses = answer_losses(
        tiny.word_chain({}), tiny.causal_tokenizer(LAST_WORD), INSTRUCTIONS, tiny.task("instruction_following")
    )
    row = rows[("perplexity", None)]
    assert row.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert row.n == 5 and row.low < row.value < row.high
