"""Converts weights from any format that `recognise` reads to the formats of other tools or of ldm."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ldm.files import atomic_folder, check_writable, recover_folder
from ldm.ownership import Record
from ldm.weights.compvis.writer import write_file
from ldm.weights.contents import Contents, StoredNetwork, open_contents
from ldm.weights.destination import check_apart, check_replaceable, sources_of
from ldm.weights.diffusers.writer import write_folder
from ldm.weights.formats import format_of
from ldm.weights.keymaps import LAYOUTS, NATIVE
from ldm.weights.model import PARTS, check_fingerprint, names_frozen_parts, open_frozen_part
from ldm.weights.native import fingerprint, write_network
from ldm.weights.storage.values import verified as verified_tensors


def with_frozen_parts(contents: Contents) -> Contents:
    """Adds the frozen parts that a model in ldm's own format only names, after checking their fingerprints.

    Raises FileNotFoundError for missing parts, ValueError for changed ones and for adapters.
    """
    if contents.base:
        raise ValueError(
            f"{contents.source} is an adapter of {contents.base['weights']}, and adapters cannot be converted; "
            "give the complete model"
        )
    if not names_frozen_parts(contents.model):
        return contents
    networks, pad = dict(contents.networks), contents.pad
    for name, kind in zip(PARTS, ("vae", "text_tower"), strict=True):
        opened, _ = open_frozen_part(contents, name)
        networks[kind], pad = opened.network(kind), opened.pad
        check_fingerprint(contents, name, _fingerprint(networks[kind]))
    model = {key: value for key, value in contents.model.items() if key not in PARTS}
    return replace(contents, networks=networks, model=model, pad=pad)


def part(contents: Contents, kind: str) -> Contents:
    """Returns only the network of this kind."""
    return replace(contents, networks={kind: contents.network(kind)}, model={})


def verified(
    contents: Contents, dtype: torch.dtype | None = None, on_read: Callable[[int], None] = lambda _: None
) -> Contents:
    """Returns the same contents, whose floats are cast to `dtype` (if given) and checked when they are read.

    Raises ValueError for tensors that do not fit their network.
    """
    networks = {}
    for kind, network in contents.networks.items():
        network.check()
        networks[kind] = replace(network, tensors=verified_tensors(network.tensors, dtype, on_read))
    return replace(contents, networks=networks)


def write(contents: Contents, path: Path, to: str, shard: int | None = None, overwrite: bool = False) -> None:
    """Writes `contents` atomically to a file, or to a folder with a record of its files.

    Raises ValueError as `check_apart` does and for contents that the format cannot represent, and FileExistsError as
    `check_replaceable` does.
    """
    recover_folder(path)
    check_apart(path, sources_of(contents))
    check_replaceable(path, overwrite)
    check_writable(path.parent)
    is_file = format_of(path) == "single"
    own = [kind for kind in contents.networks if kind not in LAYOUTS]
    if to != "ldm" and own:
        raise ValueError(f"{contents.source} holds a {own[0]}, which only ldm's own format can store: give --to ldm")
    if to == "single" and is_file:
        return write_file(path, contents)
    if to == "ldm" and is_file and len(contents.networks) == 1:
        return _write_native(path, next(iter(contents.networks)), contents)
    if is_file or to == "single":
        raise ValueError(
            f"{path} is a {'file' if is_file else 'folder'}, but --to {to} writes a {'folder' if is_file else 'file'} "
            f"here; give {'a path without an extension' if is_file else 'a .safetensors or .ckpt'}"
        )
    with atomic_folder(path) as folder:
        if to == "diffusers":
            write_folder(folder, contents, shard)
        else:
            _write_native_folder(folder, contents)
        Record(folder, "convert").write_all()
        check_replaceable(path, overwrite)  # again, because writing took a while


def _write_native(path: Path, kind: str, contents: Contents, **about: Any) -> None:
    network = contents.networks[kind]
    if kind == "text_tower":
        about |= {"pad": contents.pad}
    if kind == "image_tower":
        about |= {"pixels": asdict(contents.pixels)}
    write_network(path, kind, network.full_config, network.in_layout(NATIVE), **about)


def _write_native_folder(folder: Path, contents: Contents) -> None:
    """Writes a file per network; that of the denoising network names the other two, with their fingerprints."""
    for kind in contents.networks:
        if kind != contents.backbone:
            _write_native(folder / f"{kind}.safetensors", kind, contents)
    if contents.backbone is None:
        return
    sources = {}
    for name, kind in zip(PARTS, ("vae", "text_tower"), strict=True):
        written = open_contents(folder / f"{kind}.safetensors").network(kind)
        sources[name] = {"weights": f"./{kind}.safetensors", "fingerprint": _fingerprint(written)}
    _write_native(
        folder / f"{contents.backbone}.safetensors", contents.backbone, contents, model=contents.model | sources
    )


def _fingerprint(network: StoredNetwork) -> str:
    """Returns the fingerprint of a frozen part in float32, in which it is used."""
    return fingerprint(network.load().state_dict())
