"""A whole run: `accelerate launch -m hf_backdoor.run recipe.yaml [--key value ...]`.

Data, attack (or a given suspect), the defense's stages, its controls, evaluation, report and publishing, in this
order. Each stage writes one folder and, last, a `stage.json` with the hash of what it was made from; a stage whose
inputs have not changed is not run again, so a run that was killed goes on where it stopped.

    runs/NAME/
      recipe.yaml  data/  base/  reference/  suspect/  inject/  cleaned/  controls/CONTROL/STAGE/  results.json  report/
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from .data import SequenceClassification
from .defenses import METHODS, DefenseTrainer, Step
from .defenses.locphylax.planting import known_behaviour
from .evaluation import Results, Row, evaluate_backdoor
from .models import load_model, load_tokenizer, merged, peak_memory, resolve, save_model
from .recipe import Recipe, load_recipe
from .report import write_report
from .report.hub import publish
from .report.tables import examples_text, text_table
from .rows import RunRows, prepare_rows


@dataclass(frozen=True)
class Stage:
    """One training, from one folder into another.

    Args:
        name (`str`): Its model's name in `results.json`.
        settings (`str`): Whose arguments it takes in the recipe: `reference`, `suspect`, `inject`, ...
        step ([`Step`]): Who trains, with what changed.
        parent (`str`): Folder of the run that holds the model it starts from, or a model's name.
        folder (`str`): Folder of the run that it writes.
        rows (`str`): `clean`, `attack` (as it is) or `poisoned`.
        as_long_as (`str`, *optional*): Folder of the stage whose number of optimizer steps it must match.
        measured (`bool`): Whether its model has rows in `results.json`.
    """

    name: str
    settings: str
    step: Step
    parent: str
    folder: str
    rows: str
    as_long_as: str | None = None
    measured: bool = True


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in order."""
    stages = []
    base = "base" if resolve(recipe.model_name_or_path)[1] else recipe.model_name_or_path
    suspect = base
    if recipe.attack_trigger is not None:
        suspect = "suspect"
        if recipe.reference == "train":
            stages.append(Stage("reference", "reference", Step(DefenseTrainer), base, "reference", "attack"))
        stages.append(Stage("suspect", "suspect", Step(DefenseTrainer), base, "suspect", "poisoned"))
    if recipe.method is None:
        return stages
    method = METHODS[recipe.method]
    last = list(method.stages)[-1]
    parent = suspect
    for name, step in method.stages.items():
        folder = "cleaned" if name == last else name
        shown = "cleaned" if name == last else f"stage/{name}"
        stages.append(
            Stage(shown, name, step, parent, folder, "clean", measured=name == last or recipe.evaluate_stages)
        )
        parent = folder
    for control in recipe.controls:
        parent = suspect
        for name, step in method.controls[control].items():
            folder = f"controls/{control}/{name}"
            twin = "cleaned" if name == last else name
            stages.append(
                Stage(
                    f"control/{control}", name, step, parent, folder, "clean", as_long_as=twin, measured=name == last
                )
            )
            parent = folder
    return stages


