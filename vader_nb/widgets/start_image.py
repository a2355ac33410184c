"""The image that a sampler's clips start from: uploaded, given from Python, or the last frame of a clip."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ipywidgets import HTML, FileUpload

from ..clip_request import as_image
from ..drawing import data_url, note
from ..video import Video, image_bytes
from .controls import disable, row
from .panel import Panel

WITHOUT = "The clip starts from an image: upload one."
DRAWN = "The clip starts from an image. Without one, the prompt's first frame is drawn for it."


class StartImage:
    """The controls in `box`, and `data`, the bytes of an image file or None."""

    def __init__(self, panel: Panel, model: Any, last: Callable, changed: Callable):
        """last: returns the last frame of a clip (3, H, W). changed: is called after a new choice."""
        self.model, self.changed, self.data = model, changed, None
        self.upload = FileUpload(accept="image/*", description="start from an image")
        self.upload.layout.width = "190px"
        panel.on(self._uploaded, self.upload)
        self.again = panel.button(
            "from the last frame", "step-forward", 180, lambda: self.choose(last())
        )
        self.forget = panel.button("no image", "times", 100, lambda: self.choose(None))
        self.shown = HTML()
        self.box = row(self.upload, self.again, self.forget, self.shown)
        self.box.layout.display = "flex" if model.takes_image else "none"
        self.show()

    def choose(self, image) -> None:
        self.set(image)
        self.changed()

    def set(self, image: bytes | Path | str | torch.Tensor | None) -> None:
        """Set it to the bytes of a file, a path, a tensor (3, H, W) in [0, 1], or none.

        Raises:
            ValueError: This is not an image, or the model does not start from one.
        """
        if image is not None and not self.model.takes_image:
            raise ValueError(f"{self.model.name!r} makes clips from text alone: it takes no image")
        if isinstance(image, torch.Tensor):
            image = image_bytes(Video(image[None]).images()[0])
        data = Path(image).read_bytes() if isinstance(image, str | Path) else image
        try:
            small = data and as_image(data)
        except (OSError, SyntaxError) as error:
            raise ValueError("this image cannot be read: try a PNG or a JPEG") from error
        self.data = data
        self.show(small)

    def show(self, image=None) -> None:
        disable("" if image else "there is no image", self.forget)
        self.shown.value = note(DRAWN if self.model.world else WITHOUT)
        if image:
            image.thumbnail((112, 112))
            look = 'alt="the image that the clip starts from" style="height:56px"'
            self.shown.value = f'<img src="{data_url(image_bytes(image), "image/png")}" {look}>'

    def _uploaded(self) -> None:
        files: Any = self.upload.value
        files = [*files.values()] if isinstance(files, dict) else files  # ipywidgets 7, and 8
        if files:
            self.choose(bytes(files[-1]["content"]))
