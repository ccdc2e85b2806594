import pytest
import tiny
import torch
from transformers import LlamaForSequenceClassification

from hf_backdoor.attacks import Poisoning, poison
from hf_backdoor.data import Trigger
from hf_backdoor.defenses.locphylax import (
    FoundTriggers,
    LocphylaxConfig,
    LocphylaxTrainer,
    TriggerSearchTrainer,
    search,
)


PARTS = {"sequence_classification": "bert", "label_words": "llama", "instruction_following": "llama"}


def searching(name, folder, rows=None, model=None, **options):
    family = PARTS[name]
    config = LocphylaxConfig(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=3,
        **{"searched_triggers": 3, "searched_tokens": 1, **options},
    )  # fmt: skip
    return TriggerSearchTrainer(
        model=model or tiny.model(family),
        args=config,
        train_dataset=rows or tiny.setting(name, 8)[2],
        processing_class=tiny.tokenizer(family),
        task=tiny.task(name),
    )


def effects(trainer, texts):
    """What each text does to each aim, written as loops over rows without padding."""
    found = {}
    for text in texts:
        sums, counts = {}, {}
        for row, raw in enumerate(trainer.rows):
            features = trainer._features(text, row)
            ids = torch.tensor([features["input_ids"]])
            with torch.no_grad():
                logits = trainer.model(ids).logits[0]
            if isinstance(raw.get("label"), int):
                words = None if "labels" in features else trainer.task.word_ids(trainer.processing_class)
                chosen = logits if words is None else logits[features["prompt_length"] - 1, words]
                aims = {t: p.item() for t, p in enumerate(chosen.log_softmax(0)) if t != raw["label"]}
            else:
                answer = range(features["prompt_length"], len(features["input_ids"]))
                aims = {0: -sum(logits[i - 1].log_softmax(0)[ids[0, i]].item() for i in answer) / len(answer)}
            for aim, value in aims.items():
                aim += row % 3 * trainer.num_aims  # texts stand at three places in turn
                sums[aim], counts[aim] = sums.get(aim, 0) + value, counts.get(aim, 0) + 1
        found[text] = {aim: sums[aim] / counts[aim] for aim in sums}
    return found


@pytest.mark.parametrize("name", PARTS)
def test_effects_equal_a_loop_over_rows(name, tmp_path):
    trainer = searching(name, tmp_path)
    trainer.train()
    texts = ["music", tiny.TRIGGER, "the plot"]
    for text, expected in effects(trainer, texts).items():
        for aim, value in expected.items():
            assert trainer._effects(texts, 8)[text][aim].item() == pytest.approx(value, rel=1e-4)


