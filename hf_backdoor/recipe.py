"""A recipe: one flat YAML file that says everything about a run."""

from dataclasses import dataclass, field, fields
from typing import Any

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
from .defenses import METHODS, DefenseConfig


TASKS: dict[str, type[Task]] = {
    "sequence_classification": SequenceClassification,
    "label_words": LabelWords,
    "instruction_following": InstructionFollowing,
    "image_classification": ImageClassification,
}


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
        clean_fraction (`float`): Clean rows of the defender, as a share of `max_train_samples`; disjoint from them. Without an attack all
            rows are the defender's.
        clean_dataset_name (`str`): For methods that train on suspect rows of your own (`dataset_name`): your clean ones.
        held_out_samples (`int`): Further clean rows, to evaluate on while a stage trains on clean ones; no other stage is evaluated.
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
        max_new_tokens (`int`): Length of free answers in the evaluation. eval_batch_size (`int`): Its rows a batch.
        license (`str`, *optional*): Of the model card: the suspect's by default, where it is a folder whose README.md says so.
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
    license: str | None = None
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
