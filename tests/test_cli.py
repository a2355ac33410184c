"""The shell commands as a user types them: exit codes, output and messages included."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import vader_nb
from vader_nb import cli, config
from vader_nb.rewards import brightness

FEW = ["num_inference_steps=2", "eval_prompts=2", "eval_training_prompts=1", "seeds_per_prompt=2"]
QUICK = ["steps=1", "batch_size=1", "num_inference_steps=2", "evaluation=false"]


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """`vader-nb …` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> SimpleNamespace:
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as error:
            code = error.code or 0
        told = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=told.out, stderr=told.err)

    return run


def process(*arguments, cwd):
    """The same in a process of its own."""
    command = [sys.executable, "-m", "vader_nb", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_importing_is_instant_and_loads_no_torch():
    code = (
        "import sys, time; began = time.perf_counter(); import vader_nb; took = time.perf_counter() - began;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(took)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


def test_every_public_name_is_there_in_any_order():
    code = """
import vader_nb, types
for name in vader_nb.__all__:
    assert getattr(vader_nb, name) is not None
for name in ("align", "evaluate", "check", "load", "sample"):
    assert callable(getattr(vader_nb, name)) and not isinstance(getattr(vader_nb, name), types.ModuleType), name
import vader_nb.rewards.checking, vader_nb.rewards.video_mae
assert callable(vader_nb.rewards.check) and callable(vader_nb.rewards.action)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_align_evaluate_and_sample(shell, tmp_path):
    done = shell("align", "steps=2", "batch_size=2", "name=first", *FEW)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "first"
    assert "trained 2 steps" in done.stdout and "report.html" in done.stdout
    rows = json.loads((folder / "evaluation.json").read_text())
    assert {row["group"] for row in rows} == {"training", "held-out"}
    assert {"hps", "aesthetic", "motion", "diversity", "oracle: color and shape"} <= {
        row["metric"] for row in rows
    }
    several = [row for row in rows if row["prompts"] > 1]  # one has no interval
    assert several and all(row["low"] <= row["difference"] <= row["high"] for row in several)
    for clip in ("group-0.gif", "group-0.mp4", "group-1.gif", "group-1.mp4"):
        assert (folder / "clips" / clip).stat().st_size > 1000
    report = (folder / "report.html").read_text()
    for part in ("<svg", "data:image/gif;base64", "learning_rate", "transformers"):
        assert part in report
    links = re.findall(r'(?:src|href)="([^"]*)"', report)
    # It needs no other file.
    assert links and all(link.startswith(("data:", "#")) for link in links)

    done = shell("align", "steps=2", "name=first", *FEW)
    assert done.returncode == 2 and "holds another run" in done.stderr
    again = ["steps=3", "batch_size=2", "name=first", "resume=latest", "evaluation=false"]
    done = shell("align", *again, *FEW)
    assert done.returncode == 0, done.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3

    checkpoint = "runs/first/checkpoints/step-000002"
    again = ["steps=4", "batch_size=2", f"resume={checkpoint}", "evaluation=false"]
    done = shell("align", *again, *FEW)  # a checkpoint knows its run
    assert done.returncode == 0, done.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]

    done = shell("evaluate", "runs/first", *FEW)
    assert done.returncode == 0, done.stderr
    assert (folder / "evaluation" / "report.html").is_file()

    words = ["a red star <b>", "../x", "adapter=runs/first", "scale=1.5", "num_inference_steps=1"]
    done = shell("sample", *words)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in Path("runs/samples").iterdir()) == [
        "seed-0.gif",
        "seed-1.gif",
    ]

    done = shell("align", *QUICK, "name=second", "adapter=runs/first")
    assert done.returncode == 0, done.stderr
    assert Path("runs/second/adapter.safetensors").is_file()


def test_training_as_in_python(shell, tmp_path):
    """A reward from a file, a strategy with arguments, and settings that VADER's names do not have."""
    Path("mine.py").write_text(
        "def blue(frames, prompts):\n    return frames[:, :, 2].mean((1, 2, 3))\n"
    )
    words = ["reward=mine.py:blue", "strategy=DRTune(1, stop=1)", "frames=every:4", "eta=0.5"]
    words += ["targets=[to_q]", "unconditional_gradient=false", "gradient_checkpointing=true"]
    done = shell("align", *QUICK, *words, "name=blue")
    assert done.returncode == 0, done.stderr
    written = json.loads(Path("runs/blue/config.json").read_text())
    assert written["reward"] == "blue" and written["strategy"] == "DRTune(K=1, stop=1)"
    assert (written["frames"], written["targets"]) == ("every:4", ["to_q"])
    assert written["sampling"]["eta"] == 0.5
    assert written["sampling"]["unconditional_gradient"] is False


def test_a_stop_before_the_first_step_is_said_as_it_is(shell, monkeypatch):
    """Ctrl-C while the first step is computed."""
    from vader_nb import rewards

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewards, "parse", lambda *_, **options: rewards.reward(interrupted))
    done = shell("align", *QUICK, "name=x")
    assert done.returncode == 130
    assert "stopped before the first step; nothing to keep" in done.stderr
    assert "trained" not in done.stdout and "adapter.safetensors" not in done.stdout
    assert "could not be written" not in done.stderr

    monkeypatch.setattr(rewards, "parse", interrupted)  # while things are loaded
    done = shell("check", "colorfulness")
    assert done.returncode == 130 and "interrupted" in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["sample"], "which prompt\\?"),
        (["sample", ""], "which prompt\\?"),
        (["sample", "a cat", "steps=3"], "'steps'; did you mean num_inference_steps"),
        (["sample", "caf\udce9"], "not UTF-8"),
        (["sample", "a cat", f"seed={10**30}"], "seed must be at most"),
        (["sample", "a cat", "threads=0"], "threads must be at least 1, got 0"),
        (["sample", "a cat", "format=exe"], "must end in .gif, .webp, .mp4"),
        (["align", "model=tinny"], "unknown model 'tinny': choose one of tiny"),
        (
            ["align", "decoder_states=cpu"],
            "decoder_states='cpu' has no effect: the decoder of 'tiny'",
        ),
        (
            ["align", "model=wan", "decoder_gradient=last"],
            "decoder_gradient='last': choose 'exact'",
        ),
        (["align", "validation_steps=0"], "validation_steps must be at least 1, got 0"),
        (["align", "max_grad_norm=nan"], "max_grad_norm must be at least 0, got nan"),
        (["check", "hps + 'a'"], "does arithmetic with a string"),
        (["translate-config"], "which file\\?"),
        (["export"], "which adapter\\?"),
        (["export", "nothing"], "no adapter file at nothing"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_work(shell, tmp_path, words, message):
    done = shell(*words)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    lines = [x for x in done.stderr.splitlines() if x and "Loading weights" not in x]
    assert len(lines) == 1 and re.search(message, lines[0])


@pytest.mark.parametrize(
    "text, message",
    [
        ("1: 3", "unknown key '1'"),
        ("yes: 3", "unknown key 'True'"),
        ("null: 3", "odd.yaml is not YAML"),
        ("prompts: [[a]]", "prompts must be a list of strings"),
    ],
)
def test_odd_files_are_one_line(shell, tmp_path, text, message):
    (tmp_path / "odd.yaml").write_text(text, encoding="utf-8")
    done = shell("sample", "config=odd.yaml")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_help_begins_with_a_command_that_works(shell):
    for name, (_, kind) in cli.COMMANDS.items():
        first = shell(name, "--help").stdout.splitlines()[0]
        assert first == kind.example and name in first


def test_a_terminal_without_unicode(tmp_path):
    command = [sys.executable, "-m", "vader_nb", "align", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and "learning_rate" in done.stdout


def test_two_unnamed_starts_in_one_second_are_two_runs(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.time, "strftime", lambda form: "20261125-083159")
    for rate in ("1e-3", "1e-2"):
        assert shell("align", *QUICK, f"learning_rate={rate}").returncode == 0
    configs = [path.read_text() for path in (tmp_path / "runs").glob("*/config.json")]
    assert sorted("0.01" in text for text in configs) == [False, True]


@pytest.mark.parametrize("command", [["align"], ["check", "colorfulness"], ["memory"]])
def test_ctrl_c_while_importing_is_one_line(tmp_path, command):
    """A real SIGINT in the first second of a real process."""
    code = (
        "import signal, sys, threading, os, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        f"from vader_nb.cli import main; main({command!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (130, "vader-nb: interrupted\n")


def test_prompt_files_as_editors_write_them(tmp_path):
    from vader_nb import prompts

    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red star\r\n\r\n   \r\na blue circle <i>\r\n".encode())
    assert prompts.get(path) == ["a red star", "a blue circle <i>"]
    assert prompts.get(["x"]) == ["x"]
    assert len(prompts.get("tiny")) == 668
    assert not set(prompts.get("tiny")) & set(prompts.get("tiny_held_out"))


def test_a_report_escapes_what_users_wrote(tmp_path):
    import torch

    from vader_nb.evaluation import Evaluation, Row
    from vader_nb.video import Gallery, Video

    evil = "<script>alert(1)</script>"
    clip = torch.rand(1, 2, 3, 8, 8)
    evaluation = Evaluation(
        [Row(evil, evil, 0, 1, 1, 0.5, 1.5, 3)], {evil: ([evil], clip, clip)}, 8
    )
    for page in (
        evaluation.report(tmp_path / "r.html").read_text(),
        Gallery({evil: [Video(clip[0], 8, evil)]}).to_html(),
        Video(clip[0], 8, evil)._repr_html_(),
    ):
        assert evil not in page
        assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompts=missing.txt"], "no prompt file at missing.txt"),
        (["prompts=empty.txt"], "holds no prompt"),
        (["prompts=binary.txt"], "not UTF-8"),
        (["strategy=lst"], "cannot read strategy 'lst'"),
        (["strategy=Last(99)"], "K=99 must lie in 1..10"),
        (["--steps", "2"], "write settings as key=value: steps="),
        (["frames=random:0"], "cannot choose 0"),
        (["frames=0,99"], "index 99 is out of range"),
        (["frames=some"], "cannot read frames"),
        (["frames=,"], "nothing to score"),
        (["reward=hsp"], "known rewards"),
        (["model=modelscope", "reward=brightness"], "ali-vilab/text-to-video-ms-1.7b"),
        (["model=modelscope"], "xswu/HPSv2"),
        (["name=../escape"], "must be a single folder name"),
        (["output_dir=empty.txt"], "cannot write to"),
        (["steps=0"], "steps must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_a_failure(shell, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00bad")
    done = shell("align", "name=x", "steps=1", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("adapter.safetensors"))


def test_a_mistake_is_a_failed_process(tmp_path):
    done = process("align", "reward=hsp", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("vader-nb: unknown reward 'hsp'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "align resume=latest",
            "resume=latest continues a run by its name, but none is given: write name=",
        ),
        ("align resume=true", "resume=true continues a run by its name"),
        ("align resume=nowhere", "nowhere is not a checkpoint"),
        ("align seeds_per_prompt=0", "seeds_per_prompt must be at least 1, got 0"),
        (
            "align validation_steps=1 eval_training_prompts=0 prompts=hps_custom",
            "no prompts to evaluate on: .*held_out=",
        ),
        ("evaluate eval_training_prompts=0 prompts=animals", "no prompts to evaluate"),
        ("evaluate clips=-1", "clips must be at least 1, got -1"),
        ("evaluate clips=0", "clips must be at least 1, got 0"),
        ("evaluate eval_batch_size=0", "eval_batch_size must be at least 1"),
        ("align held_out_reward=action held_out=cats.txt", "no action .* 'a cat asleep'"),
        (
            "align held_out_reward=action held_out=cats.txt validation_steps=1 evaluation=false",
            "no action .* 'a cat asleep'",
        ),
    ],
)
def test_more_mistakes_found_before_anything_is_loaded(
    shell, tmp_path, monkeypatch, words, message
):
    (tmp_path / "cats.txt").write_text("a cat asleep\n")
    monkeypatch.setattr("vader_nb.models.load", lambda *arguments, **options: pytest.fail("loaded"))
    done = shell(*words.split(), "reward=brightness")
    assert done.returncode == 2
    assert re.search(message, done.stderr)


def test_a_judge_that_needs_more_frames_is_a_mistake_before_training(shell, tmp_path):
    words = ["reward=brightness", "held_out_reward=action", "held_out=tiny_held_out", *FEW]
    done = shell("align", *words, "steps=1", "num_frames=1", "name=x")
    assert done.returncode == 2 and "needs at least 2 frames, got 1" in done.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_warning_is_one_line(shell, monkeypatch):
    def shown():
        return warnings.formatwarning("mind the gap", UserWarning, warnings_of, 1)

    monkeypatch.setattr(vader_nb.models, "table", shown)
    warnings_of = "vader_nb/trainer.py"
    assert shell("models").stdout == "vader-nb: mind the gap\n\n"
    assert "trainer.py" in shown()  # outside of a command as ever
    warnings_of = "torch/nn.py"
    assert "torch/nn.py" in shell("models").stdout


def test_what_a_validation_looked_at_is_said(capsys, tiny):
    words = ["prompts=animals", "num_inference_steps=1", "validation_steps=1"]
    for more, told in ([], True), (["held_out=hps_custom"], False):
        arguments = config.read(config.Align, [*words, *more])
        groups = cli.evaluation_prompts(arguments, cli.training_prompts(arguments))
        cli.validation(arguments, tiny, brightness(), groups)
        err = capsys.readouterr().err
        assert ("validation uses training prompts" in err) == told and bool(err) == told


@pytest.mark.parametrize("words", [[], ["frames=ends"]], ids=str)
def test_memory_takes_the_frames_that_align_would(monkeypatch, words):
    """Without `frames`, both leave the choice to the rule for rewards on frames and on clips."""
    asked = {}
    monkeypatch.setattr("vader_nb.memory_planner.memory", lambda **options: asked.update(options))
    cli.main(["memory", "model=tiny", "gpu_memory=24", "strategy=ReFL(0.5)", *words])
    align = config.read(config.Align, words)
    assert asked["frames"] == align.frames == ("ends" if words else None)
    assert (asked["model"], asked["gpu_memory"], asked["strategy"]) == ("tiny", "24", "ReFL(0.5)")


def test_memory_in_a_shell(tmp_path):
    done = process("memory", "model=tiny", "reward=brightness", "gpu_memory=24", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^24 GiB .* fits$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "no adapter file"),
        ("pickle", "is a pickle"),
        ("truncated", "not a complete safetensors"),
    ],
)
def test_bad_adapter_files(shell, tmp_path, kind, message):
    path = tmp_path / "adapter.safetensors"
    if kind != "absent":
        path.write_bytes(b"\x80\x04K\x01." if kind == "pickle" else b"\x10\x00")
    done = shell("evaluate", path, *FEW)
    assert done.returncode == 2
    assert message in done.stderr


def launch(*arguments, cwd, processes=1):
    """accelerate's own launcher, as VADER's README uses it."""
    engine = Path(cli.__file__).parent / "engines" / "cpu.yaml"
    how = ["--config_file", engine] if processes > 1 else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how]
    command += ["--num_processes", processes, "-m", "vader_nb", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.mark.parametrize("reward", ["aesthetic", "hps", "actpred"])
def test_vaders_training_commands(shell, tmp_path, reward):
    words = ["gradient_accumulation_steps=4", "prompt_fn=hps_custom", f"reward_fn={reward}"]
    words += [*QUICK, "name=vader"]
    # One of them through the launcher; in a process of their own the others would do the same.
    done = launch("align", *words, cwd=tmp_path) if reward == "hps" else shell("align", *words)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "runs" / "vader" / "config.json").read_text())
    assert written["gradient_accumulation_steps"] == 4
    asked = {"aesthetic": "aesthetic towards 10", "hps": "hps", "actpred": "action"}[reward]
    assert asked in written["reward"]
    assert "the embedded model" in done.stderr
    assert ("its captions are used" in done.stderr) == (reward == "actpred")


