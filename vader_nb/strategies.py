"""Which denoising steps learn, and which frames are scored: the choices that define a reward-gradient method.

The published methods differ in five fields of a `Plan`. Steps are counted from the end wherever a user
names them: step 1 is the last one, the one whose output is the video.
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Plan:
    """One iteration's choice, drawn by a strategy.

    Attributes:
        active: steps, counted from the end, whose adapter gradient is kept.
        linear: the path from step to step is F(sg(x)) instead of F(x): DRTune's stop-gradient.
        stop: stop before this many last steps and score the clean video predicted there.
        renoise: DRaFT-LV: this many fresh noisings of the final latents instead of one replay. With `stop`,
            Direct-Align: noised to the level of that step, and the known noise removed from the prediction.
        leap: LeapAlign: the path leads from one active step straight to the next, and from the last to the
            video; a call passes on this fraction of the gradient on its input.
    """

    active: frozenset[int]
    linear: bool = False
    stop: int = 0
    renoise: int = 0
    leap: float | None = None

    @property
    def rollout(self) -> dict[str, int]:
        """How many last steps the roll-out notes, and how many it leaves out: arguments of `roll_out`."""
        window = max(self.active)
        return {"window": 1, "stop": 0} if self.renoise else {"window": window, "stop": self.stop}

    @property
    def passes(self) -> float:
        """The fraction of the gradient on a denoiser call's input that is passed on to earlier steps."""
        return 0.0 if self.linear else 1.0 if self.leap is None else self.leap


class Strategy(Protocol):
    """Draws a `Plan` for a chain of `steps` denoising steps."""

    def plan(self, steps: int, generator: torch.Generator | None) -> Plan: ...


@dataclass(frozen=True)
class Last:
    """DRaFT-K (arXiv 2309.17400): the last K steps learn. VADER's setting is K = 1."""

    K: int = 1

    def plan(self, steps: int, generator: torch.Generator | None) -> Plan:
        return Plan(frozenset(range(1, _within(self.K, steps, "K") + 1)))


@dataclass(frozen=True)
class Random:
    """AlignProp (arXiv 2310.03739): the last K steps, with K drawn from 1 to `max_K` each time.

    `max_K=None` draws up to all steps.
    """

    max_K: int | None = None

    def plan(self, steps: int, generator: torch.Generator | None) -> Plan:
        max_K = steps if self.max_K is None else _within(self.max_K, steps, "max_K")
        K = int(torch.randint(1, max_K + 1, (), generator=generator))
        return Plan(frozenset(range(1, K + 1)))


@dataclass(frozen=True)
class Step:
    """Only step i learns; the gradient reaches it through all later steps."""

    i: int

    def plan(self, steps: int, generator: torch.Generator | None) -> Plan:
        return Plan(frozenset([_within(self.i, steps, "i")]))


@dataclass(frozen=True)
class DRaFTLV:
    """DRaFT-LV (arXiv 2309.17400): K = 1 at a lower variance.

    The final latents are noised n times to the last step's level and denoised once each; the gradients
    are averaged. The roll-out's own last step, from which `Last(1)` learns, is not among them.
    """

    n: int = 2

    def plan(self, steps: int, generator: torch.Generator | None) -> Plan:
        if self.n < 1:
            raise ValueError(f"DRaFT-LV needs n >= 1 noisings, got n={self.n}")
        return Plan(frozenset([1]), renoise=self.n)


@dataclass(frozen=True)
class ReFL:
    """ReFL (arXiv 2304.05977): stop at a random late step and score the clean video predicted there.

    `fraction` is the part of the chain to draw from. The paper draws among the last 10 of 40 steps.
    """

    fraction: float = 0.25

    def plan(self, steps: int, generator: torch.Generator | None) -> Plan:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"ReFL's fraction must lie in (0, 1], got {self.fraction}")
        late_steps = max(1, round(self.fraction * steps))
        i = int(torch.randint(1, late_steps + 1, (), generator=generator))
        return Plan(frozenset([i]), stop=i - 1)


