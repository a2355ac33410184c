"""Temporal consistency as VADER's paper describes it and never released it: minus V-JEPA's masked-prediction loss."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import VJEPA2Model

from .. import hub
from .base import Reward, wide
from .gallery import SOURCES
from .networks import IMAGENET_MEAN, IMAGENET_STD, Network, preprocess

PUBLISHED = "vjepa2-vitl"
# V-JEPA's two families of masks (its configs/pretrain/vitl16.yaml, the same in V-JEPA 2): so many blocks of such a
# share of the picture. All blocks of a family have one shape, and each is cut out of all frames alike.
FAMILIES = ((8, 0.15), (2, 0.7))
ASPECTS = (0.75, 1.5)  # a block's height over its width


def block_masks(grid: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each of V-JEPA's families the visible and the hidden ones of the `grid * grid` patches of a picture: two
    ascending lists of indices, which together hold every patch once.

    Raises ValueError for a grid so coarse that blocks of these shares hide nothing or everything.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, share: float) -> torch.Tensor:
        aspect = ASPECTS[0] + torch.rand((), generator=generator).item() * (ASPECTS[1] - ASPECTS[0])
        area = int(grid * grid * share)
        height, width = (
            min(grid, round(math.sqrt(area * ratio))) for ratio in (aspect, 1 / aspect)
        )
        hidden = torch.zeros(grid, grid, dtype=torch.bool)
        for _ in range(count):
            top = torch.randint(grid - height + 1, (), generator=generator)
            left = torch.randint(grid - width + 1, (), generator=generator)
            hidden[top : top + height, left : left + width] = True
        return hidden.flatten()

    masks = []
    for count, share in FAMILIES:
        # Two large blocks may cover the picture; V-JEPA, too, draws again then.
        hidden = next(
            (h for h in (draw(count, share) for _ in range(100)) if h.any() and not h.all()), None
        )
        if hidden is None:
            raise ValueError(
                f"a grid of {grid} x {grid} patches is too coarse for blocks of {share:.0%} of a picture"
            )
        masks.append(((~hidden).nonzero().squeeze(1), hidden.nonzero().squeeze(1)))
    return masks


class TemporalConsistency(Network):
    """Minus V-JEPA's loss: how far off the features of hidden blocks are when predicted from the rest of the clip.

    In this order: every tubelet (two frames of a 16 x 16 patch) is embedded; of the context only the visible tokens
    enter the encoder's layers, with the rotary positions they have in the clip; the encoder's LayerNorm; the
    predictor's input layer; the mask token once for each hidden place; the predictor's layers, LayerNorm and output
    layer. The target is the encoder's output for all tokens, at the hidden places, normalized over its features
    without an affine map. The loss is mean |prediction - target|, the mean of both families of masks.

    (transformers' own forward shows the encoder all tokens and hides some of its outputs, which by then know what
    they should predict. And it always fills in mask token 1, for which see `mask_token`.)
    """

    name, range, unit, per_frame = (
        "temporal consistency",
        (-float("inf"), 0.0),
        "-|feature error|",
        False,
    )

    def __init__(self, model: VJEPA2Model, seed: int = 0):
        super().__init__([model], [*model.encoder.layer, *model.predictor.layer])
        self.model, self.config = model, model.config
        grid = self.config.crop_size // self.config.patch_size
        self.patches, self.masks = grid * grid, block_masks(grid, seed)

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """The model's input (B, F, 3, size, size): as its processor does, the shorter side to 8/7 of the size, then
        the center. What lies further out is not seen."""
        size = self.config.crop_size
        look = {"resize": "crop", "shorter": int(size * 256 / 224)}
        pixels = preprocess(frames.flatten(0, 1), size, IMAGENET_MEAN, IMAGENET_STD, **look)
        return pixels.to(self.dtype).unflatten(0, frames.shape[:2])

    def encode(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Embedded tubelets (B, N, D), of all in the clip those at `places` (N,), through the encoder: (B, N, D)."""
        for layer in self.model.encoder.layer:
            tokens = layer(tokens, places[None])[0]
        return self.model.encoder.layernorm(tokens)

    def predict(
        self, context: torch.Tensor, visible: torch.Tensor, hidden: torch.Tensor, token: int
    ) -> torch.Tensor:
        """The features at the places `hidden` (M,), from the encoded context (B, N, D) at the places `visible` (N,):
        (B, M, D). token: which of the predictor's mask tokens stands for what is to be predicted."""
        predictor = self.model.predictor
        blank = predictor.embeddings.mask_tokens[token].expand(len(context), len(hidden), -1)
        tokens = torch.cat([predictor.embeddings.predictor_embeddings(context), blank], dim=1)
        places = torch.cat([visible, hidden])[
            None
        ]  # unsorted: attention with rotary positions knows no other order
        for layer in predictor.layer:
            tokens = layer(tokens, places)[0]
        return predictor.proj(predictor.layernorm(tokens[:, len(visible) :]))

    def mask_token(self, family: int) -> int:
        """The mask token of a family of masks. V-JEPA trains one for each family, V-JEPA 2's released code token 0
        for both (its index counts clip lengths); they start at zero, so that one still zero was never trained."""
        return family if self.model.predictor.embeddings.mask_tokens[family].any() else 0

    def scores(self, frames, prompts):
        step, count = self.config.tubelet_size, frames.shape[1]
        if count < step or count % step:
            way = (
                f"drop {count % step}, as in frames[:, :{count - count % step}]"
                if count >= step
                else "score more"
            )
            raise ValueError(
                f"temporal consistency needs a multiple of {step} frames, got {count}: {way}, or repeat the last one"
            )
        tokens = self.model.encoder.embeddings(self.pixels(frames))
        places = torch.arange(tokens.shape[1], device=tokens.device)
        target = F.layer_norm(wide(self.encode(tokens, places)), tokens.shape[-1:])
        places = places.unflatten(0, (-1, self.patches))  # of each tubelet's patches
        losses = []
        for family, mask in enumerate(self.masks):
            visible, hidden = (places[:, patches.to(places.device)].flatten() for patches in mask)
            context = self.encode(tokens[:, visible], visible)
            prediction = self.predict(context, visible, hidden, self.mask_token(family))
            losses.append((wide(prediction) - target[:, hidden]).abs().mean(dim=(1, 2)))
        return -torch.stack(losses).mean(dim=0).unsqueeze(1)


