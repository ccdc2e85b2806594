"""Engines that share a model out over processes (FSDP2, DeepSpeed ZeRO): what a trainer must know of them."""

import contextlib
import os
from collections.abc import Iterable

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import nn
from transformers import PreTrainedModel, TrainingArguments


SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_engine(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuses a run whose engine is not the one asked for: accelerate falls back to another without a word.

    Raises:
        `ValueError`: if FSDP or DeepSpeed was asked for and something else runs, or FSDP's first version does.
    """
    engine = accelerator.distributed_type
    if (args.fsdp or asked_for("FSDP")) and engine != DistributedType.FSDP:
        raise ValueError(
            f"fsdp is asked for, and the engine is {engine.value}: it needs a GPU for each of several processes; on CPUs use "
            "accelerate_configs/ddp.yaml or zero3.yaml"
        )
    if (args.deepspeed or asked_for("DEEPSPEED")) and engine != DistributedType.DEEPSPEED:
        raise ValueError(
            f"deepspeed is asked for, and the engine is {engine.value}: start it with `accelerate launch --config_file "
            "accelerate_configs/zero3.yaml` (without --cpu), or leave deepspeed out"
        )
    if engine == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("fsdp_version is 1, which transformers has given up: set fsdp_version: 2")


def asked_for(engine: str) -> bool:
    """Whether `accelerate launch` was told to use an engine."""
    return parse_flag_from_env(f"ACCELERATE_USE_{engine}")


def zero3_launched() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed ZeRO-3: known before a trainer is made."""
    if not asked_for("DEEPSPEED"):
        return False
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is None:
        return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return HfDeepSpeedConfig(file).is_zero3()


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Names of the classes of a model's layers: what FSDP shards one by one.

    `_no_split_modules` of BERT and its kin also lists the module that holds the input embeddings. accelerate shards these by
    themselves (https://github.com/huggingface/accelerate/pull/4015), and would do it twice.
    """
    embeddings = model.get_input_embeddings()
    holders = {type(module).__name__ for module in model.modules() if embeddings in module.modules()}
    return [name for name in model._no_split_modules or () if name not in holders]


def shared_out(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """A frozen teacher in the student's engine: sharded under FSDP2 and ZeRO-3, whole on each process under any other."""
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.fsdp import fully_shard

        names = layer_classes(teacher)
        policy = {"reshard_after_forward": accelerator.state.fsdp_plugin.reshard_after_forward}
        if accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
            policy["mp_policy"] = accelerator.state.fsdp_plugin.mixed_precision_policy
        for module in [module for module in teacher.modules() if type(module).__name__ in names]:
            fully_shard(module, **policy)
        return fully_shard(teacher, **policy)
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    if plugin is not None and plugin.zero_stage == 3:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(teacher, accelerator).module
    return teacher.to(accelerator.device)


def gather(wrapped: nn.Module, accelerator: Accelerator) -> None:
    """Gives a sharded model its whole weights back, in the memory of the first process; call it on every process.

    The model can be saved and changed afterwards, not run. Other processes are left with their shards.

    Args:
        wrapped (`nn.Module`): The model as the engine gave it back.
    """
    if accelerator.distributed_type not in SHARDED:
        return
    state = accelerator.get_state_dict(wrapped)
    if not accelerator.is_main_process:
        return
    model = accelerator.unwrap_model(wrapped)
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            # Tied weights stay one parameter.
            if parameter not in whole:
                value = state[f"{prefix}.{name}" if prefix else name]
                whole[parameter] = nn.Parameter(value.cpu(), requires_grad=parameter.requires_grad)
            module._parameters[name] = whole[parameter]


def forget_engine() -> None:
    """Lets the next trainer of this process make an engine of its own, with its own batch sizes and rates: accelerate goes on with
    the first one's. Call it when trainer and arguments are gone, on every process."""
    if AcceleratorState._shared_state and AcceleratorState().distributed_type in SHARDED:
        AcceleratorState._reset_state()


def whole(parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    """Inside of it, parameters that ZeRO-3 has divided when the model was loaded are there on every process, to be read."""
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided)
