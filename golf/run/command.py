"""Parses the command line of train_gpt.py: a run to start, to resume or to score; key=value for every knob."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import torch

from golf.config.config import FROZEN, Config, build_config, iter_knobs, knobs_of_environment, preset_config
from golf.config.knobs import ConfigError, knob_docs
from golf.config.presets import PRESETS
from golf.run.folder import RunFolder


@dataclass(frozen=True)
class Command:
    """Describes what to do; `config` is the run's, also of a run that is resumed or scored."""

    config: Config
    resume: Path | None = None
    """Folder of the run to resume."""
    new_code: bool = False
    """Whether to resume with this code a run that other code began."""
    score: Path | None = None
    """Folder of the run whose artifact is only reloaded and scored."""
    debug: bool = False


def list_knobs() -> str:
    """Returns two lines for every knob: its name, kind and value in this script, and its meaning."""
    lines, base = [], preset_config("leaderboard")
    docs = {knob: line for section in fields(base) for knob, line in knob_docs(section.type).items()}
    for section, knob, kind, value in iter_knobs(base):
        name = " | ".join(map(str, get_args(kind))) or kind.__name__
        lines.append(f"  {knob}={value}  ({name}; {section})" + (f"\n      {docs[knob]}" if docs[knob] else ""))
    return "\n".join(lines)


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """Returns key=value words as a dictionary. Raises ConfigError."""
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value")
    return dict(word.split("=", 1) for word in words)


def command_parser(default_preset: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description="Train, average, quantize, pack, reload in a fresh process, score, report.",
        epilog="" if FROZEN else f"knobs, as key=value or as upper-case environment variables:\n{list_knobs()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", help="" if FROZEN else f"{', '.join(PRESETS)}; here {default_preset}")
    parser.add_argument("--corpus", help="text to train on: embedded, .txt, .jsonl, .jsonl.xz, or a folder of them")
    parser.add_argument("--resume", metavar="RUN_ID", help="go on with a run from wherever it was (or its folder)")
    parser.add_argument("--new-code", action="store_true", help="with --resume: go on though other code began the run")
    parser.add_argument("--score", type=Path, metavar="FOLDER", help="only reload and score the artifact of this run")
    parser.add_argument("--plan", action="store_true", help="print what would happen when (tools/plan.py --help)")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def parse_command(arguments: list[str], environ: Mapping[str, str]) -> Command:
    """Parses the command line. Raises ConfigError for a knob, a value or a run that does not exist."""
    default_preset = "leaderboard" if torch.cuda.is_available() else "local"
    options = command_parser(default_preset).parse_intermixed_args(arguments)
    overrides = parse_overrides(options.overrides)
    if options.resume or options.score:
        if options.corpus or options.preset or set(overrides) - {"runs_root"}:
            raise ConfigError("a run goes on as it was configured: leave the other arguments out")
        runs_root = Path(overrides.get("runs_root") or knobs_of_environment(environ).get("runs_root", "runs"))
        folder = options.score or next(filter(Path.is_dir, (Path(options.resume), runs_root / options.resume)), None)
        if folder is None:
            raise ConfigError(f"there is no run {options.resume!r} under {runs_root}: name one that is there")
        config = RunFolder(folder).load_config()
        return Command(config, None if options.score else folder, options.new_code, options.score, options.debug)
    named = {"preset": options.preset, "corpus": options.corpus}
    overrides |= {knob: value for knob, value in named.items() if value}
    return Command(build_config(default_preset, environ, overrides), debug=options.debug)
