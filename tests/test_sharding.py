"""Frozen weights sharded over processes (two, on the CPU, over gloo): the same numbers, in less memory, on any number."""

import shutil

import pytest
import torch

from vader_nb import evaluate, load, lora
from vader_nb.distributed import launch
from vader_nb.gradient import reward_gradient
from vader_nb.memory_planner import Step, simulate
from vader_nb.offload import is_sharded
from vader_nb.rewards import brightness, reward
from vader_nb.sampling import Sampling
from vader_nb.sharding import shard
from vader_nb.strategies import DRaFTLV, Frames, Last
from vader_nb.testing import apart

from .test_parallel import (
    PROMPTS,
    assert_same,
    build,
    counted,
    every_scenario,
    left,
    rank,
    train,
)
from .test_wan import PROMPTS as WAN_PROMPTS
from .test_wan import SMALL, pipeline, transformer


def one_gradient(model, prompt, **options):
    """A gradient (N,) through an adapter that acts."""
    adapter, generator = lora.add(model, 2), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    options = {"strategy": Last(2), "frames": Frames.all()} | options
    reward_gradient(model, adapter, brightness(), [prompt], seeds=[rank()], **options)
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


def sharded_gradient(directory, folder):
    """The gradient with the frozen weights sharded over both processes, as `fsdp` does it, and with whole ones."""
    from accelerate import Accelerator

    results = {}
    for how in ("whole", "sharded"):
        model = build(directory)
        accelerator = Accelerator(cpu=True)
        if how == "sharded":
            shard(model)
            results["blocks"] = len(model.blocks())
            results["held"] = sum(p.to_local().numel() for p in model.denoiser.parameters())
        adapter = lora.add(model, 2)
        for p in adapter.parameters()[1::2]:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        options = {"strategy": Last(2), "frames": Frames.all(), "gradient_checkpointing": True}
        result = reward_gradient(
            model,
            adapter,
            brightness(),
            [PROMPTS[accelerator.process_index]],
            seeds=[accelerator.process_index],
            **options,
        )
        results[how] = {
            "rewards": result.rewards,
            "adapter": [p.grad for p in adapter.parameters()],
        }
    torch.save(results, f"{folder}-{rank()}.pt")


