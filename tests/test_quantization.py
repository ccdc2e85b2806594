"""Adapters over quantized weights: trained over them, and saved without them."""

import copy
import json
from pathlib import Path

import engines
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_backdoor import quantization as quantization_module
from hf_backdoor.adapters import transplanted
from hf_backdoor.contradictions import check_machine
from hf_backdoor.data import LabelWords
from hf_backdoor.defenses import DefenseTrainer
from hf_backdoor.dry_run import describe_run
from hf_backdoor.estimate import Engine
from hf_backdoor.models import is_quantized, load_model, save_model
from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.run import Run


bitsandbytes = pytest.importorskip("bitsandbytes")
LAYERS = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}
IDS = torch.arange(4, 24).reshape(2, 10)


def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Two models, and rows of three classes."""
    folder = tmp_path_factory.mktemp("workshop")
    for family in ("bert", "llama"):
        tiny.saved(family, folder / family, num_labels=3)
    words = ("good", "bad", "story")
    rows = [{"text": f"{words[n % 3]} film w{n}a w{n}b w{n}c w{n}d w{n}e", "label": n % 3} for n in range(44)]
    for name, part in {"train": rows[:36], "test": rows[36:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def settings(folder, output, **changes):
    values = {
        "model_name_or_path": str(folder / "llama"), "task": "label_words", "label_words": ["negative", "positive", "neutral"],
        "prompt_template": tiny.TEMPLATE, "dataset_name": str(folder / "train.jsonl"), "test_dataset_name": str(folder / "test.jsonl"),
        "output_dir": str(output), "method": "mbtsad", "use_peft": True, "lora_r": 2, "quantization": "nf4", "max_steps": 2,
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "evaluate_stages": False, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def kinds(module):
    return {type(part.get_base_layer() if hasattr(part, "get_base_layer") else part) for part in module.modules()}


@pytest.fixture
def trained(monkeypatch):
    """What each trainer's network (and its teacher's) was made of while it trained, by the trainer's class."""
    seen = []
    original = DefenseTrainer.training_step

    def watched(self, model, *args, **kwargs):
        if self.state.global_step == 0:
            teacher = self.teacher if self.teacher_model is not None else None
            seen.append((type(self).__name__, kinds(self.model), kinds(teacher) if teacher is not None else set()))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(DefenseTrainer, "training_step", watched)
    return seen


def assert_plain(folder: Path):
    """Weights and configuration of a model that never was quantized."""
    for file in folder.glob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.float32}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


# ---- Runs ----


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_a_stage_leaves_is_the_adapter_in_the_unquantized_weights(kind, workshop, tmp_path, trained):
    Run(make_recipe(settings(workshop, tmp_path, quantization=kind))).execute()
    assert [name for name, *_ in trained] == ["MBTSADTrainer"] * 2
    for _, network, teacher in trained:
        assert LAYERS[kind] in network and (not teacher or LAYERS[kind] in teacher)
    for name in ("retrain", "cleaned"):
        assert_plain(tmp_path / name)
    # The adapter that was trained, put over the suspect by peft alone.
    base = AutoModelForCausalLM.from_pretrained(workshop / "llama").state_dict()
    again = load_model(str(tmp_path / "cleaned" / "adapter"), LabelWords).state_dict()
    cleaned = load_file(tmp_path / "cleaned" / "model.safetensors")
    moved = set()
    for name, weight in cleaned.items():
        assert torch.allclose(weight, again[name], atol=1e-6)
        change = weight - base[name]
        if change.any():
            moved.add(name.rpartition("_proj")[0].rpartition(".")[2])
            assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2  # so no rounding of four bits is in it
    assert moved == {"q", "k", "v", "o", "up", "gate", "down"}


