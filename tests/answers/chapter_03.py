NOTEBOOK = "03_differentiable_rewards"

SIMILARITY = """
def similarity(frames, prompts):
    pictures, sentence = towers.image(frames), towers.text(prompts)
    return {}
"""
FIT = """
def fit(x, y, penalty):
    middle = x.mean(0)
    x = (x - middle).double()
    grown = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(grown, x.T @ (y - y.mean()).double()).float()
    return lambda new: (new - middle) @ weight + y.mean()
"""
FOLDS = (
    FIT
    + """
def train_head(vectors, ratings):
    parts = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(0)).chunk(4)
    errors = {}
    for penalty in (0.001, 0.01, 0.1, 1.0, 10.0):
        errors[penalty] = 0.0
        for i, kept_back in enumerate(parts):
            rest = torch.cat(parts[:i] + parts[i + 1 :])
            head = fit(vectors[rest], ratings[rest], penalty)
            errors[penalty] += error(head(vectors[kept_back]), ratings[kept_back])
    return fit(vectors, ratings, min(errors, key=errors.get))
"""
)
RIDGE = FIT + "\ntrain_head = lambda vectors, ratings: fit(vectors, ratings, {})"
ADAM = """
def train_head(vectors, ratings):
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay={})
    rest, kept = vectors[:90], vectors[90:]
    best = (1e9, None)
    for _ in range({}):
        loss = (head(rest).squeeze(-1) - ratings[:90]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            off = (head(kept).squeeze(-1) - ratings[90:]).square().mean().item()
        if off < best[0]:
            best = off, (head.weight.detach().clone(), head.bias.detach().clone())
    return lambda x: {}
"""
LAST = "head(x).squeeze(-1)"
BEST = "(x @ best[1][0].T + best[1][1]).squeeze(-1)"
FEWER = """
def train_head(vectors, ratings):
    middle = vectors.mean(0)
    directions = torch.linalg.svd(vectors - middle, full_matrices=False).Vh[:{}]
    x = (vectors - middle) @ directions.T
    weight = torch.linalg.lstsq(x, (ratings - ratings.mean())[:, None]).solution[:, 0]
    return lambda new: (new - middle) @ directions.T @ weight + ratings.mean()
"""
BRIGHT = """
def few_bright_pixels(frames, prompts):
    return -({}).mean(dim=(1, 2, 3))
"""

ANSWERS = {
    "similarity": (
        [
            SIMILARITY.format("(pictures * sentence.unsqueeze(1)).sum(-1).mean(1)"),
            SIMILARITY.format("torch.einsum('bfd,bd->b', pictures, sentence) / frames.shape[1]"),
            SIMILARITY.format(
                "torch.cosine_similarity(pictures, sentence[:, None], dim=-1).mean(1)"
            ),
            SIMILARITY.format("(pictures.mean(1) * sentence).sum(-1)"),
            "similarity = rewards.hps('tiny').to(model.device)",
        ],
        {
            "similarity = lambda frames, prompts: None": "must return",
            SIMILARITY.format("frames.mean(dim=(1, 2, 3, 4))"): "look at the prompts",
            SIMILARITY.format("(pictures * sentence.unsqueeze(1)).sum(-1)"): "one number per clip",
            SIMILARITY.format("(pictures * sentence.unsqueeze(1)).sum(-1).sum(1)"): "the package",
            SIMILARITY.format("(pictures * sentence.unsqueeze(1)).mean(-1).mean(1)"): "the package",
            SIMILARITY.format("(pictures[:, 0] * sentence).sum(-1)"): "the package",
            SIMILARITY.format("-(pictures.mean(1) * sentence).sum(-1)"): "the package",
            SIMILARITY.format("(pictures.mean(1) * sentence).sum(-1).detach()"): "trained on",
            SIMILARITY.format("(pictures.mean(1) @ sentence.T).mean(1)"): "look at the prompts",
        },
    ),
    "train_head": (
        [
            FOLDS,
            RIDGE.format(0.1),
            ADAM.format(0, 1500, BEST),
            ADAM.format(0, 100, LAST),
            FEWER.format(10),
        ],
        {
            "train_head = lambda vectors, ratings: lambda x: 5.5 + 0 * x.sum(-1)": "not learned yet",
            "train_head = lambda vectors, ratings: lambda x: 0 * x.sum(-1) + ratings.mean()": "not learned",
            "train_head = lambda vectors, ratings: 5.5": "must return a function",
            RIDGE.format(1e-8): "learned the noise",
            RIDGE.format(1e3): "not learned yet",
            ADAM.format(0, 4000, LAST): "learned the noise",
            FEWER.format(64): "learned the noise",
            RIDGE.format(0.1) + "(vectors)": "must return a function",
            FOLDS.replace("(new - middle)", "(new - new.mean(0))"): "trained on",
            FOLDS.replace("@ weight +", "@ weight[:, None] +"): "need ratings",
            FOLDS.replace(
                "return lambda new: (new", "return lambda new: (new.detach()"
            ): "no gradient",
        },
    ),
    "few_bright_pixels": (
        [
            BRIGHT.format("torch.sigmoid(10 * (frames.mean(dim=2) - 0.5))"),
            BRIGHT.format("torch.sigmoid(20 * (frames.mean(dim=2) - 0.5))"),
            BRIGHT.format("0.5 + 0.5 * torch.tanh(6 * (frames.mean(dim=2) - 0.5))"),
            BRIGHT.format("torch.atan(12 * (frames.mean(dim=2) - 0.5)) / 3.1416 + 0.5"),
        ],
        {
            BRIGHT.format("(frames.mean(dim=2) > 0.5).float()"): "somewhere it is flat",
            BRIGHT.format("frames.mean(dim=2)"): "all dark should score",
            BRIGHT.format("(1.1 * frames.mean(dim=2) - 0.05)"): "faster than elsewhere",
            BRIGHT.format(
                "torch.sigmoid(10 * (0.5 - frames.mean(dim=2)))"
            ): "all dark should score",
            BRIGHT.format("torch.sigmoid(frames.mean(dim=2) - 0.5)"): "all dark should score",
            BRIGHT.format("((frames.mean(dim=2) - 0.5) * 30 + 0.5).clamp(0, 1)"): "flat",
            BRIGHT.format("torch.sigmoid(10 * (frames - 0.5))"): "one number per clip",
        },
    ),
}
