"""Drawings of the course: SVG, in colors that are legible on light and on dark pages."""

from typing import Any

from .drawing import BLUE, GRAY, RED, data_url, element, image, path, svg, words

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
    for x in (STEPS[2] - 7, STEPS[1] - 7, CUTS["latents x₀"]):  # latents that stage 1 records
        parts.append(element("circle", cx=x, cy=y + 23, r=5, fill=BLUE))
    parts.append(words(END, y + 28, "● latents", 13, fill=BLUE))
    parts.append(words(END, 34 + 28, "everything", 13, fill=BLUE))
    parts.append(words(END, 34 + 2 * ROW + 28, "one frame", 13, fill=BLUE))
    parts.append(words(END, 34 + 3 * ROW + 28, "one step", 13, fill=BLUE))
    parts.append(words(CUTS["latents x₀"] + 6, 34 + 3 * ROW + 62, "g enters here", 12, fill=RED))
    parts.append(words(CUTS["latents x₀"] - 6, 34 + 2 * ROW + 62, "g", 15, "end", fill=RED))
    parts.append(words(STEPS[2] + 42, 34 + 3 * ROW + 62, "g₁", 15, "end", fill=RED))
    for step, row in ((2, 0), (1, 0), (1, 3)):
        parts.append(words(STEPS[step] + 24, 34 + row * ROW + 74, "→ θ", 12, "middle", fill=RED))
    y = 4 * ROW + 40
    for i, (look, text) in enumerate((*LEGEND, ("later", "its turn comes later"))):
        parts += box(4 + 205 * i, y, 22, 14, look, "")
        parts.append(words(32 + 205 * i, y + 12, text, 12))
    parts += arrow(668, 622, (y - 85) / ROW)
    parts.append(words(675, y + 12, "gradient", 12))
    return parts


BYPASS_ALT = (
    "A vector x goes two ways. Above, through the large frozen matrix W. Below, through the narrow "
    "A to r numbers, through B back to full width, times alpha over r. The two are added to y."
)


def bypass() -> str:
    """LoRA's bypass around a linear layer. HTML, an <img>."""
    frozen = {"fill_opacity": 0.12, "stroke": "currentColor", "stroke_dasharray": "5 4"}
    learned = {"fill": BLUE, "fill_opacity": 0.35, "stroke": BLUE}
    parts = [
        element("rect", x=150, y=14, width=220, height=86, rx=4, **frozen),
        words(260, 52, "W, frozen", 15, "middle", font_weight=600),
        words(260, 74, "out × in", 13, "middle"),
        # Trapezoids, as wide as the space that they come from and lead to.
        element("path", d="M130 134L230 164L230 184L130 214Z", **learned),
        words(178, 179, "A", 16, "middle", font_weight=600),
        element("path", d="M270 164L370 134L370 214L270 184Z", **learned),
        words(322, 179, "B", 16, "middle", font_weight=600),
        words(250, 162, "r", 14, "middle", fill=BLUE),
        words(178, 232, "r × in, random", 13, "middle"),
        words(322, 232, "out × r, zero at first", 13, "middle"),
        words(404, 168, "× α/r", 14, "middle"),
        words(20, 118, "x", 18, "middle", font_style="italic"),
        words(520, 118, "y", 18, "middle", font_style="italic"),
        element("circle", cx=462, cy=112, r=13, fill="none", stroke="currentColor"),
        words(462, 118, "+", 18, "middle"),
        path([(34, 112), (70, 112), (70, 57), (148, 57)], stroke="currentColor"),
        path([(70, 112), (70, 174), (128, 174)], stroke="currentColor"),
        path([(230, 174), (270, 174)], stroke=BLUE, stroke_width=2),
        path([(372, 57), (462, 57), (462, 98)], stroke="currentColor"),
        path([(370, 174), (462, 174), (462, 126)], stroke="currentColor"),
        path([(476, 112), (508, 112)], stroke="currentColor"),
    ]
    return image(svg(540, 244, parts, BYPASS_ALT, 540), BYPASS_ALT)


