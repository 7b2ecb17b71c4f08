"""Bytes of validation tokens beside the shards, and scores that divide by them. pytest tests/test_sidecar.py"""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from golf.artifact.container import read_artifact, write_artifact
from golf.config.config import Config, with_knobs
from golf.config.scoring import ScoreConfig
from golf.data.shards import DataError, find_shards, read_shard, write_shard
from golf.data.sidecar import (
    StreamBytes,
    read_sidecar,
    sidecar_path,
    validation_bytes,
    without_sidecars,
)
from golf.data.tokenizer import CASE_OPERATORS, ByteTable
from golf.model.init import build_model
from golf.quant.export import quantize_state
from golf.runtime import Log, Runtime
from golf.score.journal import ScoreJournal
from golf.score.roundtrip import score_artifact, score_weights
from golf.score.scorer import ScoreError, count_target_bytes
from lab.prepare.encoding import ChunkEncoder, DocumentChunk
from lab.prepare.text_tokenizer import SentencePieceTokenizer, encode_caseops
from lab.probe.data_probes import probe_bytes
from lab.probe.probes import FAIL, PASS

TEXTS = [f"The {n} Small Models SAID: “naïve Café, {n * n} bytes” to iPhone {n % 7}." for n in range(60)]
TEXTS[0] += "\ue001"  # an operator of CaseOps that is text
TEXT_BYTES = sum(len(text.encode()) for text in TEXTS)
SCORE = ScoreConfig(eval_seq_len=32, eval_stride=16, eval_batch_seqs=8, max_eval_seconds=0.0)
MODEL = dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, bigram_vocab_size=32, bigram_dim=8)


def train_model(transform: bool) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([encode_caseops(text) if transform else text for text in TEXTS]), model_writer=model,
        model_type="bpe", vocab_size=400, hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        byte_fallback=True, add_dummy_prefix=False, minloglevel=2, normalization_rule_name="identity",
        user_defined_symbols=[*CASE_OPERATORS] if transform else [],
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue(), "cased" if transform else "plain")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, SentencePieceTokenizer]:
    return {tokenizer.kind: tokenizer for tokenizer in map(train_model, (True, False))}


def write_data(folder: Path, tokenizer: SentencePieceTokenizer, shards: int = 3) -> list[Path]:
    """Validation shards of TEXTS with their sidecar."""
    stream = np.array([token for text in TEXTS for token in (tokenizer.bos_id, *tokenizer.encode(text))])
    folder.mkdir(parents=True, exist_ok=True)
    pairs = zip(np.array_split(stream, shards), np.array_split(tokenizer.target_bytes(stream), shards), strict=True)
    for index, (tokens_N, bytes_N) in enumerate(pairs):
        write_shard(folder / f"text_val_{index:06d}.bin", tokens_N)
        write_shard(folder / f"text_val_bytes_{index:06d}.bin", bytes_N)
    return find_shards(folder, "val")


def tokens_of(paths: list[Path]) -> np.ndarray:
    return np.concatenate([read_shard(path) for path in paths])


def change_sidecar(path: Path, change) -> None:
    bytes_N = read_shard(sidecar_path(path)).copy()
    change(bytes_N)
    write_shard(sidecar_path(path), bytes_N)


def test_files_and_names(tmp_path, tokenizers):
    tokenizer = tokenizers["caseops"]
    paths = write_data(tmp_path, tokenizer)
    assert [path.name for path in paths] == [f"text_val_{n:06d}.bin" for n in range(3)]  # the bytes are no tokens
    assert sidecar_path(paths[1]) == tmp_path / "text_val_bytes_000001.bin"
    assert sidecar_path(tmp_path / "text_train_000000.bin") is None and sidecar_path(sidecar_path(paths[0])) is None
    assert without_sidecars(sorted(tmp_path.iterdir())) == paths
    bytes_N = read_sidecar(paths)
    assert bytes_N.dtype == np.uint16 and bytes_N.tolist() == tokenizer.target_bytes(tokens_of(paths)).tolist()
    assert bytes_N.sum() == TEXT_BYTES
    for path in paths:
        sidecar_path(path).unlink()
    assert read_sidecar(paths) is None


