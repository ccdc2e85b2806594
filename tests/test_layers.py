"""Layers and students that are not there are refused before anything is trained."""

import json

import pytest
import tiny
from transformers import BertConfig, BertForSequenceClassification

from hf_backdoor import run as run_module
from hf_backdoor.plan import plan
from hf_backdoor.recipe_file import make_recipe


ROBUSTKD = {"method": "robustkd", "student_layers": 1}
MBTSAD = {"method": "mbtsad"}
NTML = {"method": "ntml", "attack_trigger": "zq", "target_label": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A suspect of two layers, and students: with its words and more, and with other words."""
    folder = tmp_path_factory.mktemp("models")
    config = BertConfig(
        vocab_size=len(tiny.VOCABULARY), hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1
    )
    longer, other = tiny.encoder_tokenizer(), tiny.encoder_tokenizer()
    longer.add_tokens(["novel"])
    words = json.loads(other.backend_tokenizer.to_str())
    vocabulary = words["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    other = type(other)(tokenizer_object=other.backend_tokenizer.from_str(json.dumps(words)), pad_token="[PAD]")
    tiny.saved("bert", folder / "suspect")
    for name, tokenizer in (("longer", longer), ("other", other)):
        BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def recipe(models, **changes):
    for key in ("student_model_name_or_path",):
        changes |= {key: str(models / changes[key])} if key in changes else {}
    return make_recipe(
        {
            "model_name_or_path": str(models / "suspect"), "task": "sequence_classification", "dataset_name": "nowhere",
            "output_dir": str(models / "run"), **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"method": "robustkd", "student_layers": 0}, "student_layers is 0, and the suspect has 2 layers: choose 1 to 2"),
        ({"method": "robustkd", "student_layers": 3}, "student_layers is 3, and the suspect has 2 layers"),
        ({"method": "robustkd", "student_layers": [0, 2]}, r"student_layers is \[0, 2\], and the suspect has 2"),
        ({"method": "robustkd", "student_layers": [0, 1, 1]}, r"student_layers is \[0, 1, 1\], and .*, each once"),
        ({**ROBUSTKD, "mask_layers": ["2"]}, r"mask_layers is \['2'\]: the suspect has layers 0 to 1"),
        ({**ROBUSTKD, "stages": {"mask": {"mask_layers": ["-3"]}}}, r"mask_layers is \['-3'\]: the suspect has"),
        ({**ROBUSTKD, "teacher_feature_layers": ["0", "5"]}, "teacher_feature_layers is"),
        ({**ROBUSTKD, "student_feature_layers": ["1"]}, r"student_feature_layers is \['1'\]: the student has layers 0 to 0"),
        ({**MBTSAD, "attention_layers": [2]}, r"attention_layers is \[2\]: the suspect has layers 0 to 1"),
        ({**MBTSAD, "hidden_layers": [-3]}, r"hidden_layers is \[-3\]: the suspect has"),
        ({**NTML, "feature_layers": [3]}, r"feature_layers is \[3\]: the model gives hidden states 0 to 2 \(or -3 to -1\)"),
        ({**MBTSAD, "use_peft": True, "lora_target_modules": ["query", "q_prj"]}, "lora_target_modules has 'q_prj': the model has query, key, value"),
        ({**NTML, "reference": "/nowhere/clean"}, "model '/nowhere/clean' can't be loaded .*: give a folder"),
    ],
)  # fmt: skip
def test_layers_that_are_not_there(changes, line, models):
    with pytest.raises(ValueError, match=f"^{line}"):
        plan(recipe(models, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {**ROBUSTKD, "mask_layers": ["-2", "1", "bert.encoder.layer.0"], "student_feature_layers": ["0", "-1"]},
        {"method": "robustkd", "student_layers": [1]},
        {"method": "robustkd", "student_model_name_or_path": "longer", "student_feature_layers": ["2"]},
        {**MBTSAD, "attention_layers": [-2, 1]},
        {**NTML, "feature_layers": [-3, 2]},
        {**MBTSAD, "use_peft": True, "lora_target_modules": ["query", "attention.output.dense"]},
    ],
)
def test_layers_that_are_there(changes, models):
    assert plan(recipe(models, **changes))


def test_a_student_that_reads_other_tokens(models):
    with pytest.raises(
        ValueError, match="^student_model_name_or_path is .*other', whose tokenizer has 2 of the suspect's"
    ):
        plan(recipe(models, method="robustkd", student_model_name_or_path="other"))


def test_a_student_that_cannot_read_soft_triggers(models):
    with pytest.raises(
        ValueError, match="^soft_triggers is set, and they are embeddings of 32 numbers, .* have 8: set"
    ):
        plan(recipe(models, method="robustkd", student_model_name_or_path="longer", soft_triggers=3))
    assert plan(recipe(models, method="robustkd", student_layers=1, soft_triggers=3))


def test_a_run_is_refused_before_it_trains(models, tmp_path, monkeypatch):
    rows = tiny.reviews(60).map(
        lambda row, n: {"text": f"{row['text']} {' '.join(f'w{n}x{k}' for k in range(9))}"}, with_indices=True
    )
    rows.to_json(tmp_path / "rows.jsonl")
    monkeypatch.setattr(run_module.Run, "_train", lambda *_: pytest.fail("a stage was trained"))
    values = {
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "test_fraction": 0.2,
        "attack_trigger": "zq",
        "target_label": 1,
    }
    with pytest.raises(ValueError, match="^student_layers is 3"):
        run_module.Run(recipe(models, **values, method="robustkd", student_layers=3)).execute()
