"""Every method in every engine, on two processes: the same training as in one, and never another engine in its place."""

import functools
import json
import os
import tempfile
from pathlib import Path

import engines
import pytest
import robust
import tiny
import topics
import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_backdoor.cli import accelerate_settings, launch_command, stages_to_launch
from hf_backdoor.data import SequenceClassification
from hf_backdoor.defenses.engines import zero3_launched
from hf_backdoor.defenses.reading import OwnAnswers, SoftTriggers
from hf_backdoor.defenses.robustkd import FeatureMask
from hf_backdoor.models import load_model, merged
from hf_backdoor.recipe_file import load_recipe
from hf_backdoor.run import run


FORMATS = ("sequence_classification", "label_words")
STAGES = (
    "plain",
    "inject",
    "soft",
    "recover",
    "own",
    "retrain",
    "distil",
    "soft_retrain",
    "soft_distil",
    "mask",
    "student",
    "soft_student",
    "non_target",
    "mutual",
    "relabel",
)
LABELS = {
    "plain": "plain training (suspects, references, controls)",
    "inject": "Locphylax: injection", "soft": "Locphylax: injection with soft triggers", "recover": "Locphylax: recovery",
    "own": "Locphylax: recovery by the suspect's own answers",
    "retrain": "MBTSAD: retraining", "distil": "MBTSAD: distillation",
    "soft_retrain": "MBTSAD: retraining with soft triggers and own answers",
    "soft_distil": "MBTSAD: distillation with soft triggers and own answers",
    "mask": "RobustKD: mask", "student": "RobustKD: distillation",
    "soft_student": "RobustKD: distillation with soft triggers",
    "non_target": "NT-ML: non-target training", "mutual": "NT-ML: mutual learning (two whole models)",
    "relabel": "NT-ML: training on corrected labels",
}  # fmt: skip
CASES = [
    (engine, name, adapter, stage)
    for engine in engines.ENGINES
    for name in FORMATS
    for adapter in (False, True)
    for stage in STAGES
    if not (adapter and stage == "mask")  # nothing of the model is trained
]
NAMES = ["-".join((engine, name, "lora" if lora else "full", stage)) for engine, name, lora, stage in CASES]
REFUSED = {("zero3", "mutual"): "the engine is DeepSpeed ZeRO-3, which can't train two whole models at once"}


