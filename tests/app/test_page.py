"""Tests the page in a real browser, with a tiny model."""

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
from ldm.weights.adapters.writer import write_adapter
from tests.tiny import KNOWN, save_tiny_model, tiny_unet
from tests.weights.adapters.made import changes

httpx = pytest.importorskip("httpx", reason="it is installed with Gradio")
server = pytest.importorskip("ldm.app.server", reason="the page needs Gradio: pip install -e '.[app]'")
browsing = pytest.importorskip(
    "playwright.sync_api", reason="Playwright controls the browser: pip install -e '.[test]'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")]
TIMEOUT = 120_000  # milliseconds, enough for a busy machine


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
    """Yields a newly loaded page; fails if it sends a request to any other server."""
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    yield page
    page.close()
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []


def generate(page, prompt: str = KNOWN) -> Image.Image:
    """Enters the prompt, presses Generate and returns the image that the page then shows."""
    before = page.locator("#gallery img").count()
    page.fill("#prompt textarea", prompt)
    page.click("#generate")
    browsing.expect(page.locator("#gallery img")).to_have_count(before + 1, timeout=TIMEOUT)
    page.wait_for_selector(f"#message:has-text('{prompt} · seed')")
    assert page.locator(".toast-wrap .error").count() == 0
    return Image.open(io.BytesIO(httpx.get(page.locator("#stage img").first.get_attribute("src")).content))


def set_number(page, name: str, value: str) -> None:
    page.locator(f"#{name} input[type=number]").fill(value)
    page.locator(f"#{name} input[type=number]").press("Tab")


def random_image(path: Path, size: tuple[int, int] = (16, 16)) -> Path:
    generator = torch.Generator().manual_seed(0)
    to_pil(torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8))[0].save(path)
    return path


def field(page, name: str) -> str:
    return page.locator(f"#{name} input, #{name} textarea").first.input_value()


def test_a_prompt_generates_an_image_that_records_its_settings(page, service: Service):
    image = generate(page)
    assert image.size == (16, 16) and len(image.getcolors()) > 10
    newest = max(service.out.glob("????.png"))
    assert Image.open(newest).tobytes() == image.tobytes() and read_metadata(newest)["prompt"] == KNOWN
    browsing.expect(page.locator("#gallery img")).to_have_count(1, timeout=TIMEOUT)


def test_the_gallery_survives_a_reload_of_the_page(page):
    generate(page)
    source = page.locator("#gallery img").first.get_attribute("src")
    page.reload()
    browsing.expect(page.locator("#gallery img").first).to_have_attribute("src", source, timeout=TIMEOUT)


def test_painted_pixels_are_replaced_and_all_others_stay(page, service: Service, tmp_path: Path):
    page.click("#start button")
    box = page.wait_for_selector("#editor canvas").bounding_box()
    page.wait_for_timeout(1000)  # the editor accepts images only then
    page.set_input_files("#editor input[type=file]", random_image(tmp_path / "init.png"))
    page.wait_for_selector("#editor :text('Drop an image')", state="hidden")
    page.wait_for_timeout(1000)  # the canvas adopts the size of the image
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 4, y + 4, steps=4)
    page.mouse.up()
    page.wait_for_timeout(1000)
    image = generate(page)
    init = Image.open(tmp_path / "init.png")
    [mask] = service.out.glob("*_mask.png")
    kept = np.asarray(Image.open(mask)) == 0  # (h, w)
    same = (np.asarray(image) == np.asarray(init)).all(2)
    assert kept.any() and not kept.all() and same[kept].all() and not same.all()


def test_an_image_without_a_prompt_says_so(page):
    generate(page, "")
    assert page.inner_text("#message").startswith("no prompt · seed")


def test_a_dropped_png_restores_its_settings(page, service: Service):
    call = {"steps": 2, "sampler": "euler", "negative": "blue", "size": (8, 24)}
    *_, finished = service.sample(Request("tiny", "a red circle", [77], call, {}))
    page.set_input_files("#drop input[type=file]", finished.paths[0])
    browsing.expect(page.locator("#prompt textarea")).to_have_value("a red circle", timeout=TIMEOUT)
    assert (field(page, "seed"), field(page, "sampler")) == ("77", "euler")
    assert generate(page, "a red circle").tobytes() == Image.open(finished.paths[0]).tobytes()


@pytest.mark.slow
def test_a_dropped_lora_changes_images_until_its_weight_is_zero(page, tmp_path: Path):
    write_adapter(tmp_path / "ink.safetensors", {"unet": changes(tiny_unet(), "all")}, "kohya", {})
    page.locator("#seed input, #seed textarea").first.fill("7")
    plain = generate(page)
    page.click("#adapters button")
    page.set_input_files("#added input[type=file]", tmp_path / "ink.safetensors")
    cells = page.locator("#loras [role=row]").filter(has_text="ink.safetensors").locator("[role=gridcell]")
    browsing.expect(cells.last).to_have_text("1", timeout=TIMEOUT)
    assert generate(page).tobytes() != plain.tobytes()
    cells.last.dblclick()
    page.keyboard.press("Control+A")
    page.keyboard.type("0")
    page.keyboard.press("Enter")
    assert generate(page).tobytes() == plain.tobytes()


