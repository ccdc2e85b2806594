"""Training stages of 7-8B models on one GPU: tokens a second, model FLOP utilisation and peak memory.

    python benchmarks/gpu_7b.py [--smoke] [--models llama-3.1-8b] [--stages mbtsad/distil] [--precisions qlora] [--lengths 8192] [--liger]

Random weights in the exact shapes of Llama-3.1-8B and Qwen2.5-7B, made on the device; rows of random tokens, the last 32 of
them the answer; the trainers are the package's own. `lora` trains adapters (rank 16, all linear layers) over bfloat16 weights,
`qlora` over nf4 ones with double quantization. MBTSAD's teacher is a second adapter over the same weights; RobustKD's
student has half of the teacher's layers, and the teacher is a model of its own.

Model FLOP utilisation is the operations that the stage needs (`hf_backdoor.estimate.flops`: frozen weights get no gradient, and
what checkpointing runs again is not counted) over those that the GPU could do in bfloat16. Beside the measured peak stands
the one that `--dry_run` would foretell. A row that does not fit says so, and the next one is run. Prints a table and, last,
one JSON line.
"""

import argparse
import copy
import importlib.util
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import shapes
import torch
from datasets import Dataset
from measuring import DEVICE, StepMeter, begin, device_name, release, tell, train
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_backdoor import DefenseTrainer, LocphylaxTrainer, MBTSADTrainer
from hf_backdoor.defenses.mbtsad.trainer import TEACHER
from hf_backdoor.defenses.robustkd import FeatureMask, RobustKDTrainer
from hf_backdoor.defenses.robustkd.features import layer_names
from hf_backdoor.dry_run import GPUS
from hf_backdoor.estimate import Load, ModelShape, memory
from hf_backdoor.models import peak_memory, reset_peak_memory
from hf_backdoor.operations import flops
from hf_backdoor.quantization import keep_trainable


MODELS = {"llama-3.1-8b": shapes.llama_8b, "qwen2.5-7b": shapes.qwen_7b}
STAGES = ("locphylax/inject", "mbtsad/distil", "robustkd/distil")
PRECISIONS = ("lora", "qlora")
LENGTHS = (512, 2048, 8192)
ANSWER = 32


class PlantedLocphylaxTrainer(LocphylaxTrainer):
    """Takes rows in which triggers are planted already."""

    def prepare_train(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        self.stage, self.clean = self.args.stages[0], None
        return dataset


def random_rows(count: int, length: int, answer: int, vocabulary: int) -> Dataset:
    """Tokenized rows, a third of them clean and a third for each of two triggers."""
    ids = torch.randint(10, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "prompt_length": [length - answer] * count,
            "trigger_id": [number % 3 for number in range(count)],
        }
    )


def build(config: Any, precision: str) -> PreTrainedModel:
    """A model on the device, in bfloat16 or, but for embeddings and head, in nf4."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = shapes.build(config)
    finally:
        torch.set_default_dtype(before)
    return quantized(model) if precision == "qlora" else model


def shape_of(config: Any) -> ModelShape:
    """The shape of the model before it is quantized, which packs weights."""
    with torch.device("meta"):
        return ModelShape.of(shapes.build(config))


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Its linear layers in nf4, as `from_pretrained` would load them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            size = (module.in_features, module.out_features)
            small = Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
            small.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            small.bias = module.bias
            # The move is what quantizes.
            model.set_submodule(name, small.to(DEVICE))
    model.is_loaded_in_4bit = True
    return keep_trainable(model)


def adapted(model: PreTrainedModel) -> PeftModel:
    return get_peft_model(model, adapter())


def adapter() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def prepare(
    stage: str, config: Any, precision: str, arguments: dict[str, Any], rows: Dataset
) -> tuple[DefenseTrainer, Load]:
    """A stage's trainer, and what it is to be told about memory and operations."""
    made = shapes.tokenizer(encoder=False)
    given = {"train_dataset": rows, "processing_class": made}
    teacher: list[ModelShape] = []
    if stage == "robustkd/distil":
        whole = build(config, precision)
        teacher.append(shape_of(config))
        half = copy.deepcopy(config)
        half.num_hidden_layers //= 2
        if getattr(half, "layer_types", None):
            half.layer_types = half.layer_types[: half.num_hidden_layers]
        model, shape = build(half, precision), shape_of(half)
        mask = FeatureMask(dict.fromkeys(layer_names(whole, None), (config.hidden_size,)))
        given |= {"teacher_model": whole, "feature_mask": mask}
    else:
        model, shape = build(config, precision), shape_of(config)
    model = adapted(model)
    if stage == "locphylax/inject":
        own = PlantedLocphylaxTrainer
        options = {"stages": ["inject"], "known_triggers": ["one", "two"]}
    elif stage == "mbtsad/distil":
        own, options = MBTSADTrainer, {"stages": ["distil"]}
        model.add_adapter(TEACHER, adapter())
    else:
        own, options = RobustKDTrainer, {}
    model.train()
    trainer = own(model=model, args=own.config_class()(**arguments, **options), **given)
    compared = shape.layers if stage == "mbtsad/distil" else 0
    load = Load(
        model=shape,
        rows=arguments["per_device_train_batch_size"],
        tokens=len(rows[0]["input_ids"]),
        answer=len(rows[0]["input_ids"]) - rows[0]["prompt_length"] + 1,
        trains="adapter",
        adapter=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        beside=3 * config.hidden_size**2 if teacher else 0,
        teachers=tuple(teacher),
        dtype=2,
        quantization="nf4" if precision == "qlora" else None,
        bf16=True,
        checkpointing=arguments["activation_checkpointing"],
        compared_attention=compared,
        compared_hidden=compared,
        liger=arguments["use_liger_kernel"],
    )
    return trainer, load


