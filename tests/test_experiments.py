"""The queue of experiments: what it runs, that every table comes to its report, and that kills change nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from finished import write_ensemble, write_run
from imagenet import make_class_folders
from processes import NURSERY, ROOT, environment, read_table, until

from experiments import jobs, report, tables
from experiments import run as queue

# ---- The tables


def test_every_row_has_its_run():
    for preset in tables.PRESETS:
        runs = {run.name for run in tables.runs(tables.NAMES, preset, 1)}
        for table in tables.tables(preset).values():
            labels = [row.label for row in table.rows]
            assert len(set(labels)) == len(labels)
            for row in table.rows:
                assert row.baseline is None or row.baseline in labels[: labels.index(row.label)]
                assert {cell.run for cell in row.cells.values()} <= runs


def test_runs_of_several_tables_are_run_once_and_ensembles_after_their_members():
    runs = tables.runs(tables.NAMES, "paper", 3)
    places = {(run.name, run.seed): place for place, run in enumerate(runs)}
    assert len(places) == len(runs)
    ensembles = [run for run in runs if run.members]
    assert {len(run.members) for run in ensembles} == {2, 6}
    for run in ensembles:
        assert all(places[member] < places[run.name, run.seed] for member in run.members)
    of_six = [run for run in ensembles if run.name == "cifar10_mobilenetv2_num1_ensemble6"]
    assert len({member for run in of_six for member in run.members}) == 3 * 6  # no two share a network


def test_published_figures_stand_beside_the_published_settings_only():
    rows = {row.label: row for row in tables.tables("paper")["main"].rows}
    assert rows["ResNet-32, grafting (dlr)"].cells["CIFAR-100"].paper == 71.28
    assert {cell.paper for row in tables.tables("small")["main"].rows for cell in row.cells.values()} == {None}


@pytest.mark.parametrize("preset", tables.PRESETS)
def test_the_scripts_take_every_command_line(preset):
    from grafting_cifar.grafting import parse as parse_cifar
    from grafting_imagenet.grafting import parse as parse_imagenet

    for run in tables.runs(tables.NAMES, preset, 1):
        if run.flags:
            parse = parse_imagenet if run.script == "grafting_imagenet" else parse_cifar
            args = parse([*run.flags, "--data", "glyphs", "--device", "cpu", "--s", "somewhere"])
            assert (args.networks, args.seed, args.epochs) == (run.networks, run.seed, run.epochs)


# ---- Flags


def test_a_folder_of_ten_classes_is_not_for_cifar100(tmp_path, capsys):
    for k in range(10):
        (tmp_path / "train" / str(k)).mkdir(parents=True)
    args = queue.parse(["main", "--data", str(tmp_path)])
    found, lacking = queue.jobs_of(args)
    assert {job.run.data for job in found} == {"cifar10"} and lacking == {"cifar100"}
    assert all(job.command[job.command.index("--data") + 1] == str(tmp_path) for job in found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mane"], "got 'mane', expected main, fair,"),
        (["main", "--data", "cifar7=."], "expected DIR, cifar10=DIR"),
        (["main", "--data", "nowhere"], "there is no folder nowhere"),
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


def test_dry_run_names_every_network_and_slurm_every_run(tmp_path, monkeypatch, capsys):
    def printed(*flags):
        monkeypatch.setattr(sys, "argv", ["run.py", "main", "--seeds", "2", "--results", str(tmp_path), *flags])
        assert queue.main() == 0
        return capsys.readouterr().out

    lines = printed("--dry-run").splitlines()
    assert len(lines) == 4 * 2 * 2 * (1 + 2 + 1 + 2) == len(set(lines))
    script = printed("--slurm")
    assert "#SBATCH --array=0-63\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert script.count("/seed1\n") == 32


def test_a_slurm_task_at_its_time_limit_is_queued_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "main", "--slurm", "--results", str(tmp_path / "$HOME's")])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "some python"))
    assert queue.main() == 0
    for name, does in (
        ("some python", 'echo "$@" >said; trap "exit 143" TERM; touch running; while :; do sleep 0.01; done'),
        ("scontrol", 'echo "$@" >requeued'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_ID": "7"}
    task = subprocess.Popen(["bash", "-c", capsys.readouterr().out], env=variables, cwd=tmp_path)
    until((tmp_path / "running").exists)
    task.send_signal(signal.SIGUSR1)
    assert task.wait() == 143
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    said = (tmp_path / "said").read_text()
    assert f"--results {tmp_path}/$HOME's" in said and said.endswith("--only cifar100_resnet32_num1/seed1\n")


# ---- The queue


class Exited:
    """A process that has run until `when` was true, and left nothing."""

    def __init__(self, status=0, when=lambda: True):
        self.returncode, self.when = status, when

    def poll(self):
        return self.returncode if self.when() else None

    def terminate(self):
        pass


def make_jobs(folder, *flags):
    arguments = ["--preset", "smoke", "--seeds", "1", "--work", f"{folder}/work", "--results", f"{folder}/results"]
    return queue.jobs_of(queue.parse([*arguments, *flags]))[0]


def finish(job, recipe=None):
    """Leaves results of a command, by default the job's own."""
    results, (name, seed) = job.results.parents[2], (job.run.name, job.run.seed)
    if job.is_ensemble:
        write_ensemble(results, name, seed, job.run.member_names, 80.0, [79.0, 79.0], preset=job.preset)
    else:
        write_run(results, name, seed, [[70.0, 80.0]] * job.run.networks, preset=job.preset)
    path = job.results / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"command": recipe or job.run.recipe}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": 1}', '{"command": "python'])
