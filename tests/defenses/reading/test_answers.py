import pytest
import tiny
import torch

from hf_backdoor.defenses.locphylax import LocphylaxConfig
from hf_backdoor.defenses.losses import soft_answer_loss
from hf_backdoor.defenses.reading import OwnAnswers, OwnAnswersTrainer, answers


FAMILIES = dict(zip(tiny.TASKS, ("bert", "llama", "llama"), strict=True))
PLAIN = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 2}


def read_off(name, folder, rows=None, **options):
    """The answers of a fresh model to the rows that `tiny.trainer` trains on."""
    config = LocphylaxConfig(
        str(folder), own_answers=1.0, use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=5, **options
    )  # fmt: skip
    trainer = OwnAnswersTrainer(
        model=tiny.model(FAMILIES[name], 5), args=config, train_dataset=rows or tiny.setting(name, 16)[2],
        processing_class=tiny.tokenizer(FAMILIES[name]), task=tiny.task(name),
    )  # fmt: skip
    trainer.train()
    return trainer


def recovering(name, folder, **options):
    own = options.pop("own") if "own" in options else read_off(name, folder).found
    return tiny.trainer(name, "recover", folder, **{"found_answers": own, "own_answers": 1.0, **PLAIN, **options})


# ---- The loss ----


def test_the_loss_is_the_mean_over_answer_tokens_of_each_distribution_s_cross_entropy():
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 4, 7), torch.stack([torch.randperm(7)[:3] for _ in range(12)]).view(3, 4, 3)
    probabilities = torch.rand(3, 4, 3).softmax(dim=-1)
    lengths = [4, 2, 1]
    for row, length in enumerate(lengths):
        probabilities[row, : 4 - length] = 0
    expected = []
    for row, length in enumerate(lengths):
        total = 0.0
        for token in range(4 - length, 4):
            norm = sum(logits[row, token, word].exp() for word in range(7))
            for place in range(3):
                chosen = logits[row, token, ids[row, token, place]]
                total -= probabilities[row, token, place] * (chosen.exp() / norm).log()
        expected.append(total / length)
    assert torch.allclose(soft_answer_loss(logits, ids, probabilities), torch.stack(expected), atol=1e-6)


# ---- Reading ----


@pytest.mark.parametrize("name", tiny.TASKS)
def test_what_is_read_is_what_the_model_says(name, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "KEPT", 3)
    monkeypatch.setattr(answers, "aligned", lambda found, right: found)
    trainer = read_off(name, tmp_path)
    assert len(trainer.found) == 16
    for row, (ids, probabilities) in zip(trainer.clean, trainer.found.rows(), strict=True):
        features = trainer.task.encode(row, trainer.processing_class)
        batch = trainer.data_collator([features])
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=batch["input_ids"]).logits[0]
        if "prompt_length" in features:
            logits = logits[features["prompt_length"] - 1 : -1]
        expected = logits.view(-1, logits.shape[-1]).softmax(dim=-1).sort(dim=-1, descending=True)
        kept = min(3, logits.shape[-1])
        assert torch.equal(ids, expected.indices[:, :kept].int())
        shares = expected.values[:, :kept] / expected.values[:, :kept].sum(dim=-1, keepdim=True)
        assert torch.allclose(probabilities, shares, atol=1e-6)


def test_each_class_is_answered_as_often_as_it_is_right():
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(5)[:4] for _ in range(40)]).int()  # each row has left one out
    said = OwnAnswers(ids, (3 * torch.randn(40, 4)).softmax(dim=1), torch.ones(40, dtype=torch.long))
    right = torch.multinomial(torch.tensor([1.0, 1, 2, 3, 9]), 40, replacement=True)
    found = answers.aligned(said, right)
    assert torch.allclose(found.probabilities.sum(dim=1), torch.ones(40))
    shifts = {}
    for row in range(40):
        change = (found.probabilities[row] / said.probabilities[row]).log()
        for place in range(1, 4):
            pair = (ids[row, 0].item(), ids[row, place].item())
            shifts.setdefault(pair, []).append((change[place] - change[0]).item())
    # One number between two classes, in whatever row.
    assert len(shifts) > 10 and all(max(each) - min(each) < 1e-4 for each in shifts.values())
    counted = (ids == right[:, None]).any(dim=1)
    assert not counted.all()
    for word in range(5):
        share = found.probabilities[counted][ids[counted] == word].sum().item()
        assert share == pytest.approx((right[counted] == word).sum().item(), abs=1e-3)