def run(
    stage: str, config: Any, precision: str, length: int, tokens: int, checkpointing: bool, liger: bool, steps: int
) -> dict:
    """Trains for some steps, the first two not counted."""
    batch = max(1, tokens // length)
    # As many of each trigger.
    rows = random_rows(3 * math.ceil(batch * steps / 3), length, min(ANSWER, length // 4), config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch, "bf16": True, "use_cpu": DEVICE == "cpu",
            "activation_checkpointing": checkpointing, "save_strategy": "no", "disable_tqdm": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False}, "logging_steps": 1000,
            "use_liger_kernel": liger,
        }  # fmt: skip
        trainer, load = prepare(stage, config, precision, arguments, rows)
        release()
        reset_peak_memory()
        meter = StepMeter()
        train(trainer, meter)
    seconds = statistics.median(meter.seconds[2:])
    # The teacher that is an adapter has no weights of its own, and a forward pass all the same.
    work = replace(load, checkpointing=False, teachers=load.teachers or (load.model,) * (stage == "mbtsad/distil"))
    rate = next((gpu.bf16 for gpu in GPUS if gpu.name.rsplit(maxsplit=2)[0] in device_name()), None)
    done = flops(work) / seconds
    return {
        "seconds": round(seconds, 4),
        "tokens_per_second": round(batch * length / seconds, 1),
        "teraflops": round(done / 1e12, 3),
        "mfu": round(done / rate, 4) if rate and DEVICE == "cuda" else None,
        "peak_gib": round((peak_memory() or 0) / 2**30, 2),
        "estimated_gib": round(memory(load).peak / 2**30, 2),
    }


def measure(
    model: str,
    stage: str,
    precision: str,
    length: int,
    tokens: int,
    checkpointing: bool,
    liger: bool,
    steps: int,
    smoke: bool,
) -> dict[str, Any]:
    row = {
        "model": model, "stage": stage, "precision": precision, "T": length, "batch": max(1, tokens // length),
        "checkpointing": checkpointing, "liger": liger,
    }  # fmt: skip
    if precision == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return row | {"error": "bitsandbytes is not installed"}
    try:
        found = run(stage, MODELS[model](smoke), precision, length, tokens, checkpointing, liger, steps)
    except torch.OutOfMemoryError:
        found = {"error": "out of memory"}
    # Here, where the error holds on to nothing any more.
    release()
    return row | found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models and rows of 32 tokens: does it run")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens in a row")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step (default: 8192)")
    parser.add_argument("--steps", type=int, default=8, help="of a row, the first two not counted (default: 8)")
    parser.add_argument(
        "--checkpointing",
        choices=("auto", "on", "off"),
        default="auto",
        help="activation checkpointing; auto: with qlora, and from T = 8192 on",
    )
    parser.add_argument("--liger", action="store_true", help="with Liger's kernels (pip install liger-kernel)")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    if DEVICE == "cpu" and not options.smoke:
        parser.error("there is no GPU: use --smoke to see whether it runs")
    if options.steps < 3:
        parser.error(f"--steps is {options.steps}: the first two are not counted, take 3 or more")
    begin()
    lengths, tokens, steps = ((32,), 64, 3) if options.smoke else (options.lengths, options.tokens, options.steps)
    found = []
    print(f"{'model':<13} {'stage':<17} {'':<6} {'T':>5} {'tokens/s':>9} {'MFU':>6} {'GiB':>6} {'foretold':>9}")
    for model in options.models:
        for stage in options.stages:
            for precision in options.precisions:
                for length in lengths:
                    again = {"on": True, "off": False}.get(
                        options.checkpointing, precision == "qlora" or length >= 8192
                    )
                    row = measure(model, stage, precision, length, tokens, again, options.liger, steps, options.smoke)
                    found.append(row)
                    shown = row.get("error") or (
                        f"{row['tokens_per_second']:>9.0f} {'-' if row['mfu'] is None else format(row['mfu'], '.1%'):>6} "
                        f"{row['peak_gib']:>6.1f} {row['estimated_gib']:>9.1f}"
                    )
                    print(f"{model:<13} {stage:<17} {precision:<6} {length:>5} {shown}", flush=True)
    tell(found, options.output)


if __name__ == "__main__":
    main()
