"""Runs img2dataset with bounded downloads and upright images: img2dataset_driver.py SETTINGS.json

The download function of img2dataset opens file: URLs, reads bodies of any size, never times out on a slow trickle of
bytes, and fails on URLs with spaces or letters beyond ASCII. Its resizer ignores the orientation in EXIF and drops it.
The Python of img2dataset's environment runs this file, so it does not import ldm.
"""

import importlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
import unicodedata
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

CHUNK = 1 << 16
AGENT = "Mozilla/5.0 (X11; Ubuntu; Linux x86_64; rv:72.0) Gecko/20100101 Firefox/72.0 (compatible; img2dataset)"
ENVIRONMENT = ("NO_ALBUMENTATIONS_UPDATE", "WANDB_MODE", "OPENCV_IO_MAX_IMAGE_PIXELS")  # needed by workers too
# The characters in a URL's path and query that need no escaping, and % for existing escapes (RFC 3986).
UNESCAPED = "%/?:@!$&'()*+,;=~[]|"


def fetch(url: str, timeout: float, deadline: float, max_bytes: int) -> tuple[bytes, Any]:
    """Returns the body and the headers of an http or https URL.

    `timeout` bounds each wait and `deadline` the entire request, in seconds. Raises OSError or ValueError unless the
    response is a complete body of at most `max_bytes`.
    """
    start = time.monotonic()
    request = urllib.request.Request(in_ascii(url), headers={"User-Agent": AGENT})
    with _opener().open(request, timeout=timeout) as response:
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


def in_ascii(url: str) -> str:
    """Returns the URL in ASCII, escaped as browsers do; existing escapes are kept."""
    parts = urlsplit(url.strip())
    user, at, address = parts.netloc.rpartition("@")
    host, colon, port = address.partition(":") if not address.startswith("[") else (address, "", "")
    path, query = (quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", part), UNESCAPED) for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, quote(user, "%:") + at + _host_in_ascii(host) + colon + port, path, query, ""))


def _host_in_ascii(host: str) -> str:
    """Returns the host with non-ASCII labels in Punycode (RFC 3492)."""
    if host.isascii():
        return host
    labels = unicodedata.normalize("NFKC", host).lower().replace("。", ".").split(".")
    return ".".join(label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in labels)


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
    """Replaces the download function of img2dataset with `fetch` in this process."""
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


class BoundedDownloader:
    """Wraps img2dataset's downloader and installs the limits where it runs, in a local process or a cluster's worker.

    Clusters pickle it by value, because it is defined in the main module, so that their workers do not need ldm.
    """

    def __init__(self, downloader: Any, limits: dict[str, Any]) -> None:
        self.downloader, self.limits = downloader, limits

    def __call__(self, row: Any) -> Any:
        install(self.limits)
        return self.downloader(row)


class UprightResizer:
    """Wraps img2dataset's resizer and applies the EXIF orientation first."""

    def __init__(self, resizer: Any) -> None:
        self.resizer = resizer

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> Any:
        data = stream.getvalue()
        turned = upright(data)
        return self.resizer(stream if turned is None else io.BytesIO(turned), boxes)


def upright(data: bytes) -> bytes | None:
    """Returns the image turned upright and losslessly encoded, or None if its pixels are upright already."""
    import cv2
    import numpy as np

    orientation = _orientation(data)
    if orientation == 1:
        return None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        return None
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return bytes(cv2.imencode(".png", np.ascontiguousarray(image), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])


def _orientation(data: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; a missing or invalid one counts as 1 (upright)."""
    import exifread

    if not any(mark in data for mark in (b"Exif\0\0", b"EXIF", b"eXIf")):
        return 1
    if data.startswith(b"\x89PNG"):  # exifread cannot read PNG, but the content of the chunk is a TIFF
        start = data.find(b"eXIf")
        data = data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start], "big")]
    try:
        tags = exifread.process_file(io.BytesIO(data), details=False, stop_tag="Image Orientation")
        orientation = int(tags["Image Orientation"].values[0])
    except Exception:  # valid pixels are accepted even if their metadata is malformed
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def run(settings: dict[str, Any]) -> None:
    """Runs img2dataset with its downloader and its resizer wrapped."""
    main: Any = importlib.import_module("img2dataset.main")  # the attribute of that name is a function
    bounded, sized = main.Downloader, main.Resizer
    main.Downloader = lambda **options: BoundedDownloader(bounded(**options), settings["limits"])
    main.Resizer = lambda **options: UprightResizer(sized(**options))
    connect = {"ray": _connect_ray, "pyspark": _connect_spark}.get(settings["download"]["distributor"])
    if connect is not None:
        connect({name: os.environ[name] for name in ENVIRONMENT})
    main.download(**settings["download"])


def _connect_ray(environment: dict[str, str]) -> None:
    """Connects to the Ray cluster at RAY_ADDRESS, or starts one on this machine."""
    import ray

    ray.init(runtime_env={"env_vars": environment})


def _connect_spark(environment: dict[str, str]) -> None:
    """Starts a session as Spark is configured; without one, img2dataset would start a session on this machine."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName("ldm download")
    for name, value in environment.items():
        builder = builder.config(f"spark.executorEnv.{name}", value)
    builder.getOrCreate()


def end_with_parent() -> None:
    """Kills this process group once stdin closes, so that the download does not outlive the command that started it."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    run(json.loads(Path(sys.argv[1]).read_text()))
