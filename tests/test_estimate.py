"""The estimate against what torch saves, allocates and counts."""

import gc
from dataclasses import replace

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.autocast import inputs_as_they_are
from hf_backdoor.defenses.locphylax import LocphylaxConfig, LocphylaxTrainer
from hf_backdoor.defenses.mbtsad import MBTSADConfig, MBTSADTrainer
from hf_backdoor.estimate import Engine, Load, ModelShape, memory
from hf_backdoor.operations import flops


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


# ---- Operations ----


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
