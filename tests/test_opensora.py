"""Open-Sora 1.2: its full size, every block against a plain writing, chunks of frames, gradients, files."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from vader_nb import Prompt, load, lora, models, testing
from vader_nb.models.opensora import PUBLISHED, OpenSora, cleaned, network_of
from vader_nb.sampling import Sampling, roll_out, sample
from vader_nb.strategies import DRaFTLV, DRTune, Last, ReFL
from vader_nb.zoo import tokenizer

TRANSFORMER = {"hidden_size": 16, "depth": 2, "num_heads": 2, "caption_channels": 12}
TRANSFORMER |= {"model_max_length": 20}
VAE = {
    "vae_2d": {
        "type": "VideoAutoencoderKL",  # the published file has such entries, and no sizes
        "block_out_channels": (4, 4, 4, 4),
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "vae_temporal": {"filters": 4, "count": 1, "groups": 2},
    "micro_frame_size": 17,
    "architectures": ["VideoAutoencoderPipeline"],
}
SETTINGS = {"num_inference_steps": 5, "num_frames": 20, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory of 0.1 M random weights, with the published files' layout in `transformer` and `vae`."""
    folder = tmp_path_factory.mktemp("opensora")
    torch.manual_seed(0)
    words = tokenizer.build()
    text = T5Config(vocab_size=len(words), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(text).save_pretrained(folder / "text_encoder")
    words.save_pretrained(folder / "tokenizer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    for part, config in (("transformer", TRANSFORMER), ("vae", VAE)):
        network = network_of(part, config)
        for name, parameter in network.named_parameters():
            if name != "rope.freqs":
                torch.nn.init.normal_(parameter, float(".weight" in name and "norm" in name), 0.2)
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        save_file(network.state_dict(), folder / part / "model.safetensors")
    index = {"_class_name": "OpenSoraPipeline"}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vader_nb.json").write_text(json.dumps({"defaults": SETTINGS}))
    return folder


@pytest.fixture(scope="module")
def model(directory):
    return load(directory, dtype=torch.float64)


def test_gradients_and_everything_else_that_training_expects(directory):
    model = load(directory, dtype=torch.float64)
    strategies = [Last(1), Last(3), ReFL(0.6), DRTune(2, stop=1), DRaFTLV(2)]
    report = testing.check_model(model, strategies=strategies)
    print(report)
