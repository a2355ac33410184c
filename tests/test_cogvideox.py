"""CogVideoX: against diffusers' own pipeline, its full size, and its decoder's gradient, swept back chunk by chunk."""

import json
import shutil
from functools import partial

import diffusers
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import T5Config, T5EncoderModel

from vader_nb import Prompt, align, load, lora, models
from vader_nb.memory_planner import MemoryTracker, simulate
from vader_nb.models import causal, cogvideox_vae
from vader_nb.models.cogvideox_configs import SCHEDULER
from vader_nb.rewards import brightness
from vader_nb.sampling import Sampling, roll_out, sample
from vader_nb.strategies import DRTune, Last, ReFL
from vader_nb.testing import adapted, check_model
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


ROTARY = {"use_rotary_positional_embeddings": True}
KINDS = {"2b": {}, "5b": ROTARY, "1.5": ROTARY | {"patch_size_t": 2, "patch_bias": False}}


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


def test_a_directory_is_loaded_in_the_type_that_its_size_was_made_for(directories):
    """On CUDA; by its own configuration."""
    found = {}
    for kind, folder in directories.items():
        checkpoint = models.checkpoint_of(folder)
        found[kind] = models.family_of(checkpoint).dtypes_of(checkpoint)["default"]
    assert found == {"2b": torch.float16, "5b": torch.bfloat16, "1.5": torch.bfloat16}


