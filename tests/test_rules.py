"""The rules of the house, each as a function from a tree of files to its violations.

Every rule is run on this repository, where it must find nothing, and on a small tree with one planted violation,
which it must find.
"""

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from golf.config.config import KNOBS
from lab.bundle.bundler import check_names
from lab.bundle.parts import BundleError, check_import_forms, check_module_attributes, imported_files, read_part

REPOSITORY = Path(__file__).resolve().parents[1]
ROOMS = ("config", "runtime", "data", "model", "optim", "quant", "artifact", "score", "run")
"""Of golf/, in the order of the data's way; imports run backwards along it."""
PURPOSES = (
    "bundle", "record", "compare", "compress", "rates", "study", "generate", "evals", "demo", "machine", "cost",
    "bench", "prepare", "probe", "track", "export",
)  # fmt: skip
"""Folders of lab/, one for each purpose."""
MOST_LINES_OF_FILE, MOST_LINES_OF_FUNCTION = 400, 60

ENVIRONMENT_READERS = {
    # What torchrun tells each process, and what torch reads to find compilers and its cache; no knobs.
    "golf/runtime.py": {"RANK", "WORLD_SIZE", "LOCAL_RANK", "CC", "CXX", "TORCHINDUCTOR_CACHE_DIR"},
    "lab/demo/page.py": {"no_proxy", "NO_PROXY"},
    "lab/track/offline_runs.py": {"WANDB_ERROR_REPORTING"},
}
"""Files that may read the environment, and which variables; knobs reach golf/config/config.py as an argument."""
ENVIRONMENT_TAKERS = {"build_config", "machine_fingerprint", "parse_command"}
"""Functions that os.environ may be handed to: the way from a script to golf/config/config.py."""


def library_files(root: Path) -> list[Path]:
    return sorted((root / "golf").rglob("*.py"))


def lab_files(root: Path) -> list[Path]:
    return sorted((root / "lab").rglob("*.py"))


def program_files(root: Path) -> list[Path]:
    """Both buildings, the tools and the scripts: everything but tests."""
    folders = [path for folder in ("golf", "lab", "tools", "data") for path in sorted((root / folder).rglob("*.py"))]
    return folders + sorted(root.glob("*.py"))


@functools.cache
def parsed(text: str) -> ast.Module:
    """The syntax tree of a file's text, which many rules walk."""
    return ast.parse(text)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(parsed(path.read_text(encoding="utf-8")))


def place(root: Path, path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(root).as_posix()}:{node.lineno}"


def imported_modules(path: Path) -> Iterator[tuple[ast.AST, str]]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, node.module or "."


def room_of(names: list[str]) -> str:
    return names[1] if len(names) > 1 else ""


def imports_run_backwards(root: Path) -> Iterator[str]:
    for path in library_files(root):
        own = room_of(list(path.relative_to(root).with_suffix("").parts))
        if own == "__init__":
            continue
        if own not in ROOMS:
            yield f"{path.relative_to(root)}: {own} is no room: the rooms are {', '.join(ROOMS)}"
            continue
        for node, module in imported_modules(path):
            other = room_of(module.split("."))
            if module.startswith("golf.") and other in ROOMS and ROOMS.index(other) > ROOMS.index(own):
                yield f"{place(root, path, node)}: {own} imports {other}, which comes later"


def imports_have_one_form(root: Path) -> Iterator[str]:
    for path in library_files(root):
        try:
            part = read_part(root, path.relative_to(root).as_posix())
            check_import_forms(part)
            check_module_attributes(part)
        except BundleError as error:
            yield str(error)


def names_are_unique(root: Path) -> Iterator[str]:
    try:
        check_names([read_part(root, path.relative_to(root).as_posix()) for path in library_files(root)])
    except BundleError as error:
        yield str(error)


def packages_are_empty(root: Path) -> Iterator[str]:
    for path in library_files(root):
        if path.name == "__init__.py" and path.read_text(encoding="utf-8").strip():
            yield f"{path.relative_to(root)}: must be empty: the bundle has no packages"


