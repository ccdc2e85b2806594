"""Settings of a recipe that contradict each other, or the machine: each is refused in one line, before anything is loaded."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from .data import ImageClassification, ImageTrigger, LabelWords, refuse_other_target
from .defenses import METHODS, DefenseConfig, refuse_images
from .defenses.engines import asked_for
from .quantization import QUANTIZATIONS, refuse_launched, require_bitsandbytes
from .recipe import TASKS, Recipe


# Arguments of trainers that evaluation, and what lies between the stages, go by as well.
WHOLE_RUN = {"known_response", "label_words", "prompt_template", "system_prompt"}

# Counts, and the least that means anything. (0 and below were taken for "all", for "as it is", or failed much later.)
LEAST = {
    "max_train_samples": 1, "max_test_samples": 1, "held_out_samples": 0, "max_length": 1, "max_response_length": 1,
    "max_new_tokens": 1, "eval_batch_size": 1, "image_size": 1, "num_labels": 2, "lora_r": 1, "lora_alpha": 1, "seed": 0,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0,
}  # fmt: skip
# A training without one of these leaves the model as it is (or climbs), and looks like a defense that did nothing.
POSITIVE = ("learning_rate", "num_train_epochs")

# Keys that are read only where there is what they are about.
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
ATTACK = (
    "attack_position", "poison_rate", "poison_style", "negative_rate", "warp_strength", "target_label", "target_text", "clean_fraction",
)  # fmt: skip
ON_HELD_OUT = ("eval_strategy", "eval_steps", "load_best_model_at_end")
PUBLISHING = ("hub_model_id", "hub_private_repo")
# Of uploads while a trainer trains: a run has none.
UPLOADING = ("hub_strategy", "hub_always_push", "hub_revision")
OF_TEST_ROWS = ("test_split", "test_row_filter")

# How something is looked for, and the input by which a stage takes over what another one has found.
FOUND_EARLIER = {"look_alikes": "found_split"}

ATTACKS = ("data_poisoning", "lwp", "ep")
DTYPES = ("float32", "bfloat16", "float16")


def check_recipe(recipe: Recipe) -> None:
    """Refuses settings that contradict each other.

    Raises:
        `ValueError`: with one line that names the key, the value and the fix.
    """
    for where, values in _given(recipe).items():
        for key, least in LEAST.items():
            if values.get(key) is not None and values[key] < least:
                raise ValueError(f"{where}{key} is {values[key]}: it must be at least {least}")
        for key in POSITIVE:
            if values.get(key) is not None and values[key] <= 0:
                raise ValueError(f"{where}{key} is {values[key]}: it must be above 0")
        if values.get("max_steps") is not None and values["max_steps"] < 1 and values["max_steps"] != -1:
            raise ValueError(
                f"{where}max_steps is {values['max_steps']}: it must be at least 1, or -1 to go by num_train_epochs"
            )
    choose(recipe, "task", TASKS)
    choose(recipe, "attack", ATTACKS)
    choose(recipe, "dtype", DTYPES)
    if recipe.method is not None:
        choose(recipe, "method", METHODS)
    _check_task(recipe)
    known = METHODS[recipe.method].controls if recipe.method else {}
    for control in recipe.controls:
        if control not in known:
            raise ValueError(f"controls has {control!r}: {recipe.method} has {', '.join(known) or 'none'}")
    if recipe.quantization is not None:
        choose(recipe, "quantization", QUANTIZATIONS)
        if recipe.method is None:
            raise ValueError(
                f"quantization is {recipe.quantization!r} without a method: a suspect and a reference are trained whole; "
                "leave it out"
            )
        if not recipe.use_peft:
            raise ValueError(
                f"quantization is {recipe.quantization!r} without use_peft: quantized weights can't be trained, only adapters "
                "over them; set use_peft: true"
            )
    stages = _check_stages(recipe)
    name = recipe.model_name_or_path
    if name in {"base", "student", "cleaned", *stages} and Path(name).is_dir():
        raise ValueError(f"model_name_or_path is {name!r}, and the run has a folder of this name: write ./{name}")
    students = [key for key in ("student_layers", "student_model_name_or_path") if getattr(recipe, key) is not None]
    steps = METHODS[recipe.method].stages.values() if recipe.method else ()
    if any(step.starts_from == "student" for step in steps):
        if len(students) != 1:
            raise ValueError(
                f"{' and '.join(students) or 'student_layers'} {'are both' if students else 'is not'} set, and "
                f"{recipe.method} needs one student: set student_layers (of the suspect's) or student_model_name_or_path"
            )
    elif students:
        raise ValueError(f"{students[0]} is set, and {recipe.method or 'no method'} has no student: leave it out")
    own_rows = recipe.trains_suspect and recipe.attack_trigger is None
    if own_rows and recipe.clean_dataset_name is None:
        raise ValueError(
            f"clean_dataset_name is not set: {recipe.method} trains on the suspect rows of dataset_name and on clean ones "
            "beside them; name these"
        )
    if own_rows and recipe.test_fraction:
        raise ValueError(
            f"test_fraction is {recipe.test_fraction}, which would cut test rows out of the suspect rows: set "
            "test_dataset_name to clean ones"
        )
    if recipe.streaming:
        _check_streaming(recipe, own_rows)
    if recipe.attack != "data_poisoning" and recipe.attack_trigger is None:
        raise ValueError(f"attack is {recipe.attack!r} without attack_trigger: set it, or leave attack out")
    if recipe.clean_dataset_name is not None and not own_rows:
        raise ValueError(
            f"clean_dataset_name is {recipe.clean_dataset_name!r}, and this run takes its clean rows out of the training rows: "
            "leave it out"
        )
    if recipe.rewritten_dataset_name is not None:
        _check_rewritten(recipe)
    if not 0 <= recipe.lora_dropout < 1:
        raise ValueError(f"lora_dropout is {recipe.lora_dropout}: choose a share from 0 up to, but not, 1")
    if not 0 < recipe.clean_fraction:
        raise ValueError(f"clean_fraction is {recipe.clean_fraction}: choose a share above 0, for example 0.2")
    if not 0 <= recipe.test_fraction < 1:
        raise ValueError(f"test_fraction is {recipe.test_fraction}: choose a share from 0 up to, but not, 1")
    if recipe.test_fraction and recipe.test_dataset_name is not None:
        raise ValueError(
            f"test_fraction is {recipe.test_fraction}, and test_dataset_name is {recipe.test_dataset_name!r}: leave one of them out"
        )
    if recipe.push_to_hub and not recipe.hub_model_id:
        raise ValueError("push_to_hub is true without hub_model_id: set hub_model_id: ORG/NAME")
    if recipe.push_to_hub and not is_repo_id(recipe.hub_model_id):
        raise ValueError(
            f"hub_model_id is {recipe.hub_model_id!r}, which no repository on the Hub can have: write ORG/NAME"
        )
    if recipe.push_to_hub and recipe.method is None:
        raise ValueError("push_to_hub is true without a method: there is no cleaned model to publish; set method")
    if recipe.attack == "ep" and recipe.attack_trigger is not None and recipe.reference in (None, "base"):
        raise ValueError(
            f"attack is 'ep', which poisons a clean fine-tuned model, and reference is {recipe.reference!r}: "
            "set reference: train, or name that model"
        )
    if recipe.reference == "train" and recipe.attack_trigger is None:
        raise ValueError("reference is 'train' without an attack: name a never-poisoned model, or leave it out")
    _refuse_unread(recipe)
    _refuse_told(recipe)
    _ = recipe.poisoning


def _refuse_told(recipe: Recipe) -> None:
    """Refuses a defender who is told what the evaluation is to find out."""
    if recipe.attack_trigger is None:
        return
    for where, values in {**_given(recipe), "": _usual(recipe) | recipe.training}.items():
        known = values.get("known_triggers", [])
        if recipe.attack_trigger.lower() in (text.lower() for text in known):
            raise ValueError(
                f"{where}known_triggers is {known}, and attack_trigger {recipe.attack_trigger!r} is one of them: set others"
            )


def _refuse_unread(recipe: Recipe) -> None:
    """Refuses what nothing would read: whoever sets it expects something of it."""
    for read, keys, why, fix in (
        (recipe.use_peft, LORA, "no adapter is trained", "set use_peft: true, or leave it out"),
        (recipe.method, ("use_peft",), "there is no defense to train adapters in", "set method, or leave it out"),
        (recipe.attack_trigger is not None, ATTACK, "there is no attack", "set attack_trigger, or leave it out"),
        (recipe.held_out_samples, ON_HELD_OUT, "no rows are held out", "set held_out_samples, or leave it out"),
        (
            recipe.method,
            ON_HELD_OUT,
            "there is no defense, of whose clean rows some are held out",
            "set method, or leave it out",
        ),
        *(
            (not Path(getattr(recipe, name)).exists(), (key,), f"{name} is on this machine, as it is", "leave it out")
            for name, key in (("model_name_or_path", "model_revision"), ("dataset_name", "dataset_revision"))
        ),
        (recipe.push_to_hub, PUBLISHING, "nothing is published", "set push_to_hub: true, or leave it out"),
        (False, UPLOADING, "a run publishes once, at its end, to the main branch", "leave it out"),
        (
            any(values.get("eval_strategy", "no") != "no" for values in _given(recipe).values()),
            ("eval_steps", "mask_patience"),
            "eval_strategy is 'no'",
            "set eval_strategy: steps, or leave it out",
        ),
        (
            any(values.get("relabel_below") for values in _given(recipe).values()),
            ("look_alikes",),
            "relabel_below is 0, which leaves out the trainings that would ask for them",
            "set relabel_below, for example 0.2, or leave it out",
        ),
        (
            not recipe.test_fraction or recipe.rewritten_dataset_name,
            OF_TEST_ROWS,
            "test_fraction cuts test rows out of the training rows",
            "leave one out",
        ),
    ):
        if not read:
            _refuse_set(recipe, keys, why, fix)


def _check_stages(recipe: Recipe) -> set[str]:
    """Refuses arguments that a stage would not take; gives the stages that there are."""
    steps = METHODS[recipe.method].stages if recipe.method else {}
    takers = {"reference": DefenseConfig, "suspect": DefenseConfig}
    takers |= {name: step.trainer.config_class() for name, step in steps.items()}
    for stage, own in recipe.stages.items():
        if stage not in takers:
            raise ValueError(f"stages has {stage!r}: this run has {', '.join(sorted(takers))}")
        for key in own:
            if key in WHOLE_RUN:
                raise ValueError(
                    f"stages.{stage}.{key} is {own[key]!r}, and models are measured by it: set {key}, for the whole run"
                )
            if key not in takers[stage].__dataclass_fields__:
                raise ValueError(
                    f"stages.{stage}.{key} is {own[key]!r}, and this stage has no such argument: leave it out"
                )
            if key in FOUND_EARLIER and FOUND_EARLIER[key] in steps[stage].inputs:
                maker = steps[stage].inputs[FOUND_EARLIER[key]]
                raise ValueError(
                    f"stages.{stage}.{key} is {own[key]!r}, and this stage takes over what {maker} has found: set it for the whole run"
                )
        for key in ON_HELD_OUT:
            # For the whole run it says how stages on clean rows are evaluated. One that reads others has none held out.
            if (stage not in steps or steps[stage].rows != "clean") and own.get(key) not in (None, False, "no"):
                raise ValueError(
                    f"stages.{stage}.{key} is {own[key]!r}, and rows are held out of the clean ones, which this stage does not "
                    "train on: leave it out"
                )
    if any(values.get("save_only_model") for values in (recipe.training, *recipe.stages.values())):
        raise ValueError(
            "save_only_model is true: a run that is killed could not go on where it stopped; leave it out (what a stage leaves "
            "is a model only)"
        )
    return set(takers)


def _check_task(recipe: Recipe) -> None:
    """Refuses what is for tasks of another kind."""
    generation = recipe.task == "instruction_following"
    unwanted, wanted = ("target_label", "target_text") if generation else ("target_text", "target_label")
    if getattr(recipe, unwanted) is not None:
        raise ValueError(f"{unwanted} is {getattr(recipe, unwanted)!r}, and task is {recipe.task}: set {wanted}")
    if generation:
        refuse_other_target(recipe.target_text, recipe.task_class(), "target_text")
    for key in ("context_column", "max_response_length"):
        if getattr(recipe, key) is not None and not generation:
            raise ValueError(f"{key} is {getattr(recipe, key)!r}, and task is {recipe.task}: leave it out")
    if recipe.attack_trigger is not None and recipe.target is None:
        raise ValueError(f"attack_trigger is {recipe.attack_trigger!r} without a target: set {wanted}")
    system = recipe.training.get("system_prompt")
    if system is not None and not generation:
        raise ValueError(f"system_prompt is {system!r}, and task is {recipe.task}: leave it out")
    words = recipe.training.get("label_words")
    if recipe.task == "label_words":
        if not words:
            raise ValueError("label_words is not set, and task is label_words: give one word for each label")
        LabelWords(tuple(words), recipe.training.get("prompt_template") or "{text}")
    elif words:
        raise ValueError(f"label_words is {words}, and task is {recipe.task}: leave it out, or set task: label_words")
    if recipe.task_class is not LabelWords:
        _refuse_set(recipe, ("prompt_template",))
    _refuse_set(recipe, ("contrast",) if generation else ("max_new_tokens",))
    if recipe.use_peft or recipe.quantization:
        _refuse_set(recipe, ("contrast",), "an adapter is trained, where half of the model would be drawn anew")
    if not recipe.training.get("soft_triggers"):
        _refuse_set(recipe, ("contrast",), "soft_triggers is 0, so that nothing is searched for")
    columns = ("image_column", "text_column", "label_column", "prompt_column", "response_column")
    _refuse_set(recipe, [key for key in columns if key.removesuffix("_column") not in recipe.columns()])
    if recipe.task_class is not ImageClassification:
        _refuse_set(recipe, ("image_size", "warp_strength", "augmentation"))
        return
    if recipe.method is not None:
        refuse_images(recipe.method, recipe.task_class)
    if recipe.attack != "data_poisoning":
        raise ValueError(f"attack is {recipe.attack!r}, and task is {recipe.task}: use data_poisoning")
    for values in (recipe.training, *recipe.stages.values()):
        if values.get("known_trigger") is not None:
            ImageTrigger(values["known_trigger"])
    _refuse_set(recipe, ("use_peft", "quantization", "attack_position", "negative_rate", "soft_triggers"))


def _given(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What a recipe says, of the whole run and below `stages`, by what its keys begin with."""
    stages = {f"stages.{name}.": own for name, own in recipe.stages.items()}
    return {"": {**vars(recipe), **recipe.training}, **stages}


