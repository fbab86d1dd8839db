"""Results as the queue of experiments leaves them, with figures that a test chooses."""

import json

COLUMNS = "epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy,best,"
COLUMNS += "train_seconds,test_seconds,wait_seconds,graft_seconds,val_accuracy,invalid_0.1,invalid_0.01\n"


def write_run(root, run, seed, accuracies, *, validation=None, invalid=(36, 35), coefficients=False, preset="small",
              **settings):  # fmt: skip
    """A finished run whose network i has accuracies[i - 1], one per epoch."""
    folder = root / preset / run / f"seed{seed}"
    folder.mkdir(parents=True)
    num, epochs = len(accuracies), len(accuracies[0])
    for i, values in enumerate(accuracies, 1):
        judged = validation[i - 1] if validation else [""] * epochs
        rows = [
            f"{epoch},0.1,1,50,1,{value},{max(values)},3,1,0,0,{judge},{invalid[0]},{invalid[1]}\n"
            for epoch, (value, judge) in enumerate(zip(values, judged, strict=True))
        ]
        (folder / f"metrics{i}.csv").write_text(COLUMNS + "".join(rows))
        if coefficients:
            rows = [f"{epoch},layer{k},1.1,1.2,0.{40 + k}\n" for epoch in range(epochs - 1) for k in range(3)]
            text = "epoch,layer,own_entropy,neighbour_entropy,coefficient\n" + "".join(rows)
            (folder / f"coefficients{i}.csv").write_text(text)
    counts = {"0.1": invalid[0], "0.01": invalid[1]}
    filters = {"total": 1136, "shortcut_total": 0, "invalid": counts, "shortcut_invalid": {"0.1": 0, "0.01": 0}}
    settings = {
        "model": "resnet20",
        "num": num,
        "epochs": epochs,
        "val": 500 * bool(validation),
        "seed": seed,
    } | settings
    write_record(folder, settings, networks=num, filters=[filters] * num)
    return folder


def write_ensemble(root, run, seed, members, ensemble, alone, preset="small"):
    folder = root / preset / run / f"seed{seed}"
    folder.mkdir(parents=True)
    figures = {"members": members, "ensemble": ensemble, "networks": alone, "weight_average": 10.0 if seed else None}
    write_record(folder, {}, ensemble=figures)


def write_record(folder, settings, **more):
    record = {
        "name": folder.parent.name, "preset": folder.parents[1].name, "seed": int(folder.name[4:]),
        "command": "python …", "settings": settings, "hardware": "2 cores",
        "versions": {"python": "3.11", "torch": "2.9"}, "finished": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(record | more))
