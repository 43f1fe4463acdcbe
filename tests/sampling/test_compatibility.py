"""Each test of a rule checks its message, and demonstrates the failure that the rule prevents."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import NETWORK_TIMES, Denoiser
from ldm.diffusion.guidance import classifier_free, interval_to_times
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.prediction import COEFFICIENTS, Prediction
from ldm.diffusion.schedule import Flow, cosine, linear, scaled_linear, sigmoid, zero_terminal_snr
from ldm.diffusion.weighting import WEIGHTINGS, debiased, edm, min_snr, uniform
from ldm.nn.backbone import check_inputs
from ldm.nn.unet import UNet
from ldm.sampling.compatibility import Setup, contradictions
from ldm.sampling.driver import SAMPLERS, sample
from ldm.sampling.grid import Grid
from ldm.sampling.one_step import ddim, euler
from ldm.sampling.spacing import SPACINGS, leading, trailing
from tests.closed_form import EVERY_SCHEDULE, gaussian, schedule_name, states

FLOW, SD = Flow(), scaled_linear()
PURE = [FLOW, zero_terminal_snr(SD)]
V, EPS, X0 = Prediction("v"), Prediction("eps"), Prediction("x0")
END = torch.ones(1, dtype=torch.float64)
over_pure = pytest.mark.parametrize("schedule", PURE, ids=schedule_name)


SAMPLING = "sampler", "spacing", "steps", "sampler_options", "spacing_options", "guidance", "guidance_interval"


def problems(*parts, **settings):
    sampling = {"steps": 20} | {name: settings.pop(name) for name in SAMPLING if name in settings}
    return contradictions(Setup(*parts, sampling=sampling, **settings))


def assert_one(sentences, *words):
    """Asserts that there is one sentence, and that it contains all the words."""
    (sentence,) = sentences
    assert sentence.count(". ") == 0 and all(word in sentence for word in words), sentence


def noise(draw):
    return torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(draw))


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=schedule_name)
@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras", "log_snr"])
def test_settings_that_work_on_every_schedule_are_accepted(schedule, prediction, spacing):
    settings = {"spacing": spacing, "sampler": "dpmpp_2m", "guidance": 7.5, "guidance_interval": (0.3, 5.0)}
    assert problems(schedule, Prediction(prediction), uniform(), caption_dropout=0.1, **settings) == []


@pytest.mark.parametrize("prediction", COEFFICIENTS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("time", NETWORK_TIMES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_stable_diffusion_schedule_works_with_all_settings(prediction, spacing, time, weighting):
    settings = {"spacing": spacing, "time": time, "guidance": 7.5, "offset_noise": 0.1}
    assert problems(SD, Prediction(prediction), WEIGHTINGS[weighting](), **settings) == []


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("schedule", [SD, *PURE], ids=schedule_name)
def test_every_sampler_works_with_the_usual_schedules(sampler, steps, schedule):
    assert problems(schedule, V, sampler=sampler, spacing="trailing", steps=steps) == []


@over_pure
def test_eps_prediction_is_refused_at_zero_snr_where_errors_are_unbounded(schedule):
    assert_one(problems(schedule, EPS), "prediction=eps", f"schedule={schedule.name}", "use prediction=v")
    shares = torch.tensor([0.9, 0.99, 0.999, 1.0], dtype=torch.float64)
    t, x0, eps = schedule.t_max * shares, torch.ones(4, 8).double(), torch.full((4, 8), 0.3).double()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha.view(-1, 1) * x0 + sigma.view(-1, 1) * eps
    error = {
        p.name: (p.to_x0(x, p.target(x0, eps, alpha, sigma) + 0.01, alpha, sigma) - x0).abs().amax(1) for p in (EPS, V)
    }
    assert (error["eps"][:3].diff() > 0).all() and error["eps"][2] > 5 and not error["eps"][3].isfinite()
    assert (error["v"] < 0.02).all()


@over_pure
@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr", "p2", "sigmoid", "debiased"])
def test_a_weight_of_0_is_refused_since_the_first_step_would_not_be_trained(schedule, name):
    weighting = WEIGHTINGS[name]()
    names = f"weighting={name}", "prediction=v", f"schedule={schedule.name}", "use weighting=uniform"
    assert_one(problems(schedule, V, weighting), *names)
    x0 = states(1)
    denoiser = Denoiser(lambda x, *_: x + 1e3, schedule, V)  # wrong everywhere, but without loss at the end
    at_end, inside = (
        float(diffusion_loss(denoiser, x0, x0, t * schedule.t_max * END, torch.zeros(1, 1, 1), weighting))
        for t in (1, 0.5)
    )
    assert at_end < 1e-100 and inside > 1


@pytest.mark.parametrize(
    ("schedule", "prediction", "weighting", "side"),
    [(FLOW, X0, edm(), "start"), (FLOW, Prediction("x0"), debiased(), "start"), (cosine(), EPS, edm(), "end")],
    ids=["edm of x0", "debiased of x0", "edm of eps"],
)
def test_an_unbounded_weight_is_refused_since_one_time_would_dominate(schedule, prediction, weighting, side):
    sentences = problems(schedule, prediction, weighting)
    matching = [sentence for sentence in sentences if f"the {side} of schedule={schedule.name} a weight" in sentence]
    assert_one(matching, f"weighting={weighting.name}", f"prediction={prediction.name}", "use prediction=v")
    t = torch.linspace(schedule.t_min, schedule.t_max, 1000, dtype=torch.float64)
    shares = {}
    for p in (prediction, V):
        weights = weighting(schedule.alpha(t), schedule.sigma(t), p)
        shares[p.name] = float(weights.max() / weights.sum())
    assert shares[prediction.name] > 0.9 and shares["v"] < 0.01


@over_pure
def test_log_sigma_is_refused_at_zero_snr_where_it_is_infinite(schedule):
    assert_one(problems(schedule, V, time="log_sigma"), "time=log_sigma", f"schedule={schedule.name}", "time=thousand")
    grid, exact = Grid.of(schedule, trailing(schedule, 50)), gaussian(schedule, 2.0, 0.8)

    def generate(time):
        def denoise(x, t):
            encoded = NETWORK_TIMES[time](schedule, torch.tensor([t], dtype=torch.float64))
            return exact(x, t) * (encoded.cos() ** 2 + encoded.sin() ** 2)  # 1, unless the time is not finite

        return sample(ddim, denoise, grid.start(torch.cat((states(), -states()))), grid)

    assert float(generate("thousand").mean()) == pytest.approx(2, abs=0.01)
    with pytest.raises(FloatingPointError, match="after step 1 of 50"):
        generate("log_sigma")


def brightness(offset):
    """The exact denoiser of constant images, whose value has standard deviation 1, under offset noise."""
    schedule = zero_terminal_snr(SD)

    def denoise(x, t):
        mean = x.mean((1, 2, 3), keepdim=True)
        alpha, sigma = (float(f(torch.tensor(t).double())) for f in (schedule.alpha, schedule.sigma))
        return (alpha / (alpha**2 + sigma**2 * (1 / x[0].numel() + offset**2)) * mean).expand_as(x)

    return schedule, denoise


def test_offset_noise_is_refused_at_zero_snr_where_brightness_varies_too_little():
    assert_one(
        problems(PURE[1], V, offset_noise=0.1),
        "offset_noise=0.1",
        "schedule=zero_terminal_snr",
        "use offset_noise=0",
    )
    spread = {}
    for offset in (0.0, 0.1):
        schedule, denoise = brightness(offset)
        grid = Grid.of(schedule, trailing(schedule, 200))
        x = torch.full((1, 1, 16, 16), 1 / 16, dtype=torch.float64)
        spread[offset] = float(sample(ddim, denoise, grid.start(x), grid).mean())
    assert spread[0.0] == pytest.approx(1, abs=0.1) and spread[0.1] < 0.6


def test_guidance_without_caption_dropout_is_refused_as_untrained():
    assert_one(
        problems(SD, V, guidance=3.0, caption_dropout=0.0),
        "guidance=3",
        "caption_dropout=0",
        "use caption_dropout=0.1",
    )
    assert problems(SD, V, guidance=1.0, caption_dropout=0.0) == []
    targets, guided = [1.0, 2.0], {}  # the targets of two prompts
    for dropout in (0.0, 0.1):
        output = [9.0, 9.0, 9.0]  # for each prompt and for none: the network is initialised far from the targets
        for step in range(2000):
            prompt = step % 2
            row = 2 if step % 20 < 20 * dropout else prompt
            output[row] += 0.05 * (targets[prompt] - output[row])
        guided[dropout] = [output[2] + 3 * (output[prompt] - output[2]) for prompt in range(2)]
    assert guided[0.1] == pytest.approx([0, 3], abs=0.2)  # 1.5 ± 3 · 0.5
    assert guided[0.0] == pytest.approx([9 + 3 * (1 - 9), 9 + 3 * (2 - 9)], abs=0.2)


def test_inputs_whose_widths_differ_from_the_network_s_are_refused():
    unet = UNet(width=8, multipliers=(1,), blocks=1, depth=(1,), heads=2, context_width=16, groups=4)
    for channels, width in ((4, 24), (8, 16)):
        with pytest.raises(ValueError, match="choose a"):
            check_inputs(unet, channels, {"text": width})
        with pytest.raises(RuntimeError):
            text = torch.zeros(1, 3, width)
            unet(torch.zeros(1, channels, 4, 4), torch.zeros(1), Conditioning(text=text))


def test_truncating_widths_instead_would_lose_the_prompt_and_keep_noise():
    # `text` encodes a prompt: its sign is that of the mean of the data, ±2.
    schedule, means, text = PURE[1], {}, torch.eye(24)[20]
    grid = Grid.of(schedule, trailing(schedule, 50))
    x = grid.start(torch.cat((states(), -states())))
    for width in (24, 16):
        for prompt in (text, -text):
            mean = float(prompt[:width] @ (2 * text)[:width])
            means.setdefault(width, []).append(float(sample(ddim, gaussian(schedule, mean, 0.8), x, grid).mean()))
    assert means[24] == pytest.approx([2, -2], abs=0.01) and means[16] == pytest.approx([0, 0], abs=0.01)

    def denoise(x, t):
        """Exact for the first four channels; an output of 0, under prediction=v, for the others."""
        others = float(schedule.alpha(torch.tensor(t).double())) * x[:, 4:]
        return torch.cat((gaussian(schedule, 0.0, 0.1)(x[:, :4], t), others), 1)

    x = grid.start(states().expand(-1, 8, -1, -1))
    samples = sample(ddim, denoise, x, grid)
    left = math.prod(t.alpha * s.alpha + t.sigma * s.sigma for t, s in pairwise(grid.points))  # cosines of small turns
    torch.testing.assert_close(samples[:, 4:], left * x[:, 4:])
    assert left > 0.9 and float(samples[:, :4].std()) < 0.1


@over_pure
def test_leading_spacing_is_refused_at_zero_snr_where_it_biases_the_mean(schedule):
    words = "spacing=leading", f"schedule={schedule.name}", "use spacing=trailing"
    assert_one(problems(schedule, V, spacing="leading", steps=10), *words)
    mean, x, ends = 2.0, torch.cat((states(), -states())), {}
    for spacing in (leading, trailing):
        grid = Grid.of(schedule, spacing(schedule, 10))
        ends[spacing] = float(sample(euler, gaussian(schedule, mean, 0.8), grid.start(x), grid).mean())
    assert ends[trailing] == pytest.approx(mean, abs=0.01) and ends[leading] < mean - 0.03


@pytest.mark.parametrize("schedule", [cosine(), sigmoid()], ids=schedule_name)
def test_eps_prediction_is_refused_where_the_first_step_amplifies_errors(schedule):
    words = "prediction=eps", f"schedule={schedule.name}", "spacing=trailing", "steps=20", "use prediction=v"
    assert_one(problems(schedule, EPS, spacing="trailing", steps=20), *words)
    assert problems(schedule, EPS, spacing="leading", steps=20) == []
    off = {}
    for prediction, spacing in ((EPS, "trailing"), (EPS, "leading"), (V, "trailing")):
        exact = gaussian(schedule, 0.0, 0.5)

        def network(x, time, conditioning, prediction=prediction, exact=exact):
            """The exact output plus 0.01."""
            t = time[:1].double()
            alpha, sigma, x0 = schedule.alpha(t), schedule.sigma(t), exact(x, float(t))
            return prediction.target(x0, (x - alpha * x0) / sigma, alpha, sigma) + 0.01

        grid = Grid.of(schedule, SPACINGS[spacing](schedule, 20))
        denoise = partial(Denoiser(network, schedule, prediction), conditioning=Conditioning())
        x = grid.start(states())
        change = sample(ddim, denoise, x, grid) - sample(ddim, exact, x, grid)
        off[prediction.name, spacing] = float(change.abs().max())
    assert off["eps", "trailing"] > 2 and off["eps", "leading"] < 0.1 and off["v", "trailing"] < 0.1


@pytest.mark.parametrize(("sampler", "steps"), [("pndm", 20), ("pndm", 50), ("heun", 5), ("edm", 4)])
@pytest.mark.parametrize("schedule", [cosine(), sigmoid()], ids=schedule_name)
def test_a_sampler_whose_first_step_makes_samples_too_wide_is_refused(sampler, steps, schedule):
    settings = {"sampler": sampler, "steps": steps}
    words = f"sampler={sampler}", "spacing=trailing", f"steps={steps}", f"schedule={schedule.name}", "dpmpp_2m"
    assert_one(problems(schedule, V, spacing="trailing", **settings), *words)
    assert problems(schedule, V, spacing="leading", **settings) == []
    wide = {}
    for name, spacing in ((sampler, trailing), (sampler, leading), ("dpmpp_2m", trailing)):
        grid = Grid.of(schedule, spacing(schedule, steps))
        x = sample(SAMPLERS[name], gaussian(schedule, 1.0, 0.3), grid.start(states()), grid, noise)
        wide[name, spacing] = float(x.std()) / 0.3
    assert wide[sampler, trailing] > 10 > 3 > max(wide[sampler, leading], wide["dpmpp_2m", trailing])


def test_a_guidance_interval_without_sampled_times_is_refused():
    interval = (200.0, 800.0)  # times of another schedule
    settings = {"spacing": "trailing", "steps": 10}
    words = "interval [200.0, 800.0]", "schedule=scaled_linear", "[0.3, 5]"
    assert_one(problems(SD, V, guidance_interval=interval, **settings), *words)
    assert_one(problems(SD, V, guidance_interval=interval), *words)
    assert_one(problems(SD, V, guidance_interval=(1.0, 1.001), **settings), "contains no sampled time")
    positive, x = Conditioning(text=torch.ones(4, 1, 1)), states(4)

    def denoiser(x, t, conditioning):
        return x + conditioning.get("text").view(-1, 1, 1, 1)

    guided = classifier_free(denoiser, positive, positive.map(torch.neg), 7.5, interval_to_times(SD, interval))
    assert all(torch.equal(guided(x, t), denoiser(x, t, positive)) for t in trailing(SD, 10).tolist())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spacing": "leading", "steps": 1000}, ("use fewer steps",)),
        ({"spacing": "trailing", "steps": 0}, ("steps is 0",)),
        ({"spacing": "sideways"}, ("spacing is 'sideways'", "trailing")),
        ({"guidance_interval": [1.0]}, ("interval is [1.0]", "[0.3, 5]")),
        ({"guidance_interval": [5.0, 0.3]}, ("a low and a high sigma/alpha, not 5.0 and 0.3",)),
        ({"guidance_interval": 0.3}, ("interval is 0.3",)),
        ({"guidance_interval": [None, 5.0]}, ("interval is [None, 5.0]", "[2, null]")),
        ({"sampler": "eular"}, ("sampler is 'eular'", "euler")),
        ({"sampler": "ddim", "sampler_options": {"eat": 1.0}}, ("eat", "eta")),
    ],
)
def test_invalid_spacings_samplers_and_intervals_are_reported_not_raised(settings, words):
    assert_one(problems(linear(), V, **settings), *words)


def test_all_contradictions_are_reported_at_once():
    sentences = problems(
        FLOW, EPS, min_snr(), time="log_sigma", spacing="leading", steps=10, guidance=2, caption_dropout=0
    )
    assert len(sentences) == 4


@pytest.mark.parametrize("scale", [3.0, 7.5])
def test_zero_terminal_snr_does_not_amplify_guidance_so_no_rule_forbids_it(scale):
    """Lin et al. 2024, section 3.4, warn of it, but with exact denoisers the schedule makes no difference."""
    ends = []
    for schedule in (SD, zero_terminal_snr(SD)):
        positive, negative = gaussian(schedule, 0.8, 0.5), gaussian(schedule, 0.0, 0.5)

        def denoise(x, t, positive=positive, negative=negative):
            return negative(x, t) + scale * (positive(x, t) - negative(x, t))

        grid = Grid.of(schedule, trailing(schedule, 50))
        ends.append(float(sample(ddim, denoise, grid.start(states(500)), grid).mean()))
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
