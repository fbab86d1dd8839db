"""A network may be struck at any moment by any fault: it says so in one sentence, and continues where it was."""

import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from processes import assert_same_runs, until

from filter_grafting.checkpoint import load

# Where network 1 of two is killed, time after time, on its way through four epochs.
KILLS = [
    "after rename network1.json",
    "after train",
    r"after sync \.ckpt1_0\.t7\..*",
    "after rename ckpt1_0.t7",
    "after rename best1.t7",
    "after rename metrics1.csv",
    "after line 0",
    "after load ckpt0_0.t7",
    "after graft",
    "after test",
    "after rename coefficients1.csv",
    "after rename ckpt1_2.t7",
    "after delete ckpt1_0.t7",
    "after rename final1.t7",
]


def damage(path):
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 100):  # between two records a byte would not matter
        data[place] ^= 8
    path.write_bytes(data)


def finished(*processes):
    for process in processes:
        assert process.wait() == 0, process.output()


def test_killed_at_every_step_it_ends_with_the_same_bits_and_when_done_nothing_changes(make_run, undisturbed):
    run = make_run(2, 4)
    second = run.start(2)
    for event in KILLS:
        run.killed(1, event, "--resume")  # which begins, where there is nothing to continue
        if event == "after rename ckpt1_2.t7":
            damage(run.checkpoint(1, 2))
    finished(run.start(1, "--resume"), second)
    assert re.search(rf"{run.checkpoint(1, 2)} .*; set aside as ckpt1_2\.t7\.damaged\n", run.log(1))
    assert_same_runs(run, undisturbed(2, 4))
    assert_same_runs(run.finish("--resume"), undisturbed(2, 4))


