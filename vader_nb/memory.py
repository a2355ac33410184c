"""What lives in memory, and how much of it at the worst moment."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Inside `with Peak() as peak: …`, counts the tensors that torch makes, forwards and backwards, on any device.

    `peak.bytes` is the most that lived at one moment. Counted is every storage made inside, once, from its birth until
    its last tensor is gone; not what was there before, and not what a kernel needs for itself.
    """

    def __init__(self):
        super().__init__()
        self.live, self.bytes, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | given:  # a view or an in-place result is nothing new
                    self.born(storage)
        self.bytes = max(self.bytes, self.live)
        return result

    def born(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.live -= size
