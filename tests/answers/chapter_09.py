NOTEBOOK = "09_playground"

MIX = """
def mix(first, second, w1, w2):
    B = torch.cat([{} * first[0], {} * second[0]], dim=1)
    return B, torch.cat([{} * first[1], {} * second[1]], dim=0)
"""
ACTIVE = "def active(start, end, n):\n    return [{} for i in range(n)]\n"
RAW = "def raw_weights(weights, means, stds):\n    return [{} for w, m, s in zip(weights, means, stds)]\n"

ANSWERS = {
    "mix": (
        [
            MIX.format("w1", "w2", 1, 1),
            MIX.format(1, 1, "w1", "w2"),
            MIX.format("w1**0.5", "w2**0.5", "w1**0.5", "w2**0.5"),
            "def mix(first, second, w1, w2):\n"
            "    B = torch.hstack([w2 * second[0], w1 * first[0]])\n"
            "    return B, torch.vstack([second[1], first[1]])\n",
        ],
        {
            "def mix(first, second, w1, w2):\n"
            "    return w1 * first[0] + w2 * second[0], first[1] + second[1]\n": "mixed products",
            MIX.format("w1", "w2", "w1", "w2"): "weighted sum",
            MIX.format(1, 1, 1, 1): "weighted sum",
            MIX.format("w2", "w1", 1, 1): "weighted sum",
            "def mix(first, second, w1, w2):\n"
            "    return first[1].T, w1 * first[0].T\n": "has shape (5, 6)",
        },
    ),
    "active": (
        [
            ACTIVE.format("start <= i / n and (i + 1) / n <= end"),
            ACTIVE.format("not (i / n < start or (i + 1) / n > end)"),
        ],
        {
            ACTIVE.format("True"): "the second half",
            ACTIVE.format("start <= i / n"): "ends after 0.7",
            ACTIVE.format("start <= i / n < end"): "ends after 0.7",
            ACTIVE.format("i / n >= start and i < round(end * n)"): "ends after 0.7",
            ACTIVE.format("round(start * n) <= i and (i + 1) / n <= end"): "begins before 0.3",
        },
    ),
    "raw_weights": (
        [RAW.format("w / s"), RAW.format("w * (1 / s)")],
        {
            RAW.format("w"): "rises by",
            RAW.format("w * s"): "rises by",
            RAW.format("(w - m) / s"): "rises by",
        },
    ),
}
