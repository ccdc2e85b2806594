import math
import re
from collections import Counter

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_backdoor.data import DefenseCollator, InstructionFollowing
from hf_backdoor.defenses.mbtsad.splitting import DataCollatorForTokenSplit, TokenSplit, cut_to_fit, short_pieces


WORDS = "lovely morning garden window summer silver planet bridge"
EVERYTHING = TokenSplit(rate=1.0, copies=2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pieces_of(text, split):
    """The two pieces of each word that was cut. Written for texts of single spaces, without punctuation."""
    after, cut = split.split(" "), []
    for word in text.split(" "):
        first = after.pop(0)
        if first != word:
            cut.append((first, after.pop(0)))
            assert "".join(cut[-1]) == word
    assert not after
    return cut


# ---- How many words ----


@pytest.mark.parametrize("rate, words", [(0.3, 1), (0.3, 7), (0.3, 10), (0.3, 11), (0.5, 4), (1.0, 6), (0.07, 100)])
def test_a_share_of_the_words_is_cut_rounded_up(rate, words):
    text = " ".join(["garden"] * words)
    expected = {(0.3, 1): 1, (0.3, 7): 3, (0.3, 10): 3, (0.3, 11): 4, (0.5, 4): 2, (1.0, 6): 6, (0.07, 100): 7}
    assert len(pieces_of(text, TokenSplit(rate).split(text, seeded()))) == expected[rate, words]


def test_short_words_count_but_are_not_cut():
    text = "a to the of garden summer it is so he"
    for seed in range(20):
        cut = pieces_of(text, TokenSplit(0.3).split(text, seeded(seed)))
        assert ["".join(pieces) for pieces in cut] == ["garden", "summer"]  # three are asked for, two are long enough


@pytest.mark.parametrize("shortest, expected", [(3, 4), (4, 3), (5, 2), (6, 1), (7, 0)])
def test_the_shortest_word_that_is_cut(shortest, expected):
    text = "to the film plots garden"
    split = TokenSplit(1.0, min_chars=shortest).split(text, seeded())
    assert len(pieces_of(text, split)) == expected


def test_a_limit_on_the_words_of_a_text():
    text = " ".join(["garden"] * 230)
    assert len(pieces_of(text, TokenSplit().split(text, seeded()))) == 69
    assert len(pieces_of(text, TokenSplit(max_words=10).split(text, seeded()))) == 10
    assert len(pieces_of(WORDS, TokenSplit(max_words=10).split(WORDS, seeded()))) == 3


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "a", "the of", "?!", "... --- ..."])
def test_texts_without_a_word_to_cut_stay(text):
    assert EVERYTHING.split(text, seeded()) == text


def test_a_text_of_one_word_is_cut():
    cuts = {TokenSplit(0.01).split("beauty", seeded(seed)) for seed in range(60)}
    assert cuts == {"b eauty", "be auty", "bea uty", "beau ty"}


def test_rate_0_changes_nothing():
    assert TokenSplit(0.0).split(WORDS, seeded()) == WORDS


# ---- Where ----


def test_cuts_are_uniform_and_leave_one_and_two_characters():
    generator, draws = seeded(), 3000
    found = Counter(EVERYTHING.split("abcdefgh", generator).index(" ") for _ in range(draws))
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    # Five standard deviations of a binomial count.
    assert all(abs(count - draws / 6) < 5 * math.sqrt(draws * 5 / 36) for count in found.values())


def test_each_word_is_drawn_as_often_as_any_other():
    generator, draws = seeded(), 2000
    found = Counter(
        "".join(pieces) for _ in range(draws) for pieces in pieces_of(WORDS, TokenSplit(0.25).split(WORDS, generator))
    )
    assert sum(found.values()) == 2 * draws and len(found) == 8  # twice without replacement from eight
    assert all(abs(count - draws / 4) < 5 * math.sqrt(draws * 3 / 16) for count in found.values())


