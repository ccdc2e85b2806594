"""The losses on attention maps of whole models: of every family, under autocast, with checkpointing and dropout."""

import pytest
import torch
from maps import LOSSES, assert_equal, batch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_backdoor.defenses.mbtsad.attention import attention_map_loss
from hf_backdoor.defenses.mbtsad.losses import valid_entries
from hf_backdoor.defenses.mbtsad.recording import record_attention


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    ),
    "modernbert": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**SIZES | {"num_hidden_layers": 3}, pad_token_id=0, local_attention=8)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GROUPED, head_dim=16, query_pre_attn_scalar=16, pad_token_id=0, **WINDOWED)
    ),
}


def model(family, seed=0, implementation="sdpa"):
    """A tiny model with attention far from uniform."""
    torch.manual_seed(seed)
    made = FAMILIES[family]()
    for name, weight in made.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            weight.data *= 4
    made.set_attn_implementation(implementation)
    return made.train()


def lean(student, teacher, inputs, loss=attention_map_loss, layers=None, **options):
    with torch.no_grad(), record_attention(teacher, layers) as theirs:
        teacher(**inputs)
    with record_attention(student, layers, compare_mask=inputs["attention_mask"]) as mine:
        student(**inputs)
    return loss(mine, theirs, inputs["attention_mask"], **options)


def eager(student, teacher, inputs, loss=attention_map_loss):
    with record_attention(student) as record:
        student(**inputs)
    valid = [valid_entries(inputs["attention_mask"], layer.causal, layer.sliding_window) for layer in record]
    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = teacher(**inputs, output_attentions=True).attentions
    mine = student(**inputs, output_attentions=True).attentions
    assert len(mine) == len(valid)
    return torch.stack([LOSSES[loss](*each) for each in zip(mine, theirs, valid, strict=True)]).mean(dim=0)


def gradients(losses, module):
    weights = torch.arange(1.0, len(losses) + 1)
    (losses * weights).sum().backward()
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gets_the_loss_and_gradients_of_its_maps(family, padding, loss):
    inputs, teacher, models = batch(padding), model(family, seed=1), [model(family) for _ in range(2)]
    found, expected = (
        lean(models[0], teacher, inputs, loss, block_entries=400),
        eager(models[1], teacher, inputs, loss),
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert_equal(gradients(found, models[0]), gradients(expected, models[1]))


def test_autocast_rounds_queries_and_keys_but_not_their_maps():
    inputs, teacher = batch("left"), model("qwen3", seed=1)
    expected = lean(student := model("qwen3"), teacher, inputs)
    wanted = gradients(expected, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lean(student := model("qwen3"), teacher, inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)
    assert_equal(gradients(found, student), wanted, tolerance=0.2)


def test_activation_checkpointing_gives_the_same_gradients():
    inputs, teacher, found = batch("left"), model("llama", seed=1), {}
    for checkpointing in (False, True):
        student = model("llama")
        if checkpointing:
            student.activation_checkpointing_enable({"use_reentrant": False})
        runs = []
        student.model.layers[0].self_attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        losses = lean(student, teacher, inputs)
        found[checkpointing] = gradients(losses, student)
        # Without the second run there would be nothing to test.
        assert len(runs) == 1 + checkpointing
    assert_equal(found[True], found[False], tolerance=1e-6)


def test_maps_are_compared_before_dropout():
    inputs, teacher = batch("right"), model("llama", seed=1)
    expected = lean(student := model("llama"), teacher, inputs, layers=[0])
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.testing.assert_close(lean(student, teacher, inputs, layers=[0]), expected)
    # The second layer works on what dropout has left of the first one's output.
    assert not torch.allclose(lean(student, teacher, inputs, layers=[1]), lean(student, teacher, inputs, layers=[1]))
