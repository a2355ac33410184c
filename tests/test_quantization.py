"""Denoisers in 8 and 4 bits: the numbers, and gradients that are those of a float base with the dequantized weights."""

import copy
import shutil
import sys

import diffusers
import pytest
import torch

from vader_nb import align, load, lora, models, quantization, rewards, sample
from vader_nb.cli import main
from vader_nb.memory_planner import SAVINGS, STAGES, FakeMode, Step, _applies, simulate
from vader_nb.models.parts import ModelOfParts
from vader_nb.quantization import BITS, QuantizedLinear, eligible
from vader_nb.rewards.networks import default_dtype
from vader_nb.sampling import Sampling
from vader_nb.strategies import Frames, Last
from vader_nb.testing import HALF, REWARDS, SEEDS, adapted, apart, plain_autograd, staged

from . import test_animatediff, test_cogvideox, test_hunyuan, test_ltx_video, test_wan
from .test_opensora import SETTINGS as OPENSORA
from .test_opensora import directory as opensora_directory  # noqa: F401

PROMPTS = ["a red star", "a blue circle"]
MADE = {
    "wan": (test_wan.pipeline, test_wan.SMALL),
    "cogvideox": (lambda: test_cogvideox.pipeline_of({}), test_cogvideox.SIZE),
    "ltx": (lambda: test_ltx_video.ltx_pipeline("plain"), test_ltx_video.SETTINGS),
    "hunyuan": (test_hunyuan.pipeline_of_random_weights, test_hunyuan.SETTINGS),
    "animatediff": (
        lambda: diffusers.AnimateDiffPipeline(**test_animatediff.parts()),
        test_animatediff.SETTINGS,
    ),
}
SETTINGS = {name: settings for name, (_, settings) in MADE.items()} | {"opensora": OPENSORA}
SETTINGS |= {"micro": {"num_frames": 3, "height": 16, "width": 16, "guidance_scale": 3.0}}
SMALL = Sampling(**test_wan.SMALL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, opensora_directory, micro_directory):  # noqa: F811
    made = {name: tmp_path_factory.mktemp(name) for name in MADE}
    for name, folder in made.items():
        MADE[name][0]().save_pretrained(folder)
    return made | {"opensora": opensora_directory, "micro": micro_directory}


def quantized_layers(model):
    return {
        f"{key}.{path}": layer
        for key, denoiser in model.denoisers.items()
        for path, layer in denoiser.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


def twins(folder, quantize):
    """A quantized model, and a float one that holds its dequantized weights, in float64."""
    ours = load(folder, dtype=torch.float64, quantize=quantize)
    theirs = load(folder, dtype=torch.float64)
    layers = quantized_layers(ours)
    assert layers
    for name, layer in layers.items():
        key, _, path = name.partition(".")
        twin = theirs.denoisers[key].get_submodule(path)
        assert not torch.equal(twin.weight, layer.dequantized(torch.float64))
        twin.weight.data = layer.dequantized(torch.float64)
    return ours, theirs


@pytest.fixture(scope="module", params=BITS)
def wans(folders, request):
    return twins(folders["wan"], request.param)


# ------------------------------------------------------------------------------------------ the numbers


def layer_of(quantize, dtype=torch.float32, shape=(48, 64)):
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0]).to(dtype).requires_grad_(False)
    return linear, QuantizedLinear.of(linear.weight, linear.bias, BITS[quantize])


def test_eight_bits_are_the_nearest_of_255_steps_of_each_output():
    linear, layer = layer_of("8bit")
    step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    assert layer.weight.dtype == torch.int8 and layer.weight.nbytes == 48 * 64
    error = (layer.dequantized() - linear.weight).abs()
    assert (error <= 0.6 * step).all() and error.max() > 0.4 * step.min()  # and float16's rounding


