"""NT-ML and RobustKD on images: subsets of CIFAR-10 and GTSRB, a small ResNet from scratch, every attack with its controls.

    python benchmarks/images.py --data ../shared/data --sets cifar10 gtsrb --methods ntml robustkd

`--data` is a folder with `cifar10/` and `gtsrb/` as parquet, columns `image` (32 x 32) and `label`. The trainers and the
stages are those of a recipe; a recipe itself knows texts only. A cell (method, data set, attack, seed) is a folder of
stages: finished ones are kept, and a killed run goes on after the last one. Each cell ends as
`RESULTS/METHOD/SET_resnet_ATTACK_SEED.json`, from which `python benchmarks/efficacy.py --method METHOD --table` makes the table.

Settings were chosen by clean accuracy and a stand-in attack (`--attacks stand-in`), which is in no table.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as Picture
from PIL import Image
from torch import Tensor
from transformers import PrinterCallback, ResNetConfig, ResNetForImageClassification

from hf_backdoor.attacks.images import ImagePoisoning, poison_images, stamp_images
from hf_backdoor.data import load_rows
from hf_backdoor.defenses import METHODS, DefenseTrainer, Step
from hf_backdoor.defenses.ntml import NTMLTrainer, suspicion_quality
from hf_backdoor.evaluation import Results, Row
from hf_backdoor.folders import begin, fingerprint, finished, write_json
from hf_backdoor.inspection.second_choice import SecondChoiceCallback
from hf_backdoor.models import peak_memory, reset_peak_memory, versions
from hf_backdoor.plan import Stage, defense_stages
from hf_backdoor.report.tables import text_table


@dataclass(frozen=True)
class ImageSet:
    """What differs between the data sets. `mirror`: whether a picture's mirror image means the same."""

    labels: int
    target: int
    mirror: bool
    label_consistent_rate: float  # of all rows: the target class has no more of them


SETS = {"cifar10": ImageSet(10, 0, True, 0.05), "gtsrb": ImageSet(43, 2, False, 0.03)}
ATTACKS = ("patch", "warp", "label-consistent", "stand-in")


@dataclass(frozen=True)
class Sizes:
    """Rows, and the network: blocks of `widths` channels, `depth` layers in each (a student has one)."""

    train: int = 8000
    clean: dict[str, int] = dataclasses.field(default_factory=lambda: {"ntml": 80, "robustkd": 4000})
    test: int = 2000
    widths: tuple[int, ...] = (32, 64, 128)
    depth: int = 2
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


SHARED = {
    "per_device_train_batch_size": 100, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.05,
    "warmup_steps": 0.1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "feature_loss": "margin", "mask_shape": "position",
}  # fmt: skip
# Non-target training's temperature, and the direction and rate of mutual learning, are those with the highest mean accuracy
# without and with the stand-in (CIFAR-10, seed 7, 15 epochs). All else is a first guess; nothing was tried for RobustKD.
STAGES: dict[str, dict[str, Any]] = {
    "suspect": {"num_train_epochs": 10},
    "early_target": {"num_train_epochs": 3},
    "non_target": {"num_train_epochs": 10, "temperature": 4.0},
    "mutual": {"max_steps": 100, "learning_rate": 3e-4, "mutual_direction": "swapped"},
    "mask": {"max_steps": 100, "learning_rate": 0.1},
    "distil": {"num_train_epochs": 10},
}
SMOKE = Sizes(120, {"ntml": 24, "robustkd": 60}, 60, (8, 8), 2, {"max_steps": 2, "num_train_epochs": 1})


class StandIn(ImagePoisoning):
    """A red cross in the upper left: what settings may be chosen by, and no attack of the tables."""

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        stamped = np.array(pixels, dtype=np.uint8)
        stamped[4, 2:7] = stamped[2:7, 4] = [255, 0, 0]
        return stamped


def poisoning(name: str, images: ImageSet) -> ImagePoisoning:
    if name == "stand-in":
        return StandIn(images.target)
    rate = images.label_consistent_rate if name == "label-consistent" else 0.1
    # WaNet's own strength, 0.5, is not learnt in so few steps (ASR of the suspect: 12%); 2.0 half-way (49%).
    return ImagePoisoning(images.target, name.replace("-", "_"), rate, warp_strength=4.0)


# ---- Rows ----


