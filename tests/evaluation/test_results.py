import json
import math
import os
from pathlib import Path

import pytest

from hf_backdoor.evaluation.results import Results, Row, wilson_interval


DOCS = Path(__file__).parents[2] / "docs"


def some_results() -> Results:
    rows = [
        Row.from_counts(model="cleaned", metric="asr", trigger="cf", k=42, n=341, seed=1),
        Row.from_counts(model="control/clean fine-tuning", metric="cacc", k=9, n=9, seed=1),
        Row.from_values(model="suspect", metric="perplexity", values=[1.0, 2.0], seed=1, transform=math.exp),
        Row.from_values(model="suspect", metric="clean_quality", values=[0.5], seed=1),
    ]
    return Results(
        rows=rows,
        costs=[{"stage": "defense", "seconds": 1.5, "tokens": None, "peak_memory": 10}],
        recipe={"method": "ntml", "nested": {"seeds": [1, 2], "rate": 0.1, "none": None}},
        versions={"torch": "2.13.0"},
        data={"clean": {"source": "clean.jsonl", "rows": 3, "sha256": "a" * 64}},
        examples=[{"model": "suspect", "prompt": "你好 \x1b[0m", "trigger": None, "answer": "\ud800"}],
    )


def test_wilson_interval_by_its_formula():
    k, n, z = 42, 341, 1.959963984540054
    centre = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z / (1 + z**2 / n) * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    assert wilson_interval(k, n) == pytest.approx((centre - margin, centre + margin))


@pytest.mark.parametrize("k, n, low, high", [(0, 0, 0, 1), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1)])
def test_wilson_interval_at_the_ends(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=1e-4)


def test_wider_confidence_is_a_wider_interval():
    assert wilson_interval(3, 10, confidence=0.99)[0] < wilson_interval(3, 10)[0]


def test_row_from_counts():
    row = Row.from_counts(model="cleaned", metric="asr", trigger="cf", k=42, n=341, seed=1)
    assert (row.k, row.n, row.value) == (42, 341, 42 / 341)
    assert (row.low, row.high) == wilson_interval(42, 341)


def test_perplexity_is_the_exponential_of_the_mean():
    row = Row.from_values(model="suspect", metric="perplexity", values=[1.0, 2.0, 3.0], seed=1, transform=math.exp)
    margin = 1.959963984540054 / math.sqrt(3)
    assert row.k is None
    assert (row.low, row.value, row.high) == pytest.approx((math.exp(2 - margin), math.exp(2), math.exp(2 + margin)))


def test_one_value_has_no_interval():
    row = Row.from_values(model="suspect", metric="perplexity", values=[2.0], seed=1)
    assert (row.value, row.low, row.high) == (2.0, None, None)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Row.from_counts(model="cleaned", metric="asr", k=0, n=0, seed=1), "n is 0"),
        (lambda: Row.from_counts(model="cleaned", metric="asr", k=5, n=4, seed=1), "k is 5"),
        (lambda: Row.from_counts(model="cleaned", metric="asr", k=-1, n=4, seed=1), "k is -1"),
        (lambda: Row.from_counts(model="after", metric="asr", k=1, n=4, seed=1), "model is 'after'"),
        (lambda: Row.from_counts(model="control/", metric="asr", k=1, n=4, seed=1), "model is 'control/'"),
        (lambda: Row.from_counts(model="stage/a\nb", metric="asr", k=1, n=4, seed=1), "model is"),
        (lambda: Row.from_values(model="cleaned", metric="ppl", values=[], seed=1), "values is"),
        (lambda: Row.from_values(model="cleaned", metric="ppl", values=[math.nan, 1], seed=1), "values is nan"),
        (
            lambda: Row.from_values(model="cleaned", metric="ppl", values=[9e9], seed=1, transform=math.exp),
            "overflows",
        ),
        (lambda: Row("cleaned", "asr", None, 1, 4, 0.5, 0.0, 1.0, 1), "value is 0.5"),
        (lambda: Row("cleaned", "asr", None, 1, 4, 0.25, 0.3, 1.0, 1), "value is 0.25"),
        (lambda: Row("cleaned", "asr", None, 1, 4, 0.25, None, 1.0, 1), "high is 1.0"),
    ],
)
def test_wrong_row_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    results = some_results()
    results.save(tmp_path / "new" / "results.json")
    assert Results.load(tmp_path / "new" / "results.json") == results
    assert "你好" in (tmp_path / "new" / "results.json").read_text(encoding="utf-8")


