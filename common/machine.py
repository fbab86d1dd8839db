"""The machine and the project in words, for whoever reads what was measured on them."""

import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path


def processor() -> str:
    """The number of cores, and what they are: 2 x AMD EPYC."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def project() -> str:
    """The commit of this project, with "-dirty" if files have changed since; nothing outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""
