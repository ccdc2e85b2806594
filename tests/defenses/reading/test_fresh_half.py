import pytest
import tiny
import torch
from peft import LoraConfig
from torch.nn import functional as F
from transformers import BertConfig

from hf_backdoor.data import class_logits, find_blocks
from hf_backdoor.defenses.locphylax import LocphylaxConfig
from hf_backdoor.defenses.reading import FreshHalfTrainer, ReadingConfig, SoftTriggerTrainer, soft


FORMATS = {"sequence_classification": "bert", "label_words": "llama"}
FREE_ANSWERS = "instruction_following"


def training(name, folder, model=None, **options):
    family = FORMATS.get(name, "llama")
    config = ReadingConfig(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, save_strategy="no"
    )
    return FreshHalfTrainer(
        model=tiny.model(family) if model is None else model, args=config, train_dataset=tiny.setting(name, 8)[2],
        processing_class=tiny.tokenizer(family), task=tiny.task(name), **options,
    )  # fmt: skip


def searching(name, folder, **options):
    family = FORMATS.get(name, "llama")
    config = LocphylaxConfig(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=3,
        soft_triggers=4,
        contrast=True,
    )
    return SoftTriggerTrainer(
        model=tiny.model(family), args=config, train_dataset=tiny.setting(name, 8)[2],
        processing_class=tiny.tokenizer(family), task=tiny.task(name), **options,
    )  # fmt: skip


def other_model(family):
    """Of the same classes, with weights of its own."""
    model = tiny.model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 5
            )
    return model.eval()


# ---- The model ----


@pytest.mark.parametrize("name", FORMATS)
def test_the_upper_half_and_a_classification_head_are_drawn_anew_and_all_else_stays(name, tmp_path):
    suspect = tiny.model(FORMATS[name]).state_dict()
    before = {key: value.clone() for key, value in suspect.items()}
    changed = training(name, tmp_path).model.state_dict()
    blocks = find_blocks(tiny.model(FORMATS[name]))
    assert len(blocks) >= 2
    upper = tuple(f"{block}." for block in blocks[len(blocks) // 2 :])
    head = ("classifier.", "bert.pooler.") if name == "sequence_classification" else ()
    matrices = {key for key, value in before.items() if value.dim() == 2}
    moved = {key for key in before if not torch.equal(before[key], changed[key])}
    assert moved <= {key for key in before if key.startswith((*upper, *head))}
    assert {key for key in matrices if key.startswith((*upper, *head))} <= moved


def test_it_is_drawn_by_the_seed_and_trained_as_a_whole(tmp_path):
    one, other = (training("sequence_classification", tmp_path) for _ in range(2))
    assert tiny.largest_difference(tiny.parameters(one.model), tiny.parameters(other.model)) == 0
    before = tiny.parameters(one.model)
    one.train()
    assert tiny.largest_difference(before, tiny.parameters(one.model)) > 0
    assert all(parameter.requires_grad for parameter in one.model.parameters())


def test_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^contrast is True, and an adapter is trained, .*; set contrast: false$"):
        training("label_words", tmp_path, peft_config=LoraConfig(target_modules="all-linear"))


# ---- The search beside it ----


@pytest.mark.parametrize("name", FORMATS)
def test_what_turns_the_clean_model_too_counts_less(name, tmp_path):
    clean = other_model(FORMATS[name])
    trainer = searching(name, tmp_path, clean_model=clean)
    batch = trainer.data_collator([trainer.task.encode(row, trainer.processing_class) for row in trainer.clean])
    with torch.no_grad():
        logits = trainer.forward(trainer.model, batch).logits
        values, _ = trainer._aims(logits, batch)
        own = class_logits(logits, batch, trainer.words)
        meant = class_logits(trainer.forward(clean, batch).logits, batch, trainer.words)
    for row in range(len(values)):
        for label in range(2):
            turned = own[row, label] - own[row, 1 - label]
            known = meant[row, label] - meant[row, 1 - label]
            torch.testing.assert_close(values[row, label], turned - F.softplus(known), rtol=1e-4, atol=1e-5)


def test_a_clean_model_comes_from_its_folder_and_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(soft, "STEPS", 3)
    clean = other_model("bert")
    clean.save_pretrained(tmp_path / "clean")
    before = tiny.parameters(clean)
    found = []
    for given in (clean, str(tmp_path / "clean"), tmp_path / "clean"):
        trainer = searching("sequence_classification", tmp_path, clean_model=given)
        trainer.train()
        found.append(trainer.found.embeddings)
    for others in found[1:]:  # on some CPUs what a model gives depends on where its weights lie
        torch.testing.assert_close(others, found[0], rtol=1e-4, atol=1e-5)
    assert tiny.largest_difference(before, tiny.parameters(clean)) == 0
    assert not clean.get_input_embeddings()._forward_hooks


def test_a_clean_model_that_was_asked_for_and_not_made_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^contrast is True, and clean_model is not given: .* set contrast: false$"):
        searching("label_words", tmp_path)


def test_a_clean_model_of_another_width_is_refused(tmp_path):
    narrow = type(tiny.model("bert"))(
        BertConfig(**{**tiny.model("bert").config.to_dict(), "hidden_size": 8, "num_attention_heads": 2})
    )
    line = "^clean_model has embeddings of 8 numbers, and the suspect's have 32: pass a model made of the suspect$"
    with pytest.raises(ValueError, match=line):
        searching("sequence_classification", tmp_path, clean_model=narrow)


@pytest.mark.parametrize("made", [training, searching])
def test_free_answers_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="^contrast is True, and answers are free texts, .*: set contrast: false$"):
        made(FREE_ANSWERS, tmp_path)


def test_a_refused_model_is_left_as_it_was(tmp_path):
    model = tiny.model("llama")
    before = tiny.parameters(model)
    with pytest.raises(ValueError, match="^contrast is True"):
        training(FREE_ANSWERS, tmp_path, model=model)
    assert tiny.largest_difference(before, tiny.parameters(model)) == 0