@pytest.mark.parametrize(("kind", "other"), [("2b", "bf16"), ("5b", "fp16")])
def test_autocast_to_the_half_type_that_weights_do_not_have_is_refused(
    directories, tmp_path, kind, other
):
    """Which the decoder's concatenations of its cache and its input do not survive."""
    with pytest.raises(ValueError, match=f"mixed_precision={other} .*load the model with dtype="):
        simulate(directories[kind], "brightness", mixed_precision=other, **SIZE)
    (own,) = {"fp16", "bf16"} - {other}
    stages = simulate(directories[kind], "brightness", mixed_precision=own, **SIZE)
    assert max(stages.values()) > 0
    settings = {"mixed_precision": "bf16", "output_dir": tmp_path / "run"}
    model = load(directories["2b"], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"set mixed_precision=fp16 or no, or load"):
        align(model, brightness(), ["a red star"], steps=1, **SIZE, **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_the_promises_of_a_model(directories, kind):
    model = load(directories[kind], dtype=torch.float64)
    sampling = Sampling(**SIZE, num_inference_steps=5)
    report = check_model(model, sampling, strategies=[Last(2), ReFL(0.6), DRTune(2, stop=1)])
    assert len(report) == 16
    last, window = report.approximations[:2]  # of three chunks, a window of two more is all
    assert last.error > 0.01 and last.cosine < 0.999 and last.cost < 1
    assert (window.error, window.cost) == (0, 1) and window.cosine == pytest.approx(1)


def coupled(frames):
    """A reward in which every frame meets every other."""
    weights = torch.linspace(0.5, 1.5, frames[0].numel(), dtype=frames.dtype).view(frames.shape[1:])
    means = (frames.square() * weights).mean(dim=(2, 3, 4))
    return (
        means.prod(dim=1) * 1e3 + frames.diff(dim=1).square().mean(dim=(1, 2, 3, 4)) + means[:, 0]
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
def test_the_gradient_swept_back_is_that_of_the_whole_decoder(directories, count):
    model = load(directories["2b"], dtype=torch.float64)
    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(directories["2b"] / "vae").double()
    latents = torch.randn(
        2, 4, count, 2, 3, generator=torch.Generator().manual_seed(count)
    ).double()
    leaf = latents.requires_grad_()
    whole = vae.decode(leaf / vae.config.scaling_factor).sample.transpose(1, 2)
    whole = (whole / 2 + 0.5).clamp(0, 1)
    frames = whole.detach().requires_grad_()
    (pixels,) = torch.autograd.grad(coupled(frames).sum(), frames)
    (expected,) = torch.autograd.grad(coupled(whole).sum(), leaf, retain_graph=True)
    assert model.frames_of(count) == whole.shape[1] and expected[:, :, -1].any()
    torch.testing.assert_close(model.decode(latents.detach()), whole.detach(), rtol=0, atol=1e-12)
    every = list(range(whole.shape[1]))
    found = model.decode_vjp(latents, every, pixels)
    assert (found - expected).norm() <= 1e-9 * expected.norm()
    some = [every[-1], 0, 0]  # in any order, also twice
    (expected,) = torch.autograd.grad(whole[:, some], leaf, pixels[:, some])
    found = model.decode_vjp(latents, [-1, 0, 0], pixels[:, some])
    assert (found - expected).norm() <= 1e-9 * expected.norm()


def test_approximations_cut_the_state_between_chunks(directories):
    """Against autograd with detached states; 7 latents are three chunks, of 3, 2 and 2."""
    model = load(directories["2b"], dtype=torch.float64)
    latents = torch.randn(2, 4, 7, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    leaf = latents.requires_grad_()

    def cut(*before):
        state, decoded = None, []
        for k, part in enumerate((leaf / model.vae.config.scaling_factor).split([3, 2, 2], dim=2)):
            if k in before:
                state = tree_map_only(torch.Tensor, torch.Tensor.detach, state)
            pixels, state = cogvideox_vae.decode_chunk(model.vae, part, state)
            decoded.append(pixels)
        return torch.cat(decoded, dim=1)

    every, late = list(range(25)), [24]
    cases = [("last_chunk", every, (1, 2)), ("last_chunk", late, (2,)), ("window:1", every, (1,))]
    cases += [("window:1", late, (1,)), ("window:2", every, ()), ("window:2", late, ())]
    for name, frames, before in cases:
        chosen = cut(*before)[:, frames]
        pixels = chosen.detach() - 0.5
        (expected,) = torch.autograd.grad(chosen, leaf, pixels)
        model.decoder_gradient = name
        found = model.decode_vjp(latents, frames, pixels)
        assert (found - expected).norm() <= 1e-12 * expected.norm() > 0
        model.decoder_gradient = "exact"
        exact = model.decode_vjp(latents, frames, pixels)
        assert torch.equal(found, exact) == (not before)


def test_memory_grows_with_the_states_and_not_with_the_graph(directories):
    model = load(directories["2b"])

    def peak(count, pull):
        latents = torch.randn(1, 4, count, 4, 4)
        gradient = torch.ones(1, model.frames_of(count), 3, 16, 16)
        with MemoryTracker() as tracker:
            pull(latents, list(range(len(gradient[0]))), gradient)
        return tracker.bytes

    def plainly(latents, frames, gradient):
        latents.requires_grad_()
        torch.autograd.grad(model.vae.decode(latents).sample.transpose(1, 2), latents, gradient)

    streamed, plain = (peak(16, pull) - peak(8, pull) for pull in (model.decode_vjp, plainly))
    _, state = cogvideox_vae.decode_chunk(model.vae, torch.randn(1, 4, 2, 4, 4), None)
    states = 4 * sum(x.untyped_storage().nbytes() for x in tree_leaves(state))
    pixels = 2 * 4 * 32 * 3 * 16 * 16  # frames and their gradient
    assert streamed <= states + pixels < plain / 3
    part, gradient = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 8, 3, 16, 16)
    given = [(i, gradient[:, i]) for i in range(8)]
    _, later, _ = causal.pull_back(
        partial(cogvideox_vae.decode_chunk, model.vae), part, state, given, []
    )
    assert [x.untyped_storage().nbytes() for x in later] == [x.nbytes for x in tree_leaves(state)]


def test_early_frames_take_the_first_chunks_alone(directories):
    model = load(directories["2b"], dtype=torch.float64)
    latents = torch.randn(1, 4, 7, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    whole = model.decode(latents)
    calls = []
    model.vae.decoder.register_forward_hook(lambda *call: calls.append(call[1][0].shape[2]))
    assert torch.equal(model.decode(latents, [8, 3]), whole[:, [8, 3]]) and calls == [3]
    calls.clear()
    assert torch.equal(model.decode(latents, [9]), whole[:, [9]]) and calls == [3, 2]
    calls.clear()
    found = model.decode_vjp(latents, [8], torch.ones_like(whole[:, [8]]))
    assert calls == [3] and found[:, :, :3].any() and not found[:, :, 3:].any()


def test_no_chunk_hands_on_what_the_next_one_does_not_read(directories):
    """Every tensor of the state changes the next chunk's frames."""
    model = load(directories["2b"], dtype=torch.float64)
    latents = torch.randn(1, 4, 3, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    _, state = cogvideox_vae.decode_chunk(model.vae, latents, None)
    leaves = tree_map_only(torch.Tensor, lambda x: x.requires_grad_(), state)
    frames, _ = cogvideox_vae.decode_chunk(model.vae, latents[:, :, 1:], leaves)
    gradients = torch.autograd.grad(frames.sum(), tree_leaves(leaves))
    assert len(gradients) == 2 * 8 + 2 and all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    "name, millions, layers, clip, fps",
    [
        ("cogvideox", 1693.8, 120, [49, 480, 720], 8),
        ("cogvideox-5b", 5570.3, 168, [49, 480, 720], 8),
        ("cogvideox-1.5", 5570.7, 168, [81, 768, 1360], 16),
    ],
)
def test_full_size_is_the_published_one(name, millions, layers, clip, fps):
    with torch.device("meta"):
        model = models.from_config(name)
    counts = [sum(p.numel() for p in module.parameters()) / 1e6 for module in model.modules()]
    assert [round(count, 1) for count in counts[:2]] == [millions, 215.6]
    assert round(counts[2]) == 4762  # T5 1.1 XXL's encoder
    assert len(lora.add(model, 16).layers) == layers
    assert [model.defaults[name] for name in ("num_frames", "height", "width")] == clip
    assert model.defaults["fps"] == fps
    with pytest.raises(ValueError, match="width=716 must be a positive multiple of 16 pixels"):
        model.latent_shape(Sampling(width=716).resolve(model))


def test_the_last_step_moves_the_video(directories):
    model = load(directories["2b"])
    assert model.last_step_gain(Sampling().resolve(model)) == pytest.approx(0.231, abs=0.001)


def test_it_is_saved_and_its_adapter_is_read_by_diffusers_pipeline(directories, tmp_path):
    model, settings = load(directories["5b"]), SIZE | {"num_inference_steps": 2}
    adapter = adapted(model)
    options = {"seeds": [5, 9], "sampling": Sampling(**settings)}
    expected = sample(model, PROMPTS, adapter=adapter, **options)
    file = adapter.export(tmp_path / "lora")
    adapter.remove()
    again = load(model.save_pretrained(tmp_path / "saved"))
    base = sample(model, PROMPTS, **options)
    assert torch.equal(sample(again, PROMPTS, **options), base) and not torch.equal(base, expected)
    assert again.defaults == model.defaults
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "saved")
    pipeline.load_lora_weights(file)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [prompt.text for prompt in PROMPTS],
        [prompt.negative_prompt for prompt in PROMPTS],
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
        output_type="pt",
        max_sequence_length=12,
        **settings,
    ).frames
    torch.testing.assert_close(expected, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind, size, message",
    [
        ("2b", {"height": 20}, "height=20 must be a positive multiple of 8 pixels for"),
        ("2b", {"num_frames": 2}, "num_frames=2 cannot be decoded by .* nearest are 1 and 8"),
        ("2b", {"num_frames": 13}, "num_frames=13 cannot be .* nearest are 9 and 16"),
        ("1.5", {"num_frames": 16}, "num_frames=16 cannot be .* nearest are 9 and 17"),
        ("1.5", {"width": 32}, "width=32 must be a positive multiple of 8 pixels up to 24"),
        ("2b", {"eta": 0.5}, "eta=0.5 has no effect with CogVideoXDDIMScheduler"),
    ],
)
def test_bad_sizes(directories, kind, size, message):
    with pytest.raises(ValueError, match=message):
        sample(load(directories[kind]), "a star", sampling=Sampling(**SIZE | size))


@pytest.mark.parametrize("frames", [1, 8, 16, 17])
def test_every_length_that_it_accepts_is_the_length_of_its_clips(directories, frames):
    settings = Sampling(num_frames=frames, height=8, width=8, num_inference_steps=1)
    assert sample(load(directories["2b"]), "a star", sampling=settings).shape[1] == frames
    if frames % 8:
        assert sample(load(directories["1.5"]), "a star", sampling=settings).shape[1] == frames


def test_a_directory_with_the_dpm_scheduler_is_sampled_by_ddim(directories, tmp_path):
    folder = shutil.copytree(directories["2b"], tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "CogVideoXDPMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    model, plain = load(folder), load(directories["2b"])
    assert type(model.scheduler) is diffusers.CogVideoXDDIMScheduler
    assert model.scheduler.alphas_cumprod.equal(plain.scheduler.alphas_cumprod)
    model.scheduler = diffusers.CogVideoXDPMScheduler.from_config(model.scheduler.config)
    with pytest.raises(ValueError, match="CogVideoXDPMScheduler cannot be replayed"):
        sample(model, "a star", sampling=Sampling(**SIZE))


def test_an_image_is_refused(directories):
    with pytest.raises(ValueError, match="makes videos from text alone"):
        load(directories["2b"]).encode([Prompt("a star", image=torch.zeros(3, 8, 8))])
