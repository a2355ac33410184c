"""LTX-Video: against diffusers' own pipelines, its full size, its decoders and their noise, files, bad sizes."""

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx import pipeline_ltx, pipeline_ltx_condition
from transformers import T5Config, T5EncoderModel

from vader_nb import Prompt, load, lora, models
from vader_nb.memory_planner import FakeMode
from vader_nb.models import ltx_vae
from vader_nb.models.ltx_configs import CONDITION, PUBLISHED
from vader_nb.models.ltx_vae import decode_noise, fix_noise
from vader_nb.sampling import Sampling, roll_out, sample
from vader_nb.strategies import DRaFTLV, DRTune, Last
from vader_nb.testing import REWARDS, adapted, apart, check_model
from vader_nb.zoo import tokenizer

SETTINGS = {"num_inference_steps": 3, "num_frames": 9, "height": 32, "width": 64}
PROMPTS = [
    Prompt("a red star", negative_prompt="a green square"),
    Prompt("a blue circle growing on a sand background"),
]
# Of the published decoders' kinds: 0.9.0, 0.9.1 (told the noise level, draws noise inside), 0.9.5 and later.
REFINING = {
    "decoder_block_out_channels": (8, 16),
    "decoder_layers_per_block": (1, 1, 1),
    "decoder_spatio_temporal_scaling": (True, True),
    "upsample_residual": (True, True),
    "upsample_factor": (2, 2),
    "timestep_conditioning": True,
}
DECODERS = {
    "plain": {
        "decoder_block_out_channels": (8,) * 4,
        "decoder_layers_per_block": (1,) * 5,
        "decoder_spatio_temporal_scaling": (True, True, False, False),
    },
    "noisy": REFINING | {"decoder_inject_noise": (True, True, False)},
    "condition": REFINING | {"decoder_inject_noise": (False,) * 3},
}


def ltx_pipeline(kind):
    """A pipeline of random weights, built of the libraries' own classes."""
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        patch_size=4,
        scaling_factor=0.8,
        **DECODERS[kind],
    )
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:  # zero in a fresh network
            torch.nn.init.constant_(parameter, 5e-4)
    vae.latents_mean.uniform_(-0.3, 0.3)
    vae.latents_std.uniform_(0.5, 1.5)
    words = tokenizer.build()
    text = T5Config(vocab_size=len(words), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    published = CONDITION if kind == "condition" else PUBLISHED
    classes = {"condition": diffusers.LTXConditionPipeline}
    return classes.get(kind, diffusers.LTXPipeline)(
        transformer=transformer,
        vae=vae,
        text_encoder=T5EncoderModel(text),
        tokenizer=words,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**published["scheduler"]),
    )


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in DECODERS}
    for kind, folder in folders.items():
        ltx_pipeline(kind).save_pretrained(folder)
    return folders


