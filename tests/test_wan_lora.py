"""Adapters of Wan's transformers in the files of diffusers, peft, ComfyUI and kohya's tools, there and back."""

import copy
import json
import warnings

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from vader_nb import load, lora, models, publish
from vader_nb.sampling import Sampling, sample

from .test_wan import PROMPTS, SETTINGS, image_pipeline, pipeline, transformer

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")
SAMPLING = Sampling(**SETTINGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Wan 2.1, and the two experts of Wan 2.2 A14B."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("one", "experts")}
    pipeline().save_pretrained(made["one"])
    second = transformer(4, seed=1)
    pipeline(transformer_2=second, boundary_ratio=0.875).save_pretrained(made["experts"])
    return made


def spread(model, targets=ATTENTION, rank=2, alpha=5.0, size=0.3):
    """An adapter that acts, with an alpha that is not its rank."""
    adapter = lora.add(model, rank, alpha, targets)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(size * torch.randn(p.shape, generator=generator))
    return adapter


def clip(model, adapter=None):
    return sample(model, PROMPTS, seeds=[5, 9], adapter=adapter, sampling=SAMPLING)


def outputs(denoiser):
    """What a transformer makes of some latents, in float64."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 2, 4, 6, generator=generator, dtype=torch.float64)
    text = torch.randn(1, 7, 16, generator=generator, dtype=torch.float64)
    inputs = (latents, torch.tensor([500.0]), text)
    with torch.no_grad():
        return denoiser.double()(*inputs, return_dict=False)[0]


@pytest.mark.parametrize(
    "format, targets",
    [
        ("diffusers", ATTENTION),
        ("diffusers", EVERYTHING),
        ("comfyui", ATTENTION),
        ("comfyui", (*EVERYTHING, "proj_out", "time_proj")),
        ("comfyui", ("ffn.net.2",)),
        ("kohya", EVERYTHING),  # diffusers takes kohya's names for all of these layers only
    ],
)
def test_diffusers_reads_what_is_exported(folders, tmp_path, format, targets):
    """`WanPipeline.load_lora_weights`, which converts the authors' names by itself."""
    model = load(folders["one"])
    base, adapter = outputs(copy.deepcopy(model.denoiser)), spread(model, targets)
    if "time_proj" in targets:  # diffusers reads no alpha of these two
        adapter.alpha = 2.0
        adapter.scale = 1.0
    expected, video = outputs(copy.deepcopy(model.denoiser)), clip(model, adapter)
    file = adapter.export(tmp_path / ("out" if format == "diffusers" else "a.safetensors"), format)
    if "time_proj" in targets:
        file = without_alphas(file)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders["one"])
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    found = outputs(theirs.transformer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - base).abs().max() > 0.01
    adapter.remove()
    torch.testing.assert_close(clip(model, file), video, rtol=0, atol=1e-6)


def without_alphas(file):
    state = {name: x for name, x in load_file(file).items() if not name.endswith(".alpha")}
    save_file(state, file)
    return file


def test_the_whole_video_is_that_of_diffusers(folders, tmp_path):
    model = load(folders["one"])
    base, adapter = clip(model), spread(model, EVERYTHING, size=0.2)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders["one"])
    theirs.set_progress_bar_config(disable=True)
    file = adapter.export(tmp_path / "a.safetensors", "comfyui")
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    expected = theirs(
        [prompt.text for prompt in PROMPTS],
        [prompt.negative_prompt for prompt in PROMPTS],
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
        max_sequence_length=16,
        output_type="pt",
        **SETTINGS,
    ).frames
    torch.testing.assert_close(clip(model, adapter), expected, rtol=1e-5, atol=1e-5)
    assert (base - expected).abs().max() > 0.1


# ------------------------------------------------------------------------------------ names of other tools

# By hand, from the authors' own code and the file that they publish.
NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def theirs_of(state, prefix, halves, separator=".", alpha=5.0):
    """Our tensors under the authors' names."""
    made = {}
    for name, value in state.items():
        layer, _, half = name.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        _, block, inner = layer.split(".", 2)
        base = prefix + f"blocks.{block}.{NAMES[inner]}".replace(".", separator)
        made[f"{base}.{halves['AB'.index(half[-1])]}.weight"] = value.contiguous()
        made[f"{base}.alpha"] = torch.tensor(alpha)
    return made


FOREIGN = {
    "ComfyUI": ("diffusion_model.", ("lora_down", "lora_up")),
    "ComfyUI, peft's halves": ("diffusion_model.", ("lora_A", "lora_B")),
    "a whole checkpoint's": ("model.diffusion_model.", ("lora_down", "lora_up")),
    "kohya": ("lora_unet_", ("lora_down", "lora_up"), "_"),
    "the authors'": ("", ("lora_A", "lora_B")),
}


