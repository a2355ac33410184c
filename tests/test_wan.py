"""Wan 2.1 and 2.2: against diffusers' own pipelines, their full sizes, the streamed gradient of the causal decoder."""

import contextlib
import shutil

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from PIL import Image
from torchvision.transforms.functional import to_tensor

from vader_nb import Prompt, Trainer, align, gradient, load, lora, memory_planner, models, rewards
from vader_nb.models import causal, causal_states, wan_vae
from vader_nb.rewards.networks import default_dtype
from vader_nb.sampling import Sampling, roll_out, sample
from vader_nb.strategies import DRaFTLV, DRTune, Frames, Last, ReFL, Step
from vader_nb.testing import (
    REWARDS,
    adapted,
    apart,
    check_model,
    plain_autograd,
    staged,
    take_gradient,
)
from vader_nb.train_config import TrainConfig

PROMPTS = [
    Prompt("a red star spinning &amp; growing", negative_prompt="blurry"),
    Prompt("a  blue circle", negative_prompt="a red star"),
]
SETTINGS = {"num_inference_steps": 3, "num_frames": 5, "height": 32, "width": 48}
SMALL = {"num_inference_steps": 5, "num_frames": 5, "height": 32, "width": 32}
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
VAES = {
    "2.1": {"base_dim": 3, "z_dim": 4, "num_res_blocks": 1},
    "2.2": {
        "base_dim": 2,
        "decoder_base_dim": 3,
        "z_dim": 6,
        "num_res_blocks": 1,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = (
        "<pad> </s> <unk> a red blue star circle spinning growing blurry & on white sand background"
    )
    words = {word: i for i, word in enumerate(words.split())}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=16, **names)


def vae(version):
    torch.manual_seed(0)
    config = dict(VAES[version])
    draw = torch.Generator().manual_seed(1)
    for name in ("latents_mean", "latents_std"):
        config[name] = (torch.rand(config["z_dim"], generator=draw) + 0.5).tolist()
    return diffusers.AutoencoderKLWan(**config)


def transformer(channels, seed=0, **more):
    torch.manual_seed(seed)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **{"in_channels": channels} | more,
    )


def text_encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = UMT5Config(vocab_size=32, relative_attention_num_buckets=8, **sizes)
    return UMT5EncoderModel(config)


def pipeline(version="2.1", scheduler=None, **more):
    """A `WanPipeline` of random weights, built of the libraries' own classes."""
    decoder = vae(version)
    scheduler = scheduler or diffusers.UniPCMultistepScheduler(**UNIPC)
    parts = tokenizer(), text_encoder(), decoder, scheduler, transformer(decoder.config.z_dim)
    return diffusers.WanPipeline(*parts, **more)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two transformers, as Wan 2.2 A14B."""
    folder = tmp_path_factory.mktemp("experts")
    pipeline(transformer_2=transformer(4, seed=1), boundary_ratio=0.875).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expanded(tmp_path_factory):
    """A timestep for each token and an autoencoder of residual blocks, as Wan 2.2 5B."""
    folder = tmp_path_factory.mktemp("expanded")
    pipeline("2.2", expand_timesteps=True).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------ diffusers' pipelines


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_latents_and_frames_are_those_of_diffusers_pipeline(directory, guidance_scale):
    compare(directory, guidance_scale=guidance_scale)


@pytest.mark.parametrize("scales", [{}, {"guidance_scale_2": 3.0}])
def test_two_experts_are_those_of_diffusers_pipeline(experts, scales):
    compare(experts, guidance_scale=4.0, **scales)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_timesteps_of_tokens_are_those_of_diffusers_pipeline(expanded, guidance_scale):
    compare(expanded, guidance_scale=guidance_scale, height=64, width=32)


def compare(directory, guidance_scale, height=32, width=48, **more):
    model = load(directory)
    theirs = diffusers.DiffusionPipeline.from_pretrained(directory)
    theirs.set_progress_bar_config(disable=True)
    settings = SETTINGS | {"height": height, "width": width, "guidance_scale": guidance_scale}
    sampling = Sampling(**settings, options=more).resolve(model)
    arguments = {
        "prompt": [prompt.text for prompt in PROMPTS],
        "negative_prompt": [prompt.negative_prompt for prompt in PROMPTS],
        "max_sequence_length": 16,
        **settings,
        **more,
    }
    for output_type in ("latent", "pt"):
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
        expected = theirs(**arguments, generator=generators, output_type=output_type).frames
        if output_type == "latent":
            found = roll_out(model, PROMPTS, [5, 9], sampling).latents
        else:
            found = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.01


def test_each_expert_has_its_own_steps(experts, directory):
    model = load(experts)
    assert list(model.denoisers) == ["transformer", "transformer_2"]
    high, low = model.denoisers.values()
    assert not torch.equal(high.proj_out.weight, low.proj_out.weight)
    assert model.denoiser_at(torch.tensor(875)) is high
    assert model.denoiser_at(torch.tensor(874)) is low
    sampling = Sampling(num_inference_steps=40).resolve(model)
    shares = []
    for shift in (None, 3.0, 12.0):
        sampling.options["flow_shift"] = shift
        times = model.new_scheduler(sampling).timesteps
        shares.append(sum(model.denoiser_at(t) is high for t in times) / 40)
    assert shares == [0.325, 0.325, 0.65]  # steps above 0.7, and above 0.368
    with pytest.raises(ValueError, match="has no sampling option 'guidance_scale_2'"):
        Sampling(options={"guidance_scale_2": 3.0}).resolve(load(directory))


def test_the_second_scale_alone_guides(experts):
    """The first expert without guidance, the second with it: one branch is not enough."""
    model = load(experts)
    options = {"guidance_scale_2": 4.0}
    outputs = [
        sample(model, PROMPTS, sampling=Sampling(**SETTINGS, guidance_scale=1.0, options=options))
        for options in ({"guidance_scale_2": None}, {"guidance_scale_2": 1.0}, options)
    ]
    assert torch.equal(*outputs[:2]) and not torch.allclose(*outputs[1:])


def picture(seed):
    pixels = torch.rand(40, 56, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy())


def image_pipeline(clip):
    """A `WanImageToVideoPipeline`, with CLIP's image encoder as Wan 2.1, or with two experts as Wan 2.2."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    more = {"in_channels": 12} | ({"image_dim": 8, "added_kv_proj_dim": 24} if clip else {})
    parts = {"transformer": transformer(4, **more)}
    if clip:
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        sizes |= {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
        size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**sizes))
        parts["image_processor"] = CLIPImageProcessor(**size)
    else:
        parts |= {"transformer_2": transformer(4, seed=1, **more), "boundary_ratio": 0.9}
    scheduler = diffusers.UniPCMultistepScheduler(**UNIPC)
    return diffusers.WanImageToVideoPipeline(
        tokenizer(), text_encoder(), vae("2.1"), scheduler, **parts
    )


