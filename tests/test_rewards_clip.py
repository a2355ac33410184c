"""Rewards on CLIP: parity with open_clip, transformers and HPSv2's own package, on checkpoints of the real layouts."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from torchvision.transforms import v2 as T
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from tests.reward_contract import ascend, assert_slopes, tensor_shapes
from vader_nb import hub, rewards
from vader_nb.memory_planner import MemoryTracker
from vader_nb.rewards import clip as towers
from vader_nb.rewards import networks
from vader_nb.rewards.gallery import SOURCES
from vader_nb.rewards.networks import CLIP_MEAN, CLIP_STD, checkpoint_blocks, preprocess

PROMPTS = ["a cat with a horn", "two dogs, running", "snow"]
SMALL_VIT_H = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def frames():
    return torch.rand(3, 2, 3, 20, 36, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------- the preprocessor

SIZES = [(224, 224), (320, 512), (64, 64), (100, 60)]


@pytest.mark.parametrize("size", [*SIZES, (56, 91)], ids=str)  # the last with an odd margin
def test_crop_is_what_transformers_does(size):
    pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ours = preprocess(pictures, 56, CLIP_MEAN, CLIP_STD, resize="crop", interpolation="bicubic")
    processor = CLIPImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_rescale=False
    )
    theirs = processor(list(pictures), return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_is_what_open_clip_does(size):
    pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ours = preprocess(pictures, 56, CLIP_MEAN, CLIP_STD, resize="crop", interpolation="bicubic")
    transform = open_clip.image_transform(
        56, is_train=False, resize_mode="shortest", interpolation="bicubic"
    )
    theirs = torch.stack([on_tensors(transform)(picture) for picture in pictures])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_squash_is_what_open_clip_does(size, interpolation):
    pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ours = preprocess(pictures, 56, CLIP_MEAN, CLIP_STD, interpolation=interpolation)
    transform = open_clip.image_transform(
        56, False, resize_mode="squash", interpolation=interpolation
    )
    theirs = torch.stack([on_tensors(transform)(picture) for picture in pictures])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def on_tensors(transform):
    """open_clip's transform without the steps that want an 8-bit picture."""
    names = ("ToTensor", "function")
    return T.Compose([step for step in transform.transforms if type(step).__name__ not in names])


def test_preprocessing_without_antialias_is_interpolate():
    picture = torch.rand(1, 3, 90, 160, generator=torch.Generator().manual_seed(0))
    plain = preprocess(picture, 30, (0, 0, 0), (1, 1, 1), antialias=False)
    torch.testing.assert_close(
        plain, torch.nn.functional.interpolate(picture, (30, 30), mode="bilinear")
    )
    assert not torch.allclose(plain, preprocess(picture, 30, (0, 0, 0), (1, 1, 1)))
    with pytest.raises(ValueError, match="'stretch'.*squash, crop, pad"):
        preprocess(picture, 30, CLIP_MEAN, CLIP_STD, resize="stretch")


