"""Other tools' arguments as our settings: VADER's three scripts, VideoX-Fun's reward LoRA, TRL's AlignProp.

The tables are `configs/foreign/*.yaml`; here are the settings that depend on several arguments.
"""

import functools
import json
import re
import shlex
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

FOLDER = Path(__file__).parent / "configs" / "foreign"
SOURCES = ("vader", "videox_fun", "trl")
ACCELERATE = {"num_processes", "multi_gpu", "main_process_port", "config_file", "num_machines"}


@dataclass(frozen=True)
class Tool:
    """A table of `configs/foreign`; `vader.yaml` describes its parts."""

    title: str
    names: dict[str, str]
    left_out: dict[str, list[str]]
    notes: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict] = field(default_factory=dict)
    rewards: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    models: dict[str, list[str]] = field(default_factory=dict)
    durations: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    fixed: dict[str, list[str]] = field(default_factory=dict)

    @functools.cached_property
    def reasons(self) -> dict[str, str]:
        """Argument -> why it is left out."""
        return {name: reason for reason, names in self.left_out.items() for name in names}

    @property
    def arguments(self) -> list[str]:
        return [*self.names, *self.reasons]


@functools.cache
def tool(source: str) -> Tool:
    """The table of one of `SOURCES`."""
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; choose one of {', '.join(SOURCES)}")
    return Tool(**read_yaml(FOLDER / f"{source}.yaml"))


# ------------------------------------------------- settings that depend on several arguments

Translated = tuple[dict, list[str]]  # our settings, and what a user should know


def reward(source: str, given: dict) -> Translated:
    """An expression, from the templates in the table's `rewards`."""
    table = tool(source)
    options = json.loads(given.get("reward_fn_kwargs") or "{}")
    values = table.defaults | {key: str(value) for key, value in (given | options).items()}
    name = values["reward_fn"]
    if name in table.rewards:
        expression = table.rewards[name].format_map(values).replace("('v2.1')", "")
    elif source == "vader":  # an expression of ours
        expression = name
    else:
        return {}, [f"reward_fn={name} is not offered here; see: vader-nb rewards"]
    # VADER runs this reward with decode_frame=alt only.
    frames = {"frames": "every:2"} if name == "actpred" and "decode_frame" not in given else {}
    return {"reward": expression} | frames, []


def vader_strategy(source: str, given: dict) -> Translated:
    """Depends on the number of steps, under VADER's names or ours; of two, the later one counts."""
    names, steps = tool(source).names, 25
    for name, value in given.items():
        if names.get(name, name) == "num_inference_steps" and value is not None:
            steps = int(value)
    mode, last = str(given["backprop_mode"]), max(1, steps - 15)
    if mode == "specific":  # from step index 15 on, whatever the number of steps
        return {"strategy": f"Last({last})"}, [f"backprop_mode=specific: the last {last} steps"]
    ours = {"last": "Last(1)", "rand": "Random()"}
    if mode not in ours:
        raise ValueError(f"unknown backprop_mode {mode!r}: VADER knows last, rand and specific")
    return {"strategy": ours[mode]}, []


def vader_model(given: dict) -> str | None:
    """The model whose script has such arguments."""
    models = tool("vader").models.items()
    return next((model for model, marks in models if given.keys() & set(marks)), None)


def vader_options(source: str, given: dict) -> Translated:
    if vader_model(given) is None:
        return {}, ["fps: left out; the model's own is used"]
    return {"options": {"fps": int(given["fps"])}}, []


def vader_frames(source: str, given: dict) -> Translated:
    """A number, or Open-Sora's duration."""
    names = tool(source).names
    *_, value = (value for name, value in given.items() if names.get(name) == "num_frames")
    if re.fullmatch(r"\d+", str(value)) or value is None:
        return {"num_frames": value}, []
    durations = tool(source).durations
    if value in durations:
        return {"num_frames": durations[value]}, []
    known = ", ".join(durations)
    return {}, [f"num_frames={value}: left out; give a number, or one of {known}"]


