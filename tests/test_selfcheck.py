"""The switches for speed change no gradient and no name, and go off again; the checklist sees what is broken."""

import functools
import warnings

import pytest
import torch
from torch import nn

from tests import selfcheck
from tests.test_gradient import PROMPTS, SEEDS, adapted, bright
from vader_nb import gradient, speed
from vader_nb.gradient import reward_gradient
from vader_nb.rewards import reward
from vader_nb.sampling import Sampling, roll_out
from vader_nb.strategies import Frames, Last, Step

# --------------------------------------------------------------------------------------- the switches


@pytest.fixture(scope="module")
def eager():
    """`compile` with everything but the code generator, which would take minutes; what one test compiles, the next uses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        speed.compiled_forward.cache_clear()
        yield
    speed.compiled_forward.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def few_blocks(micro):
    """The model, one block of each class: each is compiled for seconds."""
    blocks = list({type(block): block for block in micro.blocks()}.values())
    assert len(blocks) == 4
    micro.blocks = lambda: blocks
    return micro


def gradient_of(model, adapter, strategy=Last(2)):
    reward_gradient(
        model,
        adapter,
        reward(bright, per_frame=True),
        PROMPTS,
        seeds=SEEDS,
        strategy=strategy,
        gradient_checkpointing=True,
        frames=Frames.all(),
        generator=torch.Generator().manual_seed(0),
    )
    found = torch.cat([p.grad.flatten() for p in adapter.parameters()])
    for p in adapter.parameters():
        p.grad = None
    return found


def traces(model):
    """Whatever a switch may change: names, kinds, addresses and strides of a model, and torch's settings."""
    networks = {"denoiser": model.denoiser, "vae": model.vae}
    tensors = {
        (name, key): (x.data_ptr(), x.stride())
        for name, net in networks.items()
        for key, x in net.state_dict().items()
    }
    kinds = [type(module) for net in networks.values() for module in net.modules()]
    own = [key for net in networks.values() for module in net.modules() for key in vars(module)]
    kernels = {
        name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in speed.KERNELS
    }
    return (
        tensors,
        kinds,
        own,
        kernels,
        torch.get_float32_matmul_precision(),
        torch._dynamo.config.cache_size_limit,
    )


@pytest.mark.parametrize(
    "name", ["channels_last", "sdpa_math", "compile", "channels_last,sdpa_math"]
)
def test_a_switch_changes_no_gradient_and_no_name_and_goes_off_again(few_blocks, eager, name):
    micro = few_blocks
    adapter = adapted(micro)
    expected, before = gradient_of(micro, adapter), traces(micro)
    names, adapter_names = list(micro.denoiser.state_dict()), list(adapter.state_dict())
    blocks = len(micro.blocks())
    with speed.apply(micro, name):
        assert traces(micro) != before
        assert list(micro.denoiser.state_dict()) == names
        assert list(adapter.state_dict()) == adapter_names
        assert len(micro.blocks()) == blocks
        for _ in range(2):  # what a step leaves behind must not disturb the next
            torch.testing.assert_close(gradient_of(micro, adapter), expected, rtol=1e-8, atol=1e-12)
    assert traces(micro) == before


def test_compiled_blocks_are_run_and_follow_the_adapter(few_blocks, eager):
    """Fused, frozen and disabled it acts on what was compiled already; and a second step compiles nothing more."""
    from torch._dynamo.utils import counters

    micro, adapter = few_blocks, adapted(few_blocks)
    expected = gradient_of(micro, adapter, Step(2))
    sampling = Sampling().resolve(micro)
    with adapter.disabled():
        base = roll_out(micro, PROMPTS, SEEDS, sampling).latents
    with speed.apply(micro, "compile"):
        counters.clear()
        found = gradient_of(micro, adapter, Step(2))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
        with adapter.disabled():
            found = roll_out(micro, PROMPTS, SEEDS, sampling).latents
        torch.testing.assert_close(found, base)
        made = counters["stats"]["unique_graphs"]
        gradient_of(micro, adapter, Step(2))
        assert counters["stats"]["unique_graphs"] == made > 0
        assert not counters["graph_break"]


