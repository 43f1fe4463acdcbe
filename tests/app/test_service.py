import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.app.service import Finished, Request, Service, Step
from ldm.commands.sample import command as sample
from ldm.image import read_metadata, to_pil
from tests.tiny import KNOWN, save_tiny_model


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service({"tiny": str(save_tiny_model(tmp_path))}, tmp_path / "out" / "now", device="cpu")


def random_image(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return to_pil(torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8))[0]


def results(service: Service, seeds: list[int], sources: dict[str, Image.Image] | None = None, **call: Any) -> list:
    return list(service.sample(Request("tiny", KNOWN, seeds, call, sources or {})))


def test_every_step_has_an_estimate_of_every_image(service: Service):
    *steps, finished = results(service, [1, 2], steps=3)
    assert [(step.done, step.total) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(image.mode == "RGB" for step in steps for image in step.estimates)
    assert [len(step.estimates) for step in steps] == [2, 2, 2] and len(finished.paths) == 2


def test_images_are_numbered_consecutively_and_record_their_seeds(service: Service):
    paths = [path for seeds in ([5, 6], [7]) for path in results(service, seeds, steps=1)[-1].paths]
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png"]
    assert [read_metadata(path)["seed"] for path in paths] == [5, 6, 7]


def test_existing_files_in_the_folder_are_kept(service: Service):
    service.out.mkdir(parents=True)
    for name in ("0000.png", "0002.png", "0003_init.png"):
        (service.out / name).write_bytes(b"theirs")
    paths = results(service, [5, 6], {"init": random_image(0)}, steps=1, strength=1.0)[-1].paths
    assert [path.name for path in paths] == ["0004.png", "0005.png"]
    assert [read_metadata(path)["init"]["path"] for path in paths] == [str(service.out / "0004_init.png")] * 2
    assert all((service.out / name).read_bytes() == b"theirs" for name in ("0000.png", "0002.png", "0003_init.png"))


def test_sample_py_reproduces_an_inpainted_image_of_the_page(service: Service, tmp_path: Path):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    sources = {"init": random_image(0), "mask": mask}
    path = results(service, [3, 4], sources, steps=4, strength=0.5, sampler="ddpm")[-1].paths[1]
    assert sample.main([f"from={path}", f"out={tmp_path / 'reproduced'}"]) == 0
    reproduced = tmp_path / "reproduced" / "0000.png"
    assert Image.open(reproduced).tobytes() == Image.open(path).tobytes() and read_metadata(
        reproduced
    ) == read_metadata(path)


def test_a_model_that_is_not_offered_is_refused(service: Service, tmp_path: Path):
    for name in (str(tmp_path / "unet.safetensors"), "../tiny", "/etc/passwd"):
        with pytest.raises(ValueError, match="not among the models"):
            service.settings(name)
        with pytest.raises(ValueError, match="not among the models"):
            list(service.sample(Request(name, KNOWN, [0], {}, {})))


def test_a_closed_request_ends_and_saves_nothing(service: Service):
    steps: list[int] = []
    events = service.sample(Request("tiny", KNOWN, [0], {"steps": 200}, {}))
    next(events)
    assert service._loaded is not None
    hook = service._loaded[1].backbone.register_forward_hook(lambda *_: steps.append(1))
    events.close()
    done = len(steps)
    hook.remove()
    assert done < 190 and not service.out.exists()
    assert len(results(service, [1], steps=1)) == 2  # the next request runs


def test_an_error_is_raised_after_the_events_before_it(service: Service, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("ldm.app.service.save_png", full)
    events = service.sample(Request("tiny", KNOWN, [0], {"steps": 1}, {}))
    assert isinstance(next(events), Step)
    with pytest.raises(OSError, match="the disk is full"):
        next(events)


def test_a_warning_of_the_pipeline_is_reported(service: Service):
    assert any("lacks 'zebra'" in warning for warning in finished_request(service, "zebra " * 40).warnings)


def test_a_warning_of_a_library_is_not_reported(service: Service) -> None:
    finished_request(service, KNOWN)
    assert service._loaded is not None
    kinds = DeprecationWarning, FutureWarning, UserWarning

    def library(*_: Any) -> None:
        for kind in kinds:
            warnings.warn("this will change", kind, stacklevel=1)

    hook = service._loaded[1].backbone.register_forward_hook(library)
    with pytest.warns(Warning) as passed_on:
        messages = finished_request(service, KNOWN).warnings
    hook.remove()
    assert messages == [] and {warning.category for warning in passed_on} >= {*kinds}


def finished_request(service: Service, prompt: str) -> Finished:
    *_, finished = service.sample(Request("tiny", prompt, [0], {"steps": 1}, {}))
    return finished
