"""What a command is asked to do: defaults < YAML file < key=value, by OmegaConf.

Settings of training and sampling are the fields of `TrainConfig` and `Sampling`, help texts included; the
classes here add what only a shell needs. VADER's own names are read as well (`translate`), in a file too.
"""

import difflib
import functools
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Optional, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import translate

FOLDER = Path(__file__).parent / "configs"  # settings of published runs: config=modelscope


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Common:
    """The keys of every command. `settings` names the fields of TrainConfig that a command has besides
    its own ("training", "memory", "sampling" or none), `positional` the key of words without one, `example` a
    command that works."""

    settings = ""
    positional = ""
    example = ""

    config: str | None = option(None, "a YAML file, or a recipe's name: modelscope, wan, …")
    threads: int | None = option(None, "CPU threads; default: torch's choice")


@dataclass
class Modeled(Common):
    model: str = option(
        "tiny",
        "tiny, tiny-wan, tiny-i2v, modelscope, zeroscope, videocrafter2, opensora, svd, svd-xt, or a directory",
    )
    text_cache: bool | None = option(
        None,
        "keep large text encoders out of memory, and their states on disk; default: above 1e9 parameters",
    )
    quantize: str | None = option(
        None,
        "8bit or 4bit: quantize the frozen denoiser's weights with bitsandbytes; default: as loaded",
    )


@dataclass
class Judged(Modeled):
    reward: str = option("hps + 0.02 * aesthetic", "a reward expression, or file.py:function")
    prompts: str = option("tiny", "training prompts: a named set, or a file with one per line")
    nouns_file: str | None = option(None, "with prompts=nouns_activities: your own nouns")
    activities_file: str | None = option(None, "with prompts=nouns_activities: your own activities")
    held_out: str | None = option(
        None, "prompts that training does not see; for tiny: tiny_held_out"
    )
    held_out_reward: str | None = option(
        None, "a reward that training does not see; http://host:port/path for a reward server"
    )
    eval_prompts: int = option(32, "how many of the held-out prompts are evaluated")
    eval_training_prompts: int = option(8, "how many of the training prompts are evaluated")
    seeds_per_prompt: int = option(2, "clips of each prompt in an evaluation")
    eval_batch_size: int = option(8, "clips generated at once in an evaluation")


@dataclass
class Align(Judged):
    """Train an adapter, by reward gradients or otherwise; evaluate it, write a report."""

    example = 'vader-nb align reward="hps + 0.02 * aesthetic" prompts=tiny name=mine'
    settings = "training"
    estimator: str | None = option(
        None,
        "RewardGradient (the default); for any reward: DDPO, GRPO(group_size=16), DPO(beta=2000)",
    )
    adapter: str | None = option(None, "an adapter file, or a run's folder, to start from")
    name: str | None = option(None, "the run's name; default: the model's name and the time")
    output_dir: str = option("runs", "the folder where runs are saved")
    validation_steps: int | None = option(
        None, "steps between validations, which find the best checkpoint"
    )
    resume: str = option(
        "false", "true: from the newest checkpoint; latest: the same, or a new run; or a path"
    )
    model_cpu_offload: bool = option(
        False, "keep only the networks of the current stage on the GPU"
    )
    decoder_states: str | None = option(
        None,
        "where to keep a causal decoder's states: device, cpu, or a number m to keep every m-th",
    )
    decoder_gradient: str | None = option(
        None, "of a causal decoder: exact, or, to save time, last_chunk or window:w"
    )
    speed: str | None = option(None, "switches, such as channels_last,compile (see selfcheck)")
    evaluation: bool = option(True, "compare base and adapter at the end")


@dataclass
class Race(Judged):
    """Race methods against each other on equal budgets; continues where it was when started again."""

    example = "vader-nb race races/tiny output_dir=runs/race"
    settings, positional = "race", "config"
    contestants: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "by name: settings, an estimator, its own learning_rates; or only best_of: 8 or guidance: 0.1"
        },
    )
    budget: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "of each run: one of reward_queries, denoiser_calls or seconds, and how many"
        },
    )
    learning_rates: list[Any] = field(
        default_factory=list, metadata={"help": "the grid on which every contestant is tuned"}
    )
    seeds: list[Any] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of the runs"})
    evaluations: int = option(
        4, "evaluations of each run; the k-th of n is made at (k / n)² of its budget"
    )
    output_dir: str = option("runs/race", "the race's folder")


@dataclass
class Evaluate(Judged):
    """Compare base and adapter; write a report."""

    example = "vader-nb evaluate runs/mine held_out=tiny_held_out"
    settings, positional = "sampling", "adapter"
    adapter: str | None = option(None, "a file, or a run's folder; default: the base alone")
    scale: float = option(1.0, "of the adapter, 0 to 1.5")
    clips: int | None = option(None, "evaluate this many clips of training prompts, and no others")
    output_dir: str | None = option(None, "default: `evaluation` beside the adapter")


