"""The queue of experiments: what it runs and in which order, and that failures, kills and signals change nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from filelock import FileLock
from imagenet import make_class_folders

from analysis.runs import program
from experiments import report, tables
from experiments import run as queue
from experiments.results import read_result, read_results
from grafting_cifar.flags import parse as parse_cifar
from grafting_imagenet.flags import parse as parse_imagenet

ROOT = Path(__file__).resolve().parent.parent
QUIET = SimpleNamespace(received=None)  # no signal comes


def until(condition, what):
    end = time.monotonic() + 300
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


# ---- The tables


@pytest.mark.parametrize("preset", tables.PRESETS)
def test_every_row_has_its_run_and_its_baseline_above_it(preset):
    runs = {run.name for run in tables.runs(tables.TABLES, preset, 1)}
    for name in tables.TABLES:
        seen = set()
        for row in tables.rows(name, preset):
            assert (row.dataset, row.label) not in seen and row.run in runs
            assert row.baseline is None or (row.dataset, row.baseline) in seen
            seen.add((row.dataset, row.label))


def test_runs_of_several_tables_are_run_once_and_no_two_ensembles_share_a_network():
    runs = tables.runs(tables.TABLES, "paper", 3)
    assert len({(run.name, run.seed) for run in runs}) == len(runs)
    assert {len(run.members) for run in runs if run.members} == {2, 6}
    of_six = [run for run in runs if run.name == "cifar10_mobilenetv2_num1_ensemble6"]
    assert len({member for run in of_six for member in run.members}) == 3 * 6
    assert {member for run in of_six for member in run.members} <= {(run.name, run.seed) for run in runs}


def test_published_figures_stand_beside_the_schedule_that_they_belong_to():
    def published(table, preset="paper"):
        rows = tables.rows(table, preset)
        return {(row.dataset, row.run): row.paper for row in rows if row.paper is not None}

    assert published("main")["CIFAR-100", "cifar100_resnet32_num2_difflr_cos"] == 71.28
    for table in ("filters", "leaky", "level", "criterion", "scions"):  # measured on steps at equal rates
        assert published(table) and not [run for _, run in published(table) if "cos" in run or "difflr" in run]
    assert published("imagenet")["ImageNet", "imagenet_resnet50_num1_steplr"] == "75.92 / 92.81"
    assert published("criterion")["CIFAR-10", "cifar10_mobilenetv2_num2_l1"] == 92.94
    assert not published("main", "small")


@pytest.mark.parametrize("preset", tables.PRESETS)
def test_the_scripts_take_every_command_line(preset):
    for run in tables.runs(tables.TABLES, preset, 1):
        if not run.members:
            parse = parse_imagenet if run.script == "grafting_imagenet" else parse_cifar
            args = parse([*run.flags, "--data", "somewhere", "--device", "cpu", "--s", "somewhere"])
            assert (args.num, args.seed, args.epochs) == (run.networks, run.seed, run.epochs)


def test_the_results_at_hand_are_those_of_the_tables():
    frame, damages = read_results(ROOT / "results" / "small", "small")
    folders = list((ROOT / "results" / "small").glob("*/seed*"))
    assert not damages and len(frame) == len(folders) >= 54


# ---- Flags


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mane"], "'mane' (choose from "),
        (["main", "--data", "cifar7=."], "there is no folder"),
        (["main", "--data", ".", "/"], "got two folders for the same images"),
        (["imagenet", "--preset", "small"], "small runs nothing of imagenet"),
        (["main", "--only", "cifar10_resnet32_num3"], "cifar10_resnet32_num3 is none of these tables' runs"),
    ],
)
def test_wrong_flags(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        queue.parse(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls main() with flags, folders of the test's own, and no signals of its own; returns status, output, errors."""

    def call(*flags):
        folders = ["--work", f"{tmp_path}/work", "--results", f"{tmp_path}/results"]
        monkeypatch.setattr(sys, "argv", ["run.py", *flags, *(folders if "--work" not in flags else [])])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        return program(queue.main), *capsys.readouterr()

    return call


