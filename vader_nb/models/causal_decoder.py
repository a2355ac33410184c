"""The two settings of every family with a causal decoder: where its states wait, and how far its gradient goes."""

from typing import Any

import torch

from .causal_states import States

DECODER_SETTINGS = "decoder_states", "decoder_gradient"


class CausalDecoder:
    """What a family with a causal decoder has beside `VideoModel`; `defaults` may hold both settings.

    Attributes:
        decoder_states: where `decode_vjp` keeps the decoder's states, one for each chunk: "device"; "cpu"; or a number m
            to keep every m-th on the device and compute the others again. None: "device", and "cpu" with model offload.
        decoder_gradient: "exact"; or an approximation, which takes less time and keeps fewer states. "last_chunk": a
            frame's gradient reaches only the latents that it is decoded from; the state before them is treated as
            a constant. "window:w": it reaches w more chunks; if all frames are scored, each group of w + 1 chunks,
            counted from the end, is exact by itself. A chunk is one latent of Wan, and two of CogVideoX.
            `testing.check_model` prints how far off they are.
    """

    offloader: Any
    offload_device: torch.device
    _states: str | int | None = None
    _gradient = "exact"

    def set_decoder(self, defaults: dict) -> None:
        """Take both settings from a model's defaults. Raises ValueError for invalid values."""
        self.decoder_states = defaults.get("decoder_states")
        self.decoder_gradient = defaults.get("decoder_gradient", "exact")

    @property
    def decoder_states(self) -> str | int | None:
        return self._states

    @decoder_states.setter
    def decoder_states(self, value: str | int | None) -> None:
        States("device" if value is None else value)  # raises now for an invalid value
        self._states = value

    @property
    def decoder_gradient(self) -> str:
        return self._gradient

    @decoder_gradient.setter
    def decoder_gradient(self, value: str) -> None:
        window_of(value)
        self._gradient = value

    def new_states(self) -> States:
        """For one `decode_vjp`."""
        keep = self.decoder_states or ("device" if self.offloader is None else "cpu")
        return States(keep, self.offload_device, window_of(self.decoder_gradient))


def window_of(gradient: str) -> int | None:
    """How many chunks before its own a frame's gradient reaches, see `States`."""
    if gradient in ("exact", "last_chunk"):
        return None if gradient == "exact" else 0
    kind, _, number = str(gradient).partition(":")
    if kind != "window" or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"decoder_gradient={gradient!r}: choose 'exact', or, to save time, 'last_chunk' (a frame's gradient "
            "reaches only the latents that it is decoded from) or 'window:w' (also w chunks before them)"
        )
    return int(number)
