import time
from collections.abc import Iterator

import pytest

from ldm.metadata.img2dataset_driver import fetch, in_ascii
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


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.org/1.jpg?w=2&h=%20x", "https://a.org/1.jpg?w=2&h=%20x"),
        (" https://a.org/my image.jpg ", "https://a.org/my%20image.jpg"),
        ("https://a.org/é/日本.jpg?q=ü", "https://a.org/%C3%A9/%E6%97%A5%E6%9C%AC.jpg?q=%C3%BC"),
        ("https://a.org/100% wool%2F.jpg", "https://a.org/100%25%20wool%2F.jpg"),
        ("https://BÜCHER.example:8080/a.jpg#top", "https://xn--bcher-kva.example:8080/a.jpg"),
        ("http://straße.de/a.jpg", "http://xn--strae-oqa.de/a.jpg"),
        ("http://例え。jp", "http://xn--r8jz45g.jp"),
        ("http://user:pass@a.org/(a),b;c=d'.jpg", "http://user:pass@a.org/(a),b;c=d'.jpg"),
        ("http://[::1]:80/a b", "http://[::1]:80/a%20b"),
        ('http://a.org/"x"<y>\\z', "http://a.org/%22x%22%3Cy%3E%5Cz"),
    ],
)
def test_a_url_is_escaped_as_browsers_do(url: str, expected: str) -> None:
    assert in_ascii(url) == expected == in_ascii(expected)


@pytest.mark.parametrize("path", ["a b.jpg", "é.jpg", "日本.jpg?q=ü", "100% wool.jpg"])
def test_an_image_at_a_url_with_spaces_or_other_letters_is_fetched(path: str, web: str) -> None:
    assert get(f"{web}/good/{path}") == get(in_ascii(f"{web}/good/{path}"))
