"""Clips show themselves and survive being written."""

import io

import pytest
import torch
from PIL import Image

from vader_nb import Gallery, Video
from vader_nb.video import grid


@pytest.fixture
def clip():
    return Video(
        torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0)), fps=8, caption="noise"
    )


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_pictures_keep_frames_rate_and_size(clip, suffix, tmp_path):
    picture = Image.open(io.BytesIO(clip.save(tmp_path / f"clip{suffix}", width=50).read_bytes()))
    assert picture.n_frames == 5
    assert picture.size == (48, 32)  # enlarged by a whole factor, unblurred
    picture.seek(1)
    if suffix == ".gif":
        assert picture.info["duration"] in (120, 130)  # a gif counts in hundredths of a second
        assert picture.info["loop"] == 0
    else:  # lossless
        picture.seek(0)
        expected = Image.fromarray((clip.frames[0] * 255).round().byte().permute(1, 2, 0).numpy())
        assert list(picture.convert("RGB").resize((24, 16), Image.NEAREST).getdata()) == list(
            expected.getdata()
        )


def test_mp4_can_be_read_back(clip, tmp_path):
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(clip.save(tmp_path / "clip.mp4", width=96)))
    about = next(reader)
    again = [
        torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(64, 96, 3) for frame in reader
    ]
    assert (about["size"], about["fps"], len(again)) == ((96, 64), 8.0, 5)
    small = torch.stack(again)[:, 2::4, 2::4].permute(0, 3, 1, 2) / 255
    assert (small - clip.frames).abs().mean() < 0.15  # noise is the codec's worst case


def test_it_shows_itself_with_a_text_alternative(clip):
    shown = clip._repr_html_()
    assert 'alt="noise"' in shown
    assert "data:image/gif;base64," in shown


def test_what_is_not_a_video_is_refused(clip, tmp_path):
    with pytest.raises(ValueError, match=r"\(2, 8, 8\)"):
        Video(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="must end in .gif"):
        clip.save(tmp_path / "clip.avi")


def test_grid_lays_clips_out_row_by_row():
    clips = torch.stack([torch.full((2, 3, 4, 4), value) for value in (0.1, 0.2, 0.3)])
    sheet = grid(clips, columns=2, gap=1)
    assert sheet.shape == (2, 3, 9, 9)
    assert sheet[0, 0, 0, 0].item() == pytest.approx(0.1)
    assert sheet[0, 0, 0, 5].item() == pytest.approx(0.2)
    assert sheet[0, 0, 5, 0].item() == pytest.approx(0.3)
    assert sheet[0, 0, 5, 5].item() == 1.0  # nothing there


@pytest.mark.parametrize(
    "fps, frames", [(8, 20), (24, 48), (30, 60), (50, 50), (60, 120), (120, 60)]
)
def test_a_gif_plays_at_its_speed(fps, frames, tmp_path):
    """In hundredths of a second, and never below two, which browsers would slow down."""
    clip = Video(torch.rand(frames, 3, 4, 4, generator=torch.Generator().manual_seed(0)), fps=fps)
    picture, shown = Image.open(clip.save(tmp_path / "clip.gif")), []
    for number in range(picture.n_frames):
        picture.seek(number)
        shown.append(picture.info["duration"])
    assert min(shown) >= 20
    assert sum(shown) == pytest.approx(1000 * frames / fps, abs=20)


def test_a_clip_of_real_size_is_a_video_in_a_page():
    from vader_nb.video import SMALL

    frames = torch.rand(16, 3, 255, 257, generator=torch.Generator().manual_seed(0))
    shown = Video(frames, caption='a "cat"').to_html()
    assert shown.startswith('<video src="data:video/mp4;base64,')
    assert 'aria-label="a &quot;cat&quot;"' in shown and "autoplay loop muted playsinline" in shown
    assert 16 * 255 * 257 > SMALL > 8 * 64 * 64 * 8


@pytest.mark.parametrize("name", ["-y.mp4", "a:b.mp4", "https:.mp4", "%d.mp4"])
def test_names_that_ffmpeg_would_take_for_something_else(clip, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert clip.save(name).read_bytes()[4:8] == b"ftyp"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), 1000])
def test_a_rate_that_cannot_be(fps):
    with pytest.raises(ValueError, match="fps must lie in"):
        Video(torch.zeros(2, 3, 8, 8), fps=fps)


def test_home_is_understood(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    clip.save("~/clip.gif")
    assert (tmp_path / "clip.gif").is_file()


def test_a_gallery_wider_than_its_page_scrolls_and_keeps_its_columns_wide_enough_to_see():
    clip = torch.zeros(2, 3, 8, 8)
    html = Gallery({"base": [Video(clip)] * 8}, width=112).to_html()
    assert html.startswith("<div style='overflow-x:auto'><table") and html.endswith(
        "</table></div>"
    )
    assert html.count("min-width:72px") == 8
    assert "min-width:40px" in Gallery({"base": [Video(clip)]}, width=40).to_html()