def test_same_results_make_the_same_bytes(tmp_path):
    some_results().save(tmp_path / "a.json")
    Results.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("recipe", [{"rate": math.nan}, {"path": Path("/x")}])
def test_failed_save_leaves_the_file_as_it_was(tmp_path, recipe):
    path = tmp_path / "results.json"
    some_results().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="results: "):
        Results(recipe=recipe).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


def test_interrupted_replacement_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    some_results().save(path)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Results().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


# A change to a valid document, and the words that the one line about it has to contain.
DAMAGES = [
    (lambda d: d.pop("costs"), "'costs' is missing"),
    (lambda d: d.update(notes=1), "'notes' is unknown"),
    (lambda d: d.update(schema_version=2), "schema_version is 2"),
    (lambda d: d.update(schema_version=True), "schema_version is True"),
    (lambda d: d.update(rows={}), "rows is {}"),
    (lambda d: d["rows"].append(3), "rows[4]"),
    (lambda d: d["rows"][0].pop("k"), "'k' is missing"),
    (lambda d: d["rows"][0].update(model="poisoned"), "model is 'poisoned'"),
    (lambda d: d["rows"][0].update(metric=""), "metric is ''"),
    (lambda d: d["rows"][0].update(trigger=3), "trigger is 3"),
    (lambda d: d["rows"][0].update(k=42.0), "k is 42.0"),
    (lambda d: d["rows"][0].update(n=0), "n is 0"),
    (lambda d: d["rows"][0].update(n=10**30), "n is 1000"),
    (lambda d: d["rows"][0].update(value="12%"), "value is '12%'"),
    (lambda d: d["rows"][0].update(seed=None), "seed is None"),
    (lambda d: d.update(recipe=[]), "recipe is []"),
    (lambda d: d["costs"][0].update(seconds=-1), "seconds is -1"),
    (lambda d: d["costs"][0].update(tokens=1.5), "tokens is 1.5"),
    (lambda d: d["versions"].update(torch=2.13), "torch is 2.13"),
    (lambda d: d["data"]["clean"].update(sha256="abc"), "sha256 is 'abc'"),
    (lambda d: d["data"]["clean"].pop("rows"), "'rows' is missing"),
    (lambda d: d["examples"][0].update(answer=None), "answer is None"),
    (lambda d: d["examples"][0].update(model="?"), "model is '?'"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_damaged_document_is_refused_in_one_line(tmp_path, damage, message):
    document = some_results().to_dict()
    damage(document)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        Results.load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [dict(k=43), dict(low=0.2), dict(high=0.1)],
    ids=["count and rate disagree", "rate below its interval", "rate above its interval"],
)
def test_numbers_that_contradict_each_other_are_refused(change):
    document = some_results().to_dict()
    document["rows"][0].update(change)
    with pytest.raises(ValueError, match="value is"):
        Results.from_dict(document)


def test_two_values_for_one_cell_are_refused(tmp_path):
    row = Row.from_counts(model="cleaned", metric="asr", k=1, n=4, seed=1)
    with pytest.raises(ValueError, match="unique"):
        Results(rows=[row, row]).save(tmp_path / "results.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a":' + b"9" * 9000 + b"}"])
def test_what_is_not_a_results_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Results.load(path)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        Results.load(tmp_path / "results.json")


def test_schema_names_the_fields_that_are_written():
    schema, document = json.loads((DOCS / "results.schema.json").read_text()), some_results().to_dict()
    assert list(schema["properties"]) == list(document) == schema["required"]
    for name, part in [
        ("row", document["rows"][0]),
        ("cost", document["costs"][0]),
        ("data", document["data"]["clean"]),
        ("example", document["examples"][0]),
    ]:
        assert list(schema["$defs"][name]["properties"]) == list(part) == schema["$defs"][name]["required"]


def test_saved_results_conform_to_the_schema(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads((DOCS / "results.schema.json").read_text()))
    validator.check_schema(validator.schema)
    some_results().save(tmp_path / "results.json")
    validator.validate(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_schema_refuses_what_load_refuses(damage, message):
    jsonschema = pytest.importorskip("jsonschema")
    document = some_results().to_dict()
    damage(document)
    validator = jsonschema.Draft202012Validator(json.loads((DOCS / "results.schema.json").read_text()))
    # JSON Schema takes 42.0 for an integer; the reader asks for one that is written as such.
    assert validator.is_valid(document) == (message == "k is 42.0")