# ------------------------------------------------------------------------------------------ HPS


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory):
    """A file as HPSv2's authors publish it, {'state_dict': …} of a ViT-H-14 in float16, but small."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "configs").mkdir()
    (folder / "configs" / "ViT-H-14.json").write_text(json.dumps(SMALL_VIT_H))
    before = dict(open_clip.factory._MODEL_CONFIGS)
    open_clip.add_model_config(folder / "configs")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-H-14")
    for parameter in model.parameters():  # zero at the start would be tested for nothing
        torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim else 0.0)
    torch.save({"state_dict": model.half().state_dict()}, folder / "HPS_small.pt")
    yield folder / "HPS_small.pt"
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(before)


@pytest.fixture(scope="module")
def small_hps(hps_file):
    return rewards.hps(hps_file, verify=False)


def test_hps_is_open_clips_own(hps_file, small_hps, frames):
    model = open_clip.create_model("ViT-H-14").eval()
    model.load_state_dict(torch.load(hps_file, weights_only=True)["state_dict"])
    pixels = preprocess(frames.flatten(0, 1), 28, CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True).unflatten(0, (3, 2))
        texts = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS), normalize=True)
    expected = (images * texts[:, None]).sum(-1).mean(1)
    torch.testing.assert_close(small_hps(frames, PROMPTS), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory, hps_file, frames):
    """Runs hpsv2_reference.py on HPSv2's own package, which is installed without its dependencies (it pins an old
    pytest) and with the vocabulary that it lacks; returns what it prints."""
    folder = tmp_path_factory.mktemp("hpsv2")
    install = ["pip", "install", "-q", "--no-deps", "hpsv2==1.2.0", "--target"]
    subprocess.run([sys.executable, "-m", *install, str(folder)], check=True)
    vocabulary = "bpe_simple_vocab_16e6.txt.gz"
    theirs = folder / "hpsv2" / "src" / "open_clip" / vocabulary
    theirs.write_bytes((Path(open_clip.__file__).parent / vocabulary).read_bytes())
    environment = {
        "PYTHONPATH": str(folder),
        "HPS_ROOT": str(folder),
        "OMP_NUM_THREADS": "1",
        "PATH": "",
    }

    torch.save(frames[:, 0].clone(), folder / "pictures.pt")
    script = Path(__file__).parent / "hpsv2_reference.py"
    arguments = [hps_file.parent / "configs", hps_file, folder / "pictures.pt", *PROMPTS]
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_padded_hps_is_the_score_of_hpsv2s_own_package(hps_file, hpsv2, frames):
    ours = rewards.hps(hps_file, verify=False, resize="pad")(frames[:, :1], PROMPTS)
    torch.testing.assert_close(ours, torch.tensor(hpsv2["scores"]), rtol=1e-5, atol=1e-5)


def test_the_published_files_fit_key_for_key_and_shape_for_shape(hpsv2, monkeypatch):
    """At full size: what HPSv2's own model holds, and its files (686 tensors), loads strictly into ours."""
    config = Path(open_clip.__file__).parent / "model_configs" / "ViT-H-14.json"  # not `hps_file`'s
    config = json.loads(config.read_text())
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    with torch.device("meta"):
        state = {k: torch.empty(size, dtype=torch.float16) for k, size in hpsv2["shapes"].items()}
        ours = rewards.hps(from_config=True).clip.network
    assert len(state) == 686
    assert sum(value.numel() for value in state.values()) == 986_109_441
    towers.fill(ours, state, Path("HPS_v2.1_compressed.pt"))
    assert ours.visual.proj.dtype == torch.float16


def test_a_file_of_another_version_or_layout_is_refused(hps_file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not that of a published HPS file"):
        rewards.hps(hps_file)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: hps_file)
    with pytest.raises(ValueError, match="is not xswu/HPSv2.*SHA-256"):
        hub.single_file(SOURCES["hps-v2.1"])
    with pytest.raises(ValueError, match=r"'v3'.*v2.0, v2.1, published, tiny"):
        rewards.hps("v3")
    torch.save({"state_dict": {"visual.proj": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not hold an open_clip ViT-H-14"):
        rewards.hps(tmp_path / "other.pt", verify=False)


# -------------------------------------------------------------------------- PickScore and CLIP score


def write_clip(folder: Path, projection: int = 16) -> Path:
    """A `CLIPModel` directory with a tokenizer of single letters, as `save_pretrained` writes it."""
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20
    )
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config=small
        | {"vocab_size": len(words), "max_position_embeddings": 20, "eos_token_id": 1},
        vision_config=small
        | {"image_size": 32, "patch_size": 8, "projection_dim": projection},  # twice, as OpenAI's
        projection_dim=projection,
    )
    torch.manual_seed(1)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.05)
    torch.nn.init.constant_(model.logit_scale, 4.6052)  # log 100, as trained ones have
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_pickscore_and_clip_score_are_transformers_own(clip_folder, frames):
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt"
    )
    for resize, interpolation in (("squash", "bilinear"), ("crop", "bicubic")):
        pixels = preprocess(
            frames[:, 0], 32, CLIP_MEAN, CLIP_STD, resize=resize, interpolation=interpolation
        )
        with torch.no_grad():
            logits = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
        picked = rewards.pickscore(clip_folder, resize=resize)(frames[:, :1], PROMPTS)
        torch.testing.assert_close(picked, logits, rtol=1e-5, atol=1e-5)
        cosine = rewards.clip_score(clip_folder, resize=resize)(frames[:, :1], PROMPTS)
        torch.testing.assert_close(cosine, logits / model.logit_scale.exp(), rtol=1e-5, atol=1e-5)


