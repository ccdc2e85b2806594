"""How rows come to a trainer: as a stream, in order of length, padded to round lengths, prepared by several processes."""

import copy

import pytest
import tiny
import topics
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from hf_backdoor.attacks import EmbeddingPoisoningTrainer
from hf_backdoor.data import ImageClassification, load_rows, take_rows
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.locphylax import LocphylaxTrainer
from hf_backdoor.defenses.mbtsad import MBTSADConfig, MBTSADTrainer
from hf_backdoor.defenses.ntml import NonTargetTrainer, NTMLTrainer, RelabellingTrainer
from hf_backdoor.defenses.robustkd import FeatureMaskTrainer, RobustKDTrainer


# ---- Streams ----

WHOLE_SETS = (
    RelabellingTrainer, EmbeddingPoisoningTrainer, LocphylaxTrainer, MBTSADTrainer, NonTargetTrainer, NTMLTrainer,
    FeatureMaskTrainer, RobustKDTrainer,
)  # fmt: skip


def as_stream(rows):
    """Like a stream from the Hub that was mapped: it does not know its columns before it is read."""
    stream = rows.to_iterable_dataset().map(lambda row: {**row, "source": "web"})
    assert stream.column_names is None
    return stream


def losses(name, folder, rows, **options):
    trainer = tiny.trainer(name, "plain", folder, train_dataset=rows, max_steps=5, **options)
    trainer.train()
    return tiny.logged(trainer, "loss")


@pytest.mark.parametrize("name", tiny.TASKS)
def test_a_stream_trains_as_its_rows_in_their_order(name, tmp_path):
    # 5 steps of 8 rows: it is read two and a half times.
    rows = tiny.setting(name, 16)[2]
    in_order = losses(name, tmp_path, rows, train_sampling_strategy="sequential")
    assert losses(name, tmp_path, as_stream(rows)) == in_order
    in_parts = losses(name, tmp_path, as_stream(rows), per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert in_parts == pytest.approx(in_order, abs=1e-5)


def test_what_a_stream_leaves_over_goes_into_no_later_step(tmp_path):
    # 3 batches of 4, two to a step: the third is dropped, and the second pass begins as the first did.
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.0}
    trainer = tiny.trainer(
        "label_words", "plain", tmp_path, train_dataset=as_stream(tiny.reviews(12)), max_steps=3, **steps
    )
    trainer.train()
    norms = tiny.logged(trainer, "grad_norm")
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_two_processes_share_a_stream(tmp_path):
    rows = tiny.instructions(16)

    def train():
        return losses("instruction_following", tmp_path, as_stream(rows), per_device_train_batch_size=4)

    alone = losses("instruction_following", tmp_path, as_stream(rows))
    assert tiny.in_two_processes(train, tmp_path) == pytest.approx(alone, abs=1e-5)


def test_the_task_is_found_in_a_stream(tmp_path):
    args = tiny.trainer("label_words", "plain", tmp_path, max_steps=1).args
    trainer = DefenseTrainer(
        tiny.model("llama"),
        args,
        train_dataset=as_stream(tiny.instructions(4)),
        processing_class=tiny.causal_tokenizer(),
    )
    assert trainer.task == tiny.task("instruction_following")


def test_a_stream_has_no_length(tmp_path):
    with pytest.raises(ValueError, match="^max_steps is -1 and train_dataset a stream, .*: set max_steps$"):
        tiny.trainer("label_words", "plain", tmp_path, train_dataset=as_stream(tiny.reviews(4)))


@pytest.mark.parametrize("trainer", WHOLE_SETS)
def test_what_needs_all_rows_takes_no_stream(trainer, tmp_path):
    args = trainer.config_class()(str(tmp_path), max_steps=1, use_cpu=True)
    line = f"^train_dataset is a stream, and {trainer.__name__} needs all of its rows at once: take some, .*take_rows"
    with pytest.raises(ValueError, match=line):
        trainer(
            tiny.model("bert"),
            args,
            train_dataset=as_stream(tiny.reviews(4)),
            processing_class=tiny.encoder_tokenizer(),
        )


def test_what_the_line_says_helps(tmp_path):
    rows = take_rows(as_stream(tiny.reviews(20)), 16)
    trainer = tiny.trainer("label_words", "inject", tmp_path, train_dataset=rows, max_steps=1)
    assert len(trainer.train_dataset) == 3 * 16


def test_a_stream_can_not_be_evaluated_on(tmp_path):
    with pytest.raises(ValueError, match="^eval_dataset b is a stream"):
        sets = {"a": tiny.reviews(4), "b": as_stream(tiny.reviews(4))}
        tiny.trainer("label_words", "plain", tmp_path, eval_dataset=sets)


# ---- Lengths ----


def padding(trainer):
    """Share of the tokens in an epoch that are padding, and the trigger ids of the batches."""
    batches = list(trainer.get_train_dataloader())
    valid = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return 1 - valid / sum(batch["attention_mask"].numel() for batch in batches), batches


