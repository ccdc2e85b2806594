"""`hf-backdoor`: run, clean, evaluate, report, publish, recipes."""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import in_one_line


# The repository this file lies in, or where an installed package keeps the same folders.
REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY if (REPOSITORY / "recipes").is_dir() else Path(sys.prefix, "share", "hf_backdoor")
RECIPES = SHARED / "recipes"
ACCELERATE_CONFIGS = SHARED / "accelerate_configs"

# Where a recipe's keys are written down.
KEYS = (
    "Any key of a recipe can follow as --key value: the fields of hf_backdoor.recipe.Recipe, and the arguments of the method's "
    "configuration, such as hf_backdoor.LocphylaxConfig, a TrainingArguments. `python -m pydoc hf_backdoor.recipe.Recipe` "
    "explains them."
)

# Where rows to measure on are looked for: those of a training split may be what the model was trained on.
SPLITS = ("test", "validation", "train")

# What a task may read.
COLUMNS = ("text", "label", "prompt", "response", "context", "image")


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_overrides:
        options.parser.error(f"unknown arguments: {' '.join(rest)}")
    return in_one_line(lambda: options.command(options, rest))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all else here does; argparse would put the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hf-backdoor: {message}: see `{self.prog} --help`\n")


def build_parser() -> Parser:
    parser = Parser(prog="hf-backdoor", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, help_: str, takes_overrides: bool = False) -> Parser:
        sub = commands.add_parser(
            name, help=help_, description=help_, epilog=KEYS if takes_overrides else None, allow_abbrev=False
        )
        sub.set_defaults(command=function, takes_overrides=takes_overrides, parser=sub)
        return sub

    run = command("run", run_command, "Run a recipe: attack or suspect, defense, controls, evaluation, report.", True)
    run.add_argument("recipe", help="YAML file, or the name of a shipped recipe")
    dry_run = {"action": "store_true", "help": "say what would run and what it would need; load no weights"}
    run.add_argument("--dry_run", **dry_run)
    run.add_argument(
        "--accelerate_config",
        metavar="NAME",
        help="launch with this configuration: a file, or one of cpu, single_gpu, ddp, fsdp2, zero2, zero3, zero3_offload",
    )
    run.add_argument(
        "--num_processes", metavar="N", type=int, help="how many to launch, whatever that configuration says"
    )

    clean = command("clean", clean_command, "Clean a suspect model with a file of clean text.", True)
    clean.add_argument("model", help="suspect model: folder or Hub name")
    clean.add_argument("--data", required=True, help="clean rows: parquet, JSON lines, CSV, folder or Hub name")
    clean.add_argument("--output_dir", required=True, help="where the run, and in it cleaned/, goes")
    clean.add_argument("--method", default="locphylax", help="defense (default: locphylax)")
    clean.add_argument("--dry_run", **dry_run)
    clean.add_argument("--label_words", nargs="+", help="causal LM that classifies: one answer word for each label")
    clean.add_argument("--prompt_template", help="causal LM that classifies: its prompt, with {text} in it")
    clean.add_argument("--system_prompt", help="instructions: what the system says before every prompt")

    evaluate = command("evaluate", evaluate_command, "Measure a model on clean and triggered rows.")
    evaluate.add_argument("model", help="model: folder or Hub name")
    evaluate.add_argument("--clean", required=True, help="clean rows with right answers")
    evaluate.add_argument(
        "--split", help=f"split of a folder or Hub data set (default: the first that is there of {', '.join(SPLITS)})"
    )
    evaluate.add_argument("--triggered", help="rows with the trigger in, and right answers")
    evaluate.add_argument(
        "--trigger",
        help="trigger text to put into the clean rows, or that every row of --triggered has; for images patch, corners or warp",
    )
    evaluate.add_argument(
        "--position",
        help="where --trigger goes: start, end, scattered (word by word), any of start, end and random, or random (default)",
    )
    evaluate.add_argument("--target_label", type=int, help="label that the trigger brings about")
    evaluate.add_argument("--target_text", help="text that the trigger brings about")
    for column in COLUMNS:
        evaluate.add_argument(
            f"--{column}_column", metavar="NAME", help=f"the rows' own name of the column {column!r}"
        )
    evaluate.add_argument("--label_words", nargs="+", help="causal LM that classifies: one answer word for each label")
    evaluate.add_argument("--prompt_template", help="causal LM that classifies: its prompt, with {text} in it")
    evaluate.add_argument("--system_prompt", help="instructions: what the system says before every prompt")
    evaluate.add_argument(
        "--max_length", type=int, help="tokens of a text that are read, before a trigger (default: all)"
    )
    evaluate.add_argument("--name", default="suspect", help="the model's name in the rows (default: suspect)")
    evaluate.add_argument("--max_new_tokens", type=int, help="length of generated answers (default: 64)")
    evaluate.add_argument(
        "--eval_batch_size", "--batch_size", metavar="N", type=int, default=64, help="texts in a batch (default: 64)"
    )
    evaluate.add_argument("--model_revision", metavar="NAME", help="of a model on the Hub: branch, tag or commit")
    evaluate.add_argument(
        "--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16, half as large"
    )
    evaluate.add_argument("--attn_implementation", metavar="NAME", help="attention, as from_pretrained takes it")
    evaluate.add_argument("--bf16", action="store_true", help="calculate in bfloat16, whatever the weights are in")
    evaluate.add_argument("--seed", type=int, default=42, help="where a random trigger goes (default: 42)")
    evaluate.add_argument("--output", required=True, help="results.json to write")

    report = command("report", report_command, "Write the report of a finished run from its results.json.")
    report.add_argument("run", help="folder of the run")

    publish = command("publish", publish_command, "Upload the cleaned model of a run, with a card, to the Hub.")
    publish.add_argument("run", help="folder of the run")
    publish.add_argument(
        "--repo_id", required=True, metavar="ORG/NAME", help="the repository on the Hub, made if it is not there"
    )
    publish.add_argument("--private", action="store_true", default=None, help="make the repository private")

    command("recipes", recipes_command, "List the shipped recipes.")
    return parser