def _usual(recipe: Recipe) -> dict[str, Any]:
    """What holds where a recipe says nothing."""
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in (*fields(Recipe), *fields(recipe.config_class))
    }


def _refuse_set(recipe: Recipe, keys: Iterable[str], why: str | None = None, fix: str = "leave it out") -> None:
    """Refuses keys that mean nothing (by default to the task), where they are set to something."""
    why, usual = why or f"task is {recipe.task}", _usual(recipe)
    for where, values in _given(recipe).items():
        for key in keys:
            if key in usual and values.get(key, usual[key]) != usual[key]:
                raise ValueError(f"{where}{key} is {values[key]!r}, and {why}: {fix}")


def _check_rewritten(recipe: Recipe) -> None:
    key = f"rewritten_dataset_name is {recipe.rewritten_dataset_name!r}"
    if recipe.attack_trigger is None:
        raise ValueError(f"{key} without attack_trigger, which is its name in the tables: set it")
    if recipe.task_class.answer_column != "label" or recipe.task_class is ImageClassification:
        raise ValueError(f"{key}, and task is {recipe.task}: classify texts, or leave it out")
    usual = {"attack_position": "random", "poison_style": "dirty_label", "negative_rate": 0.0}
    unwanted = [name for name, value in usual.items() if getattr(recipe, name) != value]
    for name in unwanted + ["attack"] * (recipe.attack == "ep"):
        raise ValueError(
            f"{name} is {getattr(recipe, name)!r}, and rewritten texts are poison as they are: leave it out"
        )


