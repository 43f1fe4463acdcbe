"""Tests the fine-tuning recipes: plans for Stable Diffusion 1.5, and short runs of the included small model."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.data.sources.shapes import Shapes
from ldm.image import to_pil
from ldm.pipeline.pipeline import Pipeline
from ldm.weights.adapters.textual_inversion import read_embedding
from ldm.weights.native import load_network
from tests.runs import refusal, run
from tests.test_recipes import FINE_TUNING

SHORT = (
    *("base=shapes", "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.val_check_interval=2", "logger=none"),
    *("sampler.steps=1", "name=test", "trainer.limit_val_batches=1"),
)
CAPTION = "data.caption='a red sks'"


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five images of different sizes without captions."""
    folder, shapes = tmp_path_factory.mktemp("five"), Shapes(seed=1)
    for k in range(5):
        (image,) = to_pil(shapes[k]["image"])
        image.resize((80 + 20 * k, 100)).save(folder / f"{k}.png")
    return folder


@pytest.mark.slow
def test_a_lora_of_five_images_validates_previews_and_exports(
    five: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, "experiment=lora", *SHORT, f"data.root={five}", CAPTION)
    out = capsys.readouterr().out
    assert "val/images: all 5 images, which are also trained on, at other noise" in out and "val/images/loss" in out
    assert (folder / "samples" / "step_000002.png").is_file()
    layers = {name.partition(".")[0] for name in load_file(folder / "adapter.safetensors")}
    assert layers and all(name.startswith("lora_unet_") for name in layers)
    assert Pipeline.load("shapes", "cpu", adapters=[str(folder)])("red", steps=1).images.shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_dreambooth_samples_class_images_once_and_mixes_them_in(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = "data.class_prompt='a red circle'", "data.class_images=4", f"data.class_root={tmp_path / 'class'}"
    arguments = "experiment=dreambooth", *SHORT, f"data.root={five}", CAPTION, *prior
    run(tmp_path / "first", *arguments)
    assert len(list((tmp_path / "class").rglob("*.png"))) == 4
    monkeypatch.setattr("ldm.drawing.class_images.Pipeline", None)
    folder = run(tmp_path / "second", *arguments)
    first, second = (load_file(run / "adapter.safetensors") for run in (tmp_path / "first", folder))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_dreambooth_trains_the_full_network_and_the_text_encoder(five: Path, tmp_path: Path) -> None:
    full = "data=small", "adapter=none", "training.text_encoder_lr=1e-5"
    folder = run(tmp_path, "experiment=dreambooth", *SHORT, *full, f"data.root={five}", CAPTION)
    tower = load_network(folder / "text_tower.safetensors", "text_tower").state_dict()
    plain = load_network("assets:text_tower.safetensors", "text_tower").state_dict()
    assert not torch.equal(tower["norm.bias"], plain["norm.bias"])
    assert Pipeline.load(str(folder), "cpu")("a red circle", steps=1).images.shape == (1, 3, 64, 64)


def test_textual_inversion_exports_the_vectors_of_its_token(five: Path, tmp_path: Path) -> None:
    inversion = "adapter.initial=red", "adapter.vectors=2"
    folder = run(tmp_path, "experiment=textual_inversion", *SHORT, f"data.root={five}", *inversion)
    embedding = read_embedding(folder)
    assert embedding.token == "<new>" and embedding.vectors["text_encoder"].shape == (2, 128)
    assert (folder / "checkpoints" / "last.ckpt").stat().st_size < 50_000


@pytest.mark.slow
def test_inpainting_is_trained_from_a_network_without_masks(five: Path, tmp_path: Path) -> None:
    data = "data=small", "data.memory.encode=null", f"data.root={five}", CAPTION, "data.batch_size=1"
    folder = run(tmp_path, "experiment=inpainting_finetune", *SHORT, *data, "data.global_batch=1")
    weight = load_file(folder / "unet.safetensors")["conv_in.weight"]
    assert weight.shape[1] == 17 and weight[:, 8:].any()


@pytest.mark.slow
def test_a_small_set_trains_in_buckets_with_masks_and_a_trained_text_encoder(five: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for file in five.glob("*.png"):
        image = Image.open(file)
        image.save(images / file.name)
        Image.new("L", image.size, 255).save(images / f"{file.stem}.mask.png")
    how = "data.bucketed=true", "data.bucket_step=16", "data.global_batch=1", "data.masks=true"
    text = "training.text_encoder_lr=1e-4", "callbacks.learning.after=2"
    folder = run(tmp_path / "run", "experiment=lora", *SHORT, f"data.root={images}", CAPTION, *how, *text)
    assert any(name.startswith("lora_te_") for name in load_file(folder / "adapter.safetensors"))


def test_an_adapter_with_more_input_channels_than_its_base_is_refused(five: Path, tmp_path: Path) -> None:
    message = refusal(tmp_path, "experiment=inpainting_finetune", *SHORT, "adapter=lora", f"data.root={five}", CAPTION)
    assert "does not read masks" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_recipe_is_planned_for_the_included_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    initial = ["adapter.initial=red"] if name == "textual_inversion" else []
    run(tmp_path, f"experiment={name}", "debug=plan", "base=shapes", "name=test", *initial)
    assert "memory per GPU" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FINE_TUNING, "sd15_finetune"])
def test_a_recipe_is_planned_for_stable_diffusion(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, f"experiment={name}", "debug=plan", "name=test")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("unet"))
    assert line.split()[1] in ("859.5", "862.7"), line  # with the 3.19 M of a LoRA


@pytest.mark.slow
def test_a_lora_of_stable_diffusion_is_planned_within_6_gib(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "experiment=lora", "debug=plan", "adapter.base_dtype=bfloat16", "name=test")
    out = capsys.readouterr().out
    number, unit = next(line.split()[1:3] for line in out.splitlines() if line.split()[:1] == ["all"])
    assert unit == "GiB" and float(number) < 6 and "3.189 M of them trained" in out
