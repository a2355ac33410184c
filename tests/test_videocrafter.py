"""VideoCrafter2: its authors' file, sampling and gradients against a plain writing, VADER's LoRA files."""

import math
import pickle
import re

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from vader_nb import load, lora, models, testing
from vader_nb.models.videocrafter import (
    DynamicScaleDDIM,
    VideoCrafter2,
    VideoCrafterUNet,
)
from vader_nb.sampling import Sampling, initial_noise, sample
from vader_nb.strategies import DRaFTLV, DRTune, Last, ReFL

from .test_gradient import PROMPTS, SEEDS, adapted

SMALL = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 16),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 2,
    },
    "vae": {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "layers_per_block": 2,
    },
    "text_encoder": VideoCrafter2.published["text_encoder"]
    | {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    "scheduler": VideoCrafter2.published["scheduler"],
}
SIZE = {"num_inference_steps": 4, "num_frames": 3, "height": 16, "width": 16}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
SINGLE = {"conv_in": "input_blocks.0.0", "transformer_in": "init_attn.0", "conv_norm_out": "out.0"}
SINGLE |= {"conv_out": "out.2", "time_embedding.linear_1": "time_embed.0"}
SINGLE |= {"time_embedding.linear_2": "time_embed.2"}
KINDS = ["resnets", "attentions", "temp_attentions"]


def theirs(name):
    """diffusers' name of a UNet tensor in VideoCrafter's code, by its position there."""
    for ours, other in SINGLE.items():
        if name.startswith(ours + "."):
            return other + name.removeprefix(ours)
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv\.(.+)", name):
        i = int(match[2])
        if match[1] == "down":
            return f"input_blocks.{[3, 6, 9][i]}.0.op.{match[3]}"
        return f"output_blocks.{['2.1', '5.3', '8.3'][i]}.conv.{match[3]}"
    pattern = r"(.+?)\.(resnets|attentions|temp_attentions|temp_convs)\.(\d)\.(.+)"
    where, kind, j, rest = re.fullmatch(pattern, name).groups()
    j = int(j)
    if kind == "temp_convs":
        kind, rest = "resnets", f"temopral_conv.{rest}"
    elif kind == "resnets":
        inner, _, end = rest.rpartition(".")
        rest = f"{RESNET[inner]}.{end}"
    if where == "mid_block":
        return f"middle_block.{3 * j if kind == 'resnets' else KINDS.index(kind)}.{rest}"
    side, i = re.fullmatch(r"(down|up)_blocks\.(\d)", where).groups()
    block = (
        f"input_blocks.{1 + 3 * int(i) + j}"
        if side == "down"
        else f"output_blocks.{3 * int(i) + j}"
    )
    return f"{block}.{KINDS.index(kind)}.{rest}"


def of_vae(name, levels=2):
    """diffusers' name of an autoencoder's tensor in the latent diffusion code."""
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    pairs = {
        "down_blocks": "down",
        "mid_block.attentions.0": "mid.attn_1",
        "resnets": "block",
        "samplers.0.conv": "sample.conv",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
        "group_norm": "norm",
        "to_out.0": "proj_out",
        "to_": "",
    }
    for ours, other in pairs.items():
        name = name.replace(ours, other)
    return name


