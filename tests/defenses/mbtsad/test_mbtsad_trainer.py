"""MBTSAD's two stages; what every trainer owes its user is in tests/defenses/test_trainer.py."""

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from hf_backdoor.defenses.mbtsad import MBTSADConfig


LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def states_seen(trainer):
    """Weights with which each stage begins, by stage; each is recorded at its first step."""
    seen = {}
    step = trainer.training_step

    def watched(model, *args, **kwargs):
        seen.setdefault(trainer.stage, tiny.parameters(trainer.model))
        return step(model, *args, **kwargs)

    trainer.training_step = watched
    return seen


# ---- Stages ----


def test_retraining_sees_split_copies_and_distillation_the_rows_as_they_are(tmp_path):
    trainer = tiny.trainer("label_words", "mbtsad", tmp_path, max_steps=1)
    assert len(trainer.train_dataset) == 48
    trainer.train()
    plain = tiny.trainer("label_words", "plain", tmp_path)
    assert trainer.train_dataset["input_ids"][:] == plain.train_dataset["input_ids"][:]


def test_distillation_starts_from_the_suspect_with_the_retrained_model_as_teacher(tmp_path):
    trainer = tiny.trainer("label_words", "mbtsad", tmp_path, max_steps=3)
    suspect = tiny.parameters(trainer.model)
    seen = states_seen(trainer)
    trainer.train()
    assert tiny.largest_difference(seen["distil"], suspect) == 0
    alone = tiny.trainer("label_words", "mbtsad", tmp_path / "alone", max_steps=3, stages=["retrain"])
    alone.train()
    assert tiny.largest_difference(tiny.parameters(trainer.teacher), tiny.parameters(alone.model)) == 0
    assert not any(value.requires_grad for value in trainer.teacher.parameters())


def test_with_an_adapter_the_teacher_is_an_adapter_over_the_same_base(tmp_path):
    trainer = tiny.trainer("label_words", "mbtsad", tmp_path, max_steps=3, peft_config=LORA)
    seen = states_seen(trainer)
    trainer.train()
    assert trainer.teacher_model is None and set(trainer.model.peft_config) == {"default", "teacher"}
    alone = tiny.trainer(
        "label_words", "mbtsad", tmp_path / "alone", max_steps=3, peft_config=LORA, stages=["retrain"]
    )
    start = tiny.parameters(alone.model)
    alone.train()
    after, retrained = tiny.parameters(trainer.model), tiny.parameters(alone.model)
    for name, value in retrained.items():
        if "lora_" in name:
            # The student began where the first stage did; the teacher is what that stage made, and stayed it.
            assert torch.equal(seen["distil"][name], start[name])
            assert torch.equal(after[name.replace(".default.", ".teacher.")], value)
    moved = [name for name in start if "lora_B" in name and not torch.equal(after[name], start[name])]
    assert moved and trainer.model.active_adapter == "default" and trainer.model.training


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("at", ["checkpoint-retrain/checkpoint-2", "checkpoint-distil/checkpoint-2"])
def test_both_stages_resume_bit_for_bit(at, peft, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "peft_config": peft}
    whole = tiny.trainer("label_words", "mbtsad", tmp_path, **options)
    whole.train()
    # What a run leaves that was killed in this stage: nothing of what came later.
    (tmp_path / at).with_name("checkpoint-3").rename(tmp_path / "lost")
    if at.startswith("retrain"):
        (tmp_path / "distil").rename(tmp_path / "lost_too")
        (tmp_path / "teacher").rename(tmp_path / "lost_teacher")
    resumed = tiny.trainer("label_words", "mbtsad", tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(resumed.model)) == 0


def test_two_processes_run_both_stages_as_one_does(tmp_path):
    steps = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "max_steps": 2}
    one = tiny.trainer("label_words", "mbtsad", tmp_path / "one", **steps)
    one.train()

    def work():
        trainer = tiny.trainer("label_words", "mbtsad", tmp_path / "two", per_device_train_batch_size=4, **steps)
        trainer.train()
        return tiny.parameters(trainer.model)

    assert tiny.largest_difference(tiny.parameters(one.model), tiny.in_two_processes(work, tmp_path)) < 1e-5


# ---- Losses ----


def gemma(implementation):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(tiny.VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4, pad_token_id=0, attn_implementation=implementation,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def llama(implementation):
    model = tiny.model("llama", 0)
    model.set_attn_implementation(implementation)
    return model


def mistral(implementation):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tiny.VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, pad_token_id=0, attn_implementation=implementation,
    )  # fmt: skip
    return MistralForCausalLM(config)


@pytest.mark.parametrize("build", [llama, gemma, mistral])
@pytest.mark.parametrize("loss", ["maps", "nad"])
def test_lean_and_eager_train_alike(build, loss, tmp_path):
    trained = {}
    for backend, implementation in (("lean", "sdpa"), ("eager", "eager")):
        teacher = build(implementation)
        with torch.no_grad():
            for value in teacher.parameters():
                value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        trainer = tiny.trainer(
            "label_words", "distil", tmp_path, model=build(implementation), teacher_model=teacher, max_steps=3, optim="sgd",
            attention_loss=loss, attention_weight=1000.0, attention_layers=[0, -1], hidden_layers=[-1],
            attention_backend=backend,
        )  # fmt: skip
        trainer.train()
        trained[backend] = tiny.parameters(trainer.model), tiny.logged(trainer, "loss/attention")
    assert trained["lean"][1] == pytest.approx(trained["eager"][1], rel=1e-4) and trained["lean"][1][0] > 0
    assert tiny.largest_difference(trained["lean"][0], trained["eager"][0]) < 1e-5


