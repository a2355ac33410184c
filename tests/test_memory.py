"""The count of living bytes, where the right answer can be told with a pencil; the simulator against real runs."""

import gc
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from vader_nb.memory import (
    GIB,
    GPUS,
    MARGIN,
    STAGES,
    Peak,
    Setting,
    Shapes,
    sees_frames,
    simulate,
    step,
)

import vader_nb
from vader_nb import load, models
from vader_nb.gradient import DRaFTLV, Frames, Last
from vader_nb.rewards import parse

KB = torch.zeros(256).nbytes  # a tensor of 256 floats


def test_it_counts_what_lives_together():
    there_before = torch.zeros(256)
    with Peak() as peak:
        a = there_before + 1
        b = a + 1
        a.add_(1)  # in place: nothing new
        c = b.view(16, 16)  # a view: nothing new
        del a
        d = c * 2
    assert peak.bytes == 2 * KB  # a and b, then b and d
    assert d.shape == (16, 16)


def test_it_forgets_what_is_gone():
    with Peak() as peak:
        for _ in range(10):
            torch.zeros(256) + 1
    gc.collect()
    assert peak.bytes == 2 * KB
    assert peak.live == 0


def test_it_sees_the_backward_pass_and_what_checkpointing_saves():
    """Ten layers x -> sin x keep ten inputs; checkpointed two by two, the ends of five pieces and one piece's inside."""
    peaks = {}
    for name in ("kept", "checkpointed"):
        x = torch.ones(256, requires_grad=True)
        with Peak() as peak:
            y = x
            for _ in range(5):
                twice = lambda z: z.sin().sin()  # noqa: E731
                y = (
                    checkpoint(twice, y, use_reentrant=False)
                    if name == "checkpointed"
                    else twice(y)
                )
            y.sum().backward()
        peaks[name] = peak.bytes
    assert peaks["kept"] >= 10 * KB
    assert peaks["checkpointed"] < peaks["kept"] - 2 * KB


# ------------------------------------------------------------------------------------- the simulator

TINY = Setting(model="tiny", reward="hps", num_inference_steps=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def small(micro_directory):
    """A setting that takes a second."""
    look = {
        "num_frames": 4,
        "height": 32,
        "width": 32,
        "num_inference_steps": 3,
        "dtype": torch.float32,
    }
    return Setting(str(micro_directory), "hps('tiny')", batch_size=2, **look)


def counted(setting: Setting) -> dict[str, int]:
    """The step with real numbers, every storage that lives counted; the weights, which are read, not computed, by
    hand."""
    with Peak() as peak:
        model = load(setting.model, device="cpu", dtype=setting.dtype)
        reward = parse(setting.reward, tiny=True)
        for network in [*model.modules(), *reward.networks]:
            for tensor in [*network.parameters(), *network.buffers()]:
                if tensor.untyped_storage()._cdata not in peak.known:
                    peak.born(tensor.untyped_storage())
        step(model, reward, setting, peak)
    return {stage: peak.stages[stage] for stage in STAGES}


def assert_close(setting: Setting) -> None:
    real, simulated = counted(setting), simulate(setting)
    for stage in STAGES:
        assert simulated[stage] == pytest.approx(real[stage], rel=0.1), stage
    # Nor do the weights, which are many and easy, hide what comes on top of them.
    beside = [max(stages.values()) - stages["weights"] for stages in (simulated, real)]
    assert beside[0] == pytest.approx(beside[1], rel=0.1)


@pytest.mark.parametrize(
    "change",
    [{}, {"strategy": Last(2), "checkpoint_blocks": False}, {"frames": Frames("all"), "chunk": 4}],
    ids=["K=1", "K=2, no block checkpointing", "all frames"],
)
def test_the_simulation_of_tiny_is_within_ten_per_cent_of_a_real_run(change):
    assert_close(replace(TINY, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"sequential_guidance": True, "strategy": DRaFTLV(2)},
        {"reward": "action('tiny', 'growing') + colorfulness", "frames": Frames("all")},
    ],
    ids=str,
)
def test_and_so_it_is_with_other_settings(small, change):
    assert_close(replace(small, **change))