def of_text(state):
    """transformers' tensors of CLIP's text encoder as open_clip's."""
    result = {}
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    for name, value in state.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name):
            parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            result[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            pairs = {"encoder.layers": "transformer.resblocks", "self_attn": "attn"}
            pairs |= {"layer_norm": "ln_", "fc1": "c_fc", "fc2": "c_proj", "mlp": "mlp"}
            pairs |= {"final_ln_": "ln_final", "embeddings.token": "token"}
            pairs |= {"embeddings.position_embedding.weight": "positional_embedding"}
            for ours, other in pairs.items():
                name = name.replace(ours, other)
            result[name] = value
    return result


@pytest.fixture(scope="module")
def reference():
    """The networks built by hand, and what diffusers' UNet lacks."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(**SMALL["unet"])
    vae = AutoencoderKL(**SMALL["vae"])
    text = CLIPTextModel(CLIPTextConfig(**SMALL["text_encoder"]))
    fps = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.SiLU(), torch.nn.Linear(32, 32))
    for parameter in unet.parameters():  # temporal layers start at zero, and would test nothing
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return [module.eval().requires_grad_(False) for module in (unet, vae, text, fps)]


@pytest.fixture(scope="module")
def official(reference):
    """The contents of `model.ckpt`."""
    unet, vae, text, fps = reference
    state = {}
    for name, value in unet.state_dict().items():
        one = re.fullmatch(r"transformer_in\.proj_(in|out)\.weight", name)
        state["model.diffusion_model." + theirs(name)] = value[..., None] if one else value
    for name, value in fps.state_dict().items():
        state[f"model.diffusion_model.fps_embedding.{name}"] = value
    for name, value in vae.state_dict().items():
        convolution = "attentions" in name and value.ndim == 2
        value = value[..., None, None] if convolution else value
        state["first_stage_model." + of_vae(name)] = value
    for name, value in of_text(text.state_dict()).items():
        state[f"cond_stage_model.model.{name}"] = value
    block = "cond_stage_model.model.transformer.resblocks."
    last = {k: v for k, v in state.items() if k.startswith(f"{block}22.")}
    state |= {k.replace(f"{block}22.", f"{block}23."): v + 1 for k, v in last.items()}
    state["cond_stage_model.model.text_projection"] = torch.zeros(16, 16)
    state["cond_stage_model.model.logit_scale"] = torch.zeros(())
    state |= {"betas": torch.zeros(1000), "scale_arr": torch.zeros(1400)}
    return state


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(VideoCrafter2, "published", SMALL)


@pytest.fixture
def folder(official, tmp_path):
    torch.save({"state_dict": official, "epoch": 3}, tmp_path / "model.ckpt")
    return tmp_path


@pytest.fixture
def model(folder):
    model = load(folder, dtype=torch.float64)
    model.defaults |= SIZE | {"guidance_scale": 3.0}
    return model


# ------------------------------------------------------------------------------------------ the file


def test_full_size(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        unet = VideoCrafterUNet.from_config(VideoCrafter2.published["unet"])
    assert len(unet.state_dict()) == 1484
    assert sum(p.numel() for p in unet.parameters()) == 1_413_284_420
    assert sum(p.numel() for p in unet.time_embedding.fps.parameters()) == 2_050_560
    targets = VideoCrafter2.targets["unet"]
    layers = [m for name, m in unet.named_modules() if name.endswith(targets)]
    assert len(layers) == 198
    assert sum(16 * (m.in_features + m.out_features) for m in layers) == 5_015_552
    checkpoint = models.CHECKPOINTS["videocrafter2"]
    assert (checkpoint.source, checkpoint.license) == ("VideoCrafter/VideoCrafter2", "Apache-2.0")


def test_the_names_of_full_depth_are_the_authors_own():
    with torch.device("meta"):
        unet = VideoCrafterUNet.from_config(SMALL["unet"])
    ours = {b: a for a, b in VideoCrafter2.original_names.items()}
    for name in unet.state_dict():
        if not name.startswith("time_embedding.fps"):
            assert models.base.renamed(name, ours) == theirs(name)
            assert models.base.renamed(theirs(name), VideoCrafter2.original_names) == name


def test_every_tensor_lands(model, reference):
    for one, other in zip(model.modules(), reference):
        expected = other.state_dict()
        found = {k: v for k, v in one.state_dict().items() if ".fps." not in k}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name].double()) for name in expected)
    assert model.defaults["eta"] == 1 and model.world is None
    assert not any(p.requires_grad or p.is_meta for m in model.modules() for p in m.parameters())


def test_deepspeeds_layout(official, folder, model):
    state = {f"_forward_module.{name}": value for name, value in official.items()}
    torch.save({"module": state}, folder / "model.ckpt")
    again = load(folder, dtype=torch.float64).denoiser.state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.denoiser.state_dict().items())


UNKNOWN = [
    "model.diffusion_model.input_blocks.1.0.extra.weight",
    "model.diffusion_model.output_blocks.0.1.norm.weight",
    "first_stage_model.loss.logvar",
    "cond_stage_model.model.visual.proj",
    "model_ema.decay",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_keys_are_named(official, folder, name):
    torch.save({"state_dict": official | {name: torch.ones(2)}}, folder / "model.ckpt")
    with pytest.raises(ValueError, match=f"1 of its .* unknown, such as {re.escape(name)}"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.fps_embedding.2.bias",
        "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.model.ln_final.bias",
    ],
)
def test_missing_keys_are_an_error(official, folder, name):
    state = {key: value for key, value in official.items() if key != name}
    torch.save({"state_dict": state}, folder / "model.ckpt")
    with pytest.raises(ValueError, match=r"not VideoCrafter2's.*(?s:.)*Missing key"):
        load(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_of_code_is_not_run(folder):
    (folder / "model.ckpt").write_bytes(pickle.dumps({"state_dict": print}))
    with pytest.raises(ValueError, match="cannot be read as a file of weights only"):
        load(folder)


def test_the_tokenizer_is_open_clips(model):
    theirs = open_clip.get_tokenizer("ViT-H-14")
    for text in ["", "a red star!", "Wow!! a Café's 3 dogs, running…", "so long " * 60]:
        assert torch.equal(model.tokens(text), theirs([text]))


def test_save_pretrained_comes_back(model, tmp_path):
    settings = {"seeds": 3, "sampling": Sampling(num_inference_steps=2)}
    expected = sample(model, "a red star!", **settings)
    saved = model.save_pretrained(tmp_path / "saved")
    again = load(saved, dtype=torch.float64)
    assert type(again) is VideoCrafter2 and type(again.scheduler) is DynamicScaleDDIM
    assert again.defaults == model.defaults
    assert torch.equal(sample(again, "a red star!", **settings), expected)
    assert not list(saved.rglob("*.bin"))
    assert type(models.from_config(saved)) is VideoCrafter2
    with pytest.raises(NotImplementedError, match="diffusers has no pipeline for VideoCrafter2"):
        model.pipeline()


# ---------------------------------------------------------------------------------------- sampling


def sinusoid(value, width=8):
    angles = value * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()])


def plainly(reference, latents, generators, fps, steps, guidance, prompts):
    """The authors' sampling, in float64: (B, F, 3, H, W)."""
    unet, vae, text, rate = [module.double() for module in reference]
    words = open_clip.get_tokenizer("ViT-H-14")
    states = {x: text(words([x])).last_hidden_state for x in ["", *prompts]}
    time, embedding = unet.time_embedding.forward, rate(sinusoid(fps).double())
    unet.time_embedding.forward = lambda sample, condition=None: time(sample) + embedding
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    scales = np.concatenate([np.linspace(1, 0.7, 400), np.full(1000, 0.7)])
    grid = np.arange(0, 1000, 1000 // steps) + 1
    for i in reversed(range(len(grid))):
        t, before = grid[i], grid[i - 1] if i else 0
        e = [
            torch.cat([unet(x[None], t, states[p]).sample for x, p in zip(latents, names)])
            for names in ([""] * len(prompts), prompts)
        ]
        e = e[0] + guidance * (e[1] - e[0])
        clean = (latents - (1 - alphas[t]) ** 0.5 * e) / alphas[t] ** 0.5 / scales[t]
        variance = (1 - alphas[before]) / (1 - alphas[t]) * (1 - alphas[t] / alphas[before])
        z = [
            torch.randn(1, *x.shape, generator=g, dtype=x.dtype)
            for x, g in zip(latents, generators)
        ]
        latents = (
            alphas[before] ** 0.5 * (scales[before] if i else 1) * clean
            + (1 - alphas[before] - variance) ** 0.5 * e
            + variance**0.5 * torch.cat(z)
        )
    unet.time_embedding.forward = time
    clips = [vae.decode(x.transpose(0, 1) / 0.18215).sample for x in latents]
    return (torch.stack(clips) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("fps", [24, 8])
def test_a_clip_is_the_plainly_sampled_one(model, reference, fps):
    sampling = Sampling(options={"fps": fps}).resolve(model)
    latents, generators = initial_noise(model, SEEDS, sampling)
    expected = plainly(reference, latents, generators, fps, 4, 3.0, PROMPTS)
    clip = sample(model, PROMPTS, seeds=SEEDS, sampling=Sampling(options={"fps": fps}))
    torch.testing.assert_close(clip, expected, rtol=0, atol=1e-4)
    other = sample(model, PROMPTS, seeds=SEEDS, sampling=Sampling(options={"fps": 32 - fps}))
    assert (clip - other).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 7, 30, 50])
def test_every_number_of_steps_makes_as_many_calls(model, steps):
    sampling = Sampling(num_inference_steps=steps).resolve(model)
    assert model.num_steps(sampling) == steps
    scheduler = model.new_scheduler(sampling)
    assert scheduler.timesteps.min() == 1 and scheduler.timesteps.max() < 1000


def test_more_steps_than_the_schedule_has(model):
    with pytest.raises(ValueError, match="num_inference_steps=1000 must be at most 999"):
        sample(model, "a cat", sampling=Sampling(num_inference_steps=1000))


def test_noising_and_x0_are_inverse_and_scaled(model):
    scheduler = model.new_scheduler(Sampling().resolve(model))
    clean = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64)
    for t, scale in {1: 1 - 0.3 / 399, 251: 1 - 0.3 * 251 / 399, 399: 0.7, 751: 0.7}.items():
        noise = torch.randn(
            clean.shape, generator=torch.Generator().manual_seed(1), dtype=clean.dtype
        )
        noised = model.add_noise(scheduler, clean, t, [torch.Generator().manual_seed(1)])
        alpha = scheduler.alphas_cumprod[t].double()
        plain = scale * alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
        torch.testing.assert_close(noised, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            model.x0(scheduler, noise, t, noised), clean, rtol=1e-4, atol=1e-4
        )


