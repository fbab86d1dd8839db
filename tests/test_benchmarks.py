"""The benchmarks run, at their smallest, and lose nothing that they have; what they measure is another matter."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from processes import Process, until

from benchmarks import data, gpu, tools, training
from grafting_cifar import flags as cifar
from training.loop import TrainingStep


@pytest.fixture(autouse=True)
def as_before():
    """The number of threads, which a benchmark changes in its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_everything_for_the_first_gpu_runs_dry_and_goes_on_where_it_ended(tmp_path, images, capsys, monkeypatch):
    def execute(words, log, limit, **variables):  # in this process, which has torch
        monkeypatch.setattr(sys, "argv", words)
        return import_module(".".join(Path(words[0]).with_suffix("").parts[-2:])).main() or 0

    monkeypatch.setattr(gpu, "execute", execute)
    monkeypatch.setattr(tools, "start", lambda words, log: Process(Path(words[0]), words[1:], log))
    results = tmp_path / "quick.jsonl"
    results.write_text('{"step": "grafting", "status": 0, "dev')  # of a call that was killed
    arguments = [str(tmp_path), "--device", "cpu", "--quick", "--cifar", str(images)]
    assert gpu.main(arguments) == 0, capsys.readouterr().out
    rows = tools.read(results)
    steps = [name for name, (_, small) in gpu.PLAN.items() if small is not None]
    assert [row["step"] for row in rows if "step" in row] == steps, "each step once, in its order"
    measured = [row for row in rows if "benchmark" in row]
    for benchmark in ("preflight", "grafting", "exchange", "ring", "training", "profile", "data"):
        assert any(row["benchmark"] == benchmark for row in measured)
    assert all({"device", "hardware", "versions", "time"} <= row.keys() for row in measured)
    assert [row["same"] for row in measured if "same" in row] == [True]
    assert not (tmp_path / "results.jsonl").exists(), "a dry run does not count as a run"
    assert gpu.main(arguments) == 0
    assert capsys.readouterr().out.count("done before") == len(steps)


def test_the_programs_understand_every_command_of_the_plan(tmp_path, monkeypatch):
    understood = []

    def parse(flags, arguments):
        understood.append(flags.parse_args(arguments))
        raise InterruptedError

    plan = gpu.plan(gpu.parse([str(tmp_path), "--device", "cpu"]))
    monkeypatch.setattr(tools, "parse", parse)
    assert all(Path(word).is_file() for words in plan.values() for word in words if word.endswith(".py"))
    commands = [words for words in plan.values() if "benchmarks" in words[0]]
    for program, *words in commands:
        with pytest.raises(InterruptedError):
            import_module(f"benchmarks.{Path(program).stem}").main(words)
    for args in understood:
        if "networks" in args and "flags" in args:
            cifar.parse(["--num", str(args.networks), "--model", args.model, *args.flags])
    assert len(understood) == len(commands) == len(gpu.PLAN) - 2  # without the tests, and tables of no images


def test_a_call_ends_before_its_time_and_refuses_a_step_that_is_not_there(tmp_path, capsys):
    arguments = [str(tmp_path), "--device", "cpu", "--quick"]
    assert gpu.main([*arguments, "--minutes", "0.1"]) == 1 and "the same command goes on" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        gpu.main([*arguments, "--only", "typo"])
    assert "got 'typo', expected one of" in capsys.readouterr().err


def test_a_step_that_outlasts_its_time_is_ended_with_its_children(tmp_path):
    child = (
        f"import os, time; print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w'), flush=True); time.sleep(600)"
    )
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.execute(["-c", program], tmp_path / "log", 5) == "out of time"
    pid = int((tmp_path / "pid").read_text())
    until(lambda: subprocess.getoutput(f"ps -o stat= {pid}")[:1] in ("", "Z"))
    assert gpu.execute(["-c", "raise SystemExit(3)"], tmp_path / "log", 60) == 3


def test_a_graph_is_captured_in_the_repetition_that_does_not_count(monkeypatch):
    steps, call = [], TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda *given: (steps.append(given), call(*given)))
    parser = tools.parser("")
    data.add_flags(parser, images=8, threads=1)
    run = training.prepare(data.parse(parser, ["--batch_size", "4", "--device", "cpu"]), "resnet20", "ours")
    run(0)
    assert len(steps) > TrainingStep.WARM_UP
    steps.clear()
    run(1)
    assert len(steps) == 2


def test_a_benchmark_prints_its_table_and_keeps_its_rows(tmp_path, images, capsys):
    file = tmp_path / "rows.jsonl"
    data.main(["--data", str(images), "--images", "16", "--repetitions", "3", "--device", "cpu", "--json", str(file)])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in table] == ["pipeline", "---", "ours", "torchvision"]
    ours, torchvisions = tools.read(file)
    assert len(ours["seconds"]) == 3 and ours["hardware"] and torchvisions[": torchvision"] == 1
    low, middle, high = map(tools.cell, sorted(ours["seconds"]))
    assert f"| {middle} ({low} to {high}) |" in table[2]