def test_four_bits_are_the_nearest_of_nf4s_values_in_each_block():
    linear, layer = layer_of("4bit")
    # Of QLoRA's appendix E; a block's weights are multiples of its largest one.
    negative = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004]
    positive = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    values = torch.tensor([*negative, 0.0, *positive])
    blocks = linear.weight.view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(values).abs().argmin(dim=-1)
    expected = (values[nearest] * largest).view_as(linear.weight)
    torch.testing.assert_close(layer.dequantized(), expected, rtol=1e-5, atol=1e-7)
    assert layer.weight.nbytes + layer.scale.nbytes == 48 * 64 * (1 / 2 + 4 / 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("quantize", BITS)
def test_a_layer_computes_with_the_dequantized_weight_in_its_inputs_type(quantize, dtype):
    linear, layer = layer_of(quantize, dtype)
    weight = layer.dequantized().to(dtype)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    for inputs, output in (
        (x, layer(x)),
        (plain, torch.nn.functional.linear(plain, weight, linear.bias)),
    ):
        (output * torch.arange(48).to(dtype)).sum().backward()
        assert output.dtype == inputs.grad.dtype == dtype
    assert apart(x.grad, plain.grad) <= torch.finfo(dtype).eps * 8
    assert (
        apart(layer(x).detach(), torch.nn.functional.linear(x, weight, linear.bias).detach())
        <= 1e-3
    )
    for parameter in layer.parameters():
        assert parameter is linear.bias


@pytest.mark.parametrize("quantize", BITS)
def test_a_conversion_does_not_round_the_scales(quantize):
    _, layer = layer_of(quantize)
    before = layer.dequantized()
    layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer.dequantized(), before)
    layer.to("meta")
    assert {layer.weight.device.type, layer.scale.device.type} == {"meta"}


def test_embeddings_projections_and_what_diffusers_holds_to_float32_stay(folders):
    model = load(folders["wan"], dtype=torch.bfloat16, quantize="4bit")
    linear = {
        name: m for name, m in model.denoiser.named_modules() if isinstance(m, torch.nn.Linear)
    }
    stay = {name for name, m in linear.items() if not isinstance(m, QuantizedLinear)}
    assert (
        stay == {name for name in linear if not name.startswith("blocks.")} and "proj_out" in stay
    )
    assert next(model.denoiser.condition_embedder.time_embedder.parameters()).dtype == torch.float32
    assert model.dtype == torch.bfloat16
    again = load(folders["wan"]).denoiser
    again._keep_in_fp32_modules = ["ffn"]
    assert not any("ffn" in name for name, _ in eligible(again))


@pytest.mark.parametrize("quantize", BITS)
def test_weights_are_quantized_as_they_are_read(folders, quantize, monkeypatch, tmp_path):
    """Those of files in parts, too, and to the same codes as in one go afterwards."""
    folder = shutil.copytree(folders["wan"], tmp_path / "parts")
    transformer = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="8KB")
    assert len(list(folder.glob("transformer/*.safetensors"))) > 3
    late = []
    monkeypatch.setattr(quantization, "apply", lambda *_: late.append(_))
    read = load(folder, dtype=torch.bfloat16, quantize=quantize)
    monkeypatch.undo()
    assert late
    monkeypatch.setattr(ModelOfParts, "read_network", plainly)
    whole = load(folder, dtype=torch.bfloat16, quantize=quantize)
    ours, theirs = read.denoiser.state_dict(), whole.denoiser.state_dict()
    assert quantized_layers(read).keys() == quantized_layers(whole).keys()
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[k]) for k, x in ours.items())
    assert read.to(torch.float32).dtype == torch.float32


@classmethod
def plainly(cls, part, checkpoint, options):
    return cls.networks[part].from_pretrained(checkpoint.source, subfolder=part, **options)