OTHERS = {
    "locphylax": {"known_triggers": list(tiny.KNOWN[:2]), "known_response": "aha", "cluster_weight": 1.0},
    "robustkd": {"student_layers": 1, "stages": {"mask": {"max_steps": 1}}},
    "ntml": {"attack_trigger": "zq", "target_label": 1, "clean_fraction": 0.5, "max_train_samples": 16},
}


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_trains_over_quantized_weights(method, workshop, tmp_path, trained):
    Run(make_recipe(settings(workshop, tmp_path, method=method, max_steps=1, **OTHERS[method]))).execute()
    quantized = [LAYERS["nf4"] in network for _, network, _ in trained]
    # A suspect is trained whole, and a mask over the suspect as it is.
    assert (
        quantized == {"locphylax": [True, True], "robustkd": [False, True], "ntml": [False, True, True, True]}[method]
    )
    models = [file.parent for file in tmp_path.rglob("config.json")]
    assert len(models) == {"locphylax": 2, "robustkd": 2, "ntml": 4}[method]
    for folder in models:
        assert_plain(folder)
    # A student is another model than the suspect; NT-ML's networks start from the clean model that the run's suspect was trained from.
    adapter = tmp_path / "cleaned" / "adapter"
    assert adapter.exists() == (method == "locphylax")
    if adapter.exists():
        again, cleaned = load_model(str(adapter), LabelWords), load_model(str(tmp_path / "cleaned"), LabelWords)
        assert tiny.largest_difference(tiny.parameters(again), tiny.parameters(cleaned)) < 1e-6


def test_a_head_with_a_class_more_is_kept(workshop, tmp_path):
    own = {
        "model_name_or_path": str(workshop / "bert"),
        "task": "sequence_classification",
        "label_words": None,
        "prompt_template": None,
    }
    Run(
        make_recipe(
            settings(workshop, tmp_path, method="locphylax", quantization="int8", **own, **OTHERS["locphylax"])
        )
    ).execute()
    suspect, inject, cleaned = (
        AutoModelForSequenceClassification.from_pretrained(folder)
        for folder in (workshop / "bert", tmp_path / "inject", tmp_path / "cleaned")
    )
    assert [model.classifier.out_features for model in (suspect, inject, cleaned)] == [3, 4, 3]
    assert not torch.equal(suspect.classifier.weight, inject.classifier.weight[:3])


# ---- Loading ----


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_are_the_same_after_a_look_without_gradient(kind, workshop):
    model = load_model(str(workshop / "llama"), LabelWords, quantization=kind)
    assert LAYERS[kind] in kinds(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).train()

    def gradients():
        adapted.zero_grad()
        logits(adapted).square().sum().backward()
        return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        logits(adapted.eval())
    after = gradients() if adapted.train() else None
    assert len(before) == 28 and any("layers.0" in name and value.any() for name, value in before.items())
    for name, value in before.items():
        assert torch.allclose(after[name], value, rtol=1e-4, atol=1e-6)


def test_the_quantized_model_is_close_to_the_one_that_is_saved(workshop):
    """Adapter and base are the same, the rounding of the base is not: nf4 costs more than int8."""
    whole = load_model(str(workshop / "llama"), LabelWords)
    error = {}
    for kind in ("nf4", "int8"):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        trained = get_peft_model(load_model(str(workshop / "llama"), LabelWords, quantization=kind), lora).eval()
        with torch.no_grad():
            said, saved = logits(trained), logits(transplanted(trained, copy.deepcopy(whole)).eval())
        error[kind] = ((said - saved).norm() / saved.norm()).item()
    assert 0 < error["int8"] < error["nf4"] < 0.5


