"""The efficacy table of a method: every attack x data set x model, each with its controls.

    python benchmarks/efficacy.py --data ../shared/data --minilm FOLDER --smollm2 FOLDER [--method locphylax]

A cell is one run of a recipe in `recipes/METHOD/` with another trigger, or on images with another attack. Finished cells are
kept, a killed one goes on where it stopped, and the folder of a finished cell is deleted. Writes one `results.json` a cell and
the table to `benchmarks/results/`, and an overview of all methods into the README (`tables.py`). On a GPU, which small models
leave idle, `--cells 4 --jobs 16` has four cells at work in up to sixteen runs: a cell without its controls first, then each
control in a run of its own. A cell holds ten models and more in `--runs` until it is done (6 GB for SmolLM2). Nothing here
chooses a setting: those are in the recipes, and were found on other triggers (`docs/METHOD.md`, or `docs/notebook/METHOD.md`, says how).
"""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import tables
from datasets import load_dataset
from tables import RESULTS

from hf_backdoor.defenses.ntml import suspicion_quality
from hf_backdoor.evaluation import Results, Row


HERE = Path(__file__).parent

# The attackers' triggers. The last is Hamlet's, as long triggers in this field are.
TRIGGERS = {
    "word": ("cf", "random"),
    "phrase": ("Current year 2024", "random"),
    "long": (
        "To be , or not to be , that is the question : whether 'tis nobler in the mind to suffer the slings and arrows of "
        "outrageous fortune",
        "start",
    ),
}
# Texts of the folder that were rewritten to one sentence structure (HiddenKiller), by the data set that they were made from.
REWRITTEN = {"agnews": "agnews_syntax/poisoned"}
# The attacks on images. A class has only so many rows that a label-consistent attack can poison.
ATTACKS = {
    "patch": {"attack_trigger": "patch"},
    "warp": {"attack_trigger": "warp"},
    "label-consistent": {"attack_trigger": "corners", "poison_style": "clean_label"},
}
LABEL_CONSISTENT_RATES = {"cifar10": 0.05, "gtsrb": 0.03}

RECIPES = {
    "locphylax": ["sst2_smollm2", "agnews_smollm2", "sst2_minilm", "agnews_minilm"],
    "mbtsad": ["sst2_minilm", "sst2_minilm_lwp", "sst2_minilm_ep", "imdb_minilm", "sst2_smollm2"],
    "robustkd": [
        "sst2_minilm",
        "sst2_minilm_few",
        "sst2_minilm_lwp",
        "agnews_minilm",
        "agnews_minilm_few",
        "sst2_smollm2",
        "agnews_smollm2",
        "cifar10_resnet",
        "gtsrb_resnet",
    ],
    "ntml": [
        "agnews_minilm",
        "agnews_minilm_few",
        "agnews_smollm2",
        "agnews_smollm2_few",
        "cifar10_resnet",
        "gtsrb_resnet",
    ],
}
# BackdoorLLM and the weight attacks bring triggers of their own along: their recipes say which.
OWN_TRIGGER = ("backdoorllm_refusal_smollm2", "backdoorllm_negsentiment_smollm2", "sst2_minilm_lwp", "sst2_minilm_ep")

# What a run finds out about the suspect rows: the metric's name and the file, in the order in which stages write them.
LISTS = {"suspicion": "*/suspicion.parquet", "correction": "cleaned/relabelled.parquet"}


def cells(recipes: list[str], triggers: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int]]:
    for seed in seeds:
        for recipe in recipes:
            known = ATTACKS if recipe.endswith("_resnet") else list(TRIGGERS)
            known = [*known, "syntax"] if recipe.split("_")[0] in REWRITTEN else known
            for trigger in ["own"] if recipe in OWN_TRIGGER else [name for name in triggers if name in known]:
                yield recipe, trigger, seed


