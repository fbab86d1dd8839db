"""The README and docs say what the programs do: their lines are commands that exist, with flags that exist."""

import re
import shlex
from pathlib import Path

import pytest

from grafting_cifar import flags as cifar
from grafting_imagenet import flags as imagenet
from training import commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"grafting_cifar": cifar, "grafting_imagenet": imagenet}


def lines(page):
    """(the program of each indented command line, its arguments), a `cd` before it having been followed."""
    folder = ""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            folder = ""
        if not line.startswith("    ") or "`" in line:
            continue
        words = shlex.split(line.partition(" >")[0], comments=True)
        if words[:1] == ["cd"]:
            folder = words[1]
        for k, word in enumerate(words):
            if word.endswith((".py", ".sh", ".slurm")):
                yield page.name, folder, word, words[k + 1 :]
                break


COMMANDS = [line for page in PAGES for line in lines(page)]


@pytest.mark.parametrize(("page", "folder", "program", "arguments"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_line_names_a_program_that_exists_and_flags_that_it_knows(page, folder, program, arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", [program])
    places = [ROOT / place / program for place in (folder, "", *SCRIPTS)]
    path = next((place.resolve() for place in places if place.exists()), None)
    assert path, f"{page}: there is no {program}"
    script = path.parent.name
    if arguments == ["--help"]:
        return
    if script in SCRIPTS and path.suffix == ".sh":
        commands.parse(script, *arguments)
    elif script in SCRIPTS:
        SCRIPTS[script].parse(arguments)
    elif path.suffix == ".py":
        shared = [ROOT / "benchmarks" / name for name in ("tools.py", "data.py")]
        text = "".join(one.read_text() for one in [path, *shared])
        for flag in arguments:
            assert not flag.startswith("--") or f'"{flag}"' in text, f"{page}: {program} {flag}"


def test_the_readme_can_be_read_at_one_sitting():
    assert len(PAGES[0].read_text().splitlines()) <= 200


def test_links_and_the_map_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    places = re.findall(r"`([\w/]+/)`", PAGES[0].read_text().split("## Map")[1])
    assert len(places) > 8 and all((ROOT / place).is_dir() for place in places if place != "callbacks/")
