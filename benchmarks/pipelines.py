"""Whole runs, for `trainer_overhead.py`: NT-ML's pipeline over plain training, and what fitting RobustKD's mask adds."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import shapes
import torch
import yaml
from measuring import DEVICE, StepMeter, clock, synchronize, train

from hf_backdoor import DefenseTrainer
from hf_backdoor.defenses.ntml import NonTargetTrainer, NTMLTrainer
from hf_backdoor.defenses.ntml.likeness import look_alikes, looks
from hf_backdoor.defenses.ntml.states import SplitClass
from hf_backdoor.defenses.robustkd import FeatureMaskTrainer, RobustKDTrainer, student_from_layers


RECIPES = Path(__file__).parent.parent / "recipes"
CLEAN_FRACTIONS = (0.01, 0.05)
# NT-ML's last stages: networks go over the rows, and one is trained plainly on them.
CORRECTIONS = {"second_look": "relabel", "third_look": "relabel_again"}


def prepared(trainer: type[DefenseTrainer], kind: str, **options: Any) -> DefenseTrainer:
    """A trainer in a folder that nothing is written to."""
    own = {name: options.pop(name) for name in list(options) if name in ("model", "train_dataset") or "_model" in name}
    own |= {"feature_mask": options.pop("feature_mask")} if "feature_mask" in options else {}
    config = trainer.config_class()(
        output_dir=tempfile.gettempdir(), save_strategy="no", use_cpu=DEVICE == "cpu", disable_tqdm=True,
        logging_steps=10_000, **options,
    )  # fmt: skip
    made = shapes.tokenizer(kind == "encoder")
    return trainer(args=config, processing_class=made, task=shapes.task(kind), **own)


def step_seconds(trainer: DefenseTrainer) -> float:
    """Of a step, the median but for the first two."""
    meter = StepMeter()
    train(trainer, meter)
    return statistics.median(meter.seconds[2:])


def seconds_of_looks(trainer: NonTargetTrainer) -> float:
    """For all of its rows."""

    def work(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return looks(trainer.forward(trainer.model, batch, output_hidden_states=True).hidden_states, batch)

    trainer.model.eval()
    start = clock()
    trainer.over_rows(trainer.train_dataset, work)
    synchronize()
    trainer.model.train()
    return clock() - start


def seconds_of_look_alikes(rows: int, width: int, classes: int) -> float:
    """Among rows of which a tenth stands apart in one class."""
    generator = torch.Generator().manual_seed(0)
    given, apart = torch.arange(rows) % classes, torch.zeros(rows, dtype=torch.bool)
    given[: rows // 10], apart[: rows // 10] = 0, True
    seen = torch.randn(rows + rows // 100, width, generator=generator)
    start = clock()
    look_alikes(SplitClass(0, apart, 1.0, (0, 1)), given, seen[:rows], seen[rows:])
    return clock() - start


def ntml(kind: str, words: int, smoke: bool) -> list[dict[str, Any]]:
    """A short training on the suspect rows for the soft labels, these, training on these, mutual learning, and twice a look at all
    rows and a training on them with corrected labels: all of it over plain training, with 1% and with 5% of clean rows.

    Rows, batches and epochs are those of `recipes/ntml/agnews_minilm.yaml`; a step of each training, and the soft labels and looks of
    some batches, are measured and multiplied. To find look-alikes among all rows is measured as it is.
    """
    recipe = yaml.safe_load((RECIPES / "ntml" / "agnews_minilm.yaml").read_text())
    batch, count, stages = recipe["per_device_train_batch_size"], recipe["max_train_samples"], recipe["stages"]
    options = {"per_device_train_batch_size": batch, "bf16": recipe["bf16"], "max_steps": 3 if smoke else 8}
    rows = shapes.rows(batch * options["max_steps"], words)
    plain = prepared(DefenseTrainer, kind, model=shapes.small_model(kind, smoke), train_dataset=rows, **options)
    costs = {"target": step_seconds(plain)}
    costs["early_target"] = costs["target"]
    second = prepared(
        NonTargetTrainer, kind, model=shapes.small_model(kind, smoke), train_dataset=rows, teacher_model=plain.model, **options
    )  # fmt: skip
    looking = seconds_of_looks(second)
    start = clock()
    second.train_dataset = second.with_teacher_logits(second.train_dataset)
    synchronize()
    costs["soft_labels"] = (clock() - start) / options["max_steps"]
    costs["non_target"] = step_seconds(second)
    mutual = prepared(NTMLTrainer, kind, model=second.model, train_dataset=rows, target_model=plain.model, **options)
    costs["mutual"] = step_seconds(mutual)
    # The first look is that of three networks: what the rows are, which stand apart, and which look like those. The other takes over
    # which these are.
    costs["third_look"] = costs["soft_labels"]
    costs["second_look"] = 2 * costs["soft_labels"] + looking / options["max_steps"]
    costs |= dict.fromkeys(CORRECTIONS.values(), costs["target"])
    width = plain.model.config.get_text_config().hidden_size
    alike = seconds_of_look_alikes(count, 4 * width, len(shapes.LABELS))
    made = []
    for fraction in CLEAN_FRACTIONS:
        passes = {
            "early_target": stages["early_target"]["num_train_epochs"],
            "soft_labels": 1,
            "non_target": stages["non_target"]["num_train_epochs"],
            "mutual": stages["mutual"]["num_train_epochs"] * fraction,
        }
        for look, training in CORRECTIONS.items():
            passes |= {look: 1, training: stages[training]["num_train_epochs"]}
        seconds = {name: passes[name] * count / batch * costs[name] for name in passes} | {"look_alikes": alike}
        trained = stages["suspect"]["num_train_epochs"] * count / batch * costs["target"]
        made.append(
            {
                "stage": "ntml/pipeline",
                "model": kind,
                "baseline": "trainer",
                "words": words,
                "clean_fraction": fraction,
                "epochs": {
                    name: stages[name]["num_train_epochs"]
                    for name in ("suspect", "early_target", "non_target", "mutual", *CORRECTIONS.values())
                },
                "time_ratio": round(sum(seconds.values()) / trained, 3),
                "seconds_of_a_batch": {name: round(cost, 4) for name, cost in costs.items()},
                "seconds": {name: round(value, 1) for name, value in seconds.items()},
                "baseline_seconds": round(trained, 1),
            }
        )
    return made


def mask_share(kind: str, words: int, smoke: bool) -> list[dict[str, Any]]:
    """Seconds of fitting a mask over those of the distillation, with the settings of `recipes/robustkd/sst2_minilm.yaml`.

    Fitting is run as it is; of the distillation, some steps are.
    """
    recipe = yaml.safe_load((RECIPES / "robustkd" / "sst2_minilm.yaml").read_text())
    batch, rate = recipe["per_device_train_batch_size"], recipe["stages"]["mask"]["learning_rate"]
    count = round(recipe["max_train_samples"] * recipe["clean_fraction"])
    steps = -(-count // batch) * recipe["num_train_epochs"]
    options = {"per_device_train_batch_size": batch, "bf16": recipe["bf16"]}
    fitted, measured = (2, 3) if smoke else (recipe["stages"]["mask"]["max_steps"], 16)
    clean = shapes.rows(2 * batch if smoke else count, words)
    teacher = shapes.small_model(kind, smoke)
    fitting = prepared(
        FeatureMaskTrainer, kind, model=teacher, train_dataset=clean, max_steps=fitted, learning_rate=rate, **options
    )
    spent = train(fitting)
    student = student_from_layers(teacher, teacher.config.num_hidden_layers // 2).train()
    distilling = prepared(
        RobustKDTrainer, kind, model=student, train_dataset=clean, teacher_model=teacher, max_steps=measured,
        feature_mask=fitting.model, **options,
    )  # fmt: skip
    whole = step_seconds(distilling) * steps
    return [
        {
            "stage": "robustkd/mask_share",
            "model": kind,
            "baseline": "distil",
            "words": words,
            "time_ratio": round(spent / whole, 3),
            "mask_steps": fitted,
            "distillation_steps": steps,
            "seconds": {"mask": round(spent, 3), "distillation": round(whole, 3)},
        }
    ]
