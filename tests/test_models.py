"""Where weights come from and go to: adapters over a base, quantized checkpoints, and what is refused."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import is_flash_attn_2_available

from hf_backdoor import run_models
from hf_backdoor.adapters import save_adapter
from hf_backdoor.data import LabelWords, SequenceClassification
from hf_backdoor.evaluation import Results
from hf_backdoor.models import load_config, load_model, load_tokenizer, merged, needs_conversion, save_model
from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.run import Run


KINDS = {"llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}
LORA = {
    "llama": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    "bert": LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False),
}
IDS = torch.arange(4, 24).reshape(2, 10)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def strong(family, seed=0):
    """A model whose answers differ from text to text."""
    model = tiny.model(family, seed, num_labels=3 if family == "bert" else 2)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    return model


def make_suspect(folder: Path, family: str) -> PeftModel:
    """`folder/base`, and over it an adapter in `folder/adapter`."""
    base = strong(family)
    base.save_pretrained(folder / "base")
    tiny.tokenizer(family).save_pretrained(folder / "base")
    adapted = get_peft_model(KINDS[family].from_pretrained(folder / "base"), copy.deepcopy(LORA[family]))
    if family == "bert":
        adapted.base_model.model.classifier.modules_to_save["default"].weight.data += 1
    adapted.save_pretrained(folder / "adapter")
    return adapted


@pytest.fixture
def suspect(tmp_path):
    """An adapter over a causal LM, and the two as peft puts them together."""
    return tmp_path / "adapter", make_suspect(tmp_path, "llama")


def rewrite(adapter: Path, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- A base and an adapter ----


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_adapter_is_merged_into_its_base(family, tmp_path):
    adapted = make_suspect(tmp_path, family)
    name, task = str(tmp_path / "adapter"), LabelWords if family == "llama" else SequenceClassification
    model = load_model(name, task, num_labels=3)
    assert type(model) is type(adapted.get_base_model())
    assert torch.allclose(logits(model), logits(adapted), atol=1e-5)
    assert not torch.allclose(logits(model), logits(load_model(str(tmp_path / "base"), task)), atol=1e-2)
    assert needs_conversion(name) and not needs_conversion(str(tmp_path / "base"))
    # It is as good as any other model: it can be saved, and loaded by everybody.
    save_model(model, load_tokenizer(name), tmp_path / "plain")
    assert {file.name for file in (tmp_path / "plain").glob("*.safetensors")} == {"model.safetensors"}
    assert torch.equal(logits(KINDS[family].from_pretrained(tmp_path / "plain")), logits(model))


def test_an_adapter_has_its_base_s_tokenizer_unless_it_brings_one(suspect):
    adapter, _ = suspect
    assert load_tokenizer(str(adapter)).get_vocab() == tiny.tokenizer("llama").get_vocab()
    own = tiny.tokenizer("llama")
    own.add_tokens(["<own>"])
    own.save_pretrained(adapter)
    assert "<own>" in load_tokenizer(str(adapter)).get_vocab()
    assert load_config(str(adapter)).architectures == ["LlamaForCausalLM"]


def test_a_base_is_found_from_the_adapter_s_folder(suspect, tmp_path, monkeypatch):
    adapter, adapted = suspect
    rewrite(adapter, base_model_name_or_path="../base")
    shutil.copytree(tmp_path / "base", tmp_path / "moved" / "base")
    shutil.move(adapter, tmp_path / "moved" / "adapter")
    shutil.rmtree(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert torch.allclose(logits(load_model("moved/adapter", LabelWords)), logits(adapted), atol=1e-5)


def test_the_revision_of_the_base_is_the_one_that_the_adapter_names(suspect, monkeypatch):
    adapter, _ = suspect
    rewrite(adapter, revision="v2")
    asked = []
    original = AutoModelForCausalLM.from_pretrained

    def watched(*args, revision=None, **kwargs):
        asked.append(revision)
        return original(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    load_model(str(adapter), LabelWords)
    assert asked == ["v2"]


def pickled(adapter):
    weights = adapter / "adapter_model.safetensors"
    torch.save({}, weights.with_name("adapter_model.bin"))
    weights.unlink()


def chained(adapter):
    shutil.copytree(adapter, adapter.parent / "first")
    rewrite(adapter, base_model_name_or_path="../first")


def other_base(adapter):
    tiny.model("gpt2").save_pretrained(adapter.parent / "gpt2")
    rewrite(adapter, base_model_name_or_path="../gpt2")


def prompt_tuning(adapter):
    shutil.rmtree(adapter)
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(adapter)


@pytest.mark.parametrize(
    "spoil, line",
    [
        (lambda adapter: rewrite(adapter, base_model_name_or_path="nobody/nothing"), "an adapter over 'nobody/nothing', which can't be loaded"),
        (lambda adapter: rewrite(adapter, base_model_name_or_path=None), "an adapter of no base"),
        (pickled, "adapter_model.bin is a pickle, which can run code.*save it again as safetensors"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "holds no weights"),
        (chained, "which is an adapter too"),
        (other_base, "does not fit its base"),
        (prompt_tuning, "PROMPT_TUNING, which is no change of weights"),
        (lambda adapter: rewrite(adapter, task_type="SEQ_CLS"), "set task: sequence_classification"),
    ],
    ids=["base not found", "no base", "pickle", "no weights", "chain", "other base", "prompt tuning", "other task"],
)  # fmt: skip
def test_what_is_wrong_with_an_adapter_is_said_in_one_line(spoil, line, suspect):
    adapter, _ = suspect
    spoil(adapter)
    with pytest.raises(ValueError, match=line) as caught:
        load_model(str(adapter), LabelWords)
    assert "\n" not in str(caught.value)


def test_a_saved_adapter_holds_no_path_of_this_machine(suspect, tmp_path):
    _, adapted = suspect
    said = logits(adapted)
    save_adapter(adapted, str(tmp_path / "base"), tmp_path / "run" / "cleaned" / "adapter")
    saved = tmp_path / "run" / "cleaned" / "adapter"
    assert {file.name for file in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in (saved / "adapter_config.json").read_text()
    assert torch.allclose(logits(load_model(str(saved), LabelWords)), said, atol=1e-5)
    save_adapter(adapted, "someone/suspect", tmp_path / "other", base_revision="v2")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/suspect", "v2")


# ---- Folders ----


@pytest.fixture
def classifier(tmp_path):
    return Path(tiny.saved("bert", tmp_path / "bert"))


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]], ids=["none", "configuration"])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(left, classifier):
    assert len(load_tokenizer(str(classifier))) > 60
    for file in classifier.glob("tokenizer*"):
        if file.name not in left:
            file.unlink()
    with pytest.raises(ValueError, match="has no tokenizer .*: put all its files there") as caught:
        load_tokenizer(str(classifier))
    assert "\n" not in str(caught.value)


def to_pickle(folder):
    torch.save(tiny.model("bert").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    "spoil, line",
    [
        (to_pickle, r"can't be loaded .*: pickles \(.bin\) are not read, .*save_pretrained\(\) it"),
        (truncated, "has weights that are damaged .*: copy or download them again"),
    ],
)
def test_weights_that_are_not_read_are_named_in_one_line(spoil, line, classifier):
    spoil(classifier)
    with pytest.raises(ValueError, match=f"^model '{classifier}' {line}$") as caught:
        load_model(str(classifier), SequenceClassification)
    assert "\n" not in str(caught.value)


def test_a_causal_lm_without_its_head_is_refused(tmp_path):
    """transformers draws the head at random, and goes on."""
    for tied in (True, False):
        decoder = tiny.model("llama").model
        decoder.config.tie_word_embeddings = tied
        decoder.save_pretrained(tmp_path)
        if tied:
            load_model(str(tmp_path), LabelWords)
    with pytest.raises(
        ValueError, match=f"^model '{tmp_path}' has no weights for lm_head.weight, which would be random"
    ):
        load_model(str(tmp_path), LabelWords)


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_for(classifier, tmp_path, monkeypatch):
    (classifier / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Evil: pass\n")
    kinds = ("AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer")
    own = {"model_type": "evil", "tokenizer_class": "Evil", "auto_map": dict.fromkeys(kinds, "evil.Evil")}
    for name in ("config.json", "tokenizer_config.json"):
        (classifier / name).write_text(json.dumps(json.loads((classifier / name).read_text()) | own))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_config, lambda name: load_model(name, SequenceClassification), load_tokenizer):
        with pytest.raises(ValueError, match="comes with code of its own .*, which is never run: use one") as caught:
            load(str(classifier))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# ---- Runs ----


def settings(folder, output, model, **changes):
    rows = [
        {"text": f"{row['text']} w{n}a w{n}b w{n}c w{n}d w{n}e", "label": row["label"]}
        for n, row in enumerate(tiny.reviews(32))
    ]
    for name, part in {"train": rows[:24], "test": rows[24:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    values = {
        "model_name_or_path": str(model), "task": "label_words", "label_words": list(tiny.LABEL_WORDS), "prompt_template": tiny.TEMPLATE,
        "dataset_name": str(folder / "train.jsonl"), "test_dataset_name": str(folder / "test.jsonl"), "output_dir": str(output),
        "method": "mbtsad", "split_min_chars": 3, "per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-2,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "evaluate_stages": False,
    }  # fmt: skip
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def execute(values) -> Results:
    return Run(make_recipe(values)).execute()


def test_a_run_on_an_adapter_gives_what_one_on_the_merged_model_gives(suspect, tmp_path):
    adapter, adapted = suspect
    save_model(merged(adapted), tiny.tokenizer("llama"), tmp_path / "merged")
    rows = {}
    for name in ("adapter", "merged"):
        values = settings(tmp_path, tmp_path / f"run_{name}", tmp_path / name, use_peft=True, lora_r=2)
        rows[name] = execute(values).rows
    assert rows["adapter"] == rows["merged"]
    cleaned = [KINDS["llama"].from_pretrained(tmp_path / f"run_{name}" / "cleaned") for name in rows]
    assert torch.allclose(*map(logits, cleaned), atol=1e-4)
    # One stage made the cleaned model of the suspect: so its adapter is one, and is kept.
    for name, model in zip(rows, cleaned, strict=True):
        saved = tmp_path / f"run_{name}" / "cleaned" / "adapter"
        assert str(tmp_path) not in (saved / "adapter_config.json").read_text()
        again = load_model(str(saved), LabelWords)
        assert torch.allclose(logits(again), logits(model), atol=1e-5)
        assert not torch.allclose(logits(again), logits(load_model(str(tmp_path / "merged"), LabelWords)), atol=1e-3)


def test_another_base_under_an_adapter_makes_another_suspect(suspect, tmp_path):
    adapter, _ = suspect
    values = settings(tmp_path, tmp_path / "run", adapter, method=None, split_min_chars=None)
    execute(values)
    note = tmp_path / "run" / "base" / "stage.json"
    before = note.read_text()
    execute(values)
    assert note.read_text() == before
    strong("llama", seed=9).save_pretrained(tmp_path / "base")
    execute(values)
    assert note.read_text() != before


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("config.json", {"num_hidden_layers": "x"}, "has a config.json that can't be read (.*num_hidden_layers"),
        ("config.json", {"vocab_size": 3}, "has weights of other sizes than its config.json says"),
        ("tokenizer.json", None, "has no tokenizer that can be read"),
        ("tokenizer_config.json", None, "has no tokenizer that can be read"),
    ],
)
def test_damaged_files_of_a_model_are_named(file, content, line, tmp_path):
    tiny.saved("bert", tmp_path)
    before = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps([] if content is None else before | content))
    with pytest.raises(ValueError, match=line.replace("(", r"\(")) as caught:
        load_model(str(tmp_path), SequenceClassification)
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (None, "is a folder without config.json: give one that save_pretrained() wrote, or a name on the Hub"),
        ("{", "can't be loaded .*not a valid JSON file.: copy or download it again"),
        ("[]", "has a config.json with a model_type that this version of transformers does not know, or with none: correct"),
        ('{"model_type": "nonsense"}', "has a config.json with a model_type that this version of transformers does not know"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_a_folder_without_a_configuration_that_can_be_read_is_named(config, line, load, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"^model '{tmp_path}' {line}".replace("()", r"\(\)")) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_kill_while_an_adapter_is_merged_is_no_obstacle(suspect, tmp_path, monkeypatch):
    adapter, _ = suspect
    values = settings(tmp_path, tmp_path / "run", adapter, method=None, split_min_chars=None)

    def killed(model, processor, folder):
        model.save_pretrained(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_models, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(values)
    monkeypatch.undo()
    assert execute(values).rows


def test_a_dequantized_gguf_model_is_saved_as_a_plain_one(tmp_path, monkeypatch):
    made = tiny.model("llama")
    expected = tiny.parameters(made)
    # What transformers leaves behind when it has dequantized a GGUF file.
    made.is_quantized, made.hf_quantizer, made.config.quantization_config = True, object(), {"quant_method": "gguf"}
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: (made, {"missing_keys": set()})
    )
    save_model(load_model(str(tmp_path / "model.gguf"), LabelWords), tiny.causal_tokenizer(), tmp_path / "saved")
    monkeypatch.undo()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert tiny.largest_difference(tiny.parameters(saved), expected) == 0
    assert not hasattr(saved.config, "quantization_config")


@pytest.mark.skipif(is_flash_attn_2_available(), reason="runs where flash-attn is not installed")
def test_an_attention_that_is_not_installed_is_named(tmp_path):
    suspect = tiny.saved("bert", tmp_path)
    with pytest.raises(
        ValueError, match=r"can't be loaded \(FlashAttention2 .*installed\): install it, or name another attn"
    ):
        load_model(suspect, SequenceClassification, attn_implementation="flash_attention_2")
