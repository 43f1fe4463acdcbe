import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing import checkpoint_file
from ldm.callbacks.checkpointing.sharded import ShardedModelParallel
from ldm.callbacks.export import Export
from ldm.callbacks.monitoring.health import Health
from ldm.conditioning import Conditioning
from ldm.execution.fsdp import distribute_like, distribute_state, exchange, full_tensor, shard
from ldm.nn.backbone import Backbone
from tests import runs
from tests.tiny import tiny_dit, tiny_inpainting_unet, tiny_unet
from tests.training.tiny import STEADY, diffusion, drift, fit

ROOT = Path(__file__).parents[2]


Make = Callable[[], Backbone]
each_backbone = pytest.mark.parametrize("make", [tiny_unet, tiny_inpainting_unet, tiny_dit])


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def inputs() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 16)))
    hint = torch.randn(2, 5, 8, 8, generator=generator)
    conditioning = Conditioning(text=text).with_hint("inpainting", hint)
    return x, torch.tensor([501.0, 998.3]), conditioning  # times that bfloat16 would round to 500 and 1000


@each_backbone
def test_sharding_does_not_change_the_output(group: None, make: Make) -> None:
    network = make()
    expected = network(*inputs())
    shard(network)
    assert all(isinstance(weight, DTensor) for weight in network.parameters())
    torch.testing.assert_close(network(*inputs()), expected, rtol=1e-5, atol=1e-5)


@each_backbone
def test_each_repeated_block_is_sharded_separately(group: None, make: Make) -> None:
    network = make()
    shard(network)
    assert all(isinstance(block, FSDPModule) for block in network.repeated_blocks())


@each_backbone
def test_a_bfloat16_sharded_network_keeps_float32_weights_and_gradients(group: None, make: Make) -> None:
    network = make()
    x, time, conditioning = inputs()
    expected = deepcopy(network).bfloat16()(x.bfloat16(), time, conditioning.to(dtype=torch.bfloat16)).float()
    shard(network, torch.bfloat16)
    out = network(x, time, conditioning)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    out.sum().backward()
    assert {tensor.dtype for weight in network.parameters() for tensor in (weight, weight.grad)} == {torch.float32}


def test_gathering_restores_a_distributed_tensor(group: None) -> None:
    unet = tiny_unet()
    weight = unet.conv_in.weight.detach().clone()
    shard(unet)
    assert torch.equal(full_tensor(distribute_like(weight + 1, unet.conv_in.weight)), weight + 1)
    assert full_tensor(weight) is weight and distribute_like(weight, weight) is weight


def test_a_sharded_network_computes_with_exchanged_weights(group: None) -> None:
    unet, other = tiny_unet(), tiny_unet(seed=1)
    before, after = unet(*inputs()), other(*inputs())
    shard(unet)
    unet(*inputs())
    pairs = list(zip(unet.parameters(), other.parameters(), strict=True))
    originals = [exchange(weight, distribute_like(value.detach(), weight)) for weight, value in pairs]
    torch.testing.assert_close(unet(*inputs()), after, rtol=1e-5, atol=1e-5)
    for weight, value in zip(unet.parameters(), originals, strict=True):
        exchange(weight, value)
    torch.testing.assert_close(unet(*inputs()), before, rtol=1e-5, atol=1e-5)


