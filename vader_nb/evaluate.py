"""Base against adapter: the same prompts and seeds, every reward, oracles where they apply, and a report.

evaluation = evaluate(model, run.adapter, reward, {"training": seen, "held-out": unseen})
evaluation.report(run.folder / "report.html", run)
"""

import html
import io
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .align import Run
from .checkpoints import write
from .gradient import Sampling, sample
from .lora import Adapter
from .models import VideoModel
from .rewards import Reward, as_reward
from .video import Gallery, Video, grid

RESAMPLES = 2000


@dataclass
class Row:
    """One metric on one group of prompts: means of base and adapter over prompts, and the mean paired
    difference with its 95 % bootstrap interval [low, high] over prompts."""

    group: str
    metric: str
    base: float
    adapter: float
    difference: float
    low: float
    high: float
    prompts: int

    @property
    def clear(self) -> bool:
        """The interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass
class Evaluation:
    """Rows of the comparison, and the first clips of each group: group -> (prompts, base, adapter), the
    clips as (N, F, 3, H, W)."""

    rows: list[Row]
    clips: dict[str, tuple[list[str], torch.Tensor, torch.Tensor]]
    fps: int

    def row(self, group: str, metric: str) -> Row:
        return next(row for row in self.rows if (row.group, row.metric) == (group, metric))

    def __str__(self) -> str:
        width = max(len(row.metric) for row in self.rows)
        lines = [f"{'':{width + 10}}{'base':>9}{'adapter':>9}  difference [95 % interval]"]
        for row in self.rows:
            lines.append(
                f"{row.group:<10}{row.metric:<{width}}{row.base:9.3f}{row.adapter:9.3f}  {row.difference:+.3f} "
                f"[{row.low:+.3f}, {row.high:+.3f}]{' *' if row.clear else ''}"
            )
        return "\n".join([*lines, "* the interval excludes zero"])

    __repr__ = __str__

    def gallery(self, group: str, count: int = 6) -> Gallery:
        """Base over adapter, same prompts and seeds."""
        prompts, base, adapter = self.clips[group]
        before = [Video(clip, self.fps, prompt) for prompt, clip in zip(prompts, base[:count])]
        after = [Video(clip, self.fps, prompt) for prompt, clip in zip(prompts, adapter[:count])]
        return Gallery({"base": before, "adapter": after})

    def save(self, folder: str | Path) -> None:
        """`evaluation.json`, and in `clips/` a before-and-after gif and mp4 of each group."""
        folder = Path(folder)
        write(folder / "evaluation.json", json.dumps([asdict(row) for row in self.rows], indent=2) + "\n")
        for number, (_, base, adapter) in enumerate(self.clips.values()):
            for suffix in (".gif", ".mp4"):  # named by number: a prompt never becomes a file name
                pairs = torch.cat([base[:8], adapter[:8]])
                Video(grid(pairs, len(base[:8])), self.fps).save(
                    folder / "clips" / f"group-{number}{suffix}", width=1024
                )

    def report(self, path: str | Path, run: Run | None = None) -> Path:
        """Write one HTML file that needs no other: clips, curves, table, configuration, versions."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, render(self, run))
        return path


def interval(differences: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (N,) paired differences."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(differences), (RESAMPLES, len(differences)), generator=generator)
    low, high = differences.double()[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def thumbnails(frames: torch.Tensor) -> torch.Tensor:
    """Features (B, D) of clips: 8x8 thumbnails of all frames, in levels of 0 to 255. A space without weights for
    any model; pass a network's features for one that sees meaning."""
    return 255 * torch.nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1), 8).reshape(len(frames), -1)


def motion(frames: torch.Tensor) -> torch.Tensor:
    """Mean absolute change from frame to frame, (B,)."""
    return frames.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


@torch.no_grad()
def measure(frames: torch.Tensor, prompts: list[str], rewards: list[Reward]) -> dict[str, torch.Tensor]:
    """Every per-clip metric: name -> (B,). The oracles join in where all prompts are of the tiny world."""
    from .zoo import oracles, world

    result = {reward.name: reward(frames, prompts).float().cpu() for reward in rewards}
    if all(world.parse(prompt) for prompt in prompts):
        result |= {f"oracle: {name}": value for name, value in oracles.grade(frames, prompts).items()}
    return result | {"motion": motion(frames).float().cpu()}


