"""How scripts and logs are read for a check: packed payloads, local modules, ghost knobs, names of final lines."""

import base64
import lzma
import math
import tracemalloc
import zlib

import pytest
from evidence_fixtures import (
    PUBLISHED_SCORES,
    PUBLISHED_SCRIPT,
    SP1024,
    claim,
    codes,
    edit_log,
    errors,
    script_bytes,
    ship,
    texts,
    write_published,
)

from lab.bundle.packer import pack_source
from lab.record.knob_reading import ghost_knobs
from lab.record.log_reading import read_log
from lab.record.script_reading import find_neighbours, read_script, source_layers
from lab.record.text_check import VAL_BYTES

FULL_TEXT = {"8192_bpe": 3.727, "caseops": 3.157, "1024": 2.436}
MEAN = sum(PUBLISHED_SCORES.values()) / len(PUBLISHED_SCORES)


@pytest.fixture
def published(tmp_path):
    return write_published(tmp_path / "record")


# ---- what is in the script, and beside it ----


def hide_lzma(source: str) -> str:
    payload = base64.b85encode(lzma.compress(source.encode(), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]))
    return f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{payload.decode()}"),format=L.FORMAT_RAW))'


def hide_zlib(source: str) -> str:
    payload = base64.b64encode(zlib.compress(source.encode()))
    return f"import zlib,base64\nexec(zlib.decompress(base64.b64decode({payload})))"


def hide_ascii85(source: str) -> str:
    payload = base64.a85encode(lzma.compress(source.encode()))
    return f"import lzma,base64\nexec(lzma.decompress(base64.a85decode({payload})))"


HELPER_IMPORTS = (
    "import helper\nhelper.go()\n",
    "def main():\n    from helper import go\n    go()\nmain()\n",
    "import importlib\nimportlib.import_module('helper').go()\n",
    "exec(open('helper.py').read())\n",
    "import runpy\nrunpy.run_path('./helper.py')\n",
    "from pathlib import Path\nexec(Path(__file__).with_name('helper.py').read_text())\n",
)
HIDERS = {
    "plain": str,
    "ours": pack_source,
    "lzma": hide_lzma,
    "zlib": hide_zlib,
    "twice": lambda s: hide_zlib(hide_ascii85(s)),
}


@pytest.mark.parametrize("hide", HIDERS.values(), ids=HIDERS)
@pytest.mark.parametrize("source", HELPER_IMPORTS)
def test_a_local_module_is_found_however_it_is_loaded(tmp_path, hide, source):
    (tmp_path / "helper.py").write_text("import deeper\ngo = deeper.go\n")
    (tmp_path / "deeper.py").write_text("def go(): pass\n")
    (tmp_path / "train_gpt.py").write_bytes(script_bytes(hide(source)))
    script = read_script(tmp_path / "train_gpt.py", tmp_path)
    assert set(find_neighbours(script, tmp_path).modules) == {"helper.py", "deeper.py"}


def test_a_hidden_module_counts_as_code(published):
    (published / "helper.py").write_text("x = 1\n" * 1000)
    ship(published, pack_source("import helper\nprint(helper.x)\n"))
    found = texts(published)
    assert "S25-local-module" in errors(published) and "helper.py (6,000 bytes)" in found


def test_a_hidden_module_that_breaks_the_limit(tmp_path):
    source = pack_source("import helper\nprint(helper.x)\n")
    folder = write_published(tmp_path / "record", source, model_bytes=16_000_000 - len(source))
    assert "S20-over-limit" not in errors(folder)
    (folder / "helper.py").write_text("x = 1\n")
    assert "S20-over-limit" in errors(folder)


def test_a_module_that_was_counted_is_told_as_a_warning(published):
    (published / "helper.py").write_text("x = 1\n")
    ship(published, "import helper\nprint(helper.x)\n")
    size = len("import helper\nprint(helper.x)\n") + 6
    claim(published, bytes_code=size, bytes_total=15_800_000 + size)
    for seed in PUBLISHED_SCORES:
        edit_log(published, f"Code size: {size - 6} ", f"Code size: {size} ", seed)
    assert codes(published) == {"S25-local-module": "warning"}


def test_a_missing_module_and_a_data_file_are_named(published):
    (published / "table.bin").write_bytes(b"x" * 1234)
    ship(published, "exec(open('decode.py').read())\ntable = open('table.bin', 'rb')\nprint(table)\n")
    assert codes(published) == {"S27-missing-module": "error", "S26-data-file": "warning"}
    assert "table.bin (1,234 bytes)" in texts(published) and "decode.py" in texts(published)


def test_a_payload_in_a_file_beside_the_script_is_read(tmp_path):
    (tmp_path / "payload.xz").write_bytes(lzma.compress(b"import os\nEVAL = os.environ.get('EVAL')\n" * 9))
    (tmp_path / "train_gpt.py").write_text("import lzma\nexec(lzma.decompress(open('payload.xz','rb').read()))\n")
    script = read_script(tmp_path / "train_gpt.py", tmp_path)
    assert len(script.layers) == 2 and not script.opaque and ghost_knobs(script) == (["EVAL"], [])


