NOTEBOOK = "11_one_gpu"

WEIGHTS = "def weights_gib(frozen, learning):\n    return {}\n"

SCALER = """
class Scaler:
    def __init__(self, start=2.0**16, patience=3):
        self.factor, self.patience, self.good = start, patience, 0

    def scale(self, loss):
        return loss * self.factor

    def step(self, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad /= self.factor
        if all(p.grad.isfinite().all() for p in parameters):
            optimizer.step()
            self.good += 1
        else:
            self.factor, self.good = self.factor / 2, 0
        if self.good == self.patience:
            self.factor, self.good = self.factor * 2, 0
        optimizer.zero_grad()
"""
BY_TORCH = """
class Scaler:
    def __init__(self, start=2.0**16, patience=3):
        self.inner = torch.amp.GradScaler(
            "cpu", init_scale=start, growth_interval=patience, growth_factor=2.0, backoff_factor=0.5
        )

    @property
    def factor(self):
        return self.inner.get_scale()

    def scale(self, loss):
        return self.inner.scale(loss)

    def step(self, optimizer):
        self.inner.step(optimizer)
        self.inner.update()
        optimizer.zero_grad()
"""
BEFORE_UNSCALING = SCALER.replace(
    """        for p in parameters:
            p.grad /= self.factor
        if all(p.grad.isfinite().all() for p in parameters):
            optimizer.step()
""",
    """        if all(bool(torch.isfinite(p.grad).all()) for p in parameters):
            for p in parameters:
                p.grad = p.grad / self.factor
            optimizer.step()
""",
)

CALLS = "def calls_per_clip(steps, K):\n    return {}\n"

ANSWERS = {
    "weights_gib": (
        [
            WEIGHTS.format("(2 * frozen + 16 * learning) / 2**30"),
            WEIGHTS.format("frozen * 2 / 1024**3 + 4 * learning * 4 / 1024**3"),
        ],
        {
            WEIGHTS.format("(4 * frozen + 16 * learning) / 2**30"): "is 2 bytes",
            WEIGHTS.format("(2 * frozen + 4 * learning) / 2**30"): "that is the weight alone",
            WEIGHTS.format("(2 * frozen + 12 * learning) / 2**30"): "you count 12",
            WEIGHTS.format("(2 * frozen + 16 * learning) / 1e9"): "is 2 bytes",
        },
    ),
    "Scaler": (
        [SCALER, BEFORE_UNSCALING, BY_TORCH],
        {
            SCALER.replace("loss * self.factor", "loss"): "a loss of 2",
            SCALER.replace("p.grad /= self.factor", "pass"): "times as long",
            SCALER.replace("        optimizer.zero_grad()\n", ""): "carries the first one's",
            SCALER.replace("if all(", "if True or all("): "must not reach the weights",
            SCALER.replace(
                "for p in parameters):\n            opt",
                "for p in parameters[-1:]):\n            opt",
            ): ("no weight may change"),
            SCALER.replace("self.factor / 2, 0", "self.factor, 0"): "half of 8",
            SCALER.replace("self.factor / 2, 0", "self.factor / 2, self.good"): "in a row",
            SCALER.replace("self.factor * 2, 0", "self.factor, 0"): "three good steps",
        },
    ),
    "calls_per_clip": (
        [CALLS.format("2 * (steps + K)"), CALLS.format("2 * steps + 2 * K")],
        {
            CALLS.format("2 * steps"): "computed once more",
            CALLS.format("2 * steps + K"): "has two branches, too",
            CALLS.format("steps + K"): "without learning",
            CALLS.format("2 * steps + 2 * min(K, 1)"): "take 110",
        },
    ),
}
