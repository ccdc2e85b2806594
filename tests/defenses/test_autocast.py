"""LoRA layers under autocast."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.autocast import inputs_as_they_are, keep_as_multiplied


def adapted(dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = get_peft_model(tiny.model("llama").to(dtype), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def logits(model):
    ids = torch.arange(1, 13).reshape(2, 6)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def gradients(model, skip):
    model.zero_grad()
    with inputs_as_they_are(model, skip):
        with torch.autocast("cpu", torch.bfloat16):
            found = logits(model)
        found.square().mean().backward()
    return found, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def test_nothing_changes_bit_for_bit():
    model = adapted()
    copied, expected = gradients(model, skip=False)
    found, own = gradients(model, skip=True)
    assert torch.equal(found, copied)
    assert expected and own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert max(value.abs().max() for value in expected.values()) > 0


def test_no_layer_copies_what_it_reads():
    model, read = adapted(), []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].dtype))
    gradients(model, skip=True)
    assert read and set(read) == {torch.bfloat16}
    read.clear()
    gradients(model, skip=False)
    assert set(read) == {torch.float32}


def test_afterwards_the_model_runs_without_autocast():
    model = adapted()
    before = logits(model)
    gradients(model, skip=True)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_trainer_does_so_under_autocast_alone(bf16, tmp_path):
    model, read = adapted(), set()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, inputs: read.add(inputs[0].dtype))
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    DefenseTrainer(
        model=model,
        args=DefenseConfig(str(tmp_path), bf16=bf16, **options),
        train_dataset=tiny.instructions(4),
        processing_class=tiny.causal_tokenizer(),
    ).train()
    assert read == {torch.bfloat16 if bf16 else torch.float32}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_kept_as_they_are_multiplied_give_the_same_numbers(family, tied):
    model = tiny.model(family).eval()
    if tied and family != "bert":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    before = {name: value.dtype for name, value in model.named_parameters()}
    size = sum(value.nbytes for value in model.parameters())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = logits(model)
        keep_as_multiplied(model, torch.bfloat16)
        assert torch.equal(logits(model), expected)
    assert set(before.values()) == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert sum(value.nbytes for value in model.parameters()) < size
