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

MEND = "mend that, then resume"

# A network publishes epoch 1 of 3, records it, waits and grafts: each step that a kill can come between.
STEPS = {
    "joined": ("after rename network1.json", 1),
    "checkpoint temporary file written": ("before rename ckpt1_1.t7", 1),
    "checkpoint renamed": ("after rename ckpt1_1.t7", 1),
    "metrics half-written": (r"before rename metrics1\.csv", 2),
    "log line written": ("after line 1", 1),
    "neighbour found": ("before load ckpt0_1.t7", 1),
    "grafted": ("after graft", 2),
    "last checkpoint renamed": ("after rename ckpt1_2.t7", 1),
}
MORE_STEPS = {
    "epoch trained": ("after train", 2),
    "tested": ("after test", 2),
    "checkpoint on the disk": (r"after sync \.ckpt1_1\.t7\..*", 1),
    "best written": ("after rename best1.t7", 1),
    "coefficients written": ("after rename coefficients1.csv", 1),
    "metrics written": ("after rename metrics1.csv", 2),
    "waiting": ("wait", 3),
    "neighbour loaded": ("after load ckpt0_1.t7", 1),
    "grafting": ("before graft", 2),
    "last row written": ("after rename metrics1.csv", 3),
    "final temporary file written": ("before rename final1.t7", 1),
    "final renamed": ("after rename final1.t7", 1),
    # A network whose neighbour is slow deletes its first checkpoint in the fourth epoch at the latest.
    "old checkpoint deleted": ("after delete ckpt1_0.t7", 1),
}


def killed_then_resumed(run, plan: list[list]) -> None:
    """Network 1 is killed by the plan, and continued; network 2 notices nothing."""
    first, second = run.start(1, plan=plan), run.start(2)
    assert first.wait() == -signal.SIGKILL, first.output()
    first = run.start(1, "--resume")
    assert first.wait() == 0, first.output()
    assert second.wait() == 0, second.output()


@pytest.mark.parametrize("step", [*STEPS, *(pytest.param(step, marks=pytest.mark.slow) for step in MORE_STEPS)])
def test_killed_at_any_step_it_ends_with_the_same_bits(make_run, undisturbed, step):
    epochs = 4 if step == "old checkpoint deleted" else 3
    run = make_run(2, epochs)
    event, count = (STEPS | MORE_STEPS)[step]
    # A neighbour that is ahead may keep this one from waiting: then it is killed at the next step instead.
    instead = [["at", "before load ckpt0_1.t7", 1, "kill"]] if event == "wait" else []
    killed_then_resumed(run, [["at", event, count, "kill"], *instead])
    assert_same_runs(run, undisturbed(2, epochs))


def test_resume_without_anything_to_continue_begins_and_when_done_nothing_changes(make_run, undisturbed):
    run = make_run(2, 3)
    for _ in range(2):
        assert_same_runs(run.finish("--resume"), undisturbed(2, 3))


