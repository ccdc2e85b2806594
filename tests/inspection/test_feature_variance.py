import csv

import pytest
import tiny
import torch
from datasets import Dataset

from hf_backdoor.data import DefenseCollator, ImageClassification
from hf_backdoor.defenses.robustkd import FeatureMask
from hf_backdoor.defenses.robustkd import losses as robustkd
from hf_backdoor.inspection import feature_variance
from hf_backdoor.inspection.feature_variance import MEASURES, variances


NAMES = pytest.mark.parametrize("name", ["sequence_classification", "label_words"])


def measured(name, count=9, **options):
    family, task, rows = tiny.setting(name, count)
    models = {"reference": tiny.model(family, seed=1, dropout=0.5), "suspect": tiny.model(family, seed=2)}
    return feature_variance(models, tiny.tokenizer(family), task, {"clean": rows}, **options), models


@NAMES
def test_rows_are_means_over_samples_read_one_by_one(name):
    rows, models = measured(name, batch_size=4)
    assert len(rows) == 2 * len(MEASURES) * 2
    family, task, texts = tiny.setting(name, 9)
    values = []
    for text in texts:
        ids = torch.tensor([task.encode(text, tiny.tokenizer(family))["input_ids"]])
        with torch.no_grad():
            state = models["suspect"].eval()(ids, output_hidden_states=True).hidden_states[1][0]
        values.append([torch.nn.functional.layer_norm(state, (32,)).var(0, correction=0).mean(), state.var(0, correction=0).mean(), state.var(correction=0)])  # fmt: skip
    values = torch.tensor(values)
    found = [row for row in rows if row.model == "suspect" and row.layer == 0]
    assert [row.measure for row in found] == list(MEASURES)
    for row, column in zip(found, values.T, strict=True):
        assert row.value == pytest.approx(column.mean().item(), rel=1e-4)
        assert row.high - row.value == pytest.approx(1.96 * column.std().item() / 3, rel=1e-3, abs=1e-6)
        assert row.low <= row.value <= row.high and row.n == 9


@NAMES
def test_batches_change_nothing_and_models_keep_their_mode(name):
    rows, models = measured(name, batch_size=4)
    assert models["reference"].training
    for one, other in zip(rows, measured(name, batch_size=1)[0], strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4)


def test_it_is_the_variance_that_a_mask_is_fitted_by():
    feature, valid = torch.randn(3, 6, 4), torch.arange(6) < torch.tensor([[6], [2], [4]])
    for number, measure in enumerate(MEASURES):
        axes, place = measure.split(", ")
        wanted = robustkd.feature_variance(feature, valid, axes, place)
        torch.testing.assert_close(variances(feature, valid)[:, number], wanted)


def test_a_masked_model_is_measured_as_masked():
    family, task, rows = tiny.setting("label_words", 6)
    model, tokenizer = tiny.model(family), tiny.tokenizer(family)
    batch = DefenseCollator(tokenizer)([task.encode(row, tokenizer) for row in rows])
    mask = FeatureMask.for_model(model, batch, [0], threshold=1.0)
    mask.weights[0].data.fill_(1e4)

    def first_layer():
        rows_ = feature_variance({"model": model}, tokenizer, task, {"clean": rows})
        return next(row.value for row in rows_ if (row.layer, row.measure) == (0, "tokens, raw"))

    assert first_layer() > 1e-6
    with mask.applied_to(model):
        assert first_layer() == pytest.approx(0, abs=1e-9)  # a blend of nothing but p


def test_triggered_text_and_files(tmp_path):
    family, task, rows = tiny.setting("sequence_classification", 8)
    triggered = rows.map(lambda row: {"text": row["text"] + " zq zq zq zq"})
    models = {"a $\\frac$ <b>": tiny.model(family), "=cmd()": tiny.model(family, seed=1)}
    texts = {"clean": rows, "triggered": triggered}
    found = feature_variance(models, tiny.tokenizer(family), task, texts, output_dir=tmp_path / "new")
    with open(tmp_path / "new" / "feature_variance.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found) == 2 * 2 * 3 * 2
    assert {row["model"] for row in table} == set(models) and {row["texts"] for row in table} == set(texts)
    assert float(table[0]["value"]) == found[0].value
    assert (tmp_path / "new" / "feature_variance.png").read_bytes().startswith(b"\x89PNG")
    by_text = {
        row.texts: row.value for row in found if (row.layer, row.measure, row.model) == (1, "tokens, raw", "=cmd()")
    }
    assert by_text["clean"] != by_text["triggered"]


def test_nothing_to_measure_is_refused():
    family, task, rows = tiny.setting("label_words", 2)
    with pytest.raises(ValueError, match="^models is empty"):
        feature_variance({}, tiny.tokenizer(family), task, {"clean": rows})
    with pytest.raises(ValueError, match=r"^texts\['triggered'\] has no rows"):
        feature_variance({"a": tiny.model(family)}, tiny.tokenizer(family), task, {"triggered": rows.select([])})
    with pytest.raises(ValueError, match="^task is that of pictures"):
        feature_variance({"a": tiny.model(family)}, tiny.tokenizer(family), ImageClassification(2), {"clean": rows})


@pytest.mark.parametrize("texts", [[1, 2], ["a film", None], [["a"], ["film"]]])
def test_rows_that_are_no_texts_are_refused(texts):
    rows = Dataset.from_dict({"text": texts, "label": [0, 1]})
    with pytest.raises(ValueError, match="^text is .* in row [01], which is no text: pass texts"):
        feature_variance(
            {"suspect": tiny.model("bert")},
            tiny.encoder_tokenizer(),
            tiny.task("sequence_classification"),
            {"clean": rows},
        )
