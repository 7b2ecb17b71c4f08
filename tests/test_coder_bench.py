"""The benchmark of coders measures what it says."""

import pytest

from golf.artifact.codecs import ArtifactError
from golf.artifact.container import encode_streams
from golf.quant.grid import QuantizedTensor
from lab.bench.coder_bench import bench_coders, gptq_like_codes


def test_random_codes_are_like_those_of_gptq():
    stored = gptq_like_codes(0.01)
    assert all(isinstance(entry, QuantizedTensor) and entry.bits == 6 for entry in stored.values())
    bits = [
        8 * size.entropy_bytes / size.elements for size in encode_streams(stored, "none")[0] if size.role == "codes"
    ]
    assert all(3.3 < bit < 3.5 for bit in bits)


def test_every_codec_is_measured_on_the_same_codes(monkeypatch):
    stored = {name: entry for name, entry in gptq_like_codes(0.01).items() if "c_k" in name or "tok" in name}
    figures = bench_coders(stored, ("none", "lzma", "rans"))
    assert figures["rans"]["bytes"] < figures["lzma"]["bytes"] < figures["none"]["bytes"]
    assert figures["rans"]["to_entropy"] < 1.005 < figures["lzma"]["to_entropy"]
    assert all(value > 0 for row in figures.values() for value in row.values())
    sound = stored["tok_emb.weight"].codes_RC.clone()

    def planted(fields, forms, codec):
        stored["tok_emb.weight"].codes_RC[0, 0] += 1
        return {name: entry for name, entry in stored.items()} | {
            "tok_emb.weight": QuantizedTensor(sound, stored["tok_emb.weight"].scale_SG, 6)
        }, []

    monkeypatch.setattr("lab.bench.coder_bench.decode_streams", planted)
    with pytest.raises(ArtifactError, match="does not give back"):
        bench_coders(stored, ("rans",))
