"""What every trainer owes its user, for the three formats and plain training, injection and recovery."""

import copy
import functools
import tempfile

import pytest
import tiny
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

from hf_backdoor.data import SIDE_COLUMNS, DefenseCollator
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.mbtsad import MBTSADConfig, MBTSADTrainer


CASES = [(name, method) for name in tiny.TASKS for method in tiny.METHODS]
TERMS = {"inject": {"task", "cluster"}, "distil": {"task", "attention", "hidden"}}
EVERY = pytest.mark.parametrize("name, method", CASES, ids=map("-".join, CASES))


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


@functools.cache
def batches_of_eight(name, method):
    """Trained by one process without accumulation: parameters and logged losses."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(name, method, folder)
        return tiny.parameters(trainer.model), tiny.logged(trainer, "loss"), tiny.logged(trainer, "loss/cluster")


@EVERY
def test_gradient_accumulation_changes_nothing(name, method, tmp_path):
    parameters, losses, clusters = batches_of_eight(name, method)
    trainer = trained(name, method, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert tiny.largest_difference(parameters, tiny.parameters(trainer.model)) < 1e-5
    assert tiny.logged(trainer, "loss") == pytest.approx(losses, rel=1e-4)
    assert tiny.logged(trainer, "loss/cluster") == pytest.approx(clusters, rel=1e-4)
    assert len(losses) == (12 if method in ("inject", "recover") else 4)
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
        return tiny.parameters(trainer.model), tiny.logged(trainer, "loss"), tiny.logged(trainer, "loss/cluster")

    parameters, losses, clusters = batches_of_eight(name, method)
    there, losses_there, clusters_there = tiny.in_two_processes(work, tmp_path)
    assert tiny.largest_difference(parameters, there) < 1e-5
    assert losses_there == pytest.approx(losses, rel=1e-4)
    assert clusters_there == pytest.approx(clusters, rel=1e-4)


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


# ---- Evaluation ----


def losses_one_by_one(model, task, tokenizer, rows):
    """No padding, no batches, the library's own log-softmax: one loss a row."""
    losses = []
    for row in rows:
        features = task.encode(row, tokenizer)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([features["input_ids"]])).logits[0].log_softmax(-1)
        if "labels" in features:
            losses.append(-logits[features["labels"]].item())
        else:
            start, ids = features["prompt_length"], features["input_ids"]
            losses.append(-sum(logits[at - 1, ids[at]].item() for at in range(start, len(ids))) / (len(ids) - start))
    return losses


@pytest.mark.parametrize(
    "name, family",
    [("sequence_classification", "bert"), ("label_words", "llama"), ("label_words", "gpt2"),
     ("instruction_following", "llama"), ("instruction_following", "gpt2")],
)  # fmt: skip
def test_evaluate_before_train_is_the_mean_over_samples(name, family, tmp_path):
    _, task, rows = tiny.setting(name, 13)
    model, tokenizer = tiny.model(family), tiny.tokenizer(family)
    args = DefenseConfig(
        str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=5, disable_tqdm=True
    )
    trainer = DefenseTrainer(model=model, args=args, eval_dataset=rows, processing_class=tokenizer, task=task)
    expected = losses_one_by_one(model, task, tokenizer, rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(expected) / 13, abs=1e-5)


@pytest.mark.parametrize("name", tiny.TASKS)
def test_predict_gives_logits_only(name, tmp_path):
    trainer = tiny.trainer(name, "plain", tmp_path, eval_dataset=tiny.setting(name, 5)[2])
    output = trainer.predict(trainer.eval_dataset)
    classes = 2 if name == "sequence_classification" else len(tiny.VOCABULARY)
    assert output.predictions.shape[0] == 5 and output.predictions.shape[-1] == classes
    assert output.metrics["test_loss"] > 0


