"""What tools/inspect_data.py says of a folder of shards: counts that are known, and faults that were planted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from golf.data.shards import DataError, write_shard
from lab.prepare import data_report
from lab.prepare.data_report import (
    frequent_pieces,
    inspect_folder,
    length_counts,
    length_edges,
    length_figures,
    planned_tokens,
    sample_documents,
)
from lab.prepare.text_tokenizer import bytes_tokenizer_file, load_text_tokenizer
from lab.probe import documents
from lab.probe.documents import document_blocks

TRAIN = ["a short one", "ein längerer Text mit Umlauten: äöü", "€" * 40, "eee eee", "x" * 300]
VAL = ["held out", "and another, eee"]
BOS = 1


def write_split(folder: Path, split: str, texts: list[str], shards: int) -> list[Path]:
    tokenizer = load_text_tokenizer(folder / "tokenizer.json")
    stream = np.array([token for text in texts for token in (BOS, *tokenizer.encode(text))])
    paths = [folder / f"text_{split}_{number:06d}.bin" for number in range(shards)]
    for path, part in zip(paths, np.array_split(stream, shards), strict=True):
        write_shard(path, part)
    return paths


def write_folder(folder: Path, train: list[str] = TRAIN, val: list[str] = VAL) -> Path:
    (folder / "tokenizer.json").write_bytes(bytes_tokenizer_file())
    write_split(folder, "train", train, 3)
    write_split(folder, "val", val, 1)
    return folder


def inspected(folder: Path, **options) -> data_report.DataContent:
    return inspect_folder(folder, load_text_tokenizer(folder / "tokenizer.json"), **options)


@pytest.mark.parametrize("block", [3, 50, 1 << 22])
def test_counts_are_those_of_the_texts(tmp_path, monkeypatch, block):
    monkeypatch.setattr(documents, "BLOCK_TOKENS", block)
    seen: list[int] = []
    content = inspected(write_folder(tmp_path), advance=seen.append)
    for split, texts in zip(content.splits, (TRAIN, VAL), strict=True):
        sizes = [len(text.encode()) for text in texts]
        assert (split.documents, split.tokens, split.bytes) == (len(texts), sum(sizes) + len(texts), sum(sizes))
        assert split.lengths_D.tolist() == sizes and split.bytes_per_token == 1
        assert split.counts_V.sum() == split.tokens and split.counts_V[BOS] == len(texts)
    assert content.findings == [] and content.shared.shared == 0
    assert sum(seen) == planned_tokens(tmp_path, False) == 2 * content.splits[0].tokens + content.splits[1].tokens


def test_blocks_are_whole_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_TOKENS", 7)
    paths = sorted(write_folder(tmp_path).glob("*_train_*.bin"))
    blocks = list(document_blocks(paths, BOS, lambda tokens: None))
    assert len(blocks) == len(TRAIN) and all(block[0] == BOS and BOS not in block[1:] for block in blocks)


def test_a_document_in_both_splits_is_found(tmp_path):
    content = inspected(write_folder(tmp_path, val=[*VAL, TRAIN[1]]))
    assert content.findings == ["1 validation documents are in training too, the first is number 2"]


def test_empty_documents_are_found(tmp_path):
    content = inspected(write_folder(tmp_path, train=[*TRAIN[:2], "", *TRAIN[2:], ""]))
    assert content.findings == ["train: 2 of 7 documents are empty"]


@pytest.mark.parametrize(("surplus", "faults"), [(0, 0), (1, 1)])
def test_files_of_bytes_are_compared_with_the_text(tmp_path, surplus, faults):
    folder = write_folder(tmp_path)
    ids_N = np.array([token for text in VAL for token in (BOS, *([5] * len(text)))])
    write_shard(folder / "text_val_bytes_000000.bin", (ids_N != BOS) + surplus * (np.arange(len(ids_N)) == 2))
    content = inspected(folder)
    assert content.splits[1].sidecar_bytes == sum(map(len, VAL)) + surplus
    assert len(content.findings) == faults and all("files of bytes" in finding for finding in content.findings)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    write_shard(write_folder(tmp_path) / "text_val_000000.bin", [BOS, 300, 5])
    with pytest.raises(DataError, match="token 300 is outside of the 260 pieces"):
        inspected(tmp_path)


def test_a_folder_without_validation_is_read(tmp_path):
    (write_folder(tmp_path) / "text_val_000000.bin").unlink()
    content = inspected(tmp_path)
    assert [split.split for split in content.splits] == ["train"] and content.shared is None


def test_many_training_shards_are_read_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(data_report, "QUICK_TRAIN_TOKENS", 400)
    folder = write_folder(tmp_path)
    quick, full = inspected(folder).splits[0], inspected(folder, full=True).splits[0]
    assert (len(quick.paths), quick.shards, len(full.paths)) == (2, 3, 3) and quick.tokens < full.tokens


@pytest.mark.parametrize("lengths", [[1], [0, 1, 1, 5], list(range(2000)), [7] * 3 + [100_000], [0]])
def test_the_histogram_holds_every_document_once(lengths):
    edges = length_edges(np.array(lengths))
    counts = length_counts(np.array(lengths), edges)
    assert counts.sum() == len(lengths) and (np.diff(edges) > 0).all()
    for number, begin, end in zip(counts, edges[:-1], edges[1:], strict=True):
        assert number == sum(begin <= length < end for length in lengths)


def test_lengths_are_summed_up():
    assert length_figures(np.array([1, 2, 3, 4, 90])) == {
        "shortest": 1, "5 %": 1, "median": 3, "95 %": 90, "longest": 90, "mean": 20.0
    }  # fmt: skip


def test_frequent_pieces_and_samples(tmp_path):
    folder = write_folder(tmp_path)
    tokenizer, content = load_text_tokenizer(folder / "tokenizer.json"), inspected(folder)
    assert frequent_pieces(content.splits[0], tokenizer, 2)[0] == ("'x'", ord("x") + 4, 301)
    assert sample_documents(content.splits[1], tokenizer, 2) == VAL
    assert sample_documents(content.splits[1], tokenizer, 9) == VAL
    assert sample_documents(content.splits[0], tokenizer, 5) == [text[:120] for text in TRAIN[:2]] + [
        "€" * 40, TRAIN[3], "x" * 120
    ]  # fmt: skip
    assert sample_documents(content.splits[0], tokenizer, 0) == []


def test_text_before_the_first_start_is_shown_too(tmp_path):
    folder = write_folder(tmp_path)
    write_shard(folder / "text_val_000000.bin", [70, 71, BOS, 72, BOS, 73, 74])
    split, tokenizer = inspected(folder).splits[1], load_text_tokenizer(folder / "tokenizer.json")
    assert split.lengths_D.tolist() == [2, 1, 2] and sample_documents(split, tokenizer, 3) == ["BC", "D", "EF"]


def run_tool(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/inspect_data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


def test_the_tool_prints_tables_and_draws_a_picture(repository, tmp_path):
    folder, picture = write_folder(tmp_path), tmp_path / "lengths.png"
    finished = run_tool(repository, folder, "--picture", picture)
    assert finished.returncode == 0, finished.stderr
    for words in (
        "documents",
        "bytes per token",
        "lengths of documents",
        "held out",
        "documents in both splits: 0",
    ):
        assert words in finished.stdout, words
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_tool_gives_figures_and_a_status_for_findings(repository, tmp_path):
    finished = run_tool(repository, write_folder(tmp_path, val=[*VAL, TRAIN[0]]), "--json")
    figures = json.loads(finished.stdout)
    assert finished.returncode == 1 and figures["shared_documents"] == len(figures["findings"]) == 1
    assert figures["splits"]["val"]["documents"] == 3 and figures["splits"]["train"]["frequent_pieces"][0][2] == 301


def test_the_tool_says_what_is_missing(repository, tmp_path):
    (write_folder(tmp_path) / "tokenizer.json").unlink()
    finished = run_tool(repository, tmp_path)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith("inspect_data: ") and finished.stderr.count("\n") == 1
