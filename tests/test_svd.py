"""Stable Video Diffusion: against diffusers' own pipeline, its full size, what its decoder mixes, bad images."""

import diffusers
import pytest
import torch
from PIL import Image

from vader_nb import Prompt, load
from vader_nb.models.svd import PUBLISHED
from vader_nb.sampling import Sampling, roll_out, sample

SETTINGS = {"num_inference_steps": 3, "num_frames": 4, "height": 32, "width": 24}


def picture(seed: int) -> Image.Image:
    pixels = torch.rand(32, 24, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy())


PROMPTS = [Prompt("a wave", image=picture(1)), Prompt("a tree", image=picture(2))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    svd_pipeline().save_pretrained(folder)
    return folder


def svd_pipeline():
    """A `StableVideoDiffusionPipeline` of 1.4 M random weights, built of the libraries' own classes."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        cross_attention_dim=16,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=4,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1,
    )
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
        projection_dim=16,
    )
    scheduler = diffusers.EulerDiscreteScheduler(**PUBLISHED["scheduler"])
    return diffusers.StableVideoDiffusionPipeline(
        vae, CLIPVisionModelWithProjection(config), unet, scheduler, CLIPImageProcessor()
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_latents_and_frames_are_those_of_diffusers_pipeline(directory, guidance_scale):
    model = load(directory)
    pipeline = diffusers.StableVideoDiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    options = {"motion_bucket_id": 80, "noise_aug_strength": 0.1, "fps": 9}
    sampling = Sampling(**SETTINGS, guidance_scale=guidance_scale, options=options).resolve(model)
    for output_type in ("latent", "pt"):
        theirs = pipeline(
            [prompt.image for prompt in PROMPTS],
            max_guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
            output_type=output_type,
            decode_chunk_size=4,
            **SETTINGS,
            **options,
        ).frames
        if output_type == "latent":
            ours = roll_out(model, PROMPTS, [5, 9], sampling).latents.transpose(1, 2)
        else:
            ours = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
