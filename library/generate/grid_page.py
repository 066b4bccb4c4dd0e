"""Contact sheets as one page for a browser: small pictures in it, each with a link to the whole one beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from library.generate.contact_sheet import thumbnail
from library.generate.grid import Block, Row
from library.wording import counted

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.4 system-ui, sans-serif; margin: 1rem; }
h1 { font-size: 1.2rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 0; overflow-wrap: anywhere; }
p { margin: .2rem 0 .6rem; opacity: .7; font-size: .85rem; overflow-wrap: anywhere; }
div { overflow-x: auto; }
table { border-collapse: separate; border-spacing: .4rem; }
th { font-weight: 500; font-size: .8rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
thead th { vertical-align: bottom; }
tbody th { position: sticky; left: 0; background: Canvas; padding-right: .4rem; max-width: 9rem; min-width: 4rem; }
td { padding: 0; vertical-align: top; }
img { display: block; width: clamp(7rem, 30vw, 16rem); height: auto; border-radius: 4px; }
"""


def grid_page(blocks: Sequence[Block], folder: Path) -> str:
    """An HTML page to lie in `folder`, beside the pictures that it links to; it needs nothing else."""
    pictures = {path for block in blocks for row in block.rows for path in row.pictures if path is not None}
    body = "\n".join(_block(block, folder) for block in blocks)
    title = html.escape(folder.resolve().name)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}: {counted(len(pictures), 'picture')}</h1>\n{body}\n"
        "</body>\n</html>\n"
    )


def _block(block: Block, folder: Path) -> str:
    has_labels = any(row.label for row in block.rows)
    names = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in block.columns)
    head = f"<thead><tr>{'<td></td>' if has_labels else ''}{names}</tr></thead>"
    rows = "\n".join(_row(row, block, folder, has_labels=has_labels) for row in block.rows)
    return (
        f"<h2>{html.escape(block.title)}</h2>\n<p>{html.escape(block.subtitle)}</p>\n"
        f"<div><table>{head}\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(row: Row, block: Block, folder: Path, *, has_labels: bool) -> str:
    label = html.escape(row.label).replace("\n", "<br>")
    head = f'<th scope="row">{label}</th>' if has_labels else ""
    cells = zip(row.pictures, block.columns, strict=True)
    return f"<tr>{head}{''.join(_cell(path, f'{name} {row.label}', folder) for path, name in cells)}</tr>"


def _cell(path: Path | None, name: str, folder: Path) -> str:
    if path is None:
        return "<td></td>"
    with Image.open(path) as image:
        small = thumbnail(image)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=88)
    source = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    alternative = html.escape(" ".join(name.split()))
    size = f'width="{small.width}" height="{small.height}"'
    link = quote(str(path.relative_to(folder)))
    return f'<td><a href="{link}"><img src="{source}" {size} alt="{alternative}" loading="lazy"></a></td>'
