"""A network may be struck at any moment by any fault: it says so in one sentence, and continues where it was."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from processes import assert_same_runs, make_images, until

from filter_grafting.checkpoint import load

MEND = "mend that, then continue with --resume"
GONE = "the save directory {} of network 1 is gone: there is no run.json any more\n"

# A network publishes epoch 1 of 3, waits, grafts, and records it: each step that a kill can come between.
STEPS = {
    "batch done": ("before train", 2),
    "epoch trained": ("after train", 2),
    "tested": ("after test", 2),
    "best written": ("after rename best1.t7", 1),
    "first checkpoint renamed": ("after rename ckpt1_0.t7", 1),
    "old checkpoint deleted": ("after delete ckpt1_0.t7", 1),
    "checkpoint half-written": (r"before sync \.ckpt1_1\.t7\..*", 1),
    "checkpoint temporary file written": ("before rename ckpt1_1.t7", 1),
    "checkpoint renamed": ("after rename ckpt1_1.t7", 1),
    "waiting": ("wait", 3),
    "neighbour found": ("before load ckpt0_1.t7", 1),
    "neighbour loaded": ("after load ckpt0_1.t7", 1),
    "blending": ("before blend", 2),
    "blended": ("after blend", 2),
    "coefficients written": ("after rows coefficients1.csv", 2),
    "log line written": ("after line 1", 1),
    "metrics written": ("after rows metrics1.csv", 2),
    "last checkpoint renamed": ("after rename ckpt1_2.t7", 1),
    "last row written": ("after rows metrics1.csv", 3),
    "final temporary file written": ("before rename final1.t7", 1),
    "final renamed": ("after rename final1.t7", 1),
    "run recorded": ("before rename network1.json", 2),
}


def killed_then_resumed(run, plan: list[list]) -> None:
    """Network 1 is killed by the plan, and continued; network 2 notices nothing."""
    first, second = run.start(1, plan=plan), run.start(2)
    assert first.wait() == -signal.SIGKILL, first.output()
    first = run.start(1, "--resume")
    assert first.wait() == 0, first.output()
    assert second.wait() == 0, second.output()


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_it_ends_with_the_same_bits(make_run, undisturbed, step):
    # A network whose neighbour is slow deletes its first checkpoint in the fourth epoch at the latest.
    epochs = 4 if step == "old checkpoint deleted" else 3
    run = make_run(2, epochs)
    killed_then_resumed(run, [["at", *STEPS[step], "kill"]])
    assert_same_runs(run, undisturbed(2, epochs))


@pytest.mark.parametrize(
    "tear", [["tear_row", "coefficients1.csv", 1], ["tear_row", "metrics1.csv", 2], ["tear_line", 1]], ids=str
)
def test_a_half_written_row_or_line_is_gone_when_it_continues(make_run, undisturbed, tear):
    run = make_run(2, 3)
    killed_then_resumed(run, [tear])
    assert_same_runs(run, undisturbed(2, 3))


def test_killed_in_every_epoch_it_ends_with_the_same_bits(make_run, undisturbed):
    run = make_run(2, 3)
    second = run.start(2)
    for epoch in range(3):
        first = run.start(1, "--resume", plan=[["at", f"after line {epoch}", 1, "kill"]])
        assert first.wait() == -signal.SIGKILL
    assert run.start(1, "--resume").wait() == 0
    assert second.wait() == 0
    assert_same_runs(run, undisturbed(2, 3))


def test_a_done_network_continued_stays_as_it_is(make_run, undisturbed):
    run = make_run(2, 3).finish()
    run.finish("--resume")
    assert_same_runs(run, undisturbed(2, 3))


def test_resume_without_anything_to_continue_begins(make_run, undisturbed):
    assert_same_runs(make_run(2, 3).finish("--resume"), undisturbed(2, 3))


def test_a_log_that_the_shell_has_emptied_is_filled_again(make_run, undisturbed):
    run = make_run(2, 3)
    second = run.start(2)
    assert run.start(1, plan=[["at", "after line 1", 1, "kill"]]).wait() == -signal.SIGKILL
    assert run.start(1, "--resume", append=False).wait() == 0  # python ... >1.log
    assert second.wait() == 0
    assert_same_runs(run, undisturbed(2, 3))


# Damage to one's own newest checkpoint


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_with_its_newest_checkpoint_damaged_it_goes_on_from_the_one_before(make_run, undisturbed, how):
    run = make_run(2, 3)
    second = run.start(2)
    assert run.start(1, plan=[["at", "after rename ckpt1_2.t7", 1, "kill"]]).wait() == -signal.SIGKILL
    path = run.checkpoint(1, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes({"truncated": data[:-9], "empty": b"", "flipped": data}[how])
    assert run.start(1, "--resume").wait() == 0
    assert second.wait() == 0
    assert f"{path.name}; set aside as" not in run.log(1)
    assert re.search(rf"Network:1    {path} is .*; set aside as ckpt1_2\.t7\.damaged\n", run.log(1))
    assert "continuing after epoch 1" in run.log(1)
    assert (run.directory / "ckpt1_2.t7.damaged").exists()
    assert_same_runs(run, undisturbed(2, 3))


def test_with_all_its_checkpoints_damaged_a_baseline_begins_anew(make_run, undisturbed):
    run = make_run(1, 3)
    assert run.start(1, plan=[["at", "after line 1", 1, "kill"]]).wait() == -signal.SIGKILL
    for epoch in (0, 1):
        run.checkpoint(1, epoch).write_bytes(b"")
    assert run.start(1, "--resume").wait() == 0
    assert_same_runs(run, undisturbed(1, 3))


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_batch_and_it_continues(make_run, undisturbed, number):
    run = make_run(2, 3)
    second = run.start(2)
    first = run.start(1, plan=[["at", "before train", 2, "sleep", 0.5]])
    run.reaches(1, "training", 1)
    first.signal(number)
    assert first.wait() == 128 + number
    name = signal.Signals(number).name
    assert first.sentence() == f"network 1 stopped by {name} at epoch 1; --resume continues it\n"
    status = run.status(1)
    assert (status["state"], status["detail"], status["epoch"]) == ("stopped", f"by {name}", 1)
    assert not list(run.directory.glob(".*1*.tmp"))
    assert run.start(1, "--resume").wait() == 0
    assert second.wait() == 0
    assert_same_runs(run, undisturbed(2, 3))


def test_a_signal_ends_the_wait_and_the_neighbour_repeats_why(make_run, undisturbed):
    run = make_run(2, 3)
    first = run.start(1)
    run.reaches(1, "waiting")
    first.signal(signal.SIGTERM)
    assert first.wait() == 143
    second = run.start(2, plan=[["quicken"]])
    until(lambda: "network 1 stopped at epoch 0: by SIGTERM" in run.log(2))
    assert run.start(1, "--resume").wait() == 0
    assert second.wait() == 0
    assert_same_runs(run, undisturbed(2, 3))


def test_a_signal_ends_a_start(make_run):
    run = make_run(1, 3)
    process = run.start(1, plan=[["at", "after rename network1.json", 1, "terminate"]])
    assert process.wait() == 143
    assert process.sentence() == "network 1 stopped by SIGTERM before its first epoch; --resume continues it\n"
    assert run.status(1)["state"] == "stopped"


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
    """A file system of its own, of 12 MB: room for a baseline of ResNet-20."""
    folder = Path(tempfile.mkdtemp(prefix="disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
    folder.rmdir()


@pytest.mark.parametrize(
    ("moment", "file"),
    [
        (("before train", 2), "ckpt0_[01]"),
        (("before rename ckpt0_1.t7", 1), "ckpt0_2"),
        (("after delete ckpt0_0.t7", 1), "final1"),
    ],
)
def test_a_full_disk_is_one_sentence_and_it_continues_when_there_is_space(make_run, undisturbed, disk, moment, file):
    run = make_run(1, 3, directory=disk / "run")
    ballast = disk / "ballast"
    process = run.start(1, plan=[["at", *moment, "fill", str(ballast)]])
    assert process.wait() == 1, process.output()
    said = run.status(1)["detail"]  # standard error, on the same disk, may be lost
    reason = rf"No space left on device; [01]\.\d MB are free there; {MEND}"
    assert re.fullmatch(rf"cannot write {run.directory}/{file}\.t7: {reason}", said)
    assert run.status(1)["state"] == "failed"
    for path in run.directory.glob("*.t7"):
        load(path)
    ballast.unlink()
    assert run.start(1, "--resume").wait() == 0
    assert_same_runs(run, undisturbed(1, 3))


@pytest.mark.parametrize(("moment", "file"), [("before rows metrics1.csv", "metrics"), ("before line 1", "log")])
def test_a_row_or_line_for_which_there_is_no_space_is_one_sentence_and_comes_when_it_continues(
    make_run, undisturbed, moment, file
):
    run = make_run(1, 3)
    path = run.logs / "1.log" if file == "log" else run.directory / "metrics1.csv"
    process = run.start(1, plan=[["at", moment, 1 + (file == "metrics"), "limit", str(path), 20]])
    assert process.wait() == 1
    reason = rf"File too large; [\d.]+ MB are free there; {MEND}\n"
    assert re.fullmatch(rf"cannot write {path}: {reason}", process.sentence())
    assert not path.read_text().endswith("\n")
    assert run.start(1, "--resume").wait() == 0
    assert_same_runs(run, undisturbed(1, 3))


def test_a_log_that_cannot_be_written_is_one_sentence(make_run):
    run = make_run(1, 3)
    process = run.start(1, output="/dev/full")
    assert process.wait() == 1
    assert process.sentence() == "cannot write the log to standard output: No space left on device\n"
    assert run.status(1)["detail"] == process.sentence().strip()


def test_a_checkpoint_that_may_not_grow_is_one_sentence(make_run):
    run = make_run(1, 3)
    process = run.start(1, plan=[["limit_file_size", 2_000_000]])
    assert process.wait() == 1
    reason = rf"File too large; [\d.]+ MB are free there; {MEND}\n"
    assert re.fullmatch(rf"cannot write {run.checkpoint(1, 0)}: {reason}", process.sentence())
    assert run.status(1)["detail"] == process.sentence().strip()
    load(run.directory / "best1.t7")


@pytest.fixture
def place():
    """A folder that every user may reach and write to."""
    folder = Path(tempfile.mkdtemp(prefix="place-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_a_directory_that_becomes_read_only_is_one_sentence(make_run, undisturbed, place):
    run = make_run(1, 3, directory=place / "run", data=make_images(place / "images"))
    run.logs.chmod(0o777)
    # The superuser, as whom tests may run, is stopped by no permission.
    user = [] if os.getuid() else [["become_nobody"]]
    process = run.start(1, plan=[*user, ["at", "before train", 2, "sleep", 1.0]])
    run.reaches(1, "training", 1)
    run.directory.chmod(0o555)
    assert process.wait() == 1
    said = process.sentence()
    reason = rf"Permission denied; [\d.]+ MB are free there; {MEND}\n"
    assert re.fullmatch(rf"cannot write {run.directory}/\S+: {reason}", said)
    assert run.status(1)["detail"] == said.strip()  # the file itself may still be written over
    run.directory.chmod(0o777)
    assert run.start(1, "--resume", plan=user).wait() == 0
    assert_same_runs(run, undisturbed(1, 3))


def test_a_read_only_file_system_is_one_sentence(make_run, disk, tmp_path):
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    process = make_run(1, 3, directory=disk / "run", logs=tmp_path).start(1)
    assert process.wait() == 1
    assert process.sentence().startswith(f"cannot write {disk}/run/network1.lock: Read-only file system; ")


def test_a_directory_that_is_deleted_while_it_trains_is_one_sentence(make_run):
    run = make_run(2, 3)
    run.start(2)
    process = run.start(1, plan=[["at", "before train", 2, "remove", str(run.directory)]])
    assert process.wait() == 1
    assert process.sentence() == GONE.format(run.directory)
    assert not run.directory.exists()


def test_a_directory_that_is_deleted_while_it_waits_is_one_sentence(make_run):
    run = make_run(2, 3)
    process = run.start(1)
    run.reaches(1, "waiting")
    shutil.rmtree(run.directory)
    assert process.wait() == 1
    assert process.sentence() == GONE.format(run.directory)


# Settings


def test_each_setting_that_would_change_the_outcome_is_named(undisturbed):
    run = undisturbed(2, 3)
    before = {path: path.read_bytes() for path in run.directory.glob("*.t7")}
    for flags, words in {
        ("--lr", "0.2"): "lr is 0.2 here and was 0.1",
        ("--seed", "1"): "seed is 1 here and was 0",
        ("--batch_size", "8"): "batch_size is 8 here and was 16",
        ("--amp",): "amp is True here and was False",
        ("--difflr",): "difflr is True here and was False",
        ("--cos",): "cos is True here and was False",
        ("--a", "0.5"): "a is 0.5 here and 0.4 in the run",
        ("--c", "400"): "c is 400.0 here and 500.0 in the run",
        ("--model", "resnet32"): "model is 'resnet32' here and 'resnet20' in the run",
        ("--epochs", "2"): "epochs is 2 here and 3 in the run",
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


def test_epochs_may_not_be_raised_with_a_cosine(make_run, undisturbed):
    run = undisturbed(2, 3, "--cos")
    process = run.start(1, "--resume", "--epochs", "5")
    assert process.wait() == 1
    why = "(--epochs is fixed: it shapes the whole of a cosine schedule)"
    assert f"epochs is 5 here and 3 in the run {why}" in process.sentence()


def test_killed_with_a_cosine_and_different_rates_it_ends_with_the_same_bits(make_run, undisturbed):
    run = make_run(2, 3, "--cos", "--difflr")
    killed_then_resumed(run, [["at", "after rename ckpt1_1.t7", 1, "kill"]])
    assert_same_runs(run, undisturbed(2, 3, "--cos", "--difflr"))
