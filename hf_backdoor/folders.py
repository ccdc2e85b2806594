"""Folders that know what they were made from: how a killed run finds what is done, and what it must do again."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers.utils import logging

from .defenses.checkpoints import last_checkpoint
from .evaluation.differences import as_json, differences, recipe_differences
from .recipe import Recipe


logger = logging.get_logger(__name__)

# How a recipe begins that a run has written.
WRITTEN = "# The recipe of this run, as hf-backdoor resolved it.\n"
# What a stage's folder has in it from its first moment, and when it is done.
BEGUN, STAGE = MARKS = ("begun.json", "stage.json")

# Keys that may name what an earlier run has left in the same folder.
READ = (
    "model_name_or_path", "reference", "student_model_name_or_path", "dataset_name", "test_dataset_name", "clean_dataset_name",
    "rewritten_dataset_name",
)  # fmt: skip


def fingerprint(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def noted(file: Path) -> dict[str, Any]:
    """What a run has noted in a file; nothing where there is none, or one that is no note."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def finished(folder: Path, print_: str) -> dict[str, Any] | None:
    """What a finished stage noted, if it was made from the same parts."""
    note = noted(folder / STAGE)
    return note if note.get("fingerprint") == print_ else None


def refuse_to_clear(recipe: Recipe, stages: list[str]) -> None:
    """Before anything is written: a run writes over what runs have made, and over nothing else.

    Args:
        recipe ([`Recipe`]): What is to be run.
        stages (`list[str]`): Folders of the run that it may clear.

    Raises:
        `ValueError`: if something of somebody else's is in its way, or what this run is to read.
    """
    run = Path(recipe.output_dir)
    for path in (run, *run.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir is {str(run)!r}, and {str(path)!r} is a file: choose another output_dir")
    file = run / "recipe.yaml"
    known = file.is_file() and file.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN)
    own = [] if known else ["recipe.yaml", "results.json", "data", "report", "evaluation"]
    foreign = [name for name in stages if not any((run / name / mark).exists() for mark in MARKS)]
    for path in (run / name for name in own + foreign):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ValueError(
                f"output_dir is {str(run)!r}, and its {path.relative_to(run)} was not made by a run, and this one would clear it: "
                "move it, or choose another output_dir"
            )
    for key in READ:
        name = getattr(recipe, key)
        if name is None or not Path(name).exists():
            continue
        if any(Path(name).resolve().is_relative_to((run / written).resolve()) for written in [*stages, "data"]):
            raise ValueError(
                f"{key} is {name!r}, which this run would write over: choose another output_dir than {str(run)!r}"
            )
        if key.endswith("dataset_name") and run.resolve().is_relative_to(Path(name).resolve()):
            # A folder's rows are those of all files in it.
            raise ValueError(
                f"output_dir is {str(run)!r}, in {name!r}, which is {key}: what the run writes would be read as rows; choose another "
                "output_dir"
            )


def begin(folder: Path, made_from: dict[str, Any]) -> str | None:
    """Clears a stage's folder, unless it was begun from the same parts: then gives its last checkpoint."""
    with main_process() as first:
        if first:
            clear(folder, made_from)
    with main_process():  # clears what a kill has left half written
        return last_checkpoint(folder / "checkpoints")


def clear(folder: Path, made_from: dict[str, Any]) -> None:
    """Empties a stage's folder, unless it was begun from the same parts, and says why it is made again."""
    mark, print_ = folder / BEGUN, fingerprint(made_from)
    if noted(mark).get("fingerprint") == print_:
        return
    say_why_again(f"{folder} is made", noted(mark) or noted(folder / STAGE), made_from)
    # At no moment may a kill leave a folder that looks finished, or like somebody else's.
    write_json(mark, {"fingerprint": None})
    (folder / STAGE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()
    write_json(mark, {"fingerprint": print_, "made_from": as_json(made_from)})


def say_why_again(what: str, before: dict[str, Any], made_from: dict[str, Any]) -> None:
    """One line in the log, where there was one before that was made from something else."""
    if before.get("fingerprint") is not None:
        changed = differences(made_from, before["made_from"]) if "made_from" in before else []
        logger.warning(f"{what} again: {', '.join(changed) or 'what it was made from was not noted'}")


def recipe_is(folder: Path, recipe: Recipe) -> bool:
    """Whether a run's folder was last written by this recipe, whatever it is to publish."""
    try:
        before = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(before, dict) and not recipe_differences(recipe.flat(), before)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps a run's folder for this run. A process that is killed lets go of it.

    Raises:
        `ValueError`: if another run has it.
    """
    try:
        alone = FileLock(folder / ".lock", blocking=False).acquire() if PartialState().is_main_process else None
    except Timeout:
        raise ValueError(
            f"output_dir is {str(folder)!r}, and another run is at work in it: wait for it, or choose another output_dir"
        ) from None
    with alone or contextlib.nullcontext():
        yield


@contextlib.contextmanager
def main_process() -> Iterator[bool]:
    """Yields whether this is the first process; the others wait until it is through."""
    state = PartialState()
    try:
        yield state.is_main_process
    finally:
        state.wait_for_everyone()


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, json.dumps(content, indent=1, ensure_ascii=False))


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    write(path, WRITTEN + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def write(path: Path, text: str) -> None:
    """All or nothing, so that neither a kill nor a full disk leaves half a file, or one that nobody knows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
