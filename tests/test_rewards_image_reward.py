"""ImageReward: a small state dict in the published layout, scored by ours and by a forward pass written from the
architecture's description. (By hand, once, it was compared with the authors' own code in full size.)"""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import center_crop, normalize, resize

from vader_nb import rewards
from vader_nb.memory_planner import MemoryTracker
from vader_nb.rewards import blip

from .reward_contract import ascend, assert_slopes, tensor_shapes

PROMPTS = ["a red star", "Two dogs, running", "snow"]
WORDS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 104: ","}
WORDS |= dict(enumerate(["a", "red", "star", "two", "dogs", "running", "snow"], start=110))
HEADS = 2  # of 64 numbers each
SMALL = {
    "width": 128,
    "patch": 16,
    "grid": 4,
    "blocks": 2,
    "text": 128,
    "layers": 2,
    "words": 202,
    "places": 40,
}
FULL = {
    "width": 1024,
    "patch": 16,
    "grid": 14,
    "blocks": 24,
    "text": 768,
    "layers": 12,
    "words": 30524,
    "places": 512,
}


def layout(width, patch, grid, blocks, text, layers, words, places):
    """The names and shapes of ImageReward.pt."""

    def linear(name, outside, inside):
        return {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}

    def norm(name, size):
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    vision, bert = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{vision}.cls_token": (1, 1, width),
        f"{vision}.pos_embed": (1, grid**2 + 1, width),
        f"{vision}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{vision}.patch_embed.proj.bias": (width,),
        f"{bert}.embeddings.position_ids": (1, places),
        f"{bert}.embeddings.word_embeddings.weight": (words, text),
        f"{bert}.embeddings.position_embeddings.weight": (places, text),
    }
    for block in (f"{vision}.blocks.{n}" for n in range(blocks)):
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(
            f"{block}.attn.proj", width, width
        )
        shapes |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(
            f"{block}.mlp.fc2", width, 4 * width
        )
    for layer in (f"{bert}.encoder.layer.{n}" for n in range(layers)):
        for attention, seen in (("attention", text), ("crossattention", width)):
            shapes |= linear(f"{layer}.{attention}.self.query", text, text)
            shapes |= linear(f"{layer}.{attention}.self.key", text, seen)
            shapes |= linear(f"{layer}.{attention}.self.value", text, seen)
            shapes |= linear(f"{layer}.{attention}.output.dense", text, text)
            shapes |= norm(f"{layer}.{attention}.output.LayerNorm", text)
        shapes |= linear(f"{layer}.intermediate.dense", 4 * text, text)
        shapes |= linear(f"{layer}.output.dense", text, 4 * text) | norm(
            f"{layer}.output.LayerNorm", text
        )
    shapes |= norm(f"{vision}.norm", width) | norm(f"{bert}.embeddings.LayerNorm", text)
    shapes |= linear("blip.vision_proj", 256, width) | linear("blip.text_proj", 256, text)
    for n, outside, inside in (
        (0, 1024, text),
        (2, 128, 1024),
        (4, 64, 128),
        (6, 16, 64),
        (7, 1, 16),
    ):
        shapes |= linear(f"mlp.layers.{n}", outside, inside)
    return shapes


def random_state():
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in layout(**SMALL).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            state[name] = 1 + 0.2 * noise
        elif noise.ndim < 2 or "embed" in name or "token" in name:
            state[name] = 0.3 * noise
        else:
            state[name] = noise * noise[0].numel() ** -0.5
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        state[f"blip.visual_encoder.{name}"] *= (
            0.2  # so small that the epsilon of the first norm matters
        )
    for attention in (
        "blip.text_encoder.encoder.layer.0.crossattention",
        "blip.text_encoder.encoder.layer.1.crossattention",
    ):
        state[f"{attention}.self.query.weight"] *= 3  # so that it matters where a word looks
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(SMALL["places"])[None]
    return state


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image-reward")
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text(
        "\n".join(WORDS.get(n, f"[unused{n}]") for n in range(SMALL["words"] - 2))
    )
    return folder


