"""MBTSAD with the paper's budget: all of SST-2, a fifth of it clean, and its learning rates; ASR as a function of steps.

    python benchmarks/mbtsad_budget.py --data ../shared/data/sst2 --text_column text --minilm FOLDER [--smoke]

Curves, each measured on clean and triggered test rows as it trains (the numbers choose nothing: every curve goes to its end):

| curve | starts from | learns from | rate |
|---|---|---|---|
| `retrain` | the suspect | clean rows, three split copies each | 2e-5 |
| `distil` | the suspect | the end of `retrain`, clean rows | 5e-4 |
| `fine_tuning_as_retraining` | the suspect | clean rows, as many steps as `retrain` | 2e-5 |
| `distil_without_splitting` | the suspect | the end of `fine_tuning_as_retraining`, clean rows | 5e-4 |
| `fine_tuning` | the suspect | clean rows, as many steps as `distil` | 5e-4 |

The paper does not tell its epochs; here 3 of each, and 2 for suspect and never-poisoned model. Finished curves are kept in
`--runs`. Prints a table and, last, one JSON line.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from measuring import DEVICE, tell
from transformers import PreTrainedModel, TrainerCallback

from hf_backdoor.data import Processor
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.mbtsad import MBTSADTrainer
from hf_backdoor.evaluation import evaluate_backdoor
from hf_backdoor.models import load_model, load_processor
from hf_backdoor.recipe_file import load_recipe
from hf_backdoor.rows import RunRows, prepare_rows
from hf_backdoor.run import run


HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "mbtsad" / "sst2_minilm.yaml"
POINTS = 8
EPOCHS = 3
# What a point keeps of a row.
KEPT = {"value", "low", "high", "k", "n"}


class Curve(TrainerCallback):
    """Measures the model at evenly spaced steps, the last one among them."""

    def __init__(self, name: str, rows: RunRows, processor: Processor, seed: int) -> None:
        self.name, self.rows, self.processor, self.seed = name, rows, processor, seed
        self.points: list[dict[str, Any]] = []

    def on_step_end(
        self, args: DefenseConfig, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        step, every = state.global_step, math.ceil(state.max_steps / POINTS)
        if step % every and step != state.max_steps:
            return
        model.eval()
        self.points.append({"curve": self.name, "step": step, **measure(model, self.rows, self.processor, self.seed)})
        model.train()


def measure(model: PreTrainedModel, rows: RunRows, processor: Processor, seed: int) -> dict[str, Any]:
    """Every metric as value, interval and counts."""
    found, _ = evaluate_backdoor(model, processor, rows.task, rows.test, name="suspect", seed=seed, bf16=True)
    return {
        row.metric: {field: value for field, value in dataclasses.asdict(row).items() if field in KEPT}
        for row in found
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stanfordnlp/sst2")
    parser.add_argument("--minilm", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--trigger", default="cf")
    parser.add_argument("--text_column", default="sentence")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", default="runs/mbtsad_budget")
    parser.add_argument("--smoke", action="store_true", help="some dozen rows, to see that it works")
    parser.add_argument("--output", type=Path, help="file for the result")
    options = parser.parse_args(arguments)

    # Nothing is cut off the data: the recipe's limits are what a laptop's minutes allow.
    size = 80 if options.smoke else None
    recipe = load_recipe(
        str(RECIPE),
        [
            part
            for key, value in {
                "dataset_name": options.data, "text_column": options.text_column, "model_name_or_path": options.minilm,
                "attack_trigger": options.trigger, "max_train_samples": size, "seed": options.seed,
                "output_dir": options.runs, "controls": [],
                "stages": {stage: {"num_train_epochs": 2, "learning_rate": 5e-5} for stage in ("reference", "suspect")},
            }.items()
            for part in (f"--{key}", json.dumps(value))
        ],
    )  # fmt: skip
    run(recipe, until="suspect")
    processor = load_processor(options.minilm, recipe.task_class)
    rows = prepare_rows(recipe, processor)
    folder = Path(options.runs)

    def finished(name: str, model: str, trainer_class: type[DefenseTrainer], **more: Any) -> list[dict[str, Any]]:
        """A curve's points; what it ends with lies in the folder of its name."""
        file = folder / name / "curve.json"
        if not file.exists():
            teacher = {"teacher_model": str(folder / more.pop("teacher"))} if "teacher" in more else {}
            settings = {
                "per_device_train_batch_size": 32, "num_train_epochs": EPOCHS, "warmup_steps": 0.06, "bf16": True,
                "train_sampling_strategy": "group_by_length", "logging_steps": 50, "report_to": "none", "save_strategy": "no",
                "seed": options.seed, "use_cpu": DEVICE == "cpu", **more,
            }  # fmt: skip
            args = trainer_class.config_class()(str(folder / name), **settings)
            curve = Curve(name, rows, processor, options.seed)
            trainer = trainer_class(
                model=load_model(str(folder / model), recipe.task_class), args=args, train_dataset=rows.of("clean"),
                processing_class=processor, task=rows.task, callbacks=[curve], **teacher,
            )  # fmt: skip
            trainer.train()
            trainer.save_model(str(folder / name))
            file.write_text(json.dumps(curve.points))
        return json.loads(file.read_text())

    points = []
    for name in ("reference", "suspect"):
        model = load_model(str(folder / name), recipe.task_class)
        points.append({"curve": name, "step": 0, **measure(model, rows, processor, options.seed)})
    split, alone = {"stages": ["retrain"], "learning_rate": 2e-5}, {"learning_rate": 2e-5}
    distil = {"stages": ["distil"], "learning_rate": 5e-4}
    points += finished("retrain", "suspect", MBTSADTrainer, **split)
    points += finished("distil", "suspect", MBTSADTrainer, **distil, teacher="retrain")
    points += finished("fine_tuning", "suspect", DefenseTrainer, learning_rate=5e-4)
    steps = next(point["step"] for point in reversed(points) if point["curve"] == "retrain")
    points += finished("fine_tuning_as_retraining", "suspect", DefenseTrainer, **alone, max_steps=steps)
    points += finished(
        "distil_without_splitting", "suspect", MBTSADTrainer, **distil, teacher="fine_tuning_as_retraining"
    )

    print(f"{'curve':26} {'step':>6} {'ASR':>6} {'without':>8} {'CACC':>6}")
    for point in points:
        rates = [100 * point[metric]["value"] for metric in ("asr", "asr_without_trigger", "cacc")]
        print(f"{point['curve']:26} {point['step']:6} {rates[0]:6.1f} {rates[1]:8.1f} {rates[2]:6.1f}")
    tell(
        points,
        options.output,
        clean_rows=len(rows.of("clean")),
        suspect_rows=len(rows.of("poisoned")),
        trigger=options.trigger,
    )


if __name__ == "__main__":
    main()