PROCESSES_ALT = (
    "Two processes, one above the other. Each draws its own clip with the same adapter and has a gradient "
    "of its own. The gradients meet in one box, their mean, which goes back to both. Both take the same step, "
    "and have the same adapter again."
)


def processes() -> str:
    """Two processes that share nothing but the mean of their gradients. HTML, an <img>."""
    parts = [
        element("rect", x=372, y=64, width=92, height=60, rx=4, fill=RED, fill_opacity=0.2),
        words(418, 90, "mean", 14, "middle", font_weight=600),
        words(418, 108, "all-reduce", 12, "middle"),
    ]
    for rank, y in enumerate((16, 126)):
        middle = y + 23
        parts.append(words(4, middle + 5, f"process {rank}", 14, font_weight=600))
        for x, text, look in (
            (92, "adapter", "kept"),
            (192, f"clip {rank}", "empty"),
            (282, f"gradient {rank}", "empty"),
            (496, "step", "empty"),
            (582, "adapter", "kept"),
        ):
            parts += box(x, y, 84 if "grad" in text else 74, 46, look, text)
        for start, end in ((166, 191), (266, 281), (570, 581)):
            parts.append(path([(start, middle), (end, middle)], stroke="currentColor"))
        inward = 78 if rank == 0 else 110
        there = [(366, middle), (390, middle), (390, 64 if rank == 0 else 124)]
        back = [(464, inward), (480, inward), (480, middle), (495, middle)]
        parts.append(path(there, stroke=RED, stroke_width=2.5))
        parts.append(path(back, stroke=RED, stroke_width=2.5))
    parts.append(words(129, 98, "the same", 12, "middle", fill=BLUE))
    parts.append(words(619, 98, "the same", 12, "middle", fill=BLUE))
    return image(svg(664, 190, parts, PROCESSES_ALT, 664), PROCESSES_ALT)


SETS_ALT = (
    "Prompts in two boxes. Training prompts are trained on. Held-out prompts are split into three parts that share "
    "no prompt: one to watch while training, one to choose a checkpoint, and one to report, which is looked at once."
)


def prompt_sets() -> str:
    """Prompts that are trained on, watched, chosen with and reported on. HTML, an <img>."""
    parts = [
        words(8, 20, "prompts for training", 14, font_weight=600),
        element("rect", x=8, y=32, width=196, height=58, rx=4, fill=GRAY, fill_opacity=0.25),
        words(106, 66, "train", 15, "middle", font_weight=600),
        words(8, 112, "a high reward here", 12),
        words(8, 128, "is no evidence", 12),
        words(232, 20, "prompts held out", 14, font_weight=600),
    ]
    uses = (
        ("watch", "every few steps,", "to see it break"),
        ("choose", "a checkpoint: the", "best looks too good"),
        ("report", "opened only once,", "at the end"),
    )
    for i, (name, *remark) in enumerate(uses):
        x, last = 232 + 136 * i, name == "report"
        shade = {"fill": BLUE, "fill_opacity": 0.25 if last else 0.1, "stroke": BLUE}
        parts.append(element("rect", x=x, y=32, width=124, height=58, rx=4, **shade))
        parts.append(words(x + 62, 66, name, 15, "middle", font_weight=600))
        parts += [words(x, 112 + 16 * line, text, 12) for line, text in enumerate(remark)]
    return image(svg(640, 140, parts, SETS_ALT, 640), SETS_ALT)


CHUNKS = {0: 150, 1: 330, 2: 510}  # x of a causal decoder's boxes
CAUSAL_ALT = (
    "A causal decoder, twice. Forward, without a graph, three chunks turn three latents into frames, "
    "one after the other, and each hands a state on to the next; the states before each chunk are "
    "kept. Backward, one chunk at a time has its activations in memory, the last one first: the "
    "gradient comes from its frames and from the state after it, and goes to its latent and to the "
    "state before it."
)


