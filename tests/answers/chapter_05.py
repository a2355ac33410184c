NOTEBOOK = "05_lora"

FUSE = """
def fuse(adapted):
    base = adapted.base
    {}
    return fused
"""
FUSED = FUSE.format(
    "fused = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)\n"
    "    fused.weight.data = base.weight + adapted.scaling * adapted.B @ adapted.A\n"
    "    if base.bias is not None:\n"
    "        fused.bias.data = base.bias.clone()"
)
BY_COLUMNS = FUSE.format(  # W's columns are what it makes of the unit vectors
    "fused = nn.Linear(base.in_features, base.out_features)\n"
    "    origin = adapted(torch.zeros(base.in_features))\n"
    "    fused.weight.data = (adapted(torch.eye(base.in_features)) - origin).T\n"
    "    fused.bias.data = origin"
)

INJECT = """
from contextlib import contextmanager

@contextmanager
def injected(denoiser, endings, rank=4, alpha=4.0):
    found = {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{e}") for e in endings)
    }
    learned = {p: p.requires_grad for p in denoiser.parameters()}

    def put(name, module):
        parent, _, own = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), own, module)

    denoiser.requires_grad_(False)
    layers = {name: LoRA(module, rank, alpha) for name, module in found.items()}
    try:
        for name, layer in layers.items():
            put(name, layer)
        yield layers
    finally:
        for name, module in found.items():
            put(name, module)
        for p, before in learned.items():
            p.requires_grad_(before)
"""
BY_PARENTS = """
import contextlib

@contextlib.contextmanager
def injected(denoiser, endings, rank=4, alpha=4.0):
    with contextlib.ExitStack() as undo:
        for p in denoiser.parameters():
            undo.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        layers = {}
        for path, parent in list(denoiser.named_modules()):
            for own, child in list(parent.named_children()):
                name = f"{path}.{own}" if path else own
                parts = name.split(".")
                hit = any(parts[-len(e.split(".")) :] == e.split(".") for e in endings)
                if hit and isinstance(child, nn.Linear):
                    layers[name] = parent._modules[own] = LoRA(child, rank=rank, alpha=alpha)
                    undo.callback(parent._modules.__setitem__, own, child)
        yield layers
"""
WITHOUT_TRY = INJECT.replace("    try:\n", "    if True:\n").replace(
    "    finally:\n        for name, module in found",
    "    if True:\n        for name, module in found",
)

BEST = """
def best(change, rank):
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    return {}
"""
BY_EIGENVECTORS = """
def best(change, rank):
    A = torch.linalg.eigh(change.T @ change).eigenvectors[:, -rank:].T
    return A, change @ A.T
"""

ANSWERS = {
    "fuse": (
        [FUSED, BY_COLUMNS],
        {
            FUSE.format("fused = base"): "outputs differ",
            FUSE.format(
                "base.weight.data += adapted.scaling * adapted.B @ adapted.A; fused = base"
            ): "original layer",
            FUSED.replace("adapted.scaling * ", ""): "outputs differ",
            FUSED.replace(
                "        fused.bias.data = base.bias.clone()", "        pass"
            ): "with a bias",
            FUSED.replace("bias=base.bias is not None", "bias=True"): "without a bias",
            "def fuse(adapted): return adapted": "nn.Linear",
        },
    ),
    "injected": (
        [INJECT, BY_PARENTS],
        {
            INJECT.replace("yield layers", "yield {}"): "no layers",
            INJECT.replace('f".{name}".endswith(f".{e}")', "name.endswith(e)"): "auto_q",
            INJECT.replace("isinstance(module, nn.Linear) and ", ""): "raised",
            INJECT.replace(
                "            put(name, layer)", "            pass"
            ): "not that which you yield",
            INJECT.replace("denoiser.requires_grad_(False)", "pass"): "these can learn",
            INJECT.replace("LoRA(module, rank, alpha)", "LoRA(module, rank)"): "alpha",
            INJECT.replace("            put(name, module)", "            pass"): "other layers",
            INJECT.replace(
                "            p.requires_grad_(before)", "            pass"
            ): "requires_grad",
            INJECT.replace("p.requires_grad_(before)", "p.requires_grad_(True)"): "requires_grad",
            WITHOUT_TRY: "after a failure",
        },
    ),
    "best": (
        [
            BEST.format("Vh[:rank], U[:, :rank] * S[:rank]"),
            BEST.format("S[:rank, None] * Vh[:rank], U[:, :rank]"),
            BEST.format("S[:rank, None].sqrt() * Vh[:rank], (U @ torch.diag(S.sqrt()))[:, :rank]"),
            BY_EIGENVECTORS,
        ],
        {
            BEST.format("torch.zeros(rank, 5), torch.zeros(8, rank)"): "better",
            BEST.format("Vh[:rank], U[:, :rank]"): "better",
            BEST.format("S[:rank, None] * Vh[:rank], U[:, :rank] * S[:rank]"): "better",
            BEST.format("Vh[-rank:], U[:, -rank:] * S[-rank:]"): "better",
            BEST.format("U[:, :rank] * S[:rank], Vh[:rank]"): "shapes",
            BEST.format("change[:rank], torch.eye(8)[:, :rank]"): "better",
        },
    ),
}
