"""Configuration: what wins over what, VADER's names, other tools' files, and mistakes."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from vader_nb import cli, config, memory_planner, translate
from vader_nb.config import (
    FOLDER,
    Align,
    Evaluate,
    Memory,
    Sample,
    read,
    schema,
)
from vader_nb.strategies import Last, Random, parse_frames, parse_strategy
from vader_nb.trainer import TrainConfig

ROOT = Path(__file__).parent.parent


def test_defaults_then_file_then_words(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 7\nlearning_rate: 2e-4\nreward: brightness\n")
    assert (read(Align, []).steps, read(Align, []).learning_rate) == (40, 1e-3)
    got = read(Align, [f"config={tmp_path}/mine.yaml", "steps=9"])
    assert (got.steps, got.learning_rate, got.reward, got.rank) == (9, 2e-4, "brightness", 8)
    assert read(Align, ["steps=9", f"config={tmp_path}/mine.yaml"]).steps == 9  # whatever the order


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (Align, ["--steps", "3"], "'--steps': write settings as key=value: steps="),
        (Align, ["--learning-rate=2e-4"], "write settings as key=value: learning_rate=2e-4"),
        (Align, ["steps=3", "-o", "x"], "'-o': write settings as key=value"),
        (Sample, ["a star", "-o", "x"], "'-o': write settings as key=value"),
        (Sample, ["--sequential-guidance", "a star"], "as key=value: sequential_guidance="),
        (Evaluate, ["runs/a", "runs/b"], "'runs/b': there is one adapter already"),
    ],
    ids=str,
)
def test_there_is_one_way_to_write_a_setting(command, words, message):
    with pytest.raises(ValueError, match=message):
        read(command, words)


@pytest.mark.parametrize(
    "prompt",
    ["E=mc2 on a blackboard", "???", "a ${shop} sign", "'=' in 'quotes'", "x=1", "- a dash"],
)
def test_any_text_can_be_a_prompt(prompt):
    assert read(Sample, [prompt, "seed=3"]).prompts == [prompt]
    assert read(Sample, [f"prompts={prompt}", "a star"]).prompts == [prompt, "a star"]


def test_a_misspelled_key_is_no_prompt():
    with pytest.raises(ValueError, match="unknown key 'adaptor'; did you mean adapter?"):
        read(Sample, ["a star", "adaptor=runs/first"])
    with pytest.raises(ValueError, match="unknown key 'sclae'; did you mean scale?"):
        read(Sample, ["a star", "sclae=0.5"])
    with pytest.raises(ValueError, match="unknown key 'steps'; did you mean num_inference_steps?"):
        read(Sample, ["a star", "steps=3"])
    with pytest.raises(ValueError, match="unknown key 'rank'"):  # of align
        read(Sample, ["a star", "rank=4"])
    with pytest.raises(ValueError, match="unknown key 'batch'; did you mean batch_size?"):
        read(Align, ["batch=4"])
    assert read(Sample, ["steps=down the stairs"]).prompts == ["steps=down the stairs"]


def test_the_shell_reaches_what_python_reaches():
    words = ["strategy=DRTune(2, stop=3)", "frames=every:2", "targets=[to_q,to_k]", "eta=0.5"]
    words += ["unconditional_gradient=false", "gradient_checkpointing=true", "adapter=runs/first"]
    got = read(Align, words)
    assert (got.strategy, got.frames, got.targets) == (
        "DRTune(2, stop=3)",
        "every:2",
        ["to_q", "to_k"],
    )
    assert (got.eta, got.unconditional_gradient, got.gradient_checkpointing) == (0.5, False, True)
    assert got.adapter == "runs/first"
    assert read(Align, ["targets=to_q"]).targets == ["to_q"]
    assert read(Align, ["targets=attention+ffn"]).targets == ["attention+ffn"]
    assert TrainConfig(targets=["attention+ffn"]).targets == ("attention", "ffn")
    keys = {f.name for f in fields(schema(Align))}
    assert {f.name for f in TrainConfig.flat_fields()} <= keys
    got = read(Memory, ["strategy=ReFL(0.5)", "gpu_memory=24", "activation_offload=true"])
    assert (got.strategy, got.gpu_memory, got.activation_offload) == ("ReFL(0.5)", "24", True)


def test_defaults_are_those_of_python():
    """Where the shell differs: a run's name is one folder's below output_dir, validation is off."""
    got, python = read(Align, []), TrainConfig()
    own = {f.name for f in fields(Align)}
    for f in fields(python):
        if f.name not in own and f.name != "sampling":
            value = getattr(python, f.name)
            assert getattr(got, f.name) == (str(value) if f.name == "strategy" else value), f.name
    assert parse_strategy(got.strategy) == parse_strategy(python.strategy) == Last(1)


def test_values_keep_their_shape():
    got = read(
        Align,
        [
            "reward=hps + 0.02 * aesthetic",
            "frames=0,4,-1",
            "name=007",
            "output_dir=a=b",
            "prompts=null x",
        ],
    )
    assert (got.reward, got.frames, got.output_dir) == ("hps + 0.02 * aesthetic", "0,4,-1", "a=b")
    assert (got.name, got.prompts) == ("007", "null x")
    assert read(Sample, ["a red star", "../x", "prompts=a=b", "seed=3"]).prompts == [
        "a red star",
        "../x",
        "a=b",
    ]
    assert read(Evaluate, ["runs/first", "scale=0.5"]).adapter == "runs/first"


def test_braces_in_a_text_are_no_reference():
    words = ["a ${shop} sign", "a \\${tax} form", "$5 \\ {x}"]
    assert read(Sample, words).prompts == words


def test_null_takes_a_files_value_back(tmp_path):
    (tmp_path / "mine.yaml").write_text("alpha: 3\nname: mine\nprompts: nouns\n")
    got = read(Align, [f"config={tmp_path}/mine.yaml", "alpha=null", "name=null", "prompts=null"])
    assert (got.alpha, got.name) == (None, None)
    assert got.prompts == "null"  # what cannot be empty is a text


@pytest.mark.parametrize(
    ("words", "strategy"),
    [
        (["strategy=Random()"], Random()),
        (["strategy=Random"], Random()),
        (["backprop_mode=rand"], Random()),
        (["backprop_mode=last"], Last(1)),
        ([], Last(1)),
        (["backprop_mode=specific"], Last(10)),
        (["backprop_mode=specific", "num_inference_steps=50"], Last(35)),
        (["backprop_mode=specific", "ddim_steps=50"], Last(35)),
        (["backprop_mode=specific", "strategy=Random()"], Random()),
    ],
    ids=str,
)
def test_the_steps_that_learn_with_a_shipped_configuration(words, strategy):
    got = read(Align, ["config=modelscope", *words])
    assert parse_strategy(got.strategy) == strategy


def test_vaders_names_in_a_file(tmp_path, capsys):
    """As on the command line: together with all other keys, in either's names; ours, and those that come later, win."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "lora_rank: 3\nbackprop_mode: specific\nddim_steps: 20\nreward_fn: hps\nseed: 7\n"
    )
    got = read(Align, [f"config={path}"])
    assert (got.rank, got.strategy, got.num_inference_steps, got.seed) == (3, "Last(5)", 20, 7)
    assert (
        "VADER's lora_rank, backprop_mode, ddim_steps, reward_fn read as: "
        in capsys.readouterr().err
    )
    got = read(Align, [f"config={path}", "num_inference_steps=30", "rank=4", "hps_version=v2.0"])
    assert (got.rank, got.strategy, got.reward) == (4, "Last(15)", "hps('v2.0')")
    assert got.num_inference_steps == 30


