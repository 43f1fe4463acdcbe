import pytest
import torch
from torch import nn

from ldm.training.muon import Muon, orthogonal


def random_matrices(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)])
def test_singular_values_approach_one_and_singular_vectors_stay(shape):
    matrices = random_matrices(*shape)
    result = orthogonal(matrices)
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    inner = u.mT @ result.double() @ v.mT  # diagonal if the singular vectors are the same
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-4
    assert values[s > 0.05 * s.amax(-1, keepdim=True)].min() > 0.6
    assert values.max() < 1.3


def test_the_gram_iteration_equals_newton_schulz():
    x = random_matrices(6, 20).double()
    expected = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(orthogonal(x, 5), expected, atol=1e-5, rtol=1e-5)


def test_vectors_get_the_updates_of_adamw():
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    muon = Muon([ours], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(5):
        for weight, optimizer in ((ours, muon), (theirs, adamw)):
            weight.grad = torch.linspace(-1, 1, 5) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_the_update_of_a_convolution_has_the_rms_of_adamw():
    weight = nn.Parameter(torch.zeros(16, 8, 3, 3))
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    assert 0.1 < float(weight.detach().square().mean().sqrt()) < 0.3


def test_a_broken_step_changes_neither_weights_nor_state_and_others_are_as_without_found_inf():
    def trained(steps: int, found: float | None = None) -> list[torch.Tensor]:
        weights = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 2, 2, 2)), nn.Parameter(torch.ones(3))]
        optimizer = Muon(weights, lr=0.1, weight_decay=0.5)
        for step in range(steps):
            last = step == steps - 1
            optimizer.found_inf = None if found is None else torch.tensor(found if last else 0.0)
            for number, weight in enumerate(weights):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9 * step + number))
                if last and found:
                    weight.grad.flatten()[:2] = torch.tensor([float("nan"), float("inf")])
            optimizer.step()
        state = [value for weight in weights for value in optimizer.state[weight].values()]
        return [weight.detach() for weight in weights] + state

    for broken, expected in ((trained(4, 1.0), trained(3)), (trained(4, 0.0), trained(4))):
        assert all(map(torch.equal, broken, expected)) and len(broken) == len(expected) == 8


def test_muon_resumes_exactly_from_its_state():
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))

    def train(net: nn.Module, optimizer: Muon, steps: range) -> None:
        for step in steps:
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    straight = network()
    train(straight, Muon(straight.parameters()), range(6))
    first = network()
    optimizer = Muon(first.parameters())
    train(first, optimizer, range(3))
    second = network()
    second.load_state_dict(first.state_dict())
    resumed = Muon(second.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="but lr must be >= 0, momentum in"):
        Muon([nn.Parameter(torch.ones(2, 2))], momentum=1.0)


def test_bf16_mixed_updates_are_close_to_float32() -> None:
    weights = [nn.Parameter(torch.zeros(16, 24)) for _ in range(2)]
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    for weight, precision in zip(weights, ("32-true", "bf16-mixed"), strict=True):
        weight.grad = gradient.clone()
        Muon([weight], lr=1.0, weight_decay=0.0, precision=precision).step()
    exact, rounded = (weight.detach() for weight in weights)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_updates_in_bfloat16_are_bounded(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    low = torch.randn(64, rank, generator=generator) @ torch.randn(rank, 64, generator=generator)
    matrices = (low + 1e-3 * torch.randn(64, 64, generator=generator)).bfloat16()
    assert torch.linalg.matrix_norm(orthogonal(matrices).float(), 2) < 1.5
    with pytest.raises(ValueError, match="iterations are 5, but must be at most 4 in bfloat16"):
        Muon([nn.Parameter(torch.ones(2, 2))], iterations=5, precision="bf16-mixed")
