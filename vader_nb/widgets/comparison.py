"""Base and adapters on the same prompts and noise: clips in step, rewards, heat maps, blind votes.

comparison = RewardComparison(model, adapters={"hps": "runs/hps"}, rewards=[hps()])   in a notebook
comparison.run(prompt="…")                  the same from Python: scores by contestant and reward
comparison.run_all(); comparison.export()   scores of all prompts and the last clips as an HTML file
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from ipywidgets import HTML, ToggleButton, VBox

from ..checkpoints import write_text
from ..drawing import columns, download_link, note, number
from ..evaluation import BASE
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward
from ..sampling import Sampling
from ..video import Video
from . import comparison_html
from .comparison_data import Comparison
from .comparison_html import score_rows
from .controls import FULL, choice, disable, row, switch
from .jobs import Job
from .panel import Panel
from .player import EMPTY, Player, joined, pictures
from .voting import Pair, Tally, Vote, Votes

GIVEN, HELPS, HURTS = "as given", "helps most first", "hurts most first"
BALLOT = {"A": "A is better", "=": "no difference", "B": "B is better"}
MAX_LINK = 4_000_000  # bytes of an export up to which the panel has a link that holds it


class RewardComparison(Panel):
    """Clips of the base and of each adapter, from the same noise, side by side.

    The first picture waits for two contestants only; `run()` before it is shown makes all.

    Args:
        model, sampling: What makes the clips; default: the model's settings.
        adapters: Name -> file or folder of a run; default: those shipped for the model "tiny".
        rewards: Default: those of the tiny world.
        prompts: A list, a set's name or a file, up to 200; default: six.
        seed: Of the noise.
        folder: Where votes and exports are saved.

    Raises:
        FileNotFoundError: An adapter's file does not exist.
        ValueError: An adapter does not fit, two contestants or rewards have the same name, or
            there are no rewards or prompts.
    """

    title = "Reward comparison"
    hint = (
        "Each prompt from the same noise, with and without adapters. "
        "Choose a prompt; drag “frame” to look closely."
    )

    def __init__(
        self,
        model: VideoModel,
        adapters: Mapping[str, str | Path] | None = None,
        rewards: Sequence[Reward | Callable] | None = None,
        prompts: Sequence[str | Prompt] | None = None,
        seed: int = 0,
        folder: str | Path = "runs/comparison",
        sampling: Sampling | None = None,
    ):
        self.folder, self.votes = Path(folder), Votes(folder)
        self.votes.read()  # raises for a damaged file now, not after the first vote
        self.data = Comparison(model, adapters, rewards, prompts, sampling, seed)
        self.prompts = self.data.prompts
        self.pair: Pair | None = None  # waits for a vote
        self._picture: Video | None = None  # what the player shows
        self._key: tuple | None = None  # what it was made of
        self._images: list[str] = []  # its <img>s
        self._sweeping = False  # whether all prompts are being compared
        super().__init__(
            prompt=choice("prompt", self.prompts),
            reward=choice("reward", [*self.data.rewards], width="250px"),
            heat=switch("gradient heat map", False),
            order=choice("sort prompts", [GIVEN, HELPS, HURTS], width="250px"),
            adapter=choice("by adapter", [*self.data.adapters], width="250px"),
        )
        self.on(self._update, self.prompt, self.reward, self.heat, self.adapter)
        self.on(lambda: self._update(jump=True), self.order)
        self.all_button = self.button(
            "compare all prompts", "play", 170, lambda: self.jobs.submit(self._all, 0)
        )
        self.stop_button = self.button("stop", "stop", 80, self._stop)
        self.tally_button = self.button("show tally", "", 110, self._show_tally)
        self.export_button = self.button("export as HTML", "download", 150, self.export)
        self.blind = ToggleButton(icon="eye-slash", layout={"width": "auto"})
        self.on(self._switch_view, self.blind)
        self.ballot = {}
        for side, label in BALLOT.items():  # a second click can come too late
            self.ballot[side] = self.button(
                label, "", 120, lambda side=side: self.pair and self.vote(side)
            )
        self.player = Player(self.data.sampling.num_frames or 1)
        self.caption, self.counts, self.saved = HTML(), HTML(), HTML()
        sweep = row(self.all_button, self.stop_button, self.order, self.adapter)
        self.open_box = VBox([row(self.reward, self.heat), sweep, self.why], layout=FULL)
        self.ballot_box = row(*self.ballot.values(), self.tally_button)
        clips = [self.prompt, self.player.box, self.caption]
        below = [self.open_box, self.ballot_box, self.counts]
        self.assemble(*clips, *below, row(self.blind, self.export_button, self.saved))
        self.changed()

    def changed(self) -> None:
        """Show what can act now; disable the rest, and say why."""
        alone = unsorted = ""
        if not self.data.adapters:
            alone = "there is no adapter: RewardComparison(model, adapters={'name': 'runs/…'})"
        if missing := self._missing():
            unsorted = f"compare all prompts first, {missing} of {len(self.prompts)} are missing"
        blind = "blind vote: leave it first" if self.blind.value else ""
        finished = "" if missing else "all prompts are compared"
        sweeping = "it is under way" if self._sweeping else ""
        unscored = "" if any(self.data.scores.values()) else "there is nothing to export yet"
        disable(blind, self.prompt, self.reward, self.heat)
        disable(blind or alone, self.adapter)
        disable(blind or alone or unsorted, self.order)
        disable(blind or finished or sweeping, self.all_button)
        disable("" if sweeping else "nothing is under way", self.stop_button)
        disable(blind or unscored, self.export_button)
        disable(alone, self.blind)
        disable("" if self.pair else "the next pair is being made", *self.ballot.values())
        self.why.value = note(alone or unsorted and f"sorting: {unsorted}")
        vote = f"blind vote: base or {self.adapter.value}?"
        self.blind.description = "leave the blind vote" if blind else vote
        for part in (self.prompt, self.open_box):
            part.layout.display = "none" if blind else "flex"
        self.ballot_box.layout.display = "flex" if blind else "none"

    def _missing(self) -> int:
        """The number of prompts without scores of all contestants."""
        return sum(not self.data.is_scored(prompt) for prompt in self.prompts)

    def _missing_heat_maps(self) -> list[str]:
        """Contestants whose heat map is asked for, but not computed."""
        made = self.data.clips.get(self.prompt.value, {}) if self.heat.value else {}
        return [name for name, clip in made.items() if self.reward.value not in clip.heat_maps]

    def _complete(self, prompts: Iterable[str], names: Sequence[str]) -> Job:
        """Score what has no scores; for the chosen prompt, make also clips that were dropped."""
        work = []
        for prompt in prompts:
            chosen = prompt == self.prompt.value
            known = self.data.clips_of(prompt) if chosen else self.data.scores[prompt]
            work += [(prompt, name) for name in names if name not in known]
        for i, (prompt, name) in enumerate(work):
            for fraction in self.data.add(prompt, name):
                yield (i + fraction) / len(work)
            self.changed()
            self.data.clips_of(self.prompt.value)  # used last, so that its clips stay
            if prompt == self.prompt.value:
                self._show()

    def _one(self) -> Job:
        """Make what the controls ask for."""
        yield from self._complete([self.prompt.value], self.data.names)
        for name in self._missing_heat_maps():
            self.data.add_heat_map(self.prompt.value, name, self.reward.value)
            yield 0.95
        self.changed()
        self._show()

    def _all(self) -> Job:
        """Compare on every prompt, the chosen one first."""
        self._sweeping = True
        try:
            self.changed()
            prompts = dict.fromkeys([self.prompt.value, *self.prompts])
            yield from self._complete(prompts, self.data.names)
            yield from self._one()
        finally:  # stopped or done
            self._sweeping = False
            self.changed()

    def _stop(self) -> None:
        self.jobs.give_up()
        total = len(self.prompts)
        done = f"{total - self._missing()} of {total} prompts are compared"
        self.say(f"stopped: {done}; the same button continues")

    def run(self, prompt: str | None = None) -> dict[str, dict[str, float]]:
        """Compare on a prompt now, default: the chosen one.

        Returns:
            Mean scores, contestant -> reward -> score.

        Raises:
            ValueError: The prompt is not among `prompts`.
        """
        self.set(prompt=self.prompt.value if prompt is None else prompt)
        self.jobs.finish(self._one)
        data, shown = self.data, self.prompt.value
        return {n: {r: data.mean(shown, n, r) for r in data.rewards} for n in data.names}

    def run_all(self) -> None:
        """Compare on all prompts now."""
        self.jobs.finish(self._all)

    def _update(self, jump: bool = False) -> None:
        """Show what the controls ask for, after making what is missing. jump: to the first prompt."""
        if self.blind.value:
            return
        self._sort(jump)
        self.changed()
        if self.data.missing_clips(self.prompt.value) or self._missing_heat_maps():
            self.jobs.submit(self._one)
        else:
            self._show()

    def _sort(self, jump: bool) -> None:
        options = [(prompt, prompt) for prompt in self.prompts]
        if self.order.value != GIVEN:
            if missing := self._missing():
                self.set(order=GIVEN)
                raise ValueError(f"sorting: compare all prompts first, {missing} are missing")
            adapter, reward = self.adapter.value, self.reward.value
            change = {p: self.data.difference(p, adapter, reward) for p in self.prompts}
            ranked = sorted(self.prompts, key=change.__getitem__, reverse=self.order.value == HELPS)
            options = [(f"{number(change[prompt], '+')} · {prompt}", prompt) for prompt in ranked]
        chosen = options[0][1] if jump else self.prompt.value
        with self.quiet():
            self.prompt.options = options
            self.prompt.value = chosen

    def _show(self) -> None:
        prompt, reward, data = self.prompt.value, self.reward.value, self.data
        made = data.clips_of(prompt)
        if self.blind.value or not made:
            return
        frames = [made[name].pixels() if name in made else None for name in data.names]
        alt, below = f"{', '.join(data.names)}: {prompt}", ""
        if self.heat.value and not self._missing_heat_maps():
            frames = [comparison_html.heat_overlay(clip, reward) for clip in made.values()]
            alt, below = f"{alt}, heat maps of {reward}", comparison_html.heat_legend(reward)
        if self._key != (alt, *made):  # else another reward of the same clips
            self._draw(frames, alt)
            self._key = (alt, *made)
        rows, pages = score_rows(data, prompt), []
        for frame, image in enumerate(self._images):
            left = columns(data.names, image, rows) + below
            right = comparison_html.curve(data, prompt, reward, frame)
            pages.append(
                f"<div class=vader-side><div style='flex:3 1 320px'>{left}</div>"
                f"<div style='flex:2 1 260px'>{right}</div></div>"
            )
        self.player.show(pages)
        s = data.sampling
        how = f"seed {data.seed} · {s.num_inference_steps} steps · guidance {s.guidance_scale:g}"
        self.caption.value = f"<b>{escape(prompt)}</b> {note(how)}"

    def _draw(self, frames: Sequence, alt: str) -> None:
        """Join clips side by side, playing and frame by frame."""
        self._picture = joined(frames, self.data.model.defaults["fps"], alt)
        self._images = pictures(self._picture, alt)

    def _switch_view(self) -> None:
        """Enter or leave blind mode: nothing of the other view stays on the page or goes on."""
        self.jobs.give_up()
        self.pair = self._picture = self._key = None
        self.player.show([EMPTY for _ in self.player.pages.children])
        self.caption.value = self.saved.value = self.counts.value = ""
        self.changed()
        if self.blind.value:
            self.jobs.submit(self._next_pair, 0)
        else:
            self._show_tally()
            self._update()

    def _next_pair(self) -> Job:
        """Make the next pair. The base is always first: the order would tell which side it is."""
        made = {}
        pair = self.votes.next(self.adapter.value, self.prompts, self.data.seed)
        for name in (BASE, pair.adapter):
            made[name] = yield from self.data.sample(name, pair.prompt, pair.seed)
        frames = [made[name].float().cpu() for name in pair.sides]
        self._draw(frames, f"A and B: {pair.prompt}")
        self.player.show([columns("AB", image) for image in self._images])
        self.caption.value = f"<b>{escape(pair.prompt)}</b> {note('which clip is better?')}"
        self.pair = pair
        self.changed()

    def vote(self, choice: str) -> Vote:
        """Vote "A", "B" or "=", no difference, on the pair that is shown; then make the next pair.

        Raises:
            ValueError: Another choice, or there is no pair.
        """
        if self.pair is None:
            raise ValueError("no pair waits for a vote; comparison.blind.value = True shows one")
        vote = self.votes.add(self.pair, choice)
        self.pair, self.counts.value = None, ""
        self.changed()
        self.jobs.submit(self._next_pair, 0)
        return vote

    def tally(self) -> Tally:
        """Count the votes on the chosen adapter, with those of earlier panels on this folder."""
        return self.votes.tally(self.adapter.value)

    def _show_tally(self) -> None:
        self.counts.value = f"<div>{escape(str(self.tally()))}</div>"

    def export(self, path: str | Path | None = None) -> Path:
        """Write one HTML file: scores of all compared prompts, clips of the last 24 used, votes.

        Its default path is `comparison.html` in the folder.

        Raises:
            ValueError: Nothing is compared yet.
        """
        path = Path(path or self.folder / "comparison.html")
        page = comparison_html.export(self.data, map(self.votes.tally, self.data.adapters))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
        link = download_link(path) if path.stat().st_size < MAX_LINK else ""
        self.saved.value = f"{note(f'exported to {path}')}{link}"
        return path

    def prepare(self) -> None:
        prompt, names = self.prompt.value, self.data.names
        if not self.blind.value and self.data.missing_clips(prompt):
            self.jobs.finish(lambda: self._complete([prompt], names[:2]))
            self.jobs.submit(self._one)

    def to_html(self) -> str:
        if self._picture is None:
            return "<p>nothing is compared yet</p>"
        names, rows = self.data.names, score_rows(self.data, self.prompt.value)
        if self.blind.value:
            names, rows = "AB", []
        return columns(names, self._picture.to_html(256 * len(names)), rows)