@pytest.mark.parametrize(
    ("change", "stage", "factor"),
    [
        ({"batch_size": 4}, "replay", (1.7, 2.1)),
        ({"checkpoint_blocks": False}, "replay", (2.0, 20.0)),
        ({"sequential_guidance": True}, "replay", (0.4, 0.75)),
        ({"offload": True, "checkpoint_blocks": False}, "replay", (0.1, 0.9)),
        ({"frames": Frames("all"), "chunk": 4}, "decode", (2.5, 4.1)),
    ],
    ids=str,
)
def test_it_moves_with_every_setting(small, change, stage, factor):
    """In the stage that the setting is about, what lives there beside the weights changes by a factor in this range."""
    before, after = (
        stages[stage] - stages["weights"]
        for stages in (simulate(small), simulate(replace(small, **change)))
    )
    assert factor[0] < after / before < factor[1]


def test_half_precision_halves_the_weights(small):
    full, half = (
        simulate(replace(small, dtype=dtype))["weights"] for dtype in (torch.float32, torch.float16)
    )
    assert 0.5 < half / full < 0.7  # the adapter and its moments stay in float32


def test_it_leaves_no_trace(small):
    """No fake tensors in what is kept between runs, no other default dtype."""
    simulate(small)
    assert torch.get_default_dtype() == torch.float32
    assert type(torch.zeros(1) + 1) is torch.Tensor
    tiny = load("tiny")
    assert type(tiny.encode(["a red star"]).prompt) is torch.Tensor


# ----------------------------------------------------------------------------------- whose turn it is


def whereabouts(setting: Setting) -> dict[str, set[str]]:
    """Which networks are on the accelerator, weights and all, at each stage of a step that offloads models."""
    seen = {}
    with Shapes(allow_non_fake_inputs=True):
        model, reward = models.outline(setting.model), parse(setting.reward, outline=True)
        model.home = torch.device("meta")
        networks = {
            "text": model.text_encoder,
            "denoiser": model.denoiser,
            "encoder": model.vae.encoder,
            "decoder": model.vae.decoder,
            "reward": reward.networks[0],
        }

        def look(network, stage):
            def hook(module, args):
                devices = {
                    n: {p.device.type for p in m.parameters() if not p.requires_grad}
                    for n, m in networks.items()
                }
                assert all(len(found) == 1 for found in devices.values())  # none is torn in two
                here = {n for n, found in devices.items() if found == {"cpu"}}
                seen.setdefault(stage, set()).update(here)

            network.register_forward_pre_hook(hook)

        for name in ("text", "denoiser", "decoder"):
            look(networks[name], name)
        look(reward.networks[0].visual, "reward")
        step(model, reward, setting, Peak())
    return seen


@pytest.mark.parametrize("frames", [Frames(), Frames("all")], ids=str)
def test_with_model_offload_only_those_at_work_are_on_the_accelerator(small, frames):
    assert whereabouts(replace(small, frames=frames, model_cpu_offload=True)) == {
        "text": {"text"},
        "denoiser": {"denoiser"},
        "decoder": {"decoder", "reward"},
        "reward": {"decoder", "reward"},
    }


def test_without_it_all_of_them_are(small):
    everyone = {"text", "denoiser", "encoder", "decoder", "reward"}
    assert all(here == everyone for here in whereabouts(small).values())


# ----------------------------------------------------------------------------- the targets, the answer


