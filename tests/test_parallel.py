"""Several processes (two, on the CPU, over gloo) train the adapter that one would have trained."""

import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from vader_nb import distributed, evaluate, lora
from vader_nb.checkpoints import list_checkpoints
from vader_nb.distributed import checksum, launch, shard, sync_gradients
from vader_nb.gradient import reward_gradient
from vader_nb.rewards import brightness, reward
from vader_nb.strategies import DRaFTLV, Frames, Last, Random
from vader_nb.trainer import align

from .test_align import recorded, untimed

PROMPTS = ["a red star", "a blue circle", "a green square growing"]


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def build(directory):
    from vader_nb import load

    model = load(directory, dtype=torch.float64)
    model.defaults |= {
        "num_inference_steps": 3,
        "num_frames": 3,
        "height": 16,
        "width": 16,
        "guidance_scale": 2.0,
    }
    return model


def train(directory, folder, options, scorer=None, callback=None):
    """A run; each process leaves its adapter and metrics beside the folder."""
    options = {
        "steps": 3,
        "batch_size": 2,
        "rank": 2,
        "progress": False,
        "learning_rate": 1e-2,
    } | options
    run = align(
        build(directory),
        scorer or brightness(),
        PROMPTS,
        output_dir=folder,
        callback=callback,
        **options,
    )
    left = {
        "adapter": [p.detach() for p in run.adapter.parameters()],
        "metrics": run.metrics,
        "stopped": run.stopped,
    }
    torch.save(left, f"{folder}-{rank()}.pt")


def left(folder, process=0):
    return torch.load(f"{folder}-{process}.pt", weights_only=True)


def assert_same(a, b, **tolerance):
    for x, y in zip(a["adapter"], b["adapter"], strict=True):
        torch.testing.assert_close(x, y, **tolerance) if tolerance else torch.testing.assert_close(
            x, y, rtol=0, atol=0
        )


RANDOM = {"strategy": Random(2), "frames": Frames.random(1)}


def test_two_processes_are_one_with_twice_the_accumulation(two, micro_directory, tmp_path):
    """The same prompts, seeds, steps and frames, though steps and frames are drawn for each micro-batch."""
    train(micro_directory, tmp_path / "one", RANDOM | {"gradient_accumulation_steps": 2})
    both, one = two / "random", tmp_path / "one"
    assert_same(left(both, 0), left(both, 1))
    assert_same(left(both), left(one), rtol=1e-10, atol=1e-10)
    rewards = [[row["reward"] for row in left(run)["metrics"]] for run in (both, one)]
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-6)


def test_two_processes_are_one_with_twice_the_batch(two, micro_directory, tmp_path):
    train(micro_directory, tmp_path / "one", {"frames": Frames.all(), "batch_size": 4})
    assert_same(left(two / "batch"), left(tmp_path / "one"), rtol=1e-10, atol=1e-10)


def gradients_before_and_after(directory, folder):
    from accelerate import Accelerator

    model = build(directory)
    accelerator, adapter = Accelerator(cpu=True), lora.add(model, 2)
    reward_gradient(
        model, adapter, brightness(), [PROMPTS[rank()]], seeds=[rank()], frames=Frames.all()
    )
    before = [p.grad.clone() for p in adapter.parameters()]
    values = {"reward": float(rank())}
    synced = sync_gradients(adapter.parameters(), accelerator, values, False, rank() == 1)
    after = [p.grad for p in adapter.parameters()]
    torch.save({"before": before, "after": after, "synced": vars(synced)}, f"{folder}-{rank()}.pt")


def test_gradients_differ_before_they_are_averaged_and_agree_after(two):
    first, second = left(two / "averaged", 0), left(two / "averaged", 1)
    for a, b, x, y in zip(
        first["before"], second["before"], first["after"], second["after"], strict=True
    ):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, (a + b) / 2)
    assert any(not torch.equal(a, b) for a, b in zip(first["before"], second["before"]))
    # one of them wanted to stop: both are informed
    assert first["synced"] == second["synced"]
    assert first["synced"] == {"values": {"reward": 0.5}, "non_finite": False, "stop": True}


def drift(directory, folder):
    def nudge(row):
        if row["step"] == 2 and rank() == 1:
            with torch.no_grad():
                matrix = trained[0].parameters()[0]
                matrix[0, 0] = torch.nextafter(matrix[0, 0], matrix.new_tensor(9.0))

    trained, add = [], lora.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "add", lambda *a, **o: trained.append(add(*a, **o)) or trained[0])
        try:
            train(directory, folder, {"steps": 5}, callback=nudge)
        except RuntimeError as error:
            torch.save(str(error), f"{folder}-{rank()}.pt")


