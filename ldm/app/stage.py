"""The large pictures of the page, as HTML: what is being drawn, and what has been."""

import base64
import io
from collections.abc import Sequence
from html import escape
from math import ceil, sqrt
from pathlib import Path

from torch import Tensor

from ldm.image import to_pil

CSS = """
#stage, #stage .html-container { padding: 0; }
#gallery .grid-wrap { min-height: 0; max-height: 40vh; }
.stage { border-radius: 12px; overflow: hidden; background: var(--background-fill-secondary);
         border: 1px solid var(--border-color-primary); }
.stage .pictures { display: grid; gap: 4px; aspect-ratio: 1; max-height: 72vh; width: 100%; }
.stage .pictures > * { width: 100%; height: 100%; min-height: 0; object-fit: contain; }
.stage .invitation { display: grid; place-content: center; text-align: center; gap: 6px; padding: 24px;
                     color: var(--body-text-color-subdued); }
.stage .invitation b { font-size: 1.25rem; color: var(--body-text-color); }
.stage .bar { height: 4px; background: var(--border-color-primary); }
.stage .bar div { height: 100%; background: var(--color-accent); transition: width .2s; }
.stage .told { padding: 8px 14px; color: var(--body-text-color-subdued); }
"""


def invitation(title: str, text: str) -> str:
    return _stage(f'<div class="pictures"><div class="invitation"><b>{escape(title)}</b>{escape(text)}</div></div>')


def drawing(estimates: Sequence[Tensor | None], done: int, total: int) -> str:
    """The estimates, uint8 (3, h, w), and how far they have come."""
    cells = []
    for one in estimates:
        file = io.BytesIO()
        if one is not None:
            to_pil(one)[0].save(file, "PNG")
        cells.append(_image(file.getvalue(), "being drawn") if one is not None else "<div></div>")
    bar = f'<div class="bar"><div style="width: {100 * done / total:.0f}%"></div></div>'
    return _stage(f'<div class="drawing">{_grid(cells)}</div>{bar}{_told(f"step {done} of {total}")}')


def drawn(paths: Sequence[Path], text: str) -> str:
    """The files themselves, so that a picture that is dragged or saved from here keeps its settings."""
    return _stage(_grid([_image(path.read_bytes(), text) for path in paths]) + _told(text))


def _stage(inner: str) -> str:
    return f'<div class="stage">{inner}</div>'


def _grid(cells: Sequence[str]) -> str:
    columns = ceil(sqrt(len(cells)))
    return f'<div class="pictures" style="grid-template-columns: repeat({columns}, 1fr)">{"".join(cells)}</div>'


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _told(text: str) -> str:
    return f'<div class="told">{escape(text)}</div>'
