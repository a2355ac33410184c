"""Adapters: bit-exact fusing, files that others can read, and files that must be refused."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from vader_nb import lora
from vader_nb.sampling import Sampling, roll_out, sample

from .test_gradient import PROMPTS, SEEDS, adapted


def weights(model):
    return {
        name: p.detach().clone()
        for name, p in model.denoiser.named_parameters()
        if "lora_" not in name
    }


def test_a_fresh_adapter_changes_nothing(micro):
    before = sample(micro, PROMPTS, seeds=SEEDS)
    adapter = lora.add(micro, rank=4)
    assert torch.equal(sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter), before)
    assert all(p.requires_grad for p in adapter.parameters())
    assert len(adapter.parameters()) == 2 * len(adapter.layers) > 0


def test_same_seed_same_adapter_and_no_trace_in_the_global_generator(micro):
    state = torch.get_rng_state()
    adapter = lora.add(micro, rank=2, seed=5)
    first = [p.clone() for p in adapter.parameters()]
    assert torch.equal(torch.get_rng_state(), state)
    adapter.remove()
    assert all(
        torch.equal(a, b) for a, b in zip(first, lora.add(micro, rank=2, seed=5).parameters())
    )


def test_fused_is_the_adapter_and_leaves_the_base_bit_exact(micro):
    adapter, before = adapted(micro), weights(micro)
    apart = roll_out(micro, PROMPTS, SEEDS, Sampling().resolve(micro)).latents
    together = roll_out(micro, PROMPTS, SEEDS, Sampling().resolve(micro), adapter=adapter).latents
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)
    after = weights(micro)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RuntimeError), adapter.fused():
        raise RuntimeError("in the middle")
    assert all(torch.equal(before[name], value) for name, value in weights(micro).items())
    again = roll_out(micro, PROMPTS, SEEDS, Sampling().resolve(micro)).latents
    assert torch.equal(again, apart)


def test_half_precision_base_is_restored_bit_exactly(micro_directory):
    from vader_nb import load

    model = load(micro_directory, dtype=torch.bfloat16)
    adapter = adapted(model)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    before = weights(model)
    for _ in range(5):
        with adapter.fused():
            pass
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_scale_goes_from_the_base_through_the_adapter_and_beyond(micro):
    adapter = adapted(micro)
    full = sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter)
    base = sample(micro, PROMPTS, seeds=SEEDS)
    with adapter.disabled():
        disabled = micro.decode(roll_out(micro, PROMPTS, SEEDS, Sampling().resolve(micro)).latents)
    assert torch.equal(disabled, base)
    adapter.scale = 0.0
    torch.testing.assert_close(
        sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter), base, rtol=1e-12, atol=1e-12
    )
    distances = []
    for scale in (0.25, 0.5, 1.0, 1.5):
        adapter.scale = scale
        distances.append(
            (sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter) - base).norm().item()
        )
    assert distances == sorted(distances)
    adapter.scale = 1.0
    assert torch.equal(sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter), full)
    with pytest.raises(ValueError, match="-0.1"):
        adapter.scale = -0.1


def test_a_file_comes_back_equal_with_its_story(micro, tmp_path):
    adapter = adapted(micro)
    expected = sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter)
    path = adapter.save(tmp_path / "adapter.safetensors", reward="hps + 0.02 × aesthetic", steps=40)
    state, metadata = lora.read(path)
    assert metadata["reward"] == "hps + 0.02 × aesthetic"
    assert (metadata["rank"], metadata["alpha"], metadata["steps"]) == ("2", "2", "40")
    assert json.loads(metadata["targets"]) == list(micro.targets["unet"])
    adapter.remove()
    again = lora.load(micro, path)
    assert again.state_dict().keys() == state.keys()
    assert torch.equal(sample(micro, PROMPTS, seeds=SEEDS, adapter=again), expected)
    assert list(tmp_path.iterdir()) == [path]  # nothing half written is left


def test_the_keys_are_the_ones_diffusers_writes(micro, tmp_path):
    """Saved by diffusers' own pipeline class from peft's own state dict: the same names and values."""
    from diffusers.pipelines.deprecated.text_to_video_synthesis import TextToVideoSDPipeline
    from peft import get_peft_model_state_dict

    adapter = adapted(micro)
    adapter.save(tmp_path / "ours.safetensors")
    state = get_peft_model_state_dict(micro.denoiser)
    TextToVideoSDPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    theirs, ours = (
        load_file(tmp_path / "pytorch_lora_weights.safetensors"),
        load_file(tmp_path / "ours.safetensors"),
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    # and theirs can be loaded here
    adapter.remove()
    assert lora.load(micro, tmp_path / "pytorch_lora_weights.safetensors").rank == 2


def test_removing_gives_the_base_back(micro):
    names = list(dict(micro.denoiser.named_parameters()))
    before = sample(micro, PROMPTS, seeds=SEEDS)
    adapted(micro).remove()
    assert list(dict(micro.denoiser.named_parameters())) == names
    assert torch.equal(sample(micro, PROMPTS, seeds=SEEDS), before)


def test_no_matching_layer_is_an_error_that_lists_what_there_is(micro):
    with pytest.raises(ValueError, match="no layer of .* is named to_qq.*to_k"):
        lora.add(micro, targets=("to_qq",))
    with pytest.raises(ValueError, match="rank"):
        lora.add(micro, rank=0)
    lora.add(micro)
    with pytest.raises(ValueError, match="carries an adapter already"):
        lora.add(micro)


class Bomb:
    def __reduce__(self):
        raise AssertionError("the pickle was opened")


@pytest.mark.parametrize(
    "kind",
    ["zip", "pickle", "truncated", "empty", "no lora", "foreign", "shape", "missing", "absent"],
)
def test_files_that_are_refused(micro, tmp_path, kind):
    adapter = adapted(micro)
    path = adapter.save(tmp_path / "adapter.safetensors")
    adapter.remove()
    state, whole = load_file(path), path.read_bytes()
    name = next(iter(state))
    if kind == "zip":
        torch.save(state, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "truncated":
        path.write_bytes(whole[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no lora":
        save_file({"weight": torch.zeros(2)}, path)
    elif kind == "foreign":
        save_file({key.replace("attn1", "attn9"): value for key, value in state.items()}, path)
    elif kind == "shape":
        save_file(state | {name: torch.zeros(2, 3)}, path)
    elif kind == "missing":
        save_file({key: value for key, value in state.items() if key != name}, path)
    else:
        path.unlink()
    message = {
        "zip": "pickle",
        "pickle": "pickle",
        "truncated": "not a complete",
        "empty": "not a complete",
        "no lora": "no LoRA tensors",
        "foreign": "does not fit",
        "shape": "shape|rank",
        "missing": "missing|unknown",
        "absent": "no adapter file",
    }[kind]
    before = weights(micro)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lora.load(micro, path)
    assert not any(
        "lora" in n for n, _ in micro.denoiser.named_parameters()
    )  # and the model is as it was
    assert all(torch.equal(before[n], v) for n, v in weights(micro).items())


# ---------------------------------------------------------------------------------- files of other tools


def kohya(layers, alpha):
    """As kohya's trainer names them: layers with underscores, and an alpha beside each."""
    state = {}
    for name, (a, b) in layers.items():
        name = "lora_unet_" + name.replace(".", "_")
        state |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def old_processors(layers, alpha):
    """As diffusers' attention processors named them; strength alpha / rank was in no file."""
    state = {}
    for name, (a, b) in layers.items():
        attention, _, projection = name.removesuffix(".0").rpartition(".")
        name = f"{attention}.processor.{projection}_lora"
        state |= {f"{name}.down.weight": a, f"{name}.up.weight": b * (alpha / len(a))}
    return state