def test_a_prompt_longer_than_the_table_is_cut(clip_folder, frames):
    long = ["abc " * 50] * 3
    assert rewards.clip_score(clip_folder)(frames, long).isfinite().all()


LARGE_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
LARGE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CONFIGS = {
    "openai/clip-vit-base-patch32": CLIPConfig(),
    "openai/clip-vit-large-patch14": CLIPConfig(
        text_config=LARGE_TEXT, vision_config=LARGE_VISION | {"patch_size": 14}, projection_dim=768
    ),
}


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("openai/clip-vit-large-patch14", 590, 427.6), ("openai/clip-vit-base-patch32", 398, 151.3)],
)
def test_full_size_configurations(name, tensors, parameters):
    with torch.device("meta"):
        model = CLIPModel(CONFIGS[name])
        built = rewards.clip_score(name.split("/")[1], from_config=True).clip.network
    assert tensor_shapes(built) == tensor_shapes(model)
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.1)


# ------------------------------------------------------------------------------------------- heads


def write_head(path: Path, sizes: tuple[int, ...], numbers: tuple[int, ...]) -> Path:
    generator = torch.Generator().manual_seed(len(sizes))
    head = {}
    for number, (inside, outside) in zip(numbers, zip(sizes, sizes[1:])):
        head[f"layers.{number}.weight"] = (
            torch.randn(outside, inside, generator=generator) / inside**0.5
        )
        head[f"layers.{number}.bias"] = torch.randn(outside, generator=generator)
    torch.save(head, path)
    return path


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A CLIP with 768 numbers, and the heads' files in their published layouts."""
    folder = tmp_path_factory.mktemp("heads")
    write_clip(folder, projection=768)
    write_head(folder / "laion.pth", (768, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7))
    write_head(folder / "compression.pt", (768, 512, 128, 32, 1), (0, 3, 6, 9))
    return folder


def mlp(path: Path, vectors: torch.Tensor, between=lambda x: x) -> torch.Tensor:
    head = torch.load(path, weights_only=True)
    for i, number in enumerate(sorted({int(key.split(".")[1]) for key in head})):
        vectors = vectors if i == 0 else between(vectors)
        vectors = vectors @ head[f"layers.{number}.weight"].T + head[f"layers.{number}.bias"]
    return vectors.squeeze(-1)


def test_heads_read_the_unit_embedding_of_transformers(heads, frames):
    model = CLIPModel.from_pretrained(heads).eval()
    pixels = preprocess(frames.flatten(0, 1), 32, CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        features = model.visual_projection(model.vision_model(pixels).pooler_output)
    unit = (features / features.norm(dim=-1, keepdim=True)).unflatten(0, (3, 2))
    laion, compression = heads / "laion.pth", heads / "compression.pt"
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        rewards.aesthetic(heads, laion)(frames, PROMPTS), mlp(laion, unit).mean(1), **close
    )
    size = mlp(compression, unit, torch.relu)
    torch.testing.assert_close(
        rewards.compression(compression, heads)(frames, PROMPTS), -size.mean(1), **close
    )
    for weather in (rewards.rainy, rewards.snowy):
        expected = mlp(laion, unit).sigmoid().mean(1)
        torch.testing.assert_close(weather(laion, heads)(frames, PROMPTS), expected, **close)


