import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.app.service import Drawn, Request, Service, Step
from ldm.commands.sample import command as sample
from ldm.image import read_metadata, to_pil
from tests.tiny import KNOWN, save_tiny_model


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service({"tiny": str(save_tiny_model(tmp_path))}, tmp_path / "out" / "now", device="cpu")


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return to_pil(torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8))[0]


def told_by(service: Service, seeds: list[int], sources: dict[str, Image.Image] | None = None, **call: Any) -> list:
    return list(service.draw(Request("tiny", KNOWN, seeds, call, sources or {})))


def test_every_step_shows_an_estimate_of_every_picture(service: Service):
    *steps, drawn = told_by(service, [1, 2], steps=3)
    assert [(one.done, one.total) for one in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(small.mode == "RGB" for one in steps for small in one.estimates)
    assert [len(one.estimates) for one in steps] == [2, 2, 2] and len(drawn.paths) == 2


def test_pictures_are_numbered_through_and_record_their_seeds(service: Service):
    paths = [path for seeds in ([5, 6], [7]) for path in told_by(service, seeds, steps=1)[-1].paths]
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png"]
    assert [read_metadata(path)["seed"] for path in paths] == [5, 6, 7]


def test_pictures_that_are_in_the_folder_already_are_kept(service: Service):
    service.out.mkdir(parents=True)
    for name in ("0000.png", "0002.png", "0003_init.png"):
        (service.out / name).write_bytes(b"theirs")
    paths = told_by(service, [5, 6], {"init": picture(0)}, steps=1, strength=1.0)[-1].paths
    assert [path.name for path in paths] == ["0004.png", "0005.png"]
    assert [read_metadata(path)["init"]["path"] for path in paths] == [str(service.out / "0004_init.png")] * 2
    assert all((service.out / name).read_bytes() == b"theirs" for name in ("0000.png", "0002.png", "0003_init.png"))


def test_sample_py_draws_a_picture_of_the_page_again_with_what_it_started_from(service: Service, tmp_path: Path):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    sources = {"init": picture(0), "mask": mask}
    path = told_by(service, [3, 4], sources, steps=4, strength=0.5, sampler="ddpm")[-1].paths[1]
    assert sample.main([f"from={path}", f"out={tmp_path / 'again'}"]) == 0
    again = tmp_path / "again" / "0000.png"
    assert Image.open(again).tobytes() == Image.open(path).tobytes() and read_metadata(again) == read_metadata(path)


def test_a_model_that_is_not_offered_is_refused(service: Service, tmp_path: Path):
    for name in (str(tmp_path / "unet.safetensors"), "../tiny", "/etc/passwd"):
        with pytest.raises(ValueError, match="none of the models"):
            service.settings(name)
        with pytest.raises(ValueError, match="none of the models"):
            list(service.draw(Request(name, KNOWN, [0], {}, {})))


def test_a_request_that_nobody_reads_any_longer_ends_and_keeps_nothing(service: Service):
    steps: list[int] = []
    drawing = service.draw(Request("tiny", KNOWN, [0], {"steps": 200}, {}))
    next(drawing)
    assert service._loaded is not None
    hook = service._loaded[1].backbone.register_forward_hook(lambda *_: steps.append(1))
    drawing.close()
    done = len(steps)
    hook.remove()
    assert done < 190 and not service.out.exists()
    assert len(told_by(service, [1], steps=1)) == 2  # the next one has its turn


def test_an_error_reaches_the_reader_after_what_was_told(service: Service, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("ldm.app.service.save_png", full)
    drawing = service.draw(Request("tiny", KNOWN, [0], {"steps": 1}, {}))
    assert isinstance(next(drawing), Step)
    with pytest.raises(OSError, match="the disk is full"):
        next(drawing)


def test_a_remark_of_the_pipeline_is_told(service: Service):
    assert any("cannot" in remark or "not" in remark for remark in told_by_prompt(service, "zebra " * 40).remarks)


def test_a_warning_of_a_library_is_none_of_the_remarks(service: Service) -> None:
    told_by_prompt(service, KNOWN)
    assert service._loaded is not None
    kinds = DeprecationWarning, FutureWarning, UserWarning

    def library(*_: Any) -> None:
        for kind in kinds:
            warnings.warn("this will change", kind, stacklevel=1)

    hook = service._loaded[1].backbone.register_forward_hook(library)
    with pytest.warns(Warning) as passed_on:
        remarks = told_by_prompt(service, KNOWN).remarks
    hook.remove()
    assert remarks == [] and {one.category for one in passed_on} >= {*kinds}


def told_by_prompt(service: Service, prompt: str) -> Drawn:
    *_, drawn = service.draw(Request("tiny", prompt, [0], {"steps": 1}, {}))
    return drawn
