"""The artifact gives back exactly what it was given, and refuses everything else with one error."""

import hashlib
import json
import random
import sys
import tracemalloc
import zlib
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored_fixtures import TINY, TOKENIZER, integer_weights, stored_of_every_form

from golf.artifact.codecs import ArtifactError, compress_stream, decompress_stream
from golf.artifact.container import pack_artifact, read_artifact, same_stored_state, write_artifact
from golf.artifact.description import expected_shapes
from golf.artifact.frame import (
    DIGEST_END,
    DIGEST_START,
    decode_number,
    encode_number,
    frame_artifact,
    frame_digest,
    unframe_artifact,
)
from golf.artifact.weights import load_quantized, load_weights, save_quantized, save_weights
from golf.config.config import build_config
from golf.config.presets import PRESETS
from golf.config.quantization import QuantConfig
from golf.model.gpt import GPT
from golf.quant.export import quantize_state
from golf.quant.grid import QuantizedTensor, dequantize_state

CODECS_TO_TEST = ("none", "zlib", "lzma", "zstd", "brotli", "rans")
GOLDEN = Path(__file__).parent / "golden"
TINY_QUANT = QuantConfig(embed_bits=8)


def tiny_artifact(codec: str) -> bytes:
    return pack_artifact(quantize_state(integer_weights(TINY), TINY_QUANT), TINY, TOKENIZER, codec)[0]


def stored_state_hash(data: bytes) -> str:
    """SHA-256 of all names, codes, scales and fp16 values."""
    digest = hashlib.sha256()
    for name, entry in read_artifact(data).state.items():
        digest.update(name.encode())
        for part in (entry.codes_RC, entry.scale_SG) if isinstance(entry, QuantizedTensor) else (entry,):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def with_checksum(data: bytes) -> bytes:
    """`data` with a checksum that holds, so that damage reaches the parser."""
    return data[:DIGEST_START] + frame_digest(data[DIGEST_START - 1], data[DIGEST_END:]) + data[DIGEST_END:]


def with_description(data: bytes, change) -> bytes:
    """`data` with its description changed by `change`, and sound otherwise."""
    codec, fields = unframe_artifact(data)
    document = json.loads(zlib.decompress(fields[0], -15))
    change(document)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return frame_artifact(codec, [packer.compress(json.dumps(document).encode()) + packer.flush(), *fields[1:]])


@pytest.mark.parametrize("codec", CODECS_TO_TEST)
@pytest.mark.parametrize("quant", [TINY_QUANT, QuantConfig(mlp_bits=2, attn_bits=8, bigram_bits=7)])
def test_round_trip_is_exact(codec, quant, tmp_path):
    stored = quantize_state(integer_weights(TINY), quant)
    report = write_artifact(tmp_path / "model.golf", stored, TINY, TOKENIZER, codec)
    artifact = read_artifact(tmp_path / "model.golf")
    assert same_stored_state(artifact.state, stored) and list(artifact.state) == list(expected_shapes(TINY))
    assert (artifact.model, artifact.tokenizer_sha256, artifact.codec) == (TINY, TOKENIZER, codec)
    data = (tmp_path / "model.golf").read_bytes()
    assert artifact.byte_count == report.total_bytes == len(data)
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["model.golf"]


def test_model_from_artifact_gives_the_same_logits():
    stored = quantize_state(integer_weights(TINY), TINY_QUANT)
    in_memory, reloaded = GPT(TINY), GPT(TINY)
    in_memory.load_state_dict(dequantize_state(stored))
    reloaded.load_state_dict(dequantize_state(read_artifact(tiny_artifact("lzma")).state))
    ids_BT = torch.arange(24).view(2, 12)
    assert torch.equal(in_memory.logits(ids_BT), reloaded.logits(ids_BT))


