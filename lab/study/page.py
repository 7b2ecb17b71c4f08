"""A study on one HTML page that needs nothing beside it: tables, notes, and the pictures inside."""

import base64
import html
from collections.abc import Sequence

from lab.study.pictures import StudyPicture
from lab.study.render import COST_COLUMNS, LOSS_COLUMNS, CsvRow, TableColumn, shown_columns

PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; background: #fff; }
body { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #e2e8f0; text-align: right; white-space: nowrap; }
th { background: #f7fafc; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; white-space: normal; min-width: 9rem; max-width: 24rem; }
tr.broken td { color: #c53030; }
figure { margin: 1.5rem 0; } figcaption { color: #4a5568; }
img { max-width: 100%; height: auto; }
""".strip()


def html_table(rows: Sequence[CsvRow], columns: Sequence[TableColumn]) -> str:
    shown = shown_columns(rows, columns)
    kinds = [' class="text"' if column.is_text else "" for column in shown]
    head = "".join(f"<th{k}>{html.escape(c.heading)}</th>" for k, c in zip(kinds, shown, strict=True))
    lines = []
    for row in rows:
        mark = "" if row["status"] == "finished" else ' class="broken"'
        cells = "".join(f"<td{k}>{html.escape(c.cell(row))}</td>" for k, c in zip(kinds, shown, strict=True))
        lines.append(f"<tr{mark}>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def html_picture(picture: StudyPicture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def study_page(title: str, rows: Sequence[CsvRow], notes: Sequence[str], pictures: Sequence[StudyPicture]) -> str:
    """The whole page."""
    told = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        "<h2>Loss</h2>", html_table(rows, LOSS_COLUMNS),
        "<h2>Bytes, energy, time</h2>", html_table(rows, COST_COLUMNS),
        f"<ul>{told}</ul>",
        "<h2>Pictures</h2>" if pictures else "", *map(html_picture, pictures),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{PAGE_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
