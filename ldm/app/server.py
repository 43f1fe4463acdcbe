"""Serves the page without requests to any other server."""

import gradio as gr
from PIL import Image

from ldm.app.page import CSS, Page
from ldm.app.service import Service

MAX_UPLOAD_BYTES = 32 * 2**20
MAX_PIXELS = 4096**2  # of an upload, checked before it is decoded
MAX_QUEUE = 20
FONT = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]  # fonts installed in the user's system
MONO = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]


def serve(service: Service, host: str, port: int) -> gr.Blocks:
    """Starts threads that serve the page until the result is closed. Raises OSError if the port is in use."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Gradio decodes uploads; Pillow raises above twice this, process-wide
    blocks = Page(service).blocks
    blocks.queue(max_size=MAX_QUEUE, default_concurrency_limit=1, api_open=False)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=MAX_UPLOAD_BYTES,
            allowed_paths=[str(service.out)],
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            css=CSS,
            theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONO),
        )
    except OSError as error:
        raise OSError(f"cannot serve on {host} port {port}, which is probably in use; give another --port") from error
    return blocks
