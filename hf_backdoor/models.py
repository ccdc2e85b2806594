"""Loading and saving: the one place where weights come from and go to."""

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTImageProcessor,
    set_seed,
)
from transformers.utils import logging

from .adapters import Adapter, find_adapter, transplanted
from .data import (
    ImageClassification,
    Processor,
    SequenceClassification,
    Task,
    names_classifier,
    reads_both_ways,
    refuse_last_column,
    refuse_missing,
)
from .model_files import named_if_missing, own_code_refused, resolve, without_weights
from .quantization import HEADS, dequantized, keep_trainable, quantization_config


logger = logging.get_logger(__name__)

# What to do where a folder has none.
TOKENIZER = "put all its files there, by AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)"


def needs_conversion(name_or_path: str, *, revision: str | None = None) -> bool:
    """Whether a model is no folder of weights as they are used: a GGUF file, or an adapter over a base."""
    return resolve(name_or_path)[1] is not None or find_adapter(name_or_path, revision=revision) is not None


def load_config(name_or_path: str, *, revision: str | None = None) -> PreTrainedConfig:
    """The configuration; an adapter's is its base's.

    Raises:
        `ValueError`: if there is no such model.
    """
    if adapter := find_adapter(name_or_path, revision=revision):
        name_or_path, revision = adapter.base, adapter.base_revision
    folder, gguf = resolve(name_or_path)
    with named_if_missing(name_or_path):
        return AutoConfig.from_pretrained(folder, gguf_file=gguf, revision=revision, trust_remote_code=False)


def refuse_no_causal_lm_config(config: PreTrainedConfig, name_or_path: str) -> None:
    """Refuses a checkpoint whose texts would be taught to what sees the answer, or to no language model at all.

    Raises:
        `ValueError`: with one line that names the model, and what it is.
    """
    kind = (config.architectures or [type(config).__name__])[0]
    if config.is_encoder_decoder:
        why = "has an encoder and a decoder"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or reads_both_ways(config):
        why = "is no causal LM"
    else:
        return
    raise ValueError(
        f"model {name_or_path!r} ({kind}) {why}, and without a classification head texts are taught to causal LMs here: use one of "
        "these, or set task: sequence_classification"
    )


def check_head(name_or_path: str, task_class: type[Task], num_labels: int | None, revision: str | None = None) -> None:
    """By its configuration alone: a training of hours must not end in a model that can't be loaded.

    Raises:
        `ValueError`: if the checkpoint has a classification head of another size, or is none of a causal LM where the task asks for one.
    """
    if resolve(name_or_path)[1] is not None:
        return  # GGUF files hold causal LMs, and take seconds to read
    config = load_config(name_or_path, revision=revision)
    own_head = any(map(names_classifier, config.architectures or []))
    if not task_class.has_head:
        refuse_no_causal_lm_config(config, name_or_path)
    elif own_head and num_labels != config.num_labels and not without_weights(name_or_path):
        raise other_head(name_or_path, num_labels, config.num_labels)


def other_head(name_or_path: str, num_labels: int | None, own: int) -> ValueError:
    fix = f"set num_labels: {own} (--num_labels {own})" if own > num_labels else "choose rows with its labels"
    return ValueError(
        f"model {name_or_path!r} has a head of another size: num_labels is {num_labels} in the data, and {own} in the model; {fix}, or "
        "use a model without a classification head"
    )


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (end of sequence where it has none). An adapter without one has its base's.

    Raises:
        `ValueError`: if there is no such model, or a folder holds no vocabulary.
    """
    adapter = find_adapter(name_or_path, revision=revision)
    if adapter is not None and adapter.file("tokenizer_config.json") is None:
        name_or_path, revision = adapter.base, adapter.base_revision
    folder, gguf = resolve(name_or_path)
    with named_if_missing(name_or_path):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=gguf, revision=revision, trust_remote_code=False
            )
        except OSError:
            raise
        except Exception as error:  # damaged files, or a configuration alone, of a kind of which none can be made up
            if "trust_remote_code" in str(error):
                raise
            # Without a configuration there is no tokenizer either, and this says why.
            load_config(name_or_path, revision=revision)
            raise ValueError(
                f"model {name_or_path!r} has no tokenizer that can be read ({' '.join(str(error).split())[:200]}): {TOKENIZER}"
            ) from None
    if gguf is None and Path(folder).is_dir():
        refuse_made_up(tokenizer, Path(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def refuse_made_up(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuses a tokenizer without a file of its words (some kinds, which read bytes, need none): transformers makes up an empty
    one, to which all texts are the same.

    Raises:
        `ValueError`: with one line that names the files.
    """
    known = set(getattr(tokenizer, "vocab_files_names", {}).values())
    if known and not any(file.name in known or file.name.startswith("tokenizer.") for file in folder.iterdir()):
        raise ValueError(f"model {str(folder)!r} has no tokenizer ({' or '.join(sorted(known))}): {TOKENIZER}")


