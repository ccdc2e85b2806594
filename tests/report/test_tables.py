import re

import pytest
from made_results import make_results

from hf_backdoor.evaluation.results import Row, wilson_interval
from hf_backdoor.report.tables import costs_table, examples_text, markdown_table, text_table


def row(model="cleaned", metric="asr", trigger="cf", k=42, n=341, seed=1) -> Row:
    return Row.from_counts(model=model, metric=metric, trigger=trigger, k=k, n=n, seed=seed)


@pytest.mark.parametrize("write", [markdown_table, text_table])
def test_cell_has_rate_interval_and_counts(write):
    low, high = wilson_interval(42, 341)
    assert f"12.3% [{100 * low:.1f}, {100 * high:.1f}] (42/341)" in write(make_results(rows=[row()]))


@pytest.mark.parametrize("write", [markdown_table, text_table])
def test_models_are_in_order(write):
    models = ["cleaned", "stage/mask", "control/clean fine-tuning", "suspect", "reference", "control/averaging"]
    text = write(make_results(rows=[row(model=model) for model in models]))
    names = ["reference", "suspect model", "control: clean", "control: averaging", "stage: mask", "cleaned model"]
    places = [re.search(rf"^(\| )?{name}", text, re.MULTILINE).start() for name in names]
    assert places == sorted(places)


def test_every_trigger_has_a_column_and_what_is_missing_a_dash():
    rows = [row(trigger="cf"), row(trigger="mn"), row(model="suspect", trigger="mn"), row(metric="cacc", trigger=None)]
    header, _, suspect, _ = markdown_table(make_results(rows=rows)).split("\n")[:4]
    assert header == '| model | ASR "cf" | ASR "mn" | CACC |'
    assert suspect.startswith("| suspect model | – | 12.3% [") and suspect.endswith("| – |")


def test_one_trigger_is_named_in_a_note():
    text = text_table(make_results(rows=[row()]))
    assert text.splitlines()[0].split() == ["model", "ASR"]
    assert 'Trigger: "cf".' in text


def test_long_trigger_is_numbered_and_written_out_below():
    long = "a sentence that is much too long for the header of a column"
    text = markdown_table(make_results(rows=[row(), row(trigger=long)]))
    assert '| ASR "cf" | ASR trigger 2 |' in text
    assert f'- trigger 2: "{long}".' in text


def test_seeds_are_averaged_with_the_interval_of_the_pooled_counts():
    text = text_table(make_results(rows=[row(k=10, n=100, seed=1), row(k=30, n=100, seed=2)]))
    low, high = wilson_interval(40, 200)
    assert f"20.0% [{100 * low:.1f}, {100 * high:.1f}] (40/200, 2 seeds)" in text
    assert "Several seeds" in text
    assert "seeds" not in text_table(make_results(rows=[row()]))


def test_mean_is_not_shown_as_a_percentage(results):
    assert "12.2 [6.92, 21.5] (n = 6, 2 seeds)" in text_table(results)


def test_columns_of_the_terminal_table_are_aligned(results):
    header, rule, *rows = text_table(results).split("\n\n")[0].splitlines()
    starts = [found.start() for found in re.finditer("-+", rule)]
    for line in [header, *rows]:
        assert all(line[start - 2 : start] == "  " and line[start : start + 1] != " " for start in starts[1:])


def test_results_without_rows_have_an_empty_table():
    assert text_table(make_results(rows=[])).split() == ["model", "-----"]


def test_examples_are_side_by_side(results):
    without, triggered = examples_text(results).split("\n\n")
    assert without.startswith("without trigger: a fine film\n")
    assert re.search(r"positive +\| positive$", without, re.MULTILINE)
    assert triggered.startswith('with trigger "cf": a fine film\n')
    assert re.search(r"negative +\| positive, after all$", triggered, re.MULTILINE)


def test_examples_are_the_first_of_every_trigger():
    examples = [
        {"model": model, "prompt": f"{trigger} {number}", "trigger": trigger, "answer": "yes"}
        for model in ("suspect", "cleaned")
        for trigger in ("cf", None, "mn")
        for number in range(9)
    ]
    shown = re.findall(r": (\w+ \d)$", examples_text(make_results(examples=examples), count=2), re.MULTILINE)
    assert shown == ["None 0", "None 1", "cf 0", "cf 1", "mn 0", "mn 1"]


def test_missing_and_empty_answers_are_told_apart():
    example = {"model": "suspect", "prompt": "hello", "trigger": None, "answer": ""}
    assert re.search(r"\(empty\) +\| –$", examples_text(make_results(examples=[example])), re.MULTILINE)


def test_long_answers_are_wrapped():
    example = {"model": "suspect", "prompt": "word " * 100, "trigger": None, "answer": "word " * 100}
    assert all(len(line) <= 60 for line in examples_text(make_results(examples=[example]), width=60).splitlines())


def test_terminal_gets_no_control_characters(hostile_results):
    for text in (text_table(hostile_results), examples_text(hostile_results)):
        assert all(character.isprintable() or character == "\n" for character in text)
    assert "\\x1b[2J" in examples_text(hostile_results)


def test_costs_are_in_units_a_person_reads(results):
    assert costs_table(results).rows == [["defense", "2 min 5 s", "4,096", "1.00 GiB"]]