def test_bytes_that_fit_no_file(tokenizers, monkeypatch):
    tokenizer = tokenizers["sentencepiece"]
    for bad in (2**16, -1):
        monkeypatch.setattr(tokenizer, "target_bytes", lambda ids_N, bad=bad: np.full(len(ids_N), bad))
        monkeypatch.setattr("lab.prepare.encoding.check_byte_counts", lambda *arguments: 0)
        with pytest.raises(DataError, match="0 to 65,535 bytes"):
            ChunkEncoder(tokenizer, word_cache=False).encode(DocumentChunk("val", TEXTS), with_bytes=True)


def test_targets_are_counted_by_position():
    counter = StreamBytes(np.array([0, 5, 0, 7, 300], dtype=np.uint16)).to("cpu")
    tokens_N1 = torch.ones(5, dtype=torch.int32)
    assert count_target_bytes(tokens_N1, counter).tolist() == [5, 0, 7, 300]
    assert count_target_bytes(tokens_N1[:3], counter).tolist() == [5, 0]
    assert count_target_bytes(tokens_N1, counter).dtype == torch.int32
    with pytest.raises(DataError, match="6 tokens to score, but bytes of 5"):
        count_target_bytes(torch.ones(6, dtype=torch.int32), counter)


def test_the_sidecar_counts_where_there_is_one(tmp_path, tokenizers):
    for kind, tokenizer in tokenizers.items():
        table, paths = ByteTable(tokenizer), write_data(tmp_path / kind, tokenizer)
        counter = validation_bytes(table, paths, tokens_of(paths))
        assert isinstance(counter, StreamBytes) and counter.bytes_N.sum() == TEXT_BYTES
        shutil.rmtree(tmp_path / kind)
        assert validation_bytes(table, paths, np.array([1, 5])) is table


def operators_as_text(bytes_N):
    bytes_N[bytes_N == 0] = 3


