"""tools/rate_curve.py and what is behind it: points from real bytes, curves through them, differences of curves."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from golf.artifact.container import pack_artifact, read_artifact, restore_model
from golf.artifact.weights import load_weights, save_weights
from golf.config.quantization import QuantConfig
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.quant.calibration import training_rows
from golf.quant.export import quantize_state
from golf.runtime import Runtime
from golf.score.scorer import plain_settings, score_stream
from lab.cli import run_command
from lab.rates import rate_points
from lab.rates.methods import METHODS, prepare_method_input
from lab.rates.rate_curve import ANCHORS, FEWEST_RATES, build_curves, parse_rates
from lab.rates.rate_difference import RateError
from lab.rates.rate_points import RatePoint, RateSubject, scoring_code_sha256
from lab.rates.trained_run import open_trained_run
from tests.trained_run_fixtures import copied_run, make_trained_run, power_law
from tools import rate_curve

torch.set_num_threads(1)


# ---- curves of methods ----


@dataclass(frozen=True)
class FakeMethod:
    name: str
    codec: str = "lzma"
    rates: tuple[float, ...] = (1.0, 2.0, 3.0)
    text: str = "a method of this test"
    encode: Callable | None = None


def fake_points(name: str, pairs: list[tuple[float, float]], base: float = 1.25) -> list[RatePoint]:
    return [
        RatePoint(name, number, "lzma", round(size), 3.0, base + excess, 2.0, 0.1, 0.1, 0.1, 0.1, "a", "s", "m")
        for number, (size, excess) in enumerate(pairs)
    ]


def curves_of(**pairs: list[tuple[float, float]]):
    base = RatePoint("unquantized", 0, "none", 10**8, 32.0, 1.25, 2.0, 0, 0, 0, 1.0, "a", "s", "m")
    points = [point for name, found in pairs.items() for point in fake_points(name, found)]
    return build_curves([FakeMethod(name) for name in pairs], points, base)


def test_bytes_at_stated_excesses_and_what_they_save():
    found = curves_of(recipe=power_law(1e7, 0.3), ours=power_law(0.8e7, 0.3), frontier=power_law(0.9e7, 0.3)).methods
    ours = found[1]
    assert ours.against["recipe"].percent == pytest.approx(-20, abs=1e-4)
    assert ours.against["frontier"].log_percent == pytest.approx(100 * (8 / 9 - 1), abs=1e-4)
    assert ours.against["recipe"].span == pytest.approx((0.004, 0.1))  # up to MOST_EXCESS
    for stated in ours.stated:
        assert stated.bytes == pytest.approx(0.8e7 * stated.excess_bpb**-0.3, rel=1e-5)
        assert stated.saved["recipe"] == pytest.approx(0.2e7 * stated.excess_bpb**-0.3, rel=1e-4)
        assert stated.saved_percent["recipe"] == pytest.approx(20, abs=1e-3)


def test_what_a_curve_does_not_reach_is_not_made_up():
    coarse = power_law(1e7, 0.3, (0.9, 0.5, 0.2, 0.15))
    found = curves_of(recipe=power_law(1e7, 0.3), coarse=coarse, single=[(1e6, 0.1)])
    assert [stated.bytes for stated in found.methods[1].stated] == [None] * 4
    assert found.methods[1].against["recipe"].percent is None
    assert found.methods[2].against["recipe"].percent is None
    assert any("coarse: the curves share no loss up to 0.10000" in note for note in found.notes)
    assert any("frontier was not measured" in note for note in found.notes)
    assert any(f"single has 1 points: a curve wants {FEWEST_RATES}" in note for note in found.notes)


def test_points_below_the_unquantized_score_keep_out_of_logarithms():
    pairs = [*power_law(1e7, 0.3), (6e7, -0.001), (7e7, -0.002)]
    found = curves_of(recipe=power_law(1e7, 0.3), ours=pairs)
    ours = found.methods[1]
    assert ours.against["recipe"].log_percent == pytest.approx(0, abs=1e-4)
    assert min(ours.excess_bpb) == pytest.approx(-0.002) and ours.left_out == 0
    assert any("ours: 2 points are no worse than the unquantized weights" in note for note in found.notes)


@pytest.mark.parametrize("text", ["1,two", "1,,2", "nan", "1,inf", ","])
def test_rates_that_are_no_numbers(text):
    with pytest.raises(RateError, match="give numbers with commas"):
        parse_rates(text)
    assert parse_rates("3,1e0,2.5,1") == (1.0, 2.5, 3.0)


def test_the_key_of_a_point_changes_with_all_that_decides_about_it():
    subject = RateSubject("w", "t", "v", "c", {"seq_len": 32}, "cpu", "code")
    keys = {subject.key("a", 1.0), subject.key("a", 1.5), subject.key("b", 1.0)}
    for change in (
        dict(weights_sha256="x"), dict(tokenizer_sha256="x"), dict(val_data_id="x"), dict(calibration_id="x"),
        dict(windows={"seq_len": 64}), dict(device="cuda"), dict(code_sha256="x"),
    ):  # fmt: skip
        keys.add(replace(subject, **change).key("a", 1.0))
    assert len(keys) == 10 and subject.key("a", 1) == subject.key("a", 1.0)


def test_the_hash_of_the_code_is_that_of_what_quantizes_packs_and_scores(tmp_path, write_tree):
    entries = {"lab/rates/rate_points.py": "", "lab/rates/methods.py": ""}
    tree = {"golf/config/config.py": "a", "golf/quant/grid.py": "b", "golf/score/scorer.py": "c", "lab/cli.py": "d"}
    write_tree(tmp_path, tree | entries)
    first = scoring_code_sha256(tmp_path)
    write_tree(tmp_path, {"lab/cli.py": "changed", "tools/x.py": "new"})
    assert scoring_code_sha256(tmp_path) == first
    for changed in ("golf/quant/grid.py", "lab/rates/methods.py"):
        write_tree(tmp_path, {changed: "changed"})
        assert scoring_code_sha256(tmp_path) != first
        write_tree(tmp_path, {changed: (tree | entries)[changed]})
        assert scoring_code_sha256(tmp_path) == first


# ---- the tool ----


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_trained_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def fakes(monkeypatch) -> list[tuple[str, float]]:
    """Round to nearest at as many bits as the rate says, by three names; returns the calls."""
    calls: list[tuple[str, float]] = []

    def encoder(name: str) -> Callable:
        def encode(given, rate):
            calls.append((name, rate))
            bits = dict(mlp_bits=int(rate), attn_bits=int(rate), bigram_bits=int(rate), embed_bits=int(rate))
            return quantize_state(given.state, QuantConfig(**bits))

        return encode

    methods = [FakeMethod("recipe"), FakeMethod("frontier", "zlib"), FakeMethod("ours", "zstd")]
    methods = [replace(method, rates=(3.0, 4.0, 5.0), encode=encoder(method.name)) for method in methods]
    monkeypatch.setattr(rate_curve, "METHODS", {method.name: method for method in methods})
    monkeypatch.setattr(rate_curve, "prepare_method_input", lambda saved, rows_NT, runtime: saved)
    return calls


@pytest.fixture
def run_tool(monkeypatch, capsys, run, tmp_path) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str, folder: Path = run) -> tuple[int, str, str]:
        common = ["--run", str(folder), "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["rate_curve.py", *common, *arguments])
        return run_command(rate_curve.Options, rate_curve.__doc__, rate_curve.work), *capsys.readouterr()

    return call


def independent_score(run: Path, bits: int, codec: str) -> tuple[int, float]:
    """(bytes, val_bpb) of a fake's point, made here."""
    opened = open_trained_run(run)
    quant = QuantConfig(mlp_bits=bits, attn_bits=bits, bigram_bits=bits, embed_bits=bits)
    stored = quantize_state(load_weights(run / "weights.safetensors").state, quant)
    data, _ = pack_artifact(stored, opened.saved.model, opened.saved.tokenizer_sha256, codec)
    runtime = Runtime(torch.device("cpu"))
    settings = plain_settings(opened.saved.model, 32)
    model = restore_model(read_artifact(data), runtime)
    score = score_stream(model, opened.tokens_N, opened.counter, settings, runtime, announce=False)
    return len(data), score.val_bpb


