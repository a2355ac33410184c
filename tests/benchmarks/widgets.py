"""How soon a panel shows something, what 200 interactions leave behind, and what clips weigh in a page:
`python -m tests.benchmarks.widgets [name …]`, where "clips" are the last.

Without a page a panel does everything at once, so the comparison's first picture counts all of its contestants here; in
a notebook it shows the first two and goes on.
"""

import gc
import re
import sys
import time
from pathlib import Path

import ipywidgets
import torch

import vader_nb
from vader_nb import widgets
from vader_nb.video import Video, joined
from vader_nb.widgets.player import pictures

INTERACTIONS = 200
ACTIONS = {  # what one interaction is, for the panels that make clips
    "Sampler": lambda panel, i: setattr(panel.scale, "value", (0.3, 0.6, 0.9)[i % 3]),
    "RewardComparison": lambda panel, i: (
        setattr(panel.prompt, "value", panel.prompts[i % len(panel.prompts)]),
        setattr(panel.heat, "value", bool(i % 2)),
        setattr(panel.view, "value", [*panel.data.views][i // 2 % 2]),  # contestants, scales
    ),
}


def left() -> str:
    gc.collect()
    megabytes = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    return f"{megabytes:.0f} MB, {len(ipywidgets.widgets.widget._instances)} widgets"


def weigh() -> None:
    """Clips as smooth as real ones: one in the sampler, eight in step in the comparison."""
    for count, (frames, height, width) in (
        (1, (8, 64, 64)),
        (1, (81, 480, 832)),
        (8, (81, 480, 832)),
    ):
        y, x = torch.meshgrid(
            torch.linspace(0, 9, height), torch.linspace(0, 9, width), indexing="ij"
        )
        waves = [torch.sin(x + t / 5) * torch.cos(y - t / 10) / 2 + 0.5 for t in range(frames)]
        clip = torch.stack(waves)[:, None].expand(-1, 3, -1, -1)
        clip = (clip + 0.02 * torch.randn(clip.shape)).clamp(0, 1)  # some grain, which costs bytes
        began = time.time()
        shown = joined([clip] * count, 16, "") if count > 1 else Video(clip, 16)
        page, *stills = pictures(shown, "")
        kind, weight = re.search("data:(.+?);", page)[1], len(page) / count
        print(
            f"{count} x {frames} frames of {width} x {height}: first picture after {time.time() - began:.1f} s; "
            f"{weight / 1e6:.2f} MB a clip as {kind}, {sum(map(len, stills)) / 1e6 / count:.2f} MB of single frames",
            flush=True,
        )


def main(names: list[str]) -> None:
    if "clips" in names or not names:
        weigh()
    model = vader_nb.load("tiny")
    names = [name for name in names if name != "clips"] if names else list(widgets.__all__)
    for name in names:
        if name in ("TrainingMonitor", "RunViewer"):  # which show what is in a folder
            continue
        began = time.time()
        panel = getattr(widgets, name)(*([] if name == "MemoryPlanner" else [model]))
        panel.bundles()
        print(f"{name}: first picture after {time.time() - began:.2f} s", flush=True)
        if name == "Sampler":
            panel.set(num_inference_steps=1)  # it is not the sampling that could pile up
        if name in ACTIONS:
            for i in range(40):  # until caches are full
                ACTIONS[name](panel, i)
            before = left()
            for i in range(INTERACTIONS):
                ACTIONS[name](panel, i)
            print(f"{name}: {before}; {INTERACTIONS} interactions later {left()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
