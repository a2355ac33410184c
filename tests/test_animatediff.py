"""AnimateDiff: against diffusers' own pipeline, its two hub repositories, its full size, files, too many frames."""

import json

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from vader_nb import Prompt, load, lora, models
from vader_nb.models.animatediff import PUBLISHED
from vader_nb.sampling import Sampling, roll_out, sample
from vader_nb.strategies import DRaFTLV, DRTune, Last
from vader_nb.testing import adapted, check_model
from vader_nb.zoo import tokenizer

SETTINGS = {"num_inference_steps": 3, "num_frames": 3, "height": 16, "width": 24}
PROMPTS = [
    Prompt("a red star", negative_prompt="a green square"),
    Prompt("a blue circle growing on a sand background"),
]


def parts():
    """Stable Diffusion's parts and a motion adapter, of random weights."""
    torch.manual_seed(0)
    words = tokenizer.build()
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
    )
    return {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=2,
        ),
        "motion_adapter": diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=2,
            motion_max_seq_length=6,
            use_motion_mid_block=False,
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=4,
        ),
        "text_encoder": CLIPTextModel(text),
        "tokenizer": words,
        "scheduler": diffusers.DDIMScheduler(**PUBLISHED["scheduler"]),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animatediff")
    diffusers.AnimateDiffPipeline(**parts()).save_pretrained(folder)
    return folder


