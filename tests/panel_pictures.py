"""The pictures of the panels' pages, made in a real browser: `python -m tests.panel_pictures [name …]`"""

import io
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

import vader_nb
from vader_nb import prompts, rewards

from . import browser

PAGES = browser.ROOT / "notebooks"
# What is done before the picture, in the words of the pages.
BEFORE = {
    "comparison": "comparison.run()",
    "composer": "composer.measure()",
    "truncation": "[explorer.measure(K=K, frames='all') for K in (1, 2, 5)]",
    "planner": "planner.simulate()",
    "monitor": (
        "align(model, rewards.aesthetic('tiny'), prompts.get('tiny'), steps=12, batch_size=2, learning_rate=5e-3, "
        "output_dir=monitor.folder, progress=False, **monitor.hooks).adapter.remove()"
    ),
    "race": "viewer.set(x='denoiser_calls', point='VADER · evaluation 3')",
}


def small_race(folder: Path) -> None:
    """What the run viewer's page shows, made in about a minute."""
    contestants = {"VADER": {}, "GRPO": {"estimator": "GRPO(group_size=4)", "batch_size": 8}}
    vader_nb.race(
        vader_nb.load("tiny"),
        contestants | {"best of 4": {"best_of": 4}},
        rewards.hps("tiny"),
        "tiny",
        held_out=prompts.get("tiny_held_out")[:4],
        held_out_reward=rewards.action("tiny"),
        budget={"denoiser_calls": 240},
        learning_rates=[3e-3],
        seeds=[0, 1],
        evaluations=3,
        batch_size=4,
        num_inference_steps=4,
        guidance_scale=1.5,
        output_dir=folder,
    )


def main(names: list[str]) -> None:
    pages = {page.stem.removeprefix("panel_"): page for page in sorted(PAGES.glob("panel_*.md"))}
    with tempfile.TemporaryDirectory() as folder, browser.chromium() as chromium:
        for name in names or pages:
            if name == "race":
                small_race(Path(folder) / "runs" / "race")
            code = re.search(r"```python\n(.*?)```", pages[name].read_text(), re.DOTALL)[1]
            *lines, panel = code.strip().splitlines()
            cell = "\n".join([*lines, BEFORE.get(name, ""), panel])
            notebook = browser.notebook(Path(folder) / f"{name}.ipynb", cell)
            with browser.voila(notebook) as address, browser.window(chromium, 1040, 1600) as page:
                page.goto(address)
                panel = page.locator(".vader").first
                panel.wait_for()
                page.wait_for_timeout(4000)  # until the last of its first clips
                picture = Image.open(io.BytesIO(panel.screenshot())).convert("RGB")
            target = PAGES / "images" / f"panel_{name}.png"
            picture.quantize(128).save(target, optimize=True)
            print(
                f"{target.name}: {picture.size}, {target.stat().st_size / 1000:.0f} kB", flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1:])
