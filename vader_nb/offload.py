"""Networks that take turns on an accelerator: only those at work have their weights there."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import nn


class Turns:
    """Calling it with modules brings them to `device`, and sends home whoever was there before them.

    What moves are frozen weights and buffers. What is trained, a few MB of an adapter, stays where its optimizer found
    it. Frozen weights do not change, so they keep a copy at home for good, and leaving costs nothing.
    """

    def __init__(self, device: torch.device, home: torch.device):
        self.device, self.home = device, home
        self.copies = (
            WeakKeyDictionary()
        )  # of a module: where its tensors belong, and the copies at home
        self.present: list[nn.Module] = []

    def __call__(self, *modules: nn.Module) -> None:
        """Where all of them are here already, nobody has to leave."""
        if all(module in self.present for module in modules):
            return
        for module in self.present:
            if module not in modules:
                self.place(module, self.home)
        for module in modules:
            if module not in self.present:
                self.place(module, self.device)
        self.present = list(modules)

    def place(self, module: nn.Module, device: torch.device) -> None:
        if module not in self.copies:
            self.copies[module] = [
                (*slot, at(tensor, self.home)) for *slot, tensor in frozen(module)
            ]
        for table, name, tensor in self.copies[module]:
            table[name] = at(tensor, device)


def frozen(module: nn.Module) -> Iterator[tuple[dict, str, torch.Tensor]]:
    """(table, name, tensor) of what does not learn: tables are those in which `nn.Module` keeps its tensors."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            yield from (
                (table, name, x)
                for name, x in table.items()
                if x is not None and not x.requires_grad
            )


def at(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def saved_at(home: torch.device, network: nn.Module) -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, what autograd saves for the backward pass waits at home; not the network's own weights, which are saved
    as well, but are there anyway. (torch's `save_on_cpu` would copy each of them.)"""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}

    def pack(tensor):
        own = tensor.untyped_storage()._cdata in weights
        return tensor.device, tensor if own else tensor.to(home)

    def unpack(packed):
        device, tensor = packed
        return tensor.to(device)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