def test_nothing_that_is_unpacked_is_run(tmp_path):
    planted = tmp_path / "planted"
    source = f"open({str(planted)!r}, 'w').close()\nimport os\n"
    layers, opaque = source_layers(hide_zlib(source), {})
    assert layers[1:] == [source] and not opaque and not planted.exists()


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb = base64.b64encode(zlib.compress(b"import os\n" + b"#" * 40_000_000, 9)).decode()
    tracemalloc.start()
    layers, opaque = source_layers(f"import zlib,base64\nexec(zlib.decompress(base64.b64decode('{bomb}')))", {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(layers) == 1 and opaque and peak < 40_000_000


def test_ghost_knobs_are_told_from_read_ones(tmp_path):
    source = (
        "import os\n"
        "def env_int(name, default): return int(os.environ.get(name, default))\n"
        "class Hyperparameters:\n"
        "    used = int(os.environ.get('USED', 1))\n"
        "    by_name = os.getenv('BY_NAME', '')\n"
        "    dead = env_int('DEAD', 1)\n"
        "    shown: bool = bool(os.environ.get('SHOWN', 0))\n"
        "    plain = 3\n"
        "DEAD_TOO = os.environ.get('DEAD_TOO')\n"
        "args = Hyperparameters()\n"
        "log0(f'shown:{args.shown} used:{args.used}')\n"
        "print(evaluate(args.used))\nevaluate(getattr(args, 'by_name'))\n"
    )
    (tmp_path / "train_gpt.py").write_text(source)
    script = read_script(tmp_path / "train_gpt.py", tmp_path)
    assert ghost_knobs(script) == (["DEAD_TOO", "dead"], ["shown"])


# ---- logs ----


def test_names_of_final_lines(tmp_path):
    lines = {
        "final_int6_roundtrip val_loss:2.0 val_bpb:1.20": 1.20,
        "final_int6_sliding_window val_loss:1.9 val_bpb:1.15 stride:64 eval_time:500ms": 1.15,
        "final_sliding_window_eval val_loss:1.9 val_bpb:1.14": 1.14,
        "final_int6_sliding_window_exact val_bpb: 1.1303": 1.1303,
        "quantized_ttt_phased val_loss:2.32002732 val_bpb:1.06016266 eval_time:515283ms": 1.06016266,
        "legal_ttt_exact val_loss:1.91 val_bpb:1.13": 1.13,
    }
    for line, value in lines.items():
        (tmp_path / "train.log").write_text(f"step:5/9 val_loss:1.0 val_bpb:0.5 train_time:5ms\n{line}\n")
        final = read_log(tmp_path / "train.log").last_final
        assert final is not None and final.val_bpb == value, line
    for line in (
        "step:5/9 val_loss:1.0 val_bpb:0.5 train_time:5ms",
        "diagnostic pre-quantization post-ema val_loss:2.3 val_bpb:1.06",
        "val_bpb:enabled tokenizer_kind=sentencepiece",
        'log0(f"final_int8_zlib_roundtrip val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f}")',
    ):
        (tmp_path / "train.log").write_text(line + "\n")
        assert read_log(tmp_path / "train.log").last_final is None, line


def test_later_logs_are_read_too(tmp_path):
    (tmp_path / "train_s314.log").write_text(
        "Hyperparameters:\n  seed: 314\n  ttt_enabled: True\n  vocab_size: 8192\n  run_id: 5\n"
        "4500/20000 train_loss: 2.3456 train_time: 9.6m tok/s: 6000000\n"
        "stopping_early: wallclock_cap train_time: 596137ms step: 4703/20000\n"
        "Total submission size quantized+brotli: 15,989,499 bytes\n"
        "quantized_ttt_phased val_loss:2.31 val_bpb:1.058 eval_time:591446ms\ntotal_eval_time:591.4s\n"
    )
    log = read_log(tmp_path / "train_s314.log")
    assert (log.seed, log.steps, log.total_bytes, log.total_eval_seconds) == (314, 4703, 15_989_499, 591.4)
    assert log.train_seconds == pytest.approx(596.137) and log.config == {"ttt_enabled": "True", "vocab_size": "8192"}


def test_words_in_the_source_of_a_log_are_no_trouble(published):
    script = PUBLISHED_SCRIPT + "\n# CUDA out of memory\n# SIGTERM\n"
    ship(published, script)
    assert codes(published) == {}


@pytest.mark.parametrize(("path", "ratio", "found"), [
    ("fineweb_8192_bpe.model", 3.727, None),
    ("fineweb_8192_bpe.model", 2.436, "S50-bytes-per-token"),
    ("fineweb_8192_caseops.model", 3.157, None),
    ("fineweb_1024_bpe.model", 2.436 * 1.0019, None),
    ("fineweb_1024_bpe.model", 2.436 * 1.0025, "S50-bytes-per-token"),
    ("own.model", 2.9, "S52-unknown-tokenizer"),
    ("own.model", 3.727, None),
])  # fmt: skip
def test_bytes_per_token_of_the_tokenizers(tmp_path, path, ratio, found):
    folder = write_published(tmp_path / "record")
    for seed, score in PUBLISHED_SCORES.items():
        edit_log(
            folder, f"val_loss:{score * math.log(2) * SP1024:.8f}", f"val_loss:{score * math.log(2) * ratio:.8f}", seed
        )
        edit_log(folder, "fineweb_1024_bpe.model", path, seed)
        edit_log(folder, "fineweb10B_sp1024", "dataset", seed)
        tokens = VAL_BYTES / next((known for mark, known in FULL_TEXT.items() if mark in path), ratio)
        edit_log(folder, "tokens:62021632", f"tokens:{tokens:.0f}", seed)
    claim(folder, val_loss=round(MEAN * math.log(2) * ratio, 6))
    assert set(codes(folder)) == ({found} if found else set())
