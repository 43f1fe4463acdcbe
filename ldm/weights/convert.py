"""From any of the formats that `recognise` knows to any that other tools read."""

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
from ldm.weights.keymaps import LAYOUTS, NATIVE
from ldm.weights.model import PARTS, check_same, referenced, references
from ldm.weights.native import fingerprint, write_network
from ldm.weights.storage.tensors import PICKLED
from ldm.weights.storage.values import verified as verified_tensors

FORMATS = ("single", "diffusers", "ldm")


def gathered(contents: Contents) -> Contents:
    """A model of ours together with the frozen parts that it only names, which are checked to be those."""
    if contents.base:
        raise ValueError(
            f"{contents.source} is an adapter of {contents.base['weights']}, and no model that could be converted; "
            "give the whole model"
        )
    if not references(contents.model):
        return contents
    networks, pad = dict(contents.networks), contents.pad
    for name, kind in zip(PARTS, ("vae", "text_tower"), strict=True):
        found, _ = referenced(contents, name)
        networks[kind], pad = found.network(kind), found.pad
        check_same(contents, name, _mark(networks[kind]))
    model = {key: value for key, value in contents.model.items() if key not in PARTS}
    return replace(contents, networks=networks, model=model, pad=pad)


def part(contents: Contents, kind: str) -> Contents:
    """One network alone."""
    return replace(contents, networks={kind: contents.network(kind)}, model={})


def verified(
    contents: Contents, dtype: torch.dtype | None = None, on_read: Callable[[int], None] = lambda _: None
) -> Contents:
    """The same, its floats cast to `dtype` if given. Raises ValueError for tensors that do not fit their network."""
    networks = {}
    for kind, network in contents.networks.items():
        network.check()
        networks[kind] = replace(network, tensors=verified_tensors(network.tensors, dtype, on_read))
    return replace(contents, networks=networks)


def format_of(path: Path) -> str:
    """A file's ending means a single file, no ending a diffusers folder. Raises ValueError for another ending."""
    if path.suffix in (".safetensors", *PICKLED):
        return "single"
    if path.suffix and not path.is_dir():
        raise ValueError(f"{path} ends in {path.suffix}, but weights are written to .safetensors, .ckpt or a folder")
    return "diffusers"


def write(contents: Contents, path: Path, to: str, shard: int | None = None, overwrite: bool = False) -> None:
    """Write `contents` to a file or a folder that appears whole or not at all; a folder with a record of its files.

    Raises ValueError as `check_apart`, and for what the format cannot hold; FileExistsError as `check_replaceable`.
    """
    recover_folder(path)
    check_apart(path, sources_of(contents))
    check_replaceable(path, overwrite)
    check_writable(path.parent)
    is_file = format_of(path) == "single"
    own = [kind for kind in contents.networks if kind not in LAYOUTS]
    if to != "ldm" and own:
        raise ValueError(f"{contents.source} holds a {own[0]}, which only files of ldm can hold: give --to ldm")
    if to == "single" and is_file:
        return write_file(path, contents)
    if to == "ldm" and is_file and len(contents.networks) == 1:
        return _write_native(path, next(iter(contents.networks)), contents)
    if is_file or to == "single":
        raise ValueError(
            f"{path} is a {'file' if is_file else 'folder'}, but --to {to} writes a {'folder' if is_file else 'file'} "
            f"here; give {'a name without an ending' if is_file else 'a .safetensors or .ckpt'}"
        )
    with atomic_folder(path) as folder:
        if to == "diffusers":
            write_folder(folder, contents, shard)
        else:
            _write_native_folder(folder, contents)
        Record(folder, "convert").write_all()
        check_replaceable(path, overwrite)  # again, as it took a while


def _write_native(path: Path, kind: str, contents: Contents, **about: Any) -> None:
    network = contents.networks[kind]
    if kind == "text_tower":
        about |= {"pad": contents.pad}
    if kind == "image_tower":
        about |= {"pixels": asdict(contents.pixels)}
    write_network(path, kind, network.full_config, network.arranged(NATIVE), **about)


def _write_native_folder(folder: Path, contents: Contents) -> None:
    """The denoising network's file names the other two, beside it, with their fingerprints."""
    for kind in contents.networks:
        if kind != contents.backbone:
            _write_native(folder / f"{kind}.safetensors", kind, contents)
    if contents.backbone is None:
        return
    sources = {}
    for name, kind in zip(PARTS, ("vae", "text_tower"), strict=True):
        written = open_contents(folder / f"{kind}.safetensors").network(kind)
        sources[name] = {"weights": f"./{kind}.safetensors", "fingerprint": _mark(written)}
    _write_native(
        folder / f"{contents.backbone}.safetensors", contents.backbone, contents, model=contents.model | sources
    )


def _mark(network: StoredNetwork) -> str:
    """The fingerprint of a frozen part as it is used, in float32."""
    return fingerprint(network.load().state_dict())
