import pytest
import torch

from ldm.device import choose_device, has_bf16


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
    ],
)
def test_has_bf16_is_true_on_a_cpu_with_bfloat16_instructions(
    cpu: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert has_bf16(torch.device("cpu")) == expected


def test_has_bf16_depends_on_the_compute_capability_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (7, 5), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    assert [has_bf16(torch.device("cuda", index)) for index in capabilities] == [False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "must be auto, cpu, cuda"),
        ("cuda:99", "there is no device cuda:99"),
        ("mps", "device=mps is not supported, because Apple's MPS has no float64.*: use device=cpu"),
    ],
)
def test_an_unknown_or_unavailable_device_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_device(name)
