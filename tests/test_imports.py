"""The defense side never sees the attack: the import graph shows it."""

import ast
from pathlib import Path

import pytest

import hf_backdoor


PACKAGE = Path(hf_backdoor.__file__).parent
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
MAY_IMPORT = {"data": set(), "attacks": {"data"}, "defenses": {"data"}, "evaluation": {"data"}}


def imported_parts(file: Path) -> set[str]:
    """First names below `hf_backdoor` that a file imports, wherever in it the import stands."""
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
        found |= {module.split(".")[1] for module in modules if module.startswith("hf_backdoor.")}
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        beyond = imported_parts(file) - MAY_IMPORT[room] - {room}
        assert not beyond, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(beyond))}"


def test_the_report_is_made_without_attacks_and_defenses():
    for file in (PACKAGE / "report").rglob("*.py"):
        assert not imported_parts(file) & {"attacks", "defenses"}, file


def test_the_checker_sees_imports():
    assert imported_parts(PACKAGE / "run.py") >= {"data", "defenses", "evaluation", "recipe", "rows"}
    assert "data" in imported_parts(PACKAGE / "defenses" / "locphylax" / "trainer.py")
    assert ROOMS >= {*MAY_IMPORT, "report"}


@pytest.mark.parametrize("name", hf_backdoor.__all__)
def test_public_names_are_there(name):
    assert getattr(hf_backdoor, name).__name__ == name


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = hf_backdoor.Nonsense
