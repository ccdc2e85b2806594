"""The defense side never sees the attack: the import graph shows it."""

import ast
from pathlib import Path

import pytest

import hf_backdoor


PACKAGE = Path(hf_backdoor.__file__).parent
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
# Attackers train as everybody does, with the base of all trainers; of the methods they see nothing.
BASE = {"defenses.config", "defenses.engines", "defenses.losses", "defenses.trainer"}
MAY_IMPORT = {
    "data": set(),
    "attacks": {"data", *BASE},
    "defenses": {"data"},
    "evaluation": {"data"},
    "inspection": {"data"},
}


def imported_parts(file: Path) -> set[str]:
    """What a file imports of `hf_backdoor`, wherever in it the import stands: rooms, or files of the defenses' base."""
    package = ["hf_backdoor", *file.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            modules = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            if module.startswith("hf_backdoor."):
                parts = module.split(".")[1:]
                found.add(".".join(parts[:2]) if ".".join(parts[:2]) in BASE else parts[0])
    return {part for part in found if part.split(".")[0] != file.relative_to(PACKAGE).parts[0]}


@pytest.mark.parametrize("room", [room for room in MAY_IMPORT if room in ROOMS])
def test_imports_go_one_way(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        beyond = imported_parts(file) - MAY_IMPORT[room]
        assert not beyond, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(beyond))}"


def test_the_report_is_made_without_attacks_and_defenses():
    for file in (PACKAGE / "report").rglob("*.py"):
        assert not imported_parts(file) & {"attacks", "defenses"}, file


def test_the_checker_sees_imports():
    assert imported_parts(PACKAGE / "run.py") >= {"data", "defenses", "evaluation", "recipe", "rows"}
    assert "data" in imported_parts(PACKAGE / "defenses" / "locphylax" / "trainer.py")
    assert "defenses.trainer" in imported_parts(PACKAGE / "attacks" / "lwp.py")
    assert {*MAY_IMPORT, "report"} == ROOMS


@pytest.mark.parametrize("name", hf_backdoor.__all__)
def test_public_names_are_there(name):
    assert getattr(hf_backdoor, name).__name__ == name


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = hf_backdoor.Nonsense
