"""Video clips that show themselves in a notebook and save as mp4, gif or webp."""

import base64
import html
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SUFFIXES = (".gif", ".webp", ".mp4")


@dataclass
class Video:
    """One clip.

    Args:
        frames: Shape `(F, 3, H, W)`, values in [0, 1].
        fps: Frames per second.
        caption: Text that describes the clip, usually its prompt.
    """

    frames: torch.Tensor
    fps: int = 8
    caption: str = ""

    def __post_init__(self):
        shape = tuple(self.frames.shape)
        if len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"a video's frames have shape (F, 3, H, W), got {shape}")
        self.frames = self.frames.detach().float().cpu()

    def images(self, width: int | None = None) -> list[Image.Image]:
        """Return Pillow images, enlarged to about `width` pixels in whole steps, unblurred."""
        pixels = (self.frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        factor = max(1, (width or 0) // pixels.shape[2])
        return [Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1)) for frame in pixels]

    def encoded(self, suffix: str = ".gif", width: int | None = None) -> bytes:
        """Encode the clip as an endless gif or a lossless webp."""
        images = self.images(width)
        options = {"duration": round(1000 / self.fps), "loop": 0}
        if suffix == ".webp":
            options["lossless"] = True
        else:  # one palette for the whole clip, or flat backgrounds would flicker
            sheet = Image.fromarray(np.concatenate([np.asarray(image) for image in images]))
            palette = sheet.quantize(255, method=Image.Quantize.MEDIANCUT, kmeans=2)
            images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        buffer = io.BytesIO()
        first, *rest = images
        first.save(buffer, suffix[1:], save_all=True, append_images=rest, **options)
        return buffer.getvalue()

    def save(self, path: str | Path, width: int | None = None) -> Path:
        """Write a .gif, .webp or .mp4, as the file's name ends; `width` as in `images`."""
        path = Path(path)
        if path.suffix not in SUFFIXES:
            endings = ", ".join(SUFFIXES)
            raise ValueError(f"cannot save a video as {path.name!r}: it must end in {endings}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".mp4":
            path.write_bytes(self.encoded(path.suffix, width))
            return path
        import imageio_ffmpeg
        import mediapy

        mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
        frames = np.stack([np.asarray(image) for image in self.images(width)])
        mediapy.write_video(path, frames, fps=self.fps)
        return path

    def to_html(self, width: int = 192, alt: str = "") -> str:
        """Return an `<img>` with the clip inside; `alt` describes a clip without a caption."""
        data = base64.b64encode(self.encoded(".gif")).decode()
        text = html.escape(self.caption or alt)
        style = f"image-rendering:pixelated;border-radius:6px;width:100%;max-width:{width}px"
        return (
            f'<img src="data:image/gif;base64,{data}" alt="{text}" title="{text}" '
            f'width="{width}" style="{style}">'
        )

    def _repr_html_(self) -> str:
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>"
        return f"<figure style='margin:0'>{self.to_html()}{caption}</figure>"


class Gallery:
    """Labeled rows of clips that show themselves in a notebook.

    The clips of a column become one picture, so that they play in step. The captions of the first
    row head the columns.

    Args:
        rows: The clips by label, equally many in each row.
        width: Width of a column in pixels.
    """

    def __init__(self, rows: dict[str, list[Video]], width: int = 128):
        lengths = {label: len(videos) for label, videos in rows.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"a gallery's rows must hold equally many clips, at least one row; got {lengths}"
            )
        self.rows, self.width = rows, width

    def column(self, videos: tuple[Video, ...]) -> Video:
        """Stack the clips of one column into one clip; its caption names the rows."""
        shapes = {tuple(video.frames.shape) for video in videos}
        if len(shapes) > 1:
            raise ValueError(
                f"clips under each other must have one shape (F, 3, H, W), got {sorted(shapes)}"
            )
        first = videos[0]
        labels = ", below it ".join(self.rows)
        caption = f"{labels}: {first.caption}" if first.caption else labels
        clips = torch.stack([video.frames for video in videos])
        return Video(grid(clips, columns=1), first.fps, caption)

    def to_html(self) -> str:
        """Return the gallery as an HTML table that needs no other file."""
        heads, pictures = "", ""
        for videos in zip(*self.rows.values()):
            caption = html.escape(videos[0].caption)
            heads += (
                "<td style='padding:2px 4px;vertical-align:bottom;text-align:left;font-size:11px;"
                f"line-height:1.3;overflow-wrap:anywhere;max-width:{self.width}px'>{caption}</td>"
            )
            picture = self.column(videos).to_html(self.width)
            pictures += f"<td style='padding:4px'>{picture}</td>"
        labels = "".join(
            f"<div style='padding-right:8px'>{html.escape(label)}</div>" for label in self.rows
        )
        # The labels share the height of the pictures evenly, at any width of the page.
        return (
            f"<table style='border-collapse:collapse'><tr><td></td>{heads}</tr><tr>"
            "<th scope='row' style='height:1px;padding:0;text-align:left'><div style='display:flex;"
            "height:100%;flex-direction:column;justify-content:space-around'>"
            f"{labels}</div></th>{pictures}</tr></table>"
        )

    _repr_html_ = to_html


def grid(clips: torch.Tensor, columns: int, gap: int = 4, background: float = 1.0) -> torch.Tensor:
    """Arrange clips side by side, row by row.

    Args:
        clips: Shape `(N, F, 3, H, W)`.
        columns: Clips per row.
        gap: Pixels between clips.
        background: Gray level of the gaps, 0 to 1.

    Returns:
        The frames of one video, shape `(F, 3, H', W')`.
    """
    count, length, _, height, width = clips.shape
    rows = math.ceil(count / columns)
    size = rows * (height + gap) - gap, columns * (width + gap) - gap
    sheet = torch.full((length, 3, *size), background)
    for i, clip in enumerate(clips.detach().float().cpu()):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[:, :, top : top + height, left : left + width] = clip
    return sheet