def test_several_evaluation_sets(tmp_path):
    sets = {"a": tiny.reviews(4), "b": tiny.reviews(6, seed=1)}
    metrics = tiny.trainer("label_words", "plain", tmp_path, eval_dataset=sets).evaluate()
    assert metrics["eval_a_loss"] > 0 and metrics["eval_b_loss"] > 0


def test_evaluation_in_two_processes_is_the_same(tmp_path):
    rows = tiny.reviews(12)

    def evaluate():
        trainer = tiny.trainer("label_words", "plain", tmp_path, eval_dataset=rows, per_device_eval_batch_size=3)
        return trainer.evaluate()["eval_loss"]

    assert tiny.in_two_processes(evaluate, tmp_path) == pytest.approx(evaluate(), abs=1e-5)


# ---- Logs ----


def test_logged_losses_are_means_over_samples(tmp_path):
    trainer = tiny.trainer(
        "label_words", "plain", tmp_path, learning_rate=0.0, max_steps=2, logging_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )  # fmt: skip
    trainer.train()
    rows = tiny.setting("label_words", 16)
    expected = losses_one_by_one(trainer.model, rows[1], tiny.tokenizer("llama"), rows[2])
    assert tiny.logged(trainer, "loss")[0] == pytest.approx(sum(expected) / 16, abs=1e-4)


# ---- Rows ----


def test_raw_and_tokenized_rows_train_alike(tmp_path):
    family, task, rows = tiny.setting("label_words", 16)
    raw = tiny.trainer("label_words", "plain", tmp_path, max_steps=2)
    ready = tiny.trainer(
        "label_words", "plain", tmp_path, max_steps=2, train_dataset=task.encode_rows(rows, tiny.tokenizer(family))
    )
    raw.train()
    ready.train()
    assert tiny.largest_difference(tiny.parameters(raw.model), tiny.parameters(ready.model)) == 0


def make(folder, family="llama", rows=None, **options):
    args = DefenseConfig(str(folder), use_cpu=True, report_to="none", **options)
    tokenizer = tiny.tokenizer(family)
    return DefenseTrainer(model=tiny.model(family), args=args, train_dataset=rows, processing_class=tokenizer)


def test_the_task_is_found(tmp_path):
    assert make(tmp_path, "bert", tiny.reviews(2)).task == tiny.task("sequence_classification")
    assert make(tmp_path, "llama", tiny.instructions(2)).task == tiny.task("instruction_following")
    words = {"label_words": list(tiny.LABEL_WORDS), "prompt_template": tiny.TEMPLATE}
    assert make(tmp_path, "llama", tiny.reviews(2), **words).task == tiny.task("label_words")


def test_rows_that_fit_no_task_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label_words is not set"):
        make(tmp_path, "llama", tiny.reviews(2))
    with pytest.raises(ValueError, match="the data set has columns"):
        make(tmp_path, "bert", Dataset.from_dict({"sentence": ["a"]}))


def test_a_missing_tokenizer_is_refused(tmp_path):
    args = DefenseConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="processing_class is None: pass the model's tokenizer"):
        DefenseTrainer(model=tiny.model("bert"), args=args, train_dataset=tiny.reviews(2))


def test_what_would_not_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^label_smoothing_factor is 0.1, and .*: leave it at 0$"):
        DefenseConfig(str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
    given = {"args": DefenseConfig(str(tmp_path), use_cpu=True), "processing_class": tiny.tokenizer("bert")}
    with pytest.raises(
        ValueError, match="^model_init is given, and DefenseTrainer would not read it: pass the model "
    ):
        DefenseTrainer(model_init=lambda: tiny.model("bert"), train_dataset=tiny.reviews(2), **given)
    with pytest.raises(ValueError, match="^compute_loss_func is given, .*: override loss_terms"):
        DefenseTrainer(model=tiny.model("bert"), compute_loss_func=lambda *_: 0, **given)


def test_label_words_that_share_a_first_token_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="share a first token"):
        make(
            tmp_path, "llama", tiny.reviews(2), label_words=["answer yes", "answer no"], prompt_template=tiny.TEMPLATE
        )


