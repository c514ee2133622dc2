"""The machine that a measurement was taken on, in words."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Machine", "describe_machine"]


@dataclass(frozen=True)
class Machine:
    """The facts that a reader needs to judge a timing.

    Attributes:
        cpu: Model name of the processor.
        cpus: Logical processors that this process may use.
        threads: Threads that torch computes with.
        gpu: Name of the GPU that was measured, or None.
        torch: Version of torch, with its build.
        system: Operating system and Python.
        load: Load average over the minute before the measurement, or None if the system has none. 0 on a quiet machine;
            other programs distort timings.
    """

    cpu: str
    cpus: int
    threads: int
    gpu: str | None
    torch: str
    system: str
    load: float | None

    def __str__(self) -> str:
        parts = [f"{self.cpu}, {self.cpus} CPUs, {self.threads} torch threads"]
        if self.gpu:
            parts.append(self.gpu)
        parts += [f"torch {self.torch}", self.system]
        if self.load is not None:
            parts.append(f"load average at the start {self.load:.1f}")
        return "; ".join(parts)


def describe_machine(device: torch.device) -> Machine:
    """Describes this machine and, where `device` is a GPU, that GPU."""
    return Machine(
        cpu=_cpu_model(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        torch=torch.__version__,
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
