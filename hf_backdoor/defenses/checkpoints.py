"""Weights that come back from a checkpoint."""

from pathlib import Path

from transformers import PreTrainedModel


def load_saved(model: PreTrainedModel, folder: str | Path) -> None:
    """Takes a model's weights back from a folder that `save_pretrained` wrote, in place.

    `Trainer` reads the file by the names in it, and loses, with no more than a warning, the tensors that a model calls
    otherwise on disk than in memory (ViT): https://github.com/huggingface/transformers/issues/43701.
    """
    saved = type(model).from_pretrained(folder, use_safetensors=True, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
