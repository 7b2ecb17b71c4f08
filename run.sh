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
# Without --preset: `leaderboard` on all CUDA devices where there are some, else `local`. Where the machine has an
# NVIDIA device that torch does not see, nothing runs: --preset local or device=cpu asks for the CPU.
# Each command sets up what it needs, and no more: requirements.txt for a run, with requirements-data.txt, -lab.txt,
# -demo.txt, -track.txt and -export.txt for the commands and tools that take more, all of them for the tests, requirements-dev.txt for style.
# The Python that is active is used as it is where it has what they ask for; else `.venv` is made here and filled by
# pip, once, on top of that Python's torch where it has one that fits. PYTHON=... names another Python to look at
# first, TORCH_INDEX_URL=... the package index that torch is taken from where there is none.
# Works with bash 3.2, which macOS has (tests/test_run_sh.py looks for what that lacks).
# Relative paths on the command line are meant from where the command is given. The exit status is that of what ran.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly repository caller="$PWD" setup_failed=3
readonly cuda_13_driver=580 # the first that runs what pip installs for torch by default

say() { printf 'run.sh: %s\n' "$*" >&2; }

fail() {
    say "$@"
    exit "$setup_failed"
}

# Succeeds where this Python is 3.10 to 3.14.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
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
        name, rules, older, system = re.match(
            r"([A-Za-z0-9._-]+)([^;]*)(?:; python_version < \"(.*)\")?(?:; sys_platform == \"(.*)\")?$", requirement
        ).groups()
        if older and sys.version_info[:2] >= numbers(older) or system and sys.platform != system:
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
    for name in "${PYTHON:-}" python python3 python3.12 python3.11 python3.10 python3.13 python3.14; do
        if [[ -n "$name" ]] && command -v "$name" >/dev/null 2>&1 && is_supported "$name"; then
            command -v "$name"
        fi
    done
}

# Prints the NVIDIA driver's version where this machine has a device of it ("unknown" where nvidia-smi can't tell);
# nothing where there is none, or where CUDA_VISIBLE_DEVICES hides all of them.
nvidia_driver() {
    local version
    case "${CUDA_VISIBLE_DEVICES-all}" in "" | -1 | NoDevFiles) return ;; esac
    version="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null || true)"
    version="$(sed -n '/^[0-9][0-9.]*$/{p;q;}' <<<"$version")"
    if [[ -z "$version" ]] && compgen -G '/dev/nvidia[0-9]*' >/dev/null; then version=unknown; fi
    printf '%s' "$version"
}

# Prints how to give the Python $2 a torch for the driver $1.
torch_advice() {
    local install
    install="$2 -m pip install --force-reinstall $(sed -n '/^torch==/p' constraints.txt)"
    if [[ "$1" == unknown ]]; then
        printf 'mend the driver (nvidia-smi must work)'
    elif ((${1%%.*} < cuda_13_driver)); then
        printf '%s' "update the driver to $cuda_13_driver or newer, or take the CUDA 12.6 build, whose index PyTorch's " \
            "installation page names: $install --index-url \"\$TORCH_INDEX_URL\""
    else
        printf '%s' "$install"
    fi
}

# Succeeds where this Python has a torch that requirements.txt admits, and one that sees the device where there is one.
has_torch() {
    local wanted driver
    wanted="$(sed -n '/^torch[<>=]/p' requirements.txt)"
    [[ -n "$wanted" ]] && check_requirements "$1" <(printf '%s\n' "$wanted") >/dev/null || return 1
    driver="$(nvidia_driver)"
    [[ -z "$driver" ]] || (($(count_devices "$1" || echo 0) > 0))
}

# Makes .venv of the Python $1, or mends one whose making was interrupted.
make_environment() {
    local base="$1" found
    if [[ -z "$base" ]]; then
        found="$(python3 --version 2>/dev/null || python --version 2>/dev/null || echo 'no Python')"
        fail "Python 3.10 to 3.14 is needed, and $found was found: install one, or name one with PYTHON=/path/to/python3"
    fi
    say "making $repository/.venv with $("$base" --version)"
    "$base" -m venv "$repository/.venv" ||
        fail "$base -m venv failed: install its venv module (Debian, Ubuntu: apt install python3-venv), remove .venv, try again"
    is_supported "$environment" ||
        fail "$repository/.venv is not an environment of Python 3.10 to 3.14: remove it and run this again"
    if has_torch "$base"; then
        say "its packages, torch among them, are used where they fit"
        "$base" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
            >"$("$environment" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base_packages.pth"
    fi
}

