"""The machine in words."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """The number of cores, and what they are: 2 x AMD EPYC."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"
