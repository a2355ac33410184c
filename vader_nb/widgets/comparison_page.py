"""A comparison as one HTML file that needs no other."""

import html
import json
from collections.abc import Sequence

import torch

from .. import report
from ..evaluate import FEWEST, interval
from .contest import Contest
from .side_by_side import number, signed, table
from .voting import Tally

# Added to the report's: on a phone a table scrolls, it does not break names into letters.
STYLE = "section { margin: 1.5rem 0 } .text { overflow-wrap: break-word; min-width: 4.5rem } th:first-child { text-align: left }"


def document(contest: Contest, prompts: Sequence[str], tallies: Sequence[Tally]) -> str:
    """The page of all prompts that are compared: means, clips side by side with their scores, votes, settings. Every text
    that a user wrote is escaped. Raises ValueError without such a prompt."""
    compared = [prompt for prompt in prompts if contest.scored(prompt)]
    if not compared:
        raise ValueError("there is nothing to export yet: comparison.run() or run_all() first")
    title = (
        f"{' against '.join([contest.names[0], ', '.join(contest.adapters)])}"
        if contest.adapters
        else "Base"
    )
    count = f"{len(compared)} of {len(prompts)} prompts. Side by side: the same prompt, the same noise; they play in step."
    body = [f"<h1>{html.escape(title)}</h1><p>{count} In brackets: the difference to the base.</p>"]
    if contest.adapters:
        body.append(f"<h2>Differences to the base</h2>{means(contest, compared)}")
    body.append("<h2>Prompts</h2>")
    body += [section(contest, prompt) for prompt in compared]
    votes = [f"<li>{html.escape(str(tally))}.</li>" for tally in tallies if tally.votes]
    body.append(f"<h2>Blind votes</h2><ul>{''.join(votes)}</ul>" if votes else "")
    body.append(
        f"<h2>Settings</h2><pre>{html.escape(json.dumps(settings(contest), indent=2, ensure_ascii=False))}</pre>"
    )
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>vader_nb comparison</title>"
    style = f"<style>{report.STYLE}{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}{style}</head><body>{''.join(body)}</body></html>\n"


def section(contest: Contest, prompt: str) -> str:
    """Clips and scores of a prompt."""
    shelf = contest.shelf(prompt)
    if len(shelf) == len(contest.names):
        frames = [shelf[name].pixels() for name in contest.names]
        clips = report.figure(prompt, frames, contest.names, contest.model.defaults["fps"])
    else:
        clips = f"<p>{html.escape(prompt)}</p><p class=note>Its clips were not kept: too many prompts came after it.</p>"
    scores = f"<div class=scroll>{table(contest, prompt, 'up', 'down')}</div>"
    return f"<section style='max-width:{256 * len(contest.names)}px'>{clips}{scores}</section>"


def means(contest: Contest, prompts: Sequence[str]) -> str:
    """Mean differences over prompts, and on how many an adapter is higher."""
    lines = [
        "<tr><th class=text>reward<th class=text>adapter<th>mean difference<th>95 % interval<th>higher on"
    ]
    for reward in contest.rewards:
        for name in contest.adapters:
            changes = torch.tensor([contest.difference(prompt, name, reward) for prompt in prompts])
            known = len(changes) >= FEWEST
            bounds = (
                " to ".join(number(bound, "+") for bound in interval(changes))
                if known
                else f"from {FEWEST} prompts on"
            )
            cells = f"<td>{signed(changes.mean().item(), 'up', 'down')}<td>{bounds}<td>{(changes > 0).sum()} of {len(changes)}"
            lines.append(
                f"<tr><td class=text>{html.escape(reward)}<td class=text>{html.escape(name)}{cells}"
            )
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def settings(contest: Contest) -> dict:
    sampling = {key: value for key, value in vars(contest.sampling).items() if value is not None}
    files = {name: str(path) for name, path in contest.adapters.items()}
    return (
        {"model": contest.model.name, "adapters": files, "seed": contest.seed}
        | sampling
        | report.versions()
    )
