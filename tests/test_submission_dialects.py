"""What published record folders write in other words or other places, and what a reviewer must be told all the same."""

import math
import re
import tracemalloc
from pathlib import Path

import pytest
from evidence_fixtures import (
    PUBLISHED_SCORES,
    PUBLISHED_SCRIPT,
    SP1024,
    claim,
    codes,
    edit_log,
    errors,
    published_log,
    texts,
    write_published,
)
from test_submission_reading import hide_lzma

from lab.record import feature_reading, log_reading
from lab.record.folder_check import check_record
from lab.record.knob_reading import ghost_knobs
from lab.record.log_reading import read_log
from lab.record.log_stream import BAR
from lab.record.record_folder import read_record
from lab.record.script_reading import read_script

MODEL_BYTES, SIZE = 15_800_000, len(PUBLISHED_SCRIPT.encode())


@pytest.fixture
def published(tmp_path) -> Path:
    return write_published(tmp_path / "track_10min_16mb" / "record")


def edit_logs(folder: Path, before: str, after: str) -> None:
    for seed in PUBLISHED_SCORES:
        edit_log(folder, before, after, seed)


def finding(folder: Path, code: str) -> str:
    return next(f"{found.severity}: {found.text}" for found in check_record(read_record(folder)) if found.code == code)


# ---- bytes ----


def count_compressed(folder: Path, compressed: int) -> None:
    """Logs that count the code as a packer leaves it, of a model so large that the plain script would not fit."""
    model = 16_000_000 - compressed
    edit_logs(folder, f"Code size: {SIZE} bytes", f"Code size (uncompressed): {SIZE} bytes")
    edit_logs(folder, "Serialized model: ", f"Code size (compressed): {compressed} bytes\nSerialized model: ")
    edit_logs(folder, f"{MODEL_BYTES} bytes (", f"{model} bytes (")
    edit_logs(folder, f"{MODEL_BYTES + SIZE} bytes", "16000000 bytes")
    claim(folder, bytes_total=16_000_000, bytes_code=compressed)


def test_code_that_the_logs_count_compressed_is_counted_so(published):
    count_compressed(published, SIZE - 100)
    assert codes(published) == {"S28-compressed-code": "note"}
    assert f"up to {16_000_100:,} bytes" in texts(published)


def test_no_packer_makes_a_script_as_small_as_that(published):
    count_compressed(published, 10)
    assert errors(published) == {"S28-compressed-code"}


@pytest.mark.parametrize("line", [
    "Artifact: {} bytes", "artifact_bytes: {}", "budget:{}/16000000 (15.80/16.00MB) FITS",
    "Total submission: {} bytes", "1776142360.541 Total submission size quantized+brotli: {} bytes",
])  # fmt: skip
def test_the_total_is_read_in_every_dialect(tmp_path, line):
    (tmp_path / "train.log").write_text("Total submission size: 67240000 bytes\n" + line.format("15,800,343") + "\n")
    assert read_log(tmp_path / "train.log").total_bytes == 15_800_343


def test_seed_results_may_say_the_bytes(published):
    edit_logs(published, " bytes", "")
    assert codes(published) == {"S24-no-size": "warning"}
    results = {str(s): {"val_bpb": v, "artifact_bytes": MODEL_BYTES + SIZE} for s, v in PUBLISHED_SCORES.items()}
    claim(published, seed_results=results)
    assert codes(published) == {}


def test_a_log_may_say_its_bytes_in_megabytes(published):
    edit_logs(published, " bytes", "")
    edit_logs(published, "stopping_early", "brotli: 15.67MB model + 0.077MB code = 15.75/16.00MB FITS\nstopping_early")
    assert codes(published) == {}


@pytest.mark.parametrize(("stated", "severity"), [
    (15_800_443 + 1, "note"), (15_800_000, "note"), (15_900_000, "note"), (15_000_000, "error"), (15_812_345, "error"),
])  # fmt: skip
def test_a_mean_and_a_round_figure_are_notes(published, stated, severity):
    edit_log(published, f"{MODEL_BYTES + SIZE} bytes", f"{MODEL_BYTES + SIZE + 300} bytes")  # one log is larger
    claim(published, bytes_total=stated)
    assert codes(published) == {"S21-bytes-total": severity}


def test_a_round_size_of_the_code_is_a_note(published):
    claim(published, bytes_code=400)
    assert codes(published) == {"S23-code-size": "note"}


# ---- logs ----