@given(st.integers(0, 2**32), st.sampled_from(CODECS_TO_TEST), st.sampled_from([1e-6, 0.02, 50.0]))
@settings(max_examples=20)
def test_round_trip_of_random_weights(seed, codec, size):
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * size for name, shape in expected_shapes(TINY).items()}
    stored = quantize_state(state, TINY_QUANT)
    assert same_stored_state(read_artifact(pack_artifact(stored, TINY, TOKENIZER, codec)[0]).state, stored)


@pytest.mark.parametrize("codec", CODECS_TO_TEST)
def test_packing_twice_gives_the_same_bytes(codec):
    assert tiny_artifact(codec) == tiny_artifact(codec)


@pytest.mark.parametrize("preset", PRESETS)
def test_expected_shapes_are_the_models(preset):
    model = build_config(preset, {}, {}).model
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in GPT(model).state_dict().items()}
    assert expected_shapes(model) == shapes


def test_sizes_add_up():
    data, report = pack_artifact(quantize_state(integer_weights(TINY), TINY_QUANT), TINY, TOKENIZER, "lzma")
    assert report.weights == sum(tensor.numel() for tensor in integer_weights(TINY).values())
    assert report.overhead_bytes + sum(stream.compressed_bytes for stream in report.streams) == len(data)
    assert {stream.label for stream in report.streams} == {"embed", "bigram", "attn", "mlp", "small", "scales"}
    assert 0 < report.overhead_bytes < 400


def corruptions(data: bytes, count: int, chance: random.Random):
    """Bit flips, truncations, insertions, deletions, splices, and runs of one byte."""
    for _ in range(count):
        damaged, position = bytearray(data), chance.randrange(len(data))
        end = min(len(data), position + chance.randrange(1, 40))
        kind = chance.randrange(6)
        if kind == 0:
            for _ in range(chance.randrange(1, 4)):
                damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del damaged[position:]
        elif kind == 2:
            damaged[position:position] = chance.randbytes(chance.randrange(1, 20))
        elif kind == 3:
            del damaged[position:end]
        elif kind == 4:
            start = chance.randrange(len(data))
            damaged[position:end] = data[start : start + end - position]
        else:
            damaged[position:end] = bytes([chance.randrange(256)]) * (end - position)
        if damaged != data:
            yield bytes(damaged)


@pytest.mark.parametrize("codec", CODECS_TO_TEST)
def test_damaged_bytes_give_the_artifact_error(codec):
    data, refused = tiny_artifact(codec), 0
    for damaged in corruptions(data, 2000, random.Random(codec)):
        with pytest.raises(ArtifactError):
            read_artifact(damaged)
        refused += 1
    assert refused > 1800


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS_TO_TEST)
def test_damage_under_a_valid_checksum_never_crashes(codec):
    """Such bytes may be a sound artifact of other weights; all else must be the artifact error."""
    data, refused, tries = tiny_artifact(codec), 0, 60 if codec == "rans" else 2000  # tests/test_coder.py has more
    for damaged in corruptions(data, tries, random.Random(codec)):
        if len(damaged) < DIGEST_END:
            continue
        try:
            read_artifact(with_checksum(damaged))
        except ArtifactError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > tries / 4


JUNK = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**24,
    2**63,
    10**400,
    0.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "phase",
    [],
    {},
    [[]],
]


