"""Documents from every kind of source, one after the other. pytest tests/test_readers.py"""

import io
import itertools
import json

import pytest
import zstandard
from fake_hub import FakeHub

from golf.data.shards import DataError, write_shard
from lab.prepare.readers import (
    cut_passages,
    embedded_documents,
    is_hub_source,
    iter_documents,
    source_identity,
)
from lab.probe.documents import shard_documents

TEXTS = ["one", "two é", "three\nlines\r\nhere"]


def json_lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_embedded_text_is_the_same_as_in_memory():
    assert list(itertools.islice(iter_documents("embedded"), 20)) == [t for t in embedded_documents() if t.strip()][:20]


def test_zstd_lines(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    frames = [zstandard.compress(json_lines(part)) for part in (TEXTS[:2], [" \n", *TEXTS[2:]])]
    path.write_bytes(b"".join(frames))  # two frames, as parallel writers make them
    assert list(iter_documents(path)) == TEXTS
    path.write_bytes(zstandard.compress(json_lines(TEXTS).rstrip()))
    assert list(iter_documents(path)) == TEXTS
    path.write_bytes(zstandard.compress(b'{"text": "x"}\n{"body": 1}\n'))
    with pytest.raises(DataError, match='zst, line 2: no string field "text"'):
        list(iter_documents(path))
    path.write_bytes(b"no zstd at all")
    with pytest.raises(DataError, match="damaged zstd data"):
        list(iter_documents(path))


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = arrow.table({"id": list(range(1000)), "text": [None, *[f"text {number}" for number in range(999)]]})
    parquet.write_table(table, path, row_group_size=300)
    assert list(iter_documents(path)) == [f"text {number}" for number in range(999)]
    parquet.write_table(arrow.table({"body": ["x"]}), path)
    with pytest.raises(DataError, match='no column "text"; it has body'):
        list(iter_documents(path))
    parquet.write_table(arrow.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match="holds int, not strings"):
        list(iter_documents(path))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="not a sound parquet file"):
        list(iter_documents(path))


def test_a_folder_of_several_kinds(tmp_path):
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(json_lines(TEXTS[1:])))
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "ignored.csv").write_text("no")
    assert list(iter_documents(tmp_path)) == TEXTS
    identity = source_identity(tmp_path)
    assert identity.startswith(f"{tmp_path.name}-") and identity == source_identity(str(tmp_path))
    (tmp_path / "a.txt").write_text("other")
    assert source_identity(tmp_path) != identity


def test_a_single_text_comes_in_passages_line_by_line(tmp_path):
    text = "".join(f"line {number} é\r\n" for number in range(5000)) + "end"
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    passages = list(iter_documents(path))
    assert (
        passages == [*cut_passages(io.StringIO(text, newline="\n"))] and len(passages) > 5 and "".join(passages) == text
    )
    (tmp_path / "long.jsonl").write_bytes(json_lines([text]))
    assert list(iter_documents(tmp_path / "long.jsonl")) == passages
    path.write_bytes(text.encode() + b"\n\xff")
    with pytest.raises(DataError, match="long.txt, line at byte .*: not UTF-8"):
        list(iter_documents(path))


def test_lines_are_read_as_they_are_needed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS) + b"broken\n")
    documents = iter_documents(path)
    assert [next(documents) for _ in TEXTS] == TEXTS
    with pytest.raises(DataError, match="line 4: not valid JSON"):
        next(documents)


@pytest.mark.parametrize("name", ["none.txt", "none", "./own/none", "own/none.jsonl"])
def test_missing_sources(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert not is_hub_source(name)
    with pytest.raises(DataError, match="no such file or folder"):
        iter_documents(name)


def test_text_is_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines([" ", "\n"]))
    with pytest.raises(DataError, match="no text there"):
        iter_documents(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set of three text files."""
    texts = {"b/2.jsonl": TEXTS[2:], "b/1.jsonl": TEXTS[:2], "c/3.jsonl": ["three"], "README.md": ["no"]}
    hub_module = pytest.importorskip("lab.prepare.hub")
    with FakeHub("own/text", {name: json_lines(lines) for name, lines in texts.items()}) as server:

        def open_hub(source):
            return hub_module.Hub(source.split(":")[0], server.url, tmp_path / "cache", attempts=2, longest_wait=0.03)

        monkeypatch.setattr("lab.prepare.readers.open_hub", open_hub)
        yield server


def test_a_data_set_on_the_hub(hub):
    hub.faults["b/2.jsonl"] = ["500"]
    documents = iter_documents("own/text")
    assert next(documents) == "one" and set(hub.fetched()) == {"b/1.jsonl"}  # files are fetched when they are needed
    assert [*documents] == [*TEXTS[1:], "three"]
    assert list(iter_documents("own/text:b")) == TEXTS
    identity = source_identity("own/text:b")
    assert identity.startswith("own-text-b-") and identity == source_identity("own/text:b")
    assert identity != source_identity("own/text:c").replace("-c-", "-b-")
    hub.files["b/1.jsonl"] = json_lines(["changed"])
    assert source_identity("own/text:b") != identity
    with pytest.raises(DataError, match="own/other: no such file or folder here; the hub has no dataset own/other"):
        iter_documents("own/other")
    with pytest.raises(DataError, match="holds no .txt"):
        iter_documents("own/text:elsewhere")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def no_package(name):
        raise ImportError(name)

    monkeypatch.setattr("lab.prepare.text_tokenizer.importlib.import_module", no_package)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="pyarrow is not installed: pip install -r requirements-data.txt"):
        iter_documents(tmp_path / "a.parquet")


def test_documents_of_token_shards_run_over_their_borders(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.probe.documents.BLOCK_TOKENS", 3)
    start = 50256
    write_shard(tmp_path / "x_train_000001.bin", [start, 1, 2, 3, 4, start])
    write_shard(tmp_path / "x_train_000002.bin", [5, 6, start, start, 7])
    paths = sorted(tmp_path.iterdir())
    assert [ids_N.tolist() for ids_N in shard_documents(paths, start)] == [[1, 2, 3, 4], [5, 6], [7]]


def test_gpt2_shards_are_decoded(tmp_path):
    pytest.importorskip("tiktoken")
    merges = tmp_path / "vocab.bpe"
    merges.write_text("#version: 0.2\nh e\nl l\n")
    letters = {chr(value): value - 33 for value in range(33, 127)}  # the ids of printing bytes begin at "!"
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "fineweb_train_000001.bin", [50256, letters["b"], 50256, 256, 257, letters["o"]])
    write_shard(folder / "fineweb_val_000000.bin", [50256, letters["a"]])
    with pytest.raises(DataError, match="give --merges FILE"):
        iter_documents(folder)
    assert list(iter_documents(folder, merges)) == ["a", "b", "hello"]
