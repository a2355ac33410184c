"""What a command is asked to do: a dataclass, filled by OmegaConf from defaults < YAML file < key=value.

    vader-nb align model=tiny steps=40 reward="hps + 0.02 * aesthetic"
    vader-nb align config=mine.yaml learning_rate=2e-4

`--learning-rate 2e-4` and `--resume` (for resume=true) are read as well, and so are VADER's own names (`translate`).
In a file, too. A key that nobody knows is an error that names the nearest one.
"""

import difflib
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

FOLDER = Path(__file__).parent / "configs"  # settings of published runs: config=modelscope


FRAMES = "that are scored: random:K, ends, nth:N, all, or 0,4,7; default: random:1, or all for a reward on the clip"


def option(default: Any, text: str = "", positional: bool = False):
    told = {"help": text, "positional": positional}
    return (
        field(default_factory=list, metadata=told)
        if default == []
        else field(default=default, metadata=told)
    )


@dataclass
class Common:
    config: str | None = option(
        None, "a YAML file of these keys, or the name of a shipped one: modelscope"
    )
    threads: int | None = option(None, "CPU threads; default: torch's choice")


@dataclass
class Sampled(Common):
    model: str = option("tiny", "tiny, modelscope, zeroscope, or a pipeline directory")
    num_inference_steps: int | None = option(None, "denoising steps; default: the model's")
    guidance_scale: float | None = option(None, "classifier-free guidance; default: the model's")
    num_frames: int | None = option(None, "default: the model's")
    height: int | None = option(None, "pixels; default: the model's")
    width: int | None = option(None, "pixels; default: the model's")
    sequential_guidance: bool = option(
        False, "guidance's two branches one after the other: half the memory, same result"
    )


@dataclass
class Judged(Sampled):
    reward: str = option(
        "hps + 0.02 * aesthetic", "an expression of rewards; see: vader-nb rewards"
    )
    prompts: str = option("tiny", "training prompts: a named set, or a file with one a line")
    nouns_file: str | None = option(None, "with prompts=nouns_activities: your own nouns")
    activities_file: str | None = option(None, "with prompts=nouns_activities: your own activities")
    held_out: str | None = option(
        None, "prompts that training does not see: a set or a file; default: tiny_held_out"
    )
    held_out_reward: str | None = option(None, "a reward that training does not see, to judge by")
    eval_prompts: int = option(32, "how many of the held-out prompts are evaluated")
    eval_training_prompts: int = option(8, "how many of the training prompts are evaluated")
    seeds_per_prompt: int = 2
    eval_batch_size: int = option(8, "clips made at once in an evaluation")


@dataclass
class Align(Judged):
    """Train an adapter with reward gradients, evaluate it, write a report."""

    steps: int = option(40, "optimizer steps")
    batch_size: int = option(4, "clips at once, in each process")
    gradient_accumulation_steps: int = option(1, "batches a step")
    learning_rate: float = 1e-3
    lr_scheduler: str = option(
        "constant", "constant, constant_with_warmup, linear, cosine, … as in diffusers"
    )
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    use_8bit_adam: bool = option(False, "with the package bitsandbytes")
    rank: int = option(8, "of the adapter")
    alpha: float | None = option(None, "of the adapter; default: its rank")
    strategy: str = option("last", "last, random, step, draft_lv, refl, drtune")
    K: int | None = option(
        None, "steps that learn (last, random, drtune), the step (step), noisings (draft_lv)"
    )
    frames: str | None = option(None, FRAMES)
    chunk: int = option(1, "frames decoded at once")
    offload: bool = option(
        False, "what the denoiser keeps for the backward pass waits in CPU memory"
    )
    model_cpu_offload: bool = option(False, "only the networks of the current stage are on the GPU")
    mixed_precision: str | None = option(
        None, "no, fp16, bf16; default: accelerate launch's, or no"
    )
    speed: str | None = option(
        None, "switches, such as channels_last,compile; python -m vader_nb.selfcheck measures them"
    )
    seed: int = 0
    name: str | None = option(None, "the run's name; default: the model's and the time")
    output_dir: str = option("runs", "where runs are kept")
    checkpoint_every: int = 20
    checkpoints_total_limit: int | None = option(
        None, "keep so many of the newest, and the best; default: all"
    )
    validation_steps: int | None = option(
        None,
        "measure the held_out prompts (without: training ones) every so many steps; needed for a best one",
    )
    resume: str = option(
        "false",
        "with name=…: true: its newest checkpoint; latest: or a new run; or a checkpoint's path",
    )
    log_with: str | None = option(None, "tensorboard or wandb, beside metrics.jsonl")
    evaluation: bool = option(True, "compare base and adapter at the end")