def causal() -> str:
    """The exact gradient of a causal decoder, in two passes. HTML, an <img>."""
    parts = []
    for row, (title, looks) in enumerate(
        (
            ("1 · forward", dict.fromkeys(CHUNKS, "empty")),
            ("2 · backward", {0: "later", 1: "kept", 2: "absent"}),
        )
    ):
        y = 52 + 168 * row
        parts.append(words(4, y + 28, title, 14, font_weight=600))
        for k, x in CHUNKS.items():
            parts += box(x, y, 100, 46, looks[k], f"decode {k}")
            parts.append(words(x + 50, y - 24, f"frames y{'₀₁₂'[k]}", 12, "middle"))
            parts.append(words(x + 50, y + 84, f"z{'₀₁₂'[k]}", 14, "middle"))
            parts += pointer(x + 50, y + 68, x + 50, y + 50, "currentColor")
            parts += pointer(x + 50, y - 3, x + 50, y - 18, "currentColor")
        for k in (1, 2):
            x = CHUNKS[k]
            parts += pointer(x - 76, y + 23, x - 4, y + 23, "currentColor")
            kept: dict[str, Any] = {"fill": BLUE} if not row or k == 1 else {"opacity": 0.35}
            parts.append(element("circle", cx=x - 40, cy=y + 23, r=5, **{"fill": GRAY} | kept))
            parts.append(words(x - 40, y + 12, f"h{'₀₁₂'[k]}", 13, "middle", **kept))
    parts += sweep_back(52 + 168)
    return picture_of(parts, 340, CAUSAL_ALT)


def sweep_back(y: float) -> list[str]:
    """What reaches the middle chunk, and what it hands on."""
    x, parts = CHUNKS[1], []
    parts += pointer(x + 62, y - 20, x + 62, y - 3, RED)
    parts += pointer(CHUNKS[2] - 4, y + 36, x + 104, y + 36, RED)
    parts += pointer(x - 4, y + 36, CHUNKS[0] + 104, y + 36, RED)
    parts += pointer(x + 62, y + 50, x + 62, y + 68, RED)
    parts.append(words(x + 72, y - 10, "∂R/∂y₁", 12, fill=RED))
    parts.append(words(x + 72, y + 66, "∂R/∂z₁", 12, fill=RED))
    parts.append(words(x + 142, y + 52, "∂R/∂h₂", 12, "middle", fill=RED))
    parts.append(words(x - 38, y + 52, "∂R/∂h₁", 12, "middle", fill=RED))
    for i, (look, text) in enumerate((*LEGEND, ("later", "its turn comes later"))):
        parts += box(4 + 205 * i, y + 102, 22, 14, look, "")
        parts.append(words(32 + 205 * i, y + 114, text, 12))
    parts.append(element("circle", cx=640, cy=y + 109, r=5, fill=BLUE))
    parts.append(words(652, y + 114, "state, kept", 12))
    return parts


def pointer(x: float, y: float, x2: float, y2: float, color: str) -> list[str]:
    """An arrow, up, down, left or right."""
    dx, dy = ((x2 > x) - (x2 < x), (y2 > y) - (y2 < y))
    a, b = (
        (x2 - 7 * dx - 4 * dy, y2 - 7 * dy - 4 * dx),
        (x2 - 7 * dx + 4 * dy, y2 - 7 * dy + 4 * dx),
    )
    head = f"M{a[0]} {a[1]}L{x2} {y2}L{b[0]} {b[1]}Z"
    line = path([(x, y), (x2 - 6 * dx, y2 - 6 * dy)], stroke=color, stroke_width=1.6)
    return [line, element("path", d=head, fill=color)]


def picture_of(parts: list[str], height: float, alt: str) -> str:
    """The drawing as an <img>, in a gray that is legible on light and dark pages."""
    gray = svg(WIDTH, height, parts, alt, WIDTH).replace(
        "font-family:inherit", f"font-family:sans-serif;color:{GRAY}", 1
    )
    source = data_url(gray.encode(), "image/svg+xml")
    return f'<img src="{source}" alt="{alt}" style="width:100%;max-width:{WIDTH}px">'


DRAWINGS = stages, bypass, processes, prompt_sets, causal
