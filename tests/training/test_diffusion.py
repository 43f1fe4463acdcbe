from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.conditioning import Conditioning
from ldm.data.loading.datamodule import collate
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import EDM, Flow, Schedule, scaled_linear
from ldm.diffusion.time_sampling import Uniform
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.unet import UNet
from ldm.random import normal
from ldm.training.compiling import compiled
from ldm.training.diffusion import DiffusionTraining
from ldm.weights.model import read_model, save_model
from ldm.weights.parts import Frozen
from tests.meta_device import META, Waits, on_meta
from tests.tiny import save_part, tiny_dit, tiny_unet, tiny_vae
from tests.training.tiny import CAPTIONS, Images, batch, diffusion, fit

SD = scaled_linear()


def losses(module: DiffusionTraining, *ids: int, draw: int = 0) -> Tensor:
    return module.losses(batch(*ids, draw=draw))[1].detach()


@pytest.mark.parametrize(("schedule", "name"), [(Flow(), "flow"), (Flow(), "x0"), (SD, "eps"), (SD, "v")])
def test_the_loss_of_a_perfect_denoiser_is_zero(schedule: Schedule, name: str) -> None:
    module = diffusion(schedule=schedule, prediction=Prediction(name), times=Uniform(schedule))
    x0 = module.inputs.latents(batch(0, 1, 2, 3))

    def perfect(x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        t = time.double() if schedule.discrete else time.double() / 1000
        alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        return module.prediction.target(x0, (x - alpha * x0) / sigma, alpha.flatten(), sigma.flatten())

    assert losses(module, 0, 1, 2, 3).min() > 1e-2
    module.denoiser = Denoiser(perfect, schedule, module.prediction)
    assert losses(module, 0, 1, 2, 3).max() < 1e-6  # the noise is recovered by a float32 division by sigma


def test_the_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    module = diffusion()
    together = losses(module, 0, 1, 2, 3)
    torch.testing.assert_close(together, torch.cat([losses(module, i) for i in range(4)]), rtol=1e-5, atol=0)
    torch.testing.assert_close(together.flip(0), losses(module, 3, 2, 1, 0), rtol=1e-5, atol=0)


def test_times_and_noise_depend_on_the_epoch_and_the_seed() -> None:
    first = losses(diffusion(), 0, 1)
    assert not (losses(diffusion(), 0, 1, draw=1) == first).any()
    assert not (losses(diffusion(seed=1), 0, 1) == first).any()


def test_latents_are_sampled_from_the_posterior_and_scaled_by_the_first_stage() -> None:
    module, images = diffusion(), batch(0, 1)
    noise = normal(0, "posterior", images["id"], images["draw"], (4, 4, 4))
    expected = tiny_vae().encode(images["image"].float() / 127.5 - 1, noise)
    torch.testing.assert_close(module.inputs.latents(images), expected, rtol=1e-5, atol=1e-5)


def test_cached_moments_give_the_losses_of_their_images() -> None:
    module, images = diffusion(), batch(0, 1, 2)
    cached: dict[str, Any] = {name: images[name] for name in ("id", "draw", "caption")}
    cached["moments"] = module.first_stage.moments(images["image"].float() / 127.5 - 1)
    expected = module.losses(images)[1]
    torch.testing.assert_close(module.losses(cached)[1], expected, rtol=1e-5, atol=1e-6)


def test_the_conditioning_is_the_text_encoding_of_the_captions() -> None:
    module = diffusion()
    text = module.conditioning(batch(0, 1, 2, 3)).get("text")
    assert text.shape == (4, 16, 16) and torch.equal(text, module.text_encoder.encode(CAPTIONS).get("text"))


def states_of(module: DiffusionTraining, images: dict[str, Any]) -> Tensor:
    return module.text_encoder.encode(images["caption"]).get("text").detach()


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_cached_text_states_train_like_the_text_encoder_even_with_dropped_captions(
    dtype: torch.dtype, digits: float
) -> None:
    module, images = diffusion(caption_dropout=0.5), batch(*range(8))
    cached = {**images, "states": states_of(module, images).to(dtype)}
    dropped = torch.tensor([True, *[False] * 5, True, True])
    text = module.conditioning(cached, dropped).get("text")
    torch.testing.assert_close(text, module.conditioning(images, dropped).get("text"), rtol=digits, atol=digits)
    torch.testing.assert_close(
        module.training_step(cached, 0)["losses"], module.training_step(images, 0)["losses"], rtol=digits, atol=digits
    )


def test_an_empty_caption_cached_in_inference_mode_can_be_trained_with() -> None:
    module, images = diffusion(caption_dropout=0.9), batch(0, 1)
    images["states"] = states_of(module, images)
    with torch.inference_mode():
        module.conditioning(images, torch.tensor([True, True]))
    module.training_step(images, 0)["loss"].backward()
    assert module.backbone.conv_in.weight.grad is not None


def test_a_share_of_captions_is_dropped_and_a_different_one_in_the_next_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    module, n, dropped = diffusion(caption_dropout=0.1), 4000, []

    def note(batch: dict[str, Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        dropped.append(set(rows.nonzero().flatten().tolist()))
        return torch.zeros(n), torch.zeros(n)

    monkeypatch.setattr(module, "losses", note)
    for draw in range(2):
        module.training_step({"id": torch.arange(n), "draw": torch.full((n,), draw)}, 0)
    for chosen in dropped:
        assert abs(len(chosen) - 400) < 4 * 360**0.5
    assert len(dropped[0] & dropped[1]) < 40 + 4 * 40**0.5


def test_a_dropped_caption_is_replaced_by_the_empty_one() -> None:
    module, images = diffusion(), batch(0, 1, 2)
    empty = module.losses({**images, "caption": ["", images["caption"][1], ""]})[1]
    assert torch.equal(module.losses(images, torch.tensor([True, False, True]))[1], empty)


def test_validation_uses_fixed_times_and_noise_and_drops_no_caption(tmp_path: Path) -> None:
    module = diffusion(caption_dropout=0.9)
    trainer = fit(tmp_path, module, steps=4)
    samples = [Images(6, seed=1)[index] for index in range(6)]
    images = {**collate(samples), "draw": torch.zeros(6).long()}
    expected = module.losses(images)[1].mean()
    torch.testing.assert_close(trainer.callback_metrics["val/pictures/loss"], expected.detach(), rtol=1e-5, atol=0)


def test_tokenizing_in_workers_gives_bit_identical_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, ahead = diffusion(caption_dropout=0.5), diffusion(caption_dropout=0.5)
    called, tokens = [], Tokenizer.__call__

    def note(tokenizer: Tokenizer, captions: list[str], *chunks: int) -> Tensor:
        called.extend(captions)
        return tokens(tokenizer, captions, *chunks)

    losses = [fit(tmp_path, local, 6).callback_metrics]
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "__call__", note)
        losses.append(fit(tmp_path, ahead, 6, tokenize=True).callback_metrics)
    assert {*called} == {""}  # the main process tokenizes only the empty caption
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(local.backbone.parameters(), ahead.backbone.parameters(), strict=True))


def test_training_changes_only_the_denoising_network(tmp_path: Path) -> None:
    module, fresh = diffusion(), diffusion()
    trainer = fit(tmp_path, module)
    for ours, theirs in zip(module.frozen, fresh.frozen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(module.backbone.conv_in.weight, fresh.backbone.conv_in.weight)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert [*state] == [f"backbone.{name}" for name, _ in module.backbone.named_parameters()]


def test_about_has_everything_that_sampling_needs(tmp_path: Path) -> None:
    module = diffusion()
    about = module.about()
    for name, kind, network in [
        ("first_stage", "vae", module.frozen[0]),
        ("text_encoder", "text_tower", module.text_encoder.towers[0]),
    ]:
        about["model"][name] = save_part(tmp_path / f"{kind}.safetensors", kind, network)
    save_model(tmp_path / "unet.safetensors", module.backbone.state_dict(), about)
    model = read_model(tmp_path / "unet.safetensors")
    inputs = torch.randn(1, 4, 4, 4), torch.ones(1), Conditioning(text=torch.randn(1, 16, 16))
    expected = module.backbone.eval()(*inputs)
    torch.testing.assert_close(model.backbone(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_text_encoder_of_the_wrong_width_is_refused() -> None:
    unet = UNet(width=8, multipliers=(1,), blocks=1, depth=(1,), heads=2, context_width=32, groups=4)
    with pytest.raises(
        ValueError, match="the unet reads text of width 32, but the text encoder gives text of width 16"
    ):
        diffusion(backbone=unet)


def test_latents_with_the_wrong_number_of_channels_are_refused() -> None:
    unet = UNet(3, 3, width=8, multipliers=(1,), blocks=1, depth=(1,), heads=2, context_width=16, groups=4)
    with pytest.raises(ValueError, match="the first stage has 4 latent channels, but the unet takes 3"):
        diffusion(backbone=unet)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_caption_dropout_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"training.caption_dropout"):
        diffusion(caption_dropout=share)


def saved(module: DiffusionTraining) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_checkpoint_of_the_same_model_is_accepted() -> None:
    diffusion().on_load_checkpoint(saved(diffusion(sampling={}, caption_dropout=0.5)))


def as_of_version_0_1(path: Path) -> None:
    """Rewrites a checkpoint in the format of version 0.1, where weights are named unet."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {
        name.replace("backbone.", "unet.", 1): tensor for name, tensor in checkpoint["state_dict"].items()
    }
    torch.save(checkpoint, path)


def test_a_checkpoint_of_version_0_1_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def train(folder: Path, steps: int, resume: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        module, ema = diffusion(), EMA(decay=0.5)
        fit(folder, module, steps, resume, callbacks=[ema, Checkpoint(folder)], enable_checkpointing=True)
        return module.state_dict(), ema.averages

    straight = train(tmp_path / "a", 4)
    train(tmp_path / "b", 2)
    as_of_version_0_1(tmp_path / "b" / "last.ckpt")
    resumed = train(tmp_path / "b", 4, tmp_path / "b" / "last.ckpt")
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_a_different_unet_is_refused_with_the_difference() -> None:
    other = UNet(width=16, multipliers=(1, 2), blocks=1, depth=(0, 1), heads=2, context_width=16, groups=4)
    with pytest.raises(ValueError, match=r"a different model than this config builds \(width 16 → 8\)"):
        diffusion().on_load_checkpoint(saved(diffusion(backbone=other)))


@pytest.mark.parametrize(
    "how",
    [
        {"prediction": Prediction("v")},
        {"schedule": Flow(shift=3.0)},
        {"first_stage": Frozen(tiny_vae(), {"weights": "", "fingerprint": "w"})},
    ],
    ids=["prediction", "schedule", "first_stage"],
)
def test_a_checkpoint_trained_with_other_model_settings_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"a different model than this config builds \\({next(iter(how))} "):
        diffusion().on_load_checkpoint(saved(diffusion(**how)))


def test_a_checkpoint_of_another_kind_of_run_is_refused() -> None:
    with pytest.raises(ValueError, match="not from a diffusion run"):
        diffusion().on_load_checkpoint({"state_dict": {}})


def test_every_global_batch_has_a_time_in_every_stratum(tmp_path: Path) -> None:
    module, times = diffusion(stratified=True), []
    losses = module.losses

    def note(images: dict[str, Any], dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t, loss = losses(images, dropped)
        if module.training:
            times.append(t)
        return t, loss

    module.losses = note  # type: ignore[method-assign]
    fit(tmp_path, module, steps=3)
    assert len(times) == 3
    for t in times:
        assert (t.sort().values * 4).floor().tolist() == [0, 1, 2, 3]


def test_the_time_input_is_a_setting_that_checkpoints_store() -> None:
    module = diffusion(schedule=EDM(), times=Uniform(EDM()), time="log_sigma")
    assert module.denoiser.time == "log_sigma" == module.about()["model"]["time"]
    with pytest.raises(ValueError, match=r"a different model than this config builds \(time log_sigma → thousand\)"):
        diffusion(schedule=EDM(), times=Uniform(EDM())).on_load_checkpoint(saved(module))


@pytest.mark.slow
def test_a_compiled_unet_is_compiled_once_despite_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, mode, **how: compile_(unet, backend=counter, **how))
    module = diffusion(compile="default")
    counts: list[int] = []
    step = module.training_step
    module.training_step = lambda *a: (step(*a), counts.append(counter.frame_count))[0]  # type: ignore[method-assign]
    fit(tmp_path, module, steps=5, val_check_interval=1, callbacks=[EMA()])
    assert len(counts) == 5 and counts[0] > 0 and set(counts) == {counts[0]} == {counter.frame_count}
    assert module.state_dict().keys() == diffusion().state_dict().keys()


def test_the_logged_loss_is_that_of_the_global_batch(tmp_path: Path) -> None:
    full, split = (fit(tmp_path, diffusion(), 3, None, size, accumulate_grad_batches=4 // size) for size in (4, 2))
    for name in ("train/loss", "val/pictures/loss"):
        torch.testing.assert_close(full.callback_metrics[name], split.callback_metrics[name], rtol=1e-5, atol=1e-6)


def test_an_unknown_compile_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.compile=fastest is not a mode of torch\.compile: choose default"):
        diffusion(compile="fastest")


def test_bfloat16_compute_with_float32_weights_requires_fsdp(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision=bf16-true keeps float32 weights only with strategy=fsdp"):
        fit(tmp_path, diffusion(compute="bfloat16"))


@pytest.mark.parametrize("size", [(8, 9), (7, 8), (0, 8)])
def test_a_size_that_the_network_cannot_sample_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"training.size is {size[0]}x{size[1]}, .* multiples of 2"):
        diffusion(size=size)


def test_images_of_an_unsupported_size_are_refused_before_training(tmp_path: Path) -> None:
    module = diffusion(backbone=tiny_dit().train())  # multiples of 4: patches of 2 latent pixels of 2 pixels
    with pytest.raises(ValueError, match=r"the size of an image in data is 6x6, .* multiples of 4"):
        fit(tmp_path, module, side=6)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_gradients_in_the_memory_of_cuda_graphs_are_not_accumulated(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ValueError, match=f"training.compile={mode} keeps gradients in the memory of CUDA graphs"):
        fit(tmp_path, diffusion(compile=mode), batch_size=2, accumulate_grad_batches=2)


def test_fused_norms_are_refused_on_a_cpu_and_in_a_compiled_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the device is cpu"):
        fit(tmp_path, diffusion(fused_norms=True))
    with pytest.raises(ValueError, match=r"set training\.compile=null"):
        diffusion(fused_norms=True, compile="default")


def test_frozen_networks_are_on_the_device_before_a_callback_trains(tmp_path: Path) -> None:
    """debug=batch_size trains in `on_fit_start` of a callback, which runs before that of the module."""

    class Early(Callback):
        def on_fit_start(self, _: Any, module: Any) -> None:
            seen.update(weight.device for network in module.frozen for weight in network.parameters())
            raise InterruptedError

    seen: set[torch.device] = set()
    with Waits(), pytest.raises(InterruptedError):
        fit(tmp_path, diffusion(), callbacks=[Early()], **on_meta())
    assert seen == {META}


@pytest.mark.full_size
def test_a_network_is_compiled_for_more_sizes_than_torch_allows_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, mode, **how: compile_(unet, backend=counter, **how))
    unet = tiny_unet()
    network = compiled(unet, "default")
    sizes = [(height, 8) for height in range(2, 26, 2)]
    for size in sizes * 2:
        network(torch.zeros(1, 4, *size), torch.zeros(1), Conditioning(text=torch.zeros(1, 3, 16)))
    assert counter.frame_count == len(sizes) > 8


def test_gradients_are_freed_before_the_next_forward_pass_unless_they_accumulate(tmp_path: Path) -> None:
    class Gradients(Callback):
        def __init__(self) -> None:
            self.held: list[bool] = []

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.held.append(any(weight.grad is not None for weight in module.backbone.parameters()))

    for accumulated, expected in ((1, [False] * 4), (2, [False, True, False, True])):
        gradients = Gradients()
        fit(tmp_path, diffusion(), steps=4 // accumulated, callbacks=[gradients], accumulate_grad_batches=accumulated)
        assert gradients.held == expected