def test_a_reference_in_a_file_is_to_the_final_value(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: run-${seed}\nseed: 1\n")
    assert read(Align, [f"config={tmp_path}/mine.yaml", "seed=2"]).name == "run-2"


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "torn.yaml").write_text("steps: [1\nfoo")
    (tmp_path / "list.yaml").write_text("- steps\n")
    for name, message in {
        "torn.yaml": "torn.yaml is not YAML: ",
        "list.yaml": "list.yaml holds no keys",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            read(Align, [f"config={tmp_path / name}"])
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=message):
            config.translated(tmp_path / name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learnin_rate=3"], "unknown key 'learnin_rate'; did you mean learning_rate?"),
        (["stepps=3"], "did you mean steps?"),
        (["checkpoint_every=3"], "did you mean checkpoint"),
        (["reward_fm=hps"], "did you mean reward_fn?"),
        (["steps=many"], "steps: .*'many'"),
        (["steps=1.5"], "steps: .*1.5"),
        (["evaluation=maybe"], "evaluation: .*maybe"),
        (["steps"], "write key=value"),
        (["config=missing.yaml"], "no configuration at missing.yaml; .*modelscope"),
        (["backprop_mode=some"], "unknown backprop_mode 'some'"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(Align, words)


def test_an_unknown_key_in_a_file_is_named_with_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("step: 7\n")
    with pytest.raises(ValueError, match=r"unknown key 'step' in .*mine.yaml; did you mean steps"):
        read(Align, [f"config={tmp_path}/mine.yaml"])


def test_every_key_is_in_the_help():
    for name, (_, kind) in cli.COMMANDS.items():
        text = config.usage(kind)
        for f in fields(schema(kind)):
            assert re.search(rf"^  {f.name}\b.* \w", text, re.MULTILINE), (name, f.name)


# ---------------------------------------------------------------------------------- VADER and others


def test_vaders_command_as_its_readme_writes_it(capsys):
    got = read(
        Align, ["gradient_accumulation_steps=4", "prompt_fn=hps_custom", "reward_fn=aesthetic"]
    )
    assert got.gradient_accumulation_steps == 4
    assert (got.prompts, got.reward) == ("hps_custom", "0.1 * aesthetic().towards(10)")
    assert "VADER's prompt_fn, reward_fn read as: prompts=hps_custom" in capsys.readouterr().err
    got = read(
        Evaluate,
        ["only_val=True", "num_only_val_itrs=1000", "val_batch_size=4", "lora_path=runs/mine"],
    )
    assert (got.clips, got.eval_batch_size, got.adapter) == (4000, 4, "runs/mine")
    assert read(Evaluate, ["only_val=True", "lora_path="]).adapter is None


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"reward_fn": "hps", "hps_version": "v2.1"}, {"reward": "hps"}),
        ({"reward_fn": "hps", "hps_version": "v2.0"}, {"reward": "hps('v2.0')"}),
        ({"reward_fn": "actpred"}, {"reward": "action", "frames": "every:2"}),
        ({"reward_fn": "actpred", "decode_frame": "all"}, {"reward": "action", "frames": "all"}),
        (
            {"reward_fn": "objectDetection", "target_object": "cup"},
            {"reward": "object_removal('cup')"},
        ),
        ({"decode_frame": "-1"}, {"frames": "random:1"}),
        ({"decode_frame": -1}, {"frames": "random:1"}),
        ({"decode_frame": "fml"}, {"frames": "ends"}),
        ({"decode_frame": "7"}, {"frames": "7"}),
        ({"decode_frame": "alt"}, {"frames": "every:2"}),
        ({"reward_fn": "compression"}, {"reward": "compression('compression_reward.pt')"}),
        ({"reward_fn": "0.5 * hps"}, {"reward": "0.5 * hps"}),
        ({"grad_checkpoint": "True"}, {"gradient_checkpointing": "True"}),
        ({"backprop_mode": "rand"}, {"strategy": "Random()"}),
        # from the step with index 15 to the end
        (
            {"backprop_mode": "specific", "ddim_steps": 25},
            {"strategy": "Last(10)", "num_inference_steps": 25},
        ),
        ({"use_wandb": "False", "logger_type": "wandb"}, {"log_with": None}),
        (
            {"lr": 2e-4, "lora_rank": 16, "frames": 12},
            {"learning_rate": 2e-4, "rank": 16, "num_frames": 12},
        ),
        ({"pretrained_model_path": "damo-vilab/text-to-video-ms-1.7b"}, {"model": "modelscope"}),
    ],
)
def test_vaders_arguments(given, ours):
    assert translate.translate("vader", given)[0] == ours


