"""Networks that are killed again and again."""

import random
import signal
import time

import pytest
from processes import DEADLINE, assert_same_runs, until


@pytest.mark.parametrize(
    ("networks", "epochs", "kills", "least"),
    [
        (2, 8, 8, 1),  # on a fast machine, networks are done before the last kills
        pytest.param(8, 30, 100, 10, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_kills_of_random_networks_at_random_moments_change_nothing(
    make_run, undisturbed, networks, epochs, kills, least
):
    run, schedule, struck = make_run(networks, epochs), random.Random(1), 0
    processes = {network: run.start(network) for network in range(1, networks + 1)}

    def progress() -> int:
        return sum(run.status(network).get("epoch") or 0 for network in processes)

    def outputs() -> str:
        return "\n".join(process.output() for process in processes.values())

    for moment in sorted(schedule.uniform(0, 0.95 * networks * (epochs - 1)) for _ in range(kills)):
        until(lambda moment=moment: progress() >= int(moment), 5 * DEADLINE, outputs)
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
    assert struck >= least
    assert_same_runs(run, undisturbed(networks, epochs))
