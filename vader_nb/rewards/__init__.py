"""Rewards. Names are imported on first use, so that one reward's libraries are not another's burden."""

import importlib

from .base import Reward, as_reward, conflict, record_parts, reward, statistics, validate_scores

_REWARDS = {
    "action": "action",
    "aesthetic": "heads",
    "aesthetic_hps": "heads",
    "brightness": "pixels",
    "clip_score": "clip",
    "colorfulness": "pixels",
    "compressibility": "pixels",
    "compression": "heads",
    "flow_smoothness": "flow",
    "hps": "clip",
    "image_reward": "image_reward",
    "incompressibility": "pixels",
    "motion_smoothness": "pixels",
    "object_presence": "detection",
    "object_removal": "detection",
    "pickscore": "clip",
    "rainy": "heads",
    "snowy": "heads",
    "temporal_consistency": "vjepa",
    "text_video": "text_video",
}
_HOMES = _REWARDS | {"check": "check", "table": "gallery"}
NAMES = sorted(_REWARDS)
EMBEDDED = (
    "action",
    "aesthetic",
    "aesthetic_hps",
    "hps",
)  # those of which the package holds a tiny one
__all__ = [
    "EMBEDDED",
    "NAMES",
    "Reward",
    "as_reward",
    "conflict",
    "parse",
    "reward",
    "statistics",
    *sorted(_HOMES),
]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


METHODS = ("towards", "capped", "normalized")  # of a reward, in an expression


def parse(expression: str, tiny: bool = False, outline: bool = False) -> Reward:
    """The reward of an expression such as `hps + 0.1 * aesthetic` or `aesthetic().towards(9)`.

    Only names of `NAMES`, numbers, strings, + - *, calls and the methods of `METHODS` are understood; nothing else in
    the text can run. tiny: a name without arguments means the embedded reward, where there is one. outline: only
    networks' architectures, for fake tensors (see `rewards.outline`). Raises ValueError that points at what was not
    understood.
    """
    import ast
    import functools
    import importlib
    import operator

    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def load(name, *args, **options):
        if tiny and name in EMBEDDED and not args:
            options = {"checkpoint": "tiny"} | options
        maker = importlib.import_module(f".{'outline' if outline else _REWARDS[name]}", __name__)
        return getattr(maker, name)(*args, **options)

    def call(function, node):
        args = [build(value) for value in getattr(node, "args", [])]
        try:
            return function(*args, **{k.arg: build(k.value) for k in getattr(node, "keywords", [])})
        except TypeError as error:  # an argument that lacks, or that it does not take
            raise ValueError(
                f"in {ast.unparse(node)!r} of the reward {expression!r}: {error}"
            ) from error

    def build(node):
        match node:
            case ast.Constant(value=int() | float() | str()):
                return node.value
            case ast.Name(id=name) if name in NAMES:
                return call(functools.partial(load, name), node)
            case ast.Call(func=ast.Name(id=name)) if name in NAMES:
                return call(functools.partial(load, name), node)
            case ast.Call(func=ast.Attribute(value=inner, attr=method)) if method in METHODS:
                return call(getattr(build(inner), method), node)
            case ast.BinOp() if type(node.op) in operators:
                return operators[type(node.op)](build(node.left), build(node.right))
            case ast.UnaryOp(op=ast.USub()):
                return -build(node.operand)
        raise ValueError(
            f"cannot read {ast.unparse(node)!r} in reward {expression!r}; known rewards: {', '.join(NAMES)}"
        )

    result = build(syntax(expression))
    if not isinstance(result, Reward):
        raise ValueError(
            f"{expression!r} is a number, not a reward; known rewards: {', '.join(NAMES)}"
        )
    return result


def syntax(expression: str):
    """The syntax tree of an expression. Raises ValueError for what is none, or has an unknown name in it, before anything
    is loaded."""
    import ast

    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        way = "write for instance hps + 0.1 * aesthetic"
        raise ValueError(f"cannot read the reward {expression!r}: {error.msg}; {way}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in NAMES:
            raise ValueError(
                f"unknown reward {node.id!r} in {expression!r}; known rewards: {', '.join(NAMES)}"
            )
    return tree