@dataclass
class Evaluate(Judged):
    """Compare base and adapter; write a report."""

    adapter: str | None = option(
        None, "an adapter file, or a run's folder; without one, the base alone", True
    )
    scale: float = option(1.0, "of the adapter, 0 to 1.5")
    clips: int | None = option(
        None, "so many of the training prompts' clips, in place of the three numbers above"
    )
    output_dir: str | None = option(None, "default: `evaluation` beside the adapter")


@dataclass
class Sample(Sampled):
    """Make clips of prompts."""

    prompts: list[str] = option([], "one clip each", True)
    adapter: str | None = option(None, "an adapter file, or a run's folder")
    scale: float = option(1.0, "of the adapter, 0 to 1.5")
    seed: int = option(0, "of the first clip; the next have the next")
    output_dir: str = "runs/samples"
    format: str = option("gif", "gif, mp4, webp")


@dataclass
class Check(Common):
    """Is a reward fit for training?"""

    reward: str = option("", "an expression; the embedded ones are hps('tiny') and so on", True)


@dataclass
class Memory(Sampled):
    """Will it fit? Peak memory of a configuration, without a GPU and without weights."""

    model: str = "modelscope"
    reward: str = option("hps", "an expression of rewards")
    batch_size: int = 1
    rank: int = 8
    strategy: str = option("last", "last, random, step, draft_lv, refl, drtune")
    K: int | None = option(None, "as for align")
    frames: str | None = option(None, "as for align, and its default")
    chunk: int = option(1, "frames decoded at once")
    checkpoint_blocks: bool = option(
        True, "the denoiser's blocks are computed again in the backward pass"
    )
    offload: bool = option(
        False, "what the denoiser keeps for the backward pass waits in CPU memory"
    )
    model_cpu_offload: bool = option(False, "only the networks of the current stage are on the GPU")
    gpu: str | None = option(None, "T4, L4, A100 40 GB or A100 80 GB; default: all of them")
    measured: bool = option(False, "on this machine's GPU, with real weights, instead of simulated")


@dataclass
class TranslateConfig(Common):
    """Another tool's configuration in our words, with what differs."""

    file: str = option("", "its YAML file, or the shell script that starts it", True)
    source: str | None = option(None, "vader, videox_fun or trl; default: guessed from its names")
    output: str | None = option(None, "the YAML file to write; default: printed")


@dataclass
class Engine(Common):
    """Where accelerate's configuration for an engine lies: accelerate launch --config_file "$(vader-nb engine fsdp)" …"""

    name: str = option("", "cpu, ddp, fsdp, zero2, zero3", True)


@dataclass
class Nothing(Common):
    """All rewards: what they see, cost, and when they fail."""


