"""Represents named tensors on disk, in whatever format: headers are in memory, values are read on demand.

Headers need no torch, so that `ldm info` answers at once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = Path(__file__).parents[2] / "assets"
PICKLED = (".ckpt", ".bin", ".pt", ".pth")
ITEMSIZE = {  # bytes per element
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


class Header(NamedTuple):
    """Data type, as safetensors spells it, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return "F" in self.dtype

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize


@dataclass(frozen=True, eq=False)
class Tensors(Mapping[str, Header]):
    """Maps names to headers; `read` returns the values of the given names, as views of the mapped file."""

    source: Path
    headers: dict[str, Header]
    read: "Callable[[Iterable[str]], dict[str, Tensor]]"
    metadata: dict[str, Any] = field(default_factory=dict)  # plain data that the file contains besides tensors

    def __getitem__(self, name: str) -> Header:
        return self.headers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.headers.values())

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """Returns the tensors named in `names.values()`, renamed to the corresponding `names.keys()`."""

        def read(wanted: Iterable[str]) -> "dict[str, Tensor]":
            wanted = list(wanted)
            values = self.read([names[name] for name in wanted])
            return {name: values[names[name]] for name in wanted}

        return replace(self, headers={new: self.headers[old] for new, old in names.items()}, read=read)

    def under(self, prefix: str) -> "Tensors":
        """Returns the tensors whose names begin with `prefix`, which is removed."""
        return self.renamed({name[len(prefix) :]: name for name in self if name.startswith(prefix)})


def locate(path: str | Path) -> Path:
    """Returns the file at `path`, where "assets:NAME" is a file that ships with ldm. Raises FileNotFoundError."""
    text = str(path)
    file = ASSETS / text.removeprefix("assets:") if text.startswith("assets:") else Path(text).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no weights file {file}; give the path of a .safetensors file")
    return file


def refuse_mismatch(
    source: object, network: str, missing: Iterable[str], unexpected: Iterable[str], misshapen: Sequence[str]
) -> None:
    """Raises one ValueError for all tensors because of which the weights in `source` do not fit `network`, if any."""
    problems = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of the wrong shape": misshapen}
    found = [f"{len(names)} {problem}: {_shorten(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(
            f"the weights in {source} do not match the expected {network} ({'; '.join(found)}); "
            "give weights of the same architecture"
        )


def _shorten(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