@pytest.fixture(scope="module")
def frames():
    return torch.rand(3, 2, 3, 48, 80, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- parity


def reference(state, pixels, ids, mask):
    """Raw scores (N,) of pixels (N, 3, 64, 64), ids and mask (N, 35): a pre-norm ViT; a post-norm BERT whose words
    look at each other, then at the picture; a head without activations."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(query, key, value, mask=None):
        query, key, value = (
            x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value)
        )
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    name = "blip.visual_encoder"
    patches = F.conv2d(
        pixels,
        state[f"{name}.patch_embed.proj.weight"],
        state[f"{name}.patch_embed.proj.bias"],
        stride=SMALL["patch"],
    )
    first = state[f"{name}.cls_token"].expand(len(pixels), -1, -1)
    x = torch.cat([first, patches.flatten(2).mT], dim=1) + state[f"{name}.pos_embed"]
    for block in (f"{name}.blocks.{n}" for n in range(SMALL["blocks"])):
        mixed = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6))
        x = x + linear(f"{block}.attn.proj", attend(*mixed.chunk(3, dim=-1)))
        hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(hidden))
    picture = norm(f"{name}.norm", x, 1e-6)

    name = "blip.text_encoder"
    places = state[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    words = state[f"{name}.embeddings.word_embeddings.weight"][ids] + places
    x = norm(f"{name}.embeddings.LayerNorm", words, 1e-12)
    for layer in (f"{name}.encoder.layer.{n}" for n in range(SMALL["layers"])):
        for kind, seen, hidden_words in (
            ("attention", None, mask),
            ("crossattention", picture, None),
        ):
            part = f"{layer}.{kind}"
            source = x if seen is None else seen
            query, key, value = (
                linear(f"{part}.self.{what}", of)
                for what, of in (("query", x), ("key", source), ("value", source))
            )
            mixed = linear(f"{part}.output.dense", attend(query, key, value, hidden_words))
            x = norm(f"{part}.output.LayerNorm", x + mixed, 1e-12)
        hidden = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", hidden), 1e-12)
    score = x[:, 0]
    for n in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{n}", score)
    return score[:, 0]


def tokens(prompts):
    """By hand: [CLS], the words, [SEP], padded to 35."""
    index = {word: n for n, word in WORDS.items()}
    rows = [
        [101, *(index[word] for word in prompt.lower().replace(",", " ,").split()), 102]
        for prompt in prompts
    ]
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    return ids, (torch.arange(35) < torch.tensor([[len(row)] for row in rows])).long()


def expected_scores(state, frames, prompts):
    """(B, F). Pictures of 48 by 80 become 64 by 106, then the center."""
    pictures = center_crop(
        resize(frames.flatten(0, 1), [64], interpolation=3, antialias=True), [64, 64]
    )
    pixels = normalize(
        pictures, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    )
    ids, mask = (value.repeat_interleave(frames.shape[1], dim=0) for value in tokens(prompts))
    with torch.no_grad():
        raw = reference(state, pixels, ids, mask)
    return ((raw - 0.16717362830052426) / 1.0333394966054072).view(frames.shape[:2])


def test_score_is_that_of_the_architecture(state, folder, frames):
    reward = rewards.image_reward(folder)
    expected = expected_scores(state, frames, PROMPTS)
    torch.testing.assert_close(reward.scores(frames, PROMPTS), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward(frames, PROMPTS), expected.mean(1), rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


def test_each_clip_is_judged_by_its_own_prompt(state, folder, frames):
    reward = rewards.image_reward(folder)
    same = frames[:1].expand(3, -1, -1, -1, -1)
    scores = reward(same, PROMPTS)
    torch.testing.assert_close(
        scores, expected_scores(state, same, PROMPTS).mean(1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(reward(same, PROMPTS[::-1]), scores.flip(0), rtol=1e-5, atol=1e-5)
    assert (scores[:, None] - scores).abs().add(torch.eye(3)).min() > 1e-3


@torch.no_grad()
def test_the_published_layout_in_full_size():
    """On the meta device: every one of its 625 tensors has its place in transformers' classes."""
    shapes = layout(**FULL)
    assert len(shapes) == 625
    with torch.device("meta"):
        published = {name: torch.empty(shape) for name, shape in shapes.items()}
        vision, text, head = blip.networks_of(published)
        built = rewards.image_reward(from_config=True)
    for network, other in zip(built.networks, (vision, text, head)):
        assert tensor_shapes(network) == tensor_shapes(other)
    assert built.vision.config.to_dict() == vision.config.to_dict()
    assert built.text.config.to_dict() == text.config.to_dict()
    assert sum(value.numel() for value in published.values()) == 446_666_465  # 1.79 GB in float32
    used = sum(value.numel() for network in (vision, text) for value in network.parameters())
    ignored = sum(published[name].numel() for name in blip.IGNORED)
    published_head = sum(
        value.numel() for name, value in published.items() if name.startswith("mlp.")
    )
    assert used == 446_666_465 - ignored - published_head
    assert (vision.config.num_attention_heads, vision.config.image_size) == (16, 224)
    assert (text.config.num_attention_heads, text.config.vocab_size) == (12, 30524)
    assert head.weight.shape == (1, 768)


def test_the_head_is_one_affine_map(state):
    layers = {
        name.removeprefix("mlp.layers."): value
        for name, value in state.items()
        if name.startswith("mlp.")
    }
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    expected = x
    for n in (0, 2, 4, 6, 7):
        expected = F.linear(expected, layers[f"{n}.weight"], layers[f"{n}.bias"])
    torch.testing.assert_close(blip.affine(layers)(x), expected, rtol=1e-4, atol=1e-5)


def test_words_after_35_tokens_are_not_read(folder, frames):
    reward = rewards.image_reward(folder)
    long = "red star " * 16 + "a"  # 33 words, with [CLS] and [SEP] 35
    same = frames[:1].expand(3, -1, -1, -1, -1)
    scores = reward(same, [long, long + " snow", long[:-1] + "snow"])
    assert scores[0] == scores[1] != scores[2]


# --------------------------------------------------------------------------- gradients, batches, types


def test_gradient(folder, frames):
    reward = rewards.image_reward(folder, dtype=torch.float64)
    assert_slopes(reward, frames[0, :1, :, :, 16:64].double(), "a red star", rtol=1e-4, atol=1e-8)


def test_climbing_raises_it(folder, frames):
    before, after = ascend(rewards.image_reward(folder), frames[:1, :1], PROMPTS[:1])
    assert after > before + 0.1


def test_a_batch_is_scored_as_one_by_one(folder, frames):
    reward = rewards.image_reward(folder)
    together = reward.scores(frames, PROMPTS)
    apart = [
        [reward(frames[i : i + 1, j : j + 1], PROMPTS[i : i + 1]).item() for j in range(2)]
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.tensor(apart), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 320, 512), (1, 16, 3, 48, 80), (2, 3, 3, 64, 64)], ids=str
)
def test_any_size_and_number_of_frames(folder, shape):
    frames = torch.rand(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = rewards.image_reward(folder)(frames, PROMPTS[: len(frames)])
    value.sum().backward()
    assert value.shape == (len(frames),)
    assert frames.grad.isfinite().all()
    seen = min(shape[-2:]) / max(shape[-2:])  # the center
    assert (frames.grad != 0).float().mean() > 0.95 * seen


def test_half_precision(folder, frames):
    full = rewards.image_reward(folder)(frames, PROMPTS)
    half = rewards.image_reward(folder, dtype=torch.bfloat16)
    assert {value.dtype for network in half.networks for value in network.parameters()} == {
        torch.bfloat16
    }
    # Of the unit, one standard deviation: a score may be near 0, where a ratio says nothing.
    torch.testing.assert_close(half(frames, PROMPTS), full, rtol=0, atol=0.02)
    moved = rewards.image_reward(folder)
    moved(frames, PROMPTS)
    assert torch.equal(moved.to(torch.bfloat16)(frames, PROMPTS), half(frames, PROMPTS))


def test_16_frames_need_the_memory_of_4(folder):
    """The bytes that live at the worst moment of scoring and backward, less the frames and their gradient."""
    reward = rewards.image_reward(folder)
    peaks = {}
    for count in (4, 16):
        frames = torch.rand(1, count, 3, 64, 64, requires_grad=True)
        with MemoryTracker() as peak:
            reward(frames, PROMPTS[:1]).sum().backward()
        peaks[count] = peak.bytes - frames.grad.nbytes
    assert peaks[16] <= 1.15 * peaks[4]


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: state | {"blip.text_decoder.bias": torch.zeros(1)},
            r"unknown blip\.text_decoder\.bias",
        ),
        (
            lambda state: state | {"blip.visual_encoder.head.bias": torch.zeros(1)},
            r"Unexpected key.*head\.bias",
        ),
        (
            lambda state: state | {"blip.text_encoder.pooler.bias": torch.zeros(1)},
            r"Unexpected key.*pooler\.bias",
        ),
        (
            lambda state: state | {"mlp.layers.8.bias": torch.zeros(1)},
            r"keys are not those .*8\.bias",
        ),
        (lambda state: without(state, "mlp.layers.4.weight"), r"no key that ends in '4\.weight'"),
        (
            lambda state: without(state, "blip.visual_encoder.pos_embed"),
            "no key that ends in 'pos_embed'",
        ),
        (
            lambda state: without(state, "blip.visual_encoder.blocks.1.attn.proj.bias"),
            r"Missing key.*projection\.bias",
        ),
        (
            lambda state: state | {"blip.visual_encoder.norm.bias": torch.zeros(3)},
            r"size mismatch.*post_layernorm\.bias",
        ),
        (lambda state: {"model": torch.zeros(1)}, "unknown model"),
    ],
)
def test_a_state_dict_of_another_layout(state, change, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        blip.networks_of(change(state))


def without(state, name):
    assert name in state
    return {key: value for key, value in state.items() if key != name}


def test_missing_files_and_a_wrong_vocabulary(folder, tmp_path):
    with pytest.raises(
        ValueError, match="'imagereward': choose one of published, image-reward, or give the path"
    ):
        rewards.image_reward("imagereward")
    with pytest.raises(FileNotFoundError, match=r"ImageReward\.pt is not a file"):
        rewards.image_reward(tmp_path)
    (tmp_path / "ImageReward.pt").symlink_to(folder / "ImageReward.pt")
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt is not a file"):
        rewards.image_reward(tmp_path)
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"])
    )
    with pytest.raises(ValueError, match=r"vocab\.txt makes 8 tokens, .*ImageReward\.pt has 202"):
        rewards.image_reward(tmp_path)


def test_offline_says_how_to_get_the_weights():
    with pytest.raises(FileNotFoundError, match=r"hf download THUDM/ImageReward ImageReward\.pt"):
        rewards.image_reward()