def prefixed(before, a_name="lora_A", b_name="lora_B", alphas=False):
    def make(layers, alpha):
        state = {}
        for name, (a, b) in layers.items():
            b = b if alphas else b * (alpha / len(a))
            state |= {f"{before}{name}.{a_name}.weight": a, f"{before}{name}.{b_name}.weight": b}
            if alphas:
                state[f"{before}{name}.alpha"] = torch.tensor(alpha)
        return state

    return make


def with_text_encoder(layers, alpha):
    more = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (2, 8)}
    more |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 8)}
    texts = {name: torch.ones(shape) for name, shape in more.items()}
    return prefixed("unet.")(layers, alpha) | texts


LAYOUTS = {
    "kohya": kohya,
    "old attention processors": old_processors,
    "old attention processors, unet.": lambda *args: {
        f"unet.{name}": value for name, value in old_processors(*args).items()
    },
    "ComfyUI": prefixed("diffusion_model.", "lora_down", "lora_up", alphas=True),
    "ComfyUI, peft's names": prefixed("diffusion_model.", alphas=True),
    "ComfyUI, as in a whole checkpoint": prefixed("model.diffusion_model.", alphas=True),
    "no prefix": prefixed(""),
    "peft's adapter name": prefixed("unet.", "lora_A.default", "lora_B.default"),
    "diffusers' .lora.down": prefixed("unet.", "lora.down", "lora.up"),
    "peft's state dict": prefixed("base_model.model."),
}