@pytest.mark.parametrize("name", [
    "logs/train{}.txt", "train_v{}.txt", "train_seed_{}.txt", "a/b/run-{}.log", "out_{}.out",
])  # fmt: skip
def test_logs_are_found_under_every_name(published, name):
    for seed in PUBLISHED_SCORES:
        target = published / name.format(seed)
        target.parent.mkdir(parents=True, exist_ok=True)
        (published / f"train_seed{seed}.log").rename(target)
    (published / "notes.txt").write_text("The losses are in the logs.\n")
    (published / "summary.log").write_text('{"post_ttt_val_bpb": 1.21}\n')
    assert codes(published) == {} and len(read_record(published).logs) == 3


@pytest.mark.parametrize(("line", "name"), [
    ("final_sliding_window_eval_exact stride:64 val_loss:1.9 val_bpb:1.15", "final_sliding_window_eval"),
    ("final_int8_zlib_roundtrip_exact sliding val_loss:1.9 sliding val_bpb:1.15", "final_int8_zlib_roundtrip sliding"),
    ("final_sliding val_loss:1.9 val_bpb:1.15 (stride=16, T=0.90) time:428712ms", "final_sliding"),
    ("ttt_sliding:done val_loss=1.9 val_bpb=1.15 elapsed=300s", "ttt_sliding"),
    ("1776142360.541 quantized_ttt_phased val_loss:1.9 val_bpb:1.15 eval_time:5ms", "quantized_ttt_phased"),
])  # fmt: skip
def test_final_lines_of_many_dialects(tmp_path, line, name):
    (tmp_path / "train.log").write_text(f"step:5/9 val_loss:2.0 val_bpb:1.5 train_time:5ms\n{line}\n")
    final = read_log(tmp_path / "train.log").last_final
    assert final is not None and (final.name, final.val_bpb, final.val_loss) == (name, 1.15, 1.9)


def test_lines_are_numbered_as_in_the_file(published):
    path = published / "train_seed42.log"
    lines = path.read_text().replace("\n", "\r\n").split("\r\n")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    log = read_log(path)
    for score in log.finals.values():
        assert f"val_bpb:{score.val_bpb:.8f}" in lines[score.line - 1]
    edit_log(published, "model_params", "rank 3: CUDA out of memory\nmodel_params", seed=7)
    number = 1 + (published / "train_seed7.log").read_text().split("\n").index("rank 3: CUDA out of memory")
    assert f"train_seed7.log line {number}: " in texts(published)


def test_a_log_of_two_runs_is_read_as_the_last_one(published):
    """The source of the second run stands behind what the first one printed, with no bar between."""
    path = published / "train_seed42.log"
    path.write_text(published_log(42, 1.3) + path.read_text())
    log = read_log(path)
    assert log.source.strip() == PUBLISHED_SCRIPT.strip() and log.last_final.val_bpb == PUBLISHED_SCORES[42]
    assert "S64-other-code" not in codes(published)


def test_a_copy_of_a_log_is_no_seed(published):
    (published / "train.log").write_bytes((published / "train_seed7.log").read_bytes())
    assert codes(published) == {"S41-log-twice": "note"}
    (published / "train_seed7.log").rename(published / "train_seed8.log")
    assert errors(published) >= {"S45-seed-name"}


def test_other_experiments_beside_the_record_change_nothing(published):
    (published / "sweep").mkdir()
    text = published_log(5, 1.3).replace("train_batch_tokens:524288", "train_batch_tokens:1024")
    (published / "sweep/train.log").write_text(text.replace("train_time:599950ms", "train_time:5999500ms"))
    assert codes(published) == {}


def test_the_bytes_of_a_training_count_where_a_later_log_has_the_score(published):
    (published / "later").mkdir()
    for seed, score in PUBLISHED_SCORES.items():
        line = f"seed:{seed}\nttt_exact val_loss:{(score - 0.1) * math.log(2) * SP1024:.8f} val_bpb:{score - 0.1:.8f}\n"
        (published / f"later/seed_{seed}.log").write_text(line)
    mean = sum(PUBLISHED_SCORES.values()) / 3 - 0.1
    results = {str(seed): {"val_bpb": score - 0.1} for seed, score in PUBLISHED_SCORES.items()}
    claim(published, val_bpb=mean, val_loss=mean * math.log(2) * SP1024, seed_results=results)
    assert not errors(published)
    edit_logs(published, f"{MODEL_BYTES} bytes (", "16000000 bytes (")
    assert "S20-over-limit" in errors(published)


