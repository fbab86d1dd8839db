"""Finding and making the Python that runs the project, with packages that the tests make themselves."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import ROOT, until


class Checkout:
    """A folder with a space in its name that holds venv.sh; pip finds nothing but the wheels beside it."""

    def __init__(self, folder: Path):
        self.root, self.wheels = folder / "a project", folder / "wheels"
        (self.root / "training").mkdir(parents=True)
        self.wheels.mkdir()
        shutil.copy(ROOT / "training/venv.sh", self.root / "training")
        self.python = self.root / ".venv/bin/python"

    def requires(self, *lines: str) -> None:
        (self.root / "needs.txt").write_text("".join(f"{line}\n" for line in lines))

    def make_package(self, name: str, version: str = "2.0") -> None:
        """A wheel that installs one empty module."""
        with zipfile.ZipFile(self.wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            about = f"{name}-{version}.dist-info"
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")

    def start(self, *files: str, shell: str = "sh", **variables: str) -> subprocess.Popen:
        own = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.wheels.as_uri()}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        environment |= {"PIP_CONFIG_FILE": os.devnull} | own | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen([shell, "training/venv.sh", *files], cwd=self.root, env=environment, **pipes)

    def __call__(self, *files: str, **variables: str) -> tuple[int, str, str]:
        """(exit status, what it found, messages)."""
        with self.start(*files, **variables) as process:
            output, errors = process.communicate()
        return process.returncode, output.removesuffix("\n"), errors


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_venv_is_made_reused_and_completed(checkout):
    checkout.requires("graftingone>=1.9")
    status, _, messages = checkout("needs.txt")
    assert status == 1 and "the installation failed; the same command tries once more" in messages
    checkout.make_package("graftingone")
    status, found, messages = checkout("needs.txt")
    assert (status, found) == (0, str(checkout.python)), messages
    assert checkout("needs.txt") == (0, str(checkout.python), ""), "the second time there is nothing to do"

    checkout.make_package("graftingtwo")
    checkout.requires("graftingone>=1.9", "graftingtwo")
    assert checkout("needs.txt")[:2] == (0, str(checkout.python))
    subprocess.run([checkout.python, "-c", "import graftingone, graftingtwo, torch"], check=True)
    checkout.make_package("graftingtwo", "10.0")
    checkout.requires("graftingtwo>=9.1")
    assert checkout("needs.txt")[:2] == (0, str(checkout.python)), "9.1 is less than 10.0"


@pytest.mark.slow
def test_an_interrupted_installation_is_begun_anew(checkout):
    checkout.make_package("graftingone")
    checkout.requires("graftingone")
    with checkout.start("needs.txt") as process:
        until((checkout.root / ".venv/bin/python").exists)
        os.killpg(process.pid, signal.SIGKILL)
    assert (checkout.root / ".venv/state").read_text() == "unfinished\n"
    (checkout.root / ".venv/half-made").touch()
    assert checkout("needs.txt")[:2] == (0, str(checkout.python))
    assert not (checkout.root / ".venv/half-made").exists()


@pytest.mark.slow
def test_of_two_calls_at_the_same_time_one_waits_for_the_other(checkout):
    checkout.make_package("graftingone")
    checkout.requires("graftingone")
    processes = [checkout.start("needs.txt") for _ in range(2)]
    said = [process.communicate() for process in processes]
    assert [output for output, _ in said] == [f"{checkout.python}\n"] * 2
    assert sum(errors.count("Successfully installed") for _, errors in said) == 1


def test_a_venv_that_the_user_made_is_used_and_never_changed(checkout):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout.root / ".venv"], check=True)
    checkout.requires("graftingone")
    checkout.make_package("graftingone")
    status, _, messages = checkout("needs.txt")
    assert status == 1 and "was not made by this script, and lacks graftingone" in messages
    with zipfile.ZipFile(checkout.wheels / "graftingone-2.0-py3-none-any.whl") as wheel:
        wheel.extractall(next((checkout.root / ".venv/lib").glob("python*/site-packages")))
    assert checkout("needs.txt") == (0, str(checkout.python), "")


def test_the_users_own_python_is_used_where_it_has_everything(checkout):
    checkout.requires("numpy>=1.0", "pytest")
    for shell in filter(shutil.which, ("sh", "dash", "bash", "zsh")):
        assert checkout("needs.txt", shell=shell) == (0, sys.executable, "")
    assert checkout() == (0, sys.executable, ""), "without a list, any Python will do"
    assert not (checkout.root / ".venv").exists()


def test_a_python_that_will_not_do_is_one_sentence(checkout):
    checkout.requires("numpy")
    old = checkout.root / "old python"
    old.write_text(
        f"#!/bin/sh\nexport OLD=yes\ncase $2 in *version_info*) echo Python 3.10 ;; *) echo '{old}' ;; esac\n"
    )
    old.chmod(0o755)
    for python, sentence in (
        (str(old), "is older than Python 3.10"),
        ("no-such-python", "does not start; install Python"),
    ):
        status, found, message = checkout("needs.txt", PYTHON=python)
        assert (status, found, message.count("\n")) == (1, "", 1) and sentence in message
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("name", ["grafting_cifar/grafting.sh", "grafting_imagenet/grafting.sh", "tests/run.sh"])
def test_scripts_are_posix_sh_and_small(name):
    text = (ROOT / name).read_text()
    assert text.startswith("#!/bin/sh\n") and os.access(ROOT / name, os.X_OK)
    for shell in filter(shutil.which, ("sh", "dash", "bash", "zsh")):
        subprocess.run([shell, "-n", ROOT / name], check=True)
