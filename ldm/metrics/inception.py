"""The 2015 Inception-v3 that defines FID (Szegedy et al. 2015), for weights ported from TensorFlow.

Modules are named as in `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, which torch-fidelity ships as
`weights-inception-2015-12-05-6726825d.pth`. It differs from torchvision's network: average pooling excludes the
padding, the last block uses max pooling, and there are 1008 classes.
"""

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from ldm.metrics.features import Features
from ldm.weights.native import fill

CLASSES = 1008

Kernel = int | tuple[int, int]
Layer = tuple[str, int, Kernel]  # name, channels out, kernel
Branch = list[Layer | list[Layer]]  # a nested list is a fork, whose outputs are concatenated

POOLS = {
    "average": partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "maximum": partial(max_pool2d, kernel_size=3, stride=1, padding=1),
    "halve": partial(max_pool2d, kernel_size=3, stride=2),
}


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches of convolutions, the last of them after pooling.

    Convolutions keep the spatial size, except for the last ones of a block that halves it.
    """

    def __init__(self, channels: int, branches: Sequence[Branch], pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.paths: list[list[str | list[str]]] = []
        for branch in branches:
            width, path = channels, list[str | list[str]]()
            for step in branch:
                fork = step if isinstance(step, list) else [step]
                for name, out, kernel in fork:
                    halves = pool == "halve" and step is branch[-1]
                    padding = 0 if halves else tuple(k // 2 for k in _both(kernel))
                    self.add_module(name, Conv(width, out, kernel, 2 if halves else 1, padding))  # type: ignore[arg-type]
                path.append([name for name, *_ in fork] if isinstance(step, list) else step[0])
                width = sum(out for _, out, _ in fork)
            self.paths.append(path)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for index, path in enumerate(self.paths):
            y = POOLS[self.pool](x) if index == len(self.paths) - 1 else x
            for step in path:
                names = step if isinstance(step, list) else [step]
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def _both(kernel: Kernel) -> tuple[int, int]:
    return (kernel, kernel) if isinstance(kernel, int) else kernel


def mixed_5(channels: int, pooled: int) -> Mixed:
    five: Branch = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    three: Branch = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(channels, [[("branch1x1", 64, 1)], five, three, [("branch_pool", pooled, 1)]], "average")


def mixed_6a(channels: int) -> Mixed:
    double: Branch = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(channels, [[("branch3x3", 384, 3)], double, []], "halve")


def mixed_6(channels: int, c: int) -> Mixed:
    seven: Branch = [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))]
    kernels: list[tuple[int, Kernel]] = [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))]
    double: Branch = [(f"branch7x7dbl_{i}", out, kernel) for i, (out, kernel) in enumerate(kernels, 1)]
    return Mixed(channels, [[("branch1x1", 192, 1)], seven, double, [("branch_pool", 192, 1)]], "average")


def mixed_7a(channels: int) -> Mixed:
    three: Branch = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)]
    kernels: list[Kernel] = [1, (1, 7), (7, 1), 3]
    seven: Branch = [(f"branch7x7x3_{i}", 192, kernel) for i, kernel in enumerate(kernels, 1)]
    return Mixed(channels, [three, seven, []], "halve")


def mixed_7(channels: int, pool: str) -> Mixed:
    def fork(name: str) -> list[Layer]:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    three: Branch = [("branch3x3_1", 384, 1), fork("branch3x3_2")]
    double: Branch = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")]
    return Mixed(channels, [[("branch1x1", 320, 1)], three, double, [("branch_pool", 192, 1)]], pool)


class Inception(nn.Module):
    """Maps float (b, 3, 299, 299) in [-1, 1) to pooled features (b, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = mixed_6a(288)
        self.Mixed_6b, self.Mixed_6c = mixed_6(768, 128), mixed_6(768, 160)
        self.Mixed_6d, self.Mixed_6e = mixed_6(768, 160), mixed_6(768, 192)
        self.Mixed_7a = mixed_7a(768)
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, "average"), mixed_7(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(POOLS["halve"](x))))  # (b, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (b, 768, 17, 17)
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))  # (b, 2048, 8, 8) before the mean

    def logits(self, features: Tensor) -> Tensor:
        """Returns class logits (b, 1008) of features (b, 2048), without bias, for the Inception score."""
        return features @ self.fc.weight.T


def inception_features(weights: str | Path, resize: str = "tensorflow") -> Features:
    """Loads the features of published FIDs. The weights are the .pth file of pytorch-fid or torch-fidelity.

    Raises FileNotFoundError, or ValueError for a file of another network; no code in the file is executed.
    """
    file = Path(weights).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"Inception weights {file} not found; download pt_inception-2015-12-05-6726825d.pth from the releases of "
            "pytorch-fid and give its path"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is not a file of plain tensors, or is truncated; download it again") from error
    with torch.device("meta"):
        network = Inception()
    if not isinstance(state, dict):
        raise ValueError(f"{file} contains no state dict of an Inception network; give the file of pytorch-fid")
    fill(network, state | _counters(network), file)
    level = [128 / 255] * 3
    return Features(network, 299, resize, mean=level, std=level)


def _counters(network: nn.Module) -> dict[str, Tensor]:
    """Returns zeros for the batch counters of batch norms, which inference does not read and files may omit."""
    return {name: torch.zeros((), dtype=torch.int64) for name in network.state_dict() if name.endswith("_tracked")}
