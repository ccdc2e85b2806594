"""What a trainer sends to the Hub: weights, and nothing of the training."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer


@pytest.mark.parametrize("method", ["plain", "both", "mbtsad"])
def test_what_is_uploaded_holds_no_checkpoint_and_no_pickle(tmp_path, monkeypatch, method):
    uploaded = []

    def upload_folder(folder_path, ignore_patterns, **options):
        files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        uploaded.append(set(filter_repo_objects(files, ignore_patterns=ignore_patterns)))

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer, **options: setattr(trainer, "hub_model_id", "me/x"))
    monkeypatch.setattr(Trainer, "create_model_card", lambda trainer, **options: None)
    hub = {"push_to_hub": True, "hub_token": "hf_secret", "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = tiny.trainer("sequence_classification", method, tmp_path, **hub)
    trainer.train()
    assert uploaded == [] and list(tmp_path.rglob("optimizer.pt"))
    trainer.push_to_hub()
    assert [name for name in uploaded[0] if name.endswith(".safetensors")] == ["model.safetensors"]
    assert {Path(name).suffix for name in uploaded[0]} <= {".safetensors", ".json", ".jinja"}


def test_checkpoints_are_not_for_the_hub(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer, **options: made.append(trainer))
    with pytest.raises(ValueError, match="hub_strategy is 'checkpoint', and checkpoints hold pickles"):
        tiny.trainer("label_words", "plain", tmp_path, push_to_hub=True, hub_strategy="checkpoint")
    assert not made  # no repository is left on the Hub
