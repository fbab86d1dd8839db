"""Rings of real processes: typed by hand, started late, killed, and foreign."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from processes import CIFAR, Process, assert_same, assert_same_runs, environment, read_table, until

from filter_grafting.checkpoint import load

STAND_IN = Path(__file__).with_name("stand_in.py")


def test_a_ring_of_three_comes_to_its_end(make_run):
    run = make_run(3, 3).finish()
    for network in (1, 2, 3):
        status = run.status(network)
        assert (status["state"], status["epoch"], status["epochs"], status["steps"]) == ("done", 2, 3, 2)
        assert "--i" in status["command"] and len(list(run.directory.glob(f"ckpt{network % 3}_*.t7"))) <= 4
        final = load(run.directory / f"final{network}.t7")
        assert (final["epoch"], final["settings"]["model"], final["classes"]) == (2, "ranks:tiny", ["one", "two"])
        assert final["best"] == load(run.directory / f"best{network}.t7")["accuracy"] == status["best"]
        assert len(read_table(run.directory / f"coefficients{network}.csv")) == 2 * 2  # no graft after the last epoch
    first, second = (load(run.directory / f"final{network}.t7")["net"]["0.weight"] for network in (1, 2))
    assert not torch.equal(first, second)


def test_the_published_lines_run_as_they_stand(images, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    line = (
        "CUDA_VISIBLE_DEVICES= nohup {python} {script} --s checkpoint/x --cifar 10 --model resnet20 --num 2 --i {i} "
        "--data {data} --epochs 1 >checkpoint/{i}.log 2>&1 &"
    )
    words = {"python": sys.executable, "script": CIFAR, "data": images}
    lines = "\n".join(line.format(i=i, **words) for i in (1, 2))
    subprocess.run(["bash", "-c", f"{lines}\nwait"], cwd=tmp_path, check=True, env=environment())
    for i in (1, 2):
        assert f"Network:{i}    epoch:0    accuracy:" in (tmp_path / "checkpoint" / f"{i}.log").read_text()


def test_a_network_may_start_late_while_another_process_of_the_first_is_refused(make_run, undisturbed):
    run = make_run(2, 3)
    first = run.start(1, plan=[["quicken"]])
    until(lambda: "start it with: " in run.log(1), what=lambda: run.log(1))
    assert ": network 2 has not started; start it with: " in run.log(1)
    line = run.log(1).partition("start it with: ")[2].splitlines()[0]
    assert re.match(rf"python3?[\d.]* {CIFAR} --s {run.directory} ", line) and line.endswith("--i 2 --resume")
    assert (run.status(1)["state"], run.status(1)["detail"]) == ("waiting", "for network 2")

    before = {path: path.read_bytes() for path in run.directory.iterdir() if path.name != "network1.json"}
    again = Process(CIFAR, run.arguments(1, "--resume"), run.logs / "again.log")
    assert again.wait() == 1
    assert re.match(rf"network 1 is already running in .* \(process {first.pid} on .*\); wait", again.sentence())
    assert {path: path.read_bytes() for path in run.directory.iterdir() if path.name != "network1.json"} == before

    assert (run.start(2).wait(), first.wait()) == (0, 0)
    assert_same_runs(run, undisturbed(2, 3))
    assert float(read_table(run.directory / "metrics1.csv")[1]["wait_seconds"]) > 0.5


def test_a_neighbour_that_dies_is_waited_for_until_the_timeout(make_run, undisturbed):
    run = make_run(2, 3)
    first = run.start(1, "--timeout", "0.03", plan=[["quicken"]])
    second = run.start(2, plan=[["at", "before rename ckpt0_1.t7", 1, "kill"]])
    assert second.wait() == -signal.SIGKILL
    assert first.wait() == 3
    died = r"network 2 died at epoch 1, step 1 \(killed\?\); continue it with: python.* --i 2 --resume"
    said = rf"network 1 gave up after \d+ s of waiting for network 2 \(round 1\): {died}\..*--timeout.*\n"
    assert re.fullmatch(said, first.sentence())
    assert run.status(1)["state"] == "failed"
    run.finish("--resume")
    assert_same_runs(run, undisturbed(2, 3))


def test_a_neighbour_that_does_not_fit_ends_the_network_in_one_sentence(make_run):
    run = make_run(2, 3)
    run.directory.mkdir()
    torch.save({"net": ranks.tiny(2).state_dict() | {"more": torch.zeros(1)}}, run.checkpoint(2, 0))
    first = run.start(1)
    assert first.wait() == 1
    assert first.sentence().startswith(f"{run.checkpoint(2, 0)}: more: in the network missing")
    assert first.sentence().count("\n") == 1


@pytest.mark.parametrize(("networks", "foreign"), [(3, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_process_that_knows_only_the_wire_format_sits_in_the_ring(make_run, networks, foreign):
    run = make_run(networks, 4, "--model", "resnet20")
    arguments = [str(run.directory), str(foreign), str(networks), str(run.epochs)]
    stand_in = Process(STAND_IN, arguments, run.logs / "stand_in.log")
    run.started.append(stand_in)
    ours = [run.start(network, plan=[["quicken"]]) for network in range(1, networks + 1) if network != foreign]
    for process in [*ours, stand_in]:
        assert process.wait() == 0, process.output()
    reader = foreign % networks + 1
    assert len(read_table(run.directory / f"coefficients{reader}.csv")) == 3 * 19


def test_a_baseline_exchanges_nothing_whatever_variables_another_job_has_left(make_run):
    run, variables = make_run(1, 3), {"RANK": "1", "WORLD_SIZE": "", "LOCAL_RANK": "3"}
    process = run.start(1, plan=[["set_environment", variables]])
    assert process.wait() == 0, process.output()
    names = {path.name for path in run.directory.iterdir()}
    checkpoints = {"best1.t7", "ckpt0_1.t7", "ckpt0_2.t7", "final1.t7"}
    assert names == checkpoints | {"metrics1.csv", "network1.json", "network1.lock", "run.json", "run.lock"}
    assert_same(load(run.directory / "final1.t7")["net"], load(run.checkpoint(1, 2))["net"])
