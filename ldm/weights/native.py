"""Reads and writes ldm's own format: one network in a safetensors file, with its architecture as plain metadata.

Opening a file builds the class that its `kind` names in a closed list; nothing else in the file is ever run.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from inspect import isfunction, signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.weights.about import about_of
from ldm.weights.kinds import KINDS, constructor
from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.tensors import Tensors, locate, refuse_mismatch
from ldm.weights.storage.values import check_finite, in_memory, raw_bytes, write_safetensors

COUNTS = "blocks", "layers", "depth", "middle_depth"  # settings that count layers
MAX_LAYERS, MAX_WIDTH = 500, 2**20  # SDXL has 60 layers, counted as below
INITIALISERS = {function for function in vars(nn.init).values() if isfunction(function)}


def save_network(
    path: str | Path,
    kind: str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
    **about: Any,
) -> None:
    """Writes tensors and architecture atomically; `about` is further plain data, `metadata` is for other tools."""
    write_network(path, kind, config, in_memory(Path(path), state), metadata, **about)


def write_network(
    path: str | Path,
    kind: str,
    config: dict[str, Any],
    tensors: Tensors,
    metadata: Mapping[str, str] = MappingProxyType({}),
    **about: Any,
) -> None:
    """Like `save_network`, for tensors that are still on disk."""
    own = json.dumps({"kind": kind, "config": config, **about}, ensure_ascii=False)
    write_safetensors(Path(path), tensors, {**metadata, "ldm": own})


def read_about(path: str | Path) -> dict[str, Any]:
    """Returns the metadata of a file in ldm's own format, without reading a tensor. Raises ValueError for any other."""
    tensors = open_tensors(locate(path))
    if "ldm" not in tensors.metadata:
        raise ValueError(
            f"{tensors.source} was not written by ldm: its metadata has no architecture; convert it with "
            "ldm convert --to ldm"
        )
    return about_of(tensors)


class SkipInitialisation(TorchFunctionMode):
    """Skips torch.nn.init, which has no effect on the meta device, but takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INITIALISERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(about: dict[str, Any], source: object) -> nn.Module:
    """Builds the network that `about` describes, on the meta device. Raises ValueError for invalid settings."""
    check_counts(about.get("config"), source)
    check_booleans(about["kind"], about.get("config"), source)
    try:
        with torch.device("meta"), SkipInitialisation():
            network: nn.Module = constructor(about["kind"])(**about["config"])
            return network
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{source} describes no network that this version of ldm can build ({error}); export it again"
        ) from error


def check_booleans(kind: str, config: object, source: object) -> None:
    """Raises ValueError for true or false in place of a number, which Python would take for 1 or 0."""
    parameters = signature(constructor(kind)).parameters if kind in KINDS else {}
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):  # the config of a tower in a CLIP
            check_booleans(f"{name}_tower", value, source)
        values = value if isinstance(value, list | tuple) else [value]
        allowed = name in parameters and isinstance(parameters[name].default, bool)
        if not allowed and any(isinstance(one, bool) for one in values):
            raise ValueError(f"{source} describes a {kind} whose {name} is {value}; download or export it again")


def check_counts(config: object, source: object) -> None:
    """Raises ValueError if building a network of this depth or width would take minutes or too much memory."""
    values = config if isinstance(config, dict) else {}
    for section in values.values():
        if isinstance(section, dict):  # the config of a tower in a CLIP
            check_counts(section, source)
    lists = {name: value for name, value in values.items() if isinstance(value, list | tuple) and name != "token_ids"}
    numbers = {name: [n for n in lists.get(name, [value]) if isinstance(n, int)] for name, value in values.items()}
    blocks, layers, depth, middle = (max([1, *numbers.get(name, [])]) for name in COUNTS)
    levels = max([1, *map(len, lists.values())])
    largest = max([0, *(abs(n) for each in numbers.values() for n in each)])
    if levels * blocks * layers * max(depth, middle) > MAX_LAYERS or largest > MAX_WIDTH:
        raise ValueError(
            f"{source} describes a network of more than {MAX_LAYERS:,} layers or of numbers above {MAX_WIDTH:,}, which "
            "no model has; download or export it again"
        )


def load_network(path: str | Path, kind: str, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """Loads the network in `path` in evaluation mode, in `dtype` (None: the file's).

    Raises ValueError if it is not of this `kind`.
    """
    file, about = locate(path), read_about(path)
    if about["kind"] != kind:
        raise ValueError(f"{file} holds a {about['kind']}, but a {kind} is needed here; give the file of a {kind}")
    network = build(about, file)
    tensors = open_tensors(file)
    return fill(network, tensors.read(tensors), file, dtype).eval()


def fill(network: nn.Module, state: dict[str, Tensor], source: object, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces the parameters and buffers of `network` by `state`. Raises ValueError as `check_fits`, and for NaN."""
    check_fits(network, state, source)
    cast = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    for name, tensor in cast.items():
        check_finite(name, tensor, source)
    network.load_state_dict(cast, assign=True)
    return network


def check_fits(network: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Raises a ValueError that lists every tensor that `state` lacks, has in excess or has in the wrong shape."""
    expected = network.state_dict()
    refuse_mismatch(
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
    """Returns the SHA-256 of the names, dtypes, shapes and bytes, which does not depend on the file format."""
    return fingerprint_of(sorted(state.items()))


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Like `fingerprint`, for tensors in the order of their names, of which only one need be in memory at a time."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