def test_a_causal_classifier_is_causal_to_the_eager_reference_too(tmp_path):
    """Llama with a classification head: one label a row, and causal maps."""
    config = tiny.model("llama").config
    config.num_labels = 2
    logged = {}
    for backend, implementation in (("lean", "sdpa"), ("eager", "eager")):
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            models.append(LlamaForSequenceClassification._from_config(config, attn_implementation=implementation))
        trainer = tiny.trainer(
            "sequence_classification", "distil", tmp_path, model=models[0], teacher_model=models[1], max_steps=1,
            attention_backend=backend,
        )  # fmt: skip
        trainer.train()
        logged[backend] = tiny.logged(trainer, "loss/attention")
    assert logged["lean"] == pytest.approx(logged["eager"], rel=1e-4) and logged["lean"][0] > 0


def test_a_student_that_is_its_teacher_has_the_task_loss_only(tmp_path):
    trainer = tiny.trainer("label_words", "distil", tmp_path, teacher_model=tiny.model("llama"), max_steps=1)
    trainer.train()
    assert tiny.logged(trainer, "loss/attention") == tiny.logged(trainer, "loss/hidden") == [0.0]
    assert tiny.logged(trainer, "loss/task")[0] > 0


@pytest.mark.parametrize("left_out", ["task", "attention", "hidden"])
def test_a_weight_of_zero_leaves_a_loss_out(left_out, tmp_path):
    trainer = tiny.trainer("label_words", "distil", tmp_path, max_steps=1, **{f"{left_out}_weight": 0.0})
    trainer.train()
    logged = {name for name in ("task", "attention", "hidden") if tiny.logged(trainer, f"loss/{name}")}
    assert logged == {"task", "attention", "hidden"} - {left_out}


def test_activation_checkpointing_changes_nothing(tmp_path):
    trained = {}
    for checkpointing in (False, True):
        trainer = tiny.trainer(
            "label_words", "distil", tmp_path, max_steps=2, optim="sgd", attention_weight=1000.0,
            activation_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.train()
        trained[checkpointing] = tiny.parameters(trainer.model)
    assert tiny.largest_difference(trained[False], trained[True]) < 1e-6


def test_the_model_keeps_nothing_of_the_recording(tmp_path):
    trainer = tiny.trainer("label_words", "distil", tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    saved = LlamaForCausalLM.from_pretrained(tmp_path)
    assert saved.config._attn_implementation == "sdpa"
    assert set(saved.state_dict()) == set(tiny.model("llama").state_dict())


# ---- What is refused ----


@pytest.mark.parametrize(
    "method, options, line",
    [
        ("distil", {"teacher_model": None}, "teacher_model is None: pass the retrained model"),
        ("distil", {"attention_backend": "eager"}, "attention_backend is 'eager', and the model was loaded with attn_implem"),
        ("distil", {"attention_layers": [5]}, r"attention_layers is \[5\], and the model has 2"),
        ("distil", {"hidden_layers": [5]}, r"hidden_layers is \[5\], and the model has 2"),
        ("distil", {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
         "use_reentrant: true, which leaves the attention loss without gradient"),
    ],
)  # fmt: skip
def test_what_can_not_work_is_refused_before_training(method, options, line, tmp_path):
    with pytest.raises(ValueError, match=line):
        tiny.trainer("label_words", method, tmp_path, **options)


def test_tokenized_rows_can_not_be_split(tmp_path):
    rows = tiny.task("label_words").encode_rows(tiny.reviews(4), tiny.tokenizer("llama"))
    with pytest.raises(ValueError, match="train_dataset has input_ids: pass raw rows"):
        tiny.trainer("label_words", "retrain", tmp_path, train_dataset=rows)


@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_split_rows_stay_within_the_model_s_positions(name, tmp_path, monkeypatch):
    family, task, rows = tiny.setting(name, 16)
    tokenizer = tiny.tokenizer(family)
    longest = max(len(task.encode(row, tokenizer)["input_ids"]) for row in rows)

    def lengths():
        trainer = tiny.trainer(name, "retrain", tmp_path, split_rate=1.0, split_copies=2)
        return [len(ids) for ids in trainer.train_dataset["input_ids"]]

    free = lengths()
    tokenizer.model_max_length = longest
    monkeypatch.setattr(tiny, "tokenizer", lambda _: tokenizer)
    assert max(free) > longest
    assert lengths() == [min(length, longest) for length in free]


@pytest.mark.parametrize(
    "options, line",
    [
        ({"stages": ["distil", "retrain"]}, "stages is .*: use \\['retrain', 'distil'\\]"),
        ({"attention_loss": "cosine"}, "attention_loss is 'cosine': use one of maps, nad"),
        ({"attention_backend": "flash"}, "attention_backend is 'flash': use one of lean, eager"),
        ({"hidden_weight": -1.0}, "hidden_weight is -1.0: choose 0"),
        ({"hidden_weight": 0.0, "attention_weight": 0.0}, "are both 0: there is nothing to learn from the teacher"),
        ({"split_rate": 2.0}, "split_rate is 2.0"),
    ],
)
def test_bad_arguments_are_named(options, line):
    with pytest.raises(ValueError, match=line):
        MBTSADConfig("out", use_cpu=True, **options)
