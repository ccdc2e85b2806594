"""Folders that know what they were made from: how a killed run finds what is done, and what it must do again."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from .defenses.checkpoints import last_checkpoint
from .recipe import Recipe


# What a stage's folder has in it from its first moment, and when it is done.
WRITTEN = "# The recipe of this run, as hf-backdoor resolved it.\n"
BEGUN, STAGE = MARKS = ("begun.json", "stage.json")


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def finished(folder: Path, print_: str) -> dict[str, Any] | None:
    """What a finished stage noted, if it was made from the same inputs."""
    try:
        noted = json.loads((folder / STAGE).read_text())
    except FileNotFoundError:  # or cleared in this moment, by a first process that is ahead
        return None
    return noted if noted.get("fingerprint") == print_ else None


def refuse_foreign(folder: Path) -> None:
    """Before anything is written: a folder that no run has made holds somebody's files.

    Raises:
        `ValueError`: if a stage would have to clear it.
    """
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / mark).exists() for mark in MARKS):
        raise ValueError(
            f"{str(folder)!r} was not made by a run, and this one would clear it: move it, or choose another output_dir"
        )


def refuse_foreign_run(folder: Path) -> None:
    """Before anything is written: a run writes over the files of another run, and over nobody else's.

    Raises:
        `ValueError`: if there are some.
    """
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and recipe.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN):
        return
    for name in ("recipe.yaml", "results.json", "data", "report", "evaluation"):
        if (folder / name).exists():
            raise ValueError(
                f"output_dir is {str(folder)!r}, and its {name} was not made by a run: choose another output_dir"
            )


def begin(folder: Path, print_: str) -> str | None:
    """Clears a stage's folder, unless it was begun from the same inputs: then gives its last checkpoint."""
    mark, checkpoints = folder / BEGUN, folder / "checkpoints"
    with main_process() as first:
        if first and not (mark.exists() and json.loads(mark.read_text())["fingerprint"] == print_):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(mark, {"fingerprint": print_})
    with main_process():  # clears what a kill has left half written
        return last_checkpoint(checkpoints)


def recipe_is(folder: Path, recipe: Recipe) -> bool:
    """Whether a run's folder was last written by this recipe."""
    file = folder / "recipe.yaml"
    return file.exists() and file.read_text(encoding="utf-8") == as_yaml(recipe.flat())


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
    path.write_text(as_yaml(content), encoding="utf-8")


def as_yaml(content: dict[str, Any]) -> str:
    return WRITTEN + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