# ---------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize(
    ("family", "quantize"), [*((name, "4bit") for name in SETTINGS), ("micro", "8bit")]
)
def test_every_familys_gradient_is_that_of_the_dequantized_base(folders, family, quantize):
    """By stages, blocks checkpointed, against autograd in one graph."""
    pair, results = twins(folders[family], quantize), []
    sampling = Sampling(**{"num_inference_steps": 3} | SETTINGS[family])
    for model, gradient in zip(pair, (staged, plain_autograd)):
        setup = REWARDS["frames"], PROMPTS, SEEDS, sampling, Last(2), Frames.all()
        results.append(gradient(model, adapted(model), *setup))
    (values, gradient), (expected_values, expected) = results
    assert apart(gradient, expected) <= 1e-9 and apart(values, expected_values) <= 1e-9


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": False}, {"activation_offload": True}], ids=str
)
def test_other_settings_give_the_same_gradient(wans, options):
    setup = REWARDS["clip"], PROMPTS, SEEDS, SMALL, Last(2), Frames.all()
    results = []
    for model, more in zip(wans, (options, {})):
        adapter = adapted(model)
        results.append(staged(model, adapter, *setup, **more)[1])
        adapter.remove()
    assert apart(*results) <= 1e-9


def test_model_offload_moves_the_codes(folders):
    model = load(folders["wan"], quantize="4bit")
    model.offload_device = torch.device("meta")
    model.enable_model_cpu_offload()
    assert {x.device.type for x in model.denoiser.state_dict().values()} == {"meta"}


def test_no_dequantized_weight_waits_for_the_backward_pass():
    _, layer = layer_of("4bit", shape=(1024, 1024))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        layer(torch.ones(1, 1024, requires_grad=True)).sum()
    assert {x.data_ptr() for x in kept} == {layer.weight.data_ptr(), layer.scale.data_ptr()}


# ------------------------------------------------------------------------------------------- adapters


def test_the_adapter_acts_unfused_and_the_codes_stay(wans):
    model, theirs = wans
    codes = {name: copy.deepcopy(x) for name, x in model.denoiser.state_dict().items()}
    adapter = adapted(model)
    inside = {}
    with adapter.fused():
        inside |= {name: layer._disable_adapters for name, layer in adapter.layers.items()}
        ours = sample(model, PROMPTS, seeds=3, sampling=SMALL, adapter=adapter)
    assert not any(inside.values())
    adapter.remove()
    assert all(torch.equal(x, codes[name]) for name, x in model.denoiser.state_dict().items())
    twin = adapted(theirs)
    expected = sample(theirs, PROMPTS, seeds=3, sampling=SMALL, adapter=twin)
    twin.remove()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, sample(model, PROMPTS, seeds=3, sampling=SMALL), atol=1e-3)


def test_adapters_go_to_files_and_come_back_between_float_and_quantized_bases(wans, tmp_path):
    model, theirs = wans
    adapter = adapted(model)
    state = {name: x.clone() for name, x in adapter.state_dict().items()}
    file = adapter.save(tmp_path / "adapter.safetensors")
    exported = adapter.export(tmp_path / "peft", "peft")
    adapter.remove()
    for base, path in ((model, file), (theirs, file), (model, exported)):
        loaded = lora.load(base, path)
        for name, x in loaded.state_dict().items():
            assert torch.equal(x, state[name].to(x))
        loaded.remove()


def test_wrong_shapes_are_named(wans, tmp_path):
    adapter = adapted(wans[0])
    state = adapter.state_dict()
    adapter.remove()
    name = next(iter(state))
    state[name] = state[name][:, :-1].contiguous()
    file = tmp_path / "wrong.safetensors"
    lora.lora_export.write(file, state, {})
    with pytest.raises(ValueError, match=r"lora_A of .* has shape \(2, 23\), expected \(2, 24\)"):
        lora.load(wans[0], file)


def test_what_is_quantized_is_not_saved(wans, tmp_path):
    adapter = adapted(wans[0])
    for save in (wans[0].save_pretrained, adapter.merge):
        with pytest.raises(ValueError, match="quantized.* load it without quantize"):
            save(tmp_path / "saved")
    adapter.remove()
    assert not (tmp_path / "saved").exists()


# --------------------------------------------------------------------------------------------- its use


