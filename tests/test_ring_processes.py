import csv
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from processes import CIFAR, DEADLINE, Process, assert_same, assert_same_runs, read_table, until

from filter_grafting.checkpoint import load, save

STAND_IN = Path(__file__).with_name("stand_in.py")


def says(run, network: int, words: str) -> None:
    """Waits until a network's log says something."""
    until(lambda: words in run.log(network), DEADLINE, lambda: f"{words!r} in the log:\n{run.log(network)}")


def test_a_ring_of_three_typed_by_hand_comes_to_its_end(make_run, undisturbed):
    run = make_run(3, 3)
    for process in [run.start(network, fork=False) for network in (1, 2, 3)]:
        assert process.wait() == 0, process.output()
    assert_same_runs(run, undisturbed(3, 3))
    for network in (1, 2, 3):
        status = run.status(network)
        assert (status["state"], status["epoch"], status["epochs"]) == ("done", 2, 3)
        assert len(list(run.directory.glob(f"ckpt{network % 3}_*.t7"))) <= 3
        best, final = (load(run.directory / f"{kind}{network}.t7") for kind in ("best", "final"))
        assert (final["epoch"], final["settings"]["model"]) == (2, "resnet20")
        assert best["accuracy"] == final["best"] == status["best"]
        for epoch in range(3):
            start = rf"^Network:{network}    epoch:{epoch}    accuracy:\d+\.\d{{3}}    best:\d+\.\d{{3}}(    |$)"
            assert len(re.findall(start, run.log(network), re.MULTILINE)) == 1
        for name, rows in ("metrics", 3), ("coefficients", 2 * 19):  # nothing is grafted after the last epoch
            assert len(read_table(run.directory / f"{name}{network}.csv")) == rows


def test_networks_of_one_run_differ_and_runs_repeat(undisturbed, make_run):
    first, second = (undisturbed(2, 3).outcome(network)["checkpoints"]["final"] for network in (1, 2))
    assert not torch.equal(first["net"]["conv1.weight"], second["net"]["conv1.weight"])
    assert_same_runs(make_run(2, 3).finish(), undisturbed(2, 3))


def test_a_network_may_start_late(make_run, undisturbed):
    run = make_run(2, 3)
    first = run.start(1, plan=[["quicken"]])
    says(run, 1, ": network 2 has not started; start it with: ")
    assert re.search(r"waiting for network 2 \(epoch 0\) for \d+ s: network 2 has not", run.log(1))
    until(lambda: run.status(1)["state"] == "waiting", DEADLINE, lambda: f"its status: {run.status(1)}")
    assert run.status(1)["detail"] == "for network 2"
    command = run.log(1).partition("start it with: ")[2].splitlines()[0]
    assert re.match(rf"python3?[\d.]* {CIFAR} --s {run.directory} ", command) and "--i 2" in command
    second = run.start(2)
    assert (first.wait(), second.wait()) == (0, 0)
    assert_same_runs(run, undisturbed(2, 3))
    assert float(read_table(run.directory / "metrics1.csv")[0]["wait_seconds"]) > 0.5


def test_a_neighbour_that_dies_is_reported_and_waited_for_until_the_timeout(make_run, undisturbed):
    run = make_run(2, 3)
    first = run.start(1, "--timeout", "0.03", plan=[["quicken"]])
    second = run.start(2, plan=[["at", "before rename ckpt0_1.t7", 1, "kill"]])
    assert second.wait() == -signal.SIGKILL
    assert first.wait() == 3
    assert "waiting for network 2 (epoch 1) for" in run.log(1)
    died = r"network 2 died at epoch 1 \(killed\?\); continue it with: python .* --i 2 .*--resume"
    assert re.search(died, run.log(1))
    said = first.sentence()
    assert re.fullmatch(r"network 1 gave up after \d s of waiting for network 2 \(epoch 1\): " + died
                        + r"\. Start network 2 again with --resume, then this one\n", said)  # fmt: skip
    assert run.status(1)["state"] == "failed" and run.status(1)["detail"] == said.strip()
    run.finish("--resume")
    assert_same_runs(run, undisturbed(2, 3))


