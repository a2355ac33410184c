NOTEBOOK = "12_fair_race"

ALL_WAYS = """
def best_of(scores, n):
    from itertools import combinations

    ways = list(combinations(range(scores.shape[1]), n))
    return sum(scores[:, list(way)].max(dim=1).values.mean().item() for way in ways) / len(ways)
"""
BY_RANK = """
def best_of(scores, n):
    from math import comb

    count = scores.shape[1]
    weights = torch.tensor([comb(k, n - 1) / comb(count, n) for k in range(count)])
    return (scores.sort(dim=1).values * weights).sum(dim=1).mean()
"""
PLAIN = """
def best_of(scores, n):
    return {}
"""

POLICY = """
def policy_gradient(theta, reward, noise):
    x = torch.zeros_like(noise[0])
    states = [x]
    with torch.no_grad():
        for epsilon in noise:
            x = x + theta + SIGMA * epsilon
            states.append(x)
        scores = reward(x)
    advantage = (scores - scores.mean()) / scores.std(correction=0)
    theta = theta.detach().requires_grad_()
    loss = 0
    for before, after in zip(states, states[1:]):
        log_prob = -((after - before - theta) ** 2).sum(1) / (2 * SIGMA**2)
        loss = loss - (advantage * log_prob).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    return gradient
"""
BY_HAND = """
def policy_gradient(theta, reward, noise):
    x = (theta + SIGMA * noise).sum(0)
    scores = reward(x)
    advantage = (scores - scores.mean()) / scores.std()
    return -(advantage[:, None] * noise.sum(0) / SIGMA).mean(0)
"""
BY_NORMAL = POLICY.replace(
    "-((after - before - theta) ** 2).sum(1) / (2 * SIGMA**2)",
    "torch.distributions.Normal(before + theta, SIGMA).log_prob(after).sum(1)",
)
ADVANTAGE = "(scores - scores.mean()) / scores.std(correction=0)"
ANEW = """
def policy_gradient(theta, reward, noise):
    theta = theta.detach().requires_grad_()
    x, loss = torch.zeros_like(noise[0]), 0
    for epsilon in noise:
        after = x + theta + SIGMA * epsilon
        loss = loss + ((after - x - theta) ** 2).sum(1)
        x = after
    scores = reward(x)
    loss = ((scores - scores.mean()) / scores.std() * loss).mean()
    return torch.autograd.grad(loss, theta)[0]
"""

UNTIL = """
def spent_until(spent, scores, level):
    import math

    if scores[0] >= level:
        return spent[0]
    for before, after, low, high in zip(spent, spent[1:], scores, scores[1:]):
        if high >= level:
            return before + (after - before) * (level - low) / (high - low)
    return math.inf
"""
BY_FIRST = """
def spent_until(spent, scores, level):
    i = next((i for i, score in enumerate(scores) if score >= level), None)
    if i is None:
        return float("inf")
    if i == 0:
        return 0.0
    share = (level - scores[i - 1]) / (scores[i] - scores[i - 1])
    return (1 - share) * spent[i - 1] + share * spent[i]
"""

ANSWERS = {
    "best_of": (
        [ALL_WAYS, BY_RANK],
        {
            PLAIN.format("scores[:, :n].max(dim=1).values.mean().item()"): "the best of one",
            PLAIN.format("scores.max(dim=1).values.mean().item()"): "the best of one",
            PLAIN.format("scores.mean().item()"): "of all of them",
            PLAIN.format("scores.flatten().sort().values[-n:].mean().item()"): "of all of them",
        },
    ),
    "policy_gradient": (
        [POLICY, BY_HAND, BY_NORMAL],
        {
            POLICY.replace("return gradient", "return -gradient"): "the sign",
            POLICY.replace(ADVANTAGE, "scores"): "direction is wrong",
            POLICY.replace(ADVANTAGE, "scores - scores.mean()"): "times the known one",
            POLICY.replace("(advantage * log_prob).mean()", "(advantage * log_prob).sum()"): "6.00",
            POLICY.replace(" / (2 * SIGMA**2)", ""): "times the known one",
            POLICY.replace("loss = loss - ", "loss = -"): "direction is wrong",
            POLICY.replace(".sum(1) / ", ".mean(1) / "): "0.33 times",
            ANEW: "the gradient is zero",
        },
    ),
    "spent_until": (
        [UNTIL, BY_FIRST],
        {
            UNTIL.replace(
                "return before + (after - before) * (level - low) / (high - low)", "return after"
            ): "the first measured",
            UNTIL.replace("(level - low) / (high - low)", "0.5"): "three quarters",
            UNTIL.replace("return math.inf", "return spent[-1]"): "never reached",
            UNTIL.replace("return spent[0]", "return spent[1]"): "has spent nothing",
            UNTIL.replace(
                "zip(spent, spent[1:], scores, scores[1:])",
                "zip(spent, spent[1:], [0] * 4, scores[1:])",
            ): "0.35 is reached at 300",
        },
    ),
}