@dataclass(frozen=True)
class Cell:
    """Everything that a method is run on. Rows have `pixel_values` (bytes) and `labels`, as the trainers take them."""

    images: ImageSet
    seed: int
    sizes: Sizes
    rows: dict[str, Dataset]  # attack, poisoned, clean, test, and triggered test rows
    poisoned: list[bool]

    @cached_property
    def digests(self) -> dict[str, str]:
        return {name: digest(rows) for name, rows in self.rows.items()}


def prepare(name: str, attack: ImagePoisoning, method: str, seed: int, sizes: Sizes, data: str | None) -> Cell:
    """All rows of a cell; the attack rows and the test rows are the same for every attack and method."""
    images = SETS[name]
    wanted = sizes.train + sizes.clean[method]
    if data is None:
        train, test = made_up(200), made_up(60)
    else:
        whole = (load_rows(f"{data}/{name}", split=split) for split in ("train", "test"))
        train, test = (rows.cast_column("image", Picture()) for rows in whole)
    train = train.shuffle(seed=seed).select(range(wanted))
    test = test.shuffle(seed=seed).select(range(sizes.test))
    clean = train.select(range(sizes.train))
    poisoned = poison_images(clean, attack, seed)
    rows = {
        "attack": clean,
        "poisoned": poisoned,
        "clean": train.select(range(sizes.train, wanted)),
        "test": test,
        "triggered": stamp_images(test, attack),
    }
    packed = {key: features(part) for key, part in rows.items()}
    return Cell(images, seed, sizes, packed, poisoned["poisoned"][:])


def made_up(count: int) -> Dataset:
    """Rows of four classes for `--smoke`: grey levels tell the class."""
    rng = np.random.default_rng(count)
    answers = [row % 4 for row in range(count)]
    pixels = [rng.normal(40 + 50 * label, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8) for label in answers]
    return Dataset.from_dict({"image": [Image.fromarray(picture) for picture in pixels], "label": answers})


def features(rows: Dataset) -> Dataset:
    """Pixels as bytes: lists of numbers would take longer to read than the network takes to learn from them."""

    def pack(row: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": np.asarray(row["image"], dtype=np.uint8).tobytes(), "labels": row["label"]}

    return rows.map(pack, remove_columns=rows.column_names, keep_in_memory=True)


def digest(rows: Dataset) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(row["pixel_values"] + row["labels"].to_bytes(2))
    return found.hexdigest()


@dataclass(frozen=True)
class Pictures:
    """Collator: pixels around 0, moved by up to two pixels (and mirrored) wherever something is being learnt."""

    mirror: bool
    reach: int = 2

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = np.frombuffer(b"".join(row["pixel_values"] for row in rows), dtype=np.uint8)
        pictures = torch.from_numpy(pixels.reshape(len(rows), 32, 32, 3) / np.float32(64) - 2)
        if torch.is_grad_enabled():
            pictures = self.moved(pictures)
        return {"pixel_values": pictures.permute(0, 3, 1, 2), "labels": torch.tensor([row["labels"] for row in rows])}

    def moved(self, pictures: Tensor) -> Tensor:
        number, side = pictures.shape[:2]
        shift = torch.randint(2 * self.reach + 1, (2, number, 1))
        down, across = shift + torch.arange(side)
        if self.mirror:
            across = torch.where(torch.rand(number, 1) < 0.5, across.flip(1), across)
        padded = torch.nn.functional.pad(pictures, (0, 0, *[self.reach] * 4))
        return padded[torch.arange(number)[:, None, None], down[:, :, None], across[:, None, :]]


# ---- Networks ----


def network(labels: int, sizes: Sizes, seed: int) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=sizes.widths[0], hidden_sizes=list(sizes.widths), depths=[sizes.depth] * len(sizes.widths),
        layer_type="basic", num_labels=labels,
    )  # fmt: skip
    return ResNetForImageClassification(config)


def student_of(teacher: ResNetForImageClassification) -> ResNetForImageClassification:
    """The first layer of each of the teacher's blocks, its stem and its head: what may bring the backdoor along."""
    config = ResNetConfig.from_dict(teacher.config.to_dict() | {"depths": [1] * len(teacher.config.depths)})
    student = ResNetForImageClassification(config)
    kept = teacher.state_dict()
    student.load_state_dict({name: kept[name] for name in student.state_dict()})
    return student


