"""Keys of a recipe: which there are, of what types, and what they give a run."""

import re
import typing
from dataclasses import fields

import pytest
import yaml
from least_recipe import ATTACK, DEFENSE, IMAGE_ATTACK, LEAST, refused, written

from hf_backdoor.attacks import EmbeddingPoisoningConfig, ImagePoisoning, Poisoning
from hf_backdoor.data import ImageTrigger, InstructionFollowing, SequenceClassification, Trigger
from hf_backdoor.defenses import METHODS
from hf_backdoor.defenses.locphylax import LocphylaxConfig
from hf_backdoor.defenses.robustkd import FeatureMaskConfig, RobustKDConfig
from hf_backdoor.recipe import Recipe
from hf_backdoor.recipe_file import REMOVED, in_words, load_recipe, make_recipe


# ---- Keys ----


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
    "new", [new.split()[0].rstrip(":") for new in REMOVED.values() if new[:7] not in ("nothing", "the env")]
)
def test_what_to_write_now_is_a_key_indeed(new):
    known = {field.name for field in fields(LocphylaxConfig)} | {
        field.name for field in fields(type(make_recipe(LEAST)))
    }
    assert new in known


def test_common_training_arguments_are_taken():
    given = {
        "eval_strategy": "steps", "eval_steps": 5, "save_steps": 0.5, "report_to": "none", "optim": "adamw_torch",
        "lr_scheduler_type": "cosine", "logging_steps": 10, "bf16": False, "per_device_train_batch_size": 4,
        "weight_decay": 0, "max_steps": 7, "warmup_steps": 0.1,
    }  # fmt: skip
    assert make_recipe({**LEAST, **DEFENSE, **given, "held_out_samples": 4}).training == given


@pytest.mark.parametrize("key", ["resume_from_checkpoint", "run_name", "do_train"])
def test_what_a_run_decides_for_itself_is_refused(key):
    refused(
        f"^{key} is True, and a run decides that for itself .it goes on where it stopped.: leave it out", **{key: True}
    )


# ---- Types ----


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


# ---- Stages ----


def test_arguments_of_a_stage():
    recipe = make_recipe({**LEAST, **DEFENSE, "learning_rate": 1e-3, "stages": {"inject": {"learning_rate": "1e-5"}}})
    assert recipe.arguments("inject", LocphylaxConfig) == {"learning_rate": 1e-5}
    assert recipe.arguments("recover", LocphylaxConfig) == {"learning_rate": 1e-3}


def test_a_stage_s_own_default_stands_against_the_whole_run_s():
    recipe = make_recipe({**LEAST, "method": "robustkd", "student_layers": 1, "learning_rate": 3e-5, "bf16": True})
    assert recipe.arguments("mask", FeatureMaskConfig) == {"bf16": True}
    assert recipe.arguments("distil", RobustKDConfig) == {"bf16": True, "learning_rate": 3e-5}
    recipe = make_recipe(
        {**LEAST, **ATTACK, "attack": "ep", "reference": "train", "learning_rate": 3e-5, "optim": "adamw_torch",
         "stages": {"suspect": {"learning_rate": 0.01}}}
    )  # fmt: skip
    assert recipe.arguments("suspect", EmbeddingPoisoningConfig) == {"learning_rate": 0.01}


def test_stages_are_checked_like_the_rest():
    refused(
        r"^stages.inject.learning_rat is unknown, did you mean learning_rate\?",
        **DEFENSE,
        stages={"inject": {"learning_rat": 1}},
    )
    refused("^stages.inject.learning_rate is 'fast'", **DEFENSE, stages={"inject": {"learning_rate": "fast"}})
    refused("^stages.*inject.*3", **DEFENSE, stages={"inject": 3})
    refused(
        "^stages has 'injekt': this run has answers, contrast, inject, recover, reference, search, soft_search, suspect",
        **DEFENSE,
        stages={"injekt": {}},
    )
    refused("^stages.inject.no_cuda is True", **DEFENSE, stages={"inject": {"no_cuda": True}})


# ---- Rows and attacks ----


def test_columns_have_the_task_s_names():
    recipe = make_recipe({**LEAST, "task": "instruction_following", "prompt_column": "question"})
    assert recipe.task_class is InstructionFollowing
    assert recipe.columns() == {"prompt": "question", "response": "response"}
    assert make_recipe({**LEAST, "text_column": "sentence"}).columns() == {"text": "sentence", "label": "label"}


def test_an_attack():
    recipe = make_recipe({**LEAST, **ATTACK, "attack_position": "end", "poison_rate": 0.2})
    assert recipe.poisoning == Poisoning(Trigger("zq", "end"), 1, 0.2)


def test_an_attack_on_images():
    recipe = make_recipe(
        {**LEAST, **IMAGE_ATTACK, "attack_trigger": "warp", "warp_strength": 4, "image_column": "img"}
    )
    assert recipe.poisoning == ImagePoisoning(ImageTrigger("warp", warp_strength=4.0), 0)
    assert recipe.columns() == {"image": "img", "label": "label"}
