"""grafting.slurm, with stand-ins for Slurm's commands and for the script that trains."""

import os
import shutil
import signal
import subprocess

import pytest
from processes import ROOT, until


@pytest.fixture
def cluster(project, tmp_path, monkeypatch):
    shutil.copy(ROOT / "grafting_imagenet/grafting.slurm", project.cwd / "slurm_script")
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >>"{tmp_path}/asked"\n[ $1 = requeue ] || echo "n1\nn2"\n'
    )
    (commands / "scancel").write_text(f'#!/bin/sh\necho scancel "$@" >>"{tmp_path}/asked"\n')
    # With LASTS, until the step is signalled, which is what ends it orderly.
    lasts = f'[ -z "$LASTS" ] || {{ until grep -q scancel "{tmp_path}/asked"; do sleep 0.02; done; exit 1; }}'
    (commands / "srun").write_text(f'#!/bin/sh\necho "$SRUN_CPUS_PER_TASK srun $@"\n{lasts}\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    project.asked = tmp_path / "asked"
    return project


def start(project, i=1, flags=("--num", "2"), **more):
    """A task as slurmd would run it: a copy of the file, somewhere else, that knows where it was submitted."""
    array = {"ARRAY_JOB_ID": 71, "ARRAY_TASK_ID": i, "ARRAY_TASK_MIN": 1}
    slurm = {"JOB_ID": 70 + i, "SUBMIT_DIR": project.root, **array, **more}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    command = ["sh", "slurm_script", "--data", project.cwd, "--device", "cpu", "--s", "x", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project.cwd, env=environment, **pipes)


def test_each_task_trains_one_network_and_continues_what_it_has_begun(cluster):
    for i, folder in (1, cluster.root), (2, cluster.root / "grafting_imagenet"):
        with start(cluster, i, SUBMIT_DIR=folder) as process:
            output, errors = process.communicate()
        assert (process.returncode, errors, output[:10]) == (0, "", f"Network:{i} ")
        said = cluster.status("checkpoint/x", i)
        assert (said["network"], said["num"], said["command"][-1]) == (i, 2, "--resume")
    assert not cluster.asked.exists()


@pytest.mark.parametrize("ends", ["at its time limit", "cancelled"])
def test_a_task_waits_for_its_network_and_is_queued_again_at_its_time_limit(cluster, ends):
    cluster.trains_on()
    with start(cluster) as process:
        until(lambda: cluster.states("checkpoint/x") == ["training"] or process.poll() is not None)
        if ends == "at its time limit":
            process.send_signal(signal.SIGUSR1)
        else:
            for pid in (process.pid, cluster.status("checkpoint/x", 1)["pid"]):  # Slurm signals all processes of a task
                os.kill(pid, signal.SIGTERM)
        process.communicate()
    assert process.returncode == 143 and cluster.states("checkpoint/x") == ["stopped"]
    asked = cluster.asked.read_text() if cluster.asked.exists() else ""
    assert asked == ("requeue 71_1\n" if ends == "at its time limit" else "")


def test_on_several_nodes_torchruns_meet_on_the_first(cluster):
    with start(cluster, NNODES=2, GPUS_ON_NODE=8, CPUS_PER_TASK=64) as process:
        output, _ = process.communicate()
    assert process.returncode == 0
    assert output.startswith("64 srun ") and output.rstrip().endswith(" --i 1 --resume")
    meeting = "--rdzv_id 71 --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint n1:20071 -- "
    assert f"-m torch.distributed.run {meeting}" in output and "grafting.py --data" in output


def test_on_several_gpus_the_step_of_this_task_alone_is_signalled_at_the_time_limit(cluster, monkeypatch):
    monkeypatch.setenv("LASTS", "yes")
    with start(cluster, GPUS_ON_NODE=2) as process:
        assert " srun " in process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        process.communicate()
    assert process.returncode == 1
    assert cluster.asked.read_text().splitlines()[1:] == ["scancel --signal=TERM 71_1", "requeue 71_1"]


@pytest.mark.parametrize(("i", "flags", "words"), [(1, (), "Give --num N, and --array=1-N"), (3, ("--num=2",), "--i")])
def test_the_number_of_networks_is_a_setting_and_not_the_arrays(cluster, i, flags, words):
    with start(cluster, i, flags) as process:
        _, errors = process.communicate()
    assert process.returncode == 2 and words in errors
    assert not (cluster.root / "checkpoint").exists()
