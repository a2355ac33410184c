"""Rewards: parity with the libraries that define them, algebra, and what `check` finds."""

import io

import open_clip
import pytest
import torch
from PIL import Image
from transformers import VideoMAEForVideoClassification

from vader_nb import rewards
from vader_nb.rewards import check, parse, reward
from vader_nb.rewards.clip import TINY as TINY_CLIP
from vader_nb.rewards.networks import IMAGENET_MEAN, IMAGENET_STD, preprocess
from vader_nb.rewards.video_mae import TINY as TINY_VIDEOMAE
from vader_nb.zoo import world

SPECS = [
    world.Spec("red", "star", "moving left", "gray"),
    world.Spec("blue", "circle", "growing", "sand"),
    world.Spec("green", "square", "bouncing", "white"),
]
PROMPTS = [spec.caption for spec in SPECS]


@pytest.fixture(scope="module")
def frames():
    return world.render(SPECS, torch.Generator().manual_seed(0))


def test_hps_is_open_clips_cosine(frames):
    model = open_clip.create_model(f"local-dir:{TINY_CLIP}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TINY_CLIP}")
    mean, std = (
        torch.tensor(open_clip.OPENAI_DATASET_MEAN),
        torch.tensor(open_clip.OPENAI_DATASET_STD),
    )
    with torch.no_grad():
        images = model.encode_image(
            (frames.flatten(0, 1) - mean[:, None, None]) / std[:, None, None], normalize=True
        )
        texts = model.encode_text(tokenizer(PROMPTS), normalize=True)
    expected = (images.unflatten(0, (3, 8)) * texts[:, None]).sum(-1).mean(1)
    torch.testing.assert_close(rewards.hps("tiny")(frames, PROMPTS), expected, rtol=1e-5, atol=1e-6)


def test_hps_judges_each_clip_by_its_own_prompt(frames):
    hps = rewards.hps("tiny")
    right, wrong = hps(frames, PROMPTS), hps(frames, PROMPTS[1:] + PROMPTS[:1])
    assert (right > wrong + 0.05).all()


def test_aesthetic_is_the_linear_head_on_the_unit_embedding(frames):
    from safetensors.torch import load_file

    score = rewards.aesthetic("tiny")
    head = {
        name: value.float()
        for name, value in load_file(TINY_CLIP / "aesthetic_head.safetensors").items()
    }
    expected = score.clip.image(frames) @ head["layers.0.weight"][0] + head["layers.0.bias"]
    torch.testing.assert_close(score(frames, PROMPTS), expected.mean(1))
    assert ((expected > 0) & (expected < 11)).all()


def test_a_stack_of_linear_layers_in_laions_layout_is_one_affine_map(frames):
    from vader_nb.rewards.clip import open_clip_directory
    from vader_nb.rewards.heads import HeadReward

    generator = torch.Generator().manual_seed(0)
    sizes, head = (64, 32, 16, 1), {}
    for number, (inside, outside) in zip(
        (0, 2, 4), zip(sizes, sizes[1:])
    ):  # gaps in the numbers, as in LAION's file
        head[f"layers.{number}.weight"] = (
            torch.randn(outside, inside, generator=generator) / inside**0.5
        )
        head[f"layers.{number}.bias"] = torch.randn(outside, generator=generator)
    score = HeadReward(
        open_clip_directory(TINY_CLIP, torch.float32), head, "aesthetic", (1.0, 10.0)
    )
    weight = head["layers.4.weight"] @ head["layers.2.weight"] @ head["layers.0.weight"]
    bias = (
        head["layers.4.weight"]
        @ (head["layers.2.weight"] @ head["layers.0.bias"] + head["layers.2.bias"])
        + head["layers.4.bias"]
    )
    expected = (score.clip.image(frames) @ weight.T + bias).squeeze(-1).mean(1)
    torch.testing.assert_close(score(frames, PROMPTS), expected, rtol=1e-4, atol=1e-5)


