"""Serves the page: to this machine alone unless told otherwise, and asking nobody else for anything."""

import gradio as gr
from PIL import Image

from ldm.app.page import CSS, Page
from ldm.app.service import Service

MOST_BYTES = 32 * 2**20  # of an upload
MOST_PIXELS = 4096**2  # of a picture, before it is decoded
MOST_WAITING = 20
FONT = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]  # those of the reader's machine
MONO = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]


def serve(service: Service, host: str, port: int) -> gr.Blocks:
    """Starts threads that serve the page until the result is closed. Raises OSError for a port that is taken."""
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Gradio opens uploads itself; Pillow refuses twice this, everywhere
    blocks = Page(service).blocks
    blocks.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=MOST_BYTES,
            allowed_paths=[str(service.out)],
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            css=CSS,
            theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONO),
        )
    except OSError as error:
        raise OSError(
            f"{host} port {port} cannot be served, most likely as it is taken; give another --port"
        ) from error
    return blocks
