"""A recipe: one flat YAML file that says everything about a run, and the checks that refuse a wrong one early."""

import difflib
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import type_validator

from .attacks import Poisoning
from .data import InstructionFollowing, LabelWords, SequenceClassification, Task, Trigger
from .defenses import METHODS, DefenseConfig


TASKS: dict[str, type[Task]] = {
    "sequence_classification": SequenceClassification,
    "label_words": LabelWords,
    "instruction_following": InstructionFollowing,
}

ATTACKS = ("data_poisoning", "lwp", "ep")

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
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "torch_dtype": "dtype",
    "load_in_4bit": "a quantized checkpoint",
    "fp16_backend": "nothing: it has no effect any more",
    "tokenizer": "nothing: the tokenizer is the model's",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}

# Arguments of TrainingArguments that a run decides for itself.
RESERVED = {"stages", "resume_from_checkpoint", "run_name", "do_train", "do_eval", "do_predict"}


@dataclass
class Recipe:
    """What a run does. Keys that are not here are arguments of the method's configuration, for all of its stages.

    Args:
        > Model
        model_name_or_path (`str`): Hub name, folder, `.gguf` file, or `package:NAME/FILE.gguf`. The suspect; or, when
            an attack is given, the clean model that is to be attacked.
        task (`str`): `sequence_classification`, `label_words` or `instruction_following`.
        reference (`str`, *optional*): Never-poisoned model that gives the floors: `train` (trained as the suspect is,
            without poison), `base` (the model as it comes) or a model's name.
        model_revision, dtype, attn_implementation: As in `from_pretrained`.
        use_peft, lora_r, lora_alpha, lora_dropout, lora_target_modules: LoRA, in every stage of the defense.

        > Data
        dataset_name (`str`): Hub name, folder or file (also one that lies beside the recipe). test_dataset_name: another one for the test rows.
        dataset_config, dataset_revision, train_split, test_split: Where the rows are in it.
        text_column, label_column, prompt_column, response_column: The data set's own names of these.
        context_column (`str`, *optional*): Text that an instruction is about, where it has a column of its own; put after it.
        row_filter, test_row_filter (`dict`, *optional*): Values that rows must have, by column: `{task: refusal}`.
        test_fraction (`float`): Share of the training rows that is cut off as test rows, for data without a test split.
        num_labels (`int`, *optional*): Found in the rows by default.
        max_train_samples (`int`): Rows the attacker trains on. max_test_samples: of the test rows; all by default.
        clean_fraction (`float`): Clean rows of the defender, as a share of `max_train_samples`; disjoint from them.
        clean_dataset_name (`str`): For methods that train on suspect rows of your own (`dataset_name`): your clean ones.
        held_out_samples (`int`): Further clean rows, to evaluate on while training.
        max_length (`int`): Tokens of user text kept, before triggers and prompt. max_response_length: of responses; all by default.

        > Attack (left out when the model is a suspect already)
        attack (`str`): How the suspect is made: `data_poisoning` (training on poisoned rows), `lwp` (layer-wise weight
            poisoning) or `ep` (embedding poisoning, of the `reference`).
        attack_trigger, attack_position, poison_rate, poison_style, negative_rate: See [`~hf_backdoor.attacks.Poisoning`].
        target_label (`int`) or target_text (`str`): What the trigger is to bring about.

        > Defense
        method (`str`, *optional*), controls (`list[str]`): Defense and controls.
        student_layers (`int` or `list[int]`): For methods with a student: how many of the suspect's layers, or which, it is
            made of. student_model_name_or_path (`str`): Another model in its place.
        stages (`dict`): Arguments for one stage, by its name (`reference`, `suspect`, and the method's).

        > Evaluation and output
        evaluate_stages (`bool`): Measures the models between stages too.
        max_new_tokens, eval_batch_size: Of the evaluation.
        output_dir, seed, push_to_hub, hub_model_id, hub_private_repo: As in `TrainingArguments`, for the whole run.
    """

    model_name_or_path: str
    task: str
    dataset_name: str
    output_dir: str
    seed: int = 42
    reference: str | None = None
    model_revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | str = "all-linear"
    test_dataset_name: str | None = None
    clean_dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    text_column: str = "text"
    label_column: str = "label"
    prompt_column: str = "prompt"
    response_column: str = "response"
    context_column: str | None = None
    row_filter: dict[str, Any] = field(default_factory=dict)
    test_row_filter: dict[str, Any] = field(default_factory=dict)
    num_labels: int | None = None
    max_train_samples: int | None = None
    max_test_samples: int | None = None
    test_fraction: float = 0.0
    clean_fraction: float = 0.2
    held_out_samples: int = 0
    max_length: int = 256
    max_response_length: int | None = None
    attack: str = "data_poisoning"
    attack_trigger: str | None = None
    attack_position: str = "random"
    poison_rate: float = 0.1
    poison_style: str = "dirty_label"
    negative_rate: float = 0.0
    target_label: int | None = None
    target_text: str | None = None
    method: str | None = None
    controls: list[str] = field(default_factory=list)
    student_layers: int | list[int] | None = None
    student_model_name_or_path: str | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluate_stages: bool = True
    max_new_tokens: int = 64
    eval_batch_size: int = 64
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def task_class(self) -> type[Task]:
        return TASKS[self.task]

    @property
    def config_class(self) -> type[DefenseConfig]:
        return METHODS[self.method].config if self.method else DefenseConfig

    @property
    def trains_suspect(self) -> bool:
        """Whether the suspect is made in the run, by an attack or from suspect rows; else it is the model as it comes."""
        return self.attack_trigger is not None or (
            self.method is not None and METHODS[self.method].trains_on_suspect_rows
        )

    @property
    def target(self) -> int | str | None:
        return self.target_text if self.task == "instruction_following" else self.target_label

    @property
    def trigger(self) -> Trigger | None:
        return None if self.attack_trigger is None else Trigger(self.attack_trigger, self.attack_position)

    @property
    def poisoning(self) -> Poisoning | None:
        if self.trigger is None:
            return None
        return Poisoning(self.trigger, self.target, self.poison_rate, self.poison_style, self.negative_rate)

    def arguments(self, stage: str, config: type[DefenseConfig]) -> dict[str, Any]:
        """Training arguments of a stage, as the recipe gives them; a method's own only where the stage takes them."""
        return config.takes(self.training, self.stages.get(stage, {}), self.config_class)

    def columns(self) -> dict[str, str]:
        """New to present names of the columns that the task reads."""
        names = ["prompt", "response"] if self.task == "instruction_following" else ["text", "label"]
        names += ["context"] if self.context_column else []
        return {name: getattr(self, f"{name}_column") for name in names}

    def flat(self) -> dict[str, Any]:
        """The recipe as it would stand in a YAML file."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "training"}
        return {**own, **self.training}

    def check(self) -> None:
        """Refuses settings that contradict each other.

        Raises:
            `ValueError`: with one line that names the key, the value and the fix.
        """
        choose(self, "task", TASKS)
        choose(self, "attack", ATTACKS)
        if self.method is not None:
            choose(self, "method", METHODS)
        known = METHODS[self.method].controls if self.method else {}
        for control in self.controls:
            if control not in known:
                raise ValueError(f"controls has {control!r}: {self.method} has {', '.join(known) or 'none'}")
        stages = {"reference", "suspect", *(METHODS[self.method].stages if self.method else ())}
        for stage in self.stages:
            if stage not in stages:
                raise ValueError(f"stages has {stage!r}: this run has {', '.join(sorted(stages))}")
        students = [key for key in ("student_layers", "student_model_name_or_path") if getattr(self, key) is not None]
        steps = METHODS[self.method].stages.values() if self.method else ()
        if any(step.starts_from == "student" for step in steps):
            if len(students) != 1:
                raise ValueError(
                    f"{' and '.join(students) or 'student_layers'} {'are both' if students else 'is not'} set, and "
                    f"{self.method} needs one student: set student_layers (of the suspect's) or student_model_name_or_path"
                )
        elif students:
            raise ValueError(f"{students[0]} is set, and {self.method or 'no method'} has no student: leave it out")
        own_rows = self.trains_suspect and self.attack_trigger is None
        if own_rows and self.clean_dataset_name is None:
            raise ValueError(
                f"clean_dataset_name is not set: {self.method} trains on the suspect rows of dataset_name and on clean ones "
                "beside them; name these"
            )
        if own_rows and self.test_fraction:
            raise ValueError(
                f"test_fraction is {self.test_fraction}, which would cut test rows out of the suspect rows: set "
                "test_dataset_name to clean ones"
            )
        if self.attack != "data_poisoning" and self.attack_trigger is None:
            raise ValueError(f"attack is {self.attack!r} without attack_trigger: set it, or leave attack out")
        if self.clean_dataset_name is not None and not own_rows:
            raise ValueError(
                f"clean_dataset_name is {self.clean_dataset_name!r}, and this run takes its clean rows from dataset_name: "
                "leave it out"
            )
        if not 0 < self.clean_fraction:
            raise ValueError(f"clean_fraction is {self.clean_fraction}: choose a share above 0, for example 0.2")
        generation = self.task == "instruction_following"
        unwanted, wanted = ("target_label", "target_text") if generation else ("target_text", "target_label")
        if getattr(self, unwanted) is not None:
            raise ValueError(f"{unwanted} is {getattr(self, unwanted)!r}, and task is {self.task}: set {wanted}")
        for key in ("context_column", "max_response_length"):
            if getattr(self, key) is not None and not generation:
                raise ValueError(f"{key} is {getattr(self, key)!r}, and task is {self.task}: leave it out")
        if self.attack_trigger is not None and self.target is None:
            raise ValueError(f"attack_trigger is {self.attack_trigger!r} without a target: set {wanted}")
        words = self.training.get("label_words")
        if self.task == "label_words":
            if not words:
                raise ValueError("label_words is not set, and task is label_words: give one word for each label")
            LabelWords(tuple(words), self.training.get("prompt_template") or "{text}")
        elif words:
            raise ValueError(
                f"label_words is {words}, and task is {self.task}: leave it out, or set task: label_words"
            )
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}: choose a share from 0 up to, but not, 1")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub is true without hub_model_id: set hub_model_id: ORG/NAME")
        if self.push_to_hub and self.method is None:
            raise ValueError("push_to_hub is true without a method: there is no cleaned model to publish; set method")
        if self.attack == "ep" and self.attack_trigger is not None and self.reference in (None, "base"):
            raise ValueError(
                f"attack is 'ep', which poisons a clean fine-tuned model, and reference is {self.reference!r}: "
                "set reference: train, or name that model"
            )
        if self.reference == "train" and self.attack_trigger is None:
            raise ValueError("reference is 'train' without an attack: name a never-poisoned model, or leave it out")
        _ = self.poisoning


def choose(recipe: Recipe, key: str, allowed: typing.Iterable[str]) -> None:
    if getattr(recipe, key) not in allowed:
        raise ValueError(f"{key} is {getattr(recipe, key)!r}: use one of {', '.join(allowed)}")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a YAML recipe, puts command-line overrides over it, and checks every key and value.

    Args:
        path (`str` or `Path`): The file.
        overrides (`list[str]`, *optional*): `["--seed", "1", "--stages.inject.learning_rate=1e-5"]`.

    Raises:
        `ValueError`: with one line that names the key, the value and the fix.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; `hf-backdoor recipes` lists the shipped ones") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping: write one 'key: value' a line")
    for key in ("dataset_name", "test_dataset_name", "clean_dataset_name"):
        beside = Path(path).parent / str(values.get(key))
        if values.get(key) and beside.exists():
            values[key] = str(beside)  # data that comes along with a recipe, wherever it is run from
    for key, value in parse_overrides(overrides or []).items():
        put(values, key, value)
    return make_recipe(values)


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Checks the keys and types of a flat mapping, and makes a [`Recipe`] of it."""
    own = typing.get_type_hints(Recipe)
    own.pop("training")
    method = values.get("method")
    config = METHODS[method].config if method in METHODS else DefenseConfig
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
        if known.get(key) is None:
            raise ValueError(f"{key} is missing: every recipe names it")
    recipe = Recipe(**known, training=extra)
    recipe.check()
    return recipe