def test_a_decoder_s_head_reads_no_padding_for_gradients(tmp_path):
    torch.manual_seed(0)
    config = tiny.model("llama").config
    config.num_labels = 2
    model = LlamaForSequenceClassification(config)
    trainer = TriggerSearchTrainer(
        model=model,
        args=LocphylaxConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, searched_triggers=1),
        train_dataset=tiny.reviews(8),
        processing_class=tiny.causal_tokenizer(),
    )
    trainer.train()
    word = (tiny.VOCABULARY.index(tiny.TRIGGER),)
    found = {}
    for size in (1, 8):  # a row by itself has no padding
        trainer.args.per_device_train_batch_size = size
        found[size] = trainer._gradients(word, 0)
    assert found[1].abs().max() > 0
    torch.testing.assert_close(found[8], found[1])
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", PARTS)
def test_gradients_say_what_a_small_change_of_the_word_does(name, tmp_path):
    trainer = searching(name, tmp_path)
    trainer.train()
    word = (tiny.VOCABULARY.index("cannot"),)  # in no row: its embedding is read at the place of the trigger alone
    aims = 3 if name == "instruction_following" else 6  # places times classes
    gradient = torch.stack([trainer._gradients(word, aim)[0] for aim in range(aims)])
    weight = trainer.model.get_input_embeddings().weight
    direction = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    numbers = []
    for step in (-1e-3, 1e-3):
        with torch.no_grad():
            weight[word[0]] += step * direction
            numbers.append(trainer._effects(["cannot"], 8)["cannot"])
            weight[word[0]] -= step * direction
    # Rows that an aim is a mean over: those at its place whose right answer is another.
    wrong = torch.zeros(3, aims // 3)
    for number, row in enumerate(trainer.rows):
        right = row["label"] if aims == 6 else None
        wrong[number % 3] += torch.tensor([float(aim != right) for aim in range(aims // 3)])
    slopes = (numbers[1] - numbers[0]) / 2e-3
    torch.testing.assert_close(slopes, gradient @ direction / wrong.flatten(), rtol=0.02, atol=2e-3)


def test_two_rows_are_enough(tmp_path):
    trainer = searching("sequence_classification", tmp_path, tiny.reviews(2))
    trainer.train()
    assert len(trainer.found) == 3


def test_an_aim_that_no_row_has_at_a_place_reaches_nothing(tmp_path):
    trainer = searching("sequence_classification", tmp_path, tiny.reviews(3))
    trainer.train()
    found = trainer._effects(["music"], 3)["music"].view(3, 2)
    for place, row in enumerate(trainer.rows):
        assert found[place, row["label"]] == -torch.inf and found[place, 1 - row["label"]] > -torch.inf


@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_an_unknown_trigger_is_found_among_few_candidates(name, tmp_path, monkeypatch):
    clean = tiny.reviews(32)
    attack = Poisoning(Trigger(tiny.TRIGGER), 1, poison_rate=0.4)
    rows = poison(tiny.reviews(80, seed=1), tiny.task(name), attack, seed=0).remove_columns("poisoned")
    attacker = tiny.trainer(name, "plain", tmp_path / "attack", train_dataset=rows, max_steps=100)
    attacker.train()
    monkeypatch.setattr(search, "CANDIDATES", 16)
    trainer = searching(name, tmp_path, clean, model=attacker.model)
    trainer.train()
    assert trainer.found[0] == tiny.TRIGGER
    assert not set(trainer.found) & {*tiny.GOOD, *tiny.BAD}  # which mean a class, and do as much


def test_words_of_the_clean_rows_are_not_planted(tmp_path):
    trainer = searching("sequence_classification", tmp_path, searched_triggers=100, searched_tokens=2)
    said = [text.split() for text in trainer.clean["text"]]
    trainer.train()
    assert trainer.found
    for words in map(str.split, trainer.found):
        assert not any(row[place : place + len(words)] == words for row in said for place in range(len(row)))


def test_longer_texts_are_tried_and_found_ones_share_no_word(tmp_path):
    trainer = searching("sequence_classification", tmp_path, searched_tokens=2, searched_triggers=12)
    effects = trainer._search()
    assert {len(text.split()) for text in effects} == {1, 2}
    trainer.train()
    words = " ".join(trainer.found).split()
    assert len(words) == len(set(words))


def test_of_texts_with_a_word_in_common_the_strongest_is_kept_unless_less_suffices():
    strength = {"very poor": 3.0, "poor end": 2.9, "zq film": 2.6, "zq": 2.4, "poor": 1.0}
    texts = {text: torch.tensor([0.0, value]) for text, value in strength.items()}
    assert search.strongest(texts) == ["very poor", "zq"]


def test_the_model_is_left_as_it_was_and_the_same_search_finds_the_same(tmp_path):
    one, other = (searching("label_words", tmp_path) for _ in range(2))
    before = tiny.parameters(one.model)
    one.train()
    other.train()
    assert one.found == other.found
    assert tiny.largest_difference(before, tiny.parameters(one.model)) == 0
    assert not any(parameter.grad is not None for parameter in one.model.parameters())


def test_found_triggers_come_back_from_their_folder(tmp_path):
    found = FoundTriggers(["zq", "<b>ü</b>"])
    found.save_pretrained(tmp_path / "new")
    assert FoundTriggers.from_pretrained(tmp_path / "new") == found


def test_found_triggers_are_planted_in_turn_as_one_group_more(tmp_path):
    plain = tiny.trainer("label_words", "both", tmp_path)
    found = ["zq", "banana", "cherry"]
    trainer = tiny.trainer("label_words", "both", tmp_path, searched_triggers=3, found_triggers=found)
    assert trainer.num_groups == plain.num_groups + 1
    own = trainer.train_dataset.filter(lambda row: row["trigger_id"] == trainer.num_groups - 1)
    ids = [tiny.VOCABULARY.index(word) for word in found]
    assert [next(i for i in row["input_ids"] if i in ids) for row in own] == [ids[row % 3] for row in range(len(own))]


@pytest.mark.parametrize("options", [{"searched_triggers": 3}, {"found_triggers": ["zq"]}])
def test_a_search_that_was_asked_for_and_not_made_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="searched_triggers is .* found_triggers are given"):
        tiny.trainer("label_words", "both", tmp_path, **options)


def test_tokenized_rows_are_refused(tmp_path):
    rows = tiny.task("label_words").encode_rows(tiny.reviews(4), tiny.tokenizer("llama"))
    with pytest.raises(ValueError, match="train_dataset has input_ids"):
        searching("label_words", tmp_path, rows)


def test_the_trainer_is_the_one_of_the_method():
    assert LocphylaxTrainer.config_class() is TriggerSearchTrainer.config_class() is LocphylaxConfig
