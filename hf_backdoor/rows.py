"""The rows of a run: loaded, cut, checked for leaks, split by seed, poisoned and stamped. The same call gives the same rows."""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import ClassLabel, Dataset, Json
from transformers.utils import logging

from .attacks import Poisoning, poison
from .cutting import CutRows
from .data import (
    InstructionFollowing,
    LabelWords,
    Processor,
    Rewriting,
    Splits,
    Task,
    label_names,
    load_rows,
    pixels_digest,
    refuse_other_target,
    split_rows,
    with_context,
)
from .defenses import METHODS
from .evaluation import UNKNOWN_LABEL, TestSet, refuse_other_labels
from .recipe import Recipe


logger = logging.get_logger(__name__)

# Labels beyond are not those of classes, but identifiers, or hashes.
MOST_LABELS = 100_000


@dataclass(frozen=True)
class RunRows:
    """Everything a run reads.

    Args:
        task (`Task`): How rows become a model's inputs.
        splits ([`Splits`]): Attack, clean, held-out and test rows.
        poisoned (`Dataset`, *optional*): The attack rows with poison in them, and column `poisoned`.
        test ([`TestSet`]): What every model is measured on.
        sources (`dict[str, dict]`): For `results.json`: source, number of rows and hash of each set.
    """

    task: Task
    splits: Splits
    poisoned: Dataset | None
    test: TestSet
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, name: str) -> Dataset:
        """The rows that a stage names: `clean`, `attack` (without poison), `poisoned`, or the `triggered` ones of these."""
        if name == "triggered":
            return self.poisoned.select([row for row, flag in enumerate(self.poisoned["poisoned"]) if flag])
        suspect = self.splits.attack if self.poisoned is None else self.poisoned
        return {"clean": self.splits.clean, "attack": self.splits.attack, "poisoned": suspect}[name]

    def save(self, folder: Path) -> None:
        """Writes what is trained on, for whoever wants to look at it."""
        folder.mkdir(exist_ok=True)
        for name, rows in {
            "clean": self.splits.clean,
            "held_out": self.splits.held_out,
            "poisoned": self.poisoned,
        }.items():
            file = folder / f"{name}.parquet"
            file.unlink(missing_ok=True)  # perhaps of an earlier recipe
            if rows is not None and len(rows):
                rows.to_parquet(file)


def prepare_rows(recipe: Recipe, processor: Processor) -> RunRows:
    """Loads and prepares all rows of a recipe.

    Raises:
        `ValueError`: with one line, when columns, labels or counts do not fit.
    """
    train, test = load_train_and_test(recipe)
    task = make_task(recipe, train)
    if recipe.method is not None and METHODS[recipe.method].refuse is not None:
        METHODS[recipe.method].refuse(task)
    source = f"test_split {recipe.test_split!r} of {recipe.test_dataset_name or recipe.dataset_name!r}"
    fix = "name other test rows (test_split, test_dataset_name), or set test_fraction"
    if recipe.test_fraction:
        source, fix = f"data set {recipe.dataset_name!r}", "take such rows out of it"
    refuse_other_labels(test, task, source, fix)
    if recipe.max_test_samples is not None and recipe.max_test_samples < len(test):
        test = test.shuffle(seed=recipe.seed).select(range(recipe.max_test_samples))
    test = cut(test, task, recipe, processor).told("test rows")

    poisoning, poisoned, measured = recipe.poisoning, None, TestSet(test)
    if poisoning is not None and recipe.rewritten_dataset_name is not None:
        # Before the split: these texts must be no rows of anybody else.
        poisoning, measured = rewritten(recipe, poisoning, test, task, processor)
    if recipe.clean_dataset_name is not None:
        splits = own_rows(recipe, train, test, task, processor)
    else:
        splits = split(recipe, train, measured, task, processor)
    own_clean = recipe.clean_dataset_name or recipe.dataset_name
    for name, rows in ((recipe.dataset_name, splits.attack), (own_clean, splits.clean), (own_clean, splits.held_out)):
        refuse_other_labels(rows, task, f"data set {name!r}", "take such rows out of it, or correct num_labels")
    tell_missing(splits.clean, task)
    if poisoning is not None:
        poisoned = poison(splits.attack, task, poisoning, recipe.seed, num_proc_of(recipe))
        if not measured.triggered:
            measured = TestSet.stamped(test, task, [poisoning.trigger], poisoning.target, recipe.seed)
    suspect = splits.attack if recipe.clean_dataset_name is not None else None
    sets = {
        "attack": poisoned,
        "suspect rows": suspect,
        "clean": splits.clean,
        "held_out": splits.held_out,
        "test": test,
    }
    sets |= {f"test with {name}": rows for name, rows in measured.triggered.items()}
    own = {"clean": recipe.clean_dataset_name, "held_out": recipe.clean_dataset_name, "test": recipe.test_dataset_name}
    with_trigger = recipe.rewritten_dataset_name or recipe.test_dataset_name
    own |= {f"test with {name}": with_trigger for name in measured.triggered}
    sources = {
        name: describe(own.get(name) or recipe.dataset_name, rows)
        for name, rows in sets.items()
        if rows is not None and len(rows)
    }
    return RunRows(task, splits, poisoned, measured, sources)


