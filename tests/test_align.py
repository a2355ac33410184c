"""The loop: resume is bit-equal, stops keep what there is, bad input is refused before the work."""

import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vader_nb import Prompt, checkpoints, lora
from vader_nb.checkpoints import list_checkpoints, read
from vader_nb.rewards import brightness, motion_smoothness, reward
from vader_nb.sampling import Sampling
from vader_nb.strategies import DRaFTLV, DRTune, Frames, Last
from vader_nb.trainer import align, best_step

PROMPTS = ["a red star", "a blue circle", "a green square growing"]
FAST = {
    "batch_size": 2,
    "rank": 2,
    "progress": False,
    "checkpointing_steps": 2,
    "learning_rate": 1e-2,
}


def untimed(metrics):
    """Rows without what differs from run to run: times and memory."""
    measured = {"seconds", "clips_per_second", "peak_memory"}
    return [{name: value for name, value in row.items() if name not in measured} for row in metrics]


def recorded(folder):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def fresh(micro_directory):
    """A new micro model each call: one for each run."""
    from vader_nb import load

    def make():
        model = load(micro_directory, dtype=torch.float32)
        model.defaults |= {
            "num_inference_steps": 4,
            "num_frames": 3,
            "height": 16,
            "width": 16,
            "guidance_scale": 3.0,
        }
        return model

    return make


def test_the_reward_rises_and_the_folder_tells_the_story(fresh, tmp_path):
    seen = []
    run = align(
        fresh(),
        brightness(),
        PROMPTS,
        steps=12,
        output_dir=tmp_path / "run",
        callback=seen.append,
        **FAST,
    )
    assert sum(run.rewards[-3:]) > sum(run.rewards[:3])
    assert (
        seen
        == run.metrics
        == [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    )
    assert json.loads((run.folder / "config.json").read_text())["reward"] == "brightness"
    _, metadata = lora.read(run.folder)
    assert (metadata["steps"], metadata["reward"]) == ("12", "brightness")
    assert not list(run.folder.rglob("*.part"))
    assert not run.stopped


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "strategy": DRTune(2), "frames": Frames.random(2)}],
)
def test_resume_is_bit_equal_to_an_uninterrupted_run(fresh, tmp_path, options):
    options = FAST | options
    whole = align(fresh(), brightness(), PROMPTS, steps=6, output_dir=tmp_path / "whole", **options)
    align(fresh(), brightness(), PROMPTS, steps=4, output_dir=tmp_path / "parts", **options)
    torch.manual_seed(99)  # other draws in between
    again = align(
        fresh(),
        brightness(),
        PROMPTS,
        steps=6,
        output_dir=tmp_path / "parts",
        resume=True,
        **options,
    )
    assert untimed(again.metrics) == untimed(whole.metrics)
    assert recorded(tmp_path / "parts") == again.metrics
    for a, b in zip(whole.adapter.parameters(), again.adapter.parameters()):
        assert torch.equal(a, b)


def test_resume_also_restores_the_global_generators(fresh, tmp_path):
    """A reward that draws from torch's own generator."""

    def noisy(frames, prompts):
        return (frames * torch.rand(frames.shape[-1])).mean(dim=(1, 2, 3, 4))

    torch.manual_seed(1)
    whole = align(fresh(), noisy, PROMPTS, steps=4, output_dir=tmp_path / "whole", **FAST)
    torch.manual_seed(1)
    align(fresh(), noisy, PROMPTS, steps=2, output_dir=tmp_path / "parts", **FAST)
    torch.manual_seed(99)
    again = align(
        fresh(), noisy, PROMPTS, steps=4, output_dir=tmp_path / "parts", resume=True, **FAST
    )
    assert untimed(again.metrics) == untimed(whole.metrics)


