"""Networks that are killed again and again."""

import random
import signal
import time

import pytest
from processes import DEADLINE, assert_same_runs, until


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


def test_eight_kills_change_nothing(make_run, undisturbed):
    run = make_run(2, 8)
    assert storm(run, kills=8, seed=1) >= 1  # on a fast machine, networks are done before the last kills
    assert_same_runs(run, undisturbed(2, 8))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_of_eight_networks_change_nothing(make_run, undisturbed):
    run = make_run(8, 30)
    assert storm(run, kills=100, seed=2) >= 10
    assert_same_runs(run, undisturbed(8, 30))
