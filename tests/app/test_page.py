"""The page in a real browser, drawing with a tiny model."""

import io
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.app.service import Request, Service
from ldm.image import read_metadata, save_png, to_pil
from tests.tiny import KNOWN, save_tiny_model

httpx = pytest.importorskip("httpx", reason="Gradio brings it")
server = pytest.importorskip("ldm.app.server", reason="the page needs Gradio: pip install -e '.[app]'")
browsing = pytest.importorskip("playwright.sync_api", reason="a browser is driven by Playwright: .[test] brings it")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
PATIENCE = 120_000  # milliseconds, for machines that are busy with other things


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("app")
    return Service({"tiny": str(save_tiny_model(folder))}, folder / "out" / "now", device="cpu")


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limit = Image.MAX_IMAGE_PIXELS
    blocks = server.serve(service, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}/"
    blocks.close(verbose=False)
    Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing.sync_playwright() as playwright:
        args = ["--no-sandbox"] if os.getuid() == 0 else []
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=args)


@pytest.fixture
def page(browser, address: str) -> Iterator[Any]:
    """Freshly loaded; at the end it must have asked nobody but its own server for anything."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def draw(page, prompt: str = KNOWN) -> Image.Image:
    """Types the prompt, presses the button and gives the picture that then is on the page."""
    page.fill("#prompt textarea", prompt)
    page.click("#draw")
    page.wait_for_selector(f"#told:has-text('{prompt} · seed')")
    assert page.locator(".toast-wrap .error").count() == 0
    return Image.open(io.BytesIO(httpx.get(page.locator("#stage img").first.get_attribute("src")).content))


def set_number(page, name: str, value: str) -> None:
    page.locator(f"#{name} input[type=number]").fill(value)
    page.locator(f"#{name} input[type=number]").press("Tab")


def picture(path: Path, size: tuple[int, int] = (16, 16)) -> Path:
    generator = torch.Generator().manual_seed(0)
    to_pil(torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8))[0].save(path)
    return path


def field(page, name: str) -> str:
    return page.locator(f"#{name} input, #{name} textarea").first.input_value()


def test_a_prompt_becomes_a_picture_that_holds_its_settings(page, service: Service):
    drawn = draw(page)
    assert drawn.size == (16, 16) and len(drawn.getcolors()) > 10
    newest = max(service.out.glob("????.png"))
    assert Image.open(newest).tobytes() == drawn.tobytes() and read_metadata(newest)["prompt"] == KNOWN
    browsing.expect(page.locator("#gallery img")).to_have_count(1, timeout=PATIENCE)


def test_pictures_outlast_a_reload_of_the_page(page):
    draw(page)
    source = page.locator("#gallery img").first.get_attribute("src")
    page.reload()
    browsing.expect(page.locator("#gallery img").first).to_have_attribute("src", source, timeout=PATIENCE)


def test_what_is_painted_over_is_drawn_anew_and_the_rest_stays(page, service: Service, tmp_path: Path):
    page.click("#start button")
    box = page.wait_for_selector("#editor canvas").bounding_box()
    page.wait_for_timeout(1000)  # only then the editor takes pictures
    page.set_input_files("#editor input[type=file]", picture(tmp_path / "init.png"))
    page.wait_for_selector("#editor :text('Drop a picture')", state="hidden")
    page.wait_for_timeout(1000)  # the canvas takes the picture's size
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 4, y + 4, steps=4)
    page.mouse.up()
    page.wait_for_timeout(1000)
    drawn = draw(page)
    init = Image.open(tmp_path / "init.png")
    [painted] = service.out.glob("*_mask.png")
    kept = np.asarray(Image.open(painted)) == 0  # (h, w)
    same = (np.asarray(drawn) == np.asarray(init)).all(2)
    assert kept.any() and not kept.all() and same[kept].all() and not same.all()


def test_a_dropped_png_restores_its_settings(page, service: Service):
    call = {"steps": 2, "sampler": "euler", "negative": "blue", "size": (8, 24)}
    *_, drawn = service.draw(Request("tiny", "a red circle", [77], call, {}))
    page.set_input_files("#drop input[type=file]", drawn.paths[0])
    browsing.expect(page.locator("#prompt textarea")).to_have_value("a red circle", timeout=PATIENCE)
    assert (field(page, "seed"), field(page, "sampler")) == ("77", "euler")
    assert draw(page, "a red circle").tobytes() == Image.open(drawn.paths[0]).tobytes()


def test_stop_ends_a_drawing_and_the_next_one_begins(page, service: Service):
    before = set(service.out.glob("*"))
    for name, value in (("steps", "200"), ("height", "128"), ("width", "128")):
        set_number(page, name, value)
    page.fill("#prompt textarea", KNOWN)
    page.click("#draw")
    page.wait_for_selector("#told:has-text('Step')")
    page.click("#stop")
    page.wait_for_selector("#told:has-text('Stopped')")
    set_number(page, "steps", "1")
    assert draw(page).size == (128, 128)
    assert len(set(service.out.glob("*")) - before) == 1


@pytest.mark.parametrize("name, value, sentence", [("seed", "seven", "the seed is"), ("height", "17", "multiples of")])
def test_what_cannot_be_drawn_is_told_in_a_sentence(page, name: str, value: str, sentence: str):
    page.locator(f"#{name} input, #{name} textarea").first.fill(value)
    page.fill("#prompt textarea", KNOWN)
    page.click("#draw")
    assert page.wait_for_selector(f".toast-body.error:has-text('{sentence}')").is_visible()


def test_what_a_strange_png_says_is_shown_as_text(page, service: Service, tmp_path: Path):
    *_, drawn = service.draw(Request("tiny", KNOWN, [0], {"steps": 1}, {}))
    record = read_metadata(drawn.paths[0]) | {"model": "<b id='evil'>x</b>"}
    save_png(Image.open(drawn.paths[0]), tmp_path / "strange.png", record)
    page.set_input_files("#drop input[type=file]", tmp_path / "strange.png")
    assert "<b id='evil'>" in page.wait_for_selector(".toast-body.warning").inner_text()
    assert page.locator("#evil").count() == 0


def test_a_picture_of_another_program_is_refused_in_a_sentence_and_another_may_be_dropped(page, tmp_path: Path):
    for name in ("one", "other"):
        page.set_input_files("#drop input[type=file]", picture(tmp_path / f"{name}.png"))
        page.wait_for_selector(f".toast-body.error:has-text('{name}.png holds no settings')")
        browsing.expect(page.locator("#drop input[type=file]")).to_have_count(1, timeout=PATIENCE)
        assert f"{name}.png" not in page.locator("#drop").inner_text()


def test_an_upload_of_too_many_pixels_is_refused_before_it_is_decoded(page, tmp_path: Path):
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    page.set_input_files("#drop input[type=file]", tmp_path / "large.png")
    assert page.wait_for_selector(".toast-body.error:has-text('exceeds limit')").is_visible()


def test_an_upload_of_too_many_bytes_is_refused(address: str):
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": bytes(server.MOST_BYTES + 1)})
    assert answer.status_code == 413


def test_files_outside_of_the_pictures_are_not_served(address: str, service: Service, tmp_path: Path):
    secret = picture(tmp_path / "secret.png")
    for path in (secret, service.models["tiny"], __file__, "/etc/passwd"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_a_browser_that_names_other_files_gets_none_of_them(service: Service, tmp_path: Path):
    secret = picture(tmp_path / "0000.png")
    made = [str(secret), os.path.relpath(secret, service.out), "../0000.png", "9999.png", ""]
    page = server.Page(service)
    changed = page.gallery(made)
    assert changed[page.parts["made"]] == [] and changed[page.parts["gallery"]].value in ([], None)
