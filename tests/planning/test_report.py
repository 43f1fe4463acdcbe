import gc
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from ldm.callbacks.averages.ema import EMA
from ldm.nn.dit import DiT
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.planning.config_tree import import_target
from ldm.planning.flops import measure, measure_training
from ldm.planning.memory import checkpoint_copy, memory, workspaces
from ldm.planning.networks import plan_networks
from ldm.planning.numbers import duration
from ldm.planning.report import plan
from ldm.weights.native import save_network
from tests.runs import run
from tests.tiny import save_part, tiny_text_tower, tiny_vae
from tests.training.tiny import diffusion, fit

TRAIN = Path(__file__).parents[2] / "train.py"
UNET = {
    "width": 32,
    "multipliers": [1, 2],
    "blocks": 1,
    "depth": [1, 1],
    "heads": 2,
    "context_width": 16,
    "groups": 8,
}
SIZE, BATCH = 64, 4


DIT = {"_target_": "ldm.nn.dit.DiT", "width": 64, "layers": 4, "heads": 2, "context_width": 16}
WIDE_UNET = {**UNET, "width": 64}


def config(network=UNET, size=SIZE, **trainer):
    missing = {"_target_": "ldm.weights.parts.first_stage", "weights": "/nowhere.safetensors"}
    return {
        "training": {
            "backbone": {"_target_": "ldm.nn.unet.UNet", **network},
            "first_stage": missing,
            "text_encoder": missing,
            "size": [size, size],
        },
        "data": {
            "batch_size": BATCH,
            "global_batch": None,
            "module": {"train": {"_target_": "ldm.data.sources.shapes.Shapes"}},
        },
        "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3, "fused": True},
        "ema": {"decay": 0.99},
        "trainer": {
            "precision": "32-true", "strategy": "auto", "devices": "auto", "num_nodes": 1, "max_steps": 10,
            **trainer,
        },
    }  # fmt: skip


def rows(config, sharded=False):
    (trained, *frozen), _ = plan_networks(config)
    return memory(
        config, trained.network, [planned.network for planned in frozen], config["trainer"]["devices"], sharded
    )


def test_the_planned_network_has_the_real_parameter_count():
    real = sum(parameter.numel() for parameter in UNet(**UNET).parameters())
    (trained,), _ = plan_networks(config())
    assert sum(parameter.numel() for parameter in trained.network.parameters()) == real


def test_memory_of_weights_gradients_optimizer_and_ema():
    held, n = rows(config(devices=1)), sum(parameter.numel() for parameter in UNet(**UNET).parameters())
    steps = 4 * len(list(UNet(**UNET).parameters()))  # Adam counts each tensor's steps
    assert [held[name] for name in ("weights", "gradients", "EMA")] == [4 * n] * 3
    assert held["optimizer"] == 8 * n + steps
    assert rows(config(devices=4), sharded=True)["optimizer, sharded"] == -(-held["optimizer"] // 4)
    half = rows(config(devices=1, precision="bf16-true"))
    assert half["weights"] == 2 * n and half["EMA"] == 4 * n


def test_memory_of_the_ema_follows_its_settings():
    setting, n = config(devices=1), sum(parameter.numel() for parameter in UNet(**UNET).parameters())
    for ema, expected in (({"dtype": "bfloat16"}, 2 * n), ({"lengths": [0.05, 0.1]}, 8 * n), ({"device": "cpu"}, None)):
        setting["ema"] = ema
        assert rows(setting).get("EMA") == expected


@pytest.mark.slow
def test_a_wider_network_changes_all_numbers():
    narrow, wide = (list(plan(config({**UNET, "width": width}))) for width in (32, 64))
    names = ("unet  ", "unet, forward", "unet, backward", "a step", "weights", "activations", "H200")
    for name in names:
        assert [line for line in narrow if line.strip().startswith(name)] != [
            line for line in wide if line.strip().startswith(name)
        ]


def test_twice_the_gpus_halve_the_time():
    def days(devices):
        setting = config(devices=devices, max_steps=10**11)
        setting["data"]["global_batch"] = 8 * BATCH
        time, unit = next(line for line in plan(setting) if "H200" in line).split()[1:3]
        assert unit == "days"
        return float(time)

    assert days(4) == pytest.approx(days(2) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "< 0.1 s"),
        (0.31, "0.31 s"),
        (95, "95 s"),
        (150, "2.5 min"),
        (3600 * 11.26, "11.3 h"),
        (86400 * 40, "40 days"),
    ],
)
def test_a_time_is_given_in_a_unit_that_suits_its_length(seconds, text):
    assert duration(seconds) == text


