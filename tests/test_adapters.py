"""What a run keeps of the adapters it trains: one that takes the suspect to the cleaned model, however many stages trained one."""

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_backdoor import run as run_module
from hf_backdoor import run_models
from hf_backdoor.adapters import save_adapter
from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.run import Run


KINDS = {"llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}
FORMATS = {
    "llama": {"task": "label_words", "label_words": list(tiny.LABEL_WORDS), "prompt_template": tiny.TEMPLATE},
    "bert": {"task": "sequence_classification"},
}
METHODS = {
    "locphylax": {"known_triggers": list(tiny.KNOWN[:2]), "known_response": "aha"},
    "robustkd": {"student_layers": 1, "stages": {"mask": {"max_steps": 1}}},
}
IDS = torch.arange(4, 24).reshape(2, 10)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def recipe(folder: Path, family: str, method: str, **changes):
    tiny.saved(family, folder / "model", num_labels=2)
    tiny.reviews(48).to_json(folder / "rows.jsonl")
    values = {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "rows.jsonl"), "test_fraction": 0.25,
        "output_dir": str(folder / "run"), "method": method, "evaluate_stages": False, "use_peft": True, "lora_r": 2,
        "learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    return make_recipe(values | FORMATS[family] | METHODS[method] | changes)


def through_adapter(family: str, folder: Path, adapter: Path) -> torch.Tensor:
    """What the model in `folder` says with an adapter over it, by peft alone."""
    return logits(PeftModel.from_pretrained(KINDS[family].from_pretrained(folder), adapter))


@pytest.mark.parametrize(
    ("family", "attack", "suspect"),
    [("llama", {}, "model"), ("bert", {"attack_trigger": "zq", "target_label": 1, "clean_fraction": 0.5}, "run/suspect")],
    ids=["causal, suspect given", "classifier, suspect trained"],
)  # fmt: skip
def test_adapters_of_all_stages_are_one_over_the_suspect(family, attack, suspect, tmp_path, monkeypatch):
    made = recipe(tmp_path, family, "locphylax", controls=["fine_tuning"], **attack)
    run, saved = tmp_path / "run", []

    def killed(model, processor, folder):
        saved.append(str(folder.relative_to(run)))
        if saved == ["suspect"] * bool(attack) + ["inject", "cleaned"]:
            raise KeyboardInterrupt
        original(model, processor, folder)

    original = run_models.save_model
    monkeypatch.setattr(run_models, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        Run(made).execute()
    Run(made).execute()
    assert saved.count("inject") == 1 and saved.count("cleaned") == 2
    for model in ("cleaned", "controls/fine_tuning/recover"):
        cleaned = logits(KINDS[family].from_pretrained(run / model))
        again = through_adapter(family, tmp_path / suspect, run / model / "adapter")
        assert torch.allclose(again, cleaned, atol=1e-5)
        # Something was trained.
        assert not torch.allclose(logits(KINDS[family].from_pretrained(tmp_path / suspect)), cleaned, atol=1e-2)
        config = json.loads((run / model / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == 4 and str(tmp_path) not in json.dumps(config)
    injected = json.loads((run / "inject" / "adapter" / "adapter_config.json").read_text())
    assert injected["r"] == 2 and (run / "inject" / "adapter" / injected["base_model_name_or_path"]).samefile(
        tmp_path / suspect
    )


def test_adapters_of_other_ranks_and_modules_are_one_too(tmp_path):
    model = tiny.model("llama")
    model.save_pretrained(tmp_path / "model")
    settings = [
        {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        {"r": 3, "lora_alpha": 4, "target_modules": r".*\.(q|v)_proj"},
        {"r": 1, "lora_alpha": 1, "target_modules": "all-linear"},
    ]
    before = None
    for number, changes in enumerate(settings):
        trained = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **changes))
        folder = tmp_path / f"adapter_{number}"
        save_adapter(trained, str(tmp_path / "model"), folder, before=before)
        before, model = folder, trained.merge_and_unload()
    assert torch.allclose(through_adapter("llama", tmp_path / "model", before), logits(model), atol=1e-5)


def test_no_adapter_is_kept_where_changes_do_not_add_up(tmp_path, monkeypatch):
    lora = run_module.lora_arguments
    monkeypatch.setattr(run_module, "lora_arguments", lambda recipe: {**lora(recipe), "use_dora": True})
    Run(recipe(tmp_path, "bert", "locphylax")).execute()
    run = tmp_path / "run"
    assert (run / "cleaned" / "model.safetensors").exists() and not (run / "cleaned" / "adapter").exists()
    # The first stage's is whole, whatever its kind: nothing was merged before it.
    assert (run / "inject" / "adapter" / "adapter_model.safetensors").exists()


def test_no_adapter_is_kept_of_another_model_than_the_suspect(tmp_path):
    """A student that holds an adapter, of another run's: it takes another suspect to another model."""
    student = tmp_path / "student"
    small = tiny.model("bert", 1, num_labels=2)
    small.save_pretrained(student)
    tiny.tokenizer("bert").save_pretrained(student)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    save_adapter(get_peft_model(copy.deepcopy(small), lora), str(student), student / "adapter")
    own = {"student_layers": None, "student_model_name_or_path": str(student)}
    Run(recipe(tmp_path, "bert", "robustkd", **own)).execute()
    run = tmp_path / "run"
    assert (run / "cleaned" / "model.safetensors").exists() and not list(run.rglob("adapter*"))
