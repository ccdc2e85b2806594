"""What a run would do and need, without loading any weights."""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import TrainingArguments

from .attacks import EmbeddingPoisoningTrainer
from .contradictions import check_machine
from .data import InstructionFollowing, Processor, check_lengths, learned_positions, refuse_longer, row_lengths
from .defenses import DefenseConfig
from .defenses.engines import asked_for
from .defenses.mbtsad import MBTSADTrainer
from .defenses.reading import SuspectReader
from .defenses.robustkd import FeatureMaskTrainer, RobustKDTrainer
from .defenses.robustkd.features import NUM_LAYERS
from .estimate import Engine, Load, Memory, memory
from .folders import refuse_to_clear
from .layers import check_heads
from .models import load_processor
from .operations import flops
from .plan import Stage, base_model_name, check_launch, plan, stage_arguments, training_config, written
from .quantization import refuse_divided
from .recipe import Recipe
from .rows import RunRows, num_proc_of, prepare_rows
from .shapes import Models, shape_of


# What of a device's memory tensors can have: the rest is CUDA's, the libraries' and the gaps in between. On a disk it is the tables'
# and the report's.
USABLE = 0.95
# Share of a GPU's peak rate that training is taken to reach: measured with adapters on 8B, on an H200, 8,192 tokens a step.
ASSUMED_UTILISATION = 0.4
# Seconds that the host takes to launch a block's kernels, forward and backward, however few tokens there are: measured with
# adapters on 32 blocks, 7 to 11 ms; taken to be half of it where all weights are trained, in a third of the operations.
LAUNCH_SECONDS = {"adapter": 0.009, "weights": 0.0045, "mask": 0.0045}


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: GiB as torch reports them, and dense operations a second (NVIDIA's data sheets)."""

    name: str
    memory: float
    bf16: float
    float32: float


GPUS = (
    Gpu("RTX 4090 24 GB", 23.5, 165e12, 82e12),
    Gpu("L40S 48 GB", 44.4, 362e12, 91e12),
    Gpu("A100 80 GB", 79.2, 312e12, 19.5e12),
    Gpu("H100 80 GB", 79.1, 989e12, 67e12),
    Gpu("H200 141 GB", 139.8, 989e12, 67e12),
)

# What is said of networks for images.
UNCOUNTED = "activations not counted"


@dataclass(frozen=True)
class StageNeeds:
    """A stage, its optimizer steps, and what one device works on in it."""

    stage: Stage
    config: DefenseConfig
    steps: int
    load: Load
    memory: Memory
    flops: float

    @property
    def counted(self) -> bool:
        """Whether activations and operations are: those of language models."""
        return self.load.model.hidden > 0


def describe_run(recipe: Recipe, engine: Engine | None = None) -> str:
    """Stages, rows, steps, memory and time of a recipe, as text. Loads configuration, tokenizer and data, never weights.

    Args:
        recipe ([`Recipe`]): What to run.
        engine ([`~hf_backdoor.estimate.Engine`], *optional*): What to run it with: by default what this process was launched
            with.

    Raises:
        `ValueError`: in one line, for what the run itself would refuse before it trains.
    """
    check_machine(recipe)
    stages = plan(recipe)
    refuse_to_clear(recipe, written(recipe, stages))
    processor = load_processor(recipe.model_name_or_path, recipe.task_class, revision=recipe.model_revision)
    rows = prepare_rows(recipe, processor)
    check_heads(recipe, rows.task)
    models = Models(recipe, getattr(rows.task, "num_labels", None))
    shape = shape_of(models.suspect)
    trained = f"{models.adapter_size(models.suspect) / 1e6:.1f}M" if recipe.use_peft else "all"
    lines = [
        f"model    {recipe.model_name_or_path}",
        f"         {shape.parameters / 1e6:.1f}M parameters, {trained} trained in the defense, weights in {recipe.dtype}"
        + (f", {recipe.quantization} under adapters" if recipe.quantization else ""),
        f"task     {recipe.task}"
        + (f", attack {recipe.attack_trigger!r} -> {recipe.target!r}" if recipe.trigger else ""),
        *(f"rows     {name}: {entry['rows']}" for name, entry in rows.sources.items()),
    ]
    refuse_unread(rows, stages, models, processor)
    needs: dict[str, StageNeeds] = {}
    for stage in stages:
        config = training_config(stage, recipe, stage_arguments(stage, recipe))
        engine = engine or engine_of(config)
        check_launch([stage], engine.kind == "zero3")
        found = stage_needs(stage, config, engine, models, rows, processor, needs.get(stage.as_long_as))
        refuse_quantized(found.load.quantization, engine)
        needs[stage.folder] = found
        lines += describe_stage(found)
    if needs:
        lines += [f"engine   {describe_engine(engine)}", *describe_devices(list(needs.values()), engine)]
        lines.append(describe_disk(list(needs.values()), models))
    return "\n".join(lines)


def describe_stage(needs: StageNeeds) -> list[str]:
    stage, config, load = needs.stage, needs.config, needs.load
    parts = {
        "weights": needs.memory.weights,
        "gradients": needs.memory.gradients,
        "optimizer": needs.memory.optimizer,
        "teacher": needs.memory.teacher,
        "activations": needs.memory.activations + needs.memory.at_work,
        "queries, keys and states to distil": needs.memory.distillation,
        "logits": needs.memory.logits,
        "buffers of the engine": needs.memory.engine,
    }
    shown = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    host = f", and {gib(needs.memory.host)} GiB of the host's" if needs.memory.host else ""
    long = f" x {load.tokens} tokens" if needs.counted else ""
    rest = f", {needs.flops:.1e} FLOP" if needs.counted else f", {UNCOUNTED}"
    return [
        f"stage    {stage.folder}: {stage.step.trainer.__name__} from {stage.parent}, {needs.steps} steps of "
        f"{config.per_device_train_batch_size} rows{long}, learning rate {config.learning_rate:g}",
        f"         {gib(needs.memory.peak)} GiB a device{host} ({shown}){rest}",
    ]


def describe_engine(engine: Engine) -> str:
    sharded = {"fsdp2": "weights, gradients and optimizer sharded", "zero2": "gradients and optimizer sharded"}
    what = sharded.get(engine.kind.replace("zero3", "fsdp2"), "nothing sharded")
    number = f"{engine.processes} process{'es' * (engine.processes > 1)}"
    return f"{engine.kind}, {number}, {what}{', in host memory' if engine.offload else ''}"


def describe_devices(needs: list[StageNeeds], engine: Engine) -> list[str]:
    """Whether the device at hand is large enough, and minutes on usual ones."""
    largest = max(needs, key=lambda each: each.memory.peak)
    name, available = device_at_hand()
    peak = f"{largest.stage.folder} takes {gib(largest.memory.peak)} GiB a device"
    if largest.memory.peak <= USABLE * available:
        lines = [f"device   {name}, {gib(available)} GiB: enough ({peak})"]
    else:
        lines = [
            f"device   {name}, {gib(available)} GiB: NOT ENOUGH, {peak}: lower per_device_train_batch_size or max_length, set "
            "activation_checkpointing, use_peft or quantization, or shard it (--accelerate_config)"
        ]
    if not largest.counted:
        return [f"{lines[0]}; {UNCOUNTED}"]
    times = []
    for gpu in GPUS:
        seconds = sum(training_seconds(each, engine, gpu) for each in needs)
        room = largest.memory.peak <= USABLE * gpu.memory * 2**30
        times.append(f"{gpu.name} {duration(seconds) if room else 'too small'}")
    share = f"{ASSUMED_UTILISATION:.0%} of the peak rate or as fast as the host launches"
    number = f"{engine.processes} x " if engine.processes > 1 else ""
    return [
        *lines,
        f"training {number}{', '.join(times)} (estimated, at {share}; measuring the models, and what is read off them, comes on top)",
    ]


def describe_disk(needs: list[StageNeeds], models: Models) -> str:
    """What a run leaves: the whole model of each stage, adapters merged in. Checkpoints come and go on top."""
    recipe = models.recipe
    left = [each.load.model for each in needs if each.stage.step.makes_model]
    if base_model_name(recipe) == "base":
        left.append(shape_of(models.suspect))
    if recipe.student_layers is not None:
        left.append(shape_of(models.student))
    folder = Path(recipe.output_dir)
    size = sum(model.parameters for model in left) * (4 if recipe.dtype == "float32" else 2)
    there = sum(file.stat().st_size for file in folder.rglob("model*.safetensors") if "checkpoints" not in file.parts)
    around = folder.resolve()
    free = shutil.disk_usage(next(each for each in (around, *around.parents) if each.exists())).free
    enough = size - there <= USABLE * free
    verdict = "enough" if enough else "NOT ENOUGH, leave out controls or name another output_dir"
    return f"disk     {len(left)} models, {gib(size)} GiB, of {gib(there + free)} for {folder}: {verdict}"


def training_seconds(needs: StageNeeds, engine: Engine, gpu: Gpu) -> float:
    """Seconds that a stage trains, every device at the assumed share of its peak rate, or as fast as its host launches."""
    load = needs.load
    rate = gpu.bf16 if load.bf16 or load.dtype == 2 else gpu.float32
    blocks = load.networks * load.model.layers + sum(teacher.layers for teacher in load.teachers) / 3
    launching = needs.steps * load.accumulation * blocks * LAUNCH_SECONDS[load.trains]
    return max(needs.flops / (engine.processes * ASSUMED_UTILISATION * rate), launching)


def device_at_hand() -> tuple[str, float]:
    """Name and bytes of the GPU, or of this machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return "this machine's CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 / 20 else f"{size / 2**30:.2g}"


def duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return "under 1 min"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


# ---- Engines ----


def engine_of(config: TrainingArguments) -> Engine:
    """The engine that this process was launched with, found as `Trainer` finds it."""
    processes = config.world_size
    plugin = getattr(config, "deepspeed_plugin", None)
    if plugin is not None:
        return deepspeed_engine(plugin.deepspeed_config, processes)
    if config.fsdp or asked_for("FSDP"):
        return Engine("fsdp2", processes)
    return Engine("ddp" if processes > 1 else "single", processes)


def engine_of_settings(values: dict[str, Any]) -> Engine:
    """The engine of an accelerate configuration's content, without launching it."""
    processes = int(values.get("num_processes", 1))
    if values["distributed_type"] == "DEEPSPEED":
        zero: dict[str, Any] = values.get("deepspeed_config") or {}
        if "deepspeed_config_file" in zero:
            return deepspeed_engine(HfDeepSpeedConfig(zero["deepspeed_config_file"]).config, processes)
        return zero_engine(zero.get("zero_stage", 2), processes, zero.get("offload_optimizer_device", "none"))
    if values["distributed_type"] == "FSDP":
        return Engine("fsdp2", processes)
    return Engine("ddp" if processes > 1 else "single", processes)


def deepspeed_engine(config: dict[str, Any], processes: int) -> Engine:
    """The engine of a configuration of DeepSpeed's own."""
    zero = config.get("zero_optimization", {})
    return zero_engine(zero.get("stage", 2), processes, zero.get("offload_optimizer", {}).get("device", "none"))


def zero_engine(stage: int | str, processes: int, offload_device: str | None) -> Engine:
    return Engine("zero3" if int(stage) == 3 else "zero2", processes, offload_device not in (None, "none"))


def refuse_quantized(quantization: str | None, engine: Engine) -> None:
    """
    Raises:
        `ValueError`: if quantized weights would be divided among processes.
    """
    if quantization is not None and engine.kind in ("fsdp2", "zero3"):
        refuse_divided(quantization)


# ---- What a stage works on ----


def refuse_unread(rows: RunRows, stages: list[Stage], models: Models, processor: Processor) -> None:
    """
    Raises:
        `ValueError`: if a row that is held out, or measured on, is longer than a model has positions for.
    """
    known = [learned_positions(model) for model in (models.suspect, models.student)]
    positions = min((each for each in known if each is not None), default=None)
    if positions is None:
        return
    generates, test = isinstance(rows.task, InstructionFollowing), rows.test
    # Nothing is evaluated on held-out rows where no stage trains on clean ones.
    held_out = [rows.splits.held_out] if any(stage.rows == "clean" for stage in stages) else []
    for part in (*held_out, *([test.clean] if generates else [])):
        check_lengths(rows.task.encode_rows(part, processor, num_proc_of(models.recipe)), positions)
    for part in (test.clean, *test.triggered.values()):
        longest = max((len(row["input_ids"]) for row in rows.task.questions(part, processor)), default=0)
        refuse_longer(longest + (models.recipe.max_new_tokens if generates else 0), positions)


def stage_needs(
    stage: Stage,
    config: DefenseConfig,
    engine: Engine,
    models: Models,
    rows: RunRows,
    processor: Processor,
    twin: StageNeeds | None = None,
) -> StageNeeds:
    """What a stage takes of each device, and in all; `twin` is the stage whose optimizer steps it matches."""
    dataset = rows.of(stage.rows)
    encoded = rows.task.encode_rows(dataset, processor, num_proc_of(models.recipe))
    lengths = row_lengths(encoded) if "input_ids" in encoded.column_names else [0]
    longest = max(lengths)
    # It cuts what is longer than the tokenizer says; distillation without soft triggers does not.
    cuts = stage.step.trainer is MBTSADTrainer and (config.stages == ["retrain"] or config.soft_triggers)
    if not (cuts and longest > processor.model_max_length):
        refuse_longer(longest, learned_positions(models.trained_in(stage)))
    answer = 1
    if "prompt_length" in encoded.column_names:
        pairs = zip(lengths, encoded["prompt_length"], strict=True)
        answer += max(length - prompt for length, prompt in pairs)
    load = stage_load(stage, config, models, longest, answer)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * engine.processes
    steps = math.ceil(math.ceil(len(dataset) * config.rows_factor / batch) * config.num_train_epochs)
    if config.max_steps > 0:
        steps = config.max_steps
    if twin is not None:
        steps = twin.steps
    if issubclass(stage.step.trainer, SuspectReader):
        steps = 0
    once = flops(load, sum(lengths) / len(lengths))
    total = steps * config.gradient_accumulation_steps * engine.processes * once
    return StageNeeds(stage, config, steps, load, memory(load, engine), total)


def stage_load(stage: Stage, config: DefenseConfig, models: Models, tokens: int, answer: int) -> Load:
    """What one device works on in a stage: whose weights, what is trained of them, what is kept beside."""
    recipe, trainer = models.recipe, stage.step.trainer
    adapter = recipe.use_peft and stage.settings not in ("reference", "suspect")
    model = models.trained_in(stage)
    shape, teacher = shape_of(model), shape_of(models.suspect)
    mask = issubclass(trainer, FeatureMaskTrainer | EmbeddingPoisoningTrainer | SuspectReader)
    connectors = NUM_LAYERS * (shape.hidden + 3) * teacher.hidden
    compares = trainer is MBTSADTrainer and config.stages == ["distil"]

    def compared(layers: list[int] | None, weight: float) -> int:
        return (shape.layers if layers is None else len(layers)) if weight else 0

    return Load(
        model=shape,
        rows=config.per_device_train_batch_size,
        tokens=tokens,
        answer=answer,
        trains="mask" if mask else "adapter" if adapter else "weights",
        adapter=models.adapter_size(model) if adapter and not mask else 0,
        beside=connectors if trainer is RobustKDTrainer and config.feature_weight else 0,
        networks=2 if "target_model" in stage.inputs else 1,
        teachers=(teacher,) * sum(name in stage.inputs for name in ("teacher_model", "poisoned_model")),
        dtype=4 if recipe.dtype == "float32" else 2,
        quantization=recipe.quantization if adapter and not mask else None,
        bf16=bool(config.bf16 or config.fp16),
        checkpointing=config.activation_checkpointing and not mask,
        accumulation=config.gradient_accumulation_steps,
        optimizer=str(getattr(config.optim, "value", config.optim)),
        attention=recipe.attn_implementation or "sdpa",
        liger=config.use_liger_kernel,
        compared_attention=compared(config.attention_layers, config.attention_weight) if compares else 0,
        compared_hidden=compared(config.hidden_layers, config.hidden_weight) if compares else 0,
        # The gradient of a mask comes down to the lowest of the layers that are compared.
        depth=1 - 1 / NUM_LAYERS if trainer is FeatureMaskTrainer else 1.0,
    )