def test_points_are_scores_of_real_bytes(run_tool, run, fakes, tmp_path):
    status, output, complaint = run_tool("--json")
    assert status == 0, complaint
    content = json.loads(output)
    assert content == json.loads((tmp_path / "out" / "rate_curve.json").read_text())
    assert (tmp_path / "out" / "rate_curve.png").read_bytes().startswith(b"\x89PNG")
    for method, codec in zip(content["methods"], ("lzma", "zlib", "zstd"), strict=True):
        for point, bits in zip(method["points"], (3, 4, 5), strict=True):
            assert (point["bytes"], point["val_bpb"]) == pytest.approx(independent_score(run, bits, codec), rel=1e-6)
    own = {method["name"]: method for method in content["methods"]}
    assert own["recipe"]["against"]["recipe"]["percent"] == 0 and own["ours"]["against"]["frontier"]["percent"]
    excesses = own["recipe"]["excess_bpb"]
    assert excesses[0] > excesses[1] > excesses[2] and content["unquantized"]["val_bpb"] < 3
    assert content["calibration"]["rows"] > 10 and content["machine"]["machine_id"]


def test_equal_weights_are_scored_once(run_tool, fakes, monkeypatch):
    scored, score_artifact = [], rate_points.score_artifact
    monkeypatch.setattr(
        rate_points, "score_artifact", lambda *args: (scored.append(args[0].sha256), score_artifact(*args))[1]
    )
    assert run_tool()[0] == 0
    assert len(fakes) == 9 and len(scored) == 3