def test_a_process_that_drifts_by_one_bit_is_found(two):
    for process in (0, 1):
        assert left(two / "drift", process).startswith(
            "after step 3 the processes hold different adapters: ranks [1]"
        )


def test_the_checksum_sees_every_bit_and_the_order():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert checksum([a, b]) == checksum([a.clone(), b.clone()])
    changed = a.clone()
    changed[2, 3] = torch.nextafter(changed[2, 3], torch.tensor(9.0))
    assert checksum([a, b]) != checksum([changed, b])
    assert checksum([a, b]) != checksum([b, a])
    assert checksum([a]) != checksum([a.flip(0)])


def moody(directory, folder):
    calls = []

    def scorer(frames, prompts):
        calls.append(1)
        value = frames.mean(dim=(1, 2, 3, 4))
        return value * float("nan") if len(calls) == 2 and rank() == 1 else value

    train(directory, folder, {"steps": 4}, scorer=reward(scorer))


def test_a_number_that_is_not_finite_in_one_process_skips_the_step_in_all(two):
    first, second = left(two / "nan", 0), left(two / "nan", 1)
    assert_same(first, second)
    assert ["skipped" in row for row in first["metrics"]] == [False, True, False, False]
    assert "another process" in first["metrics"][1]["skipped"]


def interrupted(directory, folder, number):
    calls = []

    def scorer(frames, prompts):
        calls.append(1)
        if len(calls) == 3 and rank() == 1:
            os.kill(os.getpid(), number)
        return frames.mean(dim=(1, 2, 3, 4))

    train(directory, folder, {"steps": 6, "checkpointing_steps": 50}, scorer=reward(scorer))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_one_process_stops_all_at_the_same_step(two, name):
    first, second = left(two / name, 0), left(two / name, 1)
    assert (
        first["stopped"]
        and second["stopped"]
        and len(first["metrics"]) == len(second["metrics"]) == 2
    )
    assert list(list_checkpoints(two / name)) == [2]


def mortal(directory, folder, steps, victim):
    def perish(row):
        if row["step"] == 3 and rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    train(
        directory,
        folder,
        {"steps": steps, "checkpointing_steps": 2, "resume": "latest"},
        callback=perish,
    )


def test_a_run_whose_process_was_killed_goes_on_as_if_nothing_had_been(
    two, micro_directory, tmp_path
):
    whole = two / "whole"
    with pytest.raises(Exception, match="SIGKILL"):
        launch(mortal, micro_directory, tmp_path / "run", 5, 1)
    assert list(list_checkpoints(tmp_path / "run")) == [2]
    launch(mortal, micro_directory, tmp_path / "run", 5, None)
    for process in (0, 1):
        assert_same(left(tmp_path / "run", process), left(whole, process))
    assert untimed(recorded(tmp_path / "run")) == untimed(recorded(whole))
    # on one process, with the same number of clips a step: said to be equal in distribution only; here nearly equal
    with pytest.warns(UserWarning, match="the 4 clips of a step are divided in another way"):
        train(
            micro_directory,
            tmp_path / "run",
            {"steps": 6, "gradient_accumulation_steps": 2, "resume": True},
        )
    with pytest.raises(ValueError, match=r"a step had 4 clips .*, now 2"):
        train(micro_directory, tmp_path / "run", {"steps": 7, "resume": True})


def fsdp():
    """What `shard` asks of an accelerator. accelerate itself refuses FSDP without a GPU; torch does not."""
    os.environ.update(FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true")
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin())
    return SimpleNamespace(distributed_type="FSDP", state=state)


def sharded_gradient(directory, folder):
    """The gradient with the frozen weights sharded over both processes, as `fsdp` does it, and with whole ones."""
    from accelerate import Accelerator

    results = {}
    for how in ("whole", "sharded"):
        model = build(directory)
        accelerator = Accelerator(cpu=True)
        if how == "sharded":
            shard(model, fsdp())
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
            shard(model, fsdp())
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "shards_weights", lambda accelerator: True)
        patch.setattr(distributed, "shard", lambda model, accelerator: shard(model, fsdp()))
        train(directory, folder, options, scorer=reward(scorer, per_frame=True))


