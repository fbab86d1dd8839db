"""Every example runs, by the very command line that its docstring gives."""

import ast
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def shell(line: str, folder: Path, seconds: float = 300) -> str:
    """What a line prints in a folder; it has to succeed, as has the process that it starts in the background."""
    script = f"set -e; {line}; wait $!" if " & " in line else line
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # PYTHONPATH stands in for the library's installation.
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["bash", "-c", script], cwd=folder, env=environment, start_new_session=True, **pipes)
    try:
        out, errors = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors
    return out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_its_docstring_says_and_its_networks_learn(path, tmp_path):
    package = path.stem.removesuffix("_trainer")
    if package != path.stem and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    [line] = re.findall(r"^ *((?:python|torchrun) .*)$", ast.get_docstring(ast.parse(path.read_text())), re.MULTILINE)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    out = shell(line, tmp_path)
    accuracies = [[float(value) for value in re.findall(r"0\.\d+", text)] for text in re.findall("accurac.*", out)]
    networks = 3 if path.stem == "one_process" else 2
    assert len([value for values in accuracies for value in values[:networks]]) >= networks * 4
    assert max(accuracies[-1]) > 0.4, out  # by chance it would be 0.25


def test_the_examples_are_short():
    assert len(EXAMPLES) == 5
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES)


@pytest.mark.slow
def test_the_examples_pass_the_strict_checks_of_mypy(tmp_path):
    for package in "mypy", "lightning", "transformers":
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), *map(str, EXAMPLES)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
