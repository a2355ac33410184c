"""AnyFlow: against diffusers' own pipeline, the gradient of its whole chain, its full size, files."""

import json
import shutil

import diffusers
import pytest
import torch

from vader_nb import load, lora, models
from vader_nb.models import wan_vae
from vader_nb.sampling import Sampling, roll_out, sample
from vader_nb.strategies import DRaFTLV, DRTune, Frames, Last
from vader_nb.testing import REWARDS, adapted, apart, check_model, plain_autograd, staged

from .test_wan import PROMPTS, text_encoder, tokenizer, vae

SETTINGS = {"num_inference_steps": 4, "num_frames": 9, "height": 32, "width": 48}
SMALL = {"num_inference_steps": 5, "num_frames": 5, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anyflow")
    decoder = vae("2.1")
    torch.manual_seed(0)
    transformer = diffusers.AnyFlowTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    parts = tokenizer(), text_encoder(), transformer, decoder, scheduler
    diffusers.AnyFlowPipeline(*parts).save_pretrained(folder)
    return folder


def diffusers_call(folder, adapter=None, **settings):
    pipeline = diffusers.AnyFlowPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    return pipeline(
        [prompt.text for prompt in PROMPTS],
        negative_prompt=[prompt.negative_prompt for prompt in PROMPTS],
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
        max_sequence_length=16,
        **settings,
    ).frames


QUICK_NORMS = wan_vae.use_quick_norms


@pytest.fixture
def same_norms(monkeypatch):
    """diffusers' norms in the decoder, whose random weights turn a difference in the last digit into 1.3e-5."""
    monkeypatch.setattr(wan_vae, "use_quick_norms", lambda vae: None)


@pytest.mark.parametrize("guidance_scale, steps", [(1.0, 3), (4.0, 3), (1.0, 1)])
def test_latents_and_frames_are_those_of_diffusers_pipeline(
    directory, same_norms, guidance_scale, steps
):
    model = load(directory)
    settings = SETTINGS | {"guidance_scale": guidance_scale, "num_inference_steps": steps}
    sampling = Sampling(**settings).resolve(model)
    theirs = diffusers_call(directory, **settings, output_type="latent")
    ours = roll_out(model, PROMPTS, [5, 9], sampling).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    latents, ours = theirs, model.decode(theirs)  # it makes 2e-5 of the latents' rounding
    theirs = diffusers_call(directory, **settings, output_type="pt")
    assert ours.shape == (2, 9, 3, 32, 48)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    model.vae.double()
    theirs = model.decode(latents.double())
    QUICK_NORMS(model.vae)  # as it is shipped
    torch.testing.assert_close(model.decode(latents.double()), theirs, rtol=0, atol=1e-9)


def test_it_keeps_the_promises_of_a_model(directory):
    model = load(directory, dtype=torch.float64)
    strategies = [Last(2), DRTune(2, stop=1), DRaFTLV(2)]
    assert len(check_model(model, Sampling(**SMALL), PROMPTS, strategies)) == 16


def test_the_gradient_of_the_whole_chain_is_autograds(directory):
    model = load(directory, dtype=torch.float64)
    sampling = Sampling(**SMALL | {"num_inference_steps": 4})
    assert Sampling().resolve(model).num_inference_steps == 4
    assert model.last_step_gain(sampling.resolve(model)) == pytest.approx(0.625)
    adapter = adapted(model)
    setup = model, adapter, REWARDS["clip"], PROMPTS, [3, 8], sampling, Last(4), Frames.all()
    (ours, gradient), (theirs, expected) = staged(*setup), plain_autograd(*setup)
    assert apart(gradient, expected) <= 1e-9 and apart(ours, theirs) <= 1e-9
    last = staged(*setup[:-2], Last(1), Frames.all())[1]
    assert apart(last, expected) > 0.01


def test_a_directory_with_its_authors_index_is_loaded_by_class(directory, tmp_path):
    folder = shutil.copytree(directory, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "WanAnyFlowPipeline",
        "scheduler": [
            "far.schedulers.scheduling_flowmap_euler_discrete",
            "FlowMapDiscreteScheduler",
        ],
        "transformer": ["far.models.transformer_far_wan_model", "FAR_Wan_Transformer3DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("transformer/config.json", "scheduler/scheduler_config.json"):
        file = folder / name
        config = json.loads(file.read_text()) | {"_class_name": "FAR_Wan", "init_far_model": False}
        file.write_text(json.dumps(config))
    model, sampling = load(folder), Sampling(**SETTINGS)
    expected = sample(load(directory), PROMPTS, seeds=[5, 9], sampling=sampling)
    assert torch.equal(sample(model, PROMPTS, seeds=[5, 9], sampling=sampling), expected)
    assert type(model.pipeline()) is diffusers.AnyFlowPipeline
    assert type(models.from_config(folder)) is type(model)


def test_it_is_saved_and_its_adapter_is_read_by_diffusers_pipeline(directory, same_norms, tmp_path):
    model = load(directory)
    adapter = adapted(model)
    options = {"seeds": [5, 9], "sampling": Sampling(**SETTINGS)}
    expected = sample(model, PROMPTS, adapter=adapter, **options)
    file = adapter.export(tmp_path / "lora")
    adapter.remove()
    again = load(model.save_pretrained(tmp_path / "saved"))
    base = sample(model, PROMPTS, **options)
    assert torch.equal(sample(again, PROMPTS, **options), base)
    assert not torch.allclose(base, expected, rtol=1e-3, atol=1e-3)
    theirs = diffusers_call(tmp_path / "saved", file, **SETTINGS, output_type="pt")
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)


def test_full_size_is_the_published_one():
    with torch.device("meta"):
        model = models.from_config("anyflow")
    counts = [sum(p.numel() for p in module.parameters()) / 1e6 for module in model.modules()]
    assert [round(count, 1) for count in counts] == [1421.8, 126.9, 5680.9]
    assert len(lora.add(model, 16).layers) == 240
    assert model.latent_shape(Sampling().resolve(model)) == (16, 21, 60, 104)


def test_bad_settings(directory):
    model = load(directory)
    with pytest.raises(ValueError, match="height=40 must be a positive multiple of 16 pixels"):
        sample(model, "a star", sampling=Sampling(**SETTINGS | {"height": 40}))
    with pytest.raises(ValueError, match="num_frames=8 must be 1 more than a multiple of 4"):
        sample(model, "a star", sampling=Sampling(**SETTINGS | {"num_frames": 8}))
    with pytest.raises(ImportError, match="has no AnyFlow: pip install -U diffusers"):
        type(model).present({"transformer": None}, {})
    model.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler cannot sample it"):
        sample(model, "a star", sampling=Sampling(**SETTINGS))
