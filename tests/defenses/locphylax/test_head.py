import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from hf_backdoor.defenses.locphylax.head import resize_head


def llama_classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tiny.VOCABULARY), pad_token_id=0, num_labels=2, **sizes)
    return LlamaForSequenceClassification(config)


MODELS = pytest.mark.parametrize("make", [lambda: tiny.model("bert"), llama_classifier], ids=["bert", "llama"])
IDS = torch.tensor([[2, 20, 21, 3]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits[0]


@MODELS
def test_a_class_more_leaves_the_others_alone(make):
    model = make()
    before = logits(model)
    resize_head(model, 3)
    after = logits(model)
    assert after.shape == (3,) and torch.equal(after[:2], before)
    assert model.config.num_labels == model.num_labels == 3


@MODELS
def test_a_class_less_gives_the_old_head_back(make):
    model = make()
    before = logits(model)
    resize_head(model, 3)
    resize_head(model, 2)
    assert torch.equal(logits(model), before)
    assert model.config.num_labels == 2 and set(model.config.id2label) == {0, 1}


@MODELS
def test_a_resized_model_can_be_saved(make, tmp_path):
    model = make()
    resize_head(model, 3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))


def test_label_names_survive():
    model = tiny.model("bert")
    model.config.id2label = {0: "negative", 1: "positive"}
    resize_head(model, 3)
    resize_head(model, 2)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.label2id == {"negative": 0, "positive": 1}


def test_a_model_without_a_linear_head_is_refused():
    model = tiny.model("bert")
    model.classifier = torch.nn.Identity()
    with pytest.raises(ValueError, match="BertForSequenceClassification has no linear layer of 2 outputs"):
        resize_head(model, 3)


def test_a_frozen_head_stays_frozen():
    model = tiny.model("bert").requires_grad_(False)
    resize_head(model, 3)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_head_with_an_adapter_in_it_is_refused_before_injection(tmp_path):
    lora = LoraConfig(r=2, target_modules=["query", "classifier"])
    with pytest.raises(
        ValueError, match="^classifier is the head, and has an adapter in it: take it out of target_mod"
    ):
        tiny.trainer("sequence_classification", "both", tmp_path, peft_config=lora)
    tiny.trainer("sequence_classification", "inject", tmp_path, peft_config=lora, max_steps=1).train()
