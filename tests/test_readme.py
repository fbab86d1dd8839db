"""The README says what the scripts do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("folder", ["grafting_cifar", "grafting_imagenet"])
def test_usage_text_is_that_of_the_script(folder):
    printed = subprocess.run(
        [sys.executable, ROOT / folder / "grafting.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    quoted = README.split(f"All flags of <code>{folder}/grafting.py</code>")[1].split("```")[1]
    # Word by word, for Python's versions break lines differently; and without the names of flags, for some repeat them.
    assert _explanations(quoted) == _explanations(printed)
    assert _flags(quoted) == _flags(printed)


def _flags(usage: str) -> set[str]:
    return set(re.findall(r"(?<!\w)--?\w[\w-]*", usage))


def _explanations(usage: str) -> list[str]:
    usage = usage[usage.index("options:") :]
    # The list of torchvision's models differs from version to version.
    usage = re.sub(r"(a model of torchvision:).*?(?=\(default)", r"\1 ", usage, flags=re.DOTALL)
    words = [word for word in usage.split() if word != "..."]
    return [word for word in words if not word.startswith("-") and not word.rstrip(",").isupper()]


def test_files_on_the_map_exist():
    folder, seen = ROOT, 0
    for line in README.split("## For whoever carries this on")[1].split("```")[1].strip().splitlines():
        for name in re.findall(r"[\w./]+(?:\.py|\.sh|\.slurm|/)(?=\s|$)", line):
            if name.endswith("/") and (ROOT / name).is_dir():
                folder = ROOT / name
            else:
                assert (folder / name).exists(), f"{folder.name}/{name}"
            seen += 1
    assert seen > 20


def test_library_example_runs(tmp_path):
    example = README.split("```python")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
