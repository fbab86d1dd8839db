"""Results as the queue of experiments leaves them, with figures that a test chooses."""

import json

import pandas as pd

from experiments.tables import TABLES, runs

RUNS = {(run.name, run.seed): run for run in runs(TABLES, "small", 100)}


def write_run(root, name, seed, accuracies, *, validation=None, invalid=(36, 35), information=None, **settings):
    """A finished run of the preset small whose network i has accuracies[i - 1], one per epoch."""
    folder = root / "small" / name / f"seed{seed}"
    folder.mkdir(parents=True)
    for i, values in enumerate(accuracies, 1):
        columns = {"epoch": range(len(values)), "test_accuracy": values, "best": max(values)}
        columns |= {"train_seconds": 3, "test_seconds": 1, "wait_seconds": 0, "graft_seconds": 0}
        columns |= {"val_accuracy": validation[i - 1] if validation else None}
        columns |= {"invalid_0.1": invalid[0], "invalid_0.01": invalid[1]}
        columns |= {"information": information} if information else {}
        pd.DataFrame(columns).to_csv(folder / f"metrics{i}.csv", index=False)
        rows = [(epoch, f"layer{k}", 0.4 + k / 100) for epoch in range(len(values) - 1) for k in range(3)]
        frame = pd.DataFrame(rows, columns=["epoch", "layer", "coefficient"])
        frame.to_csv(folder / f"coefficients{i}.csv", index=False)
    filters = {"total": 1136, "shortcut_total": 0, "invalid": {"0.1": invalid[0], "0.01": invalid[1]}}
    filters["shortcut_invalid"] = {"0.1": 0, "0.01": 0}
    own = {"epochs": len(accuracies[0]), "val": 500 * bool(validation)}
    write_record(folder, settings=own | settings, filters=[filters] * len(accuracies))
    return folder


def write_ensemble(root, name, seed, ensemble, alone):
    folder = root / "small" / name / f"seed{seed}"
    folder.mkdir(parents=True)
    members = RUNS[name, seed].members
    figures = {"members": members, "ensemble": ensemble, "networks": alone, "weight_average": 10.0 if seed else None}
    write_record(folder, ensemble=figures)
    return folder


def write_record(folder, **more):
    run = RUNS[folder.parent.name, int(folder.name[4:])]
    record = {"command": run.command, "hardware": "2 cores", "versions": {"python": "3.11", "torch": "2.9"}}
    (folder / "result.json").write_text(json.dumps(record | more))