def test_modelscope_with_hps_fits_where_it_should():
    """At 256 x 256, 16 frames, K = 1 (VADER reports 12.1 GB, and 20.4 GB beside in RAM)."""
    gib = 2**30
    resident, offloaded = (simulate(Setting(model_cpu_offload=flag)) for flag in (False, True))
    # 1411 M + 340 M + 84 M + 986 M weights of 2 bytes, and a little of an adapter
    assert resident["weights"] / gib == pytest.approx(
        (1411.2 + 340.4 + 83.7 + 986.1) * 2e6 / gib, rel=0.02
    )
    assert max(resident.values()) <= 8 * gib
    assert max(offloaded.values()) <= 5 * gib
    assert offloaded["text"] / gib == pytest.approx(340.4 * 2e6 / gib, rel=0.1)


def ask(setting: Setting, **options):
    return vader_nb.memory(**vars(setting), **options)


def test_the_answer_is_a_table(small):
    answer = ask(small)
    assert answer.bytes == max(answer.stages.values())
    assert answer.fits == dict.fromkeys(GPUS, True)
    for part in (*STAGES, *GPUS, "the peak", "fits", "1 GiB"):
        assert part in str(answer)
        assert part in answer._repr_html_()


def test_what_does_not_fit_is_told_what_to_change(small, monkeypatch):
    """On a GPU that is just large enough once guidance is sequential, and not before."""
    setting = replace(small, checkpoint_blocks=False)
    enough = {"sequential_guidance": True, "checkpoint_blocks": True}
    monkeypatch.setitem(
        GPUS, "T4", max(simulate(replace(setting, **enough)).values()) / GIB + MARGIN
    )
    answer = ask(setting, gpu="T4")
    assert not answer.fits["T4"]
    assert "too small: with" in str(answer)
    assert ask(replace(setting, **answer.remedies["T4"]), gpu="T4").fits["T4"]
    for name in answer.remedies["T4"]:  # none of them is idle
        fewer = {key: value for key, value in answer.remedies["T4"].items() if key != name}
        assert not ask(replace(setting, **fewer)).fits["T4"]


def test_a_reward_on_the_clip_is_not_offered_another_clip(small, monkeypatch):
    """Neither one random frame nor fewer frames; and frames that are named are not looked for where there are fewer."""
    module, tried = sys.modules[Setting.__module__], []
    monkeypatch.setattr(
        module, "simulate", lambda setting: tried.append(setting) or simulate(setting)
    )
    monkeypatch.setattr(module, "REMEDIES", module.REMEDIES[-2:])
    monkeypatch.setitem(GPUS, "T4", MARGIN)
    setting = replace(small, reward="motion_smoothness", frames=Frames("all"), num_frames=12)
    assert ask(setting, gpu="T4").remedies == {"T4": None}
    assert {(s.frames, s.num_frames) for s in tried} == {(Frames("all"), 12)}
    named = replace(small, reward="brightness", frames=Frames("list", indices=(11,)), num_frames=12)
    assert ask(named, gpu="T4").remedies == {"T4": None}
    assert not sees_frames(small.model, "motion_smoothness") and sees_frames(
        small.model, "hps('tiny')"
    )


def test_what_can_never_fit_is_told_so(small, monkeypatch):
    monkeypatch.setitem(GPUS, "T4", MARGIN)
    monkeypatch.setattr(
        sys.modules[Setting.__module__], "REMEDIES", ({"sequential_guidance": True},)
    )
    answer = ask(small, gpu="T4")
    assert answer.remedies == {"T4": None}
    assert "too small: no setting" in str(answer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "modelscop"}, "unknown model"),
        ({"model": "tiny", "reward": "hpss"}, "unknown reward"),
        ({"gpu": "T5"}, "unknown GPU 'T5'; choose one of T4"),
        ({"hight": 64}, "unknown setting 'hight'; memory depends on .*height"),
        ({"model": "tiny", "strategy": Last(100)}, "K=100"),
    ],
)
def test_bad_questions(arguments, message):
    with pytest.raises(ValueError, match=message):
        vader_nb.memory(**arguments)