@pytest.fixture
def trained(micro):
    """What an adapter of rank 2 and alpha 5 holds, layer by layer, and the clip that it makes."""
    adapter = lora.add(micro, 2, 5.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    clip = sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter)
    halves = [p.detach().clone() for p in adapter.parameters()]
    names = [name.removeprefix("unet.") for name in adapter.layers]
    layers = dict(zip(names, zip(halves[::2], halves[1::2])))
    adapter.remove()
    assert not torch.allclose(clip, sample(micro, PROMPTS, seeds=SEEDS), atol=1e-3)
    return layers, clip


def same_clip(model, path, clip):
    made = sample(model, PROMPTS, seeds=SEEDS, adapter=path)
    torch.testing.assert_close(made, clip, rtol=0, atol=1e-6)
    assert not lora._layers(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_acts_alike_under_the_names_of_every_tool(micro, tmp_path, trained, layout):
    layers, clip = trained
    path = tmp_path / "theirs.safetensors"
    save_file({k: v.contiguous() for k, v in LAYOUTS[layout](layers, 5.0).items()}, path)
    same_clip(micro, path, clip)


def test_tensors_for_the_text_encoder_are_left_out_with_a_warning(micro, tmp_path, trained):
    layers, clip = trained
    path = tmp_path / "both.safetensors"
    save_file({k: v.contiguous() for k, v in with_text_encoder(layers, 5.0).items()}, path)
    with pytest.warns(UserWarning, match="2 tensors are for the text encoder"):
        same_clip(micro, path, clip)


def peft_wrapped(model, layers, **config):
    """A copy of the denoiser as peft's own model, with these layers' matrices in it."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(model.denoiser), LoraConfig(**config))
    with torch.no_grad():
        for name, (a, b) in layers.items():
            layer = wrapped.base_model.model.get_submodule(name)
            layer.lora_A.default.weight.copy_(a)
            layer.lora_B.default.weight.copy_(b)
    return wrapped


def clip_with(model, denoiser):
    """What the model makes with another denoiser, whatever is on that."""
    other = copy.copy(model)
    other.denoisers = {"unet": denoiser}
    return other.decode(roll_out(other, PROMPTS, SEEDS, Sampling().resolve(other)).latents)


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def test_a_folder_of_pefts_save_pretrained(micro, tmp_path, trained):
    layers, clip = trained
    wrapped = peft_wrapped(micro, layers, r=2, lora_alpha=5, target_modules=TARGETS)
    wrapped.save_pretrained(tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    same_clip(micro, tmp_path / "peft", clip)


def test_ranks_and_alphas_that_differ_by_layer_and_rslora(micro, tmp_path):
    """peft's own model with peft's own patterns is what ours is compared with."""
    config = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "use_rslora": True}
    config |= {"rank_pattern": {"to_k": 1, r"attn2\.to_q": 4}, "alpha_pattern": {"to_v": 2}}
    wrapped = peft_wrapped(micro, {}, **config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    clip = clip_with(micro, wrapped.base_model.model)
    wrapped.save_pretrained(tmp_path / "peft")
    same_clip(micro, tmp_path / "peft", clip)
    assert lora.load(micro, tmp_path / "peft").rank == 4


def test_diffusers_own_file_acts_at_its_own_strength(micro, tmp_path, trained):
    """Written by diffusers' pipeline class with its metadata: r=2, lora_alpha=5."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from diffusers.pipelines.deprecated.text_to_video_synthesis import TextToVideoSDPipeline
    from safetensors import safe_open

    layers, clip = trained
    state = prefixed("", alphas=True)(layers, 5.0)
    state = {name: value for name, value in state.items() if not name.endswith(".alpha")}
    TextToVideoSDPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=state,
        unet_lora_adapter_metadata={"r": 2, "lora_alpha": 5, "target_modules": TARGETS},
    )
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert LORA_ADAPTER_METADATA_KEY in file.metadata()
    same_clip(micro, tmp_path, clip)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"X.dora_scale": (4, 1)}, "a DoRA adapter .*dora_scale"),
        ({"X.lora_magnitude_vector": (4,)}, "a DoRA adapter"),
        ({"X.hada_w1_a": (4, 2)}, "a LoHa adapter"),
        ({"X.lokr_w1": (4, 2)}, "a LoKr adapter"),
        ({"X.lora_mid.weight": (2, 2, 3, 3)}, "LoCon"),
        ({"X.oft_blocks": (2, 2)}, "an OFT adapter"),
        ({"X.diff": (2, 2)}, "full weights"),
        ({"X.w_norm": (2,)}, "normalization layers"),
        ({"X.boft_blocks": (2, 2)}, "a BOFT adapter"),
        ({"X.on_input": ()}, "an IA3 adapter"),
        ({"X.lora_B.bias": (4,)}, "biases"),
        ({"Y.weight": (4,)}, "Y.weight is not a LoRA tensor"),
        ({"X.alpha": ()}, r"alpha of unet.*must lie in \(0, 1e6\], got 0"),
        ({"X.lora_A.weight": (8000, 8)}, "shape|rank"),
        ({"X.lora_A.weight": ()}, r"has shape \(\)"),
        ({"X.lora_B.weight": (3, 2)}, r"lora_B of unet.* has shape \(3, 2\)"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(micro, tmp_path, trained, change, message):
    layers, _ = trained
    state = prefixed("unet.")(layers, 5.0)
    name = f"unet.{next(iter(layers))}"
    state |= {key.replace("X", name): torch.zeros(shape) for key, shape in change.items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        lora.load(micro, tmp_path / "other.safetensors")
    assert not lora._layers(micro)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(micro, tmp_path, trained, value):
    state = prefixed("unet.")(trained[0], 5.0)
    name = min(state)
    state[name] = torch.full_like(state[name], value)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        lora.load(micro, tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    "metadata",
    [{"alpha": "abc"}, {"alpha": "nan"}, {"alpha": "1e400"}, {"alpha": "-1"}, {"alpha": "null"}],
)
def test_an_alpha_that_is_no_number_names_the_file(micro, tmp_path, trained, metadata):
    state = {k: v.contiguous() for k, v in prefixed("unet.")(trained[0], 5.0).items()}
    save_file(state, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(ValueError, match=r"odd\.safetensors: alpha of "):
        lora.load(micro, tmp_path / "odd.safetensors")


@pytest.mark.parametrize("targets", ["abc", "null", "1e400", "[1, 2]"])
def test_odd_targets_in_a_file_do_no_harm(micro, tmp_path, trained, targets):
    state = {k: v.contiguous() for k, v in prefixed("unet.")(trained[0], 5.0).items()}
    save_file(state, tmp_path / "odd.safetensors", {"targets": targets})
    adapter = lora.load(micro, tmp_path / "odd.safetensors")
    assert all(isinstance(name, str) for name in adapter.targets)


# ------------------------------------------------------------------------------------------- the way out


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "comfyui"])
def test_what_is_exported_comes_back_and_acts_alike(micro, tmp_path, trained, format):
    layers, clip = trained
    save_file(
        {k: v.contiguous() for k, v in kohya(layers, 5.0).items()}, tmp_path / "mine.safetensors"
    )
    adapter = lora.load(micro, tmp_path / "mine.safetensors")
    place = tmp_path / ("out" if format in ("diffusers", "peft") else "out.safetensors")
    assert adapter.export(place, format).is_file()
    adapter.remove()
    same_clip(micro, place, clip)
    with pytest.raises(ValueError, match="unknown format 'a1111'"):
        adapter.export(place, "a1111")


def test_pefts_own_loader_takes_the_exported_folder(micro, tmp_path, trained):
    from peft import PeftModel

    layers, clip = trained
    save_file(
        {k: v.contiguous() for k, v in kohya(layers, 5.0).items()}, tmp_path / "mine.safetensors"
    )
    adapter = lora.load(micro, tmp_path / "mine.safetensors")
    adapter.export(tmp_path / "peft", "peft")
    adapter.remove()
    wrapped = PeftModel.from_pretrained(copy.deepcopy(micro.denoiser), tmp_path / "peft")
    made = clip_with(micro, wrapped.base_model.model)
    torch.testing.assert_close(made, clip, rtol=0, atol=1e-6)


def test_diffusers_own_loader_takes_the_exported_folder(tmp_path):
    """Where the class has `load_lora_adapter`: a UNet for pictures, with an alpha that is not the rank."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    torch.manual_seed(0)
    options = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    options |= {"block_out_channels": (8,), "norm_num_groups": 4, "cross_attention_dim": 8}
    unet = UNet2DConditionModel(layers_per_block=1, attention_head_dim=4, **options).eval()
    plain = copy.deepcopy(unet)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS), unet)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    state = {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}
    lora.lora_export.export(state, 5.0, tmp_path, "diffusers")
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 3, 8)
    base = plain(*inputs).sample
    plain.load_lora_adapter(tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    assert not torch.allclose(base, unet(*inputs).sample, atol=1e-3)
    torch.testing.assert_close(plain(*inputs).sample, unet(*inputs).sample)


def test_a_merged_pipeline_needs_no_adapter(micro, tmp_path, trained):
    """Plain diffusers loads it; and our own `load`, with the model's own defaults."""
    from diffusers import UNet3DConditionModel

    from vader_nb import load

    layers, clip = trained
    save_file(
        {k: v.contiguous() for k, v in kohya(layers, 5.0).items()}, tmp_path / "mine.safetensors"
    )
    adapter = lora.load(micro, tmp_path / "mine.safetensors")
    before = weights(micro)
    adapter.merge(tmp_path / "merged")
    assert adapter.attached and all(torch.equal(before[k], v) for k, v in weights(micro).items())
    model = load(tmp_path / "merged", dtype=torch.float64)
    assert model.defaults == micro.defaults
    torch.testing.assert_close(sample(model, PROMPTS, seeds=SEEDS), clip, rtol=0, atol=1e-6)
    unet = UNet3DConditionModel.from_pretrained(tmp_path / "merged", subfolder="unet")
    assert not [name for name, _ in unet.named_parameters() if "lora" in name or "base" in name]
    with pytest.raises(FileExistsError, match="not empty"):
        adapter.merge(tmp_path / "merged")


# ------------------------------------------------------------------------- several adapters, and parts of the chain


@pytest.fixture
def two_files(micro, tmp_path):
    """Adapters of different rank and alpha."""
    files = []
    for rank, alpha in ((2, 4.0), (3, 3.0)):
        adapter = lora.add(micro, rank, alpha, seed=rank)
        torch.manual_seed(rank)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        files.append(adapter.save(tmp_path / f"{rank}.safetensors"))
        adapter.remove()
    return files


def delta(model, path, scale):
    adapter = lora.load(model, path, scale)
    found = {
        name: layer.get_delta_weight(lora.NAME).detach().clone()
        for name, layer in adapter.layers.items()
    }
    adapter.remove()
    return found


def test_a_combination_is_the_weighted_sum_of_what_its_adapters_do(micro, two_files):
    first, second = (delta(micro, path, scale) for path, scale in zip(two_files, (0.7, 1.2)))
    adapter = lora.combine(micro, dict(zip(two_files, (0.7, 1.2))))
    assert adapter.rank == 5
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(
            layer.get_delta_weight(lora.NAME).detach(), first[name] + second[name]
        )


def test_a_combination_of_one_is_that_adapter_at_its_scale(micro, two_files, tmp_path):
    expected = delta(micro, two_files[0], 0.5)
    adapter = lora.combine(micro, {two_files[0]: 0.5})
    adapter.save(tmp_path / "kept.safetensors")
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.get_delta_weight(lora.NAME).detach(), expected[name])
    adapter.remove()
    again = delta(micro, tmp_path / "kept.safetensors", 1.0)
    for name in expected:
        torch.testing.assert_close(again[name], expected[name])


