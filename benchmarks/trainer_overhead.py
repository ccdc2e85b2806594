"""What every stage of every method costs over stock trainers, as ratios of step time and peak memory on the same batches.

    python benchmarks/trainer_overhead.py [--smoke] [--words 30] [--output benchmarks/results/trainer_overhead.json]

Baselines: `trainer` (stock `Trainer` on the network that the stage trains), for causal LMs `sft` (trl's `SFTTrainer`), and
for RobustKD's distillation `vanilla` (the same without a mask). Blocks of steps of ours and of the baselines take turns
in one process; a step's time is the median over all blocks. Rows have one length, so that all batches hold the same
tokens however they are drawn.

Memory: `memory_ratio` of all that a run holds at the peak of a step (weights, gradients, optimizer states, activations,
further models), `step_memory_ratio` of what a step takes beyond what is held between steps (gradients, activations,
logits). On the CPU both are the resident set's growth, see `measuring.py`.

`pipelines.py` adds the two rows about whole runs: NT-ML's pipeline over plain training, and mask fitting's share of
RobustKD's distillation. Prints a table and, last, one JSON line.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import shapes
import torch
from datasets import Dataset
from measuring import DEVICE, StepMeter, begin, held_memory, release, tell, tight_allocations, train
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_backdoor import DefenseTrainer, LocphylaxTrainer, MBTSADTrainer
from hf_backdoor.data import DefenseCollator
from hf_backdoor.defenses.ntml import NonTargetTrainer, NTMLTrainer
from hf_backdoor.defenses.ntml.trainer import TEACHER_LOGITS
from hf_backdoor.defenses.robustkd import FeatureMask, FeatureMaskTrainer, RobustKDTrainer, student_from_layers
from hf_backdoor.defenses.robustkd.features import layer_names


# Before trl is imported: a benchmark calls nobody.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

BATCH = 15
# Triggers of one word each, so that every planted row has the same length but the clean ones.
KNOWN = {"known_triggers": ["one", "two"]}
STAGES: dict[str, tuple[type[DefenseTrainer], dict[str, Any]]] = {
    "fine_tuning": (DefenseTrainer, {}),
    "locphylax/inject": (LocphylaxTrainer, {"stages": ["inject"], **KNOWN}),
    "locphylax/recover": (LocphylaxTrainer, {"stages": ["recover"], **KNOWN}),
    # Nothing is split, since split rows would be longer than the others.
    "mbtsad/retrain": (MBTSADTrainer, {"stages": ["retrain"], "split_rate": 0.0}),
    "mbtsad/distil": (MBTSADTrainer, {"stages": ["distil"]}),
    "robustkd/mask": (FeatureMaskTrainer, {}),
    "robustkd/distil": (RobustKDTrainer, {}),
    "ntml/non_target": (NonTargetTrainer, {}),
    "ntml/mutual": (NTMLTrainer, {}),
}
WHOLE_RUNS = {"ntml/pipeline": pipelines.ntml, "robustkd/mask_share": pipelines.mask_share}


class StockCollator(DefenseCollator):
    """The same batch as plain `Trainer` wants it: labels over the whole sequence, no side columns."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        if batch["labels"].dim() == 2:
            labels = torch.full_like(batch["input_ids"], -100)
            labels[:, -batch["labels"].shape[1] :] = batch["labels"]
            batch["labels"] = labels
        return {name: batch[name] for name in batch if name not in ("trigger_id", "readout_position")}


