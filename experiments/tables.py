"""Every table of the published README, and two of ours, as data: the rows, their flags and the published figures.

A row is (model, method, flags, published figures by data set). It is compared with the last row above it whose method
begins with "baseline". Rows of equal flags are one run, in whichever tables they stand.

The published figures are those of the README of github.com/fxmeng/filter-grafting (accuracy in percent).
"""

import shlex
from collections.abc import Iterable
from typing import NamedTuple

SLR, DLR = "--num 2", "--num 2 --difflr --cos"
COSINE = "baseline, cosine", "--num 1 --cos"  # ours, wherever the paper compares grafting on a cosine with steps
PUBLISHED = "the README of github.com/fxmeng/filter-grafting"
OURS = "not in the paper"


class Entry(NamedTuple):
    """A row on one data set."""

    run: str  # its name; one for each seed
    paper: float | str | None  # the published figure


class Row(NamedTuple):
    label: str
    baseline: str | None  # label of the row that it is compared with; None: it is a baseline itself
    cells: dict[str, Entry]  # by data set


class Table(NamedTuple):
    name: str
    title: str
    note: str
    kind: str  # what is reported: "accuracy", "filters" (invalid ones) or "top5" (top-1 and top-5 accuracy)
    rows: list[Row]
    source: str  # of the published figures


class Run(NamedTuple):
    """One run of a ring, or an ensemble of the networks of other runs."""

    name: str
    seed: int
    script: str  # its folder: grafting_cifar or grafting_imagenet
    data: str  # what --data must hold: cifar10, cifar100, imagenet, glyphs
    flags: tuple[str, ...]
    networks: int
    epochs: int
    members: tuple[tuple[str, int], ...] = ()  # (name, seed) of an ensemble's runs

    @property
    def member_names(self) -> list[str]:
        return [f"{name}/seed{seed}" for name, seed in self.members]

    @property
    def recipe(self) -> str:
        """The command that its results are of, wherever they and the images lie."""
        if self.members:
            return shlex.join(["python", "grafting_cifar/ensemble.py", *self.member_names])
        return shlex.join(["python", f"{self.script}/grafting.py", *self.flags])


class Preset(NamedTuple):
    cifar: str  # flags added to every run on the CIFAR data sets
    epochs: int
    imagenet: str  # the same of ImageNet
    imagenet_epochs: int
    datasets: dict[str, str]  # what stands in for a table's data sets, by label: the name of the data
    models: dict[str, str]  # the models that stand in for others