@dataclass
class Sample(Modeled):
    """Generate clips of prompts."""

    example = 'vader-nb sample "a red star growing on a black background" adapter=runs/mine'
    settings, positional = "sampling", "prompts"
    prompts: list[str] = field(default_factory=list, metadata={"help": "one clip each"})
    adapter: str | None = option(None, "an adapter file, or a run's folder")
    scale: float = option(1.0, "of the adapter, 0 to 1.5")
    seed: int = option(0, "of the first clip; each later clip has the next seed")
    output_dir: str = option("runs/samples", "where the clips go")
    format: str = option("gif", "gif, mp4, webp")


@dataclass
class Memory(Common):
    """Will it fit? Peak memory of a configuration, without a GPU and without weights."""

    example = "vader-nb memory model=modelscope reward=hps gpu_memory=T4"
    settings = "memory"
    model: str = option(
        "modelscope",
        "tiny, tiny-wan, tiny-i2v, modelscope, zeroscope, videocrafter2, opensora, svd, svd-xt, or a directory",
    )
    reward: str = option("hps", "a reward expression")
    batch_size: int = option(1, "clips at once")
    gradient_checkpointing: bool = option(
        True, "recompute the denoiser's blocks in the backward pass"
    )
    model_cpu_offload: bool = option(
        False, "keep only the networks of the current stage on the GPU"
    )
    text_cache: bool | None = option(
        None,
        "keep large text encoders out of memory, and their states on disk; default: above 1e9 parameters",
    )
    quantize: str | None = option(
        None,
        "8bit or 4bit: quantize the frozen denoiser's weights with bitsandbytes; default: as loaded",
    )
    decoder_states: str | None = option(
        None,
        "where to keep a causal decoder's states: device, cpu, or a number m to keep every m-th",
    )
    decoder_gradient: str | None = option(
        None, "of a causal decoder: exact, or, to save time, last_chunk or window:w"
    )
    dtype: str | None = option(
        None, "of the weights: float16, bfloat16, float32; default: what training uses on a GPU"
    )
    num_gpus: int = option(1, "processes, one on each GPU")
    sharding: str = option("none", "none, or full: denoisers sharded over the GPUs (engine fsdp)")
    gpu_memory: str | None = option(None, "GiB, or a card: T4, H100, …; default: all cards")
    measured: bool = option(False, "on this machine's GPU, with real weights, not simulated")


@dataclass
class Export(Common):
    """An adapter for another tool, with a model card; to the Hub if you like."""

    example = "vader-nb export runs/mine format=diffusers"
    positional = "adapter"
    adapter: str = option("", "a run's folder, or an adapter file from any tool")
    format: str = option(
        "diffusers", "diffusers, peft, kohya, comfyui, vader; merged: the whole pipeline"
    )
    model: str = option("tiny", "the model that the adapter is for")
    scale: float = option(1.0, "of the adapter, with format=merged")
    output: str | None = option(
        None, "the folder to create; default: one named after the format, in the run's folder"
    )
    push_to_hub: str | None = option(None, "user/name of the repository to upload it to")
    private: bool = option(False, "whether that repository is private")


@dataclass
class Check(Common):
    """Is a reward fit for training?"""

    example = "vader-nb check my_rewards.py:blueness"
    positional = "reward"
    reward: str = option("", "an expression, such as hps('tiny'), or file.py:function")


@dataclass
class Selfcheck(Modeled):
    """Does a model do what it promises on this machine? Ten minutes on a GPU; a table for an issue."""

    example = "vader-nb selfcheck model=wan"
    reward: str | None = option(
        None, "an expression; default: hps for embedded models, else brightness"
    )
    speed: bool = option(False, "also measure the switches for speed; takes minutes longer")


@dataclass
class Rewards(Common):
    """All rewards: what they see, cost, and when they fail."""

    example = "vader-nb rewards"


@dataclass
class Models(Common):
    """All models: what they take, need and cost, and what was tested."""

    example = "vader-nb models"


@dataclass
class Recipes(Common):
    """Configurations by model and GPU, and who ran them; with a name its YAML, with slurm a script."""

    example = "vader-nb recipes wan"
    positional = "name"
    name: str = option(
        "", "of a recipe, or slurm: the script of a job that is requeued until it is done"
    )


@dataclass
class Engine(Common):
    """Path of accelerate's configuration: accelerate launch --config_file "$(vader-nb engine fsdp)" …"""

    example = 'accelerate launch --config_file "$(vader-nb engine fsdp)" -m vader_nb align'
    positional = "name"
    name: str = option("", "cpu, ddp, fsdp, zero2, zero3")


