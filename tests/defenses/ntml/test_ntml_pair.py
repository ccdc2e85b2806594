"""Two networks in one training: who learns what, checkpoints, adapters."""

import pytest
import tiny
import topics
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, ResNetConfig, ResNetForImageClassification

from hf_backdoor.defenses import ntml


LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
# Plain gradient steps: Adam would blow rounding up into steps of full size, and clipping would hide a wrong scale.
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "num_train_epochs": 2}


# ---- Mutual learning ----


def gradients(trainer, terms, term):
    trainer.model.zero_grad()
    terms[term].sum().backward(retain_graph=True)
    reached = set()
    for name, value in trainer.model.named_parameters():
        if value.grad is not None and value.grad.abs().sum() > 0:
            reached.add(name.split(".")[0])
    return reached


@pytest.mark.parametrize(
    "name, direction, pupils",
    [("sequence_classification", "crossed", {"prediction": ["non_target"], "feature": ["target"]}),
     ("label_words", "swapped", {"prediction": ["target"], "feature": ["non_target"]}),
     ("images", "both", {"prediction": ["target", "non_target"], "feature": ["target", "non_target"]})],
)  # fmt: skip
def test_who_learns_what(name, direction, pupils, tmp_path):
    trainer = topics.trainer(name, "mutual", tmp_path, mutual_direction=direction, feature_layers=[-1, 1])
    trainer.model.train()
    terms, _ = trainer.loss_terms(trainer.model, next(iter(trainer.get_train_dataloader())), torch.tensor([8]))
    expected = {"task": ["target", "non_target"], **pupils}
    assert set(terms) == {f"{kind}_{pupil}" for kind in expected for pupil in expected[kind]}
    for kind, learners in expected.items():
        for pupil in learners:
            assert terms[f"{kind}_{pupil}"].shape == (8,)
            assert gradients(trainer, terms, f"{kind}_{pupil}") == {pupil}


def test_the_feature_weight_is_a_factor(tmp_path):
    values = []
    for weight in (1.0, 10.0):
        trainer = topics.trainer("label_words", "mutual", tmp_path, feature_weight=weight)
        batch = next(iter(trainer.get_train_dataloader()))
        values.append(trainer.loss_terms(trainer.model, batch, torch.tensor([8]))[0]["feature_target"])
    assert torch.allclose(10 * values[0], values[1], rtol=1e-4) and values[0].sum() > 0


def test_alike_networks_teach_each_other_nothing(tmp_path):
    models = {"model": tiny.model("llama", 3), "target_model": tiny.model("llama", 3)}
    trainer = topics.trainer("label_words", "mutual", tmp_path, mutual_direction="both", **models)
    terms, _ = trainer.loss_terms(trainer.model, next(iter(trainer.get_train_dataloader())), torch.tensor([8]))
    assert all(value.abs().max() < 1e-6 for name, value in terms.items() if not name.startswith("task"))
    assert torch.allclose(terms["task_target"], terms["task_non_target"])


def test_a_target_network_that_was_a_teacher_is_trained_all_the_same(tmp_path):
    target = topics.network("label_words", 7).requires_grad_(False)
    before = tiny.parameters(target)
    topics.trainer("label_words", "mutual", tmp_path, target_model=target, max_steps=1).train()
    assert all((value != before[name]).any() for name, value in tiny.parameters(target).items() if "proj" in name)


def test_a_convolutional_network(tmp_path):
    def resnet(seed):
        torch.manual_seed(seed)
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=4))

    options = {"max_steps": 2, "model": resnet(0), "feature_layers": [-1, -2]}
    trainer = topics.trainer("images", "mutual", tmp_path, target_model=resnet(1), **options)
    before = tiny.parameters(trainer.model)
    trainer.train()
    after = tiny.parameters(trainer.model)
    assert all((after[name] != before[name]).any() for name in after if name.endswith("classifier.1.weight"))
    assert tiny.logged(trainer, "loss/feature_target")[0] > 0


def test_a_hidden_state_that_is_not_there_is_refused(tmp_path):
    trainer = topics.trainer("label_words", "mutual", tmp_path, feature_layers=[9])
    with pytest.raises(ValueError, match=r"feature_layers is \[9\]: the model gives no hidden state 9"):
        trainer.train()


