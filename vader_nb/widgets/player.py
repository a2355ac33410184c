"""A clip with a frame slider that needs no JavaScript of ours.

All frames are in the page, as pages of a Tab widget. The slider is linked to it in the browser
(`jslink`), so a remote kernel causes no delay.
"""

from collections.abc import Sequence
from html import escape

from ipywidgets import HTML, SelectionSlider, Tab, VBox, jslink
from PIL import Image

from ..drawing import data_url, note
from ..video import Video, fit, image_bytes
from .controls import FULL, LINE

EMPTY = note("no clip yet")
SHOWN = 640  # pixels of a single frame of a large clip


def segments(lengths: Sequence[int], frame: int = 0) -> str:
    """The segments of a long clip as a line, so that its seams are seen; bold: that of `frame`, counted from 1."""
    if len(lengths) < 2:
        return ""
    line, end = "", 0
    for number, length in enumerate(lengths, 1):
        tag = "b" if end < frame <= end + length else "span"
        end += length
        line += f"<{tag} style='flex:{length}'>segment {number}, to frame {end}</{tag}>"
    return f"<div class=vader-segments>{line}</div>"


def still(image: Image.Image, alt: str, kind: str) -> str:
    source = data_url(image_bytes(image, kind), f"image/{kind}")
    return f'<img class=vader-frame src="{source}" alt="{escape(alt)}">'


def moving(video: Video, alt: str) -> str:
    """The clip as an element that plays."""
    return video.element(alt, "class=vader-frame")


def pictures(video: Video, alt: str) -> list[str]:
    """The clip as an element that plays, then each of its frames; those of a large clip are JPEGs as wide as a panel shows."""
    large = video.is_large
    images = Video(fit(video.frames, SHOWN)).images() if large else video.images()
    kind = "jpeg" if large else "png"
    frames = [still(image, f"{alt}, frame {i}", kind) for i, image in enumerate(images, 1)]
    return [moving(video, alt), *frames]


class Player:
    """A stack of pages in `box`: page 0 plays the clip, page i shows frame i."""

    def __init__(self, num_frames: int):
        options = _labels(num_frames)
        self.scrubber = SelectionSlider(options=options, description="frame", **LINE)
        self.pages = Tab([HTML(EMPTY) for _ in options], layout=FULL)
        self.pages.add_class("vader-frames")
        self.pages.selected_index = 0
        jslink((self.scrubber, "index"), (self.pages, "selected_index"))
        self.box = VBox([self.pages, self.scrubber], layout=FULL)

    def show(self, pages: Sequence[str]) -> None:
        """Show pages of HTML, the playing clip first. The open page stays open."""
        old = list(self.pages.children)
        if len(pages) != len(old):
            self.scrubber.index = 0
            added = [HTML() for _ in range(len(pages) - len(old))]
            self.pages.children = (old + added)[: len(pages)]
            self.scrubber.options = _labels(len(pages) - 1)
            for page in old[len(pages) :]:  # widgets that are not closed stay in memory
                for part in (page.style, page.layout, page):
                    part.close()
        for page, value in zip(self.pages.children, pages):
            page.value = value


def _labels(num_frames: int) -> list[str]:
    return ["▶ all", *(f"{i} of {num_frames}" for i in range(1, num_frames + 1))]
