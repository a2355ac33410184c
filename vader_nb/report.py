"""An evaluation as one HTML file that needs no other: what changed, clips, numbers, curves, configuration."""

import html
import io
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby

import torch

from .align import Run
from .evaluate import BASE, FEWEST, Evaluation, Row
from .video import Video, grid

SHOWN = 12  # clips of each group
INK = "#7d8590"  # of axes and their texts: readable on white and on black
COLORS = ("#3b82c4", "#d97706")

STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; --good: #1a7f37; --bad: #b3261e; --note: #666 }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff7b72; --note: #9a9a9a } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } p, li { overflow-wrap: anywhere }
.clips { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--width)), 1fr)) }
figure { margin: 0 } figcaption { font-size: .85rem; overflow-wrap: anywhere; max-height: 4.5em; overflow: hidden }
.who { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; font-size: .75rem; color: var(--note) }
.who span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.scroll { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { font-size: .85rem; color: var(--note); font-weight: 600 } .text { text-align: left }
.text { max-width: 18rem; overflow-wrap: anywhere; white-space: normal }
td:first-child { min-width: 7.5rem } tr.group td { background: var(--soft); font-weight: 600; padding-top: .6rem }
.up { color: var(--good) } .down { color: var(--bad) } .note { color: var(--note); font-size: .85rem }
.badge { font-size: .7rem; border: 1px solid var(--line); border-radius: 1em; padding: 0 .5em; white-space: nowrap }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 1rem }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; font-size: .8rem } svg { width: 100%; height: auto }
.chart { max-width: 640px }
@media (max-width: 600px) { table { font-size: .8rem } th, td { padding: .25rem .35rem } td:first-child { min-width: 5rem } }
"""


def render(evaluation: Evaluation, run: Run | None = None, choice=None) -> str:
    """The report as HTML; every text that a user wrote is escaped."""
    escape, names = html.escape, [BASE, *evaluation.adapters]
    title = " against ".join(
        ["Base", *([escape(", ".join(evaluation.adapters))] if evaluation.adapters else [])]
    )
    body = [f"<h1>{title}</h1>"]
    if run is not None:
        body.append(f"<p>Run <b>{escape(run.folder.name)}</b>, {len(run.metrics)} steps.</p>")
    body.append(in_short(evaluation))
    order = [
        *reversed(evaluation.clips)
    ]  # the held-out prompts, which count, come last in a call and first here
    for group in order:
        prompts, *clips = evaluation.clips[group]
        body.append(
            f"<h2>{escape(group)} prompts</h2><p class=note>Side by side: the same prompt and the same seed.</p>"
        )
        body.append(f"<div class=clips style='--width:{max(160, 130 * len(names))}px'>")
        body += [
            figure(prompt, side, names, evaluation.fps)
            for prompt, *side in list(zip(prompts, *clips))[:SHOWN]
        ]
        body.append("</div>")
    body.append(
        "<h2>Numbers</h2>" + table(sorted(evaluation.rows, key=lambda row: order.index(row.group)))
    )
    if run is not None and len(run.rewards) > 1:
        body.append("<h2>Training</h2>" + curves(run.metrics))
    if choice is not None:
        said = escape(choice.verdict[:1].upper() + choice.verdict[1:])
        body.append(
            f"<h2>Which checkpoint?</h2><p>{said}.</p><div class=chart>{svg(choice.plot())}</div>"
        )
    if run is not None and (run.folder / "config.json").exists():
        body.append(
            f"<h2>Configuration</h2><pre>{escape((run.folder / 'config.json').read_text())}</pre>"
        )
    body.append(f"<h2>Versions</h2><pre>{escape(json.dumps(versions(), indent=2))}</pre>")
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>vader_nb report</title>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"


def in_short(evaluation: Evaluation) -> str:
    """What is clear, of each adapter, on the last group of prompts."""
    group = next(reversed(evaluation.clips))
    lines = []
    for name in evaluation.adapters:
        rows = [row for row in evaluation.rows if (row.group, row.name) == (group, name)]
        found = {
            "<span class=up>higher</span>": [
                row for row in rows if row.clear and row.difference > 0
            ],
            "<span class=down>lower</span>": [
                row for row in rows if row.clear and row.difference < 0
            ],
            "no clear difference": [row for row in rows if not row.clear],
        }
        said = [
            f"{how}: {', '.join(html.escape(r.metric) for r in some)}"
            for how, some in found.items()
            if some
        ]
        lines.append(
            f"<li><b>{html.escape(name)}</b>, on {html.escape(group)} prompts. {'; '.join(said)}.</li>"
        )
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def figure(prompt: str, clips: Sequence[torch.Tensor], names: list[str], fps: int) -> str:
    """The clips of one prompt side by side, as one picture: so they play in step."""
    video = Video(
        grid(torch.stack(clips), len(clips), gap=3, background=0.25),
        fps,
        f"{', '.join(names)}: {prompt}",
    )
    who = "".join(f"<span>{html.escape(name)}</span>" for name in names)
    picture = video.to_html(width=256 * len(clips))
    return f"<figure><div class=who>{who}</div>{picture}<figcaption>{html.escape(prompt)}</figcaption></figure>"


def table(rows: list[Row]) -> str:
    """Rows under their group; a metric's cells are shared by its adapters."""
    several = len({row.name for row in rows}) > 1
    named = "<th class=text>adapter" if several else ""
    heads = (
        "<th>base",
        "<th>adapter" if not several else "<th>mean",
        "<th>difference",
        "<th>95 % interval",
        "<th>wins",
    )
    lines = [f"<tr><th class=text>metric{heads[0]}{named}{''.join(heads[1:])}"]
    columns = 6 + several
    for group, of_group in groupby(rows, key=lambda row: row.group):
        of_group = list(of_group)
        count = f"{of_group[0].prompts} prompt{'s' * (of_group[0].prompts != 1)}"
        lines.append(
            f"<tr class=group><td class=text colspan={columns}>{html.escape(group)} <span class=note>{count}"
        )
        for metric, some in groupby(of_group, key=lambda row: row.metric):
            some = list(some)
            badge = " <span class=badge>not trained on</span>" if some[0].held_out else ""
            for i, row in enumerate(some):
                base, *numbers = row.texts()
                span = f" rowspan={len(some)}"
                shared = (
                    f"<td class=text{span}>{html.escape(metric)}{badge}<td{span}>{base}"
                    if i == 0
                    else ""
                )
                name = f"<td class=text>{html.escape(row.name)}" if several else ""
                mark = "" if not row.clear else " class=up" if row.difference > 0 else " class=down"
                cells = "".join(
                    f"<td{mark if i in (1, 2) else ''}>{text}" for i, text in enumerate(numbers)
                )
                lines.append(f"<tr>{shared}{name}{cells}")
    note = (
        f"<p class=note>Differences are paired: same prompt, same seed. Intervals: bootstrap over prompts. Colored: the "
        f"interval excludes zero, on at least {FEWEST} prompts; of twenty rows in which nothing changed, one will be. "
        f"Wins: clips on which the adapter is higher than the base, ties half.</p>"
    )
    return f"<div class=scroll><table>{''.join(lines)}</table></div>{note}"


