"""Every reward in a table: what it sees, what it is made of, what it costs, and when it fails. Loads nothing."""

import html
from dataclasses import dataclass

from ..hub import Source

# Sizes, hashes and revisions as published; a missing hash is one that we could not check.
SOURCES = {
    "clip-vit-large-patch14": Source("openai/clip-vit-large-patch14", size="1.7 GB", license="MIT"),
    "clip-vit-base-patch32": Source("openai/clip-vit-base-patch32", size="605 MB", license="MIT"),
    "laion-v2": Source(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "sac+logos+ava1-l14-linearMSE.pth",
        size="3.7 MB",
        license="Apache-2.0",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
    "hps-v2.0": Source(
        "xswu/HPSv2",
        "HPS_v2_compressed.pt",
        size="2.0 GB",
        license="Apache-2.0",
        sha256="07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
        revision="697403c78157020a1ae59d23f111aa58ced35b0a",
    ),
    "hps-v2.1": Source(
        "xswu/HPSv2",
        "HPS_v2.1_compressed.pt",
        size="2.0 GB",
        license="Apache-2.0",
        sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        revision="697403c78157020a1ae59d23f111aa58ced35b0a",
    ),
    "pickscore-v1": Source(
        "yuvalkirstain/PickScore_v1", size="3.9 GB", license="none stated (code MIT)"
    ),
    "image-reward": Source(
        "THUDM/ImageReward", "ImageReward.pt", size="1.8 GB", license="Apache-2.0"
    ),
    "bert-vocabulary": Source(
        "google-bert/bert-base-uncased", "vocab.txt", size="232 kB", license="Apache-2.0"
    ),
    "videomae-base-kinetics": Source(
        "MCG-NJU/videomae-base-finetuned-kinetics", size="346 MB", license="CC-BY-NC-4.0"
    ),
    "vjepa2-vitl": Source("facebook/vjepa2-vitl-fpc64-256", size="1.3 GB", license="MIT"),
    "xclip-base-patch32": Source("microsoft/xclip-base-patch32", size="786 MB", license="MIT"),
    "raft-small": Source(
        "https://download.pytorch.org/models/raft_small_C_T_V2-01064c6d.pth",
        "raft_small_C_T_V2-01064c6d.pth",
        size="3.8 MB",
        license="BSD-3-Clause",
        sha256="01064c6d",
    ),
    "yolos-tiny": Source("hustvl/yolos-tiny", size="26 MB", license="Apache-2.0"),
    "yolos-base": Source("hustvl/yolos-base", size="511 MB", license="Apache-2.0"),
    "grounding-dino-tiny": Source(
        "IDEA-Research/grounding-dino-tiny", size="690 MB", license="Apache-2.0"
    ),
    "grounding-dino-base": Source(
        "IDEA-Research/grounding-dino-base", size="930 MB", license="Apache-2.0"
    ),
}


@dataclass(frozen=True)
class Card:
    """One line of the gallery. parameters: in millions; typical: scores of usual pictures or clips; beside: GB that
    live beside the weights while one clip of 16 frames of 256 x 256 is scored, forwards and backwards, in float16
    (measured by tests/benchmarks/reward_memory.py)."""

    name: str
    sees: str
    backbone: str
    sources: tuple[str, ...]
    parameters: float
    typical: tuple[float, float] | None
    fails: str
    beside: float | None = None


EVERY_FRAME, FRAME_AND_PROMPT, CLIP, CLIP_AND_PROMPT = (
    "frames",
    "frames, prompt",
    "the clip",
    "the clip, prompt",
)
CLIP_L = "CLIP ViT-L/14"

CARDS = {
    card.name: card
    for card in (
    Card("aesthetic", EVERY_FRAME, f"{CLIP_L} + linear head", ("clip-vit-large-patch14", "laion-v2"), 304.9, (4.0, 7.0), "prompts are ignored; rewards glossy, centered, simple pictures", 0.13),
    Card("hps", FRAME_AND_PROMPT, "open_clip ViT-H/14", ("hps-v2.1",), 986.1, (0.2, 0.35), "long runs turn glossy and over-bright; scores compare within one prompt only", 0.16),
    Card("aesthetic_hps", FRAME_AND_PROMPT, "both of the above", ("clip-vit-large-patch14", "laion-v2", "hps-v2.1"), 1291.0, None, "as its two parts"),
    Card("pickscore", FRAME_AND_PROMPT, "CLIP ViT-H/14", ("pickscore-v1",), 986.1, (18.0, 24.0), "drifts to fine texture and detail", 0.18),
    Card("clip_score", FRAME_AND_PROMPT, "CLIP ViT-B/32", ("clip-vit-base-patch32",), 151.3, (0.15, 0.35), "easy to fool; counts and relations hardly matter to it", 0.04),
    Card("image_reward", FRAME_AND_PROMPT, "BLIP ViT-L/16", ("image-reward", "bert-vocabulary"), 445.3, (-2.0, 2.0), "no upper end: cap it (ReFL: at 2), or pictures break; 35 tokens, the central square"),
    Card("action", CLIP_AND_PROMPT, "VideoMAE base", ("videomae-base-kinetics",), 86.5, (-6.0, 0.0), "knows 400 actions; people only", 0.08),
    Card("temporal_consistency", CLIP, "V-JEPA 2 ViT-L", ("vjepa2-vitl",), 326.0, None, "a frozen or plain clip is easy to predict; sees the central square"),
    Card("text_video", CLIP_AND_PROMPT, "X-CLIP base/32", ("xclip-base-patch32",), 196.6, None, "trained on actions: looks matter little; 8 frames, their central square", 0.03),
    Card("flow_smoothness", CLIP, "RAFT small", ("raft-small",), 0.99, None, "without a floor a frozen clip is perfect; cuts and moving edges count as jerks"),
    Card("object_removal", EVERY_FRAME, "YOLOS tiny", ("yolos-tiny",), 6.5, None, "80 COCO classes; removes what the detector recognizes, not the thing", 0.08),
    Card("object_presence", EVERY_FRAME, "YOLOS tiny", ("yolos-tiny",), 6.5, None, "as object_removal, the other way round", 0.08),
    Card("compression", EVERY_FRAME, f"{CLIP_L} + head (your file)", ("clip-vit-large-patch14",), 304.4, None, "a network's guess of a size; `compressibility` computes it", 0.13),
    Card("rainy", EVERY_FRAME, f"{CLIP_L} + head (your file)", ("clip-vit-large-patch14",), 304.9, (0.0, 1.0), "learnt from drawn rain, not from real rain", 0.13),
    Card("snowy", EVERY_FRAME, f"{CLIP_L} + head (your file)", ("clip-vit-large-patch14",), 304.9, (0.0, 1.0), "learnt from drawn snow, not from real snow", 0.13),
    Card("compressibility", EVERY_FRAME, "formula", (), 0, (-8.0, 0.0), "an empty picture is perfect"),
    Card("incompressibility", EVERY_FRAME, "formula", (), 0, (0.0, 8.0), "noise is perfect"),
    Card("colorfulness", EVERY_FRAME, "formula", (), 0, (0.0, 0.4), "garish is perfect"),
    Card("brightness", EVERY_FRAME, "formula", (), 0, (0.2, 0.7), "white is perfect"),
    Card("motion_smoothness", CLIP, "formula", (), 0, (-0.1, 0.0), "sees pixels, not things"),
    )
}  # fmt: skip

HEADINGS = ("reward", "sees", "backbone", "download", "license", "fp16 memory", "typical", "fails")


def row(card: Card) -> tuple[str, ...]:
    sources = [SOURCES[name] for name in card.sources]
    licenses = dict.fromkeys(
        source.license + (" (not for commercial use)" if "-NC" in source.license else "")
        for source in sources
    )
    if "your file" in card.backbone:
        licenses["none stated for the head"] = None
    typical = f"{card.typical[0]:g} to {card.typical[1]:g}" if card.typical else "-"
    return (
        card.name,
        card.sees,
        card.backbone,
        ", ".join(f"{place(source)}, {source.size}" for source in sources) or "none",
        ", ".join(licenses) or "ours",
        memory(card),
        typical,
        card.fails,
    )


def memory(card: Card) -> str:
    if not card.parameters:
        return "none"
    return f"{card.parameters * 2 / 1e3:.2f} GB + {card.beside or 'not measured'}"


def place(source: Source) -> str:
    return source.filename if source.repo.startswith("https://") else source.repo


class table:
    """All rewards, one a line: what each sees, its backbone, its download and license, the memory of its weights in
    fp16 plus what one clip adds, usual scores, and when it fails. Prints as text, as a table in a notebook, `.markdown()` for a README."""

    def __init__(self):
        self.rows = [row(card) for card in CARDS.values()]

    def __repr__(self) -> str:
        blocks = []
        for name, *values in self.rows:
            lines = (f"  {heading:<13} {value}" for heading, value in zip(HEADINGS[1:], values))
            blocks.append("\n".join([name, *lines]))
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        lines = ["".join(f"<th style='text-align:left'>{heading}</th>" for heading in HEADINGS)]
        lines += [
            "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row)
            for row in self.rows
        ]
        return f"<div style='overflow-x:auto'><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"

    def markdown(self) -> str:
        """The columns that fit on a page."""
        chosen = [
            HEADINGS.index(name)
            for name in ("reward", "sees", "backbone", "download", "license", "fails")
        ]
        lines = [[row[i] for i in chosen] for row in (HEADINGS, *self.rows)]
        lines.insert(1, ["---"] * len(chosen))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
