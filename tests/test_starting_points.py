"""Runs that start from a checkpoint of another one (`--resume PATH`): killed at any moment, they go on from there."""

import os
import shutil
import signal

import pytest
from imagenet import ImageRun
from processes import assert_same

JOINED = r"after rename network\d\.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory, class_folders):
    """Checkpoints to start from, of two networks; the epoch after theirs is 1."""
    run = ImageRun(tmp_path_factory.mktemp("earlier") / "run", class_folders, 2, 1).finish()
    return [run.checkpoint(network, 0) for network in (1, 2)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, class_folders, files):
    """Of one or two networks, each of which has started from its file: runs that nothing has disturbed."""
    runs = {}
    for networks in (1, 2):
        run = runs[networks] = ImageRun(tmp_path_factory.mktemp(f"{networks}") / "run", class_folders, networks, 3)
        for process in [run.start(i, "--resume", files[i - 1]) for i in range(1, networks + 1)]:
            assert process.wait() == 0, process.output()
    return runs


def assert_same_from_epoch_1(run, undisturbed):
    for network in range(1, run.networks + 1):
        outcome = run.outcome(network)
        assert [row["epoch"] for row in outcome["tables"]["metrics"]] == ["1", "2"]
        assert_same(outcome, undisturbed[run.networks].outcome(network), f"network {network}")


def killed(run, network, event, *flags):
    process = run.start(network, *flags, plan=[["at", event, 1, "kill"]])
    assert process.wait() == -signal.SIGKILL, process.output()


def refused(run, network, *flags):
    """The sentence in which a start ends."""
    process = run.start(network, *flags)
    assert (process.wait(), process.sentence().count("\n")) == (1, 1), process.output()
    return process.sentence()


def test_killed_it_goes_on_from_its_file_which_counts_only_until_it_has_a_checkpoint_of_its_own(
    make_image_run, files, undisturbed, tmp_path
):
    file = shutil.copy(files[0], tmp_path / "start.tar")
    run = make_image_run(1, 3)
    killed(run, 1, JOINED, "--resume", file)
    os.rename(file, tmp_path / "moved.tar")
    gone = f"network 1 has no checkpoint of its own yet, and {file}, from which it starts, is not there: "
    assert gone in refused(run, 1, "--resume")
    both = ["--resume", os.path.relpath(tmp_path / "moved.tar"), "--resume", "auto"]
    killed(run, 1, "after train", *both)
    killed(run, 1, "after line 1", "--resume", tmp_path / "moved.tar")
    assert "network 1 has already run in" in refused(run, 1, "--resume", tmp_path / "moved.tar")
    (tmp_path / "moved.tar").unlink()
    assert run.start(1, *both).wait() == 0, run.started[-1].output()
    assert_same_from_epoch_1(run, undisturbed)


def test_networks_of_a_ring_each_go_on_from_their_own_file_and_none_is_guessed(make_image_run, files, undisturbed):
    run = make_image_run(2, 3)
    killed(run, 1, JOINED, "--resume", files[0])
    first = run.start(1, "--resume", "auto")
    run.reaches(1, "waiting", 1)
    assert "start_epoch is 0 here and 1 in the run" in refused(run, 2, "--resume")
    killed(run, 2, JOINED, "--resume", files[1])
    for process in run.start(2, "--resume"), first:
        assert process.wait() == 0, process.output()
    assert_same_from_epoch_1(run, undisturbed)
