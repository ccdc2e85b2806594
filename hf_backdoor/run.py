"""A whole run: `accelerate launch -m hf_backdoor.run recipe.yaml [--key value ...]`.

Data, attack (or a given suspect), the defense's stages, its controls, evaluation, report and publishing, in this
order. Each stage writes one folder with, first, a `begun.json` that says what it is made from and, last, a `stage.json`; a
stage whose inputs have not changed is not run again, so a run that was killed goes on where it stopped.

    runs/NAME/
      recipe.yaml  data/  base/  reference/  suspect/  inject/  cleaned/  controls/CONTROL/STAGE/  results.json  report/
"""

import dataclasses
import errno
import gc
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig
from safetensors import SafetensorError

from .contradictions import check_machine
from .data import Processor, row_lengths
from .defenses import DefenseTrainer
from .defenses.engines import forget_engine, zero3_launched
from .dry_run import describe_run
from .errors import in_one_line
from .evaluation import Results, Row, evaluate_backdoor
from .evaluation.differences import as_json
from .evaluation.evaluate import COUNTING
from .folders import (
    STAGE,
    alone_in,
    begin,
    fingerprint,
    finished,
    main_process,
    noted,
    recipe_is,
    refuse_to_clear,
    say_why_again,
    write_json,
    write_yaml,
)
from .layers import check_heads
from .model_files import without_weights
from .models import content, cost, load_processor, reset_peak_memory
from .plan import Stage, base_model_name, check_launch, lora_arguments, plan, stage_arguments, training_config, written
from .processes import find_processes, refuse_lost_processes
from .recipe import Recipe
from .recipe_file import load_recipe
from .report import write_report
from .report.hub import publish
from .report.tables import examples_text, text_table
from .rows import RunRows, prepare_rows
from .run_models import RunModels
from .versions import together, versions


# What `hf-backdoor run --accelerate_config` adds, to launch a run stage by stage: the folder of the stage to stop after.
UNTIL = "--until_stage"
# Bytes that are left on a disk when a file of weights does not fit any more: less than its last page.
ALMOST_FULL = 2**20


