"""Settings of a recipe that contradict each other, or the machine: each is refused in one line."""

import pytest
from least_recipe import ATTACK, DEFENSE, IMAGE_ATTACK, IMAGES, LEAST, refused

from hf_backdoor.contradictions import check_machine
from hf_backdoor.recipe_file import make_recipe


HELD_OUT = {"held_out_samples": 4}


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
        ({"task": "instruction_following", "target_text": ""}, "target_text is '', an empty text: give the one that"),
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
        (
            {"method": "ntml", "clean_dataset_name": "x", "relabel_below": 0.2, "stages": {"relabel_again": {"look_alikes": True}}},
            "stages.relabel_again.look_alikes is True, and this stage takes over what relabel has found: set it for the whole",
        ),
        ({**ATTACK, **DEFENSE, "method": "ntml", "look_alikes": True}, "look_alikes is True, and relabel_below is 0, which leaves out the"),
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


def test_what_nothing_would_read_may_stand_there_as_it_is_by_default():
    make_recipe(
        {**LEAST, "lora_r": 16, "poison_rate": 0.1, "clean_fraction": 0.2, "eval_strategy": "no", "test_split": "test",
         "max_new_tokens": 64, "max_steps": -1, "warmup_steps": 0, "stages": {"suspect": {"eval_strategy": "no"}}}
    )  # fmt: skip


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


@pytest.mark.parametrize("key, value", [("context_column", "input"), ("max_response_length", 5)])
def test_keys_of_instructions_are_refused_for_labels(key, value):
    refused(f"^{key} is {value!r}, and task is sequence_classification", **{key: value})


def test_embedding_poisoning_needs_a_clean_model():
    refused("^attack is 'ep', .* reference is None: set reference: train", **ATTACK, attack="ep")
    assert make_recipe({**LEAST, **ATTACK, "attack": "ep", "reference": "train"}).attack == "ep"
    refused("^attack is 'magic': use one of data_poisoning, lwp, ep", **ATTACK, attack="magic")


def test_embedding_poisoning_is_refused_before_a_sharding_engine_starts(monkeypatch):
    values = {"attack": "ep", "attack_trigger": "cf", "target_label": 1, "reference": "train"}
    check_machine(make_recipe({**LEAST, **values}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="^attack is 'ep', which needs the embeddings as they are"):
        check_machine(make_recipe({**LEAST, **values}))


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


def test_a_model_in_a_folder_named_as_one_of_the_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_recipe({**LEAST, "model_name_or_path": "suspect"})  # a name on the Hub
    (tmp_path / "suspect").mkdir()
    refused(r"^model_name_or_path is 'suspect', and the run has a folder of this name: write \./suspect$",
            model_name_or_path="suspect")  # fmt: skip
    make_recipe({**LEAST, "model_name_or_path": "./suspect"})
