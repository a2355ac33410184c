"""LTX-Video: against diffusers' own pipelines, its full size, its decoders and their noise, files, bad sizes."""

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx import pipeline_ltx, pipeline_ltx_condition
from transformers import T5Config, T5EncoderModel

from vader_nb import Prompt, load, lora, models
from vader_nb.models import ltx_video
from vader_nb.models.ltx_configs import CONDITION, PUBLISHED
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
            torch.nn.init.constant_(parameter, 0.05)
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


def diffusers_call(folder, sampling, **options):
    """Latents (B, C, F, H, W), or frames, of diffusers' own pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
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
    decode = diffusers.AutoencoderKLLTXVideo.decode

    def decode_seeded(vae, z, *args, **kwargs):
        clips = []
        for i in range(len(z)):
            with ltx_video.seeded(z.device):
                own = [x if x is None else x[i : i + 1] for x in args]
                clips.append(decode(vae, z[i : i + 1], *own, **kwargs)[0])
        return (torch.cat(clips),)

    with monkeypatch.context() as patch:
        patch.setattr(diffusers.AutoencoderKLLTXVideo, "decode", decode_seeded)
        decoding = {key: model.defaults.get(key, 0.0) for key in ltx_video.DECODING}
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
        return ltx_video.decode_noise(torch.empty(1, *shape[1:])).expand(shape)

    return draw
