"""Rewards as text: `hps + 0.1 * aesthetic().towards(9)`, `my_rewards.py:blueness`."""

import ast
import importlib
import importlib.util
import operator
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .base import Reward, as_reward

_REWARDS = {
    "blip": "image_reward",
    "classifier": "class_probability",
    "clip": "clip_score hps pickscore",
    "coded": "h264_bytes jpeg_bytes",
    "detection": "object_presence object_removal",
    "dino": "subject_consistency",
    "flow": "flow_smoothness",
    "heads": "aesthetic aesthetic_hps compression rainy snowy",
    "pixels": "brightness colorfulness compressibility incompressibility motion_smoothness",
    "prism": "videoprism",
    "remote": "server",
    "video_align": "video_reward",
    "video_mae": "action",
    "vjepa": "temporal_consistency",
    "vlm": "vlm_yes",
    "xclip": "text_video",
}
MODULES = {name: module for module, names in _REWARDS.items() for name in names.split()}
NAMES = sorted(MODULES)
EMBEDDED = ("action", "aesthetic", "aesthetic_hps", "hps")  # the package holds a tiny one of these
WITHOUT_GRADIENT = ("coded", "remote", "vlm")  # modules
METHODS = ("towards", "capped", "normalized", "renamed")
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_KNOWN = f"known rewards: {', '.join(NAMES)}"
FILE_FUNCTION = re.compile(r"([^\s()*+,'\"]+\.py):(\w+)")
ADDRESS = re.compile(r"(?<!['\"])\bhttps?://[^\s()*+,'\"]+")  # one in quotes is an argument


def parse(expression: str, tiny: bool = False, from_config: bool = False) -> Reward:
    """The reward that an expression describes.

    An expression may hold names of `NAMES`, functions of files (`path/to/file.py:function`, or a
    call of one that returns a reward), addresses of servers (`http://host:port/path`, up to the
    next space), numbers, strings, + - * /, calls, and the methods of `METHODS`. Nothing else in the
    text can run.

    Args:
        tiny: a name without arguments means the embedded reward, where there is one.
        from_config: make networks from their configuration, without weights, for fake tensors.

    Raises:
        ValueError: points at what was not understood.
        FileNotFoundError: weights, or a file of functions, cannot be found.
    """
    result = _Parser(expression, tiny, from_config).parse()
    if not isinstance(result, Reward):
        raise ValueError(f"{expression!r} is a number, not a reward; {_KNOWN}")
    return result


class _Parser:
    def __init__(self, expression: str, tiny: bool, from_config: bool):
        self.expression, self.tiny, self.from_config = expression, tiny, from_config
        self.files: dict[str, re.Match] = {}  # a name in the tree, and the function it stands for

    def parse(self) -> Reward | float | str:
        try:
            text = ADDRESS.sub(lambda match: f"server({match[0]!r})", self.expression.strip())
            text = FILE_FUNCTION.sub(self.placeholder, text)
            tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            hint = "write for instance hps + 0.1 * aesthetic"
            raise ValueError(
                f"cannot read the reward {self.expression!r}: {error.msg}; {hint}"
            ) from error
        for node in ast.walk(tree):  # before any weights are loaded
            if isinstance(node, ast.Name) and node.id not in (*NAMES, *self.files):
                raise ValueError(f"unknown reward {node.id!r} in {self.expression!r}; {_KNOWN}")
            operands = [getattr(node, name, None) for name in ("left", "right", "operand")]
            texts = [part for part in operands if isinstance(getattr(part, "value", None), str)]
            if texts and isinstance(node, ast.expr):
                raise ValueError(
                    f"{self.text(node)!r} in {self.expression!r} does arithmetic with a string"
                )
        return self.build(tree)

    def placeholder(self, match: re.Match) -> str:
        name = f"function_{len(self.files)}_of_a_file"
        self.files[name] = match
        return name

    def build(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str()):
                return node.value
            case ast.Name(id=name) if name in self.files:
                return as_reward(load_function(*self.files[name].groups()))
            case ast.Name():
                return self.call(node, self.make, node.id)
            case ast.Call(func=ast.Name(id=name)):
                return self.call(node, self.make, name)
            case ast.Call(func=ast.Attribute(value=inner, attr=method)) if method in METHODS:
                return self.call(node, getattr(self.build(inner), method))
            case ast.BinOp() if type(node.op) in OPERATORS:
                operands = self.build(node.left), self.build(node.right)
                return self.apply(node, OPERATORS[type(node.op)], *operands)
            case ast.UnaryOp(op=ast.USub()):
                return self.apply(node, operator.neg, self.build(node.operand))
        raise ValueError(f"cannot read {self.text(node)!r} in reward {self.expression!r}; {_KNOWN}")

    def call(self, node: ast.expr, function: Callable, *args) -> Reward:
        """The function's value for the arguments that the node has, if it is a call."""
        args = [*args, *map(self.build, getattr(node, "args", []))]
        options = {word.arg: self.build(word.value) for word in getattr(node, "keywords", [])}
        return self.apply(node, function, *args, **options)

    def apply(self, node: ast.expr, function: Callable, *args, **options) -> Any:
        try:
            return function(*args, **options)
        except (TypeError, ArithmeticError) as error:  # an argument that it does not take
            text = self.text(node)
            raise ValueError(f"in {text!r} of the reward {self.expression!r}: {error}") from error

    def make(self, name: str, *args, **options) -> Reward:
        if name in self.files:
            return as_reward(load_function(*self.files[name].groups())(*args, **options))
        if self.tiny and name in EMBEDDED and not args:
            options = {"checkpoint": "tiny"} | options
        if self.from_config and MODULES[name] in WITHOUT_GRADIENT:
            raise ValueError(f"{name} has no gradient: there is no training step to simulate")
        if self.from_config and MODULES[name] != "pixels":
            options["from_config"] = True
        module = importlib.import_module(f".{MODULES[name]}", __package__)
        return getattr(module, name)(*args, **options)

    def text(self, node: ast.expr) -> str:
        text = ast.unparse(node)
        for name, match in self.files.items():
            text = text.replace(name, match[0])
        return text


def load_function(path: str, name: str) -> Callable:
    """The function `name` of the Python file at `path`, which is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such function.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {path!r} in {Path.cwd()}, to load {name!r} from")
    module_name = f"reward_file_{file.stem}"  # which cannot hide a library
    spec: Any = importlib.util.spec_from_file_location(module_name, file)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(found) or 'none'}")
    return function
