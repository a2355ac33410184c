"""`check(reward)`: is a function fit to be a reward? To find out before a training run does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .base import Reward, as_reward


@dataclass
class Finding:
    test: str
    passed: bool
    detail: str


@dataclass
class Report:
    """What `check` found; prints as a table. `passed`: fit for its use."""

    name: str
    findings: list[Finding]
    use: str = "training"  # or evaluation, for a reward that has no gradient and says so

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def __str__(self) -> str:
        width = max(len(finding.test) for finding in self.findings)
        verdict = "fit" if self.passed else "NOT FIT"
        lines = [f"check of reward {self.name!r}: {verdict} for {self.use}"]
        for finding in self.findings:
            mark = "ok  " if finding.passed else "FAIL"
            lines.append(f"{mark} {finding.test:<{width}}  {finding.detail}")
        return "\n".join(lines)

    __repr__ = __str__

    def add(self, test: str, passed: bool | torch.Tensor, detail: str) -> bool:
        self.findings.append(Finding(test, bool(passed), detail))
        return bool(passed)


def check(
    reward: Reward | Callable,
    frames: torch.Tensor | None = None,
    prompts: list[str] | None = None,
    seed: int = 0,
) -> Report:
    """Tries a reward on clips.

    Tests: one finite score per clip; a gradient, unless the reward says that it has none; the
    gradient agrees with finite differences along its own direction; a batch scores as its clips do
    one by one; a picture that is not square; and how many pixels get no gradient (a reward that
    clamps, thresholds or crops leaves many without).

    Args:
        frames: (B, F, 3, H, W) in [0, 1], B >= 2; default two clips of the tiny world.
        prompts: of the clips.
    """
    reward = as_reward(reward)
    report = Report(reward.name, [], "training" if reward.differentiable else "evaluation")
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
    noise = torch.randn(frames.shape, generator=generator).to(frames.device)
    frames = (frames + 0.02 * noise).clamp(0.02, 0.98)
    leaf = frames.clone().requires_grad_()
    try:
        value = reward(leaf, prompts)
    except Exception as error:  # anything that the user's function raises is the finding
        report.add("runs", False, f"{type(error).__name__}: {error}")
        return report
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    expected = (len(frames),)
    if not report.add("one score per clip", shape == expected, f"{shape}, expected {expected}"):
        return report
    report.add("finite", value.isfinite().all(), ", ".join(f"{v:.4g}" for v in value.tolist()))
    if reward.differentiable and not _check_gradient(report, reward, value, leaf, prompts):
        return report
    _check_batch(report, reward, value.detach(), frames, prompts)
    return report


def _check_gradient(report, reward, value, leaf, prompts) -> bool:
    """Whether there is a finite gradient."""
    lost = "left the graph: no_grad, uint8, PIL, numpy or argmax"
    has_graph = value.requires_grad
    if not report.add("differentiable", has_graph, "has a graph" if has_graph else lost):
        return False
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    norm = gradient.norm()
    if not report.add("gradient finite", gradient.isfinite().all(), f"norm {norm:.3g}"):
        return False
    silent = (gradient == 0).all(dim=2).float().mean().item()
    share = "more than 99%" if 0.99 < silent < 1 else f"{silent:.0%}"
    report.add("gradient reaches pixels", silent < 0.9, f"{share} of pixels get none")
    with torch.no_grad():
        direction = gradient / norm.clamp(min=1e-20)
        # As small as float32 allows: a network is linear only over a short distance. No pixel moves
        # by more than 0.01.
        small = 2e-3 * max(value.abs().sum().item(), 1e-2) / norm.clamp(min=1e-20)
        size = min(small.item(), 0.01 / direction.abs().max().clamp(min=1e-20).item())
        ahead, behind = (reward(leaf + step * direction, prompts) for step in (size, -size))
        slope, expected = ((ahead - behind).sum() / (2 * size)).item(), norm.item()
    agrees = abs(slope - expected) < 0.2 * max(abs(expected), 1e-12)
    detail = f"slope {slope:.3g} measured, {expected:.3g} by the gradient"
    report.add("matches finite differences", agrees, detail)
    return True


@torch.no_grad()
def _check_batch(report, reward, value, frames, prompts) -> None:
    alone = [reward(frames[i : i + 1], prompts[i : i + 1]) for i in range(len(frames))]
    spread = (torch.cat(alone) - value).abs().max().item()
    same = spread <= 1e-4 * max(1.0, value.abs().max().item())
    report.add("batch equals one by one", same, f"largest difference {spread:.2g}")
    resized = F.interpolate(frames.flatten(0, 1), (48, 80)).unflatten(0, frames.shape[:2])
    try:
        result = reward(resized, prompts)
        passed, detail = result.shape == value.shape and result.isfinite().all(), "scored"
    except Exception as error:  # as above
        passed, detail = False, f"{type(error).__name__}: {error}"
    report.add("takes 48 x 80 pixels", passed, detail)