def test_two_processes_train_watch_and_evaluate(tmp_path):
    """What a user with two GPUs types, on the CPU: training with a validation, evaluation, then VADER's evaluation."""
    words = [
        "steps=4",
        "batch_size=1",
        "validation_steps=2",
        "checkpointing_steps=1",
        "checkpoints_total_limit=1",
    ]
    words += ["held_out_reward=aesthetic", "reward=hps", "log_with=tensorboard", "name=two", *FEW]
    done = launch("align", *words, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "two"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    scored = {
        row["step"]: row["validation/aesthetic"] for row in rows if "validation/aesthetic" in row
    }
    assert list(scored) == [2, 4]
    best = max(scored, key=scored.get)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        f"step-{best:06d}",
        "step-000004",
    }
    assert f"step-{best:06d}" in done.stdout and done.stdout.count("trained 4 steps") == 1
    assert {
        row["metric"]: row["held_out"]
        for row in json.loads((folder / "evaluation.json").read_text())
    }["aesthetic"]
    assert list(folder.rglob("events.out.tfevents*"))
    words = [
        "only_val=True",
        "num_only_val_itrs=2",
        "val_batch_size=2",
        "lora_path=runs/two",
        "num_inference_steps=2",
    ]
    done = launch("evaluate", *words, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert {row["prompts"] for row in rows} == {4}


def test_check_in_a_shell(tmp_path):
    done = process("check", "colorfulness", cwd=tmp_path)
    assert done.returncode == 0
    assert "fit for training" in done.stdout


def test_a_reward_that_is_unfit_fails(shell):
    Path("mine.py").write_text(
        "def flat(frames, prompts):\n    return 0 * frames.mean((1, 2, 3, 4))\n"
    )
    done = shell("check", "mine.py:flat")
    assert done.returncode == 1
    assert "NOT FIT" in done.stdout


def test_help_and_unknown_commands(shell):
    for words in ([], ["--help"], ["-h"]):
        done = shell(*words)
        assert done.returncode == 0
        assert all(f"vader-nb {name}" in done.stdout for name in cli.COMMANDS)
    done = shell("sample", "a star", "--help")
    assert done.returncode == 0 and "guidance_scale" in done.stdout
    done = shell("algin")
    assert done.returncode == 2 and "unknown command 'algin'" in done.stderr
