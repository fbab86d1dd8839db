"""grafting.slurm, with stand-ins for Slurm's commands and for the script that trains."""

import os
import re
import shutil
import signal
import subprocess

import launching
import pytest
from launching import flags_of
from processes import ROOT, until


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    yield from launching.project(tmp_path, monkeypatch, capsys)


@pytest.fixture
def cluster(project, tmp_path, monkeypatch):
    shutil.copy(ROOT / "grafting_imagenet/grafting.slurm", project.root / "grafting_imagenet")
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/asked"\n[ $1 = requeue ] || echo n1 n2\n')
    (commands / "srun").write_text('#!/bin/sh\necho "srun $@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setattr(signal, "signal", lambda number, handler: signal.getsignal(number))  # of the tests' process
    project.asked = tmp_path / "asked"
    return project


def variables(project, i, array, count, **more):
    first, last = array.split("-")
    slurm = {"JOB_ID": 70 + i, "ARRAY_TASK_ID": i, "ARRAY_TASK_MIN": first, "ARRAY_TASK_MAX": last}
    slurm |= {
        "ARRAY_TASK_COUNT": count,
        "CPUS_ON_NODE": 6,
        "NNODES": 1,
        "SUBMIT_DIR": project.root / "grafting_imagenet",
    }
    return {f"SLURM_{name}": str(value) for name, value in (slurm | more).items()}


def task(project, *flags, i=1, array="1-2", count=2, **more):
    """A task, in this process."""
    for name, value in variables(project, i, array, count, **more).items():
        project.patch.setenv(name, value)
    return project("slurm", "--data", project.cwd, "--device", "cpu", *flags, folder="grafting_imagenet")


def start(project, **more):
    """A task as slurmd would run it: a copy of the file, somewhere else, that knows where it was submitted."""
    copy = shutil.copy(project.root / "grafting_imagenet/grafting.slurm", project.cwd / "slurm_script")
    command = ["sh", copy, "--data", project.cwd, "--device", "cpu", "--s", "x"]
    environment = os.environ | variables(project, 1, "1-2", 2, **more)
    return subprocess.Popen(command, cwd=project.cwd, env=environment, stderr=subprocess.PIPE, text=True)


def test_each_task_trains_one_network_and_continues_what_it_has_begun(cluster):
    for i in (1, 2):
        assert task(cluster, "--s", "x", i=i)[0] == 0
        seen = cluster.seen("checkpoint/x", i)
        flags = flags_of(seen["argv"], "grafting_imagenet")
        assert (flags["i"], flags["num"], flags["resume"], flags["workers"]) == (i, 2, True, 6)
        assert seen["OMP_NUM_THREADS"] == "6"
        assert "Network" in (cluster.cwd / f"checkpoint/x/{i}.out").read_text()
    assert not cluster.asked.exists()


@pytest.mark.parametrize(
    ("array", "count", "flags", "found"),
    [
        ("0-1", 2, (), "0-1, 2 tasks"),
        ("2-2", 1, (), "2-2, 1 tasks"),  # one task of an array, submitted once more
        ("1-3", 2, ("--num", "3"), "1-3, 2 tasks"),  # 1,3
        ("1-2", 2, ("--num", "1"), "1-2, 2 tasks"),
    ],
)
def test_an_array_that_is_not_1_to_the_number_of_networks_is_refused(cluster, array, count, flags, found):
    status, _, errors = task(cluster, *flags, array=array, count=count)
    num = flags[1] if flags else "2"
    assert (status, errors.count("\n")) == (2, 1)
    assert f"the array of this job is {found}, and --num is {num}: submit it with --array=1-{num}" in errors
    assert not list(cluster.cwd.iterdir())


def test_submitted_from_anywhere_else_it_says_so(cluster):
    with start(cluster, SUBMIT_DIR=cluster.cwd) as process:
        _, errors = process.communicate()
    assert (process.returncode, "submit grafting.slurm from its own folder" in errors) == (2, True)


@pytest.mark.parametrize("ends", ["at its time limit", pytest.param("cancelled", marks=pytest.mark.slow)])
def test_a_task_waits_for_its_network_and_is_queued_again_at_its_time_limit(cluster, ends):
    cluster.trains_on()
    run = cluster.cwd / "checkpoint/x"
    with start(cluster) as process:
        until(lambda: (run / "network1.json").exists(), what=process.poll)
        if ends == "at its time limit":
            process.send_signal(signal.SIGUSR1)
        else:
            for pid in (process.pid, cluster.status(run, 1)["pid"]):  # Slurm signals all processes of a task
                os.kill(pid, signal.SIGTERM)
        process.communicate()
    assert process.returncode != 0 and cluster.status(run, 1)["state"] == "stopped"
    asked = cluster.asked.read_text() if cluster.asked.exists() else ""
    assert asked == ("requeue 71\n" if ends == "at its time limit" else "")


def test_on_several_nodes_torchruns_meet_on_the_first(cluster):
    assert task(cluster, "--s", "x", "-b", "16", NNODES=2, GPUS_ON_NODE=8)[0] == 0
    said = (cluster.cwd / "checkpoint/x/1.out").read_text()
    torchrun = "--nnodes 2 --rdzv_backend c10d --rdzv_id 71 --rdzv_endpoint n1:20071 --nproc_per_node 8 --"
    assert re.match(rf"srun \S+ -m torch.distributed.run {torchrun} .*/grafting.py .*--resume", said), said
