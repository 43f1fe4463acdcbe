"""What ships does what its model card says."""

from dataclasses import replace

import numpy as np
import torch

from ldm.data.sources.phrasing import parse
from ldm.data.sources.shapes import held_out_prompts, place, render
from ldm.metrics.clip_score import clip_similarity
from ldm.metrics.composition import accuracy
from ldm.pipeline.pipeline import Pipeline

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def test_the_clip_tells_left_from_right_and_above_from_below() -> None:
    score = clip_similarity("assets:image_tower.safetensors", "assets:text_tower.safetensors")
    rng = np.random.default_rng(0)
    scenes = [scene for prompt in held_out_prompts(100) if (scene := parse(prompt)).relation]
    mirrored = [replace(scene, relation=OPPOSITE[str(scene.relation)]) for scene in scenes]
    pictures = np.stack([render(place(scene, rng), scene.background) for scene in scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    right, wrong = (score(images, [scene.caption for scene in told]) for told in (scenes, mirrored))
    assert len(scenes) > 40 and (right > wrong).double().mean() >= 0.99


def test_the_unet_draws_what_held_out_prompts_say() -> None:
    prompts = held_out_prompts(48)
    drawn = accuracy(Pipeline.load()(prompts, seeds=list(range(48))).images, prompts)
    assert drawn["accuracy"] >= 0.9 and drawn["relation"] >= 0.95
