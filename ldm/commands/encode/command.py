"""`ldm encode`: encodes the images of shards into a cache of latents for data=latents."""

import argparse
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from ldm.commands.encode.arguments import NUMBERS
from ldm.data.latents.caption_states import CaptionEncoder
from ldm.data.latents.encoding import Encode, encode_shards, finish
from ldm.data.latents.job import EncodingJob
from ldm.data.sources.buckets import Size, bucket_sizes
from ldm.data.sources.shards import Shards, find_tars
from ldm.device import device_of_rank, ranks
from ldm.errors import UsageError
from ldm.image import WHITE
from ldm.nn.vae import VAE
from ldm.ownership import check_outside
from ldm.progress import Progress
from ldm.weights.parts import Encoder, Frozen, first_stage, text_encoder


def run(args: argparse.Namespace) -> None:
    """Encodes the shards of this rank. Raises ValueError or OSError if encoding fails or no sample is readable.

    Unreadable samples are listed in the quarantine file of their shard.
    """
    for name, _, least, _ in NUMBERS:
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)}: expected {least} or more")
    if args.text_dtype and not args.text_encoder:
        raise UsageError(
            f"--text-dtype {args.text_dtype} is the type of the states of --text-encoder FILE: give --text-encoder too"
        )
    for given in args.shards:
        check_outside(args.out, given, "--out", "shards")
    rank, world, local = ranks()
    device_of_rank("auto", local)
    stage = first_stage(args.first_stage)
    if args.size % stage.network.factor:
        raise UsageError(
            f"--size {args.size}: expected a multiple of {stage.network.factor}, the autoencoder's downsampling factor"
        )
    if args.buckets % stage.network.factor:
        raise UsageError(f"--buckets {args.buckets}: expected a multiple of {stage.network.factor}, or 0")
    sizes = bucket_sizes(args.size, args.buckets) if args.buckets else []
    text = CaptionEncoder(text_encoder(args.text_encoder), args.text_dtype or "float16") if args.text_encoder else None
    files = find_tars(args.shards)
    own, others = files[rank::world], [file for k, file in enumerate(files) if k % world != rank]
    if not own:
        print(f"rank {rank} of {world} has no shards to encode: there are only {len(files)}")
        return
    shards = Shards(own, args.size, buckets=sizes, captions=args.captions, others=others)
    job = EncodingJob(files, shards, args.out, _settings(args, stage, sizes, text))
    pending = job.pending()
    todo = pending.shards
    if len(todo) < len(own):
        print(f"resuming after {len(own) - len(todo)} of {len(own)} shards", flush=True)
    if pending.damaged:
        names = ", ".join(own[shard].name for shard in pending.damaged)
        print(f"the latents of {names} are truncated or corrupt, and are encoded again", flush=True)
    progress = Progress(sum(len(job.shards.rows(shard)) for shard in todo), "images")
    if text and todo:
        print(text.size_message(progress.total), flush=True)
    encode, start = Timed(Encoder(stage)), time.monotonic()
    for count in encode_shards(job, todo, encode, args.batch, args.workers, text):
        progress.step(count)
    if progress.done:
        rate = progress.done / (time.monotonic() - start)
        encoder_rate = encode.images / encode.seconds if encode.seconds else 0.0
        share = f", {rate / encoder_rate:.0%} of the {encoder_rate:,.4g} of the encoder alone" if encoder_rate else ""
        print(f"{rate:,.4g} images/s{share}")
    manifest = finish(job)
    if manifest is None:
        print(f"rank {rank} of {world} is done; the last rank to finish writes the manifest")
        return
    _print_summary(manifest, args)


def _settings(
    args: argparse.Namespace, stage: Frozen[VAE], sizes: Sequence[Size], text: CaptionEncoder | None
) -> dict[str, Any]:
    """Returns the settings that determine the content of the cache, for its manifest."""
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


def _print_summary(manifest: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the content of the cache. Raises ValueError if no sample was usable."""
    if manifest["quarantined"] and not manifest["samples"]:
        raise ValueError(
            f"none of {manifest['quarantined']:,} samples could be used; for reasons see {args.out}/*.quarantine.jsonl"
        )
    print(f"{manifest['samples']:,} latents in {len(manifest['shards'])} shards of {args.out}")
    if args.text_encoder:
        print("to train on them, set data=latents_and_text")
    if args.buckets:
        print("to train on them, set data.bucketed=true and data.global_batch=N")
    if manifest["quarantined"]:
        print(f"{manifest['quarantined']:,} samples could not be used, see {args.out}/*.quarantine.jsonl")


def _version() -> str:
    try:
        return version("ldm")
    except PackageNotFoundError:
        return "not installed"


class Timed:
    """Wraps `encode` and counts the images and seconds."""

    def __init__(self, encode: Encode) -> None:
        self.encode, self.images, self.seconds = encode, 0, 0.0

    def __call__(self, images: Tensor) -> Tensor:
        start = time.perf_counter()
        moments = self.encode(images)
        self.seconds += time.perf_counter() - start
        self.images += len(images)
        return moments