def test_a_folder_of_ten_classes_is_not_for_cifar100(tmp_path, call):
    for k in range(10):
        (tmp_path / "images" / "train" / str(k)).mkdir(parents=True)
    status, output, errors = call("main", "--data", f"{tmp_path}/images", "--seeds", "1", "--dry-run")
    assert status == 0 and "cifar100" not in output and f"--data {tmp_path}/images --s" in output
    assert errors == "left out, as no images were given: the runs on cifar100 (as in --data cifar100=DIR)\n"
    assert call("imagenet")[0] == 2  # nothing is left


def test_dry_run_names_every_network_and_slurm_every_run(call):
    lines = call("main", "--seeds", "2", "--dry-run")[1].splitlines()
    assert len(lines) == 5 * 2 * 2 * (1 + 2 + 1 + 2) == len(set(lines))
    script = call("main", "--seeds", "2", "--slurm")[1]
    assert "#SBATCH --array=0-79\n" in script and script.count("/seed1\n") == 40
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_slurm_task_at_its_time_limit_is_queued_again(tmp_path, call, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "some python"))
    script = call("main", "--slurm", "--work", "work", "--results", str(tmp_path / "$HOME's"))[1]
    for name, does in (
        ("some python", 'echo "$@" >said; trap "exit 143" TERM; touch running; while :; do sleep 0.01; done'),
        ("scontrol", 'echo "$@" >requeued'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_ID": "7"}
    task = subprocess.Popen(["bash", "-c", script], env=variables, cwd=tmp_path)
    until((tmp_path / "running").exists, "the queue")
    os.kill(task.pid, signal.SIGUSR1)
    assert task.wait() == 143
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    said = (tmp_path / "said").read_text()
    assert f"--results {tmp_path}/$HOME's" in said and said.endswith("--only cifar10_resnet32_num2/seed1\n")


# ---- The order


def make_jobs(folder, *flags, seeds=1):
    folders = ["--work", f"{folder}/work", "--results", f"{folder}/results", "--seeds", str(seeds)]
    args = queue.parse(["--preset", "smoke", *folders, *flags])
    return [queue.Job(run, args, queue.data_flags(run, args.data)) for run in args.runs]


@pytest.fixture
def simulate(monkeypatch):
    """Runs jobs whose networks do nothing; returns which were at work together, at each begin."""

    def simulate(jobs, slots, gpus=(), outcome=lambda job: ""):
        alive, together = [], []

        def execute(job, *_):
            alive.append(job)
            together.append(list(alive))
            time.sleep(0.02)
            alive.remove(job)
            return outcome(job)

        monkeypatch.setattr(queue.Job, "execute", execute)
        monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)
        queue.work(jobs, slots, 1, list(gpus), QUIET)
        return together

    return simulate


def test_the_cheapest_run_first_and_ensembles_after_their_networks(tmp_path, simulate):
    jobs = make_jobs(tmp_path, "fair", "level")
    order = [together[-1].run for together in simulate(jobs, 1)]
    places = {(run.name, run.seed): place for place, run in enumerate(order)}
    costs = [run.cost for run in order if not run.members]
    assert len(places) == len(jobs) and costs == sorted(costs)
    ensembles = [run for run in order if run.members]
    assert len(ensembles) == 2
    assert all(places[member] < places[run.name, run.seed] for run in ensembles for member in run.members)


def test_as_many_networks_at_once_as_there_are_slots_and_a_larger_ring_alone(tmp_path, simulate):
    together = simulate(make_jobs(tmp_path, "networks"), 3)
    sizes = [[len(job.numbers) for job in jobs] for jobs in together]
    assert all(sum(size) <= 3 or len(size) == 1 for size in sizes)
    assert max(map(sum, sizes)) == 8 and max(map(len, sizes)) > 1


def test_networks_of_imagenet_have_a_gpu_each_and_others_the_least_used(tmp_path, simulate):
    (tmp_path / "images").mkdir()
    jobs = make_jobs(tmp_path, "main", "imagenet", "--data", f"imagenet={tmp_path}/images")
    together = simulate(jobs, 8, ["3", "5"])
    for at_work in together:
        of_imagenet = [gpu for job in at_work if job.run.data == "imagenet" for gpu in job.gpus]
        assert len(of_imagenet) == len(set(of_imagenet))
    assert {gpu for job in jobs for gpu in job.gpus} == {"3", "5"}
    assert all(len({*job.gpus}) == len(job.numbers) for job in jobs)


# ---- What is missing


def finish(job, command=None):
    """Leaves results, by default of the job's own command; only such as tell whether it was run."""
    job.results.mkdir(parents=True)
    record = {"command": command or job.run.command, "hardware": "", "versions": {}, "networks": job.run.networks}
    if job.run.members:
        record["ensemble"] = {"members": job.run.member_names, "networks": [1], "ensemble": 1, "weight_average": 1}
    else:
        counts = {"0.1": 0, "0.01": 0}
        filters = {"total": 9, "shortcut_total": 0, "invalid": counts, "shortcut_invalid": counts}
        record |= {"settings": {"epochs": 1}, "filters": [filters] * job.run.networks}
        columns = ["epoch", "test_accuracy", "best", "train_seconds", "test_seconds", "wait_seconds", "graft_seconds"]
        for i in job.numbers:
            pd.DataFrame([[0] * len(columns)], columns=columns).to_csv(job.results / f"metrics{i}.csv", index=False)
    (job.results / "result.json").write_text(json.dumps(record))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": 1}', '{"command": "python'])
def test_what_the_report_counts_as_damaged_the_queue_runs_again(tmp_path, text):
    jobs = make_jobs(tmp_path, "main")[:2]
    for job in jobs:
        finish(job)
    assert queue.unfinished(jobs) == []
    (jobs[0].results / "result.json").write_text(text)
    (jobs[1].results / "metrics2.csv").unlink()
    assert queue.unfinished(jobs) == jobs


def test_results_of_another_command_are_neither_taken_nor_overwritten(tmp_path, monkeypatch):
    job = make_jobs(tmp_path, "main")[0]
    finish(job, job.run.command.replace("--epochs 2", "--epochs 3"))
    monkeypatch.setattr(queue.Job, "start", lambda *_: pytest.fail("it was started"))
    assert queue.unfinished([job]) == [job]
    assert "--epochs 3" in (failure := job.execute(1, QUIET)) and failure.endswith(f"move it and {job.save} elsewhere")


def test_a_run_belongs_to_one_queue_at_a_time(tmp_path, monkeypatch):
    job = make_jobs(tmp_path, "main")[0]
    job.save.mkdir(parents=True)
    monkeypatch.setattr(queue.Job, "start", lambda *_: pytest.fail("it was started"))
    with FileLock(job.save / "queue.lock"):
        assert job.execute(1, QUIET) == "another queue is at work on it"


def test_an_ensembles_networks_are_trained_again_if_their_weights_are_gone(tmp_path, call):
    jobs = make_jobs(tmp_path, "fair")
    for job in jobs:
        if not job.run.members:
            finish(job)
    first, second = (job for job in jobs if job.run.members)
    finish(second)
    there, gone = (job for job in jobs if (job.run.name, job.run.seed) in first.run.members)
    there.save.mkdir(parents=True)
    there.final(1).touch()
    assert queue.unfinished(jobs) == [gone, first]
    lines = call("fair", "--preset", "smoke", "--seeds", "1", "--only", gone.run.name, "--dry-run")[1].splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(gone.run)]


