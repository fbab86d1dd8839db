"""The command line of both scripts: flags that work, one line for those that do not, and torchrun's parser in front."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision.models as zoo
from processes import ROOT
from torch.distributed.run import get_args_parser

from filter_grafting.information import CRITERIA
from grafting_cifar import flags as cifar
from grafting_imagenet import flags as imagenet
from training.flags import command, world

SCRIPTS = {"cifar": cifar, "imagenet": imagenet}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


def parse(module, line):
    return module.parse(line.split())


def refused(module, capsys, *flags):
    """The one line in which parsing ends."""
    with pytest.raises(SystemExit) as end:
        module.parse(list(flags))
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    return said


def test_each_criterion_has_its_function(script):
    (flag,) = (action for action in script.parser()._actions if action.dest == "criterion")
    assert set(flag.choices) == set(CRITERIA)


@pytest.mark.parametrize("folder", ["grafting_cifar", "grafting_imagenet"])
@pytest.mark.parametrize(("flags", "status"), [(["--help"], 0), (["--num", "0"], 2)], ids=str)
def test_help_and_refusals_do_not_wait_for_torch(folder, flags, status, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")  # torchvision imports it at once
    command = [sys.executable, ROOT / folder / "grafting.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stderr.count("\n")) == (status, status // 2), result.stderr


def test_every_flag_has_a_help_and_says_its_default(script):
    assert all(action.help for action in script.parser()._actions)
    text = " ".join(script.parser().format_help().split())
    for words in ("(default: 2)", "(default: 500.0)", "(default: 60.0)", "(default: entropy)"):
        assert words in text


def test_the_published_lines_are_understood():
    args = parse(cifar, "--s checkpoint/x --cifar 10 --model resnet32 --num 2 --i 2")
    assert (args.s, args.model, args.num, args.i) == (Path("checkpoint/x"), "resnet32", 2, 2)
    args = parse(imagenet, "--data d -a resnet50 -j 3 -b 64 --learning-rate 0.2 --weight-decay 1e-5 -p 5")
    assert (args.arch, args.workers, args.batch_size, args.lr, args.wd) == ("resnet50", 3, 64, 0.2, 1e-5)


def test_a_tilde_is_expanded_and_the_save_directory_has_two_names(script):
    assert script.parse(["--s=~/run"]).s == script.parse(["--save_dir=~/run"]).s == Path.home() / "run"


def test_torchvisions_models_are_known_without_importing_it():
    assert imagenet.names() == zoo.list_models(module=zoo)


def test_without_torchvision_there_is_help_and_else_one_line(monkeypatch, capsys):
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    for flags, status in ([], 1), (["-a", "resnet18", "--num", "1"], 1), (["--help"], 0):
        with pytest.raises(SystemExit) as end:
            imagenet.parse(flags)
        said = capsys.readouterr()
        assert (end.value.code, said.err.count("\n"), "usage" in said.out) == (status, status, not status)
        assert not status or "this Python has no torchvision: source .venv/bin/activate, or pip install" in said.err


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("cifar", "--model resent20", "argument --model: got 'resent20'; did you mean resnet20?"),
        ("cifar", "--modle resnet20", "unrecognized argument --modle; did you mean --model?"),
        ("imagenet", "-a resnet19", "got 'resnet19'; did you mean resnet18?"),
        ("imagenet", "-b 0", "argument -b/--batch-size: got '0', expected an integer at least 1"),
        ("imagenet", "--lr nan", "argument --lr/--learning-rate: got 'nan', expected a number above 0"),
        ("imagenet", "--lr 0", "got '0', expected a number above 0"),
        ("imagenet", "--momentum 1", "argument --momentum: got '1', expected a number at least 0 and below 1"),
        ("cifar", "--nesterov --momentum 0", "argument --nesterov: got --momentum 0, expected a number above 0"),
        ("imagenet", "--a 1.5", "argument --a: got '1.5', expected a number at least 0 and at most 1"),
        ("imagenet", "--i 3", "argument --i: got 3, expected 1 to 2 (--num)"),
        ("imagenet", "--gpu 0 --device cpu", "argument --gpu: needs --device cuda"),
        ("imagenet", "-e --resume auto", "argument -e: expected --resume PATH or --pretrained"),
        ("imagenet", "--pretrained --resume x.tar", "--pretrained: does not go with --resume PATH"),
        ("imagenet", "--pretrained -a timm.models:resnet18", "torchvision has no weights of timm.models:resnet18"),
        ("cifar", "--warmup 5 --epochs 5", "argument --warmup: got 5, expected less than 5 (--epochs)"),
        ("cifar", "--level filter", "--level: filter needs a chain of layers (--model vgg16), got --model resnet32"),
        ("cifar", "--method ema", "--method: ema needs no neighbour: got --num 2, expected --num 1"),
        ("cifar", "--method papa --num 1", "papa needs a neighbour: got --num 1"),
        ("cifar", "--scion noise", "--scion: noise needs no neighbour: got --num 2, expected --num 1"),
        ("cifar", "--method average --level filter --model vgg16", "average does not go with --level"),
        ("cifar", "--level filter --model vgg16 --c 5", "--level: filter does not go with --c"),
    ],
)
def test_a_wrong_flag_ends_in_one_line(capsys, name, flags, words):
    assert words in refused(SCRIPTS[name], capsys, *flags.split())


def test_a_models_name_may_be_anyones_function(script):
    flag = "--model" if script is cifar else "-a"
    args = script.parse([flag, "package.module:function"])
    assert args.s.name.endswith("_package.module.function")


def test_a_file_and_auto_go_together_in_any_order_and_the_last_file_counts():
    args = parse(imagenet, "--resume b.tar --resume auto --resume a.tar")
    assert (str(args.start_from), args.resume) == ("a.tar", True)


def test_the_standard_data_sets_have_a_directory_each_wherever_they_lie(tmp_path):
    def directory(*flags):
        return str(cifar.parse(["--data", *flags]).s)

    standard, mine = str(tmp_path / "standard"), tmp_path / "mine"
    (mine / "train").mkdir(parents=True)
    assert directory(standard) == "checkpoint/grafting_cifar10_resnet32"
    assert directory(standard, "--cifar", "100") == "checkpoint/grafting_cifar100_resnet32"
    assert directory(str(mine), "--lr", "0.05") == "checkpoint/grafting_mine_resnet32_lr0.05"
    assert directory("glyphs", "--method", "average") == "checkpoint/grafting_glyphs_resnet32_average"
    assert directory("glyphs", "--num", "1") == "checkpoint/baseline_glyphs_resnet32"


# torchrun, whose own parser reads the whole line first


def is_ambiguous(option):
    parser = get_args_parser()
    with contextlib.redirect_stderr(None), contextlib.suppress(SystemExit):
        parser.parse_args(["--standalone", "grafting.py", option, "1"])
        return False
    return True


def test_every_flag_has_a_name_that_torchrun_leaves_alone(script):
    assert is_ambiguous("--s") and is_ambiguous("--num")  # why these have a second one
    for action in script.parser()._actions:
        assert not all(map(is_ambiguous, action.option_strings)), action.option_strings


# What the environment says


def test_variables_that_another_job_has_left_do_not_count():
    assert world({"RANK": "x", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "b"}) == (0, 1)
    assert world({"RANK": "1"}) == world({"WORLD_SIZE": ""}) == world({"RANK": "3", "WORLD_SIZE": "4"}) == (0, 1)


def set_ranks(monkeypatch, count):
    variables = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 1}
    for name, value in (variables | {"MASTER_ADDR": "here"}).items():
        monkeypatch.setenv(name, str(value))


def test_ranks_are_for_the_imagenet_script(capsys, monkeypatch):
    set_ranks(monkeypatch, 3)
    assert "a CIFAR network trains in one process" in refused(cifar, capsys)
    assert "argument -b: got 256, expected a multiple of 3" in refused(imagenet, capsys)
    assert "argument --gpu: under torchrun each process has a GPU" in refused(imagenet, capsys, "--gpu=0", "-b", "255")


def test_the_command_that_starts_another_network(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/grafting.py", "--i=1", "--num", "3", "--i", "2", "--lr", "0.1"])
    assert command()[1:] == sys.argv
    args = cifar.parse(command(3)[2:])
    assert (args.num, args.i, args.lr, args.resume) == (3, 3, 0.1, True)
    set_ranks(monkeypatch, 2)
    monkeypatch.setattr(sys, "argv", ["/x/grafting.py", "--s", "x", "--num", "3"])
    for words in command(), command(3):  # --s and --num are those that grafting.sh gives
        assert words[1:3] == ["-m", "torch.distributed.run"]
        asked = get_args_parser().parse_args(words[3:])
        assert [asked.nproc_per_node, asked.training_script] == ["2", "/x/grafting.py"]
        assert asked.training_script_args[:2] == ["--s", "x"]