@pytest.mark.parametrize("named", [None, 0])
def test_a_decoder_s_head_is_told_what_rows_are_padded_with(named, tmp_path):
    config, tokenizer = tiny.model("llama").config, tiny.causal_tokenizer()
    config.num_labels, config.pad_token_id, tokenizer.pad_token = 2, named, None

    def decoder(seed):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(copy.deepcopy(config))

    logits = []
    for size in (1, 8):  # a row by itself has no padding
        args = MBTSADConfig(
            str(tmp_path), use_cpu=True, report_to="none", stages=["distil"], per_device_train_batch_size=size
        )
        trainer = MBTSADTrainer(
            decoder(0), args, train_dataset=tiny.reviews(8), processing_class=tokenizer, teacher_model=decoder(1)
        )
        rows = [trainer.train_dataset[row] for row in range(8)]
        parts = [trainer.data_collator(rows[start : start + size]) for start in range(0, 8, size)]
        for model in (trainer.model, trainer.teacher):
            with torch.no_grad():
                logits.append(torch.cat([trainer.forward(model, part).logits for part in parts]))
    torch.testing.assert_close(logits[:2], logits[2:])


# ---- Adapters ----


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


# ---- Why the class exists ----


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


def test_a_saved_model_is_safetensors_and_keeps_its_cache(tmp_path):
    trainer = tiny.trainer("label_words", "plain", tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names and not any(name.endswith(".bin") for name in names)
    assert type(trainer.model).from_pretrained(tmp_path).config.use_cache is True


def test_compute_loss_can_be_called_by_itself(tmp_path):
    trainer = tiny.trainer("sequence_classification", "plain", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"])
    trainer.model.eval()
    assert torch.allclose(trainer.compute_loss(trainer.model, batch), expected, atol=1e-6)


@pytest.mark.parametrize("name", tiny.TASKS)
def test_evaluate_and_predict_take_raw_rows(tmp_path, name):
    _, kind, rows = tiny.setting(name, 12)
    trainer = tiny.trainer(name, "plain", tmp_path)
    by_hand = trainer.evaluate(kind.encode_rows(rows, trainer.processing_class))
    assert trainer.evaluate(rows)["eval_loss"] == by_hand["eval_loss"]
    assert len(trainer.predict(rows).predictions) == 12


def test_a_teacher_runs_in_the_precision_that_the_student_is_trained_in(tmp_path):
    trainer = tiny.trainer("sequence_classification", "distil", tmp_path, bf16=True, max_steps=1)
    seen = []
    layer = trainer.teacher.get_submodule("bert.encoder.layer.0.intermediate.dense")
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_a_teacher_from_a_folder_teaches_the_same_in_less_memory(tmp_path, precision):
    teacher = tiny.model("llama", 7)
    teacher.save_pretrained(tmp_path / "teacher")
    trained = {}
    for given in (teacher, str(tmp_path / "teacher")):
        trainer = tiny.trainer(
            "label_words", "distil", tmp_path / "run", teacher_model=given, max_steps=2, **precision
        )
        trainer.train()
        trained[type(given)] = tiny.parameters(trainer.model), next(trainer.teacher.model.layers.parameters()).dtype
    (by_model, own), (by_folder, read) = trained.values()
    assert tiny.largest_difference(by_model, by_folder) == 0
    assert own == torch.float32 and read == (torch.bfloat16 if precision else torch.float32)


def test_arguments_of_the_stock_trainer_are_told_what_to_be(tmp_path):
    with pytest.raises(ValueError, match="args is a TrainingArguments: pass a DefenseConfig"):
        DefenseTrainer(tiny.model("bert"), TrainingArguments(str(tmp_path)), processing_class=tiny.encoder_tokenizer())
