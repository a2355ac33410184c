"""Temporal consistency as in VADER's paper, which released no code for it: minus V-JEPA's loss."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import VJEPA2Model

from .. import hub
from ..hub import StrPath
from .base import Reward, at_least_float32
from .gallery import find
from .networks import NetworkReward, preprocess

# V-JEPA's two families of masks (its configs/pretrain/vitl16.yaml, the same in V-JEPA 2): the
# number of blocks, and each one's share of the picture. All blocks of a family have one shape, and
# each is cut out of all frames alike.
FAMILIES = ((8, 0.15), (2, 0.7))
ASPECTS = (0.75, 1.5)  # a block's height over its width


def block_masks(grid: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each family the indices of the visible and of the hidden ones of `grid * grid` patches."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, share: float) -> torch.Tensor:
        low, high = ASPECTS
        aspect = low + torch.rand((), generator=generator).item() * (high - low)
        area = int(grid * grid * share)
        height = min(grid, round(math.sqrt(area * aspect)))
        width = min(grid, round(math.sqrt(area / aspect)))
        hidden = torch.zeros(grid, grid, dtype=torch.bool)
        for _ in range(count):
            top = torch.randint(grid - height + 1, (), generator=generator)
            left = torch.randint(grid - width + 1, (), generator=generator)
            hidden[top : top + height, left : left + width] = True
        return hidden.flatten()

    masks = []
    for count, share in FAMILIES:
        # Two large blocks may cover the picture; V-JEPA, too, draws again then.
        draws = (draw(count, share) for _ in range(100))
        hidden = next((h for h in draws if h.any() and not h.all()), None)
        if hidden is None:
            raise ValueError(
                f"a grid of {grid} x {grid} patches is too coarse for blocks of {share:.0%} of it"
            )
        masks.append(((~hidden).nonzero().squeeze(1), hidden.nonzero().squeeze(1)))
    return masks


class TemporalConsistency(NetworkReward):
    """Minus V-JEPA's loss: the error of predicting features of hidden blocks from the rest.

    Every tubelet (two frames of a 16 x 16 patch) is embedded. As context only the visible tokens
    go through the encoder, with the rotary positions they have in the clip, and into the
    predictor, with the mask token at each hidden place. The target is the encoder's output for all
    tokens, at the hidden places, normalized over its features without an affine map. The loss is
    mean |prediction - target|, averaged over both families of masks.

    (transformers' own forward shows the encoder all tokens and hides some of its outputs, which by
    then know what they should predict. And it always fills in mask token 1, see `mask_token`.)
    """

    name, range, unit = "temporal consistency", (-math.inf, 0.0), "-|feature error|"
    per_frame = False

    def __init__(self, model: VJEPA2Model, seed: int = 0):
        super().__init__([model], [*model.encoder.layer, *model.predictor.layer])
        self.model = model
        self.config: Any = model.config
        grid = self.config.crop_size // self.config.patch_size
        self.patches = grid * grid
        with unset_fake_temporarily(), torch.device("cpu"):  # masks are numbers in any case
            self.masks = block_masks(grid, seed)

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """The model's input (B, F, 3, size, size): the shorter side to 8/7 of it, then the center."""
        size = self.config.crop_size
        return preprocess(frames, size, resize="crop", shorter=int(size * 256 / 224)).to(self.dtype)

    def encode(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Features (B, N, D) of embedded tubelets (B, N, D) at the places (N,) of the clip."""
        for layer in self.model.encoder.layer:
            tokens = layer(tokens, places[None])[0]
        return self.model.encoder.layernorm(tokens)

    def predict(
        self, context: torch.Tensor, visible: torch.Tensor, hidden: torch.Tensor, token: int
    ) -> torch.Tensor:
        """Features (B, M, D) at the places `hidden` (M,), from `context` (B, N, D) at `visible` (N,)."""
        predictor = self.model.predictor
        blank = predictor.embeddings.mask_tokens[token].expand(len(context), len(hidden), -1)
        tokens = torch.cat([predictor.embeddings.predictor_embeddings(context), blank], dim=1)
        # Unsorted: rotary positions are all that counts.
        places = torch.cat([visible, hidden])[None]
        for layer in predictor.layer:
            tokens = layer(tokens, places)[0]
        return predictor.proj(predictor.layernorm(tokens[:, len(visible) :]))

    def mask_token(self, family: int) -> int:
        # V-JEPA trains one for each family, V-JEPA 2's released code token 0 for both (its index
        # counts clip lengths). They start at zero: one that is still zero was never trained.
        return family if self.model.predictor.embeddings.mask_tokens[family].any() else 0

    def check_frames(self, count):
        step = self.config.tubelet_size
        if count < step or count % step:
            hint = f"drop {count % step}, as in frames[:, :{count - count % step}]"
            raise ValueError(
                f"temporal consistency needs a multiple of {step} frames, got {count}: "
                f"{hint if count >= step else 'score more'}, or repeat the last one"
            )

    def scores(self, frames, prompts):
        self.check_frames(frames.shape[1])
        tokens = self.model.encoder.embeddings(self.pixels(frames))
        places = torch.arange(tokens.shape[1], device=tokens.device)
        target = F.layer_norm(at_least_float32(self.encode(tokens, places)), tokens.shape[-1:])
        places = places.unflatten(0, (-1, self.patches))  # of each tubelet's patches
        losses = []
        for family, mask in enumerate(self.masks):
            visible, hidden = (places[:, patches.to(places.device)].flatten() for patches in mask)
            context = self.encode(tokens[:, visible], visible)
            prediction = self.predict(context, visible, hidden, self.mask_token(family))
            losses.append((at_least_float32(prediction) - target[:, hidden]).abs().mean(dim=(1, 2)))
        return -torch.stack(losses).mean(dim=0).unsqueeze(1)


def temporal_consistency(
    checkpoint: StrPath = "published", *, seed=0, dtype=torch.float32, from_config=False
) -> Reward:
    """How well V-JEPA 2 (arXiv 2506.09985) predicts hidden parts of a clip from the rest of it.

    Minus its own training loss, as VADER's paper rewards image-to-video models (arXiv 2407.08737).
    Prompts are ignored. It sees the central square of an even number of frames. It was trained
    on 16 and 64 frames at 4 per second.

    The paper names neither masks nor checkpoint nor what the gradient goes through. Here the masks
    are V-JEPA's; the one published encoder encodes both context and target (the training's moving
    average is not published); and the gradient goes through the target, too, which training holds
    constant to keep the encoder from collapsing. Our encoder is frozen, but pictures can collapse:
    a clip that is plain or does not move is easy to predict, so pair this with a reward for motion
    or detail.

    Args:
        checkpoint: "published" (facebook/vjepa2-vitl-fpc64-256, 326 M parameters), or a local
            `VJEPA2Model` directory.
        seed: of the masks, which are drawn once: all clips are judged by the same.
    """
    place = find(checkpoint, "vjepa2-vitl")
    model = hub.network(VJEPA2Model, place, dtype, from_config)
    return TemporalConsistency(model, seed).identified(place, seed=seed)
