"""Several processes that train one network under torchrun: as good as one, and ending together whatever befalls one."""

import os
import re
import shutil
import signal
import time

import pytest
import torch
from imagenet import CLASSES
from processes import assert_same, assert_same_runs, until


def weights(run, kind="final", network=1):
    return torch.load(run.directory / f"{kind}{network}.tar", weights_only=True)["state_dict"]


def test_two_ranks_train_the_network_that_one_process_trains(make_image_run):
    # A network without batch norm and dropout. What an epoch holds follows from its seed alone, crops and flips
    # included, so one process sees in each step the images that two ranks see together.
    one, two = (make_image_run(1, 2, "-a", "tiny_plain", ranks=ranks).finish() for ranks in (1, 2))
    for key, entry in weights(one).items():
        torch.testing.assert_close(weights(two)[key], entry, rtol=1e-4, atol=1e-6)
    rows = [run.outcome(1)["tables"]["metrics"] for run in (one, two)]
    for left, right in zip(*rows, strict=True):
        assert {key: float(value or 0) for key, value in left.items()} == pytest.approx(
            {key: float(value or 0) for key, value in right.items()}, rel=1e-4
        )
    assert "2 processes" in two.log(1)


def test_a_ring_of_networks_of_two_ranks(make_image_run):
    run = make_image_run(2, 3, ranks=2).finish()
    for network in (1, 2):
        assert run.status(network)["state"] == "done"
        assert len(run.outcome(network)["tables"]["coefficients"]) == 2 * 2  # grafts, layers
        assert run.log(network).count(f"Network:{network}    epoch:") == 3  # rank 0 alone writes
    assert not torch.equal(weights(run, network=1)["0.weight"], weights(run, network=2)["0.weight"])


def test_a_killed_rank_ends_the_network_and_resumed_it_ends_as_if_undisturbed(make_image_run):
    undisturbed = make_image_run(2, 6, ranks=2).finish()
    run = make_image_run(2, 6, ranks=2)
    first, second = run.start(1), run.start(2)
    run.reaches(1, "training", 2)
    victim = run.pids(1, first)[1]
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert first.wait() == 1
    assert time.monotonic() - began < 60
    assert (run.status(1)["state"], run.status(1)["detail"]) == ("failed", f"rank 1 (process {victim}) died (killed?)")
    assert f"rank 1 (process {victim}) died" in first.sentence()
    assert run.start(1, "--resume", "auto").wait() == 0, run.log(1)
    assert second.wait() == 0
    assert_same_runs(run, undisturbed)


def test_a_killed_rank_0_is_seen_by_all(make_image_run):
    run = make_image_run(1, 300, ranks=2)
    process = run.start(1)
    run.reaches(1, "training", 1)
    lead, other = run.pids(1, process)
    os.kill(lead, signal.SIGKILL)
    assert process.wait() == 1
    until(lambda: not os.path.exists(f"/proc/{other}"))


def test_a_rank_that_dies_while_rank_0_waits_for_its_neighbour(make_image_run):
    run = make_image_run(2, 2, ranks=2)
    process = run.start(1)
    run.reaches(1, "waiting")
    victim = run.pids(1, process)[1]
    os.kill(victim, signal.SIGKILL)
    assert process.wait() == 1
    assert (run.status(1)["state"], run.status(1)["detail"]) == ("failed", f"rank 1 (process {victim}) died (killed?)")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_network_within_a_minute(make_image_run):
    # As seen from another machine, or under NCCL, a rank that died is one that is silent.
    run = make_image_run(1, 300, ranks=2)
    process = run.start(1)
    run.reaches(1, "training", 1)
    frozen = run.pids(1, process)[1]
    began = time.monotonic()
    os.kill(frozen, signal.SIGSTOP)
    until(lambda: run.status(1)["state"] == "failed")
    assert time.monotonic() - began < 60
    assert run.status(1)["detail"] == "rank 1 has given no sign of life for 40 s"
    assert "rank 1 has given no sign of life" in process.sentence()
    assert process.wait() == 1  # torchrun kills the frozen one


def test_an_image_that_one_rank_cannot_read_ends_both(make_image_run, class_folders, tmp_path):
    data = shutil.copytree(class_folders, tmp_path / "images")
    bad = min((data / "val" / CLASSES[0]).iterdir())
    second = sorted((data / "val" / CLASSES[0]).iterdir())[1]  # the first of rank 1
    second.write_bytes(bad.read_bytes()[:20])
    run = make_image_run(1, 2, ranks=2, data=data)
    process = run.start(1)
    assert process.wait() == 1
    assert run.status(1)["state"] == "failed"
    assert run.status(1)["detail"].startswith(f"rank 1: {second} cannot be read")
    assert process.sentence().count(f"{second} cannot be read") == 2  # by rank 1, who knows it, and rank 0, for the log


@pytest.mark.parametrize("to", ["torchrun", "rank 0", "rank 1", "all"])
def test_sigterm_stops_the_network(make_image_run, to):
    run = make_image_run(1, 300, ranks=2)
    process = run.start(1)
    run.reaches(1, "training", 1)
    pids = dict(zip(("rank 0", "rank 1"), run.pids(1, process), strict=True), torchrun=process.pid)
    for pid in pids.values() if to == "all" else [pids[to]]:
        os.kill(pid, signal.SIGTERM)
    assert process.wait() != 0
    assert (run.status(1)["state"], run.status(1)["detail"]) == ("stopped", "by SIGTERM")
    assert re.search(r"network 1 stopped by SIGTERM at epoch \d+; --resume continues it", process.sentence())


def test_sigterm_while_rank_0_waits(make_image_run):
    run = make_image_run(2, 2, ranks=2)
    process = run.start(1)
    run.reaches(1, "waiting")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() != 0
    assert (run.status(1)["state"], run.status(1)["detail"]) == ("stopped", "by SIGTERM")


def test_a_run_continues_with_another_number_of_ranks(make_image_run):
    undisturbed = make_image_run(1, 4, "-a", "tiny_plain").finish()
    run = make_image_run(1, 4, "-a", "tiny_plain", ranks=2)
    process = run.start(1, plan=[["at", "after rename pth0_1.tar", 1, "terminate"]])
    assert process.wait() != 0
    assert run.start(1, "--resume", "auto", ranks=1).wait() == 0
    assert "continuing after epoch 1" in run.log(1)
    for key, entry in weights(undisturbed).items():
        torch.testing.assert_close(weights(run)[key], entry, rtol=1e-3, atol=1e-5)

    run = make_image_run(1, 4, "-a", "tiny_plain", ranks=2)
    process = run.start(1, ranks=1, plan=[["at", "after rename pth0_1.tar", 1, "kill"]])
    assert process.wait() == -signal.SIGKILL
    assert run.start(1, "--resume", "auto").wait() == 0
    for key, entry in weights(undisturbed).items():
        torch.testing.assert_close(weights(run)[key], entry, rtol=1e-3, atol=1e-5)


def test_two_ranks_evaluate_every_image_once(make_image_run, class_folders):
    run = make_image_run(1, 1).finish()
    flags = ["-e", "--resume", str(run.directory / "final1.tar")]
    for ranks in (1, 2):
        assert run.start(1, *flags, append=True, ranks=ranks).wait() == 0
    one, two = re.findall(r"Acc@1 (\S+) +Acc@5 (\S+) +Loss (\S+) +Images 20", run.log(1))
    assert [float(value) for value in one] == pytest.approx([float(value) for value in two], abs=2e-4)
    assert_same(float(one[0]), torch.load(run.directory / "final1.tar", weights_only=True)["accuracy"])
