"""What a script that was written for `Trainer` passes: taken, or refused in one line before anything is trained."""

import pytest
import robust
import tiny
import topics
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    T5Config,
    T5ForSequenceClassification,
    TrainingArguments,
)

from hf_backdoor.defenses import DefenseConfig, DefenseTrainer


NAME = "sequence_classification"
LORA = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")


def plain(folder, **options):
    return tiny.trainer("sequence_classification", "plain", folder, max_steps=2, **options)


def script(folder, rows, family="bert", **options):
    """As in anybody's script: no task."""
    args = DefenseConfig(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1)
    given = {"model": tiny.model(family), "train_dataset": rows, "processing_class": tiny.tokenizer(family)}
    return DefenseTrainer(args=args, **{**given, **options})


# ---- The model ----


@pytest.mark.parametrize("model", ["me/suspect", None])
def test_a_name_is_no_model(model, tmp_path):
    with pytest.raises(ValueError, match="^model is .*: pass the model itself"):
        script(tmp_path, tiny.reviews(4), model=model)


def test_a_name_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"^processing_class is 'me/suspect': pass the tokenizer \(or image"):
        script(tmp_path, tiny.reviews(4), processing_class="me/suspect")


def test_an_adapter_over_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^peft_config is given, and model has an adapter.*: leave peft_config out"):
        plain(tmp_path, model=get_peft_model(tiny.model("bert"), LORA), peft_config=LORA)


@pytest.mark.parametrize("method", ["plain", "both", "mbtsad"])
def test_a_model_of_which_nothing_would_be_trained_is_refused(method, tmp_path):
    get_peft_model(tiny.model("bert"), LORA).save_pretrained(tmp_path / "adapter")
    suspect = PeftModel.from_pretrained(tiny.model("bert"), tmp_path / "adapter")  # is_trainable is False
    trainer = tiny.trainer("sequence_classification", method, tmp_path, model=suspect)
    with pytest.raises(ValueError, match="^no weight of the model has requires_grad, .*is_trainable=True"):
        trainer.train()


@pytest.mark.parametrize("method", ["inject", "distil"])
def test_an_encoder_with_a_decoder_is_refused_before_it_is_trained(method, tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=len(tiny.VOCABULARY), **sizes, pad_token_id=0, eos_token_id=3, num_labels=2)
    with pytest.raises(ValueError, match="^T5ForSequenceClassification has an encoder and a decoder"):
        tiny.trainer("sequence_classification", method, tmp_path, model=T5ForSequenceClassification(config))


def test_an_encoder_with_a_decoder_that_generates_is_refused(tmp_path):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = BartConfig(vocab_size=len(tiny.VOCABULARY), **sizes, encoder_attention_heads=4, decoder_attention_heads=4)
    with pytest.raises(ValueError, match="^BartForConditionalGeneration has an encoder and a decoder"):
        tiny.trainer("instruction_following", "plain", tmp_path, model=BartForConditionalGeneration(config))


def test_attention_that_gives_no_queries_is_refused_before_retraining(tmp_path):
    model = tiny.model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="^attn_implementation is 'eager', which gives no queries and keys"):
        tiny.trainer("label_words", "mbtsad", tmp_path, model=model)


# ---- Rows ----


class Rows(torch.utils.data.Dataset):
    """What tutorials make of a tokenizer's output."""

    def __init__(self, count=16):
        rows = tiny.reviews(count)
        self.encodings = tiny.encoder_tokenizer()(rows["text"][:], padding=True)
        self.labels = rows["label"][:]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.encodings.items()} | {"labels": self.labels[row]}


@pytest.mark.parametrize(
    "rows, kind",
    [
        (list(tiny.reviews(4)), "list"),
        (Rows(4), "Rows"),
        (DatasetDict(train=tiny.reviews(4), test=tiny.reviews(4)), "DatasetDict"),
    ],
)
def test_rows_that_have_no_columns_are_refused(rows, kind, tmp_path):
    with pytest.raises(ValueError, match=f"^rows are a {kind}: pass a datasets.Dataset"):
        script(tmp_path, rows)


def test_with_a_collator_of_its_own_anything_can_be_trained_on(tmp_path):
    tokenizer = tiny.encoder_tokenizer()
    found = []
    for rows, collator in ((Rows(), DataCollatorWithPadding(tokenizer)), (tiny.reviews(16), None)):
        trainer = script(tmp_path, rows, data_collator=collator)
        trainer.train()
        found.append(tiny.parameters(trainer.model))
    assert tiny.largest_difference(*found) < 1e-6


