"""What the demo shows: models opened side by side, their answers to one prompt, the pictures that belong to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from golf.config.config import UserError
from golf.runtime import Runtime
from lab.generate.generation import TextGeneration
from lab.generate.sampling import SamplingOptions
from lab.generate.text_model import TextModel, open_text_model

ARTIFACT_NAME = "model.golf"
"""What a run calls its artifact: the folder says which."""
RUN_PICTURES = ("rate_curve/rate_curve.png", "compare_quant/*.png")
PICTURE_SUFFIXES = (".png", ".svg", ".jpg", ".jpeg", ".webp")


class DemoError(UserError):
    """Nothing to show, or nothing to show it with."""


@dataclass(frozen=True, eq=False)
class Column:
    """One artifact; `model` is None where it could not be opened, and `problem` says why."""

    title: str
    source: str
    """The artifact as it was named."""
    model: TextModel | None
    problem: str = ""


@dataclass(frozen=True)
class Answer:
    """What one model has written so far."""

    text: str = ""
    tokens: int = 0
    tokens_per_second: float | None = None
    """Of this model alone, without reading the prompt; None before its first token."""
    prompt_bpb: float | None = None
    """Bits per byte of the prompt; None where there is no byte."""
    remarks: tuple[str, ...] = ()
    """What could not be measured, and what was cut."""
    ended: str = ""
    """Why it has: length, document, or problem; empty while it goes on."""
    problem: str = ""


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


def open_columns(paths: Sequence[Path], tokenizer: Path | None, runtime: Runtime) -> list[Column]:
    """A column for each artifact, with a message where one can't be opened. Raises DemoError where none can."""
    columns = []
    for path, title in zip(paths, column_titles(paths), strict=True):
        try:
            columns.append(Column(title, str(path), open_text_model(path, tokenizer, runtime=runtime)))
        except (UserError, OSError) as error:
            columns.append(Column(title, str(path), None, str(error)))
    if not any(column.model for column in columns):
        raise DemoError("no artifact can be opened: " + "; ".join(column.problem for column in columns))
    return columns


def column_titles(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell the artifacts apart: of the file, or of its folder where the file is a run's."""
    parts = {path: title_parts(path.absolute()) for path in paths}
    lengths, titles = dict.fromkeys(parts, 1), []
    for _ in range(max(map(len, parts.values()), default=0)):
        ends = {path: "/".join(part[-lengths[path] :]) for path, part in parts.items()}
        titles = list(ends.values())
        lengths = {path: lengths[path] + (titles.count(end) > 1) for path, end in ends.items()}
    named = dict(zip(parts, titles, strict=True))
    return [f"{named[path]} (again)" if path in paths[:number] else named[path] for number, path in enumerate(paths)]


def title_parts(path: Path) -> list[str]:
    named = path.parent if path.name == ARTIFACT_NAME and path.parent.name else path
    return [*named.parts[1:-1], named.name.removesuffix(".golf")]


def answer_together(columns: Sequence[Column], prompt: str, options: SamplingOptions) -> Iterator[list[Answer]]:
    """All answers, again after each round in which every model that has not ended writes one token.

    Every model starts from the same seed; one that fails keeps what it has written, and the others go on.
    """
    started = [begin_answer(column, prompt, options) for column in columns]
    answers = [answer for answer, _ in started]
    streams = {number: stream for number, (_, stream) in enumerate(started) if stream}
    yield list(answers)
    while streams:
        for number, stream in list(streams.items()):
            answers[number] = continue_answer(answers[number], stream)
            if answers[number].ended:
                del streams[number]
        yield list(answers)


def begin_answer(column: Column, prompt: str, options: SamplingOptions) -> tuple[Answer, TextGeneration | None]:
    """An answer without text, and what writes it where anything can."""
    if column.model is None:
        return Answer(ended="problem", problem=column.problem), None
    answer = Answer()
    try:
        answer = replace(answer, prompt_bpb=column.model.bits_per_byte(prompt) if prompt else None)
    except UserError as error:
        answer = replace(answer, remarks=(f"no bits per byte of the prompt: {error}",))
    try:
        return answer, column.model.generate([prompt], options)
    except UserError as error:
        return failed_answer(answer, error), None


def continue_answer(answer: Answer, stream: TextGeneration) -> Answer:
    try:
        [new] = next(stream)
    except UserError as error:
        return failed_answer(answer, error)
    counted = stream.statistics
    return replace(
        answer,
        text=answer.text + new,
        tokens=counted.generated_tokens,
        tokens_per_second=counted.tokens_per_second,
        remarks=tuple(dict.fromkeys([*answer.remarks, *stream.notes])),
        ended=stream.ended[0],
    )


def failed_answer(answer: Answer, error: UserError) -> Answer:
    return replace(answer, ended="problem", problem=str(error))


def departure(reference: str, text: str) -> int:
    """Characters of `text` before it departs from `reference`: all where one only goes on where the other ends."""
    for number, (expected, found) in enumerate(zip(reference, text, strict=False)):
        if expected != found:
            return number
    return len(text)


def find_pictures(artifacts: Sequence[Path], folders: Sequence[Path], repository: Path) -> list[Picture]:
    """The curves of the artifacts' runs (the project's own where no run has one), those of the records and `folders`.

    Raises DemoError for a folder that is none or holds no picture.
    """
    runs = dict.fromkeys(path if path.is_dir() else path.parent for path in map(Path.absolute, artifacts))
    found = [picture for run in runs for pattern in RUN_PICTURES for picture in sorted(run.glob(pattern))]
    if not any(path.parent.name == "rate_curve" for path in found):
        found += [path for path in [repository / "docs/rate_curve.png"] if path.is_file()]
    found += pictures_below(repository / "records")
    for folder in folders:
        pictures = pictures_below(folder)
        if not pictures:
            raise DemoError(f"{folder} holds no picture ({', '.join(PICTURE_SUFFIXES)}): name another folder")
        found += pictures
    paths = dict.fromkeys(map(Path.absolute, found))
    return [Picture(path, picture_caption(path, repository.absolute())) for path in paths]


def pictures_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURE_SUFFIXES]


def picture_caption(path: Path, repository: Path) -> str:
    """Its place in the repository, or the last three parts of its path."""
    return path.relative_to(repository).as_posix() if repository in path.parents else "/".join(path.parts[-3:])