@pytest.mark.parametrize(
    ("source", "given", "ours"),
    [
        ("videox_fun", {"reward_fn": "HPSReward"}, {"reward": "hps"}),
        (
            "videox_fun",
            {"reward_fn": "HPSReward", "reward_fn_kwargs": '{"version": "v2.0"}'},
            {"reward": "hps('v2.0')"},
        ),
        ("videox_fun", {"reward_fn": "MPSReward"}, {}),
        ("videox_fun", {"backprop_strategy": "last"}, {"strategy": "Last(1)"}),
        ("videox_fun", {"backprop_strategy": "random"}, {"strategy": "DRTune(5)"}),
        ("videox_fun", {"num_sampled_frames": "4"}, {"frames": "random:4"}),
        ("videox_fun", {"num_decoded_latents": "2"}, {"frames": "0,1"}),
        ("trl", {"truncated_backprop_rand": True}, {"strategy": "Random(50)"}),
        (
            "trl",
            {"truncated_backprop_rand": True, "truncated_rand_backprop_minmax": "(10, 50)"},
            {"strategy": "Random(40)"},
        ),
        (
            "trl",
            {"truncated_backprop_rand": "false", "truncated_backprop_timestep": 99},
            {"strategy": "Last(1)"},
        ),
    ],
)
def test_other_tools_arguments(source, given, ours):
    assert translate.translate(source, given)[0] == ours
    if "strategy" in ours:
        parse_strategy(ours["strategy"])
    if "frames" in ours:
        parse_frames(ours["frames"])