def evaluate(
    model: VideoModel,
    adapter: Adapter,
    rewards: Reward | Callable | list[Reward | Callable],
    prompts: dict[str, list[str]],
    *,
    seeds_per_prompt: int = 2,
    batch_size: int = 8,
    sampling: Sampling | None = None,
    features: Callable[[torch.Tensor], torch.Tensor] = thumbnails,
    seed: int = 10_000,
    keep: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Compare base and adapter on groups of prompts at the same seeds.

    A sum of rewards is reported as a whole and part by part. Diversity is the variance over the seeds of a
    prompt in the space of `features` (frames (B, F, 3, H, W) -> (B, D)); it needs two seeds a prompt.
    keep: clips of each group that stay for pictures. Seeds start at `seed`, far from a training run's.
    """
    listed = [as_reward(r) for r in (rewards if isinstance(rewards, list) else [rewards])]
    parts = {part.name: part for reward in listed for part in [reward, *reward.parts()]}
    if seeds_per_prompt < 1:
        raise ValueError(f"seeds_per_prompt must be at least 1, got {seeds_per_prompt}")
    for part in parts.values():
        part.to(model.device)
    rows, kept = [], {}
    total = 2 * sum(len(group) for group in prompts.values()) * seeds_per_prompt
    with tqdm(total=total, desc="evaluate", unit="clip", disable=not progress) as bar:
        for group, texts in prompts.items():
            # Seed by seed over all prompts, so that the clips that are kept show many prompts.
            jobs = [(text, seed + s * len(texts) + i) for s in range(seeds_per_prompt) for i, text in enumerate(texts)]
            table, shown = {}, {}
            for who in ("base", "adapter"):
                metrics, vectors, clips = [], [], []
                for start in range(0, len(jobs), batch_size):
                    batch = jobs[start : start + batch_size]
                    names, seeds = [text for text, _ in batch], [s for _, s in batch]
                    if who == "base":
                        with adapter.disabled():
                            frames = sample(model, names, seeds=seeds, sampling=sampling)
                    else:
                        frames = sample(model, names, seeds=seeds, sampling=sampling, adapter=adapter)
                    metrics.append(measure(frames, names, list(parts.values())))
                    vectors.append(features(frames).float().cpu())
                    clips += list(frames.cpu()) if len(clips) < keep else []
                    bar.update(len(batch))
                # (seeds, prompts) -> a mean a prompt: prompts are the independent draws, seeds are not
                columns = {name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}
                table[who] = {k: v.view(seeds_per_prompt, -1).mean(0) for k, v in columns.items()}
                if seeds_per_prompt > 1:
                    table[who]["diversity"] = torch.cat(vectors).view(seeds_per_prompt, len(texts), -1).var(0).mean(1)
                shown[who] = torch.stack(clips[:keep])
            kept[group] = ([text for text, _ in jobs[:keep]], shown["base"], shown["adapter"])
            for name, before in table["base"].items():
                after = table["adapter"][name]
                difference = after - before
                low, high = interval(difference)
                means = before.mean().item(), after.mean().item(), difference.mean().item()
                rows.append(Row(group, name, *means, low, high, len(texts)))
    return Evaluation(rows, kept, model.defaults["fps"])


# ------------------------------------------------------------------------------------------- the report

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff7b72 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1.2rem }
figure { margin: 0 } figcaption { font-size: .85rem; overflow-wrap: anywhere; max-height: 4.5em; overflow: hidden }
.pair { display: flex; gap: 4px } .pair div { flex: 1; font-size: .75rem } .pair img { width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th, td { padding: .25rem .8rem; text-align: right }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } tr { border-bottom: 1px solid var(--line) }
.up { color: var(--good) } .down { color: var(--bad) } .scroll { overflow-x: auto }
pre { background: #8881; padding: 1rem; overflow-x: auto; font-size: .8rem } svg { max-width: 100%; height: auto }
"""


def render(evaluation: Evaluation, run: Run | None) -> str:
    """The report as HTML; every text that a user wrote is escaped."""
    escape = html.escape
    body = ["<h1>Base against adapter</h1>"]
    if run is not None:
        body.append(
            f"<p>Run <b>{escape(run.folder.name)}</b>, {len(run.metrics)} steps. Left before, right after, same seed.</p>"
        )
    for group, (prompts, base, adapter) in reversed(evaluation.clips.items()):
        body.append(f"<h2>{escape(group)} prompts</h2><div class=clips>")
        for prompt, before, after in list(zip(prompts, base, adapter))[:12]:
            left = Video(before, evaluation.fps, f"before: {prompt}").to_html()
            right = Video(after, evaluation.fps, f"after: {prompt}").to_html()
            body.append(
                f"<figure><div class=pair><div>{left}<br>before</div><div>{right}<br>after</div></div>"
                f"<figcaption>{escape(prompt)}</figcaption></figure>"
            )
        body.append("</div>")
    body.append("<h2>Numbers</h2>" + table(evaluation.rows))
    if run is not None and len(run.rewards) > 1:
        body.append("<h2>Training</h2>" + curves(run.metrics))
    if run is not None and (run.folder / "config.json").exists():
        body.append(f"<h2>Configuration</h2><pre>{escape((run.folder / 'config.json').read_text())}</pre>")
    body.append(f"<h2>Versions</h2><pre>{escape(json.dumps(versions(), indent=2))}</pre>")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>vader_nb report</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def table(rows: list[Row]) -> str:
    lines = ["<tr><th>group<th>metric<th>base<th>adapter<th>difference<th>95 % interval<th>prompts"]
    for row in rows:
        mark = "" if not row.clear else " class=up" if row.difference > 0 else " class=down"
        lines.append(
            f"<tr><td>{html.escape(row.group)}<td>{html.escape(row.metric)}<td>{row.base:.3f}<td>{row.adapter:.3f}"
            f"<td{mark}>{row.difference:+.3f}<td{mark}>{row.low:+.3f} to {row.high:+.3f}<td>{row.prompts}"
        )
    note = "<p>Coloured: the interval excludes zero. Paired bootstrap over prompts.</p>"
    return f"<div class=scroll><table>{''.join(lines)}</table></div>{note}"


def curves(metrics: list[dict]):
    """Reward and gradient norm over steps, as inline SVG."""
    from matplotlib.figure import Figure

    done = [row for row in metrics if "reward" in row]
    steps, figure = [row["step"] for row in done], Figure(figsize=(10, 3), layout="constrained")
    for axis, (key, title) in zip(
        figure.subplots(1, 2), {"reward": "reward of the batch", "grad_norm": "gradient norm"}.items()
    ):
        values = torch.tensor([row[key] for row in done])
        axis.plot(steps, values, alpha=0.35, color="#3572b0")
        window = min(8, len(values))
        smooth = values.unfold(0, window, 1).mean(1)
        axis.plot(steps[window - 1 :], smooth, color="#3572b0", linewidth=2)
        axis.set(title=title, xlabel="step")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("vader-nb", "torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