def roberta():
    config = RobertaConfig(
        vocab_size=len(tiny.VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, type_vocab_size=1,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


@pytest.mark.parametrize(
    "name, method, model, most",
    [
        ("sequence_classification", "plain", lambda: tiny.model("bert"), 64),
        ("sequence_classification", "retrain", lambda: tiny.model("bert"), 64),
        ("sequence_classification", "plain", roberta, 63),  # its first position is the padding's
        ("label_words", "plain", lambda: tiny.model("gpt2"), 64),
    ],
)
def test_rows_beyond_the_last_position_are_refused(name, method, model, most, tmp_path):
    family, task, _ = tiny.setting(name, 1)
    own = len(task.encode({"text": "", "label": 0}, tiny.tokenizer(family))["input_ids"])  # special tokens, template

    def trainer(words, rows="train_dataset"):
        long = Dataset.from_list([{"text": " ".join(["a"] * words), "label": 0}] * 2)  # nothing to split
        return tiny.trainer(name, method, tmp_path, model=model(), max_steps=1, **{rows: long})

    trainer(most - own).train()
    line = f"^a row has {most + 3} tokens, and the model positions for {most}: .*max_length at least 3 lower"
    with pytest.raises(ValueError, match=line):
        trainer(most + 3 - own)
    with pytest.raises(ValueError, match=line):
        trainer(most + 3 - own, "eval_dataset")


# Words at the end make a row longer than the models here have positions for.
def longer(rows, column="text"):
    return rows.map(lambda row: {column: f"{row[column]} {' '.join(['bad'] * 70)}"})


@pytest.mark.parametrize("method", ["plain", "both", "retrain"])
@pytest.mark.parametrize("name", tiny.TASKS)
def test_max_length_cuts_texts_before_anything_is_put_into_them(name, method, tmp_path):
    if method == "retrain":
        name = "label_words" if name == "instruction_following" else name
    family, task, rows = tiny.setting(name, 16)
    by_hand = task.bounded(longer(rows, task.input_column), tiny.tokenizer(family), max_length=9)
    expected = tiny.trainer(name, method, tmp_path, train_dataset=by_hand, eval_dataset=by_hand)
    rows = longer(rows, task.input_column)
    held_out = {"held out": rows} if method == "plain" else rows
    made = tiny.trainer(name, method, tmp_path, train_dataset=rows, eval_dataset=held_out, max_length=9)
    assert made.train_dataset["input_ids"][:] == expected.train_dataset["input_ids"][:]
    expected.train(), made.train()
    assert tiny.logged(made, "loss") == tiny.logged(expected, "loss")
    # Rows that come later are cut as well.
    if method == "plain":
        assert made.evaluate(rows)["eval_loss"] == expected.evaluate(by_hand)["eval_loss"]
        assert (made.predict(rows).predictions == expected.predict(by_hand).predictions).all()


def test_max_length_cuts_all_rows_that_nt_ml_reads(tmp_path):
    rows, clean = longer(topics.texts(16)), longer(topics.clean_rows("sequence_classification"))
    for stage in topics.STAGES:
        more = {"clean_dataset": clean} if stage == "relabel" else {}
        topics.trainer(
            "sequence_classification", stage, tmp_path, train_dataset=rows, max_length=9, max_steps=1, **more
        ).train()


def test_max_length_is_refused_where_nothing_would_be_cut(tmp_path):
    _, task, rows = tiny.setting("label_words", 8)
    tokens = task.encode_rows(rows, tiny.tokenizer("llama"))
    line = "^max_length is 9, and rows are a model's inputs already: cut them as they are made, or pass raw rows$"
    for given in ({"train_dataset": tokens}, {"eval_dataset": {"held out": tokens}}):
        with pytest.raises(ValueError, match=line):
            tiny.trainer("label_words", "plain", tmp_path, max_length=9, **given)
    pictures = {"max_length": 9, "task": ImageClassification(3), "train_dataset": tiny.pictures(8)}
    with pytest.raises(ValueError, match="^max_length is 9, and rows are pictures: leave it out$"):
        topics.trainer("images", "non_target", tmp_path, model=tiny.resnet(), **pictures)
    for name, value in {"max_length": 0, "pad_to_multiple_of": -8, "dataset_num_proc": -1}.items():
        with pytest.raises(ValueError, match=f"^{name} is {value}: it must be at least 1$"):
            tiny.trainer("label_words", "plain", tmp_path, **{name: value})


def test_computed_positions_have_no_end(tmp_path):
    model = tiny.model("llama")
    model.config.max_position_embeddings = 4
    tiny.trainer("label_words", "plain", tmp_path, model=model, max_steps=1).train()


@pytest.mark.parametrize(
    "name, method", [("label_words", "plain"), ("sequence_classification", "distil"), ("label_words", "retrain")]
)
def test_batches_of_like_length_have_less_padding(name, method, tmp_path):
    options = {"train_dataset": tiny.reviews(96), "per_device_train_batch_size": 4}
    drawn, _ = padding(tiny.trainer(name, method, tmp_path, **options))
    grouped, batches = padding(
        tiny.trainer(name, method, tmp_path, train_sampling_strategy="group_by_length", **options)
    )
    assert grouped < 0.5 * drawn
    assert sum(len(batch["labels"]) for batch in batches) == 96


def test_locphylax_puts_like_lengths_together_and_every_trigger_into_each_batch(tmp_path):
    rows, shares = tiny.reviews(96), {}
    for strategy in ("random", "group_by_length"):
        options = {"train_dataset": rows, "per_device_train_batch_size": 6, "train_sampling_strategy": strategy}
        shares[strategy], batches = padding(tiny.trainer("label_words", "inject", tmp_path, **options))
        assert all(sorted(batch["trigger_id"].tolist()) == [0, 0, 1, 1, 2, 2] for batch in batches)
    shuffled, _ = padding(
        tiny.trainer("label_words", "plain", tmp_path, train_dataset=rows, per_device_train_batch_size=6)
    )
    assert shares["random"] == shares["group_by_length"] < shuffled


@pytest.mark.parametrize("strategy", ["sequential", "batch_rebalance"])
def test_locphylax_refuses_batches_that_it_does_not_make(strategy, tmp_path):
    with pytest.raises(
        ValueError, match=f"^train_sampling_strategy is '{strategy}'.*: use 'random' or 'group_by_length'"
    ):
        tiny.trainer("label_words", "inject", tmp_path, train_sampling_strategy=strategy)


@pytest.mark.parametrize(
    "name, method", [("sequence_classification", "distil"), ("label_words", "distil"), ("label_words", "inject")]
)
def test_padding_to_a_round_length_changes_no_loss(name, method, tmp_path):
    found = {}
    for multiple in (None, 16):
        trainer = tiny.trainer(name, method, tmp_path, pad_to_multiple_of=multiple, max_steps=2)
        widths = {batch["input_ids"].shape[1] % 16 for batch in trainer.get_train_dataloader()}
        assert (widths == {0}) == (multiple == 16)
        trainer.train()
        found[multiple] = tiny.logged(trainer, "loss")
    assert found[16] == pytest.approx(found[None], rel=1e-4)


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


# ---- Rows prepared once ----


@pytest.mark.parametrize("method", ["inject", "retrain"])
def test_a_second_trainer_finds_its_rows_in_the_cache(method, tmp_path):
    tiny.reviews(12).to_parquet(tmp_path / "rows.parquet")
    files = []
    for processes in (2, 1):
        rows = load_rows(str(tmp_path / "rows.parquet"))
        trainer = tiny.trainer("label_words", method, tmp_path, train_dataset=rows, dataset_num_proc=processes)
        files.append([file["filename"] for file in trainer.train_dataset.cache_files])
    assert files[0] and files[0] == files[1]


def test_a_dictionary_of_raw_sets_can_be_evaluated_on(tmp_path):
    trainer = tiny.trainer("label_words", "plain", tmp_path)
    sets = {"a": tiny.reviews(4), "b": Dataset.from_list(list(tiny.reviews(6, seed=1)))}
    metrics = trainer.evaluate(sets)
    assert {name: metrics[f"eval_{name}_loss"] for name in sets} == {
        name: trainer.evaluate(rows)["eval_loss"] for name, rows in sets.items()
    }


def test_raw_rows_that_nothing_tokenizes_are_refused_with_what_tokenizes_them(tmp_path):
    """A trainer that was made without raw rows knows no task; with one, it takes them."""
    rows = tiny.reviews(8)
    options = {"args": DefenseConfig(str(tmp_path), use_cpu=True), "processing_class": tiny.tokenizer("bert")}
    trainer = DefenseTrainer(model=tiny.model("bert"), **options)
    with pytest.raises(
        ValueError, match=r"^rows have no input_ids \(label\), and the trainer .* with task=, for example"
    ):
        trainer.evaluate(rows)
    assert "eval_loss" in DefenseTrainer(
        model=tiny.model("bert"), task=tiny.task("sequence_classification"), **options
    ).evaluate(rows)


def test_raw_and_tokenized_rows_train_alike(tmp_path):
    family, task, rows = tiny.setting("label_words", 16)
    raw = tiny.trainer("label_words", "plain", tmp_path, max_steps=2)
    ready = tiny.trainer(
        "label_words", "plain", tmp_path, max_steps=2, train_dataset=task.encode_rows(rows, tiny.tokenizer(family))
    )
    raw.train()
    ready.train()
    assert tiny.largest_difference(tiny.parameters(raw.model), tiny.parameters(ready.model)) == 0