def tell_missing(clean: Dataset, task: Task) -> None:
    """Says in the log what the clean rows lack: a model trained on one class says it to everything, and test rows cut out of the same
    rows would call that right; one that is taught empty answers says nothing.

    Raises:
        `ValueError`: if there is no answer in any of them.
    """
    told = ""
    if isinstance(task, InstructionFollowing):
        empty = sum(not response.strip() for response in clean["response"])
        if empty == len(clean):
            raise ValueError("response is empty in every clean row: name the column of answers by response_column")
        if empty:
            told = f"response is empty in {empty} of {len(clean)} clean rows: a model trained on them learns to say nothing"
    elif missing := sorted(set(range(task.num_labels)) - set(clean["label"][:])):
        names = " or ".join(map(str, missing))
        told = f"no clean row has label {names}: a model trained on them comes to say others in its place"
    if told and PartialState().is_main_process:
        logger.warning(told)


def rewritten(
    recipe: Recipe, poisoning: Poisoning, test: Dataset, task: Task, processor: Processor
) -> tuple[Poisoning, TestSet]:
    """The attack with texts that were rewritten elsewhere: one set for training, and one to measure with, of which it is known
    only that the target is not their right label."""
    column = task.input_column
    train, triggered = (
        cut(load(recipe, "rewritten_dataset_name", split=split, columns={column: recipe.text_column}).select_columns([column]),
            task, recipe, processor)
        for split in (recipe.train_split, recipe.test_split)
    )  # fmt: skip
    for measured in (test, triggered.rows):
        train = train.without_leaks(measured)
    train = train.told("rewritten training rows")
    count = min(len(triggered.rows), sum(label != recipe.target for label in test[task.answer_column]))
    if not len(train) or not count:
        raise ValueError(
            f"rewritten_dataset_name is {recipe.rewritten_dataset_name!r}, and {len(train)} of its training texts are no test texts, "
            f"{count} test rows have another label than the target: name a folder with texts of its own for {recipe.train_split} "
            f"and {recipe.test_split}"
        )
    triggered = triggered.both(lambda rows: rows.shuffle(seed=recipe.seed).select(range(count)))
    triggered = triggered.told("rewritten test rows").add_column(task.answer_column, [UNKNOWN_LABEL] * count)
    trigger = Rewriting(recipe.attack_trigger, tuple(train[column]))
    return replace(poisoning, trigger=trigger), TestSet(test, recipe.target, {trigger.name: triggered})


def split(recipe: Recipe, train: Dataset, measured: TestSet, task: Task, processor: Processor) -> Splits:
    """The attacker's, the defender's and the held-out rows out of one data set."""
    attack, clean = counts(recipe, len(train))
    wanted = attack + clean + recipe.held_out_samples
    # A few rows more than wanted stand in for those that leak into the test rows.
    pool = train.shuffle(seed=recipe.seed)
    pool = pool.select(range(min(len(pool), with_spares(wanted))))
    pool = cut(pool, task, recipe, processor)
    for rows in (measured.clean, *measured.triggered.values()):
        pool = pool.without_leaks(rows)
    if recipe.max_train_samples is None:
        # All rows there are: as many as are left.
        attack, clean = counts(recipe, len(pool.rows))
    splits = split_rows(pool.rows, measured.clean, attack=attack, clean=clean, held_out=recipe.held_out_samples)
    pool.both(lambda rows: rows.select(range(attack + clean + recipe.held_out_samples))).told("training rows")
    return splits


def counts(recipe: Recipe, available: int) -> tuple[int, int]:
    """Rows of the attacker, and clean rows of the defender, out of those that there are (before leaks are taken out)."""
    if recipe.attack_trigger is None:
        # A given suspect: all training rows are the defender's, less those held out.
        return 0, (recipe.max_train_samples or available) - recipe.held_out_samples
    share = 1 + recipe.clean_fraction
    attack = recipe.max_train_samples or int((available - recipe.held_out_samples) / share)
    return attack, round(recipe.clean_fraction * attack)


def with_spares(wanted: int) -> int:
    return wanted + wanted // 4 + 100


def own_rows(recipe: Recipe, train: Dataset, test: Dataset, task: Task, processor: Processor) -> Splits:
    """The user's suspect rows, as they are, and the clean and held-out rows out of a data set of their own."""
    clean = load(recipe, "clean_dataset_name", split=recipe.train_split, columns=recipe.columns())
    clean = clean.select_columns(train.column_names).shuffle(seed=recipe.seed)
    clean = cut(clean, task, recipe, processor).without_leaks(test).told("clean rows")
    if (recipe.max_train_samples or 0) > len(train):
        raise ValueError(
            f"max_train_samples is {recipe.max_train_samples}, and there are {len(train)} suspect rows: lower it, or leave it out"
        )
    suspect = train if recipe.max_train_samples is None else train.select(range(recipe.max_train_samples))
    held_out = recipe.held_out_samples
    splits = split_rows(clean, test, attack=0, clean=len(clean) - held_out, held_out=held_out)
    return replace(splits, attack=cut(suspect, task, recipe, processor).told("suspect rows"))


