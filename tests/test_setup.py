"""Finding and making the Python that runs the project, with packages that the tests make themselves."""

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import ROOT


class Checkout:
    """A folder with a space in its name that holds venv.py; pip finds nothing but the wheels beside it."""

    def __init__(self, folder: Path):
        self.root, self.wheels = folder / "a project", folder / "wheels"
        (self.root / "training").mkdir(parents=True)
        self.wheels.mkdir()
        shutil.copy(ROOT / "training/venv.py", self.root / "training")
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

    def __call__(self, *files: str) -> tuple[int, str, str]:
        """(exit status, what it found, messages)."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.wheels.as_uri()}
        command = [sys.executable, "training/venv.py", *files]
        ended = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        return ended.returncode, ended.stdout.removesuffix("\n"), ended.stderr


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_venv_is_made_by_one_call_at_a_time_and_completed_and_reused(checkout):
    checkout.requires("graftingone>=1.9")
    status, _, messages = checkout("needs.txt")
    assert status == 1 and "the installation failed; the same command tries once more" in messages
    checkout.make_package("graftingone")
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(checkout, ["needs.txt"] * 2))
    assert [(status, found) for status, found, _ in both] == [(0, str(checkout.python))] * 2, both
    assert sum(messages.count("Successfully installed") for *_, messages in both) == 1
    assert checkout("needs.txt") == (0, str(checkout.python), ""), "the second time there is nothing to do"
    subprocess.run([checkout.python, "-c", "import graftingone, numpy, tqdm"], check=True)


def test_a_venv_that_the_user_made_is_used_and_never_changed(checkout):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout.root / ".venv"], check=True)
    checkout.requires("graftingone")
    checkout.make_package("graftingone")
    status, _, messages = checkout("needs.txt")
    assert status == 1 and "was not made by this program, and lacks some of needs.txt" in messages
    with zipfile.ZipFile(checkout.wheels / "graftingone-2.0-py3-none-any.whl") as wheel:
        wheel.extractall(next((checkout.root / ".venv/lib").glob("python*/site-packages")))
    assert checkout("needs.txt") == (0, str(checkout.python), "")


def test_the_users_own_python_is_used_where_it_has_everything(checkout):
    checkout.requires("numpy>=1.0", "pytest")
    assert checkout("needs.txt") == (0, sys.executable, "")
    assert checkout() == (0, sys.executable, ""), "without a list, any Python will do"
    assert not (checkout.root / ".venv").exists()
    for line, status in ("pillow>=9.5", 0), ("pillow>=999", 1):  # 9.5 is less than 10.1
        checkout.requires(line)
        assert checkout("--check", "needs.txt")[0] == status


def test_help_needs_no_package_and_sets_nothing_up(project):
    python = project.cwd / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    command = [project.root / "grafting_cifar/grafting.sh", "--help"]
    shown = subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr, shown.stdout[:19]) == (0, "", "usage: grafting.sh ")
    assert not (project.root / ".venv").exists()
