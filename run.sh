#!/usr/bin/env bash
# One command for everything:
#
#   bash run.sh [--preset NAME] [--corpus PATH] [key=value ...]    set up what is missing, then train, pack, reload, score
#   bash run.sh --resume RUN_ID                                    go on with a run that was stopped or killed
#   bash run.sh download --variant sp1024 [...]                    FineWeb's published shards, verified (data/README.md)
#   bash run.sh prepare --input PATH [...]                         shards from text of your own
#   bash run.sh tool NAME [arguments]                              tools/NAME.py, for instance `bash run.sh tool compare --help`
#   bash run.sh test [pytest arguments]                            the quick tests: a few minutes on 2 cores
#   bash run.sh test --all [pytest arguments]                      every test: whole runs, kills, torchrun, a browser as well
#   bash run.sh lint                                               style
#
# Without --preset: `leaderboard` on all CUDA devices where there are some, else `local`.
# Each command sets up what it needs, and no more: requirements.txt for a run, with requirements-data.txt, -lab.txt
# and -demo.txt for the commands and tools that take more, all of them for the tests, requirements-dev.txt for style.
# The Python that is active is used as it is where it has what they ask for; else `.venv` is made here and filled by
# pip, once. PYTHON=... names another Python to look at first.
# Relative paths on the command line are meant from where the command is given. The exit status is that of what ran.
set -euo pipefail

readonly repository="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly caller="$PWD"
readonly setup_failed=3

say() { printf 'run.sh: %s\n' "$*" >&2; }

fail() {
    say "$@"
    exit "$setup_failed"
}

# Succeeds where this Python is 3.10 to 3.12.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# Prints what the Python $1 lacks of the requirement files after it; succeeds where that is nothing.
check_requirements() {
    "$1" - "${@:2}" <<'PYTHON'
import re
import sys
from importlib import metadata


def numbers(version):
    """1.2.3+cpu -> (1, 2, 3): enough to compare the releases that the files name."""
    return tuple(int(n) for n in re.match(r"\d+(\.\d+)*", version).group().split("."))


def holds(installed, rule):
    """A pin admits every local part: ==2.13.0 holds for 2.13.0+cpu."""
    operator, wanted = re.match(r"(==|>=|<)(.+)", rule).groups()
    have, want = numbers(installed), numbers(wanted)
    if operator == "==":
        return installed.split("+")[0] == wanted
    return have >= want if operator == ">=" else have < want


missing = []
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as lines:
        wanted = [line.split("#")[0].strip() for line in lines]
    for requirement in filter(None, wanted):
        name, rules, older = re.match(
            r"([A-Za-z0-9._-]+)([^;]*)(?:; python_version < \"(.*)\")?$", requirement
        ).groups()
        if older and sys.version_info[:2] >= numbers(older):
            continue
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(f"{requirement} (none installed)")
            continue
        if not all(holds(installed, rule.strip()) for rule in rules.split(",")):
            missing.append(f"{requirement} ({installed} installed)")
print(", ".join(missing))
sys.exit(bool(missing))
PYTHON
}

# Prints the Pythons to look at, those first that the user means most likely.
candidates() {
    local name
    for name in "${PYTHON:-}" python python3 python3.12 python3.11 python3.10; do
        if [[ -n "$name" ]] && command -v "$name" >/dev/null 2>&1 && is_supported "$name"; then
            command -v "$name"
        fi
    done
}

# Makes .venv, or mends one whose making was interrupted.
make_environment() {
    local base="$1" found
    if [[ -z "$base" ]]; then
        found="$(python3 --version 2>/dev/null || python --version 2>/dev/null || echo 'no Python')"
        fail "Python 3.10, 3.11 or 3.12 is needed, and $found was found: install one, or name one with PYTHON=/path/to/python3"
    fi
    say "making $repository/.venv with $("$base" --version)"
    "$base" -m venv "$repository/.venv" ||
        fail "$base -m venv failed: install its venv module (Debian, Ubuntu: apt install python3-venv), remove .venv, try again"
    is_supported "$repository/.venv/bin/python" ||
        fail "$repository/.venv is not an environment of Python 3.10 to 3.12: remove it and run this again"
}

install_requirements() {
    local python="$1" missing="$2" status=0 file
    local command=("$python" -m pip install --disable-pip-version-check --quiet)
    for file in "${@:3}"; do command+=(--requirement "$file"); done
    say "installing into $repository/.venv: $missing"
    "${command[@]}" >&2 || status=$?
    ((status == 0)) || fail "pip could not install the requirements (status $status): see its message above, then run this again"
}

# Sets `python` to one that has all that the requirement files ask for.
python=""
set_up() {
    local candidate missing base=""
    local environment="$repository/.venv/bin/python"
    while read -r candidate; do
        base="${base:-$candidate}"
        if check_requirements "$candidate" "$@" >/dev/null; then
            python="$candidate"
            return
        fi
    done < <(candidates)
    if ! { is_supported "$environment" && "$environment" -m pip --version >/dev/null 2>&1; }; then
        make_environment "$base"
    fi
    missing="$(check_requirements "$environment" "$@")" || install_requirements "$environment" "$missing" "$@"
    missing="$(check_requirements "$environment" "$@")" || fail "after installing, .venv still lacks $missing"
    python="$environment"
}

