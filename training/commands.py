"""The commands of grafting.sh and their flags. No torch here: --help and a wrong flag answer at once."""

import argparse
import shlex
import sys
from importlib import import_module

from training.flags import ROOT, Parser, did_you_mean, number

USAGE = """\
usage: grafting.sh [FLAG...]                   start the networks of a run; on a terminal, watch them
       grafting.sh status [DIR...]             how they are; without DIR: all runs below checkpoint/
       grafting.sh stop [DIR...]               end them; without DIR: those of the only run that is alive
       grafting.sh resume DIR... [--epochs E]  continue those that are neither alive nor done, with the flags
                                               that they had; with more epochs, those that are done, too
       grafting.sh demo [FLAG...]              train a baseline and two grafted networks, and compare them

All networks of a run share its save directory, DIR. --num says how many they are (1: a baseline). On
ImageNet --gpus-per-network G gives each G GPUs of its own, a process each under torchrun; without GPUs, G processes.
-v prints the commands that are started. All other flags are grafting.py's, which explains them:
       python {script} --help
"""
COMMANDS = ("status", "stop", "resume", "demo")
DEMO = ("--model", "resnet20", "--epochs", "5", "--batch_size", "32", "--cos", "--amp")  # --amp: where hardware has it
DEMO_DATA = ("--data", "glyphs", "--images", "2000", "--test_images", "500")


def parse(folder: str, *words: str) -> argparse.Namespace:
    """What is to be done: `command`, its flags, and the script's `folder`.

    To start networks, also `words`, the flags that they have in common, and `args`, as the script's own parser reads
    them. A wrong flag ends the program with one line and exit status 2.
    """
    sys.argv[0] = "grafting.sh"  # the name in the parsers' messages
    if {"-h", "--help"} & set(words):
        print(USAGE.format(script=shlex.quote(str(ROOT / folder / "grafting.py"))), end="")
        raise SystemExit(0)
    parser = Parser(add_help=False)
    command, words = (words[0], words[1:]) if words and not words[0].startswith("-") else ("start", words)
    if command not in ("start", *COMMANDS):
        parser.error(f"there is no command {command!r}{did_you_mean(command, COMMANDS)}")
    parser.set_defaults(command=command, folder="grafting_cifar" if command == "demo" else folder)
    if command in ("status", "stop", "resume"):
        parser.add_argument("directories", metavar="DIR", nargs="+" if command == "resume" else "*")
    if command == "resume":
        parser.add_argument("--epochs", metavar="E", type=number(int, 1))
    if command in ("start", "resume", "demo"):
        parser.add_argument("--gpus-per-network", metavar="G", type=number(int, 1, 1000))
        parser.add_argument("-v", "--verbose", action="store_true")
    if command in ("status", "stop", "resume"):
        return parser.parse_args(words)

    return with_flags_of_script(parser, *parser.parse_known_args(words))


def with_flags_of_script(parser: Parser, asked: argparse.Namespace, words: list[str]) -> argparse.Namespace:
    """Adds what the words behind the launcher's own flags say: `words`, `args` and `default_data`, that of --data."""
    names = {word.partition("=")[0] for word in words}
    if "--gpu" in names:
        parser.error("argument --gpu: each network has a GPU of its own; CUDA_VISIBLE_DEVICES says which there are")
    is_demo, alone = asked.command == "demo", {"--i", "-e", "--evaluate"}
    alone |= {"--s", "--save_dir", "--num", "--networks", "--resume"} if is_demo else set()
    for name in sorted(names & alone):
        what = f"{asked.command} says itself what each network does, and where"
        parser.error(f"argument {name}: is for grafting.py; {what}")
    if asked.folder == "grafting_cifar" and (asked.gpus_per_network or 1) > 1:
        parser.error("argument --gpus-per-network: a CIFAR network trains in one process; expected 1")
    script = import_module(f"{asked.folder}.flags")
    known = script.parser()
    for word in sorted(names - known._option_string_actions.keys()):
        if word.startswith("--") and (hint := did_you_mean(word, parser._option_string_actions)):
            parser.error(f"unrecognized argument {word}{hint}")
    asked.words = [*(DEMO if is_demo else ()), *(DEMO_DATA if is_demo and "--data" not in names else ()), *words]
    asked.args, asked.default_data = script.parse(asked.words), known.get_default("data")
    return asked
