"""Every switched-on feature counts its acts and proves an effect once; one that did not makes the run invalid."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from golf.config.config import Config
from golf.config.site_quantizers import activation_sites


@dataclass
class FeatureRecord:
    """What one armed feature did. Steps are those of training, None for features that act elsewhere."""

    first: int | None = None
    last: int | None = None
    count: int = 0
    effect: str = ""
    proven: bool = False


def armed_features(config: Config) -> dict[str, str]:
    """The features that are switched on, with what to do about one that never acts."""
    model, train, optim, quant, score = config.model, config.train, config.optim, config.quant, config.score
    longer = "train longer, or "
    armed = {
        "warmdown": (train.warmdown_fraction > 0, longer + "set warmdown_fraction=0"),
        "muon_momentum_warmup": (
            optim.muon_momentum_warmup_fraction > 0 and optim.muon_momentum_start != optim.muon_momentum,
            "set muon_momentum_warmup_fraction=0",
        ),
        "grad_clip": (optim.grad_clip_norm > 0, "lower grad_clip_norm, or set it to 0"),
        "qat": (quant.qat_enabled, longer + "lower qat_start"),
        "activation_quantizers": (bool(activation_sites(model)), "leave act_* out"),
        "attention_window": (model.attention_window > 0, "set attention_window=0"),
        "knowledge_tokens": (model.knowledge_tokens > 0, "set knowledge_tokens=0"),
        "swa": (config.average.swa_enabled, longer + "lower swa_start"),
        "smear_gate": (model.smear_gate, "set smear_gate=0"),
        "bigram_hash": (model.bigram_vocab_size > 0, "set bigram_vocab_size=0"),
        "validation": (train.holdout_every > 0, longer + "set holdout_every=0"),
        "calibration": (quant.quantizer == "waterfill", "set quantizer=rtn"),
        "prune": (quant.prune_frac > 0, "set prune_frac=0, or raise it"),
        "ntk_rope": (score.eval_rope == "ntk", "set eval_rope=none"),
        "document_attention": (model.document_attention, "set document_attention=0"),
        "short_seq": (train.short_seq_len > 0, longer + "set short_seq_len=0 short_seq_fraction=0"),
    }
    return {feature: advice for feature, (is_armed, advice) in armed.items() if is_armed}


class FeatureAudit:
    """Testimonies of the armed features. Acts of features that are not armed are a mistake of ours."""

    def __init__(self, config: Config, values: Mapping[str, Mapping[str, Any]] | None = None):
        self.advice = armed_features(config)
        self.records = {feature: FeatureRecord(**(values or {}).get(feature, {})) for feature in self.advice}

    def count(self, feature: str, step: int | None = None, count: int = 1) -> None:
        """`feature` acted `count` times, at `step` of the training."""
        record = self.records[feature]
        record.count += count
        if step is not None:
            record.first = step if record.first is None else record.first
            record.last = step

    def verify(self, feature: str, holds: bool, effect: str) -> None:
        """Whether the effect of `feature` was seen, and what it was."""
        self.records[feature].proven, self.records[feature].effect = bool(holds), effect

    def record(self) -> dict[str, dict[str, Any]]:
        return {feature: asdict(record) for feature, record in self.records.items()}

    def findings(self) -> list[str]:
        """One line for each feature that was armed and did not act, or acted without effect."""
        findings = []
        for feature, record in self.records.items():
            if record.count == 0:
                findings.append(f"{feature} was switched on and never acted: {self.advice[feature]}")
            elif not record.proven:
                effect = record.effect or "no measurement"
                findings.append(f"{feature} acted {record.count} times, but its effect was not seen ({effect})")
        return findings
