"""The demo's page: a card for each model, controls that all of them share, and a tab of pictures.

Gradio is imported where the page is made, by the name of its module: the library does without it.
"""

import importlib
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from types import ModuleType
from typing import Any
from urllib.parse import quote

from golf.config.config import UserError
from lab.demo.answers import Answer, Column, DemoError, Picture, answer_together, departure
from lab.demo.style import COLUMN_MARKS, DEMO_STYLE
from lab.generate.sampling import SamplingOptions

LOCALHOST = "127.0.0.1"
SECONDS_BETWEEN_UPDATES = 0.1
MOST_TOKENS, HIGHEST_TEMPERATURE, MOST_TOP_K = 1000, 2.0, 200
"""Of the sliders, unless the command asks for more."""
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONOSPACE = ["ui-monospace", "DejaVu Sans Mono", "Menlo", "Consolas", "monospace"]
"""Fonts that the reader's machine has: none is fetched."""
NOT_KNOWN = "&ndash;"
ENDS = {"document": '<span class="golf-end" title="the model ended its document here">end</span>'}
"""What follows a text that ended before its length."""
STOP_WRITING = """() => {
  const stop = () => document.querySelectorAll('.golf-writing').forEach(card => card.classList.remove('golf-writing'));
  stop(); setTimeout(stop, 700);
}"""
"""Done again a little later: a card may have been on its way."""


@dataclass(frozen=True)
class Defaults:
    """What the controls show at first."""

    prompt: str
    options: SamplingOptions


def import_gradio() -> ModuleType:
    """Gradio. Raises DemoError where it is not installed."""
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise DemoError(
            f"{error}: pip install -r requirements-demo.txt (or the extra, pip install '.[demo]')"
        ) from None


def choose_port(asked: int) -> int:
    """`asked`, or a free port for 0. Raises DemoError for one that can't be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCALHOST, asked))
        except (OSError, OverflowError) as error:
            raise DemoError(f"--port {asked} can't be had ({error}): name another, or 0 for a free one") from None
        return probe.getsockname()[1]


# ---- cards ----


def plain(text: str) -> str:
    """Text as HTML that shows it, with nothing in it that a template of the page would take for its own."""
    return escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


def column_card(number: int, column: Column, prompt: str, answer: Answer | None, reference: str) -> str:
    """One model's card; `reference` is the first column's text, from which this one's is told apart."""
    writing = " golf-writing" if answer and not answer.ended else ""
    return (
        f'<article class="golf-card{writing}" style="--mark: {COLUMN_MARKS[number % len(COLUMN_MARKS)]}">'
        f"<header><h2>{plain(column.title)}</h2><p>{plain(column.source)}</p></header>"
        f"{card_text(column, prompt, answer, reference)}{card_figures(column, answer)}</article>"
    )


def card_text(column: Column, prompt: str, answer: Answer | None, reference: str) -> str:
    problem = answer.problem if answer else column.problem
    message = f'<p class="golf-problem" role="alert">{plain(problem)}</p>' if problem else ""
    if column.model is None:
        return message
    if answer is None:
        return '<div class="golf-text"><div class="golf-idle">Nothing written yet.</div></div>'
    common = departure(reference, answer.text)
    departed = f'<span class="golf-departed">{plain(answer.text[common:])}</span>' if common < len(answer.text) else ""
    notes = "".join(f'<p class="golf-note">{plain(remark)}</p>' for remark in answer.remarks)
    return (
        f'<div class="golf-text"><div><span class="golf-prompt">{plain(prompt)}</span>'
        f'<span class="golf-new">{plain(answer.text[:common])}{departed}</span>'
        f"{ENDS.get(answer.ended, '')}</div></div>{message}{notes}"
    )


def card_figures(column: Column, answer: Answer | None) -> str:
    """What is known of the model and of its answer; a dash where a figure is not."""
    if column.model is None:
        return ""
    model, answer = column.model, answer or Answer()
    figures = (
        ("bytes", model.artifact_bytes, "{:,}", "of the artifact"),
        ("bits per weight", model.bits_per_weight, "{:.3f}", "8 x bytes of the artifact / weights"),
        ("val_bpb", model.val_bpb, "{:.4f}", "bits per byte of the validation text, where the run knows it"),
        ("bits per byte of the prompt", answer.prompt_bpb, "{:.3f}", "by this model"),
        ("tokens/s", answer.tokens_per_second, "{:,.0f}", "written, in this model's own time"),
    )
    cells = (
        f'<div title="{meaning}"><dt>{name}</dt><dd>{NOT_KNOWN if value is None else form.format(value)}</dd></div>'
        for name, value, form, meaning in figures
    )
    return f'<dl class="golf-figures">{"".join(cells)}</dl>'


def all_cards(columns: Sequence[Column], prompt: str, answers: Sequence[Answer] | None) -> list[str]:
    if answers is None:
        return [column_card(number, column, "", None, "") for number, column in enumerate(columns)]
    reference = next(answer.text for column, answer in zip(columns, answers, strict=True) if column.model)
    return [
        column_card(number, column, prompt, answer, reference)
        for number, (column, answer) in enumerate(zip(columns, answers, strict=True))
    ]


