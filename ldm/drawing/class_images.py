"""Samples and caches the class images of prior preservation (Ruiz et al. 2023) from the base model."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ldm.files import write_json
from ldm.image import save_png, to_pil
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.precision import choose_precision, dtype_of
from ldm.progress import Progress
from ldm.weights.model import model_fingerprint, open_model


def class_images(
    model: str,
    prompt: str | Sequence[str],
    count: int,
    size: Sequence[int],
    root: str | Path,
    seed: int = 0,
    batch_size: int = 4,
    device: str = "auto",
) -> Path:
    """Returns a folder with at least `count` images of one or several prompts, after sampling the missing ones.

    The folder's name in `root` is a hash of everything that determines the images: the model's fingerprint, its
    sampling settings, and the arguments except `count`, because image i is sampled with seed + i and prompt i modulo
    the number of prompts, which is also written as its caption. Images are sampled and written in blocks of
    `batch_size`, so that an interrupted run resumes with bit-identical images.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"data.class_images={count}: expected at least 1; for none, choose data=small")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("data.class_prompt is empty: expected one prompt or a list of prompts")
    precision = choose_precision("auto", device)
    about = {
        "model": model_fingerprint(model),
        "sampling": open_model(model).model["sampling"],
        **{"prompts": prompts, "size": [*size], "seed": seed, "batch_size": batch_size, "precision": precision},
    }
    folder = Path(root) / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    blocks = [range(start, start + batch_size) for start in range(0, count, batch_size)]
    missing = [block for block in blocks if not all(_file(folder, index).is_file() for index in block)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder.with_suffix(".json"), {**about, "weights": model})
        pipeline = Pipeline.load(model, device, dtype_of(precision))
        progress = Progress(len(missing) * batch_size, "images", "class images: ")
        for block in missing:
            seeds = [seed + index for index in block]
            captions = [prompts[index % len(prompts)] for index in block]
            result = pipeline(captions, seeds=seeds, batch_size=batch_size, size=(size[0], size[1]))
            made = zip(block, captions, to_pil(result.images), result.settings, strict=True)
            for index, caption, image, settings in made:
                _file(folder, index).with_suffix(".txt").write_text(caption, encoding="utf-8")
                save_png(image, _file(folder, index), settings)
            progress.step(batch_size)
    return folder


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.png"