def test_a_forward_of_an_instance_is_compiled_and_put_back(micro, monkeypatch):
    """As accelerate's hooks put one on: it was bypassed, and gone after gradient checkpointing."""
    block, calls = micro.blocks()[0], []

    def hooked(*args, **kwargs):
        calls.append(block)
        return type(block).forward(block, *args, **kwargs)

    block.forward = hooked
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    speed.compiled_forward.cache_clear()
    with speed.apply(micro, "compile"):
        gradient_of(micro, adapted(micro))
        assert calls
    speed.compiled_forward.cache_clear()
    assert block.forward is hooked


def test_an_adapter_may_come_and_go_on_compiled_blocks(few_blocks, eager):
    micro = few_blocks
    adapter = adapted(micro)
    expected = gradient_of(micro, adapter)
    adapter.remove()
    speed.apply(micro, "compile")
    for _ in range(2):
        adapter = adapted(micro)
        torch.testing.assert_close(gradient_of(micro, adapter), expected, rtol=1e-8, atol=1e-12)
        adapter.remove()


def test_channels_last_reaches_every_convolution_of_denoiser_and_decoder(micro):
    speed.apply(micro, "channels_last")
    convolutions = [
        m
        for net in (micro.denoiser, micro.vae.decoder)
        for m in net.modules()
        if type(m) in speed.LAYOUTS
    ]
    assert {type(m) for m in convolutions} == {nn.Conv2d, nn.Conv3d}
    assert all(m.weight.is_contiguous(memory_format=speed.LAYOUTS[type(m)]) for m in convolutions)


