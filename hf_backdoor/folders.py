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
from transformers.trainer_utils import get_last_checkpoint


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def finished(folder: Path, print_: str) -> dict[str, Any] | None:
    """What a finished stage noted, if it was made from the same inputs."""
    try:
        noted = json.loads((folder / "stage.json").read_text())
    except FileNotFoundError:  # or cleared in this moment, by a first process that is ahead
        return None
    return noted if noted.get("fingerprint") == print_ else None


def begin(folder: Path, print_: str) -> str | None:
    """Clears a stage's folder, unless it was begun from the same inputs: then gives its last checkpoint."""
    mark, checkpoints = folder / "begun.json", folder / "checkpoints"
    with main_process() as first:
        if first and not (mark.exists() and json.loads(mark.read_text())["fingerprint"] == print_):
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