def test_a_file_that_is_no_adapter_is_refused(page, tmp_path: Path):
    (tmp_path / "notes.bin").write_bytes(b"no tensors")
    page.click("#adapters button")
    page.set_input_files("#added input[type=file]", tmp_path / "notes.bin")
    assert page.wait_for_selector(".toast-body.error:has-text('notes.bin is neither a LoRA')").is_visible()


def test_stop_ends_a_request_and_the_next_one_runs(page, service: Service):
    before = set(service.out.glob("*"))
    for name, value in (("steps", "200"), ("height", "128"), ("width", "128")):
        set_number(page, name, value)
    page.fill("#prompt textarea", KNOWN)
    page.click("#generate")
    page.wait_for_selector("#message:has-text('Step')")
    page.click("#stop")
    page.wait_for_selector("#message:has-text('Stopped')")
    set_number(page, "steps", "1")
    assert generate(page).size == (128, 128)
    assert len(set(service.out.glob("*")) - before) == 1


@pytest.mark.parametrize("name, value, sentence", [("seed", "seven", "the seed is"), ("height", "17", "multiples of")])
def test_an_invalid_request_shows_an_error_message(page, name: str, value: str, sentence: str):
    page.locator(f"#{name} input, #{name} textarea").first.fill(value)
    page.fill("#prompt textarea", KNOWN)
    page.click("#generate")
    assert page.wait_for_selector(f".toast-body.error:has-text('{sentence}')").is_visible()


def test_untrusted_metadata_is_shown_as_plain_text(page, service: Service, tmp_path: Path):
    *_, finished = service.sample(Request("tiny", KNOWN, [0], {"steps": 1}, {}))
    record = read_metadata(finished.paths[0]) | {"model": "<b id='evil'>x</b>"}
    save_png(Image.open(finished.paths[0]), tmp_path / "untrusted.png", record)
    page.set_input_files("#drop input[type=file]", tmp_path / "untrusted.png")
    assert "<b id='evil'>" in page.wait_for_selector(".toast-body.warning").inner_text()
    assert page.locator("#evil").count() == 0


def test_after_a_refused_png_another_can_be_dropped(page, tmp_path: Path):
    for name in ("one", "other"):
        page.set_input_files("#drop input[type=file]", random_image(tmp_path / f"{name}.png"))
        page.wait_for_selector(f".toast-body.error:has-text('{name}.png holds no settings')")
        browsing.expect(page.locator("#drop input[type=file]")).to_have_count(1, timeout=TIMEOUT)
        assert f"{name}.png" not in page.locator("#drop").inner_text()


def test_an_upload_of_too_many_pixels_is_refused_before_it_is_decoded(page, tmp_path: Path):
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    page.set_input_files("#drop input[type=file]", tmp_path / "large.png")
    assert page.wait_for_selector(".toast-body.error:has-text('exceeds limit')").is_visible()


def test_an_upload_of_too_many_bytes_is_refused(address: str):
    response = httpx.post(f"{address}gradio_api/upload", files={"files": bytes(server.MAX_UPLOAD_BYTES + 1)})
    assert response.status_code == 413


def test_only_files_of_the_output_folder_are_served(address: str, service: Service, tmp_path: Path):
    secret = random_image(tmp_path / "secret.png")
    for path in (secret, service.models["tiny"], __file__, "/etc/passwd"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_file_names_from_the_browser_are_not_trusted(service: Service, tmp_path: Path):
    secret = random_image(tmp_path / "0000.png")
    history = [str(secret), os.path.relpath(secret, service.out), "../0000.png", "9999.png", ""]
    page = server.Page(service)
    updates = page.gallery(history)
    assert updates[page.parts["history"]] == [] and updates[page.parts["gallery"]].value in ([], None)


def test_the_page_has_a_title_and_shows_no_examples_for_a_model_of_another_vocabulary(page):
    assert page.locator("h1").inner_text() == "ldm"
    assert page.locator("#examples").count() == 0 or not page.locator("#examples").is_visible()


def test_an_image_is_downloaded_varied_and_deleted_and_its_seed_locked(page, service: Service):
    generate(page)
    newest = max(service.out.glob("????.png"))
    page.click("#lock")
    browsing.expect(page.locator("#seed textarea, #seed input").first).to_have_value(
        str(read_metadata(newest)["seed"]), timeout=TIMEOUT
    )
    with page.expect_download() as download:
        page.click("#download")
    assert Path(download.value.path()).read_bytes() == newest.read_bytes()
    page.click("#vary")
    page.wait_for_function("() => document.querySelector('#message').innerText.includes('seed')")
    browsing.expect(page.locator("#gallery img")).to_have_count(2, timeout=TIMEOUT)
    varied = max(service.out.glob("????.png"))
    assert read_metadata(varied)["seed"] != read_metadata(newest)["seed"]
    page.click("#delete")
    browsing.expect(page.locator("#gallery img")).to_have_count(1, timeout=TIMEOUT)
    assert newest.exists() and not varied.exists()


def test_an_aspect_sets_height_and_width(page):
    set_number(page, "width", "32")
    page.locator("#aspect input").click()
    page.locator("[role=option]:has-text('square')").click()
    browsing.expect(page.locator("#width input[type=number]")).to_have_value("16", timeout=TIMEOUT)