def diffusers_call(folder, sampling, file=None, **options):
    """What diffusers' own pipeline makes."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is diffusers.AnimateDiffPipeline
    pipeline.set_progress_bar_config(disable=True)
    if file is not None:
        pipeline.load_lora_weights(file)
    return pipeline(
        [prompt.text for prompt in PROMPTS],
        negative_prompt=[prompt.negative_prompt for prompt in PROMPTS],
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
        guidance_scale=sampling.guidance_scale,
        eta=sampling.eta,
        **SETTINGS,
        **options,
    ).frames


@pytest.mark.parametrize("settings", [{"guidance_scale": 1.0}, {"guidance_scale": 6.0, "eta": 0.5}])
def test_latents_and_frames_are_those_of_diffusers_pipeline(directory, settings):
    model = load(directory)
    sampling = Sampling(**SETTINGS, **settings).resolve(model)
    ours = roll_out(model, PROMPTS, [5, 9], sampling).latents
    theirs = diffusers_call(directory, sampling, output_type="latent")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
    theirs = diffusers_call(directory, sampling, output_type="pt")
    assert ours.shape == (2, 3, 3, 16, 24)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_it_keeps_the_promises_of_a_model(directory):
    model = load(directory, dtype=torch.float64)
    sampling = Sampling(**SETTINGS | {"num_inference_steps": 5})
    report = check_model(model, sampling, PROMPTS, [Last(2), DRTune(2, stop=1), DRaFTLV(2)])
    assert len(report) == 16


def test_the_last_step_counts(directory):
    model = load(directory)
    sampling = Sampling().resolve(model)
    assert round(model.last_step_gain(sampling), 3) == 0.041
    often_seen = {"timestep_spacing": "linspace", "set_alpha_to_one": False}
    model.scheduler = diffusers.DDIMScheduler(**PUBLISHED["scheduler"] | often_seen)
    assert model.last_step_gain(sampling) == 0


def test_frames_see_each_other_in_the_denoiser_and_not_in_the_decoder(directory):
    model = load(directory, dtype=torch.float64)
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    changed = latents.clone()
    changed[:, :, 0] += 1
    text = model.encode(["a star"])["prompt"]
    t = torch.tensor(500)
    before, after = (model.predict(x, t, text)[:, :, 2] for x in (latents, changed))
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.decode(latents, [2, 1]), model.decode(changed, [2, 1]))


def test_the_hubs_two_repositories_are_joined(tmp_path, monkeypatch):
    """The real call (`load("animatediff")`) on a hub cache with checkpoints of the published layout."""
    made, checkpoint = parts(), models.CHECKPOINTS["animatediff"]
    image, motion = checkpoint.source, checkpoint.parts["motion_adapter"]
    snapshots = {}
    for repository in (image, motion):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        snapshots[repository] = folder / "snapshots" / ("0" * 40)
        snapshots[repository].mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
    for part in ("unet", "vae", "text_encoder"):
        made[part].half().save_pretrained(snapshots[image] / part, variant="fp16")
    made["tokenizer"].save_pretrained(snapshots[image] / "tokenizer")
    diffusers.PNDMScheduler(beta_schedule="scaled_linear").save_pretrained(
        snapshots[image] / "scheduler"
    )
    made["motion_adapter"].save_pretrained(snapshots[motion])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load("animatediff", cache_dir=tmp_path, dtype=torch.float32)
    expected = diffusers.UNetMotionModel.from_unet2d(made["unet"].float(), made["motion_adapter"])
    found = model.denoiser.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())
    assert type(model.scheduler) is diffusers.DDIMScheduler
    assert model.scheduler.config.beta_schedule == "linear"
    saved = model.save_pretrained(tmp_path / "saved")
    sampling = Sampling(**SETTINGS).resolve(model)
    ours = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
    torch.testing.assert_close(
        ours, diffusers_call(saved, sampling, output_type="pt"), rtol=1e-5, atol=1e-5
    )


def test_full_size_is_the_published_one():
    with torch.device("meta"):
        model = models.from_config("animatediff")
        still = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        motion = diffusers.MotionAdapter(use_motion_mid_block=False)
        joined = diffusers.UNetMotionModel.from_unet2d(still, motion, load_weights=False)
    counts = [sum(p.numel() for p in module.parameters()) / 1e6 for module in model.modules()]
    assert [round(count, 1) for count in counts] == [1276.7, 83.7, 123.1]
    shapes = [
        {name: value.shape for name, value in network.state_dict().items()}
        for network in (model.denoiser, joined)
    ]
    assert shapes[0] == shapes[1]
    layers = [
        module
        for name, module in model.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(model.targets["unet"])
    ]
    assert len(layers) == 288
    size = sum(16 * (layer.in_features + layer.out_features) for layer in layers)
    assert round(size / 1e6, 2) == 7.69
    assert model.latent_shape(Sampling().resolve(model)) == (4, 16, 64, 64)


def test_a_saved_copy_and_diffusers_read_what_was_trained(directory, tmp_path):
    model = load(directory)
    adapter = adapted(model)
    sampling = Sampling(**SETTINGS, guidance_scale=3.0).resolve(model)
    expected = roll_out(model, PROMPTS, [5, 9], sampling).latents
    path = adapter.save(tmp_path / "pytorch_lora_weights.safetensors")
    adapter.remove()
    saved = model.save_pretrained(tmp_path / "copy")
    assert json.loads((saved / "model_index.json").read_text())["unet"][1] == "UNetMotionModel"
    again = load(saved)
    copied = lora.load(again, path)
    torch.testing.assert_close(roll_out(again, PROMPTS, [5, 9], sampling).latents, expected)
    copied.remove()
    bare = roll_out(again, PROMPTS, [5, 9], sampling).latents
    assert not torch.allclose(bare, expected, rtol=1e-2, atol=1e-2)
    theirs = diffusers_call(saved, sampling, path, output_type="latent")
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline("a star", generator=torch.Generator().manual_seed(1), **SETTINGS).frames
    assert len(theirs[0]) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_frames": 7}, "num_frames=7 must be at most 6"),
        ({"height": 15}, "height=15 must be a positive multiple of 2"),
        ({"options": {"fps": 3}}, "has no sampling option 'fps'"),
    ],
)
def test_bad_settings(directory, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(load(directory), "a star", sampling=Sampling(**SETTINGS | settings))