def test_aesthetic_follows_what_it_states():
    """On frames of held-out captions, as they are and paler, fainter, off center: a linear probe follows the
    stated criterion closely, not perfectly."""
    from vader_nb.zoo.scripts.train_clip import beauty, vary

    generator = torch.Generator().manual_seed(6)
    plain = world.render(world.split()[1][:120], generator)[:, 3]
    shown = torch.cat([plain, vary(plain, generator)])
    rated = rewards.aesthetic("tiny")(shown.unsqueeze(1), [""] * len(shown))
    assert torch.corrcoef(torch.stack([rated, beauty(shown)]))[0, 1] > 0.7


def test_action_is_transformers_own_log_softmax(frames):
    model = VideoMAEForVideoClassification.from_pretrained(
        TINY_VIDEOMAE, dtype=torch.float32
    ).eval()
    pixels = preprocess(frames.flatten(0, 1), 64, IMAGENET_MEAN, IMAGENET_STD).unflatten(0, (3, 8))
    with torch.no_grad():
        logits = model(pixels).logits
    wanted = [model.config.label2id[spec.motion] for spec in SPECS]
    expected = logits.log_softmax(-1)[torch.arange(3), wanted]
    torch.testing.assert_close(rewards.action("tiny")(frames, PROMPTS), expected)


def test_action_labels(frames):
    action = rewards.action("tiny")
    assert action.index("a red star Moving  Left on a white background") == world.MOTIONS.index(
        "moving left"
    )
    with pytest.raises(ValueError, match="the nearest are .*bouncing"):
        action.index("a cat bounces")
    with pytest.raises(ValueError, match="no action"):
        rewards.action("tiny", label="skiing")
    fixed = rewards.action("tiny", label="growing")(frames, PROMPTS)
    assert fixed.argmax() == 1
    with pytest.raises(ValueError, match="at least 2 frames"):
        action(frames[:, :1], PROMPTS)


@pytest.mark.parametrize("name", ["hps", "aesthetic", "action"])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (320, 512)])
def test_networks_take_any_size_and_pass_gradients(frames, name, size):
    sized = (
        torch.nn.functional.interpolate(frames[:1].flatten(0, 1), size)
        .unflatten(0, (1, 8))
        .requires_grad_()
    )
    value = getattr(rewards, name)("tiny")(sized, PROMPTS[:1])
    value.sum().backward()
    assert value.shape == (1,)
    assert sized.grad.isfinite().all()
    assert (sized.grad != 0).any()


