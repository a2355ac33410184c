"""The count of living bytes, where the right answer can be told with a pencil."""

import gc

import torch
from torch.utils.checkpoint import checkpoint

from vader_nb.memory import Peak

KB = torch.zeros(256).nbytes  # a tensor of 256 floats


def test_it_counts_what_lives_together():
    there_before = torch.zeros(256)
    with Peak() as peak:
        a = there_before + 1
        b = a + 1
        a.add_(1)  # in place: nothing new
        c = b.view(16, 16)  # a view: nothing new
        del a
        d = c * 2
    assert peak.bytes == 2 * KB  # a and b, then b and d
    assert d.shape == (16, 16)


def test_it_forgets_what_is_gone():
    with Peak() as peak:
        for _ in range(10):
            torch.zeros(256) + 1
    gc.collect()
    assert peak.bytes == 2 * KB
    assert peak.live == 0


def test_it_sees_the_backward_pass_and_what_checkpointing_saves():
    """Ten layers x -> sin x keep ten inputs; checkpointed two by two, the ends of five pieces and one piece's inside."""
    peaks = {}
    for name in ("kept", "checkpointed"):
        x = torch.ones(256, requires_grad=True)
        with Peak() as peak:
            y = x
            for _ in range(5):
                twice = lambda z: z.sin().sin()  # noqa: E731
                y = checkpoint(twice, y, use_reentrant=False) if name == "checkpointed" else twice(y)
            y.sum().backward()
        peaks[name] = peak.bytes
    assert peaks["kept"] >= 10 * KB
    assert peaks["checkpointed"] < peaks["kept"] - 2 * KB
