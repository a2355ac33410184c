"""Recipes are read, fit where they say, claim nothing that nobody did, and can be run again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import vader_nb
from tests import recipes as script
from vader_nb import checkpoints, cli, config, models, recipes
from vader_nb.memory_planner import GPUS, MARGIN

ROOT = Path(__file__).parent.parent
# Settings that only published runs may decide; peers' figures, for those who have any.
PUBLISHED = {
    "modelscope": (2e-4, 16, None),
    "videocrafter2": (2e-4, 16, 450),
    "opensora": (2e-4, 16, 800),
    "cogvideox": (1e-5, 128, 3000),
    "cogvideox-5b": (1e-5, 128, 1500),
    "wan": (1e-5, 128, 5000),
    "wan-14b": (1e-5, 128, 3000),
    "wan2.2-a14b": (1e-5, 128, 2700),
    "wan-unirl": (5e-6, 64, 835),
}


@pytest.mark.parametrize("name", recipes.CARDS)
def test_a_recipe_is_a_configuration_of_a_known_model(name):
    card, given = recipes.CARDS[name], config.read(config.Align, [f"config={name}"])
    assert given.model in models.CHECKPOINTS
    assert name.startswith(given.model)
    vader_nb.TrainConfig.from_flat(
        cli.settings_of(given, vader_nb.TrainConfig.flat_fields()) | {"validation_steps": 1}
    ).validate()
    vader_nb.prompts.get(given.prompts)
    key = tuple(card.settings.get(k) for k in ("learning_rate", "rank", "steps"))
    if card.gpu != "CPU":
        assert key == PUBLISHED.get(name, (None, None, None))
        assert (name in PUBLISHED) == bool(card.run_by) == bool(card.source)
        assert 0 < card.memory <= GPUS[card.gpu] - MARGIN


def test_every_family_has_one_and_every_configuration_is_in_the_table():
    assert {path.stem for path in config.FOLDER.glob("*.yaml")} == set(recipes.CARDS)
    have = {models.checkpoint_of(card.settings["model"]).family for card in recipes.CARDS.values()}
    published = {c.family for c in models.CHECKPOINTS.values() if isinstance(c, models.Checkpoint)}
    other = {"WanImageToVideoPipeline", "LTXConditionPipeline"}  # one more class of a family above
    assert published - other <= have


def test_a_status_is_true():
    for name, card in recipes.CARDS.items():
        assert card.status.startswith("run here") == (name in recipes.RUNS)
        assert card.status.endswith("; not run here") == bool(card.run_by)
    assert {recipes.CARDS[name].gpu for name in recipes.RUNS} <= {"CPU"}


@pytest.mark.parametrize("name", ["modelscope"])
def test_simulated_memory_is_what_the_table_says(name):
    assert round(recipes.simulated(name), 1) == recipes.CARDS[name].memory


@pytest.mark.parametrize(
    ("gpu", "strategy", "more", "expected"),
    [
        ("CPU", "Last(3)", {}, 2 * (5 + 3)),
        ("T4", "Last(3)", {}, 2 * (5 + 2)),  # the last call's graph is kept
        ("T4", "Last(3)", {"sequential_guidance": True}, 2 * (5 + 3)),
        ("CPU", "Last(3)", {"unconditional_gradient": False}, 2 * 5 + 3),
        ("T4", "Step(3)", {}, 2 * (5 + 3)),  # through two later steps
        ("T4", "DRTune(2)", {}, 2 * (5 + 2)),
        ("T4", "DRaFTLV(2)", {"guidance_scale": 1.0}, 5 + 2 * 2),
    ],
)
def test_denoiser_calls_are_those_of_a_step(
    gpu, strategy, more, expected, counted, tmp_path, monkeypatch
):
    model, calls = counted
    calls.clear()
    given = {"model": "tiny", "num_inference_steps": 5, "guidance_scale": 2.0, "batch_size": 2}
    given |= {"gradient_accumulation_steps": 2, "strategy": strategy} | more
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given))
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    settings = {"steps": 1, "num_frames": 2, "output_dir": tmp_path / "run", "progress": False}
    settings |= {"height": 16, "width": 16, "gradient_checkpointing": gpu != "CPU"}
    given["model"] = model
    reward = vader_nb.rewards.brightness()
    vader_nb.align(reward=reward, prompts="tiny", **given, **settings).adapter.remove()
    assert sum(calls) == recipes.Card("mine", gpu, 0.1).calls == 2 * 2 * expected
    assert recipes.Card("mine", gpu, 0.1, gpus=3).calls == 3 * sum(calls)


@pytest.fixture(scope="module")
def counted():
    model, calls = vader_nb.load("tiny"), []
    model.denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return model, calls


def test_guidance_that_the_denoiser_is_told_takes_one_call():
    steps = recipes.CARDS["hunyuanvideo"].settings["num_inference_steps"]
    assert recipes.CARDS["hunyuanvideo"].calls == 4 * (steps + 1)


@pytest.mark.parametrize("name", ["tiny", "modelscope"])
def test_the_memory_command_reads_a_recipe(name, monkeypatch):
    """Those of its settings on which memory depends, and words after it."""
    asked = {}
    monkeypatch.setattr(vader_nb, "memory", lambda **settings: asked.update(settings) or "")
    cli.main(["memory", *recipes.CARDS[name].memory_words, "rank=3"])
    given = recipes.CARDS[name].settings | {"rank": 3}
    shared = given.keys() & asked.keys()
    assert {"model", "reward", "strategy", "num_inference_steps"} <= shared
    assert {key: asked[key] for key in shared} == {key: given[key] for key in shared}
    assert (asked["dtype"], asked["gradient_checkpointing"]) == (
        ("float32", False) if name == "tiny" else (None, True)
    )


def test_the_memory_command_refuses_what_no_run_has(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: tiny\nprompts: tiny\nstrategi: Last(1)\n")
    with pytest.raises(SystemExit):
        cli.main(["memory", f"config={tmp_path / 'mine.yaml'}"])
    assert "unknown key 'strategi'" in capsys.readouterr().err


def test_the_shell_shows_table_recipe_and_script(capsys):
    cli.main(["recipes"])
    shown = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{shown}" for name in recipes.CARDS)
    cli.main(["recipes", "wan"])
    assert yaml.safe_load(capsys.readouterr().out) == recipes.CARDS["wan"].settings
    cli.main(["recipes", "slurm"])
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    with pytest.raises(SystemExit):
        cli.main(["recipes", "wan3"])
    assert "unknown recipe 'wan3'; choose one of tiny, " in capsys.readouterr().err


# -------------------------------------------------------------------------------------- run again

QUICK = [
    "steps=2",
    "batch_size=1",
    "eval_prompts=2",
    "eval_training_prompts=1",
    "seeds_per_prompt=1",
]
QUICK += ["num_inference_steps=2", "reward=brightness", "held_out_reward=colorfulness"]


def test_a_recipe_run_again_leaves_a_row_and_is_not_done_twice(tmp_path, monkeypatch):
    folder = script.run("tiny", QUICK, tmp_path)
    found = script.result(folder, "abc")
    assert [row["metric"] for row in found["rows"]] == ["brightness", "colorfulness"]
    assert {row["group"] for row in found["rows"]} == {"held-out"}
    assert found["rows"][1]["held_out"] and len(found["rewards"]) == 2
    stamp = (folder / "evaluation.json").stat().st_mtime_ns
    assert script.run("tiny", QUICK, tmp_path) == folder
    assert (folder / "evaluation.json").stat().st_mtime_ns == stamp
    file = tmp_path / "runs.yaml"
    file.write_text("# head\n{}\n")
    script.record("tiny", found, file)
    script.record("other", found, file)
    assert file.read_text().startswith("# head\n")
    runs = {
        name: recipes.Run(**fields) for name, fields in yaml.safe_load(file.read_text()).items()
    }
    monkeypatch.setattr(recipes, "RUNS", runs)
    row = found["rows"][0]
    status = recipes.CARDS["tiny"].status
    assert f"run here: {found['date']}, commit abc, trained in {found['seconds']} s" in status
    assert f"({row['low']:+.3f} to {row['high']:+.3f})" in status
    assert "colorfulness † " in status
    # Interrupted between training and evaluation, it goes on.
    (folder / "evaluation.json").unlink()
    trained = (folder / "metrics.jsonl").read_text()
    script.run("tiny", QUICK, tmp_path)
    assert (folder / "metrics.jsonl").read_text() == trained
    assert (folder / "evaluation.json").exists()


@pytest.fixture
def cluster(tmp_path):
    """Slurm's and accelerate's commands, that note their arguments or run them here."""
    python = f"exec env PYTHONPATH={ROOT} {sys.executable}"
    commands = {
        "srun": 'exec "$@"',
        "vader-nb": f'{python} -m vader_nb "$@"',
        "accelerate": f'while [ "$1" != -m ]; do shift; done\n{python} "$@"',
        "scontrol": 'echo "$@" >> scontrol.txt',
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    (tmp_path / "train.sh").write_text(recipes.text("slurm"))
    slurm = {"SLURM_JOB_NAME": "mine", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {"cwd": tmp_path, "env": os.environ | slurm | {"PATH": path}}


def test_a_job_whose_time_is_up_is_requeued_and_goes_on(cluster):
    """USR1 in the middle of training: what there is is kept, the job comes again, and is done."""
    folder, words = cluster["cwd"], ["tiny", *QUICK, "steps=400"]
    job = subprocess.Popen(["bash", "train.sh", *words], **cluster, start_new_session=True)
    metrics = folder / "runs" / "mine" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 1:
            break
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)  # the timer's sleep, which a job's end would end
    assert (folder / "scontrol.txt").read_text() == "requeue 7\n"
    done = len(metrics.read_text().splitlines())
    assert 1 < done < 400
    assert set(checkpoints.list_checkpoints(folder / "runs" / "mine")) >= {done}
    words = ["tiny", *QUICK, f"steps={done + 1}"]
    assert subprocess.run(["bash", "train.sh", *words], **cluster, timeout=200).returncode == 0
    assert len(metrics.read_text().splitlines()) == done + 1
    assert (folder / "runs" / "mine" / "report.html").exists()
    assert (folder / "scontrol.txt").read_text() == "requeue 7\n"  # and not once more


def test_a_job_that_fails_is_not_requeued(cluster):
    done = subprocess.run(["bash", "train.sh", "tiny", "stepps=1"], **cluster, capture_output=True)
    assert done.returncode == 2
    assert b"did you mean steps" in done.stderr
    assert not (cluster["cwd"] / "scontrol.txt").exists()


def test_json_of_rows_has_what_the_file_takes():
    from vader_nb.evaluation import Row

    assert set(script.FIELDS) <= set(Row.__dataclass_fields__)
    assert json.dumps(script.rounded(0.123456789)) == "0.12346"