def test_descriptions_that_lie_never_crash():
    chance, data = random.Random(0), tiny_artifact("zlib")
    names = list(asdict(TINY))

    def change(document: dict) -> None:
        for _ in range(chance.randrange(1, 3)):
            part = chance.choice(["model", "model", "model", "bits", "tokenizer", "bits whole", "extra"])
            if part == "model":
                document["model"][chance.choice(names)] = chance.choice(JUNK)
            elif part == "bits" and document["bits"]:
                document["bits"][chance.randrange(len(document["bits"]))] = chance.choice(JUNK)
            else:
                document[{"bits whole": "bits"}.get(part, part)] = chance.choice(JUNK)
                document["bits"] = document["bits"] if isinstance(document["bits"], list) else []

    for _ in range(500):
        damaged = with_description(data, change)
        try:
            artifact = read_artifact(damaged)
        except ArtifactError:
            continue
        assert {name: tuple(t.shape) for name, t in dequantize_state(artifact.state).items()} == expected_shapes(TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(vocab_size=33), "declared"),
        (lambda d: d["model"].update(num_heads=0), "num_heads"),
        (lambda d: d["model"].update(num_heads=3), "multiple"),
        (lambda d: d["model"].update(num_layers=3), "list of bits"),
        (lambda d: d["model"].update(bigram_vocab_size=2**24, bigram_dim=2**14), "more than"),
        (lambda d: d["model"].update(resid_mix_init="zero"), "resid_mix_init"),
        (lambda d: d["model"].update(new_knob=1), "entries"),
        (lambda d: d["model"].pop("bos_id"), "entries"),
        (lambda d: d["bits"].__setitem__(0, 9), "bits"),
        (lambda d: d["bits"].__setitem__(0, 6), "grid"),
        (lambda d: d["bits"].__setitem__(-1, 16), "streams|declared|stream"),
        (lambda d: d.update(tokenizer="../secret"), "SHA-256"),
    ],
)
def test_inconsistent_description_says_what_is_wrong(change, message):
    with pytest.raises(ArtifactError, match=message):
        read_artifact(with_description(tiny_artifact("none"), change))


def test_wrong_magic_version_and_length():
    data = tiny_artifact("lzma")
    with pytest.raises(ArtifactError, match="not an artifact"):
        read_artifact(b"PK\x03\x04" + data)
    with pytest.raises(ArtifactError, match="version 3 is unknown"):
        read_artifact(data[:4] + b"\x03" + data[5:])
    with pytest.raises(ArtifactError, match="truncated"):
        read_artifact(data[:20])
    with pytest.raises(ArtifactError, match="unknown codec"):
        read_artifact(with_checksum(data[:DIGEST_END] + b"\x09" + data[DIGEST_END + 1 :]))
    with pytest.raises(ArtifactError, match="streams"):
        codec, fields = unframe_artifact(data)
        read_artifact(frame_artifact(codec, [*fields, b"more"]))
    with pytest.raises(ArtifactError, match="description"):
        read_artifact(frame_artifact("lzma", []))
    with pytest.raises(ArtifactError, match="cannot read"):
        read_artifact("no/such/file.golf")


