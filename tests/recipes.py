"""The embedded recipes, run again: `python -m tests.recipes [NAME …]`, or `make recipes`

Trains and evaluates each as `vader-nb align config=NAME` does, and writes what came out into
vader_nb/configs/recipes/runs.yaml, notebooks/recipes.md and its picture of the curves. A run that was interrupted goes on where it stopped;
one of the same commit that is complete is not done again. `--memory NAME …` prints simulated peaks instead.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import yaml
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "recipes"
RUNS = ROOT / "vader_nb" / "configs" / "recipes" / "runs.yaml"
CURVES = ROOT / "notebooks" / "images" / "recipes.png"
FIELDS = ("group", "metric", "base", "adapter", "difference", "low", "high", "prompts", "held_out")


def commit() -> str:
    """Of this checkout. Ends where files differ from it, runs.yaml and the page apart."""

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=ROOT, text=True).strip()

    page = ROOT / "notebooks" / "recipes.md"
    written = [f":!{path.relative_to(ROOT)}" for path in (RUNS, CURVES, page)]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    if changed:
        sys.exit(f"commit first, for a row names the commit that was run; changed:\n{changed}")
    return git("rev-parse", "--short=10", "HEAD")


def run(name: str, words: list[str], folder: Path) -> Path:
    """The folder of a complete run: as it is, continued, or new."""
    if not (folder / name / "evaluation.json").exists():
        command = [sys.executable, "-m", "vader_nb", "align", f"config={name}", f"name={name}"]
        command += [f"output_dir={folder}", "resume=latest", *words]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder / name


def result(folder: Path, made_at: str) -> dict:
    """What runs.yaml holds of a run: its reward, and the held-out one, on prompts that it did not train on."""
    wanted = json.loads((folder / "config.json").read_text())["reward"]
    rows = json.loads((folder / "evaluation.json").read_text())
    group = rows[-1]["group"]
    rows = [row for row in rows if row["group"] == group and not row["metric"].startswith("oracle")]
    rows = [row for row in rows if row["metric"] == wanted or row["held_out"]]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ended = (folder / "evaluation.json").stat().st_mtime
    return {
        "date": f"{datetime.fromtimestamp(ended, timezone.utc):%Y-%m-%d}",
        "commit": made_at,
        "seconds": round(sum(step["seconds"] for step in steps)),
        "machine": f"{os.cpu_count()} CPU cores",
        "rows": [{key: rounded(row[key]) for key in FIELDS} for row in rows],
        "rewards": [round(step["reward"], 4) for step in steps if "reward" in step],
    }


def rounded(value):
    return round(value, 5) if isinstance(value, float) else value


def record(name: str, found: dict, file: Path) -> None:
    """Put one recipe's result into the file, under the comment at its top."""
    text = file.read_text()
    runs = (yaml.safe_load(text) or {}) | {name: found}
    file.write_text(text.splitlines()[0] + "\n" + yaml.safe_dump(runs, sort_keys=False))


def draw() -> None:
    """The curves of all runs: each step's mean reward, and the mean of the eight steps around it."""
    runs = yaml.safe_load(RUNS.read_text())
    figure = Figure(figsize=(3.2 * len(runs), 2.4), layout="constrained")
    for axes, (name, run) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items()):
        rewards = run["rewards"]
        near = [rewards[max(0, i - 4) : i + 4] for i in range(len(rewards))]
        steps = range(1, len(rewards) + 1)
        axes.plot(steps, rewards, ".", color="#7d8590", markersize=4)
        axes.plot(steps, [sum(part) / len(part) for part in near], color="#3b82c4")
        axes.set(title=name, xlabel="step")
    figure.axes[0].set(ylabel=run["rows"][0]["metric"])
    figure.savefig(CURVES, dpi=110)


def write_page() -> None:
    """In a process of its own, which reads what was just written."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, ROOT / "notebooks" / "pages.py"], env=environment, check=True)


def main() -> None:
    from vader_nb import recipes

    embedded = [name for name, card in recipes.CARDS.items() if card.gpu == "CPU"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"default: {' '.join(embedded)}")
    parser.add_argument("--memory", action="store_true", help="print the simulated peaks, in GiB")
    chosen = parser.parse_args()
    if chosen.memory:
        for name in chosen.names or recipes.CARDS:
            print(f"{name}: {recipes.simulated(name):.1f}", flush=True)
        return
    unknown = [name for name in chosen.names if name not in embedded]
    if unknown:
        parser.error(f"{unknown[0]!r} is no embedded recipe; choose from {', '.join(embedded)}")
    made_at = commit()
    for name in chosen.names or embedded:
        folder = run(name, [], FOLDER / made_at)
        record(name, result(folder, made_at), RUNS)
        draw()
        write_page()
        print(f"{name}: {folder / 'report.html'}", flush=True)


if __name__ == "__main__":
    main()
