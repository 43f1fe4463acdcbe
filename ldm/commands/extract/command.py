"""Implements `ldm extract`, which makes a LoRA from the difference of two models."""

import argparse
from pathlib import Path
from typing import Any, cast

from ldm.adapters.change import Change
from ldm.adapters.targets import Network
from ldm.errors import UsageError
from ldm.progress import Progress
from ldm.weights.adapters.extraction import Extracted, count, extract
from ldm.weights.adapters.names import TEXT, UNET, public_names
from ldm.weights.adapters.reader import networks_of
from ldm.weights.adapters.writer import write_adapter
from ldm.weights.contents import Contents, open_contents
from ldm.weights.convert import with_frozen_parts
from ldm.weights.destination import check_apart, check_replaceable, sources_of
from ldm.weights.kinds import ADAPTER, BACKBONES
from ldm.weights.model import read_model


def run(args: argparse.Namespace) -> None:
    if args.out.suffix != ".safetensors":
        raise UsageError(
            f"--out {args.out}: a LoRA is written to a .safetensors file, give one such as lora.safetensors"
        )
    base, tuned = open_contents(args.base), open_contents(args.tuned)
    check_replaceable(args.out, args.overwrite)
    check_apart(args.out, [*sources_of(base), *sources_of(tuned)])
    ours, theirs = networks_in(base, args.base), networks_in(tuned, args.tuned)
    check_alike(ours, theirs, args.base, args.tuned)
    shared = [name for name in ours if name in theirs]
    progress = Progress(sum(count(ours[name], args.targets) for name in shared), "layers")
    found = {name: extract(ours[name], theirs[name], args.rank, args.targets, progress.step) for name in shared}
    changes = {name: _public(ours[name], one) for name, one in found.items() if one.changes}
    if not changes:
        raise ValueError(
            f"{args.tuned} differs from {args.base} in none of the chosen layers: there is nothing to extract"
        )
    write_adapter(args.out, changes, args.to, _metadata(base, args))
    for line in report(found):
        print(line)
    for name in [*ours, *theirs]:
        if name not in shared:
            print(f"{name}: not compared, because only {args.base if name in ours else args.tuned} contains it")
    print(args.out)


def networks_in(contents: Contents, path: str) -> dict[str, Network]:
    """Returns the denoising network and, if the model contains one, the text encoder, in float32."""
    if ADAPTER in contents.networks:
        model = read_model(path)
        return networks_of(model.backbone, model.text_encoder.network)
    names, networks = {**dict.fromkeys(BACKBONES, UNET), "text_tower": TEXT}, with_frozen_parts(contents).networks
    found = {names[kind]: cast(Network, network.load()) for kind, network in networks.items() if kind in names}
    if not found:
        raise ValueError(f"{path} holds neither a denoising network nor a text encoder: give a model")
    return found


def check_alike(ours: dict[str, Network], theirs: dict[str, Network], base: str, tuned: str) -> None:
    """Raises ValueError if the models share no network or a shared network differs in architecture."""
    if not ours.keys() & theirs.keys():
        raise ValueError(f"{base} holds {', '.join(ours)} and {tuned} {', '.join(theirs)}: give two models of one kind")
    for name in ours.keys() & theirs.keys():
        one, two = _shapes(ours[name]), _shapes(theirs[name])
        for tensor in dict.fromkeys([*one, *two]):
            if one.get(tensor) != two.get(tensor):
                raise ValueError(
                    f"the {name} of {base} has another architecture than that of {tuned}: {tensor} is "
                    f"{one.get(tensor, 'absent')} there and {two.get(tensor, 'absent')} here"
                )


def _shapes(network: Network) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def _public(network: Network, found: Extracted) -> dict[str, Change]:
    kind = getattr(network, "kind", "text_tower")
    names = public_names(kind, network.config, list(found.changes))
    return {names[own]: change for own, change in found.changes.items()}


def _metadata(base: Contents, args: argparse.Namespace) -> dict[str, str]:
    metadata: dict[str, Any] = {
        "ss_sd_model_name": Path(args.base).name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"{Path(args.tuned).name} as a LoRA of {Path(args.base).name}",
    }
    network = base.networks.get(base.backbone or "")
    licence = network.tensors.metadata.get("modelspec.license") if network else None
    return metadata | ({"modelspec.license": licence} if isinstance(licence, str) else {})


def report(found: dict[str, Extracted]) -> list[str]:
    """Returns one line for each network about the difference that the LoRA leaves."""
    lines = []
    for name, one in found.items():
        if not one.total:
            lines.append(f"{name}: no difference")
            continue
        left = f"; {len(one.others)} tensors that it cannot change hold {_share(one.left_out, one)} of it"
        lines.append(
            f"{name}: {len(one.changes)} layers; {one.error:.2%} of the difference's norm is missing"
            + (left if one.others else "")
        )
    return lines


def _share(square: float, one: Extracted) -> str:
    return f"{(square / one.total) ** 0.5:.2%}"