OTHER_FLAGS = [
    (1, "--method", "swa", "--cos", "--val", "12"),
    pytest.param((1, "--method", "ema"), marks=pytest.mark.slow),
    pytest.param((1, "--scion", "noise", "--nesterov", "--warmup", "1"), marks=pytest.mark.slow),
    (2, "--method", "papa", "--cos", "--difflr"),
    pytest.param((2, "--level", "filter"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("flags", OTHER_FLAGS, ids=str)
def test_with_other_flags_it_ends_with_the_same_bits(make_run, undisturbed, flags):
    networks, *flags = flags
    run = make_run(networks, 4, *flags)
    others = [run.start(network) for network in range(2, networks + 1)]
    run.killed(1, rf"after rename ckpt{1 % networks}_2\.t7")
    finished(run.start(1, "--resume"), *others)
    assert_same_runs(run, undisturbed(networks, 4, *flags))


# Signals


def test_a_signal_ends_it_after_the_batch_or_while_it_waits_and_it_continues(make_run, undisturbed):
    run = make_run(2, 3)
    first = run.start(1)
    run.reaches(1, "waiting")
    first.signal(signal.SIGTERM)
    assert (first.wait(), first.sentence()) == (143, "network 1 stopped by SIGTERM; --resume continues it\n")
    assert (run.status(1)["state"], run.status(1)["detail"]) == ("stopped", "by SIGTERM")
    second = run.start(2, plan=[["quicken"]])
    until(lambda: "network 1 stopped at epoch 0" in run.log(2), what=lambda: run.log(2))
    first = run.start(1, "--resume", plan=[["at", "before train", 1, "signal", int(signal.SIGINT)]])
    assert (first.wait(), first.sentence()) == (130, "network 1 stopped by SIGINT; --resume continues it\n")
    status = run.status(1)
    assert (status["state"], status["detail"], status["epoch"], status["step"]) == ("stopped", "by SIGINT", 1, 0)
    assert not list(run.directory.glob(".*1*.tmp"))
    finished(run.start(1, "--resume"), second)
    assert_same_runs(run, undisturbed(2, 3))


def test_a_signal_ends_a_start_which_leaves_no_trace(make_run):
    run = make_run(1, 3)
    process = run.start(1, plan=[["at", "after rename network1.json", 1, "signal", int(signal.SIGTERM)]])
    assert process.wait() == 143
    assert process.sentence() == "network 1 stopped by SIGTERM; --resume continues it\n"
    assert not run.directory.exists()


def test_a_second_signal_ends_it_at_once(make_run):
    run = make_run(1, 3)
    process = run.start(1, plan=[["at", "before train", 2, "sleep", 600]])
    until((run.directory / "metrics1.csv").exists)
    process.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None  # the batch is not at its end
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


# Disks


@pytest.fixture
def disk():
    """A small file system of its own."""
    folder = Path(tempfile.mkdtemp(prefix="disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
    folder.rmdir()


def test_a_full_disk_is_one_sentence_until_there_is_space(make_run, undisturbed, disk, tmp_path):
    run = make_run(1, 3, directory=disk / "run", logs=tmp_path / "logs")
    ballast = disk / "ballast"
    process = run.start(1, plan=[["at", "before train", 2, "fill", str(ballast)]])
    assert process.wait() == 1, process.output()
    reason = r"No space left on device; [01]\.\d MB are free there; mend that, then resume\n"
    assert re.fullmatch(rf"cannot write {run.directory}/\S+: {reason}", process.sentence())
    for path in run.directory.glob("*.t7"):
        load(path)
    ballast.unlink()
    finished(run.start(1, "--resume"))
    assert_same_runs(run, undisturbed(1, 3))


def test_a_log_that_cannot_be_written_is_one_sentence(make_run):
    process = make_run(1, 3).start(1, output="/dev/full")
    assert process.wait() == 1
    assert process.sentence() == "cannot write the log to standard output: No space left on device\n"


# Settings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], r"network 1 has already run in .* \(--resume continues it"),
        (["--resume", "--data", "/nowhere"], "/nowhere"),
        (["--resume", "--a", "0.5"], "a is 0.5 here and 0.4 in the run"),
        (["--resume", "--test_images", "4"], "test_images is 4 here and 8 in the run"),
        (
            ["--resume", "--lr", "0.2", "--seed", "1"],
            "lr is 0.2 here and was 0.1, seed .* 0; give the same .*--epochs alone",
        ),
    ],
)
def test_a_start_that_would_change_the_outcome_is_refused_and_leaves_no_trace(undisturbed, flags, words):
    run = undisturbed(2, 3)
    before = {path: path.read_bytes() for path in run.directory.iterdir()}
    assert re.search(words, run.refused(1, *flags))
    assert {path: path.read_bytes() for path in run.directory.iterdir()} == before


def test_without_its_checkpoints_a_network_does_not_begin_again_over_what_it_has_left(make_run):
    run = make_run(1, 3).finish()
    for path in run.directory.glob("ckpt*"):
        path.unlink()
    before = {path: path.read_bytes() for path in run.directory.iterdir()}
    assert re.search(rf"to begin again would replace {run.directory}/best1\.t7", run.refused(1, "--resume"))
    assert {path: path.read_bytes() for path in run.directory.iterdir()} == before


def test_epochs_may_be_raised_with_the_step_schedule_alone(make_run, undisturbed):
    run, cosine = make_run(2, 2).finish(), make_run(1, 1, "--cos").finish()
    run.epochs, cosine.epochs = 3, 2
    assert_same_runs(run.finish("--resume"), undisturbed(2, 3))
    assert "epochs is 2 here and 1 in the run" in cosine.refused(1, "--resume")


def test_on_a_cosine_they_may_not_be_raised_by_a_neighbour_on_steps(make_run):
    run = make_run(2, 1)
    finished(run.start(1), run.start(2, "--cos"))
    run.epochs = 2
    finished(run.start(1, "--resume"))
    assert "epochs is 2 here and was 1" in run.refused(2, "--cos", "--resume")


def test_networks_of_one_ring_have_the_same_images(make_run, images, tmp_path):
    run = make_run(2, 2)
    first = run.start(1)
    run.reaches(1, "waiting")
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "train" / "one" / "0.png").rename(folder / "train" / "two" / "a.png")  # as many images as before
    run.flags[1] = str(folder)
    assert re.search(r"data is '\w{8}' here and '\w{8}' in the run", run.refused(2))
    assert first.poll() is None