def test_a_checkpoint_holds_two_models_that_load_by_themselves(tmp_path):
    trainer = topics.trainer(
        "sequence_classification", "mutual", tmp_path, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert not list(tmp_path.rglob("*.bin"))
    for name in ntml.NETWORKS:
        folder = tmp_path / "checkpoint-1" / name
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert tiny.largest_difference(tiny.parameters(loaded), tiny.parameters(trainer.pair.network(name))) == 0
        assert (folder / "tokenizer.json").exists() and getattr(loaded.config, "use_cache", True)


def test_what_is_saved_after_training_is_the_product(tmp_path):
    trainer = topics.trainer("sequence_classification", "mutual", tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert tiny.largest_difference(tiny.parameters(loaded), tiny.parameters(trainer.result())) == 0
    assert (tmp_path / "tokenizer.json").exists() and not any((tmp_path / name).exists() for name in ntml.NETWORKS)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    options = {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "learning_rate": 1.0, "eval_dataset": topics.texts(8, seed=2),
    }  # fmt: skip
    trainer = topics.trainer("sequence_classification", "mutual", tmp_path, **options)
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-5)


# ---- Adapters ----


def test_each_network_gets_an_adapter(tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "peft_config": LORA}
    trainer = topics.trainer("label_words", "mutual", tmp_path, **options)
    before = tiny.parameters(trainer.model)
    trainer.train()
    changed = {name for name, value in tiny.parameters(trainer.model).items() if (value != before[name]).any()}
    assert {name.split(".")[0] for name in changed} == {"target", "non_target"}
    assert changed and all("lora_" in name for name in changed)
    resumed = topics.trainer("label_words", "mutual", tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.largest_difference(tiny.parameters(trainer.model), tiny.parameters(resumed.model)) == 0
    plain = trainer.result().merge_and_unload()
    assert type(plain).__name__ == "LlamaForCausalLM"


def two_adapters(name):
    kind = {"task_type": "SEQ_CLS" if name == "sequence_classification" else "CAUSAL_LM"}
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["query", "value", "q_proj", "v_proj"], init_lora_weights=False, **kind)
    model = get_peft_model(topics.network(name, 0), lora, adapter_name="target")
    model.add_adapter("non_target", lora)
    return model


@pytest.mark.parametrize("name", ["sequence_classification", "label_words"])
def test_two_adapters_in_one_frozen_model_are_both_trained(name, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "target_model": None}
    trainer = topics.trainer(name, "mutual", tmp_path, model=two_adapters(name), **options)
    before = tiny.parameters(trainer.model)
    trainer.train()
    after = tiny.parameters(trainer.model)
    changed = {key for key in after if (after[key] != before[key]).any()}
    trained = {key for key in after if ".target." in key or ".non_target." in key}
    assert changed == trained and len(trained) >= 16
    resumed = topics.trainer(name, "mutual", tmp_path, model=two_adapters(name), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.largest_difference(after, tiny.parameters(resumed.model)) == 0


def test_two_adapters_learn_what_two_models_learn(tmp_path):
    steps = {**PLAIN, "learning_rate": 0.5}
    shared = topics.trainer(
        "label_words", "mutual", tmp_path, model=two_adapters("label_words"), target_model=None, **steps
    )
    copies = {"target_model": two_adapters("label_words"), "model": two_adapters("label_words")}
    for name, model in zip(("target", "non_target"), copies.values(), strict=True):
        model.set_adapter(name)
    apart = topics.trainer("label_words", "mutual", tmp_path, **copies, **steps)
    before = tiny.parameters(shared.model)
    shared.train()
    apart.train()
    for name in ntml.NETWORKS:
        for key, value in tiny.parameters(getattr(apart.pair, name)).items():
            if f".{name}." in key:
                learnt = dict(shared.pair.model.named_parameters())[key]
                assert torch.allclose(value, learnt, atol=1e-6)
                assert (learnt != before[f"model.{key}"]).any()


def test_two_adapters_in_two_processes(tmp_path):
    def work(size):
        trainer = topics.trainer(
            "label_words", "mutual", tmp_path, model=two_adapters("label_words"), target_model=None, **PLAIN,
            per_device_train_batch_size=size,
        )  # fmt: skip
        trainer.train()
        return tiny.parameters(trainer.model)

    assert tiny.largest_difference(work(8), tiny.in_two_processes(lambda: work(4), tmp_path)) < 1e-5


def test_non_target_training_of_the_second_adapter(tmp_path):
    model = two_adapters("label_words")
    trainer = topics.trainer("label_words", "non_target", tmp_path, model=model, teacher_model=None, max_steps=2)
    before = tiny.parameters(model)
    trainer.train()
    changed = {key for key, value in tiny.parameters(model).items() if (value != before[key]).any()}
    assert changed and all(".non_target." in key for key in changed)
    model.set_adapter("target")
    row = topics.texts(16)[3]
    prompt = torch.tensor([trainer.task.prompt_ids(row["text"], trainer.processing_class)])
    expected = model.eval()(prompt).logits[0, -1, trainer.word_ids]
    assert torch.allclose(torch.tensor(trainer.train_dataset[3]["teacher_logits"]), expected, atol=1e-5)


def test_two_adapters_do_not_go_with_activation_checkpointing(tmp_path):
    with pytest.raises(ValueError, match="activation_checkpointing is True"):
        topics.trainer(
            "label_words", "mutual", tmp_path, model=two_adapters("label_words"), target_model=None,
            activation_checkpointing=True,
        )  # fmt: skip


def test_two_models_go_with_activation_checkpointing(tmp_path):
    plain, saving = (
        topics.trainer("label_words", "mutual", tmp_path, **PLAIN, activation_checkpointing=on) for on in (False, True)
    )
    plain.train()
    saving.train()
    assert tiny.largest_difference(tiny.parameters(plain.model), tiny.parameters(saving.model)) < 1e-5


@pytest.mark.parametrize("folder", ["none", "checkpoint-2"])
def test_a_checkpoint_of_no_pair_is_refused(folder, tmp_path):
    """One that is not there, and one of another trainer."""
    topics.trainer(
        "sequence_classification", "non_target", tmp_path, save_strategy="epoch", num_train_epochs=1
    ).train()
    trainer = topics.trainer("sequence_classification", "mutual", tmp_path)
    with pytest.raises(
        ValueError,
        match=f"^resume_from_checkpoint is '{tmp_path}/{folder}', where no target and non_target are: pass a checkp",
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / folder))
