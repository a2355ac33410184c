NOTEBOOK = "08_many_gpus"

ORDERS = """
def orders(norms, limit):
    {}
"""
MEANS = ORDERS.format(
    "clipped = [min(n, limit) for n in norms]\n"
    "    return min(sum(norms) / len(norms), limit), sum(clipped) / len(clipped)"
)

AVERAGE = """
def average(parameters, bad=False):
    import torch.distributed as dist

    for p in parameters:
        if p.grad is None or bad:
            p.grad = torch.zeros_like(p)
    flag = torch.full((1,), float(bad), device=parameters[0].device)
    message = torch.cat([*(p.grad.flatten() for p in parameters), flag])
    dist.all_reduce(message)
    *sums, flag = message.split([*(p.numel() for p in parameters), 1])
    trouble = flag.item() > 0
    for p, total in zip(parameters, sums):
        p.grad = torch.zeros_like(p) if trouble else total.view_as(p) / dist.get_world_size()
    return trouble
"""
GATHERED = """
def average(parameters, bad=False):
    import torch.distributed as dist

    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mine = torch.cat([torch.tensor([float(bad)]), *(part.flatten() for part in parts)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone)
    trouble = bool(table[:, 0].any())
    mean = table[:, 1:].mean(0) * 0 if trouble else table[:, 1:].mean(0)
    mean = mean.nan_to_num(0)
    for p in parameters:
        p.grad, mean = mean[: p.numel()].view_as(p).clone(), mean[p.numel() :]
    return trouble
"""
ONE_BY_ONE = """
def average(parameters, bad=False):
    import torch.distributed as dist

    flag = torch.tensor(float(bad))
    dist.all_reduce(flag)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None or bad else p.grad
        dist.all_reduce(p.grad)
        p.grad *= (flag == 0) / dist.get_world_size()
    return flag > 0
"""

SEEDS = """
def my_seeds(seed, step, rank, processes, clips=8):
    {}
"""
SHARED = SEEDS.format(
    "generator = torch.Generator().manual_seed(seed * 10**6 + step)\n"
    "    return torch.randint(2**31, (clips,), generator=generator)[rank::processes].tolist()"
)

ANSWERS = {
    "orders": (
        [
            MEANS,
            ORDERS.format(
                "norms = torch.tensor(norms)\n"
                "    return norms.mean().clamp(max=limit), norms.clamp(max=limit).mean()"
            ),
            ORDERS.format(
                "n = len(norms); return min(limit, sum(norms) / n), sum(min(x, limit) / n for x in norms)"
            ),
        ],
        {
            ORDERS.format("return 0.0, 0.0"): "the mean, clipped",
            ORDERS.format("return sum(norms) / len(norms), limit"): "the mean, clipped",
            ORDERS.format("return limit, limit"): "clipped first",
            MEANS.replace("/ len(norms)", "").replace("/ len(clipped)", "/ 2"): "below the limit",
            MEANS.replace("/ len(norms)", "/ 2").replace("/ len(clipped)", "/ 2"): "norms 3",
        },
    ),
    "average": (
        [AVERAGE, GATHERED, AVERAGE.replace("is None or bad", "is None")],
        {
            "def average(parameters, bad=False): return bad": "process 0 has",
            AVERAGE.replace(" / dist.get_world_size()", ""): "process 0 has",
            AVERAGE.replace(" / dist.get_world_size()", " / 2"): "process 0 has",
            ONE_BY_ONE: "3 messages",
            AVERAGE.replace("return trouble", "return bad"): "is any process in trouble",
            AVERAGE.replace("torch.zeros_like(p) if trouble else ", ""): "process 0 in trouble",
            AVERAGE.replace(
                "    for p in parameters:\n        if p.grad is None or bad:",
                "    parameters = [p for p in parameters if p.grad is not None]\n"
                "    for p in parameters:\n        if bad:",
            ): "process",
            AVERAGE.replace(
                "    flag = torch.full", "    if bad:\n        return True\n    flag = torch.full"
            ): "in vain",
        },
    ),
    "my_seeds": (
        [
            SHARED,
            SEEDS.format(
                "import random\n"
                "    everything = random.Random(f'{seed} {step}').sample(range(2**31), clips)\n"
                "    share = clips // processes\n"
                "    return everything[rank * share : (rank + 1) * share]"
            ),
            SEEDS.format(
                "first = (seed * 10**6 + step) * clips\n"
                "    return list(range(first + rank, first + clips, processes))"
            ),
        ],
        {
            SEEDS.format(
                "generator = torch.Generator().manual_seed(seed * 10**6 + step + rank)\n"
                "    return torch.randint(2**31, (clips // processes,), generator=generator).tolist()"
            ): "other clips than one",
            SHARED.replace("[rank::processes]", ""): "clips",
            SHARED.replace("[rank::processes]", "[: clips // processes]"): "the same clip",
            SHARED.replace("seed * 10**6 + step", "seed"): "clips of its own",
            SHARED.replace("seed * 10**6 + step", "step"): "clips of its own",
            SHARED.replace(", generator=generator", ""): "clip",
            SEEDS.format("return list(range(rank, clips, processes))"): "clips of its own",
        },
    ),
}