# Prints how many CUDA devices to use: the most that deal a batch evenly (a divisor of 8).
usable_devices() {
    "$python" -c '
import torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(max(n for n in (0, 1, 2, 4, 8) if n <= count))'
}

# Prints a path, made absolute from where the command is given.
absolute_path() {
    case "$1" in
        "" | /* | embedded) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$caller/$1" ;;
    esac
}

# Prints an argument with a relative path in it made absolute.
absolute_argument() {
    case "$1" in
        --corpus=* | corpus=* | data_path=* | tokenizer_path=* | runs_root=*)
            printf '%s=%s\n' "${1%%=*}" "$(absolute_path "${1#*=}")"
            ;;
        *) printf '%s\n' "$1" ;;
    esac
}

run_job() {
    local preset="${PRESET:-}" devices=0 expects="" resumes="" argument
    local arguments=(train_gpt.py) command
    for argument in "$@"; do
        [[ "$expects" == --corpus ]] && argument="--corpus=$argument" expects=""
        [[ "$expects" == --preset ]] && argument="--preset=$argument" expects=""
        [[ "$expects" == --resume ]] && argument="--resume=$argument" expects=""
        case "$argument" in
            --corpus | --preset | --resume) expects="$argument" ;;
            --preset=*) preset="${argument#*=}" ;;
            --resume=*) resumes="${argument#*=}" ;;
            *) arguments+=("$(absolute_argument "$argument")") ;;
        esac
    done
    for argument in DATA_PATH TOKENIZER_PATH CORPUS RUNS_ROOT; do
        [[ -z "${!argument:-}" ]] || export "$argument=$(absolute_path "${!argument}")"
    done
    [[ -z "$expects" ]] || { say "$expects needs a value"; exit 2; }

    set_up requirements.txt
    if [[ -n "$resumes" ]]; then # a run has its preset
        unset PRESET
        arguments+=(--resume "$resumes")
        preset="$(sed -n 's/^ *"preset": "\(.*\)",$/\1/p' "$resumes/config.json" "${RUNS_ROOT:-runs}/$resumes/config.json" 2>/dev/null || true)"
    fi
    # The small presets are made for one process; what they measure is compared with machines without a GPU.
    [[ "$preset" == *local || " ${arguments[*]} " == *" --plan "* ]] || devices="$(usable_devices)"
    command=("$python")
    ((devices == 0)) || command+=(-m torch.distributed.run --standalone --nproc_per_node="$devices")
    if [[ -z "$preset" ]]; then
        preset=local
        ((devices == 0)) || preset=leaderboard
    fi
    [[ -n "$resumes" ]] || arguments+=(--preset "$preset")
    say "preset $preset, $((devices > 0 ? devices : 1)) process(es), $("$python" --version) at $python"
    exec "${command[@]}" "${arguments[@]}" # in the place of this shell, so that signals reach the run
}

# Runs a command of data/ with what it needs; paths are meant from where the command is given.
run_data_command() {
    local command="$1"
    set_up requirements.txt requirements-data.txt
    cd "$caller"
    exec "$python" "$repository/data/$command.py" "${@:2}"
}

# Runs a tool with what it needs; paths are meant from where the command is given.
run_tool() {
    local name="${1:-}" files=(requirements.txt requirements-lab.txt) names=(tools/*.py)
    name="${name%.py}"
    if [[ "$name" == */* || ! -f "tools/$name.py" ]]; then
        names=("${names[@]#tools/}")
        say "tool takes one of these names: ${names[*]%.py}"
        exit 2
    fi
    case "$name" in
        demo) files+=(requirements-demo.txt) ;;
        bench | inspect_data) files+=(requirements-data.txt) ;;
    esac
    set_up "${files[@]}"
    cd "$caller"
    exec "$python" "$repository/tools/$name.py" "${@:2}"
}

# Runs the tests that are not marked slow, or every one after --all.
run_tests() {
    local which="the quick tests (--all runs every one)"
    local arguments=(--numprocesses auto --dist loadfile --no-loadscope-reorder) # tests/conftest.py has the order
    if [[ "${1:-}" == --all ]]; then
        which="every test"
        shift
    else
        arguments+=(-m "not slow")
    fi
    set_up requirements.txt requirements-data.txt requirements-lab.txt requirements-demo.txt requirements-dev.txt
    say "$which with $("$python" --version) at $python"
    # Many small models: more threads than one only wait for each other, so there is a process for each core.
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest "${arguments[@]}" "$@"
}

run_lint() {
    set_up requirements-dev.txt
    "$python" -m ruff check .
    "$python" -m ruff format --check .
}

cd "$repository"
case "${1:-}" in
    tool) run_tool "${@:2}" ;;
    test) run_tests "${@:2}" ;;
    lint) run_lint ;;
    download | prepare) run_data_command "$@" ;;
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]##*/}" ;;
    *) run_job "$@" ;;
esac