def the_wall_stands(root: Path) -> Iterator[str]:
    """golf imports golf alone, lab imports golf and lab: neither knows tools, tests or scripts."""
    for path in library_files(root) + lab_files(root):
        building = path.relative_to(root).parts[0]
        forbidden = {"tools", "tests", "train_gpt", "data"} | ({"lab"} if building == "golf" else set())
        for node, module in imported_modules(path):
            if module.split(".")[0] in forbidden:
                yield f"{place(root, path, node)}: {building} imports {module}"


def golf_is_what_ships(root: Path) -> Iterator[str]:
    """golf/ is exactly what train_gpt.py reaches by its imports."""
    reached = set(imported_files(root, "train_gpt.py"))
    for path in library_files(root):
        name = path.relative_to(root).as_posix()
        if path.name != "__init__.py" and name not in reached:
            yield f"{name}: train_gpt.py does not reach it: what ships nowhere belongs in lab/"


def lab_has_purposes(root: Path) -> Iterator[str]:
    for path in lab_files(root):
        purpose = path.relative_to(root).parts[1]
        if purpose not in (*PURPOSES, "__init__.py", "cli.py"):
            yield f"{path.relative_to(root).as_posix()}: {purpose} is no purpose of lab/: {', '.join(PURPOSES)}"


def environment_is_read_in_config_only(root: Path) -> Iterator[str]:
    for path in program_files(root):
        allowed = ENVIRONMENT_READERS.get(path.relative_to(root).as_posix(), set())
        harmless = set()
        for node in nodes(path):  # parents come before children
            if isinstance(node, ast.Call):
                harmless |= harmless_readings(node, allowed)
            elif isinstance(node, ast.Subscript) and constant_text(node.slice) in allowed:
                harmless.add(ast.unparse(node.value) + f"@{node.value.lineno}:{node.value.col_offset}")
            elif is_environment(node) and f"{ast.unparse(node)}@{node.lineno}:{node.col_offset}" not in harmless:
                yield f"{place(root, path, node)}: reads the environment: only golf/config knows its variables"


def harmless_readings(call: ast.Call, allowed: set[str]) -> set[str]:
    """Readings of the environment in a call that passes it on to the configuration, or asks for an allowed variable."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    readings = call.args if name in ENVIRONMENT_TAKERS else []
    if name in ("get", "getenv") and call.args and constant_text(call.args[0]) in allowed:
        readings = [call.func.value if name == "get" else call.func]
    return {f"{ast.unparse(node)}@{node.lineno}:{node.col_offset}" for node in readings}


def constant_text(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ("environ", "environb", "getenv") for alias in node.names)
    return isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")


def every_knob_is_read(root: Path, knobs: tuple[str, ...] = tuple(KNOBS)) -> Iterator[str]:
    read = set()
    for path in program_files(root):
        if path.relative_to(root).as_posix() != "golf/config/config.py":
            read |= {n.attr for n in nodes(path) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    yield from (f"golf/config/config.py: nothing reads the knob {knob}" for knob in knobs if knob not in read)


def is_kernel(root: Path, path: Path) -> bool:
    return "kernels" in path.relative_to(root).with_suffix("").parts


def has_constants(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A kernel of Triton beside its plain form: what is read in one pass can't be taken apart."""
    return any(isinstance(a.annotation, ast.Name) and a.annotation.id == "constexpr" for a in function.args.args)