@pytest.mark.parametrize("layout", FOREIGN)
def test_files_of_other_tools_make_the_same_video(folders, tmp_path, layout):
    model = load(folders["one"])
    adapter = spread(model, EVERYTHING)
    expected, state = clip(model, adapter), adapter.state_dict()
    adapter.remove()
    save_file(theirs_of(state, *FOREIGN[layout]), tmp_path / "theirs.safetensors")
    torch.testing.assert_close(
        clip(model, tmp_path / "theirs.safetensors"), expected, rtol=0, atol=1e-6
    )
    assert (clip(model) - expected).abs().max() > 0.1


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_the_layers_for_images_have_names_too(tmp_path, format):
    """Exactly the names by hand, all of which diffusers reads."""
    image_pipeline(clip=True).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    adapter = spread(model, (*EVERYTHING, "add_k_proj", "add_v_proj"))
    file = adapter.export(tmp_path / "a.safetensors", format)
    layout = FOREIGN["ComfyUI, peft's halves" if format == "comfyui" else "kohya"]
    state = adapter.state_dict()
    assert load_file(file).keys() == theirs_of(state, *layout).keys()
    converted = diffusers.WanPipeline.lora_state_dict(tmp_path, weight_name=file.name)
    assert converted.keys() == state.keys()
    for name in (x for x in state if "lora_A" in x):
        other = name.replace("lora_A", "lora_B")
        found, ours = (x[other].double() @ x[name].double() for x in (converted, state))
        torch.testing.assert_close(found, ours * 2.5, rtol=1e-6, atol=1e-6)
    adapter.remove()
    again = lora.load(model, file)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())