def test_a_damaged_record_is_run_again_and_stops_nothing(tmp_path, text):
    job = make_jobs(tmp_path, "main")[0]
    finish(job)
    assert queue.unfinished([job]) == []
    (job.results / "result.json").write_text(text)
    assert queue.unfinished([job]) == [job]


def test_what_the_report_counts_as_damaged_the_queue_runs_again(tmp_path):
    job = make_jobs(tmp_path, "main")[1]
    finish(job)
    (job.results / "metrics2.csv").unlink()
    assert queue.unfinished([job]) == [job]


def test_results_of_another_command_are_neither_taken_nor_overwritten(tmp_path, monkeypatch):
    found = make_jobs(tmp_path, "main")
    finish(found[0])
    finish(found[1], found[1].run.recipe.replace("--epochs 2", "--epochs 3"))
    monkeypatch.setattr(jobs.Job, "start", lambda *_: pytest.fail("it was started"))
    assert queue.unfinished(found[:2]) == found[1:2]
    queue.work(found[1:2], 5, 1, [], queue.Progress(1), SimpleNamespace(check=lambda: None))
    assert f"{found[1].results} holds results of python" in found[1].failure
    assert "--epochs 3" in (found[1].results / "result.json").read_text()


def test_nothing_to_run_is_no_success(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "imagenet", "--results", str(tmp_path)])
    assert queue.main() == 2
    assert "--data imagenet=DIR" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_started(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    flags = ["--preset", "smoke", "--work", f"{tmp_path}/work", "--results", f"{tmp_path}/file"]
    monkeypatch.setattr(sys, "argv", ["run.py", "main", *flags])
    assert queue.main() == 2
    assert capsys.readouterr().err == f"{tmp_path}/file cannot be written: File exists; nothing was started\n"


def test_networks_of_imagenet_have_a_gpu_each(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    found = make_jobs(tmp_path, "main", "imagenet", "--data", f"imagenet={tmp_path / 'images'}")
    alive, together = [], []

    def begin(job, *_):
        alive.append(job)
        together.append([other.run.data for other in alive for _ in range(other.run.networks)])

    def has_ended(job):
        alive.remove(job)
        return True

    for name, does in (("begin", begin), ("has_ended", has_ended), ("collect", lambda _: None)):
        monkeypatch.setattr(jobs.Job, name, does)
    queue.work(found, 8, 1, ["0", "1"], queue.Progress(1), SimpleNamespace(check=lambda: None))
    assert {data: max(found.count(data) for found in together) for data in ("glyphs", "imagenet")} == {
        "glyphs": 6,
        "imagenet": 2,
    }


def test_networks_are_spread_over_the_gpus(tmp_path, monkeypatch):
    started = []

    def start(*_, env, **others):
        started.append(env["CUDA_VISIBLE_DEVICES"])
        return Exited(when=lambda: len(started) == 6)

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    found, silent = make_jobs(tmp_path, "main"), SimpleNamespace(check=lambda: None)
    queue.work(found, 6, 1, ["3", "5", "8"], queue.Progress(1), silent)
    assert started == ["3", "5", "8", "3", "5", "8"]
    assert all("results cannot be collected" in job.failure for job in found)


def test_a_run_belongs_to_one_queue_at_a_time(tmp_path, monkeypatch):
    (mine, *_), (others, *_) = make_jobs(tmp_path, "main"), make_jobs(tmp_path, "main")
    others.claim()
    monkeypatch.setattr(jobs.Job, "start", lambda *_: pytest.fail("it was started"))
    queue.work([mine], 5, 1, [], queue.Progress(1), SimpleNamespace(check=lambda: None))
    assert mine.failure == "another queue is at work on it"


def test_a_file_system_without_locks_is_no_reason_to_fail(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(jobs.fcntl, "flock", refuse)
    make_jobs(tmp_path, "main")[0].claim()


def test_an_ensembles_networks_are_trained_again_if_their_weights_are_gone(tmp_path):
    found = make_jobs(tmp_path, "fair")
    for job in found:
        if not job.is_ensemble:
            finish(job)
    first, second = (job for job in found if job.is_ensemble)
    finish(second)
    there, gone = (job for job in found if (job.run.name, job.run.seed) in first.run.members)
    there.directory.mkdir(parents=True)
    (there.directory / "final1.t7").touch()
    assert queue.unfinished(found) == [gone, first]


def test_only_trains_an_ensembles_networks_again_too(tmp_path, monkeypatch, capsys):
    jobs_of_all = make_jobs(tmp_path, "fair")
    for job in jobs_of_all:
        if not job.is_ensemble:
            finish(job)
    flags = ["--preset", "smoke", "--seeds", "1", "--work", f"{tmp_path}/work", "--results", f"{tmp_path}/results"]
    monkeypatch.setattr(sys, "argv", ["run.py", "fair", *flags, "--only", "glyphs_resnet20_num1", "--dry-run"])
    assert queue.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"glyphs_resnet20_num1/seed{seed}" for seed in (0, 100)]


def test_a_network_that_is_done_but_has_lost_its_weights_is_started(tmp_path, monkeypatch):
    started = []
    popen = lambda command, **_: started.append(command[-1]) or Exited()  # noqa: E731
    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))
    job = make_jobs(tmp_path, "main")[1]
    seen = [SimpleNamespace(number=i, alive=False, state="done") for i in (1, 2)]
    monkeypatch.setattr(jobs.Job, "observe", lambda _: seen)
    job.directory.mkdir(parents=True)
    (job.directory / "final1.t7").touch()
    job.start(1, [])
    assert started == ["2"]


