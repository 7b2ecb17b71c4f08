"""A run goes on with the code that began it; with other code only when asked to, and then its result says so."""

import pytest

from golf.config.config import build_config
from golf.config.knobs import ConfigError
from golf.run.checkpoint import features_of
from golf.run.folder import RunFolder
from golf.run.frozen_code import Program
from golf.run.result import run_findings

SOUND = {
    "bytes_total": 1, "limit_bytes": 2, "val_bpb": 1.0, "train_seconds": 1.0, "calibration_seconds": 0.0,
    "max_wallclock_seconds": 2.0, "eval_seconds": 1.0, "max_eval_seconds": 2.0, "probes": {},
}  # fmt: skip


@pytest.fixture
def program(tmp_path):
    """A bundle that began a run, and the run's folder."""
    script = tmp_path / "train_gpt.py"
    script.write_text("print(1)\n")
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.create(build_config("local", {}, {}))
    program = Program(script, bundled=True)
    program.freeze(folder)
    return program, folder


def test_the_same_code_goes_on(program):
    program, folder = program
    program.check(folder)
    program.replace_code(folder)
    assert folder.code_changes_list() == []


def test_other_code_is_refused_and_may_take_over_when_asked(program):
    program, folder = program
    program.script.write_text("print(2)\n")
    with pytest.raises(ConfigError, match="--new-code"):
        program.check(folder)
    folder.save_json(folder.stages, {"train": {}})
    program.replace_code(folder)
    program.check(folder)
    (change,) = folder.code_changes_list()
    assert change["stages"] == ["train"] and folder.code.read_text() == "print(2)\n"
    (finding,) = run_findings(SOUND | {"code_changes": folder.code_changes_list()})
    assert "code was changed" in finding and "train" in finding
    assert run_findings(SOUND) == []


def test_checkpoints_of_earlier_code_have_their_features_under_another_name():
    assert features_of({"witness": {"qat": 1}}) == features_of({"features": {"qat": 1}}) == {"qat": 1}