def test_every_linear_layer_has_a_name_that_comes_back():
    with torch.device("meta"):
        model = models.from_config("wan-i2v-14b")
    linear = [n for n, m in model.denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
    originals = [lora.lora_files.original_name(model, name) for name in linear]
    names = lora.lora_files.layer_names(model)
    assert len(set(originals)) == len(linear) == 12 * 40 + 8
    for ours, theirs in zip(linear, originals):
        assert theirs != ours
        for same in (ours, theirs, f"lora_unet_{theirs.replace('.', '_')}"):
            assert names[lora.lora_files.plain_name(same)] == f"transformer.{ours}"


# ------------------------------------------------------------------------------------ two experts


def test_two_experts_are_one_file_of_diffusers(folders, tmp_path):
    model = load(folders["experts"])
    adapter = spread(model, EVERYTHING)
    expected, video = (
        (outputs(copy.deepcopy(x)) for x in model.denoisers.values()),
        clip(model, adapter),
    )
    file = adapter.export(tmp_path / "out")
    assert {name.partition(".")[0] for name in load_file(file)} == set(model.denoisers)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders["experts"])
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    second = {"prefix": "transformer_2", "weight_name": file.name}
    theirs.transformer_2.load_lora_adapter(file.parent, **second)
    for denoiser, output in zip((theirs.transformer, theirs.transformer_2), expected):
        torch.testing.assert_close(outputs(denoiser), output, rtol=0, atol=1e-6)
    adapter.remove()
    torch.testing.assert_close(clip(model, file), video, rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", ["comfyui", "kohya", "peft"])
def test_each_of_two_experts_has_its_own_file_elsewhere(folders, tmp_path, format):
    """As those tools load them; what other tools would write, without a note of which it is, is asked about."""
    model = load(folders["experts"])
    adapter = spread(model, EVERYTHING)
    state = adapter.state_dict()
    first = adapter.export(tmp_path / ("out" if format == "peft" else "a.safetensors"), format)
    adapter.remove()
    second = tmp_path / "out" / "transformer_2" / first.name
    if format != "peft":
        assert first.name == "a_transformer.safetensors"
        second = tmp_path / "a_transformer_2.safetensors"
    for key, file in zip(model.denoisers, (first, second)):
        adapter = lora.load(model, file)
        own = {name: x for name, x in state.items() if name.startswith(f"{key}.")}
        assert adapter.state_dict().keys() == own.keys()
        assert all(torch.equal(adapter.state_dict()[name], own[name]) for name in own)
        adapter.remove()
    adapter = spread(model, ("transformer_2.to_q",))
    alone = adapter.export(tmp_path / ("one" if format == "peft" else "b.safetensors"), format)
    assert "transformer_2" in str(alone.relative_to(tmp_path))  # said where there is one alone, too
    adapter.remove()
    if format != "peft":
        theirs = diffusers.DiffusionPipeline.from_pretrained(folders["experts"])
        options = {"weight_name": second.name, "load_into_transformer_2": True}
        theirs.load_lora_weights(second.parent, **options)
        adapter = lora.load(model, second)
        expected = outputs(model.denoisers["transformer_2"])
        torch.testing.assert_close(outputs(theirs.transformer_2), expected, rtol=0, atol=1e-6)
        adapter.remove()


def test_a_file_that_names_no_expert_is_the_first_ones_unless_told(folders, tmp_path):
    model = load(folders["experts"])
    adapter = spread(model, ("transformer_2.to_q",))
    keyed = {n.replace("_2.", ".", 1): x.clone() for n, x in adapter.state_dict().items()}
    made = theirs_of(keyed, *FOREIGN["ComfyUI"])
    expected, names = clip(model, adapter), set(adapter.layers)
    adapter.remove()
    save_file(made, tmp_path / "low.safetensors")
    with pytest.warns(UserWarning, match="does not say which of transformer, transformer_2 it is"):
        adapter = lora.load(model, tmp_path / "low.safetensors")
    assert {name.partition(".")[0] for name in adapter.layers} == {"transformer"}
    adapter.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = lora.load(model, tmp_path / "low.safetensors", denoiser="transformer_2")
    assert set(adapter.layers) == names
    torch.testing.assert_close(clip(model, adapter), expected, rtol=0, atol=1e-6)
    adapter.remove()
    with pytest.raises(ValueError, match="has no denoiser 'unet'; it has: transformer, transf"):
        lora.load(model, tmp_path / "low.safetensors", denoiser="unet")
    save_file(keyed, tmp_path / "keyed.safetensors")  # for diffusers' load_into_transformer_2
    adapter = lora.load(model, tmp_path / "keyed.safetensors", denoiser="transformer_2")
    assert set(adapter.layers) == names


@pytest.mark.parametrize("which", ["one", "experts"])
@pytest.mark.parametrize("format", [x for x in publish.FORMATS if x != "vader"])
def test_the_command_writes_every_format(folders, tmp_path, which, format):
    # Merged in the type that is loaded by default; elsewhere two files' ranks are put side by side, which rounds.
    model = load(folders[which], dtype=None if format == "merged" else torch.float64)
    adapter = spread(model)
    expected = clip(model, adapter)
    run = adapter.save(tmp_path / "run" / "adapter.safetensors")
    adapter.remove()
    out = publish.export(run, tmp_path / "out", format=format, model=str(folders[which]))
    if format == "merged":
        found = clip(load(out))
    elif format == "diffusers" or which == "one":
        file = out / "adapter.safetensors" if format in publish.FILES else out
        found = clip(model, file)
    else:
        ends = [f"adapter_{key}.safetensors" for key in model.denoisers]
        parts = [
            out / (key if format == "peft" else end) for key, end in zip(model.denoisers, ends)
        ]
        found = clip(model, dict.fromkeys(parts, 1.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, refused", [("wan", "vader"), ("cogvideox", "comfyui"), ("cogvideox", "kohya")]
)
def test_a_format_that_nothing_reads_is_refused(name, refused, tmp_path):
    with torch.device("meta"):
        model = models.from_config(name)
    with pytest.raises(
        ValueError, match=f"format={refused} has no names for the layers of .* or merged"
    ):
        lora.lora_export.export({}, 1.0, tmp_path / "out", refused, model)
    assert not list(tmp_path.iterdir())


def test_ltx_videos_names_differ_by_the_prefix_and_two_layers():
    """diffusers' own table of what its authors renamed."""
    from diffusers.loaders import single_file_utils as tables

    with torch.device("meta"):
        model = models.from_config("ltx-video")
    linear = [n for n, m in model.denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
    originals = [lora.lora_files.original_name(model, name) for name in linear]
    back = tables.convert_ltx_transformer_checkpoint_to_diffusers(dict.fromkeys(originals))
    assert list(back) == linear and originals != linear
    assert all(a == b for a, b in zip(originals, linear) if a.startswith("transformer_blocks"))


def test_peft_loads_its_folder(folders, tmp_path):
    from peft import PeftModel

    model = load(folders["one"])
    adapter = spread(model, EVERYTHING)
    expected = outputs(copy.deepcopy(model.denoiser))
    adapter.export(tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 5.0)
    adapter.remove()
    wrapped = PeftModel.from_pretrained(model.denoiser, tmp_path / "peft")
    torch.testing.assert_close(outputs(wrapped), expected, rtol=0, atol=1e-6)