def test_a_sharded_denoiser_gives_the_same_gradient(two, micro_directory):
    total = sum(p.numel() for p in build(micro_directory).denoiser.parameters())
    held = [left(two / "sharded", process)["held"] for process in (0, 1)]
    assert left(two / "sharded")["blocks"] == len(
        build(micro_directory).blocks()
    )  # they can still be checkpointed
    assert sum(held) == total and max(held) <= total / 2 + 100
    for process in (0, 1):
        got = left(two / "sharded", process)
        assert_same(got["whole"], got["sharded"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            got["whole"]["rewards"], got["sharded"]["rewards"], rtol=1e-9, atol=0
        )


def evaluated(directory, folder):
    """Three batches for two processes, with the weights sharded and with whole ones."""
    from accelerate import Accelerator

    rows = {}
    for how in ("whole", "sharded"):
        model, _ = build(directory), Accelerator(cpu=True)
        if how == "sharded":
            shard(model)
        options = {"seeds_per_prompt": 1, "batch_size": 1, "progress": False}
        found = evaluate(model, None, brightness(), {"all": PROMPTS}, **options)
        rows[how] = {row.metric: row.base for row in found.rows}
    torch.save(rows, f"{folder}-{rank()}.pt")


def test_a_sharded_denoiser_is_evaluated_on_any_number_of_batches(two):
    first, second = left(two / "evaluated", 0), left(two / "evaluated", 1)
    assert first == second and set(first["whole"]) == {"brightness", "motion"}
    assert first["sharded"] == pytest.approx(first["whole"], rel=1e-6)


def moody_and_sharded(directory, folder):
    """In the second step one process sees a NaN, in the first noising of the first of its two micro-batches."""
    calls = []

    def scorer(frames, prompts):
        calls.append(1)
        value = frames.mean(dim=(1, 2, 3, 4))
        return value * float("nan") if len(calls) == 5 and rank() == 1 else value

    options = {"strategy": DRaFTLV(2), "gradient_accumulation_steps": 2, "batch_size": 1}
    train(directory, folder, options, scorer=reward(scorer, per_frame=True), sharded=True)


def test_a_number_that_is_not_finite_does_not_block_others_where_the_weights_are_sharded(two):
    first, second = left(two / "sharded nan", 0), left(two / "sharded nan", 1)
    assert_same(first, second)
    assert ["skipped" in row for row in first["metrics"]] == [False, True, False]


def test_where_the_weights_are_sharded_nothing_of_them_is_sent_back(two, micro_directory):
    model = build(micro_directory)
    weights = sum(p.nbytes for p in model.denoiser.parameters())
    size = sum(p.nbytes for p in lora.add(model, 2).parameters())
    for step in left(two / "counted", 0):
        given = {name: [] for name, _ in step}
        for name, count in step:
            given[name].append(count)
        assert size < sum(given.pop("c10d::allreduce_")) <= 1.1 * size
        assert all("gather" in name for name in given)
        # Its half, in each of two micro-batches: for three calls, and the last one again, forward and backward.
        assert sum(map(sum, given.values())) == pytest.approx(2 * 5 * weights / 2, rel=0.01)


def launched(directory, folder):
    """What `load` makes in the environment of `accelerate launch --config_file "$(vader-nb engine fsdp)"`."""
    found = {}
    for offload in ("false", "true"):
        settings = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": offload}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ({"ACCELERATE_USE_FSDP": "true"} | settings).items():
                patch.setenv(name, value)
            model = build(directory)
        whole = [part for part in model.modules() if not is_sharded(part)]
        found[offload] = {
            "held": sum(p.to_local().numel() for p in model.denoiser.parameters()),
            "whole": len(whole) == len(model.modules()) - 1,
            "gradient": one_gradient(model, PROMPTS[rank()]),
        }
    found["unsharded"] = one_gradient(build(directory), PROMPTS[rank()])
    torch.save(found, f"{folder}-{rank()}.pt")


def test_a_model_is_loaded_in_parts_where_fsdp_was_launched(two, micro_directory):
    total = sum(p.numel() for p in build(micro_directory).denoiser.parameters())
    for process in (0, 1):
        found = left(two / "launched", process)
        for offload in ("false", "true"):
            assert found[offload]["held"] <= total / 2 + 100 and found[offload]["whole"]
            torch.testing.assert_close(
                found[offload]["gradient"], found["unsharded"], rtol=1e-9, atol=1e-12
            )


def late(directory, folder):
    model = build(directory)
    lora.add(model, 2)
    with pytest.raises(ValueError, match="carries an adapter: shard the model before it gets one"):
        shard(model)


def test_a_quantized_model_is_not_cut_up(micro_directory, monkeypatch):
    with pytest.raises(ValueError, match="quantize=4bit is of no use with FSDP"):
        simulate(str(micro_directory), "brightness", **MEMORY | {"quantize": "4bit"})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="quantize=8bit is of no use with FSDP"):
        load(micro_directory, quantize="8bit")


MEMORY = {"num_frames": 4, "height": 32, "width": 32}
MEMORY |= {"num_inference_steps": 3, "dtype": torch.float32, "num_gpus": 2, "sharding": "full"}


def remembered(directory, folder):
    """The memory of a training step, counted in one of two real processes."""
    stages = Step.of(directory, "hps('tiny')", MEMORY).count()
    torch.save(stages, f"{folder}-{rank()}.pt")


def test_the_planner_knows_what_one_of_several_processes_holds(two, micro_directory):
    real, simulated = left(two / "memory"), simulate(str(micro_directory), "hps('tiny')", **MEMORY)
    assert simulated == pytest.approx(real, rel=0.1)
    alone = simulate(str(micro_directory), "hps('tiny')", **MEMORY | {"sharding": "none"})
    weights = sum(p.nbytes for p in load(micro_directory, check=False).denoiser.parameters())
    assert alone["weights"] - simulated["weights"] == pytest.approx(weights / 2, rel=0.01)


# ---------------------------------------------------------------------- Wan's experts, in bfloat16 and float64