def networks(stage: str, kind: str, smoke: bool, folder: str) -> dict[str, Any]:
    """What a stage trains, and its further models; a teacher lies in a folder, as runs leave it."""
    model = shapes.small_model(kind, smoke)
    if stage.endswith("/distil"):
        model.save_pretrained(f"{folder}/teacher")
    if stage == "mbtsad/distil":
        return {"model": model, "teacher_model": f"{folder}/teacher"}
    if stage == "ntml/mutual":
        return {"model": model, "target_model": shapes.small_model(kind, smoke)}
    if stage == "robustkd/distil":
        mask = FeatureMask(dict.fromkeys(layer_names(model, None), (model.config.hidden_size,)))
        student = student_from_layers(model, model.config.num_hidden_layers // 2).train()
        return {"model": student, "teacher_model": f"{folder}/teacher", "feature_mask": mask}
    return {"model": model}


def ours(stage: str, kind: str, words: int, smoke: bool, arguments: dict[str, Any]) -> DefenseTrainer:
    trainer, own = STAGES[stage]
    config = trainer.config_class()(**arguments, **own)
    rows = shapes.rows(BATCH * config.max_steps // config.rows_factor, words)
    if stage == "ntml/non_target":
        # The soft labels are made once, before the first step: `ntml/pipeline` counts them.
        rows = rows.add_column(TEACHER_LOGITS, torch.randn(len(rows), len(shapes.LABELS)).tolist())
    made = shapes.tokenizer(kind == "encoder")
    return trainer(
        args=config,
        train_dataset=rows,
        processing_class=made,
        task=shapes.task(kind),
        **networks(stage, kind, smoke, arguments["output_dir"]),
    )


def plain_network(trainer: DefenseTrainer) -> PreTrainedModel:
    """The network that plain training would train in the stage's place."""
    if isinstance(trainer, NTMLTrainer):
        return trainer.pair.network("non_target")
    if isinstance(trainer, FeatureMaskTrainer):
        return trainer.teacher.requires_grad_(True)
    return trainer.model


def stock(trainer: DefenseTrainer, arguments: dict[str, Any]) -> Trainer:
    """Plain `Trainer`, with the rows of ours and nothing else of it."""
    return Trainer(
        model=plain_network(trainer),
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=trainer.train_dataset,
        data_collator=StockCollator(trainer.processing_class),
    )


def sft(trainer: DefenseTrainer, arguments: dict[str, Any]) -> Trainer:
    """trl's `SFTTrainer`, which learns the answer's tokens alone as ours do."""
    from trl import SFTConfig, SFTTrainer

    def labelled(row: dict[str, Any]) -> dict[str, Any]:
        start = row["prompt_length"]
        return {"input_ids": row["input_ids"], "labels": [-100] * start + row["input_ids"][start:]}

    rows: Dataset = trainer.train_dataset
    # Its defaults would run blocks twice, and in bfloat16.
    config = SFTConfig(**{"bf16": False} | arguments, gradient_checkpointing=False, max_length=None)
    return SFTTrainer(
        model=plain_network(trainer),
        args=config,
        train_dataset=rows.map(labelled, remove_columns=rows.column_names, keep_in_memory=True),
        processing_class=trainer.processing_class,
    )


def vanilla(trainer: RobustKDTrainer, arguments: dict[str, Any]) -> Trainer:
    """Distillation without a mask, from the same layers."""
    trainer.args.teacher_feature_layers = trainer.teacher_feature_layers
    del trainer.mask
    trainer.feature_mask = None
    return trainer


BASELINES: dict[str, Callable[[Any, dict[str, Any]], Trainer]] = {"trainer": stock, "sft": sft, "vanilla": vanilla}


def baselines(stage: str, kind: str) -> list[str]:
    own = ["vanilla"] if stage == "robustkd/distil" else []
    return ["trainer", *(["sft"] if kind == "causal_lm" else []), *own]


def block(
    stage: str, kind: str, baseline: str | None, steps: int, words: int, smoke: bool, memory: bool, bf16: bool
) -> tuple[list[float], int, int]:
    """Trains a fresh model for a few steps: seconds of each but the first two, and (if asked for) peak and step memory."""
    release()
    before = held_memory()
    meter = StepMeter(memory)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": BATCH, "save_strategy": "no",
            "use_cpu": DEVICE == "cpu", "disable_tqdm": True, "logging_steps": 1000, "bf16": bf16,
        }  # fmt: skip
        trainer = ours(stage, kind, words, smoke, arguments)
        if baseline is not None:
            trainer = BASELINES[baseline](trainer, arguments)
        # What was made on the way (a further model, say) is no part of plain training.
        release()
        train(trainer, meter)
    return meter.seconds[2:], meter.peak - before, meter.step_memory


def flop_ratio(smoke: bool, kind: str, words: int) -> float:
    """RobustKD's distillation over training its student: (student's three passes + teacher's one) / student's three."""
    teacher = shapes.small_model(kind, smoke)
    made = shapes.tokenizer(kind == "encoder")
    rows = shapes.task(kind).encode_rows(shapes.rows(BATCH, words), made)
    batch = DefenseCollator(made)(list(rows))

    def flops(model: nn.Module, learns: bool) -> int:
        trainer = DefenseTrainer(model=model, processing_class=made, args=DefenseTrainer.config_class()("-"))
        model.train(learns)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learns):
            logits = trainer.forward(model, trainer._prepare_inputs(batch)).logits
            if learns:
                logits.sum().backward()
        return counter.get_total_flops()

    student = flops(student_from_layers(teacher, teacher.config.num_hidden_layers // 2), learns=True)
    return 1 + flops(teacher, learns=False) / student


def memories(stage: str, kind: str, words: int, smoke: bool, bf16: bool) -> dict[str | None, tuple[int, int]]:
    """Peak and step memory of ours and of the baselines."""
    return {
        side: block(stage, kind, side, 3, words, smoke, True, bf16)[1:] for side in (None, *baselines(stage, kind))
    }


def measure(
    stage: str,
    kind: str,
    steps: int,
    rounds: int,
    words: int,
    smoke: bool,
    bf16: bool,
    memory: dict[str | None, tuple[int, int]],
) -> list[dict[str, Any]]:
    """A row for each baseline."""
    seconds: dict[str | None, list[float]] = {side: [] for side in memory}
    for turn in range(rounds):
        # In turns, in an order that turns as well.
        for side in list(memory)[:: -1 if turn % 2 else 1]:
            seconds[side] += block(stage, kind, side, steps, words, smoke, False, bf16)[0]
    step = {side: statistics.median(values) for side, values in seconds.items()}
    always = {"bf16": True} if bf16 else {}
    more = {"flop_ratio": round(flop_ratio(smoke, kind, words), 3)} if stage == "robustkd/distil" else {}
    return [
        {
            "stage": stage,
            "model": kind,
            "baseline": side,
            "words": words,
            **always,
            "time_ratio": round(step[None] / step[side], 3),
            "memory_ratio": round(memory[None][0] / memory[side][0], 3),
            "step_memory_ratio": round(memory[None][1] / memory[side][1], 3),
            "seconds": round(step[None], 4),
            "baseline_seconds": round(step[side], 4),
            "megabytes": [round(bytes_ / 2**20) for bytes_ in memory[None]],
            "baseline_megabytes": [round(bytes_ / 2**20) for bytes_ in memory[side]],
            **(more if side == "trainer" else {}),
        }
        for side in baselines(stage, kind)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models and few steps: does it run")
    parser.add_argument("--words", type=int, default=30, help="words in a row (default: 30)")
    parser.add_argument("--bf16", action="store_true", help="under autocast, as most recipes train")
    parser.add_argument("--stages", nargs="+", default=[*STAGES, *WHOLE_RUNS], choices=[*STAGES, *WHOLE_RUNS])
    parser.add_argument("--models", nargs="+", default=["encoder", "causal_lm"], choices=["encoder", "causal_lm"])
    parser.add_argument("--steps", type=int, default=6, help="steps of a block, the first two not counted")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each (default: 3)")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    begin()
    steps, rounds = (3, 1) if options.smoke else (options.steps, options.rounds)
    found, memory = [], {}
    # All of it first: what training leaves in malloc's hands would count as used.
    with tight_allocations():
        for kind in options.models:
            # What is loaded on first use is no part of a stage.
            last = baselines("fine_tuning", kind)[-1]
            block("fine_tuning", kind, last, 3, options.words, options.smoke, True, options.bf16)
            for stage in options.stages:
                if stage in STAGES:
                    memory[kind, stage] = memories(stage, kind, options.words, options.smoke, options.bf16)
    print(f"{'model':<10} {'stage':<20} {'baseline':<9} {'time':>6} {'memory':>7} {'a step`s':>9}   (ours / baseline)")
    for kind in options.models:
        for stage in options.stages:
            whole = WHOLE_RUNS.get(stage)
            if whole is not None:
                made = whole(kind, options.words, options.smoke)
            else:
                size = (options.words, options.smoke, options.bf16)
                made = measure(stage, kind, steps, rounds, *size, memory[kind, stage])
            found += made
            for row in made:
                ratios = [row.get(name) for name in ("time_ratio", "memory_ratio", "step_memory_ratio")]
                shown = " ".join(f"{'-' if ratio is None else format(ratio, '.2f'):>7}" for ratio in ratios)
                print(f"{kind:<10} {row['stage']:<20} {row['baseline']:<9} {shown}", flush=True)
    tell(found, options.output)


if __name__ == "__main__":
    main()
