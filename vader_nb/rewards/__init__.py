"""Rewards. Names are imported on first use, so that one reward's libraries are not another's burden."""

import sys

from .._face import install
from .base import Reward, as_reward, reward

_HOMES = {
    "action": "action",
    "aesthetic": "clip",
    "brightness": "pixels",
    "check": "check",
    "colourfulness": "pixels",
    "compressibility": "pixels",
    "hps": "clip",
    "incompressibility": "pixels",
    "motion_smoothness": "pixels",
}
NAMES = sorted(set(_HOMES) - {"check"})
__all__ = ["NAMES", "Reward", "as_reward", "parse", "reward", *sorted(_HOMES)]


install(__name__, _HOMES)


def parse(expression: str) -> Reward:
    """The reward of an expression such as `hps + 0.1 * aesthetic` or `aesthetic().towards(9)`.

    Only names of `NAMES`, numbers, strings, + - *, calls and `.towards(…)` are understood; nothing else in the
    text can run. Raises ValueError that points at what was not understood.
    """
    import ast
    import operator

    here = sys.modules[__name__]
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def build(node):
        match node:
            case ast.Constant(value=int() | float() | str()):
                return node.value
            case ast.Name() if node.id in NAMES:
                return getattr(here, node.id)()
            case ast.Call(func=ast.Name(id=name)) if name in NAMES:
                return getattr(here, name)(*map(build, node.args), **{k.arg: build(k.value) for k in node.keywords})
            case ast.Call(func=ast.Attribute(value=inner, attr="towards"), args=[target]):
                return build(inner).towards(build(target))
            case ast.BinOp() if type(node.op) in operators:
                return operators[type(node.op)](build(node.left), build(node.right))
            case ast.UnaryOp(op=ast.USub()):
                return -build(node.operand)
        raise ValueError(
            f"cannot read {ast.unparse(node)!r} in reward {expression!r}; known rewards: {', '.join(NAMES)}"
        )

    try:
        result = build(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"cannot read the reward {expression!r}: {error.msg}") from error
    if not isinstance(result, Reward):
        raise ValueError(f"{expression!r} is a number, not a reward; known rewards: {', '.join(NAMES)}")
    return result
