import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn.clip import CLIP, ImageTower, TextTower
from ldm.nn.tokenizer import Tokenizer
from ldm.training.clip import ClipTraining
from ldm.training.optim import constant
from ldm.weights import native
from tests.tiny import KNOWN
from tests.training.tiny import ADAM, CAPTIONS, batch, fit, logged

TOKENIZER = Tokenizer(context=16)


def training() -> ClipTraining:
    torch.manual_seed(0)
    tokens = sorted(set(TOKENIZER([KNOWN]).flatten().tolist()))
    text = TextTower(width=16, layers=1, heads=2, context=16, projection=8, token_ids=tokens)
    return ClipTraining(CLIP(text, ImageTower(8, 4, 16, 1, 2, projection=8)), TOKENIZER, ADAM, constant())


def with_similarities(module: ClipTraining, logits: Tensor) -> None:
    module.clip.forward = lambda tokens, images: logits  # type: ignore[method-assign]


def test_the_loss_on_distinct_captions_is_that_of_clip() -> None:
    module, images = training(), batch(0, 1, 2, 3)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with_similarities(module, logits)
    own = torch.arange(4)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(module.training_step(images, 0), expected)
    torch.testing.assert_close(logged(module), {"train/loss": expected})


def test_all_images_of_the_same_caption_count_as_matches() -> None:
    module, images = training(), batch(0, 1, 4, 5)  # captions 0 1 0 1
    same = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]] * 2).bool()
    with_similarities(module, torch.where(same, 30.0, -30.0))
    torch.testing.assert_close(module.training_step(images, 0), torch.tensor(2.0).log())  # two equal matches


def test_similarities_do_not_depend_on_the_padding_of_captions() -> None:
    module, images = training(), batch(0, 1, 2, 3)
    logits, same = module.similarities(images)
    expected = module.clip(TOKENIZER(CAPTIONS), images["image"].float() / 127.5 - 1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(same, torch.eye(4).bool())


def test_tokens_in_the_batch_are_used(monkeypatch: Any) -> None:
    module, images = training(), batch(0, 1, 2, 3)
    expected = module.similarities(images)[0]
    images["tokens"] = module.tokenize(CAPTIONS)
    monkeypatch.setattr(TOKENIZER, "_bpe", None)
    assert torch.equal(module.similarities(images)[0], expected)


def test_validation_logs_the_shares_of_captions_and_images_matched_correctly(tmp_path: Path, monkeypatch: Any) -> None:
    module, seen = training(), dict[str, Tensor]()
    monkeypatch.setattr("ldm.training.clip.log_validation", lambda module, index, values: seen.update(values))
    nearest = torch.tensor([[2, 1, 0, 0], [0, 2, 0, 1], [0, 0, 2, 3], [0, 0, 3, 2]])
    with_similarities(module, nearest.float())
    module.validation_step(batch(0, 1, 2, 3), 0)
    assert seen["picture_found"].tolist() == [True, True, False, False]
    assert seen["caption_found"].tolist() == [True, True, False, False]


def test_training_increases_the_similarity_of_matching_pairs(tmp_path: Path) -> None:
    module = training()
    images = batch(*range(4))
    before = F.cross_entropy(module.similarities(images)[0], torch.arange(4))
    trainer = fit(tmp_path, module, steps=20)
    assert F.cross_entropy(module.similarities(images)[0], torch.arange(4)) < before
    assert {"val/pictures/picture_found", "val/pictures/caption_found"} <= trainer.callback_metrics.keys()


def test_the_logit_scale_is_at_most_100_at_every_step(tmp_path: Path) -> None:
    module, scales = training(), list[float]()
    module.clip.logit_scale.data.fill_(9.0)
    forward = module.clip.forward
    module.clip.forward = lambda *x: scales.append(module.clip.logit_scale.item()) or forward(*x)  # type: ignore[func-returns-value, method-assign]
    fit(tmp_path, module, steps=1, limit_val_batches=0)
    assert math.isclose(scales[0], math.log(100), rel_tol=1e-6)


def test_the_exported_files_are_the_two_towers() -> None:
    module = training()
    towers = {"text_tower": module.clip.text, "image_tower": module.clip.image}
    for file, (name, tower) in zip(module.exported_files(), towers.items(), strict=True):
        assert file.name == name and file.about == {"kind": name, "config": tower.config}
        assert native.fingerprint(file.state) == native.fingerprint(tower.state_dict())
