"""python networks.py CASES: runs code as the networks of rings, each a fork of this process: torch is imported once.

CASES is a file with a list of cases in JSON: {"folder", "networks", "first": code for this process, "blocks": code for
each network after that, with its number as `i`}. When one network fails, the others are not waited for.
"""

import json
import os
import signal
import sys
import traceback


def run(folder: str, networks: int, first: str, blocks: list[str]) -> None:
    os.chdir(folder)
    space = {"os": os, "sys": sys}
    exec(first, space)
    sys.stdout.flush()
    children = {}
    for i in range(1, networks + 1):
        child = os.fork()
        if child == 0:
            become(space | {"i": i}, blocks)
        children[child] = i
    while children:
        child, status = os.wait()
        del children[child]
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def become(space: dict, blocks: list[str]) -> None:
    status = 1
    try:
        space["torch"].manual_seed(space["i"])
        for block in blocks:
            exec(compile(block, block, "exec"), space)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        for case in json.load(file):
            run(**case)
