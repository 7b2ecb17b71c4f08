"""The command line of train_gpt.py: --preset NAME, --corpus PATH, key=value for every knob, --score FOLDER."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from golf.config import PRESETS, Config, ConfigError, build_config, iter_knobs


@dataclass(frozen=True)
class Command:
    """A run to start (`config`), or the folder of a packed run to score (`score`)."""

    config: Config | None
    score: Path | None


def list_knobs() -> str:
    """One line for every knob: name, type, the leaderboard preset's value."""
    lines = []
    for section, knob, kind, value in iter_knobs(Config()):
        name = getattr(kind, "__name__", str(kind).replace("typing.", ""))
        lines.append(f"  {knob:<30} {section:<8} {name:<44} {value!r}")
    return "\n".join(lines)


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """key=value words as a dictionary. Raises ConfigError."""
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value")
    return dict(word.split("=", 1) for word in words)


def parse_command(arguments: list[str], environ: Mapping[str, str]) -> Command:
    """Read the command line. Raises ConfigError for a knob or a value that does not exist."""
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description="Train, average, quantize, pack, reload in a fresh process, score.",
        epilog="knobs (name, section, type, default), as key=value or as upper-case environment variables;\n"
        f"golf/config.py says what each means:\n{list_knobs()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default_preset = "leaderboard" if torch.cuda.is_available() else "local"
    parser.add_argument("--preset", help=f"{', '.join(PRESETS)}; here {default_preset}")
    parser.add_argument("--corpus", help="text to train on: embedded, .txt, .jsonl, .jsonl.xz, or a folder of them")
    parser.add_argument("--score", type=Path, metavar="FOLDER", help="only reload and score the artifact of this run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.score:
        if options.overrides or options.corpus:
            raise ConfigError("--score takes the run as it was configured: leave the other arguments out")
        return Command(None, options.score)
    named = {"preset": options.preset, "corpus": options.corpus}
    overrides = parse_overrides(options.overrides) | {knob: value for knob, value in named.items() if value}
    return Command(build_config(default_preset, environ, overrides), None)