def load(folder: Path) -> ResNetForImageClassification:
    model = ResNetForImageClassification.from_pretrained(folder, use_safetensors=True)
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def logits(model: ResNetForImageClassification, rows: Dataset, pictures: Pictures) -> Tensor:
    """[N, K], on the CPU."""
    training = model.training
    model.eval()
    parts = []
    for start in range(0, len(rows), 500):
        batch = pictures([rows[row] for row in range(start, min(start + 500, len(rows)))])
        parts.append(model(pixel_values=batch["pixel_values"].to(model.device)).logits.float().cpu())
    model.train(training)
    return torch.cat(parts)


# ---- Stages ----


def stages(method: str, shared: str, cell: str) -> Iterator[Stage]:
    """The stages of a method and of its controls, as `hf_backdoor.plan` lays them out; the suspect serves all methods."""
    yield Stage("reference", "suspect", Step(DefenseTrainer), f"{shared}/base", f"{shared}/reference", "attack")
    yield Stage("suspect", "suspect", Step(DefenseTrainer), f"{shared}/base", f"{cell}/suspect", "poisoned")
    known = METHODS[method]
    last = list(known.stages)[-1]
    given = {"base": f"{shared}/base", "suspect": f"{cell}/suspect", "student": f"{cell}/student"}
    folders = {name: f"{cell}/{method}/{name}" for name in known.stages}
    shown = {name: f"stage/{name}" for name in known.stages} | {last: "cleaned"}
    yield from defense_stages(known.stages, given, folders, shown, set(known.stages))
    for control, steps in known.controls.items():
        own = {name: f"{cell}/{method}/{control}/{name}" for name in steps}
        shown = dict.fromkeys(steps, f"control/{control}")
        yield from defense_stages(steps, given | folders, own, shown, {list(steps)[-1]}, folders)


def train(stage: Stage, cell: Cell, runs: Path, method: str, prints: dict[str, str]) -> dict[str, Any]:
    """One stage, unless it is there; gives what it noted."""
    folder, config = runs / stage.folder, stage.step.trainer.config_class()
    arguments = config.takes(SHARED, STAGES[stage.settings], METHODS[method].config)
    arguments |= cell.sizes.arguments | stage.step.overrides
    if stage.as_long_as is not None:
        arguments["max_steps"] = json.loads((runs / stage.as_long_as / "stage.json").read_text())["steps"]
    rows = cell.rows[stage.rows]
    parents = [prints.get(name) for name in (stage.parent, *stage.inputs.values())]
    made_from = fingerprint(
        stage.step.trainer.__name__, arguments, cell.digests[stage.rows], cell.seed, cell.sizes, parents
    )
    prints[stage.folder] = made_from
    done = finished(folder, made_from)
    if done is not None:
        return done
    begin(folder, made_from)
    pictures = Pictures(cell.images.mirror)
    device = {"use_cpu": not torch.accelerator.is_available(), "seed": cell.seed}
    masks = {argument: str(runs / name) for argument, name in stage.inputs.items() if argument == "feature_mask"}
    trainer = stage.step.trainer(
        model=load(runs / stage.parent),
        args=config(str(folder / "checkpoints"), **device | arguments),
        train_dataset=rows,
        data_collator=pictures,
        **{argument: load(runs / name) for argument, name in stage.inputs.items() if argument not in masks} | masks,
    )
    trainer.remove_callback(PrinterCallback)
    watch = second_choices(cell, pictures) if stage.name == "suspect" else None
    if watch is not None:
        trainer.add_callback(watch)
    reset_peak_memory()
    start = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - start, 1)
    trainer.result().save_pretrained(folder)
    noted = {"fingerprint": made_from, "seconds": seconds, "peak_memory": peak_memory()}
    noted["steps"] = trainer.state.global_step
    if watch is not None:
        noted["second_choice"] = watch.rates
    if isinstance(trainer, NTMLTrainer):
        trainer.pair.network("target").save_pretrained(folder / "target")
        noted["suspicion"] = list(trainer.suspicion(cell.rows["poisoned"])["row"])
    write_json(folder / "stage.json", noted)
    return noted


def second_choices(cell: Cell, pictures: Pictures) -> SecondChoiceCallback | None:
    """Measures the premise of NT-ML by epoch; a clean-label attack leaves none to measure."""
    given, true = (torch.tensor(cell.rows[name]["labels"][:]) for name in ("poisoned", "attack"))
    changed = (given != true).nonzero()[:, 0]
    rows = cell.rows["poisoned"].select(changed.tolist())
    if len(rows) == 0:
        return None
    return SecondChoiceCallback(lambda model: logits(model, rows, pictures), given[changed], true[changed])