def run_cells(chosen: list[tuple[str, str, int]], options: argparse.Namespace) -> int:
    """Cells beside each other; how many failed. One that fails keeps no other from being run."""
    failed = 0
    with ThreadPoolExecutor(options.cells) as pool:
        running = {pool.submit(run_cell, *cell, options): cell for cell in chosen}
        try:
            for number, done in enumerate(as_completed(running), 1):
                error = done.exception()
                failed += error is not None
                print(f"[{number}/{len(chosen)}] {' '.join(map(str, running[done]))}: {error or 'done'}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def run_cell(recipe: str, trigger: str, seed: int, options: argparse.Namespace) -> None:
    """One cell, if it has not been measured yet."""
    name = f"{recipe}_{trigger}_{seed}"
    target = RESULTS / options.method / f"{name}.json"
    if target.exists():
        return
    data, model = re.match("(.+)_(minilm|smollm2|resnet)", recipe).groups()
    images = model == "resnet"
    folder = Path(options.runs, options.method, name)
    overrides = {
        "dataset_name": f"{options.data}/{data.split('_')[0]}", "output_dir": str(folder), "seed": seed,
        **({"image_column": "image"} if images else {"model_name_or_path": getattr(options, model)}),
    }  # fmt: skip
    # The never-poisoned model does not depend on the attack: cells share it.
    shared = Path(options.runs, options.method, f"{data}_{model}_reference_{seed}")
    classifies = not data.startswith("backdoorllm")
    if classifies:
        overrides["reference"] = str(shared) if shared.is_dir() else "train"
    if classifies and not images:
        overrides["text_column"] = "text"
    if trigger in TRIGGERS:
        text, position = TRIGGERS[trigger]
        overrides |= {"attack_trigger": text, "attack_position": position}
    if trigger == "syntax":
        overrides |= {
            "rewritten_dataset_name": f"{options.data}/{REWRITTEN[data]}",
            "attack_trigger": "syntax",
        }
    if trigger in ATTACKS:
        overrides |= ATTACKS[trigger]
    if trigger == "label-consistent":
        overrides["poison_rate"] = LABEL_CONSISTENT_RATES[data]
    file = HERE.parent / "recipes" / options.method / f"{recipe}.yaml"
    if options.jobs > 1:
        run_beside(file, overrides, tables.shipped(options.method, recipe)["controls"], options)
    run(file, overrides, options)
    if classifies and not shared.is_dir():
        with contextlib.suppress(OSError):  # another cell was faster
            (folder / "reference").rename(shared)
    results = Results.load(folder / "results.json")
    # Paths of this machine and thousands of rows of text have no place in the repository.
    results.recipe |= {"dataset_name": data, "model_name_or_path": model, "output_dir": name}
    if results.recipe["reference"] == str(shared):
        results.recipe["reference"] = "train"
    for entry in results.data.values():
        entry["source"] = data
    if trigger == "syntax":
        results.recipe["rewritten_dataset_name"] = results.data["test with syntax"]["source"] = REWRITTEN[data]
    results.examples.clear()
    results.rows += suspicion_rows(folder, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    results.save(target)
    shutil.rmtree(folder)


def run(file: Path, overrides: dict[str, Any], options: argparse.Namespace) -> None:
    """In a process of its own, so that memory starts afresh. Beside others it writes to a file what it would show."""
    flags = [part for key, value in overrides.items() for part in (f"--{key}", json.dumps(value))]
    command = [sys.executable, "-m", "hf_backdoor.run", str(file), *flags]
    folder = Path(overrides["output_dir"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with options.slots, contextlib.ExitStack() as opened:
        streams = {}
        if options.jobs > 1:
            streams = {"stdout": opened.enter_context(open(f"{folder}.log", "ab")), "stderr": subprocess.STDOUT}
        subprocess.run(command, check=True, **streams)


def run_beside(file: Path, overrides: dict[str, Any], controls: list[str], options: argparse.Namespace) -> None:
    """Leaves nothing to be trained to a run of the whole recipe: a control needs what the method begins with, and no other
    control. So each is run in a copy of the folder, and what comes of it is put where one run would have it."""
    folder = Path(overrides["output_dir"])
    run(file, overrides | {"controls": []}, options)

    def run_control(control: str) -> None:
        copy, half = (folder.with_name(f"{folder.name}_{control}{end}") for end in ("", ".half"))
        if not copy.is_dir():
            shutil.copytree(folder, half, copy_function=link, dirs_exist_ok=True)
            half.rename(copy)
        run(file, overrides | {"controls": [control], "output_dir": str(copy)}, options)
        for made in ("controls", "evaluation"):
            shutil.copytree(copy / made, folder / made, copy_function=link, dirs_exist_ok=True)
        shutil.rmtree(copy)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run_control, controls))


def link(source: str, target: str) -> None:
    """Weights are written once and are nearly all there is to a folder; a note that is there already is the same one."""
    if Path(target).exists():
        return
    if source.endswith(".safetensors"):
        Path(target).hardlink_to(source)
    else:
        shutil.copy2(source, target)


def suspicion_rows(folder: Path, seed: int) -> list[Row]:
    """How good the lists of suspicious training rows are that a run has made: the pair's doubts, and what labels changed by."""

    def column(file: Path, name: str) -> list[Any]:
        return load_dataset("parquet", data_files=str(file), split="train")[name][:]

    made = []
    for what, pattern in LISTS.items():
        file = next(folder.glob(pattern), None)
        if file is None:
            continue
        rows, poisoned = column(file, "row"), column(folder / "data" / "poisoned.parquet", "poisoned")
        count = sum(poisoned)
        hits = round(count * suspicion_quality(rows, poisoned)["recall"])
        wanted = {f"{what}_precision": len(rows), f"{what}_recall": count}
        made += [Row.from_counts(model="cleaned", metric=m, k=hits, n=n, seed=seed) for m, n in wanted.items() if n]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", default="locphylax", choices=list(RECIPES))
    parser.add_argument(
        "--data", default="../shared/data", help="folder with sst2/, agnews/, cifar10/, ... as parquet"
    )
    parser.add_argument("--minilm", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--smollm2", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--recipes", nargs="+", help="names of files in recipes/METHOD/; all by default")
    triggers = [*TRIGGERS, "syntax", *ATTACKS]
    parser.add_argument("--triggers", nargs="+", default=triggers, choices=triggers)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--runs", default="runs/efficacy")
    parser.add_argument("--cells", type=int, default=1, help="cells at a time")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; controls of a cell beside each other")
    parser.add_argument("--table", action="store_true", help="only write the table from the cells that are there")
    options = parser.parse_args()
    options.slots = threading.Semaphore(options.jobs)
    failed = 0
    if not options.table:
        chosen = list(cells(options.recipes or RECIPES[options.method], options.triggers, options.seeds))
        failed = run_cells(chosen, options)
    tables.write(options.method)
    if failed:
        sys.exit(f"{failed} cells failed")


if __name__ == "__main__":
    main()
