"""How adaptive scoring's gain depends on the network: the line, its interval, and the picture."""

import numpy as np
import pytest

from lab.compare.gain_picture import draw_gains, fit_gains, read_rows
from lab.compare.statistics import StatisticsError


def test_a_line_is_found_with_an_interval_that_widens_away_from_the_points():
    network_N = [2.4, 2.1, 1.9, 1.7, 1.5]
    exact = fit_gains(network_N, [0.1 * bpb - 0.05 for bpb in network_N])
    assert exact.at(1.06) == pytest.approx((0.056, 0.056, 0.056), abs=1e-9)
    noise_N = np.random.default_rng(0).normal(0, 0.01, 5)
    line = fit_gains(network_N, [0.1 * bpb - 0.05 + error for bpb, error in zip(network_N, noise_N, strict=True)])
    widths = [high - low for _, low, high in map(line.at, (1.9, 1.5, 1.06))]
    assert widths[0] < widths[1] < widths[2]


def test_an_interval_holds_a_new_network_as_often_as_it_says():
    generator, held = np.random.default_rng(1), 0
    network_N = np.array([2.4, 2.1, 1.9, 1.7, 1.5])
    for _ in range(600):
        line = fit_gains(network_N, 0.1 * network_N + generator.normal(0, 0.02, 5))
        _, low, high = line.at(1.2)
        held += low <= 0.12 + generator.normal(0, 0.02) <= high
    assert 0.92 < held / 600 < 0.98


def test_two_networks_are_no_line():
    with pytest.raises(StatisticsError, match="three"):
        fit_gains([1.5, 1.6], [0.1, 0.2])


def test_the_picture_says_what_its_lines_say(tmp_path):
    rows = [
        {"run": f"r{n}", "what": what, "val_bpb": bpb - gain * bpb}
        for n, bpb in enumerate((2.4, 2.0, 1.6))
        for what, gain in (("network alone", 0.0), ("counts (3.0% of the targets)", 0.1), ("both", 0.2))
    ]
    said = draw_gains(rows, 1.0, tmp_path / "gains.png")
    assert {way: figures[0] for way, figures in said.items()} == pytest.approx({"counts": 0.1, "both": 0.2})
    assert (tmp_path / "gains.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "text", ["", "{}x", "[1]", '[{"run": "a"}]', '[{"run": "a", "what": "b", "val_bpb": "c"}]', "5"]
)
def test_files_that_are_no_rows_are_refused_in_a_line(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(StatisticsError, match="rows.json: not the rows"):
        read_rows(tmp_path / "rows.json")


def test_a_picture_of_too_few_runs_is_refused_before_anything_is_measured(tmp_path, run_command_here):
    rows = tmp_path / "rows.json"
    rows.write_text('[{"run": "a", "what": "network alone", "val_bpb": 1.5, "seconds": 1}]')
    refused = run_command_here("tools/adaptation.py", "--rows", rows, "--picture", tmp_path / "gains.png")
    assert refused.returncode == 2 and "three runs" in refused.stderr and not (tmp_path / "gains.png").exists()