def test_preprocess_squashes_like_torchvision():
    from torchvision.transforms.v2.functional import normalize, resize

    picture = torch.rand(2, 3, 90, 160, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = normalize(resize(picture, [64, 64], antialias=True), mean, std)
    torch.testing.assert_close(preprocess(picture, 64, mean, std), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ without weights


def test_closed_forms():
    flat = torch.full((2, 3, 3, 8, 8), 0.25)
    assert rewards.brightness()(flat, ["", ""]).tolist() == pytest.approx([0.25, 0.25])
    assert rewards.colorfulness()(flat, ["", ""]).max() < 1e-3
    red = flat.clone()
    red[:, :, 0] = 1.0
    # rg = 0.75, yb = (1 + .25) / 2 - .25 = 0.375, no spread: 0.3 * sqrt(0.75^2 + 0.375^2)
    assert rewards.colorfulness()(red, ["", ""])[0].item() == pytest.approx(
        0.3 * (0.75**2 + 0.375**2) ** 0.5, abs=1e-3
    )


def test_motion_smoothness_prefers_steady_motion_to_jerks_and_to_standing_still():
    steady = torch.linspace(0.2, 0.6, 5)[None, :, None, None, None].expand(1, 5, 3, 8, 8)
    jerky = steady[:, [0, 2, 1, 4, 3]]
    still = steady[:, :1].expand(1, 5, 3, 8, 8)
    smooth = rewards.motion_smoothness()
    assert smooth(steady, [""]) > smooth(still, [""]) > smooth(jerky, [""])
    with pytest.raises(ValueError, match="at least 3 frames"):
        smooth(steady[:, :2], [""])


def jpeg_bits_per_pixel(frame, quality):
    buffer, pixels = io.BytesIO(), (frame.permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return 8 * len(buffer.getvalue()) / pixels.shape[0] / pixels.shape[1]


@pytest.mark.parametrize("quality", [40, 75, 90])
def test_compressibility_follows_real_jpeg_files(frames, quality):
    """Rank correlation with real byte counts over pictures from flat to noisy, of two sizes."""
    generator = torch.Generator().manual_seed(0)
    pictures = [frames[i % 3, i % 8] for i in range(24)]
    pictures = [
        (p + (i / 60) * torch.randn(p.shape, generator=generator)).clamp(0, 1) if i % 2 else p
        for i, p in enumerate(pictures)
    ]
    estimate = -torch.cat([rewards.compressibility(quality)(p[None, None], [""]) for p in pictures])
    real = torch.tensor([jpeg_bits_per_pixel(p, quality) for p in pictures])

    def ranks(x):
        return x.argsort().argsort().double()

    assert torch.corrcoef(torch.stack([ranks(estimate), ranks(real)]))[0, 1] > 0.9


def test_incompressibility_is_the_opposite(frames):
    assert torch.equal(
        rewards.incompressibility()(frames, PROMPTS), -rewards.compressibility()(frames, PROMPTS)
    )
    with pytest.raises(ValueError, match="quality"):
        rewards.compressibility(0)


@pytest.mark.parametrize(
    "name", ["brightness", "colorfulness", "compressibility", "motion_smoothness"]
)
def test_gradients_of_formulas(name):
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(
        1, 3, 3, 9, 11, generator=generator, dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(
        lambda x: getattr(rewards, name)()(x, [""]), picture, eps=1e-7, atol=1e-5
    )


# ------------------------------------------------------------------------------------------- algebra


def test_sums_scales_and_targets(frames):
    bright, color = rewards.brightness(), rewards.colorfulness()
    a, b = bright(frames, PROMPTS), color(frames, PROMPTS)
    mixed = 2 * bright + color * 0.5 - bright
    torch.testing.assert_close(mixed(frames, PROMPTS), 2 * a + 0.5 * b - a)
    torch.testing.assert_close((-bright)(frames, PROMPTS), -a)
    assert {part.name for part in mixed.parts()} == {"brightness", "colorfulness"}
    assert mixed.per_frame
    assert not (bright + rewards.motion_smoothness()).per_frame
    aimed = bright.towards(0.5)
    expected = -(frames.mean(dim=(2, 3, 4)) - 0.5).abs().mean(1)  # frame by frame, then the mean
    torch.testing.assert_close(aimed(frames, PROMPTS), expected)


def test_any_function_is_a_reward(frames):
    def darkness(frames, prompts):
        return 1 - frames.mean(dim=(1, 2, 3, 4))

    torch.testing.assert_close((rewards.brightness() + darkness)(frames, PROMPTS), torch.ones(3))
    assert reward(darkness).name == "darkness"
    with pytest.raises(TypeError, match="not str"):
        rewards.as_reward("hps")


def test_expressions():
    parsed = parse("hps + 0.1 * aesthetic().towards(9) - brightness", tiny=True)
    assert [part.name for part in parsed.parts()] == ["hps", "aesthetic", "brightness"]
    assert parse("compressibility(quality=50)").table[0, 0] == 16
    for bad in (
        "__import__('os').system('true')",
        "hps.clip",
        "nonsense",
        "hps +",
        "3",
        "(lambda: 1)()",
        "hps ** 2",
    ):
        with pytest.raises(ValueError, match="reward|read|number"):
            parse(bad)


# --------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize(
    "name",
    [
        "hps",
        "aesthetic",
        "action",
        "brightness",
        "colorfulness",
        "compressibility",
        "motion_smoothness",
    ],
)
def test_our_own_rewards_are_fit(name):
    report = check(parse(name, tiny=True))
    assert report.passed, report


@pytest.mark.parametrize(
    ("function", "finding"),
    [
        (lambda f, p: f.mean(), "one score per clip"),
        (lambda f, p: f.mean(dim=(1, 2, 3, 4)).detach(), "differentiable"),
        (lambda f, p: (f * 255).byte().float().mean(dim=(1, 2, 3, 4)), "differentiable"),
        (lambda f, p: f.mean(dim=(1, 2, 3, 4)) / 0, "finite"),
        (lambda f, p: f[:, :, :, :8, :8].mean(dim=(1, 2, 3, 4)), "gradient reaches pixels"),
        (lambda f, p: f.mean(dim=(1, 2, 3, 4)) - f.mean(), "batch equals one by one"),
        (lambda f, p: (f * torch.ones(64, 64)).mean(dim=(1, 2, 3, 4)), "takes 48 x 80 pixels"),
        (
            lambda f, p: f.mean(dim=(1, 2, 3, 4)) + 5 * f.detach().mean(dim=(1, 2, 3, 4)),
            "matches finite differences",
        ),
        (lambda f, p: 1 / 0, "runs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_finds(function, finding):
    report = check(function)
    assert not report.passed
    assert finding in {f.test for f in report.findings if not f.passed}, report
    assert finding in str(report)


# ------------------------------------------------------------------------- algebra, and users' own code


def frames_of(value=0.5):
    return torch.full((2, 3, 3, 8, 8), value)


@pytest.mark.parametrize(
    "text, value",
    [
        ("brightness + 1", 1.5),
        ("1 + brightness", 1.5),
        ("1 - brightness", 0.5),
        ("brightness - 2", -1.5),
        ("brightness / 4", 0.125),
        ("-brightness * 2", -1.0),
        ("(brightness + 1) / 3", 0.5),
    ],
)
def test_numbers_beside_rewards(text, value):
    for judge in (rewards.parse(text), eval(text, {"brightness": rewards.brightness()})):
        torch.testing.assert_close(judge(frames_of(), ["a", "b"]), torch.full((2,), value))


def test_the_sum_of_a_list():
    total = sum([rewards.brightness(), 2 * rewards.brightness()])
    torch.testing.assert_close(total(frames_of(), ["a", "b"]), torch.full((2,), 1.5))


@pytest.mark.parametrize(
    "text, message",
    [
        ("brightness * brightness", "a reward is multiplied by a number"),
        ("brightness + 'a'", "does arithmetic with a string"),
        ("-'a'", "does arithmetic with a string"),
        ("'a' * 99999999999999", "does arithmetic with a string"),
        ("brightness / 0", "divided by a number that is not zero"),
        ("1 / brightness", "unsupported operand"),
        ("brightness.capped('a')", "'a' is neither a reward nor a number"),
        ("9 ** 9", "cannot read"),
    ],
)
def test_expressions_that_mean_nothing_are_one_line(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        rewards.parse(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("per_frame", [True, False])
def test_a_function_may_work_in_place_and_spoils_nothing(per_frame):
    def spoiling(frames, prompts):
        frames.mul_(0.5)
        return frames.mean(dim=(1, 2, 3, 4))

    judge, frames = rewards.reward(spoiling, per_frame=per_frame), frames_of()
    for _ in range(2):
        torch.testing.assert_close(judge(frames, ["a", "b"]), torch.full((2,), 0.25))
    assert torch.equal(frames, frames_of())
    leaf = frames_of().requires_grad_()
    judge(leaf, ["a", "b"]).sum().backward()
    torch.testing.assert_close(leaf.grad.sum(), torch.tensor(1.0))


def test_a_class_that_works_in_place_is_told():
    class Spoiling(rewards.Reward):
        name = "spoiling"

        def scores(self, frames, prompts):
            return frames.sub_(0.5).mean(dim=(2, 3, 4))

    with pytest.raises(ValueError, match="'spoiling' changes its frames in place"):
        Spoiling()(frames_of(), ["a", "b"])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rewards.aesthetic("tiny", head="/etc/passwd"), "head='/etc/passwd' is not used"),
        (lambda: rewards.hps("tiny", version="9"), "version='9' is not used"),
    ],
)
def test_an_argument_that_would_be_ignored_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
