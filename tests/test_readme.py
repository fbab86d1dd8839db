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


def lines(page):
    """(the words of each indented command line, the folder that a `cd` before it names)."""
    folder = ""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            folder = ""
        if not line.startswith("    ") or "`" in line:
            continue
        words = shlex.split(line.partition(" >")[0], comments=True)
        while words and "=" in words[0]:
            del words[0]
        words = words[1:] if words[:1] == ["nohup"] else words
        if words[:1] == ["cd"]:
            folder = words[1]
        elif words:
            yield words, folder


COMMANDS = [(page.name, words, folder) for page in PAGES for words, folder in lines(page)]


@pytest.mark.parametrize(("page", "words", "folder"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_line_names_a_program_that_exists_and_flags_that_it_knows(page, words, folder, monkeypatch):
    program = next((word for word in words if word.endswith((".py", ".sh", ".slurm"))), None)
    if program is None:
        return
    path = next((base / program for base in (ROOT / folder, ROOT) if (base / program).exists()), None)
    path = path or next(base / program for base in (ROOT / "grafting_imagenet", ROOT / "grafting_cifar"))
    assert path.exists(), f"{page}: {program}"
    arguments = words[words.index(program) + 1 :]
    script = {"grafting_cifar": cifar, "grafting_imagenet": imagenet}.get(path.resolve().parent.name)
    if path.suffix == ".sh" and script:
        commands.parse(path.resolve().parent.name, *arguments)
    elif script and "--help" not in arguments:
        script.parse(arguments)
    elif path.suffix == ".py" and not script:
        text = path.read_text() + (ROOT / "benchmarks" / "tools.py").read_text()
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
