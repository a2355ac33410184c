"""Drawings of the chapters on models and rewards, in the form of `course_drawings`."""

import math

from .course_drawings import WIDTH, box
from .drawing import BLUE, RED, element, image, path, svg, words

TARGETS = (  # of a denoiser: symbol, what it is, who predicts it
    ("ε", "the noise", "Stable Diffusion, ModelScope"),
    ("x₀", "the clean data", ""),
    ("v", "α·ε − σ·x₀: along the arc", "tiny, SVD, CogVideoX"),
    ("u", "ε − x₀: along the straight line", "Wan, flow matching"),
)
TARGETS_ALT = (
    "Clean data to the right, noise on top. An arc leads from one to the other: noised data of a "
    "diffusion model, where α² + σ² = 1. A straight line joins them, too: flow matching, where "
    "α + σ = 1. From a point on the arc the arrow v runs along the arc toward the noise; from a point "
    "on the line the arrow u runs along the line. A step of the sampler goes the other way, toward "
    "the clean data."
)
PIPELINE_ALT = (
    "The prompt goes through the tokenizer and the text encoder and becomes one vector per token. "
    "Noise and these vectors enter the denoiser, which is called ten times; after each call the "
    "scheduler takes a step. The final latents go through the decoder and become eight frames."
)
TOWERS_ALT = (
    "A frame goes through the picture network and becomes a vector. The prompt goes through the text "
    "network and becomes a vector. The cosine between the two is the reward. Its gradient runs back "
    "through the picture network to the pixels of the frame."
)


