"""`hf-backdoor evaluate`: one model, measured on rows of the user's own, by the same lines as the models of a run."""

import time
from argparse import Namespace
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from .contradictions import DTYPES, LEAST
from .cutting import CutRows
from .data import load_rows, refuse_other_target
from .evaluation import Results, TestSet, evaluate_backdoor, refuse_other_labels
from .evaluation.evaluate import is_target, refuse_without_trigger
from .evaluation.results import refuse_other_model
from .found import find_columns, find_task, renamed
from .models import cost, load_model, load_processor, reset_peak_memory
from .recipe import TASKS
from .report.tables import text_table
from .rows import describe, task_of
from .versions import versions


# Options that are read for one task only.
OF_A_TASK = {
    "label_words": "label_words",
    "prompt_template": "label_words",
    "system_prompt": "instruction_following",
    "max_new_tokens": "instruction_following",
    "context_column": "instruction_following",
}


def measure(options: Namespace, splits: tuple[str, ...]) -> str:
    """Measures a model, and writes `results.json`.

    Args:
        options (`Namespace`): Those of `hf-backdoor evaluate --help`.
        splits (`tuple[str, ...]`): Where rows are looked for if no split is named, in this order.

    Returns:
        `str`: What was found, as a table.

    Raises:
        `ValueError`: with one line that names the option, its value and the fix; all that can be told without the weights before
            they are loaded.
    """
    check_options(options)
    target = options.target_label if options.target_text is None else options.target_text
    files = [Path(source).is_file() for source in (options.clean, options.triggered) if source is not None]
    if options.split is not None and all(files):
        raise ValueError(
            f"--split is {options.split!r}, and {options.clean!r} is one file, which has none: leave it out"
        )
    clean = load_rows(options.clean, key="--clean", split=options.split or splits)
    split = None if files[0] else str(clean.split)
    name, columns = find_task(options.model, clean.column_names, options.label_words, vars(options))
    for key in of_other_tasks(name):
        if getattr(options, key) is not None:
            raise ValueError(f"--{key} is {getattr(options, key)!r}, and the task is {name}: leave it out")
    if isinstance(target, str) != (name == "instruction_following") and target is not None:
        raise ValueError(
            f"target is {target!r} and the task {name}: give --target_{'text' if isinstance(target, int) else 'label'}"
        )
    if isinstance(target, str):
        refuse_other_target(target, TASKS[name](), "--target_text")
    trigger = None
    if options.trigger is not None:
        position = [] if options.position is None else [options.position]
        if position and name == "image_classification":
            raise ValueError(f"--position is {options.position!r}, and the trigger goes into images: leave it out")
        trigger = TASKS[name].trigger(options.trigger, *position)
    clean, triggered = renamed(clean, columns, options.clean), None
    if options.triggered is not None:
        triggered = load_rows(options.triggered, key="--triggered", split=options.split or splits)
        columns = find_columns(name, triggered.column_names, vars(options))
        triggered = renamed(triggered, columns, options.triggered)
    loaded = {"revision": options.model_revision}
    processor = load_processor(options.model, TASKS[name], **loaded)
    loaded |= {"seed": options.seed, "dtype": options.dtype, "attn_implementation": options.attn_implementation}
    reset_peak_memory()
    start = time.perf_counter()
    model = load_model(options.model, TASKS[name], **loaded).to(PartialState().device)
    labels = model.config.num_labels if TASKS[name].has_head else None
    task = task_of(TASKS[name], labels, options.label_words, options.prompt_template, options.system_prompt)
    refuse_other_target(target, task, "--target_label")
    fix = (
        "give rows with right labels"
        if Path(options.clean).is_file()
        else "take another --split, or rows with right labels"
    )
    refuse_other_labels(clean, task, f"--clean {options.clean!r}", fix)

    def cut(rows: Dataset, kind: str) -> Dataset:
        if options.max_length is None:
            return rows
        return CutRows.of(rows, task, processor, max_length=options.max_length).told(kind)

    clean = cut(clean, "clean rows")
    sources = {"test": describe(options.clean, clean)}
    if triggered is not None:
        triggered = cut(triggered, "triggered rows")
        refuse_other_labels(triggered, task, f"--triggered {options.triggered!r}")
        if all(is_target(answer, target) for answer in triggered[task.answer_column][:]):
            raise ValueError(
                f"--triggered {options.triggered!r} has {target!r} as every row's {task.answer_column}, which is the target: give "
                "the right ones, which the rows would have without the trigger"
            )
        sources["test with trigger"] = describe(options.triggered, triggered)
        refuse_without_trigger(triggered, clean, task, trigger, options.triggered)
        test = TestSet(clean, target, {Path(options.triggered).stem: triggered})
    elif trigger is not None:
        test = TestSet.stamped(clean, task, [trigger], target, options.seed)
    else:
        test = TestSet(clean)
    rows, examples = evaluate_backdoor(
        model,
        processor,
        task,
        test,
        name=options.name,
        seed=options.seed,
        batch_size=options.eval_batch_size,
        bf16=options.bf16,
        **({} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}),
    )
    costs = [cost(f"evaluation of {options.name}", start)]
    # No recipe: the command, as a report names it.
    made_by = {"command": "evaluate", **vars(options), "split": split}
    results = Results(rows, costs, made_by, versions(), sources, examples)
    results.save(options.output)
    return f"Clean rows: {len(clean)} of {options.clean}{f', split {split}' if split else ''}\n\n{text_table(results)}"


def of_other_tasks(name: str) -> list[str]:
    """Options that a task does not read."""
    task = TASKS[name]
    columns = dict.fromkeys(column for other in TASKS.values() for column in (other.input_column, other.answer_column))
    unread = [f"{column}_column" for column in columns if column not in (task.input_column, task.answer_column)]
    unread += ["max_length"] * ("max_length" not in task.limits)
    return unread + [key for key, only in OF_A_TASK.items() if only != name]


def check_options(options: Namespace) -> None:
    """Refuses what no model and no rows are needed to refuse, and makes the folder that is written to.

    Raises:
        `ValueError`: with one line that names the option, its value and the fix.
        `OSError`: if the folder can't be made.
    """
    for key, least in LEAST.items():
        value = getattr(options, key, None)
        if value is not None and value < least:
            raise ValueError(f"--{key} is {value}: it must be at least {least}")
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype is {options.dtype!r}: use one of {', '.join(DTYPES)}")
    refuse_other_model(options.name, "--name")
    if options.trigger is None and options.triggered is None:
        for key in ("target_label", "target_text"):
            if getattr(options, key) is not None:
                raise ValueError(
                    f"--{key} is {getattr(options, key)!r} without a trigger: give --trigger or --triggered"
                )
    elif options.target_label is None and options.target_text is None:
        raise ValueError("a trigger without a target: give --target_label or --target_text")
    if options.target_label is not None and options.target_text is not None:
        raise ValueError(
            f"--target_label is {options.target_label}, and --target_text is {options.target_text!r}: give the one that the model answers with"
        )
    if options.position is not None and options.trigger is None:
        raise ValueError(
            f"--position is {options.position!r} without --trigger, whose it is: give that, or leave it out"
        )
    if options.model_revision is not None and Path(options.model).exists():
        raise ValueError(
            f"--model_revision is {options.model_revision!r}, and {options.model!r} is on this machine, as it is: leave it out"
        )
    if Path(options.output).is_dir():
        raise ValueError(
            f"--output is {options.output!r}, a folder: name the file to write, {options.output}/results.json"
        )
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)  # what fails, fails before hours of measuring