def test_vaders_mix_has_the_gradient_of_vaders_loss(frames):
    """VADER: (1.5 * 0.1 * |a - 10| + |1 - h|) / 2, to be minimized."""
    a, h = rewards.aesthetic("tiny"), rewards.hps("tiny")
    loss = (
        0.15 * (a.scores(frames, PROMPTS) - 10).abs() + (1 - h.scores(frames, PROMPTS)).abs()
    ) / 2
    torch.testing.assert_close(rewards.aesthetic_hps("tiny")(frames, PROMPTS), -loss.mean(1))


def test_a_head_of_another_layout_is_refused(heads, tmp_path):
    with pytest.raises(ValueError, match=r"not this head.*\(512, 768\)"):
        rewards.rainy(heads / "compression.pt", heads)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        rewards.compression(tmp_path / "nowhere.pt", heads)


# --------------------------------------------------------------------------- what holds for all of them


@pytest.fixture(scope="module")
def build(hps_file, clip_folder, heads):
    """A fresh reward of a name: half precision would round the weights of a shared one for good."""
    builders = {
        "hps": lambda: rewards.hps(hps_file, verify=False),
        "pickscore": lambda: rewards.pickscore(clip_folder),
        "clip_score": lambda: rewards.clip_score(clip_folder),
        "aesthetic": lambda: rewards.aesthetic(heads, heads / "laion.pth"),
        "compression": lambda: rewards.compression(heads / "compression.pt", heads),
        "rainy": lambda: rewards.rainy(heads / "laion.pth", heads),
    }
    return lambda name: builders[name]()


