"""Model families behind one interface: the registry, schedules, branches, two denoisers, a causal decoder."""

import copy
import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from vader_nb import Prompt, align, load, lora, memory, models, rewards
from vader_nb.models import CHECKPOINTS, Conditioning
from vader_nb.models.modelscope import ModelScope
from vader_nb.sampling import Sampling, initial_noise, sample
from vader_nb.strategies import DRaFTLV, DRTune, Frames, Last, ReFL

from .test_gradient import PROMPTS, REWARDS, SEEDS, adapted, assert_equal, plain_autograd, staged

# ------------------------------------------------------------------------------------------ the registry


def test_a_copy_of_tiny_is_tiny(tiny, tmp_path):
    shutil.copytree(CHECKPOINTS["tiny"], tmp_path / "copy")
    model = load(tmp_path / "copy")
    assert model.defaults == tiny.defaults and model.world == tiny.world == "tiny"
    assert type(model.scheduler) is type(tiny.scheduler)
    settings = {"seeds": 3, "sampling": Sampling(num_inference_steps=2)}
    assert torch.equal(
        sample(model, "a red star", **settings), sample(tiny, "a red star", **settings)
    )


def test_the_guide_adds_a_family_that_keeps_its_promises(tmp_path, monkeypatch, capsys):
    """The code of notebooks/add_a_model.md, run as it stands there."""
    guide = Path(__file__).parent.parent / "notebooks" / "add_a_model.md"
    text = guide.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {"__name__": "guide"})
    assert "peak memory, simulated against counted" in capsys.readouterr().out
    run = align(load("my_model"), rewards.brightness(), ["a", "b"], steps=2, rank=2, progress=False)
    assert len(run.metrics) == 2 and run.metrics[-1]["reward"] != 0
    assert max(memory("my_model", "brightness", dtype="float32").stages.values()) > 0


def test_a_wrong_gradient_is_found_at_load(monkeypatch):
    state = torch.get_rng_state()
    model = load("tiny", check=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not lora._layers(model)
    pulled = ModelScope.decode_vjp
    monkeypatch.setattr(ModelScope, "decode_vjp", lambda *args: pulled(*args) / 2)
    with pytest.raises(AssertionError, match="(?s)'tiny' is not .*finite difference .*FAILED"):
        load("tiny", check=True)
    load("tiny")  # checked in this process before
    monkeypatch.setattr(models, "_checked", set())
    with pytest.raises(AssertionError, match="FAILED"):
        load("tiny")
    load("tiny", check=False)


def change_index(folder, **values):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | values))


def test_a_directory_is_loaded_with_its_own_scheduler(micro_directory, tmp_path):
    folder = shutil.copytree(micro_directory, tmp_path / "copy")
    change_index(folder, scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert type(load(folder).scheduler) is diffusers.EulerDiscreteScheduler
    assert type(models.from_config(folder).scheduler) is diffusers.EulerDiscreteScheduler


def test_a_family_is_found_by_its_pipeline_class(micro_directory, tmp_path, monkeypatch):
    folder = shutil.copytree(micro_directory, tmp_path / "copy")
    change_index(folder, _class_name="MyPipeline")
    with pytest.raises(
        ValueError, match="a MyPipeline, which no family here can run; known: TextToVideo"
    ):
        load(folder)

    class Mine(ModelScope):
        sampling_options = {"fps": 8}

    monkeypatch.setitem(models.FAMILIES, "MyPipeline", Mine)
    model = load(folder)
    assert type(model) is Mine
    assert Sampling().resolve(model).options == {"fps": 8}
    assert Sampling(options={"fps": 24}).resolve(model).options == {"fps": 24}
    with pytest.raises(ValueError, match="no sampling option 'motion'; it has: fps"):
        Sampling(options={"motion": 1}).resolve(model)


def test_every_part_has_its_own_dtype(micro_directory):
    types = {"unet": torch.bfloat16, "vae": torch.float64, "default": torch.float32}
    model = load(micro_directory, dtype=types)
    assert (model.dtype, model.vae.dtype) == (torch.bfloat16, torch.float64)
    assert model.text_encoder.dtype == torch.float32
    settings = Sampling(num_inference_steps=1, num_frames=1, height=16, width=16)
    assert sample(model, "a red star", sampling=settings).dtype == torch.float64


# ------------------------------------------------------------------------------------------- prompts


def test_a_negative_prompt_is_diffusers_negative_prompt(micro_directory):
    model, pipeline = (
        load(micro_directory),
        diffusers.DiffusionPipeline.from_pretrained(micro_directory),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval(), pipeline.vae.eval()
    settings = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "num_frames": 2,
        "height": 16,
        "width": 16,
    }
    prompt = Prompt("a red star", negative_prompt="a blue circle")
    theirs = pipeline(
        prompt.text,
        negative_prompt=prompt.negative_prompt,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        **settings,
    ).frames
    ours = sample(model, prompt, seeds=5, sampling=Sampling(**settings))
    torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours, sample(model, prompt.text, seeds=5, sampling=Sampling(**settings)))


