"""Documents from every kind of source, and a split that shares none. pytest tests/test_corpus.py"""

import json
import lzma
import sysconfig
import tempfile
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf.data.shards import DataError
from lab.prepare.readers import cut_passages, iter_documents, pydoc_topics
from lab.prepare.work_files import build_spool, document_digest


def read_documents(source) -> list[str]:
    return list(iter_documents(source))


@dataclass(frozen=True)
class CorpusSplit:
    train: list[str]
    val: list[str]
    duplicates: int


def split_documents(documents: list[str], val_fraction: float, seed: int = 0) -> CorpusSplit:
    """Splits documents as a preparation does."""
    with tempfile.TemporaryDirectory() as folder:
        spool = build_spool(iter(documents), Path(folder), val_fraction, seed)
        return CorpusSplit([*spool.documents("train")], [*spool.documents("val")], spool.duplicates)


@pytest.fixture(scope="session")
def embedded() -> list[str]:
    return read_documents("embedded")


def test_embedded_corpus_is_the_standard_library(embedded):
    assert len(embedded) > 300 and sum(map(len, embedded)) > 4_000_000
    assert any("class JSONDecoder" in text for text in embedded)
    assert len(set(embedded)) == len(embedded)
    assert not any("decoding_table = (" in text and "generated from '" in text[:500] for text in embedded)


def test_embedded_corpus_leaves_out_tests_packages_and_tables(tmp_path, monkeypatch):
    files = {
        "b.py": "b = 1\n",
        "a.py": "a = 1\n",
        "copy.py": "a = 1\n",
        "empty.py": " \n",
        "LICENSE.txt": "licence",
        "test/test_a.py": "no",
        "site-packages/pip.py": "no",
        "dist-packages/x.py": "no",
        "idlelib/idle_test/t.py": "no",
        "_sysconfigdata_x.py": "no",
        "encodings/cp1.py": '""" Python Character Mapping Codec cp1 generated from \'X\' with gencodec.py.\n',
        "encodings/aliases.py": "aliases = {}\n",
        "pydoc_data/topics.py": "# made by a program\ntopics = {'b': 'about b', 'a': 'about' ' a'}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes("# é\n".encode("latin-1"))
    (tmp_path / "declared.py").write_bytes("# -*- coding: latin-1 -*-\n\n# é\n".encode("latin-1"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    declared = "# -*- coding: latin-1 -*-\n\n# é\n"
    expected = ["licence", "a = 1\n", "b = 1\n", declared, "aliases = {}\n", "about b", "about a"]
    assert read_documents("embedded") == expected


def test_topics():
    assert pydoc_topics("x = 1\n") == []
    assert pydoc_topics("topics = {'a': 'text', 'b': 'te' 'xt'}\n") == ["text", "text"]


def write_lines(path, records) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())


def test_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "lines.jsonl", [{"text": "one"}, {"text": " \n"}, {"text": "two", "source": 1}])
    write_lines(tmp_path / "b" / "more.jsonl.xz", [{"text": "three é"}])
    (tmp_path / "a.txt").write_bytes("first\r\nline é".encode())
    (tmp_path / "ignored.csv").write_text("no")
    assert read_documents(tmp_path) == ["first\r\nline é", "one", "two", "three é"]
    assert read_documents(tmp_path / "b" / "more.jsonl.xz") == ["three é"]
    assert read_documents(str(tmp_path / "a.txt")) == ["first\r\nline é"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', 'line 2: no string field "text"'),
        ("a.jsonl", b'{"text": 1}\n', 'line 1: no string field "text"'),
        ("a.jsonl", b"[1]\n", 'line 1: no string field "text"'),
        ("a.jsonl", b'\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not UTF-8"),
        ("a.txt", b"ab\xff", r"not UTF-8 \(byte 2\)"),
        ("a.txt", b" \n", "no text there"),
        ("a.jsonl.xz", b"not xz", "damaged xz data"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 99)[:-20], "damaged xz data"),
        ("a.csv", b"x", "must be in .txt"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_documents(tmp_path / name)
    assert name in str(caught.value)


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(DataError, match="must be in .txt"):
        read_documents(tmp_path)


@given(
    documents=st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
def test_no_document_is_in_both_splits_and_none_is_lost(documents, fraction, seed):
    if len(set(documents)) < 2:
        return
    split = split_documents(documents, fraction, seed)
    assert split.train and split.val
    assert not set(split.train) & set(split.val)
    assert sorted(split.train + split.val) == sorted(set(documents))
    assert split.duplicates == len(documents) - len(set(documents))
    assert split.val == [text for text in dict.fromkeys(documents) if text in set(split.val)]


def test_side_depends_on_the_text_alone_and_order_on_the_seed():
    documents = [f"document {number}" for number in range(400)]
    split = split_documents(documents, 0.1)
    shuffled = split_documents(documents[::-1] + documents[:50] + ["another"], 0.1)
    assert set(split.val) == set(shuffled.val) - {"another"}
    assert [text for text in shuffled.train if text != "another"] == split.train != sorted(split.train)
    assert 20 < len(split.val) < 60
    other = split_documents(documents, 0.1, seed=1)
    assert other.val == split.val and other.train != split.train and set(other.train) == set(split.train)
    assert all(int.from_bytes(document_digest(text)[:8], "big") < 0.1 * 2**64 for text in split.val)


def test_a_single_text_is_cut_into_passages(tmp_path):
    text = "".join(f"line {number}\n" for number in range(5000)) + "end"
    passages = list(cut_passages(StringIO(text, newline="\n")))
    assert "".join(passages) == text and len(passages) > 4
    assert all(len(passage) >= 8192 and passage.endswith("\n") for passage in passages[:-1])
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}))
    split = split_documents(read_documents(tmp_path / "one.jsonl"), 0.1)
    assert sorted(split.train + split.val) == sorted(passages)


def test_too_little_text_and_bad_fractions():
    with pytest.raises(DataError, match="one short document"):
        split_documents(["short"], 0.1)
    with pytest.raises(DataError, match="one short document"):
        split_documents(["same", "same"], 0.1)
    for fraction in (0.0, 1.0):
        with pytest.raises(DataError, match="val_fraction"):
            split_documents(["a", "b"], fraction)