def test_eta_is_the_models_unless_it_is_named(model, micro):
    assert Sampling().resolve(model).eta == 1 and Sampling(eta=0.0).resolve(model).eta == 0
    assert Sampling().resolve(micro).eta == 0


@pytest.mark.parametrize("fps", [0, 61, -8, math.nan, "24", True])
def test_fps_out_of_range(model, fps):
    with pytest.raises(ValueError, match="fps must be (at least 1|at most 60|a number), got"):
        sample(model, "a cat", sampling=Sampling(options={"fps": fps}))


# --------------------------------------------------------------------------------------- gradients


def test_gradients_and_all_else_that_training_expects(model):
    """With one layer per block, for speed: what is expected does not depend on their number."""
    torch.manual_seed(0)
    unet = VideoCrafterUNet.from_config(SMALL["unet"] | {"layers_per_block": 1})
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    parts = {part: model.part(part) for part in model.part_names()}
    parts["unet"] = unet.double().eval().requires_grad_(False)
    model = VideoCrafter2(model.name, **parts, defaults=model.defaults)
    strategies = [Last(1), Last(4), ReFL(0.6), DRTune(2, stop=1), DRaFTLV(2)]
    testing.check_model(model, strategies=strategies)


# ------------------------------------------------------------------------------------- LoRA files