@dataclass
class Run:
    """A recipe being run: its folder, its rows, and what was measured so far."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase = None
    rows: RunRows = None
    prints: dict[str, str] = field(default_factory=dict)
    costs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def execute(self) -> Results:
        """Runs what is not done yet, and writes `results.json`."""
        recipe = self.recipe
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = load_tokenizer(recipe.model_name_or_path, revision=recipe.model_revision)
        self.rows = prepare_rows(recipe, self.tokenizer)
        with main_process() as first:
            if first:
                write_yaml(self.folder / "recipe.yaml", recipe.flat())
                self._save_rows()
        measured: list[tuple[list[Row], list[dict[str, Any]]]] = []
        if resolve(recipe.model_name_or_path)[1]:
            self._convert()
        if recipe.reference not in (None, "train"):
            measured.append(
                self._measure("reference", self._base() if recipe.reference == "base" else recipe.reference)
            )
        if recipe.attack_trigger is None:
            measured.append(self._measure("suspect", self._base()))
        for stage in plan(recipe):
            self._train(stage)
            if stage.measured:
                measured.append(self._measure(stage.name, stage.folder))
        results = Results(
            rows=[row for rows, _ in measured for row in rows],
            costs=self.costs,
            recipe=recipe.flat(),
            versions=versions(),
            data=self.rows.sources,
            examples=[example for _, examples in measured for example in examples],
        )
        with main_process() as first:
            if first:
                results.save(self.folder / "results.json")
        return results

    # ---- Stages ----

    def _base(self) -> str:
        return "base" if resolve(self.recipe.model_name_or_path)[1] else self.recipe.model_name_or_path

    def _path(self, name: str) -> str:
        """A folder of the run, or a model's name from elsewhere."""
        inside = self.folder / name
        return str(inside) if name in self.prints or name == "base" and inside.is_dir() else name

    def _convert(self) -> None:
        """A GGUF file is slow to load and can't be trained on: it is turned into safetensors once."""
        folder = self.folder / "base"
        self.prints["base"] = fingerprint("base", self.recipe.model_name_or_path)
        if finished(folder, self.prints["base"]) is None:
            with main_process() as first:
                if first:
                    save_model(
                        load_model(self.recipe.model_name_or_path, self.recipe.task_class), self.tokenizer, folder
                    )
                    write_json(folder / "stage.json", {"fingerprint": self.prints["base"]})

    def _load(self, name: str):
        labels = getattr(self.rows.task, "num_labels", None)
        head = labels if self.recipe.task_class is SequenceClassification and name not in self.prints else None
        return load_model(
            self._path(name),
            self.recipe.task_class,
            num_labels=head,
            seed=self.recipe.seed,
            revision=None if name in self.prints else self.recipe.model_revision,
            dtype=self.recipe.dtype,
            attn_implementation=self.recipe.attn_implementation,
        )

    def _dataset(self, stage: Stage) -> Dataset:
        return {"clean": self.rows.splits.clean, "attack": self.rows.splits.attack, "poisoned": self.rows.poisoned}[
            stage.rows
        ]

    def _train(self, stage: Stage) -> None:
        folder, recipe = self.folder / stage.folder, self.recipe
        arguments = recipe.arguments(stage.settings) | stage.step.overrides
        if stage.as_long_as is not None:
            arguments["max_steps"] = finished(self.folder / stage.as_long_as, self.prints[stage.as_long_as])["steps"]
        dataset = self._dataset(stage)
        source = self.rows.sources["clean" if stage.rows == "clean" else "attack"]["sha256"]
        lora = recipe.use_peft and stage.rows == "clean"
        peft = {key: getattr(recipe, key) for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")}
        print_ = fingerprint(
            stage.step.trainer.__name__, arguments, source, stage.rows, recipe.seed, recipe.dtype, str(self.rows.task),
            self.prints.get(stage.parent, stage.parent), peft if lora else None,
        )  # fmt: skip
        self.prints[stage.folder] = print_
        done = finished(folder, print_)
        if done is None:
            resume = begin(folder, print_)
            config = training_config(stage, recipe, arguments, folder / "checkpoints")
            trainer = stage.step.trainer(
                model=self._load(stage.parent),
                args=config,
                train_dataset=dataset,
                eval_dataset=self.rows.splits.held_out if len(self.rows.splits.held_out) and stage.rows == "clean" else None,
                processing_class=self.tokenizer,
                task=self.rows.task,
                peft_config=LoraConfig(
                    r=recipe.lora_r, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout,
                    target_modules=recipe.lora_target_modules,
                    task_type="SEQ_CLS" if recipe.task_class is SequenceClassification else "CAUSAL_LM",
                ) if lora else None,
            )  # fmt: skip
            reset_peak_memory()
            start = time.perf_counter()
            trainer.train(resume_from_checkpoint=resume)
            done = {
                "fingerprint": print_,
                "stage": stage.name if stage.measured else f"{stage.name} ({stage.settings})",
                "seconds": round(time.perf_counter() - start, 1),
                "steps": trainer.state.global_step,
                "tokens": tokens_trained(trainer),
                "peak_memory": peak_memory(),
            }
            self._save(trainer, folder)
            with main_process() as first:
                if first:
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                    write_json(folder / "stage.json", done)
            del trainer
            gc.collect()
        self.costs.append({key: done[key] for key in ("stage", "seconds", "tokens", "peak_memory")})

    def _save(self, trainer: DefenseTrainer, folder: Path) -> None:
        # The gathered weights: under FSDP and ZeRO-3 no process holds them all.
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        with main_process() as first:
            if first:
                model = trainer.accelerator.unwrap_model(trainer.model)
                model.load_state_dict(state, assign=True)
                save_model(merged(model), self.tokenizer, folder)

    # ---- Evaluation ----

    def _measure(self, name: str, model_name: str) -> tuple[list[Row], list[dict[str, Any]]]:
        recipe = self.recipe
        folder = self.folder / "evaluation"
        file = folder / f"{name.replace('/', '-')}.json"
        bf16 = bool(recipe.training.get("bf16"))
        print_ = fingerprint(
            name, self.prints.get(model_name, model_name), {k: v["sha256"] for k, v in self.rows.sources.items() if "test" in k},
            recipe.max_new_tokens, str(self.rows.task), bf16, recipe.seed,
        )  # fmt: skip
        done = json.loads(file.read_text()) if file.exists() else {}
        if done.get("fingerprint") != print_:
            reset_peak_memory()
            start = time.perf_counter()
            model = self._load(model_name).to(PartialState().device)
            classes = getattr(self.rows.task, "num_labels", None)
            rows, examples = evaluate_backdoor(
                model,
                self.tokenizer,
                self.rows.task,
                self.rows.test,
                name=name,
                seed=recipe.seed,
                behaviour=known_behaviour(self.rows.task, "") if classes and recipe.method == "locphylax" else None,
                max_new_tokens=recipe.max_new_tokens,
                batch_size=recipe.eval_batch_size,
                bf16=bf16,
            )
            del model
            gc.collect()
            done = {
                "fingerprint": print_,
                "rows": [dataclasses.asdict(row) for row in rows],
                "examples": examples,
                "cost": {
                    "stage": f"evaluation of {name}",
                    "seconds": round(time.perf_counter() - start, 1),
                    "tokens": None,
                    "peak_memory": peak_memory(),
                },
            }
            with main_process() as first:
                if first:
                    write_json(file, done)
        self.costs.append(done["cost"])
        return [Row(**row) for row in done["rows"]], done["examples"]

    def _save_rows(self) -> None:
        folder = self.folder / "data"
        folder.mkdir(exist_ok=True)
        splits = self.rows.splits
        for name, rows in {"clean": splits.clean, "held_out": splits.held_out, "poisoned": self.rows.poisoned}.items():
            if rows is not None and len(rows):
                rows.to_parquet(folder / f"{name}.parquet")


def training_config(stage: Stage, recipe: Recipe, arguments: dict[str, Any], folder: Path):
    """The stage's arguments, with what a run decides for itself.

    Raises:
        `ValueError`: in one line, when an argument's value is refused.
    """
    config = METHODS[recipe.method].config if recipe.method else stage.step.trainer.config_class()
    # Without an accelerator, bf16 and DeepSpeed work only where the CPU is asked for.
    use_cpu = not torch.accelerator.is_available()
    defaults = {"output_dir": str(folder), "seed": recipe.seed, "save_total_limit": 1, "use_cpu": use_cpu}
    try:
        return config(**{**defaults, **arguments})
    except (TypeError, ValueError) as error:
        raise ValueError(f"arguments of {stage.settings}: {' '.join(str(error).split())}") from error


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def finished(folder: Path, print_: str) -> dict[str, Any] | None:
    """What a finished stage noted, if it was made from the same inputs."""
    file = folder / "stage.json"
    noted = json.loads(file.read_text()) if file.exists() else {}
    return noted if noted.get("fingerprint") == print_ else None


def begin(folder: Path, print_: str) -> str | None:
    """Clears a stage's folder, unless it was begun from the same inputs: then gives its last checkpoint."""
    mark, checkpoints = folder / "begun.json", folder / "checkpoints"
    same = mark.exists() and json.loads(mark.read_text())["fingerprint"] == print_
    with main_process() as first:
        if first and not same:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(mark, {"fingerprint": print_})
    return get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None


@contextlib.contextmanager
def main_process():
    """Yields whether this is the first process; the others wait until it is through."""
    state = PartialState()
    try:
        yield state.is_main_process
    finally:
        state.wait_for_everyone()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All or nothing, so that a killed run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8", errors="backslashreplace"
    )
    os.replace(temporary, path)


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def tokens_trained(trainer: DefenseTrainer) -> int:
    """Tokens the optimizer saw, padding left out: rows trained on times their mean length."""
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    args = trainer.args
    rows = (
        trainer.state.global_step
        * args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size
    )
    return round(rows * sum(lengths) / len(lengths))


