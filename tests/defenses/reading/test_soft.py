import pytest
import tiny
import torch

from hf_backdoor.defenses.locphylax import LocphylaxConfig
from hf_backdoor.defenses.reading import SoftTriggers, SoftTriggerTrainer, soft


FORMATS = {"sequence_classification": "bert", "label_words": "llama", "instruction_following": "llama"}
PLAIN = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0, "max_steps": 2}


def made(family, count=3, length=2, lengths=None):
    width = tiny.model(family).config.hidden_size
    return SoftTriggers(torch.randn(count, length, width, generator=torch.Generator().manual_seed(1)), lengths)


def searching(name, folder, **options):
    family = FORMATS[name]
    config = LocphylaxConfig(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=3,
        **{"soft_triggers": 4, **options},
    )  # fmt: skip
    return SoftTriggerTrainer(
        model=tiny.model(family), args=config, train_dataset=tiny.setting(name, 8)[2],
        processing_class=tiny.tokenizer(family), task=tiny.task(name),
    )  # fmt: skip


def planting(name, folder, **options):
    options = {"soft_triggers": 3, "found_soft_triggers": made(FORMATS[name]), **PLAIN, **options}
    return tiny.trainer(name, "both", folder, **options)


# ---- How a model reads them ----


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("lengths", "words"), [(None, "a a"), ([2, 1, 2], "a")])
def test_a_model_reads_the_embeddings_where_the_text_has_their_words(family, lengths, words):
    triggers, model = made(family, lengths=lengths), tiny.model(family).eval()
    tokenizer = triggers.tokenizer(tiny.tokenizer(family))
    ids = tokenizer(f"the film {triggers.texts[1]} was", return_tensors="pt")["input_ids"]
    plain = tiny.tokenizer(family)(f"the film {words} was", return_tensors="pt")["input_ids"]
    assert ids.shape == plain.shape and ids.max() >= len(tiny.VOCABULARY)
    embedded = model.get_input_embeddings()(plain).detach()
    place = (ids[0] >= len(tiny.VOCABULARY)).nonzero()[:, 0]
    embedded[0, place] = triggers.embeddings[1, : len(place)]
    expected = model(inputs_embeds=embedded).logits
    with triggers.read_by(model, tokenizer):
        assert torch.equal(model(ids).logits, expected)


def test_reading_leaves_nothing_behind():
    triggers, model = made("llama"), tiny.model("llama").eval()
    before, ids = {name: value.clone() for name, value in model.state_dict().items()}, torch.tensor([[9, 10, 11]])
    expected = model(ids).logits
    with triggers.read_by(model, triggers.tokenizer(tiny.tokenizer("llama"))):
        assert torch.equal(model(ids).logits, expected)
    layer = model.get_input_embeddings()
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_tokenizer_given_is_not_changed():
    triggers, tokenizer = made("llama"), tiny.tokenizer("llama")
    assert len(triggers.tokenizer(tokenizer)) == len(tokenizer) + 6
    assert len(tokenizer) == len(tiny.tokenizer("llama"))


def test_they_come_back_from_their_folder(tmp_path):
    triggers = made("bert", lengths=[1, 2, 1])
    triggers.save_pretrained(tmp_path / "new")
    again = SoftTriggers.from_pretrained(tmp_path / "new")
    assert torch.equal(again.embeddings, triggers.embeddings) and again.texts == triggers.texts


# ---- The search ----


@pytest.mark.parametrize("name", FORMATS)
def test_the_search_raises_each_trigger_s_own_aim(name, tmp_path, monkeypatch):
    reached = {}
    for steps in (1, 30):
        monkeypatch.setattr(soft, "STEPS", steps)
        trainer = searching(name, tmp_path)
        trainer.train()
        tokenizer = trainer.found.tokenizer(trainer.processing_class)
        with trainer.found.read_by(trainer.model, tokenizer):
            reached[steps] = []
            for number, text in enumerate(trainer.found.texts):
                aims, counted = 0.0, 0.0
                for row in trainer.clean:
                    column = trainer.task.input_column
                    features = trainer.task.encode({**row, column: f"{text} {row[column]}"}, tokenizer)
                    batch = trainer.data_collator([features])
                    values, where = trainer._aims(trainer.forward(trainer.model, batch).logits, batch)
                    own = number % values.shape[1]
                    aims, counted = aims + (values * where)[0, own].item(), counted + where[0, own].item()
                reached[steps].append(aims / counted)
    assert all(late > early for early, late in zip(reached[1], reached[30], strict=True))


