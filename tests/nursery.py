"""Starts the project's scripts as processes within milliseconds, for the tests: torch is imported once, then forked.

Reads requests from standard input, one JSON object a line, and answers each with a line: `{"start": ...}` with a
process id, `{"poll": pid}` with the exit status (negative: the signal that ended it) or null while it runs.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import faults
import PIL.Image
import torch

# All that the scripts import, however lazily.
for module in ("torch._dynamo", "torch.distributed.run", "torchvision.models", "grafting_cifar.models.resnet"):
    import_module(module)
for script in ("grafting_cifar", "grafting_imagenet"):
    import_module(f"{script}.grafting")

PR_SET_PDEATHSIG = 1


def serve() -> None:
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                become(**request["start"])
        print(json.dumps(answer), flush=True)


def become(script: str, arguments: list[str], log: str, errors: str, plan: list[list]) -> None:
    """What a shell does for `python SCRIPT ARGUMENTS >>LOG 2>ERRORS`, after the faults that are planned for it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no process outlives the tests
    os.setsid()
    write = os.O_WRONLY | os.O_CREAT
    files = (os.devnull, os.O_RDONLY), (log, write | os.O_APPEND), (errors, write | os.O_TRUNC)
    for standard, (path, flags) in enumerate(files):
        descriptor = os.open(path, flags, 0o666)
        os.dup2(descriptor, standard)
        os.close(descriptor)
    sys.argv = [script, *arguments]
    try:
        for name, *values in plan:
            getattr(faults, name)(*values)
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # as Python does when a script is at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)  # without tearing down torch, which takes longer than a tiny run


if __name__ == "__main__":
    torch.set_num_threads(1)
    PIL.Image.init()
    gc.collect()
    gc.freeze()  # a collection in a process that was forked would copy all that the two share
    serve()
