"""Compiles Triton's kernels for GPUs that need not be there."""

from importlib import import_module
from typing import Any

import pytest

from tests.kernels.conftest import INSTALLED, INTERPRETED

CONSTANTS: dict[str, Any] = {"BLOCKS": 256, "ROWS": 64, "COLUMNS": 64, "TILES": 64, "WIDTH": 16, "SILU": True}
FLOATS = {"means", "squares", "mean", "scale", "first", "second", "weight", "bias"}
DATA = {"x", "out", "gradient"}


def kind_of(name: str, data: str) -> str:
    """Returns the type of a kernel's argument, as Triton calls it."""
    if name in CONSTANTS:
        return "constexpr"
    if name in FLOATS:
        return "*fp32"
    if name in DATA:
        return f"*{data}"
    return {"ids": "*i64", "draws": "*i64", "seed": "u64", "eps": "fp32"}.get(name, "i32")


@pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs Triton and not TRITON_INTERPRET=1, see .ci/full_size")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("module", "data", "kernels"),
    [
        ("noise", "fp32", ["_normal"]),
        ("noise", "fp64", ["_uniform"]),
        *(
            ("group_norm", data, ["_moments", "_combine", "_apply", "_gradient_sums", "_input_gradient"])
            for data in ("fp32", "bf16", "fp16")
        ),
    ],
)
def test_kernels_compile(architecture: int, module: str, data: str, kernels: list[str]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name in kernels:
        kernel = getattr(import_module(f"ldm.kernels.{module}"), name)
        signature = {argument: kind_of(argument, data) for argument in kernel.arg_names}
        constants = {argument: CONSTANTS[argument] for argument in kernel.arg_names if argument in CONSTANTS}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]