@dataclass
class TranslateConfig(Common):
    """Another tool's configuration as ours, with what differs."""

    example = "vader-nb translate-config train.sh output=mine.yaml"
    positional = "file"
    file: str = option("", "the tool's YAML file, or the shell script that starts the tool")
    source: str | None = option(
        None, "vader, videox_fun or trl; default: guessed from the argument names"
    )
    output: str | None = option(None, "the YAML file to write; default: printed")


# The fields of TrainConfig, besides Sampling's, on which memory depends.
MEMORY = {"rank", "alpha", "targets", "strategy", "frames", "decode_chunk_size"}
MEMORY |= {"activation_offload", "mixed_precision"}


# ------------------------------------------------------------------------------------ a command's keys


@functools.cache
def schema(command: type[Common]) -> Any:
    """A dataclass of all keys of a command: its own, then the settings, then those of every command."""
    own = {f.name: f for f in fields(command)}
    common = {f.name: own.pop(f.name) for f in fields(Common)}
    shared = {f.name: f for f in settings(command.settings) if f.name not in own}
    return make_dataclass(command.__name__, map(entry, (own | shared | common).values()))


def settings(group: str) -> list[Field]:
    """The fields of TrainConfig that a command has."""
    if not group:
        return []
    from .sampling import Sampling
    from .train_config import TrainConfig

    wanted = {f.name for f in fields(Sampling)} | (MEMORY if group == "memory" else set())
    if group == "race":
        from .race_jobs import SETTINGS as wanted
    return [f for f in TrainConfig.flat_fields() if group == "training" or f.name in wanted]


def entry(f: Field) -> tuple[str, Any, Any]:
    """A field as OmegaConf can read it: plain types, lists and mappings; anything else from its text."""
    union = get_origin(f.type) in (Union, UnionType)
    members = [kind for kind in get_args(f.type) if kind is not NoneType] if union else [f.type]
    kind = members[0] if len(members) == 1 else str
    container = get_origin(kind) or kind
    if container is dict:
        kind = dict[str, Any]
    elif container in (list, tuple, Sequence):
        kind = list[str]
    elif kind not in (bool, int, float):
        kind = str
    default = f.default
    optional = default is None or (union and NoneType in get_args(f.type))
    if kind is str and default not in (None, MISSING):
        default = str(default)
    made: dict[str, Any] = {"default_factory": f.default_factory, "metadata": f.metadata}
    made["default"] = default
    return f.name, Optional[kind] if optional else kind, field(**made)  # noqa: UP045


def usage(command: type[Common]) -> str:
    """The help text of a command."""
    lines = [command.example, "", command.__doc__ or "", ""]
    for f in fields(schema(command)):
        default = "" if f.default in (None, MISSING, "") else f"={f.default}"
        lines.append(f"  {f.name + default:<34} {f.metadata.get('help', '')}".rstrip())
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- reading words


def read(command: type[Common], words: Sequence[str]) -> Any:
    """An instance of `schema(command)`: what the words of a command line ask for."""
    known = {f.name: f.type for f in fields(schema(command))}
    positional = command.positional
    given: dict[str, Any] = {}
    texts: list[str] = []  # kept out of OmegaConf, to which ??? and ${…} mean something
    for key, value in pairs(words, known, positional):
        if key == positional and known[key] == list[str]:
            texts.append(value)
        else:
            given[key] = parsed(key, value, known.get(key))
    file = from_file(given["config"], known) if given.get("config") else {}
    if command is Memory:  # of a run, memory depends on some of its settings
        run = schema(Align).__dataclass_fields__.keys() - known
        file = {key: value for key, value in file.items() if key not in run}
    check_keys(file, known, f" in {given.get('config')}")
    check_keys(given, known)
    layers = []
    for source in (file, given):  # our own names win over VADER's beside them
        layers += [foreign(source, known, file | given)]
        layers += [{key: value for key, value in source.items() if key in known}]
    result = merged(command, layers)
    for key, kind in known.items():
        values = getattr(result, key) or [] if kind == list[str] else []
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{key} must be a list of strings, got {values}")
    if texts:
        setattr(result, positional, texts)
    return result


def pairs(words: Sequence[str], known: dict, positional: str) -> Iterator[tuple[str, str]]:
    """The words as (key, value)."""
    free_text = bool(positional) and known[positional] == list[str]
    seen = False
    for word in words:
        if not word.isprintable() and any("\ud800" <= c <= "\udfff" for c in word):
            raise ValueError(
                f"cannot read {word.encode('utf-8', 'replace').decode()!r}: it is not UTF-8"
            )
        key, equals, value = word.partition("=")
        if re.match(r"--|-[A-Za-z]", word):
            name = key.strip("-").replace("-", "_")
            raise ValueError(
                f"cannot read {word!r}: write settings as key=value: {name}={value or '…'}"
            )
        if equals and key == positional and free_text:
            yield from ((key, str(text)) for text in texts_of(value))
        elif equals and key.isidentifier() and not (free_text and is_text(key, value, known)):
            yield key, value
        elif not positional:
            raise ValueError(f"cannot read {word!r}: write key=value, as in steps=40")
        elif seen and not free_text:
            raise ValueError(f"cannot read {word!r}: there is one {positional} already")
        else:
            seen = True
            yield positional, word


