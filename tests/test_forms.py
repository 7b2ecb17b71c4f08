"""Every form of a stored tensor goes into an artifact and comes back; a description that lies about one is refused."""

import json
import random
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stored_fixtures import TINY, TOKENIZER, integer_weights, stored_of_every_form, stored_tensor

from golf.artifact.codecs import ArtifactError
from golf.artifact.container import coded_bytes, pack_artifact, read_artifact, same_stored_state
from golf.artifact.description import Form, forms_of_entry
from golf.artifact.frame import frame_artifact, unframe_artifact
from golf.artifact.sizes import code_entropy_bytes, size_report_dict
from golf.config.quantization import QuantConfig
from golf.quant.export import quantize_state
from golf.quant.grid import QuantizedTensor

CODECS_TO_TEST = ("none", "zlib", "lzma", "zstd", "brotli", "rans")
GOLDEN = Path(__file__).parent / "golden"


def with_document(data: bytes, change) -> bytes:
    """`data` with its description changed, and sound otherwise."""
    codec, fields = unframe_artifact(data)
    document = json.loads(zlib.decompress(fields[0], -15))
    change(document)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return frame_artifact(codec, [packer.compress(json.dumps(document).encode()) + packer.flush(), *fields[1:]])


@pytest.mark.parametrize("codec", CODECS_TO_TEST)
def test_every_form_round_trips(codec):
    stored = stored_of_every_form()
    data, report = pack_artifact(stored, TINY, TOKENIZER, codec)
    assert same_stored_state(read_artifact(data).state, stored)
    assert report.weights == sum(tensor.numel() for tensor in integer_weights(TINY).values())
    assert {stream.role for stream in report.streams} == {"codes", "scales", "columns", "zeros", "fp16"}
    assert pack_artifact(stored, TINY, TOKENIZER, codec, verify=False)[0] == data
    assert coded_bytes(stored, codec) == sum(stream.compressed_bytes for stream in report.streams)


@pytest.mark.parametrize("codec", CODECS_TO_TEST)
def test_artifacts_of_format_version_2_stay_readable(codec):
    data = (GOLDEN / f"version2_{codec}.golf").read_bytes()
    artifact = read_artifact(data)
    assert (artifact.model, artifact.tokenizer_sha256, artifact.codec) == (TINY, TOKENIZER, codec)
    assert same_stored_state(artifact.state, stored_of_every_form())


@pytest.mark.parametrize(
    "bits", [bits if bits in (1, 2, 5, 8) else pytest.param(bits, marks=pytest.mark.slow) for bits in range(1, 9)]
)
@pytest.mark.parametrize("codec", ["zlib", "rans"])
def test_every_width_round_trips(bits, codec):
    stored = quantize_state(integer_weights(TINY), QuantConfig(embed_bits=8))
    for zeros in (False, True):
        stored["tok_emb.weight"] = stored_tensor((32, 16), min(bits, 7) if zeros else bits, zeros=zeros, shared=True)
        assert same_stored_state(read_artifact(pack_artifact(stored, TINY, TOKENIZER, codec)[0]).state, stored)


def test_a_plain_description_is_no_longer_than_version_1s():
    stored = quantize_state(integer_weights(TINY), QuantConfig(embed_bits=8))
    _, before = unframe_artifact((GOLDEN / "version1_zlib.golf").read_bytes())
    _, now = unframe_artifact(pack_artifact(stored, TINY, TOKENIZER, "zlib")[0])
    assert len(now[0]) <= len(before[0])


def test_one_form_for_all_tensors_takes_few_bytes():
    stored = quantize_state(integer_weights(TINY), QuantConfig(embed_bits=8))
    shared = {
        name: replace(entry, scale_SG=entry.scale_SG[:1]) if isinstance(entry, QuantizedTensor) else entry
        for name, entry in stored.items()
    }
    sizes = [len(unframe_artifact(pack_artifact(s, TINY, TOKENIZER, "rans")[0])[1][0]) for s in (stored, shared)]
    assert sizes[0] < sizes[1] < sizes[0] + 60


def broken(entry: QuantizedTensor, **changes: object) -> dict:
    return {"tok_emb.weight": replace(entry, **changes)}


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_SG": torch.ones(3, 1).half()},
        {"scale_SG": torch.ones(32, 17).half()},
        {"column_scale_C": torch.ones(15).half()},
        {"zero_SG": torch.zeros(32, 2, dtype=torch.int8)},
        {"bits": 9},
        {"low_rank": (stored_tensor((32, 2), 4), stored_tensor((3, 16), 4))},
        {"low_rank": (stored_tensor((32, 2), 4, rank=1), stored_tensor((2, 16), 4))},
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes):
    with pytest.raises(ArtifactError, match="tok_emb"):
        forms_of_entry("tok_emb.weight", replace(stored_tensor((32, 16), 5), **changes))


