"""Taking out of a run what is nobody else's business before it is published: local paths and secrets."""

import re
from pathlib import Path
from typing import Any

from hf_backdoor.evaluation.credentials import SECRETS, TOKEN
from hf_backdoor.evaluation.results import Results


# What leads out of a folder tells of others as an absolute path does; without `..` it may be a name on the Hub.
_OUTWARDS = r"(?:[^\s\\/:]+[\\/])*\.\.[\\/]"
_PATH_INSIDE = re.compile(  # not the one of a web address
    r"(?<![\w/.~-])(?:(?:/[\w.@+-]+){2,}|(?:[\w.@+~-]+/)*\.\.(?:/[\w.@+-]+)+)/?"
)
_PATH = re.compile(rf"(?:file://)?((?:/|~|[A-Za-z]:[\\/]|\\\\|{_OUTWARDS}).*)")


def scrub(value: Any) -> Any:
    """
    A copy of a JSON-like value in which local paths are replaced by their last component, and secrets are taken out.

    Args:
        value (`Any`): Mappings, lists, texts and numbers.

    Returns:
        `Any`: The copy.
    """
    if isinstance(value, str):
        return _PATH_INSIDE.sub(lambda match: _last(match[0]), _scrub_path(scrub_text(value)))
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if isinstance(value, dict):
        copy = {}
        for key, item in value.items():
            if key in SECRETS and isinstance(item, str):
                continue
            new = scrub(key)
            while new in copy:  # two paths may end alike
                new = f"{new}'"
            copy[new] = scrub(item)
        return copy
    return value


def scrub_text(text: str) -> str:
    """A text in which paths below the home or the working folder lose their folders, and Hub tokens are taken out."""
    for root in {str(path) for folder in (Path.home(), Path.cwd()) for path in (folder, folder.resolve())}:
        if len(Path(root).parts) > 1:
            found = re.compile(rf"(?<![\w.~-]){re.escape(root)}(?:[\\/][^\s'\",;:]*)?(?![\w-])")
            text = found.sub(lambda match: _last(match[0]), text)
    return TOKEN.sub("[removed]", text)


def scrub_results(results: Results) -> Results:
    """
    Results fit to be published. What was measured stays as it is: rows and examples lose only paths below the home or
    the working folder, and Hub tokens.

    Args:
        results (`Results`): Results of a run.

    Returns:
        `Results`: A scrubbed copy.
    """
    document = results.to_dict()
    for name in ("rows", "examples"):
        document[name] = [
            {key: scrub_text(item) if isinstance(item, str) else item for key, item in entry.items()}
            for entry in document[name]
        ]
    for name in ("costs", "recipe", "versions", "data"):
        document[name] = scrub(document[name])
    return Results.from_dict(document)


def _scrub_path(text: str) -> str:
    match = _PATH.fullmatch(text.strip())
    if match is None:
        return text
    parts = [part for part in re.split(r"[\\/]", match[1]) if part]
    # "/x" alone may as well be a trigger or a command: a path only if there is such a file.
    return _last(match[1]) if len(parts) > 1 or Path(match[1]).exists() else text


def _last(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]", path) if part and part != "~"]
    return parts[-1] if parts else "."