def test_a_combination_of_adapters_for_different_layers_acts_on_all_of_them(
    micro, tmp_path, two_files
):
    adapter = lora.add(micro, 1, targets=("to_out.0",))
    for parameter in adapter.parameters():
        torch.nn.init.ones_(parameter)
    other = adapter.save(tmp_path / "other.safetensors")
    adapter.remove()
    both = lora.combine(micro, {two_files[0]: 1.0, other: 1.0})
    assert all(layer.get_delta_weight(lora.NAME).any() for layer in both.layers.values())


def test_a_combination_names_what_it_cannot_combine(micro, two_files):
    with pytest.raises(ValueError, match="nothing to combine"):
        lora.combine(micro, {})
    with pytest.raises(ValueError, match=r"2\.safetensors: an adapter's weight .* got -1"):
        lora.combine(micro, {two_files[0]: -1})
    lora.add(micro).remove()  # nothing was left behind


def test_an_adapter_used_for_a_while_leaves_the_models_own_in_place(micro, two_files):
    mine = lora.load(micro, two_files[0])
    with lora.use_adapter(micro, None):
        other = lora.combine(micro, {two_files[1]: 1.0})
    layers = lora._layers(micro)
    with lora.use_adapter(micro, other) as active:
        assert active is other and other.attached and not mine.attached
    assert lora._layers(micro) == layers and mine.attached
    with pytest.raises(RuntimeError), lora.use_adapter(micro, two_files[1]):
        raise RuntimeError("in the middle")
    assert lora._layers(micro) == layers and mine.attached


