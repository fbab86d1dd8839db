"""grafting.slurm, with stand-ins for Slurm's commands and for the script that trains."""

import os
import re
import shutil
import signal
import subprocess

import launching
import pytest
from processes import ROOT, until


@pytest.fixture
def project(tmp_path, monkeypatch):
    with launching.project(tmp_path, monkeypatch) as made:
        shutil.copy(ROOT / "grafting_imagenet/grafting.slurm", made.root / "grafting_imagenet")
        commands = tmp_path / "commands"
        commands.mkdir()
        (commands / "scontrol").write_text(
            f'#!/bin/sh\necho "$@" >>"{tmp_path}/asked"\n[ $1 = requeue ] || echo n1 n2\n'
        )
        (commands / "srun").write_text('#!/bin/sh\necho "srun $@"\n')
        for command in commands.iterdir():
            command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
        made.asked = tmp_path / "asked"
        yield made


def task(project, *flags, i=1, array="1-2", count=2, start=subprocess.run, **variables):
    """A task as slurmd would run it: a copy of the file, somewhere else, that knows where it was submitted."""
    copy = project.cwd / "slurm_script"
    shutil.copy(project.root / "grafting_imagenet/grafting.slurm", copy)
    first, last = array.split("-")
    slurm = {
        "JOB_ID": 70 + i,
        "ARRAY_TASK_ID": i,
        "ARRAY_TASK_MIN": first,
        "ARRAY_TASK_MAX": last,
        "ARRAY_TASK_COUNT": count,
    }
    slurm |= {"CPUS_ON_NODE": 6, "NNODES": 1, "SUBMIT_DIR": project.root / "grafting_imagenet"} | variables
    environment = {**os.environ, **{f"SLURM_{name}": str(value) for name, value in slurm.items()}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ["sh", copy, "--data", project.cwd, "--device", "cpu", *flags]
    return start(command, cwd=project.root / "grafting_imagenet", env=environment, **pipes)


def folder(project):
    return project.root / "grafting_imagenet/checkpoint/x"


def test_each_task_trains_one_network_and_continues_what_it_has_begun(project):
    for i in (1, 2):
        assert task(project, "--s", "x", i=i).returncode == 0
        flags = project.flags(folder(project), i, "grafting_imagenet")
        assert (flags["i"], flags["num"], flags["resume"], flags["workers"]) == (i, 2, True, 6)
        assert project.seen(folder(project), i)["OMP_NUM_THREADS"] == "6"
        assert "Network" in (folder(project) / f"{i}.out").read_text()
    assert not project.asked.exists()


@pytest.mark.parametrize(
    ("array", "count", "flags", "found"),
    [
        ("0-1", 2, (), "0-1, 2 tasks"),
        ("2-2", 1, (), "2-2, 1 tasks"),  # one task of an array, submitted once more
        ("1-3", 2, ("--num", "3"), "1-3, 2 tasks"),  # 1,3
        ("1-4", 4, (), "1-4, 4 tasks"),
        ("1-2", 2, ("--num", "1"), "1-2, 2 tasks"),
    ],
)
def test_an_array_that_is_not_1_to_the_number_of_networks_is_refused(project, array, count, flags, found):
    ended = task(project, *flags, array=array, count=count)
    num = flags[1] if flags else "2"
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"the array of this job is {found}, and --num is {num}: submit it with --array=1-{num}" in ended.stderr
    assert not (project.root / "grafting_imagenet/checkpoint").exists()


def test_submitted_from_anywhere_else_it_says_so(project):
    ended = task(project, SUBMIT_DIR=project.cwd)
    assert (ended.returncode, "submit grafting.slurm from its own folder" in ended.stderr) == (2, True)


def test_at_the_time_limit_the_network_is_stopped_and_the_task_queued_again(project):
    project.trains_on()
    with task(project, "--s", "x", start=subprocess.Popen) as process:
        until(lambda: (folder(project) / "network1.json").exists(), what=process.poll)
        process.send_signal(signal.SIGUSR1)
        process.communicate()
    assert project.asked.read_text() == "requeue 71\n"
    assert project.status(folder(project), 1)["state"] == "stopped"


def test_a_job_that_is_cancelled_waits_for_its_network_and_is_not_queued_again(project):
    project.trains_on()
    with task(project, "--s", "x", start=subprocess.Popen) as process:
        until(lambda: (folder(project) / "network1.json").exists(), what=process.poll)
        for pid in (process.pid, project.status(folder(project), 1)["pid"]):  # Slurm signals all processes of a task
            os.kill(pid, signal.SIGTERM)
        process.communicate()
    assert process.returncode != 0 and not project.asked.exists()
    assert project.status(folder(project), 1)["state"] == "stopped"


def test_on_several_nodes_torchruns_meet_on_the_first(project):
    assert task(project, "--s", "x", "-b", "16", NNODES=2, GPUS_ON_NODE=8).returncode == 0
    said = (folder(project) / "1.out").read_text()
    torchrun = "--nnodes 2 --rdzv_backend c10d --rdzv_id 71 --rdzv_endpoint n1:20071 --nproc_per_node 8 --"
    assert re.match(rf"srun \S+ -m torch.distributed.run {torchrun} .*/grafting.py .*--resume auto", said), said