def test_a_stop_keeps_the_last_whole_step_and_can_go_on(fresh, tmp_path):
    whole = align(fresh(), brightness(), PROMPTS, steps=5, output_dir=tmp_path / "whole", **FAST)

    def press(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    run = align(
        fresh(), brightness(), PROMPTS, steps=5, output_dir=tmp_path / "run", callback=press, **FAST
    )
    assert run.stopped
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert lora.read(run.folder)[1]["steps"] == "3"
    again = align(
        fresh(), brightness(), PROMPTS, steps=5, output_dir=tmp_path / "run", resume=True, **FAST
    )
    assert untimed(again.metrics) == untimed(whole.metrics)


def test_what_a_kill_leaves_behind_can_be_resumed(fresh, tmp_path):
    """What a kill can leave: half a checkpoint, a record whose checkpoint is missing, half a record."""
    run = align(fresh(), brightness(), PROMPTS, steps=4, output_dir=tmp_path / "run", **FAST)
    (run.folder / "checkpoints" / "step-000006.part").mkdir()  # what a kill in `save` leaves
    with (run.folder / "metrics.jsonl").open(
        "a"
    ) as file:  # and one after a record, before its checkpoint
        file.write(
            json.dumps({"step": 5, "reward": 0.0}) + "\n" + '{"step": 6, "rew'
        )  # the last line torn
    again = align(
        fresh(), brightness(), PROMPTS, steps=6, output_dir=tmp_path / "run", resume=True, **FAST
    )
    assert [row["step"] for row in again.metrics] == [1, 2, 3, 4, 5, 6]
    assert untimed(again.metrics[:4]) == untimed(run.metrics)


def test_non_finite_steps_are_skipped_and_said(fresh, tmp_path):
    calls = []

    def moody(frames, prompts):
        calls.append(1)
        value = frames.mean(dim=(1, 2, 3, 4))
        return value * float("nan") if len(calls) == 2 else value

    run = align(fresh(), moody, PROMPTS, steps=4, output_dir=tmp_path / "run", **FAST)
    assert ["skipped" in row for row in run.metrics] == [False, True, False, False]
    assert all(p.isfinite().all() for p in run.adapter.parameters())


def test_three_non_finite_steps_in_a_row_end_the_run_and_keep_it(fresh, tmp_path):
    calls = []

    def broken(frames, prompts):
        calls.append(1)
        value = frames.mean(dim=(1, 2, 3, 4))
        return value if len(calls) <= 2 else value * float("inf")

    with pytest.raises(RuntimeError, match="3 steps in a row were not finite"):
        align(fresh(), broken, PROMPTS, steps=9, output_dir=tmp_path / "run", **FAST)
    state, metadata = lora.read(tmp_path / "run")
    assert all(value.isfinite().all() for value in state.values())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_gradient_of_zero_is_an_error_at_once_and_leaves_nothing_behind(fresh, tmp_path):
    model = fresh()
    with pytest.raises(ValueError, match="zero: nothing to learn"):
        align(
            model,
            lambda f, p: f.sum(dim=(1, 2, 3, 4)) * 0,
            PROMPTS,
            steps=2,
            output_dir=tmp_path / "run",
            **FAST,
        )
    # the same model and name serve the next try
    assert align(model, brightness(), PROMPTS, steps=1, output_dir=tmp_path / "run", **FAST).rewards


def test_a_stop_in_the_middle_of_an_optimizer_step_is_a_stop_after_it(fresh, tmp_path, monkeypatch):
    whole = align(fresh(), brightness(), PROMPTS, steps=4, output_dir=tmp_path / "whole", **FAST)
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    run = align(fresh(), brightness(), PROMPTS, steps=4, output_dir=tmp_path / "run", **FAST)
    assert run.stopped
    assert len(run.metrics) == 3
    again = align(
        fresh(), brightness(), PROMPTS, steps=4, output_dir=tmp_path / "run", resume=True, **FAST
    )
    assert untimed(again.metrics) == untimed(whole.metrics)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.adapter.parameters(), again.adapter.parameters())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": Last(5)}, "K=5 must lie in 1..4"),
        ({"frames": Frames.random(0)}, "cannot choose 0"),
        ({"frames": Frames.at(7)}, "out of range"),
        ({"sampling": Sampling(num_inference_steps=0)}, "num_inference_steps"),
        ({"sampling": Sampling(height=13)}, "height=13 must be a positive multiple"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_that_cannot_be_met(fresh, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        align(
            fresh(),
            brightness(),
            PROMPTS,
            output_dir=tmp_path / "run",
            **(FAST | {"steps": 2} | options),
        )


def test_a_clip_reward_that_needs_more_frames_than_are_scored(fresh, tmp_path):
    for options in ({"sampling": Sampling(num_frames=2)}, {"frames": Frames.at(0, 1)}):
        with pytest.raises(ValueError, match="smoothness needs at least 3 frames, got 2"):
            align(fresh(), motion_smoothness(), PROMPTS, output_dir=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_two_runs_of_one_name(fresh, tmp_path):
    run = align(fresh(), brightness(), PROMPTS, steps=2, output_dir=tmp_path / "run", **FAST)
    kept = (run.folder / "adapter.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds another run"):
        align(fresh(), brightness(), PROMPTS, steps=2, output_dir=tmp_path / "run", **FAST)
    assert (run.folder / "adapter.safetensors").read_bytes() == kept
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        align(
            fresh(),
            brightness(),
            PROMPTS,
            steps=2,
            output_dir=tmp_path / "other",
            resume=True,
            **FAST,
        )


def test_resuming_with_other_settings_is_refused(fresh, tmp_path):
    align(fresh(), brightness(), PROMPTS, steps=2, output_dir=tmp_path / "run", **FAST)
    options = FAST | {
        "learning_rate": 0.5,
        "steps": 4,
        "resume": True,
        "output_dir": tmp_path / "run",
    }
    with pytest.raises(ValueError, match="learning_rate was 0.01, now 0.5"):
        align(fresh(), brightness(), PROMPTS, **options)
    options["learning_rate"] = FAST["learning_rate"]
    with pytest.raises(ValueError, match="prompts_checksum was"):  # as many, but others
        align(fresh(), brightness(), [*PROMPTS[:2], "a red circle"], **options)
    with pytest.raises(ValueError, match="prompts_checksum was"):  # another negative prompt
        others = [*PROMPTS[:2], Prompt(PROMPTS[2], negative_prompt="a star")]
        align(fresh(), brightness(), others, **options)
    config = tmp_path / "run" / "config.json"
    config.write_text(
        "\n".join(line for line in config.read_text().splitlines() if "checksum" not in line)
    )
    assert align(
        fresh(), brightness(), PROMPTS, **options
    ).metrics  # of a version that did not record it yet


def test_a_place_that_cannot_be_written_is_found_before_the_work(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to"):
        align(fresh(), brightness(), PROMPTS, steps=2, output_dir=tmp_path / "file" / "run", **FAST)
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="only 1 MB free"):
        align(fresh(), brightness(), PROMPTS, steps=2, output_dir=tmp_path / "run", **FAST)


def test_a_disk_that_fills_up_costs_no_finished_checkpoint_and_no_training(
    fresh, tmp_path, monkeypatch
):
    whole = align(fresh(), brightness(), PROMPTS, steps=6, output_dir=tmp_path / "whole", **FAST)
    save, calls = torch.save, []

    def full(contents, path, **options):
        calls.append(1)
        if len(calls) == 2:
            path.write_bytes(b"half of it")  # the second checkpoint finds no room
            raise OSError(28, "No space left on device")
        return save(contents, path, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(
        UserWarning,
        match="checkpoint of step 4 could not be written .*No space.*the last one is from step 2",
    ):
        run = align(fresh(), brightness(), PROMPTS, steps=6, output_dir=tmp_path / "run", **FAST)
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000006",
    ]
    assert untimed(run.metrics) == untimed(whole.metrics)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.adapter.parameters(), run.adapter.parameters())
    )


@pytest.mark.parametrize("said", ["by the user", "by the launcher", "by both"])
def test_bf16_trains(fresh, tmp_path, monkeypatch, said):
    """Whoever says it; the user's word counts more; and the one that is used is recorded."""
    options = (
        FAST
        | {"output_dir": tmp_path / "run"}
        | ({} if said == "by the launcher" else {"mixed_precision": "bf16"})
    )
    if said != "by the user":
        monkeypatch.setenv(
            "ACCELERATE_MIXED_PRECISION", "bf16" if said == "by the launcher" else "no"
        )
    run = align(fresh(), brightness(), PROMPTS, steps=1, **options)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.adapter.parameters())
    assert json.loads((run.folder / "config.json").read_text())["mixed_precision"] == "bf16"
    options |= {"output_dir": tmp_path / "plain", "mixed_precision": "no"}
    plain = align(fresh(), brightness(), PROMPTS, steps=1, **options)
    assert plain.metrics[0]["grad_norm"] != run.metrics[0]["grad_norm"]  # it is no mere record


def test_a_tracker_on_a_full_disk_costs_its_record_only(fresh, tmp_path, monkeypatch):
    """While it logs, and at the end, too."""
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", full)
    monkeypatch.setattr(TensorBoardTracker, "finish", full)
    with pytest.warns(UserWarning, match="the tracker could not write .*No space left"):
        options = FAST | {"log_with": "tensorboard", "output_dir": tmp_path / "run"}
        run = align(fresh(), brightness(), PROMPTS, steps=2, **options)
    assert [row["step"] for row in run.metrics] == [1, 2] and lora.read(run.folder)


