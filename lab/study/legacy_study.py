"""Reads the published low-bit study's flag files (configs/*.json) as knobs of this pipeline.

A file is one JSON object of booleans, false where they are left out, and `experiment_name`, which sets nothing: it is
the name of the study. Each flag put a quantizer with the study's own gradient and with gradient through its scale at
some sites; an EXTREME flag replaced the 8-bit activation quantizer of its parent flag by tanh-ternary, which in the
MLP replaced the squared ReLU too. LEGACY_SHARED_QKVO_SCALE is ours: the study's second run took one scale over the
whole attention tensor, of which W_o is a part even where it is not quantized. What has no quantizer stays in 16 bits.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from golf.config.knobs import UserError, parse_json

ATTENTION_WEIGHTS = "ENABLE_ATTN_QUANTIZATION"
SHARED_SCALE = "LEGACY_SHARED_QKVO_SCALE"
HIDDEN, EXTREME_HIDDEN = "ENABLE_MLP_ACT_QUANTIZATION", "ENABLE_EXTREME_MLP_ACT_QUANTIZATION"

WEIGHT_FLAGS = {
    ATTENTION_WEIGHTS: ("q", "k", "v"), "ENABLE_ATTN_PROJ_QUANTIZATION": ("o",),
    "ENABLE_MLP_QUANTIZATION": ("up", "down"),
}  # fmt: skip
"""Flag -> sites of weights that it makes ternary."""
ACTIVATION_FLAGS = {
    "ENABLE_ATTN_PRE_ACT_QUANTIZATION": ("ENABLE_EXTREME_PRE_ATTN_ACT_QUANTIZATION", ("attn_in",)),
    "ENABLE_ATTN_ACT_QUANTIZATION": ("ENABLE_EXTREME_ATTN_ACT_QUANTIZATION", ("q", "k")),
    "ENABLE_MLP_PRE_ACT_QUANTIZATION": ("ENABLE_EXTREME_PRE_MLP_ACT_QUANTIZATION", ("mlp_in",)),
    HIDDEN: (EXTREME_HIDDEN, ("hidden",)),
}
"""Flag -> its EXTREME flag, and the sites of activations that both act on."""
NEEDED_FLAGS = {extreme: parent for parent, (extreme, _) in ACTIVATION_FLAGS.items()}
NEEDED_FLAGS[SHARED_SCALE] = ATTENTION_WEIGHTS
"""Flag -> the flag without which it does nothing."""
STUDY_FLAGS = (*WEIGHT_FLAGS, *(name for flag, (extreme, _) in ACTIVATION_FLAGS.items() for name in (flag, extreme)))
"""The eleven of the study."""

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MATRIX_TERNARY, SHARED_TERNARY = "ternary-tensor-fork-attached", "ternary-qkvo-fork-attached"
LINEAR_8_BIT, UNSIGNED_8_BIT, TANH_TERNARY = "twosided8-fork-attached", "unsigned8-fork-attached", "tanh-ternary-fork"
FULL_PRECISION = {"mlp_bits": "16", "attn_bits": "16", "bigram_bits": "16", "embed_bits": "16"}


class FlagError(UserError):
    """The flag file does not exist, or says something that the study does not know."""


@dataclass(frozen=True)
class LegacyStudy:
    """A flag file that was read and found sound."""

    name: str
    """`experiment_name`; where there is none, the file's name without its ending."""
    flags: Mapping[str, bool]
    """All STUDY_FLAGS, and SHARED_SCALE."""

    @property
    def knobs(self) -> dict[str, str]:
        """Maps knob to text, for the overrides of build_config."""
        knobs, flags = FULL_PRECISION | {"qat_enabled": "0", "quantizer": "rtn", "prune_frac": "0"}, self.flags
        knobs["mlp_activation"] = "identity" if flags[EXTREME_HIDDEN] else "relu2"
        for flag in filter(flags.get, WEIGHT_FLAGS):
            shared = flags[SHARED_SCALE] and flag != "ENABLE_MLP_QUANTIZATION"
            knobs["qat_enabled"] = "1"
            knobs |= {f"weight_{site}": SHARED_TERNARY if shared else MATRIX_TERNARY for site in WEIGHT_FLAGS[flag]}
        for flag in filter(flags.get, ACTIVATION_FLAGS):
            extreme, sites = ACTIVATION_FLAGS[flag]
            quantizer = TANH_TERNARY if flags[extreme] else UNSIGNED_8_BIT if flag == HIDDEN else LINEAR_8_BIT
            knobs |= {f"act_{site}": quantizer for site in sites}
        return knobs


def load_study(name_or_path: str | Path) -> dict[str, str]:
    """Returns the knobs (knob -> text) of a study in configs/, by name, or of a file, by a path or anything in .json.

    Raises FlagError, OSError.
    """
    return read_study(name_or_path).knobs


def read_study(name_or_path: str | Path) -> LegacyStudy:
    """Reads the study's name and flags. Raises FlagError, OSError."""
    path = study_path(name_or_path)
    try:
        entries = parse_json(path.read_bytes(), object_pairs_hook=unique_entries)
        if not isinstance(entries, dict):
            raise FlagError("must be one JSON object of flags")
        name = entries.pop("experiment_name", path.stem)
        if not isinstance(name, str) or not name.strip():
            raise FlagError("experiment_name must be a text: it names the study and sets nothing")
        return LegacyStudy(name, checked_flags(entries))
    except FlagError as error:
        raise FlagError(f"{path}: {error}") from None
    except ValueError as error:
        raise FlagError(f"{path}: no JSON: {error}") from None


def study_path(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".json" or path.name != str(name_or_path):
        return path
    known = sorted(file.stem for file in CONFIGS.glob("*.json"))
    if path.name not in known:
        raise FlagError(f"no study {path.name!r} in configs/: there are {', '.join(known)}")
    return CONFIGS / f"{path.name}.json"


def unique_entries(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise FlagError(f"{name} is there twice: leave one of them out")
    return dict(pairs)


def checked_flags(entries: Mapping[str, object]) -> dict[str, bool]:
    """Returns all flags, those left out as false. Raises FlagError for one that is unknown, no boolean, or idle."""
    known = (*STUDY_FLAGS, SHARED_SCALE)
    for name, value in entries.items():
        if name not in known:
            raise FlagError(f"unknown flag {name!r}: there are experiment_name, {', '.join(known)}")
        if not isinstance(value, bool):
            raise FlagError(f"{name} must be true or false, not {json.dumps(value)}")
    flags = {name: bool(entries.get(name, False)) for name in known}
    for name, needed in NEEDED_FLAGS.items():
        if flags[name] and not flags[needed]:
            raise FlagError(f"{name} does nothing without {needed}: set both, or neither")
    return flags
