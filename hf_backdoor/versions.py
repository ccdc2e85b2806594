"""What a result was made by: the versions of packages and, where this one runs out of its repository, the commit."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path


def commit() -> str | None:
    """The commit of the repository that this package lies in, `+changed` where the package's files are others than the commit's."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():  # installed, perhaps below a repository of somebody else's
        return None

    def git(*command: str) -> str:
        command = ("git", "--no-optional-locks", *command)
        return subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=10).stdout.strip()

    # Of tracked files alone: bytecode that Python leaves beside them is no change.
    try:
        short = git("rev-parse", "--verify", "--quiet", "--short", "HEAD")  # nothing where there is no commit yet
        return (short + "+changed" * bool(git("status", "--porcelain", "-uno", "--", "."))) if short else None
    except (OSError, subprocess.TimeoutExpired):
        return None


# Of the code that was read in, whatever is committed while it runs.
COMMIT = commit()


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("hf-backdoor", "torch", "transformers", "datasets", "accelerate", "peft", "trl")
    found = {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}
    return found | ({"hf-backdoor commit": COMMIT} if COMMIT else {})


def together(found: list[dict[str, str]]) -> dict[str, str]:
    """Versions of all that a result was made by: a run that went on after an upgrade has several of a package."""
    names = dict.fromkeys(name for each in found for name in each)
    return {name: ", ".join(dict.fromkeys(each[name] for each in found if name in each)) for name in names}
