"""The networks that ship with ldm reach the figures of their model cards."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.data.sources.phrasing import parse
from ldm.data.sources.shapes import held_out_prompts, place, render
from ldm.metrics.clip_score import clip_similarity
from ldm.metrics.composition import accuracy
from ldm.pipeline.pipeline import Pipeline

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def test_the_shipped_clip_distinguishes_left_from_right_and_above_from_below() -> None:
    score = clip_similarity("assets:image_tower.safetensors", "assets:text_tower.safetensors")
    rng = np.random.default_rng(0)
    scenes = [scene for prompt in held_out_prompts(100) if (scene := parse(prompt)).relation]
    mirrored = [replace(scene, relation=OPPOSITE[str(scene.relation)]) for scene in scenes]
    pixels = np.stack([render(place(scene, rng), scene.background) for scene in scenes])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    right, wrong = (score(images, [scene.caption for scene in described]) for described in (scenes, mirrored))
    assert len(scenes) > 40 and (right > wrong).double().mean() >= 0.99


@pytest.mark.slow
def test_the_shipped_unet_follows_held_out_prompts() -> None:
    prompts = held_out_prompts(48)
    measured = accuracy(Pipeline.load()(prompts, seeds=list(range(48))).images, prompts)
    assert measured["accuracy"] >= 0.9 and measured["relation"] >= 0.95
