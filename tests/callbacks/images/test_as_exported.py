"""Tests that images in training come from the adapter file as exported, and that training is not disturbed."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from ldm.adapters.lora import LoRA
from ldm.adapters.text import TextualInversion
from ldm.callbacks.export import Export
from ldm.callbacks.images.as_exported import as_exported
from ldm.callbacks.images.previews import Previews
from ldm.callbacks.images.sampling import image_sampler
from ldm.files import MACHINE
from ldm.pipeline.pipeline import Pipeline
from ldm.training import export
from ldm.training.diffusion import DiffusionTraining
from ldm.training.start import start_from
from ldm.weights.parts import first_stage, text_encoder
from tests.callbacks.tiny import trainer
from tests.pipeline.tiny import assembled
from tests.tiny import KNOWN, save_tiny_model, tiny_unet
from tests.training.tiny import diffusion, fit

PROMPTS, SEEDS = [f"{KNOWN[:12]} <new>", "blue square"], [3, 4]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder)
    return folder


def adapted(base: Path, kind: str) -> DiffusionTraining:
    """A training module of an adapter of the tiny model; a LoRA changes both networks."""
    adapter: Any = LoRA(rank=2, targets="all", dropout=0.2) if kind == "lora" else TextualInversion("<new>", "red", 2)
    backbone = tiny_unet(seed=9).train()
    start, text = (
        start_from(backbone, str(base / "unet.safetensors")),
        text_encoder(str(base / "text_tower.safetensors")),
    )
    adapter.adapt(backbone)
    adapter.adapt_text(text.network)
    parts = {"first_stage": first_stage(str(base / "vae.safetensors")), "text_encoder": text}
    rate = 1e-2 if kind == "lora" else None
    return diffusion(backbone=backbone, base=start, adapter=adapter, text_encoder_lr=rate, size=(16, 16), **parts)


def train(folder: Path, module: DiffusionTraining, *callbacks: Callback, steps: int = 3) -> Trainer:
    if isinstance(module.adapter, TextualInversion):
        module.check_sample = lambda sample: None  # type: ignore[method-assign]  # captions without the token
    fit(folder, module, steps, callbacks=[*callbacks], side=16)
    return module.trainer


@pytest.mark.parametrize("kind", ["lora", "textual_inversion"])
def test_images_in_training_are_those_of_the_exported_file(kind: str, base: Path, tmp_path: Path) -> None:
    module = adapted(base, kind)
    run = train(tmp_path, module, Export(tmp_path))
    for number, layer in enumerate(parameters := [*module.trainable().values()]):
        torch.nn.init.normal_(layer, std=0.1, generator=torch.Generator().manual_seed(number))
    Export(tmp_path).on_fit_end(run, module)
    before = [weight.clone() for weight in parameters]
    with image_sampler(run, module) as sample:
        images = sample(PROMPTS, SEEDS)
    file = str(tmp_path / ("adapter" if kind == "lora" else "embedding")) + ".safetensors"
    given = {"adapters": [file]} if kind == "lora" else {"embeddings": [file]}
    pipeline = assembled(Pipeline.load(str(base / "unet.safetensors"), "cpu", **given))  # type: ignore[arg-type]
    assert (images.int() - pipeline(PROMPTS, seeds=SEEDS, size=(16, 16)).images.int()).abs().max() <= 1
    assert [*map(id, module.trainable().values())] == [*map(id, parameters)]
    assert all(map(torch.equal, before, parameters))


@pytest.mark.slow
def test_a_bad_export_shows_in_the_images(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = adapted(base, "lora")
    run = train(tmp_path, module)
    for layer in module.trainable().values():
        torch.nn.init.normal_(layer, std=0.1, generator=torch.Generator().manual_seed(0))
    exported, images = export.exported, []

    def without_scale(*arguments: Any) -> Any:
        state, about, metadata = exported(*arguments)
        return (
            {name: tensor * 4 if name.endswith("alpha") else tensor for name, tensor in state.items()},
            about,
            metadata,
        )

    for function in (exported, without_scale):
        monkeypatch.setattr(export, "exported", function)
        with image_sampler(run, module) as sample:
            images.append(sample(PROMPTS, SEEDS))
    assert not torch.equal(*images)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "textual_inversion"])
def test_previews_do_not_change_the_training_of_an_adapter(kind: str, base: Path, tmp_path: Path) -> None:
    trained = []
    for callbacks in ([], [Previews(tmp_path / "previews", PROMPTS, every_n_train_steps=1)]):
        module = adapted(base, kind)
        train(tmp_path, module, *callbacks)
        trained.append(module.trainable())
    assert len(list((tmp_path / "previews").iterdir())) == 3
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


def test_the_file_is_in_a_folder_that_is_swept_after_a_kill(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/test_leftovers.py kills the writers of such folders."""
    module, place = adapted(base, "lora"), tmp_path / "temporary"
    run = train(tmp_path, module, steps=1)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with as_exported(run, module, module.backbone, module.text_encoder):
        names = [path.name for path in place.iterdir()]
    assert names and all(name.startswith(f".ldm.{MACHINE}-") for name in names) and not [*place.iterdir()]


def test_networks_without_an_adapter_are_sampled_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = diffusion(size=(16, 16))
    monkeypatch.setattr(DiffusionTraining, "exported_files", None)
    run = trainer(tmp_path)
    with image_sampler(run, module) as sample:
        assert sample(["red"], [1]).shape == (1, 3, 16, 16)
