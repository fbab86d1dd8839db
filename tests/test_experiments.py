"""The queue of experiments: what it runs and in which order, and that failures, kills and signals change nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import saved
import torch
from filelock import FileLock, Timeout
from finished import write_ensemble, write_run
from launching import write_status
from processes import ROOT, until

from experiments import report, tables, together
from experiments import run as queue
from experiments.results import read_results
from grafting_cifar.flags import parse as parse_cifar
from grafting_imagenet.flags import parse as parse_imagenet

PARSERS = {"grafting_cifar/grafting.py": parse_cifar, "grafting_imagenet/grafting.py": parse_imagenet}
PARSERS["experiments/together.py"] = together.parse

QUIET = SimpleNamespace(received=None)  # no signal comes
RING, SINGLE = "glyphs_resnet20_num2", "glyphs_resnet20_num1"


# ---- The tables


@pytest.mark.parametrize("preset", tables.PRESETS)
def test_every_row_has_its_baseline_above_it_and_a_command_line_that_the_scripts_take(preset):
    runs = {run.name: run for run in tables.runs(tables.TABLES, preset, 1)}
    for name in tables.TABLES:
        seen = set()
        for row in tables.rows(name, preset):
            assert (row.dataset, row.label) not in seen and row.run in runs
            assert row.baseline is None or (row.dataset, row.baseline) in seen
            seen.add((row.dataset, row.label))
    for run in runs.values():
        if not run.members:
            args = PARSERS[run.script]([*run.flags, "--data", "somewhere", "--device", "cpu", "--s", "somewhere"])
            assert (args.num, args.seed) == (run.networks, run.seed)


def test_runs_of_several_tables_are_run_once_and_no_two_ensembles_share_a_network():
    runs = tables.runs(tables.TABLES, "paper", 3)
    assert len({str(run) for run in runs}) == len(runs)
    assert {len(run.members) for run in runs if run.members} == {2, 6}
    of_six = [run for run in runs if run.name == "cifar10_mobilenetv2_num1_ensemble6"]
    members = {member for run in of_six for member in run.members}
    assert len(members) == 3 * 6 and members <= {str(run) for run in runs}


def test_the_results_at_hand_are_those_of_the_tables():
    frame, damages = read_results(ROOT / "results" / "small", "small")
    assert not damages and len(frame) == len(list((ROOT / "results" / "small").glob("*/seed*"))) >= 54


# ---- The command line


@pytest.fixture
def call(tmp_path):
    """Calls main() with flags and folders of the test's own; returns status, output, errors."""
    return lambda *flags: saved.call(queue, *flags, "--work", tmp_path / "work", "--results", tmp_path / "results")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mane"], "got 'mane'; did you mean main?"),
        (["main", "--data", "cifar7=."], "got cifar7=., expected a folder, or cifar10="),
        (["main", "--data", ".", "/"], "got two folders for the same images"),
        (["main", "--only", "cifar10_resnet32_num3"], "cifar10_resnet32_num3 is none of these tables' runs"),
    ],
)
def test_wrong_flags(arguments, words, call):
    status, _, error = call(*arguments)
    assert status == 2 and words in error and error.count("\n") == 1


def test_a_dry_run_names_every_network_with_its_images_and_leaves_out_imagenet_without_any(tmp_path, call):
    folder = tmp_path / "format=jpg"
    folder.mkdir()
    flags = ["main", "imagenet", "--seeds", "2", "--data", "cifar100=/", str(folder)]
    status, output, errors = call(*flags, "--dry-run")
    assert len(output.splitlines()) == 5 * 2 * 2 * (1 + 2 + 1 + 2) == len({*output.splitlines()})
    assert status == 0 and f" --data {folder} --s {tmp_path}/work/paper/cifar10_" in output
    assert f" --data / --s {tmp_path}/work/paper/cifar100_" in output and "grafting_imagenet" not in output
    assert errors == "left out, as no images were given: the runs on imagenet (--data imagenet=DIR)\n"
    assert call("imagenet")[0] == 2  # nothing is left


