"""A self-contained HTML page: sections, tables, figures with captions; nothing is fetched when it is opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt

from llava_compete.files import write_bytes, write_text
from llava_compete.report.heat_maps import as_data_url, render

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 2px solid #0072b2; } h3 { margin-top: 1.8rem; }
nav a { margin-right: 1rem; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #c8c8c8; padding: .2rem .5rem; text-align: right; vertical-align: top; }
th { background: #f1f4f7; } td:first-child, th:first-child { text-align: left; }
td.text { text-align: left; white-space: pre-wrap; max-width: 30rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, p.note { color: #444; font-size: .88rem; max-width: 60rem; }
.scroll { overflow-x: auto; } table.tokens td, table.tokens th { font-size: .75rem; text-align: center; }
table.tokens th { white-space: pre; } .answer { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.answer > img { width: 12rem; max-width: 100%; image-rendering: pixelated; border: 1px solid #c8c8c8; }
.crops img { height: 2.4rem; image-rendering: pixelated; margin: 1px; }
"""


@dataclass
class Page:
    """HTML in the making; figures are also written as files beside it."""

    title: str
    directory: Path
    _body: list[str] = field(default_factory=list)
    _headings: list[tuple[str, str]] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def heading(self, text: str) -> None:
        anchor = f"s{len(self._headings)}"
        self._headings.append((anchor, text))
        self._body.append(f'<h2 id="{anchor}">{escape(text)}</h2>')

    def subheading(self, text: str) -> None:
        self._body.append(f"<h3>{escape(text)}</h3>")

    def note(self, text: str) -> None:
        self._body.append(f'<p class="note">{escape(text)}</p>')

    def html(self, content: str) -> None:
        """Content that is HTML already."""
        self._body.append(content)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self._body.append(f'<div class="scroll">{table_html(header, rows)}</div>')

    def figure(self, figure: plt.Figure, name: str, caption: str) -> None:
        """Embed a figure and write it as figures/NAME.png and .svg.

        caption: what it shows, on what, with n.
        """
        name = self._free_name(name)
        png = render(figure, "png")
        folder = self.directory / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"{name}.png", png)
        write_bytes(folder / f"{name}.svg", render(figure, "svg"))
        plt.close(figure)
        image = f'<img alt="{escape(caption)}" src="{as_data_url(png)}">'
        self._body.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")

    def write(self) -> Path:
        links = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in self._headings)
        path = self.directory / "report.html"
        write_text(
            path,
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body><h1>{escape(self.title)}</h1><nav>{links}</nav>\n" + "\n".join(self._body) + "\n</body></html>\n",
        )
        return path

    def _free_name(self, name: str) -> str:
        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
        free, number = name, 1
        while free in self._names:
            number += 1
            free = f"{name}-{number}"
        self._names.add(free)
        return free


def table_html(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{lines}</table>"
