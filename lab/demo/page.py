"""Builds the demo's page: a card for each model, controls that all of them share, and a tab of pictures.

Its HTML is in templates/, its CSS in style.css. Gradio is imported where the page is made, by the name of its module:
the library does without it.
"""

import importlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
from markupsafe import Markup

from golf.config.knobs import UserError
from lab.demo.answers import Answer, Column, DemoError, Picture, answer_together, departure
from lab.generate.sampling import SamplingOptions

LOCALHOST = "127.0.0.1"
SECONDS_BETWEEN_UPDATES = 0.1
MOST_TOKENS, HIGHEST_TEMPERATURE, MOST_TOP_K = 1000, 2.0, 200
"""The ends of the sliders, unless the command asks for more."""
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONOSPACE = ["ui-monospace", "DejaVu Sans Mono", "Menlo", "Consolas", "monospace"]
"""Fonts that the reader's machine has: none is fetched."""
COLUMN_MARKS = ("#0f766e", "#2b6cb0", "#dd6b20", "#7c3aed", "#be123c", "#4d7c0f", "#0891b2", "#a16207")
STOP_WRITING = """() => {
  const stop = () => document.querySelectorAll('.golf-writing').forEach(card => card.classList.remove('golf-writing'));
  stop(); setTimeout(stop, 700);
}"""
"""Done again a little later: a card may have been on its way."""


def import_gradio() -> ModuleType:
    """Returns Gradio. Raises DemoError where it is not installed."""
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise DemoError(
            f"{error}: pip install -r requirements-demo.txt (or the extra, pip install '.[demo]')"
        ) from None


def choose_port(asked: int) -> int:
    """Returns `asked`, or a free port for 0. Raises DemoError for a port that is taken or does not exist."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCALHOST, asked))
        except (OSError, OverflowError) as error:
            raise DemoError(f"--port {asked} can't be had ({error}): name another, or 0 for a free one") from None
        return probe.getsockname()[1]


# ---- HTML ----


def plain(text: str) -> Markup:
    """Escapes text, together with all that a template of Gradio's would take for its own."""
    return Markup(escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;"))


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), undefined=jinja2.StrictUndefined,
    autoescape=True, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
TEMPLATES.filters["plain"] = plain


def column_card(number: int, column: Column, prompt: str, answer: Answer | None, reference: str) -> str:
    """Returns one model's card; `reference` is the first column's text, from which this one's is told apart."""
    written, mark = answer or Answer(), COLUMN_MARKS[number % len(COLUMN_MARKS)]
    common = departure(reference, written.text)
    values = {"column": column, "prompt": prompt, "answer": written, "common": common, "mark": mark}
    return TEMPLATES.get_template("card.html.j2").render(started=answer is not None, **values)


def all_cards(columns: Sequence[Column], prompt: str, answers: Sequence[Answer] | None) -> list[str]:
    pairs = list(zip(columns, answers or [None] * len(columns), strict=True))
    reference = next((answer.text for column, answer in pairs if column.model and answer), "")
    return [column_card(number, column, prompt, answer, reference) for number, (column, answer) in enumerate(pairs)]


def picture_list(pictures: Sequence[Picture]) -> str:
    return TEMPLATES.get_template("pictures.html.j2").render(pictures=pictures)


# ---- the page ----


def responder(
    gradio: ModuleType, columns: Sequence[Column], now: Callable[[], float] = time.perf_counter
) -> Callable[..., Iterator[list[str]]]:
    """Returns what answers a press of the button: it yields all cards until all models have finished."""

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


def build_page(
    gradio: ModuleType, columns: Sequence[Column], pictures: Sequence[Picture], prompt: str, options: SamplingOptions
) -> Any:
    """Returns the page as Gradio's Blocks; its controls show `prompt` and `options` at first."""
    with gradio.Blocks(title="One prompt, many models", analytics_enabled=False, fill_width=True) as page:
        opened = sum(column.model is not None for column in columns)
        gradio.HTML(TEMPLATES.get_template("head.html.j2").render(opened=opened))
        with gradio.Tabs():
            with gradio.Tab("Side by side"):
                add_answers(gradio, columns, prompt, options)
            with gradio.Tab("Pictures"):
                gradio.HTML(picture_list(pictures))
    return page


def add_answers(gradio: ModuleType, columns: Sequence[Column], text: str, options: SamplingOptions) -> None:
    """Adds the prompt, its buttons, the controls, and a card for each column."""
    with gradio.Row(equal_height=True):
        prompt = gradio.Textbox(
            text, label="Prompt", lines=3, max_lines=12, scale=5, min_width=260, elem_id="prompt"
        )  # fmt: skip
        with gradio.Column(scale=1, min_width=230, elem_id="buttons"):
            answer = gradio.Button("Answer", variant="primary", elem_id="answer")
            with gradio.Row():
                another = gradio.Button("Next seed", min_width=90, size="md", elem_id="next-seed")
                stop = gradio.Button("Stop", min_width=70, size="md", elem_id="stop")
    with gradio.Row(elem_id="controls"):
        controls = add_controls(gradio, options)
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
    """Adds length, temperature, top-k, top-p and seed, in the order in which `responder` takes them."""
    most_tokens, most_top_k = max(MOST_TOKENS, options.tokens), max(MOST_TOP_K, options.top_k)
    hottest = max(HIGHEST_TEMPERATURE, options.temperature)
    return [
        gradio.Slider(1, most_tokens, options.tokens, step=1, precision=0, label="Tokens", min_width=215),
        gradio.Slider(0, hottest, options.temperature, step=0.05, label="Temperature", min_width=215),
        gradio.Slider(0, most_top_k, options.top_k, step=1, precision=0, label="Top-k (0: all)", min_width=215),
        gradio.Slider(min(0.05, options.top_p), 1, options.top_p, step=0.01, label="Top-p (1: all)", min_width=215),
        gradio.Number(options.seed, label="Seed", precision=0, minimum=0, min_width=215),
    ]


def go_past_proxies() -> None:
    """Lets this process reach its own server itself: Gradio asks it whether it is up, by a proxy where one is set."""
    named = (os.environ.get("no_proxy", ""), os.environ.get("NO_PROXY", ""), LOCALHOST, "localhost")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, named))  # only one of them would count


def launch_page(gradio: ModuleType, page: Any, pictures: Sequence[Picture], port: int, opens: bool) -> str:
    """Serves the page to this machine alone, in threads of its own; returns its address."""
    theme = gradio.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONT, font_mono=MONOSPACE
    )  # fmt: skip
    go_past_proxies()
    _, address, _ = page.launch(
        server_name=LOCALHOST, server_port=port, share=False, inbrowser=opens, prevent_thread_lock=True, quiet=True,
        show_error=True, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False, allowed_paths=[str(picture.path) for picture in pictures], theme=theme,
        css=Path(__file__).with_name("style.css").read_text(encoding="utf-8"),
    )  # fmt: skip
    return address


def close_page(page: Any) -> None:
    """Stops serving at once: cuts readers' connections (Gradio would wait 5 seconds for them), and says nothing."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    page.server.force_exit = True
    page.close(verbose=False)
