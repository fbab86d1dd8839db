"""The launcher's rules: which flags it takes, where it starts networks, how it shows, stops and continues them."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import launching
import pytest
import torch
from launching import write_status
from processes import ROOT, until

from filter_grafting import membership
from training import launch, view

GLYPHS = ("--data", "glyphs", "--device", "cpu")


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    with launching.project(tmp_path, monkeypatch, capsys) as made:
        yield made


@pytest.fixture
def living(tmp_path):
    """living(directory, i, ...): a process that is network i there, with these fields in its status."""
    program = (
        "import fcntl, signal, sys, time\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "if sys.argv[2:]: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(flush=True)\n"
        "time.sleep(600)\n"
    )
    processes = []

    def start(directory, network, deaf=False, **fields):
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", program, directory / f"network{network}.lock", *["deaf"] * deaf]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        processes[-1].stdout.readline()
        write_status(directory, network, **{"pid": processes[-1].pid, **fields})
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


# Flags


@pytest.mark.parametrize(
    "words", ["--help", "demo --help", "status -h", "help", "--model vgg16 --help", "stop x --help"]
)
def test_help_is_given_anywhere_and_nothing_is_touched(project, words):
    status, output, errors = project(*words.split())
    assert (status, errors) == (0, "")
    assert "grafting.sh resume DIR... [--epochs E]" in output
    assert not list(project.cwd.iterdir())


@pytest.mark.parametrize(
    ("folder", "words", "status", "sentence"),
    [
        ("cifar", "--modle resnet20", 2, "did you mean --model?"),
        ("cifar", "--model resent20", 2, "did you mean resnet20?"),
        ("cifar", "stauts checkpoint", 2, "there is no command 'stauts'; did you mean status?"),
        ("cifar", "--i 2", 2, "argument --i: all networks are started"),
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
    ],
)
def test_a_wrong_flag_is_one_line_before_anything_is_started(project, folder, words, status, sentence):
    found, _, errors = project(*words.split(), folder=f"grafting_{folder}")
    assert (found, errors.count("\n")) == (status, 1)
    assert sentence in errors
    assert not list(project.cwd.iterdir())


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("grafting_cifar", "--s=x --model resnet20 --lr 1e-5 --cos --num 3 --i 2 --data=~/x --a 0.4 --resume"),
        ("grafting_cifar", "--save_dir x --networks 1 --method average --num 2 --keep_all --timeout 0.5"),
        ("grafting_imagenet", "-a resnet34 -b 8 --wd 0 --resume x.tar --resume auto -p 0 --learning-rate 0.3 -j 3"),
        ("grafting_imagenet", "--s checkpoint/two --pretrained --steplr --gpu 1"),
    ],
)
def test_flags_are_handed_on_as_they_were_given(folder, words):
    parse = import_module(f"{folder}.flags").parse
    assert parse(launch.given(folder, words.split())) == parse(words.split())


def test_what_continues_a_network_does_not_grow():
    again = launch.given("grafting_imagenet", ["--resume", "x.tar", "--s", "x"])
    for _ in range(3):
        again = launch.given("grafting_imagenet", [*again, "--resume"], s=Path("/y"))
    assert again == ["--s", "/y", "--resume", "x.tar", "--resume", "auto"]


# Starting


def test_networks_start_as_nohup_would_start_them(project):
    status, output, errors = project(*GLYPHS, "--s", "it's a run", "--num", "2")
    assert (status, errors) == (0, "")
    assert output.splitlines()[:2] == [f"network {i}: it's a run/{i}.log" for i in (1, 2)]
    for i in (1, 2):
        seen = project.seen("it's a run", i)
        assert seen["nohup"] == [True, True, True], "deaf to SIGHUP, a session of its own, an empty standard input"
        assert seen["cwd"] == str(project.cwd)
        assert project.flags("it's a run", i)["i"] == i


@pytest.mark.parametrize(
    ("visible", "found", "expected"),
    [
        (None, 3, ["0", "1", "2", "0", "1"]),
        ("5,GPU-ab, 7", 3, ["5", "GPU-ab", "7", "5", "GPU-ab"]),
        ("4,99", 1, ["4"] * 5),  # CUDA itself stops at the first that it does not know
        (None, 0, [None] * 5),
    ],
)
def test_networks_are_spread_over_the_gpus_that_torch_can_use(project, monkeypatch, visible, found, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found or 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES") if visible is None else monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", visible
    )
    assert project("--data", "glyphs", "--num", "5", "--s", "x")[0] == 0
    seen = [project.seen("x", i) for i in range(1, 6)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in seen] == expected
    assert all((one["OMP_NUM_THREADS"] is None) == (found > 0) for one in seen)


def test_a_network_on_several_gpus_has_the_next_ones():
    names = ["a", "b", "c", "d"]
    assert [launch.gpus_of(k, 2, names)["CUDA_VISIBLE_DEVICES"] for k in (1, 2, 3)] == ["a,b", "c,d", "a,b"]


def test_networks_on_the_cpu_share_the_cores(project, monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 8)
    project(*GLYPHS, "--num", "1", "--s", "one", "--compile")
    project(*GLYPHS, "--num", "3", "--s", "three", "--compile")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    project(*GLYPHS, "--num", "3", "--s", "mine")
    seen = [project.seen(name, 1) for name in ("one", "three", "mine")]
    assert [one["OMP_NUM_THREADS"] for one in seen] == ["8", "2", "7"]
    assert [one["TORCHINDUCTOR_COMPILE_THREADS"] for one in seen] == ["8", "2", None]


def test_networks_share_the_processes_that_decode_images(project, monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 8)
    flags = ("--data", project.cwd, "--device", "cpu")
    project(*flags, "--s", "by default", folder="grafting_imagenet")
    project(*flags, "--s", "mine", "-j", "7", folder="grafting_imagenet")
    workers = [
        project.flags(f"checkpoint/{name}", 1, "grafting_imagenet")["workers"] for name in ("by default", "mine")
    ]
    assert workers == [4, 7]


def test_the_printed_commands_can_be_pasted(project):
    _, output, _ = project(*GLYPHS, "-v", "--s", "it's $HOME", "--num", "1", "--model", "package.module:fünf")
    line, seen = output.splitlines()[0], project.seen("it's $HOME", 1)
    until(lambda: project.status("it's $HOME", 1)["state"] == "done")
    (project.cwd / "it's $HOME" / "seen1.0").unlink()
    subprocess.run(["sh", "-c", f"{line} wait"], cwd=project.cwd, check=True)
    again = project.seen("it's $HOME", 1)
    assert (again.pop("nohup"), again) == ([True, False, True], {k: v for k, v in seen.items() if k != "nohup"})


def test_a_log_is_appended_to(project):
    (project.cwd / "x").mkdir()
    (project.cwd / "x/1.log").write_text("precious\n")
    project(*GLYPHS, "--num", "1", "--s", "x")
    assert (project.cwd / "x/1.log").read_text().startswith("precious\nNetwork:1")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_network_that_fails_at_once_is_said_with_its_sentence(project, monkeypatch, ranks):
    monkeypatch.setenv("FAILS", "the disk is full: make room")
    flags = ("--data", project.cwd, "--device", "cpu", "--num", "1", "--gpus-per-network", ranks)
    status, output, _ = project(*flags, folder="grafting_imagenet")
    assert (status, "\nnetwork 1 has failed: the disk is full: make room\n" in output) == (1, True), output


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


def test_a_network_that_is_being_started_is_not_started_again(project, monkeypatch):
    project.trains_on()
    monkeypatch.setenv("HOLD", str(project.cwd / "go"))
    monkeypatch.setattr(view, "START_SECONDS", 0.0)
    assert project(*GLYPHS, "--num", "1", "--s", "x")[0] == 0
    assert [status.state for status in view.look(project.cwd / "x")] == ["starting"]
    status, _, errors = project(*GLYPHS, "--num", "1", "--s", "x")
    assert (status, "network 1 runs in x" in errors) == (1, True)


# Looking


def test_a_table_fits_80_columns_whatever_the_files_hold(project, living):
    run = project.cwd / "x"
    living(
        run, 1, state="\x1b[2J" + "long " * 100, epoch="\x07", accuracy=None, best=[1], time="x", detail="\r\n|" * 99
    )
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
    living(project.cwd / "checkpoint/a/b", 1, best=93.5)
    write_status(project.cwd / "checkpoint/a/b", 2, best=94.25)
    write_status(project.root / "grafting_imagenet/checkpoint/pictures", 1, state="done", epoch=199)
    (project.root / "grafting_cifar/checkpoint/empty").mkdir(parents=True)
    lines = project("status")[1].splitlines()[1:]
    assert [line.split()[-1] for line in lines[:1]] == ["checkpoint/a/b"]
    assert lines[1].endswith("a project/grafting_imagenet/checkpoint/pictures") and len(lines) == 2
    assert [line.split()[0] for line in lines] == ["1/2", "0/1"] and "94.250" in lines[0]
    for path in ("checkpoint/a/b", "a/b", "pictures", "grafting_imagenet/checkpoint/pictures"):
        assert project("status", path)[0] == 0
    monkeypatch.chdir(project.root / "grafting_imagenet/checkpoint")
    status, output, _ = project("status", "pictures", project.cwd / "checkpoint/a/b")
    assert (status, output.splitlines()[0]) == (0, "pictures:")
    assert project("status", "a/b")[0] == 1, "it is neither here nor in the scripts' folders"


def test_no_run_at_all_is_no_failure(project):
    assert project("status")[:2] == (0, "there is no run below checkpoint/\n")
    assert project("stop")[:2] == (0, "no run below checkpoint/ is alive\n")


def test_a_reader_who_has_seen_enough_ends_it_quietly(tmp_path):
    write_status(tmp_path / "x", 1, state="failed", detail="reason " * 50)
    command = f"{shlex.quote(str(ROOT / 'grafting_cifar/grafting.sh'))} status x"
    environment = {**os.environ, "PYTHON": sys.executable}
    ended = subprocess.run(["sh", "-c", f"{command} | true"], cwd=tmp_path, env=environment, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")


# Stopping


def test_stop_ends_those_that_hold_the_locks_and_no_others(project, living):
    first, second = (living(project.cwd / name, 1) for name in ("x", "y"))
    bystander = living(project.cwd / "z", 1)
    write_status(project.cwd / "x", 2, pid=bystander.pid, state="done")  # its process id is another's now
    status, output, _ = project("stop", "x", "y")
    assert (status, first.wait(), second.wait(), bystander.poll()) == (0, -signal.SIGTERM, -signal.SIGTERM, None)
    assert output.splitlines() == [
        f"network 1 (process {first.pid}) is asked to stop", "no network of x is alive",
        f"network 1 (process {second.pid}) is asked to stop", "no network of y is alive",
    ]  # fmt: skip
    assert project("stop", "x")[0] == 0, "a second time there is nothing to do, which is fine"


def test_stop_without_a_directory_ends_the_only_run_that_is_alive(project, living):
    one = living(project.cwd / "checkpoint/one", 1)
    write_status(project.cwd / "checkpoint/old", 1)
    other = living(project.cwd / "checkpoint/other", 1)
    status, _, errors = project("stop")
    assert (status, "checkpoint/one, checkpoint/other" in errors, one.poll()) == (2, True, None)
    other.kill()
    other.wait()
    assert project("stop")[0] == 0
    assert one.wait() == -signal.SIGTERM


def test_stop_says_what_it_could_not_end(project, living, monkeypatch):
    monkeypatch.setattr(membership, "BEAT_SECONDS", 0.2)
    run, kill = project.cwd / "x", os.kill
    deaf, theirs = living(run, 1, deaf=True), living(run, 2)
    beats = threading.Event()

    def beat():
        for k in range(10**6):
            write_status(run, 3, host="elsewhere", pid=7, beat=k)
            if beats.wait(0.05):
                return

    def kill_ours(pid, number):
        if pid == theirs.pid:
            raise PermissionError(1, "Operation not permitted")
        kill(pid, number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with monkeypatch.context() as context:
            context.setattr(os, "kill", kill_ours)
            status = launch.end(run, 0.3)
    finally:
        beats.set()
        thread.join()
    output = project.capsys.readouterr().out
    assert status == 1
    assert f"network 1 (process {deaf.pid}) is still there after 0.3 s" in output
    assert f"network 2 (process {theirs.pid}) is another user's, who alone can stop it" in output
    assert "network 3 (process 7) is on elsewhere: stop it there" in output


def test_stop_within_moments_of_the_start_waits_for_what_is_starting(project, monkeypatch):
    project.trains_on()
    go = project.cwd / "go"
    monkeypatch.setenv("HOLD", str(go))
    monkeypatch.setattr(view, "START_SECONDS", 0.0)
    project(*GLYPHS, "--s", "x", "--num", "2")
    (looks, look) = ([], view.look)

    def look_and_go(directory, of=None):
        looks.append(directory)
        if len(looks) == 3:
            go.touch()  # now they take their places
        return look(directory, of)

    monkeypatch.setattr(view, "look", look_and_go)
    status, output, _ = project("stop", "x")
    assert (status, output.count("is asked to stop"), "no network of x is alive" in output) == (0, 2, True)
    assert [project.status("x", i)["state"] for i in (1, 2)] == ["stopped"] * 2
    assert not view.started_here(project.cwd / "x")


@pytest.mark.parametrize("by_hand", [False, True])
def test_stop_of_a_network_on_several_processes_waits_for_them_all(project, by_hand):
    project.trains_on()
    project.patch.setattr(launch, "cores", lambda: 2)
    flags = ("--data", str(project.cwd), "--device", "cpu", "--save_dir", "x", "--networks", "1")
    if by_hand:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        line = shlex.join([*torchrun, str(project.root / "grafting_imagenet/grafting.py"), *flags])
        (project.cwd / "checkpoint/x").mkdir(parents=True)
        subprocess.run(["sh", "-c", f"{line} >by_hand 2>&1 </dev/null &"], check=True)
    else:
        status, output, errors = project(*flags, "--gpus-per-network", "2", folder="grafting_imagenet")
        assert status == 0, output + errors
    assert [project.seen("checkpoint/x", 1, rank)["OMP_NUM_THREADS"] for rank in (0, 1)] == ["1", "1"]
    until(lambda: project.status("checkpoint/x", 1)["state"] == "training")
    status, output, _ = project("stop", "x")
    assert (status, output.splitlines()[-1]) == (0, "no network of checkpoint/x is alive")
    for path in project.pids.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


# Continuing


def test_resume_goes_on_with_the_flags_that_each_network_had(project, living, monkeypatch):
    (project.cwd / "images").mkdir()
    flags = ("--data", "images", "--device", "cpu", "--model", "resnet20", "--lr", "0.05", "--num", "4", "--s", "x")
    assert project(*flags, "--epochs", "2")[0] == 0
    run = project.cwd / "x"
    until(lambda: all(project.status("x", i)["state"] == "done" for i in range(1, 5)))
    for i, state in ((2, "training"), (3, "failed")):  # network 2 as if it had been killed
        write_status(run, **project.status("x", i) | {"state": state})
    living(run, 4)
    for path in run.glob("seen*"):
        path.unlink()
    monkeypatch.chdir("/")
    assert project("resume", run)[0] == 0
    for i in (2, 3):
        expected = {"data": Path("images"), "lr": 0.05, "num": 4, "s": run, "resume": True, "epochs": 2, "i": i}
        assert expected.items() <= project.flags("x", i).items()
        assert project.seen("x", i)["cwd"] == str(project.cwd)
    assert sorted(path.name for path in run.glob("seen*")) == ["seen2.0", "seen3.0"], "1 is done, 4 is alive"


def test_resume_with_more_epochs_continues_what_is_done(project, living):
    for name in ("x", "y"):
        project(*GLYPHS, "--epochs", "2", "--s", name, "--num", "1")
        until(lambda name=name: project.status(name, 1)["state"] == "done")
    assert "nothing to continue in x" in project("resume", "x")[1]
    status, _, errors = project("resume", "x", "--epochs", "1")
    assert (status, "got 1, expected at least 2" in errors) == (2, True)
    assert project("resume", "x", "y", "--epochs", "3")[0] == 0
    until(lambda: [project.status(name, 1)["epochs"] for name in ("x", "y")] == [3, 3])
    living(project.cwd / "x", 1, state="training", epochs=3)
    status, _, errors = project("resume", "x", "--epochs", "4")
    assert (status, "--epochs can be raised once all networks have ended" in errors) == (1, True)


def test_start_with_resume_continues_what_is_neither_alive_nor_done(project):
    flags = (*GLYPHS, "--s", "x", "--num", "1", "--resume")
    assert project(*flags, "--epochs", "2")[0] == 0
    until(lambda: project.status("x", 1)["state"] == "done")
    assert "nothing to start" in project(*flags, "--epochs", "2")[1]
    assert project(*flags, "--epochs", "3")[0] == 0
    until(lambda: project.status("x", 1)["epochs"] == 3)


@pytest.mark.parametrize("command", [[], ["python", "/tmp/evil.py"], ["python", "elsewhere/grafting.py", "--num", "1"]])
def test_resume_starts_nothing_but_the_projects_own_scripts(project, command):
    write_status(project.cwd / "x", 1, command=command, cwd=str(project.cwd))
    status, _, errors = project("resume", "x")
    assert (status, "network 1 has left no command in x" in errors) == (1, True)
    assert not list(project.pids.iterdir())


def test_resume_knows_how_many_processes_a_network_had(project, monkeypatch):
    python = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["grafting.py", "--data", str(project.cwd), "--num", "1", "--device", "cpu"]
    place = {"cwd": str(project.root / "grafting_imagenet"), "state": "stopped"}
    write_status(project.cwd / "x", 1, command=[*python, *words], **place)
    commands = []
    monkeypatch.setattr(launch, "command_of", lambda *arguments: commands.append(arguments) or ["true"])
    project("resume", "x")
    assert [(folder, ranks) for folder, _, ranks in commands] == [("grafting_imagenet", 2)]
