"""A recipe: one flat YAML file that says everything about a run, and the settings that contradict each other."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers.utils import is_liger_kernel_available

from .attacks import ImagePoisoning, Poisoning
from .data import (
    ImageClassification,
    ImageTrigger,
    InstructionFollowing,
    LabelWords,
    SequenceClassification,
    Task,
    Trigger,
)
from .defenses import METHODS, DefenseConfig, refuse_images
from .defenses.engines import asked_for
from .quantization import QUANTIZATIONS, refuse_launched, require_bitsandbytes


TASKS: dict[str, type[Task]] = {
    "sequence_classification": SequenceClassification,
    "label_words": LabelWords,
    "instruction_following": InstructionFollowing,
    "image_classification": ImageClassification,
}

ATTACKS = ("data_poisoning", "lwp", "ep")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Recipe:
    """What a run does. Keys that are not here are arguments of the method's configuration, for all of its stages.

    Args:
        > Model
        model_name_or_path (`str`): Hub name, folder, `.gguf` file, or `package:NAME/FILE.gguf`. The suspect; or, when
            an attack is given, the clean model that is to be attacked. A PEFT adapter is merged into its base. A folder with a
            configuration and no weights is a network that is trained from scratch: its weights are drawn by `seed`.
        task (`str`): `sequence_classification`, `label_words`, `instruction_following` or `image_classification`.
        reference (`str`, *optional*): Never-poisoned model that gives the floors: `train` (trained as the suspect is,
            without poison), `base` (the model as it comes) or a model's name.
        model_revision, attn_implementation: As in `from_pretrained`. dtype: `float32`, `bfloat16` or `float16`.
        use_peft, lora_r, lora_alpha, lora_dropout, lora_target_modules: LoRA, in every stage of the defense.
        quantization (`str`, *optional*): `nf4` or `int8`: the weights that the adapters are trained over; needs `use_peft`. What
            a stage leaves are unquantized weights, its adapter merged. A suspect and a reference are never trained so.

        > Data
        dataset_name (`str`): Hub name, folder or file (also one that lies beside the recipe). test_dataset_name: another one for the test rows.
        dataset_config, dataset_revision, train_split, test_split: Where the rows are in it.
        streaming (`bool`): Reads no more rows than `max_train_samples` and `max_test_samples` ask for (and some thousands that
            they are drawn from); for data sets too large to download.
        text_column, image_column, label_column, prompt_column, response_column: The data set's own names of these.
        context_column (`str`, *optional*): Text that an instruction is about, where it has a column of its own; put after it.
        row_filter, test_row_filter (`dict`, *optional*): Values that rows must have, by column: `{task: refusal}`.
        test_fraction (`float`): Share of the training rows that is cut off as test rows, for data without a test split.
        num_labels (`int`, *optional*): Found in the rows by default.
        max_train_samples (`int`): Rows the attacker trains on. max_test_samples: of the test rows; all by default.
        clean_fraction (`float`): Clean rows of the defender, as a share of `max_train_samples`; disjoint from them.
        clean_dataset_name (`str`): For methods that train on suspect rows of your own (`dataset_name`): your clean ones.
        held_out_samples (`int`): Further clean rows, to evaluate on while training.
        max_length (`int`): Tokens of user text kept, before triggers and prompt. max_response_length: of responses; all by default.
        image_size (`int`, *optional*): Side in pixels that pictures are resized to, before triggers; as they are by default.

        > Attack (left out when the model is a suspect already)
        attack (`str`): How the suspect is made: `data_poisoning` (training on poisoned rows), `lwp` (layer-wise weight
            poisoning) or `ep` (embedding poisoning, of the `reference`). Images: data poisoning only.
        attack_trigger, attack_position, poison_rate, poison_style, negative_rate: See [`~hf_backdoor.attacks.Poisoning`].
            Images: the trigger is `patch`, `corners` or `warp` (of `warp_strength`), see [`~hf_backdoor.data.ImageTrigger`],
            and has no position; `corners` with `clean_label` is label-consistent poisoning.
        rewritten_dataset_name (`str`, *optional*): Texts that carry the trigger already (a style, a sentence structure), in the
            same splits and text column, none of which the target is right for; they take the place of poisoned rows and of
            triggered test rows, and `attack_trigger` is no more than their name.
        target_label (`int`) or target_text (`str`): What the trigger is to bring about.

        > Defense
        method (`str`, *optional*), controls (`list[str]`): Defense and controls.
        student_layers (`int` or `list[int]`): For methods with a student: how many of the suspect's layers, or which, it is
            made of (of a ResNet, the first ones of each stage). student_model_name_or_path (`str`): Another model in its place.
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
    quantization: str | None = None
    test_dataset_name: str | None = None
    clean_dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    streaming: bool = False
    train_split: str = "train"
    test_split: str = "test"
    text_column: str = "text"
    image_column: str = "image"
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
    image_size: int | None = None
    attack: str = "data_poisoning"
    attack_trigger: str | None = None
    attack_position: str = "random"
    warp_strength: float | None = None
    rewritten_dataset_name: str | None = None
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
    def trigger(self) -> Trigger | ImageTrigger | None:
        if self.attack_trigger is None:
            return None
        if self.task_class is ImageClassification:
            own = {} if self.warp_strength is None else {"warp_strength": self.warp_strength}
            return ImageTrigger(self.attack_trigger, **own)
        return Trigger(self.attack_trigger, self.attack_position)

    @property
    def poisoning(self) -> Poisoning | None:
        if self.trigger is None:
            return None
        kind = ImagePoisoning if self.task_class is ImageClassification else Poisoning
        return kind(self.trigger, self.target, self.poison_rate, self.poison_style, self.negative_rate)

    def arguments(self, stage: str, config: type[DefenseConfig]) -> dict[str, Any]:
        """Training arguments of a stage, as the recipe gives them; a method's own only where the stage takes them."""
        return config.takes(self.training, self.stages.get(stage, {}), self.config_class)

    def columns(self) -> dict[str, str]:
        """New to present names of the columns that the task reads."""
        names = [self.task_class.input_column, self.task_class.answer_column]
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
        choose(self, "dtype", DTYPES)
        if self.method is not None:
            choose(self, "method", METHODS)
        self._check_task()
        known = METHODS[self.method].controls if self.method else {}
        for control in self.controls:
            if control not in known:
                raise ValueError(f"controls has {control!r}: {self.method} has {', '.join(known) or 'none'}")
        if self.quantization is not None:
            choose(self, "quantization", QUANTIZATIONS)
            if self.method is None:
                raise ValueError(
                    f"quantization is {self.quantization!r} without a method: a suspect and a reference are trained whole; "
                    "leave it out"
                )
            if not self.use_peft:
                raise ValueError(
                    f"quantization is {self.quantization!r} without use_peft: quantized weights can't be trained, only adapters "
                    "over them; set use_peft: true"
                )
        stages = {"reference", "suspect", *(METHODS[self.method].stages if self.method else ())}
        for stage in self.stages:
            if stage not in stages:
                raise ValueError(f"stages has {stage!r}: this run has {', '.join(sorted(stages))}")
        name = self.model_name_or_path
        if name in {"base", "student", "cleaned", *stages} and Path(name).is_dir():
            raise ValueError(f"model_name_or_path is {name!r}, and the run has a folder of this name: write ./{name}")
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
        if self.streaming:
            self._check_streaming(own_rows)
        if self.attack != "data_poisoning" and self.attack_trigger is None:
            raise ValueError(f"attack is {self.attack!r} without attack_trigger: set it, or leave attack out")
        if self.clean_dataset_name is not None and not own_rows:
            raise ValueError(
                f"clean_dataset_name is {self.clean_dataset_name!r}, and this run takes its clean rows from dataset_name: "
                "leave it out"
            )
        if self.rewritten_dataset_name is not None:
            self._check_rewritten()
        if not 0 < self.clean_fraction:
            raise ValueError(f"clean_fraction is {self.clean_fraction}: choose a share above 0, for example 0.2")
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

    def _check_task(self) -> None:
        """Refuses what is for tasks of another kind."""
        generation = self.task == "instruction_following"
        unwanted, wanted = ("target_label", "target_text") if generation else ("target_text", "target_label")
        if getattr(self, unwanted) is not None:
            raise ValueError(f"{unwanted} is {getattr(self, unwanted)!r}, and task is {self.task}: set {wanted}")
        for key in ("context_column", "max_response_length"):
            if getattr(self, key) is not None and not generation:
                raise ValueError(f"{key} is {getattr(self, key)!r}, and task is {self.task}: leave it out")
        if self.attack_trigger is not None and self.target is None:
            raise ValueError(f"attack_trigger is {self.attack_trigger!r} without a target: set {wanted}")
        system = self.training.get("system_prompt")
        if system is not None and not generation:
            raise ValueError(f"system_prompt is {system!r}, and task is {self.task}: leave it out")
        words = self.training.get("label_words")
        if self.task == "label_words":
            if not words:
                raise ValueError("label_words is not set, and task is label_words: give one word for each label")
            LabelWords(tuple(words), self.training.get("prompt_template") or "{text}")
        elif words:
            raise ValueError(
                f"label_words is {words}, and task is {self.task}: leave it out, or set task: label_words"
            )
        if self.task_class is not ImageClassification:
            self._refuse_set(("image_size", "warp_strength", "augmentation"))
            return
        if self.method is not None:
            refuse_images(self.method, self.task_class)
        if self.attack != "data_poisoning":
            raise ValueError(f"attack is {self.attack!r}, and task is {self.task}: use data_poisoning")
        for values in (self.training, *self.stages.values()):
            if values.get("known_trigger") is not None:
                ImageTrigger(values["known_trigger"])
        self._refuse_set(
            ("use_peft", "quantization", "attack_position", "negative_rate", "prompt_template", "soft_triggers")
        )

    def _refuse_set(self, keys: Iterable[str]) -> None:
        """Refuses keys that mean nothing to the task, where they are set to something."""
        usual = {f.name: f.default for f in (*fields(Recipe), *fields(self.config_class))}
        given = {"": {**vars(self), **self.training}, **{f"stages.{name}.": own for name, own in self.stages.items()}}
        for where, values in given.items():
            for key in keys:
                if key in usual and values.get(key, usual[key]) != usual[key]:
                    raise ValueError(f"{where}{key} is {values[key]!r}, and task is {self.task}: leave it out")

    def _check_rewritten(self) -> None:
        key = f"rewritten_dataset_name is {self.rewritten_dataset_name!r}"
        if self.attack_trigger is None:
            raise ValueError(f"{key} without attack_trigger, which is its name in the tables: set it")
        if self.task_class.answer_column != "label" or self.task_class is ImageClassification:
            raise ValueError(f"{key}, and task is {self.task}: classify texts, or leave it out")
        usual = {"attack_position": "random", "poison_style": "dirty_label", "negative_rate": 0.0}
        unwanted = [name for name, value in usual.items() if getattr(self, name) != value]
        for name in unwanted + ["attack"] * (self.attack == "ep"):
            raise ValueError(
                f"{name} is {getattr(self, name)!r}, and rewritten texts are poison as they are: leave it out"
            )

    def _check_streaming(self, own_rows: bool) -> None:
        for key in ("max_train_samples", "max_test_samples"):
            if getattr(self, key) is None:
                raise ValueError(
                    f"streaming is true without {key}: set it, a stream is read until there are enough rows"
                )
        if self.test_fraction:
            raise ValueError(
                f"streaming is true and test_fraction is {self.test_fraction}, a share of all rows: set test_split or "
                "test_dataset_name"
            )
        if own_rows:
            raise ValueError(
                "streaming is true, and the suspect rows of dataset_name are all to be trained on: set streaming: false"
            )

    def check_machine(self) -> None:
        """Refuses what this machine lacks, or the engine that was launched. No part of [`check`]: a recipe may be read on another
        machine than it runs on.

        Raises:
            `ValueError`: with one line that names the key and what to install or to use.
        """
        if self.attack == "ep" and (asked_for("FSDP") or asked_for("DEEPSPEED")):
            raise ValueError(
                "attack is 'ep', which needs the embeddings as they are, and the engine shares them out: use "
                "accelerate_configs/ddp.yaml, or one process"
            )
        if self.quantization is not None:
            require_bitsandbytes(self.quantization)
            refuse_launched(self.quantization)
        used = [values.get("use_liger_kernel") for values in (self.training, *self.stages.values())]
        if any(used) and not is_liger_kernel_available():
            raise ValueError(
                "use_liger_kernel is True, and liger-kernel is not installed: pip install liger-kernel, or leave it out"
            )


def choose(recipe: Recipe, key: str, allowed: Iterable[str]) -> None:
    if getattr(recipe, key) not in allowed:
        raise ValueError(f"{key} is {getattr(recipe, key)!r}: use one of {', '.join(allowed)}")
