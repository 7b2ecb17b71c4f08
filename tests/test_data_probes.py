"""Legality probes of the data: shared documents, what was opened, damaged records."""

import json

import numpy as np
import pytest

from golf.data.shards import write_shard
from lab.probe import data_probes
from lab.probe.data_probes import ProbeError, probe_access, probe_disjoint
from lab.probe.documents import document_hashes, find_shared_documents
from lab.probe.probes import FAIL, NOT_EXERCISED, PASS

BOS = 1


def write_split(folder, split: str, texts: list[list[int]], shards: int) -> list:
    stream = np.array([token for text in texts for token in (BOS, *text)])
    paths = [folder / f"text_{split}_{number:06d}.bin" for number in range(shards)]
    for path, part in zip(paths, np.array_split(stream, shards), strict=True):
        write_shard(path, part)
    return paths


TEXTS = [[int(token) for token in np.random.default_rng(n).integers(2, 60, 5 + n)] for n in range(12)]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_documents_are_hashed_over_the_borders_of_shards_and_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr("lab.probe.documents.BLOCK_TOKENS", block)
    one, three = (list(document_hashes(write_split(tmp_path, "val", TEXTS, count), BOS)) for count in (1, 3))
    assert one == three and len(set(one)) == len(TEXTS)
    with_empty = write_split(tmp_path, "train", [[], TEXTS[0], [], TEXTS[1], []], 1)
    assert list(document_hashes(with_empty, BOS)) == one[:2]


@pytest.mark.parametrize(("planted", "shared"), [([], 0), ([TEXTS[9]], 1), ([TEXTS[10], TEXTS[9], TEXTS[9]], 2)])
def test_a_shared_document_is_found(tmp_path, planted, shared):
    train = write_split(tmp_path, "train", [*TEXTS[:4], *planted, *TEXTS[4:8]], 2)
    val = write_split(tmp_path, "val", TEXTS[8:], 2)
    found = find_shared_documents(train, val, BOS)
    assert (found.shared, found.val_documents, found.train_documents) == (shared, 4, 8 + len(planted))
    assert found.example == (1 if shared else None)
    probe = probe_disjoint(train, val, BOS, False, "tool --full")
    assert probe.verdict == (FAIL if shared else PASS)


def test_many_training_tokens_are_hashed_only_when_asked_for(tmp_path, monkeypatch):
    train, val = write_split(tmp_path, "train", TEXTS[:8], 2), write_split(tmp_path, "val", TEXTS[7:], 1)
    monkeypatch.setattr(data_probes, "QUICK_TRAINING_TOKENS", 75)
    probe = probe_disjoint(train, val, BOS, False, "tool --full")
    assert probe.verdict == NOT_EXERCISED and "tool --full" in probe.detail
    seen: list[tuple[int, int]] = []
    assert probe_disjoint(train, val, BOS, True, "", lambda *progress: seen.append(progress)).verdict == FAIL
    assert seen[-1] == (76, 76)


ACCESS = {
    "watched": True,
    "validation_opened_before_score": False,
    "training_opened_after_calibration": False,
    "network_during_scoring": False,
    "violations": [],
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [PASS, PASS]),
        ({"validation_opened_before_score": True}, [FAIL, PASS]),
        ({"training_opened_after_calibration": True}, [FAIL, PASS]),
        ({"violations": ["planted"]}, [FAIL, PASS]),
        ({"network_during_scoring": True}, [PASS, FAIL]),
        ({"watched": False}, [NOT_EXERCISED] * 2),
    ],
)
def test_what_was_opened(tmp_path, changes, expected):
    path = tmp_path / "access.json"
    assert [probe.verdict for probe in probe_access(path)] == [NOT_EXERCISED] * 2
    path.write_text(json.dumps(ACCESS | changes))
    assert [probe.verdict for probe in probe_access(path)] == expected


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"watched": True})])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "access.json").write_text(text)
    with pytest.raises(ProbeError, match="access.json"):
        probe_access(tmp_path / "access.json")