def pointer(start: tuple, end: tuple, color: str, **more) -> list[str]:
    """A line with a head at its end."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    corners = [
        (end[0] - 10 * math.cos(angle + turn), end[1] - 10 * math.sin(angle + turn))
        for turn in (-0.45, 0.45)
    ]
    line = path([start, end], stroke=color, stroke_width=2.5, **more)
    head = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (end, *corners)) + "Z"
    return [line, element("path", d=head, fill=color)]


def targets() -> str:
    """The four outputs that a denoiser may have, between clean data and noise. HTML, an <img>."""
    left, bottom, size = 70, 262, 214

    def at(a, b):
        return left + size * a, bottom - size * b

    def on_arc(degrees):
        return at(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))

    parts = [
        path([on_arc(d) for d in range(0, 91, 3)], stroke=BLUE, stroke_width=1.5),
        path([at(1, 0), at(0, 1)], stroke=RED, stroke_width=1.5, stroke_dasharray="6 4"),
        path([at(0, 1.08), at(0, 0), at(1.12, 0)], stroke="currentColor", opacity=0.5),
        words(*at(1.02, -0.09), "clean x₀", 13, "middle", font_weight=600),
        words(left - 8, bottom - size + 4, "noise ε", 13, "end", font_weight=600),
        words(*at(0.5, -0.09), "α", 13, "middle"),
        words(left - 12, bottom - size / 2, "σ", 13, "end"),
    ]
    for (x, y), color in ((on_arc(48), BLUE), (at(0.5, 0.5), RED)):
        parts.append(element("circle", cx=x, cy=y, r=5, fill=color))
    (x, y), tangent = on_arc(48), math.radians(48)
    tip = (x - 70 * math.sin(tangent), y - 70 * math.cos(tangent))
    parts += pointer((x, y), tip, BLUE) + [words(tip[0] + 8, tip[1] - 4, "v", 16, fill=BLUE)]
    parts += pointer(at(0.5, 0.5), at(0.29, 0.71), RED)
    parts.append(words(*at(0.22, 0.66), "u", 16, "middle", fill=RED))
    parts += pointer(on_arc(45), on_arc(23), "currentColor")
    parts.append(words(on_arc(34)[0] + 12, on_arc(34)[1], "a step of the sampler", 12))
    for i, (symbol, meaning, models) in enumerate(TARGETS):
        color = {"v": BLUE, "u": RED}.get(symbol, "currentColor")
        y = 124 + 44 * i
        parts.append(words(430, y, symbol, 17, font_weight=700, fill=color))
        parts += [words(462, y, meaning, 13), words(462, y + 16, models, 12, opacity=0.75)]
    parts.append(words(430, 92, "the network says …", 13, font_weight=600))
    parts.append(words(430, 40, "blue: α² + σ² = 1, diffusion", 12, fill=BLUE))
    parts.append(words(430, 58, "red: α + σ = 1, flow matching", 12, fill=RED))
    return image(svg(WIDTH, 300, parts, TARGETS_ALT, WIDTH), TARGETS_ALT, WIDTH)


def row_of(names: dict[str, tuple], y: float, look: str = "empty") -> list[str]:
    """Boxes in a row, each (x, width), joined by arrows."""
    parts, places = [], list(names.values())
    for name, (x, width) in names.items():
        parts += box(x, y, width, 46, look, name)
    for (x, width), (following, _) in zip(places, places[1:]):
        parts += pointer((x + width + 3, y + 23), (following - 3, y + 23), "currentColor")
    return parts


def pipeline() -> str:
    """From a sentence and noise to frames, with the shapes of `tiny`. HTML, an <img>."""
    text = {"prompt": (10, 90), "tokenizer": (150, 100), "text encoder": (300, 110)}
    video = {"denoiser": (300, 110), "scheduler": (450, 90), "decoder": (580, 80)}
    parts = row_of(text, 30) + row_of(video, 140, "kept")
    parts += box(10, 140, 90, 46, "empty", "noise") + pointer(
        (103, 163), (297, 163), "currentColor"
    )
    parts += pointer((355, 79), (355, 137), "currentColor")
    parts += pointer((663, 163), (684, 163), "currentColor")
    parts.append(words(688, 159, "frames", 12))
    shapes = [
        (125, 22, "sentence"),
        (275, 22, "24 tokens"),
        (366, 112, "24 × 64, to every call"),
        (196, 154, "latents 4 × 8 × 8 × 8"),
        (688, 176, "8 × 3 ×"),
        (688, 191, "64 × 64"),
        (560, 132, "x₀"),
    ]
    for x, y, text in shapes:
        anchor = "start" if x in (366, 688) else "middle"
        parts.append(words(x, y, text, 11, anchor, opacity=0.85))
    loop = [(495, 189), (495, 222), (355, 222), (355, 196)]
    parts.append(path(loop, stroke=RED, stroke_width=2.5))
    parts += pointer((355, 205), (355, 190), RED)
    parts.append(words(425, 238, "ten times, each with less noise", 12, "middle", fill=RED))
    return image(svg(WIDTH, 250, parts, PIPELINE_ALT, WIDTH), PIPELINE_ALT, WIDTH)


def towers() -> str:
    """A reward made of two networks, and the path of its gradient. HTML, an <img>."""
    parts = row_of(
        {"frame": (10, 90), "picture network": (170, 130), "vector": (370, 80)}, 24, "kept"
    )
    parts += row_of({"prompt": (10, 90), "text network": (170, 130), "vector ": (370, 80)}, 136)
    parts += box(540, 80, 110, 46, "kept", "cosine = R")
    parts += pointer((453, 52), (537, 92), "currentColor")
    parts += pointer((453, 154), (537, 116), "currentColor")
    parts += pointer((575, 76), (460, 32), RED)
    parts += pointer((366, 84), (304, 84), RED) + pointer((166, 84), (104, 84), RED)
    parts.append(words(335, 104, "∂R/∂vector", 12, "middle", fill=RED))
    parts.append(words(135, 104, "∂R/∂pixels", 12, "middle", fill=RED))
    parts.append(words(10, 206, "blue: activations are kept for the backward pass", 12, fill=BLUE))
    return image(svg(WIDTH, 220, parts, TOWERS_ALT, WIDTH), TOWERS_ALT, WIDTH)


DRAWINGS = (targets, pipeline, towers)
