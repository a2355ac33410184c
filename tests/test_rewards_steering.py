"""Rewards on detectors: parity with transformers' own scores on random YOLOS and Grounding DINO checkpoints."""

import math

import pytest
import torch
from torchvision.transforms.v2.functional import normalize, resize
from transformers import (
    AutoTokenizer,
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from tests.reward_contract import ascend, assert_slopes, tensor_shapes
from vader_nb import rewards
from vader_nb.memory_planner import MemoryTracker
from vader_nb.rewards import detection

LABELS = {0: "N/A", 1: "person", 2: "book", 3: "cat", 4: "traffic light"}
WORDS = {
    101: "[CLS]",
    102: "[SEP]",
    103: "[MASK]",
    100: "[UNK]",
    0: "[PAD]",
    1012: ".",
    1029: "?",
}  # as bert-base-uncased
WORDS |= {1040: "red", 1041: "book", 1042: "cat"}


def shaken(model, seed=0):
    """Random weights that make every part of a network matter (some start at zero, most too small to be seen)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim < 2:
                parameter.copy_(0.1 * noise)
            elif "embed" in name or "token" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    """A YOLOS directory. Its patches are as large as the pictures are high are few, which keeps it fast."""
    folder = tmp_path_factory.mktemp("yolos")
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=(256, 384),
        patch_size=64,
        num_detection_tokens=10,
        id2label=LABELS,
        label2id={name: i for i, name in LABELS.items()},
    )
    shaken(YolosForObjectDetection(config)).save_pretrained(folder)
    return folder


def grounding_dino(folder, num_queries):
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            patch_size=16,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=1100,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        **{"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_text_len": 16},
        **{
            f"{part}_{what}": 2
            for part in ("encoder", "decoder")
            for what in ("layers", "attention_heads")
        },
        num_queries=num_queries,
    )
    model = shaken(GroundingDinoForObjectDetection(config))
    with torch.no_grad():
        model.model.decoder.layer_norm.weight *= 0.1  # for logits about 1: nothing is sure
        model.model.decoder.layer_norm.bias *= 0.1
    (folder / "vocab.txt").write_text("\n".join(WORDS.get(i, f"[unused{i}]") for i in range(1100)))
    return model


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A Grounding DINO directory."""
    folder = tmp_path_factory.mktemp("dino")
    grounding_dino(folder, num_queries=20).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def even_dino(tmp_path_factory):
    """A Grounding DINO of which every gradient is the whole truth: it takes all 216 places of a picture of 512 by 320
    as queries, in an order that does not matter, and its boxes stay where they are."""
    folder = tmp_path_factory.mktemp("even-dino")
    model = grounding_dino(folder, num_queries=216)
    with torch.no_grad():
        model.model.query_position_embeddings.weight.zero_()
        for head in (
            model.model.encoder_output_bbox_embed,
            *model.bbox_embed,
            *model.model.decoder.bbox_embed,
        ):
            head.layers[-1].weight.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def frames():
    return torch.rand(3, 2, 3, 48, 80, generator=torch.Generator().manual_seed(0))


def pixels_of(frames, width):
    """What the detectors' processors make of the pictures, by torchvision."""
    pictures = resize(frames.flatten(0, 1), [512, width], antialias=True)
    return normalize(pictures, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def smooth_maximum(p):
    """The confidence of the docstring, from p (N, queries) rather than from log odds."""
    odds = ((p / (1 - p)) ** 4).sum(-1) ** 0.25
    return odds / (1 + odds)


# ------------------------------------------------------------------------------------------ parity


def test_yolos_p_is_what_its_own_post_processing_scores(yolos, frames):
    pixels = pixels_of(frames, 832)  # 853 in proportion, 13 whole patches of 64
    model = YolosForObjectDetection.from_pretrained(yolos, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = model(pixels)
        p = outputs.logits.softmax(-1)
        best = YolosImageProcessor().post_process_object_detection(outputs, threshold=0)
        labels, scores = (
            torch.stack([picture[key] for picture in best]) for key in ("labels", "scores")
        )
        for target, index in {"person": 1, "book": 2, "Cat": 3, " Traffic light. ": 4}.items():
            reward = rewards.object_presence(target, yolos)
            ours = reward.detector.log_odds(detection.scaled(frames.flatten(0, 1), 64)).sigmoid()
            torch.testing.assert_close(ours, p[..., index], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                ours[labels == index], scores[labels == index], rtol=1e-5, atol=1e-6
            )
            expected = smooth_maximum(p[..., index]).view(3, 2)
            torch.testing.assert_close(
                reward.scores(frames, [""] * 3), expected, rtol=1e-5, atol=1e-6
            )
    assert len(labels.unique()) > 1  # several of the targets are somewhere the best label


def test_grounding_dino_p_is_what_its_own_post_processing_scores(dino, frames):
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessor(), AutoTokenizer.from_pretrained(dino)
    )
    model = GroundingDinoForObjectDetection.from_pretrained(dino, dtype=torch.float32).eval()
    pixels = pixels_of(frames, 853)
    text = processor(text="book.", return_tensors="pt")
    assert text["input_ids"].tolist() == [[101, 1041, 1012, 102]]
    with torch.no_grad():
        outputs = model(pixels, **{name: ids.expand(6, -1) for name, ids in text.items()})
        outputs.logits[..., [0, 2, 3]] = -torch.inf  # of [CLS], of the full stop, and of [SEP]
        best = processor.post_process_grounded_object_detection(
            outputs, text["input_ids"].expand(6, -1), 0, 0
        )
        p = torch.stack([picture["scores"] for picture in best])
        assert p.shape == (6, 20)
        reward = rewards.object_presence("Book", dino)
        ours = reward.detector.log_odds(detection.scaled(frames.flatten(0, 1), 1)).sigmoid()
        torch.testing.assert_close(ours, p, rtol=1e-5, atol=1e-6)
        expected = smooth_maximum(p).view(3, 2)
        torch.testing.assert_close(reward.scores(frames, [""] * 3), expected, rtol=1e-5, atol=1e-6)


def test_all_words_of_a_phrase_count(dino, frames):
    model = GroundingDinoForObjectDetection.from_pretrained(dino, dtype=torch.float32).eval()
    pixels = pixels_of(frames, 853)
    with torch.no_grad():
        logits = model(pixels, torch.tensor([[101, 1040, 1041, 1012, 102]]).expand(6, -1)).logits
    expected = smooth_maximum(logits[..., 1:3].sigmoid().mean(-1)).view(3, 2)
    for phrase in ("red book", " Red book. "):
        ours = rewards.object_presence(phrase, dino).scores(frames, [""] * 3)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_sizes():
    for size, step, width in [
        ((320, 512), 16, 816),
        ((320, 512), 1, 819),
        ((512, 512), 16, 512),
        ((90, 1), 16, 16),
    ]:
        assert detection.scaled(torch.rand(1, 3, *size), step).shape == (1, 3, 512, width)
    picture = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (picture - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(detection.scaled(picture, 16), expected)


@torch.no_grad()
def test_the_published_sizes_have_the_blocks_that_are_checkpointed(dino):
    """On the meta device; the parameters are those of the published files (26 and 511 MB, 690 and 930 MB)."""
    coco = {"num_labels": 91}
    tiny = {
        "hidden_size": 192,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "use_mid_position_embeddings": False,
    }
    base = SwinConfig(
        image_size=384,
        window_size=12,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        out_indices=[2, 3, 4],
    )
    text = BertConfig()
    with torch.device("meta"):
        models = {
            6.5: YolosForObjectDetection(YolosConfig(image_size=[800, 1333], **tiny, **coco)),
            127.8: YolosForObjectDetection(YolosConfig(image_size=[800, 1344], **coco)),
            172.25: GroundingDinoForObjectDetection(GroundingDinoConfig(text_config=text)),
            232.3: GroundingDinoForObjectDetection(
                GroundingDinoConfig(backbone_config=base, text_config=text)
            ),
        }
        for millions, name in {6.5: "yolos-tiny", 127.8: "yolos-base"}.items():
            built = rewards.object_presence("book", name, from_config=True).detector.model
            assert tensor_shapes(built) == tensor_shapes(models[millions])
    for millions, model in models.items():
        assert sum(value.numel() for value in model.parameters()) / 1e6 == pytest.approx(
            millions, abs=0.05
        )
    tokenizer = AutoTokenizer.from_pretrained(dino)
    for millions, count in {6.5: 12, 127.8: 12}.items():
        models[millions].config.id2label = LABELS
        assert len(detection.Yolos(models[millions], "book").blocks) == count
    for millions, count in {172.25: 12 + 12, 232.3: 24 + 12}.items():
        assert len(detection.GroundingDino(models[millions], tokenizer, "book").blocks) == count


# -------------------------------------------------------------------------------- the smooth maximum


def test_a_background_stays_one_and_a_detection_is_its_p():
    for count, p, expected in [(100, 1e-4, 3e-4), (900, 0.01, 0.05), (1, 0.9, 0.9)]:
        odds = torch.full((count,), p, dtype=torch.float64).logit()
        assert detection.pooled(odds).sigmoid().item() == pytest.approx(expected, rel=0.06)
    odds = torch.full((100,), 1e-4, dtype=torch.float64).logit()
    odds[7] = math.log(9)
    assert detection.pooled(odds).sigmoid().item() == pytest.approx(0.9, abs=1e-6)


def test_every_query_has_a_gradient_and_two_sure_ones_do_not_hide_each_other():
    odds = torch.tensor([-9.0, -3.0, 0.5, 7.0, 7.0], dtype=torch.float64, requires_grad=True)
    confidence = detection.pooled(odds).sigmoid()
    confidence.backward()
    assert (odds.grad > 0).all()
    assert odds.grad.argsort().tolist()[:3] == [0, 1, 2]
    alone = torch.tensor(7.0, dtype=torch.float64).sigmoid()
    assert odds.grad[3] > 0.4 * alone * (1 - alone)
    # 1 - prod(1 - p) would leave (1 - alone) times less than this.
    assert (1 - alone) ** 2 < 1e-2 * odds.grad[3]


def test_presence_and_removal_are_exact_opposites_from_nothing_to_certainty(yolos, frames):
    removal, presence = (
        rewards.object_removal("book", yolos),
        rewards.object_presence("book", yolos),
    )
    for shift in (-30.0, 0.0, 30.0):
        for reward in (removal, presence):
            reward.detector.log_odds = lambda pixels, shift=shift: (
                torch.linspace(-1, 1, 10).repeat(len(pixels), 1) + shift
            )
        here, gone = presence(frames, [""] * 3), removal(frames, [""] * 3)
        torch.testing.assert_close(here + gone, torch.ones(3))
        assert (here > 0).all() and (gone > 0).all()  # neither is rounded to nothing


# --------------------------------------------------------------------------- gradients, batches, types


def test_yolos_gradient(yolos, frames):
    reward = rewards.object_removal("book", yolos, dtype=torch.float64)
    assert_slopes(reward, frames[0, :1].double(), "", rtol=1e-4, atol=1e-9)


@pytest.fixture
def float64():
    """Grounding DINO writes its logits into a tensor of torch's default type, whatever its weights are."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_grounding_dino_gradient(even_dino, float64):
    """Where the choice and the place of its queries, which its authors leave out of the gradient, do not matter."""
    picture = torch.rand(3, 80, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward = rewards.object_removal("red book", even_dino, dtype=torch.float64)
    assert_slopes(reward, picture[None], "", rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("target, detector", [("cat", "yolos"), ("red book", "dino")])
def test_climbing_removes_and_brings_the_object(target, detector, frames, request):
    folder = request.getfixturevalue(detector)
    for build in (rewards.object_removal, rewards.object_presence):
        before, after = ascend(build(target, folder), frames[:1, :1], [""])
        assert after > before + 0.01


@pytest.mark.parametrize("detector", ["yolos", "dino"])
def test_a_batch_is_scored_as_one_by_one(detector, frames, request):
    reward = rewards.object_removal("book", request.getfixturevalue(detector))
    together = reward.scores(frames, ["a", "b", "c"])
    apart = [
        [reward(frames[i : i + 1, j : j + 1], [""]).item() for j in range(2)] for i in range(3)
    ]
    torch.testing.assert_close(together, torch.tensor(apart), rtol=1e-5, atol=1e-6)
    assert together.flatten().unique().numel() == 6


@pytest.mark.parametrize("detector", ["yolos", "dino"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 320, 512), (1, 16, 3, 48, 80), (2, 1, 3, 600, 400)], ids=str
)
def test_any_size_and_number_of_frames(detector, shape, request):
    reward = rewards.object_removal("book", request.getfixturevalue(detector))
    frames = torch.rand(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = reward(frames, [""] * len(frames))
    value.sum().backward()
    assert value.shape == (len(frames),)
    assert ((value > 0) & (value < 1)).all()
    assert frames.grad.isfinite().all()
    assert (frames.grad != 0).float().mean() > 0.99  # every pixel is looked at, at the edges too


@pytest.mark.parametrize("detector", ["yolos", "dino"])
def test_half_precision(detector, frames, request):
    folder = request.getfixturevalue(detector)
    full = rewards.object_removal("book", folder)(frames, [""] * 3)
    half = rewards.object_removal("book", folder, dtype=torch.bfloat16)
    assert half.detector.model.dtype == torch.bfloat16
    torch.testing.assert_close(half(frames, [""] * 3), full, rtol=0.02, atol=0)
    moved = rewards.object_removal("book", folder).to(torch.bfloat16)
    assert torch.equal(moved(frames, [""] * 3), half(frames, [""] * 3))


def test_16_frames_need_the_memory_of_4(yolos):
    """The bytes that live at the worst moment of scoring and backward, less the frames and their gradient."""
    reward = rewards.object_removal("book", yolos)
    peaks = {}
    for count in (4, 16):
        frames = torch.rand(1, count, 3, 48, 80, requires_grad=True)
        with MemoryTracker() as peak:
            reward(frames, [""]).sum().backward()
        peaks[count] = peak.bytes - frames.grad.nbytes
    assert peaks[16] <= 1.15 * peaks[4]


# ------------------------------------------------------------------------------------------- errors


def test_unknown_names(yolos, dino, tmp_path):
    with pytest.raises(
        ValueError, match="'yolo-tiny': choose one of yolos-tiny, yolos-base, grounding-dino-tiny"
    ):
        rewards.object_removal("book", "yolo-tiny")
    with pytest.raises(ValueError, match="does not know 'bok'; the nearest of its labels are book"):
        rewards.object_removal("bok", yolos)
    with pytest.raises(ValueError, match="does not know 'n/a'"):
        rewards.object_presence("N/A", yolos)
    for detector in (yolos, dino):
        with pytest.raises(ValueError, match="must name an object"):
            rewards.object_removal(" . ", detector)
    for phrase in ("book. cat", "book?"):
        with pytest.raises(ValueError, match=f"one phrase.*not {phrase!r}".replace("?", "[?]")):
            rewards.object_removal(phrase, dino)
    with pytest.raises(ValueError, match="vocabulary .* no tokens for 'zebra'"):
        rewards.object_removal("zebra", dino)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        rewards.object_removal("book", tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert' model, not a yolos"):
        rewards.object_removal("book", tmp_path)


@pytest.mark.parametrize("detector", detection.DETECTORS)
def test_offline_says_how_to_get_the_weights(detector):
    with pytest.raises(FileNotFoundError) as caught:
        rewards.object_removal("book", detector)
    assert f"hf download {'hustvl' if 'yolos' in detector else 'IDEA-Research'}/{detector}" in str(
        caught.value
    )
    assert f"object_removal('book', detector='/path/to/{detector}')" in str(caught.value)
