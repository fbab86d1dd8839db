"""Every table of the published README, and some of ours, as data: the rows, their flags and the published figures.

A row is (model, method, flags, published figure on each data set). It is compared with the last row above it whose
method begins with "baseline". Rows of equal flags are one run, in whichever tables they stand.
"""

import shlex
from collections.abc import Iterable
from typing import NamedTuple

SLR, DLR = "--num 2", "--num 2 --difflr --cos"
PAPER = "the README of github.com/fxmeng/filter-grafting"
EXTENDED = "arXiv 2004.12311, the authors' extended paper, and the first version of their code"
RERUN = "the authors' own later rerun: a single network, last epoch, in the issues of their repository"
SEEDS = 100  # at most; seed k's ensemble has the networks of seeds k, 100 + k, 200 + k ...: no two share one


class Table(NamedTuple):
    title: str
    note: str
    rows: list[tuple]  # as declared: (model, method, flags, *published figures by data set)
    source: str = PAPER  # of the published figures
    datasets: tuple[str, ...] = ("CIFAR-10", "CIFAR-100")


class Row(NamedTuple):
    """A row of a table on one data set, with the models and images of a preset."""

    dataset: str
    label: str
    baseline: str | None  # label of the row that it is compared with; None: it is a baseline itself
    run: str  # its name; one for each seed
    paper: float | str | None  # the published figure
    data: str  # what --data must hold: cifar10, cifar100, imagenet, glyphs
    model: str
    flags: str  # "--num 2 --cos", or an ensemble's "2 x --num 1"

    @property
    def is_ensemble(self) -> bool:
        return " x " in self.flags

    @property
    def is_grafting(self) -> bool:
        """Whether networks are grafted onto each other by their weights' information."""
        return not any(word in self.flags for word in ("--num 1", "--method", "--together"))


class Run(NamedTuple):
    """One run of a ring, or an ensemble of the networks of other runs."""

    name: str
    seed: int
    script: str  # its path from the checkout's root
    data: str
    flags: tuple[str, ...]
    networks: int  # processes, one a network
    epochs: int  # of training, over all networks
    cost: float  # about how long one core or GPU takes, in epochs of ResNet-20 on CIFAR
    members: tuple[str, ...] = ()  # NAME/seedK of an ensemble's runs

    def __str__(self) -> str:
        return f"{self.name}/seed{self.seed}"

    @property
    def command(self) -> str:
        """The command that its results are of, wherever they and the images lie."""
        return shlex.join(["python", self.script, *(self.members or self.flags)])


class Preset(NamedTuple):
    cifar: str  # flags added to every run on the CIFAR data sets
    imagenet: str  # the same of ImageNet
    datasets: dict[str, str]  # what stands in for a table's data sets, by label: the name of the data
    models: dict[str, str]  # the models that stand in for others


