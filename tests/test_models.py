"""Loading: parity with diffusers' own pipeline, full-size layouts, and errors that help."""

import time

import diffusers
import pytest
import torch

from tests.benchmarks.models import facts
from vader_nb import cli, load, models
from vader_nb.models import CHECKPOINTS, gallery
from vader_nb.sampling import Sampling, sample


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_our_loop_makes_what_diffusers_pipeline_makes(micro_directory, scheduler, guidance_scale):
    model = load(micro_directory)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(micro_directory)
    cls = getattr(diffusers, scheduler)
    model.scheduler, pipeline.scheduler = (
        cls.from_config(model.scheduler.config) for _ in range(2)
    )
    settings = {
        "num_inference_steps": 4,
        "guidance_scale": guidance_scale,
        "num_frames": 3,
        "height": 16,
        "width": 24,
    }
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval(), pipeline.vae.eval()
    prompt = "a red star moving left on a white background"
    theirs = pipeline(
        prompt, generator=torch.Generator().manual_seed(5), output_type="pt", **settings
    ).frames
    ours = sample(model, prompt, seeds=5, sampling=Sampling(**settings))
    torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-4, atol=1e-4)


def test_plain_diffusers_loads_and_samples_the_tiny_model(tiny):
    source = CHECKPOINTS["tiny"]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval()
    assert type(pipeline).__name__ == "TextToVideoSDPipeline"
    prompt = "a green star growing on a black background"
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "num_frames": 8}
    theirs = pipeline(
        prompt, generator=torch.Generator().manual_seed(1), output_type="pt", **settings
    ).frames
    ours = sample(
        tiny, prompt, seeds=1, sampling=Sampling(num_inference_steps=3, guidance_scale=3.0)
    )
    torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-3, atol=1e-3)


def test_the_text_is_projected_once_per_clip_and_the_output_is_diffusers(micro):
    seeded = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 2, 2, generator=seeded, dtype=micro.dtype)
    inputs = micro.encode(["a red star", "a green circle"])["prompt"]
    rows = []
    layer = next(
        module
        for name, module in micro.denoiser.named_modules()
        if "attentions" in name and name.endswith("attn2.to_k")
        if module.weight.shape[1] == micro.denoiser.config.cross_attention_dim
    )
    hook = layer.register_forward_hook(lambda layer, inputs, output: rows.append(len(inputs[0])))
    ours = micro.predict(latents, torch.tensor(500), inputs)
    theirs = micro.denoiser(latents, torch.tensor(500), inputs["encoder_hidden_states"]).sample
    hook.remove()
    assert rows == [2, 6]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_parts_have_the_types_that_a_family_was_made_for():
    cuda = torch.device("cuda")
    wan, tiny, small, large, long = (
        models.family_of(models.checkpoint_of(name)).dtypes_of(models.checkpoint_of(name))
        for name in ("wan", "tiny", "cogvideox", "cogvideox-5b", "cogvideox-1.5")
    )
    half, full = torch.bfloat16, torch.float32
    assert models.part_dtypes(wan, cuda, None) == {"default": half, "vae": full}
    assert models.part_dtypes(wan, cuda, {"vae": half}) == {"default": half, "vae": half}
    assert models.part_dtypes(wan, cuda, torch.float16) == {"default": torch.float16}
    assert models.part_dtypes(wan, torch.device("cpu"), None) == {"default": full}
    assert models.part_dtypes(tiny, cuda, {"vae": full}) == {"default": torch.float16, "vae": full}
    assert models.part_dtypes(small, cuda, None) == {"default": torch.float16}
    assert models.part_dtypes(large, cuda, None) == models.part_dtypes(long, cuda, None)
    assert models.part_dtypes(long, cuda, None) == {"default": half}


def test_everything_is_frozen_and_in_eval_mode(tiny):
    for module in tiny.modules():
        assert not any(p.requires_grad for p in module.parameters())
        assert not any(
            m.training for m in module.modules()
        )  # temporal convolutions hold a dropout of 0.1


def test_sampling_twice_is_equal(tiny):
    options = {"seeds": 3, "sampling": Sampling(num_inference_steps=2)}
    assert torch.equal(sample(tiny, "a red star", **options), sample(tiny, "a red star", **options))


def test_one_frame_decodes_as_it_does_among_others(tiny):
    latents = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = tiny.decode(latents, list(range(8)))
        alone = tiny.decode(latents, [5])
    assert together.shape == (2, 8, 3, 64, 64)
    assert together.min() >= 0 and together.max() <= 1
    torch.testing.assert_close(alone[:, 0], together[:, 5], rtol=1e-4, atol=1e-5)


def test_modelscope_full_size_fits_the_published_layout():
    """The published configuration on the meta device: names and sizes, without the weights."""
    from diffusers import UNet3DConditionModel

    config = {
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "attention_head_dim": 64,
        "sample_size": 32,
    }
    with torch.device("meta"):
        unet = UNet3DConditionModel(**config)
    assert len(unet.state_dict()) == 1480
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(1411.2e6, rel=1e-3)
    ends = [
        n
        for n, m in unet.named_modules()
        if isinstance(m, torch.nn.Linear) and n.endswith((".to_q", ".to_k", ".to_v"))
    ]
    assert len(ends) == 198  # the adapter's layers without to_out


@pytest.mark.parametrize("name", ["modelscope", "zeroscope"])
def test_offline_without_weights_says_what_to_do_within_seconds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.time()
    with pytest.raises(FileNotFoundError) as caught:
        load(name, cache_dir=tmp_path)
    assert time.time() - began < 5
    message, checkpoint = str(caught.value), CHECKPOINTS[name]
    for part in (checkpoint.source, checkpoint.size, "load('/path", "tiny"):
        assert part in message


