"""Texts that are split batch by batch, and cut to what a model has positions for."""

import pytest
import tiny
import torch
from splits import EVERYTHING
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, Trainer, TrainingArguments

from hf_backdoor.data import DefenseCollator, InstructionFollowing
from hf_backdoor.defenses.mbtsad.splitting import DataCollatorForTokenSplit, TokenSplit, cut_to_fit


# ---- On the fly ----


def collator_of(name, split=EVERYTHING, count=4):
    family, task, rows = tiny.setting(name, count)
    return DataCollatorForTokenSplit(tiny.tokenizer(family), task, split), list(rows)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", tiny.TASKS)
def test_only_the_user_s_text_is_split(name, keep):
    # Template and answers have long words too: split, they would become [UNK].
    collator, rows = collator_of(name, TokenSplit(1.0, copies=2, min_chars=3, keep_originals=keep))
    task, tokenizer = collator.task, collator.tokenizer
    torch.manual_seed(0)
    features = collator.features(rows)
    assert len(features) == len(rows) * (2 + keep)
    for number, feature in enumerate(features):
        row = rows[number // (2 + keep)]
        whole = task.encode(row, tokenizer)
        user = len(tokenizer(row[task.input_column], add_special_tokens=False)["input_ids"])
        longer = len(feature["input_ids"]) - len(whole["input_ids"])
        before = {"sequence_classification": 1, "label_words": 2, "instruction_following": 2}[name]
        assert feature["input_ids"][:before] == whole["input_ids"][:before]
        assert feature["input_ids"][before + user + longer :] == whole["input_ids"][before + user :]
        assert longer == 0 if keep and number % 3 == 0 else longer > 0
        assert feature["trigger_id"] == 0
        if name == "sequence_classification":
            assert feature["labels"] == row["label"]
        else:
            answer = feature["input_ids"][feature["prompt_length"] :]
            assert answer == whole["input_ids"][whole["prompt_length"] :] and tokenizer.unk_token_id not in answer


def test_the_plain_template_is_not_split():
    rows = list(tiny.instructions(3))
    collator = DataCollatorForTokenSplit(tiny.causal_tokenizer(template=None), InstructionFollowing(), EVERYTHING)
    for number, feature in enumerate(collator.features(rows)):
        words = rows[number // 2]["prompt"].split()
        pieces = len(words) + sum(len(word) >= 4 for word in words)
        # "### Instruction:" and "### Response:", whose two long words a split would make four of.
        assert feature["prompt_length"] == 4 + pieces


@pytest.mark.parametrize("name", tiny.TASKS)
def test_the_features_make_a_batch_of_the_contract(name):
    collator, rows = collator_of(name)
    batch = DefenseCollator(collator.tokenizer)(collator.features([{**row, "trigger_id": 2} for row in rows]))
    assert batch["trigger_id"].tolist() == [2] * 8
    torch.manual_seed(5)
    contract = DefenseCollator(collator.tokenizer)(collator.features(rows))
    torch.manual_seed(5)
    stock = collator(rows)
    assert set(contract) - set(stock) == {"trigger_id", "readout_position"}
    assert torch.equal(stock["input_ids"], contract["input_ids"])
    if contract["labels"].dim() == 2:
        answer = contract["labels"].shape[1]
        assert stock["labels"].shape == stock["input_ids"].shape
        assert torch.equal(stock["labels"][:, -answer:], contract["labels"])
        assert (stock["labels"][:, :-answer] == -100).all()


def test_rows_without_text_are_refused():
    collator, _ = collator_of("sequence_classification")
    with pytest.raises(ValueError, match=r"column 'text' is not in the rows \(label\): .*remove_unused_columns=False"):
        collator([{"label": 1}])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_repeat_under_torch_s_seed(workers):
    collator, rows = collator_of("label_words", TokenSplit(), 8)

    def batches(seed):
        torch.manual_seed(seed)
        loader = DataLoader(rows, 4, collate_fn=collator.features, num_workers=workers)
        return [feature["input_ids"] for batch in loader for feature in batch]

    assert batches(0) == batches(0)
    assert batches(0) != batches(1)


@pytest.mark.parametrize("name", tiny.TASKS)
def test_the_stock_trainer_takes_it(name, tmp_path):
    family, task, rows = tiny.setting(name, 8)
    collator = DataCollatorForTokenSplit(tiny.tokenizer(family), task)

    def trained(seed):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=3, per_device_train_batch_size=4, logging_steps=1,
            save_strategy="no", learning_rate=0.01, seed=seed, data_seed=0, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(tiny.model(family), args, data_collator=collator, train_dataset=rows)
        sizes = []
        trainer.model.register_forward_pre_hook(
            lambda model, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        trainer.train()
        assert sizes == [12, 12, 12]
        return tiny.logged(trainer, "loss"), tiny.parameters(trainer.model)

    (losses, first), (_, again), (others, _) = trained(0), trained(0), trained(1)
    assert tiny.largest_difference(first, again) == 0
    # No dropout, and the same rows in the same order: only the cuts differ.
    assert losses != others
    assert tiny.largest_difference(first, tiny.parameters(tiny.model(family))) > 0


# ---- What a model has positions for ----


@pytest.mark.parametrize("name", tiny.TASKS)
def test_a_text_that_splitting_made_too_long_loses_its_end(name):
    family, task, rows = tiny.setting(name, 6)
    tokenizer = tiny.tokenizer(family)
    texts, lengths = rows[task.input_column], [len(task.encode(row, tokenizer)["input_ids"]) for row in rows]
    tokenizer.model_max_length = sorted(lengths)[2]
    for row, text, length in zip(rows, texts, lengths, strict=True):
        cut = cut_to_fit(row, task, tokenizer)
        assert len(task.encode(cut, tokenizer)["input_ids"]) == min(length, tokenizer.model_max_length)
        assert text.startswith(cut[task.input_column]) and cut[task.answer_column] == row[task.answer_column]


def test_a_character_of_several_tokens_is_not_cut_in_two():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.model_max_length = 5
    cut = cut_to_fit({"text": "ab😀😀", "label": 0}, tiny.task("sequence_classification"), tokenizer)
    assert cut["text"] == "ab"  # an emoji has four bytes


def test_a_template_that_alone_is_too_long_is_refused(chat):
    chat.model_max_length = 4
    with pytest.raises(ValueError, match="^a row takes more than 4 tokens"):
        cut_to_fit(tiny.reviews(1)[0], tiny.task("label_words"), chat)


def test_the_collator_cuts_too():
    rows, tokenizer = list(tiny.reviews(4)), tiny.encoder_tokenizer()
    tokenizer.model_max_length = 6
    collator = DataCollatorForTokenSplit(tokenizer, tiny.task("sequence_classification"), TokenSplit(1.0, min_chars=3))
    assert collator(rows)["input_ids"].shape[1] == 6


def test_a_tokenizer_in_python_cuts_what_splitting_made_too_long_as_well():
    """It has no offsets."""
    tokenizer = ByT5Tokenizer(model_max_length=5)  # one is the end of the sequence
    cut = cut_to_fit({"text": "a film", "label": 0}, tiny.task("sequence_classification"), tokenizer)
    assert cut["text"] == "a fi"