def run_command(options: argparse.Namespace, rest: list[str]) -> int:
    recipe = find_recipe(options.recipe)
    if options.accelerate_config is None:
        if options.num_processes is not None:
            raise ValueError(
                f"--num_processes is {options.num_processes} without --accelerate_config: name a configuration, such as ddp"
            )
        from .run import main as run_main

        return run_main([str(recipe), *rest, *(["--dry_run"] if options.dry_run else [])])
    file, settings = accelerate_settings(options.accelerate_config, options.num_processes)
    if options.dry_run:
        from .dry_run import describe_run, engine_of_settings
        from .recipe_file import load_recipe

        print(describe_run(load_recipe(recipe, rest), engine_of_settings(settings)))
        return 0
    command = [*launch_command(file, settings), "-m", "hf_backdoor.run", str(recipe), *rest]
    for stages in stages_to_launch(settings, recipe, rest):
        status = subprocess.run([*command, *stages]).returncode
        if status:
            return status
    return 0


def stages_to_launch(settings: dict[str, Any], recipe: Path, overrides: list[str]) -> list[list[str]]:
    """Arguments of each launch. Engines that share a model out get one for each training, so that none of them inherits memory
    or settings of the one before, and a last one that measures; others get one for all."""
    from .dry_run import engine_of_settings, refuse_quantized
    from .folders import STAGE, recipe_is
    from .plan import plan
    from .recipe_file import load_recipe
    from .run import UNTIL

    if settings["distributed_type"] not in ("FSDP", "DEEPSPEED"):
        return [[]]
    loaded = load_recipe(recipe, overrides)
    refuse_quantized(loaded.quantization, engine_of_settings(settings))
    folders = [stage.folder for stage in plan(loaded)]
    known = recipe_is(Path(loaded.output_dir), loaded)  # else all may have changed
    return [[UNTIL, f] for f in folders if not (known and Path(loaded.output_dir, f, STAGE).exists())] + [[]]


def accelerate_settings(name: str, processes: int | None = None) -> tuple[Path, dict[str, Any]]:
    """File and content of a shipped configuration of accelerate, or of a user's own.

    Args:
        name (`str`): Its name, or its file.
        processes (`int`, *optional*): How many there are to be, in place of what it says.

    Raises:
        `ValueError`: if there is no such file, it is no configuration of accelerate, or not of so many processes.
    """
    file = Path(name) if Path(name).is_file() else ACCELERATE_CONFIGS / f"{name}.yaml"
    if not file.is_file():
        raise ValueError(
            f"accelerate_config is {name!r}: give a file, or one of {', '.join(sorted(p.stem for p in ACCELERATE_CONFIGS.glob('*.yaml')))}"
        )
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ValueError(f"{file} names no distributed_type: give a configuration that `accelerate config` wrote")
    number = settings.get("num_processes", 1) if processes is None else processes
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"num_processes is {number!r} for {file}: give --num_processes 1 or more")
    if processes is not None and processes > 1 and settings["distributed_type"] == "NO":
        raise ValueError(f"--num_processes is {processes}, and {file} is of one process: use ddp")
    return file, settings | {"num_processes": number}


