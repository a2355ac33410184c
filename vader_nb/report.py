"""An evaluation as one HTML file that needs no other file."""

import io
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from .checkpoints import write_text
from .stats import NOTES
from .video import joined

if TYPE_CHECKING:
    from .best import Choice
    from .evaluation import Evaluation
    from .trainer import Run

GRAY = "#7d8590"  # axes and their texts: readable on white and on black
BLUE = "#3b82c4"
PACKAGES = (
    "vader-nb",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "open_clip_torch",
)

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)

STYLE = TEMPLATES.get_template("report.css.j2").render()


def write_report(
    evaluation: "Evaluation",
    path: str | Path,
    run: "Run | None" = None,
    choice: "Choice | None" = None,
) -> Path:
    """Write an evaluation as an HTML page: clips, table, curves, configuration and versions.

    Args:
        evaluation: What `evaluate` returned.
        path: The file to write; missing folders are made.
        run: The run of the first adapter.
        choice: What `best_checkpoint` returned.
    """
    config = None if run is None else run.folder / "config.json"
    page = TEMPLATES.get_template("report.html.j2").render(
        evaluation=evaluation,
        notes=NOTES,
        run=run,
        curves=[] if run is None or len(run.rewards) < 2 else curves(run.metrics),
        config=config.read_text(encoding="utf-8") if config and config.exists() else None,
        choice=choice,
        plot=svg(choice.plot()) if choice else None,
        picture=picture,
        versions=versions(),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def picture(prompt: str, clips: Sequence[torch.Tensor], names: Sequence[str], fps: float) -> Markup:
    """Return clips `(F, 3, H, W)` side by side, as one `<img>`, so that they play in sync."""
    video = joined(clips, fps, f"{', '.join(names)}: {prompt}")
    return Markup(video.to_html(width=256 * len(clips)))  # escapes its caption


def curves(metrics: list[dict]) -> list[Markup]:
    """Draw reward and gradient norm over steps, with a moving average."""
    rows = [row for row in metrics if "reward" in row]
    steps = [row["step"] for row in rows]
    window = min(8, len(rows))
    pictures = []
    for key, title in {"reward": "reward of the batch", "grad_norm": "gradient norm"}.items():
        values = [row[key] for row in rows]
        means = np.convolve(values, np.full(window, 1 / window), mode="valid")
        figure = Figure(figsize=(5, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, values, alpha=0.35, color=BLUE)
        axes.plot(steps[window - 1 :], means, color=BLUE, linewidth=2)
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        pictures.append(svg(figure))
    return pictures


def svg(figure: Figure) -> Markup:
    """Return a matplotlib figure as inline SVG for light and dark pages."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=GRAY)
        axes.spines[:].set_color(GRAY)
        if legend := axes.get_legend():
            legend.get_frame().set_alpha(0)
    for text in figure.findobj(Text):
        text.set_color(GRAY)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    _, start, drawing = buffer.getvalue().partition("<svg")
    return Markup(start + drawing)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
