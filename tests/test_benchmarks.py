"""The benchmarks run, at their smallest, and lose nothing that they have; what they measure is another matter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, tools

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["--images", "16", "--batch_size", "8", "--repetitions", "1"]
RING = ["--repetitions", "2", "--networks", "2", "--epochs", "2", "--sleep", "0.1", "--rings", "1"]
SMALLEST = {
    "data.py": ["--images", "16", "--repetitions", "1"],
    "grafting.py": ["--models", "resnet20", "--repetitions", "1"],
    "exchange.py": ["--sizes", "0.1", *RING],
    "training.py": ["--models", "resnet20", "--variants", "plain", "graph", *TINY],
    "profiling.py": ["--model", "resnet20", "--steps", "2", "--batch_size", "8", "--variants", "ours"],
    "ring.py": ["--images", "20", "--epochs", "2", "--same", "--killed"],
    "imagenet_loader.py": [
        "--images",
        "8",
        "--size",
        "32",
        "--batch-size",
        "4",
        "--workers",
        "1",
        "--repetitions",
        "1",
    ],
}
QUICK = ["--device", "cpu", "--quick"]


def run(script, *arguments, cwd=None):
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=590)


def steps(out):
    return [(one["step"], one["status"]) for one in tools.read(out / "quick.jsonl") if "step" in one]


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALLEST)
def test_a_benchmark_prints_its_table_and_keeps_its_rows(script, tmp_path):
    file = tmp_path / "rows.jsonl"
    result = run(script, *SMALLEST[script], "--device", "cpu", "--json", str(file), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    heads = sum(line.startswith("| ---") for line in table)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert heads >= 1 and len(table) - 2 * heads == len(rows) > 0
    assert all({"benchmark", "device", "hardware", "versions"} <= row.keys() for row in rows)


@pytest.mark.slow
def test_everything_for_the_first_gpu_runs_dry(tmp_path):
    result = run("gpu.py", str(tmp_path), *QUICK, "--minutes", "9")
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in (tmp_path / "logs").iterdir())
    assert "failed" not in result.stdout, result.stdout + logs
    assert {status for _, status in steps(tmp_path)} <= {0, "out of time"}


def test_what_needs_a_gpu_goes_on_where_it_ended(tmp_path):
    first = run("gpu.py", str(tmp_path), *QUICK, "--only", "preflight")
    assert first.returncode == 0, first.stdout + first.stderr
    results = tmp_path / "quick.jsonl"
    with open(results, "a") as file:
        file.write('{"step": "grafting", "status": 0, "dev')  # of a process that was killed
    again = run("gpu.py", str(tmp_path), *QUICK, "--only", "preflight", "grafting")
    assert again.returncode == 0 and "preflight: done before" in again.stdout, again.stdout + again.stderr
    assert steps(tmp_path) == [("preflight", 0), ("grafting", 0)]
    assert any(one.get("benchmark") == "grafting" and one["ours (ms)"] for one in tools.read(results))
    assert not (tmp_path / "results.jsonl").exists(), "a dry run does not count as a run"


def test_a_step_that_is_not_there_is_refused(tmp_path):
    result = run("gpu.py", str(tmp_path), *QUICK, "--only", "typo")
    assert result.returncode == 2 and "got 'typo', expected some of 'preflight'" in result.stderr


def test_a_step_that_outlasts_its_time_is_ended_with_its_children(tmp_path):
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    assert gpu.execute(["-c", program], tmp_path / "log", 0.5, {}) == "out of time"
    assert gpu.execute(["-c", "raise SystemExit(3)"], tmp_path / "log", 60, {}) == 3


def test_every_row_is_kept_as_soon_as_it_is_had(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"benchmark": "x", "half": ')
    table = tools.Table("x", "Caption.", file)
    table.add(a=1, b=[1.0, 3.0, 2.0])
    rows = tools.read(file)
    assert [(row["a"], row["b"]) for row in rows] == [(1, [1.0, 3.0, 2.0])] and rows[0]["hardware"]
    assert "| 1 | 2 (1 to 3) |" in capsys.readouterr().out
