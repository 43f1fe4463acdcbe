"""A web server on loopback whose responses are slow, broken, redirected, oversized or wrong."""

import http.server
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image


def jpeg(width: int = 96, height: int = 64, seed: int = 0) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 16 or 1, width // 16 or 1, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


def turned(orientation: int, form: str = "JPEG") -> bytes:
    """Returns an image of four colours with this EXIF orientation."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(colours).resize((128, 64), Image.Resampling.NEAREST).save(file, form, exif=exif, quality=95)
    return file.getvalue()


class Answers(http.server.BaseHTTPRequestHandler):
    """Chooses the kind of response by the path: /good/3.jpg, /silent/1.jpg …"""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1].split("?")[0]
        with suppress(BrokenPipeError, ConnectionResetError):  # clients give up on some of these responses
            getattr(self, f"send_{kind}", self.send_missing)()

    def respond(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content_Length": str(len(body)), "Content_Type": "image/jpeg"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_good(self) -> None:
        self.respond(jpeg(seed=sum(self.path.encode())))

    def send_turned(self) -> None:
        """Sends an image with the format and orientation in its path: /turned/PNG/6."""
        _, _, form, orientation = self.path.split("/")
        self.respond(turned(int(orientation), form))

    def send_large(self) -> None:
        self.respond(jpeg(1024, 768))

    def send_missing(self) -> None:
        self.respond(b"not here", 404)

    def send_failing(self) -> None:
        self.respond(b"", 503)

    def send_silent(self) -> None:
        """Accepts the request and sends nothing."""
        time.sleep(8)

    def send_trickle(self) -> None:
        """Sends single bytes, each within the timeout of a read."""
        self.send_response(200)
        self.end_headers()
        for byte in jpeg()[:80]:
            self.wfile.write(bytes([byte]))
            time.sleep(0.1)

    def send_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b"\xff" * (1 << 20))

    def send_short(self) -> None:
        """Announces more bytes than it sends."""
        self.respond(jpeg()[:-300], Content_Length=str(len(jpeg())))

    def send_cut(self) -> None:
        """Sends a complete response with half an image."""
        self.respond(jpeg()[:40])

    def send_page(self) -> None:
        """Sends an HTML page that is declared as an image."""
        self.respond(b"<html>sign in</html>")

    def send_empty(self) -> None:
        self.respond(b"")

    def send_moved(self) -> None:
        self.respond(b"", 302, Location="/good/moved.jpg")

    def send_circle(self) -> None:
        self.respond(b"", 302, Location=self.path)

    def send_disk(self) -> None:
        self.respond(b"", 302, Location="file:///etc/passwd")

    def send_garbage(self) -> None:
        self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")

    def send_private(self) -> None:
        self.respond(jpeg(), X_Robots_Tag="noai")

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections of many threads at once, on a busy machine

    def handle_error(self, *_: object) -> None:
        pass  # from clients that closed the connection


@contextmanager
def served() -> Iterator[str]:
    with Server(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
