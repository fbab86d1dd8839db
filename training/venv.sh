#!/bin/sh
# Prints the path of a Python that has what the requirement files list: python=$(sh training/venv.sh requirements.txt)
# That is the user's own (PYTHON, or python3) if it has everything; nothing is ever installed into it. Otherwise it is
# .venv in the checkout, made by the first call. Without a file nothing is made, and any Python new enough will do.
set -eu
own=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)' 2>/dev/null) || own=
cd -- "$(dirname -- "$0")/.."
fail() { printf '%s\n' "$*" >&2; exit 1; }
lacking='import re, sys  # prints the first thing that this Python lacks, if any
if sys.version_info < (3, 10): sys.exit(print("Python 3.10"))
from importlib.metadata import distributions
numbers = lambda version: [int(number) for number in re.findall(r"\d+", version)[:3]]
for name, _, least in (line.strip().partition(">=") for path in sys.argv[1:] for line in open(path)):
    if name and not any(numbers(found.version) >= numbers(least) for found in distributions(name=name)):
        sys.exit(print(name))'
state=$(cat .venv/state 2>/dev/null || :) # complete, unfinished, or nothing where this script has not made .venv
[ "$state" = unfinished ] || [ ! -x .venv/bin/python ] || venv=$PWD/.venv/bin/python
for python in ${own:+"$own"} ${venv:+"$venv"}; do
    lacks=$("$python" -c "$lacking" "$@")
    [ -n "$lacks" ] || { printf '%s\n' "$python"; exit; }
done
[ -n "$own" ] || fail "${PYTHON:-python3} does not start; install Python 3.10, or name it, as in PYTHON=/path/to/python3.12"
[ "$lacks" != "Python 3.10" ] || fail "$own is older than Python 3.10; name another, as in PYTHON=python3.12"
[ ! -e .venv ] || [ -n "$state" ] || rmdir .venv 2>/dev/null \
    || fail "$PWD/.venv was not made by this script, and lacks $lacks: install that there, or move it away"
if [ -z "${VENV_IS_LOCKED-}" ]; then # one call at a time, and each looks anew; however it ends, the kernel unlocks
    echo "$own lacks $lacks: setting up $PWD/.venv …" >&2
    VENV_IS_LOCKED=yes exec "$own" -c 'import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_EX)
os.set_inheritable(lock, True)
os.execvp("sh", ["sh", *sys.argv[1:]])' training/venv.sh "$@"
fi
if [ "$state" != complete ]; then
    rm -rf .venv && mkdir .venv && echo unfinished >.venv/state
    "$own" -m venv .venv >&2 || fail "$own cannot make .venv; install its venv module (Debian, Ubuntu: python3-venv)"
    # Where only smaller packages are lacking, the user's torch, a build for their GPU perhaps, is used as it is.
    "$own" -c 'import importlib.util as u, sys
if u.find_spec("torch") and u.find_spec("torchvision"): print(*(p for p in sys.path if "-packages" in p), sep="\n")' \
        >"$(echo .venv/lib/python*/site-packages)/own.pth"
fi
echo unfinished >.venv/state # begun anew by the next call, if it stays so
.venv/bin/python -m pip install --disable-pip-version-check $(printf ' -r %s' "$@") >&2 \
    || fail "the installation failed; the same command tries once more"
echo complete >.venv/state
printf '%s\n' "$PWD/.venv/bin/python"
