"""Opens models side by side, answers one prompt by all of them, and finds the pictures that belong to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from golf.config.knobs import UserError
from golf.runtime import Runtime
from lab.generate.sampling import SamplingOptions
from lab.generate.text_model import TextModel, open_text_model

ARTIFACT_NAME = "model.golf"
"""The name of every run's artifact: its folder says which it is."""
RUN_PICTURES = ("rate_curve/rate_curve.png", "compare_quant/*.png")
PICTURE_SUFFIXES = (".png", ".svg", ".jpg", ".jpeg", ".webp")


class DemoError(UserError):
    """There is nothing to show, or nothing to show it with."""


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
    """Holds what one model has written so far."""

    text: str = ""
    tokens: int = 0
    tokens_per_second: float | None = None
    """Speed of this model alone, without reading the prompt; None before its first token."""
    prompt_bpb: float | None = None
    """Bits per byte of the prompt; None where there is no byte."""
    remarks: tuple[str, ...] = ()
    """Sentences on what could not be measured, and on what was cut."""
    ended: str = ""
    """Cause of the end: length, document, or problem; empty while the model writes."""
    problem: str = ""


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


def open_columns(paths: Sequence[Path], tokenizer: Path | None, runtime: Runtime) -> list[Column]:
    """Returns a column for each artifact, with a message where one can't be opened. Raises DemoError where none can."""
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
    """Returns the shortest names that tell artifacts apart: of the file, or of its folder where the file is a run's."""
    parts, titles = {path: title_parts(path.absolute()) for path in paths}, []
    for number, path in enumerate(paths):
        own, others = parts[path], [part for other, part in parts.items() if other != path]
        lengths = (n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others))
        titles.append("/".join(own[-next(lengths, len(own)) :]) + " (again)" * (path in paths[:number]))
    return titles


def title_parts(path: Path) -> list[str]:
    named = path.parent if path.name == ARTIFACT_NAME and path.parent.name else path
    return [*named.parts[1:-1], named.name.removesuffix(".golf")]


def answer_together(columns: Sequence[Column], prompt: str, options: SamplingOptions) -> Iterator[list[Answer]]:
    """Yields all answers, again after each round in which every model that has not ended writes one token.

    Every model starts from the same seed; one that fails keeps what it has written, and the others go on.
    """
    streams = [answer_alone(column, prompt, options) for column in columns]
    answers = [next(stream) for stream in streams]
    yield answers
    while not all(answer.ended for answer in answers):
        pairs = zip(answers, streams, strict=True)
        answers = [answer if answer.ended else next(stream) for answer, stream in pairs]
        yield answers


def answer_alone(column: Column, prompt: str, options: SamplingOptions) -> Iterator[Answer]:
    """Yields one model's answer before its first token and after each, until it has ended."""
    if column.model is None:
        yield Answer(ended="problem", problem=column.problem)
        return
    answer = Answer()
    try:
        answer = replace(answer, prompt_bpb=column.model.bits_per_byte(prompt) if prompt else None)
    except UserError as error:
        answer = replace(answer, remarks=(f"no bits per byte of the prompt: {error}",))
    try:
        stream = column.model.generate([prompt], options)
        yield answer
        while not answer.ended:
            [new] = next(stream)
            counted, remarks = stream.statistics, tuple(dict.fromkeys([*answer.remarks, *stream.notes]))
            answer = replace(
                answer, text=answer.text + new, tokens=counted.generated_tokens, remarks=remarks,
                tokens_per_second=counted.tokens_per_second, ended=stream.ended[0],
            )  # fmt: skip
            yield answer
    except UserError as error:
        yield replace(answer, ended="problem", problem=str(error))


def departure(reference: str, text: str) -> int:
    """Counts the characters of `text` before it departs from `reference`: all where one is the other's beginning."""
    for number, (expected, found) in enumerate(zip(reference, text, strict=False)):
        if expected != found:
            return number
    return len(text)


def find_pictures(artifacts: Sequence[Path], folders: Sequence[Path], repository: Path) -> list[Picture]:
    """Finds the curves of the artifacts' runs (else the project's own), and the pictures of the records and `folders`.

    A caption is the place in the repository, or the last three parts of the path. Raises DemoError for a folder that is
    missing or holds no picture.
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
    paths, home = dict.fromkeys(map(Path.absolute, found)), repository.absolute()
    return [
        Picture(path, path.relative_to(home).as_posix() if home in path.parents else "/".join(path.parts[-3:]))
        for path in paths
    ]


def pictures_below(folder: Path) -> list[Path]:
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURE_SUFFIXES]
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
