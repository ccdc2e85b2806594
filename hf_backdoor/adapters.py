"""PEFT adapters on disk: a suspect that is a base and an adapter, and the adapter that a defense trained."""

import copy
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file


CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Of a LoRA adapter's configuration: what two adapters may differ in and still be one, of their ranks together. Any other field
# changes what their weights mean (DoRA's magnitudes, a scaling by the root of the rank, an initialization that changes the base).
FREE = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "task_type", "fan_in_fan_out",
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
}  # fmt: skip


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


def save_adapter(
    trained: PeftModel, base: str, folder: Path, *, base_revision: str | None = None, before: Path | None = None
) -> None:
    """Writes the adapter alone, as safetensors, with its base's Hub name or its place seen from `folder`.

    Args:
        base (`str`): Folder or Hub name of the model that the adapter changes.
        before (`Path`, *optional*): An adapter over `base` that was merged into it before this one was trained. Both are written,
            as one.
    """
    name = trained.active_adapter
    trained.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's card, with this machine's paths in it
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if before is not None:
        config |= _stack(before, folder)
    local = Path(base).is_dir()
    config["base_model_name_or_path"] = os.path.relpath(base, folder) if local else base
    config["revision"] = None if local else base_revision
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stackable(trained: PeftModel, before: Path) -> bool:
    """Whether an adapter, and the one on disk that was merged before it was trained, can be written as one."""
    plain = LoraConfig().to_dict()
    return all(
        isinstance(config, LoraConfig)
        and all(value == plain[field] for field, value in config.to_dict().items() if field not in FREE)
        for config in (PeftConfig.from_pretrained(str(before)), trained.peft_config[trained.active_adapter])
    )


def _stack(before: Path, folder: Path) -> dict[str, Any]:
    """Writes the weights of the adapter `before` and those in `folder` there as one adapter's; gives what is new in its configuration.

    Two changes of low rank are one, of their ranks together: B1 A1 + B2 A2 = [B1 B2] [A1; A2]. A head is the later one's. (peft's
    `add_weighted_adapter` stacks too: with the whole model in memory, and not where both adapters bring a head.)
    """
    configs = [json.loads((each / CONFIG).read_text(encoding="utf-8")) for each in (before, folder)]
    rank = sum(config["r"] for config in configs)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for config, each in zip(configs, (before, folder), strict=True):
        for name, value in load_file(each / WEIGHTS).items():
            parts[name].append(value * (config["lora_alpha"] / config["r"]) if _rank_dimension(name) == 0 else value)
    state = {name: _joined(values, rank, _rank_dimension(name)) for name, values in parts.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    changed = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in state if ".lora_" in name}
    return {"r": rank, "lora_alpha": rank, "target_modules": sorted(changed)}


def _rank_dimension(name: str) -> int | None:
    """Where a tensor of an adapter has the rank: A is [rank, in], B is [out, rank], and a head's has none."""
    found = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.|$)", name)
    return found and "AB".index(found[1])


def _joined(values: list[Tensor], rank: int, dimension: int | None) -> Tensor:
    """One tensor of all adapters; zeros stand for one that leaves this module as it is."""
    if dimension is None:
        return values[-1]
    value = torch.cat(values, dimension)
    shape = list(value.shape)
    shape[dimension] = rank - shape[dimension]
    return torch.cat([value, value.new_zeros(shape)], dimension)
