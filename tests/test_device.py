from types import SimpleNamespace

import pytest
import torch

from ldm.device import ATTENTION, allow_tf32, choose_device, device_of_rank, has_bf16, preferred_attention, ranks


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


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretends that there are two GPUs; returns the indices that are made the current one."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_each_process_of_a_machine_gets_its_own_gpu_which_cuda_also_means_there(two_gpus: list[int]) -> None:
    assert [device_of_rank("auto", 0), device_of_rank("cuda", 1), device_of_rank("auto", 3)] == [
        "cuda:0",
        "cuda:1",
        "cuda:1",
    ]
    assert two_gpus == [0, 1, 1]


@pytest.mark.parametrize("name", ["cpu", "cuda:0"])
def test_a_device_that_is_named_exactly_is_used_by_each_process(name: str, two_gpus: list[int]) -> None:
    assert device_of_rank(name, 1) == name and two_gpus == []


def test_without_a_gpu_processes_run_on_the_device_that_is_named() -> None:
    assert torch.cuda.is_available() or device_of_rank("auto", 1) == "auto"


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_or_not_in_matrix_products_and_convolutions(allowed: bool) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(allowed)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_a_preferred_attention_kernel_comes_first_and_the_others_remain(name: str) -> None:
    before = torch._C._get_sdp_priority_order()  # type: ignore[attr-defined]
    with preferred_attention(name):
        order = torch._C._get_sdp_priority_order()  # type: ignore[attr-defined]
        assert order[0] == ATTENTION[name].value
        assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.cudnn_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == before  # type: ignore[attr-defined]


def test_an_unknown_attention_kernel_is_refused_and_none_leaves_the_choice_to_torch() -> None:
    with pytest.raises(ValueError, match="attention is 'fast', but must be one of flash, efficient, cudnn, or null"):
        preferred_attention("fast")
    before = torch._C._get_sdp_priority_order()  # type: ignore[attr-defined]
    with preferred_attention(None):
        assert torch._C._get_sdp_priority_order() == before  # type: ignore[attr-defined]


@pytest.mark.cuda
@pytest.mark.parametrize("allowed", [False, True])
def test_float32_products_on_a_gpu_are_exact_unless_tf32_is_allowed(allowed: bool) -> None:
    allow_tf32(allowed)
    a, b = (torch.randn(512, 512, dtype=torch.float64, device="cuda") for _ in range(2))
    error = (a.float() @ b.float()).double().sub(a @ b).abs().max() / (a.abs() @ b.abs()).max()
    assert (error > 2.0**-18) == allowed  # a sum of 512 rounded products; TF32 rounds their factors by up to 2⁻¹¹


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SRUN, "SLURM_PTY_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("names", [TORCHRUN, SRUN])
def test_the_rank_is_read_from_torchrun_or_a_step_of_srun(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks() == (0, 1, 0)
    for name, value in zip(names, "583", strict=True):
        monkeypatch.setenv(name, value)
    assert ranks() == (5, 8, 3)
    monkeypatch.setenv(names[0], "8")
    with pytest.raises(ValueError, match="a rank below"):
        ranks()


@pytest.mark.usefixtures("alone")
def test_the_script_of_a_slurm_job_and_a_shell_in_it_are_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)  # as sbatch --ntasks 8 sets them for the script
    assert ranks() == (0, 1, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PTY_PORT", "40045")  # srun --ntasks 8 --pty bash
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert ranks() == (0, 1, 0)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))  # srun within that shell
    assert ranks() == (0, 8, 0)
