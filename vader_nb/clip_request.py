"""The settings of a sampler's clip: what they ask of `sample`, in words, and as code."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps

from . import zoo
from .models import VideoModel
from .prompts import Prompt
from .sampling import Sampling

NONE = "none (base model)"


@dataclass(frozen=True)
class Request:
    """The settings of a clip."""

    prompt: str
    seed: int = 0
    num_inference_steps: int = 10
    guidance_scale: float = 2.0
    adapter: str = NONE  # a name of the panel's adapters or `NONE`
    scale: float = 1.0  # 0 to 1.5
    second: str = NONE
    second_scale: float = 0.5
    start: float = 0.0  # the part of the denoising in which the adapters act
    end: float = 1.0
    negative_prompt: str = ""
    guidance_rescale: float = 0.0
    extend: int = 1
    options: tuple[tuple[str, float], ...] = ()  # of the family, those that are not its defaults
    image: bytes | None = None  # a file's, that the clip starts from

    @property
    def weights(self) -> dict[str, float]:
        """The adapters that act, by name. A second one acts only beside a first."""
        if self.adapter == NONE:
            return {}
        # The same adapter twice counts once, with the first scale.
        chosen = {self.second: self.second_scale, self.adapter: self.scale}
        return {n: chosen[n] for n in (self.adapter, self.second) if n != NONE and chosen[n]}

    @property
    def base(self) -> "Request":
        """The same of the base model."""
        default = Request("")
        own = ("adapter", "scale", "second", "second_scale", "start", "end")
        return replace(self, **{name: getattr(default, name) for name in own})

    def settings_of(self, model: VideoModel) -> dict:
        """Every setting by its name, also those of the model's family."""
        return vars(self) | model.sampling_options | dict(self.options)

    @property
    def given(self) -> str | Prompt:
        """What the model is given."""
        if not (self.negative_prompt or self.image):
            return self.prompt
        return Prompt(
            self.prompt, self.negative_prompt, as_image(self.image) if self.image else None
        )

    def settings(self) -> dict:
        """Arguments of `Sampling` that are not its defaults."""
        values = {"num_inference_steps": self.num_inference_steps}
        values |= {"guidance_scale": self.guidance_scale}
        more = {"guidance_rescale": self.guidance_rescale, "extend": self.extend}
        default = Sampling()
        values |= {name: value for name, value in more.items() if value != getattr(default, name)}
        return values | ({"options": dict(self.options)} if self.options else {})

    @property
    def sampling(self) -> Sampling:
        return Sampling(**self.settings())

    @property
    def how(self) -> str:
        """What acts on the model."""
        text = " + ".join(f"{weight:g} × {name}" for name, weight in self.weights.items()) or "base"
        if self.weights and (self.start, self.end) != (0, 1):
            text += f", acting {self.start:.0%} to {self.end:.0%}"
        return text

    def __str__(self) -> str:
        parts = [self.how, f"seed {self.seed}", f"{self.num_inference_steps} steps"]
        parts.append(f"guidance {self.guidance_scale:g}")
        if self.guidance_rescale:
            parts.append(f"rescaled {self.guidance_rescale:g}")
        if self.negative_prompt:
            parts.append(f"not “{self.negative_prompt}”")
        parts += [f"{name} {value:g}" for name, value in self.options]
        if self.image:
            parts.append("from your image")
        if self.extend > 1:
            parts.append(f"{self.extend} segments")
        return " · ".join(parts)

    def code(self, model: VideoModel, adapters: Mapping[str, str | Path], fps: float) -> str:
        """Python that makes the clip without a panel; an image is named as `Sampler.save` names it."""
        shipped, files, lines = zoo.adapters(), [], ["import vader_nb"]
        prompt = repr(self.prompt)
        if self.negative_prompt or self.image:
            start = ", image=Image.open('clip-001-start.png').convert('RGB')" if self.image else ""
            lines += ["from PIL import Image", ""] if self.image else []
            negative = f", {self.negative_prompt!r}" if self.negative_prompt else ""
            prompt = f"Prompt({prompt}{negative}{start})"
        call = f"{prompt}, seeds={self.seed}, sampling=sampling"
        for name, weight in self.weights.items():
            path = adapters[name]
            # For a shipped adapter, code that works on other machines too.
            known = path == shipped.get(name)
            file = f"zoo.adapters()[{name!r}]" if known else repr(str(path))
            files.append(f"{file}: {weight:g}")
        if files:
            call += f", adapter={{{', '.join(files)}}}"
            if (self.start, self.end) != (0, 1):
                call += f", adapter_start={self.start:g}, adapter_end={self.end:g}"
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return "\n".join(
            [
                *lines,
                f"from vader_nb import {'Prompt, ' * ('Prompt(' in prompt)}Sampling, Video, zoo\n",
                f"model = vader_nb.load({model.name!r})",
                f"sampling = Sampling({settings})",
                f"frames = vader_nb.sample(model, {call})",
                f"Video(frames[0], fps={fps:g})",
            ]
        )


def as_image(data: bytes) -> Image.Image:
    """A file's image, upright."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
