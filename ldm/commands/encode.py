"""`ldm encode`: shards of pictures into latents, for data=latents."""

import argparse
import os
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.latents.caption_states import CaptionEncoder
from ldm.data.latents.encoding import Encode, EncodingJob, encode_shards, finish
from ldm.data.sources.buckets import Size, bucket_sizes
from ldm.data.sources.shards import Shards, find_tars
from ldm.errors import UsageError
from ldm.image import WHITE
from ldm.nn.vae import VAE
from ldm.ownership import check_outside
from ldm.progress import Progress
from ldm.weights.parts import Frozen, encoder, first_stage, text_encoder

NUMBERS = (
    ("size", 64, 1, "pixels a side; the short side is scaled to it, the long side cropped around the centre"),
    (
        "buckets",
        0,
        0,
        "step in pixels of the sides of aspect-ratio buckets, such as 64; 0 makes squares of all pictures",
    ),
    ("batch", 32, 1, "pictures a batch"),
    ("workers", min(4, os.cpu_count() or 1), 0, "processes that decode while others are encoded; 0 takes turns"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Encode the pictures of shards once, for training with data=latents data.cache=DIR. The same command goes on "
        "where it was stopped, shard by shard; under torchrun or SLURM each rank takes its own shards. Latents are of "
        "the picture as it is: mirror images and random crops are not to be had from them."
    )
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="tars, patterns such as 'x-{000..099}.tar', folders"
    )
    parser.add_argument(
        "--first-stage",
        default="assets:vae.safetensors",
        metavar="FILE",
        help="the autoencoder: a file, a diffusers folder or a whole model (default: the small one that ships)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the cache")
    parser.add_argument(
        "--captions",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="where captions are, all of which are kept: extensions such as txt or alt.txt, txt:lines (one a line), "
        "json:FIELD (a string or a list) (default: txt, or else the caption in json)",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="FILE",
        help="also keep the states of all captions, for data=latents_and_text: of Stable Diffusion 1.x 118 kB a "
        "caption, where its latents take 66 kB a picture (default: none, and training runs the encoder)",
    )
    parser.add_argument(
        "--text-dtype", choices=("float16", "float32"), help="of the states (default: float16, to 3 digits)"
    )
    for name, default, _, unit in NUMBERS:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{unit} (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """ValueError or OSError in one sentence on failure; unreadable samples are listed by file, and one if all are."""
    for name, _, least, _ in NUMBERS:
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)}: expected {least} or more")
    if args.text_dtype and not args.text_encoder:
        raise UsageError(f"--text-dtype {args.text_dtype} is of the states that --text-encoder FILE makes: give both")
    for given in args.shards:
        check_outside(args.out, given, "--out", "shards")
    rank, world, local = ranks()
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    stage = first_stage(args.first_stage)
    if args.size % stage.network.factor:
        raise UsageError(
            f"--size {args.size}: expected a multiple of {stage.network.factor}, the factor of its latents"
        )
    if args.buckets % stage.network.factor:
        raise UsageError(f"--buckets {args.buckets}: expected a multiple of {stage.network.factor}, or 0")
    sizes = bucket_sizes(args.size, args.buckets) if args.buckets else []
    text = CaptionEncoder(text_encoder(args.text_encoder), args.text_dtype or "float16") if args.text_encoder else None
    files = find_tars(args.shards)
    own, others = files[rank::world], [file for k, file in enumerate(files) if k % world != rank]
    if not own:
        print(f"rank {rank} of {world} has nothing to do: there are {len(files)} shards")
        return
    shards = Shards(own, args.size, buckets=sizes, captions=args.captions, others=others)
    job = EncodingJob(files, shards, args.out, _settings(args, stage, sizes, text))
    todo = job.todo()
    if len(todo) < len(own):
        print(f"going on after {len(own) - len(todo)} of {len(own)} shards", flush=True)
    progress = Progress(sum(len(job.shards.rows(shard)) for shard in todo), "pictures")
    if text and todo:
        print(text.size_message(progress.total), flush=True)
    encode, began = Timed(encoder(stage)), time.monotonic()
    for count in encode_shards(job, encode, args.batch, args.workers, text):
        progress.step(count)
    if progress.done:
        rate = progress.done / (time.monotonic() - began)
        own_rate = encode.pictures / encode.seconds if encode.seconds else 0.0
        share = f", {rate / own_rate:.0%} of the encoder's own {own_rate:,.4g}" if own_rate else ""
        print(f"{rate:,.4g} pictures/s{share}")
    manifest = finish(job)
    if manifest is None:
        print(f"rank {rank} of {world} is done; the last rank writes the manifest")
        return
    _tell(manifest, args)


def _settings(
    args: argparse.Namespace, stage: Frozen[VAE], sizes: Sequence[Size], text: CaptionEncoder | None
) -> dict[str, Any]:
    """What decides the cache."""
    return {
        "first_stage": stage.source["fingerprint"],
        "scale": stage.network.config["scale"],
        "resolution": [args.size, args.size],
        **({"buckets": [list(size) for size in sizes]} if sizes else {}),
        "captions": args.captions,
        "crop": "center",
        "background": list(WHITE),
        "dtype": "float16",
        **(text.settings if text else {}),
        "version": _version(),
    }


def _tell(manifest: dict[str, Any], args: argparse.Namespace) -> None:
    """What there is now; ValueError if nothing could be used."""
    if manifest["quarantined"] and not manifest["samples"]:
        raise ValueError(
            f"none of {manifest['quarantined']:,} samples could be used: see {args.out}/*.quarantine.jsonl"
        )
    print(f"{manifest['samples']:,} latents in {len(manifest['shards'])} shards of {args.out}")
    if args.text_encoder:
        print("train on them with data=latents_and_text")
    if args.buckets:
        print("train on them with data.bucketed=true and data.global_batch=N")
    if manifest["quarantined"]:
        print(f"{manifest['quarantined']:,} samples could not be used: see {args.out}/*.quarantine.jsonl")


def _version() -> str:
    try:
        return version("ldm")
    except PackageNotFoundError:
        return "not installed"


class Timed:
    """`encode`, with the pictures it had and the seconds it took."""

    def __init__(self, encode: Encode) -> None:
        self.encode, self.pictures, self.seconds = encode, 0, 0.0

    def __call__(self, pictures: Tensor) -> Tensor:
        began = time.perf_counter()
        moments = self.encode(pictures)
        self.seconds += time.perf_counter() - began
        self.pictures += len(pictures)
        return moments


def ranks() -> tuple[int, int, int]:
    """Rank, number of ranks and rank on this machine, as torchrun or else SLURM says; (0, 1, 0) without them."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if names[0] in os.environ and names[1] in os.environ:
            rank, world, local = (int(os.environ.get(name, 0)) for name in names)
            if not 0 <= rank < world:
                raise ValueError(f"{names[0]}={rank} and {names[1]}={world}: expected a rank below the number of ranks")
            return rank, world, local
    return 0, 1, 0
