"""The estimate against what torch saves, allocates and counts."""

import gc
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from hf_backdoor.cli import accelerate_settings
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.autocast import inputs_as_they_are
from hf_backdoor.defenses.locphylax import LocphylaxConfig, LocphylaxTrainer
from hf_backdoor.defenses.mbtsad import MBTSADConfig, MBTSADTrainer
from hf_backdoor.dry_run import USABLE, Models, describe_run, engine_of, engine_of_settings, stage_load
from hf_backdoor.estimate import Engine, Load, ModelShape, memory
from hf_backdoor.operations import flops
from hf_backdoor.plan import plan, stage_arguments, training_config
from hf_backdoor.recipe_file import load_recipe, make_recipe
from hf_backdoor.run import Run


TOLERANCE = 0.15
ROWS, TOKENS, ANSWER = 8, 64, 4
SIZES = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}


def made(family, dtype=torch.float32):
    torch.manual_seed(0)
    if family == "bert":
        config = BertConfig(
            **SIZES, intermediate_size=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2
        )
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype).train()
    config = LlamaConfig(**SIZES, intermediate_size=344, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def adapted(model, family):
    kind = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type=kind))


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loss_of(model, family, bf16=False, device="cpu"):
    ids = torch.randint(1, 500, (ROWS, TOKENS), device=device)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    keep = {} if family == "bert" else {"logits_to_keep": ANSWER}
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, attention_mask=mask, **keep).logits
    logits = logits.float().flatten(0, -2)
    return torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=device))


def saved_bytes(model, work):
    """Bytes of the distinct storages that autograd saves, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, sizes = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept.append(tensor)  # an address is one tensor's as long as that tensor lives
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = work()
    del loss
    return sum(sizes.values())


def allocated_peak(work):
    """Most bytes that torch's CPU allocator held at once for what `work` made."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def load_of(model, shape, family, lora, *, dtype=torch.float32, bf16=False, checkpointing=False):
    return Load(
        shape,
        ROWS,
        TOKENS,
        1 if family == "bert" else ANSWER,
        trains="adapter" if lora else "weights",
        adapter=sum(parameter.numel() for parameter in trainable(model)) if lora else 0,
        dtype=dtype.itemsize,
        bf16=bf16,
        checkpointing=checkpointing,
    )


# ---- Memory of one step ----


FULL, LORA, STORED, AGAIN = False, True, False, True


@pytest.mark.parametrize(
    ("family", "dtype", "bf16", "lora", "checkpointing"),
    [
        ("bert", torch.float32, False, FULL, STORED),
        ("bert", torch.float32, True, FULL, AGAIN),
        ("bert", torch.bfloat16, False, LORA, STORED),
        ("llama", torch.float32, False, FULL, STORED),
        ("llama", torch.float32, False, LORA, STORED),
        ("llama", torch.float32, True, FULL, STORED),
        ("llama", torch.float32, True, LORA, AGAIN),
        ("llama", torch.bfloat16, False, FULL, AGAIN),
        ("llama", torch.bfloat16, False, LORA, STORED),
        ("llama", torch.bfloat16, True, LORA, STORED),
        ("llama", torch.bfloat16, True, LORA, AGAIN),
    ],
    ids=str,
)
def test_a_step_takes_what_is_estimated(family, dtype, bf16, lora, checkpointing):
    model = made(family, dtype)
    shape = ModelShape.of(model)
    model = adapted(model, family) if lora else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(trainable(model), fused=True)

    def step():
        # As our trainers have it.
        with inputs_as_they_are(model, bf16):
            loss_of(model, family, bf16).backward()
        optimizer.step()
        optimizer.zero_grad()

    with inputs_as_they_are(model, bf16):
        saved = saved_bytes(model, lambda: loss_of(model, family, bf16))
    step()  # the optimizer's states are made in the first step
    found = memory(load_of(model, shape, family, lora, dtype=dtype, bf16=bf16, checkpointing=checkpointing))
    weights = size(model.parameters())
    states = size(value for state in optimizer.state.values() for value in state.values())
    assert found.weights == pytest.approx(weights, rel=0.02)
    assert found.optimizer == pytest.approx(states, rel=0.02)
    assert found.gradients == pytest.approx(size(trainable(model)), rel=0.02)
    # What the softmax of the logits saves is counted with the logits, a quarter of them.
    assert found.activations + found.logits / 4 == pytest.approx(saved, rel=TOLERANCE)
    assert found.peak == pytest.approx(weights + states + allocated_peak(step), rel=TOLERANCE)


