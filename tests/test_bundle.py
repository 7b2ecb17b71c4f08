"""The bundler and the packer: what they make does what the modules did (what they refuse: test_bundle_refusals.py)."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.bundle.bundler import bundle_source
from lab.bundle.packer import minify_source, pack_source, quote_bytes, unpack_source
from lab.bundle.parts import BundleError

ENTRY = '''\
#!/usr/bin/env python3
"""The toy's story."""

import sys

from golf.model.net import Net, describe  # the network
from golf.settings import Settings

BUNDLED = False  # True in one file


def main() -> None:
    print(describe(Net(Settings(width=3))), BUNDLED, len(sys.argv), __file__.endswith(".py"))


if __name__ == "__main__":
    main()
'''
SETTINGS = '''\
"""Knobs."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class Settings:
    width: int = 2
    """Columns."""
    mode: Literal["a", "b"] = "a"


def field_types(settings: Settings) -> Iterator[object]:
    return (knob.type for knob in fields(settings))


def half(table: Mapping[str, float]) -> float:
    # a comment that says why
    total: float = math.fsum(table.values())
    return total / 2
'''
NET = '''\
import inspect
import math
from collections.abc import Mapping

from golf.settings import (
    Settings,
    field_types,
    half,
)

QUOTE = """two

    words"""


class Net:
    def __init__(self, settings: Settings):
        self.settings = settings


def describe(net: Net, *, pad: int = 1) -> str:
    kinds = [str(kind) for kind in field_types(net.settings)]
    total = half({"x": math.pi})
    return f"{kinds} {net.settings.width * pad} {total} {QUOTE!r} {list(inspect.get_annotations(describe))}"


def source_of_describe() -> str:
    return inspect.getsource(describe)
'''


TOY = {"train_gpt.py": ENTRY, "golf/settings.py": SETTINGS, "golf/model/net.py": NET}


@pytest.fixture
def toy(tmp_path, write_tree):
    """Writes the toy project, with some files added or replaced; returns its entry and its root."""

    def write(changed: dict[str, str] | None = None) -> tuple[Path, Path]:
        root = tmp_path / "project"
        write_tree(root, TOY | (changed or {}))
        return root / "train_gpt.py", root

    return write


def run_script(path: Path, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)


def test_one_file_with_header_imports_and_rulers(toy):
    source = bundle_source(*toy())
    assert source.startswith("#!/usr/bin/env python3\n# Made by tools/bundle.py from train_gpt.py")
    assert (
        f"{hashlib.sha256(SETTINGS.encode()).hexdigest()[:16]}  {SETTINGS.count(chr(10)):>4} lines  golf/settings.py"
        in source
    )
    assert re.findall(r"^# ---- (\S+) -+$", source, re.M) == ["golf/settings.py", "golf/model/net.py", "train_gpt.py"]
    top = source.split("# ----")[0]
    assert top.count("import math\n") == 1 and "from collections.abc import Iterator, Mapping\n" in top
    assert "# a comment that says why" in source and "two\n\n    words" in source
    assert "BUNDLED = True  # True in one file\n" in source and "BUNDLED = False" not in source
    assert "\n\n\n\n" not in source and not re.search(r"[ \t]$", source, re.M)


def test_module_shared_by_two_appears_once_and_before_both(toy):
    extra = "from golf.settings import Settings\n\ndef widest(): return Settings(9)\n"
    entry = ENTRY.replace("import sys\n", "import sys\n\nfrom golf.extra import widest\n") + "print(widest())\n"
    source = bundle_source(*toy({"train_gpt.py": entry, "golf/extra.py": extra}))
    order = re.findall(r"^# ---- (\S+) -+$", source, re.M)
    assert order == ["golf/settings.py", "golf/extra.py", "golf/model/net.py", "train_gpt.py"]


def test_future_of_all_parts_comes_before_everything_but_the_docstring(tmp_path, toy):
    future = "from __future__ import annotations\n"
    changed = {
        "train_gpt.py": ENTRY.replace("import sys\n", future + "import sys\n"),
        "golf/settings.py": SETTINGS.replace("import math\n", future + "import math\n"),
        "golf/model/net.py": future + NET,
    }
    script, root = toy(changed)
    modules = run_script(script)
    (tmp_path / "alone").mkdir()
    one_file = tmp_path / "alone" / "bundle.py"
    one_file.write_text(bundle_source(script, root))
    assert modules.stdout.replace("False", "True", 1) == run_script(one_file).stdout != ""
    assert "'int'" in modules.stdout  # the annotations that dataclasses see are text now


@pytest.mark.parametrize("form", ["readable", "packed"])
def test_same_output_as_the_modules_from_an_empty_folder(tmp_path, toy, form):
    script, root = toy()
    readable = bundle_source(script, root)
    empty = tmp_path / "empty"
    empty.mkdir()
    one_file = empty / "train_gpt.py"
    one_file.write_bytes(readable.encode() if form == "readable" else pack_source(readable))
    modules, alone = run_script(script, "x"), run_script(one_file, "x", folder=empty)
    expected = modules.stdout.replace("False", "True", 1)
    assert modules.returncode == alone.returncode == 0, alone.stderr
    assert (
        "<class 'int'>" in expected
        and "typing.Literal['a', 'b']" in expected
        and "['net', 'pad', 'return']" in expected
    )
    assert alone.stdout == expected


def test_same_input_same_bytes(tmp_path, toy):
    readable = bundle_source(*toy())
    assert readable == bundle_source(*toy())
    assert pack_source(readable) == pack_source(readable)
    code = (
        "import sys; from pathlib import Path; from lab.bundle.bundler import bundle_source; "
        "from lab.bundle.packer import pack_source; root = Path(sys.argv[1]); "
        "sys.stdout.buffer.write(pack_source(bundle_source(root / 'train_gpt.py', root)))"
    )
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        root = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-c", code, str(tmp_path / "project")]
        assert subprocess.check_output(command, cwd=root, env=environment) == pack_source(readable)


def test_a_change_in_any_part_changes_the_provenance(toy):
    before = bundle_source(*toy())
    after = bundle_source(*toy({"golf/settings.py": SETTINGS + "# more\n"}))
    digests = [re.search(r"sha256 of the parts: (\w{64})", source).group(1) for source in (before, after)]
    assert digests[0] != digests[1]


def test_unpacking_gives_the_minified_source_without_running_it():
    source = "raise SystemExit('ran')  # comment\n" + "x = 'payload'\n" * 200
    packed = pack_source(source)
    assert packed.startswith(b"# coding: latin-1\n") and hashlib.sha256(source.encode()).hexdigest().encode() in packed
    assert unpack_source(packed) == minify_source(source)
    assert len(packed) < len(source)


@given(st.binary(max_size=300))
def test_any_bytes_stand_in_a_literal(data):
    source = b"# coding: latin-1\nx = " + quote_bytes(data).encode("latin-1") + b"\n"
    scope = {}
    exec(compile(source, "literal", "exec"), scope)
    assert scope["x"].encode("latin-1") == data and b"\0" not in source and b"\r" not in source


@pytest.mark.parametrize("data", [bytes(range(256)) * 3, b"\0007\0\r\n", b'"""' * 9, b'\\"', b"\\" * 5, b""])
def test_hard_bytes_stand_in_a_literal(data):
    test_any_bytes_stand_in_a_literal.hypothesis.inner_test(data)


