"""What `predict` gives and `compute_metrics` gets: logits, as of any other Trainer, before training and after it."""

import numpy as np
import pytest
import robust
import tiny
import topics
import torch
from peft import LoraConfig

from hf_backdoor.defenses.locphylax import LocphylaxConfig, LocphylaxTrainer


LORA = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")


def made(method, name, folder, **options):
    """A trainer of any method and stage, and rows that it has not seen."""
    if method in topics.STAGES:
        rows = topics.pixels(6) if name == "images" else topics.texts(6)
        return topics.trainer(name, method, folder, max_steps=1, eval_dataset=rows, **options), rows
    rows = tiny.setting(name, 6)[2]
    kinds = {"mask": robust.fitting, "student": robust.distilling}
    if method in kinds:
        return kinds[method](name, folder, max_steps=1, eval_dataset=rows, **options), rows
    return tiny.trainer(name, method, folder, max_steps=1, eval_dataset=rows, **options), rows


def logits(trainer, rows):
    """Of what is to be saved, all rows as one batch."""
    encoded = trainer._remove_unused_columns(trainer.encode_rows(rows, trainer.processing_class))
    batch = trainer.data_collator([encoded[row] for row in range(len(encoded))])
    network = trainer.result().eval()
    with torch.no_grad():
        return trainer.forward(network, batch).logits.numpy()


def check(trainer, rows):
    found = trainer.predict(rows)
    expected = logits(trainer, rows)
    assert isinstance(found.predictions, np.ndarray) and found.predictions.shape == expected.shape
    np.testing.assert_allclose(found.predictions, expected, atol=1e-5)
    assert np.isfinite(found.metrics["test_loss"])
    seen = []
    before = trainer.compute_metrics
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {"rows": len(seen[-1])}
    assert trainer.evaluate(rows)["eval_rows"] == trainer.evaluate({"some": rows})["eval_some_rows"] == 6
    assert len(trainer.evaluate()) > 1
    trainer.compute_metrics = before
    assert all(isinstance(each, np.ndarray) and each.ndim == expected.ndim for each in seen)
    np.testing.assert_allclose(seen[0], expected, atol=1e-5)
    np.testing.assert_allclose(seen[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    "method, name",
    [
        *[(method, "sequence_classification") for method in ("inject", "both", "mbtsad", "mask", "student")],
        *[(method, "instruction_following") for method in ("both", "distil", "student")],
        ("recover", "label_words"),
        ("non_target", "sequence_classification"),
        ("mutual", "label_words"),
        ("mutual", "images"),
        ("relabel", "sequence_classification"),
    ],
)
def test_predictions_are_logits(method, name, tmp_path):
    trainer, rows = made(method, name, tmp_path)
    check(trainer, rows)
    trainer.train()
    check(trainer, rows)


def test_with_an_adapter_too(tmp_path):
    trainer, rows = made("both", "sequence_classification", tmp_path, peft_config=LORA)
    check(trainer, rows)
    trainer.train()
    check(trainer, rows)
    assert trainer.predict(rows).predictions.shape == (6, 2)  # the class that injection adds is gone


def test_what_a_user_makes_of_logits_is_left_alone(tmp_path):
    trainer = LocphylaxTrainer(
        model=tiny.model("bert"), args=LocphylaxConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True),
        train_dataset=tiny.reviews(4), eval_dataset=tiny.reviews(4), processing_class=tiny.encoder_tokenizer(),
        preprocess_logits_for_metrics=lambda logits, labels: logits[:, :1],
    )  # fmt: skip
    assert trainer.predict(tiny.reviews(6)).predictions.shape == (6, 1)
