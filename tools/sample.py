"""Samples text from a trained model, over a cache of keys and values.

    python tools/sample.py --artifact FILE | --run RUN --prompt TEXT [--tokens 200] [--temperature 0.8] [--top-k K]
        [--top-p P] [--seed S] [--stop TEXT] [--batch B] [--stream] [--packed-cache]

Temperature 0 takes the most likely token each time. `--prompt -` reads the prompt from standard input; without a
prompt a document begins. B rows continue it with seeds S, S + 1, ... A document's end ends a row; so does a stop text,
which is left out. Text goes to standard output, what was cut and the speed to standard error.
Exit status: 0 sampled, 2 bad input.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from golf.runtime import Log, start_runtime
from lab.cli import DeviceOptions, run_command
from lab.generate.generation import TextGeneration
from lab.generate.sampling import SamplingError, SamplingOptions
from lab.generate.text_model import TextModel, open_text_model


@dataclass(frozen=True)
class Options(DeviceOptions, SamplingOptions):
    artifact: Path | None = None
    """The artifact to sample from; or give --run."""
    run: Path | None = None
    """Folder of a run that has an artifact."""
    prompt: str = ""
    """Text to go on with; - reads it from standard input."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text that ends a row; several: --stop TEXT --stop TEXT."""
    batch: int = 1
    """Rows that continue the prompt."""
    stream: bool = False
    """Print the text as it comes; of one row."""
    tokenizer: Path | None = None
    """Default: that of the run, whose folder the artifact may lie in."""

    def __post_init__(self) -> None:
        """Leaves the checks of SamplingOptions to check_options, whose errors are one line."""


def read_prompt(prompt: str) -> str:
    """Returns the prompt, or standard input for "-". Raises SamplingError for bytes that are no text."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise SamplingError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from None


def check_options(options: Options) -> SamplingOptions:
    """Returns how to sample. Raises SamplingError."""
    if bool(options.artifact) == bool(options.run):
        raise SamplingError("give either --artifact FILE or --run FOLDER")
    if options.batch < 1:
        raise SamplingError(f"batch={options.batch}: 1 row at least")
    if options.stream and (options.batch > 1 or options.json):
        raise SamplingError("--stream is for one row of text: leave --batch and --json out")
    return SamplingOptions(**{field.name: getattr(options, field.name) for field in fields(SamplingOptions)})


def collect(generation: TextGeneration, rows: int, stream: bool) -> list[str]:
    """Returns all text of each row, printed as it comes where asked."""
    texts = [""] * rows
    for new in generation:
        texts = [text + more for text, more in zip(texts, new, strict=True)]
        if stream:
            print(new[0], end="", flush=True)
    return texts


def report_lines(model: TextModel, generation: TextGeneration) -> list[str]:
    """Returns what was cut, and the speed."""
    found = generation.statistics
    bpb = f", val_bpb {model.val_bpb:.4f}" if model.val_bpb else ""
    return [
        *generation.notes,
        f"{model.name}: {model.artifact_bytes:,} bytes, {model.bits_per_weight:.2f} bits per weight{bpb}",
        f"prompt: {found.prompt_tokens:,} tokens in {found.prompt_seconds:.2f} s, "
        f"{found.prompt_tokens_per_second:,.0f} tokens/s",
        f"generated: {found.generated_tokens:,} tokens in {found.generated_seconds:.2f} s, "
        f"{found.tokens_per_second:,.0f} tokens/s on {model.runtime.device}; cache {found.cache_bytes:,} bytes",
    ]


def json_report(options: Options, model: TextModel, generation: TextGeneration, texts: list[str]) -> dict[str, object]:
    found = generation.statistics
    rows = [
        {"seed": options.seed + number, "text": text, "ended": ended}
        for number, (text, ended) in enumerate(zip(texts, generation.ended, strict=True))
    ]
    speeds = {
        "prompt_tokens_per_second": found.prompt_tokens_per_second,
        "tokens_per_second": found.tokens_per_second,
    }
    described = {name: getattr(model, name) for name in ("name", "artifact_bytes", "bits_per_weight", "val_bpb")}
    return described | asdict(found) | speeds | {"notes": generation.notes, "rows": rows}


def work(options: Options) -> int:
    sampling, prompt = check_options(options), read_prompt(options.prompt)
    run_config = options.run_config()
    with start_runtime(run_config, "sample", Log(sys.stderr)) as runtime:
        model = open_text_model(options.artifact or options.run, options.tokenizer, runtime)
        generation = model.generate([prompt] * options.batch, sampling)
        if options.stream:
            print(prompt, end="", flush=True)
        texts = collect(generation, options.batch, options.stream)
    if options.json:
        print(json.dumps(json_report(options, model, generation, texts)))
        return 0
    for number, text in enumerate([] if options.stream else texts):
        heading = f"=== seed {options.seed + number}\n" if options.batch > 1 else ""
        print(f"{heading}{prompt}{text}")
    if options.stream:
        print()
    print(*report_lines(model, generation), sep="\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