@pytest.mark.parametrize("text", ["", "print('hello')", "x = 'no base85 \"'", "x = '00000'", "(", "x = 'VPaz'"])
def test_what_was_not_packed_does_not_unpack(text):
    with pytest.raises(BundleError):
        unpack_source(text.encode())


def test_a_cut_payload_does_not_unpack():
    packed = pack_source("x = 1\n" * 50)
    start, end = packed.index(b'"""') + 3, packed.rindex(b'"""')
    with pytest.raises(BundleError):
        unpack_source(packed[: start + (end - start) // 2] + packed[end:])


def test_source_of_a_newer_python_is_not_packed():
    with pytest.raises(BundleError, match="not Python 3.10"):
        pack_source("type Pair = tuple[int, int]\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\x89PNG", r"golf/settings.py: not UTF-8 \(byte 0\)"), (b"x = 1\n\0", r"golf/settings.py:\d: .*null bytes")],
)
def test_what_is_no_text_is_no_script(toy, data, message):
    entry, root = toy()
    (root / "golf" / "settings.py").write_bytes(data)
    with pytest.raises(BundleError, match=message):
        bundle_source(entry, root)


def test_quotes_in_f_strings_stay_those_of_the_oldest_python():
    assert minify_source("""d={'a':1}\nprint(f"{d['a']}")\n""").strip().endswith("""print(f"{d['a']}")""")


