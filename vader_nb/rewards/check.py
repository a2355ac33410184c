"""Is this function fit to be a reward? `check(reward)` finds out before a training run does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .base import Reward, as_reward


@dataclass
class Finding:
    test: str
    passed: bool
    detail: str


@dataclass
class Report:
    """What `check` found; prints as a table. `passed`: fit for training."""

    name: str
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def __str__(self) -> str:
        width = max(len(finding.test) for finding in self.findings)
        lines = [
            f"{'ok  ' if f.passed else 'FAIL'} {f.test:<{width}}  {f.detail}" for f in self.findings
        ]
        return "\n".join(
            [
                f"check of reward {self.name!r}: {'fit' if self.passed else 'NOT FIT'} for training",
                *lines,
            ]
        )

    __repr__ = __str__


def check(
    reward: Reward | Callable,
    frames: torch.Tensor | None = None,
    prompts: list[str] | None = None,
    seed: int = 0,
) -> Report:
    """Try a reward on frames (B, F, 3, H, W) in [0, 1], B >= 2: default two clips of the tiny world.

    Tests: one finite score a clip; a gradient; the gradient agrees with finite differences along its own
    direction; a batch scores as its clips do one by one; a picture that is not square; and how many pixels
    get no gradient (a reward that clamps, thresholds or crops leaves many without).
    """
    reward = as_reward(reward)
    generator = torch.Generator().manual_seed(seed)
    if frames is None:
        from ..zoo import world

        specs = [
            world.Spec("red", "star", "moving left", "gray"),
            world.Spec("blue", "circle", "growing", "sand"),
        ]
        frames, prompts = world.render(specs, generator), [spec.caption for spec in specs]
    if prompts is None or len(prompts) != len(frames):
        raise ValueError(f"{len(frames)} clips need as many prompts, got {len(prompts or [])}")
    # Away from 0 and 1, so that a reward's own clamping shows, and ours does not.
    frames = (frames + 0.02 * torch.randn(frames.shape, generator=generator)).clamp(0.02, 0.98)
    findings = []

    def add(test, passed, detail):
        findings.append(Finding(test, bool(passed), detail))
        return passed

    def report():
        return Report(reward.name, findings)

    leaf = frames.clone().requires_grad_()
    try:
        value = reward(leaf, prompts)
    except Exception as error:  # whatever the user's function raises is the finding
        add("runs", False, f"{type(error).__name__}: {error}")
        return report()
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    if not add(
        "one score a clip", shape == (len(frames),), f"returned {shape}, expected ({len(frames)},)"
    ):
        return report()
    add("finite", value.isfinite().all(), ", ".join(f"{v:.4g}" for v in value.tolist()))
    if not add(
        "differentiable",
        value.requires_grad,
        "has a graph"
        if value.requires_grad
        else "left the graph: no_grad, uint8, PIL, numpy or argmax",
    ):
        return report()
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    gradient = torch.zeros_like(frames) if gradient is None else gradient
    if not add("gradient finite", gradient.isfinite().all(), f"norm {gradient.norm():.3g}"):
        return report()
    silent = (gradient == 0).all(dim=2).float().mean().item()
    add("gradient reaches pixels", silent < 0.9, f"{silent:.0%} of pixels get none")

    with torch.no_grad():
        direction = gradient / gradient.norm().clamp(min=1e-20)
        # As small as float32 allows: a network is straight only over a short way. No pixel moves by over 0.01.
        small = 2e-3 * max(value.abs().sum().item(), 1e-2) / gradient.norm().clamp(min=1e-20)
        size = min(small.item(), 0.01 / direction.abs().max().clamp(min=1e-20).item())
        ahead, behind = (
            reward(frames + size * direction, prompts),
            reward(frames - size * direction, prompts),
        )
        measured, promised = ((ahead - behind).sum() / (2 * size)).item(), gradient.norm().item()
        gap = abs(measured - promised) / max(abs(promised), 1e-12)
        add(
            "matches finite differences",
            gap < 0.2,
            f"slope {measured:.3g} measured, {promised:.3g} by the gradient",
        )
        alone = torch.cat(
            [reward(frames[i : i + 1], prompts[i : i + 1]) for i in range(len(frames))]
        )
        spread = (alone - value).abs().max().item()
        add(
            "batch equals one by one",
            spread <= 1e-4 * max(1.0, value.abs().max().item()),
            f"largest difference {spread:.2g}",
        )
        try:
            wide = reward(
                torch.nn.functional.interpolate(frames.flatten(0, 1), (48, 80)).unflatten(
                    0, frames.shape[:2]
                ),
                prompts,
            )
            add(
                "takes 48 x 80 pixels",
                wide.shape == value.shape and wide.isfinite().all(),
                "scored",
            )
        except Exception as error:
            add("takes 48 x 80 pixels", False, f"{type(error).__name__}: {error}")
    return report()