NAMES = ["hps", "pickscore", "clip_score", "aesthetic", "compression", "rainy"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(build, name, frames):
    square = frames[0, ..., :20].double() * 0.9 + 0.05  # some crop, and a margin has no slope
    assert_slopes(build(name).to(torch.float64), square, PROMPTS[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_scores_as_its_clips_do(build, name, frames):
    reward = build(name)
    together = reward(frames, PROMPTS)
    alone = torch.cat([reward(frames[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hps", "pickscore", "clip_score"])
def test_each_clip_is_judged_by_its_own_prompt(build, name, frames):
    """Not by the first of the batch, as in VADER's PickScore: changing prompt 1 changes score 1 alone."""
    reward = build(name)
    before, after = (
        reward(frames, [PROMPTS[0], second, PROMPTS[2]]) for second in ("snow", "a whale")
    )
    assert (before - after).abs()[1] > 1e-4
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_within_two_percent(build, name, frames):
    reward = build(name)
    exact = reward(frames, PROMPTS)
    half = reward.to(torch.bfloat16)(frames, PROMPTS)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() <= 0.02 * exact.abs().max()


def test_the_temperature_is_not_rounded_with_the_weights(build, clip_folder):
    """In bfloat16 exp(4.6052) would be 98.9, a per cent off every score."""
    exact = build("pickscore").clip.temperature()
    assert exact.item() == pytest.approx(100, abs=0.01)
    for reward in (
        build("pickscore").to(torch.bfloat16),
        rewards.pickscore(clip_folder, dtype=torch.bfloat16),
    ):
        assert reward.clip.dtype == torch.bfloat16
        assert reward.clip.temperature() == exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_frames_in_half_precision_are_widened(build, name, frames, dtype):
    reward, leaf = build(name), frames.to(dtype).requires_grad_()
    torch.testing.assert_close(reward(leaf, PROMPTS), reward(frames.to(dtype).float(), PROMPTS))
    reward(leaf, PROMPTS).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_climbing_on_the_pixels_raises_it_within_20_steps(build, name, frames):
    before, after = ascend(build(name), frames, PROMPTS)
    assert (after > before).all()


@pytest.mark.parametrize("count", [1, 16])
def test_any_number_of_frames(build, count):
    clip = torch.rand(1, count, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    reward = build("hps")
    scores = reward.scores(clip, PROMPTS[:1])
    assert scores.shape == (1, count)
    last = reward(clip[:, -1:], PROMPTS[:1])
    torch.testing.assert_close(scores[:, -1], last, rtol=1e-5, atol=1e-6)


def test_16_frames_in_chunks_of_4_need_the_memory_of_4():
    """The bytes that live at the worst moment of scoring and backward, less the frames and their gradient."""
    config = {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8}
    model = open_clip.CLIP(64, config, {"width": 64, "heads": 2, "layers": 1})
    reward = towers.PromptSimilarity(
        towers.open_clip_towers(model, open_clip.get_tokenizer("ViT-B-32")), "hps"
    )
    peaks = {}
    for count in (4, 16):
        frames = torch.rand(1, count, 3, 64, 64, requires_grad=True)
        reward(frames, ["a cat"])  # the text's vector is kept
        with MemoryTracker() as peak:
            reward(frames, ["a cat"]).sum().backward()
        peaks[count] = peak.bytes - frames.grad.nbytes
    assert peaks[16] <= 1.15 * peaks[4]


def test_checkpointing_a_block_does_not_change_its_gradient():
    torch.manual_seed(0)
    block, x = (
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()),
        torch.randn(2, 4, requires_grad=True),
    )
    (plain,) = torch.autograd.grad(block(x).sum(), x)
    checkpoint_blocks([block])
    (again,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(plain, again)


def test_texts_are_remembered_until_the_network_moves(build, frames):
    reward = build("pickscore")
    reward(frames, ["a", "b", "a"])
    assert list(reward.clip.text_cache) == ["a", "b"]
    reward.to(torch.float64)
    assert not reward.clip.text_cache


def test_their_number_is_bounded(build, monkeypatch):
    monkeypatch.setattr(networks, "CACHED_PROMPTS", 3)
    clip = build("clip_score").clip
    clip.text(["a", "b", "c"])
    kept = clip.text(["a", "d"])
    assert list(clip.text_cache) == ["a", "d"]
    torch.testing.assert_close(kept, clip.text(["a", "d"]))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("hps", "xswu/HPSv2 HPS_v2.1_compressed.pt"),
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("clip_score", "openai/clip-vit-base-patch32"),
        ("aesthetic", "sac%2Blogos%2Bava1-l14-linearMSE.pth"),
        ("aesthetic_hps", "sac%2Blogos%2Bava1-l14-linearMSE.pth"),
        ("action", "MCG-NJU/videomae-base-finetuned-kinetics"),
    ],
)
def test_offline_each_says_what_is_missing_and_how_to_give_it(name, missing):
    with pytest.raises(
        FileNotFoundError, match="(?s)not on this machine.*with a copy:.*path/to"
    ) as error:
        getattr(rewards, name)()
    assert missing in str(error.value)
    assert ("('tiny')" in str(error.value)) == (name not in ("pickscore", "clip_score"))


def test_a_version_can_be_insisted_on(hps_file, monkeypatch):
    """Files of one version have been shared under the other's name."""
    monkeypatch.setattr(hub, "sha256", lambda path: SOURCES["hps-v2.0"].sha256)
    assert rewards.hps(hps_file, version="v2.0").name == "hps"
    with pytest.raises(ValueError, match="HPS_small.pt is HPS v2.0, not v2.1"):
        rewards.hps(hps_file, version="v2.1")


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "aesthetic"])
def test_an_unknown_checkpoint_is_named_with_the_known_ones(name, heads):
    with pytest.raises(
        ValueError, match="unknown checkpoint 'yolos-tiny': choose one of published"
    ):
        getattr(rewards, name)(
            "yolos-tiny", *([heads / "laion.pth"] if name == "aesthetic" else [])
        )