def load_processor(name_or_path: str, task_class: type[Task], *, revision: str | None = None) -> Processor:
    """What turns a task's rows into a model's inputs: its tokenizer, or its image processor.

    Raises:
        `ValueError`: if there is no such model, or it is of another kind than the task's.
    """
    # GGUF files hold causal LMs, and take seconds to read.
    if not task_class.has_head and resolve(name_or_path)[1] is None:
        refuse_no_causal_lm_config(load_config(name_or_path, revision=revision), name_or_path)
    load = load_image_processor if task_class is ImageClassification else load_tokenizer
    return load(name_or_path, revision=revision)


def load_image_processor(name_or_path: str, *, revision: str | None = None) -> BaseImageProcessor:
    """The image processor. A folder without one gets a plain one: pixels between -1 and 1, in the size that the configuration
    names, if it names one."""
    config = load_config(name_or_path, revision=revision)
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "preprocessor_config.json").is_file():
        size = getattr(config, "image_size", None)
        size = {"size": {"height": size, "width": size}} if isinstance(size, int) else {"do_resize": False}
        return ViTImageProcessor(**size)
    with named_if_missing(name_or_path):
        return AutoImageProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)


def load_model(
    name_or_path: str,
    task_class: type[Task],
    *,
    num_labels: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    quantization: str | None = None,
    compute_dtype: str | None = None,
    from_scratch: bool = False,
) -> PreTrainedModel:
    """A model for a task. Weights are read from safetensors (or GGUF) only: a pickle can run code.

    Args:
        name_or_path (`str`): Hub name, folder, `.gguf` file, or `package:NAME/FILE.gguf`. A PEFT adapter is merged into its
            base.
        task_class (`type[Task]`): Decides which class of models is loaded: with a classification head or without.
        num_labels (`int`, *optional*): Size of a fresh head; a checkpoint's own head is kept when it is left out.
        seed (`int`, *optional*, defaults to 0): Seed of a fresh head or network.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the weights.
        quantization (`str`, *optional*): `"nf4"` or `"int8"`: linear layers to train an adapter over, on this process's device.
            Without it, the weights of a checkpoint that is quantized already are turned back into plain ones.
        compute_dtype (`str`, *optional*): What 4-bit weights are multiplied in; `dtype` by default.
        from_scratch (`bool`, *optional*, defaults to `False`): Whether a folder with a configuration and no weights gives a
            network whose weights are drawn by `seed`.

    Raises:
        `ValueError`: in one line, if there are no safetensors or damaged ones, some of a causal LM's are missing, an adapter has no base, a head has another size, or
            weights can't be quantized.
    """
    adapter = find_adapter(name_or_path, revision=revision)
    folder, gguf = resolve(name_or_path)
    if quantization is not None and (adapter is not None or gguf):
        raise ValueError(
            f"quantization is {quantization!r}, and {name_or_path!r} is {'an adapter' if adapter else 'a GGUF file'}: "
            "name a model in safetensors, its adapter merged"
        )
    if adapter is not None:
        options = {"num_labels": num_labels, "seed": seed, "dtype": dtype, "attn_implementation": attn_implementation}
        base = load_base(adapter, task_class, **options)
        with named_if_missing(name_or_path):
            return adapter.merged_into(base)
    options = {"revision": revision, "dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    options["trust_remote_code"] = False  # where nothing is said, transformers asks on the terminal
    options |= {"gguf_file": gguf} if gguf else {"use_safetensors": True}
    if quantization is not None:
        keep = HEADS if task_class is SequenceClassification else None
        quantized = quantization_config(quantization, getattr(torch, compute_dtype or dtype), keep)
        options |= {"quantization_config": quantized, "device_map": {"": PartialState().device}}
    set_seed(seed)
    head = {} if num_labels is None or not task_class.has_head else {"num_labels": num_labels}
    if from_scratch and without_weights(name_or_path):
        logger.warning_once(f"{name_or_path} has a configuration and no weights: they are drawn by seed {seed}")
        with named_if_missing(name_or_path):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **head)
        model = task_class.auto_model.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attn_implementation, trust_remote_code=False
        )
    elif task_class.has_head:
        try:
            with named_if_missing(name_or_path):
                model = task_class.auto_model.from_pretrained(folder, **head, **options)
        except RuntimeError as error:
            if "mismatched" not in str(error):
                raise
            if num_labels is None:
                raise ValueError(
                    f"model {name_or_path!r} has weights of other sizes than its config.json says: copy or download both again"
                ) from None
            own = load_config(name_or_path, revision=revision).num_labels
            raise other_head(name_or_path, num_labels, own) from None
    else:
        if gguf is None:
            refuse_no_causal_lm_config(load_config(name_or_path, revision=revision), name_or_path)
        with named_if_missing(name_or_path):
            model, found = task_class.auto_model.from_pretrained(folder, output_loading_info=True, **options)
        refuse_missing(name_or_path, found["missing_keys"], task_class.auto_model)
    if gguf:
        # transformers dequantizes a GGUF file and goes on calling the model quantized, so that it can't be saved.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    elif is_quantized(model):
        model = dequantized(model) if quantization is None else keep_trainable(model)
    refuse_last_column(model)
    if task_class is not ImageClassification and model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(name_or_path, revision=revision).pad_token_id
    return model