SPOILED = {
    "one is missing": (lambda paths: sidecar_path(paths[1]).unlink(), "no bytes of its tokens beside it"),
    "too short": (
        lambda paths: write_shard(sidecar_path(paths[1]), read_shard(sidecar_path(paths[1]))[:-1]),
        "bytes of [0-9]+ tokens, text_val_000001.bin has",
    ),
    "damaged": (lambda paths: sidecar_path(paths[0]).write_bytes(b"x" * 2000), "not a token shard"),
    "bytes for document starts": (
        lambda paths: change_sidecar(paths[0], lambda bytes_N: bytes_N.__setitem__(0, 1)),
        "bytes for document starts",
    ),
    "operators count": (lambda paths: change_sidecar(paths[2], operators_as_text), "bytes for document starts|counts"),
    "doubled": (lambda paths: change_sidecar(paths[1], lambda bytes_N: np.multiply(bytes_N, 2, bytes_N)), "the pieces"),
    "of other tokens": (
        lambda paths: change_sidecar(paths[0], lambda bytes_N: bytes_N.__setitem__(slice(None), bytes_N[::-1].copy())),
        "bytes for document starts",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_wrong_sidecar_is_refused(tmp_path, tokenizers, case):
    spoil, message = SPOILED[case]
    tokenizer = tokenizers["caseops"]
    paths = write_data(tmp_path, tokenizer)
    spoil(paths)
    with pytest.raises(DataError, match=message):
        validation_bytes(ByteTable(tokenizer), paths, tokens_of(paths))


def one_more(bytes_N):
    bytes_N[5] += 1


def test_one_byte_too_many_is_refused_where_the_sum_is_known(tmp_path, tokenizers):
    plain, cased = tokenizers["sentencepiece"], tokenizers["caseops"]
    paths = write_data(tmp_path / "plain", plain)
    change_sidecar(paths[0], one_more)
    with pytest.raises(DataError, match=f"counts {TEXT_BYTES + 1} bytes, the pieces have {TEXT_BYTES}"):
        validation_bytes(ByteTable(plain), paths, tokens_of(paths))
    paths = write_data(tmp_path / "cased", cased)
    manifest = tmp_path / "cased" / "manifest.json"
    manifest.write_text(json.dumps({"splits": {"val": {"bytes": TEXT_BYTES}}}))
    assert isinstance(validation_bytes(ByteTable(cased), paths, tokens_of(paths)), StreamBytes)
    change_sidecar(paths[0], one_more)
    with pytest.raises(DataError, match=f"counts {TEXT_BYTES + 1} bytes, the manifest {TEXT_BYTES}"):
        validation_bytes(ByteTable(cased), paths, tokens_of(paths))
    assert isinstance(validation_bytes(ByteTable(cased), paths[:2], tokens_of(paths[:2])), StreamBytes)  # not all
    manifest.write_text(json.dumps({"datasets": []}))  # someone else's
    assert isinstance(validation_bytes(ByteTable(cased), paths, tokens_of(paths)), StreamBytes)
    manifest.write_text("{")
    with pytest.raises(DataError, match="holds no JSON"):
        validation_bytes(ByteTable(cased), paths, tokens_of(paths))


# ---- scores ----


def packed(folder: Path, tokenizer: SentencePieceTokenizer):
    """(artifact, state, path of the tokenizer) of an untrained model."""
    config = with_knobs(Config(), MODEL | dict(vocab_size=tokenizer.vocab_size, train_seq_len=16))
    state = build_model(config.model, seed=3).state_dict()
    (folder / "tokens.model").write_bytes(tokenizer.processor.serialized_model_proto())
    stored = quantize_state(state, config.quant)
    write_artifact(folder / "model.golf", stored, config.model, tokenizer.sha256, "zlib")
    return read_artifact(folder / "model.golf"), state, folder / "tokens.model"


def quiet() -> Runtime:
    return Runtime(torch.device("cpu"), log=Log(io.StringIO()))


def test_caseops_is_scored_by_the_bytes_of_the_original_text(tmp_path, tokenizers):
    artifact, state, model = packed(tmp_path, tokenizers["caseops"])
    paths = write_data(tmp_path, tokenizers["caseops"])
    everything = sorted(tmp_path.glob("*_val_*.bin"))  # a pattern that matches the bytes, too
    measured, _ = score_artifact(artifact, model, everything, SCORE, quiet())
    assert (measured.bytes, measured.tokens) == (TEXT_BYTES, len(tokens_of(paths)) - 1)
    assert score_weights(state, artifact, model, paths, 4, quiet()).bytes == TEXT_BYTES
    for path in paths:
        sidecar_path(path).unlink()
    with pytest.raises(ScoreError, match="_val_bytes_NNNNNN.bin that say them"):
        score_artifact(artifact, model, paths, SCORE, quiet())


def test_a_journal_of_other_bytes_is_not_taken_up(tmp_path, tokenizers):
    artifact, _, model = packed(tmp_path, tokenizers["caseops"])
    paths = write_data(tmp_path, tokenizers["caseops"])
    for extra in (0, 1):
        measured, _ = score_artifact(
            artifact, model, paths, SCORE, quiet(), journal=ScoreJournal(tmp_path / "journal.jsonl")
        )
        assert measured.bytes == TEXT_BYTES + extra
        change_sidecar(paths[0], one_more)


def shifted(bytes_N):
    """The same sum, a byte in a document where it is not."""
    bytes_N[5] += 1
    bytes_N[bytes_N.nonzero()[0][-1]] -= 1


@pytest.mark.parametrize(("change", "verdict"), [(None, PASS), (one_more, FAIL), (shifted, FAIL)])
def test_the_probe_holds_the_sidecar_against_decoded_text(tmp_path, tokenizers, change, verdict):
    tokenizer = tokenizers["caseops"]
    paths = write_data(tmp_path, tokenizer, shards=1)
    if change:
        change_sidecar(paths[0], change)
    tokens = tokens_of(paths)
    counter = validation_bytes(ByteTable(tokenizer), paths, tokens)
    total = int(read_sidecar(paths).sum())
    figures = dict(val_bytes=total, val_tokens=len(tokens) - 1, val_loss=2.0)
    figures["val_bpb"] = 2.0 * figures["val_tokens"] / np.log(2) / total
    probe = probe_bytes(tokenizer, tokens, figures, full=True, counter=counter)
    assert probe.verdict == verdict, probe.detail
    if change:
        assert "document 1: its tokens' own counts say" in probe.detail
    else:  # the table alone takes the literal operators for CaseOps' own
        assert probe_bytes(tokenizer, tokens, figures, full=True).verdict == FAIL