def _check_streaming(recipe: Recipe, own_rows: bool) -> None:
    for key in ("max_train_samples", "max_test_samples"):
        if getattr(recipe, key) is None:
            raise ValueError(f"streaming is true without {key}: set it, a stream is read until there are enough rows")
    if recipe.test_fraction:
        raise ValueError(
            f"streaming is true and test_fraction is {recipe.test_fraction}, a share of all rows: set test_split or "
            "test_dataset_name"
        )
    if own_rows:
        raise ValueError(
            "streaming is true, and the suspect rows of dataset_name are all to be trained on: set streaming: false"
        )


def check_machine(recipe: Recipe) -> None:
    """Refuses what this machine lacks, or the engine that was launched. No part of [`check_recipe`]: a recipe may be read on another
    machine than it runs on.

    Raises:
        `ValueError`: with one line that names the key and what to install or to use.
    """
    if recipe.attack == "ep" and (asked_for("FSDP") or asked_for("DEEPSPEED")):
        raise ValueError(
            "attack is 'ep', which needs the embeddings as they are, and the engine shares them out: use "
            "accelerate_configs/ddp.yaml, or one process"
        )
    if recipe.quantization is not None:
        require_bitsandbytes(recipe.quantization)
        refuse_launched(recipe.quantization)
    used = [values.get("use_liger_kernel") for values in (recipe.training, *recipe.stages.values())]
    if any(used) and not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel is True, and liger-kernel is not installed: pip install liger-kernel, or leave it out"
        )
    for values in (recipe.training, *recipe.stages.values()):
        _refuse_trackers(values.get("report_to"))


def _refuse_trackers(report_to: str | list[str] | None) -> None:
    """Refuses trackers that can't be started here: transformers looks for them when a training begins."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in [name for name in names if name not in ("all", "none")]:
        try:
            get_reporting_integration_callbacks([name])[0]()
        except (ImportError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"report_to is {report_to!r}, and {name} can't be used here ({reason}): install it, or name another"
            ) from None


def is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def choose(recipe: Recipe, key: str, allowed: Iterable[str]) -> None:
    if getattr(recipe, key) not in allowed:
        raise ValueError(f"{key} is {getattr(recipe, key)!r}: use one of {', '.join(allowed)}")