@pytest.mark.parametrize("source", translate.SOURCES)
def test_every_translated_name_is_one_of_ours(source):
    table = translate.tool(source)
    known = {f.name for kind in (Align, Evaluate) for f in fields(schema(kind))}
    assert set(table.names.values()) <= known
    assert set(table.values) <= known and set(table.notes) <= set(table.names)
    assert len(set(table.arguments)) == len(table.arguments)  # none is in two places
    assert all(table.left_out)  # what is left out has a reason


VADER_YAML = """
pretrained_model_path: "damo-vilab/text-to-video-ms-1.7b"
gradient_accumulation_steps: 1
prompt_fn: "nouns_activities"
prompt_fn_kwargs:
  nouns_file: animals.txt
  activities_file: deeds.txt
decode_frame: -1
reward_fn: "hps"
lora_rank: 16
validation_data:
  width: 384
  height: 384
  num_frames: 16
  num_inference_steps: 25
  guidance_scale: 9
learning_rate: 2e-4
adam_weight_decay: 0
train_batch_size: 1
max_train_steps: 10000
mixed_precision: "fp16"
use_text_lora: True
load_videodataset: False
"""
VIDEOX_SH = """
export MODEL_NAME="models/Wan"
export STEPS=5
accelerate launch --mixed_precision="bf16" scripts/wan2.1_fun/train_reward_lora.py \\
  --pretrained_model_name_or_path=$MODEL_NAME --rank=32 --network_alpha=16 --train_batch_size=1 \\
  --learning_rate=1e-05 --max_grad_norm=0.3 --train_sample_height=256 --train_sample_width=256 \\
  --num_inference_steps=30 --reward_fn="HPSReward" --reward_fn_kwargs='{"version": "v2.1"}' \\
  --backprop_strategy="tail" --backprop_num_steps=$STEPS --backprop --low_vram
"""
TRL_YAML = """
num_epochs: 50
train_learning_rate: 1e-3
train_gradient_accumulation_steps: 4
sample_num_steps: 50
truncated_backprop_rand: false
truncated_backprop_timestep: 45
negative_prompts: ""
"""