def test_rows_that_somebody_else_has_tokenized_are_refused(tmp_path):
    tokenizer = tiny.encoder_tokenizer()
    rows = tiny.reviews(16).map(lambda row: tokenizer(row["text"]), remove_columns="text")
    for given, missing in (
        (rows, "labels and no readout_position"),
        (rows.rename_column("label", "labels"), "readout"),
    ):
        with pytest.raises(ValueError, match=f"^rows have input_ids and no {missing}.*: pass raw rows"):
            script(tmp_path, given).train()


def test_labels_of_whole_rows_are_refused(tmp_path):
    tokenizer = tiny.causal_tokenizer()
    rows = tiny.reviews(16).map(lambda row: tokenizer(row["text"]), remove_columns=["text", "label"])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(ValueError, match="^labels are as long as input_ids: .* leave data_collator out"):
        script(tmp_path, rows, "llama", data_collator=collator).train()


@pytest.mark.parametrize("kind", [float, bool])
def test_labels_may_be_any_kind_of_number(kind, tmp_path):
    rows = tiny.reviews(16)
    other = Dataset.from_list([{"text": row["text"], "label": kind(row["label"])} for row in rows])
    assert script(tmp_path, other).train_dataset["labels"][:] == rows["label"][:]
    script(tmp_path, other).train()


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


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("method", ["plain", "both", "mbtsad"])
def test_a_column_named_as_what_is_planted_is_refused(method, where, tmp_path):
    """It was taught in place of the labels, without a word."""
    rows = tiny.reviews(4).add_column("planted", ["aha"] * 4)
    with pytest.raises(ValueError, match="^column 'planted' is in the data set, and would be taught .*: rename it$"):
        tiny.trainer("label_words", method, tmp_path, **{where: rows}, max_steps=1)


def test_rows_that_come_later_are_looked_at_as_well(tmp_path):
    rows = tiny.reviews(4).add_column("planted", ["aha"] * 4)
    with pytest.raises(ValueError, match="^column 'planted' is in the data set"):
        tiny.trainer("label_words", "plain", tmp_path).evaluate(rows)


@pytest.mark.parametrize("method", ["plain", "both", "mbtsad"])
@pytest.mark.parametrize("max_length", [None, 4])
@pytest.mark.parametrize("text, said", [(None, "None"), (5, "5"), (["a", "b"], r"\['a', 'b'\]")])
@pytest.mark.parametrize("name", tiny.TASKS)
def test_what_is_no_text_is_refused_by_its_row(name, text, said, max_length, method, tmp_path):
    task, rows = tiny.setting(name, 4)[1:]
    for column in task.text_columns:
        texts = rows[column][:2] + [None, "end"] if text is None else [text] * 4
        broken = rows.remove_columns(column).add_column(column, texts)
        line = f"^{column} is {said} in row {2 if text is None else 0}, which is no text: pass texts "
        with pytest.raises(ValueError, match=line):
            tiny.trainer(name, method, tmp_path, train_dataset=broken, max_length=max_length)
        if text is None:  # such rows may be left out
            tiny.trainer(name, "plain", tmp_path, train_dataset=broken.select([0, 1, 3]), max_length=max_length)


def test_label_words_that_share_a_first_token_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="share a first token"):
        make(
            tmp_path, "llama", tiny.reviews(2), label_words=["answer yes", "answer no"], prompt_template=tiny.TEMPLATE
        )


def with_one_more(token, name):
    tokenizer = tiny.tokenizer("llama" if name == "label_words" else "bert")
    tokenizer.add_tokens([token])
    return tokenizer


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "padding"])
@pytest.mark.parametrize("name, method", [("label_words", "both"), ("sequence_classification", "plain")])
def test_tokens_that_the_model_does_not_know_are_refused(name, method, where, tmp_path, monkeypatch):
    tokenizer = with_one_more("brandnew", name)
    if where == "padding":
        tokenizer.pad_token = "brandnew"
    monkeypatch.setattr(tiny, "tokenizer", lambda family: tokenizer)
    rows = Dataset.from_dict({"text": ["a film", "a brandnew film"], "label": [0, 1]})
    options = {} if where == "padding" else {where: rows}
    size = len(tiny.VOCABULARY)
    line = (
        rf"^vocab_size is {size} in the model, .* 'brandnew' \({size}\): pass .*resize_token_embeddings\({size + 1}\)"
    )
    with pytest.raises(ValueError, match=line):
        tiny.trainer(name, method, tmp_path, **options)
    larger = tiny.model("llama" if name == "label_words" else "bert")
    larger.resize_token_embeddings(size + 8)
    tiny.trainer(name, method, tmp_path, model=larger, max_steps=1, **options).train()


