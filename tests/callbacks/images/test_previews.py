import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.images.previews import Previews
from ldm.image import read_metadata
from tests.callbacks.painted import Model, Painter
from tests.callbacks.tiny import Batches, trainer
from tests.training.tiny import CAPTIONS, diffusion, fit

PROMPTS = ["a red circle on a white background", "a blue square on a black background"]


def test_previews_are_sampled_every_n_steps_and_at_the_end_with_fixed_seeds(
    tmp_path: Path, painter: type[Painter]
) -> None:
    previews = Previews(tmp_path / "samples", PROMPTS, every_n_train_steps=2, seed=7)
    trainer(tmp_path, previews, max_steps=5, accumulate_grad_batches=2).fit(Model(), Batches())
    files = sorted(os.listdir(tmp_path / "samples"))
    assert files == ["step_000002.png", "step_000004.png", "step_000005.png"]
    assert [call[:2] for call in painter.calls] == [(PROMPTS, [7, 8])] * 3
    assert read_metadata(tmp_path / "samples" / files[0])["step"] == 2


def test_a_preview_at_the_last_step_is_sampled_once(tmp_path: Path, painter: type[Painter]) -> None:
    trainer(tmp_path, Previews(tmp_path, PROMPTS, 2), max_steps=4).fit(Model(), Batches())
    assert len(painter.calls) == 2


def test_previews_are_sampled_with_the_ema_weights(tmp_path: Path, painter: type[Painter]) -> None:
    ema = EMA(decay=0.5)
    trainer(tmp_path, ema, Previews(tmp_path, PROMPTS, 9)).fit(Model(), Batches())
    averages = torch.cat([average.flatten() for average in ema.averages.values()])
    assert torch.equal(painter.calls[0][2], averages)


def test_tensorboard_gets_the_preview_at_the_step_of_its_scalars(tmp_path: Path, painter: type[Painter]) -> None:
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    trainer(tmp_path, Previews(tmp_path, PROMPTS, 9), logger=logger).fit(Model(), Batches())
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    (image,) = events.Reload().Images("samples")
    with Image.open(tmp_path / "step_000004.png") as preview:
        assert (image.step, image.width, image.height) == (3, *preview.size)  # counted from 0


def test_previews_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs at least one prompt"):
        Previews(tmp_path, [], every_n_train_steps=5)


def test_without_prompts_the_captions_of_the_validation_set_are_previewed(tmp_path: Path) -> None:
    previews = Previews(tmp_path, None, every_n_train_steps=9)
    fit(tmp_path, diffusion(size=(16, 16)), 1, callbacks=[previews], side=16)
    assert previews.prompts == [*CAPTIONS]
    assert read_metadata(tmp_path / "step_000001.png")["prompts"] == [*CAPTIONS]