# ---- Memory of a trainer ----


def long_reviews(count=16):
    """Texts of about as many tokens, so that none is padded by much."""
    text = " ".join(row["text"] for row in tiny.reviews(40))
    words = text.split()[:TOKENS]
    return Dataset.from_list([{"text": " ".join(words[row % 3 :]), "label": row % 2} for row in range(count)])


def options(folder, **more):
    return {
        "output_dir": str(folder), "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": ROWS, "save_strategy": "no", "max_steps": 2, "seed": 0,
        "label_words": list(tiny.LABEL_WORDS), "prompt_template": tiny.TEMPLATE, **more,
    }  # fmt: skip


STAGES = {
    "accumulated": (DefenseTrainer, DefenseConfig, {"gradient_accumulation_steps": 2}),
    "inject": (LocphylaxTrainer, LocphylaxConfig, tiny.LOCPHYLAX | {"stages": ["inject"]}),
    "distil": (MBTSADTrainer, MBTSADConfig, {"stages": ["distil"]}),
    "distil_bf16": (MBTSADTrainer, MBTSADConfig, {"stages": ["distil"], "bf16": True}),
    "distil_lora": (MBTSADTrainer, MBTSADConfig, {"stages": ["distil"], "bf16": True}),
    "distil_checkpointed": (MBTSADTrainer, MBTSADConfig, {"stages": ["distil"], "activation_checkpointing": True}),
}


def trainer_and_load(name, folder, model, teacher, use_cpu=True):
    kind, config, more = STAGES[name]
    shape = ModelShape.of(model)
    distils, lora = name.startswith("distil"), name.endswith("lora")
    if distils:
        teacher.save_pretrained(folder / "teacher")  # as runs give it: it is read when it is first asked for
    trainer = kind(
        model=model,
        args=config(**options(folder, **more, use_cpu=use_cpu)),
        train_dataset=long_reviews(),
        processing_class=tiny.causal_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        **({"teacher_model": str(folder / "teacher")} if distils else {}),
    )
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    layers = shape.layers if distils else 0
    load = Load(
        shape, ROWS, max(lengths), 2,
        teachers=(shape,) if distils else (), bf16=trainer.args.bf16, checkpointing=trainer.args.activation_checkpointing,
        accumulation=trainer.args.gradient_accumulation_steps, compared_attention=layers, compared_hidden=layers,
        trains="adapter" if lora else "weights", adapter=sum(p.numel() for p in trainable(trainer.model)) if lora else 0,
        dtype=2 if lora else 4,
    )  # fmt: skip
    return trainer, load


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_takes_what_is_estimated(name, tmp_path):
    dtype = torch.bfloat16 if name.endswith("lora") else torch.float32
    model, teacher = made("llama", dtype), made("llama", dtype)
    trainer, load = trainer_and_load(name, tmp_path, model, teacher)
    held = size(trainer.model.parameters()) + (size(trainer.teacher.parameters()) if load.teachers else 0)
    assert memory(load).peak == pytest.approx(held + allocated_peak(trainer.train), rel=TOLERANCE)


# ---- Engines ----


def test_zero_divides_as_its_paper_says():
    """7.5 billion parameters in 16 bits on 64 GPUs: 120, 16.6 and 1.9 GB (figure 1 of 1910.02054), activations apart."""
    shape = ModelShape(
        parameters=7_500_000_000, blocks=7_400_000_000, matrices=7_400_000_000, head=100_000_000, layers=30,
        hidden=4096, intermediate=16384, query=4096, key=4096, heads=32, outputs=50_000, gated=False, rms_norm=False,
    )  # fmt: skip
    load = Load(shape, rows=1, tokens=1, dtype=4, bf16=True)

    def states(engine):
        found = memory(load, engine)
        return (found.weights + found.gradients + found.optimizer) / 1e9

    assert states(Engine("zero2", 1)) == pytest.approx(120)
    assert states(Engine("zero2", 64)) == pytest.approx(16.6, abs=0.05)
    assert states(Engine("zero3", 64)) == pytest.approx(1.9, abs=0.05)