def test_rows_that_come_later_are_looked_through_as_well(tmp_path, monkeypatch):
    tokenizer = with_one_more("brandnew", NAME)
    monkeypatch.setattr(tiny, "tokenizer", lambda family: tokenizer)
    trainer = plain(tmp_path)
    for rows, line in (
        ({"text": ["a brandnew film"], "label": [0]}, "^vocab_size is .* 'brandnew'"),
        ({"text": [["a film"]], "label": [0]}, r"^text is \['a film'\] in row 0, which is no text"),
    ):
        for use in (trainer.evaluate, trainer.predict):
            with pytest.raises(ValueError, match=line):
                use(Dataset.from_dict(rows))


def test_an_adapter_s_settings_are_a_peft_config(tmp_path):
    with pytest.raises(
        ValueError, match=r"^peft_config is \{'r': 2\}: pass a PeftConfig, for example peft.LoraConfig"
    ):
        plain(tmp_path, peft_config={"r": 2})


def test_a_token_that_no_row_has_is_nothing_to_the_model(tmp_path, monkeypatch):
    tokenizer = with_one_more("<image>", "label_words")
    monkeypatch.setattr(tiny, "tokenizer", lambda family: tokenizer)
    tiny.trainer("label_words", "plain", tmp_path, max_steps=1).train()


# ---- An optimizer of the user's own ----


def sgd(module):
    return torch.optim.SGD(module.parameters(), 0.1), None


def test_an_optimizer_of_all_that_is_trained_is_used(tmp_path):
    model = tiny.model("bert")
    trainer = plain(tmp_path, model=model, optimizers=sgd(model), learning_rate=0.0)
    trainer.train()
    assert tiny.largest_difference(tiny.parameters(tiny.model("bert")), tiny.parameters(model)) > 0
    trainer.train()


def made_with(kind, folder):
    """A trainer, given an optimizer of the model that it was given."""
    model = tiny.model("bert", num_labels=4 if kind == "pair" else 2)
    options = {"optimizers": sgd(model), "max_steps": 1}
    if kind == "adapter":
        return plain(folder, model=model, peft_config=LORA, optimizers=sgd(model))
    if kind == "new class":
        return tiny.trainer("sequence_classification", "inject", folder, model=model, **options)
    if kind == "connectors":
        return robust.distilling("sequence_classification", folder, student=model, **options)
    if kind == "mask":
        return robust.fitting("sequence_classification", folder, suspect=model, **options)
    return topics.trainer("sequence_classification", "mutual", folder, model=model, **options)


@pytest.mark.parametrize("kind", ["adapter", "new class", "connectors", "mask", "pair"])
def test_an_optimizer_that_would_train_something_else_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="^optimizers has one for .*: pass optimizer_cls_and_kwargs"):
        made_with(kind, tmp_path).train()


# ---- What else there is ----


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


@pytest.mark.parametrize(
    "name, said",
    [
        ("label_words", {"label_words": ["no", "yes"]}),
        ("label_words", {"prompt_template": "{text} is"}),
        ("instruction_following", {"system_prompt": "Be kind."}),
    ],
)
def test_arguments_do_not_contradict_the_task(name, said, tmp_path):
    """A task that is given went before them, without a word."""
    (argument,) = said
    with pytest.raises(
        ValueError, match=f"^{argument} is .*, and the task that is given has .*: leave one of the two"
    ):
        tiny.trainer(name, "plain", tmp_path, **said)
    tiny.trainer("label_words", "plain", tmp_path, label_words=list(tiny.LABEL_WORDS), prompt_template=tiny.TEMPLATE)


def test_arguments_of_the_stock_trainer_are_told_what_to_be(tmp_path):
    with pytest.raises(ValueError, match="args is a TrainingArguments: pass a DefenseConfig"):
        DefenseTrainer(tiny.model("bert"), TrainingArguments(str(tmp_path)), processing_class=tiny.encoder_tokenizer())