@pytest.mark.parametrize("codec", ["zlib", "lzma", "zstd", "brotli"])
@pytest.mark.parametrize("field", [0, 1])
def test_bombs_are_refused_in_little_memory(codec, field):
    """A stream, or the description, that would unfold to 20 MB."""
    _, fields = unframe_artifact(tiny_artifact(codec))
    fields[field] = compress_stream("zlib" if field == 0 else codec, bytes(20_000_000))
    bomb = frame_artifact(codec, fields)
    assert len(bomb) < 200_000
    tracemalloc.start()
    with pytest.raises(ArtifactError):
        read_artifact(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_deeply_nested_description_is_refused():
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    with pytest.raises(ArtifactError, match="description is damaged"):
        read_artifact(frame_artifact("none", [packer.compress(b"[" * 60_000) + packer.flush()]))


@pytest.mark.parametrize(("codec", "package"), [("zstd", "zstandard"), ("brotli", "brotli")])
def test_a_missing_package_is_an_error_not_another_codec(codec, package, monkeypatch):
    data = tiny_artifact(codec)
    monkeypatch.setitem(sys.modules, package, None)
    for call in (lambda: tiny_artifact(codec), lambda: read_artifact(data)):
        with pytest.raises(ArtifactError, match=f"pip install .?{package}"):
            call()


@given(st.binary(max_size=300), st.sampled_from(CODECS_TO_TEST[:-1]), st.integers(-3, 3))
def test_streams_give_exactly_their_declared_size(data, codec, excess):
    packed = compress_stream(codec, data)
    assert decompress_stream(codec, packed, len(data)) == data
    if excess and len(data) + excess >= 0:
        with pytest.raises(ArtifactError):
            decompress_stream(codec, packed, len(data) + excess)


@given(st.integers(0, 2**35 - 1))
def test_lengths(value):
    assert decode_number(b"x" + encode_number(value) + b"y", 1) == (value, 1 + len(encode_number(value)))


def test_tensors_must_be_those_of_the_model():
    stored = quantize_state(integer_weights(TINY), TINY_QUANT)
    with pytest.raises(ArtifactError, match=r"smear\.gate.*missing"):
        pack_artifact({name: entry for name, entry in stored.items() if name != "smear.gate"}, TINY, TOKENIZER, "none")
    with pytest.raises(ArtifactError, match="smear.gate.*not one of"):
        pack_artifact(stored, replace(TINY, smear_gate=False), TOKENIZER, "none")
    with pytest.raises(ArtifactError, match="tok_emb.*shape"):
        pack_artifact(stored, replace(TINY, vocab_size=64), TOKENIZER, "none")


GOLDEN_STATE_HASH = "7863ae3f9790bf6d16ba6225ec80c44541fea92b6757a435235486a3c21fb511"


@pytest.mark.parametrize("codec", ["zlib", "lzma", "zstd"])
def test_artifacts_of_format_version_1_stay_readable(codec):
    data = (GOLDEN / f"version1_{codec}.golf").read_bytes()
    artifact = read_artifact(data)
    assert (artifact.model, artifact.tokenizer_sha256, artifact.codec) == (TINY, TOKENIZER, codec)
    assert stored_state_hash(data) == GOLDEN_STATE_HASH
    assert same_stored_state(artifact.state, quantize_state(integer_weights(TINY), TINY_QUANT))


def test_weights_round_trip(tmp_path):
    path, state = tmp_path / "weights.safetensors", integer_weights(TINY)
    save_weights(path, state, TINY, TINY_QUANT, TOKENIZER)
    saved = load_weights(path)
    assert (saved.model, saved.quant, saved.tokenizer_sha256) == (TINY, TINY_QUANT, TOKENIZER)
    assert list(saved.state) == list(state) and all(torch.equal(saved.state[name], state[name]) for name in state)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path, state = tmp_path / "weights.safetensors", integer_weights(TINY)
    sound = {"model": json.dumps(asdict(TINY)), "quant": json.dumps(asdict(TINY_QUANT)), "tokenizer_sha256": TOKENIZER}
    gate = state["smear.gate"]
    cases = [
        (state, {}, "metadata 'model'"),
        (state, sound | {"model": "{"}, "JSON"),
        (state, sound | {"model": json.dumps(asdict(replace(TINY, num_layers=3)))}, "skip_weights|blocks.2"),
        (state, sound | {"quant": json.dumps(asdict(replace(TINY_QUANT, mlp_bits=9)))}, "bits"),
        (state | {"smear.gate": gate[:-1].clone()}, sound, "smear.gate"),
        (state | {"smear.gate": gate / 0}, sound, "smear.gate.*NaN"),
        (state | {"extra": gate.clone()}, sound, "extra"),
    ]
    for tensors, metadata, message in cases:
        save_file(tensors, path, metadata)
        with pytest.raises(ArtifactError, match=message):
            load_weights(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(ArtifactError, match="cannot read weights"):
        load_weights(path)
    with pytest.raises(ArtifactError, match="cannot read weights"):
        load_weights(tmp_path / "absent.safetensors")


def test_quantized_weights_are_saved_in_every_form(tmp_path):
    """A run that goes on behind its quantize stage packs what it would have packed: trellis, factors and all."""
    stored = stored_of_every_form()
    save_quantized(tmp_path / "quantized.safetensors", stored)
    loaded = load_quantized(tmp_path / "quantized.safetensors")
    assert list(loaded) == list(stored) and same_stored_state(loaded, stored)
    entries = [entry for entry in stored.values() if isinstance(entry, QuantizedTensor)]
    for part in fields(QuantizedTensor):  # the state has every form: a field that is not saved is seen here
        values = {repr(getattr(entry, part.name)) for entry in entries}
        assert len(values) > 1, part.name
