"""Shared models, among them a micro ModelScope directory of random weights in the real layout; and the order of tests."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from . import environments

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))

# With several workers (`pytest -n 2 --dist loadscope --no-loadscope-reorder`): what takes longest comes first, so that
# they end together. Each of these tests may run anywhere; else a worker takes a whole file, whose fixtures are made once.
APART = (
    "test_every_cell_runs_and_every_exercise_is_solved",
    "test_types",
    "test_the_lowest_versions_do",
)
LONGEST = (
    "test_browser",
    "test_notebooks",
    "test_gpu_path",
    "test_widgets",
    "test_memory",
    "test_align",
    "test_evaluate",
    "test_wan",
    "test_cli",
    "test_selfcheck",
    "test_sharding",
    "test_recipes",
)


def name_of(nodeid: str) -> tuple[str, str]:
    """File and name of a test, without its parameters."""
    file, _, test = nodeid.partition("::")
    return file, test.partition("[")[0]


def pytest_collection_modifyitems(items):
    def turn(item):
        file, test = item.path.stem, name_of(item.nodeid)[1]
        place = LONGEST.index(file) if file in LONGEST else len(LONGEST)
        return (test not in APART, place, file)

    items.sort(key=turn)  # stable: within a file the order stays


def pytest_collection_finish():
    # The libraries' million objects stay: without this each simulation of memory, which collects twice, walks through
    # them for a second.
    gc.collect()
    gc.freeze()


class ByFile(LoadScopeScheduling):
    """pytest-xdist's scheduler, with a file as the unit of work, or one test of `APART`."""

    def _split_scope(self, nodeid: str) -> str:
        file, test = name_of(nodeid)
        return nodeid if test in APART else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


@pytest.fixture(scope="session")
def from_wheel(tmp_path_factory):
    """Environment variables under which another Python imports the package from its wheel, built once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    done = folder / "wheel" / "done"
    with FileLock(folder / "wheel.lock"):
        if not done.exists():
            environments.install_wheel(folder / "wheel")
            done.touch()
    return os.environ | {"PYTHONPATH": str(folder / "wheel" / "installed")}


@pytest.fixture(scope="session")
def micro_directory(tmp_path_factory):
    """A `TextToVideoSDPipeline` directory of 0.1 M random weights, saved by the libraries themselves."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
    from diffusers.pipelines.deprecated.text_to_video_synthesis import TextToVideoSDPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from vader_nb.zoo import tokenizer

    torch.manual_seed(0)
    words = tokenizer.build()
    unet = UNet3DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=24,
            eos_token_id=words.eos_token_id,
        )
    )
    # Random temporal layers start at zero, and a test of a layer that does nothing tests nothing.
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
    )
    folder = tmp_path_factory.mktemp("micro")
    TextToVideoSDPipeline(vae, text_encoder, words, unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def micro(micro_directory):
    """The micro model in float64."""
    from vader_nb import load

    model = load(micro_directory, dtype=torch.float64)
    model.defaults |= {
        "num_inference_steps": 5,
        "num_frames": 3,
        "height": 16,
        "width": 16,
        "guidance_scale": 3.0,
    }
    return model


@pytest.fixture(scope="session")
def tiny():
    from vader_nb import load

    return load("tiny")