@pytest.mark.parametrize(
    ("name", "text", "expected", "warned"),
    [
        ("config.yaml", VADER_YAML, {"model": "modelscope", "prompts": "nouns_activities", "nouns_file": "animals.txt",
         "reward": "hps", "frames": "random:1", "rank": 16, "height": 384, "num_frames": 16, "num_inference_steps": 25,
         "guidance_scale": 9.0, "learning_rate": 2e-4, "steps": 10000, "batch_size": 1, "mixed_precision": "fp16"},
         ["use_text_lora", "load_videodataset: left out; there is no data set", "alpha=8"]),
        ("train.sh", VIDEOX_SH, {"model": "models/Wan", "rank": 32, "alpha": 16.0, "learning_rate": 1e-5,
         "max_grad_norm": 0.3, "height": 256, "reward": "hps", "strategy": "Last(5)", "mixed_precision": "bf16"},
         ["its Fun checkpoints", "low_vram", "backprop: left out"]),
        ("align.yaml", TRL_YAML, {"steps": 50, "learning_rate": 1e-3, "gradient_accumulation_steps": 4,
         "num_inference_steps": 50, "strategy": "Last(5)"}, ["negative_prompts"]),
    ],
    ids=["vader", "videox_fun", "trl"],
)  # fmt: skip
def test_translate_config(tmp_path, monkeypatch, capsys, name, text, expected, warned):
    """As a user: translate a file, look at what is said, and read the result back as a configuration."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    cli.main(["translate-config", name, "output=ours.yaml"])
    told = capsys.readouterr()
    for words in warned:
        assert words in told.err
    got = read(Align, ["config=ours.yaml"])
    assert {key: getattr(got, key) for key in expected} == expected
    cli.main(["translate-config", name])
    assert capsys.readouterr().out == Path("ours.yaml").read_text()


VIDEOCRAFTER_SH = """
# don't launch this twice
accelerate launch --multi_gpu main.py --mode 'base' --ckpt_path x.ckpt \\
  --savefps 10 --fps 24 --frames 12 --unconditional_guidance_scale 12.0 --ddim_eta 1.0 \\
  --prompt_fn 'chatgpt_inference' --reward_fn rainy --backprop_mode rand  # it's raining
