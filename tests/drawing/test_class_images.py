"""Class images are sampled once per model and settings, and interrupted sampling resumes."""

from pathlib import Path

import pytest

from ldm.data.sources.folder import Folder
from ldm.drawing import class_images as module
from ldm.drawing.class_images import class_images
from ldm.image import load_image, pixels
from ldm.pipeline.pipeline import Pipeline
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def sampled(model: str, root: Path, count: int = 3, **how: object) -> Path:
    settings: dict[str, object] = {"size": (16, 16), "batch_size": 2, "device": "cpu", "prompt": "red circle"}
    return class_images(model, count=count, root=root, **(settings | how))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}


def test_class_images_are_sampled_by_the_base_model_with_consecutive_seeds(tiny: str, tmp_path: Path) -> None:
    folder = sampled(tiny, tmp_path, seed=5)
    expected = Pipeline.load(tiny, "cpu")(["red circle"] * 2, seeds=[5, 6], batch_size=2, size=(16, 16)).images
    for index in range(2):
        assert (pixels(load_image(folder / f"{index:06}.png")).int() - expected[index].int()).abs().max() <= 1


def test_class_images_of_several_prompts_have_their_prompts_as_captions(tiny: str, tmp_path: Path) -> None:
    folder = sampled(tiny, tmp_path, count=4, prompt=["red circle", "blue star", "ring"])
    captions = [Folder(folder, 16)[index]["caption"] for index in range(4)]
    assert captions == ["red circle", "blue star", "ring", "red circle"]
    expected = Pipeline.load(tiny, "cpu")(["red circle", "blue star"], seeds=[0, 1], batch_size=2, size=(16, 16)).images
    assert (pixels(load_image(folder / "000001.png")).int() - expected[1].int()).abs().max() <= 1


def test_class_images_are_sampled_once_and_resumed_after_an_interruption(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sampled(tiny, tmp_path)
    first = contents(folder)
    assert len(first) == 4  # complete blocks
    (folder / "000001.png").unlink()
    assert sampled(tiny, tmp_path) == folder and contents(folder) == first
    assert sampled(tiny, tmp_path, count=5) == folder and contents(folder).items() > first.items()
    monkeypatch.setattr(module, "Pipeline", None)
    assert sampled(tiny, tmp_path, count=6) == folder


def test_another_model_or_setting_has_another_folder(tiny: str, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other")
    other.write_bytes(other.read_bytes()[:-4] + b"\0\0\0\0")
    changes: list[dict[str, object]] = [{}, {"prompt": "blue"}, {"seed": 1}, {"size": (8, 8)}]
    folders = [sampled(tiny, tmp_path / "images", 1, **how) for how in changes]
    assert len({*folders, sampled(str(other), tmp_path / "images", 1)}) == 5


def test_a_count_of_zero_is_refused(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.class_images=0: expected at least 1"):
        sampled(tiny, tmp_path, 0)