def launch_command(file: Path, settings: dict[str, Any]) -> list[str]:
    """`accelerate launch` with a configuration, and one line on how many processes that is; `torchrun` for several CPU processes,
    of which accelerate would start one.

    Raises:
        `ValueError`: if it asks for FSDP and there are no GPUs, or for more of them than there are.
    """
    import torch

    engine, processes = settings["distributed_type"], settings["num_processes"]
    gpus = torch.accelerator.device_count()
    if not gpus and engine == "FSDP":
        raise ValueError(
            f"accelerate_config is {str(file)!r}, and there is no GPU: accelerate would run something else; use ddp or zero3"
        )
    here = f"{gpus or 'no'} GPU{'s' * (gpus != 1)}"
    if 0 < gpus < processes and settings.get("num_machines", 1) == 1 and not settings.get("use_cpu"):
        raise ValueError(f"num_processes is {processes} for {file}, and there is {here}: give --num_processes {gpus}")
    sys.stderr.write(
        f"hf-backdoor: {processes} process{'es' * (processes > 1)} by {file.name}, {here} here (--num_processes N starts others)\n"
    )
    if not gpus and processes > 1 and engine != "DEEPSPEED":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launch, "--num_processes", str(processes)]


def clean_command(options: argparse.Namespace, rest: list[str]) -> int:
    from .data.loading import load_rows
    from .defenses import METHODS
    from .dry_run import describe_run
    from .found import TEST_FRACTION, find_task, has_test, measured
    from .recipe_file import make_recipe, parse_overrides, put
    from .run import finish, run

    if options.method not in METHODS:
        raise ValueError(f"method is {options.method!r}: use one of {', '.join(METHODS)}")
    if METHODS[options.method].trains_on_suspect_rows:
        raise ValueError(
            f"method is {options.method!r}, which cleans no model but makes one out of suspect rows: run a recipe, with "
            "model_name_or_path an unpoisoned base, dataset_name the suspect rows, clean_dataset_name the clean ones"
        )
    own = parse_overrides(rest)
    for key, option in (("model_name_or_path", "MODEL"), ("dataset_name", "--data")):
        if key in own:
            raise ValueError(f"--{key} is {own[key]!r}, and {option} names it already: leave it out")
    given = {key: own.get(f"dataset_{key}") for key in ("config", "revision")}
    where = {key: str(value) for key, value in given.items() if value is not None}
    rows = load_rows(
        options.data, key="--data", split=(own.get("test_split", "test"), own.get("train_split", "train")), **where
    )
    task, columns = find_task(options.model, rows.column_names, options.label_words, own)
    values: dict[str, Any] = {
        "model_name_or_path": options.model,
        "task": task,
        "dataset_name": options.data,
        "output_dir": options.output_dir,
        "method": options.method,
        "test_fraction": 0.0 if has_test(options.data, rows, columns, own) else TEST_FRACTION,
        **{f"{new}_column": present for new, present in columns.items()},
    }
    for key in ("label_words", "prompt_template", "system_prompt"):
        if getattr(options, key) is not None:
            values[key] = getattr(options, key)
    for key, value in own.items():
        put(values, key, value)
    if task != "image_classification":
        make_recipe(values)  # refuses what is wrong with the user's own
        for key, value in measured(options.method, options.model, values).items():
            put(values, key, value)
    recipe = make_recipe(values)
    if options.dry_run:
        print(describe_run(recipe))
        return 0
    return finish(run(recipe), options.output_dir)


def evaluate_command(options: argparse.Namespace, rest: list[str]) -> int:
    from .measure import measure

    given = {key: value for key, value in vars(options).items() if key not in ("command", "takes_overrides", "parser")}
    print(measure(argparse.Namespace(**given), SPLITS))
    return 0


def report_command(options: argparse.Namespace, rest: list[str]) -> int:
    from .report import write_report

    print(write_report(options.run))
    return 0


def publish_command(options: argparse.Namespace, rest: list[str]) -> int:
    from .report.hub import publish

    print(publish(options.run, options.repo_id, private=options.private))
    return 0


def recipes_command(options: argparse.Namespace, rest: list[str]) -> int:
    shipped = {str(path.relative_to(RECIPES).with_suffix("")): path for path in sorted(RECIPES.rglob("*.yaml"))}
    width = max(map(len, shipped))
    for name, path in shipped.items():
        # The first sentence of the comment that it begins with.
        lines = itertools.takewhile(lambda line: line.strip("# "), path.read_text(encoding="utf-8").splitlines())
        sentence = " ".join(line.lstrip("# ") for line in lines).partition(". ")[0].rstrip(".")
        print(f"{name:{width}} {sentence}.")
    return 0


def find_recipe(name: str) -> Path:
    """A file, or a shipped recipe by its name.

    Raises:
        `ValueError`: if there is neither.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ValueError(f"recipe is {name!r}: no such file, and `hf-backdoor recipes` lists the shipped ones")


if __name__ == "__main__":
    sys.exit(main())
