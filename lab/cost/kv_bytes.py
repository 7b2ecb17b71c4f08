"""Counts what the keys and values of a text take: bytes for each token, and the longest text that a memory holds.

Counted as lab/generate/packed_cache.py keeps them: of a site with a quantizer the codes' bits, in whole bytes for a
token's head, and its scales; of any other site its values. Knowledge tokens are kept, and counted, beside the text.
"""

from dataclasses import dataclass, replace

from golf.config.knobs import UserError
from golf.config.model import ModelConfig
from golf.config.site_quantizers import parse_site
from golf.model.recurrence import layer_order
from lab.generate.packed_cache import packed_width, scale_count

KV_SETTINGS = (
    ("", ""), ("int8", ""), ("int8", "int8"), ("int4", ""), ("int4", "int4"), ("ternary", ""), ("ternary", "ternary"),
    ("tanh-ternary", ""), ("tanh-ternary", "int8"), ("tanh-ternary", "tanh-ternary"),
)  # fmt: skip
"""Quantizers of keys and of values that a table compares; empty: none."""


class KvBytesError(UserError):
    """A memory that holds no text."""


@dataclass(frozen=True)
class KvBytes:
    """Bytes of one token's keys and values, by layer."""

    k_by_layer: tuple[int, ...]
    v_by_layer: tuple[int, ...]
    knowledge_tokens: int
    attention_window: int

    @property
    def per_token(self) -> int:
        return sum(self.k_by_layer) + sum(self.v_by_layer)

    @property
    def knowledge(self) -> int:
        """Counts the bytes of the knowledge tokens, which no text adds to."""
        return self.knowledge_tokens * self.per_token

    def of_text(self, tokens: int) -> int:
        """Returns the bytes after so many tokens, those of knowledge among them; a window forgets what is before it."""
        kept = min(tokens, self.attention_window - 1) if self.attention_window else tokens
        return self.knowledge + self.per_token * kept

    def longest_text(self, memory_bytes: int) -> int | None:
        """Returns how many tokens fit, at least one; None: any number, for the window does. Raises KvBytesError."""
        if self.attention_window and self.of_text(self.attention_window) <= memory_bytes:
            return None
        tokens = (memory_bytes - self.knowledge) // self.per_token
        if tokens < 1:
            raise KvBytesError(
                f"{memory_bytes:,} bytes hold no token: each takes {self.per_token:,} bytes, beside {self.knowledge:,} "
                "bytes of knowledge tokens"
            )
        return tokens


def kv_site_bytes(text: str, heads: int, head_dim: int, value_bytes: int, scale_bytes: int) -> int:
    """Returns the bytes of one token's keys (or values) in one layer, with the quantizer that `text` names."""
    site = parse_site(text, activation=True)
    if site is None:
        return heads * head_dim * value_bytes
    return heads * (packed_width(head_dim, site.bits) + scale_count(site) * scale_bytes)


def kv_bytes_per_token(config: ModelConfig, value_bytes: int = 2, scale_bytes: int = 4) -> KvBytes:
    """Counts a model as it is; `value_bytes` of what has no quantizer (2: bf16), `scale_bytes` of a scale (4: fp32)."""
    head_dim = config.model_dim // config.num_heads
    k, v = (
        kv_site_bytes(text, config.num_kv_heads, head_dim, value_bytes, scale_bytes)
        for text in (config.act_k, config.act_v)
    )
    layers = len(layer_order(config))
    return KvBytes((k,) * layers, (v,) * layers, config.knowledge_tokens, config.attention_window)


@dataclass(frozen=True)
class KvRow:
    """One line of the table: what a setting would take in this model."""

    act_k: str
    act_v: str
    bytes: KvBytes
    gain: float
    """Bytes of 16-bit keys and values, divided by these."""
    longest_text: int | None
    """In the memory that was asked for; None: any length, or no memory was."""


def kv_table(
    config: ModelConfig, settings: tuple[tuple[str, str], ...] = KV_SETTINGS, memory_bytes: int = 0,
    scale_bytes: int = 4,
) -> list[KvRow]:  # fmt: skip
    """Returns the model's sizes at each setting of (act_k, act_v), its own first. Raises KvBytesError."""
    own = (config.act_k, config.act_v)
    full = kv_bytes_per_token(replace(config, act_k="", act_v=""))
    rows = []
    for act_k, act_v in dict.fromkeys((own, *settings)):
        found = kv_bytes_per_token(replace(config, act_k=act_k, act_v=act_v), 2, scale_bytes)
        longest = found.longest_text(memory_bytes) if memory_bytes else None
        rows.append(KvRow(act_k, act_v, found, full.per_token / found.per_token, longest))
    return rows
