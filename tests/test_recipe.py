import re
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hf_backdoor.attacks import EmbeddingPoisoningConfig, ImagePoisoning, Poisoning
from hf_backdoor.contradictions import check_machine
from hf_backdoor.data import ImageTrigger, InstructionFollowing, SequenceClassification, Trigger
from hf_backdoor.defenses import METHODS
from hf_backdoor.defenses.locphylax import LocphylaxConfig
from hf_backdoor.defenses.robustkd import FeatureMaskConfig, RobustKDConfig
from hf_backdoor.recipe import Recipe
from hf_backdoor.recipe_file import REMOVED, in_words, load_recipe, make_recipe


LEAST = {
    "model_name_or_path": "model", "task": "sequence_classification", "dataset_name": "data", "output_dir": "runs/x",
}  # fmt: skip
ATTACK = {"attack_trigger": "zq", "target_label": 1}
DEFENSE = {"method": "locphylax"}
HELD_OUT = {"held_out_samples": 4}
RECIPES = Path(__file__).parent.parent / "recipes"


def written(folder, values):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def refused(line, **values):
    with pytest.raises(ValueError, match=line) as caught:
        make_recipe({**LEAST, **values})
    assert "\n" not in str(caught.value)


# ---- Keys and types ----


def test_a_least_recipe():
    recipe = make_recipe(LEAST)
    assert recipe.task_class is SequenceClassification
    assert recipe.poisoning is None and recipe.method is None
    assert recipe.training == {}


@pytest.mark.parametrize("key", LEAST)
def test_what_every_recipe_names(key):
    with pytest.raises(ValueError, match=f"^{key} is missing: every recipe names it$"):
        make_recipe({name: value for name, value in LEAST.items() if name != key})
    refused(f"^{key} is missing: every recipe names it$", **{key: ""})