@dataclass(frozen=True)
class DRTune:
    """DRTune (arXiv 2405.00760): K steps evenly spread over the chain, from a random offset.

    The gradient skips from step to step without passing through the denoiser, so it reaches early
    steps without exploding. With `stop` > 0 the chain ends at a random one of the last `stop` + 1
    steps, on the clean video predicted there.
    """

    K: int = 1
    stop: int = 0

    def plan(self, steps: int, generator: torch.Generator | None) -> Plan:
        if not 0 <= self.stop < steps:
            raise ValueError(
                f"DRTune's stop must lie in 0..{steps - 1} for {steps} steps, got {self.stop}"
            )
        stop = int(torch.randint(self.stop + 1, (), generator=generator))
        spacing = (steps - stop) // _within(self.K, steps - stop, "K")
        offset = int(torch.randint(1, spacing + 1, (), generator=generator))
        active = frozenset(stop + offset + spacing * k for k in range(self.K))
        return Plan(active, linear=True, stop=stop)


@dataclass(frozen=True)
class DirectAlign:
    """Direct-Align (arXiv 2509.06942, the estimator of SRPO): `DRaFTLV` at any step.

    The final latents are noised to the level of a random step, among the last `fraction` of all, and that step is
    taken with a graph. Since the noise is known, what is left of it can be removed: the reward sees clean
    latents changed by this one step, where `ReFL` shows it a blur. Averaged over n noisings.
    """

    n: int = 1
    fraction: float = 1.0

    def plan(self, steps: int, generator: torch.Generator | None) -> Plan:
        late = ReFL(self.fraction).plan(steps, generator)
        return replace(DRaFTLV(self.n).plan(steps, generator), active=late.active, stop=late.stop)


@dataclass(frozen=True)
class LeapAlign:
    """LeapAlign (arXiv 2604.15311): two random steps learn, whatever the length of the chain.

    The gradient goes from the video to the later step in one leap, as if there were no steps between, and from
    there to the earlier one; both steps' latents are those of the roll-out. What passes through the later
    denoiser call is multiplied by `discount`, against exploding gradients: 0 is DRTune's stop-gradient. (The
    paper also gives more weight to pairs whose leaps end near the roll-out's latents, which is not done here.)
    """

    discount: float = 0.5

    def plan(self, steps: int, generator: torch.Generator | None) -> Plan:
        if not 0 <= self.discount <= 1:
            raise ValueError(f"LeapAlign's discount must lie in 0..1, got {self.discount}")
        if steps < 2:
            raise ValueError(f"LeapAlign needs at least 2 steps, the sampler takes {steps}")
        drawn = torch.randperm(steps, generator=generator)[:2] + 1
        return Plan(frozenset(drawn.tolist()), leap=float(self.discount))


STRATEGIES = {
    "Last": Last,
    "Random": Random,
    "Step": Step,
    "DRaFTLV": DRaFTLV,
    "ReFL": ReFL,
    "DRTune": DRTune,
    "DirectAlign": DirectAlign,
    "LeapAlign": LeapAlign,
}


def _within(value: int, steps: int, name: str) -> int:
    if not 1 <= value <= steps:
        raise ValueError(f"{name}={value} must lie in 1..{steps}: the sampler takes {steps} steps")
    return value


def parse_strategy(text: "str | Strategy") -> Strategy:
    """Read a strategy from text, as it is written in Python: `Last(2)`, `DRTune(2, stop=3)`, `ReFL`.

    Args:
        text: a constructor call with literal arguments, or a bare name for the defaults; upper or lower
            case. A strategy is returned as it is.

    Raises:
        ValueError: for an unknown name or arguments that the strategy does not take.
    """
    examples = "Last(1), Random(), Step(3), DRaFTLV(2), ReFL(0.25), DRTune(2, stop=3), DirectAlign, LeapAlign"
    return parse_call(text, STRATEGIES, "strategy", examples) if isinstance(text, str) else text


