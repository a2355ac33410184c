"""What autograd saved waits elsewhere, and comes back one before it is needed."""

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vader_nb import offload
from vader_nb.memory_planner import FakeMode, MemoryTracker
from vader_nb.offload import Offloaded, offload_saved_tensors

CPU, META = torch.device("cpu"), torch.device("meta")
NOTHING = torch.nn.Identity()


def chain(x, length=5):
    for _ in range(length):
        x = x.sin()  # saves its input
    return x


@pytest.fixture
def events(monkeypatch):
    """("takes" or "comes", place in the order of saving), and weak references to what was saved."""
    found, saved = [], []
    make, take, fetch = Offloaded.__init__, Offloaded.take, Offloaded.fetch

    def place(one):
        return next(i for i, other in enumerate(saved) if other() is one)

    def made(self, *arguments):
        make(self, *arguments)
        saved.append(weakref.ref(self))

    def taken(self):
        found.append(("takes", place(self)))
        return take(self)

    def fetched(self):
        if self.coming is None:
            found.append(("comes", place(self)))
        return fetch(self)

    for name, function in (("__init__", made), ("take", taken), ("fetch", fetched)):
        monkeypatch.setattr(Offloaded, name, function)
    return found, saved


def test_each_one_comes_while_the_backward_pass_is_at_the_next(events):
    found, saved = events
    x = torch.ones(3, requires_grad=True)
    with offload_saved_tensors(CPU, NOTHING):
        y = chain(x)
    assert not found and len(saved) == 5
    y.sum().backward()
    assert found[:3] == [("takes", 4), ("comes", 4), ("comes", 3)]
    assert found[3:] == [("takes", 3), ("comes", 2), ("takes", 2), ("comes", 1)] + [
        ("takes", 1),
        ("comes", 0),
        ("takes", 0),
    ]
    plain = torch.ones(3, requires_grad=True)
    chain(plain).sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_nothing_of_it_stays_after_the_backward_pass(events):
    _, saved = events
    with offload_saved_tensors(CPU, NOTHING):
        y = chain(torch.ones(3, requires_grad=True))
    y.sum().backward()
    gc.collect()
    assert not any(reference() for reference in saved)


def test_a_graph_may_be_gone_through_twice(events):
    x = torch.ones(3, requires_grad=True)
    with offload_saved_tensors(CPU, NOTHING):
        y = chain(x).sum()
    (once,) = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x)[0], once)


def test_two_are_on_the_device_at_a_time():
    """Beside them the gradient, before and after a layer, and a cosine."""
    with FakeMode(), MemoryTracker("cpu") as tracker:
        x = torch.ones(256, requires_grad=True)
        with offload_saved_tensors(META, NOTHING):
            y = chain(x, 20)
        gc.collect()
        tracker.enter("backward")
        y.sum().backward()
    assert tracker.stages["backward"] <= 8 * x.nbytes


def test_weights_stay_where_they_are(events):
    layer = torch.nn.Linear(3, 3)
    with offload_saved_tensors(META, layer):
        y = layer(torch.ones(2, 3, requires_grad=True))
    assert [one().kept.shape for one in events[1]] == [(2, 3)]
    assert y.shape == (2, 3)


def test_on_a_gpu_copies_have_a_stream_and_wait_for_what_they_need(monkeypatch):
    """Without a GPU: fake CUDA tensors, and streams that note what is asked of them."""
    noted = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            noted.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def inside(stream):
        noted.append(f"copy in {stream.name}")
        yield

    side, main = Stream("side"), Stream("main")
    monkeypatch.setattr(offload, "copies", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    kept = lambda tensor, stream: noted.append(f"memory kept for {stream.name}")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", kept)
    out = ["side waits for main", "copy in side", "memory kept for side"]
    home = ["main waits for side", "memory kept for main"]
    with FakeTensorMode():
        hooks: Any = offload_saved_tensors(CPU, NOTHING)
        first, second = (hooks.pack_hook(torch.ones(n, device="cuda")) for n in (1, 2))
        assert noted == out * 2 and first.kept.device.type == "cpu"
        noted.clear()
        assert hooks.unpack_hook(second).device.type == "cuda"
        assert noted == ["copy in side", *home, "copy in side"]  # the first comes already
        noted.clear()
        assert hooks.unpack_hook(first).shape == (1,)
        assert noted == home
