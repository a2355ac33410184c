"""What is asked of every reward with a network inside, for the tests of each family."""

import torch


def ascend(reward, frames, prompts, steps=20, size=0.02):
    """The reward (B,) before and after climbing along the sign of the pixels' gradient."""
    frames = frames.clone().requires_grad_()
    values = []
    for _ in range(steps + 1):
        value = reward(frames, prompts)
        (slope,) = torch.autograd.grad(value.sum(), frames)
        assert slope.isfinite().all()
        values.append(value.detach())
        frames = (frames + size * slope.sign()).clamp(0, 1).detach().requires_grad_()
    return values[0], values[-1]


def assert_slopes(reward, clip, prompt, step=1e-5, rtol=1e-5, atol=1e-9):
    """The gradient of one clip (F, 3, H, W) in float64 equals finite differences at 20 random values of it."""
    leaf = clip[None].clone().requires_grad_()
    reward(leaf, [prompt]).sum().backward()
    places = torch.randperm(clip.numel(), generator=torch.Generator().manual_seed(1))[:20]
    moved = torch.zeros(20, clip.numel(), dtype=clip.dtype)
    moved[torch.arange(20), places] = step
    moved = moved.view(20, *clip.shape)
    with torch.no_grad():
        slopes = (reward(clip + moved, [prompt] * 20) - reward(clip - moved, [prompt] * 20)) / (
            2 * step
        )
    assert slopes.abs().min() > 0
    torch.testing.assert_close(leaf.grad.flatten()[places], slopes, rtol=rtol, atol=atol)


def tensor_shapes(network):
    """The names and shapes of a network's tensors."""
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
