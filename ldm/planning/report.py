"""What a run would cost, counted on the meta device: it reads no data and no weights, and trains nothing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.nn.backbone import Backbone, check_size, trainable
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.inpainting import INPAINTING
from ldm.nn.vae import VAE
from ldm.planning.flops import Cost, Forward, measure, measure_training
from ldm.weights.find import find as find_weights
from ldm.weights.native import build as build_network

# Name, memory in GiB, and dense bf16 TFLOP/s from NVIDIA's data sheets (half of those "with sparsity").
GPUS = (
    ("A100 40 GB", 40, 312.0),
    ("A100 80 GB", 80, 312.0),
    ("H100 SXM", 80, 989.5),
    ("H200", 141, 989.5),
    ("L4", 24, 121.0),
    ("RTX 4090", 24, 165.2),
)
UTILISATION = 0.4  # of the peak, assumed
ROOM = 0.9  # of a GPU's memory, the rest being for CUDA, workspaces and fragmentation
CAPTION = 100  # bytes, assumed
ONE_DTYPE = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
LATENTS = ("ldm.data.latents.in_memory.InMemory", "ldm.data.latents.cache.CachedLatents")  # data sets of moments


@dataclass(frozen=True)
class Part:
    """A network on the meta device and its forward pass on one batch; None where a step does not call it."""

    name: str
    network: nn.Module
    forward: Forward | None
    note: str


def print_plan(config: dict[str, Any]) -> None:
    """Prints what training with this resolved config costs: parameters, FLOPs, memory, cache and time."""
    for line in plan(config):
        print(line)


def plan(config: dict[str, Any]) -> Iterator[str]:
    """The lines that `print_plan` prints."""
    trainer, batch = config["trainer"], config["data"]["batch_size"]
    parts, notes = parts_of(config)
    trained, others = parts[0], [part.network for part in parts[1:]]
    low, gpus, sharded = AUTOCAST.get(trainer["precision"]), count_gpus(trainer), is_sharded(trainer)
    held, other = (memory(config, trained.network, others, gpus, fsdp) for fsdp in (sharded, not sharded))
    trained.network.to(compute(config))  # which the weights are cast to as they are gathered
    costs = {
        part.name: measure_training(part.network, part.forward, low)
        if part is trained
        else measure(part.forward, low, grad=False)
        for part in parts
        if part.forward
    }
    held["activations"] = other["activations"] = costs[trained.name].saved
    need = sum(held.values())
    images = config["data"]["global_batch"] or batch * gpus
    flops = sum(cost.forward + cost.backward for cost in costs.values()) * images // batch

    yield "parameters"
    for part in parts:
        yield row(part.name, amount(sum(p.numel() for p in part.network.parameters())), part.note)
    yield f"FLOPs, a batch of {batch} on one GPU"
    yield from operations(costs)
    each = f"{images} images on {count(gpus, 'GPU')}, {amount(flops // images)} each"
    yield row("a step", amount(flops), each)
    names = ("ddp", "fsdp") if not sharded else ("fsdp", "ddp")
    yield f"memory a GPU (strategy {names[0]}, precision {precision_of(config)}, batch {batch})"
    for name, size in (held | {"all": need}).items():
        yield row(name, amount(size, 1024, "B"))
    if gpus > 1:
        yield row(f"all, strategy {names[1]}", amount(sum(other.values()), 1024, "B"))
    yield "  as if all were there at once; without workspaces, and without what torch.compile saves"
    yield from cache(trained, has_states(config))
    yield from hours(config, flops, need, held["activations"] / batch, gpus)
    yield from notes


def parts_of(config: dict[str, Any]) -> tuple[list[Part], list[str]]:
    """The trained network, then the frozen ones, with inputs as configured; and what to know of them."""
    training, precision = config["training"], config["trainer"]["precision"]
    notes: list[str] = []
    if precision not in ONE_DTYPE | AUTOCAST:
        known = ", ".join(ONE_DTYPE | AUTOCAST)
        raise ValueError(f"precision={precision} cannot be planned; choose one of {known}")
    dtype = ONE_DTYPE.get(precision, torch.float32)
    name = next(name for name in ("backbone", "vae", "clip") if name in training)
    network = build(training[name], notes).to("meta", dtype)
    if isinstance(network, Backbone):
        if config.get("adapter"):
            build(config["adapter"], notes).adapt(network)
        return diffusion_parts(config, network, compute(config), notes), notes
    if isinstance(network, CLIP):
        return [clip_part(config, network, dtype)], notes
    if isinstance(network, VAE):
        return [autoencoder_part(config, network, dtype)], notes
    raise ValueError(f"model is a {type(network).__name__}, which is no Backbone, autoencoder or CLIP to plan")


def clip_part(config: dict[str, Any], clip: CLIP, dtype: torch.dtype) -> Part:
    shape = config["data"]["batch_size"], config["training"]["tokenizer"]["context"]
    tokens = torch.empty(shape, dtype=torch.int64, device="meta")
    images = pictures(config, (clip.image.size, clip.image.size), dtype)
    return Part("CLIP", clip, partial(clip, tokens, images), "trained")


def autoencoder_part(config: dict[str, Any], vae: VAE, dtype: torch.dtype) -> Part:
    side = find(config["data"], "size")
    if side is None:
        raise ValueError("data names no size of pictures to plan with; add +data.size=64, or whatever it is")
    images = pictures(config, (side, side) if isinstance(side, int) else side, dtype)
    channels_last(vae)
    return Part("autoencoder", vae, lambda: vae.decode(vae.encode(images)), "trained")


def diffusion_parts(config: dict[str, Any], backbone: Backbone, dtype: torch.dtype, notes: list[str]) -> list[Part]:
    """The denoising network, and of its frozen companions those whose architecture is known."""
    training, batch = config["training"], config["data"]["batch_size"]
    height, width = training["size"]
    vae = frozen(training["first_stage"], "first stage", "vae", notes)
    text = frozen(training["text_encoder"], "text encoder", "text_tower", notes)
    factor, n = vae.factor if isinstance(vae, VAE) else 8, text.context if isinstance(text, TextTower) else 77
    if vae is None:
        notes.append("latents are taken to be an eighth the size of pictures")
    check_size(backbone, factor, (height, width), "training.size")
    shape = batch, backbone.latent_channels, height // factor, width // factor
    with torch.device("meta"):
        x, time = torch.empty(shape, dtype=dtype), torch.empty(batch)
        tokens = torch.empty(batch, n, dtype=torch.int64)
    x = x.contiguous(memory_format=torch.channels_last)
    forward = partial(backbone, x, time, inputs_of(backbone, x, n))
    parts = [Part(backbone.kind, channels_last(backbone), forward, trained_share(backbone))]
    if isinstance(vae, VAE):
        cached = any(target in LATENTS for target in targets(config["data"]["module"]["train"]))
        encode = None if cached else partial(vae.moments, pictures(config, (height, width), torch.float32))
        note = "frozen; not called in a step, because data holds latents" if cached else "frozen"
        parts.append(Part("first stage", vae, encode, note))
    if isinstance(text, TextTower):
        note = "frozen; not called in a step, because data holds its states" if has_states(config) else "frozen"
        parts.append(Part("text encoder", text, None if has_states(config) else partial(text, tokens), note))
    return parts


def inputs_of(backbone: Backbone, x: Tensor, tokens: int) -> Conditioning:
    """The conditioning that a network reads beside the latents x, on the meta device."""
    given: dict[str, Tensor] = {}
    for name, width in backbone.reads.items():
        shape = {"text": (tokens, width), INPAINTING: (width, *x.shape[2:]), "labels": ()}.get(name, (width,))
        given[name] = x.new_empty((len(x), *shape))
    hints = {name: given.pop(name) for name in (INPAINTING,) if name in given}
    return Conditioning(**given, hints=hints)


def trained_share(backbone: Backbone) -> str:
    """How much of the network is trained, for people."""
    trained = sum(weight.numel() for weight in trainable(backbone).values())
    total = sum(weight.numel() for weight in backbone.parameters())
    return "trained" if trained == total else f"{amount(trained)} of them trained"


def channels_last(network: nn.Module) -> nn.Module:
    """`network` itself, laid out as in training."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def pictures(config: dict[str, Any], size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A batch (b, 3, h, w) on the meta device."""
    shape = config["data"]["batch_size"], 3, *size
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)


