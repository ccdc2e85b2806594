"""What attention distillation costs: lean (queries and keys, in blocks) against eager maps, and against fine-tuning.

    python benchmarks/attention_distillation.py [--smoke] [--encoder] [--output benchmarks/results/attention_distillation.json]

One training step is the teacher's forward pass, the student's, the loss and the backward pass, in float32, of models of
6 layers, width 384 and 6 heads, on 2 rows without padding. Three variants: `finetuning` (SDPA, the teacher's forward
pass included, task loss alone), `eager` (both models give their maps) and `lean`.

Time: the three take turns; medians. Memory: the peak of a step, with all that is held at it (models, gradients and
activations), see `measuring.py`. Error: the largest difference of lean from eager in the attention loss and in every
parameter's gradient of it, each over the largest entry of its own.

Prints a table and, last, one JSON line.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import DEVICE, begin, clock, held_memory, release, synchronize, tell, tight_allocations
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_backdoor.defenses.losses import answer_cross_entropy, label_cross_entropy
from hf_backdoor.defenses.mbtsad.attention import attention_map_loss
from hf_backdoor.defenses.mbtsad.losses import eager_attention_map_loss, valid_entries
from hf_backdoor.defenses.mbtsad.recording import record_attention
from hf_backdoor.models import peak_memory, reset_peak_memory


VARIANTS = ("finetuning", "eager", "lean")
BATCH, ANSWER, WEIGHT = 2, 8, 100.0
LENGTHS = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (128, 256, 512, 1024, 2048, 4096, 8192, 16384)}


def build(encoder: bool, length: int, seed: int, smoke: bool) -> PreTrainedModel:
    """Random weights, those of queries and keys large enough for maps that are far from uniform, as trained ones are."""
    torch.manual_seed(seed)
    width, layers = (48, 2) if smoke else (384, 6)
    shape = {
        "vocab_size": 200 if smoke else 32000, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": 6, "max_position_embeddings": length, "pad_token_id": 0,
    }  # fmt: skip
    if encoder:
        config = BertConfig(**shape, intermediate_size=4 * width, num_labels=2)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        model = BertForSequenceClassification(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=8 * width // 3))
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and name.split(".")[-2] in ("query", "key", "q_proj", "k_proj"):
            weight.data *= 3
    return model.to(DEVICE)


def batch(encoder: bool, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 200, (BATCH, length), generator=generator)
    labels = torch.tensor([0, 1]) if encoder else ids[:, -ANSWER:].clone()
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(DEVICE) for name, value in made.items()}


def losses(
    variant: str, student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Task loss and attention loss of each sample."""
    inputs = dict(inputs)
    labels, mask = inputs.pop("labels"), inputs["attention_mask"]
    if labels.dim() == 2:
        # As in training: logits at the answer's positions only.
        inputs["logits_to_keep"] = ANSWER + 1
    for model in (student, teacher):
        model.set_attn_implementation("eager" if variant == "eager" else "sdpa")
    attention = None
    if variant == "finetuning":
        with torch.no_grad():
            teacher(**inputs)
        outputs = student(**inputs)
    elif variant == "lean":
        with torch.no_grad(), record_attention(teacher) as theirs:
            teacher(**inputs)
        with record_attention(student) as mine:
            outputs = student(**inputs)
        attention = attention_map_loss(mine, theirs, mask)
    else:
        with torch.no_grad():
            theirs = teacher(**inputs, output_attentions=True).attentions
        outputs = student(**inputs, output_attentions=True)
        valid = valid_entries(mask, causal=labels.dim() == 2)
        pairs = zip(outputs.attentions, theirs, strict=True)
        attention = sum(eager_attention_map_loss(one, two, valid) for one, two in pairs) / len(theirs)
    task = (label_cross_entropy if labels.dim() == 1 else answer_cross_entropy)(outputs.logits, labels)
    return task, attention


