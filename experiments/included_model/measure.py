"""Measures the included model on what people type, and writes the figures and a grid of images.

    python -m experiments.included_model.measure EMOJI [--model runs/NAME] [--tower image.safetensors text.safetensors]

EMOJI is the folder that `ldm emoji` wrote. Run it from the checkout. Three sets of prompts are measured: `held_out`,
the canonical captions of the default run's evaluation; `plain`, every colour and shape with no more than an article;
`emoji`, the names of 100 training emoji. Shapes are judged by the composition metric. The image of an emoji is right if
the CLIP towers find its own name the most similar among the 100.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.sources.phrasing import plain_prompts, with_article
from ldm.data.sources.shapes import held_out_prompts
from ldm.data.sources.shards import Shards
from ldm.data.sources.split import Split
from ldm.files import write_json
from ldm.image import grid, to_pil
from ldm.metrics.clip_score import ClipSimilarity, clip_similarity
from ldm.metrics.composition import accuracy
from ldm.pipeline.pipeline import Pipeline

HERE = Path(__file__).parent
ONE = "a red circle"
SHOWN = ("a cat face", "a red heart", "a slice of pizza")
NAMES = 100


def emoji_names(folder: Path) -> list[str]:
    """Returns the names of 100 training emoji: those of `SHOWN`, if present, and others in the order of a hash."""
    emoji = Split(Shards(str(folder), 64), "train", every=16)
    captions = {emoji[0, index]["caption"] for index in range(len(emoji))}
    names = sorted(captions, key=lambda name: hashlib.sha256(name.encode()).digest())
    shown = [name for name in names if with_article(name) in SHOWN]
    return [*shown, *(name for name in names if name not in shown)][:NAMES]


def retrieved(similarity: ClipSimilarity, images: Tensor, names: Sequence[str]) -> Tensor:
    """Returns for images (n, 3, h, w) of these n names whether their own name is the most similar."""
    scores = torch.stack([similarity(images, [with_article(name)] * len(images)) for name in names], 1)
    return scores.argmax(1) == torch.arange(len(names))


def measure(
    pipeline: Pipeline, similarity: ClipSimilarity, names: Sequence[str], seeds: int
) -> tuple[dict[str, Any], Tensor]:
    """Returns the figures, and images for the grid: `ONE` and the emoji."""
    held_out, plain = held_out_prompts(512), plain_prompts() * 4
    figures: dict[str, Any] = {
        "held_out": accuracy(pipeline(held_out, batch_size=64).images, held_out),
        "plain": accuracy(pipeline(plain, batch_size=64).images, plain),
    }
    circles = pipeline([ONE] * 100, batch_size=64).images
    figures["a red circle in 100 seeds"] = accuracy(circles, [ONE] * 100)
    found = []
    for seed in range(seeds):
        images = pipeline([with_article(name) for name in names], seeds=[seed] * len(names), batch_size=64).images
        found.append(retrieved(similarity, images, names))
    figures["emoji"] = {"retrieved": torch.stack(found).double().mean().item(), "names": len(names), "seeds": seeds}
    figures["emoji"]["retrieved_by_name"] = dict(zip(names, torch.stack(found).double().mean(0).tolist(), strict=True))
    return figures, torch.cat([circles[:20], images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emoji", type=Path)
    parser.add_argument("--model", default="assets:unet.safetensors")
    parser.add_argument("--tower", nargs=2, default=["assets:image_tower.safetensors", "assets:text_tower.safetensors"])
    parser.add_argument("--seeds", type=int, default=3, help="images per emoji (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    pipeline, similarity = Pipeline.load(args.model), clip_similarity(*args.tower)
    figures, images = measure(pipeline, similarity, emoji_names(args.emoji), args.seeds)
    write_json(args.out / "figures.json", figures)
    grid(to_pil(images), columns=20).save(args.out / "grid.png")
    for name in ("held_out", "plain", "a red circle in 100 seeds"):
        print(f"{name}: {figures[name]['accuracy']:.1%} right")
    print(f"emoji: {figures['emoji']['retrieved']:.1%} of the names retrieved among {NAMES}")


if __name__ == "__main__":
    main()
