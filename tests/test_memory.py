"""The count of living bytes, where the right answer can be told with a pencil; the simulator against real runs."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vader_nb
from tests import simulations
from vader_nb import load, memory_planner, models
from vader_nb.memory_planner import (
    GIB,
    GPUS,
    MARGIN,
    STAGES,
    FakeMode,
    MemoryTracker,
    Step,
    find_gpu,
    is_per_frame,
    simulate,
)
from vader_nb.models import gallery
from vader_nb.offload import CPUOffloader
from vader_nb.strategies import DRaFTLV, Frames, Last

KB = torch.zeros(256).nbytes  # a tensor of 256 floats


def test_it_counts_what_lives_together():
    there_before = torch.zeros(256)
    with MemoryTracker() as peak:
        a = there_before + 1
        b = a + 1
        a.add_(1)  # in place: nothing new
        c = b.view(16, 16)  # a view: nothing new
        del a
        d = c * 2
    assert peak.bytes == 2 * KB  # a and b, then b and d
    assert d.shape == (16, 16)


def test_it_forgets_what_is_gone():
    with MemoryTracker() as peak:
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
        with MemoryTracker() as peak:
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

TINY = {"model": "tiny", "num_inference_steps": 3, "dtype": torch.float32}


@pytest.fixture(scope="module", autouse=True)
def simulated_once(request):
    """Simulations are kept between runs, see `simulations`."""
    kept = os.environ.get("VADER_NB_SIMULATIONS") or request.config.cache.mkdir("simulations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "simulate", simulations.cached(kept))
        yield


@pytest.fixture(scope="module")
def small(micro_directory):
    """A setting that takes a second."""
    return {
        "model": str(micro_directory),
        "reward": "hps('tiny')",
        "batch_size": 2,
        "num_frames": 4,
        "height": 32,
        "width": 32,
        "num_inference_steps": 3,
        "dtype": torch.float32,
    }


def step_of(model="modelscope", reward="hps", **settings) -> Step:
    return Step.of(model, reward, settings)


def assert_close(setting: dict) -> None:
    real, simulated = step_of(**setting).count(), simulate(**setting)
    for stage in STAGES:
        assert simulated[stage] == pytest.approx(real[stage], rel=0.1), stage
    # Nor do the weights, which are many and easy, hide what comes on top of them.
    beside = [max(stages.values()) - stages["weights"] for stages in (simulated, real)]
    assert beside[0] == pytest.approx(beside[1], rel=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"strategy": Last(2), "gradient_checkpointing": False},
        {"frames": Frames.all(), "decode_chunk_size": 4},
    ],
    ids=["K=1", "K=2, no block checkpointing", "all frames"],
)
def test_the_simulation_of_tiny_is_within_ten_per_cent_of_a_real_run(change):
    assert_close(TINY | change)


@pytest.mark.parametrize(
    "change",
    [
        {"sequential_guidance": True, "strategy": DRaFTLV(2)},
        {"reward": "action('tiny', 'growing') + colorfulness", "frames": Frames.all()},
        {"mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_and_so_it_is_with_other_settings(small, change):
    assert_close(small | change)


@pytest.mark.parametrize(
    ("change", "stage", "factor"),
    [
        ({"batch_size": 4}, "replay", (1.7, 2.1)),
        ({"gradient_checkpointing": False}, "replay", (2.0, 20.0)),
        ({"sequential_guidance": True}, "replay", (0.4, 0.75)),
        ({"activation_offload": True, "gradient_checkpointing": False}, "replay", (0.1, 0.9)),
        ({"frames": Frames.all(), "decode_chunk_size": 4}, "decode", (1.6, 2.1)),
    ],
    ids=str,
)
def test_it_moves_with_every_setting(small, change, stage, factor):
    """In the stage that the setting is about, what lives there beside the weights changes by a factor in this range."""
    # From two frames at once on: with one, the last call's graph stays beside the frame.
    pair = {"frames": Frames.all(), "decode_chunk_size": 2}
    base = small | pair if stage == "decode" else small
    before, after = (
        stages[stage] - stages["weights"]
        for stages in (simulate(**base), simulate(**(small | change)))
    )
    assert factor[0] < after / before < factor[1]


def test_the_last_calls_kept_graph_does_not_raise_the_peak(small, monkeypatch):
    """ModelScope's peak is that of the replay, with one frame decoded at a time."""
    from vader_nb import gradient, memory_planner

    peaks = []
    for kept in (gradient.kept_call, lambda *a, **k: None):
        monkeypatch.setattr(gradient, "kept_call", kept)
        monkeypatch.setattr(memory_planner, "_simulated", {})
        peaks.append(max(simulate(**small).values()))
    assert peaks[0] <= 1.001 * peaks[1]


def test_half_precision_halves_the_weights(small):
    full, half = (
        simulate(**(small | {"dtype": dtype}))["weights"] for dtype in (torch.float32, "float16")
    )
    assert 0.5 < half / full < 0.7  # the adapter and its moments stay in float32


