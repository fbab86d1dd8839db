"""Several processes that train one network under torchrun: as good as one, and ending together when one ends."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from processes import ROOT, assert_same_runs, environment, until


def weights(run):
    return torch.load(run.directory / "final1.tar", weights_only=True)["state_dict"]


def test_any_number_of_ranks_trains_the_network_that_one_process_trains(make_image_run):
    # A network without batch norm and dropout. What an epoch holds follows from its seed alone, crops and flips
    # included, so one process sees in each step the images that two ranks see together.
    one, two, first_two = (make_image_run(1, 2, "-a", "ranks:plain") for _ in range(3))
    # Of the ranks, rank 0 alone writes checkpoints.
    assert first_two.start(1, ranks=2, plan=[["at", "after rename pth0_0.tar", 1, "kill"]]).wait() != 0
    for process in one.start(1), two.start(1, ranks=2), first_two.start(1, "--resume", "auto"):
        assert process.wait() == 0, process.output()
    assert "2 processes" in two.log(1) and "continuing after epoch 0" in first_two.log(1)
    for run in two, first_two:
        for key, entry in weights(one).items():
            torch.testing.assert_close(weights(run)[key], entry, rtol=1e-4, atol=1e-6)
        rows = [each.outcome(1)["tables"]["metrics"] for each in (one, run)]
        for left, right in zip(*rows, strict=True):
            left, right = ({key: float(value or 0) for key, value in row.items()} for row in (left, right))
            assert left == pytest.approx(right, rel=1e-4)
    # And every image is evaluated once.
    flags = ["-e", "--resume", str(one.directory / "final1.tar")]
    for ranks in (1, 2):
        assert one.start(1, *flags, ranks=ranks).wait() == 0
    one, two = re.findall(r"Acc@1 (\S+) +Acc@5 (\S+) +Loss (\S+) +Images 20", one.log(1))
    assert [float(value) for value in one] == pytest.approx([float(value) for value in two], abs=2e-4)


def test_a_ring_of_networks_of_two_ranks_of_which_one_is_killed_and_resumed(make_image_run):
    undisturbed = make_image_run(2, 4, ranks=2).finish()
    for network in (1, 2):
        assert undisturbed.status(network)["state"] == "done"
        assert undisturbed.status(network)["command"][1:4] == ["-m", "torch.distributed.run", "--standalone"]
        assert len(undisturbed.outcome(network)["tables"]["coefficients"]) == 3 * 2  # grafts, layers
        assert undisturbed.log(network).count(f"Network:{network}    epoch:") == 4  # rank 0 alone writes
    run = make_image_run(2, 4, ranks=2)
    first = run.start(1)
    run.reaches(1, "waiting", 0)
    os.kill(run.pids(1, first)[1], signal.SIGKILL)
    second = run.start(2)
    assert first.wait() == 1
    until(lambda: run.status(1)["state"] in ("failed", "stopped"), what=lambda: str(run.status(1)))
    assert run.start(1, "--resume", "auto").wait() == 0, run.log(1)
    assert second.wait() == 0
    assert_same_runs(run, undisturbed)


@pytest.mark.parametrize("state", ["training", "waiting"])
def test_sigterm_to_all_of_its_processes_stops_the_network(make_image_run, state):
    run = make_image_run(2 if state == "waiting" else 1, 300, ranks=2)
    process = run.start(1)
    run.reaches(1, state)
    for pid in [process.pid, *run.pids(1, process)]:
        os.kill(pid, signal.SIGTERM)
    assert process.wait() != 0
    assert (run.status(1)["state"], run.status(1)["detail"]) == ("stopped", "by SIGTERM")
    assert "network 1 stopped by SIGTERM; --resume continues it" in process.sentence()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_torchrun_as_anyone_types_it(class_folders, tmp_path):
    line = (
        "-m torch.distributed.run --standalone --nproc_per_node=2 {script} --data {data} -a ranks:tiny -b 12 -j 1 "
        "--image_size 32 --epochs 2 --device cpu --save_dir x --networks 2 --i {i}"
    )
    words = {"script": ROOT / "grafting_imagenet" / "grafting.py", "data": class_folders}
    commands = [[sys.executable, *line.format(i=i, **words).split()] for i in (1, 2)]
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment()) for command in commands]
    assert [process.wait(1000) for process in processes] == [0, 0]
    for i in (1, 2):
        assert (tmp_path / "checkpoint" / "x" / f"final{i}.tar").exists()