def test_finished_points_are_kept_and_not_measured_again(run_tool, fakes, tmp_path, monkeypatch):
    recipe = rate_curve.METHODS["recipe"]

    def failing(given, rate):
        if rate == 5.0:
            raise RateError("this rate can't be")
        return recipe.encode(given, rate)

    monkeypatch.setitem(rate_curve.METHODS, "recipe", replace(recipe, encode=failing))
    status, output, complaint = run_tool("--methods", "recipe")
    assert (status, output) == (2, "") and complaint.endswith("rate_curve: this rate can't be\n")
    kept = {path: path.read_bytes() for path in (tmp_path / "out" / "points").iterdir()}
    assert len(kept) == 3 and not (tmp_path / "out" / "rate_curve.json").exists()
    monkeypatch.setitem(rate_curve.METHODS, "recipe", recipe)

    status, output, complaint = run_tool("--methods", "recipe")
    assert (status, output) == (2, "") and "is not empty: add --resume" in complaint
    del fakes[:]
    assert run_tool("--methods", "recipe", "--resume")[0] == 0
    assert fakes == [("recipe", 5.0)]
    assert all(path.read_bytes() == data for path, data in kept.items())
    del fakes[:]
    assert run_tool("--methods", "recipe,frontier", "--rates", "4,6", "--resume")[0] == 0
    assert fakes == [("recipe", 6.0), ("frontier", 4.0), ("frontier", 6.0)]


def test_a_damaged_point_is_named(run_tool, fakes, tmp_path):
    assert run_tool("--methods", "recipe", "--rates", "4,5")[0] == 0
    path = sorted((tmp_path / "out" / "points").iterdir())[0]
    path.write_text(path.read_text().replace('"bytes": ', '"bytes": -'))
    status, output, complaint = run_tool("--methods", "recipe", "--rates", "4,5", "--resume")
    assert (status, output) == (2, "") and f"{path}: damaged" in complaint


def other_tokenizer(folder: Path) -> None:
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text('{"kind": "chars", "characters": "abc"}')