def test_sample_takes_exactly_the_adapter_it_is_given(micro, two_files):
    """None is the base model, whatever is on it; a path or weights need nothing on it."""
    base = sample(micro, "a cat")
    from_file = sample(micro, "a cat", adapter=two_files[0])
    mixed = sample(micro, "a cat", adapter={two_files[0]: 0.7, two_files[1]: 0.3})
    mine = lora.load(micro, two_files[0])
    assert torch.equal(sample(micro, "a cat", adapter=mine), from_file)
    assert torch.equal(sample(micro, "a cat", adapter=str(two_files[0])), from_file)
    assert torch.equal(sample(micro, "a cat"), base)
    assert mine.attached
    assert len({tuple(x.flatten().tolist()) for x in (base, from_file, mixed)}) == 3, (
        "three different clips"
    )


def test_an_adapter_of_another_model_or_a_removed_one_is_an_error(
    micro, micro_directory, two_files
):
    from vader_nb import load

    other = load(micro_directory, dtype=torch.float64)
    with pytest.raises(ValueError, match="belongs to another"):
        sample(micro, "a cat", adapter=lora.load(other, two_files[0]))
    removed = lora.load(micro, two_files[0])
    removed.remove()
    with pytest.raises(ValueError, match="was removed"):
        sample(micro, "a cat", adapter=removed)


