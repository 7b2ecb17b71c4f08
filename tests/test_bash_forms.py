"""run.sh keeps to what bash 3.2 has, the bash of macOS, which is not at hand: its text is searched for newer forms."""

import re
from collections.abc import Iterator

import pytest

NEWER_FORMS = {
    "associative arrays, names of names": r"\b(?:declare|local|typeset|readonly) -[a-zA-Z]*[Agnlu]",
    "words": r"\b(?:mapfile|readarray|coproc|BASHPID|EPOCHSECONDS|EPOCHREALTIME|globstar|lastpipe)\b",
    "changes of case, transformations": r"\$\{\w+(?:\[[^]]*\])?(?:\^|,|@[A-Za-z]\})",
    "the last of an array": r"\$\{\w+\[-",
    "length from the end": r"\$\{[\w@]+:[^}]*:\s*-",
    "redirections": r"&>>|\|&",
    "ways through a case": r";;?&",
    "is it set": r"\[\[? (?:! )?-[vR] |\btest -v ",
    "any job": r"\bwait -[nfp]",
    "times": r"%\([^)]*\)T",
    "a case in a substitution": r"\$\([^()]*\bcase\b",
}


def newer_forms(script: str) -> Iterator[str]:
    """What of a script bash 3.2 lacks; there an empty array is no array under set -u, too."""
    shell = re.sub(r"<<'(\w+)'.*?^\1$", "", script, flags=re.MULTILINE | re.DOTALL)
    shell = re.sub(r"^\s*#.*|\s# .*", "", shell, flags=re.MULTILINE)
    for what, pattern in NEWER_FORMS.items():
        yield from (f"{what}: {found.group()}" for found in re.finditer(pattern, shell))
    shell = re.sub(r"\$\{(\w+)\[@\]\+\"\$\{\1\[@\]\}\"\}", "", shell)  # guarded
    for name in sorted(set(re.findall(r"\$\{(\w+)\[[@*]\]", shell))):
        values = re.findall(rf"\b{name}=\(\s*(.)", shell)
        if not values or ")" in values:
            yield f"an array that may be empty: {name}"


def test_run_sh_has_nothing_that_bash_3_2_lacks(repository):
    assert list(newer_forms((repository / "run.sh").read_text())) == []


@pytest.mark.parametrize(
    "planted",
    [
        "declare -A table", "local -n other=name", "mapfile -t lines", "readarray lines", 'echo "${name^^}"',
        'echo "${name,}"', 'echo "${names[0]@Q}"', 'echo "${1:0:-1}"', "command &>> log", "a |& b", "x) a ;;&",
        "x) a ;&", "[[ -v name ]]", "wait -n", "printf '%(%F)T' -1", "names=(a b); echo ${names[-1]}",
        'names=(); run "${names[@]}"', 'local names; run "${names[@]}"', 'x="$(case $1 in a) echo;; esac)"',
    ],
)  # fmt: skip
def test_forms_that_bash_3_2_lacks_are_found(planted):
    assert len(list(newer_forms(f"set -u\n{planted}\n"))) == 1


@pytest.mark.parametrize(
    "fine",
    [
        'names=(a); run "${names[@]}"', 'names=(); run ${names[@]+"${names[@]}"}', 'run "${@:2}" && a || b',
        "# mapfile is newer", "case $1 in a) b ;; esac", "python <<'CODE'\nmapfile\nCODE",
    ],
)  # fmt: skip
def test_forms_that_bash_3_2_has_are_let_be(fine):
    assert list(newer_forms(f"{fine}\n")) == []