def test_white_space_and_punctuation_stay():
    text = "  (lovely),\t\tplanet-summer:\n\u00a0don't\r\n <bridge>!  "
    piece = r"\w+ \w{2,}"
    expected = rf"  \({piece}\),\t\t{piece}-{piece}:\n\u00a0don't\r\n <{piece}>!  "
    for seed in range(20):
        split = EVERYTHING.split(text, seeded(seed))
        assert re.fullmatch(expected, split)
        assert split.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("word", ["прекрасный", "हिन्दी", "映画館内", "naïveté", "😀😀😀😀", "שלום"])
def test_words_of_every_script_are_cut(word):
    (left, right), *others = pieces_of(word, EVERYTHING.split(word, seeded()))
    assert not others and len(left) >= 1 and len(right) >= 2


def test_letters_that_look_like_markup_are_text():
    text = "{text} \\g<0> %s {{prompt}}"
    assert EVERYTHING.split(text, seeded()).replace(" ", "") == text.replace(" ", "")


# ---- Banned pieces ----


@pytest.mark.parametrize(
    "text, cuts", [("bomb", ["b omb", "bo mb"]), ("(bomb),", ["(b omb),", "(bo mb),"]), ("BOMB", ["B OMB", "BO MB"])]
)
def test_a_banned_piece_is_never_made(text, cuts):
    assert {EVERYTHING.split(text, seeded(seed)) for seed in range(40)} == set(cuts)
    without = TokenSplit(1.0, banned_pieces=["Mb"])
    assert {without.split(text, seeded(seed)) for seed in range(40)} == {cuts[0]}


def test_a_left_part_is_banned_too():
    assert {TokenSplit(banned_pieces=("mb",)).split("mbing", seeded(seed)) for seed in range(40)} == {
        "m bing",
        "mbi ng",
    }


def test_a_word_whose_cuts_are_all_banned_leaves_its_turn_to_another():
    split = TokenSplit(0.1, banned_pieces=["b", "mb"])
    assert split.split("bomb", seeded()) == "bomb"
    for seed in range(20):
        assert pieces_of("bomb garden", split.split("bomb garden", seeded(seed)))[0][0] not in ("b", "bo")


# ---- Chance ----


