"""The launcher's rules: which flags it takes, where it starts networks, how it shows, stops and continues them."""

import os
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import launching
import pytest
import torch
from launching import flags_of, write_status
from processes import ROOT, until

from filter_grafting import membership
from training import launch, view

GLYPHS = ("--data", "glyphs", "--device", "cpu")


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    yield from launching.project(tmp_path, monkeypatch, capsys)


@pytest.fixture
def living(tmp_path):
    """living(directory, i, ...): a process that is network i there, with these fields in its status."""
    program = (
        "import fcntl, signal, sys, time\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "if sys.argv[2:]: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(flush=True)\n"
        "time.sleep(120)\n"
    )
    processes = []

    def start(directory, network, deaf=False, **fields):
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-S", "-c", program, directory / f"network{network}.lock", *["deaf"] * deaf]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        processes[-1].stdout.readline()
        write_status(directory, network, **{"pid": processes[-1].pid, **fields})
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


# Flags


def test_help_is_given_anywhere_and_nothing_is_touched(project):
    for words in ("--help", "demo --help", "status -h", "help", "--model vgg16 --help", "stop x --help"):
        status, output, errors = project(*words.split())
        assert (status, errors) == (0, "")
        assert "grafting.sh resume DIR... [--epochs E]" in output
    assert not list(project.cwd.iterdir())


WRONG = [
    ("cifar", "--modle resnet20", 2, "did you mean --model?"),
    ("cifar", "--model resent20", 2, "did you mean resnet20?"),
    ("cifar", "stauts checkpoint", 2, "there is no command 'stauts'; did you mean status?"),
    ("cifar", "--i=2", 2, "argument --i: all networks are started"),
    ("cifar", "--data /nonexistent", 1, "there is no folder /nonexistent"),
    ("cifar", "--data glyphs --gpus-per-network 2", 2, "torchrun is for grafting_imagenet"),
    ("cifar", "resume", 2, "DIR"),
    ("cifar", "resume x --epoch 3", 2, "did you mean --epochs?"),
    ("cifar", "demo --num=4", 2, "argument --num: the demo says itself what it trains"),
    ("cifar", "demo --epochs 0", 2, "argument --epochs: got '0'"),
    ("cifar", "demo --data /nonexistent", 1, "there is no folder /nonexistent"),
    ("cifar", "status nothing", 1, "nothing is not the save directory of a run"),
    ("imagenet", "--data / --gpu 1", 2, "CUDA_VISIBLE_DEVICES"),
    ("imagenet", "--data / -e --pretrained", 2, "argument -e"),
    ("imagenet", "", 1, "there is no folder imagenet"),
    ("imagenet", "--data / -b 6 --gpus-per-network 4", 2, "argument -b: got 6, expected a multiple of 4"),
    ("imagenet", "--data / --gpus-per-network 0", 2, "argument --gpus-per-network: got '0'"),
]


def test_a_wrong_flag_is_one_line_before_anything_is_started(project):
    for folder, words, status, sentence in WRONG:
        found, _, errors = project(*words.split(), folder=f"grafting_{folder}")
        assert (found, errors.count("\n")) == (status, 1) and sentence in errors, words
    assert not list(project.cwd.iterdir())


# Starting


def test_networks_start_as_nohup_would_start_them(project):
    (project.cwd / "it's $HOME").mkdir()
    (project.cwd / "it's $HOME/1.log").write_text("precious\n")
    status, output, errors = project(*GLYPHS, "--s", "it's $HOME", "--num", "2", "-v")
    assert (status, errors) == (0, "")
    for i in (1, 2):
        seen = project.seen("it's $HOME", i)
        assert seen["nohup"] == [True, True, True], "deaf to SIGHUP, a session of its own, an empty standard input"
        assert (seen["cwd"], flags_of(seen["argv"])["i"]) == (str(project.cwd), i)
    until(lambda: project.status("it's $HOME", 1)["state"] == "done")
    first = project.seen("it's $HOME", 1)
    subprocess.run(["sh", "-c", f"{output.splitlines()[0]} wait"], cwd=project.cwd, check=True)  # can be pasted
    again = project.seen("it's $HOME", 1)
    assert again["pid"] != first["pid"] and again["argv"] == first["argv"]
    log = (project.cwd / "it's $HOME/1.log").read_text()
    assert log.startswith("precious\nNetwork:1") and log.count("Network:1") == 2