def test_more_seeds_than_are_claimed_are_asked_about(published):
    """Three of five seeds may be the best three."""
    (published / "train_seed80.log").write_text(published_log(80, 1.22))
    (published / "train_seed90.log").write_text(published_log(90, 1.23))
    assert codes(published) == {"S15-one-of-many": "warning"}
    assert "the mean over the 5 logs is 1.2198" in texts(published)


def test_a_log_under_the_name_of_another_seed_is_an_error(published):
    edit_log(published, "seed:7\n", "seed:8\n", seed=7)
    assert errors(published) == {"S45-seed-name"}


def test_a_long_log_takes_little_memory(published):
    path = published / "train_seed42.log"
    head, tail = path.read_text().split("stopping_early")
    with path.open("w") as file:
        file.write(head)
        for i in range(160_000):
            file.write(f"step:{i}/200000 train_loss:2.0 train_time:{i}ms step_avg:44.00ms ttt: x\n")
        file.write("x" * 3_000_000 + "\nstopping_early" + tail)
    assert path.stat().st_size > 12_000_000
    tracemalloc.start()
    log = read_log(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert log.last_final.val_bpb == PUBLISHED_SCORES[42] and log.losses[0] > 1000 and log.steps == 13000
    assert peak < 9_000_000


@pytest.mark.parametrize("module", [log_reading, feature_reading], ids=lambda module: module.__name__)
def test_no_pattern_of_a_line_repeats_without_a_bound(module):
    """What has a bound at each place of a line is linear in the line."""
    for name, pattern in vars(module).items():
        if isinstance(pattern, re.Pattern):
            bare = re.sub(r"\\.|\[[^\]]*\]", "", pattern.pattern)
            assert not {"*", "+"} & set(bare), name


def test_a_diagnosis_is_no_part_of_the_evaluation(published):
    edit_logs(
        published,
        "final_int8_zlib_roundtrip val",
        "diagnostic post-ema eval_time:590000ms\nfinal_int8_zlib_roundtrip val",
    )
    assert codes(published) == {}


# ---- scripts and names ----


def test_files_under_another_name_are_notes(published):
    (published / "train_gpt.py").rename(published / "train_gpt_cuda.py")
    (published / "submission.json").rename(published / "submission_cuda.json")
    (published / "README.md").rename(published / "readme.txt")
    assert codes(published) == {"S06-other-name": "note"}
    assert "train_gpt.py is named train_gpt_cuda.py" in texts(published)


def test_of_several_scripts_the_one_that_was_counted_is_the_submitted_one(published):
    (published / "train_gpt.py").rename(published / "train_z.py")
    (published / "train_a.py").write_text("print(1)\n")
    assert read_record(published).script_name == "train_z.py" and not errors(published)


NEWER = """\
import os
import helper
class H:
    dead = int(os.environ.get('DEAD', 1))
    used = int(os.environ.get('USED', 1))
def show(h):
    import inner
    return f"{h["a"]} {f'{h['b']}'} {H.used}"
print(show({}), helper, lambda: 0)
"""


@pytest.mark.parametrize("hide", [str, hide_lzma], ids=["plain", "packed"])
def test_a_script_in_newer_python_is_read_as_far_as_it_can_be(published, hide):
    """Python 3.12 reads all of it, an older one all but the function with the nested quotes."""
    source = hide(NEWER)
    (published / "helper.py").write_text("x = 1\n")
    (published / "inner.py").write_text("x = 1\n")
    (published / "train_gpt.py").write_text(source)
    script = read_script(published / "train_gpt.py", published)
    assert not script.opaque and ghost_knobs(script) == (["dead"], [])
    assert set(read_record(published).neighbours.modules) == {"helper.py", "inner.py"}
    for seed, score in PUBLISHED_SCORES.items():
        (published / f"train_seed{seed}.log").write_text(published_log(seed, score, source))
    found = codes(published)
    assert "S63-opaque" not in found and found.get("S62-grammar", "note") == "note"


def test_a_source_that_differs_in_comments_or_values_is_told_so(published):
    script = published / "train_gpt.py"
    script.write_text(PUBLISHED_SCRIPT.replace("class H", "# what can be set\nclass H"))
    assert finding(published, "S64-other-code").startswith("note")
    script.write_text(PUBLISHED_SCRIPT.replace("1000", "1001"))
    assert finding(published, "S64-other-code").startswith("warning")
    knob = '    seed = int(os.environ.get("SEED", 1337))\n'
    script.write_text(PUBLISHED_SCRIPT.replace(knob, knob + knob.replace("SEED", "OTHER").replace("seed", "other")))
    assert finding(published, "S64-other-code").startswith("warning")
    script.write_text(PUBLISHED_SCRIPT.replace("print(len", "print(max"))
    assert finding(published, "S64-other-code").startswith("error")


# ---- what must be found ----


@pytest.mark.parametrize("line", ["logfile: logs/swa_run.txt", "run_id: swa_3", "  logfile: swa.txt"])
def test_the_name_of_a_run_proves_no_feature(published, line):
    edit_log(published, "model_params", f"swa_enabled: True\n{line}\nmodel_params")
    assert codes(published) == {"S61-never-acted": "warning"}
    edit_log(published, "stopping_early", "swa: applying averaged weights\nstopping_early")
    assert codes(published) == {}


@pytest.mark.parametrize(("line", "found"), [
    ("swa: averaged 0 snapshots", True), ("swa_count: 0", True), ("swa:done updates=0", True),
    ("swa: averaged 12 snapshots", False), ("swa_count: 3\nswa_count: 0", False),
])  # fmt: skip
def test_a_counter_that_stays_at_zero_is_an_error(published, line, found):
    edit_log(published, "model_params", "swa_enabled: True\nswa_updates: 0\nmodel_params")  # (before training: a knob)
    edit_log(published, "stopping_early", f"{line}\nstopping_early")
    assert ("S66-zero-count" in errors(published)) is found


@pytest.mark.parametrize(("counters", "found"), [
    ("token_gate=628130 within_gate=9866847 word_gate=2891588", True),
    ("token_gate=628130 within_gate=0 word_gate=0", False), ("word_start_hints: 77", True),
    ("expert hints=200000 hits=199990", True), ("expert hints=200000 hits=61000", False),
])  # fmt: skip
def test_a_gate_that_reads_the_scored_token_is_an_error(published, counters, found):
    edit_log(published, "stopping_early", f"ngram_tilt:hints total=47851520 {counters}\nstopping_early")
    assert ("S67-reads-target" in errors(published)) is found


def test_a_part_of_the_validation_text_is_an_error(published):
    edit_logs(published, "tokens:62021632", "tokens:6202163")
    assert errors(published) == {"S53-subset"} and "10% of the validation text" in texts(published)


@pytest.mark.parametrize("setting", ["val_max_tokens: 500000", "max_val_docs: 1000"])
def test_a_bound_on_the_validation_text_is_a_warning(published, setting):
    edit_logs(published, " tokens:62021632", f"\n  {setting}")
    assert codes(published) == {"S53-subset": "warning"}


def test_a_bound_that_the_script_has_unless_it_is_told_is_a_warning(published):
    source = PUBLISHED_SCRIPT.replace("HOLDOUT_EVERY", "VAL_MAX_TOKENS")
    (published / "train_gpt.py").write_text(source)
    for seed, score in PUBLISHED_SCORES.items():
        (published / f"train_seed{seed}.log").write_text(published_log(seed, score, source))
    edit_logs(published, " tokens:62021632", "")
    assert "S53-subset" in codes(published)
    (published / "run.sh").write_text("VAL_MAX_TOKENS=0 python train_gpt.py\n")
    assert "S53-subset" not in codes(published)


def test_scores_of_two_stages_are_told_apart(published):
    """Seeds are claimed before the windows slide, the headline after."""
    sliding = {seed: score - 0.03 for seed, score in PUBLISHED_SCORES.items()}
    for seed, score in sliding.items():
        with (published / f"train_seed{seed}.log").open("a") as file:
            loss = score * math.log(2) * SP1024
            file.write(f"final_sliding_window_exact val_loss:{loss:.8f} val_bpb:{score:.8f}\n")
    mean = sum(sliding.values()) / 3
    claim(published, val_bpb=mean)
    assert codes(published) == {"S19-other-stage": "warning"}
    assert texts(published).count("final_sliding_window") == 2  # of the loss, and of the seeds
    claim(published, val_loss=mean * math.log(2) * SP1024)
    claim(published, seed_results={str(seed): {"val_bpb": score} for seed, score in sliding.items()})
    assert codes(published) == {}


def test_a_bar_that_is_no_source_divides_nothing(tmp_path):
    (tmp_path / "train.log").write_text(f"seed:3\n{BAR}\nfinal_x val_bpb:1.5\n")
    log = read_log(tmp_path / "train.log")
    assert log.seed == 3 and log.source == "" and log.last_final.line == 3