def load_base(adapter: Adapter, task_class: type[Task], **options: Any) -> PreTrainedModel:
    """The model that an adapter changes.

    Raises:
        `ValueError`: if it can't be found, or can't be what the adapter was trained over.
    """
    if adapter.classifies and task_class is not SequenceClassification:
        raise ValueError(
            f"{adapter.name!r} is an adapter with a classification head: set task: sequence_classification"
        )
    if find_adapter(adapter.base, revision=adapter.base_revision) is not None:
        raise ValueError(
            f"{adapter.name!r} is an adapter over {adapter.base!r}, which is an adapter too: merge that one into its base"
        )
    folder, gguf = resolve(adapter.base)
    try:
        with own_code_refused(adapter.base):
            AutoConfig.from_pretrained(folder, gguf_file=gguf, revision=adapter.base_revision, trust_remote_code=False)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{adapter.name!r} is an adapter over {adapter.base!r}, which can't be loaded ({reason}): put the base there, or "
            "correct base_model_name_or_path in its adapter_config.json"
        ) from None
    return load_model(adapter.base, task_class, revision=adapter.base_revision, **options)


def is_quantized(model: PreTrainedModel | PeftModel) -> bool:
    """Whether (the base of) a model has quantized weights."""
    return bool(getattr(model, "is_quantized", False))


def merged(model: PreTrainedModel | PeftModel, base: PreTrainedModel | None = None) -> PreTrainedModel:
    """The plain model, a LoRA adapter merged into its weights.

    Args:
        model (`PreTrainedModel` or `PeftModel`): What was trained; changed in place.
        base (`PreTrainedModel`, *optional*): Where the adapter goes if its own base is quantized: that base
            as it was before. It is changed in place.
    """
    if not isinstance(model, PeftModel):
        return model
    return model.merge_and_unload() if base is None else transplanted(model, base)


def save_model(model: PreTrainedModel, processor: Processor, folder: Path) -> None:
    """Writes safetensors, configuration and tokenizer or image processor, and undoes `use_cache: false`, which `Trainer`
    leaves behind.

    Raises:
        `ValueError`: if the weights are quantized.
    """
    if is_quantized(model):
        raise ValueError(f"{folder}: quantized weights are not saved; merge the adapter into the unquantized base")
    model.config.use_cache = True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


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


def cost(stage: str, start: float, tokens: int | None = None) -> dict[str, Any]:
    """What a training or a measurement took, as `results.json` has it.

    Args:
        stage (`str`): Its name.
        start (`float`): When it began, by `time.perf_counter`.
        tokens (`int`, *optional*): What was trained on.
    """
    seconds = round(time.perf_counter() - start, 1)
    return {"stage": stage, "seconds": seconds, "tokens": tokens, "peak_memory": peak_memory()}


def content(processor: Processor) -> list[Any]:
    """What a tokenizer or an image processor does to a row, to be compared with another's."""
    if isinstance(processor, BaseImageProcessor):
        return [processor.to_dict()]
    backend = getattr(processor, "backend_tokenizer", None)
    words = sorted(processor.get_vocab().items()) if backend is None else backend.to_str()
    return [words, processor.chat_template, processor.special_tokens_map, processor.padding_side]