def test_functions_find_their_source_in_a_packed_script(tmp_path):
    """inspect.getsource is what triton.jit calls; torch.compile and custom operators read annotations."""
    script = tmp_path / "packed.py"
    script.write_bytes(
        pack_source(
            "import inspect, sys\n"
            "def kernel(x_ptr: 'pointer', BLOCK: int) -> int:\n    '''doc'''\n    y: int = BLOCK\n    return y\n"
            "print(inspect.getsource(kernel)); print(kernel.__annotations__, __name__, __file__ == sys.argv[0])\n"
        )
    )
    finished = run_script(script)
    assert "def kernel(x_ptr:'pointer',BLOCK:int)->int:" in finished.stdout, finished.stderr
    assert "{'x_ptr': 'pointer', 'BLOCK': <class 'int'>, 'return': <class 'int'>} __main__ True" in finished.stdout


def test_tracebacks_of_a_packed_script_show_its_lines(tmp_path):
    script = tmp_path / "packed.py"
    script.write_bytes(pack_source("def divide(numerator):\n    # why\n    return numerator / 0\n\n\ndivide(5)\n"))
    finished = run_script(script)
    assert finished.returncode == 1
    assert re.search(r'packed\.py:src", line \d+, in divide', finished.stderr)
    assert "numerator/0" in finished.stderr and "ZeroDivisionError" in finished.stderr


def test_the_command_writes_at_once_and_reports_sizes(tmp_path, repository):
    """Run in a copy of the parts that the command needs, with the toy for an entry."""
    for name in ("golf", "lab", "tools"):
        shutil.copytree(repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "train_gpt.py").write_text("import sys\n\nBUNDLED = False\nprint(sys.version_info.major)\n")
    tool, out = tmp_path / "tools" / "bundle.py", tmp_path / "deep" / "train_gpt.py"
    made = run_script(tool, "--pack", "--json", "--out", str(out))
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["bytes_code"] == report["bytes_packed"] == out.stat().st_size
    assert report["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert run_script(out).stdout == "3\n"

    (tmp_path / "train_gpt.py").write_text("import golf\n")
    before = out.read_bytes()
    refused = run_script(tool, "--out", str(out))
    assert refused.returncode == 2 and refused.stderr.startswith("bundle: train_gpt.py:1:")
    assert refused.stderr.count("\n") == 1 and out.read_bytes() == before


@pytest.mark.slow
def test_the_real_bundle_starts_from_an_empty_folder(tmp_path, repository):
    script = repository / "train_gpt.py"
    if not script.exists():
        pytest.skip("there is no train_gpt.py yet")
    readable = bundle_source(script, repository)
    assert not re.search(r"^\s*(from|import) golf\b", readable, re.M)
    outputs = []
    for name, data in (("readable.py", readable.encode()), ("packed.py", pack_source(readable))):
        (tmp_path / name).write_bytes(data)
        outputs.append(run_script(tmp_path / name, "--help", folder=tmp_path))
        assert outputs[-1].returncode == 0, outputs[-1].stderr
    knobs = [re.findall(r"^  (\w+)=", output.stdout, re.M) for output in outputs]  # the packed one has lost their docs
    assert knobs[0] == knobs[1] and len(knobs[0]) > 100 and "--preset" in outputs[1].stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed.py", "readable.py"]