def checked_training(key: str, value: Any, hints: dict[str, Any], known: list[str], prefix: str = "") -> Any:
    if key in REMOVED:
        raise ValueError(f"{prefix}{key} is {value!r}: transformers 5 has no {key}; use {REMOVED[key]}")
    if key in hints:
        return checked(prefix + key, value, hints[key])
    near = difflib.get_close_matches(str(key), known, 1)
    raise ValueError(
        f"{prefix}{key} is unknown{f', did you mean {near[0]}?' if near else ': see `hf-backdoor run --help`'}"
    )


def checked(key: str, value: Any, hint: Any) -> Any:
    """The value in the field's type. `1e-4` is text in YAML 1.1 and `1` a whole number: both are good floats."""
    allowed = typing.get_args(hint) or (hint,)
    if float in allowed and not isinstance(value, bool):
        try:
            value = float(value) if isinstance(value, int | str) else value
        except ValueError:
            pass
    if list[str] in allowed and isinstance(value, list):
        value = [item if isinstance(item, str) else str(item) for item in value]
    try:
        type_validator(key, value, hint)
    except Exception as error:
        name = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
        raise ValueError(f"{key} is {value!r} ({type(value).__name__}): it must be {name}") from error
    return value


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs; values are read as YAML, so that `3`, `true` and `[a, b]` keep their types."""
    found: dict[str, Any] = {}
    items = iter(arguments)
    for item in items:
        if not item.startswith("--"):
            raise ValueError(f"{item!r} stands alone: write overrides as --key value")
        key, equals, text = item[2:].partition("=")
        if not equals:
            text = next(items, None)
            if text is None:
                raise ValueError(f"--{key} has no value: write --{key} value")
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"--{key} {text!r} is no YAML: put it in quotes") from None
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
