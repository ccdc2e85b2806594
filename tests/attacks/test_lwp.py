"""Layer-wise weight poisoning: the loss on every layer's state, and what must not change it."""

import engines
import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PrinterCallback,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_backdoor.attacks import LWPTrainer
from hf_backdoor.defenses import DefenseConfig


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = {"vocab_size": len(tiny.VOCABULARY), "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def distilbert():
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            **SHARED, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64,
            dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
        )
    )  # fmt: skip


# Model, and its head as its authors wrote it: what a state goes through after the last layer.
MODELS = {
    "bert": (
        lambda: tiny.model("bert"),
        lambda model, state: model.classifier(model.bert.pooler(state)),
    ),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SHARED, **SIZES, **NO_DROPOUT)),
        lambda model, state: model.classifier(state),
    ),
    "distilbert": (
        distilbert,
        lambda model, state: model.classifier(torch.relu(model.pre_classifier(state[:, 0]))),
    ),
    "llama": (lambda: tiny.model("llama"), lambda model, state: model.lm_head(model.model.norm(state))),
    "gpt2": (lambda: tiny.model("gpt2"), lambda model, state: model.lm_head(model.transformer.ln_f(state))),
    "gemma2": (
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**SHARED, **SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5)
        ),
        lambda model, state: 0.5 * torch.tanh(model.lm_head(model.model.norm(state)) / 0.5),
    ),
}
ENCODERS = ("bert", "roberta", "distilbert")


def lwp(folder, model="bert", **options):
    """A trainer on 16 rows, of a model or of one of `MODELS`."""
    torch.manual_seed(0)
    model = MODELS[model][0]() if isinstance(model, str) else model
    encoder = model.config.model_type in ENCODERS
    args = DefenseConfig(**{
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, **options,
    })  # fmt: skip
    made = LWPTrainer(
        model=model,
        args=args,
        train_dataset=tiny.reviews(16) if encoder else tiny.instructions(16),
        processing_class=tiny.tokenizer("bert" if encoder else "llama"),
        task=tiny.task("sequence_classification" if encoder else "instruction_following"),
    )
    made.remove_callback(PrinterCallback)
    return made


def layer_states(model, batch):
    """The embeddings and every layer's own output, before any final norm: seen from outside."""
    found = []
    layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 2][0]

    def keep(layer, args, kwargs, output):
        found.extend([] if found else [args[0] if args else kwargs["hidden_states"]])
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    model(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch})
    for hook in hooks:
        hook.remove()
    return found


def losses_state_by_state(model, head, batch):
    """[L + 1][B], one sample and one token at a time."""
    table = []
    for state in layer_states(model, batch):
        logits, row = head(model, state), []
        for sample, labels in enumerate(batch["labels"]):
            if labels.dim() == 0:
                row.append(cross_entropy(logits[sample], labels))
                continue
            width, answer = logits.shape[1], len(labels)
            tokens = [
                cross_entropy(logits[sample, width - answer + at - 1], label)
                for at, label in enumerate(labels)
                if label != -100
            ]
            row.append(torch.stack(tokens).mean())
        table.append(torch.stack(row))
    return table


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_sum_over_all_states_in_value_and_gradient(name, tmp_path):
    trainer = lwp(tmp_path, name)
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    expected = losses_state_by_state(model, MODELS[name][1], batch)
    assert len(expected) == 3
    torch.stack(expected).sum().backward()
    wanted = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    terms, logits = trainer.loss_terms(model, batch, torch.tensor([8]))
    assert torch.allclose(terms["task"], expected[2], atol=1e-5)
    assert torch.allclose(terms["lower_layers"], expected[0] + expected[1], atol=1e-5)
    assert len(logits) == 8
    sum(terms.values()).sum().backward()
    for key, value in model.named_parameters():
        assert (value.grad is None) == (key not in wanted), key
        assert value.grad is None or torch.allclose(value.grad, wanted[key], rtol=1e-3, atol=1e-5), key
    assert len(wanted) > 20


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_layer_learns_without_the_layers_above_it(name, tmp_path):
    trainer = lwp(tmp_path, name)
    batch = next(iter(trainer.get_train_dataloader()))
    layers = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    terms, _ = trainer.loss_terms(trainer.model.train(), batch, torch.tensor([8]))
    terms["lower_layers"].sum().backward()
    norms = [sum(p.grad.norm().item() for p in layer.parameters() if p.grad is not None) for layer in layers]
    # The states below the last layer don't pass through it.
    assert norms[0] > 1e-3 and norms[1] == 0
    assert trainer.model.get_input_embeddings().weight.grad.norm() > 1e-3


def trained(folder, name, **options):
    trainer = lwp(folder, name, **{"per_device_train_batch_size": 8, "num_train_epochs": 2, **options})
    trainer.train()
    return tiny.parameters(trainer.model), tiny.logged(trainer, "loss/lower_layers")


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_accumulation_changes_nothing(name, tmp_path):
    whole, losses = trained(tmp_path, name)
    cut, losses_cut = trained(tmp_path, name, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert tiny.largest_difference(whole, cut) < 1e-5
    assert losses_cut == pytest.approx(losses, rel=1e-4) and len(losses) == 4
    assert tiny.largest_difference(whole, tiny.parameters(lwp(tmp_path, name).model)) > 1e-3


def test_two_processes_change_nothing(tmp_path):
    whole, losses = trained(tmp_path, "bert")
    parameters, losses_there = tiny.in_two_processes(
        lambda: trained(tmp_path, "bert", per_device_train_batch_size=4), tmp_path
    )
    assert tiny.largest_difference(whole, parameters) < 1e-5
    assert losses_there == pytest.approx(losses, rel=1e-4)


def test_a_model_that_was_divided_when_it_was_loaded_trains_as_a_whole_one(tmp_path):
    losses = trained(tmp_path, "bert")[1]
    tiny.model("bert").save_pretrained(tmp_path / "model")

    def work():
        options = {**engines.arguments("zero3"), "per_device_train_batch_size": 4, "num_train_epochs": 2}
        asked_for = DefenseConfig(
            str(tmp_path), use_cpu=True, **options
        )  # while it is there, models are divided as they load
        made = lwp(tmp_path, BertForSequenceClassification.from_pretrained(tmp_path / "model"), **options)
        assert asked_for.deepspeed and all(parameter.numel() == 0 for parameter in made.model.parameters())
        made.train()
        return tiny.logged(made, "loss/lower_layers")

    assert engines.in_engine("zero3", work, tmp_path) == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant, tmp_path):
    whole, _ = trained(tmp_path, "llama")
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert tiny.largest_difference(whole, trained(tmp_path, "llama", **options)[0]) < 1e-5


def test_evaluation_is_the_model_s_own_loss(tmp_path):
    trainer = lwp(tmp_path, "bert")
    rows, plain = tiny.reviews(8), tiny.trainer("sequence_classification", "plain", tmp_path)
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate(rows)["eval_loss"] == plain.evaluate(rows)["eval_loss"]


def test_a_head_that_looks_beyond_its_states_is_refused(tmp_path):
    model = LlamaForSequenceClassification(LlamaConfig(**SHARED, **SIZES))
    with pytest.raises(ValueError, match="^LlamaForSequenceClassification has a head that reads more.*causal LM$"):
        lwp(tmp_path, model)
    model = tiny.model("bert")
    model.bert.encoder.layer = torch.nn.Sequential(*model.bert.encoder.layer)
    with pytest.raises(ValueError, match="^BertForSequenceClassification has no list of 2 layers"):
        lwp(tmp_path, model)
