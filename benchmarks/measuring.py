"""What the benchmarks share: peak memory, step times, the machine they ran on, and how a result is told.

Time on the CPU is the process's CPU time, of all its threads (run with OMP_WAIT_POLICY=PASSIVE, or waiting counts too).

Memory on a GPU is what torch has allocated. On the CPU it is the process's resident set; what `malloc` keeps of freed
tensors would count as used, and differs from run to run by a tenth, so it is measured under [`tight_allocations`].
"""

import contextlib
import ctypes
import gc
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_backdoor.models import peak_memory, reset_peak_memory
from hf_backdoor.versions import versions


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On the CPU a step's time is what the process was given: others at work on the machine don't count.
clock = time.perf_counter if DEVICE == "cuda" else time.process_time
# Parameters of glibc's mallopt, and the largest threshold that it comes to by itself.
TRIM_THRESHOLD, MMAP_THRESHOLD, LARGEST_THRESHOLD = -1, -3, 2**25


def begin() -> None:
    """Before anything is measured: no progress bars, and no look at all that was imported whenever memory is given back."""
    disable_progress_bars()
    gc.collect()
    gc.freeze()


def release() -> None:
    """Gives freed memory back."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def tight_allocations() -> Iterator[None]:
    """On Linux's CPUs: what is freed is given back at once, so that the resident set is what is in use. Not for timing,
    since every tensor's pages are then made anew."""
    if DEVICE == "cuda" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(MMAP_THRESHOLD, 2**16)
    release()
    try:
        yield
    finally:
        # Where the default, which grows with what is freed, ends up in training.
        libc.mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)


def held_memory() -> int:
    """Bytes in use now, as [`peak_memory`] counts them."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) * 1024 if found else 0


class StepMeter(TrainerCallback):
    """Seconds of each optimizer step, and the memory that the last step takes.

    Args:
        memory (`bool`): Whether to look at memory; times are then of no use.

    Attributes:
        seconds (`list[float]`): Of each step.
        step_memory (`int`): Bytes at the peak of the last step beyond what is held between steps (weights, optimizer states).
        peak (`int`): Bytes at the peak of the last step.
    """

    def __init__(self, memory: bool = False) -> None:
        self.memory = memory
        self.seconds: list[float] = []
        self.step_memory = self.peak = self._held = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.memory:
            release()
            reset_peak_memory()
            self._held = held_memory()
        synchronize()
        self._start = clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(clock() - self._start)
        if self.memory:
            self.peak = peak_memory() or 0
            self.step_memory = self.peak - self._held


def train(trainer: Trainer, meter: StepMeter | None = None) -> float:
    """Trains without a word, and gives the seconds of it all."""
    trainer.remove_callback(PrinterCallback)
    if meter is not None:
        trainer.add_callback(meter)
    start = clock()
    trainer.train()
    synchronize()
    return clock() - start


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def tell(rows: list[dict[str, Any]], output: Path | None, **more: Any) -> None:
    """Prints the result as one JSON line, and writes it to a file if there is one."""
    result = {
        "rows": rows,
        **more,
        "device": device_name(),
        "machine": platform.machine(),
        "date": str(date.today()),
        "versions": versions(),
    }
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
