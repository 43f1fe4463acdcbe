"""Implements `ldm merge`, which merges adapters into a model and writes the result as a model."""

import argparse
import sys
from dataclasses import replace
from typing import cast

import torch

from ldm.adapters.targets import Network
from ldm.drawing.keys import lora
from ldm.errors import UsageError, warnings_on_stderr
from ldm.progress import Progress
from ldm.weights.adapters.merging import merge_files
from ldm.weights.adapters.names import TEXT, UNET
from ldm.weights.adapters.recognise import adapter_at
from ldm.weights.contents import Contents, open_contents
from ldm.weights.convert import verified, with_frozen_parts, write
from ldm.weights.destination import check_apart, sources_of
from ldm.weights.formats import format_of
from ldm.weights.keymaps import NATIVE
from ldm.weights.kinds import BACKBONES
from ldm.weights.storage.values import in_memory


def run(args: argparse.Namespace) -> None:
    adapters = [_adapter(text) for text in args.adapters]
    contents = with_frozen_parts(open_contents(args.model))
    check_apart(args.out, [*sources_of(contents), *(adapter_at(path) for path, _ in adapters)])
    for note in contents.notes:
        print(note, file=sys.stderr)
    merged = merged_contents(contents, adapters)
    progress = Progress(sum(len(network.tensors) for network in merged.networks.values()), "tensors")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with warnings_on_stderr():
        write(verified(merged, dtype, progress.step), args.out, args.to or format_of(args.out), None, args.overwrite)
    print(args.out)


def _adapter(text: str) -> tuple[str, float]:
    try:
        return lora(text)
    except ValueError as error:
        raise UsageError(f"{text!r} was given, but an adapter must be {error}") from error


def merged_contents(contents: Contents, adapters: list[tuple[str, float]]) -> Contents:
    """Returns the model with adapters merged into its networks. Raises ValueError for adapters of another model."""
    names = {**dict.fromkeys(BACKBONES, UNET), "text_tower": TEXT}
    loaded = {kind: contents.networks[kind].load(None) for kind in contents.networks if kind in names}
    merge_files({names[kind]: cast(Network, network) for kind, network in loaded.items()}, adapters)
    networks = dict(contents.networks)
    for kind, network in loaded.items():
        stored = networks[kind]
        networks[kind] = replace(
            stored,
            config=stored.full_config,
            layout=NATIVE,
            tensors=in_memory(stored.tensors.source, network.state_dict(), stored.tensors.metadata),
        )
    return replace(contents, networks=networks)
