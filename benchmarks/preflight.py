#!/usr/bin/env python
"""What this machine has: its GPU, capability, driver, compiler and memory. Fails where torch cannot use the GPU.

python benchmarks/preflight.py --device cuda
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools


def main(arguments: list[str] | None = None) -> None:
    args = tools.parse(tools.parser(__doc__), arguments)
    shared = Path("/dev/shm")
    found = {
        "cores": os.cpu_count(),
        "compiler": shutil.which("cc") or shutil.which("gcc") or "none",
        "/dev/shm free (GB)": shutil.disk_usage(shared).free / 1e9 if shared.is_dir() else 0.0,
        "MPS": shutil.which("nvidia-cuda-mps-control") or "none",
    }
    if args.device.type == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        found |= {"GPU": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"GPU memory (GB)": properties.total_memory / 1e9, "CUDA": torch.version.cuda}
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
        found |= {"cuDNN": torch.backends.cudnn.version(), "driver": driver}
        torch.ones(8, device=args.device).sum().item()
    tools.Table("preflight", "The machine.", args).add(**found)


if __name__ == "__main__":
    main()
