"""Exact gradients through a causal decoder that runs chunk by chunk, with one chunk's graph in memory at a time.

Such a decoder is a recurrence: a chunk of latents and a state, the last frames that its convolutions saw, give
frames and the next state. One pass without a graph keeps the state before each chunk; a sweep in reverse then
computes each chunk again, with a graph, and passes the gradient on its state to the chunk before. The result is
that of autograd through the whole clip; approximations, by name, end the sweep earlier.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from .causal_states import Chunk, States


def decode(
    chunk: Chunk,
    parts: Sequence[torch.Tensor],
    state: Any,
    counts: Sequence[int],
    frames: list[int],
) -> torch.Tensor:
    """Some frames (B, len(frames), …) of a clip; chunks after the last of them are not decoded.

    Args:
        chunk: the decoder.
        parts: the chunks' latents, in order.
        state: before the first chunk.
        counts: how many frames each chunk decodes to.
        frames: indices in the whole clip, none of them negative.
    """
    decoded: list[Any] = [None] * len(frames)
    for part, places in zip(parts, places_of(counts, frames)):
        pixels, state = chunk(part, state)
        for place, inner in places:
            decoded[place] = pixels[:, inner]
    return torch.stack(decoded, dim=1)


def decode_vjp(
    chunk: Chunk,
    parts: Sequence[torch.Tensor],
    state: Any,
    counts: Sequence[int],
    frames: list[int],
    gradient: torch.Tensor,
    states: States,
) -> list[torch.Tensor]:
    """The gradient on each part, given that on `decode` of the same arguments.

    Args:
        gradient: (B, len(frames), …).
        states: where the states before the chunks wait, and how far the gradient goes through them.
    """
    places = places_of(counts, frames)
    pulled: list[torch.Tensor] = [torch.zeros_like(part) for part in parts]
    states.begin(chunk, parts, state)
    sweeps = sweeps_of(places, states.window)
    for start, end in sweeps:
        states.fill(start, end)
        waiting: list[Any] = []  # the gradient on each tensor of the state after the chunk
        for k in reversed(range(start, end)):
            given = [(inner, gradient[:, place]) for place, inner in places[k]]
            pulled[k], waiting, after = pull_back(
                chunk, parts[k], states.take(k), given, waiting, constant=k == start
            )
            if k == end - 1 and (start, end) != sweeps[-1]:
                states.keep(end, after)  # the next sweep begins with it
            del after
    return pulled


def pull_back(
    chunk: Chunk, part: torch.Tensor, state: Any, given: list, waiting: list, constant: bool = False
) -> tuple[torch.Tensor, list, Any]:
    """The gradients on one part and on the leaves of the state before it, and the state after it.

    Args:
        given: (index in the chunk, gradient) of its frames.
        waiting: the gradients on the leaves of the state after it; None where there is none.
        constant: the gradient on the state before it is not needed.
    """
    part = as_leaf(part)
    state = state if constant else tree_map_only(torch.Tensor, as_leaf, state)
    leaves = [] if constant else tree_leaves(state)
    with torch.enable_grad():
        pixels, after = chunk(part, state)
        ends = [(pixels[:, inner], gradient) for inner, gradient in given]
    ends += [pair for pair in zip(tree_leaves(after), waiting) if pair[1] is not None]
    outputs, gradients = zip(*ends)
    inputs = [part, *filter(is_real, leaves)]
    found = iter(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))
    after = tree_map_only(torch.Tensor, torch.Tensor.detach, after)
    return next(found), [next(found) if is_real(x) else None for x in leaves], after


def sweeps_of(places: list, window: int | None) -> list[tuple[int, int]]:
    """(first, one past the last) of the chunks that each sweep goes through, in order.

    A sweep goes from the last chunk with a frame in it back through `window` more chunks (None: all of them); the next
    one starts at the last such chunk before those.
    """
    sweeps: list[tuple[int, int]] = []
    end = len(places)
    while end > 0:
        start = end - 1
        if places[end - 1]:
            start = 0 if window is None else max(0, end - 1 - window)
            sweeps.insert(0, (start, end))
        end = start
    return sweeps


def places_of(counts: Sequence[int], frames: list[int]) -> list[list[tuple[int, int]]]:
    """For each chunk up to the last one that is needed: (place in `frames`, index in the chunk) of its frames."""
    places: list[list[tuple[int, int]]] = []
    start = 0
    for count in counts:
        held = enumerate(frame - start for frame in frames)
        places.append([(place, inner) for place, inner in held if 0 <= inner < count])
        start += count
        if start > max(frames):
            break
    return places


def as_leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a leaf, if it can have a gradient. Its gradient is a copy: a view of the gradient on a
    convolution's whole input would keep all of that in memory."""
    leaf = tensor.detach().requires_grad_(tensor.is_floating_point())
    if leaf.requires_grad:
        leaf.register_hook(torch.clone)
    return leaf


def is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
