"""Describes the environment of a measurement: device, libraries, threads, date."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from typing import Any

import timm
import torch

import fxgraft
from fxgraft.errors import ConfigError


def checked_device(device: str | torch.device) -> torch.device:
    """Turn a device name into a device that is there.

    Raises:
        ConfigError: the name means nothing to torch, or this machine has no such device.
    """
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ConfigError(
            f"This machine has no device {str(device)!r}, as far as torch can see.\n"
            f"It sees {', '.join(known)}; an accelerator needs its driver, and a torch that was built for it.\n"
            "Name one of these, or leave the device out."
        ) from error
    if checked.type == "meta":
        raise ConfigError(
            "The 'meta' device computes nothing, so nothing can be measured on it.\nTake \"cpu\", or an accelerator."
        )
    return checked


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