def test_a_number_that_is_not_finite_does_not_block_others_where_the_weights_are_sharded(two):
    first, second = left(two / "sharded nan", 0), left(two / "sharded nan", 1)
    assert_same(first, second)
    assert ["skipped" in row for row in first["metrics"]] == [False, True, False]


def disagreeing(directory, folder):
    """A validation whose scores differ between the processes, as two GPUs' may in the last bit."""
    calls = []

    def validate(adapter):
        calls.append(1)
        return {"score": float(len(calls) if rank() == 0 else -len(calls))}

    options = {"validate": validate, "validation_steps": 1, "checkpoints_total_limit": 1}
    train(directory, folder, options)


def test_processes_whose_validations_differ_decide_alike(two):
    """Whether to save is decided by the main process's scores; each by its own, they would wait for ever."""
    first, second = left(two / "disagreeing", 0), left(two / "disagreeing", 1)
    assert [row["validation/score"] for row in first["metrics"]] == [1.0, 2.0, 3.0]
    assert [row["validation/score"] for row in second["metrics"]] == [1.0, 2.0, 3.0]


def counted(directory, folder):
    """Bytes that cross between processes, a step."""
    import torch.distributed as dist

    crossed = []

    def counting(function, name):
        def call(*args, **options):
            tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
            crossed.append((name, sum(x.nbytes for x in tensors[-1:])))
            return function(*args, **options)

        return call

    names = (  # of torch.distributed
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "broadcast",
        "reduce",
        "gather",
        "all_to_all",
    )
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, counting(getattr(dist, name), name))
        train(directory, folder, {"steps": 3}, callback=lambda row: steps.append(len(crossed)))
    torch.save([crossed[a:b] for a, b in zip(steps, steps[1:])], f"{folder}-{rank()}.pt")


def test_only_the_adapter_crosses_between_processes(two, micro_directory):
    model = build(micro_directory)
    size = sum(p.nbytes for p in lora.add(model, 2).parameters())
    weights = sum(p.nbytes for p in model.denoiser.parameters())
    for step in left(two / "counted", 0):
        assert [name for name, _ in step].count("all_reduce") == 1
        assert size < sum(count for _, count in step) <= size + 64 < weights / 2


SCENARIOS = {
    "random": (train, RANDOM),
    "batch": (train, {"frames": Frames.all(), "batch_size": 2}),
    "averaged": (gradients_before_and_after,),
    "drift": (drift,),
    "nan": (moody,),
    "SIGINT": (interrupted, signal.SIGINT),
    "SIGTERM": (interrupted, signal.SIGTERM),
    "whole": (mortal, 5, None),
    "sharded": (sharded_gradient,),
    "evaluated": (evaluated,),
    "sharded nan": (moody_and_sharded,),
    "disagreeing": (disagreeing,),
    "counted": (counted,),
}


def every_scenario(directory, folder):
    """A process that waits for a collective that never comes says where and dies, instead of hanging."""
    # By a signal: faulthandler's timer, which pytest uses, waits in a forked process for a thread that is not there.
    faulthandler.register(signal.SIGALRM, chain=True)
    for name, (function, *args) in SCENARIOS.items():
        signal.alarm(60)
        function(directory, folder / name, *args)
    signal.alarm(0)


@pytest.fixture(scope="module")
def two(micro_directory, tmp_path_factory):
    """The folder in which two processes, launched once, left the results of all scenarios."""
    folder = tmp_path_factory.mktemp("two")
    launch(every_scenario, micro_directory, folder)
    return folder


def test_processes_may_be_forked_from_one_that_has_used_its_threads(micro_directory, tmp_path):
    """As in a notebook: a fork that asks for the threads of its parent would wait for ever."""
    code = (
        "import torch; torch.set_num_threads(2); torch.nn.LayerNorm(512)(torch.randn(512, 512)).sum();"
        "from tests.test_parallel import launch, train;"
        f"launch(train, {str(micro_directory)!r}, {str(tmp_path / 'run')!r}, {{}})"
    )
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name}
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=120,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    assert_same(left(tmp_path / "run", 0), left(tmp_path / "run", 1))


def where(folder):
    from vader_nb.models import default_device

    (folder / f"{rank()}").write_text(default_device())


def test_processes_without_a_gpu_each_are_on_the_cpu_all_through(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launch(where, tmp_path)
    assert [(tmp_path / name).read_text() for name in "01"] == ["cpu", "cpu"]


def test_a_gpu_that_is_in_use_already_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="restart the kernel"):
        launch(print, "never")