def step(variant: str, student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    task, attention = losses(variant, student, teacher, inputs)
    (task if attention is None else task + WEIGHT * attention).mean().backward()
    student.zero_grad()
    synchronize()


def error(student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    found = {}
    for variant in ("eager", "lean"):
        attention = losses(variant, student, teacher, inputs)[1]
        (WEIGHT * attention).mean().backward()
        grads = {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}
        found[variant] = {"loss": attention.detach(), **{name: grad.clone() for name, grad in grads.items()}}
        student.zero_grad()
    # Softmax does not see a shift of all its scores, so the gradient of keys' biases is rounding alone.
    named = [name for name in found["eager"] if not name.endswith("key.bias") and found["eager"][name].any()]
    return max(
        ((found["lean"][name] - found["eager"][name]).abs().max() / found["eager"][name].abs().max()).item()
        for name in named
    )


def memory(variant: str, encoder: bool, length: int, smoke: bool) -> int | None:
    """Peak of a step, in bytes; nothing if it does not fit."""
    release()
    before = held_memory()
    student, teacher = (build(encoder, length, seed, smoke) for seed in (0, 1))
    teacher.requires_grad_(False)
    inputs = batch(encoder, length)
    reset_peak_memory()
    try:
        for _ in range(2):
            step(variant, student, teacher, inputs)
    except torch.OutOfMemoryError:
        return None
    return peak_memory() - before


def memories(encoder: bool, lengths: Sequence[int], smoke: bool) -> dict[int, dict[str, int | None]]:
    with tight_allocations():
        # What torch and transformers load on first use is no part of a step.
        for variant in VARIANTS:
            memory(variant, encoder, 16, smoke=True)
        return {
            length: {variant: memory(variant, encoder, length, smoke) for variant in VARIANTS} for length in lengths
        }


def measure(encoder: bool, length: int, rounds: int, smoke: bool, peak: dict[str, int | None]) -> dict[str, Any]:
    student, teacher = (build(encoder, length, seed, smoke) for seed in (0, 1))
    teacher.requires_grad_(False)
    inputs = batch(encoder, length)
    # Where eager maps do not fit, nothing is compared with them.
    variants = [variant for variant in VARIANTS if peak[variant] is not None]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(rounds + 1):
        for variant in variants:
            start = clock()
            step(variant, student, teacher, inputs)
            if turn > 0:
                seconds[variant].append(clock() - start)
            release()
    median = {variant: statistics.median(values) for variant, values in seconds.items()}
    fits = "eager" in variants
    return {
        "T": length,
        "model": "encoder" if encoder else "causal_lm",
        "error": error(student, teacher, inputs) if fits else None,
        "time_ratio_to_eager": round(median["lean"] / median["eager"], 3) if fits else None,
        "time_ratio_to_finetuning": round(median["lean"] / median["finetuning"], 3),
        "memory_ratio_to_eager": round(peak["lean"] / peak["eager"], 3) if fits else None,
        "memory_ratio_to_finetuning": round(peak["lean"] / peak["finetuning"], 3),
        "seconds": {variant: round(value, 4) for variant, value in median.items()},
        "megabytes": {variant: round(peak[variant] / 2**20) for variant in variants},
    }


def show(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-".rjust(int(form.split(".")[0]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models and short rows: does it run")
    parser.add_argument(
        "--encoder", action="store_true", help="BERT's shape (every token sees all) in place of Llama's"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens in a row, in place of the standard ones")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant (default: 5)")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    begin()
    lengths = options.lengths or ((48,) if options.smoke else LENGTHS[DEVICE])
    # All of it first: what other steps leave in malloc's hands would count as used.
    peaks, found = memories(options.encoder, lengths, options.smoke), []
    print(f"{'':>6} {'error':>8}   {'time of lean over':^18}   {'memory of lean over':^18}")
    print(f"{'T':>6} {'':>8}   {'eager':>8} {'finetuning':>9}   {'eager':>8} {'finetuning':>9}")
    for length in lengths:
        row = measure(options.encoder, length, 2 if options.smoke else options.rounds, options.smoke, peaks[length])
        found.append(row)
        time_ratios = f"{show(row['time_ratio_to_eager'], '8.2f')} {show(row['time_ratio_to_finetuning'], '9.2f')}"
        memory_ratios = (
            f"{show(row['memory_ratio_to_eager'], '8.2f')} {show(row['memory_ratio_to_finetuning'], '9.2f')}"
        )
        print(f"{length:>6} {show(row['error'], '8.1e')}   {time_ratios}    {memory_ratios}", flush=True)
    tell(found, options.output, memory="allocated" if DEVICE == "cuda" else "growth of the resident set")


if __name__ == "__main__":
    main()
