# Sourced by common/launch.sh and tests/run.sh: finds, or makes, the Python that runs the project.
#
#   environment REQUIREMENTS_FILE...    sets $python to an interpreter that has all that the files list
#
# That is the user's own (python3, or what PYTHON names) where it has everything: it is never installed into.
# Otherwise it is .venv at the repository root, made on the first call and reused by later ones; where the user's own
# Python lacks only smaller packages, .venv sees its torch (a build for their GPU, say) instead of installing another.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }
fail() { say "$1"; exit "${2:-1}"; }

# Sets $python to the user's own, with nothing asked of it but its version.
users_python() {
    python=${PYTHON:-python3}
    command -v -- "$python" >/dev/null \
        || fail "$python is not installed: install Python 3.10 or newer, or name one, as in PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || fail "$python is $("$python" --version 2>&1), but 3.10 or newer is needed: name another, as in PYTHON=python3.12"
}

# lacking PYTHON FILE...: prints the requirements that PYTHON does not meet. With thorough=yes torch and torchvision are
# imported, too, for some seconds: builds that do not fit each other or this machine show only then.
lacking() {
    thorough=${thorough-} "$1" - "${@:2}" <<'PYTHON'
import os
import re
import sys
from importlib import import_module, metadata


def numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def is_met(name, least):
    try:
        return numbers(metadata.version(name)) >= numbers(least)
    except metadata.PackageNotFoundError:
        return False


def can_be_imported(name):
    try:
        import_module(name)
    except Exception:
        return False
    return True


lines = [line.partition("#")[0].strip() for path in sys.argv[1:] for line in open(path)]
requirements = dict(line.partition(">=")[::2] for line in lines if line)
unmet = [name for name, least in requirements.items() if not is_met(name, least)]
if not unmet and os.environ["thorough"]:
    unmet = [name for name in requirements if name.startswith("torch") and not can_be_imported(name)]
print(*unmet)
PYTHON
}

environment() {
    local venv=$root/.venv files=() file line lacks
    users_python
    lacks=$(lacking "$python" "$@")
    [ -n "$lacks" ] || return 0
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/state" 2>/dev/null)" != unfinished ] \
            && [ -z "$(lacking "$venv/bin/python" "$@")" ]; then
        python=$venv/bin/python
        return 0
    fi
    # In a process of its own, whose end, however it ends, releases the lock on the repository's folder.
    (
        exec 9<"$root"
        if command -v flock >/dev/null && ! flock -n 9; then
            say "waiting for another process that is making $venv …"
            flock 9
        fi
        make_venv "$@"
    )
    python=$venv/bin/python
}

# .venv/state says that this script made .venv, and whether the last installation came to its end: an interrupted one is
# begun anew, while a .venv that the user made is never changed.
make_venv() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "$python cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"
    if [ -e "$venv" ] && [ ! -e "$venv/state" ]; then
        fail "$venv was not made by this script and does not have all that $* list: install them there, or move it away"
    fi
    if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/state")" != complete ]; then
        [ ! -e "$venv" ] || say "$venv is half-made: beginning anew"
        rm -rf -- "$venv"
        mkdir -- "$venv"
        echo unfinished >"$venv/state"
        say "making $venv with $("$python" --version) …"
        "$python" -m venv "$venv"
        if "$python" -c 'import torch, torchvision' 2>/dev/null; then
            "$python" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
                >"$(echo "$venv"/lib/python*/site-packages)/users_own.pth"
        fi
    fi
    lacks=$(lacking "$venv/bin/python" "$@")
    [ -n "$lacks" ] || return 0  # installed by the process that we waited for
    echo unfinished >"$venv/state"
    say "installing $lacks …"
    for file in "$@"; do files+=(-r "$file"); done
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "${files[@]}" 2>&1 \
        | tee "$venv/installation.log" \
        | while IFS= read -r line; do  # a sign of life: the largest packages take minutes
            case $line in
                *Downloading*" MB)") say "  ${line#"${line%%[! ]*}"}" ;;
                Installing*) say "  Installing what was downloaded …" ;;
                *ERROR*) say "$line" ;;
            esac
        done || fail "the installation failed (all of it: $venv/installation.log); the same command tries once more"
    lacks=$(lacking "$venv/bin/python" "$@")
    [ -z "$lacks" ] || fail "$venv still lacks $lacks after the installation (see $venv/installation.log)"
    echo complete >"$venv/state"
}
