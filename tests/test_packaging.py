"""What an installed package brings along: every recipe, their data, and the launch configurations."""

import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SHIPPED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["data-files"]
FILES = [
    path.relative_to(ROOT)
    for folder in ("recipes", "accelerate_configs")
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
]


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=str)
def test_every_folder_is_shipped_to_its_place(folder):
    patterns = SHIPPED[f"share/hf_backdoor/{folder.as_posix()}"]
    shipped = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)}
    assert {file for file in FILES if file.parent == folder} <= shipped