"""
OPEN_SORA_SH = (
    "accelerate launch main.py config.py --num-frames 2s --resolution 240p --aspect-ratio 3:4 "
    "--prompt-path p.txt\n"
)


@pytest.mark.parametrize(
    ("text", "expected", "warned"),
    [
        (
            VIDEOCRAFTER_SH,
            {
                "model": "videocrafter2",
                "reward": "rainy('rainy_reward.pt')",
                "strategy": "Random()",
                "prompts": "tiny",
                "num_frames": 12,
                "guidance_scale": 12.0,
                "eta": 1.0,
                "options": {"fps": 24},
            },
            [
                "VADER's script for model=videocrafter2",
                "no prompts are named 'chatgpt_inference' here",
            ],
        ),
        (
            OPEN_SORA_SH,
            {
                "model": "opensora",
                "num_frames": 51,
                "height": 276,
                "width": 368,
                "prompts": "p.txt",
            },
            ["VADER's script for model=opensora"],
        ),
    ],
    ids=["videocrafter", "open_sora"],
)
def test_vaders_other_scripts(tmp_path, monkeypatch, text, expected, warned):
    from vader_nb import models, rewards

    (tmp_path / "train.sh").write_text(text)
    written, notes = config.translated(tmp_path / "train.sh")
    for words in warned:
        assert any(words in note for note in notes)
    assert not any("unknown" in note for note in notes)
    (tmp_path / "ours.yaml").write_text(written)
    got = read(Align, [f"config={tmp_path}/ours.yaml"])
    assert {key: getattr(got, key) for key in expected} == expected
    assert got.model in models.CHECKPOINTS
    if "rainy" in got.reward:  # it is read as far as to ask for the file
        with pytest.raises(FileNotFoundError, match="rainy_reward.pt"):
            rewards.parse(got.reward)


def test_lengths_and_sizes_that_have_no_number(tmp_path):
    line = "python main.py --num-frames 3s --resolution 720p --aspect-ratio 9:16 --fps 8\n"
    (tmp_path / "train.sh").write_text(line)
    written, notes = config.translated(tmp_path / "train.sh")
    assert "num_frames" not in written and "height" not in written
    assert "num_frames=3s: left out; give a number, or one of 1x, 2s, 4s, 8s, 16s" in notes
    assert any("'720p 9:16': left out; give height and width in pixels" in note for note in notes)
    (tmp_path / "train.sh").write_text(
        "python main.py --image_size 2 --n_sample_frames 3 --fps 8\n"
    )
    notes = config.translated(tmp_path / "train.sh", "vader")[1]
    assert {
        "image_size: left out; give height and width in pixels",
        "fps: left out; the model's own is used",
    } < {*notes}


def test_what_cannot_be_translated(tmp_path):
    (tmp_path / "train.py").write_text("lr = 1\n")
    (tmp_path / "empty.sh").write_text("echo hello\n")
    with pytest.raises(ValueError, match="is Python, which is not run here"):
        config.translated(tmp_path / "train.py")
    with pytest.raises(ValueError, match="no arguments found"):
        config.translated(tmp_path / "empty.sh")
    with pytest.raises(FileNotFoundError, match="no file at"):
        config.translated(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations(path):
    from vader_nb import prompts

    got = read(Align, [f"config={path.stem}"])
    assert len(prompts.get(got.prompts))
    assert parse_strategy(got.strategy) and parse_frames(got.frames)
    # Refuses autocast to the half type that the weights do not have.
    memory_planner.Step.of(got.model, got.reward, {"mixed_precision": got.mixed_precision})


# ---------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize("name", ["cpu", "ddp", "fsdp", "zero2", "zero3"])
def test_engines_are_read_by_accelerate_and_build_their_plugins(name, tmp_path, capsys):
    """accelerate's own launcher reads the file and hands the environment to a script, which builds the plugin."""
    cli.main(["engine", name])
    path = capsys.readouterr().out.strip()
    code = f"""
import os
from accelerate.commands.launch import launch_command_parser, _validate_launch_command
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
arguments = launch_command_parser().parse_args(["--config_file", {path!r}, "script.py"])
arguments, defaults, _ = _validate_launch_command(arguments)
if arguments.use_deepspeed:
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    os.environ.update(prepare_deepspeed_cmd_env(arguments)[1])
    plugin = DeepSpeedPlugin()
    print("zero", plugin.zero_stage, plugin.deepspeed_config["zero_optimization"]["stage"])
else:
    os.environ.update(prepare_multi_gpu_env(arguments))
    if arguments.use_fsdp:
        plugin = FullyShardedDataParallelPlugin()
        print("fsdp", plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_offload)
    else:
        print("processes", arguments.num_processes)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = {
        "cpu": "processes 2",
        "ddp": "processes 4",
        "fsdp": "fsdp 2 True OffloadPolicy",
        "zero2": "zero 2 2",
        "zero3": "zero 3 3",
    }
    assert expected[name] in done.stdout


def test_a_strangers_yaml_reads_no_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "theirs.yaml"
    path.write_text("name: ${oc.env:SECRET}\nprompts: 'buy ${shop}'\n", encoding="utf-8")
    arguments = read(Align, [f"config={path}"])
    assert (arguments.name, arguments.prompts) == ("${oc.env:SECRET}", "buy ${shop}")


def test_yaml_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml is not YAML: .utf-8. codec"):
        read(Align, [f"config={tmp_path / 'latin.yaml'}"])


def test_a_file_of_prompts_is_its_prompts(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a red star\na blue circle\n", encoding="utf-8")
    assert read(Sample, [f"prompts={path}"]).prompts == ["a red star", "a blue circle"]
    assert read(Sample, ["prompts=a red star", "a cat"]).prompts == ["a red star", "a cat"]
    assert len(read(Sample, ["prompts=animals"]).prompts) == 45
    with pytest.raises(FileNotFoundError, match="no prompt file at"):
        read(Sample, [f"prompts={tmp_path / 'none.txt'}"])


@pytest.mark.parametrize(
    "word", ["adam_beta1=0.5", "lora_unet_dropout=0.1", "load_videodataset=True"]
)
def test_an_argument_that_would_change_what_is_trained_is_an_error(word):
    with pytest.raises(ValueError, match=f"{word} is not supported: "):
        read(Align, [word])
    read(Align, ["adam_beta1=0.9", "lora_unet_dropout=0", "load_videodataset=False"])
    assert read(Align, ["lora_path=runs/mine"]).adapter == "runs/mine"