def test_it_leaves_no_trace(small):
    """No fake tensors in what is kept between runs, no other default dtype."""
    simulations.simulate(step_of(**small))
    assert torch.get_default_dtype() == torch.float32
    assert type(torch.zeros(1) + 1) is torch.Tensor
    tiny = load("tiny")
    states = tiny.encode(["a red star"])["prompt"]["encoder_hidden_states"]
    assert type(states) is torch.Tensor


def test_a_process_that_simulates_ends_as_it_should():
    """Deep copies of fake tensors corrupt the heap, which shows when Python frees it at the end."""
    code = "import vader_nb; print(vader_nb.memory('tiny', num_inference_steps=1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tiny + hps, simulated" in done.stdout


def test_frames_are_by_default_those_that_training_would_take(small):
    """One random frame, or all for a reward on the whole clip."""
    for reward, frames in (("brightness", "random:1"), ("motion_smoothness", "all")):
        setting = small | {"reward": reward, "num_inference_steps": 1, "guidance_scale": 1}
        chosen = simulate(**(setting | {"frames": frames}))
        assert simulate(**setting) == pytest.approx(chosen, rel=0.01)


# --------------------------------------------------------------------------------- which networks are loaded


def test_the_offloader_moves_frozen_weights_and_keeps_trained_ones():
    network, other = torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2)
    other.bias.requires_grad_(False)
    trained, values = other.weight, network.weight.clone()
    offloader = CPUOffloader(torch.device("meta"), torch.device("cpu"))
    offloader.onload(network, other)
    assert offloader.loaded == [network, other]
    assert network.weight.device.type == other.bias.device.type == "meta"
    assert isinstance(network.weight, torch.nn.Parameter)
    assert other.weight is trained and trained.device.type == "cpu"
    offloader.onload(other)  # all there already
    assert offloader.loaded == [network, other]
    offloader.offload(network)
    assert offloader.loaded == [other]
    torch.testing.assert_close(network.weight, torch.nn.Parameter(values))


def test_a_network_that_was_offloaded_is_loaded_again_when_it_is_needed():
    """Offloaded by itself, it counted as loaded, and was missing where it had to work."""
    network = torch.nn.Linear(2, 2).requires_grad_(False)
    offloader = CPUOffloader(torch.device("meta"), torch.device("cpu"))
    offloader.onload(network)
    offloader.offload(network)
    assert network.weight.device.type == "cpu"
    offloader.onload(network)
    assert network.weight.device.type == "meta"


def whereabouts(setting: dict) -> dict[str, set[str]]:
    """Which networks are on the accelerator, weights and all, at each stage of a step that offloads models."""
    seen, step = {}, step_of(**setting)
    with FakeMode() as fake:
        fake.truth = False
        model, reward = models.from_config(step.model), step.make_reward(from_config=True)
        fake.truth = True
        model.offload_device = torch.device("meta")
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
        step.run(model, reward, MemoryTracker())
    return seen