def test_the_wait_line_repeats_why_the_neighbour_failed(make_run):
    run = make_run(2, 3)
    run.start(1, plan=[["quicken"]])
    run.reaches(1, "waiting")
    second = run.start(2, "--a", "0.5")
    assert second.wait() == 1
    said = f"network 2 does not fit the run in {run.directory}: a is 0.5 here and 0.4 in the run; give the same"
    assert second.sentence().startswith(said)
    says(run, 1, f"network 2 failed before its first epoch: {said}")


def test_a_truncated_checkpoint_is_waited_out_and_replaced(make_run, undisturbed):
    run = make_run(2, 3)
    path, renamed = run.checkpoint(2, 1), "after rename ckpt0_1.t7"
    first = run.start(1, plan=[["quicken"], ["at", "before load ckpt0_1.t7", 1, "sleep", 1.0]])
    second = run.start(2, plan=[["at", renamed, 1, "truncate", str(path)], ["at", renamed, 1, "kill"]])
    assert second.wait() == -signal.SIGKILL
    says(run, 1, f"{path} is truncated or damaged")
    assert first.poll() is None
    assert run.start(2, "--resume").wait() == 0
    assert first.wait() == 0
    assert "ckpt0_1.t7 is truncated or damaged" in run.log(2) and "set aside as ckpt0_1.t7.damaged" in run.log(2)
    assert_same_runs(run, undisturbed(2, 3))


def test_a_stale_checkpoint_of_another_run_is_waited_out_and_replaced(make_run, undisturbed):
    other = undisturbed(2, 3)
    run = make_run(2, 3)
    run.directory.mkdir()
    contents = load(other.checkpoint(2, 2))
    save(run.checkpoint(2, 0), contents | {"epoch": 0})
    first = run.start(1, plan=[["quicken"]])
    says(run, 1, f"{run.checkpoint(2, 0)} belongs to another run")
    refused = run.start(2)
    assert refused.wait() == 1 and "network 2 has already run in" in refused.sentence()
    assert run.start(2, "--resume").wait() == 0
    assert first.wait() == 0
    assert_same_runs(run, other)


