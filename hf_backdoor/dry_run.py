"""What a run would do and need, without loading any weights."""

import math

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from .data import SequenceClassification
from .defenses import DefenseConfig
from .models import load_tokenizer, resolve
from .plan import Stage, plan, stage_arguments, training_config
from .recipe import Recipe
from .rows import RunRows, prepare_rows


# AdamW in float32: weights, gradients and two moments.
BYTES_PER_TRAINED_PARAMETER = 16
# Values that a transformer layer keeps for the backward pass, in multiples of the hidden size for each token: the
# usual count for a layer with a gated or plain MLP of 4 times the width and fused attention.
ACTIVATIONS_PER_LAYER = 34


def describe_run(recipe: Recipe) -> str:
    """Stages, rows, steps and memory of a recipe, as text. Loads configuration, tokenizer and data, never weights.

    Raises:
        `ValueError`: in one line, for whatever the run itself would refuse.
    """
    tokenizer = load_tokenizer(recipe.model_name_or_path, revision=recipe.model_revision)
    rows = prepare_rows(recipe, tokenizer)
    trained, total, layers, hidden = model_size(recipe, rows)
    lines = [
        f"model    {recipe.model_name_or_path}",
        f"         {total / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained in the defense, weights in {recipe.dtype}",
        f"task     {recipe.task}"
        + (f", attack {recipe.attack_trigger!r} -> {recipe.target!r}" if recipe.trigger else ""),
        *(f"rows     {name}: {entry['rows']}" for name, entry in rows.sources.items()),
    ]
    for stage in plan(recipe):
        config = training_config(stage, recipe, stage_arguments(stage, recipe))
        steps, width = stage_size(stage, config, rows, tokenizer)
        parameters = total if stage.settings in ("reference", "suspect") else trained
        memory = parameters * BYTES_PER_TRAINED_PARAMETER + (total - parameters) * 4 + len(stage.inputs) * total * 4
        activations = layers * hidden * ACTIVATIONS_PER_LAYER * config.per_device_train_batch_size * width
        memory += activations * (2 if config.bf16 or config.fp16 else 4)
        lines.append(
            f"stage    {stage.folder}: {stage.step.trainer.__name__} from {stage.parent}, "
            f"{'as many steps as ' + stage.as_long_as if stage.as_long_as else f'{steps} steps'} of "
            f"{config.per_device_train_batch_size} rows x {width} tokens, learning rate {config.learning_rate:g}, "
            f"about {memory / 2**30:.1f} GiB"
        )
    return "\n".join(lines)


def model_size(recipe: Recipe, rows: RunRows) -> tuple[int, int, int, int]:
    """Trained parameters, all parameters, layers and hidden size, from the configuration alone."""
    folder, gguf = resolve(recipe.model_name_or_path)
    config = AutoConfig.from_pretrained(folder, gguf_file=gguf, revision=recipe.model_revision)
    classifier = recipe.task_class is SequenceClassification
    if classifier:
        config.num_labels = rows.task.num_labels
    with torch.device("meta"):
        model = (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = total
    if recipe.use_peft:
        linear = [
            module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "head" not in name
        ]
        trained = sum(recipe.lora_r * (module.in_features + module.out_features) for module in linear)
    return trained, total, config.num_hidden_layers, config.hidden_size


def stage_size(
    stage: Stage, config: DefenseConfig, rows: RunRows, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Optimizer steps, and tokens in the longest of the first hundred rows."""
    dataset = rows.of(stage.rows)
    sample = rows.task.tokenize(dataset.select(range(min(100, len(dataset)))), tokenizer)
    width = max(len(ids) for ids in sample["input_ids"])
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = math.ceil(len(dataset) * config.rows_factor / batch) * config.num_train_epochs
    return (config.max_steps if config.max_steps > 0 else math.ceil(steps)), width
