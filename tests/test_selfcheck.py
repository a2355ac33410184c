"""The switches for speed change no gradient and no name, and go off again; selfcheck sees what is broken."""

import functools
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.test_gradient import PROMPTS, SEEDS, adapted, bright
from vader_nb import checkpoints, cli, gradient, machine, selfcheck, speed
from vader_nb.gradient import reward_gradient
from vader_nb.models import FAMILIES
from vader_nb.models.modelscope import ModelScope
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


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(monkeypatch, capsys):
    """`vader-nb selfcheck …` in this process, of some checks: its exit code, its table, all that it printed."""

    def run(*words, small=None, **checks):
        words = [*words, *([f"model={small}", "reward=brightness"] if small else [])]
        if checks:
            kept = {name: (check, 0) for name, check in checks.items()}
            monkeypatch.setattr(selfcheck, "CHECKS", kept)
        code = 0
        try:
            cli.main(["selfcheck", *words])
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr().out
        return code, table(printed), printed

    return run


def table(text):
    """Rows of the second table as lists of cells."""
    lines = text.partition("seconds")[2].splitlines()[2:]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if line.startswith("|")
    ]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(scope="module")
def small(micro_directory, tmp_path_factory):
    """The micro model as if it was an embedded one, which a CPU may check."""
    folder = shutil.copytree(micro_directory, tmp_path_factory.mktemp("small") / "mine")
    (folder / "vader_nb.json").write_text(json.dumps({"defaults": {}, "world": "tiny"}))
    return folder


@pytest.mark.parametrize("name", ["tiny", "tiny-wan", "tiny-i2v"])
def test_the_embedded_models_pass_and_what_needs_a_gpu_says_so(run, no_gpu, name):
    code, rows, printed = run(f"model={name}")
    assert code == 0, printed
    verdicts = {}
    for check, *_, verdict, seconds in rows:
        verdicts.setdefault(check, []).append(verdict)
        assert float(seconds) >= 0
    assert verdicts == {
        "resume": ["ok"],
        "memory": ["ok"],
        "gradient, float32": ["ok"] * 4,
        "half precision": ["needs a GPU"],
        "two processes": ["needs 2 GPUs"],
    }
    told = dict(line.strip("| ").split(" | ") for line in printed.split("\n\n")[0].splitlines()[2:])
    assert told["model"] == name and re.fullmatch("digest [0-9a-f]{16}", told["revision"])
    assert told["torch"] == torch.__version__ and told["GPU"] == "none"
    assert str(Path.home()) not in printed and not re.search(r"(?<![\w:.])/\w", printed)


class Broken(ModelScope):
    """Its frames are right, and its gradient half of what it should be."""

    def decode(self, latents, frames=None):
        made = super().decode(latents, frames)
        return made.detach() + 0.5 * (made - made.detach())


def test_a_broken_model_fails_its_check_and_the_others_go_on(
    run, no_gpu, small, tmp_path, monkeypatch
):
    folder = shutil.copytree(small, tmp_path / "mine")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "Broken"}))
    monkeypatch.setitem(FAMILIES, "Broken", Broken)
    checks = {"gradient": selfcheck.gradient, "resume": selfcheck.resume}
    code, rows, printed = run(small=folder, **checks)
    assert code == 1
    found = {(check, measured): verdict for check, measured, *_, verdict, _ in rows}
    assert found == {
        ("gradient, float32", "with checkpointing against without"): "ok",
        ("gradient, float32", "gradient against a finite difference"): "FAILED",
        ("gradient, float32", "decode of some frames against all"): "ok",
        ("gradient, float32", "of the last step, against plain autograd"): "ok",
        ("resume", "1 step + 1 resumed against 2: largest difference"): "ok",
    }
    assert "1 failure;" in printed and "| model | mine |" in printed
    assert tmp_path.name not in printed