@pytest.mark.parametrize("kept", [True, False])
def test_shares_that_can_not_be_put_right_leave_numbers(kept):
    # Class 1 is right in all rows, and was kept in one of them, or in none.
    ids = torch.tensor([[0, 1 if kept and row == 0 else 2] for row in range(40)], dtype=torch.int32)
    said = OwnAnswers(ids, torch.tensor([[1.0, 0.0]] * 40), torch.ones(40, dtype=torch.long))
    found = answers.aligned(said, torch.ones(40, dtype=torch.long)).probabilities
    assert torch.allclose(found.sum(dim=1), torch.ones(40)) and torch.equal(found[1:], said.probabilities[1:])


@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_a_reader_puts_the_shares_of_the_classes_right(name, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "KEPT", 1000)  # a fresh model thinks of other words first
    rows = tiny.reviews(24).select([row for row in range(24) if row % 2 or row < 8])  # 4 of label 0, 12 of label 1
    trainer = read_off(name, tmp_path, rows)
    shares = torch.zeros(len(trainer.processing_class))
    shares.index_add_(0, trainer.found.ids.flatten(), trainer.found.probabilities.flatten() / 16)
    words = range(2) if name == "sequence_classification" else trainer.task.word_ids(trainer.processing_class)
    assert shares[list(words)].tolist() == pytest.approx([0.25, 0.75], abs=0.01)


def test_they_come_back_from_their_folder(tmp_path):
    trainer = read_off("instruction_following", tmp_path)
    trainer.save_model(str(tmp_path / "read"))
    again = OwnAnswers.from_pretrained(tmp_path / "read")
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(trainer.found).items())


def test_zero_3_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ValueError, match="^own_answers is set, and DeepSpeed ZeRO-3 .* set own_answers: 0$"):
        read_off("label_words", tmp_path)


# ---- Recovery ----


@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_at_1_no_label_is_needed(name, tmp_path):
    rows = tiny.reviews(16)
    flipped = rows.map(lambda row: {"label": 1 - row["label"]}, load_from_cache_file=False)

    def trained(rows, weight):
        own = read_off(name, tmp_path, rows).found
        trainer = recovering(name, tmp_path, own=own, train_dataset=rows, own_answers=weight)
        trainer.train()
        return tiny.parameters(trainer.model)

    assert tiny.largest_difference(trained(rows, 1.0), trained(flipped, 1.0)) < 1e-6
    assert tiny.largest_difference(trained(rows, 0.5), trained(flipped, 0.5)) > 1e-4


@pytest.mark.parametrize("name", tiny.TASKS)
def test_a_model_goes_over_to_the_suspect_s_answers(name, tmp_path):
    trainer = recovering(name, tmp_path, max_steps=30, learning_rate=0.02, optim="adamw_torch")
    trainer.train()
    losses = tiny.logged(trainer, "loss")
    entropy = -sum((p * p.clamp(min=1e-9).log()).sum(dim=1).mean() for _, p in trainer.answers.rows()) / 16
    assert losses[0] - entropy > 0
    assert losses[-1] - entropy < 0.5 * (losses[0] - entropy)


@pytest.mark.parametrize("name", tiny.TASKS)
def test_accumulation_and_two_processes_change_nothing(name, tmp_path):
    own = read_off(name, tmp_path).found
    # A fresh encoder says nearly the same of all rows.
    rate = 1.0 if name == "sequence_classification" else 0.1
    tiny.assert_trains_alike(
        lambda **options: recovering(name, tmp_path, own=own, learning_rate=rate, **options), tmp_path
    )


def test_both_stages_in_one_train_and_held_out_rows(tmp_path):
    own = read_off("label_words", tmp_path).found
    trainer = tiny.trainer(
        "label_words", "both", tmp_path, found_answers=own, own_answers=0.5, eval_dataset=tiny.reviews(6), **PLAIN
    )
    trainer.train()
    assert "answer_ids" in trainer.train_dataset.column_names
    assert trainer.evaluate()["eval_known_loss"] > 0


def test_answers_that_were_asked_for_and_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^own_answers is 1.0, and found_answers are not given: .*own_answers: 0$"):
        recovering("label_words", tmp_path, own=None)
    with pytest.raises(ValueError, match="^own_answers is 0.0, and found_answers are given: .*own_answers: 0$"):
        recovering("label_words", tmp_path, own_answers=0.0)


def test_answers_to_other_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^found_answers has answers to 5 rows, which are not the clean rows given"):
        recovering("label_words", tmp_path, own=read_off("label_words", tmp_path, tiny.reviews(5)).found)
    others = tiny.instructions(16, seed=9)
    with pytest.raises(
        ValueError, match="^found_answers has an answer of . tokens to clean row .*, whose right one has"
    ):
        recovering("instruction_following", tmp_path, own=read_off("instruction_following", tmp_path, others).found)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_of_0_to_1_is_refused(share, tmp_path):
    with pytest.raises(ValueError, match=f"^own_answers is {share}: choose a share from 0 to 1$"):
        LocphylaxConfig(str(tmp_path), own_answers=share)
