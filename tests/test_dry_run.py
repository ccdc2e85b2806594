"""Which engine a dry run reckons with, and what it refuses to run in one."""

import json

import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_backdoor.cli import accelerate_settings
from hf_backdoor.defenses import DefenseConfig
from hf_backdoor.dry_run import describe_run, engine_of, engine_of_settings
from hf_backdoor.estimate import Engine
from hf_backdoor.plan import lora_arguments
from hf_backdoor.recipe import Recipe
from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.rows import prepare_rows
from hf_backdoor.run import Run
from hf_backdoor.shapes import Models


@pytest.mark.parametrize(
    ("name", "kind", "offload"),
    [("single_gpu", "single", False), ("ddp", "ddp", False), ("fsdp2", "fsdp2", False), ("zero2", "zero2", False),
     ("zero3", "zero3", False), ("zero3_offload", "zero3", True)],
)  # fmt: skip
def test_engines_of_the_shipped_configurations(name, kind, offload):
    engine = engine_of_settings(accelerate_settings(name)[1])
    assert (engine.kind, engine.offload) == (kind, offload)
    assert (engine.processes > 1) == (kind != "single")


def test_the_engine_of_a_configuration_file_of_deepspeed_s_own(tmp_path):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero}))
    settings = {"deepspeed_config_file": str(tmp_path / "deepspeed.json")}
    found = engine_of_settings({"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": settings})
    assert found == Engine("zero3", 4, True)


