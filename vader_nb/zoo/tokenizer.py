"""The tiny models' tokenizer: CLIP's byte-pair encoding, with merges for the words of the tiny world only.

A word of the world is one token; any other text is split into its bytes, so every prompt can be
encoded, as with the big vocabulary (49,408 tokens there, a few hundred here).
"""

import json
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from . import world

CONTEXT_LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"


def _bytes() -> list[str]:
    """The 256 printable characters that stand for the 256 bytes, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in printable]
    return [chr(n) for n in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding's training: join the most frequent neighbors, until every word is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        (left, right), _ = pairs.most_common(1)[0]
        merges.append((left, right))
        for word in pieces:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return merges


def files() -> dict[str, str]:
    """The classic pair of a CLIP tokenizer: vocabulary and merges."""
    words = dict.fromkeys(word for spec in world.specs() for word in spec.caption.split())
    merges = learn_merges(list(words))
    tokens = _bytes()
    tokens += [token + "</w>" for token in tokens]
    tokens += [left + right for left, right in merges]
    # The end token has the largest id, as CLIP's text pooling (argmax) expects.
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), START, END])}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    return {"vocab.json": json.dumps(vocabulary), "merges.txt": "\n".join(lines) + "\n"}


def build() -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files().items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH)


def save(folder: Path) -> None:
    """Everything that any version of transformers looks for: the older ones read the classic pair."""
    build().save_pretrained(folder)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