@pytest.mark.parametrize("name", ["tf32", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"])
def test_what_cannot_help_on_a_cpu_stays_off_and_says_why(micro, name):
    before = traces(micro)
    with pytest.warns(UserWarning, match=f"^{name} stays off: .*(CUDA|CPU)"):
        speed.apply(micro, name)
    assert traces(micro) == before


def test_unknown_switches_are_refused_before_any_is_turned_on(micro):
    before = traces(micro)
    with pytest.raises(
        ValueError, match=r"unknown switch 'turbo'; choose among tf32, channels_last, compile"
    ):
        speed.apply(micro, "channels_last, turbo")
    with pytest.raises(ValueError, match="one kernel, not sdpa_math and sdpa_flash"):
        speed.apply(micro, ["sdpa_math", "sdpa_flash"])
    assert traces(micro) == before


def test_no_switch_is_no_switch(micro):
    before = traces(micro)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speed.apply(micro, "")
        speed.apply(micro, [])
    assert traces(micro) == before


def test_everything_is_restored_after_an_error_too(micro):
    before = traces(micro)
    with pytest.raises(KeyError), speed.apply(micro, "channels_last,sdpa_math"):
        raise KeyError
    assert traces(micro) == before


# -------------------------------------------------------------------------------------- the checklist


def only(monkeypatch, **checks):
    monkeypatch.setattr(selfcheck, "CHECKS", {name: (check, 0) for name, check in checks.items()})


def table(text):
    """Rows of the second table as lists of cells."""
    lines = text.partition("verdict")[2].splitlines()[2:]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if line.startswith("|")
    ]


def test_the_gradient_check_passes_here(monkeypatch, capsys):
    only(monkeypatch, gradient=selfcheck.gradient)
    assert selfcheck.main(["--quick"]) == 0
    ((check, _, figure, limit, verdict),) = table(capsys.readouterr().out)
    assert (check, verdict) == ("gradient", "ok")
    assert float(figure) <= float(limit.removeprefix("<= "))


BREAKS = {
    "2 % too long": lambda rewards, slope: (rewards, 1.02 * slope),
    "one clip's missing": lambda rewards, slope: (
        rewards,
        slope * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1),
    ),
    "not a number": lambda rewards, slope: (rewards, slope + float("nan")),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_gradient_check_fails_when_the_gradient_is_broken(monkeypatch, capsys, broken):
    real = gradient.score
    monkeypatch.setattr(gradient, "score", lambda *args: BREAKS[broken](*real(*args)))
    only(monkeypatch, gradient=selfcheck.gradient)
    assert selfcheck.main([]) == 1
    assert table(capsys.readouterr().out)[0][-1] == "FAILED"


def test_the_resume_check_fails_when_the_optimizer_is_forgotten(monkeypatch, capsys):
    from vader_nb import checkpoints

    only(monkeypatch, resume=selfcheck.resume)
    assert selfcheck.main([]) == 0
    real = checkpoints.read

    def read(path):
        tensors, contents = real(path)
        contents["optimizer"]["state"] = {}
        return tensors, contents

    monkeypatch.setattr(checkpoints, "read", read)
    assert selfcheck.main([]) == 1


def test_the_memory_check_compares_the_peak_with_the_simulator(monkeypatch, capsys):
    only(monkeypatch, memory=selfcheck.peak_memory)
    assert selfcheck.main([]) == 0
    monkeypatch.setattr(selfcheck.Step, "simulate", lambda step: {"replay": 1})
    assert selfcheck.main([]) == 1


def test_a_check_that_crashes_leaves_the_others(monkeypatch, capsys):
    def crashes(options):
        yield selfcheck.Row("crashes", "before", verdict="ok")
        raise RuntimeError("out of | luck\nand a second line")

    def fine(options):
        yield selfcheck.at_most("fine", "nothing", 0.0, 1.0)

    only(monkeypatch, crashes=crashes, fine=fine)
    assert selfcheck.main([]) == 1
    printed = capsys.readouterr().out
    rows = table(printed)
    assert [row[0] for row in rows] == ["crashes", "crashes", "fine"]
    assert rows[1][1:] == [r"RuntimeError: out of \| luck", "", "", "FAILED"]
    assert rows[2][-1] == "ok"
    assert "1 check failed" in printed


def test_what_needs_a_gpu_is_not_run_and_never_ok(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    needy = {name: (check, gpus) for name, (check, gpus) in selfcheck.CHECKS.items() if gpus}
    assert set(needy) == {"half precision", "loss scaling", "two processes"}
    monkeypatch.setattr(selfcheck, "CHECKS", needy)
    assert selfcheck.main([]) == 0
    assert [row[-1] for row in table(capsys.readouterr().out)] == ["no GPU: not run"] * 3


def test_a_switch_that_crashes_or_bends_the_gradient_is_left_off_and_is_no_failure(
    monkeypatch, capsys
):
    def crash(model, undo):
        raise RuntimeError("no such kernel")

    def bend(model, undo):
        model.predict = lambda *args, real=model.predict: real(*args).flip(-1)
        undo.callback(delattr, model, "predict")

    def idle(model, undo):
        raise speed.Unavailable("not on this machine")

    made = {"crash": crash, "bend": bend, "math": speed.SWITCHES["sdpa_math"], "idle": idle}
    monkeypatch.setattr(speed, "SWITCHES", made)
    only(monkeypatch, speed=selfcheck.switches)
    assert selfcheck.main(["--quick"]) == 0
    rows = {row[0]: row for row in table(capsys.readouterr().out)}
    assert rows["speed: crash"][1:] == ["RuntimeError: no such kernel", "", "", "leave it off"]
    assert "cosine" in rows["speed: bend"][1]
    assert rows["speed: bend"][-1] == "leave it off"
    assert rows["speed: idle"][1:] == ["not on this machine", "", "", "off"]
    assert rows["speed: math"][-1] in ("use it", "leave it off")
    assert rows["speed: none"][2].startswith("1.00")


def test_nan_and_infinity_keep_no_limit():
    assert selfcheck.at_most("", "", float("nan"), 1.0).verdict == "FAILED"
    assert selfcheck.at_least("", "", float("nan"), 1.0).verdict == "FAILED"
    assert selfcheck.at_most("", "", float("inf"), 1.0).verdict == "FAILED"
