"""The benchmark of data preparation measures what it says. pytest tests/test_data_bench.py"""

import itertools
import json
import os
import sys

import pytest

from golf.data.shards import DataError
from lab.bench.data_bench import bench_data, repeated_documents, time_preparation, tree_memory, write_text
from lab.prepare.vocabulary import train_competition_tokenizer

TEXTS = [f"document {number} of some words about nothing" for number in range(50)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_a_short_text_is_repeated_in_other_words(corpus, tmp_path):
    texts = list(itertools.islice(repeated_documents(str(corpus)), 150))
    assert texts[:50] == TEXTS and len(set(texts)) == 150
    out = tmp_path / "text.jsonl"
    written = write_text(str(corpus), out, 5000)
    lines = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert written == sum(map(len, lines)) and 5000 <= written < 5000 + max(map(len, lines))


@pytest.mark.slow
def test_figures_of_a_preparation(corpus, tmp_path, repository):
    model = tmp_path / "some.model"
    model.write_bytes(train_competition_tokenizer(TEXTS, 300))
    figures = bench_data(repository / "data" / "prepare.py", str(corpus), model, (1,), 2, tmp_path)
    assert figures["prepare_1_to_bare"] == figures["prepare_1_mb_per_s"] / figures["bare_thread_mb_per_s"]
    assert figures["prepare_1_tokens"] > 100_000 and figures["prepare_1_seconds"] > 0
    if sys.platform.startswith("linux"):
        assert figures["prepare_1_peak_mib"] > 30


def test_a_failed_preparation_is_an_error(tmp_path, capfd):
    with pytest.raises(DataError, match="the preparation failed"):
        time_preparation([sys.executable, "-c", "raise SystemExit('no')"])
    assert "no" in capfd.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_process():
    before = tree_memory(os.getpid())
    block = bytearray(os.urandom(1 << 20)) * 64
    assert tree_memory(os.getpid()) > before + 60 * 2**20
    assert len(block) == 64 << 20 and tree_memory(2**22 + 1) == 0