def files_are_short(root: Path) -> Iterator[str]:
    for path in program_files(root) + sorted((root / "tests").glob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES_OF_FILE and not is_kernel(root, path):
            yield f"{path.relative_to(root)}: {lines} lines: over {MOST_LINES_OF_FILE} wants to be two"


def functions_are_short(root: Path) -> Iterator[str]:
    for path in program_files(root) + sorted((root / "tests").glob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(root, path):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_FUNCTION and not has_constants(node):
                    yield f"{place(root, path, node)}: {node.name} has {lines} lines: over {MOST_LINES_OF_FUNCTION}"


def nothing_unpickles(root: Path) -> Iterator[str]:
    for path in program_files(root):
        for node, module in imported_modules(path):
            if module.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal"):
                yield f"{place(root, path, node)}: imports {module}: tensors and plain numbers only"
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                yield f"{place(root, path, node)}: {ast.unparse(node)}: it pickles"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                yield f"{place(root, path, node)}: allow_pickle"


def no_error_is_swallowed(root: Path) -> Iterator[str]:
    for path in program_files(root):
        for node in nodes(path):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is None:
                yield f"{place(root, path, node)}: bare except: name what can happen"
            elif ast.unparse(node.type) in ("Exception", "BaseException") and ast.unparse(node.body) == "pass":
                yield f"{place(root, path, node)}: swallows every exception"


IMPORT_PROBE = """
import importlib, sys
for external in sys.argv[2].split():
    importlib.import_module(external)
events = []
def watch(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.mkdir", "os.remove", "os.rename", "os.putenv", "socket.connect"):
        events.append(f"{event} {arguments!r:.200}")
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc", ".so")):
        events.append(f"opens {arguments[0]}")
sys.addaudithook(watch)
for module in sys.argv[1].split():
    before = len(events)
    importlib.import_module(module)
    print("".join(f"{module}: {event}\\n" for event in events[before:]), end="")
torch = sys.modules.get("torch")
if torch and torch.cuda.is_initialized():
    print("golf: importing it starts CUDA")
if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
    print("golf: importing it starts torch.distributed")
"""


def importing_does_nothing(root: Path) -> Iterator[str]:
    """Imports every module in a process that watches; other people's modules are imported before it looks."""
    modules, externals = [], set()
    for path in library_files(root):
        modules.append(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
        top_level = ast.parse(path.read_text(encoding="utf-8")).body
        imports = [node for node in top_level if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in imports:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            externals |= {name for name in names if name.split(".")[0] not in ("golf", "__future__")}
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_PROBE, " ".join(modules), " ".join(sorted(externals))]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root / "golf", timeout=600)
    yield from finished.stdout.splitlines()
    if finished.returncode:
        yield f"import failed: {finished.stderr.strip().splitlines()[-1]}"


def parses_on_the_oldest_python(root: Path) -> Iterator[str]:
    for path in program_files(root) + sorted((root / "tests").glob("*.py")):
        try:
            read_part(root, path.relative_to(root).as_posix())
        except BundleError as error:
            yield str(error)


RULES: dict[Callable[[Path], Iterator[str]], list[tuple[str, str]]] = {
    imports_run_backwards: [
        ("golf/model/x.py", "from golf.score.scorer import Score"),
        ("golf/config/config.py", "from golf.runtime import rank"),
        ("golf/extras/x.py", "import math"),
    ],
    imports_have_one_form: [
        ("golf/model/x.py", "import golf.config.config"),
        ("golf/model/x.py", "from golf import config"),
        ("golf/model/x.py", "from golf.config.config import Config as C"),
        ("golf/model/x.py", "def f():\n    from golf.config.config import Config"),
        ("golf/model/x.py", "from math import *"),
        ("golf/model/x.py", "if __name__ == '__main__':\n    print()"),
    ],
    names_are_unique: [
        ("golf/model/x.py", "class Planted: pass"),
        ("golf/model/x.py", "def np(): pass"),
        ("golf/model/x.py", "def hash(): pass"),
    ],
    packages_are_empty: [("golf/model/__init__.py", "VERSION = 1")],
    the_wall_stands: [
        ("golf/run/x.py", "from tools.bundle import main"),
        ("golf/run/x.py", "from lab.cli import run_command"),
        ("golf/run/x.py", "import lab"),
        ("lab/bundle/x.py", "from tests.conftest import toy"),
    ],
    golf_is_what_ships: [("golf/model/x.py", "width = 1")],
    lab_has_purposes: [("lab/misc/x.py", "width = 1")],
    environment_is_read_in_config_only: [
        ("golf/model/x.py", "import os\nwidth = os.environ['WIDTH']"),
        ("golf/model/x.py", "import os\nwidth = os.getenv('WIDTH')"),
        ("golf/model/x.py", "from os import environ"),
        ("golf/runtime.py", "import os\nseed = os.environ.get('SEED', '1')"),
        ("tools/x.py", "import os\nprint(dict(os.environ))"),
        ("train_gpt.py", "import os\nos.environ['OMP_NUM_THREADS'] = '1'"),
    ],
    every_knob_is_read: [
        ("golf/config/config.py", "class Planted:\n    only_here: int = 1\nprint(Planted().only_here)")
    ],
    files_are_short: [("golf/model/x.py", "x = 1\n" * (MOST_LINES_OF_FILE + 1))],
    functions_are_short: [("tools/x.py", "def f():\n" + "    x = 1\n" * MOST_LINES_OF_FUNCTION)],
    nothing_unpickles: [
        ("golf/artifact/x.py", "import pickle"),
        ("golf/artifact/x.py", "import torch\nload = lambda path: torch.load(path, weights_only=True)"),
        ("golf/artifact/x.py", "import numpy as np\nload = lambda path: np.load(path, allow_pickle=True)"),
    ],
    no_error_is_swallowed: [
        ("golf/artifact/x.py", "try:\n    x = 1\nexcept:\n    raise"),
        ("golf/artifact/x.py", "try:\n    x = 1\nexcept Exception:\n    pass"),
    ],
    importing_does_nothing: [
        ("golf/model/x.py", "open('planted.txt', 'w').close()"),
        ("golf/model/x.py", "import subprocess\nsubprocess.run(['true'])"),
        ("golf/model/x.py", "from torch import distributed\nimport tempfile\ndistributed.init_process_group("
         "'gloo', store=distributed.HashStore(), rank=0, world_size=1)"),
        ("golf/model/x.py", "raise RuntimeError('planted')"),
    ],
    parses_on_the_oldest_python: [("tests/x.py", "type Pair = tuple[int, int]")],
}  # fmt: skip
"""Each rule, and (file, text) of violations to plant."""

PLANTED = [(rule, path, text) for rule, plants in RULES.items() for path, text in plants]
SOUND = {
    "golf/__init__.py": "",
    "golf/config/config.py": "import dataclasses\n\n\nclass Planted:\n    used: int = 1\n",
    "golf/runtime.py": "import os\n\nimport numpy as np\n\ndef rank(): return np.int64(os.environ.get('RANK', 0))\n",
    "golf/model/__init__.py": "",
    "golf/score/scorer.py": "class Score: pass\n",
    "tools/bundle.py": "from golf.config.config import Planted\n\nprint(Planted().used)\n",
    "train_gpt.py": "import os\n\nfrom golf.config.config import Planted\nfrom golf.runtime import rank\n"
    "from golf.score.scorer import Score\n\nbuild_config('local', os.environ, {})\n",
}
"""A tree in which no rule finds anything; build_config need not exist, for nothing runs it."""


def knobs_of_toy(rule: Callable) -> dict[str, tuple[str, ...]]:
    return {"knobs": ("used", "only_here")} if rule is every_knob_is_read else {}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_repository_keeps(rule):
    violations = list(rule(REPOSITORY))
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_passes(rule, tmp_path, write_tree):
    write_tree(tmp_path, SOUND)
    assert list(rule(tmp_path, **({"knobs": ("used",)} if rule is every_knob_is_read else {}))) == []


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_violation_is_found(rule, path, text, tmp_path, write_tree):
    write_tree(tmp_path, SOUND | {path: SOUND.get(path, "") + text + "\n"})
    every = list(rule(tmp_path, **knobs_of_toy(rule)))
    violations = [line for line in every if not line.startswith("[Gloo]")]  # torch 2.9 talks when it is started
    assert len(violations) == 1, every
