"""The launcher's rules: which flags it takes, where it starts networks, how it shows, stops and continues them."""

import os
import re
import signal
import subprocess
from argparse import Namespace
from functools import partial

import pytest
import torch
from launching import ENVIRONMENT, LAUNCHER, write_status
from processes import until

from filter_grafting.membership import observe
from grafting_imagenet import flags
from training import launch

GLYPHS = ("--data", "glyphs", "--device", "cpu")


def test_help_is_given_anywhere_and_nothing_is_touched(project):
    for words in ("--help", "demo --help", "status -h", "--model vgg16 --help", "stop x --help"):
        status, output, errors = project(*words.split())
        assert (status, errors) == (0, "") and "grafting.sh resume DIR... [--epochs E]" in output
    assert not list(project.cwd.iterdir())


@pytest.mark.parametrize(
    ("folder", "words", "status", "sentence"),
    [
        ("cifar", "--modle resnet20", 2, "did you mean --model?"),
        ("cifar", "--gpus-per-netwrok 2", 2, "did you mean --gpus-per-network?"),
        ("cifar", "--gpus-per-network 2", 2, "argument --gpus-per-network: a CIFAR network trains in one process"),
        ("imagenet", "demo --gpus-per-network 2", 2, "a CIFAR network trains in one process"),
        ("cifar", "stauts checkpoint", 2, "there is no command 'stauts'; did you mean status?"),
        ("cifar", "--i=2", 2, "argument --i: is for grafting.py"),
        ("cifar", "resume", 2, "DIR"),
        ("cifar", "resume x --epoch 3", 2, "did you mean --epochs?"),
        ("cifar", "demo --num=4", 2, "argument --num: is for grafting.py"),
        ("cifar", "demo --epochs 0", 2, "argument --epochs: got '0'"),
        ("cifar", "status nothing", 1, "nothing is not the save directory of a run"),
        ("imagenet", "--gpu 1", 2, "CUDA_VISIBLE_DEVICES says which there are"),
        ("imagenet", "--gpus-per-network 0", 2, "argument --gpus-per-network: got '0'"),
    ],
)
def test_a_wrong_flag_is_one_line_before_anything_is_started(project, folder, words, status, sentence):
    found, _, errors = project(*words.split(), folder=f"grafting_{folder}")
    assert (found, errors.count("\n")) == (status, 1) and sentence in errors
    assert not list(project.cwd.iterdir())


# Starting