def picture_list(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return '<p class="golf-idle">No pictures: tools/rate_curve.py and tools/compare_quant.py make some.</p>'
    figures = []
    for picture in pictures:
        address, caption = f"gradio_api/file={quote(str(picture.path))}", plain(picture.caption)
        figures.append(
            f'<figure><a href="{address}" target="_blank"><img src="{address}" alt="{caption}"></a>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="golf-pictures">{"".join(figures)}</div>'


# ---- the page ----


def page_head(columns: Sequence[Column]) -> str:
    opened = sum(column.model is not None for column in columns)
    models = "one model" if opened == 1 else f"{opened} models"
    lead = "Every model is rebuilt from the bytes of its artifact and answers with the same seed and settings."
    if opened > 1:
        lead += " A text is marked from where it departs from the first one."
    return f'<div class="golf-head"><p>Parameter golf</p><h1>One prompt, {models}</h1><p>{lead}</p></div>'


def responder(
    gradio: ModuleType, columns: Sequence[Column], now: Callable[[], float] = time.perf_counter
) -> Callable[..., Iterator[list[str]]]:
    """What answers a press of the button: the cards, again and again until all models have finished."""

    def respond(
        prompt: str, tokens: float, temperature: float, top_k: float, top_p: float, seed: float
    ) -> Iterator[list[str]]:
        try:  # an emptied field is None
            options = SamplingOptions(
                tokens=int(tokens or 0), temperature=math.nan if temperature is None else temperature,
                top_k=int(top_k or 0), top_p=top_p or 0.0, seed=int(seed or 0),
            )  # fmt: skip
            last, answers = float("-inf"), None
            for answers in answer_together(columns, prompt or "", options):
                if now() - last >= SECONDS_BETWEEN_UPDATES:
                    last = now()
                    yield all_cards(columns, prompt or "", answers)
            yield all_cards(columns, prompt or "", answers)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return respond


def build_page(gradio: ModuleType, columns: Sequence[Column], pictures: Sequence[Picture], defaults: Defaults) -> Any:
    """The page as Gradio's Blocks."""
    with gradio.Blocks(title="One prompt, many models", analytics_enabled=False, fill_width=True) as page:
        gradio.HTML(page_head(columns))
        with gradio.Tabs():
            with gradio.Tab("Side by side"):
                add_answers(gradio, columns, defaults)
            with gradio.Tab("Pictures"):
                gradio.HTML(picture_list(pictures))
    return page


def add_answers(gradio: ModuleType, columns: Sequence[Column], defaults: Defaults) -> None:
    """The prompt, its buttons, the controls, and a card for each column."""
    with gradio.Row(equal_height=True):
        prompt = gradio.Textbox(
            defaults.prompt, label="Prompt", lines=3, max_lines=12, scale=5, min_width=260, elem_id="prompt"
        )
        with gradio.Column(scale=1, min_width=230, elem_id="buttons"):
            answer = gradio.Button("Answer", variant="primary", elem_id="answer")
            with gradio.Row():
                another = gradio.Button("Next seed", min_width=90, size="md", elem_id="next-seed")
                stop = gradio.Button("Stop", min_width=70, size="md", elem_id="stop")
    with gradio.Row(elem_id="controls"):
        controls = add_controls(gradio, defaults.options)
    cards = []
    with gradio.Row(equal_height=True, elem_id="columns"):
        for number, card in enumerate(all_cards(columns, "", None)):
            with gradio.Column(min_width=300):
                cards.append(gradio.HTML(card, elem_id=f"column-{number}", elem_classes="golf-column"))
    how = dict(
        fn=responder(gradio, columns), inputs=[prompt, *controls], outputs=cards, show_progress="hidden",
        concurrency_limit=1, concurrency_id="models",
    )  # fmt: skip
    pressed, entered = answer.click(**how, api_name="answer"), prompt.submit(**how, api_visibility="private")
    seed = controls[-1]
    moved = another.click(lambda value: int(value or 0) + 1, seed, seed, queue=False, api_visibility="private")
    moved = moved.then(**how, api_visibility="private")
    stop.click(None, cancels=[pressed, entered, moved], js=STOP_WRITING)


def add_controls(gradio: ModuleType, options: SamplingOptions) -> list[Any]:
    """Length, temperature, top-k, top-p and seed, in the order in which `responder` takes them."""
    most_tokens, most_top_k = max(MOST_TOKENS, options.tokens), max(MOST_TOP_K, options.top_k)
    hottest = max(HIGHEST_TEMPERATURE, options.temperature)
    return [
        gradio.Slider(1, most_tokens, options.tokens, step=1, precision=0, label="Tokens", min_width=215),
        gradio.Slider(0, hottest, options.temperature, step=0.05, label="Temperature", min_width=215),
        gradio.Slider(0, most_top_k, options.top_k, step=1, precision=0, label="Top-k (0: all)", min_width=215),
        gradio.Slider(min(0.05, options.top_p), 1, options.top_p, step=0.01, label="Top-p (1: all)", min_width=215),
        gradio.Number(options.seed, label="Seed", precision=0, minimum=0, min_width=215),
    ]


def page_theme(gradio: ModuleType) -> Any:
    """Gradio's plainest theme in the project's colours, with fonts of the reader's machine."""
    return gradio.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONT, font_mono=MONOSPACE
    )  # fmt: skip


def launch_page(gradio: ModuleType, page: Any, pictures: Sequence[Picture], port: int, opens: bool) -> str:
    """Serve the page to this machine alone, in threads of its own; returns its address."""
    _, address, _ = page.launch(
        server_name=LOCALHOST, server_port=port, share=False, inbrowser=opens, prevent_thread_lock=True, quiet=True,
        show_error=True, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False, allowed_paths=[str(picture.path) for picture in pictures], theme=page_theme(gradio),
        css=DEMO_STYLE,
    )  # fmt: skip
    return address


def close_page(page: Any) -> None:
    """Stop serving at once: readers' connections are cut (Gradio would wait 5 seconds for them), and nobody is told."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    page.server.force_exit = True
    page.close(verbose=False)