def test_the_first_stage_is_read_from_its_weights_file(tmp_path):
    vae = VAE(widths=[8, 8], blocks=1, groups=4, patch=2)
    save_network(tmp_path / "vae.safetensors", "vae", vae.config, vae.state_dict())
    setting = config()
    setting["training"]["first_stage"] = {"weights": str(tmp_path / "vae.safetensors")}
    (unet, first_stage), _ = plan_networks(setting)
    assert unet.forward.args[0].shape[2:] == (SIZE // vae.factor,) * 2
    assert sum(p.numel() for p in first_stage.network.parameters()) == sum(p.numel() for p in vae.parameters())
    assert measure(first_stage.forward, grad=False).forward > 0


@pytest.mark.parametrize(
    "train",
    [
        {"_target_": "ldm.data.latents.in_memory.InMemory", "dataset": {"_target_": "ldm.data.sources.shapes.Shapes"}},
        {"_target_": "ldm.data.sources.split.Split", "dataset": {"_target_": "ldm.data.latents.cache.CachedLatents"}},
    ],
)
def test_training_on_latents_does_not_call_the_first_stage(train, tmp_path):
    setting = config()
    setting["training"]["first_stage"] = save_part(tmp_path / "vae.safetensors", "vae", tiny_vae())
    assert plan_networks(setting)[0][1].forward is not None
    setting["data"]["module"]["train"] = train
    assert plan_networks(setting)[0][1].forward is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "checkpointing", "sharded"),
    [
        (WIDE_UNET, False, False),
        pytest.param(DIT, True, True, marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *((WIDE_UNET, True, sharded) for sharded in (False, True)),
                *((DIT, checkpointing, False) for checkpointing in (False, True)),
            )
        ),
    ],
)
def test_planned_memory_matches_a_real_run(network, checkpointing, sharded, tmp_path):
    settings = {**network, "checkpointing": checkpointing}
    setting = config(settings, size=32, devices=1)
    vae, text = save_part(tmp_path / "v.safetensors", "vae", tiny_vae()), tmp_path / "t.safetensors"
    setting["training"] |= {"first_stage": vae, "text_encoder": save_part(text, "text_tower", tiny_text_tower())}
    setting["data"]["module"]["train"] = {"_target_": "ldm.data.latents.in_memory.InMemory"}
    strategy = "auto"
    if sharded:
        setting["trainer"]["strategy"] = {"_target_": "lightning.pytorch.strategies.ModelParallelStrategy"}
        strategy = ModelParallelStrategy(save_distributed_checkpoint=False)
    found = re.findall(r"^  (all|gradients)(?:, sharded)? +([\d.]+) (\w+)$", "\n".join(plan(setting)), re.MULTILINE)
    planned = {name: float(number) * {"KiB": 2**10, "MiB": 2**20}[unit] for name, number, unit in found}
    gc.collect()  # so that garbage of earlier tests is not freed while profiling
    kind = import_target(settings.pop("_target_", "ldm.nn.unet.UNet"))
    with torch.profiler.profile(profile_memory=True) as profile:
        fit(tmp_path, diffusion(backbone=kind(**settings)), 3, side=32, callbacks=[EMA(decay=0.99)], strategy=strategy)
    if sharded:
        torch.distributed.destroy_process_group()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    # Gradients grow while activations are freed, so the peak is at least the larger of both and at most their sum.
    assert planned["all"] - planned["gradients"] < 1.1 * peak and peak < 1.1 * planned["all"]


def test_a_frozen_network_without_weights_needs_a_config():
    setting = config()
    assert any("text encoder is not counted" in line for line in plan(setting))
    setting["training"]["text_encoder"] = {
        "weights": "/nowhere.safetensors",
        "config": {"width": 16, "heads": 2},
    }
    networks, notes = plan_networks(setting)
    assert [planned.name for planned in networks] == ["unet", "text encoder"]
    assert not any("text encoder" in note for note in notes)


@pytest.mark.slow
def test_stable_diffusion_has_859_5_million_parameters():
    lines = list(plan(config({}, size=512, precision="bf16-mixed")))
    assert next(line for line in lines if line.startswith("  unet")).split()[1:3] == ["859.5", "M"]


def test_a_transformer_is_planned_as_a_dit():
    (trained,), _ = plan_networks(config(DIT))
    assert trained.name == "dit" and isinstance(trained.network, DiT)
    assert rows(config(DIT, devices=1))["weights"] == 4 * sum(weight.numel() for weight in trained.network.parameters())


