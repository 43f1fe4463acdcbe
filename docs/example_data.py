"""Writes small files on which `.ci/docs` runs the commands of these pages: python docs/example_data.py KIND PATH."""

import gzip
import json
import sys
from pathlib import Path

from PIL import Image
from pyarrow import Table, csv, parquet

from ldm.data.sources.shapes import Shapes

COUNT = 80
PARTS = """import torch

from ldm.diffusion.schedule import Discrete, table
from ldm.diffusion.weighting import Weighting


def bell(width: float = 2.0) -> Weighting:
    return Weighting("bell", "output", lambda log_snr: 0.1 + torch.exp(-((log_snr / width) ** 2)), {"width": width})


def gentle(power: float = 2.0, steps: int = 1000) -> Discrete:
    left = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
    alpha_bar = left**power
    return table(1 - alpha_bar[1:] / alpha_bar[:-1])
"""
GENTLE = """_target_: my_parts.gentle
power: 2.0
steps: 1000
"""


def images(folder: Path, extension: str = "png") -> dict[str, str]:
    """Writes images of shapes, and returns their captions by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for index in range(COUNT):
        sample, name = Shapes(seed=9)[index], f"{index:012d}.{extension}"
        Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(folder / name)
        captions[name] = sample["caption"]
    return captions


def plain(path: Path) -> None:
    images(path)


def captioned(path: Path) -> None:
    for name, caption in images(path).items():
        (path / name).with_suffix(".txt").write_text(caption)


def coco(path: Path) -> None:
    captions = images(path / "train2017", "jpg")
    listed = [{"id": k, "file_name": name} for k, name in enumerate(captions)]
    annotations = [{"id": k, "image_id": k, "caption": caption} for k, caption in enumerate(captions.values())]
    (path / "annotations").mkdir(exist_ok=True)
    (path / "annotations" / "captions_train2017.json").write_text(
        json.dumps({"images": listed, "annotations": annotations})
    )


def kohya(path: Path) -> None:
    images(path / "3_sks ring")


def tutorial(path: Path) -> None:
    (path / "my_parts.py").write_text(PARTS)
    for file, text in (
        ("weighting/bell.yaml", "_target_: my_parts.bell\nwidth: 2.0\n"),
        ("schedule/gentle.yaml", GENTLE),
    ):
        (path / "my_conf" / file).parent.mkdir(parents=True, exist_ok=True)
        (path / "my_conf" / file).write_text(text)


def sampling(path: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(path / "MASK.png")
    (path / "prompts.csv").write_text("prompt,seed,n\na red circle on a white background,3,2\n")


def laion(path: Path) -> None:
    scores = {"similarity": 0.3, "punsafe": 0.1, "pwatermark": 0.2, "AESTHETIC_SCORE": 6.75}
    table = rows("URL", "TEXT", WIDTH=640, HEIGHT=512, **scores)
    (path / "metadata").mkdir(exist_ok=True)
    parquet.write_table(table, path / "metadata" / "part-00000.parquet")
    csv.write_csv(table.select(["URL", "TEXT", "WIDTH", "HEIGHT"]), path / "mine.csv")
    (path / "mine.csv.gz").write_bytes(gzip.compress((path / "mine.csv").read_bytes()))
    (path / "mine.csv").unlink()


def datacomp(path: Path) -> None:
    path.mkdir(exist_ok=True)
    scores = {"clip_b32_similarity_score": 0.31, "clip_l14_similarity_score": 0.3, "sha256": "e3b0", "uid": "a1fa"}
    parquet.write_table(rows("url", "text", original_width=640, original_height=512, **scores), path / "part.parquet")


def coyo(path: Path) -> None:
    path.mkdir(exist_ok=True)
    scores = {
        **{"clip_similarity_vitb32": 0.4, "clip_similarity_vitl14": 0.3, "nsfw_score_opennsfw2": 0.01},
        **{
            "nsfw_score_gantman": 0.01,
            "watermark_score": 0.1,
            "aesthetic_score_laion_v2": 6.6,
            "image_phash": "c9",
            "id": 1,
        },
    }
    parquet.write_table(rows("url", "text", width=640, height=512, **scores), path / "part.parquet")


def cc12m(path: Path) -> None:
    lines = [f"https://example.org/{k}.jpg\ta photo of boat number {k} in a harbour\n" for k in range(COUNT)]
    (path / "cc12m.tsv").write_text("".join(lines))


def rows(url: str, text: str, **values: float | str) -> Table:
    columns = {url: [f"https://example.org/{k}.jpg" for k in range(COUNT)]}
    columns[text] = [f"a photo of boat number {k} in a harbour" for k in range(COUNT)]
    return Table.from_pydict(columns | {name: [value] * COUNT for name, value in values.items()})


KINDS = plain, captioned, coco, kohya, tutorial, sampling, laion, datacomp, coyo, cc12m


def main() -> None:
    kinds = {each.__name__: each for each in KINDS}
    kinds[sys.argv[1]](Path(sys.argv[2]))


if __name__ == "__main__":
    main()