def test_a_score_that_is_nan_is_not_the_best():
    rows = [
        {"step": step, "validation/judge": score}
        for step, score in ((20, math.nan), (40, 0.5), (60, 0.4))
    ]
    assert best_step(rows) == 40


WORKER = """
import sys, torch
torch.set_num_threads(1)
from vader_nb import load
from vader_nb.trainer import align
from vader_nb.rewards import brightness
model = load(sys.argv[1], dtype=torch.float64)
model.defaults |= {"num_inference_steps": 3, "num_frames": 2, "height": 16, "width": 16, "guidance_scale": 2.0}
run = align(model, brightness(), ["a red star", "a blue circle"], steps=2, batch_size=int(sys.argv[3]), rank=2,
            output_dir=sys.argv[2], progress=False)
import os
torch.save([p.detach() for p in run.adapter.parameters()], sys.argv[2] + f"-rank{os.environ.get('RANK', 0)}.pt")
"""


def test_ctrl_c_in_a_shell(micro_directory, tmp_path):
    """A real SIGINT to a real process: exit code 0, the last whole step kept."""
    script = tmp_path / "worker.py"
    script.write_text(
        WORKER.replace(
            "steps=2", "steps=100000, callback=lambda row: print(row['step'], flush=True)"
        ).replace("import os\n", "assert run.stopped\nimport os\n")
    )
    # A background job of a shell script is born deaf to SIGINT, and so would its children be.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script.write_text(heard + script.read_text())
    process = subprocess.Popen(
        [sys.executable, str(script), str(micro_directory), str(tmp_path / "run"), "1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if int(line) >= 3:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert int(lora.read(tmp_path / "run")[1]["steps"]) >= 3


def test_latest_serves_the_first_start_and_every_later_one(fresh, tmp_path):
    options = FAST | {"output_dir": tmp_path / "run", "resume": "latest"}
    assert len(align(fresh(), brightness(), PROMPTS, steps=3, **options).metrics) == 3
    again = align(fresh(), brightness(), PROMPTS, steps=5, **options)
    assert [row["step"] for row in again.metrics] == [1, 2, 3, 4, 5]
    options["resume"] = tmp_path / "run" / "checkpoints" / "step-000002"
    older = align(fresh(), brightness(), PROMPTS, steps=5, **options)
    assert untimed(older.metrics) == untimed(again.metrics)
    options["resume"] = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        align(fresh(), brightness(), PROMPTS, steps=5, **options)


def test_a_damaged_checkpoint_is_named_with_the_way_out(fresh, tmp_path):
    options = FAST | {"output_dir": tmp_path / "run"}
    align(fresh(), brightness(), PROMPTS, steps=4, **options)
    (tmp_path / "run" / "checkpoints" / "step-000004" / "state.pt").write_bytes(b"not what it was")
    model = fresh()
    with pytest.raises(
        ValueError, match="step-000004.* is damaged.*resume from an older checkpoint"
    ):
        align(model, brightness(), PROMPTS, steps=5, resume=True, **options)
    older = tmp_path / "run" / "checkpoints" / "step-000002"
    assert len(align(model, brightness(), PROMPTS, steps=5, resume=older, **options).metrics) == 5


def test_what_came_after_the_checkpoint_that_a_run_goes_on_from_is_gone(fresh, tmp_path):
    """Else the abandoned checkpoints would be the newest: kept instead of the new ones, and found by resume=latest."""
    options = FAST | {"output_dir": tmp_path / "run"}
    whole = align(fresh(), brightness(), PROMPTS, steps=8, **options)
    damaged, older = (tmp_path / "run" / "checkpoints" / f"step-00000{step}" for step in (6, 2))
    (damaged / "state.pt").write_bytes(b"not what it was")
    again = align(
        fresh(), brightness(), PROMPTS, steps=6, resume=older, checkpoints_total_limit=2, **options
    )
    assert list(list_checkpoints(again.folder)) == [4, 6] and untimed(again.metrics) == untimed(
        whole.metrics[:6]
    )
    read(damaged)
    again = align(fresh(), brightness(), PROMPTS, steps=8, resume="latest", **options)
    assert untimed(again.metrics) == untimed(whole.metrics) and list(
        list_checkpoints(again.folder)
    ) == [4, 6, 8]


def test_a_kill_while_what_came_after_is_discarded(fresh, tmp_path, monkeypatch):
    options = FAST | {"output_dir": tmp_path / "run"}
    whole = align(fresh(), brightness(), PROMPTS, steps=8, **options)
    discard, gone = checkpoints.discard, []

    def killed(path):
        if gone:
            raise SystemExit("killed")
        discard(path)
        gone.append(path.name)

    monkeypatch.setattr(checkpoints, "discard", killed)
    with pytest.raises(SystemExit):
        align(
            fresh(),
            brightness(),
            PROMPTS,
            steps=8,
            resume=tmp_path / "run/checkpoints/step-000002",
            **options,
        )
    monkeypatch.undo()
    assert gone == ["step-000008"] and list(list_checkpoints(tmp_path / "run")) == [2, 4, 6]
    again = align(fresh(), brightness(), PROMPTS, steps=8, resume="latest", **options)
    assert untimed(again.metrics) == untimed(whole.metrics)


def test_a_checkpoint_is_known_by_what_it_holds_not_by_its_name(fresh, tmp_path):
    options = FAST | {"output_dir": tmp_path / "run"}
    whole = align(fresh(), brightness(), PROMPTS, steps=4, **options)
    kept = shutil.copytree(
        tmp_path / "run" / "checkpoints" / "step-000002", tmp_path / "run" / "kept"
    )
    again = align(fresh(), brightness(), PROMPTS, steps=4, resume=kept, **options)
    assert untimed(again.metrics) == untimed(whole.metrics)
    with pytest.raises(
        ValueError, match="holds no run: a checkpoint can only be resumed in its own run's folder"
    ):
        align(
            fresh(),
            brightness(),
            PROMPTS,
            steps=4,
            resume=kept,
            **options | {"output_dir": tmp_path / "other"},
        )


def test_a_run_does_not_go_on_from_another_ones_checkpoint(fresh, tmp_path):
    """Equal settings hide it: the weights would be one run's, the rows of its metrics the other's."""
    for name in ("one", "other"):
        align(fresh(), brightness(), PROMPTS, steps=4, output_dir=tmp_path / name, **FAST)
    theirs = tmp_path / "other" / "checkpoints" / "step-000002"
    with pytest.raises(ValueError, match=r"belongs to the run in .*other; .* adapter="):
        align(
            fresh(),
            brightness(),
            PROMPTS,
            steps=6,
            output_dir=tmp_path / "one",
            resume=theirs,
            **FAST,
        )
    assert list(list_checkpoints(tmp_path / "one")) == [2, 4]  # nothing is discarded
    backup = shutil.copytree(theirs, tmp_path / "backup")  # nobody knows whose it was
    options = FAST | {"output_dir": tmp_path / "other", "resume": backup}
    assert len(align(fresh(), brightness(), PROMPTS, steps=6, **options).metrics) == 6


def test_random_states_come_back_from_a_file_numpys_too(tmp_path):
    def numbers():
        return torch.rand(1).item(), random.random(), *np.random.normal(size=3)  # noqa: NPY002

    np.random.normal()  # noqa: NPY002, leaves one more in the generator
    torch.save(checkpoints.random_states(), tmp_path / "states.pt")
    expected = numbers()
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    checkpoints.set_random_states(states)
    assert numbers() == expected
    del states["numpy"]  # as an older version wrote it
    checkpoints.set_random_states(states)
    assert numbers()[:2] == expected[:2] and numbers()[2] != expected[2]


def test_numbers_that_are_not_finite_are_null_in_the_journal(tmp_path):
    rows = [{"step": 1, "reward": math.nan, "parts": {"a": math.inf}, "all": [0.5, math.nan]}]
    checkpoints.Journal(tmp_path / "metrics.jsonl", []).add(rows[0])
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["reward"] is None
    (row,) = checkpoints.read_metrics(tmp_path)
    assert math.isnan(row["reward"]) and math.isnan(row["parts"]["a"]) and row["all"][0] == 0.5


def test_a_checkpoint_of_four_gpus_goes_on_where_there_is_one_or_none(fresh, tmp_path, monkeypatch):
    run = align(fresh(), brightness(), PROMPTS, steps=2, output_dir=tmp_path / "run", **FAST)
    state, written = run.folder / "checkpoints" / "step-000002" / "state.pt", []
    contents = read(state.parent)[1]
    with monkeypatch.context() as patched:  # as torch marks tensors that lay on a GPU
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(contents, state)
    states = read(state.parent)[1]["random"][0] | {"cuda": [torch.get_rng_state()] * 4}
    checkpoints.set_random_states(states)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: written.append(device))
    checkpoints.set_random_states(states)
    assert written == [0]


def test_the_newest_checkpoints_are_kept_and_the_best(fresh, tmp_path):
    """A validation whose score we set, by the step: best at 2."""
    scores, called = {2: 9.0, 4: 1.0, 6: 2.0}, []

    def validate(adapter):
        called.append(len(called) + 1)
        assert adapter.layers
        return {"judge": scores[2 * len(called)], "another": 0.0}

    options = FAST | {"validate": validate, "validation_steps": 2, "checkpoints_total_limit": 1}
    run = align(fresh(), brightness(), PROMPTS, steps=6, output_dir=tmp_path / "run", **options)
    assert list(list_checkpoints(run.folder)) == [2, 6]
    assert run.best == run.folder / "checkpoints" / "step-000002"
    assert [row.get("validation/judge") for row in run.metrics] == [None, 9.0, None, 1.0, None, 2.0]


def test_watching_does_not_change_what_is_trained(fresh, tmp_path):
    from vader_nb import Validation
    from vader_nb.rewards import colorfulness

    def noisy(frames, prompts):  # a reward that draws, so that a validation could disturb it
        return (frames * torch.rand(frames.shape[-1])).mean(dim=(1, 2, 3, 4))

    torch.manual_seed(1)
    plain = align(fresh(), noisy, PROMPTS, steps=4, output_dir=tmp_path / "plain", **FAST)
    model = fresh()
    watch = Validation(model, [colorfulness(), noisy], ["a red square", "a blue star"])
    torch.manual_seed(1)
    watched = align(
        model,
        noisy,
        PROMPTS,
        steps=4,
        output_dir=tmp_path / "watched",
        validate=watch,
        validation_steps=1,
        **FAST,
    )
    assert [row["reward"] for row in watched.metrics] == [row["reward"] for row in plain.metrics]
    assert all("validation/colorfulness" in row for row in watched.metrics)
    first = watched.metrics[0]["validation/colorfulness"]
    assert watched.metrics[3]["validation/colorfulness"] != first  # the same clips, another adapter


def test_metrics_survive_a_disk_that_is_full_for_a_while(fresh, tmp_path, monkeypatch):
    opened, calls = Path.open, []

    def full(self, mode="r", *arguments, **options):
        if self.name == "metrics.jsonl" and mode == "a":
            calls.append(1)
            if len(calls) in (1, 2):
                with opened(self, "a") as file:
                    file.write('{"step": 2, "rew')  # half a line still fitted
                raise OSError(28, "No space left on device")
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.warns(UserWarning, match="its rows are kept"):
        run = align(fresh(), brightness(), PROMPTS, steps=5, output_dir=tmp_path / "run", **FAST)
    assert run.metrics == [
        json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_an_adapter_that_cannot_be_written_is_on_the_model_still(fresh, tmp_path, monkeypatch):
    save = lora.Adapter.save

    def full(self, path, **metadata):
        if path.parent == tmp_path / "run":  # the last file of the run, not a checkpoint's
            raise OSError(28, "No space left on device")
        return save(self, path, **metadata)

    monkeypatch.setattr(lora.Adapter, "save", full)
    with pytest.warns(UserWarning, match="a notebook still has it"):
        run = align(fresh(), brightness(), PROMPTS, steps=2, output_dir=tmp_path / "run", **FAST)
    monkeypatch.undo()
    assert lora.read(run.adapter.save(tmp_path / "elsewhere.safetensors"))[0]


def test_learning_rates_follow_the_schedule(fresh, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: rates.append(self.param_groups[0]["lr"]) or step(self, *a, **k),
    )
    options = FAST | {"lr_scheduler": "linear", "lr_warmup_steps": 2, "learning_rate": 0.01}
    align(fresh(), brightness(), PROMPTS, steps=4, output_dir=tmp_path / "run", **options)
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])
    with pytest.raises(ValueError, match="steps was 4, now 6"):  # the schedule would be another one
        align(
            fresh(),
            brightness(),
            PROMPTS,
            steps=6,
            output_dir=tmp_path / "run",
            resume=True,
            **options,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "sawtooth"}, "unknown lr_scheduler 'sawtooth'; choose one of .*cosine"),
        ({"log_with": "notebook"}, "unknown tracker 'notebook'; choose one of tensorboard, wandb"),
        ({"checkpoints_total_limit": 0}, None),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
    ],
)
def test_more_settings_that_cannot_be_met(fresh, tmp_path, options, message):
    model = fresh()
    with pytest.raises(ValueError, match=message or "checkpoints_total_limit must be at least 1"):
        align(
            model, brightness(), PROMPTS, steps=2, output_dir=tmp_path / "run", **(FAST | options)
        )
    assert lora.add(model, 2)  # nothing was left on it


