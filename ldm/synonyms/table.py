"""Names of settings in other programs, and the settings of ldm that have the same meaning.

The other programs are diffusers and its training scripts, AUTOMATIC1111's web UI, ComfyUI, kohya's sd-scripts and
CompVis's scripts. A name whose values have another meaning here is an `Instead`, which says what to write.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Same:
    """The setting of ldm with the same meaning; `convert` changes the value to that of ldm."""

    ours: str
    convert: Callable[[Any], Any] = lambda value: value


class Instead(str):
    """What to write instead."""


def _guidance_scale(scale: Any) -> Any:
    """diffusers turns guidance off at scales up to 1; here only 1 is no guidance."""
    return max(1.0, scale) if isinstance(scale, int | float) else scale


# For sample.py and the calls of a pipeline.
SAMPLING: dict[str, Same | Instead] = {
    "num_inference_steps": Same("steps"),
    "ddim_steps": Same("steps"),
    "guidance_scale": Same("guidance", _guidance_scale),
    "cfg_scale": Same("guidance"),
    "cfg": Same("guidance"),
    "scale": Same("guidance"),
    "negative_prompt": Same("negative"),
    "mask_image": Same("mask"),
    "scheduler": Same("sampler"),
    "sampler_name": Same("sampler"),
    "schedule_type": Same("spacing", lambda name: name.lower() if isinstance(name, str) else name),
    "height": Same("height"),  # together with width: size
    "width": Same("width"),
    "denoising_strength": Instead("strength, which runs int(strength * steps) steps, one less than the web UI"),
    "CLIP_stop_at_last_layers": Same("clip_skip", lambda layers: layers - 1 if isinstance(layers, int) else layers),
}
# For sample.py only.
COMMAND: dict[str, Same | Instead] = {
    "prompt": Same("prompt"),
    "image": Same("init"),
    "init_image": Same("init"),
    "init_img": Same("init"),
    "num_images_per_prompt": Same("n"),
    "num_images": Same("n"),
    "output": Same("out"),
    "outdir": Same("out"),
    "output_dir": Same("out"),
    "ckpt": Same("model"),
    "H": Same("height"),
    "W": Same("width"),
    "pretrained_model_name_or_path": Same("model"),
    "eta": Instead("sampler_options=eta=NUMBER, with a sampler that has this option, such as sampler=ddim"),
    "plms": Instead("sampler=PLMS"),
    "generator": Instead("seed=SEED, with noise=diffusers for the noise of torch.Generator().manual_seed(SEED)"),
    "n_iter": Instead("n=NUMBER, the number of images per prompt"),
    "n_samples": Instead("n=NUMBER, the number of images per prompt, and batch_size=NUMBER"),
}
# For calls of a pipeline only.
CALL: dict[str, Same | Instead] = {
    "prompt": Same("prompts"),
    "seed": Same("seeds"),
    "init_image": Same("image"),
    "eta": Instead('sampler_options={"eta": …}, with a sampler that has this option, such as sampler="ddim"'),
    "generator": Instead('seeds=SEED, with noise="diffusers" for the noise of torch.Generator().manual_seed(SEED)'),
    **dict.fromkeys(("num_images_per_prompt", "n"), Instead("a list with the prompt repeated, such as [prompt] * 4")),
    "output_type": Instead("no such argument: the result has .images, a tensor, and .pil, a list of PIL images"),
    "return_dict": Instead("no such argument: the result has .images, a tensor, and .pil, a list of PIL images"),
    "callback_on_step_end": Instead("on_step=FUNCTION or on_estimate=FUNCTION"),
    "cross_attention_kwargs": Instead("Pipeline.load(…, adapters=[(FILE, WEIGHT)])"),
}

# Samplers by their names in lower case, with _ for spaces and p for +; those that are spelt as here are left out.
SAMPLERS: dict[str, dict[str, Any]] = {
    "euler_ancestral": {"sampler": "euler_a"},
    "plms": {"sampler": "pndm", "sampler_options": {"prk": False}},
    "unipc": {"sampler": "unipc", "sampler_options": {"order": 3, "variant": "bh1"}},
    "uni_pc": {"sampler": "unipc", "sampler_options": {"order": 3, "variant": "bh1"}},
    "uni_pc_bh2": {"sampler": "unipc", "sampler_options": {"order": 3}},
    "dpmpp_2s_a": {"sampler": "dpmpp_2s", "sampler_options": {"eta": 1.0}},
    "dpmpp_2s_ancestral": {"sampler": "dpmpp_2s", "sampler_options": {"eta": 1.0}},
    "dpmpp_2m_sde_heun": {"sampler": "dpmpp_2m_sde", "sampler_options": {"rule": "heun"}},
    **{name: {"sampler": name} for name in ("ddpm", "ddim", "euler", "euler_a", "heun", "lms", "deis")},
    **{name: {"sampler": name} for name in ("dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")},
}
SPACINGS = ("karras", "exponential")  # also as the last word of a sampler's name

# For train.py: what to write, with {} for the value; or that for each value.
TRAINING: dict[str, str | dict[str, str] | Instead] = {
    "learning_rate": "optimizer.lr={}",
    "max_train_steps": "trainer.max_steps={}",
    "num_train_epochs": "trainer.max_steps=-1 trainer.max_epochs={}",
    "max_train_epochs": "trainer.max_steps=-1 trainer.max_epochs={}",
    "train_batch_size": "data.batch_size={}",
    "per_device_train_batch_size": "data.batch_size={}",
    "gradient_accumulation_steps": Instead(
        "data.global_batch=NUMBER, the images of an optimizer step on all GPUs: data.batch_size × GPUs × accumulation "
        "steps"
    ),
    "mixed_precision": {"no": "precision=fp32", "fp16": "precision=16-mixed", "bf16": "precision=bf16-mixed"},
    "gradient_checkpointing": {"true": "model.checkpointing=true", "false": "model.checkpointing=false"},
    "max_grad_norm": "trainer.gradient_clip_val={}",
    "lr_scheduler": {
        "constant": "lr=constant lr.warmup=0",
        "constant_with_warmup": "lr=constant",
        "cosine": "lr=cosine lr.final=0",
        "linear": "lr=linear lr.final=0 lr.hold=0",
    },
    "lr_warmup_steps": "lr.warmup={}",
    "weight_decay": "optimizer.weight_decay={}",
    "adam_weight_decay": "optimizer.weight_decay={}",
    "adam_epsilon": "optimizer.eps={}",
    "adam_beta1": Instead("optimizer.betas=[BETA1,BETA2]"),
    "adam_beta2": Instead("optimizer.betas=[BETA1,BETA2]"),
    "use_8bit_adam": {"true": "optimizer=adamw_8bit"},
    "snr_gamma": "weighting=min_snr weighting.gamma={}",
    "min_snr_gamma": "weighting=min_snr weighting.gamma={}",
    "noise_offset": "training.offset_noise={}",
    "resolution": "training.size=[{},{}]",
    "rank": "adapter.rank={}",
    "network_dim": "adapter.rank={}",
    "network_alpha": "adapter.alpha={}",
    "instance_prompt": "data.caption={}",
    "class_prompt": "data.class_prompt={}",
    "train_data_dir": "data.root={}",
    "instance_data_dir": "data.root={}",
    "pretrained_model_name_or_path": "training.start={}",
    "output_dir": "run_dir={}",
    "resume_from_checkpoint": {"latest": "resume=auto"},
    "checkpointing_steps": "callbacks.checkpoint.every_n_train_steps={}",
    "dataloader_num_workers": "data.workers={}",
    "report_to": {"tensorboard": "logger=tensorboard", "wandb": "logger=wandb", "none": "logger=none"},
    "num_inference_steps": "sampler.steps={}",
    "guidance_scale": "guidance.scale={}",
    "cfg_scale": "guidance.scale={}",
    "validation_prompt": Instead("callbacks.previews.prompts=[PROMPT,PROMPT]"),
}
