"""Several processes (two, on the CPU, over gloo) train the adapter that one would have trained."""

import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vader_nb import load, lora
from vader_nb.checkpoints import list_checkpoints
from vader_nb.distributed import checksum, launch, sync_gradients
from vader_nb.gradient import reward_gradient
from vader_nb.rewards import brightness, reward
from vader_nb.sharding import shard
from vader_nb.strategies import Frames, Random
from vader_nb.trainer import align

from .test_align import recorded, untimed

PROMPTS = ["a red star", "a blue circle", "a green square growing"]


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def build(directory):
    model = load(directory, dtype=torch.float64, check=False)
    model.defaults |= {
        "num_inference_steps": 3,
        "num_frames": 3,
        "height": 16,
        "width": 16,
        "guidance_scale": 2.0,
    }
    return model


def train(directory, folder, options, scorer=None, callback=None, sharded=False):
    """A run; each process leaves its adapter and metrics beside the folder."""
    model = build(directory)
    if sharded:
        shard(model)
    options = {
        "steps": 3,
        "batch_size": 2,
        "rank": 2,
        "progress": False,
        "learning_rate": 1e-2,
    } | options
    run = align(
        model,
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
    with pytest.warns(UserWarning, match="the 4 clips of a step are divided differently"):
        train(
            micro_directory,
            tmp_path / "run",
            {"steps": 6, "gradient_accumulation_steps": 2, "resume": True},
        )
    with pytest.raises(ValueError, match=r"a step had 4 clips .*, now 2"):
        train(micro_directory, tmp_path / "run", {"steps": 7, "resume": True})


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


class Collectives(TorchDispatchMode):
    """Notes the name of each collective, and how many bytes this process gives to it."""

    def __init__(self):
        super().__init__()
        self.given = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.given.append((function.name(), tensors[-1].nbytes))  # what it fills comes first
        return function(*args, **(kwargs or {}))


def counted(directory, folder, sharded):
    """What crosses between processes, a step of two micro-batches."""
    steps, options = [], {"steps": 3, "gradient_accumulation_steps": 2}
    with Collectives() as crossed:
        note = lambda row: steps.append(len(crossed.given))  # noqa: E731
        train(directory, folder, options, callback=note, sharded=sharded)
    torch.save([crossed.given[a:b] for a, b in zip(steps, steps[1:])], f"{folder}-{rank()}.pt")


def test_only_the_adapter_crosses_between_processes(two, micro_directory):
    model = build(micro_directory)
    size = sum(p.nbytes for p in lora.add(model, 2).parameters())
    weights = sum(p.nbytes for p in model.denoiser.parameters())
    for step in left(two / "counted", 0):
        assert [name for name, _ in step].count("c10d::allreduce_") == 1
        assert size < sum(count for _, count in step) <= 1.1 * size < weights / 2


SCENARIOS = {
    "random": (train, RANDOM),
    "batch": (train, {"frames": Frames.all(), "batch_size": 2}),
    "averaged": (gradients_before_and_after,),
    "drift": (drift,),
    "nan": (moody,),
    "SIGINT": (interrupted, signal.SIGINT),
    "SIGTERM": (interrupted, signal.SIGTERM),
    "whole": (mortal, 5, None),
    "disagreeing": (disagreeing,),
    "counted": (counted, False),
}


def every_scenario(scenarios, directory, folder):
    """A process that waits for a collective that never comes says where and dies, instead of hanging."""
    # By a signal: faulthandler's timer, which pytest uses, waits in a forked process for a thread that is not there.
    faulthandler.register(signal.SIGALRM, chain=True)
    for name, (function, *args) in scenarios.items():
        signal.alarm(60)
        function(directory, folder / name, *args)
    signal.alarm(0)


@pytest.fixture(scope="module")
def two(micro_directory, tmp_path_factory):
    """The folder in which two processes, launched once, left the results of all scenarios."""
    folder = tmp_path_factory.mktemp("two")
    launch(every_scenario, SCENARIOS, micro_directory, folder)
    return folder


def test_processes_may_be_forked_from_one_that_has_used_its_threads(micro_directory, tmp_path):
    """As in a notebook: a fork that asks for the threads of its parent would wait for ever, and one from a parent whose
    first backward pass was simulated would be refused."""
    code = (
        "import torch; torch.set_num_threads(2); torch.nn.LayerNorm(512)(torch.randn(512, 512)).sum();"
        f"from vader_nb import memory; memory({str(micro_directory)!r}, 'brightness', num_inference_steps=2);"
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