def diffusers_call(folder, sampling, lora=None, **options):
    """Latents (B, C, F, H, W), or frames, of diffusers' own pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    fix_noise(pipeline.vae)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    found = pipeline(
        prompt=[prompt.text for prompt in PROMPTS],
        negative_prompt=[prompt.negative_prompt for prompt in PROMPTS],
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
        guidance_scale=sampling.guidance_scale,
        guidance_rescale=sampling.guidance_rescale,
        frame_rate=sampling.options["fps"],
        **SETTINGS,
        **options,
    ).frames
    if found.ndim == 3:
        found = pipeline._unpack_latents(found, 3, 2, 4)
    return found


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", DECODERS)
def test_latents_and_frames_are_those_of_diffusers_pipeline(
    directories, kind, guidance_scale, monkeypatch
):
    model = load(directories[kind])
    settings = {"guidance_scale": guidance_scale, "guidance_rescale": 0.6, "options": {"fps": 9}}
    sampling = Sampling(**SETTINGS, **settings).resolve(model)
    theirs = diffusers_call(directories[kind], sampling, output_type="latent")
    ours = roll_out(model, PROMPTS, [5, 9], sampling).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    # The decoder's noise is ours in both: each pipeline draws it after the initial latents.
    for module in (pipeline_ltx, pipeline_ltx_condition):
        monkeypatch.setattr(module, "randn_tensor", first_then_ours(module.randn_tensor))
    decoding = {key: model.defaults.get(key, 0.0) for key in ltx_vae.DECODING}
    theirs = diffusers_call(directories[kind], sampling, output_type="pt", **decoding)
    ours = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
    assert ours.shape == (2, 9, 3, 32, 64)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def first_then_ours(randn_tensor):
    calls = []

    def draw(shape, *args, **kwargs):
        calls.append(shape)
        if len(calls) % 2:
            return randn_tensor(shape, *args, **kwargs)
        return decode_noise(torch.empty(1, *shape[1:])).expand(shape)

    return draw


@pytest.mark.parametrize("kind", DECODERS)
def test_it_keeps_the_promises_of_a_model(directories, kind):
    model = load(directories[kind], dtype=torch.float64)
    sampling = Sampling(**SETTINGS | {"num_inference_steps": 5})
    strategies = [Last(2), DRTune(2, stop=1), DRaFTLV(2)]
    report = check_model(model, sampling, PROMPTS, strategies[: 1 + 2 * (kind == "plain")])
    assert len(report) == {"plain": 16}.get(kind, 14)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_decoders_gradient_is_autograds_and_its_noise_always_the_same(directories, kind):
    model = load(directories[kind], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 8, 3, 2, 4, generator=generator).double()
    leaf = latents.clone().requires_grad_()
    whole = model.decode(leaf)
    for frames in ([0, -1, 4], list(range(9))):
        part = whole[:, frames]
        (gradient,) = torch.autograd.grad(
            REWARDS["clip"](part, PROMPTS).sum(), part, retain_graph=True
        )
        (expected,) = torch.autograd.grad(part, leaf, gradient, retain_graph=True)
        torch.rand(3)  # the global generator has no part in it
        assert torch.equal(model.decode(latents, frames), part)
        found = model.decode_vjp(latents, frames, gradient)
        assert apart(found, expected) <= 1e-9
    for option in model.defaults.keys() & ltx_vae.DECODING.keys():
        model.defaults[option] *= 1.5
        assert not torch.allclose(model.decode(latents), whole)


def test_the_noise_that_blocks_draw_acts(directories):
    model = load(directories["noisy"], dtype=torch.float64)
    latents = torch.randn(1, 8, 3, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    before = model.decode(latents)
    for name, parameter in model.vae.named_parameters():
        if "per_channel_scale" in name:
            torch.nn.init.zeros_(parameter)
    assert not torch.allclose(model.decode(latents), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, sizes, layers, rank_16",
    [
        ("ltx-video", [1923.4, 419.2], 224, 14.7),
        ("ltx-video-0.9.1", [1923.4, 935.0], 224, 14.7),
        ("ltx-video-13b", [13042.6, 1246.9], 384, 50.3),
    ],
)
def test_full_size_is_the_published_one(name, sizes, layers, rank_16):
    with torch.device("meta"):
        model = models.from_config(name)
    counts = [sum(p.numel() for p in module.parameters()) / 1e6 for module in model.modules()]
    assert [round(count, 1) for count in counts] == [*sizes, 4762.3]
    ends = model.targets["transformer"]
    adapted_layers = [
        module
        for name, module in model.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(ends)
    ]
    size = sum(16 * (layer.in_features + layer.out_features) for layer in adapted_layers) / 1e6
    assert len(adapted_layers) == layers and round(size, 1) == rank_16
    assert model.latent_shape(Sampling().resolve(model))[:3] == (128, 21, 16)
    assert type(model).__name__ == ("LTXCondition" if name.endswith("13b") else "LTXVideo")


def test_the_schedule_ends_where_the_published_one_does():
    """The gain of the last step does not depend on the size."""
    gains = {}
    for name in ("ltx-video", "ltx-video-13b"):
        with FakeMode() as fake:
            fake.truth = False
            model = models.from_config(name)
        for frames in (9, 161):
            sampling = Sampling(num_frames=frames).resolve(model)
            gains[name, frames] = round(model.last_step_gain(sampling), 3)
    assert list(gains.values()) == [0.1, 0.1, 0.124, 0.124]


def test_a_saved_copy_and_diffusers_read_what_was_trained(directories, tmp_path):
    model = load(directories["plain"])
    adapter = adapted(model)
    sampling = Sampling(**SETTINGS, guidance_scale=3.0).resolve(model)
    expected = roll_out(model, PROMPTS, [5, 9], sampling).latents
    path = adapter.save(tmp_path / "pytorch_lora_weights.safetensors")
    adapter.remove()
    saved = model.save_pretrained(tmp_path / "copy")
    again = load(saved)
    copied = lora.load(again, path)
    torch.testing.assert_close(roll_out(again, PROMPTS, [5, 9], sampling).latents, expected)
    copied.remove()
    bare = roll_out(again, PROMPTS, [5, 9], sampling).latents
    theirs = diffusers_call(saved, sampling, lora=path, output_type="latent")
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(bare, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 40}, "height=40 must be a positive multiple of 16"),
        ({"width": 8}, "width=8 must be a positive multiple of 16"),
        ({"num_frames": 8}, "num_frames=8 must be 1 more than a multiple of 4 .*: use 5 or 9"),
        ({"num_inference_steps": 1}, "num_inference_steps=1 must be at least 2"),
        ({"options": {"fps": 0}}, "fps must be at least 1"),
    ],
)
def test_bad_settings(directories, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(load(directories["plain"]), "a star", sampling=Sampling(**SETTINGS | settings))


def test_bad_prompts_and_schedulers(directories):
    model, sampling = load(directories["plain"]), Sampling(**SETTINGS)
    with pytest.raises(ValueError, match="its prompts take no image"):
        sample(model, Prompt("a star", image=torch.zeros(3, 32, 64)), sampling=sampling)
    with pytest.warns(
        UserWarning, match="the text encoder reads 128 tokens, but the prompt has 132"
    ):
        sample(model, " ".join(["star"] * 130), sampling=sampling)
    model.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler cannot sample it"):
        sample(model, "a star", sampling=sampling)