def versions() -> dict[str, str]:
    names = ("hf-backdoor", "torch", "transformers", "datasets", "accelerate", "peft", "trl")
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}


def refuse_lost_processes() -> None:
    """`accelerate launch` for several CPU processes starts one and says nothing.

    Raises:
        `ValueError`: if several processes were asked for and this is the only one.
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate was asked for several processes and started one (it does so for CPUs): "
            "use `torchrun --nproc_per_node N -m hf_backdoor.run RECIPE`, or num_processes: 1"
        )


def run(recipe: Recipe) -> Results:
    """Runs a recipe to its end: trained, measured, reported and, if it says so, published."""
    results = Run(recipe).execute()
    folder = Path(recipe.output_dir)
    with main_process() as first:
        if first:
            write_report(folder)
            if recipe.push_to_hub:
                publish(folder, recipe.hub_model_id, private=bool(recipe.hub_private_repo))
    return results


def main(arguments: list[str] | None = None) -> int:
    """What `accelerate launch -m hf_backdoor.run` executes."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        refuse_lost_processes()
        if not arguments or arguments[0].startswith("-"):
            raise ValueError("no recipe: accelerate launch -m hf_backdoor.run RECIPE.yaml [--key value ...]")
        recipe = load_recipe(arguments[0], arguments[1:])
        results = run(recipe)
    except ValueError as error:
        print(f"hf-backdoor: {error}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        print("\n" + text_table(results))
        if results.examples:
            print("\n" + examples_text(results))
        print(f"\nReport: {Path(recipe.output_dir, 'report', 'index.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
