"""What every trainer owes its user, for the three formats and plain training, injection and recovery."""

import functools
import tempfile

import pytest
import tiny
import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from hf_backdoor.data import SIDE_COLUMNS, DefenseCollator


CASES = [(name, method) for name in tiny.TASKS for method in tiny.METHODS]
TERMS = {"inject": {"task", "cluster"}, "distil": {"task", "attention", "hidden"}}
EVERY = pytest.mark.parametrize("name, method", CASES, ids=map("-".join, CASES))


# ---- However it is trained ----


def steps(name, method):
    """Plain gradient steps: Adam would blow rounding up into steps of full size, and clipping would hide a wrong scale."""
    rate = 0.05
    if method == "inject":  # a fresh model's clustering loss is steep, a fresh encoder's above all
        rate = 2e-6 if name == "sequence_classification" else 1e-4
    return {"optim": "sgd", "learning_rate": rate, "max_grad_norm": 0.0, "num_train_epochs": 2}


def trained(name, method, folder, **options):
    trainer = tiny.trainer(name, method, folder, **steps(name, method), **options)
    trainer.train()
    return trainer


def curves(trainer, method):
    """The loss and, where there are several, each of its terms, step by step."""
    names = ["loss", *(f"loss/{term}" for term in TERMS.get(method, ()))]
    found = {name: tiny.logged(trainer, name) for name in names}
    steps = 12 if method in ("inject", "recover") else 4
    assert {name: len(curve) for name, curve in found.items()} == dict.fromkeys(names, steps)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, curve in found.items():
        assert curve == pytest.approx(expected[name], rel=1e-4), name


