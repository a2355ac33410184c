"""Whatever makes clips on the same prompts and noise: clips in step, rewards, heat maps, blind votes.

comparison = RewardComparison(model, {"hps": "runs/hps", "best of 4": BestOf(4, hps())})   in a notebook
comparison.run(prompt="…")                  the same from Python: scores by contestant and reward
comparison.run(view="scales of hps")        an adapter weaker and stronger, on several prompts
comparison.run_all(); comparison.export()   scores of all prompts and the last clips as an HTML file
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ipywidgets import SelectionSlider, VBox

from ..checkpoints import write_text
from ..comparison import STEPS, Clip, Comparison, View
from ..comparison_html import along, curve, export, heat_legend, heat_overlay, sections
from ..drawing import columns, download_link, note, number
from ..evaluation import BASE
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward
from ..sampling import Sampling
from ..stepwise import Job
from ..video import Video
from .ballot import BlindVote
from .controls import FULL, LINE, choice, disable, row, switch
from .player import Player

GIVEN, HELPS, HURTS = "as given", "helps most first", "hurts most first"
MAX_LINK = 4_000_000  # bytes of an export up to which the panel has a link that holds it
NARROW = {"width": "290px"}


class RewardComparison(BlindVote):
    """Clips of the base and of each contestant, from the same noise, side by side.

    The first picture waits for two contestants only; `run()` before it is shown makes all.

    Args:
        model, sampling: What makes the clips; default: the model's settings.
        contestants: By name: a file or folder of an adapter, several by weight ({path: weight}), a run,
            or what `evaluate` takes in their place, with `sample(model, prompts, *, seeds, sampling,
            adapter)`, such as `BestOf` or `RewardGuidance`. Default: the adapters shipped for the
            model "tiny". The checkpoints in a run's folder can be seen along a slider.
        rewards: Default: those of the tiny world.
        prompts: A list, a set's name or a file, up to 200; default: six.
        seed: Of the noise.
        folder: Where votes and exports are saved. All vote files in it count.
        voter: The name to vote under, if several people vote.

    Raises:
        FileNotFoundError: An adapter's file does not exist.
        ValueError: An adapter does not fit, two contestants or rewards have the same name, there are
            no rewards or prompts, or a file of votes is damaged.
    """

    title = "Reward comparison"
    hint = (
        "All contestants start from the same noise. Choose a prompt and what to show; "
        "drag “frame” to look closely."
    )

    def __init__(
        self,
        model: VideoModel,
        contestants: Any = None,
        rewards: Sequence[Reward | Callable] | None = None,
        prompts: Sequence[str | Prompt] | None = None,
        seed: int = 0,
        folder: str | Path = "runs/comparison",
        sampling: Sampling | None = None,
        voter: str = "",
    ):
        self.data = data = Comparison(model, contestants, rewards, prompts, sampling, seed)
        self.prompts, everyone = data.prompts, [*data.contestants]
        self._drawn: dict[str, tuple[Any, Any]] = {}  # by prompt: what was drawn, and of what
        self._sweeping = False  # whether all prompts are being compared
        steps = data.views[STEPS].steps if STEPS in data.views else [0]
        super().__init__(
            folder,
            voter,
            prompt=choice("prompt", {prompt: prompt for prompt in self.prompts}),
            view=choice("show", [*data.views], **NARROW),
            step=SelectionSlider(options=steps, value=steps[-1], description="step", **LINE),
            reward=choice("reward", [*data.rewards], **NARROW),
            heat=switch("gradient heat map", False),
            one=choice("compare", everyone, everyone[:2][-1], **NARROW),
            other=choice("with", everyone, BASE, **NARROW),
            order=choice("sort prompts", [GIVEN, HELPS, HURTS], **NARROW),
        )
        seen = ("prompt", "view", "step", "reward", "heat", "one", "other")
        self.on(self.update, *(self.settings[name] for name in seen))
        self.on(lambda: self.update(jump=True), self.order)
        self.all_button = self.button("compare all prompts", "play", 170, self._all)
        self.stop_button = self.button("stop", "stop", 80, self._stop)
        self.export_button = self.button("export as HTML", "download", 150, self.export)
        self.player = Player(data.sampling.total_frames)
        pair = row(self.one, self.other, self.order)
        sweep = row(self.all_button, self.stop_button, self.why)
        self.open_box = VBox([row(self.reward, self.heat), pair, sweep], layout=FULL)
        clips = self.prompt, self.view, self.player.box, self.step, self.caption
        below = self.open_box, self.ballot_box, self.counts
        self.assemble(*clips, *below, row(self.blind, self.export_button, self.saved))
        self.changed()

    @property
    def _view(self) -> View:
        return self.data.views[self.view.value]

    def _seen(self) -> tuple[list[str], list[str]]:
        """The prompts and the contestants that are in sight."""
        listed = [prompt for _, prompt in self.prompt.options]
        first = listed.index(self.prompt.value)
        rows = (listed[first:] + listed[:first])[: self._view.prompts]
        return rows, self._view.shown(self.step.value)

    def _compared(self) -> list[str]:
        """Whom “compare all prompts” compares: those of the view, and the pair that sorts."""
        return [*dict.fromkeys([*self._view.names, self.one.value, self.other.value])]

    def changed(self) -> None:
        """Show what can act now; disable the rest, and say why."""
        super().changed()
        one, other, data = self.one.value, self.other.value, self.data
        alone = unsorted = ""
        if len(data.contestants) == 1:
            alone = "there is only the base: RewardComparison(model, {'name': 'runs/…'})"
        same = alone or ("choose two that differ" if one == other else "")
        if missing := data.lacks([one, other]):
            total = len(self.prompts)
            unsorted = f"compare all prompts first, {len(missing)} of {total} are missing"
        blind = "blind vote: leave it first" if self.blind.value else ""
        finished = "" if data.lacks(self._compared()) else "all prompts are compared"
        sweeping = "it is under way" if self._sweeping else ""
        whole = any(len(data.lacks(v.names)) < len(data.prompts) for v in data.views.values())
        unscored = "" if whole else "there is nothing to export yet"
        disable(blind, self.prompt, self.view, self.step, self.reward, self.heat)
        disable(blind or alone, self.one, self.other)
        disable(blind or same or unsorted or sweeping, self.order)  # it would end the sweep
        disable(blind or finished or sweeping, self.all_button)
        disable("" if sweeping else "nothing is under way", self.stop_button)
        disable(blind or unscored, self.export_button)
        disable("" if blind else same, self.blind)
        self.why.value = note(same or unsorted and f"sorting: {unsorted}")
        for part in (self.prompt, self.view, self.open_box):
            part.layout.display = "none" if blind else "flex"
        self.step.layout.display = "flex" if self._view.steps and not blind else "none"

    def _lacks_heat_maps(self) -> list[tuple[str, str]]:
        """Prompts and contestants whose heat map is asked for, but not computed."""
        rows, seen = self._seen()
        made = {(p, n): clip for p in rows for n, clip in self.data.clips_of(p, seen).items()}
        lacking = [key for key, clip in made.items() if self.reward.value not in clip.heat_maps]
        return lacking if self.heat.value else []

    def _make(self, work: Sequence[tuple[str, str]]) -> Job:
        """Sample and score clips by prompt and contestant."""
        for i, (prompt, name) in enumerate(work):
            for fraction in self.data.add(prompt, name):
                yield (i + fraction) / len(work)
            self.changed()
            self._show()

    def _one(self) -> Job:
        """Make what the controls ask for; then the rest of the steps."""
        rows, seen = self._seen()
        yield from self._make(self.data.to_do(rows, seen, keep=True))
        for prompt, name in self._lacks_heat_maps():
            self.data.add_heat_map(prompt, name, self.reward.value)
            yield 0.95
        self.changed()
        self._show()
        yield from self._make(self.data.to_do(rows, self._view.names))

    def _all(self) -> Job:
        """Compare on every prompt, what is in sight first."""
        self._sweeping = True
        try:
            self.changed()
            yield from self._one()
            yield from self._make(self.data.to_do(self.prompts, self._compared()))
        finally:  # stopped or done
            self._sweeping = False
            self.changed()

    def _stop(self) -> None:
        self.jobs.give_up()
        total = len(self.prompts)
        done = total - len(self.data.lacks(self._compared()))
        self.say(
            f"stopped: {done} of {total} prompts are compared; “compare all prompts” continues"
        )

    def run(self, prompt: str | None = None, **settings) -> dict[str, dict[str, float]]:
        """Compare on a prompt now, default: the chosen one; other settings by name, as for `set`.

        Returns:
            Mean scores, contestant -> reward -> score.

        Raises:
            ValueError: The prompt is not among `prompts`, or a setting is unknown or not offered.
        """
        self.set(prompt=self.prompt.value if prompt is None else prompt, **settings)
        self.jobs.finish(self._one)
        data, shown = self.data, self.prompt.value
        return {n: {r: data.mean(shown, n, r) for r in data.rewards} for n in self._view.names}

    def run_all(self) -> None:
        """Compare on all prompts now."""
        self.jobs.finish(self._all)

    def update(self, jump: bool = False) -> None:
        """Show what the controls ask for, and make what is missing. jump: to the first prompt."""
        if self.blind.value:
            return
        self._sort(jump)
        self.changed()
        self._show()
        rows, seen = self._seen()
        lacking = self.data.to_do(rows, seen, keep=True) or self._lacks_heat_maps()
        if lacking or self.data.to_do(rows, self._view.names):
            self.jobs.submit(self._one)

    def _sort(self, jump: bool) -> None:
        labels = {prompt: prompt for prompt in self.prompts}
        if self.order.value != GIVEN:
            one, other, data = self.one.value, self.other.value, self.data
            if missing := data.lacks([one, other]):
                self.set(order=GIVEN)
                raise ValueError(f"sorting: compare all prompts first, {len(missing)} are missing")
            change = {p: data.difference(p, one, self.reward.value, other) for p in labels}
            ranked = sorted(labels, key=change.__getitem__, reverse=self.order.value == HELPS)
            labels = {prompt: f"{number(change[prompt], '+')} · {prompt}" for prompt in ranked}
        chosen = next(iter(labels)) if jump else self.prompt.value
        with self.quiet():
            self.prompt.options = [(label, prompt) for prompt, label in labels.items()]
            self.prompt.value = chosen

    def _show(self) -> None:
        """Show the clips of the current view that exist."""
        drawn = self._draw()
        if self.blind.value or not drawn:
            return
        data, view, reward, (_, names) = self.data, self._view, self.reward.value, self._seen()
        below, pages = heat_legend(reward) if self.heat.value else "", []
        for frame in range(len([*drawn.values()][0][1])):
            left = self._sections({prompt: images[frame] for prompt, (_, images) in drawn.items()})
            if view.axis:
                right = along(data, view, [*drawn], reward, self.step.value if view.steps else None)
            else:
                right = curve(data, names, self.prompt.value, reward, frame)
            pages.append(
                f"<div class=vader-side><div style='flex:3 1 320px'>{left}{below}</div>"
                f"<div style='flex:2 1 260px'>{right}</div></div>"
            )
        self.player.show(pages)
        s = data.sampling
        how = f"seed {data.seed} · {s.num_inference_steps} steps · guidance {s.guidance_scale:g}"
        self.caption.value = note(how)

    def _sections(self, elements: dict[str, str]) -> str:
        """Pictures by prompt with the scores; in a grid those of the chosen reward alone."""
        rewards = [self.reward.value] if self._view.prompts > 1 else [*self.data.rewards]
        return sections(self.data, elements, self._seen()[1], rewards)

    def _draw(self) -> dict[str, tuple[Video, list[str]]]:
        """The current view, by prompt: the clips that exist, side by side."""
        (rows, names), reward, drawn = self._seen(), self.reward.value, {}
        for prompt in rows:
            if not (made := self.data.clips_of(prompt, names)):
                continue
            look, alt = Clip.pixels, f"{', '.join(names)}: {prompt}"
            if self.heat.value and all(reward in clip.heat_maps for clip in made.values()):
                look, alt = partial(heat_overlay, reward=reward), f"{alt}, heat maps of {reward}"
            drawn[prompt] = self._drawn.get(prompt, ("", ()))
            if drawn[prompt][0] != (key := (alt, *made)):  # else another reward of the same clips
                frames = [look(made[name]) if name in made else None for name in names]
                drawn[prompt] = key, self.draw(frames, alt)
        self._drawn = drawn
        return {prompt: picture for prompt, (_, picture) in drawn.items()}

    def export(self, path: str | Path | None = None) -> Path:
        """Write one HTML file: scores of all that was compared, the clips that are kept, votes.

        Its default path is `comparison.html` in the folder.

        Raises:
            ValueError: Nothing has been compared yet.
        """
        path = Path(path or self.folder / "comparison.html")
        page = export(self.data, self.votes.read())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
        link = download_link(path) if path.stat().st_size < MAX_LINK else ""
        self.saved.value = f"{note(f'exported to {path}')}{link}"
        return path

    def prepare(self) -> None:
        rows, seen = self._seen()
        if not self.blind.value and (work := self.data.to_do(rows, seen, keep=True)):
            self.jobs.finish(lambda: self._make(work[:2]))  # two contestants, for a first picture
            self.jobs.submit(self._one)

    def to_html(self) -> str:
        if self.blind.value:
            return columns("AB", self.video.to_html(512)) if self.pair else note("no pair yet")
        width = 256 * len(self._seen()[1])
        drawn = {prompt: video.to_html(width) for prompt, (video, _) in self._draw().items()}
        return self._sections(drawn) or "<p>nothing has been compared yet</p>"
