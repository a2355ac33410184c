"""The size of real files as rewards: what JPEG and H.264 need for a clip. Judges without a gradient."""

import io

import torch

from ..video import Video, h264
from .base import Reward


class JPEGBytes(Reward):
    """Minus the bits per pixel of each frame as a JPEG file."""

    name, unit, range = "jpeg bytes", "bits/pixel", (-float("inf"), 0.0)
    differentiable, instead = False, "compressibility, an estimate of it with a gradient"

    def __init__(self, quality: int = 75):
        if not 1 <= quality <= 95:
            raise ValueError(f"JPEG quality must lie in 1..95, got {quality}")
        self.quality = quality

    def scores(self, frames, prompts):
        return -bits_per_pixel(frames, lambda clip: map(self.size, Video(clip).images()))

    def size(self, image) -> int:
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=self.quality)
        return buffer.tell()


class H264Bytes(Reward):
    """Minus the bits per pixel of each clip as an mp4 file."""

    name, unit, range, per_frame = "h264 bytes", "bits/pixel", (-float("inf"), 0.0), False
    differentiable, instead = False, "compressibility, which sees no motion"

    def __init__(self, crf: int = 23):
        if not 0 <= crf <= 51:
            raise ValueError(f"H.264's constant rate factor must lie in 0..51, got {crf}")
        self.crf, self.fps = crf, 8.0
        self.identified(crf=crf)

    def at_fps(self, fps):
        self.fps = fps

    def scores(self, frames, prompts):
        def sizes(clip):
            video = Video(clip, self.fps)
            yield len(h264(video.images(), video.fps, self.crf)) / len(clip)

        return -bits_per_pixel(frames, sizes)


def bits_per_pixel(frames: torch.Tensor, sizes) -> torch.Tensor:
    """(B, n) of frames (B, F, 3, H, W), where sizes(clip) gives n numbers of bytes for a frame."""
    pixels = frames.shape[-2] * frames.shape[-1]
    return frames.new_tensor([[8 * size / pixels for size in sizes(clip)] for clip in frames])


def jpeg_bytes(quality: int = 75) -> Reward:
    """Minus the size of each frame as a JPEG file, in bits per pixel, for evaluation: no gradient.

    Files as Pillow writes them (chroma at half resolution), header included: of frames of 64 x 64
    it alone is 1.2 bits per pixel. `compressibility` estimates it with a gradient.

    Args:
        quality: 1 to 95, as Pillow takes it.
    """
    return JPEGBytes(quality)


def h264_bytes(crf: int = 23) -> Reward:
    """Minus the size of each clip as an mp4 file, in bits per pixel, for evaluation: no gradient.

    Unlike JPEG, it sees time: what moves, flickers or changes has to be coded. Files as
    `Video.save` writes them (x264 in one thread, so that they are the same everywhere; frames are
    4:2:0; container included). Encoded at the frame rate of the model that is evaluated.

    Args:
        crf: constant rate factor, 0 (lossless) to 51; 23 is x264's default.
    """
    return H264Bytes(crf)
