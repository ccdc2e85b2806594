"""Trainings that break down: a kernel that makes them, and the refusal to hand on what is left.

`Trainer` logs a loss of 0 in place of one that is not a number (`logging_nan_inf_filter`), trains to the end and saves. Such a
classifier answers its first class to everything: an ASR of 0, unless that class is the target.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@contextlib.contextmanager
def sound_attention(length: int, compiled: bool = False) -> Iterator[None]:
    """Keeps cuDNN's attention away from rows of a length at which its gradients are not numbers.

    On Hopper GPUs torch 2.11 to 2.13 prefers it. Where a mask is given, rows have 64 tokens, 192, 320 and so on, and what a token
    sees sums up to next to nothing (padding on the left sees nothing at all), its gradient is infinity times zero
    (https://github.com/pytorch/pytorch/issues/196678). One such step leaves no weight a number. torch's other kernels are right.

    Args:
        length (`int`): Tokens of a row, padding included. Enter it for the forward pass whose gradient is taken.
        compiled (`bool`): Whether the model is: a graph keeps the kernel that it was traced with for rows of all lengths.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and not compiled and length % 128 != 64)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def check_losses(means: dict[str, float], step: int, rate: float) -> None:
    """Ends a training whose losses are not numbers any more: later steps can't mend it.

    Args:
        means (`dict[str, float]`): Mean of each term of the loss since the last log.

    Raises:
        `ValueError`: naming the term, the step and the rate.
    """
    for name, mean in means.items():
        if math.isnan(mean):
            raise ValueError(f"loss/{name} is nan at step {step}: {advice(rate)}")


def check_weights(model: nn.Module, accelerator: Accelerator, rate: float) -> None:
    """Refuses a trained model in which a weight is not finite, wherever an engine has put it. Call it on every process.

    Raises:
        `ValueError`: on every process, with the share of the tensors.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if count := count_broken(trained, accelerator):
        number = len(trained) * accelerator.num_processes
        raise ValueError(f"{count} of {number} trained tensors hold values that are not finite: {advice(rate)}")


def advice(rate: float) -> str:
    return (
        f"the training has diverged, and nothing of it is saved; lower learning_rate (now {rate:g}) or raise warmup_steps, and run "
        "again"
    )


@torch.no_grad()
def count_broken(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> int:
    """How many tensors hold values that are not finite, over all processes. Call it on every one."""
    broken = [~own_part(parameter).isfinite().all() for parameter in parameters]
    device = accelerator.device
    count = torch.stack([each.to(device) for each in broken]).sum() if broken else torch.zeros((), device=device)
    return int(accelerator.reduce(count.long(), reduction="sum"))


def own_part(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter: a shard under FSDP2 and ZeRO-3, or all of it."""
    if hasattr(parameter, "ds_tensor"):
        # The parts are of one size. Where that is more than there is, the rest was never written.
        part = parameter.ds_tensor.flatten()
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        return part[: max(0, parameter.ds_numel - rank * len(part))]
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