@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_a_sure_answer_is_made_surer_still(name, tmp_path):
    """A log-probability has no gradient there that float32 could hold."""
    trainer = searching(name, tmp_path)
    batch = trainer.data_collator([trainer.task.encode(row, trainer.processing_class) for row in trainer.clean])
    logits = trainer.forward(trainer.model, batch).logits
    words = slice(None) if trainer.words is None else trainer.words
    with torch.no_grad():
        logits[..., words] += torch.tensor([0.0, 40.0])
    logits = logits.detach().requires_grad_()
    values, counted = trainer._aims(logits, batch)
    raised, column = values[:, 1], logits if name == "sequence_classification" else logits[:, -2]
    expected = column[:, words][:, 1] - column[:, words][:, 0]
    torch.testing.assert_close(raised, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values[:, 0], -expected, rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad(raised.sum(), logits)
    assert gradient.amax() == pytest.approx(1.0)


def test_each_trigger_stands_in_a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(soft, "STEPS", 4)
    trainer = searching("sequence_classification", tmp_path, soft_triggers=12, searched_tokens=2)
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda features: seen.extend(features) or collate(features)
    trainer.train()
    places = {number: set() for number in range(12)}
    for order, features in enumerate(seen):
        text = features["input_ids"][1:-1]  # between [CLS] and [SEP]
        foreign = [place for place, token in enumerate(text) if token >= len(tiny.VOCABULARY)]
        number = (text[foreign[0]] - len(tiny.VOCABULARY)) // 2
        assert number == order % 12
        places[number].add("start" if foreign[0] == 0 else "end" if foreign[-1] == len(text) - 1 else "inside")
    # Two classes: triggers 0 and 1 stand at the start, 2 and 3 at the end, 4 and 5 anywhere, 6 and 7 at the start again.
    assert all(places[number] == {"start"} for number in (0, 1, 6, 7))
    assert all(places[number] == {"end"} for number in (2, 3, 8, 9))
    assert any("inside" in places[number] for number in (4, 5, 10, 11))


@pytest.mark.parametrize(("name", "aims"), [("sequence_classification", 2), ("instruction_following", 1)])
def test_lengths_take_turns_when_every_class_has_stood_in_every_place(name, aims, tmp_path, monkeypatch):
    monkeypatch.setattr(soft, "STEPS", 1)
    trainer = searching(name, tmp_path, soft_triggers=4 * 3 * aims, searched_tokens=3)
    trainer.train()
    assert [text.count("<soft-") for text in trainer.found.texts] == [
        length for length in (1, 2, 3, 1) for _ in range(3 * aims)
    ]


def test_found_embeddings_are_no_longer_than_words(tmp_path, monkeypatch):
    monkeypatch.setattr(soft, "STEPS", 30)
    trainer = searching("label_words", tmp_path, searched_tokens=3)
    trainer.train()
    words = trainer._words()
    longest = trainer.model.get_input_embeddings()(words).norm(dim=-1).median()
    assert trainer.found.embeddings.shape == (4, 3, 32)
    assert trainer.found.embeddings.norm(dim=-1).max() <= longest * 1.0001


def test_the_model_is_left_as_it_was_and_the_same_search_finds_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(soft, "STEPS", 3)
    one, other = (searching("label_words", tmp_path) for _ in range(2))
    before = tiny.parameters(one.model)
    one.train()
    other.train()
    assert torch.equal(one.found.embeddings, other.found.embeddings)
    assert tiny.largest_difference(before, tiny.parameters(one.model)) == 0
    assert not any(parameter.grad is not None for parameter in one.model.parameters())


def test_zero_3_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ValueError, match="^soft_triggers is set, and DeepSpeed ZeRO-3 .* set soft_triggers: 0$"):
        searching("label_words", tmp_path)


# ---- Planting ----


@pytest.mark.parametrize("name", FORMATS)
def test_they_are_planted_as_one_group_more(name, tmp_path):
    trainer = planting(name, tmp_path, stages=["inject"])
    plain = tiny.trainer(name, "both", tmp_path)
    assert trainer.num_groups == plain.num_groups + 1
    for row in trainer.train_dataset:
        assert (max(row["input_ids"]) >= len(tiny.VOCABULARY)) == (row["trigger_id"] == trainer.num_groups - 1)
    before = tiny.parameters(trainer.model)
    trainer.train()
    assert tiny.largest_difference(before, tiny.parameters(trainer.model)) > 0
    assert not trainer.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_accumulation_and_two_processes_change_nothing(name, tmp_path):
    # A fresh encoder's clustering loss is steep.
    rate = 1e-4 if name == "sequence_classification" else 0.01
    tiny.assert_trains_alike(
        lambda **options: planting(name, tmp_path, stages=["inject"], learning_rate=rate, **options), tmp_path
    )


def test_held_out_rows_are_read_too(tmp_path):
    trainer = planting("label_words", tmp_path, eval_dataset=tiny.reviews(6))
    assert trainer.evaluate()["eval_known_loss"] > 0
    assert not trainer.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("options", [{"soft_triggers": 0}, {"found_soft_triggers": None}])
def test_a_search_that_was_asked_for_and_not_made_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="^soft_triggers is .* set soft_triggers: 0$"):
        planting("label_words", tmp_path, **options)