@pytest.mark.parametrize(
    ("visible", "found", "expected"),
    [
        (None, 3, ["0", "1", "2", "0", "1"]),
        ("5,GPU-ab, 7", 3, ["5", "GPU-ab", "7", "5", "GPU-ab"]),
        ("4,99", 1, ["4"] * 5),  # CUDA itself stops at the first that it does not know
        (None, 0, [None] * 5),
    ],
)
def test_networks_are_spread_over_the_gpus_that_torch_can_use(monkeypatch, visible, found, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found or 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    names = launch.gpus(None)
    assert [launch.gpus_of(k, 1, names).get("CUDA_VISIBLE_DEVICES") for k in range(1, 6)] == expected
    assert launch.gpus("cpu") == []


def test_a_network_on_several_gpus_has_the_next_ones():
    names = ["a", "b", "c", "d"]
    assert [launch.gpus_of(k, 2, names)["CUDA_VISIBLE_DEVICES"] for k in (1, 2, 3)] == ["a,b", "c,d", "a,b"]


def test_networks_share_the_cores(project, monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 8)
    compiled = Namespace(compile=True)
    assert launch.share_of(compiled, 3, []) == {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    assert launch.share_of(Namespace(compile=False), 3, ["0"]) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch.share_of(compiled, 16, []) == {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    jobs = project.records()
    for flags in ((), ("-j", "7")):
        project("--data", project.cwd, "--num", "2", *flags, folder="grafting_imagenet")
    assert [flags_of(job.words, "grafting_imagenet")["workers"] for job in jobs] == [4, 4, 7, 7]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_network_that_fails_at_once_is_said_with_its_sentence(project, monkeypatch, ranks):
    monkeypatch.setenv("FAILS", "the disk is full: make room")
    flags = ("--data", project.cwd, "--device", "cpu", "--num", "1", "--gpus-per-network", ranks)
    status, output, _ = project(*flags, folder="grafting_imagenet")
    assert (status, "\nnetwork 1 has failed: the disk is full: make room\n" in output) == (1, True), output


def test_torchruns_report_does_not_hide_what_a_network_said(tmp_path):
    log = tmp_path / "1.log"
    report = "E1126 01:02 7 site-packages/torch/distributed/elastic/multiprocessing/api.py:874] failed (exitcode: 1)\n"
    log.write_text(f"earlier\nthe disk is full: make room\n{report}Traceback\n  more\n")
    one = view.Started("network 1", Namespace(returncode=1), log, len("earlier\n"), "")
    assert one.sentence() == "network 1 has failed: the disk is full: make room"


def test_a_directory_that_cannot_be_made_is_a_sentence(project):
    (project.cwd / "file").touch()
    status, _, errors = project(*GLYPHS, "--s", "file/x")
    assert (status, errors) == (1, "file/x: Not a directory\n")


def test_a_directory_in_which_networks_run_or_have_run_is_refused(project, living):
    write_status(project.cwd / "old", 2, state="stopped")
    living(project.cwd / "alive", 1)
    for name, runs in (("old", "network 2 has run in old"), ("alive", "network 1 runs in alive")):
        status, _, errors = project(*GLYPHS, "--s", name)
        assert (status, runs in errors) == (1, True)
        assert f"grafting.sh' resume {name} continues it" in errors
        assert not list((project.cwd / name).glob("*.log"))


# Looking


def test_a_table_fits_80_columns_whatever_the_files_hold(project, living):
    run = project.cwd / "x"
    rubbish = {"state": "\x1b[2J" + "long " * 100, "epoch": "\x07", "accuracy": None, "best": [1], "detail": "\r|" * 99}
    living(run, 1, time="x", **rubbish)
    write_status(run, 2, state="failed", detail="\x1b]0;title\x07" + "reason " * 100, epoch=10**400, steps="x", step=3)
    living(run, 112, state="waiting", detail="for network 111", epochs=1000, lr=1.234e-5, accuracy=100.0)
    status, output, _ = project("status", "x")
    lines = output.splitlines()
    assert status == 0 and all(len(line) <= 80 and line.isprintable() for line in lines)
    assert [line.split()[0] for line in lines[:3]] == ["network", "1", "2"]
    assert lines[112].endswith("waiting for 111")
    assert lines[113].startswith("network 2 failed:  ]0;title reason")


def test_the_time_left_is_told_by_the_last_epochs(tmp_path):
    write_status(tmp_path, 1, epoch=2, epochs=4, step=5, steps=10)
    rows = ["epoch,train_seconds,test_seconds,wait_seconds,graft_seconds", "0,20,5,,", "1,30,5,4,1"]
    (tmp_path / "metrics1.csv").write_text("\n".join(rows) + "\n")
    (status,) = membership.observe(tmp_path, [1])
    done, left = view.progress(tmp_path, status._replace(state="training"))
    assert (done, left) == (2.5, 1.5 * (25 + 40) / 2)
    (tmp_path / "metrics1.csv").write_text(rows[0] + "\n")
    assert view.progress(tmp_path, status) == (0, None)


def test_status_lists_all_runs_and_finds_them_from_any_folder(project, living, monkeypatch):
    assert project("status")[:2] == (0, "there is no run below checkpoint/\n")
    assert project("stop")[:2] == (0, "no run below checkpoint/ is alive\n")
    living(project.cwd / "checkpoint/a/b", 1, best=93.5)
    write_status(project.cwd / "checkpoint/a/b", 2, best=94.25)
    write_status(project.root / "grafting_imagenet/checkpoint/pictures", 1, state="done", epoch=199)
    (project.root / "grafting_cifar/checkpoint/empty").mkdir(parents=True)
    lines = project("status")[1].splitlines()[1:]
    assert lines[0].split()[-1] == "checkpoint/a/b"
    assert lines[1].endswith("a project/grafting_imagenet/checkpoint/pictures") and len(lines) == 2
    assert [line.split()[0] for line in lines] == ["1/2", "0/1"] and "94.250" in lines[0]
    for path in ("checkpoint/a/b", "a/b", "pictures", "grafting_imagenet/checkpoint/pictures"):
        assert project("status", path)[0] == 0
    monkeypatch.chdir(project.root / "grafting_imagenet/checkpoint")
    status, output, _ = project("status", "pictures", project.cwd / "checkpoint/a/b")
    assert (status, output.splitlines()[0]) == (0, "pictures:")
    assert project("status", "a/b")[0] == 1, "it is neither here nor in the scripts' folders"


def test_a_reader_who_has_seen_enough_ends_it_quietly(tmp_path):
    write_status(tmp_path / "x", 1, state="failed", detail="reason " * 50)
    command = f"{shlex.quote(str(ROOT / 'grafting_cifar/grafting.sh'))} status x"
    environment = {**os.environ, "PYTHON": sys.executable}
    ended = subprocess.run(["sh", "-c", f"{command} | true"], cwd=tmp_path, env=environment, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")


# Stopping


def test_stop_ends_those_that_hold_the_locks_and_no_others(project, living):
    first, second = (living(project.cwd / name, 1) for name in ("x", "checkpoint/y"))
    bystander = living(project.cwd / "checkpoint/z", 1)
    write_status(project.cwd / "x", 2, pid=bystander.pid, state="done")  # its process id is another's now
    status, _, errors = project("stop")
    assert (status, "checkpoint/y, checkpoint/z" in errors) == (2, True)
    status, output, _ = project("stop", "x", "y")
    assert (status, first.wait(), second.wait(), bystander.poll()) == (0, -signal.SIGTERM, -signal.SIGTERM, None)
    asked = [f"network 1 (process {process.pid}) is asked to stop" for process in (first, second)]
    gone = [f"no network of {name} is alive" for name in ("x", "checkpoint/y")]
    assert output.splitlines() == [asked[0], gone[0], asked[1], gone[1]]
    assert project("stop", "x")[0] == 0, "a second time there is nothing to do, which is fine"
    assert project("stop")[0] == 0 and bystander.wait() == -signal.SIGTERM, "the only run that is alive"


def test_stop_says_what_it_could_not_end(project, living):
    deaf = living(project.cwd / "x", 1, deaf=True)
    living(project.cwd / "x", 2, host="elsewhere", pid=7)
    assert launch.end(project.cwd / "x", 0.3) == 1
    output = project.capsys.readouterr().out
    assert f"network 1 (process {deaf.pid}) is still there after 0.3 s" in output
    assert "network 2 (process 7) is on elsewhere: stop it there" in output


def test_within_moments_of_the_start_nothing_is_started_twice_and_stop_waits_for_what_is_starting(project, monkeypatch):
    project.trains_on()
    project.hold()
    assert project(*GLYPHS, "--s", "x", "--num", "2")[0] == 0
    assert [status.state for status in view.look(project.cwd / "x")] == ["starting"] * 2
    status, _, errors = project(*GLYPHS, "--num", "2", "--s", "x")
    assert (status, "network 1 runs in x" in errors) == (1, True)
    looks, look = [], view.look

    def look_and_go(directory, of=None):
        looks.append(directory)
        if len(looks) == 3:
            project.go.touch()  # now they take their places
        return look(directory, of)

    monkeypatch.setattr(view, "look", look_and_go)
    status, output, _ = project("stop", "x")
    assert (status, output.count("is asked to stop"), "no network of x is alive" in output) == (0, 2, True)
    assert [project.status("x", i)["state"] for i in (1, 2)] == ["stopped"] * 2
    assert not view.started_here(project.cwd / "x")


def test_stop_of_a_network_on_several_processes_waits_for_them_all(project):
    project.trains_on()
    project.patch.setattr(launch, "cores", lambda: 2)
    flags = ("--data", str(project.cwd), "--device", "cpu", "--save_dir", "x", "--networks", "1")
    status, output, errors = project(*flags, "--gpus-per-network", "2", folder="grafting_imagenet")
    assert status == 0, output + errors
    seen = [project.seen("checkpoint/x", 1, rank) for rank in (0, 1)]
    assert [one["OMP_NUM_THREADS"] for one in seen] == ["1", "1"]
    until(lambda: project.status("checkpoint/x", 1)["state"] == "training")
    status, output, _ = project("stop", "x")
    assert (status, output.splitlines()[-1]) == (0, "no network of checkpoint/x is alive")
    for one in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(one["pid"], 0)


# Continuing


def test_resume_goes_on_with_the_flags_that_each_network_had(project, living, monkeypatch):
    (project.cwd / "images").mkdir()
    flags = ("--data", "images", "--device", "cpu", "--model", "resnet20", "--lr", "0.05", "--num", "4", "--s", "x")
    jobs, run = project.records(), project.cwd / "x"
    assert project(*flags, "--epochs", "2")[0] == 0
    script = str(project.root / "grafting_cifar/grafting.py")
    for job, state in zip(jobs, ("done", "training", "failed", "training"), strict=True):  # 2 as if killed
        command = {"command": ["python", script, *job.words], "cwd": str(project.cwd), "state": state, "epochs": 2}
        (living if job.i == 4 else write_status)(run, job.i, **command)
    jobs.clear()
    monkeypatch.chdir("/")
    assert project("resume", run)[0] == 0
    assert [job.i for job in jobs] == [2, 3], "1 is done, 4 is alive"
    for job in jobs:
        expected = {"data": Path("images"), "lr": 0.05, "num": 4, "s": run, "resume": True, "epochs": 2, "i": job.i}
        assert expected.items() <= flags_of(job.words).items() and job.cwd == str(project.cwd)
        write_status(run, job.i, command=["python", script, *job.words], cwd=str(project.cwd))
    again = list(jobs)
    jobs.clear()
    project("resume", run)
    assert jobs == again, "what continues a network does not grow"


def test_resume_with_more_epochs_continues_what_is_done(project):
    flags = ("--s", "x", "--num", "1", "--epochs")
    project(*GLYPHS, *flags, "2")
    until(lambda: not view.living(project.cwd / "x"))
    assert "nothing to continue in x" in project("resume", "x")[1]
    assert "nothing to start" in project(*GLYPHS, "--resume", *flags, "2")[1]
    assert project("resume", "x", "--epochs", "3")[0] == 0
    until(lambda: not view.living(project.cwd / "x"))
    assert project.status("x", 1)["epochs"] == 3
    assert project(*GLYPHS, "--resume", *flags, "4")[0] == 0
    until(lambda: project.status("x", 1)["epochs"] == 4)


@pytest.mark.parametrize("command", [[], ["python", "/tmp/evil.py"], ["python", "elsewhere/grafting.py", "--num", "1"]])
def test_resume_starts_nothing_but_the_projects_own_scripts(project, command):
    jobs = project.records()
    write_status(project.cwd / "x", 1, command=command, cwd=str(project.cwd))
    status, _, errors = project("resume", "x")
    assert (status, "network 1 has left no command in x" in errors, jobs) == (1, True, [])


def test_resume_knows_how_many_processes_a_network_had(project, monkeypatch):
    python = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["grafting.py", "--data", str(project.cwd), "--num", "1", "--device", "cpu"]
    place = {"cwd": str(project.root / "grafting_imagenet"), "state": "stopped"}
    write_status(project.cwd / "x", 1, command=[*python, *words], **place)
    commands = []
    monkeypatch.setattr(launch, "command_of", lambda *arguments: commands.append(arguments) or ["true"])
    project("resume", "x")
    assert [(folder, ranks) for folder, _, ranks in commands] == [("grafting_imagenet", 2)]