def test_loaded_optimizer_state_has_the_memory_layout_of_its_weight() -> None:
    """Fused AdamW pairs weight and state by memory position, without an error for different layouts."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    state, mean = optimizer.state[weight], optimizer.state[weight]["exp_avg"]
    state["exp_avg"] = mean.contiguous()
    distribute_state(optimizer)
    assert torch.equal(state["exp_avg"], mean) and state["exp_avg"].stride() == weight.stride() != (12, 4, 2, 1)


@pytest.fixture
def destroys_group() -> Iterator[None]:
    """Destroys the process group that the Trainer starts."""
    yield
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_run_trains_and_resumes_like_an_unsharded_one(tmp_path: Path, destroys_group: None) -> None:
    plain, ema = diffusion(optimizer=STEADY), EMA(decay=0.9)
    fit(tmp_path, plain, 4, callbacks=[ema], gradient_clip_val=1.0)
    for steps, resume in ((2, None), (4, tmp_path / "2.ckpt")):
        module, average = diffusion(optimizer=STEADY), EMA(decay=0.9)
        options = {
            "strategy": ShardedModelParallel(),
            "callbacks": [average, Health(tmp_path), Export(tmp_path)],
            "gradient_clip_val": 1.0,
        }
        trainer = fit(tmp_path, module, steps, resume, **options)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
    checkpoint = checkpoint_file.read(tmp_path / "4.ckpt")
    for name, weight in plain.backbone.named_parameters():
        torch.testing.assert_close(checkpoint["state_dict"][f"backbone.{name}"], weight.detach(), **drift(steps=4))
        torch.testing.assert_close(checkpoint["ema"][name], ema.averages[name], **drift(steps=4))
    exported = load_file(tmp_path / "unet.safetensors")
    assert all(torch.equal(exported[name], average) for name, average in checkpoint["ema"].items())


@pytest.mark.full_size  # tests/test_dit_run.py trains two sharded ranks among the slow tests
def test_two_sharded_ranks_train_and_resume_like_one_process(tmp_path: Path) -> None:
    tiny = "model.width=16", "model.groups=8", "model.blocks=1", "model.heads=2", "sampler.steps=2", "++data.count=18"
    plain = "precision=fp32", "lr=constant", "metrics=none", "logger=none", "trainer.accelerator=cpu"
    steady = "optimizer=adamw", "optimizer.lr=1e-3", "optimizer.eps=1e-3"
    halves = "strategy=fsdp", "trainer.devices=2", "data.batch_size=2", f"run_dir={tmp_path}/two", "resume=auto"
    runs.run(tmp_path / "one", *tiny, *plain, *steady, "name=test", "data.batch_size=4", "trainer.max_steps=6")
    for arguments in ((*halves, "trainer.max_steps=3"), (*halves, "trainer.max_steps=6")):
        command = [sys.executable, "train.py", *tiny, *plain, *steady, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stderr
    one, two = (checkpoint_file.read(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    for key in ("state_dict", "ema"):
        for name, weight in one[key].items():  # two means over 2 round differently from a mean over 4
            torch.testing.assert_close(two[key][name], weight, **drift(steps=6, lr=1e-3, eps=1e-3))
    exported = load_file(tmp_path / "two" / "unet.safetensors")
    assert all(torch.equal(exported[name], average) for name, average in two["ema"].items())


def test_a_bfloat16_average_of_sharded_weights_equals_that_of_full_ones(group: None) -> None:
    averages = []
    for sharded in (False, True):
        unet, ema = tiny_unet(), EMA(decay=0.5, warmup=False, dtype="bfloat16")
        if sharded:
            shard(unet)
        weights = dict(unet.named_parameters())
        ema.tracks = [{name: (2 * weight.detach()).bfloat16() for name, weight in weights.items()}]
        ema.update(weights)
        averages.append([full_tensor(average) for average in ema.averages.values()])
    assert all(torch.equal(plain, gathered) for plain, gathered in zip(*averages, strict=True))


@pytest.mark.parametrize("broken", [False, True])
def test_fused_adamw_skips_a_broken_step_of_sharded_weights_by_itself(group: None, broken: bool) -> None:
    unet = tiny_unet()
    shard(unet)
    before = [full_tensor(weight.detach()).clone() for weight in unet.parameters()]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.1, fused=True)
    unet(*inputs()).square().mean().backward()
    optimizer.found_inf = torch.tensor(float(broken))
    optimizer.step()
    after = [full_tensor(weight.detach()) for weight in unet.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)) == broken
