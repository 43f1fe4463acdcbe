"""Runs img2dataset with a download function that bounds time and size: img2dataset_driver.py SETTINGS.json

The function of img2dataset opens file: URLs, reads bodies of any size, and never times out on a slow trickle of bytes.
The Python of img2dataset's environment runs this file, so it does not import ldm.
"""

import io
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

CHUNK = 1 << 16
AGENT = "Mozilla/5.0 (X11; Ubuntu; Linux x86_64; rv:72.0) Gecko/20100101 Firefox/72.0 (compatible; img2dataset)"


def fetch(url: str, timeout: float, deadline: float, max_bytes: int) -> tuple[bytes, Any]:
    """Returns body and headers of an http or https URL.

    `timeout` bounds each wait and `deadline` the entire request, in seconds. Raises OSError or ValueError unless the
    response is a complete body of at most `max_bytes`.
    """
    start = time.monotonic()
    with _opener().open(urllib.request.Request(url, headers={"User-Agent": AGENT}), timeout=timeout) as response:
        body, expected = bytearray(), response.length
        while (expected is None or len(body) < expected) and (block := response.read1(CHUNK)):
            body += block
            if len(body) > max_bytes:
                raise ValueError("larger than the limit")
            if time.monotonic() - start > deadline:
                raise TimeoutError("slower than the deadline")
        if expected is not None and len(body) < expected:
            raise ValueError("shorter than its Content-Length")
        if not body:
            raise ValueError("empty")
        return bytes(body[:expected]), response.headers


def _opener() -> urllib.request.OpenerDirector:
    """Returns an opener for http and https only, without the handlers of urllib for file:, ftp: and data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPRedirectHandler,
    ):
        opener.add_handler(handler())
    return opener


def install(limits: dict[str, Any]) -> None:
    """Replaces the download function of img2dataset by `fetch`, also in its spawned workers, which run this file."""
    import img2dataset.downloader

    def download_image(
        row: tuple[int, str], timeout: float, user_agent_token: str | None, disallowed: Any
    ) -> tuple[int, io.BytesIO | None, str | None]:
        key, url = row
        try:
            body, headers = fetch(url, timeout, limits["deadline"], limits["max_bytes"])
        except Exception as error:  # every failure is counted by its message
            return key, None, str(error) or type(error).__name__
        if disallowed and img2dataset.downloader.is_disallowed(headers, user_agent_token, disallowed):
            return key, None, "Use of image disallowed by X-Robots-Tag directive"
        return key, io.BytesIO(body), None

    img2dataset.downloader.download_image = download_image


def end_with_parent() -> None:
    """Kills this process group once stdin closes, so that the download does not outlive the command that started it."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


if __name__ in ("__main__", "__mp_main__"):
    SETTINGS = json.loads(Path(sys.argv[1]).read_text())
    install(SETTINGS["limits"])

if __name__ == "__main__":
    import img2dataset

    threading.Thread(target=end_with_parent, daemon=True).start()
    img2dataset.download(**SETTINGS["download"])