def damage_weights(folder: Path) -> None:
    saved = load_weights(folder / "weights.safetensors")
    saved.state["skip_weights"][0, 0] = torch.nan
    path = folder / "weights.safetensors"
    save_weights(path, saved.state, saved.model, saved.quant, saved.tokenizer_sha256)


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (shutil.rmtree, [], "is not the folder of a run"),
        (lambda run: (run / "weights.safetensors").unlink(), [], "weights.safetensors is missing: the run has not"),
        (damage_weights, [], "tensor 'skip_weights' in {run}/weights.safetensors has NaN"),
        (lambda run: (run / "config.json").write_text("{"), [], "config.json: damaged"),
        (None, ["--methods", "recipe,magic"], "unknown method 'magic': choose among recipe, frontier, ours"),
        (None, ["--rates", "3,x"], "--rates '3,x': give numbers"),
        (None, ["--calibration-tokens", "31"], "no row to calibrate on"),
        (None, ["--calibration-tokens", "-5"], "no row to calibrate on"),
        (None, ["--calibration", "{data}/text_val_000000.bin"], "is a validation shard"),
        (None, ["--calibration", "{run}/copy_of_val.bin"], "holds the validation text"),
        (None, ["--val", "{data}/nothing_*.bin"], "no file matches"),
        (None, ["--val", "{data}/tokenizer.json"], "less than a header"),
        (other_tokenizer, ["--tokenizer", "{run}/tokenizer.json"], "is not that of the artifact's tokenizer"),
        (None, ["--val", "{run}/other/*.bin"], "the shards were made with another tokenizer"),
        (None, ["--val", "{run}/beyond/*.bin"], "were written with another tokenizer"),
        (None, ["--threads", "-1"], "threads=-1"),
        (None, ["--window", "-4"], "all must be positive"),
        (None, ["--stride", "64"], "stride"),
        (None, ["--most-excess", "0"], "--most-excess 0.0"),
        (None, ["--out", "{run}/config.json"], "is no folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    run_tool, run, fakes, tmp_path, capsys, damage, arguments, message
):
    folder, data = copied_run(run, tmp_path), run.parent / "data"
    shutil.copyfile(data / "text_val_000000.bin", folder / "copy_of_val.bin")
    for name in ("other", "beyond"):
        (folder / name).mkdir()
    shutil.copyfile(data / "text_val_000000.bin", folder / "other" / "text_val_000000.bin")
    (folder / "other" / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": "f" * 64}}))
    tokens = np.array([1, 300, 5, 6], dtype="<u2")
    shutil.copyfile(data / "text_val_000000.bin", folder / "beyond" / "text_val_000000.bin")
    with (folder / "beyond" / "text_val_000000.bin").open("r+b") as file:
        file.seek(1024)
        file.write(tokens.tobytes())
    if damage:
        damage(folder)
    arguments = [word.format(run=folder, data=data) for word in arguments]
    status, output, complaint = run_tool(*arguments, folder=folder)
    assert (status, output) == (2, "")
    assert complaint.startswith("rate_curve: ") and complaint.count("\n") == 1
    assert message.format(run=folder) in complaint
    assert not (tmp_path / "out").exists() and not fakes


def test_calibration_rows_are_seeded_distinct_and_of_the_training_text(tmp_path):
    paths = [tmp_path / f"text_train_{number:06d}.bin" for number in range(2)]
    for number, path in enumerate(paths):
        write_shard(path, np.arange(1000) + 1000 * number)
    rows_NT, again_NT, other_NT = (training_rows(TokenStream(paths), 640, 32, seed) for seed in (0, 0, 1))
    assert rows_NT.shape == (20, 32) and torch.equal(rows_NT, again_NT) and not torch.equal(rows_NT, other_NT)
    starts = rows_NT[:, 0].tolist()
    assert starts == sorted(set(starts)) and max(starts) > 1000 > min(starts)
    assert torch.equal(rows_NT, rows_NT[:, :1] + torch.arange(32)) and all(start % 32 == 0 for start in starts)
    assert len(training_rows(TokenStream(paths), 10**9, 32, 0)) == 2000 // 32


def test_the_registry_keeps_its_contract_and_makes_real_points(run, run_tool, monkeypatch):
    assert set(ANCHORS) <= METHODS.keys()
    for name, method in METHODS.items():
        assert method.name == name and len(method.rates) >= FEWEST_RATES and "\n" not in method.text
        assert list(method.rates) == sorted(set(method.rates))
    opened = open_trained_run(run)
    rows_NT = training_rows(TokenStream(opened.train_paths), 1024, 32, 0)
    given_once = prepare_method_input(opened.saved, rows_NT, Runtime(torch.device("cpu")))
    monkeypatch.setattr(rate_curve, "prepare_method_input", lambda *args: given_once)
    status, output, complaint = run_tool("--methods", ",".join(ANCHORS), "--json")
    assert status == 0, complaint
    for method in json.loads(output)["methods"]:
        sizes = [point["bytes"] for point in method["points"]]
        assert len(sizes) >= FEWEST_RATES and min(sizes) < 0.8 * max(sizes)
