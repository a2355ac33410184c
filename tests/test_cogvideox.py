"""CogVideoX: against diffusers' own pipeline, its full size, and its decoder's gradient, swept back chunk by chunk."""

import diffusers
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from vader_nb import Prompt, load, lora, models
from vader_nb.models.cogvideox import SCHEDULER
from vader_nb.sampling import Sampling, roll_out, sample
from vader_nb.strategies import DRTune, Last, ReFL
from vader_nb.testing import check_model
from vader_nb.zoo import tokenizer

SIZE = {"num_frames": 9, "height": 16, "width": 24}
PROMPTS = [
    Prompt("a red star", negative_prompt="a blue circle"),
    Prompt("a blue circle growing on a sand background", negative_prompt="a star"),
]
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": 12,
}
VAE = {
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


def pipeline_of(transformer: dict):
    """A `CogVideoXPipeline` of random weights, built of the libraries' own classes."""
    torch.manual_seed(0)
    words = tokenizer.build()
    text = T5Config(vocab_size=len(words), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return diffusers.CogVideoXPipeline(
        words,
        T5EncoderModel(text),
        diffusers.AutoencoderKLCogVideoX(**VAE),
        diffusers.CogVideoXTransformer3DModel(**TRANSFORMER | transformer),
        diffusers.CogVideoXDDIMScheduler(**SCHEDULER),
    )


KINDS = {"2b": {}}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folders = {}
    for kind, config in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        pipeline_of(config).save_pretrained(folders[kind])
    return folders


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_frames_are_those_of_diffusers_pipeline(directories, kind, guidance_scale):
    folder = directories[kind]
    model, pipeline = load(folder), diffusers.CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = SIZE | {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    sampling = Sampling(**settings).resolve(model)
    for output_type in ("latent", "pt"):
        theirs = pipeline(
            [prompt.text for prompt in PROMPTS],
            [prompt.negative_prompt for prompt in PROMPTS],
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
            output_type=output_type,
            max_sequence_length=12,
            **settings,
        ).frames
        if output_type == "latent":
            ours = roll_out(model, PROMPTS, [5, 9], sampling).latents.transpose(1, 2)
        else:
            ours = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
