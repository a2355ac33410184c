"""Open-Sora 1.2: its full size, every block against a plain writing, chunks of frames, gradients, files."""

import json
import math
import shutil

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from vader_nb import Prompt, load, lora, lora_export, models, testing
from vader_nb.memory_planner import simulate
from vader_nb.models import opensora
from vader_nb.models.opensora import PUBLISHED, cleaned, network_of
from vader_nb.sampling import Sampling, sample
from vader_nb.strategies import DRaFTLV, DRTune, Last, ReFL
from vader_nb.zoo import tokenizer

WIDTH, HEADS, TOKENS = 16, 2, 48
TRANSFORMER = {"hidden_size": WIDTH, "depth": 2, "num_heads": HEADS, "caption_channels": 12}
TRANSFORMER |= {"model_max_length": TOKENS, "model_type": "STDiT3", "qk_norm": True}
VAE_2D = {
    "block_out_channels": (4, 4, 4, 4),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
# Files have entries like `type`, and the published one no sizes.
VAE = {"vae_2d": VAE_2D | {"type": "VideoAutoencoderKL"}, "micro_frame_size": 17}
VAE |= {"vae_temporal": {"filters": 4, "count": 1, "groups": 2}}
SETTINGS = {"num_inference_steps": 5, "num_frames": 20, "height": 16, "width": 24}
PROMPTS = ["a red star", "a blue circle growing on a sand background"]


def random_network(part, config):
    torch.manual_seed(0)
    network = network_of(part, config)
    for name, parameter in network.named_parameters():
        if name != "rope.freqs":
            mean = float("norm" in name and name.endswith("weight"))
            torch.nn.init.normal_(parameter, mean, 0.2)
    return network


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory of random weights, with the published files' layout in `transformer` and `vae`."""
    folder = tmp_path_factory.mktemp("opensora")
    words = tokenizer.build()
    torch.manual_seed(0)
    text = T5Config(vocab_size=len(words), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(text).save_pretrained(folder / "text_encoder")
    words.save_pretrained(folder / "tokenizer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    for part, config in (("transformer", TRANSFORMER), ("vae", VAE)):
        network = random_network(part, config)
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        save_file(network.state_dict(), folder / part / "model.safetensors")
    index = {"_class_name": "OpenSoraPipeline"}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vader_nb.json").write_text(json.dumps({"defaults": SETTINGS}))
    return folder


@pytest.fixture
def model(directory):
    return load(directory, dtype=torch.float64)


@pytest.fixture(scope="module")
def files(directory):
    """The tensors of both files, in float64."""
    parts = {p: load_file(directory / p / "model.safetensors") for p in ("transformer", "vae")}
    return {part: {k: v.double() for k, v in state.items()} for part, state in parts.items()}


# ---------------------------------------------------------------------------------- the published size

BLOCK = """attn.qkv.weight attn.qkv.bias attn.q_norm.weight attn.k_norm.weight attn.proj.weight attn.proj.bias
cross_attn.q_linear.weight cross_attn.q_linear.bias cross_attn.kv_linear.weight cross_attn.kv_linear.bias
cross_attn.proj.weight cross_attn.proj.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias
scale_shift_table"""
TOP = """x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight t_embedder.mlp.0.bias
t_embedder.mlp.2.weight t_embedder.mlp.2.bias fps_embedder.mlp.0.weight fps_embedder.mlp.0.bias
fps_embedder.mlp.2.weight fps_embedder.mlp.2.bias t_block.1.weight t_block.1.bias y_embedder.y_embedding
y_embedder.y_proj.fc1.weight y_embedder.y_proj.fc1.bias y_embedder.y_proj.fc2.weight y_embedder.y_proj.fc2.bias
final_layer.linear.weight final_layer.linear.bias final_layer.scale_shift_table rope.freqs"""


def millions(network):
    return sum(p.numel() for p in network.parameters()) / 1e6


def test_the_denoiser_has_the_published_names_and_size():
    with torch.device("meta"):
        network = network_of("transformer", PUBLISHED["transformer"])
    kinds = [f"{kind}_blocks.{i}" for kind in ("spatial", "temporal") for i in range(28)]
    names = {f"{kind}.{name}" for kind in kinds for name in BLOCK.split()} | set(TOP.split())
    state = network.state_dict()
    assert set(state) == names and len(names) == 973
    assert millions(network) == pytest.approx(1207.6, abs=0.1)
    assert state["rope.freqs"].shape == (36,)
    assert state["y_embedder.y_embedding"].shape == (300, 4096)
    targets = [
        module
        for name, module in network.named_modules()
        if name.rpartition(".")[2] in opensora.OpenSora.targets["transformer"]
    ]
    adapter = sum(16 * (m.in_features + m.out_features) for m in targets) / 1e6
    assert len(targets) == 168 and adapter == pytest.approx(9.29, abs=0.01)


def test_autoencoder_and_text_encoder_have_the_published_size():
    with torch.device("meta"):
        vae = network_of("vae", {"vae_2d": {"from_pretrained": "…"}, "vae_temporal": None})
        text = T5EncoderModel(T5Config(**PUBLISHED["text_encoder"]))
    time, state = vae.temporal_vae, vae.state_dict()
    assert len(time.state_dict()) == 267
    assert millions(time) == pytest.approx(309.7, abs=0.1)
    assert millions(time.decoder) == pytest.approx(165.3, abs=0.1)
    assert millions(text) == pytest.approx(4762, abs=1)
    prefixes = ("spatial_vae.module.", "temporal_vae.encoder.", "temporal_vae.decoder.")
    prefixes += ("temporal_vae.quant_conv.conv.", "temporal_vae.post_quant_conv.conv.")
    assert all(name.startswith(prefixes) for name in state if name not in ("scale", "shift"))
    assert state["scale"].shape == state["shift"].shape == (1, 4, 1, 1, 1)
    for name in ("block_res_blocks.3.0.conv3.conv.weight", "conv_blocks.2.conv.bias"):
        assert f"temporal_vae.encoder.{name}" in state
    for name in ("block_res_blocks.0.0.conv3.conv.weight", "conv_blocks.1.conv.bias"):
        assert f"temporal_vae.decoder.{name}" in state
    assert not any("conv_blocks.0" in name for name in state)


# -------------------------------------------------------------------------------------- plain writings


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attention(q, k, v):
    """(L, heads, d), (N, heads, d), (N, heads, d) -> (L, heads * d)."""
    scores = torch.einsum("lhd,nhd->hln", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("hln,nhd->lhd", weights, v).flatten(1)


def self_attention(w, name, x, freqs=None):
    """x (L, C); with frequencies, pairs of channels are turned as complex numbers."""
    q, k, v = (part.view(len(x), HEADS, -1) for part in linear(w, f"{name}.qkv", x).chunk(3, -1))

    def normal(part, which):
        root = (part.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        part = part / root * w[f"{name}.{which}_norm.weight"]
        if freqs is None:
            return part
        angles = torch.outer(torch.arange(len(x)), freqs)
        turns = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    return linear(w, f"{name}.proj", attention(normal(q, "q"), normal(k, "k"), v))


def cross_attention(w, name, x, text):
    """Only the text's own tokens are there, as in the packed sequences of the published code."""
    q = linear(w, f"{name}.q_linear", x).view(len(x), HEADS, -1)
    k, v = (
        part.view(len(text), HEADS, -1)
        for part in linear(w, f"{name}.kv_linear", text).chunk(2, -1)
    )
    return linear(w, f"{name}.proj", attention(q, k, v))


def mlp(w, name, x):
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x), approximate="tanh"))


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()


def block(w, name, x, text, time, freqs=None):
    """x (T, S, C), one clip; over space without frequencies, else over time."""
    shift1, scale1, gate1, shift2, scale2, gate2 = w[f"{name}.scale_shift_table"] + time.view(6, -1)
    inner = layer_norm(x) * (1 + scale1) + shift1
    dim = 0 if freqs is None else 1
    rows = [self_attention(w, f"{name}.attn", row, freqs) for row in inner.unbind(dim)]
    x = x + gate1 * torch.stack(rows, dim)
    x = x + cross_attention(w, f"{name}.cross_attn", x.flatten(0, 1), text).view_as(x)
    return x + gate2 * mlp(w, f"{name}.mlp", layer_norm(x) * (1 + scale2) + shift2)


def number(w, name, value):
    angles = [torch.tensor(value) * math.exp(-math.log(1e4) * i / 128) for i in range(128)]
    waves = torch.stack([a.cos() for a in angles] + [a.sin() for a in angles]).double()
    hidden = F.silu(linear(w, f"{name}.mlp.0", waves))
    return linear(w, f"{name}.mlp.2", hidden)


def position(row, column, rows, columns, height, width):
    base, quarter = round(math.sqrt(rows * columns)), WIDTH // 4
    numbers = []
    for index, count in ((column, columns), (row, rows)):
        place = index / (math.sqrt(height * width) / 512) * base / count
        angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
        numbers += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(numbers, dtype=torch.float64)


def velocity(w, x, t, text, fps, height, width):
    """clean - noise (4, T, h, w) of one clip's latents, by its text's own tokens (n, 12)."""
    frames, h, width_of = x.shape[1:]
    rows, columns = -(-h // 2), -(-width_of // 2)
    padded = torch.zeros(4, frames, 2 * rows, 2 * columns, dtype=x.dtype)
    padded[..., :h, :width_of] = x
    kernel = w["x_embedder.proj.weight"].flatten(1)
    tokens = torch.empty(frames, rows * columns, WIDTH, dtype=x.dtype)
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                patch = padded[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten()
                token = kernel @ patch + w["x_embedder.proj.bias"]
                place = position(r, c, rows, columns, height, width)
                tokens[f, r * columns + c] = token + place
    time = number(w, "t_embedder", t) + number(w, "fps_embedder", fps)
    modulation = linear(w, "t_block.1", F.silu(time))
    text = mlp(w, "y_embedder.y_proj", text)
    for i in range(TRANSFORMER["depth"]):
        tokens = block(w, f"spatial_blocks.{i}", tokens, text, modulation)
        tokens = block(w, f"temporal_blocks.{i}", tokens, text, modulation, w["rope.freqs"])
    shift, scale = w["final_layer.scale_shift_table"] + time
    out = linear(w, "final_layer.linear", layer_norm(tokens) * (1 + scale) + shift)
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                patch = out[f, r * columns + c].view(2, 2, 8)[..., :4].permute(2, 0, 1)
                padded[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = patch
    return padded[..., :h, :width_of]


def states_of(model, text):
    """T5's states (n, 12) of a caption with the note on its quality, padded and masked as published."""
    words = model.tokenizer(
        text + " aesthetic score: 6.5.",
        padding="max_length",
        max_length=TOKENS,
        return_tensors="pt",
    )
    states = model.text_encoder(words.input_ids, words.attention_mask).last_hidden_state[0]
    return states[words.attention_mask[0].bool()].detach()


@pytest.mark.parametrize("height, width, frames", [(16, 24, 20), (40, 32, 1)])
def test_both_branches_are_the_plain_writing(model, files, height, width, frames):
    """Sizes that need padding to whole patches; one frame has a frame rate of its own."""
    sampling = Sampling(height=height, width=width, num_frames=frames).resolve(model)
    seeded = torch.Generator().manual_seed(0)
    shape = (2, *model.latent_shape(sampling))
    latents = torch.randn(shape, generator=seeded, dtype=torch.float64)
    conditioning = model.encode(PROMPTS, sampling)
    for t in (1000.0, 312.5):
        ours = model.predict_branches(
            latents, torch.tensor(t), conditioning, ["negative", "prompt"]
        )
        for i, prompt in enumerate(PROMPTS):
            text = states_of(model, prompt)
            learned = files["transformer"]["y_embedder.y_embedding"][: len(text)]
            for branch, states in (("negative", learned), ("prompt", text)):
                setup = states, 24 if frames > 1 else 120, height, width
                plain = velocity(files["transformer"], latents[i], t, *setup)
                assert plain.std() > 0.1
                torch.testing.assert_close(ours[branch][i], -plain, rtol=1e-4, atol=2e-4)


def causal(w, name, x, stride=1):
    kernel, bias = w[f"{name}.conv.weight"], w.get(f"{name}.conv.bias")
    k, side = kernel.shape[2], kernel.shape[3] // 2
    x = F.pad(x, (side, side, side, side, k - stride, 0))
    return F.conv3d(x, kernel, bias, (stride, 1, 1))


def normed(w, name, x, groups=2):
    parts = x.view(len(x), groups, -1)
    spread = (parts.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    parts = (parts - parts.mean(-1, keepdim=True)) / spread
    shape = (1, -1, 1, 1, 1)
    x = parts.view_as(x) * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)
    return x * torch.sigmoid(x)


def residual(w, name, x):
    inner = causal(w, f"{name}.conv1", normed(w, f"{name}.norm1", x))
    inner = causal(w, f"{name}.conv2", normed(w, f"{name}.norm2", inner))
    return inner + (causal(w, f"{name}.conv3", x) if f"{name}.conv3.conv.weight" in w else x)


def decode_chunk(w, z, count):
    """The image autoencoder's latents of one chunk (1, 4, f, h, w)."""
    x = causal(w, "decoder.conv1", causal(w, "post_quant_conv", z))
    x = residual(w, "decoder.res_blocks.0", x)
    for i in (3, 2, 1, 0):
        x = residual(w, f"decoder.block_res_blocks.{i}.0", x)
        if i in (3, 2):
            pairs = causal(w, f"decoder.conv_blocks.{i - 1}", x)
            doubled = torch.empty(1, x.shape[1], 2 * x.shape[2], *x.shape[3:], dtype=x.dtype)
            doubled[:, :, 0::2], doubled[:, :, 1::2] = pairs[:, 0::2], pairs[:, 1::2]
            x = doubled
    x = causal(w, "decoder.conv_out", normed(w, "decoder.norm1", x))
    return x[:, :, (4 - count % 4) % 4 :]


def plain_decode(files, latents, frames):
    """All frames (F, 3, H, W) of one clip's latents (4, f, h, w), chunk by chunk."""
    w = {k.removeprefix("temporal_vae."): v for k, v in files["vae"].items()}
    image = diffusers.AutoencoderKL(**VAE_2D).double()
    prefix = "spatial_vae.module."
    image.load_state_dict({k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)})
    z, clip = latents[None] * w["scale"] + w["shift"], []
    while frames > 0:
        smooth = decode_chunk(w, z[:, :, :5], min(frames, 17))
        clip += [image.decode(smooth[:, :, i] / 0.18215).sample[0] for i in range(smooth.shape[2])]
        z, frames = z[:, :, 5:], frames - 17
    return (torch.stack(clip) / 2 + 0.5).clamp(0, 1).detach()


LENGTHS = {1: 1, 2: 1, 16: 4, 17: 5, 20: 6, 51: 15}


@pytest.mark.parametrize("frames, expected", LENGTHS.items())
def test_frames_of_any_number_are_the_plain_writing(model, files, frames, expected):
    sampling = Sampling(num_frames=frames).resolve(model)
    shape = model.latent_shape(sampling)
    assert shape == (4, expected, 2, 3)
    seeded = torch.Generator().manual_seed(frames)
    latents = torch.randn((2, *shape), generator=seeded, dtype=torch.float64)
    whole = model.decode(latents)
    assert whole.shape == (2, frames, 3, 16, 24) and whole.std() > 0.01
    for ours, z in zip(whole, latents):
        torch.testing.assert_close(ours, plain_decode(files, z, frames), rtol=1e-6, atol=1e-6)
    some = [-1, 0, frames // 2]
    assert torch.equal(model.decode(latents, some), whole[:, some])
    with pytest.raises(IndexError):
        model.decode(latents, [frames])


def test_latents_that_were_not_sampled_here_decode_to_the_most_frames(directory):
    model = load(directory)
    assert model.decode(torch.zeros(1, 4, 6, 2, 2)).shape[1] == 21


@pytest.mark.parametrize("size", [1, 3])
def test_the_decoders_gradient_is_autograds(model, size):
    shape = model.latent_shape(Sampling(num_frames=38).resolve(model))
    seeded = torch.Generator().manual_seed(0)
    latents = torch.randn((2, *shape), generator=seeded, dtype=torch.float64)
    frames = [-1, 0, 16, 17, 5, 3]  # of three chunks, in any order
    leaf = latents.clone().requires_grad_()
    clip = model.decode(leaf, frames)
    pulled = torch.randn(clip.shape, generator=seeded, dtype=torch.float64)
    clip.backward(pulled)
    found = model.decode_vjp(latents, frames, pulled, size)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-9, atol=1e-12)


def test_the_temporal_encoder_is_the_plain_writing(model, files):
    w = {k.removeprefix("temporal_vae."): v for k, v in files["vae"].items()}
    x = torch.randn(1, 4, 6, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = model.vae.temporal_vae.encode(x)
    x = causal(w, "encoder.conv_in", F.pad(x, (0, 0, 0, 0, 2, 0)))
    for i in range(4):
        x = residual(w, f"encoder.block_res_blocks.{i}.0", x)
        if i in (1, 2):
            x = causal(w, f"encoder.conv_blocks.{i}", x, stride=2)
    x = normed(w, "encoder.norm1", residual(w, "encoder.res_blocks.0", x))
    x = causal(w, "quant_conv", causal(w, "encoder.conv2", x))
    torch.testing.assert_close(ours, x[:, :4])


# --------------------------------------------------------------------------------------------- sampling


def published_times(steps, frames, height, width):
    """With latents counted as `5 * (frames // 17)`, for whole chunks."""
    ratio = math.sqrt(height * width / 512**2) * math.sqrt(frames // 17 * 5)
    times = [1 - i / steps for i in range(steps)]
    return [ratio * t / (1 + (ratio - 1) * t) for t in times]


def test_a_clip_is_that_of_the_published_loop(model, files):
    frames, size, steps = 17, (16, 24), 5
    sampling = Sampling(num_frames=frames, num_inference_steps=steps).resolve(model)
    assert sampling.guidance_scale == 7
    z = torch.randn(4, 5, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w, times = files["transformer"], published_times(steps, frames, *size)
    text = states_of(model, PROMPTS[0])
    learned = w["y_embedder.y_embedding"][: len(text)]
    for t, after in zip(times, [*times[1:], 0.0]):
        cond, uncond = (velocity(w, z, 1000 * t, y, 24, *size) for y in (text, learned))
        z = z + (uncond + 7 * (cond - uncond)) * (t - after)
    ours = sample(model, PROMPTS[0], seeds=3, sampling=sampling)
    expected = plain_decode(files, z, frames)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours[0], expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("frames", LENGTHS)
def test_times_are_the_published_ones_where_these_exist(model, frames):
    sampling = Sampling(num_frames=frames, num_inference_steps=30, height=276, width=368)
    scheduler = model.new_scheduler(sampling.resolve(model))
    assert scheduler.sigmas.isfinite().all() and (scheduler.sigmas.diff() < 0).all()
    assert scheduler.sigmas[0] == 1 and model.num_steps(sampling.resolve(model)) == 30
    if frames % 17 == 0:
        expected = torch.tensor([*published_times(30, frames, 276, 368), 0])
        torch.testing.assert_close(scheduler.sigmas, expected)
    if frames == 51:
        assert scheduler.sigmas[-2] == pytest.approx(0.077, abs=0.001)


def test_the_clean_latents_of_a_velocity(model):
    sampling = Sampling(num_frames=17).resolve(model)
    scheduler = model.new_scheduler(sampling)
    clean, noise = torch.randn(2, 1, 4, 5, 2, 3, dtype=torch.float64).unbind(0)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        noised = (1 - sigma) * clean + sigma * noise
        found = model.x0(scheduler, -(clean - noise), t, noised)  # predict's sign
        torch.testing.assert_close(found, clean)
        torch.testing.assert_close(found, noised + sigma * (clean - noise))


def test_gradients_and_all_else_that_training_expects(model):
    strategies = [Last(1), Last(3), ReFL(0.6), DRTune(2, stop=1), DRaFTLV(2)]
    testing.check_model(model, strategies=strategies)


@pytest.mark.parametrize("height, width", [(276, 370), (0, 16), (20, 16), (368, 276)])
def test_sizes_that_cannot_be_made_are_an_error(model, height, width):
    sampling = Sampling(num_inference_steps=1)
    sampling.height, sampling.width = height, width
    message = "must be at least 1|multiples of 8 pixels .* cut: .*276x368"
    with pytest.raises(ValueError, match=message):
        sample(model, "a cat", sampling=sampling)
    assert not model._embeddings


def test_sizes_of_its_own_are_cut(model):
    settings = Sampling(num_inference_steps=1, num_frames=1, height=276, width=368)
    assert sample(model, "a cat", sampling=settings).shape == (1, 1, 3, 272, 368)


def test_what_it_cannot_do_is_said(model):
    with pytest.raises(
        NotImplementedError, match="is Open-Sora, for which diffusers has no pipeline"
    ):
        model.pipeline()
    with pytest.raises(ValueError, match="take no image"):
        sample(model, Prompt("a cat", image=torch.zeros(3, 8, 8)))
    with pytest.raises(ValueError, match="fps must be at least 1, got 0"):
        sample(model, "a cat", sampling=Sampling(options={"fps": 0}))
    model.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="rectified flow: DDIMScheduler cannot"):
        sample(model, "a cat")


# -------------------------------------------------------------------------------------------- the text


def test_captions_are_cleaned(monkeypatch):
    dirty = "A Red   <b>star</b> &amp;amp; a MOON "
    assert cleaned(dirty + " aesthetic score: 6.5.").endswith("aesthetic score: 6.5.")
    assert cleaned("A Red   star") == "a red star"
    monkeypatch.setattr(opensora, "is_ftfy_available", lambda: False)
    assert cleaned("A Red   star &amp;amp; a MOON ") == "a red star & a moon"


def test_a_negative_prompt_is_in_the_place_of_the_learned_states(model):
    sampling = Sampling().resolve(model)
    own = model.encode([Prompt("a red star", negative_prompt="a moon"), "a cat"], sampling)
    plain = model.encode(["a red star", "a cat"], sampling)
    alone = model._embed("a moon")
    states, mask = (own["negative"][key][0] for key in ("encoder_hidden_states", "mask"))
    assert torch.equal(states[mask], alone)
    for key, value in own["prompt"].items():
        assert torch.equal(value, plain["prompt"][key])
    assert torch.equal(own["negative"]["mask"][1], plain["prompt"]["mask"][1])
    assert len(model._embeddings) == 3  # each text once


# ----------------------------------------------------------------------------------------------- files


def test_adapters_of_vader_come_and_go(model, tmp_path):
    """peft's names on the bare denoiser; VADER's alpha is 8, which is not in its files."""
    adapter = lora.add(model, rank=4, alpha=8, seed=0)
    for p in adapter.parameters():
        torch.nn.init.normal_(p, 0, 0.3, generator=torch.Generator().manual_seed(len(p)))
    assert len(adapter.layers) == 4 * 3
    expected = sample(model, "a red star", adapter=adapter)
    path = lora_export.export(adapter.state_dict(), 8, tmp_path / "peft", "peft")
    adapter.remove()
    state = load_file(path)
    assert "base_model.model.spatial_blocks.0.attn.qkv.lora_A.weight" in state
    assert len(state) == 2 * 4 * 3
    found = sample(model, "a red star", adapter=tmp_path / "peft")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, sample(model, "a red star"))


def test_a_saved_directory_is_loaded_again(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "copy")
    again = load(folder, dtype=torch.float64)
    assert again.defaults == model.defaults
    expected = sample(model, "a red star")
    assert torch.equal(sample(again, "a red star"), expected)
    adapter = testing.adapted(model)
    merged = load(adapter.merge(tmp_path / "merged"), dtype=torch.float64)
    found = sample(merged, "a red star")
    adapted = sample(model, "a red star", adapter=adapter)
    torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, expected)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["vader_nb", "STDiT3"]
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    shapes = models.from_config(folder).denoiser.state_dict()
    assert {k: v.shape for k, v in shapes.items()} == {
        k: v.shape for k, v in again.denoiser.state_dict().items()
    }


def test_the_published_repositories_load_from_the_hub_cache(directory, tmp_path, monkeypatch):
    """The real call, on a hub cache with files of the published names; T5's weights are a `.bin` there."""

    def snapshot(repository):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    shutil.copytree(directory / "transformer", snapshot("hpcai-tech/OpenSora-STDiT-v3"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError, match="hf download hpcai-tech/OpenSora-STDiT-v3 && .*VAE"
    ):
        load("opensora", cache_dir=tmp_path)
    shutil.copytree(directory / "vae", snapshot("hpcai-tech/OpenSora-VAE-v1.2"))
    text = shutil.copytree(directory / "text_encoder", snapshot("DeepFloyd/t5-v1_1-xxl"))
    shutil.copytree(directory / "tokenizer", text, dirs_exist_ok=True)
    weights = load_file(text / "model.safetensors")
    (text / "model.safetensors").unlink()
    torch.save(weights, text / "pytorch_model.bin")
    model = load("opensora", cache_dir=tmp_path, dtype={"vae": torch.float64})
    assert model.defaults == opensora.DEFAULTS and model.scheduler.config.shift == 1
    assert model.vae.dtype == torch.float64 and model.dtype == torch.float32
    here = load(directory, dtype={"vae": torch.float64})
    settings = Sampling(**SETTINGS)
    clips = [sample(m, "a red star", sampling=settings) for m in (model, here)]
    assert torch.equal(*clips)


def test_files_that_do_not_fit_are_refused(directory, tmp_path):
    folder = shutil.copytree(directory, tmp_path / "copy")
    config = TRANSFORMER | {"depth": 3}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="model.safetensors is not the transformer of Open-Sora 1.2"
    ):
        load(folder)


def test_offloaded_networks_make_the_same_clip(model):
    expected = sample(model, "a red star")
    model._embeddings.clear()
    model.enable_model_cpu_offload()
    assert torch.equal(sample(model, "a red star"), expected)


def test_memory_is_planned(directory):
    stages = simulate(directory, "brightness")
    assert 0 < stages["weights"] < stages["replay"]
