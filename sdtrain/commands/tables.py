"""Tables, pictures and notes as a page of Markdown, HTML, LaTeX or CSV. Names come from files: all text is escaped."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

# line ends, what steers a terminal, what turns the direction of writing
BLANK = re.compile(r"[\x00-\x20\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")
IN_MARKDOWN = str.maketrans(
    {c: f"\\{c}" for c in "\\*[]~$#!"} | {"|": "&#124;", "`": "&#96;", "<": "&lt;", ">": "&gt;", "&": "&amp;"}
)
HEAD = (
    '<meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    "<title>sdtrain report</title>",
)
FORMULA = re.compile(r"[=+@]|-(?!$|[\d.])")
LONE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside a word it is no emphasis
IN_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "{}$&#_%"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}"}
)


@dataclass(frozen=True)
class Table:
    """Plain text; the first `words` columns are words, the others numbers."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    words: int = 1


def one_line(text: str) -> str:
    """The text without line ends, and without halves of characters, which nobody can write or draw."""
    return BLANK.sub(" ", text.encode(errors="replace").decode()).strip()


def in_markdown(text: str) -> str:
    return LONE_UNDERSCORE.sub(r"\\_", one_line(text).translate(IN_MARKDOWN))


def in_html(text: str) -> str:
    return html.escape(one_line(text)).replace("+-", "&plusmn;")


def in_latex(text: str) -> str:
    return one_line(text).translate(IN_LATEX).replace("+-", r"$\pm$")


def markdown(tables: Sequence[Table], notes: Sequence[str], pictures: Sequence[Path] = ()) -> str:
    parts = []
    for table in tables:
        rule = ["---"] * table.words + ["---:"] * (len(table.head) - table.words)
        cells = [[*map(in_markdown, line)] for line in (table.head, *table.rows)]
        lines = [f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:])]
        parts.append("\n".join([in_markdown(table.caption), "", *lines]))
    parts += ["\n".join(f"- {in_markdown(note)}" for note in notes)] if notes else []
    parts += [f"![{in_markdown(file.stem)}]({quote(file.name)})" for file in pictures]
    return "\n\n".join(parts)


def as_html(tables: Sequence[Table], notes: Sequence[str], pictures: Sequence[Path] = ()) -> str:
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:.2em .8em;border-bottom:1px solid #ccc}"
    style += "td.n,th.n{text-align:right}caption{text-align:left}img{max-width:100%}div{overflow-x:auto}"
    parts = ["<!DOCTYPE html>", *HEAD, f"<style>{style}</style>"]
    for table in tables:
        parts += ["<div><table>", f"<caption>{in_html(table.caption)}</caption>"]
        parts += [_html_row(line, "td" if i else "th", table.words) for i, line in enumerate([table.head, *table.rows])]
        parts.append("</table></div>")
    parts += ["<ul>", *(f"<li>{in_html(note)}</li>" for note in notes), "</ul>"] if notes else []
    for file in pictures:  # inside the page, so that it can be sent as one file
        data = base64.b64encode(file.read_bytes()).decode()
        parts.append(f'<p><img src="data:image/png;base64,{data}" alt="{in_html(file.stem)}"></p>')
    return "\n".join(parts)


def _html_row(line: Sequence[str], tag: str, words: int) -> str:
    kinds = ["" if column < words else ' class="n"' for column in range(len(line))]
    return "<tr>" + "".join(f"<{tag}{kind}>{in_html(cell)}</{tag}>" for kind, cell in zip(kinds, line)) + "</tr>"


def as_csv(tables: Sequence[Table], notes: Sequence[str], pictures: Sequence[Path] = ()) -> str:
    """Each table under its caption, with an empty line between; notes last. Pictures are files beside it."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    for table in tables:
        for line in ([table.caption], table.head, *table.rows, []):
            write.writerow(map(in_csv, line))
    write.writerows([in_csv(note)] for note in notes)
    return out.getvalue().rstrip("\n")


def in_csv(text: str) -> str:
    """One line that no spreadsheet takes for a formula."""
    text = one_line(text)
    return f"'{text}" if FORMULA.match(text) else text


def latex(tables: Sequence[Table], notes: Sequence[str], pictures: Sequence[Path] = ()) -> str:
    """To be \\input into a document that loads graphicx."""
    parts = []
    for table in tables:
        lines = [" & ".join(map(in_latex, line)) + r" \\" for line in (table.head, *table.rows)]
        columns = "l" * table.words + "r" * (len(table.head) - table.words)
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
        caption = rf"\caption{{{in_latex(table.caption)}}}"
        parts.append("\n".join([r"\begin{table}", caption, *body, r"\end{tabular}", r"\end{table}"]))
    parts += ["\n\n".join(map(in_latex, notes))] if notes else []
    parts += [rf"\includegraphics[width=\linewidth]{{\detokenize{{{file.name}}}}}" for file in pictures]
    return "\n\n".join(parts)


PAGES: dict[str, Callable[[Sequence[Table], Sequence[str], Sequence[Path]], str]] = {
    ".md": markdown,
    ".html": as_html,
    ".tex": latex,
    ".csv": as_csv,
}


def shortened(names: Sequence[str], limit: int) -> dict[str, str]:
    """Each name in at most `limit` characters; numbered where short ones would be equal."""
    found: dict[str, str] = {}
    for name in names:
        text = one_line(name)
        text = text if len(text) <= limit else f"{text[: limit // 2 - 2]}...{text[2 - limit // 2 :]}"
        if text in found.values():
            text = f"{text[: limit - 6]} #{len(found) + 1}"
        found[name] = text
    return found
