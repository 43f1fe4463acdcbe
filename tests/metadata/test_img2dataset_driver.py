import time
from collections.abc import Iterator

import pytest

from ldm.metadata.img2dataset_driver import fetch
from tests.data.web import jpeg, served


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with served() as url:
        yield url


def get(url: str) -> bytes:
    return fetch(url, timeout=1, deadline=1.5, max_bytes=100_000)[0]


def test_a_complete_image_is_returned_with_its_headers(web: str) -> None:
    body, headers = fetch(f"{web}/large/1.jpg", 1, 5, 1 << 20)
    assert body == jpeg(1024, 768) and headers["Content-Type"] == "image/jpeg"


def test_a_redirect_is_followed(web: str) -> None:
    assert get(f"{web}/moved/1.jpg") == get(f"{web}/good/moved.jpg")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "404"),
        ("failing", "503"),
        ("silent", "timed out"),
        ("trickle", "slower than the deadline"),
        ("endless", "larger than the limit"),
        ("short", "shorter than its Content-Length"),
        ("empty", "empty"),
        ("circle", "redirect"),
        ("disk", "is not allowed"),
        ("garbage", None),
    ],
)
def test_any_other_response_soon_raises_an_error(kind: str, message: str | None, web: str) -> None:
    start = time.monotonic()
    with pytest.raises(Exception, match=message):
        get(f"{web}/{kind}/1.jpg")
    assert time.monotonic() - start < 8  # the silent server waits that long, and the trickling one sends for 8 s


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "data:text/plain,x", "ftp://127.0.0.1/x", "pipe:ls", "/etc/passwd"]
)
def test_only_http_urls_are_opened(url: str) -> None:
    with pytest.raises((OSError, ValueError)):
        get(url)
