"""Drawings of the course: SVG, in colors that are legible on light and on dark pages."""

from .drawing import BLUE, RED, element, image, path, svg, words

WIDTH, ROW = 740, 84
STEPS = {4: 140, 3: 202, 2: 264, 1: 326}  # x of the boxes
CUTS = {"latents x₀": 402, "frames": 530}
DECODER, REWARD, END = 420, 548, 646
FRAMES = range(3)
LEGEND = (("empty", "computed, nothing is kept"), ("kept", "activations in memory"))
ALT = (
    "The chain from noise through four denoising steps, the latents, the decoder and the frames to "
    "the reward, four times. Plain autograd keeps the activations of two steps, of the decoder and "
    "of the reward for all frames. Stage 1 keeps only latents. Stage 2 keeps the decoder and the "
    "reward for one frame, and its gradient ends at the latents. Stage 3 keeps one step, and the "
    "gradient goes from the latents back into step 1, then step 2."
)


def stages() -> str:
    """The reward's gradient in one piece, and in three stages: what is in memory. HTML, an <img>."""
    all_steps, x0 = dict.fromkeys(STEPS, "empty"), CUTS["latents x₀"]
    rows = (
        *chain(0, "plain autograd", all_steps | {2: "kept", 1: "kept"}, ["kept"] * 3),
        *arrow(END, STEPS[2], 0),
        *chain(1, "1 · roll out", all_steps),
        *chain(2, "2 · score", {}, ["kept", "later", "later"]),
        *arrow(END, x0, 2),
        *chain(3, "3 · replay", {2: "later", 1: "kept"}),
        *arrow(x0 - 4, STEPS[2] + 48, 3),
        *notes(),
    )
    return image(svg(WIDTH, 4 * ROW + 64, rows, ALT, WIDTH), ALT, WIDTH)


def chain(row: int, title: str, steps: dict, frames: list | None = None) -> list[str]:
    """One row: the looks of its steps and frames ("kept", "empty", "later"); others are not part of it."""
    y = 34 + row * ROW
    parts = [words(4, y + 28, title, 14, font_weight=600)]
    for number, x in STEPS.items():
        parts += box(x, y, 48, 46, steps.get(number, "absent"), f"step {number}")
    for i in FRAMES:
        look = frames[i] if frames else "absent"
        for x, name in ((DECODER, "decode"), (REWARD, "reward")):
            parts += box(x, y + 16 * i, 92, 14, look, f"{name} {i + 1}")
    return parts


def box(x: float, y: float, width: float, height: float, look: str, text: str) -> list[str]:
    looks = {
        "kept": {"fill": BLUE, "fill_opacity": 0.35, "stroke": BLUE},
        "empty": {"fill_opacity": 0, "stroke": "currentColor"},
        "later": {"fill_opacity": 0, "stroke": "currentColor", "stroke_dasharray": "3 3"},
        "absent": {"fill_opacity": 0, "stroke": "currentColor", "stroke_opacity": 0.25},
    }
    more = {
        "opacity": 0.35 if look == "absent" else 1,
        "font_weight": 700 if look == "kept" else 400,
    }
    frame = element("rect", x=x, y=y, width=width, height=height, rx=3, **looks[look])
    return [frame, words(x + width / 2, y + height / 2 + 4, text, 12, "middle", **more)]


def arrow(start: float, end: float, row: float) -> list[str]:
    """The gradient below a row, from right to left."""
    y = 92 + row * ROW
    head = f"M{end + 9} {y - 5}L{end} {y}L{end + 9} {y + 5}Z"
    line = path([(start, y), (end + 8, y)], stroke=RED, stroke_width=2.5)
    return [line, element("path", d=head, fill=RED)]


def notes() -> list[str]:
    """The cuts, what is handed from stage to stage, and the legend."""
    bottom, parts = 34 + 4 * ROW - 14, []
    for name, x in CUTS.items():
        parts.append(words(x, 14, name, 13, "middle", font_weight=600))
        parts.append(path([(x, 22), (x, bottom)], stroke=RED, stroke_dasharray="5 5", opacity=0.8))
    y = 34 + ROW
    for x in (STEPS[2] - 7, STEPS[1] - 7, CUTS["latents x₀"]):  # latents that stage 1 notes
        parts.append(element("circle", cx=x, cy=y + 23, r=5, fill=BLUE))
    parts.append(words(END, y + 28, "● latents", 13, fill=BLUE))
    parts.append(words(END, 34 + 28, "everything", 13, fill=BLUE))
    parts.append(words(END, 34 + 2 * ROW + 28, "one frame", 13, fill=BLUE))
    parts.append(words(END, 34 + 3 * ROW + 28, "one step", 13, fill=BLUE))
    parts.append(words(CUTS["latents x₀"] + 6, 34 + 3 * ROW + 62, "g enters here", 12, fill=RED))
    parts.append(words(CUTS["latents x₀"] - 6, 34 + 2 * ROW + 62, "g", 15, "end", fill=RED))
    for step, row in ((2, 0), (1, 0), (1, 3)):
        parts.append(words(STEPS[step] + 24, 34 + row * ROW + 74, "→ θ", 12, "middle", fill=RED))
    y = 4 * ROW + 40
    for i, (look, text) in enumerate((*LEGEND, ("later", "its turn comes after"))):
        parts += box(4 + 205 * i, y, 22, 14, look, "")
        parts.append(words(32 + 205 * i, y + 12, text, 12))
    parts += arrow(668, 622, (y - 85) / ROW)
    parts.append(words(675, y + 12, "gradient", 12))
    return parts