@pytest.fixture(scope="module", params=[True, False], ids=["CLIP", "experts"])
def of_images(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    image_pipeline(request.param).save_pretrained(folder)
    return folder


def test_image_to_video_is_that_of_diffusers_pipeline(of_images):
    model, theirs = load(of_images), diffusers.DiffusionPipeline.from_pretrained(of_images)
    theirs.set_progress_bar_config(disable=True)
    sampling = Sampling(**SETTINGS).resolve(model)
    prompts = [Prompt(p.text, p.negative_prompt, picture(i)) for i, p in enumerate(PROMPTS)]
    for output_type in ("latent", "pt"):
        expected = [
            theirs(
                prompt.image,
                prompt.text,
                prompt.negative_prompt,
                generator=torch.Generator().manual_seed(seed),
                output_type=output_type,
                max_sequence_length=model.text_length,
                **SETTINGS,
            ).frames
            for prompt, seed in zip(prompts, (5, 9))
        ]
        if output_type == "latent":
            found = roll_out(model, prompts, [5, 9], sampling).latents
        else:
            found = sample(model, prompts, seeds=[5, 9], sampling=sampling)
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    swapped = [Prompt(p.text, p.negative_prompt, picture(1)) for p in prompts]
    other = sample(model, swapped, seeds=[5, 9], sampling=sampling)
    assert not torch.allclose(other[0], found[0]) and torch.equal(other[1], found[1])


def test_image_to_video_keeps_the_promises_of_a_model(of_images):
    model = load(of_images, dtype=torch.float64)
    if model.image_encoder is not None:
        check_model(model, Sampling(**SMALL), strategies=[Last(2)])
    with pytest.raises(ValueError, match="continues an image: give Prompt"):
        sample(model, "a star", sampling=Sampling(**SMALL))


def with_images(prompts=PROMPTS):
    return [Prompt(p.text, p.negative_prompt, picture(i)) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("scheduler", ["UniPC", "FlowMatchEuler"])
def test_2_2_5b_continues_an_image_as_diffusers_pipeline_does(expanded, tmp_path, scheduler):
    """The same directory, loaded as it is; in diffusers by the other pipeline's class."""
    if scheduler == "FlowMatchEuler":  # whose timesteps are no whole numbers
        shutil.copytree(expanded, tmp_path / "euler")
        expanded = tmp_path / "euler"
        made = diffusers.DiffusionPipeline.from_pretrained(expanded)
        made.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        made.save_pretrained(expanded)
    model = load(expanded)
    theirs = diffusers.WanImageToVideoPipeline.from_pretrained(expanded)
    theirs.set_progress_bar_config(disable=True)
    settings = SETTINGS | {"height": 64, "width": 32, "guidance_scale": 5.0}
    sampling, prompts = Sampling(**settings).resolve(model), with_images()
    if scheduler == "FlowMatchEuler":
        sigmas = model.new_scheduler(sampling).sigmas
        set_timesteps = theirs.scheduler.set_timesteps
        theirs.scheduler.set_timesteps = lambda n, device: set_timesteps(
            sigmas=sigmas[:-1].tolist(), device=device
        )
    expected = {
        kind: torch.cat(
            [
                theirs(
                    prompt.image,
                    prompt.text,
                    prompt.negative_prompt,
                    generator=torch.Generator().manual_seed(seed),
                    output_type=kind,
                    max_sequence_length=model.text_length,
                    **settings,
                ).frames
                for prompt, seed in zip(prompts, (5, 9))
            ]
        )
        for kind in ("latent", "pt")
    }
    found = roll_out(model, prompts, [5, 9], sampling).latents
    torch.testing.assert_close(found, expected["latent"], rtol=1e-5, atol=1e-5)
    clip = sample(model, prompts, seeds=[5, 9], sampling=sampling)
    torch.testing.assert_close(clip, expected["pt"], rtol=1e-5, atol=1e-5)
    without = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
    assert (without - clip).abs().max() > 0.1


def test_the_gradient_with_a_first_latent_that_is_given(expanded):
    model = load(expanded, dtype=torch.float64)
    sampling, adapter = Sampling(**SMALL), adapted(model)
    for strategy in (Last(2), Step(3), ReFL(0.6), DRTune(2, stop=1), DRaFTLV(2)):
        setup = REWARDS["clip"], with_images(), [1, 2], sampling, strategy, Frames.all()
        (ours, gradient), (theirs, expected) = (
            take(model, adapter, *setup) for take in (staged, plain_autograd)
        )
        assert apart(gradient, expected) < 1e-9 and apart(ours, theirs) < 1e-9
    latents = roll_out(model, with_images(), [1, 2], sampling.resolve(model)).latents
    encoded = model.encode(with_images(), sampling.resolve(model))["prompt"]["first"]
    assert torch.equal(latents[:, :, :1], encoded) and encoded.std() > 0.1


def learned_from(model, prompts):
    """The frames whose reward has a gradient."""
    adapter, plan, sampling = adapted(model), Last(1).plan(5, None), Sampling(**SMALL)
    rollout = gradient.rolled_out(model, adapter, prompts, [1, 2], sampling.resolve(model), plan)
    frames = []
    for frame in range(sampling.num_frames):
        gradient.accumulate(model, adapter, REWARDS["frames"], rollout, plan, [frame])
        if take_gradient(adapter).any():
            frames.append(frame)
    adapter.remove()
    return frames


def test_frames_that_an_image_gives_are_neither_drawn_nor_accepted_alone(expanded):
    model = load(expanded)
    for prompts, given in ((with_images(), 1), (PROMPTS, 0)):
        assert model.given_frames(prompts) == given
        assert learned_from(model, prompts) == list(range(given, 5))
        drawn = [Frames.random(1).choose(5, None, given)[0] for _ in range(100)]
        assert set(drawn) == set(range(given, 5))
    adapter = adapted(model)
    for frames in (Frames.at(0), Frames.random(5)):
        config = TrainConfig(frames=frames, sampling=Sampling(**SMALL))
        with pytest.raises(ValueError, match="image"):
            staged(
                model,
                adapter,
                REWARDS["frames"],
                with_images(),
                [1, 2],
                Sampling(**SMALL),
                Last(1),
                frames,
            )
        with pytest.raises(ValueError, match="image"):
            Trainer(model, REWARDS["frames"], with_images(), config)
        Trainer(model, REWARDS["frames"], PROMPTS, config)


def test_all_frames_are_learned_from_where_the_image_is_a_condition(of_images):
    model = load(of_images)
    assert model.given_frames(with_images()) == 0
    assert learned_from(model, with_images()) == list(range(5))


def test_a_batch_has_images_or_none(expanded, directory):
    model = load(expanded)
    with pytest.raises(ValueError, match="1 of 2 prompts have an image: in a batch, all clips"):
        sample(model, [with_images()[0], "a star"], sampling=Sampling(**SMALL))
    with pytest.raises(ValueError, match="makes videos from text alone; its prompts take no image"):
        sample(load(directory), with_images(), sampling=Sampling(**SMALL))


def test_the_other_pipelines_class_needs_an_image(expanded, tmp_path):
    """A directory that names `WanImageToVideoPipeline`, and expands timesteps."""
    made = diffusers.WanImageToVideoPipeline.from_pretrained(expanded)
    made.save_pretrained(tmp_path / "model")
    model, other = load(tmp_path / "model"), load(expanded)
    assert type(model).__name__ == "WanImageToVideo" and model.expand_timesteps
    clips = [sample(m, with_images(), sampling=Sampling(**SMALL)) for m in (model, other)]
    assert torch.equal(*clips)
    with pytest.raises(ValueError, match="continues an image: give Prompt"):
        sample(model, "a star", sampling=Sampling(**SMALL))


def test_a_tensor_is_the_image_that_it_shows(of_images):
    model, sampling = load(of_images), Sampling(**SETTINGS)
    shown = picture(0).resize((48, 32))
    tensor = to_tensor(shown)
    one, other = (
        sample(model, Prompt("a star", image=x), sampling=sampling) for x in (shown, tensor)
    )
    torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)  # CLIP's resizing rounds to bytes


# ------------------------------------------------------------------------------------ the decoder's gradient


def coupled(frames):
    """A nonlinear reward in which every frame meets its neighbors."""
    jumps = frames.diff(dim=1).square().sum(dim=(1, 2, 3, 4)) / 100
    return (frames.mean(dim=(1, 2, 3, 4)) ** 3 - jumps).sum()


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_decode(vae, latents):
    """All frames by diffusers' class, from latents as the transformer has them."""
    mean, std = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    z = latents * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)
    return (vae.decode(z).sample / 2 + 0.5).transpose(1, 2)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Models in float64, by version."""
    made = {}
    for version in VAES:
        folder = tmp_path_factory.mktemp("decoder")
        pipeline(version).save_pretrained(folder)
        made[version] = load(folder, dtype=torch.float64)
    made["2.2"].vae.decoder.conv_out.weight.mul_(3)  # so that some values are clamped
    return made


@pytest.mark.parametrize("channel_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_quick_norm_is_diffusers(channel_first, bias):
    norm = WanRMS_norm(6, channel_first, images=False, bias=bias).double()
    with torch.no_grad():
        norm.gamma.copy_(normals(*norm.gamma.shape))
    x = normals(2, 6, 3, 4, 6)
    x[0, :, 0, 0], x[1, 0, 0, 0] = 0, 0  # of length zero, on whichever axis
    x.requires_grad_()
    expected = norm(x)
    pulled = torch.autograd.grad(expected.square().sum(), x)[0]
    wan_vae.use_quick_norms(norm)
    found = norm(x)
    assert type(norm) is wan_vae.RMSNorm and torch.equal(
        norm(x.half()), type(norm).__base__.forward(norm, x.half())
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), x)[0], pulled, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("count, exactly", [(3, True), (6, True), (3, False)])
@pytest.mark.parametrize("version", VAES)
def test_the_streamed_gradient_is_autograd_through_diffusers_decode(
    decoders, version, count, exactly, monkeypatch
):
    """For every choice of where states wait; of the whole clip, of its beginning, and of some frames, one twice."""
    model = decoders[version]
    if exactly:  # the decoder's upsampling casts to float32, whose rounding would hide small errors
        monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    latents = (normals(2, model.vae.config.z_dim, count, 4, 2) * 2).requires_grad_()
    whole = plain_decode(model.vae, latents)
    length = 4 * count - 3
    assert whole.shape[1] == length
    clamped = ((whole == 0) | (whole == 1)).double().mean()
    assert 0.001 < clamped < 0.5
    for frames in (list(range(length)), [0], [length - 3, 1, -2, 1]):
        chosen = whole[:, frames].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(coupled(chosen) + chosen.square().sum(), chosen)
        (expected,) = torch.autograd.grad(whole[:, frames], latents, gradient, retain_graph=True)
        torch.testing.assert_close(model.decode(latents, frames), chosen, rtol=0, atol=1e-12)
        for states in ("device", "cpu", 1, 2, 4):
            model.decoder_states = states
            found = model.decode_vjp(latents, frames, gradient)
            assert (found - expected).norm() <= 1e-9 * expected.norm() > 0
            reached = 1 if frames == [0] else count
            assert not found[:, :, reached:].any() and found[:, :, :reached].any()


def decode_with_cuts(model, latents, cuts):
    """All frames, with the states before these latents detached."""
    mean, scale = wan_vae.statistics(model.vae, latents)
    state, decoded = [None] * model.vae._cached_conv_counts["decoder"], []
    for k, part in enumerate((latents / scale + mean).split(1, dim=2)):
        if k in cuts:
            state = [x.detach() if isinstance(x, torch.Tensor) else x for x in state]
        pixels, state = wan_vae.decode_chunk(model.vae, part, state)
        decoded.append(pixels)
    return torch.cat(decoded, dim=1)


ALL = list(range(21))


@pytest.mark.parametrize(
    "approximation, frames, cuts, reached, calls",
    [
        ("last_chunk", [20], [5], [5], (5, 1)),
        ("last_chunk", ALL, [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], (0, 6)),
        ("last_chunk", [9, 20, 0], [3, 5], [0, 3, 5], (3, 3)),
        ("window:2", [20], [3], [3, 4, 5], (5, 3)),
        ("window:2", [-1, 5], [3], [0, 1, 2, 3, 4, 5], (4, 6)),
        ("window:1", [20, 5], [4, 1], [1, 2, 4, 5], (4, 4)),
        ("window:2", ALL, [3], [0, 1, 2, 3, 4, 5], (4, 6)),
        ("window:3", ALL, [2], [0, 1, 2, 3, 4, 5], (4, 6)),
        ("window:6", ALL, [], [0, 1, 2, 3, 4, 5], (5, 6)),
        ("window:99", [20], [], [0, 1, 2, 3, 4, 5], (5, 6)),
    ],
)
@pytest.mark.parametrize("version", VAES)
def test_an_approximation_is_autograd_with_detached_states(
    decoders, version, approximation, frames, cuts, reached, calls, monkeypatch
):
    """And takes fewer calls of the decoder: without a graph, and with one. A window as long as the clip is exact."""
    model = decoders[version]
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    latents = (normals(2, model.vae.config.z_dim, 6, 4, 2) * 2).requires_grad_()
    gradient = normals(2, len(frames), 3, *model.decode(latents, [0]).shape[-2:], seed=1)
    chosen = decode_with_cuts(model, latents, cuts)[:, frames]
    (expected,) = torch.autograd.grad(chosen, latents, gradient)
    made, run = [], model.vae.decoder.forward

    def counted(*args, **options):
        made.append(torch.is_grad_enabled())
        return run(*args, **options)

    monkeypatch.setattr(model.vae.decoder, "forward", counted)
    model.decoder_gradient = approximation
    for states in ("device", "cpu", 2):
        model.decoder_states = states
        made.clear()
        found = model.decode_vjp(latents, frames, gradient)
        assert (found - expected).norm() <= 1e-12 * expected.norm()
        assert [k for k in range(6) if found[:, :, k].any()] == reached
        if states != 2:  # which computes some of them twice
            assert (made.count(False), made.count(True)) == calls
    model.decoder_states, model.decoder_gradient = None, "exact"
    exact = model.decode_vjp(latents, frames, gradient)
    assert not any(
        "forward" in vars(part)
        for part in model.vae.decoder.modules()
        if part is not model.vae.decoder
    )
    apart = (exact - found).norm() / exact.norm()
    assert apart > 0.01 if cuts else torch.equal(exact, found)


@pytest.mark.parametrize(
    "name", ["last", "window", "window:", "window:0", "window:-1", "window:a", 3]
)
def test_an_approximation_must_have_a_name(decoders, name, tmp_path):
    """Also in the settings of a directory, where it is found at load."""
    model = decoders["2.1"]
    with pytest.raises(ValueError, match=f"decoder_gradient={name!r}: choose 'exact', or, to save"):
        model.decoder_gradient = name
    assert model.decoder_gradient == "exact"


def test_a_directory_names_the_decoders_settings(directory, tmp_path):
    model = load(directory)
    model.defaults |= {"decoder_states": 2, "decoder_gradient": "window:3"}
    again = load(model.save_pretrained(tmp_path / "saved"))
    assert (again.decoder_states, again.decoder_gradient) == (2, "window:3")
    model.defaults["decoder_gradient"] = "window:none"
    with pytest.raises(ValueError, match="decoder_gradient='window:none'"):
        load(model.save_pretrained(tmp_path / "wrong"))


def test_frames_of_the_beginning_decode_the_beginning_alone(decoders, monkeypatch):
    model = decoders["2.1"]
    model.decoder_states = "device"
    latents, calls = normals(1, 4, 6, 4, 2), []
    whole, run = model.decode(latents), model.vae.decoder.forward
    monkeypatch.setattr(
        model.vae.decoder, "forward", lambda *a, **b: calls.append(a) or run(*a, **b)
    )
    for frame, needed in ((0, 1), (1, 2), (4, 2), (5, 3), (20, 6)):
        calls.clear()
        assert torch.equal(model.decode(latents, [frame]), whole[:, [frame]])
        assert len(calls) == needed
        calls.clear()
        model.decode_vjp(latents, [frame], torch.ones_like(whole[:, [frame]]))
        assert len(calls) == 2 * needed - 1  # the states before the last one, and each with a graph


@pytest.mark.parametrize("states", ["disk", 0, -1, True, 1.5])
def test_states_must_have_a_place(decoders, states):
    model = decoders["2.1"]
    with pytest.raises(ValueError, match=f"decoder_states={states!r}: choose 'device', 'cpu'"):
        model.decoder_states = states


def test_memory_grows_by_the_states_alone(decoders, tmp_path):
    """Simulated: 2 more latents are 2 states on the device, or none in CPU memory, or every second one.
    An approximation keeps none of other sweeps."""
    decoders["2.1"].save_pretrained(tmp_path / "saved")
    with memory_planner.FakeMode() as fake:
        fake.truth = False
        model = models.from_config(tmp_path / "saved")
        model.offload_device = torch.device("meta")

        def peak(states, count, reach="exact"):
            latents, frames = torch.randn(1, 4, count, 8, 8), list(range(4 * count - 3))
            gradient = torch.randn(1, len(frames), 3, 64, 64)
            with memory_planner.MemoryTracker("cpu") as tracker:
                model.decoder_states, model.decoder_gradient = states, reach
                model.decode_vjp(latents, frames, gradient)
            return tracker.bytes

        state = [None] * 33
        for _ in range(3):
            state = wan_vae.decode_chunk(model.vae, torch.randn(1, 4, 1, 8, 8), state)[1]
        size = sum(x.nbytes for x in state if x is not None)
        growth = {s: (peak(s, 6) - peak(s, 4)) / size for s in ("device", "cpu", 2)}
        window = (peak("device", 5, "last_chunk") - peak("device", 3, "last_chunk")) / size
    assert growth["device"] == pytest.approx(2, abs=0.05)
    assert growth["cpu"] == pytest.approx(0, abs=0.05)
    assert growth[2] == pytest.approx(1, abs=0.05)
    assert window == pytest.approx(0, abs=0.05)


def test_blocks_of_the_full_size_decoder_are_computed_again(monkeypatch):
    """Simulated at 480 x 832: less than half of what a latent's plain graph takes, in fewer than 10 GiB."""

    def peak():
        with memory_planner.MemoryTracker("cpu") as tracker:
            wan_vae.decode_vjp(decoder, latents, [4], gradient, causal.States("cpu", there))
        return tracker.bytes / memory_planner.GIB

    there = torch.device("meta")
    with memory_planner.FakeMode() as fake:
        fake.truth = False
        with default_dtype(torch.bfloat16):  # fake weights cannot be converted
            decoder = diffusers.AutoencoderKLWan().requires_grad_(False)
        latents = torch.randn(1, 16, 2, 60, 104, dtype=torch.bfloat16)
        gradient = torch.randn(1, 1, 3, 480, 832, dtype=torch.bfloat16)
        again = peak()
        monkeypatch.setattr(wan_vae, "recomputed", contextlib.nullcontext)
        assert again < min(10, 0.5 * peak())