def test_packages_that_are_missing_are_named_before_the_work(fresh, tmp_path):
    missing = {"log_with": "wandb", "use_8bit_adam": "bitsandbytes"}
    for option, package in missing.items():
        if importlib.util.find_spec(package) is None:
            options = FAST | {
                option: True if option == "use_8bit_adam" else package,
                "output_dir": tmp_path / package,
            }
            with pytest.raises(ValueError, match=f"pip install {package}"):
                align(fresh(), brightness(), PROMPTS, steps=2, **options)


def test_a_loss_scale_comes_down_and_training_goes_on(fresh, tmp_path, monkeypatch):
    """fp16's scaler, on the CPU: gradients that overflow are skipped, the scale falls until they do not."""
    from vader_nb import distributed

    build = distributed.accelerator_for

    def scaled(*arguments):
        accelerator = build(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
        accelerator.native_amp, accelerator.state._mixed_precision = (
            True,
            "fp16",
        )  # which accelerate has for GPUs only
        accelerator.autocast = contextlib.nullcontext
        return accelerator

    monkeypatch.setattr(distributed, "accelerator_for", scaled)
    options = FAST | {"checkpointing_steps": 1, "output_dir": tmp_path / "run"}
    options["frames"] = Frames.random(1)
    run = align(fresh(), lambda f, p: 1e6 * f.mean(dim=(1, 2, 3, 4)), PROMPTS, steps=12, **options)
    skipped = ["skipped" in row for row in run.metrics]
    assert skipped[0] and not skipped[-1] and sorted(skipped, reverse=True) == skipped
    state = read(list_checkpoints(run.folder)[12])[1]
    assert state["scaler"]["scale"] < 2.0**126
    again = align(
        fresh(),
        lambda f, p: 1e6 * f.mean(dim=(1, 2, 3, 4)),
        PROMPTS,
        steps=13,
        resume=True,
        **options,
    )
    assert "skipped" not in again.metrics[12]  # it starts with the scale that it had found


def one_run(directory, folder, steps):
    from vader_nb import load

    torch.set_num_threads(1)
    model = load(directory, dtype=torch.float32)
    model.defaults |= {
        "num_inference_steps": 2,
        "num_frames": 2,
        "height": 16,
        "width": 16,
        "guidance_scale": 3.0,
    }
    options = FAST | {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume": "latest"}
    align(
        model,
        brightness(),
        PROMPTS,
        steps=steps,
        output_dir=folder,
        lr_scheduler="cosine",
        **options,
    )


def test_twenty_kills_at_any_moment_change_not_one_byte(micro_directory, tmp_path):
    """SIGKILL, 20 times, at moments drawn over all that a run does, resumed each time with the same command."""
    # Children of a server without threads, which has imported everything once: a fork of this process, whose
    # threads may hold a lock at that moment, can stand still forever.
    server, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    server.set_forkserver_preload([__name__])
    one_run(micro_directory, tmp_path / "whole", 30)
    kills, reached = 0, []
    while kills < 20:
        process = server.Process(target=one_run, args=(micro_directory, tmp_path / "killed", 30))
        process.start()
        before = len(reached) and reached[-1]
        if (
            draw.random() < 0.5
        ):  # sometimes only when it has made progress, else the first steps would be all it does
            while (
                process.is_alive()
                and max(list_checkpoints(tmp_path / "killed"), default=0) <= before
            ):
                time.sleep(0.005)
        process.join(draw.uniform(0, 0.4))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        reached.append(max(list_checkpoints(tmp_path / "killed"), default=0))
        for checkpoint in list_checkpoints(tmp_path / "killed").values():
            read(checkpoint)  # whatever bears the name of a checkpoint is a whole one
    assert kills == 20 and reached == sorted(reached) and reached[-1] > 5
    one_run(micro_directory, tmp_path / "killed", 30)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    name = "adapter.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert untimed(recorded(killed)) == untimed(recorded(whole))


def test_reward_that_looks_at_prompts_gets_the_right_ones(fresh, tmp_path):
    seen = set()

    def spy(frames, prompts):
        seen.update(prompts)
        assert len(prompts) == len(frames)
        return frames.mean(dim=(1, 2, 3, 4))

    align(
        fresh(), reward(spy, per_frame=True), PROMPTS, steps=6, output_dir=tmp_path / "run", **FAST
    )
    assert seen == set(PROMPTS)


# ------------------------------------------------------------------------- nothing lost, nothing silently wrong


def test_a_resume_that_is_refused_deletes_nothing(fresh, tmp_path):
    """The everyday case in a notebook: the last run's adapter is on the model still."""
    options = FAST | {"output_dir": tmp_path / "run"}
    run = align(fresh(), brightness(), PROMPTS, steps=8, **options)
    config = (run.folder / "config.json").read_bytes()
    older = run.folder / "checkpoints" / "step-000002"
    model = fresh()
    lora.add(model, 2)
    with pytest.raises(ValueError, match="carries an adapter already"):
        align(model, brightness(), PROMPTS, steps=9, resume=older, **options)
    with pytest.raises(ValueError, match="learning_rate was"):
        align(
            fresh(),
            brightness(),
            PROMPTS,
            steps=9,
            resume=older,
            **options | {"learning_rate": 0.5},
        )
    assert list(list_checkpoints(run.folder)) == [2, 4, 6, 8]
    assert (run.folder / "config.json").read_bytes() == config


def test_frames_that_are_not_finite_skip_the_step(fresh, tmp_path):
    """As of an autoencoder that overflows in float16; not a ValueError about the range of frames."""
    model, calls = fresh(), []
    decode = model.decode

    def overflowing(latents, frames=None):
        calls.append(1)
        return decode(latents, frames) * (float("nan") if len(calls) == 2 else 1.0)

    model.decode = overflowing
    run = align(model, brightness(), PROMPTS, steps=4, output_dir=tmp_path / "run", **FAST)
    assert ["skipped" in row for row in run.metrics] == [False, True, False, False]
    assert "decoded frames are not finite" in run.metrics[1]["skipped"]


def test_a_string_is_a_set_of_prompts_or_a_file_never_letters(fresh, tmp_path):
    seen = set()

    def spy(frames, prompts):
        seen.update(prompts)
        return frames.mean(dim=(1, 2, 3, 4))

    file = tmp_path / "mine.txt"
    file.write_text("a red star\na blue circle\n")
    align(fresh(), spy, str(file), steps=2, output_dir=tmp_path / "run", **FAST)
    assert seen == {"a red star", "a blue circle"}
    seen.clear()
    align(fresh(), spy, "tiny", steps=1, output_dir=tmp_path / "tiny", **FAST)
    assert seen and all(len(prompt) > 10 for prompt in seen)
    with pytest.raises(FileNotFoundError, match="no prompt file at a red star"):
        align(fresh(), spy, "a red star", steps=1, output_dir=tmp_path / "none", **FAST)


def test_another_reward_of_the_same_name_does_not_resume(fresh, tmp_path):
    options = FAST | {"output_dir": tmp_path / "run"}
    align(fresh(), lambda f, p: f.mean(dim=(1, 2, 3, 4)), PROMPTS, steps=2, **options)
    with pytest.raises(ValueError, match="reward_fingerprint was"):
        align(
            fresh(),
            lambda f, p: -f.mean(dim=(1, 2, 3, 4)),
            PROMPTS,
            steps=4,
            resume=True,
            **options,
        )
    again = align(
        fresh(), lambda f, p: f.mean(dim=(1, 2, 3, 4)), PROMPTS, steps=4, resume=True, **options
    )
    assert len(again.metrics) == 4


def test_an_error_in_a_validation_costs_no_row_of_a_step_that_was_taken(fresh, tmp_path):
    def validate(adapter):
        raise ValueError("the judge is out")

    options = FAST | {"output_dir": tmp_path / "run", "validation_steps": 3}
    with pytest.raises(ValueError, match="the judge is out"):
        align(fresh(), brightness(), PROMPTS, steps=6, validate=validate, **options)
    again = align(fresh(), brightness(), PROMPTS, steps=6, resume=True, **options)
    assert [row["step"] for row in again.metrics] == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------------------- settings and pieces


def test_a_row_says_what_a_step_cost_and_what_each_part_of_a_mixed_reward_was(fresh, tmp_path):
    from vader_nb.rewards import colorfulness

    mixed = brightness() + 0.5 * colorfulness()
    options = FAST | {"frames": Frames.all(), "lr_scheduler": "linear", "lr_warmup_steps": 2}
    run = align(fresh(), mixed, PROMPTS, steps=2, output_dir=tmp_path / "run", **options)
    for row in run.metrics:
        parts = row["reward/brightness"] + 0.5 * row["reward/colorfulness"]
        assert row["reward"] == pytest.approx(parts, rel=1e-5)
        assert row["seconds"] > 0
        assert row["clips_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["peak_memory"] > 1e8
    assert [row["learning_rate"] for row in run.metrics] == pytest.approx([0.0, 0.005])


def test_a_run_starts_from_an_adapter(fresh, tmp_path):
    first = align(fresh(), brightness(), PROMPTS, steps=2, output_dir=tmp_path / "first", **FAST)
    start = [p.detach().clone() for p in first.adapter.parameters()]
    options = FAST | {"learning_rate": 1e-30}
    for name, adapter in {"path": first.folder, "run": first}.items():
        model = fresh() if name == "path" else first.adapter.model
        run = align(
            model,
            brightness(),
            PROMPTS,
            steps=1,
            output_dir=tmp_path / name,
            adapter=adapter,
            **options,
        )
        for p, expected in zip(run.adapter.parameters(), start):
            torch.testing.assert_close(p, expected)
    with pytest.raises(ValueError, match="rank=4 .* has rank 2"):
        align(
            fresh(),
            brightness(),
            PROMPTS,
            steps=1,
            output_dir=tmp_path / "other",
            adapter=first.folder,
            **options | {"rank": 4},
        )


def test_layers_are_chosen_by_name(fresh, tmp_path):
    run = align(
        fresh(),
        brightness(),
        PROMPTS,
        steps=1,
        output_dir=tmp_path / "run",
        targets=["to_q"],
        **FAST,
    )
    assert all(name.endswith("to_q") for name in run.adapter.layers)
    assert json.loads((run.folder / "config.json").read_text())["targets"] == ["to_q"]


def test_an_estimator_of_ones_own(fresh, tmp_path):
    """Two updates per roll-out, rewards compared between roll-out and gradient, no gradient of the reward."""
    from vader_nb.estimators import Collected, Estimator, Row
    from vader_nb.rewards import Reward
    from vader_nb.sampling import roll_out

    class Blind(Reward):
        name, differentiable = "blind", False

        def scores(self, frames, prompts):
            return frames.detach().mean(dim=(1, 2, 3, 4))[:, None]

    calls = []

    class Weighted(Estimator):
        """The denoiser's output on every state of the chain, weighted by the advantage."""

        updates_per_rollout = 2

        def collect(self, batch):
            calls.append("collect")
            steps = self.sampling.num_inference_steps
            rollout = roll_out(self.model, batch.prompts, batch.seeds, self.sampling, window=steps)
            assert len(rollout.states) == len(rollout.outputs) == steps
            with torch.no_grad():
                frames = self.model.decode(rollout.latents)
            return Collected(rollout, None, [], rewards=self.reward(frames, batch.prompts))

        def advantages(self, collected, gather):
            calls.append("advantages")
            rewards = torch.cat(gather(torch.cat([c.rewards for c in collected])))
            for c in collected:
                c.advantages = c.rewards - rewards.mean()

        def accumulate(self, collected, weight, backward):
            calls.append("accumulate")
            rollout = collected.rollout
            output = self.model.guided(
                rollout.states[-1], rollout.timesteps[-1], rollout.conditioning, self.sampling
            )
            loss = (output.mean(dim=(1, 2, 3, 4)) * collected.advantages).mean()
            backward(loss * weight)
            return Row(collected.rewards)

    with pytest.raises(ValueError, match="'blind' is not differentiable"):
        align(fresh(), Blind(), PROMPTS, steps=2, output_dir=tmp_path / "no", **FAST)
    run = align(
        fresh(),
        Blind(),
        PROMPTS,
        steps=2,
        estimator=Weighted(),
        gradient_accumulation_steps=2,
        output_dir=tmp_path / "run",
        **FAST,
    )
    assert calls == (["collect"] * 2 + ["advantages"] + ["accumulate"] * 4) * 2
    assert len(run.rewards) == 2
    assert any(p.any() for p in run.adapter.parameters()[1::2])


def test_every_setting_is_known_to_the_flat_list():
    from vader_nb.trainer import TrainConfig

    names = [f.name for f in TrainConfig.flat_fields()]
    assert len(names) == len(set(names)) and "sampling" not in names
    assert all(f.metadata["help"] for f in TrainConfig.flat_fields())
    config = TrainConfig.from_flat({"steps": 3, "num_frames": 4, "strategy": "DRTune(2, stop=1)"})
    assert (config.steps, config.sampling.num_frames) == (3, 4)
    assert config.strategy == DRTune(2, stop=1)
    with pytest.raises(ValueError, match="unknown setting 'stepz'"):
        TrainConfig.from_flat({"stepz": 3})


# ----------------------------------------------------------------------------- several updates a roll-out


def test_a_rollout_serves_several_updates(fresh, tmp_path, monkeypatch):
    """Of 4 denoiser calls 3 are the roll-out's alone; each update scores other frames; the schedule knows of them."""
    from vader_nb import gradient

    frames, rates, calls = [], [], {1: [], 3: []}
    accumulate, step = gradient.accumulate, torch.optim.AdamW.step
    monkeypatch.setattr(
        gradient, "accumulate", lambda *a, **k: frames.append(a[5]) or accumulate(*a, **k)
    )
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: rates.append(self.param_groups[0]["lr"]) or step(self, *a, **k),
    )
    for n in calls:
        rates.clear()
        model = fresh()
        predict = model.predict
        model.predict = lambda *a, predict=predict, n=n: (calls[n].append(1), predict(*a))[1]
        options = FAST | {"rollout_reuse": n, "lr_scheduler": "linear"}
        options |= {"frames": Frames.random(1), "output_dir": tmp_path / str(n), "steps": 3}
        run = align(model, brightness(), PROMPTS, **options)
        assert rates == pytest.approx([1e-2 * (1 - i / (3 * n)) for i in range(3 * n)])
    assert len(calls[1]) == 3 * (4 + 1)  # one of them once more, with a graph
    assert len(calls[3]) == len(calls[1]) + 3 * 2 * (1 + 1)
    assert len(run.metrics) == 3 and len(frames) == 3 + 9
    assert len({tuple(one) for one in frames[3:6]}) > 1


@pytest.mark.parametrize(
    "options", [{}, {"strategy": DRaFTLV(1), "gradient_accumulation_steps": 2}]
)
def test_resume_with_several_updates_a_rollout_is_bit_equal(fresh, tmp_path, monkeypatch, options):
    """After a stop between the updates of a roll-out, which ends after them; and after a kill there."""
    options = FAST | {"rollout_reuse": 3, "steps": 5, "frames": Frames.random(1)} | options
    whole = align(fresh(), brightness(), PROMPTS, output_dir=tmp_path / "whole", **options)
    step, calls = torch.optim.AdamW.step, []

    def disturbed(self, *arguments, **settings):
        calls.append(1)
        if len(calls) == 8:  # the second update of the third step
            os.kill(os.getpid(), signal.SIGINT)
        if len(calls) == 14:  # and of the fifth, whose first has been taken: the process is gone
            raise SystemExit("killed")
        return step(self, *arguments, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", disturbed)
    monkeypatch.setattr("vader_nb.trainer.Trainer.finish", lambda self: self.save())
    options |= {"output_dir": tmp_path / "parts", "resume": "latest"}
    run = align(fresh(), brightness(), PROMPTS, **options)
    assert run.stopped and len(run.metrics) == 3
    monkeypatch.setattr("vader_nb.trainer.Trainer.finish", lambda self: None)
    with pytest.raises(SystemExit):
        align(fresh(), brightness(), PROMPTS, **options)
    assert max(list_checkpoints(tmp_path / "parts")) == 4
    monkeypatch.undo()
    again = align(fresh(), brightness(), PROMPTS, **options)
    assert untimed(again.metrics) == untimed(whole.metrics)
    assert all(map(torch.equal, whole.adapter.parameters(), again.adapter.parameters()))


def test_a_later_update_that_is_not_finite_ends_those_of_its_rollout(fresh, tmp_path):
    calls = []

    def moody(frames, prompts):
        calls.append(1)
        value = frames.mean(dim=(1, 2, 3, 4))
        return value * float("nan") if len(calls) == 5 else value

    options = FAST | {"rollout_reuse": 3, "output_dir": tmp_path / "run", "steps": 3}
    run = align(fresh(), moody, PROMPTS, **options)
    assert len(calls) == 3 + 2 + 3
    assert len(run.rewards) == 3
    assert run.metrics[1]["skipped"].startswith("the rewards of")
    assert all(p.isfinite().all() for p in run.adapter.parameters())


def test_rollouts_that_cannot_serve_again_are_refused(fresh, tmp_path):
    from vader_nb.estimators import Estimator

    class Other(Estimator):
        collect = accumulate = None

    options = FAST | {"rollout_reuse": 2, "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match="rollout_reuse=2 works only with the reward's gradient"):
        align(fresh(), brightness(), PROMPTS, estimator=Other(), **options)
    with pytest.raises(ValueError, match="rollout_reuse must be at least 1"):
        align(fresh(), brightness(), PROMPTS, **options | {"rollout_reuse": 0})


# ------------------------------------------------------------- one folder, one run; settings that act


def test_a_folder_in_which_a_run_works_is_not_anothers(fresh, tmp_path):
    folder, refused = tmp_path / "run", []

    def second(row):
        if row["step"] == 1:
            with pytest.raises(FileExistsError, match="is being written by another run"):
                align(fresh(), brightness(), PROMPTS, steps=1, output_dir=folder, resume="latest")
            refused.append(recorded(folder))

    run = align(fresh(), brightness(), PROMPTS, steps=2, output_dir=folder, callback=second, **FAST)
    assert len(refused) == 1 and [row["step"] for row in recorded(folder)] == [1, 2]
    again = align(  # and it is free afterwards
        fresh(), brightness(), PROMPTS, steps=3, output_dir=folder, resume=True, **FAST
    )
    assert untimed(again.metrics[:2]) == untimed(run.metrics)


def test_a_resumed_run_may_validate_by_another_score(fresh, tmp_path):
    options = FAST | {"output_dir": tmp_path / "run", "validation_steps": 1}
    scores = iter([0.9, 0.8, 0.1, 0.3, 0.2])
    first = align(
        fresh(), brightness(), PROMPTS, steps=2, validate=lambda a: {"old": next(scores)}, **options
    )
    assert best_step(first.metrics) == 1
    for steps, best in ((4, 4), (5, 4)):
        run = align(
            fresh(),
            brightness(),
            PROMPTS,
            steps=steps,
            resume=True,
            validate=lambda a: {"new": next(scores)},
            **options,
        )
        assert best_step(run.metrics) == best


@pytest.mark.parametrize(
    "contents",
    [[], {}, 3, {"step": 4}, {"random": []}, {"random": [{"torch": 3}]}, {"step": -1}, object],
    ids=["list", "empty", "int", "keys", "no generators", "half of them", "negative", "code"],
)
def test_an_odd_state_is_named_and_nothing_of_torchs_advice_is_repeated(fresh, tmp_path, contents):
    options = FAST | {"output_dir": tmp_path / "run"}
    align(fresh(), brightness(), PROMPTS, steps=2, **options)
    path = tmp_path / "run" / "checkpoints" / "step-000002" / "state.pt"
    if isinstance(contents, dict) and contents:
        contents = torch.load(path, weights_only=True) | contents
        if contents["step"] == 4:
            del contents["optimizer"]
    torch.save(contents, path)
    with pytest.raises(
        ValueError, match=r"state\.pt is .*resume from an older checkpoint"
    ) as raised:
        align(fresh(), brightness(), PROMPTS, steps=4, resume=True, **options)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize(
    "name, text",
    [("config.json", '{"steps": 2'), ("config.json", "[]x"), ("metrics.jsonl", "3\n")]
    + [("metrics.jsonl", text) for text in ("null\n", "[]\n", '{"reward": 1}\n', "{\n")],
)
def test_odd_files_of_a_run_are_named(fresh, tmp_path, name, text):
    options = FAST | {"output_dir": tmp_path / "run"}
    align(fresh(), brightness(), PROMPTS, steps=2, **options)
    (tmp_path / "run" / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        align(fresh(), brightness(), PROMPTS, steps=4, resume=True, **options)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (999_999, 1_000_000, 20):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert list(list_checkpoints(tmp_path)) == [20, 999_999, 1_000_000]


def test_a_first_batch_above_the_cap_trains_on(fresh, tmp_path):
    """The next batch may lie below it."""
    with pytest.warns(UserWarning, match="the first batch is at the reward's upper bound"):
        run = align(
            fresh(),
            brightness().capped(0.001),
            PROMPTS,
            steps=2,
            output_dir=tmp_path / "run",
            **FAST,
        )
    assert [row["grad_norm"] for row in run.metrics] == [0, 0]


def test_no_clipping_is_zero(fresh, tmp_path):
    """Elsewhere, too: with 0 nothing is clipped."""
    adapters = []
    for norm in (0, 1e9):
        folder = tmp_path / str(norm)
        run = align(
            fresh(), brightness(), PROMPTS, steps=2, output_dir=folder, max_grad_norm=norm, **FAST
        )
        adapters.append(torch.cat([p.detach().flatten() for p in run.adapter.parameters()]))
    assert torch.equal(*adapters) and adapters[0].any()


def test_weights_that_overflow_are_put_back(fresh, tmp_path, monkeypatch):
    """The step is skipped, and its weights are those before it."""
    seen, step = [], torch.optim.AdamW.step

    def overflowing(self, *arguments, **options):
        parameters = self.param_groups[0]["params"]
        seen.append([p.detach().clone() for p in parameters])
        step(self, *arguments, **options)
        if len(seen) == 2:
            parameters[0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    run = align(fresh(), brightness(), PROMPTS, steps=3, output_dir=tmp_path / "run", **FAST)
    assert ["skipped" in row for row in run.metrics] == [False, True, False]
    assert "lower learning_rate" in run.metrics[1]["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": float("nan")}, "learning_rate must be at least"),
        ({"learning_rate": float("inf")}, "learning_rate must be at most"),
        ({"learning_rate": -1.0}, "learning_rate must be at least"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be at least 0"),
        ({"rank": 10**6}, "rank must be at most 4096"),
        ({"seed": 10**30}, "seed must be at most"),
        ({"decode_chunk_size": 0}, "decode_chunk_size must be at least 1"),
        ({"validation_steps": 0}, "validation_steps must be at least 1"),
        ({"sampling": Sampling(guidance_scale=float("nan"))}, "guidance_scale must be at least 0"),
        ({"sampling": Sampling(guidance_scale=1e30)}, "guidance_scale must be at most"),
        ({"sampling": Sampling(width=100_000)}, "width must be at most"),
        ({"sampling": Sampling(eta=1.5)}, "eta must be at most 1"),
        ({"mixed_precision": "fp16"}, "mixed_precision=fp16 needs a GPU"),
    ],
)
def test_numbers_out_of_bounds_are_found_first(fresh, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        align(fresh(), brightness(), PROMPTS, **FAST | options, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


# --------------------------------------------------------------------------- after any exception


def test_after_any_exception_the_model_is_as_it_was(fresh, tmp_path):
    """Weights, layers, hooks and scheduler, whatever failed and however far it got."""
    from vader_nb import evaluate, reward_gradient, sample

    model = fresh()
    good = lora.add(model, 2).save(tmp_path / "good.safetensors")
    lora.use_adapter(model, None)
    lora._detach(model)

    def picture():
        modules = list(model.denoiser.named_modules())
        hooks = [(name, len(m._forward_hooks), "forward" in vars(m)) for name, m in modules]
        weights = {name: p.clone() for name, p in model.denoiser.named_parameters()}
        return [name for name, _ in modules], hooks, weights, vars(model.scheduler).keys()

    def raising(frames, prompts):
        raise ZeroDivisionError("the user's own code")

    def interrupted(*_):
        raise KeyboardInterrupt

    def gradient(judge):
        adapter = lora.load(model, good)
        try:
            reward_gradient(model, adapter, judge, PROMPTS[:1], seeds=[0])
        finally:
            adapter.remove()

    options = FAST | {"output_dir": tmp_path / "run", "steps": 1}
    attempts = [
        lambda: lora.load(model, good, scale=11),
        lambda: lora.load(model, tmp_path / "none.safetensors"),
        lambda: lora.combine(model, {good: 1.0, tmp_path / "none.safetensors": 1.0}),
        lambda: lora.add(model, 2, targets=("nothing",)),
        lambda: sample(model, PROMPTS, adapter=good, callback=interrupted),
        lambda: sample(model, PROMPTS, adapter={good: 99}),
        lambda: gradient(raising),
        lambda: align(model, raising, PROMPTS, **options),
        lambda: align(model, brightness(), PROMPTS, callback=raising, **options),
        lambda: align(model, brightness(), PROMPTS, adapter=good, rank=3, **options),
        lambda: evaluate(model, None, raising, {"all": PROMPTS}),
    ]
    before = picture()
    for number, attempt in enumerate(attempts):
        with pytest.raises(BaseException):  # noqa: B017
            attempt()
        names, hooks, weights, scheduler = picture()
        assert (names, hooks, scheduler) == (before[0], before[1], before[3]), number
        assert all(torch.equal(weights[name], p) for name, p in before[2].items()), number
    lora.load(model, good).remove()