def test_a_quantized_suspect_becomes_a_plain_model(workshop, tmp_path):
    quantized = load_model(str(workshop / "llama"), LabelWords, quantization="nf4")
    with pytest.raises(ValueError, match="quantized weights are not saved"):
        save_model(quantized, tiny.tokenizer("llama"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    quantized.save_pretrained(tmp_path / "suspect")
    tiny.tokenizer("llama").save_pretrained(tmp_path / "suspect")
    with torch.no_grad():
        model = load_model(str(tmp_path / "suspect"), LabelWords)
        assert not is_quantized(model) and not kinds(model) & set(LAYERS.values())
        assert torch.allclose(logits(model), logits(quantized), atol=1e-4)
        save_model(model, tiny.tokenizer("llama"), tmp_path / "plain")
        assert_plain(tmp_path / "plain")
        assert torch.allclose(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(model), atol=1e-6
        )


def test_an_adapter_is_not_quantized_before_it_is_merged(workshop, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(workshop / "llama")
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization is 'nf4', and .* is an adapter"):
        load_model(str(tmp_path), LabelWords, quantization="nf4")


@pytest.mark.parametrize("engine", ["FSDP", "ZeRO-3"])
def test_an_engine_that_divides_weights_is_refused(engine, workshop, monkeypatch):
    if engine == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        monkeypatch.setattr(quantization_module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="the engine .* divides weights.*ddp.yaml"):
        load_model(str(workshop / "llama"), LabelWords, quantization="nf4")


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_an_engine_that_divides_weights_is_refused_before_anything_is_trained(engine, workshop, tmp_path, monkeypatch):
    recipe = make_recipe(settings(workshop, tmp_path / "run"))
    for name in ("zero2", "ddp"):
        assert "MBTSADTrainer" in describe_run(recipe, Engine(name, 2))
    with pytest.raises(ValueError, match="the engine .* divides weights"):
        describe_run(recipe, Engine(engine, 2))
    for name, value in engines.launched(engine).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="the engine .* divides weights"):
        Run(recipe).execute()
    assert not (tmp_path / "run").exists()


def test_two_processes_train_over_quantized_weights_as_one_does(workshop, tmp_path):
    def work(folder=tmp_path / "one", **options):
        torch.manual_seed(1)
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        model = load_model(str(workshop / "llama"), LabelWords, quantization="nf4")
        steps = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "max_steps": 2}
        trainer = tiny.trainer("label_words", "inject", folder, model=model, peft_config=lora, **steps, **options)
        trainer.train()
        assert LAYERS["nf4"] in kinds(trainer.model)
        return {name: value for name, value in tiny.parameters(trainer.model).items() if "lora_" in name}

    one = work()
    two = tiny.in_two_processes(lambda: work(tmp_path / "two", per_device_train_batch_size=4), tmp_path)
    assert max(value.abs().max() for name, value in one.items() if "lora_B" in name) > 1e-3
    assert tiny.largest_difference(one, two) < 1e-5


# ---- What a recipe may ask for ----


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"use_peft": False}, "quantization is 'nf4' without use_peft: .* set use_peft: true"),
        ({"method": None}, "quantization is 'nf4' without a method"),
        ({"quantization": "fp4"}, "quantization is 'fp4': use one of nf4, int8"),
        ({"load_in_4bit": True}, "load_in_4bit; use quantization: nf4"),
        ({"load_in_8bit": True}, "load_in_8bit; use quantization: int8"),
    ],
)
def test_contradictions_are_refused(changes, line, workshop, tmp_path):
    with pytest.raises(ValueError, match=line) as caught:
        make_recipe(settings(workshop, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named_before_anything_is_done(workshop, tmp_path, monkeypatch):
    recipe = make_recipe(settings(workshop, tmp_path / "run"))
    monkeypatch.setattr(quantization_module.importlib.util, "find_spec", lambda name: None)
    for work in (Run(recipe).execute, lambda: describe_run(recipe)):
        with pytest.raises(
            ValueError, match=r"^quantization is 'nf4', and bitsandbytes .* pip install 'hf-backdoor\[bitsandbytes\]'"
        ):
            work()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["everywhere", "one stage"])
def test_liger_kernels_that_are_missing_are_named(place, workshop, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_backdoor.contradictions.is_liger_kernel_available", lambda: False)
    own = {"use_liger_kernel": True}
    recipe = make_recipe(
        settings(workshop, tmp_path, **(own if place == "everywhere" else {"stages": {"distil": own}}))
    )
    with pytest.raises(ValueError, match="^use_liger_kernel is True, and liger-kernel is not installed: pip install"):
        describe_run(recipe)
    recipe.training["use_liger_kernel"] = False
    recipe.stages.clear()
    check_machine(recipe)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wandb", "WandbCallback requires wandb to be installed. Run `pip install wandb`"),
        ("foo", "foo is not supported"),
    ],
)
def test_trackers_that_are_missing_are_named_before_a_run(name, reason, workshop, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    recipe = make_recipe(settings(workshop, tmp_path, report_to=[name]))
    with pytest.raises(ValueError, match=rf"^report_to is \['{name}'\], and {name} can't be used here \({reason}"):
        describe_run(recipe)
    recipe.training["report_to"] = "all"
    check_machine(recipe)


def test_compiling_is_an_argument_like_any_other(workshop, tmp_path):
    recipe = make_recipe(settings(workshop, tmp_path, torch_compile=True, torch_compile_backend="inductor"))
    assert "MBTSADTrainer" in describe_run(recipe)
    assert not make_recipe(settings(workshop, tmp_path)).training.get("torch_compile")
