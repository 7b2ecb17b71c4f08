"""What the bundler refuses, each with the place: whatever could mean something else in one file than in many."""

import pytest

from lab.bundle.bundler import bundle_source
from lab.bundle.parts import BundleError

REFUSED = {
    "same global name twice": (
        {"golf/a.py": "import math\n\ndef scale(): pass\n", "golf/b.py": "scale = 3\nother = 4\n"},
        "from golf.a import scale\nfrom golf.b import other",
        r"golf/b.py:1: .*scale is bound at golf/a.py:3",
    ),
    "same private global name twice": (
        {"golf/a.py": "def one(): return _help\ndef _help(): pass\n", "golf/b.py": "two = 2\nclass _help: pass\n"},
        "from golf.a import one\nfrom golf.b import two",
        r"golf/b.py:2: .*_help is bound at golf/a.py:2",
    ),
    "name made global in a function": (
        {"golf/a.py": "def one():\n    global state\n    state = 1\n", "golf/b.py": "state = 2\n"},
        "from golf.a import one\nfrom golf.b import state",
        r"golf/b.py:1: .*state is bound at golf/a.py:3",
    ),
    "the entry's own name": (
        {"golf/a.py": "one = 1\nmain = 2\n"},
        "from golf.a import one\n\ndef main(): pass",
        r"train_gpt.py:3: .*main is bound at golf/a.py:2",
    ),
    "global name hides an import": (
        {"golf/a.py": "from dataclasses import field\none = field\n", "golf/b.py": "two = 2\ndef field(): pass\n"},
        "from golf.a import one\nfrom golf.b import two",
        r"golf/b.py:2: .*field hides `from dataclasses import field` at golf/a.py:1",
    ),
    "two imports under one name": (
        {"golf/a.py": "import json as codec\none = codec\n", "golf/b.py": "import pprint as codec\ntwo = codec\n"},
        "from golf.a import one\nfrom golf.b import two",
        r"golf/b.py:1: `import pprint as codec`, but codec is `import json as codec` at golf/a.py:1",
    ),
    "global name hides a built-in": (
        {"golf/a.py": "one = 1\n\ndef round(x): return x\n"},
        "from golf.a import one",
        r"golf/a.py:3: .*round hides a built-in",
    ),
    "import hides a built-in": (
        {"golf/a.py": "from math import pow\none = pow\n"},
        "from golf.a import one",
        r"golf/a.py:1: .*pow",
    ),
    "alias": ({"golf/a.py": "one = 1\n"}, "from golf.a import one as uno", r"train_gpt.py:1: alias import"),
    "import golf": ({"golf/a.py": "one = 1\n"}, "import os\nimport golf", r"train_gpt.py:2: `import golf`"),
    "import golf.a": ({"golf/a.py": "one = 1\n"}, "import golf.a", r"train_gpt.py:1: `import golf`"),
    "from golf import a": ({"golf/a.py": "one = 1\n"}, "from golf import a", r"train_gpt.py:1: `from golf import`"),
    "a package": (
        {"golf/a.py": "", "golf/p/__init__.py": ""},
        "from golf.p import a",
        r"train_gpt.py:1: .*no golf/p.py",
    ),
    "no such module": ({}, "from golf.nowhere import a", r"train_gpt.py:1: .*no golf/nowhere.py"),
    "no such name": (
        {"golf/a.py": "one = 1\n"},
        "from golf.a import two",
        r"train_gpt.py:1: two is not defined in golf/a.py",
    ),
    "second-hand name": (
        {"golf/a.py": "one = 1\n", "golf/b.py": "from golf.a import one\ntwo = one\n"},
        "from golf.b import one",
        r"train_gpt.py:1: one is not defined in golf/b.py",
    ),
    "lazy": (
        {"golf/a.py": "one = 1\n"},
        "def main():\n    from golf.a import one\n    return one",
        r"train_gpt.py:2: import of golf.a that is not at the top level",
    ),
    "conditional": (
        {"golf/a.py": "one = 1\n"},
        "if 1:\n    from golf.a import one",
        r"train_gpt.py:2: .*not at the top level",
    ),
    "relative": (
        {"golf/a.py": "from . import b\none = 1\n"},
        "from golf.a import one",
        r"golf/a.py:1: relative import",
    ),
    "star of ours": ({"golf/a.py": "one = 1\n"}, "from golf.a import *", r"train_gpt.py:1: star import"),
    "star of others": (
        {"golf/a.py": "from math import *\none = 1\n"},
        "from golf.a import one",
        r"golf/a.py:1: star import",
    ),
    "cycle": (
        {"golf/a.py": "from golf.b import two\none = 1\n", "golf/b.py": "from golf.a import one\ntwo = 2\n"},
        "from golf.a import one",
        r"golf/b.py:1: import cycle: golf/a.py -> golf/b.py -> golf/a.py",
    ),
    "main guard in a library": (
        {"golf/a.py": "one = 1\nif __name__ == '__main__':\n    print(one)\n"},
        "from golf.a import one",
        r"golf/a.py:2: __name__ would not mean this file",
    ),
    "file of a library": (
        {"golf/a.py": "one = 1\ndef where():\n    return __file__\n"},
        "from golf.a import one",
        r"golf/a.py:3: __file__ would not mean this file",
    ),
    "docstring of the entry": ({}, "import sys\nprint(__doc__)", r"train_gpt.py:2: __doc__ would not mean"),
    "future of some parts": (
        {"golf/a.py": "from __future__ import annotations\none = 1\n"},
        "from golf.a import one",
        r"golf/a.py:1: .*annotations.* would act on all",
    ),
    "code in a package": (
        {"golf/__init__.py": "version = 1\n", "golf/a.py": "one = 1\n"},
        "from golf.a import one",
        r"golf/__init__.py:1: must be empty",
    ),
    "project file outside": (
        {"golf/a.py": "from tools.x import y\none = y\n", "tools/x.py": "y = 1\n"},
        "from golf.a import one",
        r"golf/a.py:1: tools is a project file outside the package",
    ),
    "shared line": (
        {"golf/a.py": "one = 1\n"},
        "from golf.a import one; two = 2",
        r"train_gpt.py:1: .*shares its line",
    ),
    "syntax of Python 3.12": (
        {"golf/a.py": "one = 1\ntype Two = int\n"},
        "from golf.a import one",
        r"golf/a.py:2: not Python 3.10",
    ),
    "no syntax at all": ({"golf/a.py": "one = (1\n"}, "from golf.a import one", r"golf/a.py:1: not Python 3.10"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_file_and_line(tmp_path, write_tree, case):
    modules, entry, message = REFUSED[case]
    write_tree(tmp_path, modules | {"train_gpt.py": f"{entry}\nBUNDLED = False\n"})
    with pytest.raises(BundleError, match=f"^{message}"):
        bundle_source(tmp_path / "train_gpt.py", tmp_path)


def test_entry_must_exist_in_the_root_and_have_the_flag(tmp_path, write_tree):
    root = tmp_path / "project"
    write_tree(root, {"train_gpt.py": "import os\n"})
    with pytest.raises(BundleError, match=r"^train_gpt.py:1: has no top-level `BUNDLED = False`"):
        bundle_source(root / "train_gpt.py", root)
    with pytest.raises(BundleError, match="does not exist"):
        bundle_source(root / "nothing.py", root)
    with pytest.raises(BundleError, match="is not under"):
        bundle_source(tmp_path / "other.py", root)