def test_modelscope_loads_from_the_hub_cache_with_its_fp16_variant(
    micro_directory, tmp_path, monkeypatch
):
    """The real call (`load("modelscope")`: hub id, fp16 variant) on a hub cache that holds a checkpoint of the
    same layout: fp16 safetensors for UNet and text encoder, `.bin` for the autoencoder, as published."""
    from diffusers import AutoencoderKL, UNet3DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    repository = tmp_path / "models--ali-vilab--text-to-video-ms-1.7b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    UNet3DConditionModel.from_pretrained(micro_directory / "unet").half().save_pretrained(
        snapshot / "unet", variant="fp16"
    )
    CLIPTextModel.from_pretrained(micro_directory / "text_encoder").half().save_pretrained(
        snapshot / "text_encoder", variant="fp16"
    )
    vae = AutoencoderKL.from_pretrained(micro_directory / "vae").half()
    vae.save_pretrained(snapshot / "vae", variant="fp16", safe_serialization=False)
    CLIPTokenizer.from_pretrained(micro_directory / "tokenizer").save_pretrained(
        snapshot / "tokenizer"
    )
    diffusers.DDIMScheduler.from_pretrained(micro_directory / "scheduler").save_pretrained(
        snapshot / "scheduler"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load("modelscope", cache_dir=tmp_path, dtype=torch.float32)
    assert type(model.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert model.name == "modelscope"
    clip = sample(
        model,
        "a panda",
        sampling=Sampling(num_inference_steps=2, num_frames=2, height=16, width=16),
    )
    assert clip.shape == (1, 2, 3, 16, 16)


def test_unknown_names_and_empty_directories(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'modelscop'.*tiny, .*modelscope"):
        load("modelscop")
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one"),
        ({"prompts": ["a", "b"], "seeds": [1]}, "as many seeds"),
        ({"prompts": "a", "sampling": Sampling(height=60)}, "multiple of 8"),
        ({"prompts": "a", "sampling": Sampling(num_frames=0)}, "num_frames must be at least 1"),
    ],
)
def test_bad_sampling_requests(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny, **arguments)


def test_long_and_strange_prompts_are_only_text(tiny):
    prompts = ["x" * 10_000, "<script>alert(1)</script>", "../../etc/passwd", "ein Würfel 🎲", " "]
    clips = sample(tiny, prompts, sampling=Sampling(num_inference_steps=1))
    assert clips.isfinite().all()


def test_a_prompt_is_read_once_and_whatever_stands_beside_it(tiny, monkeypatch):
    tiny._embeddings.clear()
    alone = tiny.encode(["a red star"])
    embed, asked = tiny._embed, []
    monkeypatch.setattr(tiny, "_embed", lambda prompt: asked.append(prompt) or embed(prompt))
    among = tiny.encode(["a blue circle", "a red star", "a blue circle"])
    assert asked == ["a blue circle"]
    key = "encoder_hidden_states"
    assert torch.equal(among["prompt"][key][1], alone["prompt"][key][0])
    assert torch.equal(among["negative"][key][2], alone["negative"][key][0])
    together = tiny.text_encoder(
        tiny.tokenizer(["a red star", ""], padding="max_length", return_tensors="pt").input_ids
    ).last_hidden_state
    torch.testing.assert_close(
        together, alone.batched(["prompt", "negative"])[key], rtol=1e-4, atol=1e-5
    )


def test_prompts_are_kept_within_bounds(tiny, monkeypatch):
    monkeypatch.setattr("vader_nb.models.modelscope.CACHED_PROMPTS", 4)
    for i in range(10):
        states = tiny.encode([f"{i} red stars", "a star"])["prompt"]["encoder_hidden_states"]
        assert len(states) == 2
        assert len(tiny._embeddings) <= 4


def test_a_model_that_offloads_is_moved_before_not_after(micro):
    micro.enable_model_cpu_offload()
    with pytest.raises(RuntimeError, match="before that"):
        micro.to(torch.float32)


def test_words_that_the_text_encoder_does_not_see_are_said_once(micro):
    import warnings

    limit = micro.tokenizer.model_max_length
    text = " ".join(["red"] * limit + ["star"])
    with pytest.warns(UserWarning, match=f"reads {limit} tokens, .*not seen: '.*star'"):
        micro.encode([text])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        micro.encode([text, "a red star"])


def test_a_directory_with_a_pickle_is_refused_in_one_line(micro_directory, tmp_path):
    import pickle
    import shutil

    from vader_nb import load

    folder = shutil.copytree(micro_directory, tmp_path / "copy")
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(ValueError, match="holds a pickle") as raised:
        load(folder)
    assert "weights_only" not in str(raised.value)


# ------------------------------------------------------------------------------------------ the table


def test_every_model_stands_in_the_table(capsys):
    assert set(gallery.CARDS) == set(models.CHECKPOINTS)
    cli.main(["models"])
    shown = capsys.readouterr().out
    assert all(f"{name}\n  takes " in shown for name in models.CHECKPOINTS)


def test_what_the_table_says_is_what_is_simulated():
    """All are, by `python -m tests.benchmarks.models`, which takes minutes; the peak of ModelScope in test_memory."""
    found, card = facts("tiny-i2v"), gallery.CARDS["tiny-i2v"]
    for key, value in found.items():
        assert getattr(card, key) == value, key