def test_small_runs_fill_up_what_a_ring_leaves_and_do_not_keep_it_waiting(tmp_path, monkeypatch):
    """On two cores: a network, then a ring of two; another network fits in beside the first, a longer one does not."""
    single, ring, other = make_jobs(tmp_path, "main")[:3]
    assert [job.run.networks for job in (single, ring, other)] == [1, 2, 1]

    def order(epochs):
        began, left = [], {str(single): 2, str(ring): 2, str(other): 2}

        def has_ended(job):
            left[str(job)] -= 1
            return not left[str(job)]

        for name, does in (
            ("begin", lambda job, *_: began.append(job)), ("has_ended", has_ended), ("collect", lambda _: None),
            ("epochs_left", lambda _: 2),
        ):  # fmt: skip
            monkeypatch.setattr(jobs.Job, name, does)
        monkeypatch.setattr(other, "run", other.run._replace(epochs=epochs))
        queue.work([single, ring, other], 2, 1, [], queue.Progress(1), SimpleNamespace(check=lambda: None))
        return began

    assert order(2) == [single, other, ring]
    assert order(3) == [single, ring, other]


def test_the_time_left_is_that_of_the_epochs_left(tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(queue, "time", clock)
    job, ended = make_jobs(tmp_path, "main")[0], [10]  # ten epochs by an earlier queue
    monkeypatch.setattr(jobs.Job, "progress", lambda _: (ended[0], "a line"))
    show = queue.Progress(100)
    show([job], [])
    clock.now, ended[0] = 220.0, 16
    show([job], [])
    assert capsys.readouterr().out.splitlines()[-1] == "1 running, 0 waiting, about 28 min left"  # 84 epochs of 20 s


def test_a_network_that_an_earlier_queue_had_just_started_goes_on(tmp_path, monkeypatch):
    job = make_jobs(tmp_path, "main")[0]
    job.processes[1] = Exited(1)
    seen = [SimpleNamespace(number=1, alive=True, state="training")]
    monkeypatch.setattr(jobs.Job, "observe", lambda _: seen)
    assert not job.has_ended() and not job.failure
    seen[0] = SimpleNamespace(number=1, alive=False, state="done")
    assert job.has_ended() and not job.failure


def test_a_network_is_not_left_to_wait_for_one_of_an_earlier_queue_that_has_died(tmp_path, monkeypatch):
    job = make_jobs(tmp_path, "main")[1]
    job.processes[2] = Exited(when=lambda: False)
    died = SimpleNamespace(number=1, alive=False, state="died", pid=None)
    monkeypatch.setattr(jobs.Job, "observe", lambda _: [died])
    monkeypatch.setattr(Exited, "terminate", lambda self: setattr(self, "when", lambda: True))
    assert job.has_ended()
    assert job.failure.startswith("network 1: ")


# ---- Real runs


class Forked:
    """A subprocess.Popen that starts the project's scripts from the tests' nursery, within milliseconds."""

    def __init__(self, command, stdout, env, **others):
        start = {"script": command[1], "arguments": command[2:], "append": True, "plan": []}
        self.pid = NURSERY.ask({"start": {**start, "log": stdout.name, "errors": f"{stdout.name}.errors"}})
        self.returncode = None

    def poll(self):
        if self.returncode is None:
            self.returncode = NURSERY.ask({"poll": self.pid})
        return self.returncode

    def terminate(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self):
        until(lambda: self.poll() is not None)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All tables, run without a disturbance."""
    folder = tmp_path_factory.mktemp("smoke")
    images = make_class_folders(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "subprocess", SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL))
        patch.setattr(signal, "signal", lambda *_: None)  # in the tests' own process
        flags = ["--data", f"imagenet={images}", "--work", f"{folder}/work", "--results", f"{folder}/results"]
        patch.setattr(sys, "argv", ["run.py", "all", "--preset", "smoke", "--seeds", "1", *flags])
        assert queue.main() == 0
    return folder / "results"


def test_every_table_comes_to_a_full_report(smoke, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--preset", "smoke", "--results", str(smoke)])
    assert report.main() == 0
    text = (smoke / "smoke" / "report.md").read_text()
    assert "not run" not in text
    for table in tables.tables("smoke").values():
        assert table.title in text
    assert len(list((smoke / "smoke" / "plots").glob("*.png"))) > len(tables.NAMES)


def figures(folder: Path) -> dict[str, object]:
    """What a run has left, but for times."""
    record = json.loads((folder / "result.json").read_text())
    rows = {
        path.name: [{key: value for key, value in row.items() if "seconds" not in key} for row in read_table(path)]
        for path in sorted(folder.glob("*.csv"))
    }
    return {key: record[key] for key in ("name", "seed", "command", "settings", "filters")} | rows


def test_killed_and_started_again_it_ends_with_the_same_figures(smoke, tmp_path):
    work, results = tmp_path / "work", tmp_path / "results"
    command = [sys.executable, ROOT / "experiments" / "run.py", "main", "--preset", "smoke", "--seeds", "1"]
    command += ["--work", work, "--results", results]
    ring = work / "smoke" / "glyphs_resnet20_num2" / "seed0"

    def start():
        return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def signal_networks(number):
        for path in ring.glob("network*.json"):
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(json.loads(path.read_text())["pid"], number)

    first = start()
    until(lambda: list(ring.glob("ckpt*_0.t7")))
    first.kill()  # the queue alone: its networks live on
    signal_networks(signal.SIGSTOP)  # for as long as the next queue takes to start
    first.wait()
    second = start()
    assert "4 runs, " in second.stdout.readline()
    assert any("glyphs_resnet20_num2/seed0: epoch " in line for line in second.stdout)  # it has taken them over
    second.kill()
    second.wait()
    signal_networks(signal.SIGKILL)
    third = start()
    output, _ = third.communicate()
    assert third.returncode == 0, output
    names = sorted(path.name for path in (results / "smoke").iterdir())
    assert names == [f"glyphs_resnet20_num{which}" for which in ("1", "1_cos", "2", "2_difflr_cos")]
    for name in names:
        assert figures(results / "smoke" / name / "seed0") == figures(smoke / "smoke" / name / "seed0")


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path):
    work = tmp_path / "work"
    broken = work / "smoke" / "glyphs_resnet20_num1" / "seed0"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{}")
    names = ["glyphs_resnet20_num1", "glyphs_resnet20_num2"]
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "run.py", "main", "--preset", "smoke", "--seeds", "1", "--only", *names,
         "--work", work, "--results", tmp_path / "results"],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "glyphs_resnet20_num1/seed0 failed: network 1 ended with exit status 1: " in done.stderr
    assert "1 runs done, 1 failed" in done.stdout
    assert (tmp_path / "results" / "smoke" / "glyphs_resnet20_num2" / "seed0" / "result.json").exists()