def test_a_slurm_task_at_its_time_limit_is_queued_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "some python"))
    script = saved.call(queue, "main", "--slurm", "--work", "work", "--results", tmp_path / "$HOME's")[1]
    for name, does in (
        ("some python", 'echo "$@" >said; trap "exit 143" TERM; touch running; while :; do sleep 0.01; done'),
        ("scontrol", 'echo "$@" >requeued'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_JOB_ID": "7"}
    task = subprocess.Popen(["bash", "-c", script], env=variables, cwd=tmp_path)
    until((tmp_path / "running").exists)
    os.kill(task.pid, signal.SIGUSR1)
    assert task.wait() == 143
    assert (tmp_path / "requeued").read_text() == "requeue 7_4\n"
    said = (tmp_path / "said").read_text()
    assert f"--results {tmp_path}/$HOME's" in said and said.endswith("--only cifar10_resnet32_num2/seed1\n")


def test_a_job_array_holds_the_runs_that_were_chosen_and_there_is_none_of_no_runs(call, tmp_path):
    flags = ["fair", "--preset", "small", "--seeds", "1", "--slurm", "--jobs", "3"]
    only = [PAIR, *MEMBERS, f"{ENSEMBLE}/seed0"]
    script = call(*flags, "--only", *only)[1]
    assert f"--jobs 3 --only {' '.join(only)}\n" in script and "--array=0-2\n" in script
    assert script.count(f" --only {' '.join(only)} --only ") == 1, "a task runs its own run alone"
    for seed in (0, 100):
        write_run(tmp_path / "results", MEMBERS[0].partition("/")[0], seed, [[80.0]])
        final = tmp_path / "work" / "small" / MEMBERS[seed // 100] / "final1.t7"
        final.parent.mkdir(parents=True)
        final.touch()
    status, script, errors = call(*flags, "--only", f"{ENSEMBLE}/seed0")
    assert (status, script) == (1, "") and f"this makes: {sys.executable} " in errors


# ---- The order


@pytest.fixture
def simulate(tmp_path, monkeypatch):
    """Runs tables' jobs whose networks do nothing; returns all jobs, and which were at work together, at each begin."""

    def simulate(*flags, slots, gpus=()):
        alive, together = [], []

        def has_ended(job, _):
            if job in alive:
                alive.remove(job)
                return True
            alive.append(job)
            together.append(list(alive))
            return False

        monkeypatch.setattr(queue.Job, "has_ended", has_ended)
        monkeypatch.setattr(queue, "POLL_SECONDS", 0)
        args = queue.parse([*flags, "--preset", "smoke", "--seeds", "1", "--work", str(tmp_path)])
        jobs = [queue.Job(run, args) for run in args.runs]
        queue.work(jobs, slots, 1, list(gpus), QUIET)
        return jobs, together

    return simulate


def test_the_cheapest_runs_first_as_many_as_there_are_slots_and_ensembles_after_their_networks(simulate):
    jobs, together = simulate("fair", "networks", slots=3)
    sizes = [[job.run.networks for job in at_work] for at_work in together]
    assert all(sum(size) <= 3 or len(size) == 1 for size in sizes)  # a larger ring goes alone
    assert max(map(sum, sizes)) == 8 and max(map(len, sizes)) > 1
    order = [at_work[-1].run for at_work in together]
    costs = [run.cost for run in order if not run.members]
    assert len(order) == len(jobs) and costs == sorted(costs)
    places = {str(run): place for place, run in enumerate(order)}
    ensembles = [run for run in order if run.members]
    assert len(ensembles) == 3
    assert all(places[member] < places[str(run)] for run in ensembles for member in run.members)


def test_networks_of_imagenet_have_a_gpu_each_and_others_the_least_used(simulate):
    jobs, together = simulate("main", "imagenet", slots=8, gpus=["3", "5"])
    for at_work in together:
        of_imagenet = [gpu for job in at_work if job.run.data == "imagenet" for gpu in job.gpus]
        assert len(of_imagenet) == len(set(of_imagenet))
    assert {gpu for job in jobs for gpu in job.gpus} == {"3", "5"}
    assert all(len({*job.gpus}) == len(job.numbers) for job in jobs)


# ---- What is missing


ENSEMBLE, MEMBERS = "cifar10_resnet20_num1_ensemble2", ["cifar10_resnet20_num1/seed0", "cifar10_resnet20_num1/seed100"]
PAIR = "cifar10_resnet20_num2/seed0"


def test_what_is_finished_is_not_run_again_and_results_of_another_command_are_left_alone(tmp_path, call):
    def planned():
        output = call("fair", "--preset", "small", "--seeds", "1", "--dry-run")[1]
        return sorted({line.partition(": ")[0] for line in output.splitlines()} & {PAIR, f"{ENSEMBLE}/seed0", *MEMBERS})

    root = tmp_path / "results"
    ensemble, ring = write_ensemble(root, ENSEMBLE, 0, 80.0, [79.0, 78.0]), write_run(root, PAIR[:-6], 0, [[80.0]] * 2)
    for seed in (0, 100):
        write_run(root, "cifar10_resnet20_num1", seed, [[80.0]])
    assert planned() == []
    (ring / "metrics2.csv").unlink()
    assert planned() == [PAIR]
    (ensemble / "result.json").unlink()  # its networks are needed again, but for the one whose weights are there
    there = tmp_path / "work" / "small" / MEMBERS[0]
    there.mkdir(parents=True)
    (there / "final1.t7").touch()
    assert planned() == [MEMBERS[1], f"{ENSEMBLE}/seed0", PAIR]
    path = root / "small" / MEMBERS[0] / "result.json"
    path.write_text(path.read_text().replace("--epochs 30", "--epochs 3"))
    status, output, errors = call("main", "--preset", "small", "--seeds", "1")
    assert status == 1 and output == "" and f"{path} is of another command, move it elsewhere: " in errors


# ---- Processes


def test_a_run_that_fails_ends_its_own_networks_and_leaves_the_others_alone(tmp_path, call, monkeypatch):
    def command_of(job, i):
        does = "import time; time.sleep(600)" if i == 2 else f"raise SystemExit('no luck for {job.run.name}')"
        return [sys.executable, "-c", does]

    monkeypatch.setattr(queue.Job, "command_of", command_of)
    status, output, errors = call("main", "--preset", "smoke", "--seeds", "1", "--only", RING, SINGLE)
    assert status == 1 and output.endswith(f"0 runs done, 2 failed; results: {tmp_path}/results/smoke\n")
    for name in RING, SINGLE:
        failure = f"{name}/seed0 failed: network 1 ended with exit status 1: no luck for {name} (log: {tmp_path}/work"
        assert failure in errors
        assert not (tmp_path / "results" / "smoke" / name).exists()


def test_a_signal_ends_the_networks_and_says_how_to_go_on(tmp_path, call, monkeypatch):
    sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    monkeypatch.setattr(queue.Job, "command_of", lambda *_: [sys.executable, "-c", sleep])
    logs = [tmp_path / "work" / "smoke" / RING / "seed0" / f"{i}.log" for i in (1, 2)]

    def interrupt():
        until(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    status, _, errors = call("main", "--preset", "smoke", "--seeds", "1", "--only", RING)
    assert status == 130 and errors.endswith("stopped by SIGINT; the same command goes on\n")
    for log in logs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(log.read_text()), 0)
    assert not (tmp_path / "results" / "smoke").exists()


def hide_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # from the networks
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # from this process, which may have looked before


def test_a_queue_leaves_what_a_report_needs_and_has_then_nothing_to_do(tmp_path, call, monkeypatch):
    hide_gpus(monkeypatch)
    flags = ["main", "--preset", "smoke", "--seeds", "1", "--only", RING]
    status, output, errors = call(*flags)
    assert status == 0 and f"{RING}/seed0: done (0 to go)\n" in output, errors
    folder = tmp_path / "results" / "smoke" / RING / "seed0"
    record = json.loads((folder / "result.json").read_text())
    assert record["settings"]["num"] == 2 and record["settings"]["amp"] is False
    assert record["filters"][1]["total"] == 688 and (folder / "coefficients2.csv").exists()
    status, output, _ = call(*flags)
    assert status == 0 and re.match("1 runs, 1 of them done; .*\n0 runs done, 0 failed; ", output)

    before = record.pop("finished")
    (folder / "result.json").unlink()  # as if the queue had been killed just ahead of it
    assert call(*flags)[0] == 0
    record_again = json.loads((folder / "result.json").read_text())
    assert record_again.pop("finished") > before and record_again == record
    (folder / "result.json").unlink()
    smoke = tables.PRESETS["smoke"]
    monkeypatch.setitem(tables.PRESETS, "smoke", smoke._replace(cifar=f"{smoke.cifar} --momentum 0.8"))
    status, _, errors = call(*flags)  # what the save directory holds is not the result of another command
    assert status == 1 and "momentum is 0.8 here and was 0.9" in errors
    assert not (folder / "result.json").exists()


def test_a_run_that_was_trained_again_for_an_ensemble_leaves_its_results_as_they_are(tmp_path):
    folder = write_run(tmp_path, "cifar10_resnet20_num1", 0, [[80.0]])
    before = (folder / "result.json").read_bytes()
    args = queue.parse(["fair", "--preset", "small", "--results", str(tmp_path), "--work", str(tmp_path / "work")])
    job = next(queue.Job(run, args) for run in args.runs if str(run) == MEMBERS[0])
    job.collect()  # there is no work of it to read
    assert (folder / "result.json").read_bytes() == before


def test_networks_that_outlive_a_killed_queue_are_the_next_ones_and_a_run_has_one_queue(tmp_path, monkeypatch):
    started, collected = [], []
    monkeypatch.setattr(queue.Job, "command_of", lambda _, i: started.append(i) or [sys.executable, "-c", ""])
    monkeypatch.setattr(queue.Job, "collect", lambda job: collected.append(job))
    args = queue.parse(["main", "--preset", "smoke", "--work", str(tmp_path)])
    (run,) = [run for run in args.runs if str(run) == f"{RING}/seed0"]
    job = queue.Job(run, args)
    job.save.mkdir(parents=True)
    with FileLock(job.save / "network1.lock"):  # network 1 is alive
        assert not job.has_ended(1)
        job.processes[2].wait()
        assert not job.has_ended(1)
        with pytest.raises(Timeout):
            queue.Job(run, args).has_ended(1)
    assert job.has_ended(1) and started == [2] and collected == [job]


def test_stopping_ends_networks_of_a_killed_queue_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(queue.Job, "command_of", lambda *_: [sys.executable, "-c", ""])
    args = queue.parse(["main", "--preset", "smoke", "--work", str(tmp_path)])
    job = queue.Job(next(run for run in args.runs if str(run) == f"{RING}/seed0"), args)
    job.save.mkdir(parents=True)
    lives = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
    lives += "; print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", lives, job.save / "network1.lock"]
    network = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        network.stdout.readline()
        write_status(job.save, 1, pid=network.pid)
        assert not job.has_ended(1) and job.alive == {1}
        queue.stop([job])
        assert network.wait(60) == -signal.SIGTERM and not job.lock.is_locked
    finally:
        network.kill()
        network.communicate()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_table_comes_to_a_full_report(tmp_path, call, class_folders, monkeypatch):
    hide_gpus(monkeypatch)
    status, output, errors = call("all", "--preset", "smoke", "--seeds", "1", "--data", f"imagenet={class_folders}")
    assert status == 0, output + errors
    assert saved.call(report, "--preset", "smoke", "--results", tmp_path / "results")[0] == 0
    text = (tmp_path / "results" / "smoke" / "report.md").read_text()
    assert "not run" not in text and "Damaged" not in text
    assert all(f"## {table.title}" in text for table in tables.TABLES.values())
    assert len(list((tmp_path / "results/smoke/plots").glob("*.png"))) > len(tables.TABLES)