# ---- Real runs


class Queue:
    """experiments/run.py as a process, on the smallest table."""

    def __init__(self, folder, *flags):
        self.folder = folder
        command = [sys.executable, ROOT / "experiments" / "run.py", *(flags or ["main"]), "--preset", "smoke"]
        command += ["--seeds", "1", "--work", folder / "work", "--results", folder / "results"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def finish(self):
        output, _ = self.process.communicate()
        return self.process.returncode, output

    def networks(self, run):
        """Status files of a run's networks."""
        paths = (self.folder / "work" / "smoke" / run / "seed0").glob("network*.json")
        return [json.loads(path.read_text()) for path in paths]


RING, SINGLE = "glyphs_resnet20_num2", "glyphs_resnet20_num1"


def figures(folder, name):
    """What a run has left, but for times."""
    (run,) = [run for run in tables.runs(["main"], "smoke", 1) if run.name == name]
    networks = read_result(folder / "results" / "smoke" / str(run), run)["result"].networks
    return [(network.metrics.filter(regex="^(?!.*seconds)").to_csv(), network.filters) for network in networks]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A ring, run without a disturbance, beside a run that fails."""
    folder = tmp_path_factory.mktemp("undisturbed")
    broken = folder / "work" / "smoke" / SINGLE / "seed0"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{}")
    status, output = Queue(folder, "main", "--only", RING, SINGLE).finish()
    assert status == 1 and f"{SINGLE}/seed0 failed: network 1 ended with exit status 1: " in output, output
    assert f"{RING}/seed0: done\n" in output and "1 runs done, 1 failed" in output
    return folder


def test_a_finished_queue_has_nothing_to_do_and_leaves_what_a_report_needs(undisturbed):
    status, output = Queue(undisturbed, "main", "--only", RING).finish()
    assert status == 0 and output.startswith("1 runs, 1 of them done; ")
    folder = undisturbed / "results" / "smoke" / RING / "seed0"
    record = json.loads((folder / "result.json").read_text())
    assert record["settings"]["num"] == 2 and record["settings"]["amp"] is False
    assert record["filters"][1]["total"] == 688 and (folder / "coefficients2.csv").exists()


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_figures(undisturbed, tmp_path):
    def signal_networks(number):
        for status in first.networks(RING):
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(status["pid"], number)

    first = Queue(tmp_path, "main", "--only", RING)
    until(lambda: len(list((tmp_path / "work/smoke" / RING / "seed0").glob("ckpt*_0.t7"))) == 2, "the first epoch")
    first.process.kill()  # the queue alone: its networks live on
    signal_networks(signal.SIGSTOP)  # for as long as the next queue takes to start
    first.process.wait()
    second = Queue(tmp_path, "main", "--only", RING)
    try:
        assert "1 runs, 0 of them done" in second.process.stdout.readline()
        time.sleep(1)  # it takes them over
    finally:
        second.process.kill()
        second.process.wait()
        signal_networks(signal.SIGKILL)
    status, output = Queue(tmp_path, "main", "--only", RING).finish()
    assert status == 0, output
    assert figures(tmp_path, RING) == figures(undisturbed, RING)


def test_a_signal_ends_the_networks_and_says_how_to_go_on(tmp_path):
    started = Queue(tmp_path, "main", "--only", RING)
    until(lambda: len(started.networks(RING)) == 2, "the networks")
    started.process.send_signal(signal.SIGINT)
    status, output = started.finish()
    assert status == 130 and output.endswith("stopped by SIGINT; the same command goes on\n"), output
    for one in started.networks(RING):
        with pytest.raises(ProcessLookupError):
            os.kill(one["pid"], 0)
    assert not (tmp_path / "results/smoke" / RING).exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_table_comes_to_a_full_report(tmp_path, monkeypatch, capsys):
    images = make_class_folders(tmp_path / "images")
    status, output = Queue(tmp_path, "all", "--data", f"imagenet={images}").finish()
    assert status == 0, output
    monkeypatch.setattr(sys, "argv", ["report.py", "--preset", "smoke", "--results", f"{tmp_path}/results"])
    assert report.main() == 0
    text = (tmp_path / "results" / "smoke" / "report.md").read_text()
    assert "not run" not in text and "Damaged" not in text
    assert all(f"## {table.title}" in text for table in tables.TABLES.values())
    assert len(list((tmp_path / "results/smoke/plots").glob("*.png"))) > len(tables.TABLES)