def vader_size(source: str, given: dict) -> Translated:
    """The height, or height and width by Open-Sora's names of sizes."""
    if "height" in given:
        return {"height": given["height"]}, []
    if "image_size" in given:
        return {}, ["image_size: left out; give height and width in pixels"]
    name, sizes = f"{given.get('resolution')} {given.get('aspect_ratio')}", tool(source).sizes
    if name in sizes:
        return dict(zip(("height", "width"), sizes[name])), []
    note = f"resolution and aspect_ratio {name!r}: left out; give height and width in pixels"
    return {}, [f"{note}, or one of {', '.join(sizes)}"]


def videox_strategy(source: str, given: dict) -> Translated:
    how, count = str(given.get("backprop_strategy", "last")), given.get("backprop_num_steps", 5)
    if given.get("backprop_step_list"):
        note = "one step is strategy=Step(i), counted from the end; lists are not offered"
        return {}, [f"backprop_step_list: {note}"]
    if how not in ("last", "tail"):
        note = (
            f"backprop_strategy={how}: read as DRTune, with evenly spread steps; the path between them "
            f"skips the denoiser, as with stop_latent_model_input_gradient"
        )
        return {"strategy": f"DRTune({count})"}, [note]
    notes = ["for stop_latent_model_input_gradient, see strategy=DRTune(K)"]
    skips = given.get("stop_latent_model_input_gradient")
    return {"strategy": f"Last({1 if how == 'last' else count})"}, notes if skips else []


def videox_frames(source: str, given: dict) -> Translated:
    if "num_sampled_frames" in given:
        return {"frames": f"random:{given['num_sampled_frames']}"}, []
    return {"frames": ",".join(map(str, range(int(given["num_decoded_latents"]))))}, []


def trl_strategy(source: str, given: dict) -> Translated:
    steps = int(given.get("sample_num_steps", 50))
    if str(given.get("truncated_backprop_rand", "True")).lower() == "true":
        bounds = re.findall(r"-?\d+", str(given.get("truncated_rand_backprop_minmax", "0 50")))
        note = "K is drawn once per clip here; TRL draws anew at every step"
        strategy = f"Random({max(1, steps - int(bounds[0]))})"
        return {"strategy": strategy}, [f"truncated_backprop_rand: {note}"]
    at = int(given.get("truncated_backprop_timestep", 49))
    note = f"truncated_backprop_timestep={at} of {steps} steps leaves no gradient"
    return {"strategy": f"Last({max(1, steps - at)})"}, [note] if at >= steps else []


TOGETHER: dict[tuple[str, str], Callable[[str, dict], Translated]] = {
    ("vader", "reward"): reward,
    ("vader", "strategy"): vader_strategy,
    ("vader", "options"): vader_options,
    ("vader", "num_frames"): vader_frames,
    ("vader", "height"): vader_size,
    ("videox_fun", "reward"): reward,
    ("videox_fun", "strategy"): videox_strategy,
    ("videox_fun", "frames"): videox_frames,
    ("trl", "strategy"): trl_strategy,
}


# ----------------------------------------------------------------------- arguments to settings


