"""Run by test_rewards_clip.py in an environment of its own: the score of HPSv2's own package, on its own code.

    python hpsv2_reference.py CONFIG_DIR CHECKPOINT PICTURES.pt PROMPT…

CONFIG_DIR holds a small ViT-H-14.json, so that the comparison takes seconds. Prints {"scores": one for each picture
and prompt, "shapes": of the tensors of its full-size model, which is what its files hold}.
"""

import json
import sys
import types

import torch

# The package imports a name from turtle by accident, which needs a screen, and clint for a download's progress.
sys.modules["turtle"] = types.SimpleNamespace(forward=None)
sys.modules |= {
    "clint": types.ModuleType("clint"),
    "clint.textui": types.SimpleNamespace(progress=None),
}
from hpsv2.src.open_clip import (  # noqa: E402
    CLIP,
    add_model_config,
    create_model_and_transforms,
    get_model_config,
    get_tokenizer,
)
from torchvision.transforms import Compose, ToTensor  # noqa: E402

with torch.device("meta"):
    state = CLIP(**get_model_config("ViT-H-14")).state_dict()
shapes = {name: list(value.shape) for name, value in state.items()}
configs, checkpoint, pictures, *prompts = sys.argv[1:]
add_model_config(configs)
model, _, transform = create_model_and_transforms(
    "ViT-H-14", None, precision="fp32", light_augmentation=True, output_dict=True
)
model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
model.eval()
# What its transform does after an 8-bit picture has become a tensor.
after = [isinstance(step, ToTensor) for step in transform.transforms].index(True) + 1
transform = Compose(transform.transforms[after:])
with torch.no_grad():
    images = torch.stack(
        [transform(picture) for picture in torch.load(pictures, weights_only=True)]
    )
    outputs = model(images, get_tokenizer("ViT-H-14")(prompts))
scores = (outputs["image_features"] @ outputs["text_features"].T).diagonal().tolist()
print(json.dumps({"scores": scores, "shapes": shapes}))
