"""Our own file of one network: safetensors whose metadata holds the architecture as plain data.

Opening one builds the class that its `kind` names from a closed list; nothing else in the file is ever run.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from inspect import isfunction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.weights.about import about_of
from ldm.weights.kinds import constructor
from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.tensors import Tensors, locate, refuse_misfits
from ldm.weights.storage.values import check_finite, held, raw, write_safetensors

INITIALISERS = {function for function in vars(nn.init).values() if isfunction(function)}


def save_network(
    path: str | Path,
    kind: str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
    **about: Any,
) -> None:
    """Write tensors and architecture atomically; `about` is any more plain data to keep beside them, and `metadata`
    what other tools read."""
    write_network(path, kind, config, held(Path(path), state), metadata, **about)


def write_network(
    path: str | Path,
    kind: str,
    config: dict[str, Any],
    tensors: Tensors,
    metadata: Mapping[str, str] = MappingProxyType({}),
    **about: Any,
) -> None:
    """The same of tensors that are still on disk."""
    told = json.dumps({"kind": kind, "config": config, **about}, ensure_ascii=False)
    write_safetensors(Path(path), tensors, {**metadata, "ldm": told})


def read_about(path: str | Path) -> dict[str, Any]:
    """What a file of ours says of itself, without reading a tensor. Raises ValueError for any other file."""
    tensors = open_tensors(locate(path))
    if "ldm" not in tensors.metadata:
        raise ValueError(f"{tensors.source} was not written by ldm: its metadata names no architecture")
    return about_of(tensors)


class WithoutInitialisation(TorchFunctionMode):
    """Passes over torch.nn.init, which on the meta device does nothing, but takes seconds to do so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INITIALISERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(about: dict[str, Any], source: object) -> nn.Module:
    """The network that `about` describes, on the meta device. Raises ValueError for unfit settings."""
    try:
        with torch.device("meta"), WithoutInitialisation():
            network: nn.Module = constructor(about["kind"])(**about["config"])
            return network
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{source} describes no network that this ldm can build ({error})") from error


def load_network(path: str | Path, kind: str, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """The network in `path`, in evaluation mode; `dtype` None keeps the file's. ValueError if it is no `kind`."""
    file, about = locate(path), read_about(path)
    if about["kind"] != kind:
        raise ValueError(f"{file} holds a {about['kind']}, but a {kind} is needed here; give the file of one")
    network = build(about, file)
    tensors = open_tensors(file)
    return fill(network, tensors.read(tensors), file, dtype).eval()


def fill(network: nn.Module, state: dict[str, Tensor], source: object, dtype: torch.dtype | None = None) -> nn.Module:
    """`network` with its parameters replaced by `state`. Raises ValueError as `check_fits`, and for NaN."""
    check_fits(network, state, source)
    cast = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    for name, tensor in cast.items():
        check_finite(name, tensor, source)
    network.load_state_dict(cast, assign=True)
    return network


def check_fits(network: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Raises ValueError that lists every tensor of `state` that is missing, unexpected or of another shape."""
    expected = network.state_dict()
    refuse_misfits(
        source,
        type(network).__name__,
        missing=expected.keys() - state.keys(),
        unexpected=state.keys() - expected.keys(),
        misshapen=[
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    )


def fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 of names, types and bytes: the same for the same weights, whatever file they lie in."""
    return fingerprint_of(sorted(state.items()))


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The same of tensors in the order of their names, each of which may go when the next one comes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()
