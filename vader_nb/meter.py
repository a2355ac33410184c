"""What a run costs: clips scored, latents through the denoisers and back, bytes that are kept; and a run with a budget."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from .models import VideoModel
from .trainer import Trainer

COSTS = ("reward_queries", "denoiser_calls", "denoiser_backwards", "seconds", "bytes_kept")


class Held:
    """A tensor that autograd keeps; reports when it is released."""

    def __init__(self, tensor: torch.Tensor, release: Callable[[], None]):
        self.tensor, self.release = tensor, release

    def __del__(self):
        self.release()


class Meter:
    """Counts between `with` and its end.

    Attributes:
        calls: latents that pass through a denoiser, once for each branch of the guidance.
        backwards: those that a gradient passes through on its way back.
    """

    def __init__(self, model: VideoModel, networks: Iterable[torch.nn.Module] = ()):
        """networks: their weights, like the model's, do not count as kept."""
        self.model, self.networks = model, [*model.modules(), *networks]
        self.calls = self.backwards = 0
        self.rollouts = self.saved = self.most = 0
        self.users: dict[int, int] = {}  # of a storage that autograd keeps, by its address

    def __enter__(self) -> "Meter":
        self.before = vars(self.model).get("predict")
        predict, model = self.model.predict, self.model

        def counted(latents: torch.Tensor, *args, **options) -> torch.Tensor:
            self.calls += len(latents)
            output = predict(latents, *args, **options)
            if output.requires_grad:
                output.register_hook(lambda gradient: self.passed(len(gradient)))
            return output

        model.predict = counted
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
            self.allocated = torch.cuda.memory_allocated(model.device)
        return self

    def __exit__(self, *_) -> None:
        del self.model.predict
        if self.before is not None:
            self.model.predict = self.before

    def passed(self, count: int) -> None:
        self.backwards += count

    @property
    def kept(self) -> int:
        """Bytes at most at a time; see `race`."""
        if self.model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.model.device) - self.allocated
        return self.most

    def holds(self, collected: Iterable) -> None:
        """These roll-outs are kept now, and no others."""
        tensors: list[Any] = []
        for rollout in (one.rollout for one in collected):
            tensors += [rollout.latents, *rollout.states]
            tensors += [output for outputs in rollout.outputs for output in outputs.values()]
        storages = [tensor.untyped_storage() for tensor in tensors]
        self.rollouts = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        self.most = max(self.most, self.rollouts + self.saved)

    def saving(self) -> contextlib.AbstractContextManager:
        """Inside, what autograd saves is counted."""
        if self.model.device.type == "cuda":
            return contextlib.nullcontext()
        weights = [
            p for network in self.networks for p in (*network.parameters(), *network.buffers())
        ]
        self.weights = {p.untyped_storage().data_ptr() for p in weights}
        return saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def pack(self, tensor: torch.Tensor) -> Held:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.weights:
            size = 0
        if not self.users.get(address):
            self.saved += size
            self.most = max(self.most, self.rollouts + self.saved)
        self.users[address] = self.users.get(address, 0) + 1

        def release() -> None:
            self.users[address] -= 1
            if not self.users[address]:
                self.saved -= size

        return Held(tensor.detach(), release)


class MeteredTrainer(Trainer):
    """A run that counts its costs, and ends when the budget for one of them is spent. See `race`.

    Args:
        budget: name of a cost, and how much.
        parts: of the budget; at the end of each a checkpoint is kept.
        reached: called before that, with how many parts are spent, and the adapter on the model.
    """

    def __init__(self, *args, budget: tuple[str, float], parts: int, reached: Callable, **options):
        super().__init__(*args, **options)
        self.unit, self.limit = budget
        self.parts, self.reached, self.queries = parts, reached, 0

    def spent(self, name: str, rows: list[dict] | None = None) -> float:
        """How much was spent until now, or in these rows of metrics.jsonl."""
        values = [row[name] for row in (self.state.metrics if rows is None else rows)]
        return max(values, default=0) if name == "bytes_kept" else sum(values)

    def part(self, rows: list[dict] | None = None) -> int:
        """How many parts of the budget are spent. Part k of n ends at (k / n)²: a curve is steepest at first."""
        share = max(0.0, self.spent(self.unit, rows) / self.limit)
        return min(self.parts, int(share**0.5 * self.parts + 1e-9))

    def plateaued(self, bar) -> bool:
        return self.part() == self.parts

    def train_step(self, bar) -> None:
        self.queries, self.began = 0, time.process_time()
        with Meter(self.model, self.reward.networks) as self.meter:
            super().train_step(bar)

    def collect(self, step: int):
        rollouts = super().collect(step)
        if isinstance(rollouts, list):  # all of them, scored
            self.queries += sum(len(one.rewards) for one in rollouts if one.rewards is not None)
            self.meter.holds(rollouts)
        return rollouts

    def gradients(self, collected: Iterable, may_stop: bool = True) -> dict:
        def seen() -> Iterator:
            for part in collected:
                if part.rewards is None:  # which is scored on the way to its gradient
                    self.queries += len(part.rollout.prompts) * max(1, part.plan.renoise)
                    self.meter.holds([part])
                yield part

        with self.meter.saving():
            return super().gradients(seen(), may_stop)

    def costs(self, seconds: float) -> dict:
        meter = self.meter
        if self.model.device.type == "cpu":
            seconds = (time.process_time() - self.began) / torch.get_num_threads()
        counted = self.queries, meter.calls, meter.backwards, meter.kept
        names = [name for name in COSTS if name != "seconds"]
        return super().costs(seconds) | dict(zip(names, counted, strict=True))

    def validate(self) -> None:
        part = self.part()
        if part > self.part(self.state.metrics[:-1]):
            with self.averaged():
                self.reached(self, part)
            self.save()