def test_networks_start_as_nohup_would_start_them(project):
    (project.cwd / "it's $HOME").mkdir()
    (project.cwd / "it's $HOME/1.log").write_text("precious\n")
    status, output, errors = project(*GLYPHS, "--s", "it's $HOME", "--num", "2", "-v")
    assert (status, errors) == (0, "")
    until(lambda: project.states("it's $HOME") == ["done"] * 2)
    for i in (1, 2):
        said = project.status("it's $HOME", i)
        assert said["session"] == said["pid"] and said["stdin"] == "", "a session of its own, an empty standard input"
        assert (said["cwd"], said["command"][-2:]) == (str(project.cwd), ["--i", str(i)])
        assert said["threads"] == str(max(1, launch.cores() // 2))
    first = project.status("it's $HOME", 1)
    subprocess.run(["sh", "-c", f"{output.splitlines()[0]} wait"], cwd=project.cwd, check=True)  # can be pasted
    again = project.status("it's $HOME", 1)
    assert again["pid"] != first["pid"] and again["command"] == first["command"]
    log = (project.cwd / "it's $HOME/1.log").read_text()
    assert log.startswith("precious\nNetwork:1") and log.count("Network:1") == 2


@pytest.mark.parametrize(
    ("visible", "found", "ranks", "expected"),
    [
        (None, 3, 1, ["0", "1", "2", "0", "1"]),
        ("5,GPU-ab, 7", 3, 1, ["5", "GPU-ab", "7", "5", "GPU-ab"]),
        ("4,99", 1, 1, ["4"] * 5),  # CUDA itself stops at the first that it does not know
        ("4,5,6,7", 4, 2, ["4,5", "6,7", "4,5", "6,7", "4,5"]),
        (None, 3, 2, ["0,1", "2,0", "1,2", "0,1", "2,0"]),
        (None, 0, 1, [None] * 5),
    ],
)
def test_networks_are_spread_over_the_gpus_that_torch_can_use(monkeypatch, visible, found, ranks, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found or 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    args = Namespace(device=None, num=5, compile=False)
    assert [launch.environment(i, args, ranks).get("CUDA_VISIBLE_DEVICES") for i in range(1, 6)] == expected
    for device, gpu in ("cpu", None), (None, 1):
        args = Namespace(device=device, gpu=gpu, num=1, compile=False)
        assert "CUDA_VISIBLE_DEVICES" not in launch.environment(1, args)


def test_a_network_gets_no_gpu_twice_and_nothing_is_started_without_enough(project, monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda device: ["0", "1"])
    status, _, errors = project("--num", "1", "--gpus-per-network", "4", folder="grafting_imagenet")
    sentence = (
        "each network is to have 4 GPUs (--gpus-per-network), and torch can use 2 here (see CUDA_VISIBLE_DEVICES)"
    )
    assert (status, errors) == (1, f"{sentence}\n") and not list(project.cwd.rglob("*.out"))


def test_networks_share_the_cores(project, monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 8)
    jobs = project.records()
    for words in ((), ("-j", "7"), ("--gpus-per-network", "2")):
        project("--num", "2", "--device", "cpu", *words, folder="grafting_imagenet")
    assert [flags.parse(job.words).workers for job, *_ in jobs] == [4, 4, 7, 7, 2, 2]
    assert [variables["OMP_NUM_THREADS"] for _, variables, _ in jobs] == ["4", "4", "4", "4", "2", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's own
    compiling = Namespace(device="cpu", num=2, compile=True)
    assert launch.environment(1, compiling) == {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
    monkeypatch.setattr(launch, "gpus", lambda device: ["0"])
    assert launch.environment(1, compiling) == {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_network_that_fails_at_once_is_said_with_its_sentence(project, monkeypatch, ranks):
    monkeypatch.setenv("FAILS", "the disk is full: make room")
    words = ("--device", "cpu", "--num", "1", "--gpus-per-network", ranks)
    status, output, _ = project(*words, folder="grafting_imagenet")
    assert (status, "\nnetwork 1 ended with status 1: the disk is full: make room\n" in output) == (1, True), output


def test_a_directory_in_which_networks_run_or_have_run_or_that_cannot_be_made_is_a_sentence(project):
    write_status(project.cwd / "old", 2, state="stopped")
    project.is_alive("alive", 1)
    for name, runs in (("old", "network 2 has run in old"), ("alive", "network 1 runs in alive")):
        status, _, errors = project(*GLYPHS, "--s", name)
        assert (status, runs in errors) == (1, True)
        assert f"grafting.sh resume {name} continues it" in errors
        assert not list((project.cwd / name).glob("*.log"))
    (project.cwd / "file").touch()
    status, _, errors = project(*GLYPHS, "--s", "file/x")
    assert (status, errors.startswith("file/x")) == (1, True) and errors.endswith(": Not a directory\n")


# Looking


def test_status_shows_how_the_networks_are(project):
    run = project.cwd / "x"
    project.is_alive("x", 1, num=4, epoch=2, epochs=4, lr=1.234e-5, accuracy=100.0)
    rows = ["epoch,train_seconds,test_seconds,wait_seconds,graft_seconds", "0,20,5,,", "1,30,5,4,1"]
    (run / "metrics1.csv").write_text("\n".join(rows) + "\n")
    project.is_alive("x", 2, num=4, state="waiting", detail="for network 1", accuracy=None)
    write_status(run, 3, num=4, state="failed", detail="the disk is full")
    status, output, _ = project("status", "x")
    lines = output.splitlines()
    assert (status, lines[0]) == (0, "x:")
    assert lines[1].split() == ["network", "epoch", "accuracy", "best", "rate", "left", "state"]
    assert lines[2].split() == ["1", "2/4", "##..", "100.000", "92.250", "1.23e-05", "65", "s", "training"]
    states = ["waiting for network 1", "failed: the disk is full", "not started"]
    assert all(line.endswith(state) for line, state in zip(lines[3:], states, strict=True))


def test_status_lists_all_runs_and_finds_them_from_any_folder(project, monkeypatch):
    assert project("status")[:2] == (0, "there is no run below checkpoint/\n")
    assert project("stop")[:2] == (0, "no run below checkpoint/ is alive\n")
    write_status(project.cwd / "checkpoint/a/b", 1)
    write_status(project.root / "grafting_imagenet/checkpoint/pictures", 1, state="done", epoch=199)
    (project.root / "grafting_cifar/checkpoint/empty").mkdir(parents=True)
    heads = [line for line in project("status")[1].splitlines() if line.endswith(":")]
    assert sorted(heads) == ["../a project/grafting_imagenet/checkpoint/pictures:", "checkpoint/a/b:"]
    for path in ("checkpoint/a/b", "a/b", "pictures", "grafting_imagenet/checkpoint/pictures"):
        assert project("status", path)[0] == 0
    monkeypatch.chdir(project.root / "grafting_imagenet/checkpoint")
    status, output, _ = project("status", "pictures", project.cwd / "checkpoint/a/b")
    assert (status, output.splitlines()[0]) == (0, "pictures:")
    assert project("status", "a/b")[0] == 1, "it is neither here nor in the scripts' folders"


# Stopping


def test_stop_ends_a_runs_networks_and_no_others(project):
    project.trains_on()
    for name in ("x", "checkpoint/y", "checkpoint/z"):
        assert project(*GLYPHS, "--num", "1", "--s", name)[0] == 0
    pids = [project.status(name, 1)["pid"] for name in ("x", "checkpoint/y", "checkpoint/z")]
    write_status(project.cwd / "x", 2, pid=pids[2], state="done")  # its process id is another's now
    status, _, errors = project("stop")
    assert (status, "checkpoint/y, checkpoint/z" in errors) == (2, True)
    status, output, _ = project("stop", "x", "y")
    assert status == 0
    asked = [f"network 1 (process {pid}) is asked to stop" for pid in pids]
    gone = [f"no network of {name} is alive" for name in ("x", "checkpoint/y")]
    assert output.splitlines() == [asked[0], gone[0], asked[1], gone[1]]
    assert [project.states(name) for name in ("checkpoint/y", "checkpoint/z")] == [["stopped"], ["training"]]
    assert project("stop", "x")[0] == 0, "a second time there is nothing to do, which is fine"
    assert project("stop")[0] == 0 and project.states("checkpoint/z") == ["stopped"], "the only run that is alive"


def test_stop_says_what_it_could_not_end(project, monkeypatch):
    monkeypatch.setattr(launch, "STOP_SECONDS", 0.1)
    project.is_alive("x", 1, pid=2**30)
    project.is_alive("x", 2, host="elsewhere", pid=7)
    status, output, _ = project("stop", "x")
    assert (status, "process 7) is asked" in output) == (1, False)
    assert f"network 1 (process {2**30} on {os.uname().nodename}) is still alive" in output
    assert "network 2 (process 7 on elsewhere) is still alive" in output


# Continuing


def test_resume_goes_on_with_the_flags_that_each_network_had(project, monkeypatch):
    words = ("--data", "images", "--device", "cpu", "--model", "resnet20", "--lr", "0.05", "--num", "4", "--s", "x")
    (project.cwd / "images").mkdir()
    jobs, run = project.records(), project.cwd / "x"
    assert project(*words, "--epochs", "2")[0] == 0
    script = str(project.root / "grafting_cifar/grafting.py")
    for (job, *_), state in zip(jobs, ("done", "training", "failed", "training"), strict=True):  # 2 as if killed
        fields = {"command": ["python", script, *job.words], "cwd": str(project.cwd), "state": state}
        write_status(run, job.i, num=4, epochs=2, **fields)
    project.is_alive("x", 4, num=4, epochs=2)
    first = {job.i: job.words for job, *_ in jobs}
    jobs.clear()
    monkeypatch.chdir("/")
    assert project("resume", run)[0] == 0
    assert [job.i for job, *_ in jobs] == [2, 3], "1 is done, 4 is alive"
    for job, *_ in jobs:
        assert job.words == [*first[job.i], "--s", str(run), "--resume"] and job.cwd == str(project.cwd)
        write_status(run, job.i, num=4, epochs=2, command=["python", script, *job.words], cwd=str(project.cwd))
    again = list(jobs)
    jobs.clear()
    project("resume", run)
    assert jobs == again, "what continues a network does not grow"


def test_resume_with_more_epochs_continues_what_is_done(project):
    words = (*GLYPHS, "--s", "x", "--num", "1", "--epochs")

    def has_ended(epochs):
        (one,) = observe(project.cwd / "x", [1])
        return (one.state, one.alive, one.epochs) == ("done", False, epochs)

    for call, epochs in ((*words, "2"), 2), (("resume", "x", "--epochs", "3"), 3), (("--resume", *words, "4"), 4):
        assert project(*call)[0] == 0
        until(partial(has_ended, epochs))
    for call in ("resume", "x"), ("--resume", *words, "4"):
        assert "nothing to start" in project(*call)[1]


def test_resume_starts_the_projects_own_scripts_alone_in_as_many_processes_as_they_had(project):
    jobs, place = project.records(), {"cwd": str(project.root / "grafting_imagenet"), "state": "stopped", "num": 1}
    for command in ([], ["python", "/tmp/evil.py"], ["python", "elsewhere/grafting.py", "--num", "1"]):
        write_status(project.cwd / "x", 1, command=command, **place)
        status, _, errors = project("resume", "x")
        sentence = (
            "network 1 has left no command of grafting.py: start the run with the flags that it had, and --resume"
        )
        assert (status, sentence in errors, jobs) == (1, True, [])
    python = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    write_status(project.cwd / "x", 1, command=[*python, "grafting.py", "--num", "1", "--device", "cpu"], **place)
    project("resume", "x")
    project("resume", "x", "--gpus-per-network", "4")
    assert [(job.folder, ranks) for job, _, ranks in jobs] == [("grafting_imagenet", 2), ("grafting_imagenet", 4)]


# As it is called: from a terminal, from a file, with networks that train


def test_a_terminal_shows_a_table_and_neither_its_end_nor_ctrl_c_ends_the_training(project, terminal):
    project.trains_on()
    flags = ("--data", "glyphs", "--device", "cpu", "--s")
    calls = [partial(project.run, *flags, name) for name in ("x", "y", "z")]
    watched, left, closed = (terminal(call, project.cwd) for call in calls)
    for shown in (watched, left, closed):
        shown.shows("training")
    left.press_ctrl_c()
    assert left.end() == 130
    assert "no longer watching; the training goes on" in left.text
    os.kill(closed.pid, signal.SIGHUP)
    assert closed.end() == -signal.SIGHUP
    until(lambda: project.states("y") == project.states("z") == ["training"] * 2)
    assert project("stop", "y")[0] == 0 and project.states("y") == ["stopped"] * 2
    project.ends.touch()
    assert watched.end() == 0
    last = watched.text.split("\x1b[J")[-1].splitlines()
    assert [line.split()[-1] for line in last[:3]] == ["state", "done", "done"]
    assert all(len(re.sub(r"\x1b\[\d*\w", "", line)) <= 80 for line in watched.text.splitlines())
    until(lambda: project.states("z") == ["done"] * 2)


def test_on_a_terminal_several_runs_are_continued_and_none_is_watched(project, terminal):
    script = str(project.root / "grafting_cifar/grafting.py")
    for name in ("x", "y"):
        words = (*GLYPHS, "--s", name, "--num", "1")
        write_status(project.cwd / name, 1, num=1, cwd=str(project.cwd), command=["python", script, *words])
    status, _, errors = project("resume", "x", "typo")
    assert (status, "typo is not the save directory" in errors) == (1, True)
    assert not (project.cwd / "x/1.log").exists(), "a wrong name shows before anything is started"
    project.trains_on()
    assert terminal(partial(project.run, "resume", "x", "y"), project.cwd).end() == 0
    assert project.states("x") == project.states("y") == ["training"]


def test_grafting_sh_runs_from_any_folder_and_its_reader_may_have_seen_enough(tmp_path):
    write_status(tmp_path / "a run", 1, state="failed", detail="the disk is full")
    command = ["sh", "-c", f"'{LAUNCHER}' status 'a run' | head -n 1"]
    ended = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "a run:\n", "")


@pytest.mark.slow
def test_a_ring_is_started_killed_resumed_and_stopped(make_run, tmp_path):
    run = make_run(directory=tmp_path / "a run")

    def call(*words, cwd):
        return subprocess.run([LAUNCHER, *map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)

    def epochs():
        return [path.read_text().count("\n") for path in sorted(run.directory.glob("metrics?.csv"))]

    started = call(*run.flags, "--epochs", "100000", "--s", run.directory, cwd=tmp_path)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        until(lambda: len(epochs()) == 2 and min(epochs()) > 2)
        survivor, victim = (run.status(network)["pid"] for network in (1, 2))
        os.kill(victim, signal.SIGKILL)
        until(lambda: observe(run.directory)[1].state == "died")
        before = epochs()[1]
        resumed = call("resume", run.directory, cwd="/")
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        until(lambda: run.status(2)["pid"] != victim and epochs()[1] > before)
        assert run.status(1)["pid"] == survivor
        stopped = call("stop", run.directory, cwd=tmp_path)
    finally:
        for one in observe(run.directory):
            if one.alive:
                os.kill(one.pid, signal.SIGKILL)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert [run.status(network)["state"] for network in (1, 2)] == ["stopped"] * 2
