"""Describes the environment of a measurement: device, libraries, threads, date."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from typing import Any

import timm
import torch

import fxgraft


def processor(device: torch.device) -> str:
    """Name what a device is: the GPU's product, or the CPU's architecture and vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide a result."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "fxgraft": fxgraft.__version__,
    }


def environment(device: str | torch.device) -> dict[str, Any]:
    """Say what a result was measured with: versions, device, threads, date (UTC)."""
    return {
        **versions(),
        "device": processor(torch.device(device)),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }
