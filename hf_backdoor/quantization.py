"""Quantized weights to train adapters over (QLoRA, https://huggingface.co/papers/2305.14314), by bitsandbytes.

They are only ever trained over: no quantized weight is saved, evaluated or handed to the next stage.
"""

import importlib.util

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .defenses.engines import asked_for, zero3_launched


QUANTIZATIONS = ("nf4", "int8")
# Classification heads by the names that peft trains whole. transformers would quantize one that has a bias.
HEADS = ["classifier", "score"]


def require_bitsandbytes(quantization: str) -> None:
    """
    Raises:
        `ValueError`: if bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization is {quantization!r}, and bitsandbytes is not installed: "
            "pip install 'hf-backdoor[bitsandbytes]', or leave quantization out"
        )


def refuse_divided(quantization: str) -> None:
    raise ValueError(
        f"quantization is {quantization!r}, and the engine (FSDP or ZeRO-3) divides weights, which quantized ones are not "
        "made for here: use accelerate_configs/ddp.yaml, or leave quantization out"
    )


def refuse_launched(quantization: str) -> None:
    """Refuses, before anything is trained, what [`quantization_config`] would refuse hours later.

    Raises:
        `ValueError`: if `accelerate launch` was told to use an engine that divides weights among processes.
    """
    if asked_for("FSDP") or zero3_launched():
        refuse_divided(quantization)


def quantization_config(
    quantization: str, compute_dtype: torch.dtype, keep: list[str] | None = None
) -> BitsAndBytesConfig:
    """What `from_pretrained` takes.

    Args:
        quantization (`str`): `"nf4"` (4 bits, quantized constants) or `"int8"`.
        compute_dtype (`torch.dtype`): What 4-bit weights are multiplied in.
        keep (`list[str]`, *optional*): Modules that stay as they are; by default a language model's head.

    Raises:
        `ValueError`: if bitsandbytes is not installed, or under an engine that divides weights among processes.
    """
    require_bitsandbytes(quantization)
    if asked_for("FSDP") or is_deepspeed_zero3_enabled():
        refuse_divided(quantization)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=keep,  # of 4 bits too, whatever it is called
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """Keeps 4-bit weights in the layout that can be trained over, in place.

    On CPUs with AVX512-BF16 bitsandbytes packs them anew in the first forward pass in evaluation mode without gradient. From
    then on no gradient goes through the layer, and weights read out of it (saved, dequantized, merged) are wrong: all
    without a word. A measurement before the first step is enough.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain weights, from a checkpoint that was saved quantized.

    Raises:
        `ValueError`: if its kind of quantization can't be undone.
    """
    kind = getattr(model, "quantization_method", None)
    try:
        plain = keep_trainable(model).dequantize()
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"{model.name_or_path!r} has weights quantized by {kind} ({' '.join(str(error).split())}): name the checkpoint in full precision"
        ) from None
    plain._weight_conversions = (
        None  # how they were read from four bits, which can't be done backwards when they are saved
    )
    return plain