def parse_call(text: str, kinds: Mapping[str, Callable], what: str, examples: str) -> Any:
    """What a constructor call with literal arguments makes, or a bare name; upper or lower case.

    Raises:
        ValueError: for an unknown name or arguments that it does not take.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        known = {key.lower(): kind for key, kind in kinds.items()}
        args = [ast.literal_eval(arg) for arg in getattr(node, "args", [])]
        options = {k.arg: ast.literal_eval(k.value) for k in getattr(node, "keywords", [])}
        return known[name.lower().replace("_", "")](*args, **options)
    except (SyntaxError, AttributeError, KeyError, ValueError, TypeError) as error:
        detail = f" ({error})" if isinstance(error, TypeError) else ""
        raise ValueError(f"cannot read {what} {text!r}{detail}; write one of {examples}") from None


@dataclass(frozen=True)
class Frames:
    """Which frames of a clip the reward sees. Use the constructors: `Frames.random(1)`, `.all()`, …

    `str(frames)` is the text that the shell and configuration files use: `random:1`, `ends`, `every:2`,
    `all`, or indices such as `0,4,-1`.
    """

    kind: str = "random"
    count: int = 1
    indices: tuple[int, ...] = ()

    @classmethod
    def random(cls, k: int = 1) -> "Frames":
        """k different frames, drawn anew for each batch, except those given by an image. VADER takes 1."""
        return cls("random", k)

    @classmethod
    def ends(cls) -> "Frames":
        """The first, the middle and the last frame."""
        return cls("ends")

    @classmethod
    def every(cls, n: int) -> "Frames":
        """Every n-th frame, from the first."""
        return cls("every", n)

    @classmethod
    def all(cls) -> "Frames":
        """All frames."""
        return cls("all")

    @classmethod
    def at(cls, *indices: int) -> "Frames":
        """The frames with these indices; negative ones count from the end."""
        return cls("at", indices=indices)

    def __str__(self) -> str:
        if self.kind == "at":
            return ",".join(map(str, self.indices))
        return f"{self.kind}:{self.count}" if self.kind in ("random", "every") else self.kind

    def choose(
        self, num_frames: int, generator: torch.Generator | None, given: int = 0
    ) -> list[int]:
        """Indices of the chosen frames, ascending.

        Args:
            num_frames: of the clip.
            generator: draws random ones.
            given: how many first frames are the prompts' images (`VideoModel.given_frames`), which are not drawn.

        Raises:
            ValueError: if the clip is too short, or nothing can be learned from the frames: all of them are given.
        """
        if self.kind == "random":
            free = num_frames - given
            if not 1 <= self.count <= free:
                image = f", of which the image gives {given}" if given else ""
                raise ValueError(
                    f"cannot choose {self.count} random frames: the clip has {num_frames}{image}; "
                    f"choose 1..{free}"
                )
            drawn = torch.randperm(free, generator=generator)[: self.count]
            return sorted((drawn + given).tolist())
        chosen = self.named(num_frames)
        if max(chosen) < given:
            raise ValueError(
                f"frames={self}: these come from the prompts' images, which training cannot change; choose later ones"
            )
        return chosen

    def named(self, num_frames: int) -> list[int]:
        """As `choose`, for all but random ones."""
        if self.kind == "ends":
            return sorted({0, num_frames // 2, num_frames - 1})
        if self.kind == "every":
            if self.count < 1:
                raise ValueError(f"every n-th frame needs n >= 1, got {self.count}")
            return list(range(0, num_frames, self.count))
        if self.kind == "all":
            return list(range(num_frames))
        if self.kind != "at":
            raise ValueError(
                f"unknown frame choice {self.kind!r}; use Frames.random(1), .ends(), …"
            )
        if not self.indices:
            raise ValueError(
                "an empty list of frames leaves nothing to score; name at least one index"
            )
        outside = [i for i in self.indices if not -num_frames <= i < num_frames]
        if outside:
            raise ValueError(
                f"frame index {outside[0]} is out of range: the clip has {num_frames} frames"
            )
        return sorted({i % num_frames for i in self.indices})


def parse_frames(text: "str | Frames") -> Frames:
    """Read a choice of frames from its text form; a `Frames` is returned as it is.

    Raises:
        ValueError: for text of another form.
    """
    if isinstance(text, Frames):
        return text
    text = str(text)
    kind, colon, number = text.partition(":")
    try:
        if kind in ("random", "every") and number:
            return Frames(kind, int(number))
        if text in ("random", "ends", "all"):
            return Frames(text)
        return Frames.at(*(int(part) for part in text.strip("[]").split(",") if part.strip()))
    except ValueError:
        raise ValueError(
            f"cannot read frames {text!r}; write random:2, ends, every:3, all, or indices like 0,4,7"
        ) from None
