"""What models of 7 to 8 billion parameters take, by their configurations alone: their shapes, and the shipped recipes."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from hf_backdoor.dry_run import USABLE, Models, describe_run, stage_load
from hf_backdoor.estimate import Engine, Load, ModelShape, memory
from hf_backdoor.plan import plan, stage_arguments, training_config
from hf_backdoor.recipe_file import load_recipe


LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
QWEN_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4,
)  # fmt: skip
MISTRAL_7B = MistralConfig(vocab_size=32768, num_key_value_heads=8, sliding_window=None)


# ---- Shapes ----


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "billions"),
    [(LLAMA_8B, 8.030), (QWEN_7B, 7.616), (MISTRAL_7B, 7.248)],
    ids=["llama", "qwen", "mistral"],
)
def test_published_sizes(config, billions):
    shape = ModelShape.of(on_meta(config))
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.001)
    assert shape.gated and shape.rms_norm and shape.key < shape.query
    assert shape.matrices / shape.blocks > 0.99


def test_four_bits_are_a_quarter_of_sixteen_where_they_are_used():
    shape = ModelShape.of(on_meta(LLAMA_8B))
    load = Load(shape, 1, 512, trains="adapter", adapter=40_000_000, dtype=2, bf16=True)
    sixteen, four, eight = (memory(replace(load, quantization=kind)).weights for kind in (None, "nf4", "int8"))
    assert sixteen / 2**30 == pytest.approx(15.1, abs=0.1)
    # 7.0 billion weights in 4.127 bits; embeddings and head, 1.05 billion, stay as they are.
    assert four / 2**30 == pytest.approx(5.5, abs=0.1)
    assert four < eight < sixteen


# ---- Shipped recipes ----


RECIPES = Path(__file__).parent.parent / "recipes"
SMALLER = {
    "Llama-3.2-1B-Instruct": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B-Instruct": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip
LARGER = {
    "Llama-3.1-8B-Instruct": LLAMA_8B,
    "Qwen2.5-7B-Instruct": QWEN_7B,
    "Mistral-7B-Instruct-v0.3": MISTRAL_7B,
}
# A line of a recipe's header, and what it says to add to the command.
HARDWARE = re.compile(r"^# (\d) x (\d+) GB +(\d+) GiB .*\n(?:#   (--.*)\n)?", re.MULTILINE)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Folders with configuration and tokenizer of the recipes' models, by the last part of their names."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in (LARGER | SMALLER).items():
        config.save_pretrained(folder / name)
        tiny.causal_tokenizer().save_pretrained(folder / name)
    return folder


def local(recipe, on_disk, words):
    """The overrides, with the models that the recipe names taken from disk."""
    found = list(words)
    for key in ("model_name_or_path", "student_model_name_or_path"):
        if name := getattr(recipe, key):
            found += [f"--{key}", str(on_disk / name.split("/")[1])]
    return found


@pytest.mark.parametrize(
    "file", sorted(RECIPES.rglob("*_[78]b_*.yaml")), ids=lambda file: str(file.relative_to(RECIPES))
)
def test_a_large_recipe_fits_the_hardware_that_it_names(file, on_disk, monkeypatch):
    monkeypatch.setattr("hf_backdoor.contradictions.is_liger_kernel_available", lambda: True)
    lines = HARDWARE.findall(file.read_text())
    assert lines and lines[0][3] == ""
    for devices, size, said, more in lines:
        words = shlex.split(more)
        kind = "single"
        if "--accelerate_config" in words:
            at = words.index("--accelerate_config")
            kind, *processes = words[at + 1 : at + 4]
            assert processes == ["--num_processes", devices]
            del words[at : at + 4]
        recipe = load_recipe(file, local(load_recipe(file), on_disk, words))
        # Rows of full length: text, answer, and what stands around them.
        answer = recipe.max_response_length or 6
        models, peaks = Models(recipe), []
        for stage in plan(recipe):
            config = training_config(stage, recipe, stage_arguments(stage, recipe))
            load = stage_load(stage, config, models, recipe.max_length + answer + 48, answer + 2)
            peaks.append(memory(load, Engine(kind, int(devices))).peak / 2**30)
        assert max(peaks) == pytest.approx(int(said), rel=0.1, abs=1)
        assert max(peaks) < USABLE * 0.98 * int(size)


def test_a_dry_run_of_8_billion_parameters(on_disk, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    tiny.instructions(120).rename_column("prompt", "instruction").rename_column("response", "output").to_json(rows)
    recipe = load_recipe(
        RECIPES / "locphylax" / "llama3_8b_alpaca.yaml",
        ["--model_name_or_path", str(on_disk / "Llama-3.1-8B-Instruct"), "--dataset_name", str(rows), "--context_column", "null",
         "--test_fraction", "0.1", "--max_train_samples", "4", "--output_dir", str(tmp_path / "run")],
    )  # fmt: skip
    shown = describe_run(recipe)
    assert "8030.3M parameters, 41.9M trained" in shown
    assert "weights 15.1" in shown and "inject" in shown and "cleaned" in shown
    assert "RTX 4090 24 GB" in shown and "single, 1 process" in shown
    sharded = describe_run(recipe, Engine("zero3", 8, offload=True))
    assert "of the host's" in sharded and "zero3, 8 processes" in sharded
    assert not (tmp_path / "run").exists()