def test_a_model_of_text_refuses_an_image(micro):
    with pytest.raises(ValueError, match="takes? no image"):
        sample(micro, Prompt("a red star", image=torch.zeros(3, 16, 16)))


# ------------------------------------------------------------------------------------------- schedules

TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": {},
    "LCMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "UniPC of noise": {"predict_x0": False},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_x0_is_the_clean_video_whatever_the_scheduler(micro, kind, prediction):
    """A denoiser that predicts perfectly: from the noised latents, at any step, the clean ones come back."""
    name = "UniPCMultistepScheduler" if kind.startswith("UniPC of") else kind
    flow = "FlowMatch" in name
    config = {} if flow else TRAINED | {"prediction_type": prediction} | KINDS[kind]
    micro.scheduler = getattr(diffusers, name)(**config)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (
        torch.randn(2, 4, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in "ab"
    )
    scheduler = micro.new_scheduler(Sampling(num_inference_steps=5))
    for t in scheduler.timesteps[1:4]:
        alpha, sigma = micro.signal_and_noise(scheduler, t)
        noised = alpha * clean + sigma * noise
        length = (alpha**2 + sigma**2) ** 0.5
        output = {
            "epsilon": noise,
            "v_prediction": (alpha * noise - sigma * clean) / length,
            "sample": clean,
        }[prediction]
        output = noise - clean if flow else output
        torch.testing.assert_close(
            micro.x0(scheduler, output, t, noised), clean, rtol=1e-4, atol=1e-4
        )


OTHERS = {
    "LCMScheduler": TRAINED,
    "PNDMScheduler": TRAINED,
    "TCDScheduler": TRAINED,
    "IPNDMScheduler": {},
    "SASolverScheduler": TRAINED,
    "UniPCMultistepScheduler": TRAINED | {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    "HeunDiscreteScheduler": TRAINED,
    "KDPM2DiscreteScheduler": TRAINED,
}


@pytest.mark.parametrize("strategy", [ReFL(0.6), DRTune(2, stop=2), Last(2)], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_that_predict_no_clean_video_themselves(micro, name, strategy):
    """Against plain autograd, where x0 is computed by the same formula; its value is checked above."""
    micro.scheduler = getattr(diffusers, name)(**OTHERS[name])
    adapter = adapted(micro)
    sampling = Sampling(num_inference_steps=4)
    setup = micro, adapter, REWARDS["frames"], sampling, strategy, Frames.all()
    assert_equal(staged(*setup), plain_autograd(*setup))


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"]
)
def test_K_counts_calls_of_the_denoiser(micro, name):
    """A solver of second order calls it almost twice a step: all calls together are the whole chain."""
    micro.scheduler = getattr(diffusers, name)(**TRAINED)
    sampling = Sampling(num_inference_steps=4).resolve(micro)
    calls, predict = [], micro.predict
    micro.predict = lambda *a, **k: (calls.append(1), predict(*a, **k))[1]
    sample(micro, "a cat", sampling=sampling)
    assert micro.num_steps(sampling) == len(calls) > 4
    del micro.predict
    adapter = adapted(micro)
    every = Last(micro.num_steps(sampling))
    setup = micro, adapter, REWARDS["frames"], sampling, every, Frames.all()
    assert_equal(staged(*setup), plain_autograd(*setup))
    with pytest.raises(ValueError, match=f"K=99 must lie in 1..{len(calls)}"):
        staged(micro, adapter, REWARDS["frames"], sampling, Last(99), Frames.all())


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_the_noise_level_is_the_one_the_scheduler_scales_by(micro, name):
    """Also halfway between two steps."""
    micro.scheduler = getattr(diffusers, name)(**TRAINED)
    scheduler = micro.new_scheduler(Sampling(num_inference_steps=3))
    latents = torch.ones(1, 4, 2, 4, 4, dtype=torch.float64)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t).max()
        _, sigma = micro.signal_and_noise(scheduler, t)
        torch.testing.assert_close(scaled, latents.max() / (sigma**2 + 1) ** 0.5)
        latents = scheduler.step(0.1 * latents, t, latents).prev_sample.clamp(min=1.0)


def test_guidance_rescale_is_diffusers(micro):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    outputs = {name: torch.randn(2, 4, 2, 4, 4) for name in ("negative", "prompt")}
    sampling = Sampling(guidance_scale=7.0, guidance_rescale=0.7).resolve(micro)
    guided = outputs["negative"] + 7.0 * (outputs["prompt"] - outputs["negative"])
    theirs = rescale_noise_cfg(guided, outputs["prompt"], guidance_rescale=0.7)
    torch.testing.assert_close(micro.combine(outputs, torch.tensor(5), sampling), theirs)
    setup = micro, adapted(micro), REWARDS["frames"], sampling, Last(3), Frames.all()
    assert_equal(staged(*setup), plain_autograd(*setup))


@pytest.mark.parametrize("steps", [3, 7, 25])
def test_full_noise_in_ddim_is_finite_at_zero_terminal_snr(tiny, steps):
    sampling = Sampling(num_inference_steps=steps, eta=1.0, num_frames=1)
    assert sample(tiny, "a red star", sampling=sampling).isfinite().all()


def test_an_eta_that_the_scheduler_does_not_have_is_an_error(micro):
    micro.scheduler = diffusers.DPMSolverMultistepScheduler(**TRAINED)
    with pytest.raises(ValueError, match="eta=0.5 has no effect with DPMSolverMultistep"):
        sample(micro, "a cat", sampling=Sampling(eta=0.5))


@pytest.mark.parametrize(
    "strategy", [Last(1), Last(3), ReFL(0.6), DRTune(2, stop=2), DRaFTLV(2)], ids=str
)
def test_flow_matching_equals_plain_autograd(micro, strategy):
    micro.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    adapter = adapted(micro)
    for name in REWARDS:
        setup = micro, adapter, REWARDS[name], Sampling(), strategy, Frames.all()
        assert_equal(staged(*setup), plain_autograd(*setup))


# ------------------------------------------------------------------- a family unlike the first one


class Unlike(ModelScope):
    """Two denoisers by noise level, three branches, and a causal decoder that makes 1 + 2 (F - 1) frames."""

    independent_frames = False

    def __init__(self, like: ModelScope):
        super().__init__(
            "unlike",
            like.denoiser,
            like.vae,
            like.text_encoder,
            like.tokenizer,
            like.scheduler,
            like.defaults,
        )
        second = copy.deepcopy(like.denoiser)
        with torch.no_grad():
            for p in second.parameters():
                p.mul_(1.1)
        self.denoisers = {"transformer": like.denoiser, "transformer_2": second}
        self.targets = {"transformer": ("to_q",), "transformer_2": ("to_q", "to_k")}

    def blocks(self):
        first = super().blocks()
        return first + [
            m for m in self.denoisers["transformer_2"].modules() if type(m) is type(first[0])
        ]

    def denoiser_at(self, t):
        return self.denoisers["transformer" if t >= 500 else "transformer_2"]

    def latent_shape(self, sampling):
        channels, frames, height, width = super().latent_shape(sampling)
        return channels, 1 + (frames - 1) // 2, height, width

    def encode(self, prompts, sampling=None, generators=None):
        branches = super().encode(prompts, sampling).branches
        still = {key: value.flip(1) for key, value in branches["prompt"].items()}
        return Conditioning(branches | {"still": still})

    def branches(self, sampling):
        return ["negative", "still", "prompt"]

    def predict(self, latents, t, inputs):
        return self.denoiser_at(t)(latents, t, inputs["encoder_hidden_states"]).sample

    def combine(self, outputs, t, sampling):
        """Three branches, and rescaled to the prompt's spread, which is not linear."""
        guided = (
            outputs["negative"]
            + sampling.guidance_scale * (outputs["prompt"] - outputs["still"])
            + 0.5 * (outputs["still"] - outputs["negative"])
        )
        dims = (1, 2, 3, 4)
        return guided * outputs["prompt"].std(dims, keepdim=True) / guided.std(dims, keepdim=True)

    def decode(self, latents, frames=None):
        mixed = latents.cumsum(2) / torch.arange(1, latents.shape[2] + 1).view(1, 1, -1, 1, 1)
        doubled = mixed.repeat_interleave(2, dim=2)[:, :, 1:]
        doubled = torch.cat([doubled[:, :, :1], doubled[:, :, 1:] * 0.9], dim=2)
        wanted = list(range(doubled.shape[2])) if frames is None else frames
        return super().decode(doubled, wanted)


@pytest.fixture
def unlike(micro):
    return Unlike(micro)


def test_it_samples_pixel_frames(unlike):
    clip = sample(unlike, PROMPTS, seeds=SEEDS)
    assert clip.shape == (2, 3, 3, 16, 16)
    latents, _ = initial_noise(unlike, SEEDS, Sampling().resolve(unlike))
    assert latents.shape[2] == 2


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("strategy", [Last(1), Last(5), ReFL(0.6), DRTune(2), DRaFTLV(2)], ids=str)
def test_its_gradient_equals_plain_autograd(unlike, strategy, sequential):
    adapter, sampling = adapted(unlike), Sampling(sequential_guidance=sequential)
    for name in REWARDS:
        setup = unlike, adapter, REWARDS[name], sampling, strategy, Frames.at(0, -1)
        assert_equal(staged(*setup, decode_chunk_size=2), plain_autograd(*setup))


def test_its_adapter_is_on_both_denoisers_and_its_file_comes_back(unlike, tmp_path):
    adapter = adapted(unlike)
    endings = {
        name.rpartition(".")[2] for name in adapter.layers if name.startswith("transformer.")
    }
    assert endings == {"to_q"}
    assert any(n.startswith("transformer_2.") and n.endswith("to_k") for n in adapter.layers)
    expected = sample(unlike, PROMPTS, seeds=SEEDS, adapter=adapter)
    path = adapter.save(tmp_path / "adapter.safetensors")
    adapter.remove()
    base = sample(unlike, PROMPTS, seeds=SEEDS)
    assert torch.equal(sample(unlike, PROMPTS, seeds=SEEDS, adapter=path), expected)
    assert not torch.equal(base, expected)
    assert torch.equal(sample(unlike, PROMPTS, seeds=SEEDS), base)
    one = lora.add(unlike, 2, targets=("transformer_2.to_q",))
    assert one.layers and all(name.startswith("transformer_2.") for name in one.layers)


def test_the_last_steps_teach_the_low_noise_denoiser_only(unlike):
    adapter = adapted(unlike)
    _, gradient = staged(unlike, adapter, REWARDS["clip"], Sampling(), Last(1), Frames.all())
    sizes = [p.numel() for p in adapter.parameters()]
    names = [name for name in adapter.layers for _ in "AB"]
    for name, part in zip(names, gradient.split(sizes), strict=True):
        assert part.any() == name.startswith("transformer_2."), name