def texts_of(value: str) -> list:
    """Prompts of a set or a file, or the value as the one prompt."""
    from . import prompts

    is_source = value in prompts.SETS or Path(value).suffix in prompts.SUFFIXES
    return prompts.get(value) if is_source or Path(value).is_file() else [value]


def is_text(key: str, value: str, known: dict) -> bool:
    """In a prompt such as "E=mc2 on a blackboard", what comes before = is neither a key nor close to one.

    Before a single word it is not a part of a key either (steps of num_inference_steps), nor a key of `align`.
    """
    keys = all_keys(known)
    every = [*keys, *schema(Align).__dataclass_fields__]
    parts = {part for name in every for part in (name, *name.split("_"))}
    if len(value.split()) < 2 and key in parts:
        return False
    return not difflib.get_close_matches(key, keys, 1, cutoff=0.75)


def all_keys(known: dict) -> list[str]:
    return [*known, *translate.tool("vader").arguments]


def check_keys(given: dict, known: dict, where: str = "") -> None:
    keys = all_keys(known)
    for key in given:
        if key not in keys:
            parts = [name for name in known if key in name.split("_")]
            near = (
                difflib.get_close_matches(key, keys, 1, cutoff=0.75)
                or difflib.get_close_matches(key, parts, 1, cutoff=0)
                or difflib.get_close_matches(key, keys, 1)
            )
            hint = f"; did you mean {near[0]}?" if near else ""
            shown = key if len(key) < 60 else f"{key[:50]}…"
            raise ValueError(f"unknown key {shown!r}{where}{hint} (--help lists all)")


def parsed(key: str, text: str, kind: Any) -> Any:
    """A value for OmegaConf, which converts numbers and switches itself."""
    kinds = {kind, *get_args(kind)}
    if text == "null" and NoneType in kinds:
        return None
    if {list[str], dict[str, Any]} & kinds:
        made: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={text}"]))
        value = made[key]
        return [value] if isinstance(value, str) else value
    return literal(text)


def literal(value: Any, keys: Collection[str] = ()) -> Any:
    """A value whose texts keep ${…} as it is, except a reference to one of these keys: ${oc.env:…} would
    read environment variables into a run that a stranger's file describes."""
    if isinstance(value, str):
        known = "|".join(map(re.escape, keys)) or "(?!)"
        return re.sub(rf"(\\*)\$\{{(?!({known})\}})", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: literal(item, keys) for key, item in value.items()}
    return [literal(item, keys) for item in value] if isinstance(value, list) else value


def from_file(name: str, keys: Collection[str]) -> dict:
    places = (Path(name).expanduser(), FOLDER / f"{name}.yaml")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise FileNotFoundError(
            f"no configuration at {name}; give a YAML file, or one of {shipped}"
        )
    return literal(translate.read_yaml(path), keys)


def foreign(source: dict, known: dict, everything: dict) -> dict:
    """What a source sets under VADER's names, as our settings; reports how they were read."""
    theirs = {key: value for key, value in source.items() if key not in known}
    if not theirs:
        return {}
    table = translate.tool("vader")
    for key, value in theirs.items():
        if str(value) not in table.fixed.get(key, [str(value)]):
            raise ValueError(f"{key}={value} is not supported: {table.reasons[key]}")
    ours, notes = translate.translate("vader", theirs, known, everything)
    if os.environ.get("RANK", "0") == "0":
        meant = ", ".join(f"{key}={value}" for key, value in ours.items())
        for line in (f"VADER's {', '.join(theirs)} read as: {meant}", *notes):
            print(f"vader-nb: {line}", file=sys.stderr)
    return ours


def merged(command: type[Common], layers: list[dict]) -> Any:
    """The command's keys, set by layers of which later ones win."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema(command)), *layers))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or command.__name__
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error


def translated(path: str | Path, source: str | None = None) -> tuple[str, list[str]]:
    """Another tool's file as YAML of `align`'s keys, and notes on what differs."""
    known = {f.name for f in fields(schema(Align))}
    source, ours, notes = translate.translate_file(path, source, known)
    head = f"# {source} arguments of {Path(path).name}, as settings of vader_nb\n"
    typed = merged(Align, [ours])
    return head + OmegaConf.to_yaml({name: getattr(typed, name) for name in ours}), notes