def trainer(name, stage, adapter, folder, start=0, **options):
    """A trainer of one of `STAGES`. `start` is the seed of what is trained: a resumed training must not need it."""
    rate = 0.05
    if stage in ("inject", "soft"):  # a fresh model's clustering loss is steep, a fresh encoder's above all
        rate = 2e-6 if name == "sequence_classification" else 1e-4
    # With so large an epsilon Adam does not blow rounding up into steps of full size, and clipping would hide a wrong scale.
    options = {"adam_epsilon": 1.0, "learning_rate": rate, "max_grad_norm": 0.0, "max_steps": 3, **options}
    if adapter:
        kind = "SEQ_CLS" if name == "sequence_classification" else "CAUSAL_LM"
        options["peft_config"] = LoraConfig(r=2, target_modules="all-linear", task_type=kind)
    if stage == "mask":
        return robust.fitting(name, folder, **options)
    if stage == "student":
        return robust.distilling(name, folder, **options)
    if stage.startswith("soft"):
        embeddings = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(1))
        options |= {"soft_triggers": 3, "found_soft_triggers": SoftTriggers(embeddings)}
    if stage in ("own", "soft_retrain", "soft_distil"):
        drawn = torch.rand(16, 2, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
        answers = OwnAnswers(torch.tensor([[0, 1]] * 16, dtype=torch.int32), drawn, torch.ones(16, dtype=torch.long))
        options |= {"own_answers": 0.5, "found_answers": answers}
    if stage == "soft_student":
        return robust.distilling(name, folder, **options)
    stage = {"soft": "inject", "own": "recover"}.get(stage, stage).removeprefix("soft_")
    make = topics.trainer if stage in topics.STAGES else tiny.trainer
    return make(name, stage, folder, model_seed=start, **options)


def outcome(made, folder):
    """Losses of a finished training, and its result's weights as they are saved."""
    made.gather()
    if PartialState().is_main_process:
        result = made.result()
        (result if isinstance(result, FeatureMask) else merged(result)).save_pretrained(folder)
    PartialState().wait_for_everyone()
    return tiny.logged(made, "loss")


def reloaded(name, stage, folder):
    if stage == "mask":
        return tiny.parameters(FeatureMask.from_pretrained(folder))
    auto = AutoModelForSequenceClassification if name == "sequence_classification" else AutoModelForCausalLM
    return tiny.parameters(auto.from_pretrained(folder))


@functools.cache
def in_one_process(name, adapter, stage):
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(name, stage, adapter, folder)
        made.train()
        losses = outcome(made, folder)
        return losses, reloaded(name, stage, folder)


@functools.cache
def in_engine(engine, name, adapter, root):
    """All stages in one pair of processes, by name: losses, the engine's name and class, the losses of a resumed training; or what
    was refused. Weights lie in `root`."""

    def work():
        found = {}
        for stage in STAGES:
            folder = root / stage
            options = engines.arguments(engine) | {"per_device_train_batch_size": 4}
            resumes = name == "label_words" and not adapter
            if resumes:
                options |= {"save_strategy": "steps", "save_steps": 2}
            if adapter and stage == "mask":
                continue
            try:
                made = trainer(name, stage, adapter, folder / "work", **options)
                made.train()
                evidence = made.accelerator.distributed_type, PartialState().num_processes, type(made.model_wrapped)
                losses, resumed = outcome(made, folder / "whole"), None
                if resumes:
                    made = trainer(name, stage, adapter, folder / "work", start=5, **options)
                    made.train(resume_from_checkpoint=str(folder / "work" / "checkpoint-2"))
                    resumed = outcome(made, folder / "resumed")
                found[stage] = losses, (evidence[0].value, evidence[1], evidence[2].__name__), resumed
            except ValueError as error:
                found[stage] = str(error)
        return found

    return engines.in_engine(engine, work, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.mark.parametrize("engine, name, adapter, stage", CASES, ids=NAMES)
def test_two_processes_train_as_one(engine, name, adapter, stage, root):
    folder = root / f"{engine}-{name}-{adapter}"
    folder.mkdir(exist_ok=True)
    found = in_engine(engine, name, adapter, folder)[stage]
    if (engine, stage) in REFUSED:
        assert isinstance(found, str) and found.startswith(REFUSED[engine, stage]) and "\n" not in found
        return
    losses, (kind, processes, wrapper), resumed = found
    expected_kind, expected_wrapper = engines.EVIDENCE[engine]
    assert kind == expected_kind.value and processes == 2 and wrapper.startswith(expected_wrapper)
    expected, weights = in_one_process(name, adapter, stage)
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(losses) == 3 and len(set(losses)) > 1
    saved = reloaded(name, stage, folder / stage / "whole")
    assert tiny.largest_difference(saved, weights) < 1e-5
    if resumed is not None:
        assert resumed == losses
        assert tiny.largest_difference(saved, reloaded(name, stage, folder / stage / "resumed")) == 0


def test_what_zero_3_keeps_in_the_host_s_memory_trains_as_one_process(tmp_path):
    def work():
        options = engines.arguments("zero3_offload") | {"per_device_train_batch_size": 4}
        made = trainer("label_words", "inject", False, tmp_path / "work", **options)
        made.train()
        zero = made.model_wrapped.optimizer  # where there is no other memory, its word is all there is
        return outcome(made, tmp_path / "whole"), (zero.offload_param, zero.offload_optimizer)

    losses, offloaded = engines.in_engine("zero3_offload", work, tmp_path)
    assert offloaded == (True, True)
    expected, weights = in_one_process("label_words", False, "inject")
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6) and len(set(losses)) > 1
    assert tiny.largest_difference(reloaded("label_words", "inject", tmp_path / "whole"), weights) < 1e-5


def test_a_student_is_measured_and_its_best_state_taken_back_while_fsdp_trains_it(tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    # The first state, to tell it from the last one.
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}

    def measured(folder, **more):
        rows = tiny.setting("label_words", 16)[2]
        made = trainer("label_words", "student", False, folder, eval_dataset=rows, **options, **more)
        made.train()
        return [*tiny.logged(made, "eval_loss"), made.evaluate()["eval_loss"]]

    more = engines.arguments("fsdp2") | {"per_device_train_batch_size": 4}
    found = engines.in_engine("fsdp2", lambda: measured(tmp_path / "two", **more), tmp_path)
    assert found == pytest.approx(measured(tmp_path / "one"), rel=1e-5)
    assert found[0] == found[-1] != found[-2]


def matrix():
    """What is tested, as a table."""
    lines = [
        "| stage | one process | " + " | ".join(engines.ENGINES) + " |",
        "|---|---|" + "---|" * len(engines.ENGINES),
    ]
    for stage in STAGES:
        kinds = "full" if stage == "mask" else "full, LoRA"
        cells = ["refused" if (engine, stage) in REFUSED else kinds for engine in engines.ENGINES]
        lines.append(" | ".join([f"| {LABELS[stage]}", kinds, *cells]) + " |")
    return "\n".join(lines)


def test_the_documented_matrix_is_what_is_tested():
    assert matrix() in (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")


# ---- Engines that are asked for and do not run ----


@pytest.mark.parametrize("engine, message", [("fsdp2", "^fsdp is asked for"), ("zero2", "^deepspeed is asked for")])
def test_another_engine_than_the_one_asked_for_is_refused(engine, message, tmp_path):
    def work():
        # What accelerate does on CPUs: FSDP becomes DDP, and DeepSpeed too where the CPU is asked for.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        with pytest.raises(ValueError, match=message) as caught:
            trainer("label_words", "plain", False, tmp_path, **engines.arguments(engine))
        return str(caught.value)

    assert "\n" not in tiny.in_two_processes(work, tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_3_is_known_before_a_trainer_is_made(stage, tmp_path, monkeypatch):
    assert not zero3_launched()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    assert zero3_launched() == (stage == 3)
    # A configuration file of DeepSpeed's own has the last word.
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 5 - stage}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert zero3_launched() == (stage == 2)


@pytest.mark.parametrize("stage", ["both", "mbtsad"])
def test_several_stages_in_one_training_are_refused(stage, tmp_path):
    def work():
        with pytest.raises(ValueError, match="^stages is .* a trainer for each stage"):
            tiny.trainer("label_words", stage, tmp_path, **engines.arguments("zero2"))
        return True

    assert engines.in_engine("zero2", work, tmp_path)


# ---- Runs ----


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.classifier_recipe(tmp_path_factory.mktemp("recipe"), adam_epsilon=1.0, learning_rate=0.01)


LORA = ("--use_peft", "true", "--lora_r", "2")
METHODS = {
    "locphylax": ("--known_triggers", str(list(tiny.KNOWN[:2])), "--stages.inject.learning_rate", "2e-6"),
    "mbtsad": ("--split_min_chars", "3", *LORA),
    "robustkd": ("--student_layers", "1"),
}


@pytest.mark.parametrize(
    "engine, method", [("fsdp2", "locphylax"), ("zero3", "locphylax"), ("zero2", "mbtsad"), ("zero3", "robustkd")]
)
def test_a_run_gives_the_same_results(engine, method, recipe, tmp_path):
    def results(name, size):
        overrides = ["--output_dir", str(tmp_path / name), "--per_device_train_batch_size", size]
        made = run(load_recipe(recipe, ["--method", method, *METHODS[method], *overrides]))
        return [row.__dict__ for row in made.rows], PartialState().num_processes

    found, processes = engines.in_engine(engine, lambda: results("two", "3"), tmp_path, engines.launched(engine))
    assert processes == 2 and found == results("one", "6")[0]
    assert (tmp_path / "two" / "cleaned" / "model.safetensors").exists()


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_adapters_of_weights_that_were_shared_out_add_up(engine, recipe, tmp_path):
    def work():
        overrides = ["--output_dir", str(tmp_path / "run"), "--method", "locphylax", *METHODS["locphylax"], *LORA]
        run(load_recipe(recipe, overrides))

    engines.in_engine(engine, work, tmp_path, engines.launched(engine))
    cleaned, suspect = tmp_path / "run" / "cleaned", tmp_path / "run" / "suspect"
    with_adapter = load_model(str(cleaned / "adapter"), SequenceClassification)
    expected, before = (
        reloaded("sequence_classification", "", cleaned),
        reloaded("sequence_classification", "", suspect),
    )
    assert tiny.largest_difference(tiny.parameters(with_adapter), expected) < 1e-6
    assert tiny.largest_difference(before, expected) > 1e-4


def test_a_run_up_to_a_stage_measures_nothing(recipe, tmp_path):
    assert run(load_recipe(recipe, ["--output_dir", str(tmp_path)]), until="suspect") is None
    assert (tmp_path / "suspect" / "stage.json").exists()
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "inject").exists()


def test_engines_that_share_a_model_out_are_launched_stage_by_stage(recipe, tmp_path):
    overrides = ["--output_dir", str(tmp_path), "--method", "locphylax", "--known_triggers", str(list(tiny.KNOWN[:2]))]
    run(load_recipe(recipe, overrides), until="suspect")
    assert [stage[-1:] for stage in stages_to_launch(accelerate_settings("zero3")[1], recipe, overrides)] == [
        ["inject"],
        ["cleaned"],
        [],
    ]
    assert stages_to_launch(accelerate_settings("ddp")[1], recipe, overrides) == [[]]


def test_what_launches_the_shipped_configurations(monkeypatch):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    assert launch_command(*accelerate_settings("zero2"))[2] == "accelerate.commands.launch"
    assert launch_command(*accelerate_settings("ddp"))[2] == "torch.distributed.run"
    with pytest.raises(ValueError, match="^accelerate_config is '.*fsdp2.yaml', and there is no GPU"):
        launch_command(*accelerate_settings("fsdp2"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert Path(launch_command(*accelerate_settings("fsdp2"))[4]).name == "fsdp2.yaml"
