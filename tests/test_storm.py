"""Networks that are killed again and again, and networks that run for long."""

import random
import re
import signal
import time
from pathlib import Path

import pytest
from processes import DEADLINE, assert_same_runs, read_table, until


def storm(run, kills: int, seed: int) -> int:
    """Kills random networks at random moments, spread over the whole run, and continues each; returns how many."""
    schedule = random.Random(seed)
    processes = {network: run.start(network) for network in range(1, run.networks + 1)}
    total, struck = run.networks * (run.epochs - 1), 0

    def progress() -> int:
        return sum(run.status(network).get("epoch") or 0 for network in processes)

    for moment in sorted(schedule.uniform(0, 0.95 * total) for _ in range(kills)):
        until(lambda moment=moment: progress() >= int(moment), 5 * DEADLINE, lambda: outputs(processes))
        time.sleep(schedule.uniform(0, 0.3))
        victims = [network for network, process in processes.items() if process.poll() is None]
        schedule.shuffle(victims)
        for victim in victims:
            processes[victim].kill()
            if processes[victim].status == -signal.SIGKILL:  # it had not come to its end just before
                struck += 1
                processes[victim] = run.start(victim, "--resume")
                break
    for process in processes.values():
        assert process.wait(5 * DEADLINE) == 0, process.output()
    return struck


def outputs(processes) -> str:
    return "\n".join(process.output() for process in processes.values())


def test_twenty_kills_change_nothing(make_run, undisturbed):
    run = make_run(3, 12)
    assert storm(run, kills=20, seed=1) >= 1  # on a fast machine, networks are done before the last kills
    assert_same_runs(run, undisturbed(3, 12))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_of_eight_networks_change_nothing(make_run, undisturbed):
    run = make_run(8, 30)
    assert storm(run, kills=100, seed=2) >= 10
    assert_same_runs(run, undisturbed(8, 30))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_networks_do_not_grow(make_run):
    run = make_run(8, 20, "--model", "resnet20")
    processes = {network: run.start(network, fork=False) for network in range(1, 9)}
    memory = {network: {} for network in processes}  # the most that was in use in each epoch, in kB
    while any(process.poll() is None for process in processes.values()):
        for network, process in processes.items():
            used, status = resident(process.pid), run.status(network)
            # Not at the end: that of Python itself takes some more.
            if status.get("state") in ("training", "testing", "waiting") and used:
                memory[network][status["epoch"]] = max(used, memory[network].get(status["epoch"], 0))
        time.sleep(0.02)
    for network, process in processes.items():
        assert process.status == 0, process.output()
        assert len(read_table(run.directory / f"metrics{network}.csv")) == 20
        before = max(memory[network][epoch] for epoch in range(1, 4))
        after = max(used for epoch, used in memory[network].items() if epoch > 3)
        print(f"network {network}: {before / 1024:.0f} MB up to epoch 3, {after / 1024:.0f} MB after it")
        assert after <= 1.02 * before


def resident(pid: int) -> int:
    try:
        match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) if match else 0  # a process that has just ended has none