def test_a_malicious_checkpoint_is_waited_out_and_runs_nothing(make_run, undisturbed, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/it_ran",)

    run = make_run(2, 3)
    first = run.start(1, plan=[["quicken"]])
    assert run.start(2, plan=[["at", "before rename ckpt0_1.t7", 1, "kill"]]).wait() == -signal.SIGKILL
    torch.save({"net": {}, "bomb": Bomb()}, run.checkpoint(2, 1))
    says(run, 1, f"{run.checkpoint(2, 1)} holds more than tensors and plain values, and could run code; it was not")
    assert run.start(2, "--resume").wait() == 0
    assert first.wait() == 0
    assert not (tmp_path / "it_ran").exists()
    assert_same_runs(run, undisturbed(2, 3))


def test_a_neighbour_of_another_architecture_ends_the_network_with_both_shapes(make_run):
    run = make_run(2, 3)
    run.directory.mkdir()
    torch.save({"net": {"conv1.weight": torch.zeros(64, 3, 3, 3)}}, run.checkpoint(2, 0))
    first = run.start(1)
    assert first.wait() == 1
    assert first.sentence() == (
        f"{run.checkpoint(2, 0)} cannot be grafted onto network 1: conv1.weight: in the network (16, 3, 3, 3) "
        "torch.float32, in its neighbour (64, 3, 3, 3) torch.float32\n"
    )
    assert run.status(1)["detail"] == first.sentence().strip()


def test_what_a_neighbours_file_says_is_made_printable(make_run):
    run = make_run(2, 3)
    run.directory.mkdir()
    from grafting_cifar.models import build

    state = build("resnet20", 2).state_dict()
    torch.save({"net": state | {"\x1b[2J\nNetwork:1    epoch:9": torch.zeros(1)}}, run.checkpoint(2, 0))
    first = run.start(1)
    assert first.wait() == 1
    assert first.sentence().removesuffix("\n").isprintable()


def test_a_neighbour_with_a_value_that_is_not_finite_is_refused(make_run):
    run = make_run(2, 3)
    run.directory.mkdir()
    from grafting_cifar.models import build

    state = build("resnet20", 2).state_dict()
    state["layer2.0.conv1.weight"][0] = float("nan")
    torch.save({"net": state}, run.checkpoint(2, 0))
    first = run.start(1)
    assert first.wait() == 1
    assert "layer2.0.conv1.weight: its neighbour holds a value that is not finite" in first.sentence()


def test_a_second_process_of_the_same_network_is_refused_and_the_first_unharmed(make_run, undisturbed):
    run = make_run(2, 3)
    first = run.start(1)
    run.reaches(1, "waiting")
    before = {path: path.read_bytes() for path in run.directory.iterdir() if path.name != "network1.json"}
    for flags in (), ("--resume",):
        again = Process(CIFAR, run.arguments(1, *flags), run.logs / "again.log")
        assert again.wait() == 1
        said = rf"network 1 is already running in .* \(process {first.pid} on .*\); wait for its end or stop it "
        assert re.match(said, again.sentence())
    assert {path: path.read_bytes() for path in run.directory.iterdir() if path.name != "network1.json"} == before
    assert run.status(1)["pid"] == first.pid
    assert run.start(2).wait() == 0
    assert first.wait() == 0
    assert_same_runs(run, undisturbed(2, 3))


def test_a_directory_that_holds_a_run_is_refused(make_run):
    run = make_run(2, 3).finish()
    before = {path: path.read_bytes() for path in run.directory.iterdir()}
    again = Process(CIFAR, run.arguments(1), run.logs / "again.log")
    assert again.wait() == 1
    said = rf"network 1 has already run in {run.directory} \(state done, epoch 2\): there is ckpt1_2\.t7\. Continue "
    assert re.match(said, again.sentence())
    assert {path: path.read_bytes() for path in run.directory.iterdir()} == before


def test_a_baseline_touches_nobody(make_run):
    run = make_run(1, 3).finish()
    names = {path.name for path in run.directory.iterdir()}
    checkpoints = {"best1.t7", "ckpt0_1.t7", "ckpt0_2.t7", "final1.t7"}
    assert names == checkpoints | {"metrics1.csv", "network1.json", "network1.lock", "run.json", "run.lock"}
    final, last = load(run.directory / "final1.t7"), load(run.checkpoint(1, 2))
    assert_same(final["net"], last["net"])
    assert "wait:0.00s    graft:0.00s" in run.log(1)


def test_a_ring_of_eight_comes_to_its_end_in_any_order(make_run):
    run = make_run(8, 2)
    processes = [run.start(network) for network in (5, 1, 8, 2, 7, 3, 6, 4)]
    assert [process.wait() for process in processes] == [0] * 8
    runs = {load(run.directory / f"ckpt{network % 8}_1.t7")["run"] for network in range(1, 9)}
    assert runs == {json.loads((run.directory / "run.json").read_text())["run"]}


@pytest.mark.parametrize(("networks", "foreign"), [(2, 2), (3, 1)])
def test_a_process_that_knows_only_the_wire_format_sits_in_the_ring(make_run, networks, foreign):
    run = make_run(networks, 4)
    arguments = [str(run.directory), str(foreign), str(networks), str(run.epochs)]
    stand_in = Process(STAND_IN, arguments, run.logs / "stand_in.log")
    run.started.append(stand_in)
    ours = [run.start(network, plan=[["quicken"]]) for network in range(1, networks + 1) if network != foreign]
    for process in [*ours, stand_in]:
        assert process.wait() == 0, process.output()
    reader = foreign % networks + 1
    with open(run.directory / f"coefficients{reader}.csv") as file:
        assert len(list(csv.DictReader(file))) == 3 * 19


def test_a_stand_in_that_is_slow_is_described_by_its_files(make_run):
    run = make_run(2, 3)
    run.directory.mkdir()
    from grafting_cifar.models import build

    torch.save({"net": build("resnet20", 2).state_dict()}, run.checkpoint(2, 0))
    run.start(1, plan=[["quicken"]])
    says(run, 1, "network 2 keeps no status file; its newest checkpoint is of epoch 0")