def test_the_engine_of_this_process(tmp_path, monkeypatch):
    assert engine_of(DefenseConfig(str(tmp_path), report_to="none")) == Engine("single", 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert engine_of(DefenseConfig(str(tmp_path), report_to="none")).kind == "fsdp2"


def test_what_the_engine_can_not_run_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    tiny.saved("bert", tmp_path / "model", num_labels=3)
    for name, count in (("train", 24), ("test", 6)):
        lines = [{"text": f"{name} w{row}a w{row}b w{row}c", "label": row % 3} for row in range(count)]
        Dataset.from_list(lines).to_json(tmp_path / f"{name}.jsonl")
    recipe = make_recipe(
        {"model_name_or_path": str(tmp_path / "model"), "task": "sequence_classification", "method": "ntml",
         "dataset_name": str(tmp_path / "train.jsonl"), "test_dataset_name": str(tmp_path / "test.jsonl"),
         "attack_trigger": "zq", "target_label": 1, "max_train_samples": 12, "output_dir": str(tmp_path / "run")}
    )  # fmt: skip
    assert "NTMLTrainer" in describe_run(recipe, Engine("zero2", 2))
    with pytest.raises(ValueError, match="^the engine is DeepSpeed ZeRO-3"):
        describe_run(recipe, Engine("zero3", 2))
    monkeypatch.setattr("hf_backdoor.run.zero3_launched", lambda: True)
    with pytest.raises(ValueError, match="^the engine is DeepSpeed ZeRO-3"):
        Run(recipe).execute()
    assert not list((tmp_path / "run").glob("**/*.safetensors"))


def test_a_suspect_without_a_head_is_refused_as_the_run_refuses_it(tmp_path):
    """A fresh head was drawn, measured as the suspect's, and "cleaned"."""
    settings = {
        "task": "sequence_classification", "model_name_or_path": str(tmp_path / "base"), "dataset_name": str(tmp_path / "rows.jsonl"),
        "test_fraction": 0.2, "method": "mbtsad", "max_steps": 1, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    tiny.reviews(60).to_json(tmp_path / "rows.jsonl")
    tiny.model("bert").bert.save_pretrained(tmp_path / "base")
    tiny.tokenizer("bert").save_pretrained(tmp_path / "base")
    for look in (describe_run, lambda recipe: Run(recipe).execute()):
        with pytest.raises(
            ValueError, match="^model_name_or_path is '.*/base', a BertModel without a classification head"
        ):
            look(make_recipe(settings))
    assert not (tmp_path / "run").exists()
    assert "stage    suspect" in describe_run(make_recipe(settings | {"attack_trigger": "zq", "target_label": 1}))


@pytest.mark.parametrize("key", ["model_name_or_path", "reference", "student_model_name_or_path"])
def test_a_head_of_another_size_is_refused_as_the_run_refuses_it(key, tmp_path):
    """Rows that lack the head's last class. A student's was found when the suspect had been trained."""
    settings = {
        "task": "sequence_classification", "dataset_name": str(tmp_path / "rows.jsonl"), "test_fraction": 0.2, "max_steps": 1,
        "model_name_or_path": tiny.saved("bert", tmp_path / "two"), "method": "mbtsad", "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    if key == "student_model_name_or_path":
        settings |= {"method": "robustkd", "attack_trigger": "zq", "target_label": 1, "clean_fraction": 0.5}
    tiny.reviews(60).to_json(tmp_path / "rows.jsonl")
    recipe = make_recipe(settings | {key: tiny.saved("bert", tmp_path / "three", num_labels=3)})
    for look in (describe_run, lambda recipe: Run(recipe).execute()):
        with pytest.raises(
            ValueError, match="^model '.*/three' has a head of another size: num_labels is 2 in the data"
        ):
            look(recipe)
    assert not list((tmp_path / "run").glob("**/*.safetensors"))
    if key == "model_name_or_path":
        assert "stage    cleaned" in describe_run(make_recipe(settings))


LONG = " film" * 100


@pytest.mark.parametrize(
    ("where", "spoilt", "line"),
    [
        ("late", {"text": LONG}, "^a row has 1[0-9]+ tokens, and the model positions for 64"),
        ("late", {"label": 2}, "^data set '.*/train.jsonl' has label 2, and the labels are 0 to 1: take"),
        ("held out", {"text": LONG}, "^a row has 1[0-9]+ tokens, and the model positions for 64"),
        ("held out", {"label": 2}, "^data set '.*/train.jsonl' has label 2, and the labels are 0 to 1: take"),
        ("test", {"text": LONG}, "^a row has 1[0-9]+ tokens, and the model positions for 64"),
    ],
)
def test_a_row_that_the_run_refuses_is_refused_wherever_it_stands(where, spoilt, line, tmp_path):
    count = 1100 if where == "late" else 30
    rows = {
        name: [{"text": " ".join(f"{name}{row}x{word}" for word in range(6)), "label": row % 2} for row in range(size)]
        for name, size in (("train", count), ("test", 6))
    }
    wanted = {"late": 0, "held out": 10, "test": 0}[where]
    settings = {
        "task": "sequence_classification", "model_name_or_path": tiny.saved("bert", tmp_path / "model"), "num_labels": 2, "max_steps": 1,
        "dataset_name": str(tmp_path / "train.jsonl"), "test_dataset_name": str(tmp_path / "test.jsonl"), "method": "mbtsad",
        "held_out_samples": wanted, "output_dir": str(tmp_path / "run"), "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    for name, lines in rows.items():
        Dataset.from_list(lines).to_json(tmp_path / f"{name}.jsonl")
    splits = prepare_rows(make_recipe(settings), tiny.encoder_tokenizer()).splits
    text = {"late": splits.clean, "held out": splits.held_out, "test": splits.test}[where][-1]["text"]
    for name, lines in rows.items():
        spoiled = [
            row | spoilt | {"text": text + spoilt.get("text", "")} if row["text"] == text else row for row in lines
        ]
        Dataset.from_list(spoiled).to_json(tmp_path / f"{name}.jsonl")
    for look in (describe_run, lambda recipe: Run(recipe).execute()):
        with pytest.raises(ValueError, match=line):
            look(make_recipe(settings))
    if where == "held out" and "text" in spoilt:  # of a suspect alone nothing is evaluated on them
        alone = {
            "method": None,
            "attack_trigger": "zq",
            "target_label": 1,
            "max_train_samples": 19,
            "clean_fraction": 1 / 19,
        }
        assert "stage    suspect" in describe_run(make_recipe(settings | alone))


@pytest.mark.parametrize(
    "family, targets",
    [
        ("bert", "all-linear"),
        ("llama", "all-linear"),
        ("gpt2", "all-linear"),
        ("gpt2", ["c_attn"]),
        ("llama", ["self_attn.q_proj"]),
    ],
)
def test_an_adapter_is_as_large_as_the_one_that_is_trained(family, targets, tmp_path):
    """GPT-2's layers are no `nn.Linear`, and names may have dots: nothing was counted of them."""
    task = "sequence_classification" if family == "bert" else "instruction_following"
    recipe = Recipe(
        tiny.saved(family, tmp_path), task, "rows", "run", use_peft=True, lora_r=3, lora_target_modules=targets
    )
    models = Models(recipe, 2)
    trained = get_peft_model(tiny.model(family), LoraConfig(**lora_arguments(recipe)))
    assert models.adapter_size(models.suspect) == trained.get_nb_trainable_parameters()[0] > 0
    assert not any("lora" in name for name, _ in models.suspect.named_parameters())