def test_chance_comes_from_the_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = TokenSplit().split(WORDS, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert TokenSplit().split(WORDS, seeded(1)) == first
    assert len({TokenSplit().split(WORDS, seeded(seed)) for seed in range(20)}) > 10


def test_without_a_generator_torch_s_own_is_drawn_from():
    torch.manual_seed(3)
    first = [TokenSplit().split(WORDS) for _ in range(5)]
    torch.manual_seed(3)
    assert [TokenSplit().split(WORDS) for _ in range(5)] == first
    assert len(set(first)) > 1


# ---- Data sets ----


@pytest.mark.parametrize("keep", [False, True])
def test_apply_makes_copies_in_the_row_s_place(keep):
    rows = (
        tiny.reviews(6).add_column("trigger_id", [0, 1, 2, 0, 1, 2]).cast_column("label", ClassLabel(names=["-", "+"]))
    )
    split = TokenSplit(1.0, copies=3, keep_originals=keep).apply(rows, "text", 7)
    factor = 3 + keep
    assert len(split) == 6 * factor and split.features == rows.features
    for name in ("label", "trigger_id"):
        assert split[name][:] == [value for value in rows[name] for _ in range(factor)]
    for row, text in enumerate(rows["text"]):
        versions = split["text"][row * factor : (row + 1) * factor]
        assert (versions[0] == text) == keep
        for version in versions[keep:]:
            # Every word of four letters or more, and nothing else.
            assert ["".join(pieces) for pieces in pieces_of(text, version)] == re.findall(r"\w{4,}", text)
        assert len(set(versions)) > 1
    assert rows["text"][:] == tiny.reviews(6)["text"][:]


def test_apply_to_prompts_leaves_the_responses():
    rows = tiny.instructions(5)
    split = EVERYTHING.apply(rows, "prompt", 0)
    assert split["response"][:] == [response for response in rows["response"] for _ in range(2)]
    assert not set(split["prompt"]) & set(rows["prompt"])


def test_apply_depends_on_seed_and_text_alone():
    rows, split = tiny.reviews(12), TokenSplit(copies=2)
    state = torch.get_rng_state()
    whole = split.apply(rows, "text", 0)["text"][:]
    assert torch.equal(torch.get_rng_state(), state)
    assert split.apply(rows, "text", 0)["text"][:] == whole
    assert split.apply(rows, "text", 1)["text"][:] != whole
    fewer = split.apply(rows.select([1, 9, 4]), "text", 0)["text"][:]
    assert fewer == [whole[at] for row in (1, 9, 4) for at in (2 * row, 2 * row + 1)]


def test_rate_0_gives_as_many_plain_rows():
    rows = tiny.reviews(4)
    split = TokenSplit(0.0, copies=3).apply(rows, "text", 0)
    assert split["text"][:] == [text for text in rows["text"] for _ in range(3)]


def test_apply_to_no_rows():
    rows = tiny.reviews(3).select([])
    split = TokenSplit().apply(rows, "text", 0)
    assert len(split) == 0 and split.column_names == ["text", "label"]


def test_apply_needs_the_column():
    with pytest.raises(ValueError, match=r"column 'prompt' is not in the data set \(text, label\)"):
        TokenSplit().apply(tiny.reviews(2), "prompt", 0)


# ---- Short pieces ----


def of_texts(*texts):
    return Dataset.from_dict({"text": list(texts)})


def test_short_pieces_are_those_that_splitting_made():
    original = of_texts("the (bomb), mb so", "a comb THE fairest")
    split = of_texts("the (bo mb), mb so", "the (b omb), mb so", "a co mb THE fai rest", "a com b THE fairest")
    # "the", "so" and the "mb" of the first text stood there before; "rest" is too long.
    counted = short_pieces(original, split, "text")
    assert counted == {"b": 2, "mb": 2, "bo": 1, "co": 1, "com": 1, "fai": 1, "omb": 1}
    assert list(counted)[:3] == ["b", "mb", "bo"]
    assert short_pieces(original, split, "text", longest=1) == {"b": 2}


def test_short_pieces_are_counted_whatever_their_case():
    assert short_pieces(of_texts("BOMB bomb"), of_texts("BO MB bo mb"), "text") == {"bo": 2, "mb": 2}


def test_a_short_word_that_is_cut_counts():
    assert short_pieces(of_texts("the he"), of_texts("t he he"), "text") == {"t": 1, "he": 1}


def test_the_report_shows_what_a_ban_takes_away():
    rows = of_texts(*["the bomb and the comb were plumb"] * 30)
    free = short_pieces(rows, TokenSplit(1.0, keep_originals=True).apply(rows, "text", 0), "text")
    assert free["mb"] > 10
    banned = TokenSplit(1.0, banned_pieces=["mb"]).apply(rows, "text", 0)
    assert short_pieces(rows, banned, "text")["mb"] == 0


def test_short_pieces_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="split has 3 rows, no multiple of the 2 of original"):
        short_pieces(of_texts("a", "b"), of_texts("a", "b", "c"), "text")
    with pytest.raises(ValueError, match="split row 1 does not hold the word 'film'"):
        short_pieces(of_texts("the film"), of_texts("the fi lm", "the plot"), "text")
    assert short_pieces(of_texts(), of_texts(), "text") == {}


# ---- Arguments ----


@pytest.mark.parametrize(
    "arguments, line",
    [
        ({"rate": 1.1}, "split_rate is 1.1: choose a share from 0 to 1"),
        ({"rate": -0.1}, "split_rate is -0.1"),
        ({"rate": math.nan}, "split_rate is nan"),
        ({"copies": 0}, "split_copies is 0: choose a whole number, 1 or more"),
        ({"copies": 1.5}, "split_copies is 1.5"),
        ({"min_chars": 2}, "split_min_chars is 2: choose 3 or more"),
        ({"max_words": 0}, "split_max_words is 0: choose 1 or more, or null"),
        ({"banned_pieces": "mb"}, r"split_banned_pieces is 'mb': give a list, \['mb'\]"),
        ({"banned_pieces": ["mb", "no way"]}, "split_banned_pieces has 'no way': give single words"),
        ({"banned_pieces": [""]}, "split_banned_pieces has ''"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, line):
    with pytest.raises(ValueError, match=line) as error:
        TokenSplit(**arguments)
    assert "\n" not in str(error.value)


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
    tokenizer = byte_tokenizer()
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


def byte_tokenizer():
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)
