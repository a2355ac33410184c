"""A clip with a frame slider that needs no JavaScript of ours.

All frames are in the page, as pages of a Tab widget. The slider is linked to it in the browser
(`jslink`), so a remote kernel causes no delay.
"""

import io
from collections.abc import Sequence
from html import escape

from ipywidgets import HTML, SelectionSlider, Tab, VBox, jslink

from ..video import Video
from .controls import FULL, LINE
from .drawing import data_url, note

EMPTY = note("no clip yet")


def moving(video: Video, alt: str) -> str:
    """The clip as an <img> that plays."""
    source = data_url(video.encoded(".gif"), "image/gif")
    return f'<img class=vader-frame src="{source}" alt="{escape(alt)}">'


def pictures(video: Video, alt: str) -> list[str]:
    """The clip as an <img> that plays, then each of its frames."""
    found = [moving(video, alt)]
    for number, image in enumerate(video.images(), 1):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        source, text = data_url(buffer.getvalue(), "image/png"), f"{alt}, frame {number}"
        found.append(f'<img class=vader-frame src="{source}" alt="{escape(text)}">')
    return found


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