@pytest.mark.parametrize(("bits", "code"), [(1, 0), (1, 2), (2, 2), (5, 16), (8, -128)])
@pytest.mark.parametrize("codec", ["none", "rans"])
def test_codes_outside_their_grid_are_refused(bits, code, codec):
    stored = quantize_state(integer_weights(TINY), QuantConfig(embed_bits=8))
    entry = stored_tensor((32, 16), bits)
    entry.codes_RC[3, 4] = code
    with pytest.raises(ArtifactError, match="tok_emb.weight.*grid"):
        pack_artifact(stored | {"tok_emb.weight": entry}, TINY, TOKENIZER, codec)


PLAIN, RANKED = [1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 2, 2, [1, 1, 0, 0, 0], 4, [1, 2, 0, 0, 0]]


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        (7, "list of forms"),
        ([[PLAIN]], "damaged"),
        ([[PLAIN, [0]], [PLAIN, [0]]], "twice"),
        ([[PLAIN, [99]]], "names no tensor"),
        ([[PLAIN, [True]]], "names no tensor"),
        ([[[1, 1, 0, 0], [0]]], "impossible form"),
        ([[[2, 1, 0, 0, 0], [0]]], "impossible form"),
        ([[[1, 17, 0, 0, 0], [0]]], "groups"),
        ([[[1, 0, 0, 0, 0], [0]]], "groups"),
        ([[[*RANKED[:5], 17, *RANKED[6:]], [0]]], "rank"),
        ([[[*RANKED[:5], 0, *RANKED[6:]], [0]]], "rank"),
        ([[[*RANKED[:6], 12, *RANKED[7:]], [0]]], "bits"),
        ([[[*RANKED[:7], RANKED, *RANKED[8:]], [0]]], "impossible form"),
        ([[PLAIN, [4]]], "impossible form"),
        ([[[1, 2, 0, 0, 0], [0]]], "declared|stream"),
    ],
)
def test_forms_that_lie_say_what_is_wrong(forms, message):
    stored = quantize_state(integer_weights(TINY), QuantConfig(embed_bits=8))
    data = pack_artifact(stored, TINY, TOKENIZER, "none")[0]
    with pytest.raises(ArtifactError, match=message):
        read_artifact(with_document(data, lambda document: document.update(forms=forms)))


@pytest.mark.parametrize("codec", ["none", "rans"])
@pytest.mark.slow
def test_random_lies_about_forms_never_crash(codec):
    chance = random.Random(0)
    data = pack_artifact(stored_of_every_form(), TINY, TOKENIZER, codec)[0]

    def change(document: dict) -> None:
        pair = chance.choice(document["forms"])
        form = pair[0]
        place = chance.randrange(len(form))
        form[place] = chance.choice([0, 1, 2, 3, -1, 16, 2**40, None, [], 0.5, "1", PLAIN, True])

    for _ in range(60 if codec == "rans" else 400):
        try:
            read_artifact(with_document(data, change))
        except ArtifactError as error:
            assert "\n" not in str(error)


def test_the_report_counts_codes_against_their_entropy():
    stored = stored_of_every_form()
    _, report = pack_artifact(stored, TINY, TOKENIZER, "rans")
    for stream in report.streams:
        assert (stream.entropy_ratio is None) == (stream.role != "codes") and stream.encode_seconds > 0
        assert stream.decode_seconds > 0
    total = size_report_dict(report)["codes"]
    parts = [stream for stream in report.streams if stream.role == "codes"]
    assert total["compressed_bytes"] == sum(part.compressed_bytes for part in parts)
    assert total["entropy_ratio"] == pytest.approx(total["compressed_bytes"] / sum(p.entropy_bytes for p in parts))
    four = torch.tensor([[0, 1, 2, 3] * 8], dtype=torch.int8)
    assert code_entropy_bytes([four, four]) == pytest.approx(16)
    assert code_entropy_bytes([torch.zeros(5, 5, dtype=torch.int8)]) == 0


def test_code_ranges():
    assert Form((2, 2), 1).code_range == (-1, 1) and Form((2, 2), 6).code_range == (-31, 31)
    assert Form((2, 2), 4, zeros=True).code_range == (0, 15) and Form((2, 2), 8, zeros=True).code_range == (-128, 127)
