"""PEFT adapters on disk: a suspect that is a base and an adapter, and the adapter that a defense trained."""

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file


CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class Adapter:
    """An adapter, and the model that it changes.

    Args:
        name (`str`): Its folder or Hub name.
        revision (`str`, *optional*): Of the adapter.
        base (`str`): Folder or Hub name of the model it was trained over.
        base_revision (`str`, *optional*): Of that model.
        classifies (`bool`): Whether it brings a classification head.
    """

    name: str
    revision: str | None
    base: str
    base_revision: str | None
    classifies: bool

    def file(self, name: str) -> Path | None:
        """One of its files, fetched if it lies on the Hub; nothing if it has no such file."""
        try:
            return Path(cached_file(self.name, name, revision=self.revision))
        except OSError:
            return None

    def merged_into(self, base: PreTrainedModel) -> PreTrainedModel:
        """The base with the adapter in its weights. The base is changed in place.

        Raises:
            `ValueError`: if the weights are a pickle, or not there, or don't fit the base, or the adapter is of a kind that can't
                be merged (prompt tuning).
        """
        weights = self.file(WEIGHTS)
        if weights is None:
            why = f"{PICKLE} is a pickle, which can run code" if self.file(PICKLE) else "it holds no weights"
            raise ValueError(f"{self.name!r} is an adapter without {WEIGHTS} ({why}): save it again as safetensors")
        try:
            adapted = PeftModel.from_pretrained(base, str(weights.parent), torch_device="cpu")
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.name!r} is an adapter that does not fit its base {self.base!r} "
                f"({' '.join(str(error).split())[:300]}): correct base_model_name_or_path in its {CONFIG}"
            ) from None
        if not hasattr(adapted.base_model, "merge_and_unload"):
            kind = adapted.peft_config["default"].peft_type
            raise ValueError(f"{self.name!r} is an adapter of type {kind!s}, which is no change of weights: use LoRA")
        return adapted.merge_and_unload()


def find_adapter(name_or_path: str, *, revision: str | None = None) -> Adapter | None:
    """The adapter that a folder or Hub name means, if it has an `adapter_config.json`.

    A base given by a path is looked for from the adapter's folder on first, so that a run's folder can be moved.

    Raises:
        `ValueError`: if it names no base.
    """
    if name_or_path.startswith("package:") or name_or_path.endswith(".gguf"):
        return None
    try:
        file = find_adapter_config_file(name_or_path, revision=revision)
    except OSError:  # no such folder: who loads the model says so
        file = None
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise ValueError(f"{name_or_path!r} is an adapter with a broken {CONFIG}: it is no JSON object") from None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{name_or_path!r} is an adapter of no base: put base_model_name_or_path into its {CONFIG}")
    beside = Path(file).parent / base
    return Adapter(
        name=name_or_path,
        revision=revision,
        base=os.path.normpath(beside) if beside.is_dir() else base,
        base_revision=config.get("revision"),
        classifies=config.get("task_type") == "SEQ_CLS",
    )


def transplanted(trained: PeftModel, base: PreTrainedModel) -> PreTrainedModel:
    """The base with an adapter in its weights that was trained over a quantized copy of it. The base is changed in place."""
    name = trained.active_adapter
    adapted = get_peft_model(base, copy.deepcopy(trained.peft_config[name]))
    # The embeddings were not trained, whatever their size: nothing but the adapter's own tensors.
    state = get_peft_model_state_dict(trained, adapter_name=name, save_embedding_layers=False)
    set_peft_model_state_dict(adapted, state)
    return adapted.merge_and_unload()


def save_adapter(trained: PeftModel, base: str, folder: Path, *, base_revision: str | None = None) -> None:
    """Writes the adapter alone, as safetensors, with its base's Hub name or its place seen from `folder`.

    Args:
        base (`str`): Folder or Hub name of the model that the adapter changes.
    """
    name = trained.active_adapter
    trained.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's card, with this machine's paths in it
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    local = Path(base).is_dir()
    config["base_model_name_or_path"] = os.path.relpath(base, folder) if local else base
    config["revision"] = None if local else base_revision
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
