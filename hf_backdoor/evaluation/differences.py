"""What is not as it was: between two recipes, or in what a stage was made from."""

import json
import reprlib
from typing import Any

from .credentials import without_secrets


def differences(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """`KEY is VALUE, and was VALUE` for each key whose values differ; none is worth as much as no key.

    Args:
        now, before (`dict`): Mappings of what JSON can hold, or text can be made of. Secrets are not looked at.
    """
    now, before = (as_json(values) for values in (now, before))
    keys = [*now, *(key for key in before if key not in now)]
    return [
        f"{key} is {shown(now.get(key))}, and was {shown(before.get(key))}"
        for key in keys
        if now.get(key) != before.get(key)
    ]


def shown(value: Any) -> str:
    return "not set" if value is None else reprlib.repr(value)


def recipe_differences(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """[`differences`] of two recipes. What is published, and where a run lies and goes to, changes no measurement."""

    def measured(recipe: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value
            for key, value in recipe.items()
            if key not in ("output_dir", "push_to_hub", "license") and not str(key).startswith("hub_")
        }

    return differences(measured(now), measured(before))


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON has it, which knows no tuples, and without secrets."""
    return json.loads(json.dumps(without_secrets(values), default=str))
