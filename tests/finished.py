"""Results as the queue of experiments leaves them, with figures that a test chooses."""

import json

import pandas as pd

from experiments.tables import TABLES, runs

RUNS = {(run.name, run.seed): run for run in runs(TABLES, "small", 100)}


def write_run(
    root, name, seed, accuracies, *, validation=None, invalid=(36, 35), information=None, coefficients=False, **settings
):
    """A finished run of the preset small whose network i has accuracies[i - 1], one per epoch."""
    folder = root / "small" / name / f"seed{seed}"
    folder.mkdir(parents=True)
    for i, values in enumerate(accuracies, 1):
        columns = {"epoch": range(len(values)), "lr": 0.1, "test_accuracy": values, "best": max(values)}
        columns |= {"train_seconds": 3, "test_seconds": 1, "wait_seconds": 0, "graft_seconds": 0}
        columns |= {"val_accuracy": validation[i - 1] if validation else None}
        columns |= {"invalid_0.1": invalid[0], "invalid_0.01": invalid[1]}
        columns |= {"information": information} if information else {}
        pd.DataFrame(columns).to_csv(folder / f"metrics{i}.csv", index=False)
        if coefficients:
            rows = [(epoch, f"layer{k}", 0.4 + k / 100) for epoch in range(len(values) - 1) for k in range(3)]
            frame = pd.DataFrame(rows, columns=["epoch", "layer", "coefficient"])
            frame.to_csv(folder / f"coefficients{i}.csv", index=False)
    counts = {"0.1": invalid[0], "0.01": invalid[1]}
    filters = {"total": 1136, "shortcut_total": 0, "invalid": counts, "shortcut_invalid": {"0.1": 0, "0.01": 0}}
    num, epochs = len(accuracies), len(accuracies[0])
    own = {"model": "resnet20", "num": num, "epochs": epochs, "val": 500 * bool(validation), "seed": seed}
    write_record(folder, settings=own | settings, networks=num, filters=[filters] * num)
    return folder


def write_ensemble(root, name, seed, ensemble, alone):
    folder = root / "small" / name / f"seed{seed}"
    folder.mkdir(parents=True)
    members = RUNS[name, seed].members
    figures = {"members": members, "ensemble": ensemble, "networks": alone, "weight_average": 10.0 if seed else None}
    write_record(folder, networks=1, ensemble=figures)
    return folder


def write_record(folder, **more):
    name, seed = folder.parent.name, int(folder.name[4:])
    record = {"name": name, "preset": "small", "seed": seed, "command": RUNS[name, seed].command, "hardware": "2 cores"}
    record |= {"versions": {"python": "3.11", "torch": "2.9"}, "finished": "2026-01-01T00:00:00Z"}
    (folder / "result.json").write_text(json.dumps(record | more))


def change(folder, **more):
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
