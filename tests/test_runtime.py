"""What a run stands on: its folder, files that appear at once, devices and compilers that are there or not."""

from dataclasses import replace

import pytest
import torch

from golf.config.config import build_config
from golf.config.knobs import ConfigError
from golf.run.folder import RunFolder, choose_run_folder
from golf.runtime import Runtime, choose_compile, choose_device, write_file_atomically


def test_two_runs_never_share_a_folder(tmp_path):
    config = build_config("local", {}, {"runs_root": str(tmp_path), "run_id": "same"})
    folder = choose_run_folder(config, Runtime(torch.device("cpu")))
    folder.create(config)
    assert folder.load_config() == config
    with pytest.raises(ConfigError, match="exists: choose another run_id"):
        folder.create(config)
    with pytest.raises(ConfigError, match="can't name a folder"):
        choose_run_folder(replace(config, run=replace(config.run, run_id="../x")), Runtime(torch.device("cpu")))
    with pytest.raises(ConfigError, match="not the folder of a run"):
        RunFolder(tmp_path).load_config()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "result.json"
    write_file_atomically(path, "old")
    with pytest.raises(TypeError):
        write_file_atomically(path, 5)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_was_asked_for_and_is_missing_stops_the_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not choose_compile("auto", torch.device("cpu")) and not choose_compile("off", torch.device("cpu"))
    with pytest.raises(ConfigError, match="install g\\+\\+"):
        choose_compile("on", torch.device("cpu"))
