"""Models that answer by no head, or that see the answer: neither trained nor measured."""

import pytest
import tiny
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_backdoor.cli import main
from hf_backdoor.data import SequenceClassification
from hf_backdoor.evaluation import TestSet, evaluate_backdoor
from hf_backdoor.models import load_model


WORDS, CLASSES = tiny.task("label_words"), tiny.task("sequence_classification")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
ENCODER = BertConfig(vocab_size=len(tiny.VOCABULARY), max_position_embeddings=64, pad_token_id=0, **SIZES)
DECODER = BertConfig(**{**ENCODER.to_diff_dict(), "is_decoder": True})
LORA = LoraConfig(r=2, target_modules=["query"])


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=len(tiny.VOCABULARY), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )


OTHERS = {
    "masked": lambda: BertForMaskedLM(ENCODER),
    "with an adapter": lambda: get_peft_model(BertForMaskedLM(ENCODER), LORA),
    "both ways": lambda: BertLMHeadModel(ENCODER),
    "bare encoder": lambda: BertModel(ENCODER),
    "bare decoder": lambda: LlamaModel(tiny.model("llama").config),
}


def measured(model, task, family="llama"):
    return evaluate_backdoor(model, tiny.tokenizer(family), task, TestSet(tiny.reviews(4)), name="suspect", seed=0)


@pytest.mark.parametrize("kind", OTHERS)
def test_no_causal_lm_is_trained(kind, tmp_path):
    with pytest.raises(
        ValueError, match=r"^model is a \w+, which has no head, or sees the answer .* pass a causal LM"
    ):
        tiny.trainer("label_words", "plain", tmp_path, model=OTHERS[kind]())


class Masked(BertForMaskedLM):
    """The user's own, with the head that it inherits."""


class BothWays(BertLMHeadModel):
    pass


class Causal(LlamaForCausalLM):
    pass


@pytest.mark.parametrize("kind", [Masked, BothWays])
def test_a_subclass_of_what_is_no_causal_lm_is_none_either(kind, tmp_path):
    with pytest.raises(ValueError, match=f"^model is a {kind.__name__}, which has no head, or sees the answer"):
        tiny.trainer("label_words", "plain", tmp_path, model=kind(ENCODER))
    tiny.trainer("label_words", "plain", tmp_path, model=Causal(tiny.model("llama").config))


@pytest.mark.parametrize("kind", ["masked", "both ways", "bare decoder"])
def test_a_teacher_that_is_no_causal_lm_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"^teacher_model is a \w+, which has no head, or sees the answer"):
        tiny.trainer("label_words", "distil", tmp_path, teacher_model=OTHERS[kind]())
    OTHERS[kind]().save_pretrained(tmp_path / "teacher")
    trainer = tiny.trainer("label_words", "distil", tmp_path, teacher_model=str(tmp_path / "teacher"))
    why = "has no weights for lm_head.weight" if kind == "bare decoder" else r"is a \w+, which has no head, or sees"
    with pytest.raises(ValueError, match=f"^model '{tmp_path}/teacher' {why}"):
        trainer.train()


def test_a_teacher_s_classification_head_is_not_drawn(tmp_path):
    tiny.model("bert").bert.save_pretrained(tmp_path / "teacher")
    trainer = tiny.trainer("sequence_classification", "distil", tmp_path, teacher_model=str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match=f"^model '{tmp_path}/teacher' has no weights for classifier.bias and 1 more"):
        trainer.train()


@pytest.mark.parametrize("kind", [*OTHERS, "sequences", "classifier"])
def test_no_causal_lm_is_measured_by_words(kind):
    model = (OTHERS | {"sequences": t5, "classifier": lambda: tiny.model("bert")})[kind]()
    with pytest.raises(ValueError, match=r"^model is a \w+, and task is LabelWords, which is measured on causal LMs"):
        measured(model, WORDS)


@pytest.mark.parametrize("kind", [*OTHERS, "language model"])
def test_what_has_no_classes_is_not_measured_by_classes(kind):
    model = (OTHERS | {"language model": lambda: tiny.model("llama")})[kind]()
    with pytest.raises(
        ValueError, match=r"^model is a \w+, and task is SequenceClassification, which is measured on mod"
    ):
        measured(model, CLASSES)


def test_an_encoder_that_was_made_a_decoder_is_a_causal_lm(tmp_path):
    tiny.trainer("label_words", "plain", tmp_path, model=BertLMHeadModel(DECODER))
    assert measured(BertLMHeadModel(DECODER), WORDS)


def test_a_network_of_the_user_s_own_is_taken_as_it_is():
    class Own(type(tiny.model("bert"))):
        pass

    assert measured(Own(tiny.model("bert").config), CLASSES, "bert")


# ---- Checkpoints ----


@pytest.mark.parametrize("kind", ["masked", "bare encoder", "sequences"])
@pytest.mark.parametrize("command", ["clean", "clean --dry_run", "evaluate", "run"])
def test_checkpoints_that_are_no_causal_lms_are_refused(kind, command, reviews, tmp_path, capsys):
    folder = str(tmp_path / "other")
    (OTHERS | {"sequences": t5})[kind]().save_pretrained(folder)
    tiny.causal_tokenizer().save_pretrained(folder)
    name, *dry = command.split()
    recipe = tiny.classifier_recipe(tmp_path, task="label_words", label_words=list(tiny.LABEL_WORDS))
    out = {"evaluate": ["--clean", reviews, "--output", f"{tmp_path}/o.json"]}
    arguments = out.get(name, ["--data", reviews, "--output_dir", f"{tmp_path}/run", *dry])
    if name == "run":
        tiny.encoder_tokenizer().save_pretrained(folder)
        assert main(["run", str(recipe), "--model_name_or_path", folder]) == 2
    else:
        assert main([name, folder, *arguments]) == 2
    error = capsys.readouterr().err
    why = "has an encoder and a decoder" if kind == "sequences" else "is no causal LM"
    assert error.startswith(f"hf-backdoor: model {folder!r} (") and f") {why}, and without a classification" in error
    assert error.count("\n") == 1 and len(error) < 400


@pytest.mark.parametrize("kind", ["masked", "bare encoder"])
def test_an_encoder_s_checkpoint_gets_a_fresh_head(kind, tmp_path):
    OTHERS[kind]().save_pretrained(tmp_path)
    tiny.encoder_tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), SequenceClassification, num_labels=3).config.num_labels == 3
    with pytest.raises(ValueError, match="is no causal LM"):
        load_model(str(tmp_path), type(WORDS))