@pytest.mark.parametrize("frames", [Frames.random(1), Frames.all()], ids=str)
def test_with_model_offload_only_those_at_work_are_on_the_accelerator(small, frames):
    assert whereabouts(small | {"frames": frames, "model_cpu_offload": True}) == {
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
    resident, offloaded = (
        simulate("modelscope", "hps", model_cpu_offload=flag) for flag in (False, True)
    )
    # 1411 M + 340 M + 84 M + 986 M weights of 2 bytes, and a little of an adapter
    weights = (1411.2 + 340.4 + 83.7 + 986.1) * 2e6
    assert resident["weights"] / GIB == pytest.approx(weights / GIB, rel=0.02)
    assert max(resident.values()) <= 8 * GIB
    assert max(offloaded.values()) <= 5 * GIB
    assert offloaded["text"] / GIB == pytest.approx(340.4 * 2e6 / GIB, rel=0.1)
    assert round(max(resident.values()) / GIB, 1) == gallery.CARDS["modelscope"].resident


def test_the_answer_is_a_table(small):
    answer = vader_nb.memory(**small)
    assert answer.bytes == max(answer.stages.values())
    assert answer.fits == dict.fromkeys(GPUS, True)
    for part in (*STAGES, *GPUS, "the peak", "fits", "1 GiB"):
        assert part in str(answer)
        assert part in answer._repr_html_()
    assert "<th" in answer._repr_html_() and "hps(&#39;tiny&#39;)" in answer._repr_html_()


def test_what_does_not_fit_is_told_what_to_change(small):
    """On a GPU that is just large enough once guidance is sequential, and not before."""
    setting = small | {"gradient_checkpointing": False}
    enough = {"sequential_guidance": True, "gradient_checkpointing": True}
    gib = max(simulate(**(setting | enough)).values()) / GIB + MARGIN
    answer = vader_nb.memory(**setting, gpu_memory=gib)
    gpu, _ = find_gpu(gib)
    assert not answer.fits[gpu]
    assert "too small: with" in str(answer)
    change = answer.suggestions[gpu]
    assert vader_nb.memory(**(setting | change), gpu_memory=gib).fits[gpu]
    for name in change:  # none of them is idle
        fewer = {key: value for key, value in change.items() if key != name}
        assert max(simulate(**(setting | fewer)).values()) / GIB + MARGIN > gib


def test_weights_are_cut_up_if_that_makes_it_fit(small):
    setting = small | {"sequential_guidance": True, "model_cpu_offload": True, "num_gpus": 8}
    gib = max(simulate(**setting, sharding="full").values()) / GIB + MARGIN
    answer = vader_nb.memory(**setting, gpu_memory=gib)
    assert answer.suggestions[find_gpu(gib)[0]] == {"sharding": "full"}


def test_a_reward_on_the_clip_is_not_offered_another_clip(small, monkeypatch):
    """Neither one random frame nor fewer frames; and frames that are named are not looked for where there are fewer."""
    tried = []

    def noted(model, reward, **settings):
        tried.append(settings)
        return simulate(model, reward, **settings)

    monkeypatch.setattr(memory_planner, "simulate", noted)
    monkeypatch.setattr(memory_planner, "SAVINGS", memory_planner.SAVINGS[-2:])
    setting = small | {"reward": "motion_smoothness", "frames": Frames.all(), "num_frames": 12}
    assert vader_nb.memory(**setting, gpu_memory=MARGIN).suggestions == {"1 GiB": None}
    assert {(s["frames"], s["num_frames"]) for s in tried} == {(Frames.all(), 12)}
    named = small | {"reward": "brightness", "frames": Frames.at(11), "num_frames": 12}
    assert vader_nb.memory(**named, gpu_memory=MARGIN).suggestions == {"1 GiB": None}
    assert not is_per_frame(small["model"], "motion_smoothness")
    assert is_per_frame(small["model"], "hps('tiny')")


def test_what_can_never_fit_is_told_so(small, monkeypatch):
    monkeypatch.setitem(GPUS, "T4", MARGIN)
    monkeypatch.setattr(memory_planner, "SAVINGS", ({"sequential_guidance": True},))
    answer = vader_nb.memory(**small, gpu_memory="T4")
    assert answer.suggestions == {"T4": None}
    assert "too small: no setting" in str(answer)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (24, ("24 GiB", 24.0)),
        ("24", ("24 GiB", 24.0)),
        (79.5, ("79.5 GiB", 79.5)),
        ("t4", ("T4", GPUS["T4"])),
        ("4090", ("RTX 4090", GPUS["RTX 4090"])),
        (4090, ("RTX 4090", GPUS["RTX 4090"])),
        ("a100 80gb", ("A100 80 GB", GPUS["A100 80 GB"])),
        ("H200", ("H200", GPUS["H200"])),
    ],
)
def test_a_gpu_is_named_or_a_number_of_gib(given, found):
    assert find_gpu(given) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "modelscop"}, "unknown model"),
        ({"model": "tiny", "reward": "hpss"}, "unknown reward"),
        ({"gpu_memory": "T5"}, "unknown GPU 'T5'; choose one of T4"),
        ({"gpu_memory": "A100"}, "'A100' may be A100 40 GB or A100 80 GB"),
        ({"gpu_memory": 0}, "unknown GPU 0; .* or give its memory in GiB"),
        ({"hight": 64}, "unknown setting 'hight'; memory depends on .*height"),
        ({"dtype": "float17"}, "unknown dtype 'float17'"),
        ({"num_gpus": 0}, "num_gpus must be at least 1, got 0"),
        (
            {"sharding": "full"},
            "sharding=full has no effect on one GPU: give their number, such as num_gpus=8",
        ),
        ({"num_gpus": 8, "sharding": "half"}, "unknown sharding 'half'; choose one of none, full"),
        ({"num_gpus": 8, "measured": True}, "measured works on one GPU only, and num_gpus=8"),
        ({"model": "tiny", "strategy": Last(100)}, "K=100"),
        (
            {"model": "tiny-i2v", "extend": 3},
            "extend=3: segments learn one after the other; plan for one",
        ),
    ],
)
def test_bad_questions(arguments, message):
    with pytest.raises(ValueError, match=message):
        vader_nb.memory(**arguments)


# ----------------------------------------------------------------------------------- simulations on disk


def test_what_is_kept_on_disk_is_simulated_again_when_anything_changes(
    small, monkeypatch, tmp_path
):
    key = simulations.key(step_of(**small))
    assert simulations.key(step_of(**small)) == key
    assert simulations.key(step_of(**(small | {"rank": 4}))) != key
    assert simulations.key(step_of(**(small | {"reward": "brightness"}))) != key
    assert simulations.key(step_of(**(small | {"model": "tiny"}))) != key
    shutil.copy(Path(small["model"]) / "model_index.json", tmp_path)
    assert simulations.key(step_of(**(small | {"model": str(tmp_path)}))) != key
    monkeypatch.setattr(simulations, "code_version", lambda: "another")
    assert simulations.key(step_of(**small)) != key
