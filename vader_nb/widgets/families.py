"""What a model's family has besides prompt, seed, steps and guidance, and what a model of the tiny world knows."""

from itertools import groupby
from typing import Any

from ipywidgets import Widget

from ..experts import by_step
from ..models import VideoModel
from ..sampling import Sampling
from ..zoo import world
from .controls import slider, text

WORDS = {w for spec in world.specs() for w in spec.caption.split()}  # of the tiny world
TELLING = WORDS - {"a", "on", "background", "moving"}
OWN = "the model's own"  # a number that is not set
GUIDED = ("negative_prompt", "guidance_rescale")  # controls that act where there is guidance


def controls(model: VideoModel) -> dict[str, Widget]:
    """Controls of what only some families have, by their names in `Sampling` or its `options`."""
    late: dict[str, Any] = {"continuous_update": False}
    made: dict[str, Widget] = {}
    if hasattr(model, "text_encoder"):  # SVD has none: its guidance is a scale for each frame
        made["negative_prompt"] = text("negative", "")
        made["guidance_rescale"] = slider("rescale", 0.0, 0, 1, step=0.05, **late)
    if model.takes_image:
        made["extend"] = slider("segments", 1, 1, 4, **late)
    for name, value in model.sampling_options.items():
        label = name.removesuffix("_id").removesuffix("_strength").replace("_", " ")
        if value is None:
            made[name] = text(label, "", placeholder=OWN)
            continue
        low, high = model.option_bounds[name]
        step = {} if isinstance(value, int) else {"step": value / 10, "readout_format": ".3f"}
        made[name] = slider(label, value, low, min(high, 10 * value or high), **step, **late)
    return made


def number_or_none(name: str, written: str) -> float | None:
    """The number that a line of text has; None for an empty one."""
    try:
        return float(written) if written.strip() else None
    except ValueError:
        raise ValueError(f"{name} must be a number, or empty for {OWN}; got {written!r}") from None


def experts_at_work(model: VideoModel, sampling: Sampling) -> str:
    """Which steps each of several denoisers has."""
    if len(model.denoisers) == 1:
        return ""
    parts, end = [], 0
    for name, steps in groupby(reversed(by_step(model, sampling))):
        first, end = end + 1, end + len([*steps])
        parts.append(f"{name}: steps {first} to {end}")
    return " · ".join(parts)


def vocabulary(model: VideoModel) -> str:
    """What a model of the tiny world knows; nothing for another model."""
    if model.world != "tiny":
        return ""
    kinds = world.COLORS, world.SHAPES, world.MOTIONS, world.BACKGROUNDS
    named = zip(("colors", "shapes", "motions", "backgrounds"), map(", ".join, kinds))
    return "Words that the model knows, " + " · ".join(f"{kind}: {words}" for kind, words in named)


def unknown(model: VideoModel, prompt: str) -> str:
    """A remark on words of a prompt that a model of the tiny world does not know."""
    words = [word.strip(".,;:!?").lower() for word in str(prompt).split()]
    strange = [word for word in words if word not in WORDS]
    if model.world != "tiny" or not strange:
        return ""
    if not TELLING & {*words}:
        return "The model knows none of these words: what it draws has nothing to do with them."
    return f"The model does not know: {', '.join(dict.fromkeys(strange))}."


def guides(model: VideoModel, sampling: Sampling) -> bool:
    """Whether these settings have a negative branch, which a negative prompt and rescaling act on."""
    return "negative" in model.branches(sampling.resolve(model))
