"""What our trainers cost over stock `Trainer`, as ratios of step time and peak memory on the same batches.

    python benchmarks/trainer_overhead.py [--smoke] [--words 30] [--output benchmarks/results/trainer_overhead.json]

Blocks of steps alternate between the two, in one process; a step's time is the median over all blocks. Rows have one
length, so that the batches of both hold the same tokens however they are drawn. Prints a table and, last, one JSON line.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_backdoor import (
    DefenseTrainer,
    LocphylaxTrainer,
    MBTSADTrainer,
)
from hf_backdoor.data import DefenseCollator, LabelWords, SequenceClassification
from hf_backdoor.models import peak_memory, reset_peak_memory, versions


# Triggers of one word each, so that every planted row has the same length but the clean ones.
KNOWN = {"known_triggers": ["one", "two"]}
STAGES: dict[str, tuple[type[DefenseTrainer], dict[str, Any]]] = {
    "fine_tuning": (DefenseTrainer, {}),
    "locphylax/inject": (LocphylaxTrainer, {"stages": ["inject"], **KNOWN}),
    "locphylax/recover": (LocphylaxTrainer, {"stages": ["recover"], **KNOWN}),
    # Nothing is split, since split rows would be longer than the others.
    "mbtsad/retrain": (MBTSADTrainer, {"stages": ["retrain"], "split_rate": 0.0}),
    "mbtsad/distil": (MBTSADTrainer, {"stages": ["distil"]}),
}


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


class StockCollator(DefenseCollator):
    """The same batch as plain `Trainer` wants it: labels over the whole sequence, no side columns."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        if batch["labels"].dim() == 2:
            labels = torch.full_like(batch["input_ids"], -100)
            labels[:, -batch["labels"].shape[1] :] = batch["labels"]
            batch["labels"] = labels
        return {name: batch[name] for name in batch if name not in ("trigger_id", "readout_position")}


def tokenizer(encoder: bool) -> PreTrainedTokenizerFast:
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "</s>",
        "Review",
        ":",
        "Sentiment",
        "negative",
        "positive",
        "Aha",
    ]
    vocabulary += [f"w{number}" for number in range(200)] + ["Make", "life", "better", "one", "two", "three"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if encoder else {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def build(kind: str, smoke: bool) -> torch.nn.Module:
    """Random weights: MiniLM's shape (encoder), SmolLM2-135M's (causal LM), or tiny ones."""
    torch.manual_seed(0)
    if kind == "encoder":
        width, layers, vocabulary = (32, 2, 400) if smoke else (384, 6, 30522)
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=4 if smoke else 12, num_labels=2,
        )  # fmt: skip
        return BertForSequenceClassification(config)
    width, layers, vocabulary = (32, 2, 400) if smoke else (576, 30, 49152)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=64 if smoke else 1536, num_hidden_layers=layers,
        num_attention_heads=4 if smoke else 9, num_key_value_heads=2 if smoke else 3, tie_word_embeddings=True,
        bos_token_id=4, eos_token_id=4, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(count: int, words: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(200, (count, words), generator=generator).tolist()
    return Dataset.from_list(
        [{"text": " ".join(f"w{w}" for w in line), "label": n % 2} for n, line in enumerate(words)]
    )


def block(kind: str, stage: str, stock: bool, steps: int, words: int, smoke: bool) -> tuple[list[float], int]:
    """Trains a fresh model for a few steps; gives the seconds of each but the first two, and the peak memory."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    model, made = build(kind, smoke), tokenizer(kind == "encoder")
    task = (
        SequenceClassification(2)
        if kind == "encoder"
        else LabelWords(("negative", "positive"), "Review : {text} Sentiment :")
    )
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 15, "save_strategy": "no",
            "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True, "logging_steps": 1000,
        }  # fmt: skip
        ours, own = STAGES[stage]
        config = ours.config_class()(**arguments, **own)
        teacher = {"teacher_model": build(kind, smoke)} if stage == "mbtsad/distil" else {}
        clean = rows(15 * steps // config.rows_factor, words)
        trainer = ours(model=model, args=config, train_dataset=clean, processing_class=made, task=task, **teacher)
        trainer.add_callback(times)
        if stock:
            # Made like ours, so that both have the same rows; the teacher is no part of plain training.
            teacher.clear()
            trainer.teacher_model = None
            trainer = Trainer(
                model=trainer.model,
                args=TrainingArguments(**arguments, remove_unused_columns=False),
                train_dataset=trainer.train_dataset,
                data_collator=StockCollator(made),
                callbacks=[times],
            )
        reset_peak_memory()
        trainer.train()
    return times.seconds[2:], peak_memory()


def measure(kind: str, stage: str, steps: int, rounds: int, words: int, smoke: bool) -> dict[str, Any]:
    seconds: dict[bool, list[float]] = {True: [], False: []}
    memory: dict[bool, list[int]] = {True: [], False: []}
    for _ in range(rounds):
        for stock in (True, False):
            found, peak = block(kind, stage, stock, steps, words, smoke)
            seconds[stock] += found
            memory[stock].append(peak)
    step, peak = ({stock: statistics.median(values[stock]) for stock in values} for values in (seconds, memory))
    return {
        "stage": stage,
        "model": kind,
        "words": words,
        "time_ratio": round(step[False] / step[True], 3),
        "memory_ratio": round(peak[False] / peak[True], 3),
        "seconds": round(step[False], 4),
        "stock_seconds": round(step[True], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models and few steps: does it run")
    parser.add_argument("--words", type=int, default=30, help="words in a row (default: 30)")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--models", nargs="+", default=["encoder", "causal_lm"], choices=["encoder", "causal_lm"])
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    steps, rounds = (4, 1) if options.smoke else (8, 2)
    found = []
    print(f"{'model':<10} {'stage':<20} {'time':>6} {'memory':>7}   (ours / stock)")
    for kind in options.models:
        for stage in options.stages:
            row = measure(kind, stage, steps, rounds, options.words, options.smoke)
            found.append(row)
            print(f"{kind:<10} {row['stage']:<20} {row['time_ratio']:>6.2f} {row['memory_ratio']:>7.2f}", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "rows": found,
        "device": device,
        "machine": platform.machine(),
        "date": str(date.today()),
        "versions": versions(),
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
