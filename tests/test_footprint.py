"""tools/footprint.py: bytes, keys and values, and energy of a finished run."""

import json
import sys

import pytest

from golf.artifact.container import read_artifact
from golf.quant.grid import QuantizedTensor
from lab.cli import run_command
from tests.sampled_run_fixtures import make_sampled_run
from tools import footprint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_sampled_run(tmp_path_factory.mktemp("footprint"))


@pytest.fixture
def weigh(monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["footprint.py", *map(str, arguments)])
        status = run_command(footprint.Options, footprint.__doc__, footprint.work)
        return status, *capsys.readouterr()

    return call


def test_every_byte_and_parameter_is_counted(run, weigh):
    status, output, _ = weigh(run, "--json")
    found, state = json.loads(output), read_artifact(run / "model.golf").state
    sizes = [e.codes_RC.numel() if isinstance(e, QuantizedTensor) else e.numel() for e in state.values()]
    assert status == 0 and found["bytes"] == (run / "model.golf").stat().st_size
    assert 0 < found["bytes_matrices"] < found["bytes"]
    assert found["parameters"] == sum(sizes) > found["quantized_parameters"] > 0


def test_keys_and_values_by_hand(run, weigh):
    """2 layers, 1 key head of 16: 2 x (16 + 16) values of 2 bytes; keys of 2 bits are 4 bytes a head."""
    rows = json.loads(weigh(run, "--json", "--memory-mb", "1")[1])["keys_and_values"]
    bytes_of = {(row["act_k"], row["act_v"]): row["bytes_per_token"] for row in rows}
    assert bytes_of["", ""] == 128 and bytes_of["tanh-ternary", ""] == 2 * (4 + 32)
    assert bytes_of["int8", "int8"] == 2 * 2 * (16 + 4)
    assert next(row["longest_text"] for row in rows if not row["act_k"]) == 2**20 // 128


def test_the_estimate_comes_with_its_assumptions(run, weigh):
    status, output, _ = weigh(run)
    assert status == 0 and "(estimate)" in output and "arXiv 2310.11453" in output and "no such energy was" in output
    energy = json.loads(weigh(run, "--json")[1])["energy"]["7nm"]
    assert 0 < energy["uj_zeros_skipped"] <= energy["uj"] <= energy["uj_in_floats"]


def test_mistakes_are_one_line(run, tmp_path, weigh):
    assert weigh(tmp_path)[0] == 2
    status, output, complaint = weigh(run, "--memory-mb", "0")
    assert status == 2 and not output and complaint.count("\n") == 1 and "positive" in complaint
