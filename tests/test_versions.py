"""What results say that they were made by."""

import importlib.util
import shutil
import subprocess

import pytest

from hf_backdoor import versions as module


def read_in(folder):
    """The module, as it lies in a folder."""
    spec = importlib.util.spec_from_file_location("versions_elsewhere", folder / "hf_backdoor" / "versions.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def git(folder, *arguments):
    who = ["-c", "user.name=me", "-c", "user.email=me@here"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "hf_backdoor").mkdir()
    shutil.copy(module.__file__, tmp_path / "hf_backdoor")
    (tmp_path / "table.md").write_text("one\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")
    return tmp_path


def test_a_checkout_names_its_commit_and_whether_it_was_changed(repository):
    short = git(repository, "rev-parse", "--short", "HEAD").strip()
    (repository / "table.md").unlink()  # results and pages make no other code
    assert read_in(repository).versions()["hf-backdoor commit"] == short
    with (repository / "hf_backdoor" / "versions.py").open("a") as file:
        file.write("# changed\n")
    assert read_in(repository).versions()["hf-backdoor commit"] == f"{short}+changed"


def test_an_installed_package_names_no_commit_of_the_repository_around_it(repository):
    installed = repository / "venv" / "site-packages"
    shutil.copytree(repository / "hf_backdoor", installed / "hf_backdoor")
    assert "hf-backdoor commit" not in read_in(installed).versions()


def test_without_git_there_is_no_commit(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert set(read_in(repository).versions()) >= {"python", "hf-backdoor"}
    assert "hf-backdoor commit" not in read_in(repository).versions()
