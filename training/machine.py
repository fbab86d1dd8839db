"""What figures were measured with: hardware and versions, as they stand beside every result."""

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from training.flags import ROOT


def hardware() -> str:
    """Processor, and GPU where there is one."""
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else []
    words = f"{os.cpu_count()} x {names[0] if names else platform.machine()}"
    if torch.cuda.is_available():
        words += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return words


def versions() -> dict[str, str]:
    """Of Python, torch, torchvision and this project's commit."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision"):
        with suppress(metadata.PackageNotFoundError):  # built from source, or not there
            found[name] = metadata.version(name)
    with suppress(OSError, subprocess.SubprocessError):  # no git, or no checkout
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        found["project"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found
