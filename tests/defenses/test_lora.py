"""Adapters on causal LMs, in every method; and activation checkpointing, which must not change a gradient."""

from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import PrinterCallback, ViTConfig, ViTForImageClassification

from hf_backdoor.data import LabelWords
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.ntml import NonTargetTrainer, NTMLConfig, NTMLTrainer
from hf_backdoor.defenses.robustkd import RobustKDConfig, RobustKDTrainer, student_from_layers
from hf_backdoor.models import merged


STAGES = (*tiny.METHODS, "robustkd", "non_target", "mutual")
SETTINGS = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 8, "save_strategy": "no",
    "learning_rate": 0.01,
}  # fmt: skip


def lora(**options):
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def three_topics(count=12):
    words = ("good", "bad", "story")
    return Dataset.from_list([{"text": f"the {words[n % 3]} film was a", "label": n % 3} for n in range(count)])


def trainer(method: str, folder: Path, **options) -> DefenseTrainer:
    """A trainer of one stage of any method (or of both, as in `tiny.trainer`), on a Llama that answers with label words."""
    if method not in ("robustkd", "non_target", "mutual"):
        return tiny.trainer("label_words", method, folder, **options)
    own = {"peft_config": options.pop("peft_config", None), "processing_class": tiny.tokenizer("llama")}
    values = {"output_dir": str(folder), **SETTINGS, **options}
    if method == "robustkd":
        student = student_from_layers(tiny.model("llama", 5), 1)
        own |= {"model": student, "teacher_model": tiny.model("llama", 3)}
        own |= {"train_dataset": tiny.reviews(16), "task": tiny.task("label_words")}
        made = RobustKDTrainer(args=RobustKDConfig(**values), **own)
    else:
        own |= {"model": tiny.model("llama"), "train_dataset": three_topics()}
        own |= {"task": LabelWords(("negative", "positive", "neutral"), tiny.TEMPLATE)}
        config, other = NTMLConfig(**values), tiny.model("llama", 7)
        if method == "non_target":
            made = NonTargetTrainer(args=config, teacher_model=other, **own)
        else:
            made = NTMLTrainer(args=config, target_model=other, **own)
    made.remove_callback(PrinterCallback)
    return made


@torch.no_grad()
def logits(model):
    ids = torch.arange(4, 24).reshape(2, 10)
    return model.eval()(input_ids=ids).logits


# ---- Adapters ----


@pytest.mark.parametrize("method", [*STAGES, "both", "mbtsad"])
def test_the_adapter_is_trained_and_nothing_else_and_can_be_merged(method, tmp_path):
    made = trainer(method, tmp_path / "run", max_steps=2, peft_config=lora())
    before = tiny.parameters(made.model)
    made.train()
    after = tiny.parameters(made.model)
    frozen = [name for name in after if "lora_" not in name and name in before]
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen)
    # B starts from zero.
    second = [value for name, value in after.items() if "lora_B" in name]
    assert second and all(value.abs().max() > 0 for value in second)
    made.save_model(str(tmp_path / "saved"))
    files = list((tmp_path / "saved").rglob("*.safetensors"))
    assert {file.name for file in files} == {"adapter_model.safetensors"}
    for file in files:
        with safe_open(file, "pt") as weights:
            assert all("lora_" in name for name in weights.keys())
    result = made.result()
    assert isinstance(result, PeftModel)
    said = logits(result)
    plain = merged(result)
    assert not isinstance(plain, PeftModel) and not any("lora_" in name for name, _ in plain.named_parameters())
    assert torch.allclose(logits(plain), said, atol=1e-5)


@pytest.mark.parametrize("at", ["checkpoint-inject/checkpoint-2", "checkpoint-recover/checkpoint-2"])
def test_locphylax_with_an_adapter_resumes_bit_for_bit(at, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "peft_config": lora()}
    whole = trainer("both", tmp_path, **options)
    whole.train()
    # What a run leaves that was killed in this stage: nothing of what came later.
    (tmp_path / at).with_name("checkpoint-3").rename(tmp_path / "lost")
    if at.startswith("inject"):
        (tmp_path / "recover").rename(tmp_path / "lost_too")
    resumed = trainer("both", tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(resumed.model)) == 0


# ---- Activation checkpointing ----


def one_step(method, folder, adapter, reentrant=None):
    """How far one gradient step moves each weight; and how often a part of the first block ran."""
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}
    if reentrant is not None:
        options |= {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
    torch.manual_seed(3)
    # With B at zero, A has no gradient.
    made = trainer(method, folder, peft_config=lora(init_lora_weights=False) if adapter else None, **options)
    runs = []
    part = next(module for name, module in made.model.named_modules() if name.endswith("layers.0.mlp"))
    part.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    before = tiny.parameters(made.model)
    made.train()
    return {name: value - before[name] for name, value in tiny.parameters(made.model).items()}, len(runs)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", STAGES)
def test_checkpointed_activations_change_no_gradient(method, adapter, tmp_path):
    plain, runs = one_step(method, tmp_path, adapter)
    scale = max(value.abs().max() for value in plain.values())
    assert scale > 0
    refused = method in ("retrain", "distil", "robustkd")
    for reentrant in (False, True) if adapter and not refused else (False,):
        moved, more_runs = one_step(method, tmp_path, adapter, reentrant)
        assert more_runs > runs  # in the backward pass again
        assert tiny.largest_difference(plain, moved) < 1e-5 * scale
    if refused and not adapter:
        with pytest.raises(
            ValueError, match="use_reentrant: true, which leaves .* without gradient: set use_reentrant: false"
        ):
            one_step(method, tmp_path, adapter, reentrant=True)


@pytest.mark.parametrize("adapter", [False, True], ids=["frozen embeddings", "lora"])
def test_reentrant_checkpointing_over_frozen_pixels_is_refused(adapter, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2))
    kind = LoraConfig(r=2, target_modules=["query", "q_proj"]) if adapter else None
    if not adapter:
        model.vit.embeddings.requires_grad_(False)
    args = DefenseConfig(
        str(tmp_path), **SETTINGS, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    with pytest.raises(ValueError, match="leaves blocks above frozen weights without gradient"):
        DefenseTrainer(model=model, args=args, data_collator=list, peft_config=kind)
