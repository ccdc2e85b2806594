"""The processes of a launch: whether all that were asked for are there, and know of each other."""

import os

import torch
from accelerate import PartialState


def refuse_lost_processes() -> None:
    """`accelerate launch` for several CPU processes starts one and says nothing.

    Raises:
        `ValueError`: if several processes were asked for and this is the only one.
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate was asked for several processes and started one (it does so for CPUs): "
            "use `torchrun --nproc_per_node N -m hf_backdoor.run RECIPE`, or num_processes: 1"
        )


def find_processes() -> None:
    """Lets the processes of a launch find each other. On CPUs each would take itself for the first one until the first trainer is made.

    Raises:
        `ValueError`: if fewer did than were started.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were started, and {state.num_processes} found each other"
        )
