"""Runs that start from a checkpoint of another one (`--resume PATH`): killed at any moment, they go on from there."""

import os
import shutil
import signal

import pytest
from imagenet import ImageRun
from processes import assert_same


@pytest.fixture(scope="session")
def files(tmp_path_factory, class_folders):
    """Checkpoints to start from, of two networks; the epoch after theirs is 1."""
    run = ImageRun(tmp_path_factory.mktemp("earlier") / "run", class_folders, 2, 1).finish()
    return [run.checkpoint(network, 0) for network in (1, 2)]


@pytest.fixture(scope="session")
def single(tmp_path_factory, class_folders, files):
    """A single network that has started from the first of them, and that nothing has disturbed."""
    return ImageRun(tmp_path_factory.mktemp("single") / "run", class_folders, 1, 3).finish("--resume", files[0])


@pytest.fixture(scope="session")
def ring(tmp_path_factory, class_folders, files):
    """The same for two, each of which has started from another file."""
    run = ImageRun(tmp_path_factory.mktemp("ring") / "run", class_folders, 2, 3)
    for process in [run.start(network, "--resume", file) for network, file in enumerate(files, 1)]:
        assert process.wait() == 0, process.output()
    return run


def assert_same_from_epoch_1(run, undisturbed):
    for network in range(1, run.networks + 1):
        outcome = run.outcome(network)
        assert [row["epoch"] for row in outcome["tables"]["metrics"]] == ["1", "2"]
        assert_same(outcome, undisturbed.outcome(network), f"network {network}")


def killed(run, network, event, *flags):
    process = run.start(network, *flags, plan=[["at", event, 1, "kill"]])
    assert process.wait() == -signal.SIGKILL, process.output()


def refused(run, network, *flags):
    """The sentence in which a start ends."""
    process = run.start(network, *flags)
    assert (process.wait(), process.sentence().count("\n")) == (1, 1), process.output()
    return process.sentence()


JOINED = r"after rename network\d\.json"


@pytest.mark.parametrize("event", [JOINED, pytest.param("after train", marks=pytest.mark.slow), "after line 1"])
def test_killed_it_goes_on_from_where_it_started(make_image_run, files, single, event):
    run = make_image_run(1, 3)
    killed(run, 1, event, "--resume", os.path.relpath(files[0]))
    assert run.start(1, "--resume").wait() == 0, run.started[-1].output()
    assert_same_from_epoch_1(run, single)


@pytest.mark.parametrize("event", [JOINED, pytest.param(r"after rename pth._1\.tar", marks=pytest.mark.slow)])
def test_networks_of_a_ring_each_go_on_from_their_own_file(make_image_run, files, ring, event):
    run = make_image_run(2, 3)
    for network, file in enumerate(files, 1):
        killed(run, network, event, "--resume", file)
    run.finish("--resume", "auto")
    assert_same_from_epoch_1(run, ring)


def test_the_file_counts_only_until_the_network_has_a_checkpoint(make_image_run, files, single, tmp_path):
    file = shutil.copy(files[0], tmp_path / "start.tar")
    run = make_image_run(1, 3)
    killed(run, 1, "after train", "--resume", file)
    os.rename(file, tmp_path / "moved.tar")
    gone = f"network 1 has no checkpoint of its own yet, and {file}, from which it starts, is not there: "
    assert gone in refused(run, 1, "--resume")
    both = ["--resume", tmp_path / "moved.tar", "--resume", "auto"]
    killed(run, 1, r"after rename pth0_1\.tar", *both)
    (tmp_path / "moved.tar").unlink()
    killed(run, 1, "after train", "--resume")
    assert run.start(1, *both).wait() == 0
    assert_same_from_epoch_1(run, single)


def test_the_same_command_again_loses_nothing(make_image_run, files, single):
    run = make_image_run(1, 3)
    killed(run, 1, JOINED, "--resume", files[0])
    killed(run, 1, "after line 1", "--resume", files[0])
    assert "network 1 has already run in" in refused(run, 1, "--resume", files[0])
    assert run.start(1, "--resume").wait() == 0
    assert_same_from_epoch_1(run, single)


def test_a_network_that_has_not_begun_is_not_guessed_at(make_image_run, files, ring):
    run = make_image_run(2, 3)
    first = run.start(1, "--resume", files[0])
    run.reaches(1, "waiting", 1)
    for flags in ([], ["--resume"]):
        assert "start_epoch is 0 here and 1 in the run" in refused(run, 2, *flags)
    assert run.start(2, "--resume", files[1], "--resume").wait() == 0
    assert first.wait() == 0
    assert_same_from_epoch_1(run, ring)