def test_an_embedded_model_keeps_the_promises_that_are_checked_at_load_and_learns(tmp_path):
    model = load("tiny-wan", quantize="8bit", check=True)
    options = {"steps": 2, "rank": 2, "progress": False, "output_dir": tmp_path / "run"}
    options |= {"num_inference_steps": 2, "batch_size": 1}
    run = align(model, rewards.brightness(), ["a red star"], **options)
    assert all(row["grad_norm"] > 0 for row in run.metrics)
    assert {p.dtype for p in run.adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision_the_gradient_points_where_the_wide_one_does(folders, autocast):
    gradients = []
    for half in (False, True):  # from the same noise, which Wan draws in float32
        dtype = torch.bfloat16 if half and not autocast else torch.float32
        model = load(folders["wan"], dtype=dtype, quantize="8bit")
        adapter = adapted(model)
        setup = REWARDS["frames"], PROMPTS, SEEDS, SMALL, Last(1), Frames.at(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half and autocast):
            gradients.append(staged(model, adapter, *setup)[1])
    assert torch.cosine_similarity(*gradients, dim=0) > HALF[torch.bfloat16]


def test_what_cannot_be_is_an_error_before_anything_is_read(monkeypatch):
    with pytest.raises(ValueError, match="quantize must be 8bit or 4bit, got 'int3'"):
        load("wan-14b", quantize="int3")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for ask in (lambda: load("wan-14b", quantize="4bit"), lambda: simulate(quantize="4bit")):
        with pytest.raises(ValueError, match=r"needs the package bitsandbytes: pip install"):
            ask()


def test_a_model_without_such_layers_is_an_error(folders, monkeypatch):
    monkeypatch.setattr(quantization, "eligible", lambda network: iter(()))
    with pytest.raises(ValueError, match="quantize has no effect: no list of blocks in .*micro"):
        load(folders["micro"], quantize="4bit")


def test_in_a_shell(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        f"model={folders['wan']}",
        "quantize=4bit",
        *(f"{k}={v}" for k, v in test_wan.SMALL.items()),
    ]
    main(["sample", "a red star", *words])
    main(["memory", "reward=brightness", "gpu_memory=24", *words])
    assert "fits" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ its memory


def test_the_planner_counts_what_a_step_takes(folders):
    settings = {"dtype": torch.float32, "quantize": "4bit", "batch_size": 2, "strategy": Last(2)}
    settings |= test_wan.SMALL | {"text_cache": False}
    step = Step.of(folders["wan"], "brightness", settings)
    simulated, real = step.simulate(), step.count()
    for stage in STAGES:
        assert simulated[stage] == pytest.approx(real[stage], rel=0.1), stage


def test_the_planner_offers_what_is_installed(folders, monkeypatch):
    setup = {"quantize": "4bit"}, folders["wan"], "brightness"
    assert {"quantize": "8bit"} in SAVINGS and setup[0] in SAVINGS
    assert _applies(*setup, {}) and _applies(*setup, {"quantize": "8bit"})
    assert not _applies(*setup, {"quantize": "4bit"})
    monkeypatch.setattr(quantization, "is_installed", lambda: False)
    assert not _applies(*setup, {})


@pytest.mark.parametrize("quantize", [None, *BITS])
def test_the_planners_weights_of_wan_14b_are_those_of_arithmetic(quantize):
    """40 blocks of 8 square layers and a feed-forward of 13824."""
    weights, outputs = 40 * (8 * 5120**2 + 2 * 5120 * 13824), 40 * (8 * 5120 + 13824 + 5120)
    expected = {
        None: 2 * weights,
        "8bit": weights + 4 * outputs,
        "4bit": weights / 2 + 4 * weights / 64,
    }
    with FakeMode() as fake, default_dtype(torch.bfloat16):
        fake.truth = False
        network = models.from_config("wan-14b", None, quantize).denoiser
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    found = [
        x.nbytes
        for name, x in tensors.items()
        if name.startswith("blocks.") and (x.ndim == 2 or name.endswith("scale"))
    ]
    assert sum(found) == expected[quantize]
