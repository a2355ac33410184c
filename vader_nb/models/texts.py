"""Text encoders of several gigabytes, kept out of memory: loaded only for new texts, once for all of them.

An encoder's states of a text are kept on disk (`text_files`), in a file named by a hash of all that they depend on:
the encoder's files, the token ids (and so the tokenizer), and what affects rounding: dtypes, device type, versions.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput

from ..offload import CPUOffloader, is_sharded
from ..prompts import Prompt
from . import text_files
from .base import VideoModel, cached, exclusive

LARGE = 1e9  # parameters; CLIP's largest has 0.7e9, T5-xxl 4.8e9
HUB = ("token", "cache_dir", "local_files_only", "revision")  # arguments of a download
IN_MEMORY = 250  # texts that are new at once, for the steps that follow
CPU = torch.device("cpu")


class TextOnDisk(VideoModel):
    """A family whose text encoder may stay on disk. Its `encode` calls `encode_texts` first."""

    large_text_encoder = True
    text_encoder: Any
    _embeddings: dict[str, torch.Tensor]  # on the CPU
    _embed: Callable[[str], torch.Tensor]  # the states of one text

    def to(self, *args, **kwargs) -> Any:
        super().to(*args, **kwargs)
        self._embeddings.clear()
        return self

    @property
    def keeps_texts(self) -> bool:
        return isinstance(self.text_encoder, StoredEncoder)

    @exclusive
    def encode_texts(self, prompts: Sequence[str | Prompt]) -> None:
        if not self.keeps_texts:
            return
        texts = dict.fromkeys(text for column in self.texts(prompts).values() for text in column)
        new = [text for text in texts if text not in self._embeddings]
        stand_in = self.text_encoder
        with contextlib.ExitStack() as stack:
            stand_in.reader = functools.cache(lambda device: self._read_alone(device, stack))
            try:
                for text in tqdm(new, desc="text encoder", unit="text", delay=2, leave=False):
                    cached(self._embeddings, [text], self._embed, IN_MEMORY)
                if stand_in.reader.cache_info().currsize:
                    text_files.prune()
            finally:
                stand_in.reader = None  # and so the encoder, before the others come back

    def _read_alone(self, device: torch.device, stack: contextlib.ExitStack) -> Any:
        """The text encoder; until the stack is closed, the other networks wait in CPU memory."""
        away = self.device != self.offload_device and not is_sharded(self.denoiser)
        if self.offloader is None and away:
            stack.callback(self.disable_model_cpu_offload)
            self.enable_model_cpu_offload()
        self.onload(self.text_encoder)
        return self.text_encoder.encoder(device)


class StoredEncoder(nn.Module):
    """Stands in for a text encoder: reads its states from disk, and loads the encoder only if they are not there.

    Args:
        read: loads the encoder.
        name: of the folder of its states; None: nothing is kept on disk.
        dtype: that `read` loads it in.
    """

    def __init__(self, read: Callable[[], Any], name: str | None, dtype: torch.dtype):
        super().__init__()
        self.read, self.name, self.dtypes = read, name, [dtype]
        self.reader: Any = None  # in place of `encoder`, to read it once for many texts

    def to(self, *args, **kwargs) -> "StoredEncoder":
        """Note a conversion, to be applied to the encoder once it is loaded."""
        given = (*args, *kwargs.values())
        dtype = next((x for x in given if isinstance(x, torch.dtype)), None)
        self.dtypes += [dtype] if dtype not in (None, self.dtypes[-1]) else []
        return self

    def encoder(self, device: torch.device) -> Any:
        """The encoder itself, read now."""
        encoder = self.read().eval().requires_grad_(False)
        for dtype in self.dtypes[1:]:
            encoder.to(dtype)
        CPUOffloader(device, encoder.device).onload(encoder)  # unlike `to`, it moves fake tensors
        return encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        path = self.path(input_ids, attention_mask)
        states = text_files.load(path) if path else None
        if states is None:
            encoder = (self.reader or self.encoder)(input_ids.device)
            states = encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            if path:
                text_files.save(path, states)
        return BaseModelOutput(last_hidden_state=states.to(input_ids.device))

    def path(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Path | None:
        """The file of the states of these ids."""
        if self.name is None:
            return None
        kind = ids.device.type
        rounding = [kind, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)]
        rounding += [torch.get_float32_matmul_precision(), torch.__version__]
        tokens = ids.tolist(), mask if mask is None else mask.tolist()
        facts = [tokens, self.dtypes, rounding, transformers.__version__]
        return text_files.folder() / self.name / f"{text_files.digest(facts)}.states"


def from_pretrained(kind: Any, source: str, subfolder: str, checkpoint: Any, options: dict) -> Any:
    """A text encoder of a directory or hub repository, or what stands for it, see `models.load`.

    Args:
        kind: its class.
        source, subfolder, options: of its `from_pretrained`.
        checkpoint: a `models.Checkpoint`.
    """
    plain = {key: value for key, value in options.items() if key not in ("variant", "dtype")}
    config = kind.config_class.from_pretrained(source, subfolder=subfolder, **plain)
    place, options = Path(source, subfolder), options | {"subfolder": subfolder}
    if not is_stored(kind, config, checkpoint):
        return kind.from_pretrained(source, **options)
    if place.is_dir():
        files = text_files.samples(place)
    else:  # a commit, and what will be read is of that
        fetch = {key: options[key] for key in HUB if key in options}
        file = huggingface_hub.hf_hub_download(
            source, "config.json", subfolder=subfolder or None, **fetch
        )
        commit = Path(file).parents[len(Path(subfolder).parts)].name
        files, options["revision"] = [source, subfolder, commit], commit
    others = {key: value for key, value in options.items() if key not in (*HUB, "dtype")}
    name = f"{Path(source).name}-{text_files.digest([kind.__name__, others, files])}"
    return StoredEncoder(
        functools.partial(kind.from_pretrained, source, **options), name, options["dtype"]
    )


def from_config(kind: Any, config: Any, checkpoint: Any) -> Any:
    """The same of a configuration, for fake tensors; nothing is kept on disk."""
    if not is_stored(kind, config, checkpoint):
        return kind(config)
    dtype = torch.get_default_dtype()
    return StoredEncoder(lambda: on_meta(kind, config, dtype), None, dtype)


def is_stored(kind: Any, config: Any, checkpoint: Any) -> bool:
    if checkpoint.text_cache is not None:
        return checkpoint.text_cache
    return sum(p.numel() for p in on_meta(kind, config, torch.float32).parameters()) > LARGE


def on_meta(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return kind._from_config(config, dtype=dtype)


def whole(part: Any, device: torch.device = CPU) -> Any:
    """For a stand-in, the encoder itself, loaded for this; other parts as they are."""
    return part.encoder(device) if isinstance(part, StoredEncoder) else part
