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


@dataclass(frozen=True)
class Heading:
    """What stands over the tables and pictures that follow."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG beside the page, and what is said of it."""

    file: Path
    caption: str = ""


Block = Table | Heading | Picture


def one_line(text: str) -> str:
    """The text without line ends, and without halves of characters, which nobody can write or draw."""
    return BLANK.sub(" ", text.encode(errors="replace").decode()).strip()


def in_markdown(text: str) -> str:
    return LONE_UNDERSCORE.sub(r"\\_", one_line(text).translate(IN_MARKDOWN))


def in_html(text: str) -> str:
    return html.escape(one_line(text)).replace("+-", "&plusmn;")


def in_latex(text: str) -> str:
    return one_line(text).translate(IN_LATEX).replace("+-", r"$\pm$")


def markdown(blocks: Sequence[Block], notes: Sequence[str], pictures: Sequence[Path] = ()) -> str:
    parts = [_in_markdown(block) for block in blocks]
    parts += ["\n".join(f"- {in_markdown(note)}" for note in notes)] if notes else []
    return "\n\n".join([*parts, *(_in_markdown(Picture(file)) for file in pictures)])


def _in_markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {in_markdown(block.text)}"
    if isinstance(block, Picture):
        shown = f"![{in_markdown(block.file.stem)}]({quote(block.file.name)})"
        return f"{shown}\n\n{in_markdown(block.caption)}" if block.caption else shown
    rule = ["---"] * block.words + ["---:"] * (len(block.head) - block.words)
    cells = [[*map(in_markdown, line)] for line in (block.head, *block.rows)]
    lines = [f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:])]
    return "\n".join([in_markdown(block.caption), "", *lines])


def as_html(blocks: Sequence[Block], notes: Sequence[str], pictures: Sequence[Path] = ()) -> str:
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:.2em .8em;border-bottom:1px solid #ccc}"
    style += "td.n,th.n{text-align:right}td.n{white-space:nowrap}td,th{vertical-align:top;min-width:4em}"
    style += "img{max-width:100%}div{overflow-x:auto}"
    style += "@media(max-width:40em){body{margin:.8em}}"
    parts = ["<!DOCTYPE html>", *HEAD, f"<style>{style}</style>", *map(_in_html, blocks)]
    parts += ["<ul>", *(f"<li>{in_html(note)}</li>" for note in notes), "</ul>"] if notes else []
    return "\n".join([*parts, *(_in_html(Picture(file)) for file in pictures)])


def _in_html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{in_html(block.text)}</h2>"
    if isinstance(block, Picture):  # inside the page, so that it can be sent as one file
        data = base64.b64encode(block.file.read_bytes()).decode()
        said = f"<br>{in_html(block.caption)}" if block.caption else ""
        return f'<p><img src="data:image/png;base64,{data}" alt="{in_html(block.file.stem)}">{said}</p>'
    lines = [_html_row(line, "td" if i else "th", block.words) for i, line in enumerate([block.head, *block.rows])]
    # a caption inside the table would be as wide as the table, and be cut off on a narrow screen
    return "\n".join([f"<p>{in_html(block.caption)}</p>", "<div><table>", *lines, "</table></div>"])


def _html_row(line: Sequence[str], tag: str, words: int) -> str:
    kinds = ["" if column < words else ' class="n"' for column in range(len(line))]
    return "<tr>" + "".join(f"<{tag}{kind}>{in_html(cell)}</{tag}>" for kind, cell in zip(kinds, line)) + "</tr>"


def as_csv(blocks: Sequence[Block], notes: Sequence[str], pictures: Sequence[Path] = ()) -> str:
    """Each table under its caption, with an empty line between; notes last. Pictures are files beside it."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    for table in (block for block in blocks if isinstance(block, Table)):
        for line in ([table.caption], table.head, *table.rows, []):
            write.writerow(map(in_csv, line))
    write.writerows([in_csv(note)] for note in notes)
    return out.getvalue().rstrip("\n")


def in_csv(text: str) -> str:
    """One line that no spreadsheet takes for a formula."""
    text = one_line(text)
    return f"'{text}" if FORMULA.match(text) else text


def latex(blocks: Sequence[Block], notes: Sequence[str], pictures: Sequence[Path] = ()) -> str:
    """To be \\input into a document that loads graphicx."""
    parts = [_in_latex(block) for block in blocks]
    parts += ["\n\n".join(map(in_latex, notes))] if notes else []
    return "\n\n".join([*parts, *(_in_latex(Picture(file)) for file in pictures)])


def _in_latex(block: Block) -> str:
    if isinstance(block, Heading):
        return rf"\section*{{{in_latex(block.text)}}}"
    if isinstance(block, Picture):
        shown = rf"\includegraphics[width=\linewidth]{{\detokenize{{{block.file.name}}}}}"
        return f"{shown}\n\n{in_latex(block.caption)}" if block.caption else shown
    lines = [" & ".join(map(in_latex, line)) + r" \\" for line in (block.head, *block.rows)]
    columns = "l" * block.words + "r" * (len(block.head) - block.words)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
    caption = rf"\caption{{{in_latex(block.caption)}}}"
    return "\n".join([r"\begin{table}", caption, *body, r"\end{tabular}", r"\end{table}"])


PAGES: dict[str, Callable[[Sequence[Block], Sequence[str], Sequence[Path]], str]] = {
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
