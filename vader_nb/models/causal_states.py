"""Where the states before a causal decoder's chunks wait until the sweep in reverse takes them, see `causal`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

# (latents of a chunk, state) -> (its frames (B, f, …), next state). A state is a tree of tensors and other values; it
# must not be changed in place, since it is used again.
Chunk = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]


class States:
    """The states before each chunk: computed in order, without a graph, and taken in reverse, sweep by sweep.

    Args:
        keep: "device" keeps all where they are made; "cpu" in CPU memory; a number m keeps every m-th on the device,
            and the others are computed again, m at a time.
        offload_device: what "cpu" means; see `VideoModel.offload_device`.
        window: how many chunks before its own a frame's gradient reaches; None: all of them.
    """

    def __init__(
        self,
        keep: str | int,
        offload_device: torch.device | None = None,
        window: int | None = None,
    ):
        keep = int(keep) if isinstance(keep, str) and keep.isdecimal() else keep
        if keep not in ("device", "cpu") and not (type(keep) is int and keep > 0):
            raise ValueError(
                f"decoder_states={keep!r}: choose 'device', 'cpu', or a number m to keep every m-th state"
            )
        self.every = keep if isinstance(keep, int) else 1
        self.place = (offload_device or torch.device("cpu")) if keep == "cpu" else None
        self.window = window

    def begin(self, chunk: Chunk, parts: Sequence[torch.Tensor], state: Any) -> None:
        """A new clip, from the state before its first chunk."""
        self.chunk, self.parts, self.kept = chunk, parts, {0: state}

    def keep(self, k: int, state: Any) -> None:
        self.kept[k] = moved(state, self.place)

    @torch.no_grad()
    def fill(self, start: int, end: int) -> None:
        """Compute the states before parts[start:end], from the one that is there."""
        known = min(self.kept)
        self.start, state = start, self.pop(known)
        for k in range(known, end):
            if k >= start and (k - start) % self.every == 0:
                self.keep(k, state)
            if k < end - 1:
                state = self.chunk(self.parts[k], state)[1]

    @torch.no_grad()
    def take(self, k: int) -> Any:
        """The state before the k-th part, which is then forgotten; the last one first."""
        if k not in self.kept:
            before = k - (k - self.start) % self.every
            state = self.kept[before]
            for i in range(before, k):
                state = self.chunk(self.parts[i], state)[1]
                self.kept[i + 1] = state
        return self.pop(k)

    def pop(self, k: int) -> Any:
        return moved(self.kept.pop(k), self.place and self.parts[k].device)


def moved(state: Any, device: torch.device | None) -> Any:
    """The state with its tensors on a device; None leaves them where they are."""
    if device is None:
        return state
    return tree_map_only(torch.Tensor, lambda x: x.to(device), state)