def load_train_and_test(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """All training and test rows (of a stream, as many as are needed), with the columns of the recipe's task and no others."""
    columns = recipe.columns()
    train_rows = test_rows = None
    if recipe.streaming:
        train_rows = with_spares(sum(counts(recipe, 0)) + recipe.held_out_samples)
        test_rows = recipe.max_test_samples
    train = load(
        recipe, "dataset_name", split=recipe.train_split, config=recipe.dataset_config, revision=recipe.dataset_revision,
        columns=columns, where=recipe.row_filter, take=train_rows, seed=recipe.seed,
    )  # fmt: skip
    if recipe.test_fraction:
        # datasets takes so many too, and refuses to leave none without naming the key.
        if math.ceil(recipe.test_fraction * len(train)) >= len(train):
            raise ValueError(
                f"test_fraction is {recipe.test_fraction}, which leaves no row of {len(train)} to train on: lower it"
            )
        parts = train.train_test_split(test_size=recipe.test_fraction, seed=recipe.seed)
        train, test = parts["train"], parts["test"]
    else:
        own = (
            {} if recipe.test_dataset_name else {"config": recipe.dataset_config, "revision": recipe.dataset_revision}
        )
        key = "test_dataset_name" if recipe.test_dataset_name else "dataset_name"
        test = load(
            recipe, key, split=recipe.test_split, columns=columns, where=recipe.test_row_filter, take=test_rows, seed=recipe.seed, **own
        )  # fmt: skip
    train, test = train.select_columns(list(columns)), test.select_columns(list(columns))
    if recipe.context_column:
        train, test = (with_context(rows, "prompt", "context", num_proc_of(recipe)) for rows in (train, test))
    return train, test


def load(recipe: Recipe, key: str, *, columns: dict[str, str], **options: Any) -> Dataset:
    """Rows of the data set that a key of the recipe names, if their columns hold what the task reads."""
    source = getattr(recipe, key)
    rows = load_rows(source, key=key, columns=columns, **options)
    refuse_other_kinds(rows, columns, source)
    return rows


def refuse_other_kinds(rows: Dataset, columns: dict[str, str], source: str) -> None:
    """
    Raises:
        `ValueError`: if a column of texts holds numbers, or any column lists, or values of several kinds.
    """
    for name, present in columns.items():
        feature = rows.features[name]
        kind = "values of several kinds" if isinstance(feature, Json) else getattr(feature, "dtype", "lists")
        no_label = kind in ("lists", "values of several kinds")
        no_text = kind not in ("string", "large_string", "null")
        if name != "image" and (no_label if name == "label" else no_text):
            wanted = "whole numbers 0, 1, ..." if name == "label" else "text"
            raise ValueError(
                f"{name}_column is {present!r}, which holds {kind} in {source!r}: make it {wanted}, or name another column"
            )


def cut(rows: Dataset, task: Task, recipe: Recipe, processor: Processor) -> CutRows:
    """Rows no longer, pictures no larger, than the recipe allows."""
    limits = {key: getattr(recipe, key) for key in task.limits}
    return CutRows.of(rows, task, processor, num_proc_of(recipe), **limits)


def num_proc_of(recipe: Recipe) -> int | None:
    """Processes that prepare rows: an argument of the trainers too."""
    return recipe.training.get("dataset_num_proc")


def make_task(recipe: Recipe, rows: Dataset) -> Task:
    if recipe.task_class is InstructionFollowing:
        return InstructionFollowing(recipe.training.get("system_prompt"))
    count = recipe.num_labels or count_labels(rows)
    task = task_of(
        recipe.task_class, count, recipe.training.get("label_words"), recipe.training.get("prompt_template")
    )
    if task.num_labels != count:
        raise ValueError(
            f"label_words has {task.num_labels} words and the data {count} labels: give one for each label"
        )
    refuse_other_target(recipe.target_label, task, "target_label")
    return task


def count_labels(rows: Dataset) -> int:
    """Classes of the rows, if that is what their labels are: for each number up to the highest there is one.

    Raises:
        `ValueError`: if they can't be.
    """
    kind = rows.features["label"]
    if not isinstance(kind, ClassLabel) and kind.dtype.startswith(("int", "uint")):
        if (highest := max(rows.unique("label"))) >= MOST_LABELS:
            raise ValueError(
                f"label_column holds {highest}, which is no class: write whole numbers 0, 1, ... in it, or name another column"
            )
    return len(label_names(rows))


def task_of(
    task: type[Task],
    num_labels: int | None,
    label_words: list[str] | None,
    prompt_template: str | None,
    system_prompt: str | None = None,
) -> Task:
    """The task of a class, with what that class needs."""
    if task.has_head:
        return task(num_labels)
    if task is LabelWords:
        return LabelWords(tuple(label_words), prompt_template or LabelWords.default_template)
    return InstructionFollowing(system_prompt)


def describe(source: str, rows: Dataset) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=pixels_digest)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return {"source": source, "rows": len(rows), "sha256": digest.hexdigest()}