_SMALL_MODELS = dict.fromkeys(("resnet32", "resnet56", "resnet110", "mobilenetv2", "wrn28_10"), "resnet20")
_SMALL_MODELS |= {f"resnet{depth}_leaky": "resnet20_leaky" for depth in (32, 56, 110)}
_SMALL_MODELS |= {"resnet34": "resnet18", "resnet50": "resnet18"}
PRESETS = {
    # As published, but in bfloat16 and compiled: with neither, ResNet-32 takes 1.7 times as long on an H100.
    "paper": Preset(
        "--amp --compile",
        "--amp",
        {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet": "imagenet"},
        {},
    ),
    # For 2 cores without a GPU. A thirtieth of the steps, the learning rate falling at the same shares of them.
    "small": Preset(
        "--epochs 30 --step_epochs 9 --images 10000 --test_images 5000 --val 2000 --amp",
        "",
        {"CIFAR-10": "cifar10"},
        _SMALL_MODELS,
    ),
    # A regime in which filters die, as in the paper's tables, unlike in "small": docs/results.md has the search.
    "medium": Preset(
        "--epochs 26 --step_epochs 8 --images 5000 --test_images 5000 --batch_size 32 --weight_decay 4e-3 --amp",
        "",
        {"CIFAR-10": "cifar10"},
        _SMALL_MODELS,
    ),
    # Shows that everything runs; the figures mean nothing.
    "smoke": Preset(
        "--epochs 2 --step_epochs 1 --images 96 --test_images 64 --val 32 --batch_size 32",
        "--epochs 2 --image_size 32 --batch-size 16 --workers 1",
        {"CIFAR-10": "glyphs", "ImageNet": "imagenet"},
        _SMALL_MODELS,
    ),
}

# Name, and about how long an epoch takes, in those of ResNet-20 on the images of CIFAR.
MODELS = {
    "resnet20": ("ResNet-20", 1),
    "resnet32": ("ResNet-32", 1.6),
    "resnet56": ("ResNet-56", 3),
    "resnet110": ("ResNet-110", 6),
    "resnet20_leaky": ("ResNet-20, leaky ReLU", 1),
    "resnet32_leaky": ("ResNet-32, leaky ReLU", 1.6),
    "resnet56_leaky": ("ResNet-56, leaky ReLU", 3),
    "resnet110_leaky": ("ResNet-110, leaky ReLU", 6),
    "mobilenetv2": ("MobileNetV2", 5),
    "mobilenetv2_w025": ("MobileNetV2, a quarter of its width", 0.7),
    "mobilenetv2_w050": ("MobileNetV2, half its width", 1.6),
    "mobilenetv2_w075": ("MobileNetV2, three quarters of its width", 3),
    "vgg16": ("VGG-16", 5),
    "wrn28_10": ("WRN-28-10", 90),
    "resnet18": ("ResNet-18", 1000),
    "resnet34": ("ResNet-34", 2000),
    "resnet50": ("ResNet-50", 2500),
}

_COSINE = "baseline, cosine", "--num 1 --cos"  # ours, wherever the paper compares grafting on a cosine with steps
_UNKNOWN = None, None
_ON_STEPS = (
    "The code of the published figures knew neither a cosine nor different rates: its baseline and its grafting are "
    "on the same steps, at equal rates (slr). The rows on a cosine are ours."
)


def _both_schedules(model: str, baseline: tuple, slr: tuple, dlr: tuple) -> list[tuple]:
    """Baseline and grafting on steps at equal rates, then on a cosine; each with its published figures."""
    return [
        (model, "baseline", "--num 1", *baseline),
        (model, "grafting (slr)", SLR, *slr),
        (model, *_COSINE, *_UNKNOWN[: len(dlr)]),
        (model, "grafting (dlr)", DLR, *dlr),
    ]


TABLES = {
    "main": Table(
        "Main results",
        "slr: both networks start at the learning rate 0.1, which falls to a tenth every 60 of 200 epochs (of a "
        "shorter preset: at about the same shares). dlr: they start at 0.05 and 0.1, and follow a cosine. The "
        "published baseline is on the former schedule in either case; the baseline on a cosine is ours, and what "
        "grafting (dlr) is compared with here. The schedule of the published grafting of WRN-28-10 is not stated; dlr "
        "is taken.",
        [
            *_both_schedules("resnet32", (92.83, 69.82), (93.33, 71.16), (93.94, 71.28)),
            *_both_schedules("resnet56", (93.50, 71.55), (94.28, 73.09), (94.73, 72.83)),
            *_both_schedules("resnet110", (93.81, 73.21), (94.60, 74.70), (94.96, 75.27)),
            *_both_schedules("mobilenetv2", (92.42, 71.44), (93.53, 73.26), (94.20, 74.15)),
            *_both_schedules("wrn28_10", (95.75, 80.65), _UNKNOWN, (96.40, 81.62)),
        ],
    ),
    "fair": Table(
        "Fair baselines",
        "What a user would do instead of grafting, on the same two schedules: tune the learning rate of a single "
        "network, or its recipe (Nesterov momentum, label smoothing); average its weights over time (ema; SWA: the "
        "mean of the epochs' ends, at a constant rate from 75 % of them on), average two networks as often as grafting "
        "does (coefficient 1/2), pull two towards their mean (PAPA, every 10 steps and once an epoch), let two learn "
        "from each other's predictions (mutual learning), or train two and average theirs (ensemble; it costs twice as "
        "much to use). Training one network for twice the epochs costs as much, too. The time constant of ema, 5 % of "
        "all steps, is not tuned.",
        [
            ("resnet32", "baseline: step, lr 0.1", "--num 1", None),
            ("resnet32", "step, lr 0.05", "--num 1 --lr 0.05", None),
            ("resnet32", "step, lr 0.02", "--num 1 --lr 0.02", None),
            ("resnet32", "step, ema", "--num 1 --method ema", None),
            ("resnet32", "step, average of 2", f"{SLR} --method average", None),
            ("resnet32", "step, ensemble of 2", "2 x --num 1", None),
            ("resnet32", "step, grafting (slr)", SLR, None),
            ("resnet32", "baseline: cosine, lr 0.1", "--num 1 --cos", None),
            ("resnet32", "cosine, lr 0.05", "--num 1 --cos --lr 0.05", None),
            ("resnet32", "cosine, lr 0.02", "--num 1 --cos --lr 0.02", None),
            ("resnet32", "cosine, tuned recipe", "--num 1 --cos --nesterov --label_smoothing 0.1", None),
            ("resnet32", "cosine, twice the epochs", "--num 1 --cos --epochs 2x", None),
            ("resnet32", "cosine, ema", "--num 1 --cos --method ema", None),
            ("resnet32", "cosine, SWA", "--num 1 --cos --method swa", None),
            ("resnet32", "cosine, average of 2 at equal rates", "--num 2 --cos --method average", None),
            ("resnet32", "cosine, average of 2 (dlr)", f"{DLR} --method average", None),
            ("resnet32", "cosine, PAPA of 2, once an epoch", "--num 2 --cos --method papa", None),
            ("resnet32", "cosine, PAPA of 2", "--together papa --num 2 --cos", None),
            ("resnet32", "cosine, mutual learning of 2", "--together mutual --num 2 --cos", None),
            ("resnet32", "cosine, ensemble of 2", "2 x --num 1 --cos", None),
            ("resnet32", "cosine, grafting at equal rates", "--num 2 --cos", None),
            ("resnet32", "cosine, grafting (dlr)", DLR, None),
            ("mobilenetv2", "baseline: step, lr 0.1", "--num 1", 92.48),
            ("mobilenetv2", "step, lr 0.02", "--num 1 --lr 0.02", 94.03),
            ("mobilenetv2", "step, lr 0.04", "--num 1 --lr 0.04", 93.89),
            ("mobilenetv2", "step, grafting (slr)", SLR, None),
        ],
        source=RERUN,
        datasets=("CIFAR-10",),
    ),
    "networks": Table(
        "Number of networks",
        "More networks in the ring, and an ensemble of six single ones. The published baseline is on steps, grafting "
        "on a cosine (dlr); the baseline on a cosine is ours.",
        [
            ("mobilenetv2", "baseline", "--num 1", 92.42, 71.44),
            ("mobilenetv2", "ensemble of 6", "6 x --num 1", 94.09, 76.75),
            ("mobilenetv2", *_COSINE, None, None),
            ("mobilenetv2", "grafting of 2", "--num 2 --difflr --cos", 94.20, 74.15),
            ("mobilenetv2", "grafting of 3", "--num 3 --difflr --cos", 94.55, 76.21),
            ("mobilenetv2", "grafting of 4", "--num 4 --difflr --cos", 95.23, 77.08),
            ("mobilenetv2", "grafting of 6", "--num 6 --difflr --cos", 95.33, 78.32),
            ("mobilenetv2", "grafting of 8", "--num 8 --difflr --cos", 95.20, 77.76),
        ],
    ),
    "criterion": Table(
        "Entropy or L1 norm",
        "What a layer's information is taken to be: its entropy, or the L1 norm of its weights, as the authors compare "
        "them. All on steps at equal rates.",
        [
            ("resnet32", "baseline", "--num 1", 92.83, 69.82),
            ("resnet32", "grafting by entropy", SLR, 93.33, 71.16),
            ("resnet32", "grafting by L1 norm", f"{SLR} --criterion l1", 93.24, 70.69),
            ("resnet56", "baseline", "--num 1", 93.50, 71.55),
            ("resnet56", "grafting by entropy", SLR, 94.28, 73.09),
            ("resnet56", "grafting by L1 norm", f"{SLR} --criterion l1", 94.09, 72.73),
            ("resnet110", "baseline", "--num 1", 93.81, 73.21),
            ("resnet110", "grafting by entropy", SLR, 94.60, 74.70),
            ("resnet110", "grafting by L1 norm", f"{SLR} --criterion l1", 94.37, 73.65),
            ("mobilenetv2", "baseline", "--num 1", 92.42, 71.44),
            ("mobilenetv2", "grafting by entropy", SLR, 93.53, 73.26),
            ("mobilenetv2", "grafting by L1 norm", f"{SLR} --criterion l1", 92.94, 72.90),
        ],
        source=f"{PAPER} (baseline, entropy); {EXTENDED} (L1 norm)",
    ),
    "filters": Table(
        "Invalid filters",
        "Filters with an L1 norm below 0.1 and below 0.01, ours after the last epoch. The published counts are of the "
        f"baseline's best epoch and grafting's last. {_ON_STEPS}",
        [
            *_both_schedules("resnet32", ("36/1136 and 35/1136",), ("14/1136 and 8/1136",), (None,)),
            *_both_schedules("mobilenetv2", ("10929/17088 and 9834/17088",), ("9903/17088 and 8492/17088",), (None,)),
        ],
        datasets=("CIFAR-10",),
    ),
    "leaky": Table(
        "Leaky ReLU",
        "Without filters that die of a gradient of 0. The published table calls all three networks resnet32; their "
        f"accuracies are taken for those of 32, 56 and 110 layers. {_ON_STEPS}",
        [
            *_both_schedules("resnet32_leaky", (93.28, 70.04), (93.60, 70.93), _UNKNOWN),
            *_both_schedules("resnet56_leaky", (94.03, 72.24), (94.32, 73.14), _UNKNOWN),
            *_both_schedules("resnet110_leaky", (93.24, 73.34), (93.97, 73.82), _UNKNOWN),
        ],
    ),
    "level": Table(
        "Layer level and filter level",
        f"One coefficient for a layer, or one for each of its filters. {_ON_STEPS}",
        [
            ("vgg16", "baseline", "--num 1", 93.68, 73.41),
            ("vgg16", "grafting (slr), layer", SLR, 94.02, 74.28),
            ("vgg16", "grafting (slr), filter", f"{SLR} --level filter", 94.26, 74.63),
            ("vgg16", *_COSINE, None, None),
            ("vgg16", "grafting (dlr), layer", DLR, None, None),
            ("vgg16", "grafting (dlr), filter", f"{DLR} --level filter", None, None),
        ],
    ),
    "coefficient": Table(
        "A and c",
        "How far the coefficient may lie from 1/2 (A), and how steeply it follows the entropies (c). The "
        "learning rates of the published table are not stated; slr is taken. A 0.4, c 500 are then the settings of "
        "grafting (slr) in the main results, where 93.53 and 73.26 are published for them.",
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
    "scions": Table(
        "Scions",
        "What is grafted: noise or filters of its own, onto the invalid filters of a single network; or the weights of "
        "another network (external), by the layers' L1 norms as published, or by their entropies. Where no filter is "
        "invalid, noise and internal are the baseline. All on steps.",
        [
            ("mobilenetv2", "baseline", "--num 1", 92.42, 71.44),
            ("mobilenetv2", "noise", "--num 1 --scion noise", 92.51, 72.34),
            ("mobilenetv2", "internal", "--num 1 --scion internal", 92.68, 72.38),
            ("mobilenetv2", "external, by L1 norm", f"{SLR} --criterion l1", 92.94, 72.90),
            ("mobilenetv2", "external, by entropy", SLR, None, None),
        ],
        source=EXTENDED,
    ),
    "imagenet": Table(
        "ImageNet",
        "Top-1 and top-5 accuracy. The published baseline is on steps (a tenth every 30 epochs), grafting on a cosine, "
        "as here; the baseline on a cosine is ours.",
        [
            ("resnet18", "baseline, steps", "--num 1 --steplr", "69.15 / 88.87"),
            ("resnet18", "baseline, cosine", "--num 1", None),
            ("resnet18", "grafting", SLR, "71.19 / 90.01"),
            ("resnet34", "baseline, steps", "--num 1 --steplr", "72.60 / 90.91"),
            ("resnet34", "baseline, cosine", "--num 1", None),
            ("resnet34", "grafting", SLR, "74.58 / 92.05"),
            ("resnet50", "baseline, steps", "--num 1 --steplr", "75.92 / 92.81"),
            ("resnet50", "baseline, cosine", "--num 1", None),
            ("resnet50", "grafting", SLR, "76.76 / 93.34"),
        ],
        datasets=("ImageNet",),
    ),
}
_RIVALS = "the authors of grafting, who print it beside theirs"
_FIVE = "a follow-up by the authors of grafting: mean and deviation of five runs"
_TUNED = "github.com/chenyaofo/pytorch-cifar-models: cosine, Nesterov, batch 256, 200 epochs"
_LOWER = "the authors' own later rerun: steps, last epoch"
# Published figures of others, and at other settings, that no run of ours repeats: network, method, CIFAR-10, CIFAR-100,
# source.
REFERENCE = [
    ("ResNet-32", "mutual learning", "92.80", "70.19", _RIVALS),
    ("ResNet-32", "RePr", "93.90", "69.90", _RIVALS),
    ("ResNet-32", "single network", "–", "69.87 ± 0.42", _FIVE),
    ("ResNet-32", "grafting", "–", "70.76 ± 0.33", _FIVE),
    ("ResNet-32", "single network, tuned recipe", "93.53", "70.16", _TUNED),
    ("ResNet-56", "single network", "–", "71.87 ± 0.42", _FIVE),
    ("ResNet-56", "grafting", "–", "72.00 ± 0.03", _FIVE),
    ("ResNet-56", "single network, tuned recipe", "94.37", "72.63", _TUNED),
    ("ResNet-110", "RePr", "94.60", "73.60", _RIVALS),
    ("WRN-28-10", "mutual learning", "95.66", "80.28", _RIVALS),
    ("VGG-16", "single network, tuned recipe", "94.16", "74.00", _TUNED),
    ("MobileNetV2", "single network, tuned recipe", "93.79", "74.20", _TUNED),
    *(
        ("MobileNetV2", f"single network, lr {lr}", accuracy, "–", _LOWER)
        for lr, accuracy in ((0.01, "93.17"), (0.02, "94.03"), (0.04, "93.89"), (0.06, "93.37"), (0.1, "92.48"))
    ),
    ("MobileNetV2", "grafting of 2, different rates up to 0.02", "94.48", "–", _LOWER),
    ("MobileNetV2", "grafting of 2, different rates up to 0.04", "94.45", "–", _LOWER),
]


def rows(table: str, preset_name: str) -> list[Row]:
    """The rows of a table in a preset, data set by data set; none if the preset has none of its data sets."""
    preset, found = PRESETS[preset_name], {}
    for place, dataset in enumerate(TABLES[table].datasets):
        data, baseline = preset.datasets.get(dataset), None
        for published_model, method, flags, *figures in TABLES[table].rows if data else ():
            model = preset.models.get(published_model, published_model)
            label = f"{MODELS[model][0]}, {method}"
            baseline = label if method.startswith("baseline") else baseline
            compared = baseline if baseline != label else None
            paper = figures[place] if preset_name == "paper" else None
            shown = "glyphs" if data == "glyphs" else dataset
            row = Row(shown, label, compared, _run_name(data, model, flags), paper, data, model, flags)
            found.setdefault((dataset, label), row)  # models with the same stand-in: one row is enough
    return list(found.values())


def runs(names: Iterable[str], preset_name: str, seeds: int) -> list[Run]:
    """All runs of the tables, each once; an ensemble comes after its members."""
    every = (
        run
        for name in names
        for row in rows(name, preset_name)
        for seed in range(seeds)
        for run in _runs(PRESETS[preset_name], row.data, row.model, row.flags, seed)
    )
    return list({str(run): run for run in every}.values())


def _runs(preset: Preset, data: str, model: str, flags: str, seed: int) -> list[Run]:
    """The run of a row's flags; of an ensemble ("6 x --num 1"), first those of its members."""
    name, (count, _, of_one) = _run_name(data, model, flags), flags.rpartition(" x ")
    if count:
        members = [run for k in range(int(count)) for run in _runs(preset, data, model, of_one, seed + k * SEEDS)]
        epochs, names = sum(run.epochs for run in members), tuple(map(str, members))
        return [*members, Run(name, seed, "analysis/ensemble.py", data, (), 1, epochs, 0, names)]
    of_imagenet = data == "imagenet"
    words = ["--arch" if of_imagenet else "--model", model, *(["--cifar", "100"] if data == "cifar100" else [])]
    words += (preset.imagenet if of_imagenet else preset.cifar).split()
    epochs = int(words[words.index("--epochs") + 1]) if "--epochs" in words else 90 if of_imagenet else 200
    epochs *= 2 if "--epochs 2x" in of_one else 1
    words = without_steps(words + of_one.replace("2x", str(epochs)).split())  # the last --epochs counts
    networks = int(words[words.index("--num") + 1])
    epochs *= networks
    script = f"grafting_{'imagenet' if of_imagenet else 'cifar'}/grafting.py"
    if "--together" in words:  # all in one process, which keeps one of them, or their mean
        script, networks = "experiments/together.py", 1
    return [Run(name, seed, script, data, (*words, "--seed", str(seed)), networks, epochs, epochs * MODELS[model][1])]


def without_steps(words: list[str]) -> list[str]:
    """The words of a command without --step_epochs E, if it has --cos: a cosine has no steps."""
    if "--cos" in words and "--step_epochs" in words:
        place = words.index("--step_epochs")
        return words[:place] + words[place + 2 :]
    return words


def _run_name(data: str, model: str, flags: str) -> str:
    """cifar10_resnet32_num2_difflr_cos; a value that says by itself what it is stands alone, as in _num1_ema.

    A scion keeps its flag, and so does SWA: results under names such as _num1_noise are of an earlier definition.
    """
    count, _, of_one = flags.rpartition(" x ")
    parts = [data, model]
    for word in of_one.split():
        if word.startswith("--"):
            parts.append(word.removeprefix("--"))
        elif word[0].isdigit():
            parts[-1] += word
        elif parts[-1] == "scion" or word == "swa":
            parts.append(word)
        else:
            parts[-1] = word
    return "_".join([*parts, f"ensemble{count}"] if count else parts)
