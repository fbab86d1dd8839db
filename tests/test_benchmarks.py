"""The benchmarks run, at their smallest; what they measure is another matter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SMALLEST = {
    "grafting.py": ["--models", "resnet20", "torchvision:squeezenet1_1", "--repetitions", "1"],
    "exchange.py": ["--sizes", "0.1", "--repetitions", "3", "--networks", "1", "2", "--epochs", "2", "--sleep", "0.1",
                    "--rings", "1"],
    "plain.py": ["--model", "resnet20", "--images", "32", "--batch_size", "16"],
    "training.py": ["--models", "resnet20", "--images", "32", "--batch_size", "16", "--repetitions", "1"],
    "phases.py": ["--images", "32", "--batch_size", "16", "--epochs", "3"],
}  # fmt: skip


def run(script, *arguments, cwd=None):
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALLEST)
def test_a_benchmark_prints_its_table_and_keeps_its_rows(script, tmp_path):
    file = tmp_path / "rows.jsonl"
    keep = [] if script == "plain.py" else ["--json", str(file)]
    device = [] if script == "exchange.py" else ["--device", "cpu"]
    result = run(script, *SMALLEST[script], *device, *keep, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if keep:
        table = [line for line in result.stdout.splitlines() if line.startswith("|")]
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        tables = sum(line.startswith("| ---") for line in table)
        assert tables >= 1 and len(table) - 2 * tables == len(rows) > 0


@pytest.mark.slow
def test_what_needs_a_gpu_goes_on_where_it_ended(tmp_path):
    flags = ["--device", "cpu", "--quick", "--images", "32", "--only", "grafting", "phases"]
    first = run("gpu.py", str(tmp_path / "out"), *flags[:-1])
    again = run("gpu.py", str(tmp_path / "out"), *flags)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert "grafting: done before" in again.stdout and "# phases" in again.stdout
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "step" in record] == ["grafting", "phases"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SMALLEST, "gpu.py"])
def test_help_says_what_is_measured(script):
    result = run(script, "--help")
    assert result.returncode == 0 and f"python benchmarks/{script}" in result.stdout