PREFIX = "base_model.model.model.diffusion_model."


def vaders(model, rank=2):
    """The contents of one of VADER's files."""
    state = {}
    for name, module in model.denoiser.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            base = PREFIX + theirs(f"{name}.weight").removesuffix(".weight")
            state[f"{base}.lora_A.weight"] = torch.randn(rank, module.in_features)
            state[f"{base}.lora_B.weight"] = torch.randn(module.out_features, rank)
    return state


def test_vaders_files(model, tmp_path):
    torch.manual_seed(0)
    state = vaders(model)
    assert len(state) == 396
    torch.save(state, tmp_path / "vader.pt")
    expected = load(tmp_path, dtype=torch.float64)
    weights = {theirs(k): v for k, v in expected.denoiser.state_dict().items() if ".fps." not in k}
    for name in (key.removesuffix(".lora_A.weight") for key in state if "lora_A" in key):
        a, b = (state[f"{name}.lora_{half}.weight"].double() for half in "AB")
        weights[f"{name.removeprefix(PREFIX)}.weight"] += 8 / 2 * b @ a
    settings = {"seeds": 3, "sampling": Sampling(**SIZE, guidance_scale=3.0)}
    clip = sample(expected, "a red star", **settings)
    assert not torch.equal(sample(model, "a red star", **settings), clip)
    adapter = lora.load(model, tmp_path / "vader.pt")
    adapted_clip = sample(model, "a red star", adapter=adapter, **settings)
    torch.testing.assert_close(adapted_clip, clip, rtol=0, atol=1e-8)
    exported = adapter.export(tmp_path / "again.pt", format="vader")
    again = torch.load(exported, weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name].float(), state[name]) for name in state)


def test_another_alpha_is_folded_in(model, tmp_path):
    settings = {"seeds": 3, "sampling": Sampling(num_inference_steps=2)}
    adapter = adapted(model)
    assert adapter.alpha != 8
    expected = sample(model, "a red star", adapter=adapter, **settings)
    path = adapter.export(tmp_path / "mine.pt", format="vader")
    adapter.remove()
    clip = sample(model, "a red star", adapter=path, **settings)
    torch.testing.assert_close(clip, expected, rtol=0, atol=1e-8)


def test_other_pickles_and_models_are_refused(model, micro, tmp_path):
    state = {name.removeprefix(PREFIX): value for name, value in vaders(model).items()}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is a pickle.*not in VADER's layout"):
        lora.load(model, tmp_path / "other.pt")
    torch.save(vaders(model) | {"code": print}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="is a pickle"):
        lora.load(model, tmp_path / "code.pt")
    torch.save(vaders(model), tmp_path / "vader.pt")
    with pytest.raises(ValueError, match="does not fit"):
        lora.load(micro, tmp_path / "vader.pt")
    with pytest.raises(ValueError, match="format=vader has no names for the layers of"):
        adapted(micro).export(tmp_path / "micro.pt", format="vader")