BREAKS = {
    "2% too long": lambda rewards, slope: (rewards, 1.02 * slope),
    "one column's missing": lambda rewards, slope: (
        rewards,
        slope * (slope.new_ones(1) - torch.eye(slope.shape[-1])[0]),
    ),
    "not a number": lambda rewards, slope: (rewards, slope + float("nan")),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_gradient_check_fails_when_the_gradient_is_broken(
    run, no_gpu, small, monkeypatch, broken
):
    real = gradient.score
    monkeypatch.setattr(gradient, "score", lambda *args: BREAKS[broken](*real(*args)))
    code, rows, _ = run(small=small, gradient=selfcheck.gradient)
    assert code == 1 and rows[-1][-2] == "FAILED"


def test_the_resume_check_fails_when_the_optimizer_is_forgotten(run, no_gpu, small, monkeypatch):
    real = checkpoints.read

    def read(path):
        tensors, contents = real(path)
        contents["optimizer"]["state"] = {}
        return tensors, contents

    monkeypatch.setattr(checkpoints, "read", read)
    code, ((*_, verdict, _),), _ = run(small=small, resume=selfcheck.resume)
    assert (code, verdict) == (1, "FAILED")


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_the_memory_check_fails_when_the_planner_is_wrong(run, no_gpu, small, monkeypatch, factor):
    simulate, sizes = selfcheck.Step.simulate, {}

    def counted(step):  # once: a second simulation may differ in a byte of garbage
        sizes.update(sizes or simulate(step))
        return sizes

    monkeypatch.setattr(selfcheck.Step, "count", counted)
    monkeypatch.setattr(
        selfcheck.Step,
        "simulate",
        lambda step: {stage: factor * size for stage, size in counted(step).items()},
    )
    code, ((_, _, figure, _, verdict, _),), _ = run(small=small, memory=selfcheck.peak_memory)
    assert (code, figure, verdict) == (1, f"{1 / factor:.3f}", "FAILED")


def test_both_half_precisions_are_tried_and_overflow_in_the_own_one_is_a_failure(
    run, no_gpu, small, monkeypatch
):
    """On the CPU, where float32 is the model's own, and which trains in bfloat16 alone."""
    monkeypatch.setattr(selfcheck, "HALF", {"bf16": torch.bfloat16})
    monkeypatch.setattr(selfcheck, "SCALED_STEPS", 2)
    code, rows, _ = run(small=small, gradient=selfcheck.gradient, half=selfcheck.half_precision)
    assert code == 0 and [row[-2] for row in rows] == ["ok"] * 6
    cosine = float(rows[-2][2].removeprefix("finite, cosine "))
    assert selfcheck.testing.HALF[torch.bfloat16] < cosine <= 1
    assert rows[-1][1:4] == ["bf16: finite training steps of 2", "2", ">= 1"]
    real = gradient.score
    monkeypatch.setattr(gradient, "score", lambda *args: BREAKS["not a number"](*real(*args)))
    _, ((_, measured, figure, _, verdict, _),), _ = run(small=small, half=selfcheck.half_precision)
    assert (figure, verdict) == ("not finite", "use torch.float32") and "bf16" in measured
    subject = selfcheck.Subject(str(small), "brightness")
    subject.dtype = torch.bfloat16
    assert [row.verdict for row in selfcheck.half_precision(subject)] == ["FAILED"]


def test_a_check_that_crashes_leaves_the_others_and_names_no_folder(run, no_gpu, small):
    def crashes(subject):
        yield selfcheck.Row("crashes", "before", verdict="ok")
        raise RuntimeError(
            f"out of | luck in {Path.home()}/secret/place/file.txt\nand a second line"
        )

    def fine(subject):
        yield selfcheck.at_most("fine", "nothing", 0.0, 1.0)

    code, rows, printed = run(small=small, crashes=crashes, fine=fine)
    assert code == 1
    assert [row[0] for row in rows] == ["crashes", "crashes", "fine"]
    assert rows[1][1:5] == [r"RuntimeError: out of \| luck in file.txt", "", "", "FAILED"]
    assert rows[2][-2] == "ok"
    assert "1 failure;" in printed


def test_a_mistake_is_an_error_before_any_check(run, no_gpu, capsys):
    for words, message in (
        (
            ["model=wan"],
            "model=wan needs a GPU, and there is none; on a CPU use tiny, tiny-wan, tiny-i2v",
        ),
        (["reward=beauty"], "unknown reward 'beauty'"),
        (["model=none"], "none"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["selfcheck", *words])
        told = capsys.readouterr()
        assert ended.value.code == 2 and message in told.err and not told.out


def test_the_report_names_nobody():
    home = Path.home()
    private = machine.private
    assert private(f"no file at {home}/wan/vae/config.json") == "no file at config.json"
    assert private("'/mnt/data/me/model' is not there") == "'model' is not there"
    assert private("see https://huggingface.co/a/b") == "see https://huggingface.co/a/b"
    assert private("3 / 4 of 1/2") == "3 / 4 of 1/2"


def test_a_published_checkpoint_is_named_by_its_commits(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert machine.revision("wan") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers unknown commit"
    place = tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers" / "refs"
    place.mkdir(parents=True)
    (place / "main").write_text("0fad780a")
    assert machine.revision("wan") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers 0fad780a"


def test_a_switch_that_crashes_or_bends_the_gradient_is_left_off_and_is_no_failure(
    run, no_gpu, small, monkeypatch
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
    code, found, _ = run("speed=true", small=small, none=lambda subject: [])
    assert code == 0
    rows = {row[0]: row for row in found}
    assert rows["speed: crash"][1:5] == ["no such kernel", "", "", "off"]
    assert "cosine" in rows["speed: bend"][1]
    assert rows["speed: idle"][1:5] == ["not on this machine", "", "", "off"]
    assert rows["speed: math"][-2] in ("use it", "leave it off")
    assert rows["speed: none"][2].startswith("1.00")


def test_nan_and_infinity_keep_no_limit():
    assert selfcheck.at_most("", "", float("nan"), 1.0).verdict == "FAILED"
    assert selfcheck.at_least("", "", float("nan"), 1.0).verdict == "FAILED"
    assert selfcheck.at_most("", "", float("inf"), 1.0).verdict == "FAILED"