# Installs into .venv what $1 says is missing of the requirement files after it.
install_requirements() {
    local missing="$1" status=0 file driver
    local command=("$environment" -m pip install --disable-pip-version-check --quiet)
    say "installing into $repository/.venv: $missing"
    if [[ ", $missing" == *", torch"[\<\>=]* ]]; then # what is there and fits stays; else one release is for everyone
        driver="$(nvidia_driver)"
        if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
            "${command[@]}" --index-url "$TORCH_INDEX_URL" --constraint constraints.txt torch >&2 ||
                fail "pip could not install torch from TORCH_INDEX_URL: see its message above"
        elif [[ -z "$asks_for_cpu" && -n "$driver" && "$driver" != unknown ]] && ((${driver%%.*} < cuda_13_driver)); then
            fail "the NVIDIA driver is $driver, and the torch that pip installs by default needs $cuda_13_driver: update it, or" \
                "set TORCH_INDEX_URL to the index of PyTorch's CUDA 12.6 build (its installation page has it) and run this again"
        fi
        command+=(--constraint constraints.txt)
    fi
    for file in "${@:2}"; do command+=(--requirement "$file"); done
    "${command[@]}" >&2 || status=$?
    ((status == 0)) || fail "pip could not install the requirements (status $status): see its message above, then run this again"
}

# Sets `python` to one that has all that the requirement files ask for.
python=""
asks_for_cpu=""
readonly environment="$repository/.venv/bin/python"
set_up() {
    local candidate missing base=""
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
    missing="$(check_requirements "$environment" "$@")" || install_requirements "$missing" "$@"
    missing="$(check_requirements "$environment" "$@")" || fail "after installing, .venv still lacks $missing"
    python="$environment"
}

# Prints how many CUDA devices the Python $1 should use: the most that deal a batch evenly (a divisor of 8).
count_devices() {
    "$1" -W ignore -c '
import torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(max(n for n in (0, 1, 2, 4, 8) if n <= count))'
}

# Sets `devices`; an NVIDIA device that torch does not see is an error, so that no GPU machine trains on its CPU.
find_devices() {
    local driver
    devices="$(count_devices "$python")" || fail "the torch of $python can't be imported: its message is above"
    driver="$(nvidia_driver)"
    if ((devices == 0)) && [[ -n "$driver" ]]; then
        fail "this machine has an NVIDIA device (driver $driver), and torch" \
            "$("$python" -W ignore -c 'import torch; print(torch.__version__)') of $python sees none:" \
            "$(torch_advice "$driver" "$python"); --preset local asks for the CPU"
    fi
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

# Sets `preset`, `device` and `arguments` from the command line.
read_arguments() {
    local expects="" argument
    for argument in "$@"; do
        [[ -z "$expects" ]] || argument="$expects=$argument" expects=""
        case "$argument" in
            --corpus | --preset | --resume) expects="$argument" ;;
            --preset=*) preset="${argument#*=}" ;;
            --resume=*) resumes="${argument#*=}" ;;
            *)
                [[ "$argument" != device=* ]] || device="${argument#*=}"
                arguments+=("$(absolute_argument "$argument")")
                ;;
        esac
    done
    [[ -z "$expects" ]] || { say "$expects needs a value"; exit 2; }
}

# Prints what the configuration of the run to resume says of a knob.
resumed_knob() {
    sed -n "s/^ *\"$1\": \"\\(.*\\)\",\$/\\1/p" "$resumes/config.json" "${RUNS_ROOT:-runs}/$resumes/config.json" 2>/dev/null || true
}

run_job() {
    local preset="${PRESET:-}" device="${DEVICE:-}" devices=0 resumes="" name
    local arguments=(train_gpt.py) command
    read_arguments "$@"
    for name in DATA_PATH TOKENIZER_PATH CORPUS RUNS_ROOT; do
        [[ -z "${!name:-}" ]] || export "$name=$(absolute_path "${!name}")"
    done
    if [[ -n "$resumes" ]]; then # a run has its preset
        unset PRESET
        arguments+=(--resume "$resumes")
        preset="$(resumed_knob preset)" device="$(resumed_knob device)"
    fi
    # The small presets are made for one process; what they measure is compared with machines without a GPU.
    case "$preset:$device" in *local:* | stories:* | *:cpu) asks_for_cpu=1 ;; esac
    set_up requirements.txt
    [[ -n "$asks_for_cpu" || " ${arguments[*]} " == *" --plan "* ]] || find_devices
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
    set_up requirements.txt requirements-data.txt
    cd "$caller"
    exec "$python" "$repository/data/$1.py" "${@:2}"
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
        track) files+=(requirements-track.txt) ;;
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
    set_up requirements.txt requirements-{data,lab,demo,track,export,dev}.txt
    say "$which with $("$python" --version) at $python"
    # Many small models: more threads than one only wait for each other, so there is a process for each core.
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest "${arguments[@]}" "$@"
}

run_lint() {
    set_up requirements-dev.txt
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/shellcheck" run.sh .ci/run
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
