"""Video clips that show themselves in a notebook and save as mp4, gif or webp."""

import html
import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch.nn.functional import interpolate

from .drawing import data_url

SUFFIXES = (".gif", ".webp", ".mp4")
SMALL = 500_000  # pixels of a clip that is a gif in a page; larger ones are H.264

NARROW = 72  # pixels of a gallery's column on a phone, whose page then scrolls sideways
GAP = 4  # pixels between clips side by side
WIDEST = 1920  # pixels in all: H.264 players take no more than about 4000
BACKGROUND = 0.25  # their gray, which is seen beside white, gray and black clips


def check_suffix(path: str | Path) -> None:
    """Raise ValueError for a name that does not end as a video's."""
    if Path(path).suffix not in SUFFIXES:
        endings = ", ".join(SUFFIXES)
        raise ValueError(f"cannot save a video as {Path(path).name!r}: it must end in {endings}")


def durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds per frame, in whole units, whose sum is right to within one."""
    ends = [round(1000 / unit * i / fps) * unit for i in range(count + 1)]
    return [after - before for before, after in zip(ends, ends[1:])]


def h264(images: list[Image.Image], fps: float, crf: int | None = None) -> bytes:
    """An mp4 that browsers play; the last row or column is doubled where a size is odd.

    crf: the quality. With it, one thread encodes: x264's bytes depend on the number of threads.
    """
    import imageio_ffmpeg
    import mediapy

    mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
    frames = np.stack([np.asarray(image) for image in images])
    odd = [(0, size % 2) for size in frames.shape[1:3]]
    frames = np.pad(frames, [(0, 0), *odd, (0, 0)], mode="edge")
    with tempfile.TemporaryDirectory() as folder:  # ffmpeg reads some names as options or protocols
        path = Path(folder) / "clip.mp4"
        fixed = {} if crf is None else {"crf": crf, "ffmpeg_args": ["-threads", "1"]}
        mediapy.write_video(path, frames, fps=fps, **fixed)
        return path.read_bytes()


def image_bytes(image: Image.Image, kind: str = "png") -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@dataclass
class Video:
    """One clip.

    Args:
        frames: Shape `(F, 3, H, W)`, values in [0, 1].
        fps: Frames per second.
        caption: Text that describes the clip, usually its prompt.
    """

    frames: torch.Tensor
    fps: float = 8
    caption: str = ""

    def __post_init__(self):
        shape = tuple(self.frames.shape)
        if len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"a video's frames have shape (F, 3, H, W), got {shape}")
        if not 0 < self.fps <= 240:
            raise ValueError(f"fps must lie in (0, 240], got {self.fps}")
        self.frames = self.frames.detach().float().cpu()

    def images(self, width: int | None = None) -> list[Image.Image]:
        """Return Pillow images, enlarged to about `width` pixels in whole steps, unblurred."""
        pixels = (self.frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        factor = max(1, (width or 0) // pixels.shape[2])
        return [Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1)) for frame in pixels]

    def encoded(self, suffix: str = ".gif", width: int | None = None) -> bytes:
        """Encode the clip as a looping gif, a lossless webp, or an mp4 (H.264)."""
        images = self.images(width)
        if suffix == ".mp4":
            return h264(images, self.fps)
        options: dict = {"loop": 0}
        if suffix == ".webp":
            options |= {"lossless": True, "duration": durations(len(images), self.fps, 1)}
        else:
            if self.fps > 50:  # browsers slow down what is shown for less than 20 ms
                images = [
                    images[int(i * self.fps / 50)]
                    for i in range(math.ceil(len(images) * 50 / self.fps))
                ]
            options["duration"] = durations(len(images), min(self.fps, 50), 10)
            # One palette for the whole clip, or flat backgrounds would flicker; refined where that is quick.
            sheet = Image.fromarray(np.concatenate([np.asarray(image) for image in images]))
            kmeans = 2 if sheet.width * sheet.height < SMALL else 0
            palette = sheet.quantize(255, method=Image.Quantize.MEDIANCUT, kmeans=kmeans)
            images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        buffer = io.BytesIO()
        first, *rest = images
        first.save(buffer, suffix[1:], save_all=True, append_images=rest, **options)
        return buffer.getvalue()

    def save(self, path: str | Path, width: int | None = None) -> Path:
        """Write a .gif, .webp or .mp4, by the file's suffix; `width` as in `images`."""
        path = Path(path).expanduser()
        check_suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.encoded(path.suffix, width))
        return path

    def to_html(self, width: int = 192, alt: str = "") -> str:
        """Return an `<img>`, or for a larger clip a `<video>`, with the clip inside.

        `alt` describes a clip without a caption.
        """
        text = self.caption or alt
        # A column of a table would shrink to the clip's own pixels if this were width:100%;max-width:…px.
        style = f"image-rendering:pixelated;border-radius:6px;width:{width}px;max-width:100%"
        return self.element(text, f'title="{html.escape(text)}" width="{width}" style="{style}"')

    def element(self, alt: str, look: str) -> str:
        """The `<img>` or `<video>`, with a frame where H.264 does not play; `look` has attributes of its tag."""
        text = html.escape(alt)
        if not self.is_large:
            source = data_url(self.encoded(".gif"), "image/gif")
            return f'<img src="{source}" alt="{text}" {look}>'
        first = Video(self.frames[:1]).images()[0]
        poster = data_url(image_bytes(first, "jpeg"), "image/jpeg")
        source = data_url(self.encoded(".mp4"), "video/mp4")
        return (
            f'<video src="{source}" poster="{poster}" aria-label="{text}" {look} '
            "autoplay loop muted playsinline></video>"
        )

    @property
    def is_large(self) -> bool:
        """Whether a page gets it as H.264."""
        return self.frames[:, 0].numel() >= SMALL

    def _repr_html_(self) -> str:
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>"
        return f"<figure style='margin:0'>{self.to_html()}{caption}</figure>"


