"""Video: frames and their rate. Shows itself in a notebook; saves mp4, gif and webp."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import torch

SUFFIXES = (".gif", ".webp", ".mp4")


@dataclass
class Video:
    """One clip: frames (F, 3, H, W) in [0, 1], frames a second, and the text that describes it."""

    frames: torch.Tensor
    fps: int = 8
    caption: str = ""

    def __post_init__(self):
        if self.frames.ndim != 4 or self.frames.shape[1] != 3:
            raise ValueError(
                f"a video's frames have shape (F, 3, H, W), got {tuple(self.frames.shape)}"
            )
        self.frames = self.frames.detach().float().cpu()

    def images(self, width: int | None = None) -> list:
        """Pillow images; narrower clips are enlarged to about `width` pixels in whole steps, unblurred."""
        from PIL import Image

        pixels = (self.frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        images = [Image.fromarray(frame) for frame in pixels]
        factor = max(1, (width or 0) // images[0].width)
        return [
            image.resize((image.width * factor, image.height * factor), Image.NEAREST)
            for image in images
        ]

    def encoded(self, suffix: str = ".gif", width: int | None = None) -> bytes:
        """The clip as an endless gif or a lossless webp."""
        buffer, images = io.BytesIO(), self.images(width)
        if suffix == ".gif":  # one palette for the clip, or flat grounds would flicker
            from PIL import Image

            sheet = Image.new("RGB", (images[0].width, images[0].height * len(images)))
            for i, image in enumerate(images):
                sheet.paste(image, (0, i * image.height))
            palette = sheet.quantize(255, method=Image.Quantize.MEDIANCUT, kmeans=2)
            images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        options = {
            "save_all": True,
            "append_images": images[1:],
            "duration": round(1000 / self.fps),
            "loop": 0,
        }
        images[0].save(
            buffer,
            suffix[1:].upper(),
            **options,
            **({"lossless": True} if suffix == ".webp" else {}),
        )
        return buffer.getvalue()

    def save(self, path: str | Path, width: int | None = None) -> Path:
        """Write a gif, webp or mp4, by the name's ending; widths as in `images`."""
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"cannot save a video as {path.name!r}: the name must end in {', '.join(SUFFIXES)}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mp4":
            import imageio_ffmpeg
            import mediapy
            import numpy as np

            mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
            mediapy.write_video(
                path, np.stack([np.asarray(image) for image in self.images(width)]), fps=self.fps
            )
        else:
            path.write_bytes(self.encoded(path.suffix, width))
        return path

    def to_html(self, width: int = 192, alt: str = "") -> str:
        """An <img> with the clip inside; works without any codec. alt: its alternative text, if it has no caption."""
        data = base64.b64encode(self.encoded(".gif")).decode()
        text = html.escape(self.caption or alt, quote=True)
        return (
            f'<img src="data:image/gif;base64,{data}" alt="{text}" title="{text}" width="{width}" '
            f'style="image-rendering:pixelated;border-radius:6px;width:100%;max-width:{width}px">'
        )

    def _repr_html_(self) -> str:
        return f"<figure style='margin:0'>{self.to_html()}<figcaption>{html.escape(self.caption)}</figcaption></figure>"


class Gallery:
    """Clips in rows, each row with a label; shows itself in a notebook. Clips that stand under each other are one
    picture, so that they play in step and can be compared; the first row's captions head the columns."""

    def __init__(self, rows: dict[str, list[Video]], width: int = 128):
        lengths = {label: len(videos) for label, videos in rows.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"a gallery's rows must hold equally many clips, at least one row; got {lengths}"
            )
        self.rows, self.width = rows, width

    def column(self, videos: tuple[Video, ...]) -> Video:
        """The clips of one column, under each other, told apart by their rows' labels."""
        first = videos[0]
        shapes = {tuple(video.frames.shape) for video in videos}
        if len(shapes) > 1:
            raise ValueError(
                f"clips under each other must have one shape (F, 3, H, W), got {sorted(shapes)}"
            )
        labels = ", below it ".join(self.rows)
        text = f"{labels}: {first.caption}" if first.caption else labels
        return Video(
            grid(torch.stack([video.frames for video in videos]), columns=1), first.fps, text
        )

    def to_html(self) -> str:
        columns = [self.column(videos) for videos in zip(*self.rows.values())]
        captions = [video.caption for video in next(iter(self.rows.values()))]
        heads = "".join(
            f"<td style='padding:2px 4px;vertical-align:bottom;text-align:left;font-size:11px;line-height:1.3;"
            f"overflow-wrap:anywhere;max-width:{self.width}px'>{html.escape(caption)}</td>"
            for caption in captions
        )
        labels = "".join(
            f"<div style='padding-right:8px'>{html.escape(label)}</div>" for label in self.rows
        )
        pictures = "".join(
            f"<td style='padding:4px'>{video.to_html(self.width)}</td>" for video in columns
        )
        # The labels share the pictures' height evenly, whatever width the page leaves for them.
        return (
            f"<table style='border-collapse:collapse'><tr><td></td>{heads}</tr><tr>"
            f"<th scope='row' style='height:1px;padding:0;text-align:left'><div style='display:flex;height:100%;"
            f"flex-direction:column;justify-content:space-around'>{labels}</div></th>{pictures}</tr></table>"
        )

    _repr_html_ = to_html


def grid(clips: torch.Tensor, columns: int, gap: int = 4, background: float = 1.0) -> torch.Tensor:
    """Clips (N, F, 3, H, W) side by side as the frames (F, 3, H', W') of one video, row by row."""
    count, length, _, height, width = clips.shape
    rows = -(-count // columns)
    sheet = torch.full(
        (length, 3, rows * (height + gap) - gap, columns * (width + gap) - gap), background
    )
    for i, clip in enumerate(clips.detach().float().cpu()):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[:, :, top : top + height, left : left + width] = clip
    return sheet