@dataclass
class Run:
    """A recipe being run: its folder, its rows, and what was measured so far."""

    recipe: Recipe
    processor: Processor = None
    reads: str = ""
    rows: RunRows = None
    models: RunModels = None
    costs: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def execute(self, until: str | None = None) -> Results | None:
        """Runs what is not done yet, and writes `results.json`.

        Args:
            until (`str`, *optional*): Folder of the stage to stop after, with nothing measured: what is launched stage by
                stage is measured at the end.
        """
        recipe = self.recipe
        check_machine(recipe)
        # The dry run is content with the configuration of a model that is not there yet.
        if not recipe.trains_suspect and without_weights(recipe.model_name_or_path):
            raise ValueError(
                f"model_name_or_path is {recipe.model_name_or_path!r}, a suspect without weights: name one that has some, or "
                "set attack_trigger and target_label to train one"
            )
        base, stages = base_model_name(recipe), plan(recipe)
        for stage in stages:
            training_config(stage, recipe, stage_arguments(stage, recipe))  # a wrong value is not found after hours
        refuse_to_clear(recipe, written(recipe, stages, until))
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone_in(self.folder):
            return self._execute(base, stages, until)

    def _execute(self, base: str, stages: list[Stage], until: str | None) -> Results | None:
        recipe = self.recipe
        self.processor = load_processor(recipe.model_name_or_path, recipe.task_class, revision=recipe.model_revision)
        # Before it is used: to cut texts sets something in a tokenizer.
        self.reads = fingerprint(content(self.processor))
        # Two processes that build one cache of a file at once trip over each other's temporary files.
        with PartialState().main_process_first():
            self.rows = prepare_rows(recipe, self.processor)
        check_heads(recipe, self.rows.task)
        self.models = RunModels(recipe, self.processor, self.rows.task)
        with main_process() as first:
            if first:
                if not recipe_is(self.folder, recipe):
                    self._drop_evidence()
                write_yaml(self.folder / "recipe.yaml", recipe.flat())
                self.rows.save(self.folder / "data")
        measured: list[tuple[list[Row], list[dict[str, Any]]]] = []
        check_launch(stages, zero3_launched())
        if base == "base":
            self.models.convert()
        if recipe.reference not in (None, "train") and until is None:
            measured.append(self._measure("reference", base if recipe.reference == "base" else recipe.reference))
        if not recipe.trains_suspect and until is None:
            measured.append(self._measure("suspect", base))
        for stage in stages:
            # A student from elsewhere may lie in a folder of that name.
            made_here = recipe.student_layers is not None and "student" not in self.models.prints
            if stage.parent == "student" and made_here:
                self.models.make_student()
            self._train(stage)
            if stage.folder == until:
                return None
            if stage.measured and until is None:
                measured.append(self._measure(stage.name, stage.folder))
        results = Results(
            rows=[row for rows, _ in measured for row in rows],
            costs=self.costs,
            recipe=recipe.flat(),
            versions=together(self.versions),
            data=self.rows.sources,
            examples=[example for _, examples in measured for example in examples],
        )
        with main_process() as first:
            if first:
                results.save(self.folder / "results.json")
        return results

    # ---- Stages ----

    def _train(self, stage: Stage) -> None:
        folder, recipe = self.folder / stage.folder, self.recipe
        arguments = stage_arguments(stage, recipe)
        if stage.as_long_as is not None:
            arguments["max_steps"] = finished(self.folder / stage.as_long_as, self.models.prints[stage.as_long_as])[
                "steps"
            ]
        held_out = self.rows.splits.held_out if len(self.rows.splits.held_out) and stage.rows == "clean" else None
        if held_out is None:
            arguments |= {"eval_strategy": "no", "load_best_model_at_end": False}
        suspect_rows = "attack" if recipe.attack_trigger is not None else "suspect rows"
        source = self.rows.sources["clean" if stage.rows == "clean" else suspect_rows]["sha256"]
        peft = lora_arguments(recipe) if recipe.use_peft and stage.settings not in ("reference", "suspect") else None
        # A stage that trains no model trains no adapter either: nothing of it can be quantized.
        quantization = recipe.quantization if peft and stage.step.makes_model else None
        made_from = {
            **arguments,
            **{name if name.startswith("lora_") else f"lora_{name}": value for name, value in (peft or {}).items()},
            "quantization": quantization,
            "trainer": stage.step.trainer.__name__,
            "model": self.models.origin(stage.parent),
            **{argument: self.models.origin(name) for argument, name in stage.inputs.items()},
            "rows": stage.rows,
            "data": source,
            "held-out data": held_out and self.rows.sources["held_out"]["sha256"],
            "clean data": self.rows.sources["clean"]["sha256"] if stage.step.with_clean else None,
            **self._common(),
        }
        print_ = self.models.prints[stage.folder] = fingerprint(made_from)
        done = finished(folder, print_)
        if done is None:
            with main_process() as first:
                if first:
                    self._drop_evidence()
            resume = begin(folder, made_from)
            config = training_config(stage, recipe, arguments)
            trainer = stage.step.trainer(
                model=self.models.load(stage.parent, quantization),
                args=config,
                train_dataset=self.rows.of(stage.rows),
                eval_dataset=held_out,
                processing_class=self.processor,
                task=self.rows.task,
                peft_config=LoraConfig(**peft) if peft else None,
                **({"clean_dataset": self.rows.of("clean")} if stage.step.with_clean else {}),
                **{
                    # What the run made is loaded when it is needed; a model from elsewhere may have a revision, and one
                    # beside quantized weights is quantized too.
                    argument: self.models.path(name)
                    if name in self.models.prints and not (quantization and argument.endswith("_model"))
                    else self.models.load(name, quantization)
                    for argument, name in stage.inputs.items()
                },
            )
            reset_peak_memory()
            start = time.perf_counter()
            trainer.train(resume_from_checkpoint=resume)
            done = {
                "fingerprint": print_,
                **cost(
                    stage.name if stage.measured else f"{stage.name} ({stage.settings})",
                    start,
                    tokens_trained(trainer),
                ),
                "steps": trainer.state.global_step,
                "versions": versions(),
            }
            findings = trainer.findings(self.rows.of("poisoned") if recipe.trains_suspect else None)
            trainer.gather()
            self.models.save(trainer, stage, findings)
            with main_process() as first:
                if first:
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                    write_json(folder / STAGE, done)
            del trainer, config
            gc.collect()
            forget_engine()
        self.costs.append({key: done[key] for key in ("stage", "seconds", "tokens", "peak_memory")})
        self.versions.append(done["versions"])

    # ---- Evaluation ----

    def _measure(self, name: str, model_name: str) -> tuple[list[Row], list[dict[str, Any]]]:
        recipe = self.recipe
        folder = self.folder / "evaluation"
        file = folder / f"{name.replace('/', '-')}.json"
        bf16 = bool(recipe.training.get("bf16"))
        made_from = {
            "way of counting": COUNTING,
            "model": self.models.origin(model_name),
            "target": recipe.target,
            "known_response": self._known_response(),
            "max_new_tokens": recipe.max_new_tokens,
            "bf16": bf16,
            **{name: entry["sha256"] for name, entry in self.rows.sources.items() if "test" in name},
            **self._common(),
        }
        print_ = fingerprint(made_from)
        done = noted(file)
        if done.get("fingerprint") != print_:
            say_why_again(f"{name} is measured", done, made_from)
            reset_peak_memory()
            start = time.perf_counter()
            model = self.models.load(model_name).to(PartialState().device)
            rows, examples = evaluate_backdoor(
                model,
                self.processor,
                self.rows.task,
                self.rows.test,
                name=name,
                seed=recipe.seed,
                known_response=self._known_response(),
                max_new_tokens=recipe.max_new_tokens,
                batch_size=recipe.eval_batch_size,
                bf16=bf16,
            )
            del model
            gc.collect()
            done = {
                "fingerprint": print_,
                "made_from": as_json(made_from),
                "rows": [dataclasses.asdict(row) for row in rows],
                "examples": examples,
                "cost": cost(f"evaluation of {name}", start),
                "versions": versions(),
            }
            with main_process() as first:
                if first:
                    write_json(file, done)
        self.costs.append(done["cost"])
        self.versions.append(done["versions"])
        return [Row(**row) for row in done["rows"]], done["examples"]

    def _common(self) -> dict[str, Any]:
        """What every stage and every measurement is made from."""
        recipe = self.recipe
        return {
            "task": str(self.rows.task),
            "tokenizer or image processor": self.reads,
            "seed": recipe.seed,
            "dtype": recipe.dtype,
            "attn_implementation": recipe.attn_implementation,
        }

    def _known_response(self) -> str | None:
        """What the method plants, if it plants anything."""
        default = getattr(self.recipe.config_class, "known_response", None)
        return self.recipe.training.get("known_response", default)

    def _drop_evidence(self) -> None:
        """What tells of models that are about to be replaced."""
        (self.folder / "results.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "report", ignore_errors=True)


def tokens_trained(trainer: DefenseTrainer) -> int | None:
    """Tokens the optimizer saw, padding left out: rows trained on times their mean length. Pictures have none."""
    if "input_ids" not in trainer.train_dataset.column_names:
        return None
    lengths = row_lengths(trainer.train_dataset)
    args = trainer.args
    rows = (
        trainer.state.global_step
        * args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size
    )
    return round(rows * sum(lengths) / len(lengths))


def run(recipe: Recipe, until: str | None = None) -> Results | None:
    """Runs a recipe to its end: trained, measured, reported and, if it says so, published; or to the end of one stage."""
    folder = Path(recipe.output_dir)
    try:
        results = Run(recipe).execute(until)
    except (RuntimeError, SafetensorError):  # torch's says nothing of a disk
        if folder.exists() and shutil.disk_usage(folder).free < ALMOST_FULL:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from None
        raise
    if results is None:
        return None
    with main_process() as first:
        if first:
            write_report(folder)
            if recipe.push_to_hub:
                publish(folder, recipe.hub_model_id, private=recipe.hub_private_repo)
    return results


def finish(results: Results, output_dir: str) -> int:
    """Shows what a run found."""
    if PartialState().is_main_process:
        print("\n" + text_table(results))
        if results.examples:
            print("\n" + examples_text(results))
        print(f"\nReport: {Path(output_dir, 'report', 'index.html')}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """What `accelerate launch -m hf_backdoor.run` executes."""
    given = sys.argv[1:] if arguments is None else arguments
    return in_one_line(lambda: _main(given))


def _main(arguments: list[str]) -> int:
    refuse_lost_processes()
    find_processes()
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("no recipe: accelerate launch -m hf_backdoor.run RECIPE.yaml [--key value ...]")
    until = None
    if UNTIL in arguments[:-1]:
        position = arguments.index(UNTIL)
        until = arguments[position + 1]
        arguments = arguments[:position] + arguments[position + 2 :]
    recipe = load_recipe(arguments[0], [item for item in arguments[1:] if item != "--dry_run"])
    if "--dry_run" in arguments:
        described = describe_run(recipe)
        if PartialState().is_main_process:
            print(described)
        return 0
    results = run(recipe, until)
    status = 0 if results is None else finish(results, recipe.output_dir)
    # A process that leaves the group without a word takes a slower one's last exchange down with it.
    PartialState().destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
