"""Describes the machine that a measurement runs on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Machine", "describe_machine"]


@dataclass(frozen=True)
class Machine:
    """The facts that a reader needs to judge a timing."""

    cpu: str  # model name
    cpus: int  # logical processors that this process may use
    threads: int  # threads of torch
    gpu: str | None  # model name of the measured GPU
    torch: str  # version and build
    system: str  # operating system and Python
    load: float | None  # load average over the last minute; None if the system has none

    def __str__(self) -> str:
        parts = [f"{self.cpu}, {self.cpus} CPUs, {self.threads} torch {'thread' if self.threads == 1 else 'threads'}"]
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
    found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