# ---- Measuring ----


def measure(model: ResNetForImageClassification, name: str, attack: str, cell: Cell) -> list[Row]:
    """The metrics of `hf_backdoor.evaluation`, on pictures."""
    pictures, target = Pictures(cell.images.mirror), cell.images.target
    right = torch.tensor(cell.rows["test"]["labels"][:])
    others = right != target
    clean, triggered = (logits(model, cell.rows[key], pictures).argmax(dim=1) for key in ("test", "triggered"))
    hits = {
        "cacc": (clean == right, None),
        "asr_without_trigger": ((clean == target)[others], None),
        "asr": ((triggered == target)[others], attack),
        "robust_accuracy": ((triggered == right)[others], attack),
    }
    return [
        Row.from_counts(model=name, metric=metric, trigger=trigger, k=int(hit.sum()), n=len(hit), seed=cell.seed)
        for metric, (hit, trigger) in hits.items()
    ]


def findings(stage: Stage, noted: dict[str, Any], cell: Cell) -> Iterator[Row]:
    """What a stage found out about the training rows, against the truth."""
    poisoned = sum(cell.poisoned)
    for epoch, rate in noted.get("second_choice", {}).items():
        k = round(rate * poisoned)
        yield Row.from_counts(model="suspect", metric=f"second_choice_epoch_{epoch}", k=k, n=poisoned, seed=cell.seed)
    listed = noted.get("suspicion")
    if listed and stage.name == "cleaned":
        hits = round(suspicion_quality(listed, cell.poisoned)["recall"] * poisoned)
        for metric, n in {"suspicion_precision": len(listed), "suspicion_recall": poisoned}.items():
            yield Row.from_counts(model="cleaned", metric=metric, k=hits, n=n, seed=cell.seed)


def run_cell(method: str, name: str, attack: str, options: argparse.Namespace) -> Results:
    sizes, seed = SMOKE if options.smoke else Sizes(), options.seed
    poison = poisoning(attack, SETS[name])
    cell = prepare(name, poison, method, seed, sizes, None if options.smoke else options.data)
    shared, own = f"{name}_{seed}", f"{name}_{attack}_{seed}"
    network(SETS[name].labels, sizes, seed).save_pretrained(options.runs / shared / "base")
    results = Results(
        recipe={
            "method": method, "dataset_name": name, "attack": attack, "seed": seed, "sizes": dataclasses.asdict(sizes),
            "poisoning": dataclasses.asdict(poison), "arguments": SHARED, "stages": STAGES,
        },
        versions=versions(),
        data={key: {"source": name, "rows": len(rows), "sha256": cell.digests[key]} for key, rows in cell.rows.items()},
    )  # fmt: skip
    prints: dict[str, str] = {}
    for stage in stages(method, shared, own):
        if stage.parent.endswith("/student") and stage.parent not in prints:
            student_of(load(options.runs / own / "suspect")).save_pretrained(options.runs / stage.parent)
            prints[stage.parent] = prints[f"{own}/suspect"]
        noted = train(stage, cell, options.runs, method, prints)
        if stage.measured:
            results.rows += measure(load(options.runs / stage.folder), stage.name, attack, cell)
        if stage.name == "cleaned" and "suspicion" in noted:
            target = load(options.runs / stage.folder / "target")
            results.rows += measure(target, "stage/target_network_after_mutual", attack, cell)
        results.rows += findings(stage, noted, cell)
        title = stage.name if stage.measured else f"{stage.name} ({stage.settings})"
        cost = {"stage": title, "tokens": None} | {key: noted[key] for key in ("seconds", "peak_memory")}
        results.costs.append(cost)
    results.save(options.results / method / f"{name}_resnet_{attack}_{seed}.json")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="../shared/data", help="folder with cifar10/ and gtsrb/ as parquet")
    parser.add_argument("--methods", nargs="+", default=["ntml", "robustkd"], choices=["ntml", "robustkd"])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS[:3]), choices=ATTACKS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/images"), help="folder of the stages")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="made-up pictures and few steps: does it run")
    options = parser.parse_args()
    for method in options.methods:
        for name in options.sets:
            for attack in options.attacks:
                print(f"\n{method}, {name}, {attack}, seed {options.seed}", flush=True)
                results = run_cell(method, name, attack, options)
                shown = [row for row in results.rows if "epoch" not in row.metric]
                print(text_table(dataclasses.replace(results, rows=shown)), flush=True)


if __name__ == "__main__":
    main()
