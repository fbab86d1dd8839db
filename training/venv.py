"""Prints the path of a Python that has what requirement files list: python=$(python3 training/venv.py requirements.txt)

That is the one that runs this, if it has everything; nothing is ever installed into it. Otherwise it is .venv in the
checkout, made by the first call. Without a file, any Python that is new enough will do.
"""

import fcntl
import re
import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"{sys.executable} is older than Python 3.10; name another, as in PYTHON=python3.12")

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from subprocess import CalledProcessError, run

ROOT = Path(__file__).resolve().parent.parent
VENV, PYTHON = ROOT / ".venv", ROOT / ".venv" / "bin" / "python"
LOCK = VENV / "made by venv.py"


def lacks(name, least):
    """Whether this Python is without a package, or has it in too old a version."""
    try:
        have, need = ([int(number) for number in re.findall(r"\d+", text)[:3]] for text in (version(name), least))
        return have < need
    except PackageNotFoundError:
        return True


def venv_has(files):
    return PYTHON.exists() and run([PYTHON, __file__, "--check", *files]).returncode == 0


def install(files):
    """Makes .venv, or completes what an earlier call has left unfinished."""
    if not PYTHON.with_name("pip").exists():  # which comes last
        run([sys.executable, "-m", "venv", VENV], check=True, stdout=sys.stderr)
    if find_spec("torch") and find_spec("torchvision"):  # the user's own, a build for their GPU perhaps, will do
        own = "\n".join(path for path in sys.path if "-packages" in path)
        next(VENV.glob("lib/python*/site-packages")).joinpath("own.pth").write_text(own)
    lists = [word for file in files for word in ("-r", ROOT / file)]
    run([PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *lists], check=True, stdout=sys.stderr)


files = [word for word in sys.argv[1:] if word != "--check"]
lines = [line.partition(">=") for file in files for line in (ROOT / file).read_text().split()]
missing = [name for name, _, least in lines if lacks(name, least)]
if "--check" in sys.argv:
    sys.exit(bool(missing))
if missing and not venv_has(files):
    if VENV.exists() and not LOCK.exists():
        sys.exit(f"{VENV} was not made by this program, and lacks some of {' '.join(files)}: install them there")
    print(f"{sys.executable} lacks {missing[0]}: setting up {VENV} …", file=sys.stderr)
    VENV.mkdir(exist_ok=True)
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one call at a time
        try:
            if not venv_has(files):
                install(files)
        except CalledProcessError:
            sys.exit("the installation failed; the same command tries once more")
print(PYTHON if missing else sys.executable)
