"""Prints the path of a Python that has what requirement files list: python=$(python3 training/venv.py requirements.txt)

That is the one that runs this, if it has everything; nothing is ever installed into it. Otherwise it is .venv in the
checkout, made by the first call. Without a file, any Python that is new enough will do.
"""

import fcntl
import re
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"{sys.executable} is older than Python 3.10; name another, as in PYTHON=python3.12")

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

ROOT = Path(__file__).resolve().parent.parent
VENV, PYTHON = ROOT / ".venv", ROOT / ".venv" / "bin" / "python"
LOCK = VENV / "made by venv.py"


def main(*files: str) -> str:
    if not (missing := lacking(*files)):
        return sys.executable
    if venv_has(files):
        return str(PYTHON)
    if VENV.exists() and not LOCK.exists():
        sys.exit(f"{VENV} was not made by this program, and lacks some of {' '.join(files)}: install them there")
    print(f"{sys.executable} lacks {missing}: setting up {VENV} …", file=sys.stderr)
    VENV.mkdir(exist_ok=True)
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one call at a time
        if not venv_has(files):
            install(files)
    return str(PYTHON)


def lacking(*files: str) -> str:
    """The first package that this Python lacks, or has in too old a version."""
    for name, _, least in (line.partition(">=") for file in files for line in (ROOT / file).read_text().split()):
        try:
            if numbers(version(name)) < numbers(least):
                return name
        except PackageNotFoundError:
            return name
    return ""


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:3]]


def venv_has(files: tuple[str, ...]) -> bool:
    return PYTHON.exists() and subprocess.run([PYTHON, __file__, "--check", *files]).returncode == 0


def install(files: tuple[str, ...]) -> None:
    """Makes .venv, or completes what an earlier call has left unfinished."""
    lists = [word for file in files for word in ("-r", str(ROOT / file))]
    try:
        if not PYTHON.with_name("pip").exists():  # which comes last
            subprocess.run([sys.executable, "-m", "venv", VENV], check=True, stdout=sys.stderr)
        if find_spec("torch") and find_spec("torchvision"):  # the user's own, a build for their GPU perhaps, will do
            own = [path for path in sys.path if "-packages" in path]
            next(VENV.glob("lib/python*/site-packages")).joinpath("own.pth").write_text("\n".join(own))
        pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
        subprocess.run([*pip, *lists], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError:
        sys.exit("the installation failed; the same command tries once more")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        sys.exit(bool(lacking(*sys.argv[2:])))
    print(main(*sys.argv[1:]))