def curves(metrics: list[dict]) -> str:
    """Reward and gradient norm over steps, as inline SVG."""
    from matplotlib.figure import Figure

    done, pictures = [row for row in metrics if "reward" in row], []
    for key, title in {"reward": "reward of the batch", "grad_norm": "gradient norm"}.items():
        picture = Figure(figsize=(5, 2.8), layout="constrained")
        axis, values = picture.subplots(), torch.tensor([row[key] for row in done])
        steps, window = [row["step"] for row in done], min(8, len(done))
        axis.plot(steps, values, alpha=0.35, color=COLORS[0])
        axis.plot(
            steps[window - 1 :], values.unfold(0, window, 1).mean(1), color=COLORS[0], linewidth=2
        )
        axis.set(title=title, xlabel="step")
        pictures.append(svg(picture))
    return f"<div class=curves>{''.join(pictures)}</div>"


def svg(figure) -> str:
    """A matplotlib figure as inline SVG that goes with a light page and a dark one."""
    figure.patch.set_alpha(0)
    for axis in figure.axes:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=INK)
        axis.spines[:].set_color(INK)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_color(INK)
        if axis.get_legend():
            axis.get_legend().get_frame().set_alpha(0)
            for text in axis.get_legend().get_texts():
                text.set_color(INK)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (
        "vader-nb",
        "torch",
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "open_clip_torch",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