def translate(
    source: str, given: dict, known: Collection[str] | None = None, everything: dict | None = None
) -> Translated:
    """Another tool's arguments as our settings; `known` are those that make sense here.

    `everything`, by default `given`, are all values that a translation may depend on.
    """
    table, ours, notes, groups = tool(source), {}, [], []
    for name, value in given.items():
        setting = table.names.get(name)
        if name in table.reasons:
            notes.append(f"{name}: left out; {table.reasons[name]}")
        elif setting is None:
            notes.append(f"{name}={value}: unknown, left out")
        else:
            if (source, setting) in TOGETHER:
                groups.append(setting)
            else:
                ours[setting] = table.values.get(setting, {}).get(str(value), value)
            if name in table.notes:
                notes.append(f"{name} is {setting} here; {table.notes[name]}")
    for setting in sorted(set(groups)):
        more, remarks = TOGETHER[source, setting](source, everything or given)
        ours, notes = ours | more, notes + remarks
    if source == "vader" and (model := vader_model(given)):
        ours = {"model": model} | ours
        notes.append(f"these are arguments of VADER's script for model={model}")
    if "clips" in ours:  # iterations of so many clips
        ours["clips"] = int(ours["clips"]) * int(given.get("val_batch_size", 1))
    if str(given.get("use_wandb", "")).lower() == "false":
        ours["log_with"] = None
    for name in sorted(ours.keys() - set(ours if known is None else known)):
        notes.append(f"{name}={ours.pop(name)}: not a setting of this command, left out")
    return ours, notes


def translate_file(
    path: str | Path, source: str | None = None, known: Collection[str] | None = None
) -> tuple[str, dict, list[str]]:
    """The source (by default the one with most of the file's names), our settings, and notes."""
    given = {name: value for name, value in read(path).items() if name not in ACCELERATE}
    if source is None:
        source = max(SOURCES, key=lambda name: len(given.keys() & set(tool(name).arguments)))
    ours, notes = translate(source, given, known)
    if source == "vader":
        notes += drop_unusable(ours)
    return source, ours, notes


def drop_unusable(ours: dict) -> Iterator[str]:
    """Takes out prompts that mean nothing here, with a note. (In a shell they are an error.)"""
    from .prompts import SETS

    prompts = ours.get("prompts")
    if prompts and not (prompts in SETS or re.search(r"[/.]", prompts) or Path(prompts).is_file()):
        del ours["prompts"]
        sets = ", ".join(SETS)
        yield f"no prompts are named {prompts!r} here: left out; give prompts=FILE, or a set: {sets}"


# ------------------------------------------------------------------------------- reading files


def read_yaml(path: str | Path) -> dict:
    """The keys of a YAML file."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        shown = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not YAML: {shown}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds no keys: write lines such as steps: 40")
    return {str(key): value for key, value in loaded.items()}


def read(path: str | Path) -> dict:
    """Arguments in a YAML file (sections are flattened), or in the script that starts a tool."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    if path.suffix in (".yaml", ".yml"):
        return dict(leaves(read_yaml(path)))
    if path.suffix == ".py":
        hint = "write its settings as key=value lines in a .sh file"
        raise ValueError(f"{path} is Python, which is not run here; {hint}")
    found = {}
    words = script_words(path.read_text(encoding="utf-8"))
    for word, following in zip(words, [*words[1:], "--"]):
        name, given, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if given and name.isidentifier():
            found[name] = value
        elif word.startswith("--"):
            found[name] = "True" if following.startswith("--") else following
    if not found:
        hint = "give a YAML file, or the script with its launch command"
        raise ValueError(f"no arguments found in {path}: {hint}")
    return found


def script_words(text: str) -> list[str]:
    """The words of a script's launch commands, its plain variables replaced."""
    assignment = r"^\s*(?:export\s+)?(\w+)=(['\"]?[^\s'\"]*['\"]?)\s*$"
    variables = dict(re.findall(assignment, text, re.MULTILINE))
    text = text.replace("\\\n", " ")
    text = re.sub(r"\$\{?(\w+)\}?", lambda m: variables.get(m[1], m[0]).strip("'\""), text)
    text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)  # comments may hold one quotation mark
    lines = [line for line in text.splitlines() if "launch" in line or "python" in line]
    return [word for line in lines for word in shlex.split(line, comments=True)]


def leaves(tree: dict) -> Iterator[tuple[str, object]]:
    """(name, value) of all that is not a section. VADER's are train_data, …; the last value wins."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value)
        elif value is not None:
            yield name, value
