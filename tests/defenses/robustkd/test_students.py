import copy

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_backdoor.defenses.robustkd import student_from_layers


IDS = torch.tensor([[2, 20, 9, 11, 3]])


def deep(family, layers=4):
    """Four layers that differ."""
    model = tiny.model(family)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    torch.manual_seed(1)
    return type(model)(config).eval()


def blocks(model):
    return {
        "BertForSequenceClassification": lambda m: (m.bert.encoder, "layer"),
        "LlamaForCausalLM": lambda m: (m.model, "layers"),
        "GPT2LMHeadModel": lambda m: (m.transformer, "h"),
    }[type(model).__name__](model)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("layers, kept", [(2, [1, 3]), ([0, 2, 3], [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_a_student_is_its_teacher_without_the_other_layers(family, layers, kept, tmp_path):
    teacher = deep(family)
    student = student_from_layers(teacher, layers)
    assert type(student) is type(teacher) and student.config.num_hidden_layers == len(kept)
    before = teacher(IDS).logits
    student.save_pretrained(tmp_path)
    reloaded = type(teacher).from_pretrained(tmp_path).eval()
    owner, name = blocks(teacher)
    setattr(owner, name, nn.ModuleList([getattr(owner, name)[layer] for layer in kept]))
    with torch.no_grad():
        wanted = teacher(IDS, use_cache=False).logits if family != "bert" else teacher(IDS).logits
        torch.testing.assert_close(student(IDS).logits, wanted)
        torch.testing.assert_close(reloaded(IDS).logits, wanted)
    assert len(kept) == 4 or not torch.allclose(before, wanted)


def test_it_shares_no_weight_with_its_teacher():
    teacher = deep("bert")
    student = student_from_layers(teacher, 2)
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in student.parameters()}
    assert teacher.config.num_hidden_layers == 4


def test_tied_embeddings_types_of_layers_and_precision_are_kept():
    small = {
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    tied = LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=3, tie_word_embeddings=True)).bfloat16()
    student = student_from_layers(tied, 1)
    assert student.dtype == torch.bfloat16
    assert student.lm_head.weight.data_ptr() == student.model.embed_tokens.weight.data_ptr()
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    mixed = Qwen3ForCausalLM(
        Qwen3Config(
            **small, head_dim=8, num_hidden_layers=4, layer_types=kinds, sliding_window=4, use_sliding_window=True
        )
    )
    assert student_from_layers(mixed, [0, 1, 3]).config.layer_types == [kinds[0], kinds[1], kinds[3]]


def test_layers_that_go_by_their_number_keep_it():
    # GPT-2 may divide attention scores by a layer's number.
    config = tiny.model("gpt2").config
    config.scale_attn_by_inverse_layer_idx = True
    teacher = GPT2LMHeadModel(config)
    assert student_from_layers(teacher, [0]).config.num_hidden_layers == 1
    with pytest.raises(ValueError, match=r"layer 1 would be of another kind in place 0 \(scaling is"):
        student_from_layers(teacher, [1])


@pytest.mark.parametrize("layers", [0, 5, [], [4], [-1], [1, 1], [0, 1, 2, 3, 3]])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="^student layers are .*4 blocks, 0 to 3"):
        student_from_layers(deep("llama"), layers)


# ---- Models in stages ----


@pytest.mark.parametrize("layers, depths", [(1, [1, 1]), ([1, 2], [1, 2])])
def test_a_resnet_s_student_answers_with_the_first_layers_of_each_stage(layers, depths):
    teacher = tiny.resnet().eval()
    student = student_from_layers(teacher, layers)
    assert student.config.depths == depths and not student.training and teacher.config.depths == [2, 2]
    for stage, depth in zip(teacher.resnet.encoder.stages, depths, strict=True):
        stage.layers = stage.layers[:depth]
    pixels = torch.randn(2, 3, 8, 8)
    assert torch.equal(student(pixel_values=pixels).logits, teacher(pixel_values=pixels).logits)


@pytest.mark.parametrize("layers", [0, 3, [1], [1, 3]])
def test_layers_that_a_stage_has_not_are_refused(layers):
    with pytest.raises(ValueError, match="^student_layers is .*, and the suspect has stages of 2, 2 layers: choose"):
        student_from_layers(tiny.resnet(), layers)


def test_a_first_block_that_is_not_like_the_others_must_be_kept():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    teacher = ModernBertForSequenceClassification(
        ModernBertConfig(vocab_size=40, **sizes, pad_token_id=0, cls_token_id=2, sep_token_id=3, num_labels=2)
    )
    with pytest.raises(ValueError, match=r"not all alike .*layers that begin with 0, for example \[0, 1, 3\]$"):
        student_from_layers(teacher, 2)
    assert student_from_layers(teacher, [0, 1, 3]).config.num_hidden_layers == 3
