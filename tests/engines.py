"""The engines that share a model out over processes, on two CPU processes."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.state
import tiny
from accelerate.utils import DistributedType


ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# What the engine's name in the launcher's terms, and the class that it puts around a model, must be.
EVIDENCE = {
    "ddp": (DistributedType.MULTI_CPU, "DistributedDataParallel"),
    "fsdp2": (DistributedType.FSDP, "FSDP"),
    "zero2": (DistributedType.DEEPSPEED, "DeepSpeedEngine"),
    "zero3": (DistributedType.DEEPSPEED, "DeepSpeedEngine"),
}


def arguments(engine: str) -> dict[str, Any]:
    """Training arguments that ask for an engine."""
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    if engine == "ddp":
        return {}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": int(engine[len("zero")]), "stage3_gather_16bit_weights_on_model_save": True}
    config = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(auto, "auto")}
    if engine.endswith("_offload"):
        zero |= dict.fromkeys(("offload_optimizer", "offload_param"), {"device": "cpu"})
        # DeepSpeed's own optimizer for CPUs would be compiled when it is first used, for minutes: torch's takes its place.
        config["zero_force_ds_cpu_optimizer"] = False
    return {"deepspeed": config}


def launched(engine: str) -> dict[str, str]:
    """What `accelerate launch` with the shipped configuration of an engine sets in the environment."""
    if engine == "fsdp2":
        return {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        }  # fmt: skip
    if engine == "ddp":
        return {}
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": engine[-1]}
    if engine == "zero3":
        zero |= dict.fromkeys(
            ("ACCELERATE_DEEPSPEED_ZERO3_INIT", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"), "true"
        )
    return zero


def in_engine(engine: str, work: Callable[[], Any], folder: Path, environment: dict[str, str] | None = None) -> Any:
    """What `work` gives in the first of two forked processes in which an engine can run."""

    def child() -> Any:
        os.environ.pop("ACCELERATE_USE_CPU", None)  # the test launcher sets it, and it would turn DeepSpeed off
        os.environ.update(environment or {})
        if engine == "fsdp2":
            _allow_fsdp_on_cpus()
        if engine.startswith("zero"):
            _start_deepspeed()
        gc.freeze()  # with what was imported just now: see conftest.py
        return work()

    return tiny.in_two_processes(child, folder)


def _allow_fsdp_on_cpus() -> None:
    """accelerate 1.15 knows FSDP on GPUs alone, and runs DDP on CPUs without a word; PyTorch's FSDP2 does run there."""
    state = accelerate.state
    initialize = state.AcceleratorState.__init__

    def promoted(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = promoted


def _start_deepspeed() -> None:
    import deepspeed
    import deepspeed.ops

    # It would be compiled when it is first used: a minute, for an exchange through shared memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