@pytest.mark.parametrize("start, end, acts", [(0, 1, 5), (0, 0.4, 2), (0.6, 1, 2), (0.2, 0.6, 2)])
def test_an_adapter_acts_in_its_part_of_the_chain_only(micro, two_files, start, end, acts):
    """Whether each step is the adapter's or the base model's is read off its own output."""
    adapter, seen = lora.load(micro, two_files[0], scale=0.8), []
    predict = micro.predict

    def spied(latents, t, inputs):
        """The base weights hold the sum while fused, so compare with a copy from before."""
        output = predict(latents, t, inputs)
        seen.append(not torch.equal(output, untouched.predict(latents, t, inputs)))
        return output

    with lora.use_adapter(micro, None):
        untouched = copy.deepcopy(micro)
    micro.predict = spied
    clip = sample(micro, "a cat", adapter=adapter, adapter_start=start, adapter_end=end)
    assert seen == [start * 5 <= i and i + 1 <= end * 5 for i in range(5)]
    assert seen.count(True) == acts
    assert adapter.scale == 0.8 and adapter.attached
    del micro.predict
    assert torch.equal(clip, sample(micro, "a cat", adapter=adapter)) == (acts == 5)


def test_an_adapter_that_acts_backwards_is_an_error(micro, two_files):
    with pytest.raises(ValueError, match=r"got 0\.5 to 0\.2"):
        sample(micro, "a cat", adapter=two_files[0], adapter_start=0.5, adapter_end=0.2)


