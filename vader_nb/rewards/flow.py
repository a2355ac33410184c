"""Smoothness of motion, measured by optical flow: torchvision's RAFT (arXiv 2003.12039)."""

import math

import torch
import torch.nn.functional as F
from torchvision.models.optical_flow import RAFT, raft_small

from .. import hub
from ..hub import StrPath
from .base import Reward, at_least_float32
from .gallery import find
from .networks import NetworkReward, default_dtype

SMALLEST, MULTIPLE = 128, 8  # of the sides that RAFT takes
UPDATES = 12  # of the flow, as torchvision's default


class FlowSmoothness(NetworkReward):
    """Minus the mean change of the optical flow between pairs of frames, with a floor under it.

    If the mean flow is below `floor`, the shortfall is subtracted: otherwise a frozen clip is perfect.
    Flows are in fractions of the picture's diagonal per frame, so that the size of the frames does
    not matter, and are compared at the same place of the picture (not along the path of what moves
    there, so that an object's edge counts as change).
    """

    name, range, unit, per_frame = "flow smoothness", (-float("inf"), 0.0), "diagonals/frame", False
    min_frames = 3
    frames_at_once = 1  # pairs: RAFT's comparisons grow with the square of a picture's area

    def __init__(self, raft: RAFT, floor: float = 0.0):
        super().__init__([raft])
        self.raft, self.floor = raft, floor

    def flow(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, F - 1, 2, h, w): the flow from each frame of (B, F, 3, H, W) to the next.

        Across and down, in diagonals of the picture, of the size at which RAFT saw it.
        """
        height, width = frames.shape[-2:]
        grown = max(1.0, SMALLEST / min(height, width))
        rounded = [MULTIPLE * round(side * grown / MULTIPLE) for side in (height, width)]
        size = [max(SMALLEST, side) for side in rounded]
        unit = frames.new_tensor([width / size[1], height / size[0]], dtype=self.dtype)
        unit = (unit / math.hypot(height, width))[:, None, None]

        def between(pairs):
            pictures = at_least_float32(pairs.unflatten(1, (2, 3)).flatten(0, 1))
            if size != [height, width]:
                pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True)
            first, second = (pictures * 2 - 1).to(self.dtype).unflatten(0, (-1, 2)).unbind(1)
            return estimate(self.raft, first, second) * unit

        return self.per_picture(between, torch.cat([frames[:, :-1], frames[:, 1:]], dim=2))

    def scores(self, frames, prompts):
        self.check_frames(frames.shape[1])
        flow = self.flow(frames)
        change = flow.diff(dim=1).norm(dim=2).mean(dim=(1, 2, 3))
        missing = (self.floor - flow.norm(dim=2).mean(dim=(1, 2, 3))).relu()
        return -(change + missing).unsqueeze(1)

    def to(self, *args, **kwargs):
        # Pixels are looked up at fractional positions, which half precision cannot represent.
        wanted = torch.empty(0, dtype=self.dtype).to(*args, **kwargs)
        return super().to(wanted.device, torch.promote_types(wanted.dtype, torch.float32))


def estimate(raft: RAFT, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """RAFT's last estimate of the flow (N, 2, h, w) in pixels between (N, 3, h, w) in [-1, 1].

    As torchvision's forward, except that there each update starts from a detached flow, which
    steadies RAFT's training but keeps only the last update's share of the gradient.
    """
    one, two = raft.feature_encoder(torch.cat([first, second])).chunk(2)
    raft.corr_block.build_pyramid(one, two)
    width = raft.update_block.hidden_state_size
    state, context = raft.context_encoder(first).tensor_split([width], dim=1)
    state, context = state.tanh(), context.relu()
    down, across = (
        torch.arange(side, device=one.device, dtype=one.dtype) for side in one.shape[-2:]
    )
    start = torch.stack(torch.meshgrid(across, down, indexing="xy")).expand(len(one), -1, -1, -1)
    flow = torch.zeros_like(start)
    for _ in range(UPDATES):
        compared = raft.corr_block.index_pyramid(start + flow)
        state, step = raft.update_block(state, context, compared, flow)
        flow = flow + step
    raft.corr_block.corr_pyramid = []  # frees the last pair's comparisons, and their graph
    scale = first.shape[-1] // one.shape[-1]
    return scale * F.interpolate(flow, scale_factor=scale, mode="bilinear", align_corners=True)


def flow_smoothness(
    checkpoint: StrPath = "published", *, floor=0.0, dtype=torch.float32, from_config=False
) -> Reward:
    """Smooth motion of the whole clip, as RAFT sees it: 0 for motion that does not change.

    Prompts are ignored. Clips have 3 frames or more; sides that RAFT cannot take are resized to the
    nearest multiples of 8, at least 128. The network runs in float32 even when `dtype` asks for less.

    Args:
        checkpoint: "published" (torchvision's raft_small_C_T_V2-01064c6d.pth, 1 M parameters,
            BSD-3-Clause), or a local file of such weights.
        floor: the least mean flow, in diagonals of the picture per frame, without a penalty: above
            0, standing still is no longer best.
    """
    if not floor >= 0:
        raise ValueError(f"the floor for the mean flow must be 0 or more, got {floor}")
    place = find(checkpoint, "raft-small")
    if from_config:
        with default_dtype(torch.float32):
            raft = raft_small(weights=None)
    else:
        path = hub.single_file(place)
        with torch.device("meta"):  # no memory, no random numbers
            raft = raft_small(weights=None)
        hub.fill(raft, hub.state_dict(path), f"{path} does not hold raft_small's weights")
    reward = FlowSmoothness(raft, floor).identified(place, floor=floor)
    return reward if from_config else reward.to(dtype)