def sharded_experts(directory, folder):
    """Gradients through both experts, whole and sharded: in bfloat16 some of a block's layers stay in float32."""
    # Of three steps, the first is the high-noise expert's.
    few = Sampling(**SMALL | {"num_inference_steps": 3})
    setup = {"sampling": few, "strategy": Last(3)}
    ways = {
        "whole": (torch.float64, None, {}),
        "sharded": (torch.float64, {}, {}),
        "offloaded": (torch.float64, {"cpu_offload": True}, {"activation_offload": True}),
        "half": (torch.bfloat16, None, {}),
        "sharded half": (torch.bfloat16, {}, {}),
    }
    found = {}
    for name, (dtype, sharding, options) in ways.items():
        model = load(folder, dtype=dtype)
        if sharding is not None:
            shard(model, **sharding)
            model.enable_model_cpu_offload()  # of the other networks
        found[name] = one_gradient(model, WAN_PROMPTS[rank()], **setup, **options)
        found[f"{name} dtypes"] = [str(p.dtype) for p in model.denoiser.parameters()]
    torch.save(found, f"{folder}-{rank()}.pt")


def test_both_experts_of_wan_are_sharded(two):
    for process in (0, 1):
        found = left(two / "experts", process)
        assert found["whole"].count_nonzero() == len(found["whole"])  # of both
        for name, other in (
            ("sharded", "whole"),
            ("offloaded", "whole"),
            ("sharded half", "half"),
        ):
            assert apart(found[name], found[other]) < 1e-9, name
        assert found["half"].dtype == torch.float32  # the adapter's
        assert set(found["sharded half dtypes"]) == {"torch.bfloat16", "torch.float32"}


# ------------------------------------------------------------------------- on another number of processes

EMBEDDED = ("tiny", "tiny-wan")
SHORT = {"steps": 2, "batch_size": 2, "checkpointing_steps": 1, "num_frames": 5}
SHORT |= {"frames": Frames.all(), "num_inference_steps": 2, "strategy": Last(2)}


def scored(name, folder, options=None, **more):
    """A short run, beside which each process leaves the rewards of the clips that it scored."""
    values = []

    def scorer(frames, prompts):
        values.append(frames.mean(dim=(1, 2, 3, 4)))
        return values[-1]

    train(name, folder, SHORT | (options or {}), scorer=reward(scorer), **more)
    torch.save(torch.cat(values).detach(), f"{folder}-scored-{rank()}.pt")


def again_from(folder, new):
    """A copy of a run, which goes on from its first step."""
    if rank() == 0:  # which alone looks there
        shutil.copytree(folder, new)
    return {"resume": new / "checkpoints" / "step-000001"}


def on_two(directory, folder, name, sharded):
    scored(name, folder, sharded=sharded)
    new = folder.with_name(f"{folder.name}-from-one")
    scored(name, new, again_from(folder.with_name(name), new), sharded=sharded)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_number_of_processes_changes_nothing(two, name, sharded):
    one, both = two / name, two / f"{name}-{sharded}"
    clips = [left(f"{both}-scored", process) for process in (0, 1)]
    assert [len(part) for part in clips] == [4, 4]  # each scores its own
    torch.testing.assert_close(
        torch.cat(clips).sort().values, left(f"{one}-scored").sort().values, rtol=1e-10, atol=0
    )
    new = two / f"{name}-{sharded}-from-two"
    with pytest.warns(UserWarning, match="the 4 clips of a step are divided differently"):
        scored(name, new, {"batch_size": 4} | again_from(both, new))
    for run in (both, two / f"{name}-{sharded}-from-one", new):
        assert_same(left(run), left(one), rtol=1e-10, atol=1e-10)


SCENARIOS = {
    "sharded": (sharded_gradient,),
    "evaluated": (evaluated,),
    "sharded nan": (moody_and_sharded,),
    "counted": (counted, True),
    "launched": (launched,),
    "memory": (remembered,),
    "late": (late,),
    "experts": (sharded_experts,),
}
for each in EMBEDDED:
    for whether in (False, True):
        SCENARIOS[f"{each}-{whether}"] = (on_two, each, whether)


@pytest.fixture(scope="module")
def two(micro_directory, tmp_path_factory):
    """The folder in which two processes, launched once, left the results of all scenarios."""
    folder = tmp_path_factory.mktemp("two")
    for name in EMBEDDED:
        scored(name, folder / name, {"batch_size": 4})
    experts = pipeline(transformer_2=transformer(4, seed=1), boundary_ratio=0.875)
    experts.save_pretrained(folder / "experts")
    launch(every_scenario, SCENARIOS, micro_directory, folder)
    return folder
