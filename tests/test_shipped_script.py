"""What ships: for every preset, a script that is made for it alone does from an empty folder what the modules do."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from golf.config.config import build_config
from golf.config.presets import PRESETS
from lab.bundle.bundler import bundle_source
from lab.bundle.frozen import freeze_config
from lab.bundle.packer import pack_source
from lab.bundle.specialize import UNKNOWN, Folder, Frozen, specialize

SMALL = {
    "num_layers": "2", "model_dim": "32", "num_heads": "2", "num_kv_heads": "2", "mlp_mult": "2",
    "train_seq_len": "32", "train_batch_tokens": "256", "micro_batch_tokens": "256", "iterations": "6",
    "eval_stride": "32", "eval_batch_seqs": "32", "holdout_every": "0", "limit_bytes": "400000",
}  # fmt: skip
TOYS = {
    "local": "vocab_size=400 bigram_vocab_size=64 bigram_dim=8 calibration_tokens=512 eval_seq_len=64",
    "baseline": "vocab_size=400 device=cpu eval_seq_len=32",
    "baseline-local": "vocab_size=400 eval_seq_len=32",
    "leaderboard": "vocab_size=400 device=cpu bigram_vocab_size=64 bigram_dim=8 eval_seq_len=64 swa_start=0.5",
    "stories": "eval_seq_len=32",
    "frontier-base": (
        "vocab_size=400 device=cpu num_layers=5 loop_first=1 loop_last=2 lanes_from=3 short_seq_len=16 "
        "middle_seq_len=0 middle_seq_fraction=0 calibration_tokens=512 calibration_reserve=0 eval_seq_len=64"
    ),
    "stories low-bit": (
        "eval_seq_len=32 qat_enabled=1 attn_bits=16 mlp_bits=16 weight_q=ternary-qkvo weight_k=ternary-qkvo "
        "weight_v=ternary-qkvo weight_o=ternary-qkvo weight_up=ternary weight_down=int4-row act_mlp_in=int8 "
        "act_q=tanh-ternary knowledge_tokens=2 codec=rans"
    ),
}
"""A configuration of each preset that trains in seconds."""
MACHINE = ["threads=1", "compile=off", "max_wallclock_seconds=0", "warmup_steps=1", "runs_root=runs", "run_id=x"]
MOST_BYTES = {
    "leaderboard": 42_600, "local": 69_000, "frontier-base": 64_500, "frontier-base-local": 59_200,
    "frontier": 70_500, "frontier-local": 71_000,
}  # fmt: skip


def run(script: Path, folder: Path, *arguments: str, **variables: str) -> dict:
    """Runs a script in `folder` and returns the result of its run."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | variables
    finished = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, cwd=folder, env=environment, timeout=1500
    )
    result = folder / "runs" / "x" / "result.json"
    assert result.exists(), finished.stderr[-2000:] + finished.stdout[-2000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A text of 120 kB: documents of other words each."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    words = re.findall(r"\w+", Path(subprocess.__file__).read_text())[:4000]
    rows = (" ".join(words[n * 37 % 3900 : n * 37 % 3900 + 100]) for n in range(200))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("toy", TOYS)
def test_the_shipped_script_of_a_run_does_what_the_modules_did(tmp_path, repository, corpus, toy):
    """The packed code of a run of the modules, alone in an empty folder, gives the same artifact and the same score."""
    knobs = [*(f"{knob}={value}" for knob, value in SMALL.items()), *TOYS[toy].split(), *MACHINE]
    preset = toy.split()[0]
    made = tmp_path / "made"
    made.mkdir()
    first = run(repository / "train_gpt.py", made, "--preset", preset, "--corpus", str(corpus), *knobs)
    data = json.loads((made / "runs/x/config.json").read_text())["data"]
    alone = tmp_path / "alone"
    alone.mkdir()
    script = alone / "train_gpt.py"
    script.write_bytes((made / "runs/x/train_gpt.py").read_bytes())
    places = {name.upper(): data[name] for name in ("data_path", "tokenizer_path")}
    second = run(script, alone, *MACHINE, **places)
    for key in ("artifact_sha256", "val_bpb", "bytes_code", "code_sha256", "params", "steps", "features"):
        assert first[key] == second[key], key
    assert first["bytes_code"] == script.stat().st_size
    readable = (made / "runs/x/train_gpt_readable.py").read_text()
    assert pack_source(readable) == script.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_ships_no_more_than_it_may(preset, repository):
    packed = pack_source(bundle_source(repository / "train_gpt.py", repository, freeze(preset)))
    assert len(packed) <= MOST_BYTES.get(preset, 45_000)


def freeze(preset: str, **knobs: str) -> Frozen:
    return freeze_config(build_config(preset, {}, knobs))


@pytest.fixture(scope="module")
def leaderboard(repository) -> str:
    return bundle_source(repository / "train_gpt.py", repository, freeze("leaderboard"))


def test_what_a_preset_does_not_use_is_not_in_its_script(leaderboard):
    for absent in (
        "class FactorModel",
        "def fill_limit",
        "parse_site",
        "encode_zstd",
        "def calibrate",
        "KeyValueCache(",
    ):
        assert absent not in leaderboard, absent
    for present in ("def encode_lzma", "class SmearGate", "def fit_to_limit", "def grid_row_kernel"):
        assert present in leaderboard, present


def test_a_script_for_one_configuration_takes_no_other(leaderboard, tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text(leaderboard)
    command = [sys.executable, script, "num_layers=3", "device=cpu"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert refused.returncode == 2 and "this script is made for num_layers=10" in refused.stderr
    assert refused.stderr.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["train_gpt.py"]


FROZEN = Frozen(
    {"codec": "zlib"}, {"codec": "zlib", "smear_gate": False}, frozenset({"codec"}), frozenset({"on"}), {},
    frozenset({"threads"}),
)  # fmt: skip
TOY = '''"""Story."""
# header
import math
import zlib

# ---- golf/a.py ------


FROZEN: dict = {}


def left_out(x: int) -> int:
    return zlib.crc32(x)


# why it stays
def stays(quant, codec: "Codec") -> float:
    # a comment
    return math.pi if quant.codec == "zlib" and codec != "lzma" else left_out(1)


def gate(config):
    if config.smear_gate:
        return left_out(2)
    return 3


BY_CODEC = {"zlib": stays, "lzma": left_out}


class Kept:
    def used(self):
        return self.other

    def unused(self):
        return left_out(3)


class ToyConfig:
    width: int = 3
    """Said by a test."""
    smear_gate: bool = False
    """Folded away."""
    codec: str = "lzma"
    """Frozen."""
    threads: int = 0
    """Free."""


register_feature = print
register_feature(Feature := dict)
print(BY_CODEC["zlib"], gate(None), Kept().used, FROZEN, ToyConfig().width)
'''


def test_folding_by_example():
    text = specialize(TOY.replace("register_feature(Feature := dict)\n", ""), FROZEN)
    assert "left_out" not in text and "unused" not in text and "import zlib" not in text
    assert "# why it stays" in text and "return math.pi" in text and "FROZEN: dict = {'codec': 'zlib'}" in text
    assert "BY_CODEC = {'zlib': stays}" in text


def test_knobs_that_nothing_names_go_with_their_line():
    text = specialize(TOY.replace("register_feature(Feature := dict)\n", ""), FROZEN)
    assert "smear_gate" not in text and "Folded away" not in text
    for kept in ("width: int = 3", "Said by a test", 'codec: str = "lzma"', "threads: int = 0", "Free."):
        assert kept in text


@pytest.mark.parametrize(
    ("test", "value"),
    [
        ("quant.codec == 'zlib'", True),
        ("self.config.quant.codec in ('lzma', 'zlib')", True),
        ("codec != 'zlib'", False),
        ("config.smear_gate and unknown()", False),
        ("not model.smear_gate or unknown()", True),
        ("bool(config.smear_gate)", False),
    ],
)
def test_tests_that_are_known(test, value):
    assert bool(Folder(FROZEN).value(ast.parse(test, mode="eval").body)) is value


@pytest.mark.parametrize(
    "test", ["artifact.codec == 'zlib'", "config.num_layers", "unknown() and quant.codec == 'zlib'"]
)
def test_tests_that_are_not_known(test):
    assert Folder(FROZEN).value(ast.parse(test, mode="eval").body) is UNKNOWN