def test_what_an_engine_moves_to_the_host_is_not_on_the_device():
    load = Load(ModelShape.of(made("llama")), ROWS, TOKENS, bf16=True)
    here, there = memory(load, Engine("zero3", 2)), memory(load, Engine("zero3", 2, offload=True))
    assert there.weights == there.optimizer == there.gradients == 0
    assert there.host == here.weights + here.optimizer + here.gradients
    assert there.peak < here.peak


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_more_devices_never_take_more_each(kind):
    load = Load(ModelShape.of(made("llama")), ROWS, TOKENS, bf16=True)
    peaks = [memory(load, Engine(kind, processes)).peak for processes in (2, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)
    assert (peaks[0] > peaks[-1]) == (kind != "ddp")


# ---- Shapes, and operations ----


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
QWEN_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4,
)  # fmt: skip
MISTRAL_7B = MistralConfig(vocab_size=32768, num_key_value_heads=8, sliding_window=None)


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


@pytest.mark.parametrize(
    ("family", "lora", "checkpointing"),
    [("bert", FULL, STORED), ("llama", FULL, STORED), ("llama", LORA, STORED), ("llama", FULL, AGAIN)],
    ids=str,
)
def test_operations_are_those_that_torch_counts(family, lora, checkpointing):
    model = made(family)
    shape = ModelShape.of(model)
    model.set_attn_implementation("eager")  # torch does not count what its fused attention does on a CPU
    model = adapted(model, family) if lora else model
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with FlopCounterMode(display=False) as counter:
        loss_of(model, family).backward()
    load = load_of(model, shape, family, lora, checkpointing=checkpointing)
    assert flops(load) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_short_row_is_cheaper_than_the_longest():
    load = Load(ModelShape.of(made("llama")), ROWS, TOKENS)
    assert flops(load, TOKENS / 2) < flops(load) / 1.9
    assert flops(replace(load, teachers=(load.model,))) > 1.3 * flops(load)


def test_four_bits_are_a_quarter_of_sixteen_where_they_are_used():
    shape = ModelShape.of(on_meta(LLAMA_8B))
    load = Load(shape, 1, 512, trains="adapter", adapter=40_000_000, dtype=2, bf16=True)
    sixteen, four, eight = (memory(replace(load, quantization=kind)).weights for kind in (None, "nf4", "int8"))
    assert sixteen / 2**30 == pytest.approx(15.1, abs=0.1)
    # 7.0 billion weights in 4.127 bits; embeddings and head, 1.05 billion, stay as they are.
    assert four / 2**30 == pytest.approx(5.5, abs=0.1)
    assert four < eight < sixteen


# ---- On a GPU ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and pytest --gpu")
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_on_a_gpu_takes_what_is_estimated(name, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    config = LlamaConfig(**(SIZES | sizes), num_key_value_heads=4)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name.endswith("lora") else torch.float32
    model, teacher = (AutoModelForCausalLM.from_config(config, dtype=dtype) for _ in range(2))
    trainer, load = trainer_and_load(name, tmp_path, model, teacher, use_cpu=False)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert memory(load).peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=TOLERANCE)


# ---- Shipped recipes of 7 to 8 billion parameters ----

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


def test_what_the_engine_can_not_run_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    tiny.model("bert", num_labels=3).save_pretrained(tmp_path / "model")
    tiny.encoder_tokenizer().save_pretrained(tmp_path / "model")
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


def test_the_engine_of_this_process(tmp_path, monkeypatch):
    assert engine_of(DefenseConfig(**options(tmp_path))) == Engine("single", 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert engine_of(DefenseConfig(**options(tmp_path))).kind == "fsdp2"
