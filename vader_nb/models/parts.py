"""Families whose parts are networks of diffusers and transformers, or written like theirs: one table reads, builds
and saves them."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..hub import DummyTokenizer
from . import texts
from .base import VideoModel, read_config


class ModelOfParts(VideoModel):
    """A pipeline directory with a subfolder for each part. `__init__` gets the parts by name.

    Attributes:
        networks: part -> class, derived from diffusers' `ModelMixin` or transformers' `PreTrainedModel`.
        processors: part -> class of a tokenizer or an image processor.
        optional: parts that a checkpoint may lack, as its `model_index.json` says. A model's own `networks` and
            `processors` are those that it has.
        settings: other entries of `model_index.json` -> default; a model has them as attributes.
        schedulers: name -> class of those that diffusers does not have.
        published: part -> the published configuration, for `from_config`; with one of "scheduler". What is
            missing in it is the class's own default. "model_index" may have `settings`.
        family: the pipeline class that `model_index.json` names, under which the class is registered.
    """

    family: str

    networks: dict[str, Any]
    processors: dict[str, Any] = {}
    optional: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    schedulers: dict[str, Any] = {}
    published: dict[str, dict] = {}

    @classmethod
    def from_pretrained(cls, checkpoint, *, name: str, dtypes: dict, **hub) -> Any:
        """Load the parts of a pipeline directory or hub repository, see `models.load`."""
        plain = {key: value for key, value in hub.items() if key != "variant"}
        index: Any = {}
        if cls.optional or cls.settings:
            index = DiffusionPipeline.load_config(checkpoint.source, **plain)
        parts: dict[str, Any] = {}
        for part, kind in cls.present(cls.networks, index).items():
            argument = "torch_dtype" if issubclass(kind, ModelMixin) else "dtype"
            options = hub | {argument: dtypes.get(part, dtypes["default"])}
            if part == "text_encoder" and cls.large_text_encoder:
                place = checkpoint.source, part
                parts[part] = texts.from_pretrained(kind, *place, checkpoint, options)
            else:
                parts[part] = cls.read_network(part, checkpoint, options)
        others = {**cls.processors, "scheduler": cls.scheduler_class(checkpoint)}
        for part, kind in cls.present(others, index).items():
            parts[part] = kind.from_pretrained(checkpoint.source, subfolder=part, **plain)
        return cls.of(checkpoint, name, parts, index)

    @classmethod
    def read_network(cls, part: str, checkpoint, options: dict) -> nn.Module:
        """One of `networks`; options: of its `from_pretrained`."""
        if part in cls.targets and checkpoint.quantize:
            options = options | {"quantization_config": checkpoint.quantize}
        return cls.networks[part].from_pretrained(checkpoint.source, subfolder=part, **options)

    @classmethod
    def from_config(cls, checkpoint, *, name: str) -> Any:
        """The architecture of a directory's configuration, or the published one, see `models.from_config`."""
        folder = checkpoint.directory
        if folder and not (folder / "model_index.json").is_file():  # its authors' own layout
            folder = None
        if folder:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            named = [*cls.present(cls.networks, index), "scheduler"]
            config = {part: read_config(folder / part) for part in named}
        else:
            config = cls.published_for(checkpoint)
            index = config | config.get("model_index", {})
        parts: dict[str, Any] = {}
        for part, kind in cls.present(cls.networks, index).items():
            network: Any = kind
            if issubclass(kind, ModelMixin):
                parts[part] = network.from_config(config[part])
            elif part == "text_encoder" and cls.large_text_encoder:
                parts[part] = texts.from_config(kind, kind.config_class(**config[part]), checkpoint)
            else:
                parts[part] = kind(kind.config_class(**config[part]))
        for part, kind in cls.present(cls.processors, index).items():
            made = DummyTokenizer if part.startswith("tokenizer") else kind
            parts[part] = kind.from_pretrained(folder / part) if folder else made()
        # The values of its tables are read, not only their sizes.
        with unset_fake_temporarily(), torch.device("cpu"):
            parts["scheduler"] = cls.scheduler_class(checkpoint).from_config(config["scheduler"])
        return cls.of(checkpoint, name, parts, index)

    @classmethod
    def of(cls, checkpoint, name: str, parts: dict[str, Any], index: dict) -> Any:
        """The model of these parts and of this `model_index.json`, frozen and always in eval mode, since some
        networks contain dropout."""
        make: Any = cls
        model = make(name, **parts, defaults=checkpoint.defaults, world=checkpoint.world)
        model.family = checkpoint.family
        model.networks = {part: kind for part, kind in cls.networks.items() if part in parts}
        model.processors = {part: kind for part, kind in cls.processors.items() if part in parts}
        for setting, default in cls.settings.items():
            setattr(model, setting, index.get(setting, default))
        for module in model.modules():
            module.eval().requires_grad_(False)
        return model

    @classmethod
    def published_for(cls, checkpoint) -> dict[str, dict]:
        """The published configuration of a checkpoint, for families with several."""
        return cls.published

    @classmethod
    def present(cls, kinds: dict[str, Any], index: dict) -> dict[str, Any]:
        """Those parts that are not optional, or that a `model_index.json` names with their classes."""
        absent = [part for part in cls.optional if index.get(part) in (None, [None, None])]
        return {part: kind for part, kind in kinds.items() if part not in absent}

    @classmethod
    def scheduler_class(cls, checkpoint) -> Any:
        """The scheduler that `model_index.json` names."""
        return cls.schedulers.get(checkpoint.scheduler) or getattr(diffusers, checkpoint.scheduler)

    def part(self, name: str) -> Any:
        return self.denoisers[name] if name in self.denoisers else getattr(self, name)

    def modules(self) -> list[nn.Module]:
        return [self.part(name) for name in self.networks]

    def pipeline(self) -> Any:
        """diffusers' pipeline of the same parts. Raises NotImplementedError if diffusers has none."""
        kind: Any = getattr(diffusers, self.family, None)
        if kind is None:
            raise NotImplementedError(
                f"diffusers has no pipeline for {self.family}: sample with vader_nb.sample, and save with "
                f"save_pretrained, which writes its parts one by one"
            )
        settings = {name: getattr(self, name) for name in self.settings}
        device = self.device
        parts = {name: texts.whole(self.part(name), device) for name in self.part_names()}
        return kind(**parts, **settings)

    def part_names(self) -> list[str]:
        return [*self.networks, *self.processors, "scheduler"]

    def save_parts(self, folder: Path) -> None:
        index: dict[str, Any] = {"_class_name": self.family}
        for name in self.part_names():
            part = texts.whole(self.part(name))
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
        index |= {name: getattr(self, name) for name in self.settings}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
