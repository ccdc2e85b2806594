"""Whether a value is of the type that its field asks for, and what to call such a type."""

import inspect
import reprlib
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, Union


UNIONS = (Union, types.UnionType)


def check_types(config: Any, base: type) -> None:
    """Looks at the fields of a dataclass that `base` does not have: a comparison would fail with a TypeError that names no field, and a
    number where a list belongs would do so after hours of training.

    Raises:
        `ValueError`: with one line that names the field, the value and what the field takes.
    """
    hints, others = typing.get_type_hints(type(config)), {f.name for f in fields(base)}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in others and not fits(value, hints[f.name]):
            raise ValueError(f"{f.name} is {reprlib.repr(value)}: it must be {in_words(hints[f.name])}")


def fits(value: Any, hint: Any) -> bool:
    """Whole numbers are numbers, those of numpy too; any sequence is a list, but for a text."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in UNIONS:
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return True  # the configuration names the choices itself
    if kind is list:
        return (
            isinstance(value, Sequence) and not isinstance(value, str) and all(fits(item, parts[0]) for item in value)
        )
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return kind not in (bool, str, NoneType) or isinstance(value, kind)  # a user's own types are the user's


def in_words(hint: Any) -> str:
    """What a field takes, as one would say it to who writes YAML and no Python."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in UNIONS:
        # What an Enum allows is written as text.
        each = [in_words(part) for part in parts if not (inspect.isclass(part) and issubclass(part, NoneType | Enum))]
        return " or ".join(dict.fromkeys(each))
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind is list:
        return "a list of whole numbers, as [0, 1]" if parts == (int,) else "a list of texts, as [one, another]"
    if kind is dict:
        below = parts and typing.get_origin(parts[1]) is dict
        return "names, each with its own keys and values below it" if below else "keys and values below it"
    words = {bool: "yes or no (true or false)", int: "a whole number", float: "a number", str: "a text"}
    return words.get(kind) or f"a {kind.__name__}"