_SMALL_MODELS = {
    "resnet32": "resnet20", "resnet56": "resnet20", "resnet110": "resnet20", "mobilenetv2": "resnet20",
    "resnet32_leaky": "resnet20_leaky", "resnet56_leaky": "resnet20_leaky", "resnet110_leaky": "resnet20_leaky",
    "resnet34": "resnet18", "resnet50": "resnet18",
}  # fmt: skip
PRESETS = {
    "paper": Preset(
        "", 200, "", 90, {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet": "imagenet"}, {}),
    # For 2 cores without a GPU. A thirtieth of the steps, the learning rate falling at the same shares of them.
    "small": Preset(
        "--epochs 30 --step_epochs 9 --images 10000 --test_images 5000 --val 2000 --amp", 30, "", 90,
        {"CIFAR-10": "cifar10"}, _SMALL_MODELS),
    # Shows that everything runs; the figures mean nothing.
    "smoke": Preset(
        "--epochs 2 --step_epochs 1 --images 96 --test_images 64 --val 32 --batch_size 32", 2,
        "--epochs 2 --image_size 32 --batch-size 16 --workers 1", 2,
        {"CIFAR-10": "glyphs", "ImageNet": "imagenet"}, _SMALL_MODELS),
}  # fmt: skip

MODELS = {
    "resnet20": "ResNet-20", "resnet32": "ResNet-32", "resnet56": "ResNet-56", "resnet110": "ResNet-110",
    "resnet20_leaky": "ResNet-20, leaky ReLU", "resnet32_leaky": "ResNet-32, leaky ReLU",
    "resnet56_leaky": "ResNet-56, leaky ReLU", "resnet110_leaky": "ResNet-110, leaky ReLU",
    "mobilenetv2": "MobileNetV2", "vgg16": "VGG-16",
    "resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50",
}  # fmt: skip
_CIFAR = ("CIFAR-10", "CIFAR-100")

_SCHEDULE = (
    "The published baseline is on the former schedule in either case; the baseline on a cosine is ours, and what "
    "grafting (dlr) is compared with here."
)
_COSINE = "The published baseline is on steps, grafting on a cosine; the baseline on a cosine is ours."

# name: (title, note, kind, source, data sets, rows)
_TABLES = {
    "main": (
        "Main results",
        "slr: both networks start at the learning rate 0.1, which falls to a tenth every 60 of 200 epochs (of a "
        "shorter preset: at about the same shares). dlr: they "
        f"start at 0.05 and 0.1, and follow a cosine. {_SCHEDULE}",
        "accuracy", PUBLISHED, _CIFAR,
        [
            ("resnet32", "baseline", "--num 1", 92.83, 69.82),
            ("resnet32", "grafting (slr)", SLR, 93.33, 71.16),
            ("resnet32", *COSINE, None, None),
            ("resnet32", "grafting (dlr)", DLR, 93.94, 71.28),
            ("resnet56", "baseline", "--num 1", 93.50, 71.55),
            ("resnet56", "grafting (slr)", SLR, 94.28, 73.09),
            ("resnet56", *COSINE, None, None),
            ("resnet56", "grafting (dlr)", DLR, 94.73, 72.83),
            ("resnet110", "baseline", "--num 1", 93.81, 73.21),
            ("resnet110", "grafting (slr)", SLR, 94.60, 74.70),
            ("resnet110", *COSINE, None, None),
            ("resnet110", "grafting (dlr)", DLR, 94.96, 75.27),
            ("mobilenetv2", "baseline", "--num 1", 92.42, 71.44),
            ("mobilenetv2", "grafting (slr)", SLR, 93.53, 73.26),
            ("mobilenetv2", *COSINE, None, None),
            ("mobilenetv2", "grafting (dlr)", DLR, 94.20, 74.15),
        ],
    ),
    "fair": (
        "Fair baselines",
        "What a user would do instead of grafting, on the same two schedules: tune the learning rate of a single "
        "network, average its weights over time (ema), average two networks as often as grafting does (coefficient "
        "1/2), or train two and average their predictions (ensemble; it costs twice as much to use). Training one "
        "network for twice the epochs costs as much, too. The time constant of ema, 5 % of all steps, is not tuned.",
        "accuracy", OURS, _CIFAR[:1],
        [
            ("resnet32", "baseline: step, lr 0.1", "--num 1"),
            ("resnet32", "step, lr 0.05", "--num 1 --lr 0.05"),
            ("resnet32", "step, lr 0.02", "--num 1 --lr 0.02"),
            ("resnet32", "step, ema", "--num 1 --method ema"),
            ("resnet32", "step, average of 2", f"{SLR} --method average"),
            ("resnet32", "step, ensemble of 2", "2 x --num 1"),
            ("resnet32", "step, grafting (slr)", SLR),
            ("resnet32", "baseline: cosine, lr 0.1", "--num 1 --cos"),
            ("resnet32", "cosine, lr 0.05", "--num 1 --cos --lr 0.05"),
            ("resnet32", "cosine, lr 0.02", "--num 1 --cos --lr 0.02"),
            ("resnet32", "cosine, twice the epochs", "--num 1 --cos --epochs 2x"),
            ("resnet32", "cosine, ema", "--num 1 --cos --method ema"),
            ("resnet32", "cosine, average of 2 (dlr)", f"{DLR} --method average"),
            ("resnet32", "cosine, ensemble of 2", "2 x --num 1 --cos"),
            ("resnet32", "cosine, grafting at equal rates", "--num 2 --cos"),
            ("resnet32", "cosine, grafting (dlr)", DLR),
        ],
    ),
    "networks": (
        "Number of networks",
        f"More networks in the ring, and an ensemble of six single ones. {_COSINE}",
        "accuracy", PUBLISHED, _CIFAR,
        [
            ("mobilenetv2", "baseline", "--num 1", 92.42, 71.44),
            ("mobilenetv2", "ensemble of 6", "6 x --num 1", 94.09, 76.75),
            ("mobilenetv2", *COSINE, None, None),
            ("mobilenetv2", "grafting of 2", "--num 2 --difflr --cos", 94.20, 74.15),
            ("mobilenetv2", "grafting of 3", "--num 3 --difflr --cos", 94.55, 76.21),
            ("mobilenetv2", "grafting of 4", "--num 4 --difflr --cos", 95.23, 77.08),
            ("mobilenetv2", "grafting of 6", "--num 6 --difflr --cos", 95.33, 78.32),
            ("mobilenetv2", "grafting of 8", "--num 8 --difflr --cos", 95.20, 77.76),
        ],
    ),
    "filters": (
        "Invalid filters",
        "Filters with an L1 norm below 0.1 and below 0.01 after training. The data set and the learning rates of "
        f"the published counts are not stated; CIFAR-10 and dlr are taken. {_COSINE}",
        "filters", PUBLISHED, _CIFAR[:1],
        [
            ("resnet32", "baseline", "--num 1", "36/1136 and 35/1136"),
            ("resnet32", *COSINE, None),
            ("resnet32", "grafting (dlr)", DLR, "14/1136 and 8/1136"),
            ("mobilenetv2", "baseline", "--num 1", "10929/17088 and 9834/17088"),
            ("mobilenetv2", *COSINE, None),
            ("mobilenetv2", "grafting (dlr)", DLR, "9903/17088 and 8492/17088"),
        ],
    ),
    "leaky": (
        "Leaky ReLU",
        "Without filters that die of a gradient of 0. The published table calls all three networks resnet32; their "
        f"accuracies are taken for those of 32, 56 and 110 layers, and its grafting for dlr. {_COSINE}",
        "accuracy", PUBLISHED, _CIFAR,
        [
            ("resnet32_leaky", "baseline", "--num 1", 93.28, 70.04),
            ("resnet32_leaky", *COSINE, None, None),
            ("resnet32_leaky", "grafting (dlr)", DLR, 93.60, 70.93),
            ("resnet56_leaky", "baseline", "--num 1", 94.03, 72.24),
            ("resnet56_leaky", *COSINE, None, None),
            ("resnet56_leaky", "grafting (dlr)", DLR, 94.32, 73.14),
            ("resnet110_leaky", "baseline", "--num 1", 93.24, 73.34),
            ("resnet110_leaky", *COSINE, None, None),
            ("resnet110_leaky", "grafting (dlr)", DLR, 93.97, 73.82),
        ],
    ),
    "level": (
        "Layer level and filter level",
        "One coefficient for a layer, or one for each of its filters. The published learning rates are not stated; "
        f"dlr is taken. {_COSINE}",
        "accuracy", PUBLISHED, _CIFAR,
        [
            ("vgg16", "baseline", "--num 1", 93.68, 73.41),
            ("vgg16", *COSINE, None, None),
            ("vgg16", "grafting (dlr), layer", DLR, 94.02, 74.28),
            ("vgg16", "grafting (dlr), filter", f"{DLR} --level filter", 94.26, 74.63),
        ],
    ),
    "coefficient": (
        "A and c",
        "How far the coefficient may lie from 1/2 (A), and how steeply it follows the entropies (c). The "
        "learning rates of the published table are not stated; slr is taken. A 0.4, c 500 are then the settings of "
        "grafting (slr) in the main results, where 93.53 and 73.26 are published for them.",
        "accuracy", PUBLISHED, _CIFAR,
        [
            ("mobilenetv2", "baseline", "--num 1", 92.42, 71.44),
            ("mobilenetv2", "A 0.4, c 1", f"{SLR} --c 1", 93.19, 73.30),
            ("mobilenetv2", "A 0.4, c 5", f"{SLR} --c 5", 92.76, 72.69),
            ("mobilenetv2", "A 0.4, c 10", f"{SLR} --c 10", 93.31, 73.26),
            ("mobilenetv2", "A 0.4, c 50", f"{SLR} --c 50", 93.24, 73.05),
            ("mobilenetv2", "A 0.4, c 500", SLR, 92.79, 72.38),
            ("mobilenetv2", "A 0, c 100", f"{SLR} --method average", 93.40, 72.55),  # the same: c is of no account
            ("mobilenetv2", "A 0.2, c 100", f"{SLR} --a 0.2 --c 100", 93.61, 72.90),
            ("mobilenetv2", "A 0.4, c 100", f"{SLR} --c 100", 93.46, 73.13),
            ("mobilenetv2", "A 0.6, c 100", f"{SLR} --a 0.6 --c 100", 92.60, 72.68),
            ("mobilenetv2", "A 0.8, c 100", f"{SLR} --a 0.8 --c 100", 93.03, 71.80),
            ("mobilenetv2", "A 1, c 100", f"{SLR} --a 1 --c 100", 92.53, 72.27),
        ],
    ),
    "scions": (
        "Scions",
        "What is grafted: noise or filters of its own, onto the invalid filters of a single network; or the weights of "
        "another network (external). All at the learning rate 0.1 with steps.",
        "accuracy", OURS, _CIFAR,
        [
            ("resnet32", "baseline", "--num 1"),
            ("resnet32", "noise", "--num 1 --scion noise"),
            ("resnet32", "internal", "--num 1 --scion internal"),
            ("resnet32", "external", SLR),
        ],
    ),
    "imagenet": (
        "ImageNet",
        "Top-1 and top-5 accuracy.",
        "top5", PUBLISHED, ("ImageNet",),
        [
            ("resnet18", "baseline", "--num 1", "69.15 / 88.87"),
            ("resnet18", "grafting", SLR, "71.19 / 90.01"),
            ("resnet34", "baseline", "--num 1", "72.60 / 90.91"),
            ("resnet34", "grafting", SLR, "74.58 / 92.05"),
            ("resnet50", "baseline", "--num 1", "75.92 / 92.81"),
            ("resnet50", "grafting", SLR, "76.76 / 93.34"),
        ],
    ),
}  # fmt: skip
NAMES = tuple(_TABLES)
SEEDS = 100  # at most; seed k's ensemble has the networks of seeds k, 100 + k, 200 + k ...: no two share one


def tables(preset: str) -> dict[str, Table]:
    """The tables of a preset; those without a data set there are left out."""
    return {name: table for name in _TABLES if (table := _table(name, PRESETS[preset])).rows}


def _table(name: str, preset: Preset) -> Table:
    title, note, kind, source, datasets, declared = _TABLES[name]
    rows, baseline = {}, None
    for model, method, flags, *figures in declared:
        stand_in = preset.models.get(model, model)
        label = f"{MODELS[stand_in]}, {method}"
        cells = {}
        for dataset, figure in zip(datasets, figures or [None] * len(datasets), strict=True):
            if dataset in preset.datasets:
                paper = figure if stand_in == model and preset.epochs == 200 else None
                data = preset.datasets[dataset]
                cells["glyphs" if data == "glyphs" else dataset] = Entry(_run_name(data, stand_in, flags), paper)
        baseline = label if method.startswith("baseline") else baseline
        if cells and label not in rows:  # models with the same stand-in: one row is enough
            rows[label] = Row(label, None if baseline == label else baseline, cells)
    return Table(name, title, note, kind, list(rows.values()), source)


def runs(names: Iterable[str], preset_name: str, seeds: int) -> list[Run]:
    """All runs of the tables, each once; an ensemble comes after its members."""
    preset, found = PRESETS[preset_name], {}
    for name in names:
        datasets, declared = _TABLES[name][4:]
        for model, _, flags, *_ in declared:
            for dataset in datasets:
                if dataset not in preset.datasets:
                    continue
                for seed in range(seeds):
                    for run in _runs(preset, preset.datasets[dataset], preset.models.get(model, model), flags, seed):
                        found.setdefault((run.name, run.seed), run)
    return list(found.values())


def _runs(preset: Preset, data: str, model: str, flags: str, seed: int) -> list[Run]:
    """The run of a row's flags; of an ensemble ("6 x --num 1"), first those of its members."""
    count, _, of_one = flags.rpartition(" x ")
    if count:
        members = [
            run for k in range(int(count)) for run in _runs(preset, data, model, of_one, seed + k * SEEDS)
        ]
        pairs = tuple((member.name, member.seed) for member in members)
        return [*members, members[0]._replace(name=_run_name(data, model, flags), seed=seed, flags=(), members=pairs)]
    on_imagenet = data == "imagenet"
    epochs = preset.imagenet_epochs if on_imagenet else preset.epochs
    if "--epochs 2x" in of_one:
        epochs *= 2
    words = ["--arch" if on_imagenet else "--model", model, *(["--cifar", "100"] if data == "cifar100" else [])]
    words += (preset.imagenet if on_imagenet else preset.cifar).split() + of_one.split()
    words = [str(epochs) if word == "2x" else word for word in words]  # the last --epochs counts
    networks = int(words[words.index("--num") + 1])
    script = "grafting_imagenet" if on_imagenet else "grafting_cifar"
    return [Run(_run_name(data, model, of_one), seed, script, data, (*words, "--seed", str(seed)), networks, epochs)]


def _run_name(data: str, model: str, flags: str) -> str:
    """cifar10_resnet32_num2_difflr_cos; a value that says by itself what it is stands alone, as in _num1_ema."""
    count, _, of_one = flags.rpartition(" x ")
    parts = [data, model]
    for word in of_one.split():
        if word.startswith("--"):
            parts.append(word.removeprefix("--"))
        else:
            parts[-1] = parts[-1] + word if word[0].isdigit() else word
    return "_".join([*parts, f"ensemble{count}"] if count else parts)