class Away:
    """A tensor's values where no one counts them, as in the memory of another device."""

    def __init__(self, tensor):
        self.values = tensor.numpy().copy()


def out_of_sight(state, device):
    """In place of `causal_states.moved`, on a machine with one device: there, and back."""
    if device is None:
        return state
    if any(isinstance(x, Away) for x in state):
        return [torch.tensor(x.values) if isinstance(x, Away) else x for x in state]
    return [Away(x) if isinstance(x, torch.Tensor) else x for x in state]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A decoder large enough that its states, and what a latent's graph keeps, are the most of a step's memory."""
    folder = tmp_path_factory.mktemp("wide")
    made = pipeline()
    made.vae = diffusers.AutoencoderKLWan(**VAES["2.1"] | {"base_dim": 12}, **STATISTICS)
    made.save_pretrained(folder)
    return folder


STATISTICS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
LONG = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 2, "frames": "all"}
FLOAT32 = LONG | {"dtype": torch.float32}


@pytest.mark.parametrize(
    "setting",
    [
        {"decoder_states": "device"},
        {"decoder_states": "cpu"},
        {"decoder_states": 2},
        {"decoder_gradient": "last_chunk"},
        {"decoder_gradient": "window:1"},
        {"decoder_gradient": "window:1", "frames": "16"},
        {"dtype": None},
    ],
    ids=str,
)
def test_the_planner_foresees_the_decoders_settings(wide, setting, monkeypatch):
    """Against memory that was counted."""
    step = memory_planner.Step.of(wide, "brightness", FLOAT32 | setting)
    simulated = memory_planner.simulate(wide, "brightness", **FLOAT32 | setting)
    monkeypatch.setattr(causal_states, "moved", out_of_sight)
    real = step.count()
    for stage in ("decode", "reward", "replay"):
        assert simulated[stage] == pytest.approx(real[stage], rel=0.1), stage
    beside = [stages["decode"] - stages["weights"] for stages in (simulated, real)]
    assert beside[0] == pytest.approx(beside[1], rel=0.1)


def test_the_planner_tells_the_decoders_settings_apart(wide):
    peaks = {}
    for name, value in [("decoder_states", s) for s in ("device", 2, "cpu")] + [
        ("decoder_gradient", g) for g in ("window:1", "last_chunk")
    ]:
        stages = memory_planner.simulate(wide, "brightness", **FLOAT32 | {name: value})
        peaks[value] = stages["decode"]
    assert peaks["device"] > peaks[2] > peaks["cpu"]
    assert peaks["device"] > peaks["window:1"] > peaks["last_chunk"]
    own, half = (
        memory_planner.simulate(wide, "brightness", **LONG | {"dtype": dtype})["decode"]
        for dtype in (None, torch.bfloat16)
    )  # by default the autoencoder is in float32
    assert own > 1.2 * half
    with pytest.raises(ValueError, match="decoder_states='disk': choose"):
        memory_planner.memory("wan", "hps", decoder_states="disk")
    with pytest.raises(ValueError, match="decoder_gradient='exact' has no effect: the decoder of"):
        memory_planner.memory("tiny", "hps", decoder_gradient="exact")


def test_the_planner_takes_the_random_frame_that_needs_the_most(wide):
    """With a causal decoder the last one, before which all others are decoded."""
    first, last, random = (
        memory_planner.simulate(wide, "brightness", **FLOAT32 | {"frames": frames})["decode"]
        for frames in ("0", "16", "random:1")
    )
    assert first < last == random


# ------------------------------------------------------------------------------------ promises of a model


@pytest.mark.parametrize("which", ["directory", "experts", "expanded"])
def test_it_keeps_the_promises_of_a_model(which, request):
    model = load(request.getfixturevalue(which), dtype=torch.float64)
    assert {p.dtype for m in model.modules()[:2] for p in m.parameters()} == {torch.float64}
    # With two experts and the default shift, the first of 5 steps is the high-noise expert's, and Last(5) trains both.
    strategies = {
        "directory": [Last(2), DRTune(2, stop=1), DRaFTLV(2)],
        "experts": [Last(5), Step(5)],
        "expanded": [Last(1)],
    }
    report = check_model(model, Sampling(**SMALL), strategies=strategies[which])
    assert len(report) == 13 + len(strategies[which])
    assert [one.name for one in report.approximations] == ["last_chunk", "window:2"] * 2
    assert all(one.error > 0.01 and one.cost < 1 for one in report.approximations)
    assert str(report).splitlines()[-1].startswith("window:2          all frames, coupled")


def test_the_published_sizes():
    counts = {}
    for name in ("wan", "wan-14b", "wan-i2v-14b", "wan2.2-a14b", "wan2.2-5b"):
        with torch.device("meta"):
            model = models.from_config(name)
            parts = {part: model.part(part) for part in model.networks}
            parts["decoder"] = model.vae.decoder
            counts[name] = {
                part: round(sum(p.numel() for p in module.parameters()) / 1e6, 1)
                for part, module in parts.items()
            }
            adapter = lora.add(model, rank=16)
            counts[name]["layers"] = len(adapter.layers)
            counts[name]["lora"] = round(sum(p.numel() for p in adapter.parameters()) / 1e6, 1)
        shape = model.latent_shape(Sampling().resolve(model))
        counts[name]["latents"] = shape
        assert len(model.blocks()) * 8 == len(adapter.layers)
    text, vae = (
        {"text_encoder": 5680.9},
        {"vae": 126.9, "decoder": 73.3, "latents": (16, 21, 60, 104)},
    )
    large = {"transformer": 14288.5, "layers": 320, "lora": 52.4} | text | vae
    assert counts["wan"] == {"transformer": 1419.0, "layers": 240, "lora": 11.8} | text | vae
    assert counts["wan-14b"] == large
    assert counts["wan2.2-a14b"] == large | {"transformer_2": 14288.5, "layers": 640, "lora": 104.9}
    image = {"transformer": 16394.9, "image_encoder": 630.8}
    assert counts["wan-i2v-14b"] == large | image
    assert counts["wan2.2-5b"] == text | {
        "transformer": 4999.8,
        "vae": 704.7,
        "decoder": 555.0,
        "latents": (48, 31, 44, 80),
        "layers": 240,
        "lora": 23.6,
    }


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 40}, "height=40 must be a positive multiple of 16 pixels"),
        ({"width": 8}, "width=8 must be a positive multiple of 16 pixels"),
        ({"num_frames": 8}, "num_frames=8 must be 1 more than a multiple of 4 for .*: use 5 or 9"),
        ({"options": {"flow_shift": 0}}, "flow_shift must be at least 0.01, got 0"),
        ({"options": {"fps": 8}}, "has no sampling option 'fps'; it has: flow_shift"),
    ],
)
def test_bad_settings(directory, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(load(directory), "a star", sampling=Sampling(**SETTINGS | settings))


def test_what_cannot_be_sampled(directory):
    model = load(directory)
    with pytest.raises(ValueError, match="its prompts take no image"):
        sample(model, Prompt("a", image=torch.zeros(3, 32, 32)), sampling=Sampling(**SETTINGS))
    with pytest.warns(UserWarning, match="reads 16 tokens, but the prompt has 21; not seen: "):
        model.encode(["star " * 20])
    model.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="is a rectified flow: DDIMScheduler cannot sample it"):
        sample(model, "a star", sampling=Sampling(**SETTINGS))


# ------------------------------------------------------------------------------------ files


def test_float32_layers_stay_float32(directory):
    model = load(directory, dtype={"vae": torch.float32, "default": torch.bfloat16})
    types = {name: p.dtype for name, p in model.denoiser.named_parameters()}
    kept = {name for name, dtype in types.items() if dtype == torch.float32}
    assert "scale_shift_table" in kept and "blocks.0.norm2.weight" in kept
    assert types["blocks.0.attn1.to_q.weight"] == model.dtype == torch.bfloat16
    latents = roll_out(model, PROMPTS, [5, 9], Sampling(**SETTINGS).resolve(model)).latents
    assert latents.dtype == torch.float32


@pytest.mark.parametrize("which", ["directory", "experts", "expanded"])
def test_a_saved_model_is_the_same(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    model = load(folder)
    model.defaults |= {"decoder_states": 2, "guidance_scale_2": 2.5}
    again = load(model.save_pretrained(tmp_path / "saved"))
    sampling = Sampling(**SETTINGS | {"width": 32})
    videos = [sample(m, PROMPTS, seeds=3, sampling=sampling) for m in (model, again)]
    assert again.decoder_states == 2
    if which == "experts":
        assert Sampling().resolve(again).options["guidance_scale_2"] == 2.5
        again.sampling_options = model.sampling_options
        videos[1] = sample(again, PROMPTS, seeds=3, sampling=sampling)
    assert torch.equal(*videos)
    reread = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(reread) is diffusers.WanPipeline
    assert reread.config.expand_timesteps == (which == "expanded")
    assert reread.config.boundary_ratio == (0.875 if which == "experts" else None)


@pytest.mark.parametrize("which", ["directory", "experts"])
def test_diffusers_loads_an_exported_adapter(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    model, theirs = load(folder), diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    base = sample(model, PROMPTS, seeds=[5, 9], sampling=Sampling(**SETTINGS))
    adapter = adapted(model)
    found = sample(model, PROMPTS, seeds=[5, 9], adapter=adapter, sampling=Sampling(**SETTINGS))
    file = adapter.export(tmp_path)
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    if which == "experts":
        theirs.transformer_2.load_lora_adapter(
            file.parent, prefix="transformer_2", weight_name=file.name
        )
    expected = theirs(
        [prompt.text for prompt in PROMPTS],
        [prompt.negative_prompt for prompt in PROMPTS],
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
        max_sequence_length=16,
        output_type="pt",
        **SETTINGS,
    ).frames
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 0.1


# ------------------------------------------------------------------------------------ a model to train here


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The size of an embedded model: 3.9 M, 9 frames of 64 x 64, sampled by FlowMatchEuler."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    text = UMT5Config(
        vocab_size=128, relative_attention_num_buckets=8, is_encoder_decoder=False, **sizes
    )
    made = diffusers.WanPipeline(
        tokenizer(),
        UMT5EncoderModel(text),
        diffusers.AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 2, 2, 4], num_res_blocks=1),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.WanTransformer3DModel(
            num_attention_heads=6,
            attention_head_dim=32,
            text_dim=64,
            freq_dim=64,
            ffn_dim=768,
            num_layers=6,
            rope_max_seq_len=64,
        ),
    )
    folder = tmp_path_factory.mktemp("embedded")
    made.save_pretrained(folder)
    return folder


def test_the_embedded_size_loads_samples_and_trains(embedded, tmp_path):
    model = load(embedded)
    assert sum(p.numel() for p in model.denoiser.parameters()) == pytest.approx(3.914e6, rel=1e-3)
    sampling = Sampling(num_inference_steps=4, num_frames=9, height=64, width=64)
    assert sample(model, PROMPTS, sampling=sampling).shape == (2, 9, 3, 64, 64)
    options = {"steps": 2, "batch_size": 2, "sampling": sampling, "progress": False}
    run = align(model, rewards.brightness(), PROMPTS, output_dir=tmp_path / "run", **options)
    assert all(row["grad_norm"] > 0 for row in run.metrics)


def test_flow_match_euler_is_shifted_once(embedded):
    model = load(embedded)
    sampling = Sampling(num_inference_steps=30).resolve(model)
    assert model.last_step_gain(sampling) == pytest.approx(0.0938, abs=1e-4)
    sampling.options["flow_shift"] = 1.0
    assert model.last_step_gain(sampling) == pytest.approx(1 / 30)
    scheduler = model.new_scheduler(sampling)
    ours = torch.tensor(scheduler.sigmas)
    sigmas = torch.linspace(1, 1 / 30, 30)
    torch.testing.assert_close(ours, torch.cat([sigmas, torch.zeros(1)]))