SINGLE = [
    ("--method", "swa", "--cos", "--val", "12"),
    pytest.param(("--method", "ema"), marks=pytest.mark.slow),
    pytest.param(("--scion", "noise"), marks=pytest.mark.slow),
    pytest.param(("--nesterov", "--warmup", "1", "--label_smoothing", "0.1"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("flags", SINGLE, ids=str)
def test_a_single_network_with_other_flags_ends_with_the_same_bits(make_run, undisturbed, flags):
    single = make_run(1, 4, *flags)
    process = single.start(1, plan=[["at", "after rename ckpt0_2.t7", 1, "kill"]])
    assert process.wait() == -signal.SIGKILL, process.output()
    single.finish("--resume")
    assert_same_runs(single, undisturbed(1, 4, *flags))


RINGS = [
    ("--method", "papa", "--cos", "--difflr"),
    pytest.param(("--criterion", "l1"), marks=pytest.mark.slow),
    pytest.param(("--level", "filter"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("flags", RINGS, ids=str)
def test_a_ring_with_other_flags_ends_with_the_same_bits(make_run, undisturbed, flags):
    run = make_run(2, 3, *flags)
    killed_then_resumed(run, [["at", "after rename ckpt1_1.t7", 1, "kill"]])
    assert_same_runs(run, undisturbed(2, 3, *flags))


# Damage to one's own newest checkpoint


def test_with_its_newest_checkpoint_damaged_it_goes_on_from_the_one_before(make_run, undisturbed):
    run = make_run(2, 3)
    second = run.start(2)
    assert run.start(1, plan=[["at", "after rename ckpt1_2.t7", 1, "kill"]]).wait() == -signal.SIGKILL
    path = run.checkpoint(1, 2)
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 100):  # between two records a byte would not matter
        data[place] ^= 8
    path.write_bytes(data)
    assert run.start(1, "--resume").wait() == 0
    assert second.wait() == 0
    assert re.search(rf"{path} .*; set aside as ckpt1_2\.t7\.damaged\n", run.log(1))
    assert "continuing after epoch 1" in run.log(1)
    assert_same_runs(run, undisturbed(2, 3))


# Signals


NUMBERS = [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_it_after_the_batch_and_it_continues(make_run, undisturbed, number):
    run = make_run(2, 3)
    second = run.start(2)
    first = run.start(1, plan=[["at", "before train", 2, "signal", int(number)]])
    assert first.wait() == 128 + number
    name = signal.Signals(number).name
    assert first.sentence() == f"network 1 stopped by {name}; --resume continues it\n"
    status = run.status(1)
    assert (status["state"], status["detail"], status["epoch"], status["step"]) == ("stopped", f"by {name}", 1, 0)
    assert not list(run.directory.glob(".*1*.tmp"))
    assert run.start(1, "--resume").wait() == 0
    assert second.wait() == 0
    assert_same_runs(run, undisturbed(2, 3))


def test_a_signal_ends_the_wait(make_run, undisturbed):
    run = make_run(2, 3)
    first = run.start(1)
    run.reaches(1, "waiting")
    first.signal(signal.SIGTERM)
    assert first.wait() == 143
    assert (run.status(1)["state"], run.status(1)["detail"]) == ("stopped", "by SIGTERM")
    second = run.start(2, plan=[["quicken"]])
    until(lambda: "network 1 stopped at epoch 0" in run.log(2), what=lambda: run.log(2))
    assert run.start(1, "--resume").wait() == 0
    assert second.wait() == 0
    assert_same_runs(run, undisturbed(2, 3))


def test_a_signal_ends_a_start_which_leaves_no_trace(make_run):
    run = make_run(1, 3)
    process = run.start(1, plan=[["at", "after rename network1.json", 1, "signal", int(signal.SIGTERM)]])
    assert process.wait() == 143
    assert process.sentence() == "network 1 stopped by SIGTERM; --resume continues it\n"
    assert not run.directory.exists()


def test_a_second_signal_ends_it_at_once(make_run, undisturbed):
    run = make_run(1, 3)
    process = run.start(1, plan=[["at", "before train", 2, "sleep", 600]])
    run.reaches(1, "training", 1)
    process.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None  # the batch is not at its end
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert run.start(1, "--resume").wait() == 0
    assert_same_runs(run, undisturbed(1, 3))


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


MOMENTS = [("before train", 2), pytest.param(("after line 2", 1), marks=pytest.mark.slow)]


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_full_disk_is_one_sentence_until_there_is_space(make_run, undisturbed, disk, tmp_path, moment):
    run = make_run(1, 3, directory=disk / "run", logs=tmp_path / "logs")
    ballast = disk / "ballast"
    process = run.start(1, plan=[["at", *moment, "fill", str(ballast)]])
    assert process.wait() == 1, process.output()
    reason = rf"No space left on device; [01]\.\d MB are free there; {MEND}\n"
    assert re.fullmatch(rf"cannot write {run.directory}/\S+: {reason}", process.sentence())
    for path in run.directory.glob("*.t7"):
        load(path)
    ballast.unlink()
    assert run.start(1, "--resume").wait() == 0, run.started[-1].output()
    assert_same_runs(run, undisturbed(1, 3))


def test_a_log_that_cannot_be_written_is_one_sentence(make_run):
    run = make_run(1, 3)
    process = run.start(1, output="/dev/full")
    assert process.wait() == 1
    assert process.sentence() == "cannot write the log to standard output: No space left on device\n"


def test_a_directory_that_is_deleted_is_one_sentence(make_run):
    run = make_run(2, 3)
    run.start(2)
    process = run.start(1, plan=[["at", "before train", 2, "remove", str(run.directory)]])
    assert process.wait() == 1
    gone = f"the save directory {run.directory} of network 1 is gone: there is no run.json any more\n"
    assert process.sentence() == gone
    assert not run.directory.exists()


# Settings


def test_each_setting_that_would_change_the_outcome_is_named(undisturbed):
    run = undisturbed(2, 3)
    before = {path: path.read_bytes() for path in run.directory.glob("*.t7")}
    for flags, words in {
        ("--a", "0.5"): "a is 0.5 here and 0.4 in the run",
        ("--model", "resnet32"): "model is 'resnet32' here and 'ranks:tiny' in the run",
        ("--test_images", "4"): "test_images is 4 here and 8 in the run",
        ("--lr", "0.2", "--seed", "1"): "lr is 0.2 here and was 0.1, seed is 1 here and was 0",
    }.items():
        process = run.start(1, "--resume", *flags)
        assert process.wait() == 1
        assert words in process.sentence(), process.sentence()
    assert {path: path.read_bytes() for path in run.directory.glob("*.t7")} == before


def test_epochs_may_be_raised_with_the_step_schedule(make_run, undisturbed):
    run = make_run(2, 3).finish()
    run.epochs = 5
    run.finish("--resume")
    assert_same_runs(run, undisturbed(2, 5))


def test_epochs_that_shape_the_whole_run_cannot_be_raised(make_run):
    single = make_run(1, 1, "--cos").finish()
    single.epochs = 2
    process = single.start(1, "--resume")
    assert process.wait() == 1
    assert "epochs is 2 here and 1 in the run" in process.sentence()


def test_networks_of_one_ring_have_the_same_images(make_run, images, tmp_path):
    run = make_run(2, 2)
    first = run.start(1)
    run.reaches(1, "waiting")
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "train" / "one" / "0.png").rename(folder / "train" / "two" / "a.png")  # as many images as before
    run.flags[1] = str(folder)
    second = run.start(2)
    assert second.wait() == 1
    assert re.search(r"data is '\w{8}' here and '\w{8}' in the run", second.sentence())
    assert first.poll() is None
