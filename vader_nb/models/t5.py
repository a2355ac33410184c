"""The text of CogVideoX and LTX-Video: T5's states of a text and of the padding after it."""

from typing import Any

import torch

from .base import cached, warn_truncated
from .parts import ModelOfParts
from .texts import TextOnDisk

# T5 1.1 XXL's encoder, for `from_config`; what is missing here is the class's own default.
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_XXL |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CACHED_PROMPTS = 250  # texts whose states a model keeps: 1 or 2 MB each in half precision


class TextByT5(TextOnDisk, ModelOfParts):
    """A model with a `T5EncoderModel`; `__init__` calls `set_text_encoder`."""

    masked_text = False  # whether T5 does not see the padding

    def set_text_encoder(self, text_encoder: Any, tokenizer: Any, length: int) -> None:
        """length: tokens of a text, the padding included."""
        self.text_encoder, self.tokenizer, self.text_length = text_encoder, tokenizer, length
        self._embeddings: dict[str, torch.Tensor] = {}  # on the CPU

    def text_states(self, prompts) -> dict[str, torch.Tensor]:
        """branch -> states (B, tokens, width) of its texts, on the CPU."""
        self.encode_texts(prompts)
        columns = self.texts(prompts)
        both = columns["prompt"] + columns["negative"]
        known = cached(self._embeddings, both, self._embed, CACHED_PROMPTS)
        return {
            branch: torch.stack([known[text] for text in texts])
            for branch, texts in columns.items()
        }

    @torch.no_grad()
    def _embed(self, text: str) -> torch.Tensor:
        """The text encoder's states (tokens, width), on the CPU. One text at a time, as ModelScope's."""
        self.onload(self.text_encoder)
        warn_truncated(self.tokenizer, text, self.text_length)
        tokens = self.tokens([text]).to(self.device)
        mask = tokens.attention_mask if self.masked_text else None
        states = self.text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state
        return states[0].to("cpu", self.dtype)

    def tokens(self, texts: list[str]) -> Any:
        """Ids and mask (B, tokens), filled up to the same length."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(texts, max_length=self.text_length, **options)
