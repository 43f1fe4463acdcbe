"""Named tensors on disk, whatever file holds them: their headers at once, their values when asked for.

Reading headers needs no torch, so that `ldm info` answers at once.
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
ITEMSIZE = {  # bytes of one number
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
    """Type, as safetensors spells it, and shape of a tensor."""

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
    """Name → header; `read` gives the values, as views of the mapped file."""

    source: Path
    headers: dict[str, Header]
    read: "Callable[[Iterable[str]], dict[str, Tensor]]"
    metadata: dict[str, Any] = field(default_factory=dict)  # plain data that the file holds besides

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
        """The tensors `names.values()` under the names `names.keys()`."""

        def read(wanted: Iterable[str]) -> "dict[str, Tensor]":
            wanted = list(wanted)
            values = self.read([names[name] for name in wanted])
            return {name: values[names[name]] for name in wanted}

        return replace(self, headers={new: self.headers[old] for new, old in names.items()}, read=read)

    def under(self, prefix: str) -> "Tensors":
        """Those whose names begin with `prefix`, without it."""
        return self.renamed({name[len(prefix) :]: name for name in self if name.startswith(prefix)})


def locate(path: str | Path) -> Path:
    """The file that `path` names; "assets:NAME" is one that ships with ldm. Raises FileNotFoundError."""
    text = str(path)
    found = ASSETS / text.removeprefix("assets:") if text.startswith("assets:") else Path(text).expanduser()
    if not found.is_file():
        raise FileNotFoundError(f"there is no weights file {found}; give the path of a .safetensors file")
    return found


def refuse_misfits(
    source: object, network: str, missing: Iterable[str], unexpected: Iterable[str], misshapen: Sequence[str]
) -> None:
    """Raises one ValueError for all tensors that keep the weights in `source` out of a network, if there are any."""
    problems = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": misshapen}
    told = [f"{len(names)} {what}: {_shorten(names)}" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"the weights in {source} are those of another {network} ({'; '.join(told)})")


def _shorten(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