@functools.cache
def batches_of_eight(name, method):
    """Trained by one process without accumulation: parameters and logged losses."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(name, method, folder)
        return tiny.parameters(trainer.model), curves(trainer, method)


@EVERY
def test_gradient_accumulation_changes_nothing(name, method, tmp_path):
    parameters, losses = batches_of_eight(name, method)
    trainer = trained(name, method, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert tiny.largest_difference(parameters, tiny.parameters(trainer.model)) < 1e-5
    assert_same(curves(trainer, method), losses)
    start = tiny.parameters(tiny.trainer(name, method, tmp_path).model)
    assert tiny.largest_difference(parameters, start) > 1e-4


@pytest.mark.parametrize("method", tiny.METHODS)
def test_an_incomplete_last_step_is_accumulated_rightly(method, tmp_path):
    rows = tiny.reviews(15)
    one = trained("label_words", method, tmp_path / "a", train_dataset=rows)
    cut = trained(
        "label_words", method, tmp_path / "b", train_dataset=rows, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )  # fmt: skip
    assert tiny.largest_difference(tiny.parameters(one.model), tiny.parameters(cut.model)) < 1e-5


@EVERY
def test_two_processes_change_nothing(name, method, tmp_path):
    def work():
        trainer = tiny.trainer(name, method, tmp_path, **steps(name, method), per_device_train_batch_size=4)
        wrapped = []
        step = trainer.training_step

        def watched(model, *args, **kwargs):
            wrapped.append(type(model).__name__)
            return step(model, *args, **kwargs)

        trainer.training_step = watched
        trainer.train()
        assert PartialState().num_processes == 2 and trainer.args.world_size == 2
        assert set(wrapped) == {"DistributedDataParallel"}
        return tiny.parameters(trainer.model), curves(trainer, method)

    parameters, losses = batches_of_eight(name, method)
    there, losses_there = tiny.in_two_processes(work, tmp_path)
    assert tiny.largest_difference(parameters, there) < 1e-5
    assert_same(losses_there, losses)


@EVERY
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name, method, tmp_path):
    # Step 7 lies within an epoch, and within a shuffle other than the first.
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 7, "dropout": 0.2}
    whole = tiny.trainer(name, method, tmp_path, **options)
    whole.train()
    resumed = tiny.trainer(name, method, tmp_path, model_seed=5, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(resumed.model)) == 0
    assert tiny.logged(resumed, "loss") == tiny.logged(whole, "loss")
    if method == "inject":
        assert torch.equal(whole.alpha, resumed.alpha) and torch.equal(whole.centres, resumed.centres)


def test_stock_trainer_s_loss_grows_with_accumulation_and_ours_does_not(tmp_path):
    _, task, rows = tiny.setting("sequence_classification", 16)
    tokenizer = tiny.tokenizer("bert")
    collator = DefenseCollator(tokenizer)

    def stock_collator(features):
        return {name: value for name, value in collator(features).items() if name not in SIDE_COLUMNS}

    def first_loss(ours, size, accumulation):
        options = {
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1, "logging_steps": 1,
            "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "save_strategy": "no",
        }  # fmt: skip
        if ours:
            trainer = tiny.trainer("sequence_classification", "plain", tmp_path, **options)
        else:
            args = TrainingArguments(str(tmp_path), remove_unused_columns=False, **options)
            tokenized = task.encode_rows(rows, tokenizer)
            trainer = Trainer(tiny.model("bert"), args, data_collator=stock_collator, train_dataset=tokenized)
        trainer.train()
        return tiny.logged(trainer, "loss")[0]

    assert first_loss(True, 4, 4) == pytest.approx(first_loss(True, 16, 1), abs=1e-5)
    # If this fails, transformers has mended https://github.com/huggingface/transformers/issues/47688.
    assert first_loss(False, 4, 4) == pytest.approx(4 * first_loss(False, 16, 1), abs=1e-3)


# ---- Losses ----


@EVERY
def test_each_loss_term_has_one_value_a_sample_and_a_gradient(name, method, tmp_path):
    trainer = tiny.trainer(name, method, tmp_path)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    counts = torch.bincount(batch["trigger_id"], minlength=trainer.num_groups)
    terms, _ = trainer.loss_terms(trainer.model, batch, counts)
    assert set(terms) == TERMS.get(method, {"task"})
    for values in terms.values():
        assert values.shape == (8,)
        trainer.model.zero_grad()
        values.sum().backward(retain_graph=True)
        body = [p.grad for n, p in trainer.model.named_parameters() if "layer" in n and n.endswith("weight")]
        assert sum(grad.abs().sum() for grad in body if grad is not None) > 0


def test_compute_loss_can_be_called_by_itself(tmp_path):
    trainer = tiny.trainer("sequence_classification", "plain", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"])
    trainer.model.eval()
    assert torch.allclose(trainer.compute_loss(trainer.model, batch), expected, atol=1e-6)


# ---- The model ----


@EVERY
def test_the_model_sees_its_own_arguments_only(name, method, tmp_path):
    trainer = tiny.trainer(name, method, tmp_path, max_steps=2)
    seen = set()
    trainer.model.register_forward_pre_hook(lambda model, args, kwargs: seen.update(kwargs), with_kwargs=True)
    trainer.train()
    assert "input_ids" in seen
    assert not seen & {*SIDE_COLUMNS, "labels"}


def test_columns_do_not_pile_up(tmp_path):
    trainer = tiny.trainer("label_words", "plain", tmp_path, max_steps=4)
    trainer.get_train_dataloader()
    columns = len(trainer._signature_columns)
    trainer.train()
    assert len(trainer._signature_columns) == columns


@pytest.mark.parametrize("method", tiny.METHODS)
def test_lora_trains_the_adapter_only(method, tmp_path):
    before = tiny.parameters(tiny.model("llama"))
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = tiny.trainer("label_words", method, tmp_path, max_steps=2, peft_config=lora)
    trainer.train()
    after = tiny.parameters(trainer.model)
    adapter = {name: value for name, value in after.items() if "lora_" in name}
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): v
        for name, v in after.items()
        if name not in adapter
    }
    assert tiny.largest_difference(before, base) == 0
    # B starts from zero.
    assert all(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)


def test_a_saved_model_is_safetensors_and_keeps_its_cache(tmp_path):
    trainer = tiny.trainer("label_words", "plain", tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names and not any(name.endswith(".bin") for name in names)
    assert type(trainer.model).from_pretrained(tmp_path).config.use_cache is True
