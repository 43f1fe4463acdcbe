"""Caches encoded data sets on disk, one file each, named by a hash of everything that determines it.

A file is written atomically and verified when it is read, so that runs may share the folder and may be killed. If the
files take more than `LIMIT` bytes in total, the least recently used ones are removed.
"""

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

import ldm
from ldm.data.latents.shard import digest
from ldm.data.mapped import map_arrays, write_arrays
from ldm.files import cache_home, leftovers, try_lock

LIMIT = 4 << 30  # bytes
CODE = ("data", "nn", "device.py", "image.py", "random.py", "weights/parts.py")  # determines the encoded samples
Sample = dict[str, Any]


@runtime_checkable
class Identified(Protocol):
    """A data set or encoder that is completely determined by its code and a few plain values."""

    @property
    def identity(self) -> dict[str, Any]: ...


def store_folder(setting: str | None) -> Path | None:
    """Returns the folder of a setting: a path, "auto" for the user's cache folder, or None to keep nothing."""
    if setting is None:
        return None
    try:
        return cache_home() / "latents" if setting == "auto" else Path(setting).expanduser()
    except RuntimeError:  # there is no home folder
        return None


class LatentStore:
    """The file in `folder` of the first `count` samples of a data set, encoded in batches of `batch_size`."""

    def __init__(self, folder: Path, dataset: Identified, encode: Identified, count: int, batch_size: int) -> None:
        self.identity = json.dumps(
            {
                "dataset": dataset.identity,
                "encoder": encode.identity,
                "count": count,
                "batch_size": batch_size,
                **machine(),
                "code": code_digest(),
            },
            sort_keys=True,
        )
        name = hashlib.sha256(self.identity.encode()).hexdigest()[:32]
        self.folder, self.path = folder, folder / f"{name}.safetensors"

    def read(self) -> tuple[Tensor, list[Sample]] | None:
        """Returns moments (n, 2z, h, w) and samples, or None if they are not stored or their file is damaged."""
        try:
            mapped, record = map_arrays(self.path, ["moments", "samples"])
            arrays = {name: np.array(array) for name, array in mapped.items()}
            if record["identity"] != self.identity or record["sha256"] != digest(arrays):
                return None
            os.utime(self.path)  # records the time of the last use
            return torch.from_numpy(arrays["moments"]), json.loads(arrays["samples"].tobytes())
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, moments: Tensor, samples: Sequence[Sample]) -> None:
        """Stores the data unless another process is writing to the folder; a failure only causes a warning."""
        text = json.dumps(samples).encode()
        arrays = {"moments": moments.numpy(), "samples": np.frombuffer(text, np.uint8)}
        size = sum(array.nbytes for array in arrays.values())
        if json.loads(text) != samples or moments.dtype != torch.float32 or size > LIMIT:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (lock := try_lock(self.folder)) is None:
                return
            try:
                self._tidy(LIMIT - size)
                write_arrays(self.path, arrays, {"identity": self.identity, "sha256": digest(arrays)})
            finally:
                os.close(lock)
        except OSError as error:
            warnings.warn(
                f"cannot keep the encoded images, so that every start encodes them again ({error}): set "
                "data.latent_store to a folder that is writable, or to null",
                stacklevel=2,
            )

    def _tidy(self, limit: int) -> None:
        """Removes files left by killed processes, and the least recently used files beyond `limit` bytes in total."""
        for path in leftovers(self.folder, lambda name: name.endswith(".safetensors")):
            path.unlink(missing_ok=True)
        total = 0
        for path in sorted(self.folder.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime):
            total += path.stat().st_size
            if total > limit:
                path.unlink(missing_ok=True)


def machine() -> Mapping[str, Any]:
    """Returns the hardware, versions and settings that determine the rounding of an encoding."""
    return {
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
    }


def code_digest() -> str:
    """Returns the SHA-256 of the code that creates and encodes samples."""
    root, total = Path(ldm.__file__).parent, hashlib.sha256()
    for part in CODE:
        for path in [root / part] if part.endswith(".py") else sorted((root / part).rglob("*.py")):
            total.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()