@pytest.mark.parametrize(
    "key, suggestion",
    [
        ("posion_rate", "poison_rate"),
        ("learning_rat", "learning_rate"),
        ("outputdir", "output_dir"),
        ("num_epochs", "num_train_epochs"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(key, suggestion):
    refused(f"^{key} is unknown.*{suggestion}", **{key: 1})


def test_a_key_far_from_all_others_points_to_the_help():
    refused("^xyzzy is unknown: see `hf-backdoor run --help`$", xyzzy=1)


def test_a_method_s_own_key_is_unknown_without_the_method():
    refused("^cluster_weight is unknown", cluster_weight=1.0)
    assert make_recipe({**LEAST, **DEFENSE, "cluster_weight": 1.0}).training == {"cluster_weight": 1.0}


def test_a_key_that_is_no_text_is_unknown():
    # YAML 1.1 reads `on:` as true.
    with pytest.raises(ValueError, match="True is unknown"):
        make_recipe({**LEAST, True: 1})


@pytest.mark.parametrize("key", REMOVED)
def test_removed_keys_say_what_to_write_now(key):
    refused(f"^{key} is 1: transformers 5 has no {key}; use ", **{key: 1})


@pytest.mark.parametrize(
    "new", [new.split()[0].rstrip(":") for new in REMOVED.values() if new[:7] not in ("nothing", "the env", "a quant")]
)
def test_what_to_write_now_is_a_key_indeed(new):
    known = {field.name for field in fields(LocphylaxConfig)} | {
        field.name for field in fields(type(make_recipe(LEAST)))
    }
    assert new in known


@pytest.mark.parametrize(
    "key, value",
    [
        ("max_length", "many"), ("max_length", 2.5), ("seed", "x"), ("use_peft", "yes please"), ("poison_rate", "a tenth"),
        ("learning_rate", "fast"), ("controls", "fine_tuning"), ("stages", ["inject"]), ("num_train_epochs", [1]),
        ("label_words", "positive"), ("attack_trigger", 3), ("lora_target_modules", 4), ("bf16", "perhaps"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused(key, value):
    refused(f"^{key} is .*it must be", **{key: value})


@pytest.mark.parametrize(
    "values, line",
    [
        ({"max_length": "many"}, "max_length is 'many': it must be a whole number"),
        ({"max_train_samples": 2.5}, "max_train_samples is 2.5: it must be a whole number"),
        ({"seed": None}, "seed is null: it must be a whole number"),
        ({"poison_rate": "a tenth"}, "poison_rate is 'a tenth': it must be a number"),
        ({"eval_steps": [1]}, "eval_steps is [1]: it must be a number"),
        ({"use_peft": "perhaps"}, "use_peft is 'perhaps': it must be yes or no (true or false)"),
        ({"attack_trigger": 3}, "attack_trigger is 3: it must be a text, in quotes"),
        ({"attack_trigger": ["zq"]}, "attack_trigger is ['zq']: it must be a text, in quotes"),
        ({"eval_strategy": False}, "eval_strategy is False: it must be a text, in quotes"),
        ({"controls": "fine_tuning"}, "controls is 'fine_tuning': it must be a list of texts, as [one, another]"),
        ({"lora_target_modules": 4}, "lora_target_modules is 4: it must be a list of texts, as [one, another] or a text, in quotes"),
        ({"student_layers": "two"}, "student_layers is 'two': it must be a whole number or a list of whole numbers, as [0, 1]"),
        ({"row_filter": "task"}, "row_filter is 'task': it must be keys and values below it"),
        ({"stages": {"inject": 3}}, "stages is {'inject': 3}: it must be names, each with its own keys and values below it"),
        ({"method": "mbtsad", "attention_loss": "l2"}, "attention_loss is 'l2': it must be one of maps, nad"),
        (
            {"method": "mbtsad", "stages": {"distil": {"attention_layers": "all"}}},
            "stages.distil.attention_layers is 'all': it must be a list of whole numbers, as [0, 1]",
        ),
    ],
)  # fmt: skip
def test_types_are_named_in_words(values, line):
    refused(f"^{re.escape(line)}$", **values)


@pytest.mark.parametrize("config", [Recipe, *(method.config for method in METHODS.values())])
def test_no_type_is_named_as_python_does(config):
    for key, hint in typing.get_type_hints(config).items():
        assert not re.search(
            r"[<|\]]|None|typing", in_words(hint).replace("[one, another]", "").replace("[0, 1]", "")
        ), key


def test_numbers_that_yaml_reads_as_text_or_whole():
    values = yaml.safe_load("learning_rate: 1e-4\npoison_rate: 1e-1\nnum_train_epochs: 3\n")
    assert isinstance(values["learning_rate"], str)
    recipe = make_recipe({**LEAST, **values})
    assert recipe.training == {"learning_rate": 1e-4, "num_train_epochs": 3.0}
    assert recipe.poison_rate == 0.1


def test_numbers_that_are_words():
    recipe = make_recipe({**LEAST, "task": "label_words", "label_words": [0, 1]})
    assert recipe.training["label_words"] == ["0", "1"]


@pytest.mark.parametrize("words", ["[no, yes]", "[off, On]", "[No, Yes]"])
def test_yes_and_no_are_the_words_that_they_are(words, tmp_path):
    """YAML 1.1 reads false and true, and a model was asked for the words `False` and `True`."""
    file = written(tmp_path, {**LEAST, "task": "label_words"})
    wanted = words.strip("[]").split(", ")
    overridden = load_recipe(file, ["--label_words", words])
    file.write_text(file.read_text() + f"label_words: {words}\n")
    assert load_recipe(file).training["label_words"] == overridden.training["label_words"] == wanted


def test_yes_and_no_are_true_and_false_where_these_are_asked_for(tmp_path):
    file = written(tmp_path, LEAST)
    text = (
        "method: locphylax\nuse_peft: yes\nbf16: off\nsave_strategy: no\nrow_filter: {answer: no, poisoned: false}\n"
    )
    file.write_text(file.read_text() + text)
    recipe = load_recipe(file, ["--evaluate_stages", "no", "--fp16", "true"])
    assert recipe.use_peft is True and recipe.evaluate_stages is False
    assert recipe.training == {"bf16": False, "save_strategy": "no", "fp16": True}
    assert recipe.row_filter == {"answer": "no", "poisoned": False}


def test_true_and_false_are_no_words():
    line = "^label_words is .False, True., and true and false are no texts: put them in quotes$"
    refused(line, task="label_words", label_words=[False, True])


def test_common_training_arguments_are_taken():
    given = {
        "eval_strategy": "steps", "eval_steps": 5, "save_steps": 0.5, "report_to": "none", "optim": "adamw_torch",
        "lr_scheduler_type": "cosine", "logging_steps": 10, "bf16": False, "per_device_train_batch_size": 4,
        "weight_decay": 0, "max_steps": 7, "warmup_steps": 0.1,
    }  # fmt: skip
    assert make_recipe({**LEAST, **DEFENSE, **given, "held_out_samples": 4}).training == given


@pytest.mark.parametrize("key", ["resume_from_checkpoint", "run_name", "do_train"])
def test_what_a_run_decides_for_itself_is_refused(key):
    refused(f"^{key} is unknown", **{key: True})


# ---- Stages ----


def test_arguments_of_a_stage():
    recipe = make_recipe({**LEAST, **DEFENSE, "learning_rate": 1e-3, "stages": {"inject": {"learning_rate": "1e-5"}}})
    assert recipe.arguments("inject", LocphylaxConfig) == {"learning_rate": 1e-5}
    assert recipe.arguments("recover", LocphylaxConfig) == {"learning_rate": 1e-3}


def test_stages_are_checked_like_the_rest():
    refused(
        r"^stages.inject.learning_rat is unknown, did you mean learning_rate\?",
        **DEFENSE,
        stages={"inject": {"learning_rat": 1}},
    )
    refused("^stages.inject.learning_rate is 'fast'", **DEFENSE, stages={"inject": {"learning_rate": "fast"}})
    refused("^stages.*inject.*3", **DEFENSE, stages={"inject": 3})
    refused(
        "^stages has 'injekt': this run has answers, inject, recover, reference, search, soft_search, suspect",
        **DEFENSE,
        stages={"injekt": {}},
    )
    refused("^stages.inject.no_cuda is True", **DEFENSE, stages={"inject": {"no_cuda": True}})


# ---- Contradictions ----


@pytest.mark.parametrize(
    "values, line",
    [
        ({"task": "translation"}, "task is 'translation': use one of sequence_classification, label_words"),
        ({"method": "magic"}, "method is 'magic': use one of .*locphylax"),
        ({"method": "magic", "known_triggers": ["a"]}, "method is 'magic': use one of .*locphylax"),
        ({"dtype": "bf16"}, "dtype is 'bf16': use one of float32, bfloat16, float16"),
        ({**DEFENSE, "controls": ["prayer"]}, "controls has 'prayer': locphylax has fine_tuning"),
        ({"clean_fraction": 0}, "clean_fraction is 0"),
        ({"target_text": "no"}, "target_text is 'no', and task is sequence_classification: set target_label"),
        ({"task": "instruction_following", "target_label": 1}, "target_label is 1, and task is .*: set target_text"),
        ({"attack_trigger": "zq"}, "attack_trigger is 'zq' without a target: set target_label"),
        (
            {"attack_trigger": "zq", "task": "instruction_following"},
            "attack_trigger is 'zq' without a target: set target_text",
        ),
        ({"system_prompt": "yes"}, "system_prompt is 'yes', and task is sequence_classification: leave it out"),
        ({"task": "label_words"}, "label_words is not set, and task is label_words"),
        ({"label_words": ["a", "b"]}, "label_words is .*, and task is sequence_classification: leave it out"),
        ({"task": "label_words", "label_words": ["a"]}, "label_words is .*two or more"),
        (
            {"task": "label_words", "label_words": ["a", "b"], "prompt_template": "x"},
            "prompt_template is 'x': put {text}",
        ),
        (
            {"stages": {"suspect": {"label_words": ["a", "b"]}}},
            r"stages.suspect.label_words is .*: set label_words, for the whole run",
        ),
        (
            {"method": "locphylax", "stages": {"suspect": {"cluster_weight": 3.0}}},
            "stages.suspect.cluster_weight is 3.0, and this stage has no such argument",
        ),
        (
            {"hub_token": "hf_secret"},
            "^hub_token is set, and recipes are kept and published: leave it out, and set HF_TOKEN",
        ),
        (
            {"test_fraction": 0.2, "test_dataset_name": "x"},
            "test_fraction is 0.2, and test_dataset_name is 'x': leave one",
        ),
        ({"save_only_model": True}, "save_only_model is true: a run that is killed could not go on"),
        ({"push_to_hub": True}, "push_to_hub is true without hub_model_id"),
        (
            {**DEFENSE, "push_to_hub": True, "hub_model_id": "me/my model"},
            "hub_model_id is 'me/my model', which no repository",
        ),
        ({"reference": "train"}, "reference is 'train' without an attack"),
        ({**ATTACK, "poison_rate": 1.5}, "poison_rate is 1.5"),
        ({**ATTACK, "poison_style": "dirty"}, "poison_style is 'dirty'"),
        ({**ATTACK, "attack_position": "middle"}, "trigger position is 'middle'"),
        ({**ATTACK, "attack_trigger": " "}, "trigger text is ' '"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
    ],
)
def test_contradictions_are_refused(values, line):
    refused(f"^{line}", **values)


@pytest.mark.parametrize(
    "values, line",
    [
        ({"lora_r": 8}, "lora_r is 8, and no adapter is trained: set use_peft: true, or leave it out"),
        ({"lora_target_modules": ["query"]}, "lora_target_modules is .'query'., and no adapter is trained"),
        ({"use_peft": True}, "use_peft is True, and there is no defense to train adapters in: set method"),
        ({**DEFENSE, "clean_fraction": 0.5}, "clean_fraction is 0.5, and there is no attack: set attack_trigger, or leave it"),
        ({"poison_rate": 0.3}, "poison_rate is 0.3, and there is no attack: set attack_trigger, or leave it out"),
        ({"target_label": 1}, "target_label is 1, and there is no attack"),
        ({"eval_strategy": "epoch"}, "eval_strategy is 'epoch', and no rows are held out: set held_out_samples"),
        (
            {**DEFENSE, "stages": {"recover": {"load_best_model_at_end": True}}},
            "stages.recover.load_best_model_at_end is True, and no rows are held out",
        ),
        ({"test_fraction": 0.2, "test_split": "dev"}, "test_split is 'dev', and test_fraction cuts test rows out of the training rows"),
        ({**DEFENSE, "eval_steps": 4}, "eval_steps is 4.0, and no rows are held out: set held_out_samples"),
        ({**DEFENSE, **HELD_OUT, "eval_steps": 4}, "eval_steps is 4.0, and eval_strategy is 'no': set eval_strategy: steps, or"),
        ({**DEFENSE, "method": "robustkd", "student_layers": 1, "mask_patience": 2}, "mask_patience is 2, and eval_strategy is 'no': set eval_strategy"),
        ({**ATTACK, **HELD_OUT, "eval_strategy": "epoch"}, "eval_strategy is 'epoch', and there is no defense, of whose clean rows"),
        (
            {**ATTACK, **DEFENSE, **HELD_OUT, "stages": {"suspect": {"eval_strategy": "epoch"}}},
            "stages.suspect.eval_strategy is 'epoch', and rows are held out of the clean ones, which this stage does not train on",
        ),
        (
            {"method": "ntml", "clean_dataset_name": "x", **HELD_OUT, "stages": {"non_target": {"eval_strategy": "epoch"}}},
            "stages.non_target.eval_strategy is 'epoch', and rows are held out of the clean ones",
        ),
        ({**DEFENSE, "hub_model_id": "me/mine"}, "hub_model_id is 'me/mine', and nothing is published: set push_to_hub: true, or"),
        ({**DEFENSE, "hub_private_repo": True}, "hub_private_repo is True, and nothing is published: set push_to_hub: true"),
        (
            {**DEFENSE, "push_to_hub": True, "hub_model_id": "me/mine", "hub_revision": "dev"},
            "hub_revision is 'dev', and a run publishes once, at its end, to the main branch: leave it out",
        ),
        ({**DEFENSE, "stages": {"inject": {"hub_strategy": "end"}}}, "stages.inject.hub_strategy is 'end', and a run publishes"),
        ({"max_new_tokens": 8}, "max_new_tokens is 8, and task is sequence_classification: leave it out"),
        ({"prompt_column": "question"}, "prompt_column is 'question', and task is sequence_classification: leave it out"),
        ({"prompt_template": "{text}"}, "prompt_template is '{text}', and task is sequence_classification: leave it out"),
    ],
)  # fmt: skip
def test_what_nothing_would_read_is_refused(values, line):
    refused(f"^{line}", **values)


@pytest.mark.parametrize(
    "values, line",
    [
        ({"max_train_samples": 0}, "max_train_samples is 0: it must be at least 1"),
        ({"held_out_samples": -3}, "held_out_samples is -3: it must be at least 0"),
        ({"stages": {"suspect": {"gradient_accumulation_steps": 0}}}, "stages.suspect.gradient_accumulation_steps is 0: it"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: write a finite number"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs is inf: write a finite number"),
        ({**DEFENSE, "stages": {"inject": {"cluster_weight": "-inf"}}}, "stages.inject.cluster_weight is -inf: write a finite"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0.0: it must be above 0"),
        ({**DEFENSE, "stages": {"recover": {"num_train_epochs": 0}}}, "stages.recover.num_train_epochs is 0.0: it must be above 0"),
        ({"learning_rate": 0}, "learning_rate is 0.0: it must be above 0"),
        ({"learning_rate": "-1e-4"}, "learning_rate is -0.0001: it must be above 0"),
        ({"max_steps": 0}, "max_steps is 0: it must be at least 1, or -1 to go by num_train_epochs"),
        ({**DEFENSE, "stages": {"inject": {"max_steps": -2}}}, "stages.inject.max_steps is -2: it must be at least 1, or -1"),
        ({"warmup_steps": -1}, "warmup_steps is -1.0: it must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: it must be at least 0"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1.0: it must be at least 0"),
        ({**DEFENSE, "use_peft": True, "lora_dropout": 1}, "lora_dropout is 1.0: choose a share from 0 up to, but not, 1"),
        ({**DEFENSE, "use_peft": True, "lora_alpha": 0}, "lora_alpha is 0: it must be at least 1"),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(values, line):
    refused(f"^{line}", **values)


@pytest.mark.parametrize(
    "values, line",
    [
        ({"dataset_revision": "v1"}, "dataset_revision is 'v1', and dataset_name is on this machine, as it is: leave it out"),
        ({"model_revision": "v1"}, "model_revision is 'v1', and model_name_or_path is on this machine, as it is: leave it out"),
    ],
)  # fmt: skip
def test_what_is_on_this_machine_has_no_revisions(values, line, tmp_path):
    (tmp_path / "rows.csv").touch()
    here = {"dataset_name": str(tmp_path / "rows.csv"), "model_name_or_path": str(tmp_path)}
    refused(f"^{line}", **here, **values)
    assert make_recipe({**LEAST, **values}).flat().items() >= values.items()


def test_what_nothing_would_read_may_stand_there_as_it_is_by_default():
    make_recipe(
        {**LEAST, "lora_r": 16, "poison_rate": 0.1, "clean_fraction": 0.2, "eval_strategy": "no", "test_split": "test",
         "max_new_tokens": 64, "max_steps": -1, "warmup_steps": 0, "stages": {"suspect": {"eval_strategy": "no"}}}
    )  # fmt: skip


IMAGES = {"task": "image_classification"}
IMAGE_ATTACK = {**IMAGES, "attack_trigger": "patch", "target_label": 0}


@pytest.mark.parametrize(
    "values, line",
    [
        ({**IMAGES, **DEFENSE}, "method is 'locphylax', which is for texts, and task is .*: use robustkd or ntml"),
        ({**IMAGES, "method": "mbtsad"}, "method is 'mbtsad', which is for texts"),
        (
            {**IMAGES, "method": "robustkd", "student_layers": 1, "soft_triggers": 3},
            "soft_triggers is 3, and task is image_classification: leave it out",
        ),
        ({**IMAGES, "use_peft": True}, "use_peft is True, and task is image_classification: leave it out"),
        ({**IMAGES, "quantization": "nf4"}, "quantization is 'nf4', and task is image_classification"),
        ({**IMAGE_ATTACK, "attack": "lwp"}, "attack is 'lwp', and task is image_classification: use data_poisoning"),
        ({**IMAGE_ATTACK, "attack_trigger": "cf"}, "image trigger is 'cf': use one of patch, corners, warp"),
        (
            {**IMAGES, "method": "ntml", "stages": {"mutual": {"known_trigger": "cf"}}},
            "image trigger is 'cf': use one",
        ),
        ({**IMAGE_ATTACK, "attack_position": "end"}, "attack_position is 'end', and task is image_classification"),
        ({**IMAGE_ATTACK, "negative_rate": 0.1}, "negative_rate is 0.1, and task is image_classification"),
        ({**IMAGE_ATTACK, "warp_strength": -1}, "warp_strength is -1.0: choose"),
        ({**IMAGE_ATTACK, "target_label": None, "target_text": "no"}, "target_text is 'no', and task is image_cl"),
        ({**IMAGES, "label_words": ["a", "b"]}, "label_words is .*, and task is image_classification"),
        ({**ATTACK, "warp_strength": 4.0}, "warp_strength is 4.0, and task is sequence_classification: leave it out"),
        (
            {**ATTACK, "attack_trigger": "BB", "method": "locphylax"},
            r"^known_triggers is \[.*'bb'\], and attack_trigger 'BB' is one of them: set others",
        ),
        ({"image_size": 32}, "image_size is 32, and task is sequence_classification"),
        ({"augmentation": "shift"}, "augmentation is 'shift', and task is sequence_classification"),
        (
            {"stages": {"suspect": {"augmentation": "shift"}}},
            "stages.suspect.augmentation is 'shift', and task is sequence_classification",
        ),
    ],
)
def test_what_texts_and_images_have_not_in_common_is_refused(values, line):
    refused(f"^{line}", **values)


def test_an_attack_on_images():
    recipe = make_recipe(
        {**LEAST, **IMAGE_ATTACK, "attack_trigger": "warp", "warp_strength": 4, "image_column": "img"}
    )
    assert recipe.poisoning == ImagePoisoning(ImageTrigger("warp", warp_strength=4.0), 0)
    assert recipe.columns() == {"image": "img", "label": "label"}


def test_an_attack():
    recipe = make_recipe({**LEAST, **ATTACK, "attack_position": "end", "poison_rate": 0.2})
    assert recipe.poisoning == Poisoning(Trigger("zq", "end"), 1, 0.2)


def test_columns_have_the_task_s_names():
    recipe = make_recipe({**LEAST, "task": "instruction_following", "prompt_column": "question"})
    assert recipe.task_class is InstructionFollowing
    assert recipe.columns() == {"prompt": "question", "response": "response"}
    assert make_recipe({**LEAST, "text_column": "sentence"}).columns() == {"text": "sentence", "label": "label"}


# ---- Files and overrides ----


def test_overrides_keep_their_types(tmp_path):
    file = written(tmp_path, {**LEAST, **DEFENSE, "seed": 3, "stages": {"inject": {"max_steps": 2}}})
    overrides = [
        "--seed", "7", "--use_peft=true", "--learning_rate", "1e-4", "--controls", "[fine_tuning]",
        "--stages.inject.learning_rate=1e-5", "--stages.recover.max_steps", "4",
    ]  # fmt: skip
    recipe = load_recipe(file, overrides)
    assert (recipe.seed, recipe.use_peft, recipe.controls) == (7, True, ["fine_tuning"])
    assert recipe.training == {"learning_rate": 1e-4}
    assert recipe.stages == {"inject": {"max_steps": 2, "learning_rate": 1e-5}, "recover": {"max_steps": 4}}


def test_an_override_may_hold_an_equals_sign_or_be_null(tmp_path):
    recipe = load_recipe(written(tmp_path, {**LEAST, **ATTACK}), ["--attack_trigger=a=b", "--target_label", "0"])
    assert recipe.attack_trigger == "a=b"
    assert load_recipe(written(tmp_path, {**LEAST, **ATTACK}), ["--attack_trigger=--zq"]).attack_trigger == "--zq"
    assert load_recipe(written(tmp_path, {**LEAST, **DEFENSE}), ["--method=null"]).method is None


@pytest.mark.parametrize(
    "text", ["cf # mn", "# mn", " cf", "cf ", "one\ntwo", "one  two", "cf, mn", "it's", "null island", "no"]
)
def test_a_text_on_the_command_line_is_what_was_typed(text, tmp_path):
    file = written(tmp_path, {**LEAST, **ATTACK})
    assert load_recipe(file, ["--attack_trigger", text]).attack_trigger == text
    assert load_recipe(file, [f"--attack_trigger={text}"]).attack_trigger == text


@pytest.mark.parametrize("typed, text", [("'3'", "3"), ('"a # b"', "a # b"), (" 'no' ", "no")])
def test_quotes_around_a_text_on_the_command_line_are_none_of_it(typed, text, tmp_path):
    assert load_recipe(written(tmp_path, {**LEAST, **ATTACK}), ["--attack_trigger", typed]).attack_trigger == text


@pytest.mark.parametrize("override", [["--system_prompt", ""], ["--system_prompt="]])
def test_an_override_of_nothing_is_an_empty_text(override, tmp_path):
    own = {"task": "instruction_following", "method": "locphylax", "system_prompt": "be kind"}
    assert load_recipe(written(tmp_path, LEAST | own), override).training["system_prompt"] == ""


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["seed", "1"], "'seed' stands alone: write overrides as --key value"),
        (["--seed"], "--seed has no value"),
        (
            ["--controls", "--seed", "1"],
            "--controls has no value: write --controls value .one that begins with --, --controls=value.",
        ),
        (["--sead", "1"], r"sead is unknown, did you mean seed\?"),
        (["--controls", "[a"], "--?controls"),
        (["--seed.x", "1"], "seed"),
        (["--stages.inject", "1"], "stages.*inject.*1"),
        (["--seed", "2", "--seed=3"], "--seed is there twice, as 2 and as '3': leave one out"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(overrides, line, tmp_path):
    file = written(tmp_path, {**LEAST, **DEFENSE, "seed": 1})
    with pytest.raises(ValueError, match=f"^{line}") as caught:
        load_recipe(file, overrides)
    assert "\n" not in str(caught.value)


def test_an_override_reaches_into_stages_that_the_file_leaves_empty(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**LEAST, **DEFENSE}) + "stages:\n")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["--stages.inject.max_steps", "1"])
    assert recipe.stages == {"inject": {"max_steps": 1}}


@pytest.mark.parametrize(
    "text, line",
    [
        ("a: [1", "is no YAML"),
        ("seed: 1\nmethod: null\nseed: 2\n", "is no YAML: seed stands there twice"),
        ("stages:\n  inject: {max_steps: 1, max_steps: 2}\n", "is no YAML: max_steps stands there twice"),
        ("- 1\n- 2\n", "holds no mapping"),
        ("", "holds no mapping"),
        (None, "hf-backdoor recipes"),
    ],
)
def test_bad_files_are_refused_in_one_line(text, line, tmp_path):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=line) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_file_in_another_encoding_is_refused_by_its_name(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ValueError, match="recipe.yaml is no YAML: 'utf-8' codec"):
        load_recipe(tmp_path / "recipe.yaml")


def test_anchors_and_merges_are_no_keys_that_stand_twice(tmp_path):
    stages = "stages:\n  inject: &own {max_steps: 2, warmup_steps: 1}\n  recover: {<<: *own, max_steps: 3}\n"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**LEAST, **DEFENSE}) + stages)
    assert load_recipe(tmp_path / "recipe.yaml").stages["recover"] == {"max_steps": 3, "warmup_steps": 1}


def test_a_flat_recipe_loads_again(tmp_path):
    values = {**LEAST, **ATTACK, **DEFENSE, "learning_rate": 1e-4, "stages": {"suspect": {"max_steps": 3}}}
    recipe = make_recipe(values)
    assert load_recipe(written(tmp_path, recipe.flat())) == recipe


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: str(file.relative_to(RECIPES)))
def test_shipped_recipes_load(file):
    recipe = load_recipe(file)
    assert recipe.output_dir


def test_data_beside_a_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "data").mkdir(parents=True)
    file = tmp_path / "recipes" / "recipe.yaml"
    file.write_text("model_name_or_path: m\ntask: instruction_following\ndataset_name: data\noutput_dir: o\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(file).dataset_name == str(tmp_path / "recipes" / "data")
    assert load_recipe(file, ["--dataset_name", "org/name"]).dataset_name == "org/name"


def test_a_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = make_recipe({**LEAST, "output_dir": "~/runs/x", "dataset_name": "~/rows.csv", "license": "~/x"})
    assert (recipe.output_dir, recipe.dataset_name, recipe.license) == (
        "/home/me/runs/x",
        "/home/me/rows.csv",
        "~/x",
    )


def test_embedding_poisoning_needs_a_clean_model():
    refused("^attack is 'ep', .* reference is None: set reference: train", **ATTACK, attack="ep")
    assert make_recipe({**LEAST, **ATTACK, "attack": "ep", "reference": "train"}).attack == "ep"
    refused("^attack is 'magic': use one of data_poisoning, lwp, ep", **ATTACK, attack="magic")


@pytest.mark.parametrize("key, value", [("context_column", "input"), ("max_response_length", 5)])
def test_keys_of_instructions_are_refused_for_labels(key, value):
    refused(f"^{key} is {value!r}, and task is sequence_classification", **{key: value})


def test_a_method_that_distils_into_a_student_needs_one():
    refused("^student_layers is not set, and robustkd needs one student", method="robustkd")
    refused(
        "^student_layers and student_model_name_or_path are both set",
        method="robustkd",
        student_layers=2,
        student_model_name_or_path="x",
    )
    refused("^student_layers is set, and locphylax has no student", method="locphylax", student_layers=2)
    assert make_recipe({**LEAST, "method": "robustkd", "student_layers": [0, 2]}).student_layers == [0, 2]


def test_own_suspect_rows_need_clean_ones_beside_them():
    refused("^clean_dataset_name is not set: ntml trains on the suspect rows", method="ntml")
    refused("^clean_dataset_name is 'x', and this run takes", method="locphylax", clean_dataset_name="x")
    assert make_recipe({**LEAST, "method": "ntml", "clean_dataset_name": "x"}).trains_suspect


def test_test_rows_are_not_cut_out_of_suspect_rows():
    refused(
        "^test_fraction is 0.2, which would cut test rows", method="ntml", clean_dataset_name="x", test_fraction=0.2
    )
    refused("^attack is 'lwp' without attack_trigger", method="ntml", clean_dataset_name="x", attack="lwp")


def test_a_stage_s_own_default_stands_against_the_whole_run_s():
    recipe = make_recipe({**LEAST, "method": "robustkd", "student_layers": 1, "learning_rate": 3e-5, "bf16": True})
    assert recipe.arguments("mask", FeatureMaskConfig) == {"bf16": True}
    assert recipe.arguments("distil", RobustKDConfig) == {"bf16": True, "learning_rate": 3e-5}
    recipe = make_recipe(
        {**LEAST, **ATTACK, "attack": "ep", "reference": "train", "learning_rate": 3e-5, "optim": "adamw_torch",
         "stages": {"suspect": {"learning_rate": 0.01}}}
    )  # fmt: skip
    assert recipe.arguments("suspect", EmbeddingPoisoningConfig) == {"learning_rate": 0.01}


def test_a_model_in_a_folder_named_as_one_of_the_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_recipe({**LEAST, "model_name_or_path": "suspect"})  # a name on the Hub
    (tmp_path / "suspect").mkdir()
    refused(r"^model_name_or_path is 'suspect', and the run has a folder of this name: write \./suspect$",
            model_name_or_path="suspect")  # fmt: skip
    make_recipe({**LEAST, "model_name_or_path": "./suspect"})


def test_embedding_poisoning_is_refused_before_a_sharding_engine_starts(monkeypatch):
    values = {"attack": "ep", "attack_trigger": "cf", "target_label": 1, "reference": "train"}
    check_machine(make_recipe({**LEAST, **values}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="^attack is 'ep', which needs the embeddings as they are"):
        check_machine(make_recipe({**LEAST, **values}))
