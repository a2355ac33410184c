"""The text of Wan's families: UMT5's states, then zeros, without a mask for the transformer."""

from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch.nn.functional import pad

from ..hub import DummyTokenizer
from .base import Conditioning, cached, warn_truncated
from .parts import ModelOfParts
from .texts import TextOnDisk

TEXT_LENGTH = 512  # tokens that the transformer sees
CACHED_PROMPTS = 1000  # texts whose states a model keeps: 8 kB per token in half precision


class TextByUMT5(TextOnDisk, ModelOfParts):
    """A model with a `UMT5EncoderModel`; `__init__` calls `set_text_encoder`."""

    def set_text_encoder(self, text_encoder: Any, tokenizer: Any) -> None:
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        unknown = isinstance(tokenizer, DummyTokenizer)
        self.text_length = min(TEXT_LENGTH, TEXT_LENGTH if unknown else tokenizer.model_max_length)
        self._embeddings: dict[str, torch.Tensor] = {}  # on the CPU, without padding

    def texts(self, prompts) -> dict[str, list[str]]:
        columns = super().texts(prompts)
        return {branch: [prompt_clean(text) for text in texts] for branch, texts in columns.items()}

    def encode(self, prompts, sampling: Any = None, generators=None) -> Conditioning:
        self.encode_texts(prompts)
        texts = self.texts(prompts)
        both = texts["prompt"] + texts["negative"]
        known = cached(self._embeddings, both, self._embed, CACHED_PROMPTS)
        rows = {branch: [known[text] for text in column] for branch, column in texts.items()}
        return Conditioning({branch: self._padded(column) for branch, column in rows.items()})

    def _padded(self, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        padded = [pad(row, (0, 0, 0, self.text_length - len(row))) for row in rows]
        return {"encoder_hidden_states": torch.stack(padded).to(self.device)}

    @torch.no_grad()
    def _embed(self, text: str) -> torch.Tensor:
        """The text encoder's states (tokens, width), on the CPU; without padding, which it would not see."""
        self.onload(self.text_encoder)
        warn_truncated(self.tokenizer, text, self.text_length)
        options = {"truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(text, max_length=self.text_length, **options)
        states = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state[0]
        return states.to("cpu", self.dtype)
