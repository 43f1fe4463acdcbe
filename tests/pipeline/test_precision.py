import pytest
import torch

from ldm.pipeline.precision import AUTO, DTYPES, choose_precision, dtype_of


def test_each_precision_has_a_dtype_with_its_number_of_bits() -> None:
    assert {name: dtype_of(name).itemsize * 8 for name in DTYPES} == {"32": 32, "bf16": 16, "16": 16}
    assert dtype_of("bf16") == torch.bfloat16


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "32")])
def test_auto_is_bf16_only_if_the_device_supports_it(
    supported: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": supported})
    assert choose_precision(AUTO, "cpu") == expected


@pytest.mark.parametrize("name", DTYPES)
def test_a_named_precision_is_kept_on_every_device(name: str) -> None:
    assert choose_precision(name, "cpu") == name
