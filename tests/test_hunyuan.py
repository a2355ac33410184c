"""HunyuanVideo: against diffusers' own pipeline, its full size, its decoder of overlapping parts, files, bad sizes."""

import diffusers
import pytest
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from vader_nb import Prompt, load, lora, models
from vader_nb.sampling import Sampling, roll_out, sample
from vader_nb.strategies import DRaFTLV, DRTune, Last
from vader_nb.testing import REWARDS, adapted, apart, check_model
from vader_nb.zoo import tokenizer

SETTINGS = {"num_inference_steps": 3, "num_frames": 5, "height": 16, "width": 32}
PROMPTS = [
    Prompt("a red star", negative_prompt="a green square"),
    Prompt("a blue circle growing on a sand background"),
]
TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 12,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 2, 2),
}
VAE = {
    "block_out_channels": (4, 4, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


def llama_tokenizer():
    """One token a word; within the template the prompt begins a few tokens after the 95 that are cut off."""
    words = [prompt.text for prompt in PROMPTS] + [prompt.negative_prompt for prompt in PROMPTS]
    pieces = " ".join([DEFAULT_PROMPT_TEMPLATE["template"], *words])
    vocabulary = {"<pad>": 0, "<unk>": 1}
    for piece, _ in Whitespace().pre_tokenize_str(pieces):
        vocabulary.setdefault(piece, len(vocabulary))
    fast = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>")


def pipeline_of_random_weights():
    torch.manual_seed(0)
    words, pieces = tokenizer.build(), llama_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
    )
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=words.eos_token_id,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=pieces,
        transformer=diffusers.HunyuanVideoTransformer3DModel(**TRANSFORMER),
        vae=diffusers.AutoencoderKLHunyuanVideo(**VAE),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip),
        tokenizer_2=words,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunyuan")
    pipeline_of_random_weights().save_pretrained(folder)
    return folder


def diffusers_call(folder, settings, lora=None, tiling=False, **options):
    """Latents, or frames, of diffusers' own pipeline."""
    pipeline = diffusers.HunyuanVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    if tiling:
        pipeline.vae.enable_tiling()
    return pipeline(
        prompt=[prompt.text for prompt in PROMPTS],
        negative_prompt=[prompt.negative_prompt for prompt in PROMPTS],
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
        **settings,
        **options,
    ).frames


@pytest.mark.parametrize("guidance_scale, true_cfg_scale", [(1.0, 1.0), (6.0, 1.0), (6.0, 3.0)])
def test_latents_and_frames_are_those_of_diffusers_pipeline(
    directory, guidance_scale, true_cfg_scale
):
    model = load(directory)
    settings = SETTINGS | {"guidance_scale": guidance_scale}
    options = {"true_cfg_scale": true_cfg_scale}
    sampling = Sampling(**settings, options=options).resolve(model)
    theirs = diffusers_call(directory, settings, **options, output_type="latent")
    ours = roll_out(model, PROMPTS, [5, 9], sampling).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    theirs = diffusers_call(directory, settings, **options, output_type="pt")
    ours = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
    assert ours.shape == (2, 5, 3, 16, 32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
