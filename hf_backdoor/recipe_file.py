"""From a YAML file and command-line overrides to a [`Recipe`]: every key and every type is checked on the way."""

import difflib
import math
import os
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import type_validator

from .contradictions import check_recipe
from .defenses import METHODS, DefenseConfig
from .defenses.field_types import UNIONS, in_words
from .recipe import Recipe


# Arguments of old recipes that transformers 5 took away, and what to write now (its MIGRATION_GUIDE_V5.md).
REMOVED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps (a value below 1 is a ratio)",
    "overwrite_output_dir": "nothing: a finished stage is kept, delete its folder to run it again",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "no_cuda": "use_cpu",
    "use_mps_device": "nothing: the device is found",
    "save_safetensors": "nothing: weights are always safetensors",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "include_inputs_for_metrics": "include_for_metrics",
    "push_to_hub_token": "the environment variable HF_TOKEN",
    "push_to_hub_model_id": "hub_model_id",
    "torch_dtype": "dtype",
    "load_in_4bit": "quantization: nf4",
    "load_in_8bit": "quantization: int8",
    "fp16_backend": "nothing: it has no effect any more",
    "tokenizer": "nothing: the tokenizer is the model's",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}

# Arguments of TrainingArguments that a run decides for itself.
RESERVED = {"stages", "resume_from_checkpoint", "run_name", "do_train", "do_eval", "do_predict"}

# Keys whose values may lie beside the recipe.
BESIDE = (
    "dataset_name", "test_dataset_name", "clean_dataset_name", "rewritten_dataset_name", "model_name_or_path", "student_model_name_or_path",
)  # fmt: skip


# What YAML 1.1 takes for true and false beside these words themselves, and YAML 1.2 for text.
YES_AND_NO = {"yes": True, "on": True, "no": False, "off": False}
BOOL = "tag:yaml.org,2002:bool"


class RecipeLoader(yaml.SafeLoader):
    """YAML in which `yes` and `no` are text, as label words and answers are, and no key stands twice: PyYAML makes the words true
    and false, and takes the last key, without a word."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a YAML recipe, puts command-line overrides over it, and checks every key and value.

    Args:
        path (`str` or `Path`): The file.
        overrides (`list[str]`, *optional*): `["--seed", "1", "--stages.inject.learning_rate=1e-5"]`.

    Raises:
        `ValueError`: with one line that names the key, the value and the fix.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=RecipeLoader)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; `hf-backdoor recipes` lists the shipped ones") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping: write one 'key: value' a line")
    for key in BESIDE:
        beside = Path(path).parent / str(values.get(key))
        if values.get(key) and beside.exists():
            values[key] = os.path.normpath(beside)  # what comes along with a recipe, wherever it is run from
    for key, value in parse_overrides(overrides or []).items():
        put(values, key, value)
    return make_recipe(values)


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Checks the keys and types of a flat mapping, and makes a [`Recipe`] of it."""
    values = {
        key: os.path.expanduser(value) if key in ("output_dir", *BESIDE) and isinstance(value, str) else value
        for key, value in values.items()  # "~" is no folder, but a shell's name of one
    }
    own = typing.get_type_hints(Recipe)
    own.pop("training")
    method = values.get("method")
    if method is not None and method not in list(METHODS):
        raise ValueError(f"method is {method!r}: use one of {', '.join(METHODS)}")
    config = DefenseConfig if method is None else METHODS[method].config
    training = {
        k: v for k, v in typing.get_type_hints(config).items() if k not in own and k not in RESERVED and k[0] != "_"
    }
    known: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in values.items():
        if key in own:
            known[key] = checked(key, value, own[key])
        else:
            extra[key] = checked_training(key, value, training, [*own, *training])
    for stage, settings in known.get("stages", {}).items():
        if not isinstance(settings, dict):
            raise ValueError(f"stages.{stage} is {settings!r}: write its arguments as 'key: value'")
        known["stages"][stage] = {
            key: checked_training(key, value, training, list(training), f"stages.{stage}.")
            for key, value in settings.items()
        }
    for key in ("model_name_or_path", "task", "dataset_name", "output_dir"):
        if not known.get(key):
            raise ValueError(f"{key} is missing: every recipe names it")
    recipe = Recipe(**known, training=extra)
    check_recipe(recipe)
    return recipe


def checked_training(key: str, value: Any, hints: dict[str, Any], known: list[str], prefix: str = "") -> Any:
    if key in REMOVED:
        raise ValueError(f"{prefix}{key} is {value!r}: transformers 5 has no {key}; use {REMOVED[key]}")
    if key == "hub_token":
        raise ValueError(
            f"{prefix}hub_token is set, and recipes are kept and published: leave it out, and set HF_TOKEN or run `hf auth login`"
        )
    if key in RESERVED:
        raise ValueError(
            f"{prefix}{key} is {value!r}, and a run decides that for itself (it goes on where it stopped): leave it out"
        )
    if key in hints:
        return checked(prefix + key, value, hints[key])
    near = difflib.get_close_matches(str(key), known, 1)
    raise ValueError(
        f"{prefix}{key} is unknown{f', did you mean {near[0]}?' if near else ': see `hf-backdoor run --help`'}"
    )


def checked(key: str, value: Any, hint: Any) -> Any:
    """The value in the field's type. `1e-4` is text in YAML 1.1 and `1` a whole number: both are good floats."""
    allowed = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    if float in allowed and not isinstance(value, bool):
        try:
            value = float(value) if isinstance(value, int | str) else value
        except ValueError:
            pass
    if bool in allowed and isinstance(value, str):
        value = YES_AND_NO.get(value.lower(), value)
    if list[str] in allowed and isinstance(value, list):
        if any(isinstance(item, bool) for item in value):
            raise ValueError(f"{key} is {value}, and true and false are no texts: put them in quotes")
        value = [item if isinstance(item, str) else str(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}: write a finite number")
    try:
        type_validator(key, value, hint)
    except Exception as error:
        shown = "null" if value is None else repr(value)
        quotes = ", in quotes" if str in allowed and not isinstance(value, str | None) else ""
        raise ValueError(f"{key} is {shown}: it must be {in_words(hint)}{quotes}") from error
    return value


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs; values are read as YAML, so that `3`, `true` and `[a, b]` keep their types, and a text
    that is in no quotes is what was typed: YAML would leave out what follows a " #", and make one space of a line's end.

    Raises:
        `ValueError`: if one is no such pair, no YAML, or there twice.
    """
    found: dict[str, Any] = {}
    items = iter(arguments)
    for item in items:
        if not item.startswith("--"):
            raise ValueError(
                f"{item!r} stands alone: write overrides as --key value (a list as --key '[one, another]')"
            )
        key, equals, text = item[2:].partition("=")
        if not equals:
            text = next(items, None)
            if text is None or text.startswith("--"):
                raise ValueError(f"--{key} has no value: write --{key} value (one that begins with --, --{key}=value)")
        if key in found:
            raise ValueError(f"--{key} is there twice, as {found[key]!r} and as {text!r}: leave one out")
        try:
            read = yaml.load(text, Loader=RecipeLoader)
        except yaml.YAMLError:
            raise ValueError(f"--{key} {text!r} is no YAML: put it in quotes") from None
        as_typed = isinstance(read, str) and text.lstrip()[0] not in "'\""
        nothing = read is None and text.strip().lower() not in ("null", "~")  # which YAML reads as null, and is a text
        found[key] = text if as_typed or nothing else read
    return found


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """`stages.inject.learning_rate` reaches into the mapping."""
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"{key} reaches into {parent}, which is {values!r}: only stages have keys below them")
    values[last] = value