def pairs(words: list[str], kind: type) -> list[tuple[str, str]]:
    """Command line words as (key, value): `key=value`, `--key value`, `--key=value`, `--switch`, `--no-switch`."""
    known = {f.name: f for f in fields(kind)}
    switches = {name for name, f in known.items() if f.type is bool} | {"resume"}
    places = [name for name, f in known.items() if f.metadata.get("positional")]
    found, words = [], list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, given, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if not given and key.removeprefix("no_") in switches and key not in switches:
                key, value = key.removeprefix("no_"), "false"
            elif not given:
                bare = key in switches and (
                    not words or words[0].startswith("--") or "=" in words[0]
                )
                if not bare and not words:
                    raise ValueError(f"{word} needs a value")
                value = "true" if bare else words.pop(0)
            found.append((key, value))
        elif "=" in word and word.partition("=")[0].isidentifier():
            found.append(tuple(word.split("=", 1)))
        elif places:
            found.append((places[0], word))
        else:
            raise ValueError(f"cannot read {word!r}: write key=value, as in steps=40")
    return found


def read(kind: type, words: list[str]) -> Any:
    """The configuration that these words ask for. Raises ValueError for an unknown key or a value of the wrong type."""
    from omegaconf import OmegaConf

    known = {f.name for f in fields(kind)}
    lists = {f.name for f in fields(kind) if f.type == list[str]}
    optional = {f.name for f in fields(kind) if type(None) in get_args(f.type)}
    given: dict[str, Any] = {}
    for key, value in pairs(words, kind):
        if key in lists:
            given.setdefault(key, []).append(literal(value))
        else:
            given[key] = None if value == "null" and key in optional else literal(value)
    file = from_file(given["config"]) if given.get("config") else {}
    unknown(file, known, f" in {given.get('config')}")
    unknown(given, known)
    layers = [OmegaConf.structured(kind)]
    for source in (
        file,
        given,
    ):  # our own names win over VADER's beside them, whose meaning depends on all keys
        layers += [
            foreign(source, known, file | given),
            {key: source[key] for key in source if key in known},
        ]
    return merged(layers, kind)


def literal(text: str) -> str:
    """As OmegaConf must be told it: `${shop}` in a prompt is no reference to another key."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def foreign(source: dict, known: set[str], everything: dict) -> dict:
    """What a source says in VADER's names, in ours."""
    from . import translate

    theirs = {key: value for key, value in source.items() if key not in known}
    if not theirs:
        return {}
    ours, notes = translate.translate("vader", theirs, known, everything)
    report(theirs, ours, notes)
    return ours


def from_file(name: str) -> dict:
    path = next((p for p in (Path(name), FOLDER / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise FileNotFoundError(
            f"no configuration at {name}; give a YAML file, or one of: {shipped}"
        )
    return yaml_of(path)


def yaml_of(path: Path) -> dict:
    """The keys of a YAML file."""
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
    except YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path} holds no keys: write lines such as steps: 40")
    return OmegaConf.to_container(loaded)


def unknown(given, known: set[str], where: str = "") -> None:
    from . import translate

    for key in given:
        if key not in known and key not in translate.NAMES["vader"]:
            near = difflib.get_close_matches(key, [*known, *translate.NAMES["vader"]], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown key {key!r}{where}{hint} (--help lists all)")


def merged(layers: list, kind: type):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(*layers))
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{getattr(error, 'full_key', None) or kind.__name__}: {first}") from error


def report(foreign: dict, ours: dict, notes: list[str]) -> None:
    """Say once how another tool's names were read."""
    import os
    import sys

    if os.environ.get("RANK", "0") == "0":
        told = ", ".join(f"{key}={value}" for key, value in ours.items())
        print(f"vader-nb: VADER's {', '.join(foreign)} read as: {told}", file=sys.stderr)
        for note in notes:
            print(f"vader-nb: {note}", file=sys.stderr)


def usage(name: str, kind: type) -> str:
    """The help text of a command."""
    shown = [f for f in fields(kind) if f.name not in ("config", "threads")]
    lines = [f"vader-nb {name} key=value …", "", (kind.__doc__ or "").strip(), ""]
    for f in [*shown, *fields(Common)]:
        default = "" if f.default in (None, MISSING) else f"={f.default}"
        lines.append(f"  {f.name + default:<34} {f.metadata.get('help', '')}".rstrip())
    return "\n".join(lines)