def test_an_inpainting_network_is_planned_with_its_hint():
    plain, inpainting = (plan_networks(config({**UNET, "in_channels": channels}))[0][0] for channels in (4, 9))
    assert inpainting.forward.args[2].get("inpainting").shape == (BATCH, 5, SIZE // 8, SIZE // 8)
    difference = 2 * BATCH * (SIZE // 8) ** 2 * 5 * 32 * 9  # in the first convolution
    assert measure(inpainting.forward).forward == measure(plain.forward).forward + difference


def test_an_adapter_is_planned_with_its_trainable_weights():
    setting = config(devices=1) | {
        "adapter": {"_target_": "ldm.adapters.train_only.TrainOnly", "names": ["conv_out.*"]}
    }
    held, count = rows(setting), 32 * 4 * 9 + 4
    assert held["gradients"] == held["EMA"] == 4 * count
    assert held["optimizer"] == 8 * count + 2 * 4  # Adam counts each tensor's steps
    assert held["weights"] == rows(config(devices=1))["weights"]
    (trained,), _ = plan_networks(setting)
    assert trained.note == f"{count / 1000:.3f} k of them trained"


@pytest.mark.slow
def test_a_lora_on_checkpointed_blocks_is_planned():
    """Blocks without attention train nothing but propagate gradients."""
    setting = config({**UNET, "checkpointing": True}, devices=1)
    lora = setting | {"adapter": {"_target_": "ldm.adapters.lora.LoRA", "rank": 2}}
    assert rows(lora)["gradients"] < rows(setting)["gradients"]
    whole, adapted = (
        measure_training(part.network, part.forward) for (part,), _ in map(plan_networks, (setting, lora))
    )
    assert 0 < adapted.saved <= whole.saved and whole.forward < adapted.forward < adapted.backward < whole.backward


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="model is a Linear, but only a Backbone, a VAE or a CLIP can be planned"):
        list(plan(config({"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3})))


@pytest.mark.slow
def test_a_plan_reads_no_data_or_weights_and_writes_no_files(tmp_path):
    command = [sys.executable, str(TRAIN), "experiment=shapes_vae", "debug=plan"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout and "RTX 4090" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_towers_of_clip_are_planned_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", "experiment=shapes_clip", "debug=plan", "name=test")
    out = capsys.readouterr().out
    assert "parameters" in out and "RTX 4090" in out
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_copied_to_pinned_memory_of_the_size_of_weights_optimizer_and_ema():
    held, n = rows(config(devices=1)), sum(parameter.numel() for parameter in UNet(**UNET).parameters())
    assert checkpoint_copy(held) == 4 * n + held["optimizer"] + 4 * n
    assert any(line.strip().startswith("pinned, on the CPU") for line in plan(config(devices=1)))


def test_workspaces_are_planned_for_the_largest_convolution():
    convolutions = [layer.weight.numel() for layer in UNet(**UNET).modules() if isinstance(layer, nn.Conv2d)]
    (trained,), _ = plan_networks(config())
    assert workspaces(trained.network) == 32 * 2**20 + 4 * max(convolutions)
    assert workspaces(nn.Linear(2, 3)) == 32 * 2**20
    assert any(line.strip().startswith("workspaces") for line in plan(config()))


@pytest.mark.parametrize(
    ("precision", "tf32", "speed"),
    [
        ("32-true", None, "67 TFLOP/s float32"),
        ("32-true", True, "494.8 TFLOP/s TF32"),
        ("bf16-mixed", None, "989.5 TFLOP/s bf16"),
    ],
)
def test_the_time_is_that_of_the_precision_in_which_gpus_multiply(precision, tf32, speed):
    setting = config(precision=precision) | {"precision": {"tf32": tf32}}
    assert speed in next(line for line in plan(setting) if "H200" in line)


NETWORKS = {
    "unet": {"_target_": "ldm.nn.unet.UNet", **UNET},
    "checkpointed unet": {"_target_": "ldm.nn.unet.UNet", **UNET, "checkpointing": True},
    "dit": DIT,
}


@pytest.mark.parametrize(("network", "both"), [("unet", True), ("checkpointed unet", False), ("dit", False)])
def test_activations_are_given_with_and_without_compilation_where_both_are_known(network, both):
    setting = config()
    setting["training"]["backbone"] = NETWORKS[network]
    names = [line.split("  ")[1] for line in plan(setting) if line.startswith("  activations")]
    assert names == ["activations", "activations, compiled"][: 1 + both]