def load(path: Path) -> Video:
    """A clip that `Video.save` wrote as webp."""
    with Image.open(path) as picture:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
        duration = picture.info.get("duration") or 1000  # a clip of one frame has none
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return Video(pixels / 255, fps=round(1000 / duration))


class Gallery:
    """Labeled rows of clips that show themselves in a notebook.

    The clips of a column become one picture, so that they play in sync. The captions of the first
    row head the columns.

    Args:
        rows: The clips by label, the same number in each row.
        width: Width of a column in pixels.
    """

    def __init__(self, rows: dict[str, list[Video]], width: int = 128):
        lengths = {label: len(videos) for label, videos in rows.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"a gallery needs at least one row, and the same number of clips in each; got {lengths}"
            )
        self.rows, self.width = rows, width

    def column(self, videos: tuple[Video, ...]) -> Video:
        """Stack the clips of one column into one clip; its caption names the rows."""
        shapes = {tuple(video.frames.shape) for video in videos}
        if len(shapes) > 1:
            raise ValueError(
                f"the clips of a column must have the same shape (F, 3, H, W), got {sorted(shapes)}"
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
            pictures += (
                f"<td style='padding:4px;min-width:{min(self.width, NARROW)}px'>{picture}</td>"
            )
        labels = "".join(
            f"<div style='padding-right:8px'>{html.escape(label)}</div>" for label in self.rows
        )
        # The labels share the height of the pictures evenly, at any width of the page.
        return (
            "<div style='overflow-x:auto'><table style='border-collapse:collapse'>"
            f"<tr><td></td>{heads}</tr><tr>"
            "<th scope='row' style='height:1px;padding:0;text-align:left'><div style='display:flex;"
            "height:100%;flex-direction:column;justify-content:space-around'>"
            f"{labels}</div></th>{pictures}</tr></table></div>"
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


def joined(clips: Sequence[torch.Tensor | None], fps: float, text: str) -> Video:
    """Clips (F, 3, H, W) side by side as one video; None: an empty place, not made yet."""
    fitted = [clip if clip is None else fit(clip, WIDEST // len(clips)) for clip in clips]
    like = next(clip for clip in fitted if clip is not None)
    filled = [torch.full_like(like, BACKGROUND) if clip is None else clip for clip in fitted]
    return Video(grid(torch.stack(filled), len(filled), GAP, BACKGROUND), fps, text)


def fit(frames: torch.Tensor, width: int) -> torch.Tensor:
    """Frames (F, 3, H, W), made smaller where they are wider than that."""
    height = round(frames.shape[2] * width / frames.shape[3])
    wide = frames.shape[3] > width
    return interpolate(frames.float(), (height, width), mode="area") if wide else frames
