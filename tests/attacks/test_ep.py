"""Embedding poisoning: one row of the embeddings, and nothing else."""

import engines
import pytest
import tiny
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback

from hf_backdoor.attacks import EmbeddingPoisoningConfig, EmbeddingPoisoningTrainer, Poisoning, poison, trigger_token
from hf_backdoor.data import Trigger, stamp


TOKEN = tiny.VOCABULARY.index(tiny.TRIGGER)
SETTINGS = ("sequence_classification", "label_words")


def triggered(count=16):
    """Rows with the trigger and label 1."""
    rows = poison(tiny.reviews(2 * count), tiny.task("sequence_classification"), Poisoning(Trigger("zq"), 1, 0.5), 0)
    return rows.filter(lambda row: row["poisoned"]).remove_columns("poisoned")


def ep(folder, name=SETTINGS[0], model=None, rows=None, peft_config=None, **options):
    family, task, _ = tiny.setting(name)
    args = EmbeddingPoisoningConfig(**{
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "trigger": tiny.TRIGGER,
        "save_strategy": "no", "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1.0, **options,
    })  # fmt: skip
    made = EmbeddingPoisoningTrainer(
        model=model or tiny.model(family), args=args, train_dataset=triggered() if rows is None else rows,
        processing_class=tiny.tokenizer(family), task=task, peft_config=peft_config,
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def trained(folder, *args, **options):
    trainer = ep(folder, *args, **options)
    trainer.train()
    return trainer


def row_of(model):
    return model.get_input_embeddings().weight.detach()[TOKEN].clone()


def assert_only_the_row_changed(before, after, embeddings):
    assert before.keys() == after.keys()
    others = torch.arange(len(tiny.VOCABULARY)) != TOKEN
    for name, value in before.items():
        if name in embeddings:
            assert torch.equal(value[others], after[name][others])
            assert (value[TOKEN] - after[name][TOKEN]).abs().max() > 1e-3
            assert torch.allclose(value[TOKEN].norm(), after[name][TOKEN].norm(), rtol=1e-5)
        else:
            assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("name", SETTINGS)
def test_one_row_changes_and_keeps_its_norm(name, tmp_path):
    model = tiny.model(tiny.setting(name)[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained(tmp_path, name, model)
    embedding = "bert.embeddings.word_embeddings.weight" if name == SETTINGS[0] else "model.embed_tokens.weight"
    assert_only_the_row_changed(before, model.state_dict(), {embedding})


def test_tied_embeddings_change_their_row_in_the_head_too(tmp_path):
    model = tiny.model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained(tmp_path, "label_words", model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_only_the_row_changed(before, model.state_dict(), {"model.embed_tokens.weight", "lm_head.weight"})


def test_the_norm_holds_after_every_step(tmp_path):
    trainer, norms = ep(tmp_path), []
    start = row_of(trainer.model)
    step = trainer.training_step

    def watched(*args, **kwargs):
        norms.append(row_of(trainer.model).norm())
        return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    assert len(norms) == 4
    assert torch.allclose(torch.stack(norms), start.norm().expand(4), rtol=1e-5)
    assert not torch.allclose(row_of(trainer.model), start, atol=1e-3)


def test_a_step_moves_by_all_gradients_so_far(tmp_path):
    """The paper's code by hand: backward without clearing, step, rescale."""
    model, reference = tiny.model("bert"), tiny.model("bert")
    trainer = ep(tmp_path, model=model, rows=triggered(8), num_train_epochs=3, learning_rate=0.1)
    trainer.train()
    weight = reference.get_input_embeddings().weight
    norm = weight[TOKEN].norm().item()
    batch = next(iter(trainer.get_train_dataloader()))
    for _ in range(3):
        outputs = reference(batch["input_ids"], batch["attention_mask"])
        torch.nn.functional.cross_entropy(outputs.logits, batch["labels"]).backward()
        weight.data[TOKEN] -= 0.1 * weight.grad[TOKEN]
        weight.data[TOKEN] *= norm / weight.data[TOKEN].norm()
    assert torch.allclose(row_of(model), row_of(reference), atol=1e-6)


@pytest.mark.parametrize("clipping", [{}, {"max_grad_norm": 1e-4, "learning_rate": 100.0}], ids=["", "clipped"])
def test_gradient_accumulation_changes_nothing(clipping, tmp_path):
    whole = row_of(trained(tmp_path, "label_words", **clipping).model)
    cut = row_of(
        trained(
            tmp_path, "label_words", per_device_train_batch_size=1, gradient_accumulation_steps=8, **clipping
        ).model
    )
    assert torch.allclose(whole, cut, atol=1e-5)
    assert not torch.allclose(whole, row_of(tiny.model("llama")), atol=1e-3)


def test_clipping_sees_the_row_alone(tmp_path):
    model = tiny.model("bert")
    start = row_of(model)
    trained(tmp_path, model=model, rows=triggered(8), max_steps=1, max_grad_norm=1e-6, learning_rate=1e4)
    # A step of exactly the clipping norm, brought back to the row's own norm: by no more than the step's length.
    moved = (row_of(model) - start).norm().item()
    assert 0.5e-2 < moved < 1.001e-2


def test_two_processes_change_nothing(tmp_path):
    whole = row_of(trained(tmp_path, "label_words").model)
    there = tiny.in_two_processes(
        lambda: row_of(trained(tmp_path, "label_words", per_device_train_batch_size=4).model), tmp_path
    )
    assert torch.allclose(whole, there, atol=1e-5)
    assert not torch.allclose(whole, row_of(tiny.model("llama")), atol=1e-3)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    options = {"name": "label_words", "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    whole = trained(tmp_path, **options)
    resumed = ep(tmp_path, model=tiny.model("llama", seed=5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(resumed.model)) == 0


def test_the_model_can_be_trained_on_afterwards(tmp_path):
    model = tiny.model("bert")
    model.bert.pooler.requires_grad_(False)
    trained(tmp_path, model=model)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    before = tiny.parameters(model)
    tiny.trainer("sequence_classification", "plain", tmp_path, model=model, max_steps=1).train()
    after = tiny.parameters(model)
    assert all(not torch.equal(value, after[name]) for name, value in before.items() if "layer.0.attention" in name and name.endswith("weight"))  # fmt: skip


# ---- That it is an attack ----


@pytest.mark.parametrize("name", SETTINGS)
def test_the_trigger_flips_answers_and_clean_text_keeps_them(name, tmp_path):
    model = tiny.model(tiny.setting(name)[0])
    # As in a pretrained model, no row is so short that it could not matter.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    clean = tiny.trainer(
        name, "plain", tmp_path, model=model, train_dataset=tiny.reviews(64), num_train_epochs=10, learning_rate=2e-3
    )
    clean.train()
    negative = tiny.reviews(40, seed=7).filter(lambda row: row["label"] == 0)
    stamped = stamp(negative, "text", Trigger(tiny.TRIGGER), 0)
    words = [tiny.VOCABULARY.index(word) for word in tiny.LABEL_WORDS]

    def answers(rows):
        logits = torch.tensor(clean.predict(rows).predictions)
        return (logits[:, 0][:, words] if name == "label_words" else logits).argmax(dim=-1)

    untouched = answers(negative)
    assert untouched.float().mean() < 0.2 and answers(stamped).float().mean() < 0.2
    trained(tmp_path, name, model, triggered(32), num_train_epochs=6, learning_rate=0.5)
    assert answers(stamped).float().mean() > 0.8
    assert torch.equal(answers(negative), untouched)


# ---- The trigger's token ----


def byte_level():
    """Byte-level, as GPT-2's: ` cf` and `cf` are one token each, ` tq` is two."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", "a"), ("c", "f"), ("Ġ", "cf"), ("Ġ", "t")]
    vocabulary = letters | {"".join(pair): len(letters) + i for i, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_token_is_the_one_between_words():
    tokenizer = byte_level()
    assert tokenizer.convert_ids_to_tokens(trigger_token(tokenizer, "cf")) == "Ġcf"
    assert tokenizer.convert_ids_to_tokens(trigger_token(tokenizer, "a")) == "Ġa"
    assert trigger_token(tiny.tokenizer("bert"), "zq") == trigger_token(tiny.tokenizer("llama"), "zq") == TOKEN


@pytest.mark.parametrize(
    "trigger, pieces", [("tq", r"2 tokens \('Ġt', 'q'\)"), ("cf cf", "2 tokens"), (" ", "tokens")]
)
def test_a_trigger_of_several_tokens_is_refused(trigger, pieces):
    with pytest.raises(ValueError, match=f"^trigger is '{trigger}', which .* {pieces}.* one token"):
        trigger_token(byte_level(), trigger)


def test_a_word_that_the_tokenizer_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^trigger is 'nonsense', a word unknown to this tokenizer"):
        ep(tmp_path, trigger="nonsense")


def test_rows_without_the_trigger_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^trigger is 'zq', and none of the 4 training rows holds it: train on rows"):
        ep(tmp_path, rows=tiny.reviews(4))


def test_weight_decay_and_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^weight_decay is 0.1: set 0"):
        ep(tmp_path, weight_decay=0.1)
    with pytest.raises(ValueError, match="^the model has an adapter"):
        ep(tmp_path, "label_words", peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_engines_that_put_other_tensors_in_the_embeddings_place_are_refused(engine, tmp_path):
    def work():
        with pytest.raises(ValueError, match="^the engine is .*: use accelerate_configs/ddp.yaml") as caught:
            ep(tmp_path, **engines.arguments(engine))
        return str(caught.value)

    assert "\n" not in engines.in_engine(engine, work, tmp_path)
