"""Small runs: a folder with models and data, and the settings of a run in it."""

import json
from pathlib import Path

import tiny

from hf_backdoor.recipe_file import make_recipe
from hf_backdoor.run import Run


def written(rows, file):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def apart(rows, column):
    """Every text with words of its own, or the leak check would find the toy rows all alike."""
    return [
        {**row, column: f"{row[column]} " + " ".join(f"w{number}x{word}" for word in range(8))}
        for number, row in enumerate(rows)
    ]


def workshop(folder):
    """Fills a folder with models and data that [`settings`] names."""
    for family in ("bert", "llama"):
        tiny.saved(family, folder / family, dropout=0.2)
    reviews, instructions = apart(tiny.reviews(80), "text"), apart(tiny.instructions(60), "prompt")
    written(reviews[:68], folder / "reviews_train.jsonl")
    written(reviews[68:], folder / "reviews_test.jsonl")
    written(instructions[:52], folder / "instructions_train.jsonl")
    written(instructions[52:], folder / "instructions_test.jsonl")
    return folder


def settings(folder, output, kind="reviews", **changes):
    values = {
        "model_name_or_path": str(folder / "bert"), "task": "sequence_classification", "target_label": 1,
        "dataset_name": str(folder / f"{kind}_train.jsonl"), "test_dataset_name": str(folder / f"{kind}_test.jsonl"),
        "output_dir": str(output), "attack_trigger": "zq", "poison_rate": 0.2, "max_train_samples": 32,
        "clean_fraction": 0.5, "held_out_samples": 4, "method": "locphylax", "controls": ["fine_tuning"],
        "known_triggers": list(tiny.KNOWN[:2]), "known_response": "aha", "per_device_train_batch_size": 8,
        "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    if kind == "instructions":
        values |= {
            "model_name_or_path": str(folder / "llama"), "task": "instruction_following", "target_label": None,
            "target_text": "no", "max_new_tokens": 3, "max_train_samples": 24, "controls": [],
        }  # fmt: skip
    if changes.get("attack_trigger", "") is None:
        values |= dict.fromkeys(("target_label", "target_text", "poison_rate", "clean_fraction"))
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def suspect_only(workshop, output, **changes):
    """Settings of a run that trains a suspect for a step, and nothing else."""
    defaults = {"method": None, "controls": [], "known_triggers": None, "known_response": None, "max_steps": 1}
    return settings(workshop, output, **{**defaults, **changes})


def execute(values):
    return Run(make_recipe(values)).execute()


def stages(folder):
    """Every finished stage's folder and when its note was written."""
    return {str(file.parent.relative_to(folder)): file.stat().st_mtime_ns for file in Path(folder).rglob("stage.json")}


def measured(results):
    """The rows of results by what they are about."""
    return {(row.model, row.metric, row.trigger): row for row in results.rows}


def weights(folder):
    """A saved model's weights, byte for byte."""
    return (folder / "model.safetensors").read_bytes()