# ------------------------------------------------------------------------------------------ where it goes


@pytest.mark.parametrize("targets", ["attention+ffn", ("attention", "ffn"), ["attention+ffn"]])
def test_attention_and_feed_forward_by_their_names(micro, targets):
    attention = lora.add(micro)
    layers = set(attention.layers)
    attention.remove()
    adapter = lora.add(micro, targets=targets)
    more = set(adapter.layers) - layers
    assert layers < set(adapter.layers) and more
    assert all(name.endswith(("ff.net.0.proj", "ff.net.2")) for name in more)
    assert adapter.targets == ("attention", "ffn")
    adapter.remove()
    same = lora.add(micro, targets="attention")
    assert set(same.layers) == layers


@pytest.mark.parametrize(
    "targets, named",
    [
        (("attention", "to_qq"), "to_qq"),
        ("attention+fnn", "fnn"),
        ("norm1", "norm1"),
        ("vae.ffn", "vae.ffn"),
    ],
)
def test_a_target_that_no_layer_has_is_named(micro, targets, named):
    with pytest.raises(ValueError, match=rf"is named {named}; choose attention, attention\+ffn"):
        lora.add(micro, targets=targets)
    assert not lora._layers(micro)


@pytest.mark.parametrize(
    "name, layers, millions",
    [  # by hand, of rank 16: blocks * (attention + 2 layers of 16 * (width + hidden))
        ("wan", 300, 11.796 + 30 * 2 * 16 * (1536 + 8960) / 1e6),
        ("cogvideox", 180, 7.373 + 30 * 2 * 16 * (1920 + 7680) / 1e6),
        ("cogvideox-5b", 252, 42 * 16 * (8 * 3072 + 2 * (3072 + 12288)) / 1e6),
        ("ltx-video", 280, 14.680 + 28 * 2 * 16 * (2048 + 8192) / 1e6),
    ],
)
def test_the_full_size_of_attention_and_feed_forward(name, layers, millions):
    from vader_nb import models

    with torch.device("meta"):
        model = models.from_config(name)
        adapter = lora.add(model, 16, targets="attention+ffn")
    assert len(adapter.layers) == layers
    counted = sum(p.numel() for p in adapter.parameters()) / 1e6
    assert counted == pytest.approx(millions, abs=0.001)


@pytest.mark.parametrize(
    "name", ["modelscope", "svd", "opensora", "animatediff", "videocrafter2", "wan2.2-a14b"]
)
def test_every_family_has_feed_forward_layers(name):
    """The first and the second one of each block, and the second one narrows."""
    from vader_nb import models

    with torch.device("meta"):
        model = models.from_config(name)
        adapter = lora.add(model, 1, targets="ffn")
    shapes = [layer.get_base_layer().weight.shape for layer in adapter.layers.values()]
    narrowing = [shape for shape in shapes if shape[1] > shape[0]]
    assert len(shapes) >= 32 and len(narrowing) == len(shapes) // 2