def has_states(config: dict[str, Any]) -> bool:
    """Whether the data holds what the text encoder says of captions."""
    return find(config["data"]["module"]["train"], "text_encoder") is not None


def find(node: Any, key: str) -> Any:
    """The first value under `key` in nested dictionaries and lists, or None."""
    if isinstance(node, dict) and key in node:
        return node[key]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next((found for child in children if (found := find(child, key)) is not None), None)


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in nested dictionaries and lists."""
    if isinstance(node, dict) and "_target_" in node:
        yield node["_target_"]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(child)


def build(node: Any, notes: list[str]) -> Any:
    """The network of a config node, on the meta device; an argument made of no network keeps its default."""
    if not isinstance(node, dict) or "_target_" not in node:
        return node
    arguments = {}
    for key, value in node.items():
        if isinstance(value, dict) and not value.get("_target_", "").startswith("ldm.nn."):
            notes.append(f"{key} is left to its default, because {value.get('_target_')} could need data")
        elif key != "_target_":
            arguments[key] = build(value, notes)
    with torch.device("meta"):
        return named(node["_target_"])(**arguments)


def named(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


def frozen(node: dict[str, Any], name: str, kind: str, notes: list[str]) -> nn.Module | None:
    """The network its weights file describes, else the node's `config`; None with a note if neither."""
    try:
        if not node["weights"]:
            raise FileNotFoundError("its weights are not given")
        network = find_weights(node["weights"]).network(kind).build()
    except (FileNotFoundError, ValueError) as error:
        if "config" not in node:
            notes.append(f"the {name} is not counted: {error}")
            return None
        network = build_network({"kind": kind, "config": node["config"]}, node["weights"])
    return channels_last(network.requires_grad_(False).to("meta"))