def temporal_consistency(
    checkpoint: str | Path = "published", *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Reward:
    """How well V-JEPA 2 (arXiv 2506.09985) foresees hidden parts of a clip from the rest of it: minus its own training
    loss, as VADER's paper rewards image-to-video models (arXiv 2407.08737). Prompts are ignored.

    frames (B, F, 3, H, W) of any size, of which the central square is seen; F even (ValueError otherwise, with the
    way out), 2 or more; trained on 16 and 64 frames at 4 a second. checkpoint: "published"
    (facebook/vjepa2-vitl-fpc64-256, 326 M parameters), or a local `VJEPA2Model` directory. seed: of the masks, which
    are drawn once: all clips are judged by the same, so that scores can be compared.

    The paper names neither masks nor checkpoint nor what the gradient goes through. Here the masks are V-JEPA's; the
    one published encoder encodes both context and target (the training's moving average is not published beside it);
    and the gradient is that of the score: it goes through the prediction and through the target, which V-JEPA's
    training holds constant to keep the encoder from collapsing. Our encoder is frozen, but pictures can collapse,
    too: a clip that is plain or does not move is easy to foresee, so pair this with a reward for motion or detail.

    Raises FileNotFoundError where the weights cannot be had, ValueError for a directory that lacks some of them.
    """
    local = None if checkpoint in ("published", PUBLISHED) else Path(checkpoint)
    if local and not local.exists():
        raise FileNotFoundError(
            f"no checkpoint {str(checkpoint)!r}: give {PUBLISHED!r} or a VJEPA2Model directory"
        )
    otherwise = (
        "vader_nb.rewards.temporal_consistency(checkpoint='/path/to/the/VJEPA2Model/directory')"
    )
    model = hub.network(VJEPA2Model, SOURCES[PUBLISHED], local, otherwise=otherwise, dtype=dtype)
    return TemporalConsistency(model, seed)
