"""A comparison as one HTML file that needs no other."""

import json
from collections.abc import Sequence

import torch
from jinja2 import Environment
from markupsafe import Markup

from .. import report
from ..evaluate import MIN_PROMPTS
from ..stats import paired_interval
from .comparison_data import Comparison
from .side_by_side import columns, joined, number, score_rows, signed
from .voting import Tally

# Added to the report's style. On a phone a table scrolls; it does not break names into letters.
STYLE = """
section { margin: 1.5rem 0 } section td { text-align: left; white-space: normal; border: 0 }
.text { overflow-wrap: break-word; min-width: 4.5rem }
.vader-note { color: var(--note); font-size: .85rem }
.vader-up { color: var(--good) } .vader-down { color: var(--bad) }
"""

PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>
<title>vader_nb comparison</title><style>{{ style }}</style></head><body>
<h1>{{ names[0] if names|length > 1 else "Base" }}
{%- if names|length > 1 %} against {{ names[1:]|join(", ") }}{% endif %}</h1>
<p>{{ sections|length }} of {{ total }} prompts. Side by side: the same prompt, the same noise; they
play in step. Beside an adapter's score: its difference to the base.</p>
{% if means %}<h2>Differences to the base</h2><div class=scroll><table>
<tr><th class=text>reward<th class=text>adapter<th>mean difference<th>95 % interval<th>higher on
{% for reward, name, mean, bounds, wins in means %}
<tr><td class=text>{{ reward }}<td class=text>{{ name }}<td>{{ mean }}<td>{{ bounds }}<td>{{ wins }}
{% endfor %}</table></div>{% endif %}
<h2>Prompts</h2>
{% for prompt, body in sections %}<section><p>{{ prompt }}</p>{{ body }}</section>
{% endfor %}
{% if votes %}<h2>Blind votes</h2><ul>{% for tally in votes %}<li>{{ tally }}.
{% endfor %}</ul>{% endif %}
<h2>Settings</h2><pre>{{ settings }}</pre></body></html>
"""


def render(comparison: Comparison, prompts: Sequence[str], tallies: Sequence[Tally]) -> str:
    """Return the page: means, clips with scores for all compared prompts, votes, settings.

    Raises:
        ValueError: Nothing is compared yet.
    """
    compared = [prompt for prompt in prompts if comparison.is_scored(prompt)]
    if not compared:
        raise ValueError("there is nothing to export yet: comparison.run() or run_all() first")
    settings = {
        "model": comparison.model.name,
        "adapters": {name: str(path) for name, path in comparison.adapters.items()},
        "seed": comparison.seed,
    }
    sampling = {k: v for k, v in vars(comparison.sampling).items() if v is not None}
    settings |= sampling | report.versions()
    return Environment(autoescape=True).from_string(PAGE).render(
        style=Markup(report.STYLE + STYLE),
        names=comparison.names,
        total=len(prompts),
        means=_means(comparison, compared),
        sections=[(prompt, Markup(_clips(comparison, prompt))) for prompt in compared],
        votes=[str(tally) for tally in tallies if tally.votes],
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
    )


def _clips(comparison: Comparison, prompt: str) -> str:
    """Clips and scores of a prompt."""
    names, clips = comparison.names, comparison.clips_of(prompt)
    picture = "<p class=note>Its clips were not kept: too many prompts came after it.</p>"
    if len(clips) == len(names):
        frames = [clips[name].pixels() for name in names]
        video = joined(frames, comparison.model.defaults["fps"], f"{', '.join(names)}: {prompt}")
        picture = video.to_html(width=256 * len(names))
    return columns(names, picture, *score_rows(comparison, prompt))


def _means(comparison: Comparison, prompts: Sequence[str]) -> list[tuple]:
    """Rows of the table of mean differences over prompts."""
    rows = []
    for reward in comparison.rewards:
        for name in comparison.adapters:
            changes = torch.tensor([comparison.difference(p, name, reward) for p in prompts])
            bounds = f"from {MIN_PROMPTS} prompts on"
            if len(changes) >= MIN_PROMPTS:
                bounds = " to ".join(number(bound, "+") for bound in paired_interval(changes))
            wins = f"{(changes > 0).sum()} of {len(changes)}"
            rows.append((reward, name, Markup(signed(changes.mean().item())), bounds, wins))
    return rows