def memory(
    config: dict[str, Any], trained: nn.Module, frozen: list[nn.Module], gpus: int, sharded: bool
) -> dict[str, int]:
    """Bytes that a GPU holds all the time, by what they are."""
    strategy, parameters = config["trainer"]["strategy"], list(trainable(trained).values())
    gradients = size(parameters)
    state = {"weights": size(trained.parameters()), "gradients": gradients}
    state["optimizer"] = optimizer_state(config["optimizer"], parameters)
    if (ema := config["ema"]) and ema.get("device") != "cpu":
        each = getattr(torch, ema.get("dtype", "float32")).itemsize * len(ema.get("lengths", [None]))
        state["EMA"] = each * sum(p.numel() for p in parameters)  # in its own type, whatever that of the weights
    if sharded:
        state = {f"{name}, sharded": -(-held // gpus) for name, held in state.items()}
        state["gathered"] = gathered(trained, compute(config))
    elif gpus > 1 and not find(strategy, "gradient_as_bucket_view"):
        state["buckets of DDP"] = gradients
    if frozen:
        state["frozen networks"] = sum(size(network.parameters()) for network in frozen)
    return state


def gathered(trained: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the weights that FSDP2 has gathered at its peak: those in no repeated block, of the largest block, and
    of the next. The gathered gradients of a block come later, when old ones have gone.
    """
    everywhere = sum(p.numel() for p in trained.parameters())
    repeated = trained.repeated_blocks() if isinstance(trained, Backbone) else []
    blocks = [sum(p.numel() for p in block.parameters()) for block in repeated] or [0]
    return dtype.itemsize * (everywhere - sum(blocks) + 2 * max(blocks))


def is_sharded(trainer: dict[str, Any]) -> bool:
    return any("ModelParallel" in target for target in targets(trainer["strategy"]))


def compute(config: dict[str, Any]) -> torch.dtype:
    """What the trained network's weights are when it is called."""
    named = config["training"].get("compute")
    return getattr(torch, named) if named else ONE_DTYPE.get(config["trainer"]["precision"], torch.float32)


def precision_of(config: dict[str, Any]) -> str:
    named = config["training"].get("compute")
    return f"{named} from float32 weights" if named else config["trainer"]["precision"]


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def optimizer_state(node: dict[str, Any], parameters: list[nn.Parameter]) -> int:
    """Bytes that the optimizer keeps after its first step, which it takes on the meta device."""
    options = {key: value for key, value in node.items() if key not in ("_target_", "_partial_", "fused", "foreach")}
    optimizer = named(node["_target_"])(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return size(value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))


def count_gpus(trainer: dict[str, Any]) -> int:
    """How many GPUs the Trainer's arguments ask for; as many as it finds (auto) counts as one a node."""
    devices = trainer["devices"]
    if isinstance(devices, list):
        return len(devices) * trainer["num_nodes"]
    return (1 if devices in ("auto", "-1", -1) else int(devices)) * trainer["num_nodes"]


def operations(costs: dict[str, Cost]) -> Iterator[str]:
    for name, cost in costs.items():
        yield row(f"{name}, forward", amount(cost.forward))
        if cost.backward:
            yield row(f"{name}, backward", amount(cost.backward))


def cache(trained: Part, states: bool) -> Iterator[str]:
    """What `ldm encode` would write a sample: moments in half precision, and a caption, perhaps with its states."""
    if isinstance(trained.network, Backbone) and isinstance(trained.forward, partial):
        z, height, width = trained.forward.args[0].shape[1:]
        _, tokens, width_of_states = trained.forward.args[2].get("text").shape
        held = 2 * (2 * z * height * width) + CAPTION + states * 2 * tokens * width_of_states
        told = f", with states {tokens}x{width_of_states} in float16" if states else ""
        yield f"cache (moments {2 * z}x{height}x{width} in float16; {CAPTION} bytes of caption{told}, assumed)"
        yield row("a sample", amount(held, 1024, "B"))
        yield row("a million", amount(held * 10**6, 1024, "B"))


def hours(config: dict[str, Any], flops: int, need: int, image: float, gpus: int) -> Iterator[str]:
    """Time for all steps on each of `GPUS`, and up to which batch size memory is enough; an image adds `image`."""
    trainer, batch = config["trainer"], config["data"]["batch_size"]
    steps, single = trainer["max_steps"], precision_of(config).startswith("32")
    yield f"time for {steps} steps on {count(gpus, 'GPU')}, at {UTILISATION:.0%} (assumed) of the dense peak"
    for name, held, peak in GPUS:
        peak = peak / 2 if single else peak  # TF32
        duration = flops * steps / (gpus * peak * 1e12 * UTILISATION) / 3600
        most = int((ROOM * held * 2**30 - need) / image + batch)  # images of a batch
        fits = f"fits a batch up to {most}" if most > 0 else f"does not fit in {ROOM:.0%} of {held} GiB"
        yield row(name, f"{duration:.3g} h", f"{peak:.4g} TFLOP/s {'TF32' if single else 'bf16'}, {fits}")
    if trainer["devices"] in ("auto", "-1", -1):
        yield "trainer.devices=auto counts as one GPU a node: set trainer.devices=N for N"


def row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<24}{value:>12}  {note}".rstrip()


def amount(value: float, base: int = 1000, unit: str = "") -> str:
    """Four digits and a prefix: 859.5 M, or with base 1024 and unit B 13.94 GiB."""
    exponent = 0
    while value >= base and exponent < 6:
        value, exponent = value / base, exponent + 1
    prefix = ("", *"kMGTPE")[exponent] if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")[exponent]
    return f"{value:.4g} {prefix}{unit}".rstrip()


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
