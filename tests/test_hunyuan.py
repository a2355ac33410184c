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
from vader_nb.memory_planner import MemoryTracker
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
        bos_token_id=words.bos_token_id,
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


def diffusers_call(folder, settings, adapter=None, tiling=False, **options):
    """Latents, or frames, of diffusers' own pipeline."""
    pipeline = diffusers.HunyuanVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
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


@pytest.mark.parametrize("tiling", [False, True])
def test_long_clips_are_decoded_in_parts_as_diffusers_pipeline_does(directory, tiling):
    model = load(directory)
    settings = SETTINGS | {"num_frames": 29, "num_inference_steps": 1}
    if tiling:
        settings |= {"height": 16, "width": 272}
        model.vae.enable_tiling()
    ours = sample(model, PROMPTS, seeds=[5, 9], sampling=Sampling(**settings))
    theirs = diffusers_call(directory, settings, tiling=tiling, output_type="pt")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_texts_are_encoded_once_and_the_negative_one_where_it_acts(directory):
    model = load(directory)
    calls = []
    for encoder in (model.text_encoder, model.text_encoder_2):
        encoder.register_forward_hook(lambda *call: calls.append(type(call[0]).__name__))
    plain, guided = (
        Sampling(**SETTINGS, options={"true_cfg_scale": scale}).resolve(model) for scale in (1, 2)
    )
    for count, sampling in ((2, plain), (2, plain), (4, guided)):
        conditioning = model.encode(PROMPTS, sampling)
        assert calls == (["LlamaModel"] * 2 + ["CLIPTextModel"] * 2) * (count // 2)
    inputs = conditioning["prompt"]
    lengths = inputs["encoder_attention_mask"].sum(dim=1).tolist()
    assert inputs["encoder_hidden_states"].shape == (2, 256, 12) and lengths[1] - lengths[0] == 5
    assert not inputs["encoder_hidden_states"][0, lengths[0] :].any()
    assert conditioning["negative"]["guidance"].tolist() == [6000, 6000]
    model.to(torch.float64)
    assert model.encode(PROMPTS, plain)["prompt"]["pooled_projections"].dtype == torch.float64


@pytest.mark.parametrize("frames, true_cfg_scale", [(5, 1.0), (21, 2.5)])
def test_it_keeps_the_promises_of_a_model(directory, frames, true_cfg_scale):
    model = load(directory, dtype=torch.float64)
    settings = {"num_inference_steps": 5, "num_frames": frames, "height": 16, "width": 16}
    sampling = Sampling(**settings, options={"true_cfg_scale": true_cfg_scale})
    strategies = [Last(2), DRTune(2, stop=1), DRaFTLV(2)][: 3 if frames == 5 else 1]
    report = check_model(model, sampling, PROMPTS, strategies)
    assert len(report) == 13 + len(strategies)


@pytest.mark.parametrize(
    "latents, tiling", [(1, False), (4, True), (5, False), (7, False), (8, True), (12, False)]
)
def test_the_gradient_is_that_of_the_whole_decoder(directory, latents, tiling):
    model = load(directory, dtype=torch.float64)
    vae = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(directory / "vae").double()
    if tiling:  # 2 latents wide, of which one overlaps
        for network in (vae, model.vae):
            network.enable_tiling(16, 16, None, 16, 8)
    generator = torch.Generator().manual_seed(latents)
    leaf = torch.randn(2, 4, latents, 2, 3, generator=generator).double().requires_grad_()
    whole = torch.cat([vae.decode(z[None] / vae.config.scaling_factor).sample for z in leaf])
    whole = (whole.transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    count = whole.shape[1]
    torch.testing.assert_close(model.decode(leaf), whole, rtol=0, atol=1e-12)
    for frames in (list(range(count)), [count - 1], [0], [count // 2, -1, 0], [count // 2] * 2):
        part = whole[:, frames].detach().requires_grad_()
        (pixels,) = torch.autograd.grad(REWARDS["clip"](part, PROMPTS).sum(), part)
        (expected,) = torch.autograd.grad(whole[:, frames], leaf, pixels, retain_graph=True)
        torch.testing.assert_close(model.decode(leaf.detach(), frames), part, rtol=0, atol=1e-12)
        found = model.decode_vjp(leaf, frames, pixels)
        assert expected.any() and apart(found, expected) <= 1e-9


def test_a_frame_takes_the_parts_that_it_is_blended_of(directory):
    model, sizes = load(directory), []
    latents = torch.randn(1, 4, 12, 2, 2, generator=torch.Generator().manual_seed(0))
    model.vae.decoder.register_forward_hook(lambda *call: sizes.append(call[1][0].shape[2]))
    model.decode(latents)
    assert sizes == [5, 5, 5, 3]
    for frame, expected in ((3, [5, 2]), (20, [5, 5, 2]), (40, [5, 3])):
        sizes.clear()
        model.decode(latents, [frame])
        assert sizes == expected


def test_memory_grows_with_the_pixels_and_not_with_the_graph(directory):
    model = load(directory)

    def peak(count, pull):
        latents = torch.randn(1, 4, count, 4, 4)
        gradient = torch.ones(1, 4 * count - 3, 3, 32, 32)
        with MemoryTracker() as tracker:
            pull(latents, list(range(len(gradient[0]))), gradient)
        return tracker.bytes

    def plainly(latents, frames, gradient):
        leaf = latents.requires_grad_()
        torch.autograd.grad(model.decode(leaf), leaf, gradient)

    ours, plain = (peak(20, pull) - peak(8, pull) for pull in (model.decode_vjp, plainly))
    frames = 4 * (4 * 12) * 3 * 32 * 32  # bytes of those that were added
    assert ours <= 4 * frames < plain / 10


def test_full_size_is_the_published_one():
    with torch.device("meta"):
        model = models.from_config("hunyuanvideo")
    counts = [sum(p.numel() for p in module.parameters()) / 1e6 for module in model.modules()]
    assert [round(count, 1) for count in counts] == [12821.0, 246.5, 7505.2, 123.1]
    assert model.vae.use_tiling and model.defaults["fps"] == 24
    layers = lora.add(model, 16).layers
    size = sum(p.numel() for p in model.denoiser.parameters() if p.requires_grad) / 1e6
    assert len(layers) == 208 and round(size, 1) == 20.4
    assert model.latent_shape(Sampling().resolve(model)) == (16, 33, 90, 160)


def test_the_last_step_moves_the_video(directory):
    sampling = Sampling(num_inference_steps=30).resolve(model := load(directory))
    assert model.last_step_gain(sampling) == pytest.approx(0.1944, abs=1e-4)


def test_it_is_saved_and_its_adapter_is_read_by_diffusers_pipeline(directory, tmp_path):
    model, settings = load(directory), SETTINGS | {"num_inference_steps": 2}
    adapter = adapted(model)
    options = {"seeds": [5, 9], "sampling": Sampling(**settings)}
    expected = sample(model, PROMPTS, adapter=adapter, **options)
    file = adapter.export(tmp_path / "lora")
    adapter.remove()
    again = load(model.save_pretrained(tmp_path / "saved"))
    base = sample(model, PROMPTS, **options)
    assert torch.equal(sample(again, PROMPTS, **options), base)
    assert not torch.allclose(base, expected, rtol=1e-3, atol=1e-3)
    assert again.defaults == model.defaults
    theirs = diffusers_call(tmp_path / "saved", settings, adapter=file, output_type="pt")
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 24}, "height=24 must be a positive multiple of 16 pixels"),
        ({"width": 8}, "width=8 must be a positive multiple of 16 pixels"),
        ({"num_frames": 8}, "num_frames=8 must be 1 more than a multiple of 4 .*: use 5 or 9"),
        ({"options": {"true_cfg_scale": 0.5}}, "true_cfg_scale must be at least 1, got 0.5"),
    ],
)
def test_bad_settings(directory, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(load(directory), "a star", sampling=Sampling(**SETTINGS | settings))


def test_bad_prompts_and_schedulers(directory):
    model, sampling = load(directory), Sampling(**SETTINGS)
    with pytest.raises(ValueError, match="its prompts take no image"):
        sample(model, Prompt("a star", image=torch.zeros(3, 16, 32)), sampling=sampling)
    with pytest.warns(
        UserWarning, match="the text encoder reads 256 tokens, but the prompt has 300"
    ):
        sample(model, " ".join(["star"] * 300), sampling=sampling)
    model.scheduler = diffusers.UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="UniPCMultistepScheduler cannot sample it"):
        sample(model, "a star", sampling=sampling)
