"""How soon a panel shows something, and what 200 interactions leave behind: `python -m tests.benchmarks.widgets [name …]`

Without a page a panel does everything at once, so the comparison's first picture counts all of its contestants here; in
a notebook it shows the first two and goes on.
"""

import gc
import sys
import time
from pathlib import Path

import ipywidgets

import vader_nb
from vader_nb import widgets

INTERACTIONS = 200
ACTIONS = {  # what one interaction is, for the panels that make clips
    "Sampler": lambda panel, i: setattr(panel.scale, "value", (0.3, 0.6, 0.9)[i % 3]),
    "RewardComparison": lambda panel, i: (
        setattr(panel.prompt, "value", panel.prompts[i % len(panel.prompts)]),
        setattr(panel.heat, "value", bool(i % 2)),
    ),
}


def left() -> str:
    gc.collect()
    megabytes = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    return f"{megabytes:.0f} MB, {len(ipywidgets.widgets.widget._instances)} widgets"


def main(names: list[str]) -> None:
    model = vader_nb.load("tiny")
    for name in names or [name for name in widgets.__all__ if name != "TrainingMonitor"]:
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
