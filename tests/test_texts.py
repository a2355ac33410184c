"""Text encoders that are kept out of memory, their states on disk: the same clips and gradients, and never stale ones."""

import errno
import json
import os
import shutil
import weakref

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from vader_nb import Prompt, align, load, lora, models, rewards, sample
from vader_nb.cli import main
from vader_nb.distributed import launch
from vader_nb.evaluation import Validation, evaluate
from vader_nb.gradient import reward_gradient
from vader_nb.memory_planner import FakeMode, Step
from vader_nb.models import text_files, texts
from vader_nb.sampling import Sampling
from vader_nb.strategies import Frames
from vader_nb.testing import CHECKS, adapted, check_model, take_gradient

from . import test_cogvideox, test_ltx_video, test_opensora, test_wan
from .test_opensora import directory as opensora_directory  # noqa: F401

PROMPTS = [Prompt("a red star spinning", negative_prompt="blurry"), "a blue circle"]
SIZES = {
    "wan": test_wan.SMALL,
    "cogvideox": {"num_inference_steps": 5} | test_cogvideox.SIZE,
    "ltx": test_ltx_video.SETTINGS,
    "ltx-condition": test_ltx_video.SETTINGS,
    "opensora": test_opensora.SETTINGS,
}
SMALL = Sampling(**test_wan.SMALL)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, opensora_directory):  # noqa: F811
    made = {
        "wan": test_wan.pipeline(),
        "cogvideox": test_cogvideox.pipeline_of({}),
        "ltx": test_ltx_video.ltx_pipeline("plain"),
        "ltx-condition": test_ltx_video.ltx_pipeline("condition"),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, folder in folders.items():
        made[name].save_pretrained(folder)
    return folders | {"opensora": opensora_directory}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VADER_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """The encoders that were read."""
    found, encoder = [], texts.StoredEncoder.encoder

    def noted(self, device):
        found.append(encoder(self, device))
        return found[-1]

    monkeypatch.setattr(texts.StoredEncoder, "encoder", noted)
    return found


@pytest.fixture
def wan(directories, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(directories["wan"], tmp_path / "wan")


def files(cache):
    return sorted(cache.rglob("*.states"))


# ------------------------------------------------------------------------------------ the same as ever


@pytest.mark.parametrize("family", SIZES)
def test_clips_and_gradients_are_the_same_bit_by_bit(directories, family, reads):
    sampling, results = Sampling(**SIZES[family]), []
    for stored in (False, True, True):  # in memory; new on disk; from disk
        model = load(directories[family], text_cache=stored)
        assert model.keeps_texts is stored
        clips = sample(model, PROMPTS, seeds=3, sampling=sampling)
        adapter = adapted(model)
        options = {"seeds": [3, 8], "sampling": sampling, "frames": Frames.all()}
        reward_gradient(model, adapter, rewards.brightness(), PROMPTS, **options)
        results.append((clips, take_gradient(adapter)))
    for clips, gradient in results[1:]:
        assert torch.equal(clips, results[0][0]) and torch.equal(gradient, results[0][1])
    assert results[0][1].any() and len(reads) == 1


@pytest.mark.parametrize("mixed_precision", [None, "bf16"])
def test_a_run_reads_the_encoder_once_for_all_its_texts(
    directories, tmp_path, reads, mixed_precision
):
    def train(model, name):
        prompts = ["a red star", Prompt("a blue circle", "blurry"), "a red circle", "a star"]
        validate = Validation(model, rewards.colorfulness(), ["a star growing"], sampling=SMALL)
        options = {"rank": 2, "sampling": SMALL, "steps": 3, "mixed_precision": mixed_precision}
        options |= {"batch_size": 2, "validate": validate, "validation_steps": 1, "progress": False}
        options |= {"output_dir": tmp_path / name}
        run = align(model, rewards.brightness(), prompts, **options)
        return [p.detach() for p in run.adapter.parameters()], run.metrics

    model = load(directories["wan"], text_cache=True)
    ours, metrics = train(model, "stored")
    assert len(reads) == 1
    theirs, expected = train(load(directories["wan"]), "plain")
    assert all(map(torch.equal, ours, theirs))
    name = "validation/colorfulness"
    assert [row[name] for row in metrics] == [row[name] for row in expected]


def test_the_encoder_leaves_memory_and_is_read_again_for_new_texts_alone(directories, reads):
    model = load(directories["wan"], text_cache=True)
    assert not list(model.text_encoder.parameters())
    model.encode_texts(["a red star", Prompt("a blue circle", "blurry"), "a red star"])
    alive = [weakref.ref(encoder) for encoder in reads]
    assert len(alive) == 1
    reads.clear()
    assert alive[0]() is None
    sample(model, ["a red star", Prompt("a blue circle", "blurry")], sampling=SMALL)
    assert not reads
    sample(model, ["a red star", "a circle"], sampling=SMALL)
    assert len(reads) == 1


def test_an_evaluation_reads_it_once_for_all_groups(directories, reads):
    model = load(directories["wan"], text_cache=True)
    groups = {"seen": ["a red star", "a blue star"], "unseen": ["a red circle"]}
    options = {"sampling": SMALL, "batch_size": 1, "seeds_per_prompt": 1, "progress": False}
    evaluate(model, None, rewards.brightness(), groups, **options)
    assert len(reads) == 1


def test_types_are_converted_as_in_memory(directories, reads):
    for first, second in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        states = []
        for stored in (False, True):
            model = load(directories["wan"], dtype=first, text_cache=stored).to(second)
            inputs = model.encode(["a red star"], SMALL.resolve(model))["prompt"]
            states.append(inputs["encoder_hidden_states"])
        assert states[0].dtype == second and torch.equal(*states)
    assert len(reads) == 2  # rounded or not, these are other states


def test_it_works_where_networks_are_offloaded(directories, reads):
    expected = sample(load(directories["wan"]), PROMPTS, sampling=SMALL)
    for _ in range(2):
        model = load(directories["wan"], text_cache=True)
        model.enable_model_cpu_offload()
        assert torch.equal(sample(model, PROMPTS, sampling=SMALL), expected)
    assert len(reads) == 1


def test_it_keeps_the_promises_of_a_model(directories):
    model = load(directories["wan"], dtype=torch.float64, text_cache=True)
    check_model(model, SMALL, strategies=[])
    assert len(CHECKS) == 8 and model.keeps_texts


# -------------------------------------------------------------------------------------- never stale ones


def encoded(folder, text="a red star", **options):
    model = load(folder, **options)
    return model.encode([text], SMALL.resolve(model))["prompt"]["encoder_hidden_states"]


def test_a_changed_encoder_has_states_of_its_own(wan, reads):
    file = wan / "text_encoder" / "model.safetensors"
    before, stat = encoded(wan, text_cache=True), file.stat()
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    last = max(weights)
    save_file(weights | {last: weights[last] + 0.5}, file, {"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy of an archive may have
    after = encoded(wan, text_cache=True)
    assert not torch.equal(after, before) and torch.equal(after, encoded(wan))
    assert len(reads) == 2


def test_any_byte_of_a_large_file_counts_once_it_is_written(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1 << 24))
    before = text_files.samples(tmp_path)
    assert text_files.samples(tmp_path) == before
    with open(file, "r+b") as opened:
        opened.seek(5000)  # between two samples
        opened.write(b"1")
    assert text_files.samples(tmp_path) != before


def test_a_changed_tokenizer_has_states_of_its_own(wan, reads):
    before = encoded(wan, text_cache=True)
    file = wan / "tokenizer" / "tokenizer.json"
    words = file.read_text()
    file.write_text(
        words.replace('"red"', '"?"').replace('"blue"', '"red"').replace('"?"', '"blue"')
    )
    after = encoded(wan, text_cache=True)
    assert not torch.equal(after, before) and torch.equal(after, encoded(wan))
    assert len(reads) == 2


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-40], lambda x: x[:-1] + bytes([x[-1] ^ 1]), lambda x: b""]
)
def test_a_damaged_file_is_computed_again(directories, cache, reads, damage):
    before = encoded(directories["wan"], text_cache=True)
    for file in files(cache):
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
    assert torch.equal(encoded(directories["wan"], text_cache=True), before)
    assert len(reads) == 2 and files(cache)[-1].read_bytes() == whole


def test_a_published_encoder_is_known_by_its_commit(directories, tmp_path, monkeypatch, reads):
    def publish(repository, commit, *parts):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(commit * 40)
        for part in parts:
            shutil.copytree(
                directories["opensora"] / part,
                folder / "snapshots" / (commit * 40),
                dirs_exist_ok=True,
            )
        return folder / "snapshots" / (commit * 40)

    publish("hpcai-tech/OpenSora-STDiT-v3", "0", "transformer")
    publish("hpcai-tech/OpenSora-VAE-v1.2", "0", "vae")
    publish("DeepFloyd/t5-v1_1-xxl", "0", "text_encoder", "tokenizer")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sampling, clips = Sampling(**SIZES["opensora"]), []
    for stored in (False, True):
        model = load("opensora", cache_dir=tmp_path, text_cache=stored)
        clips.append(sample(model, PROMPTS, sampling=sampling))
    assert torch.equal(*clips) and model.text_encoder.name.startswith("t5-v1_1-xxl-")
    # Another commit becomes the newest before the encoder is read again.
    newer = publish("DeepFloyd/t5-v1_1-xxl", "1", "text_encoder", "tokenizer")
    (newer / "model.safetensors").unlink()
    model.encode_texts(["a blue star"])
    other = load("opensora", cache_dir=tmp_path, text_cache=True)
    assert len(reads) == 2 and other.text_encoder.name != model.text_encoder.name


# ------------------------------------------------------------------------------------ disks, and processes


def test_a_full_disk_costs_time_alone(directories, cache, monkeypatch, reads):
    expected = sample(load(directories["wan"]), PROMPTS, sampling=SMALL)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    model = load(directories["wan"], text_cache=True)
    with pytest.warns(UserWarning, match="No space left on device.*VADER_NB_CACHE"):
        clips = sample(model, PROMPTS, sampling=SMALL)
    assert torch.equal(clips, expected) and len(reads) == 1
    assert not list(cache.rglob("*.part")) and not files(cache)
    assert torch.equal(sample(model, PROMPTS, sampling=SMALL), expected)
    assert len(reads) == 1  # they are in memory


def test_a_place_that_cannot_be_a_folder_costs_time_alone(directories, cache):
    cache.write_text("a file")
    with pytest.warns(UserWarning, match="VADER_NB_CACHE"):
        found = encoded(directories["wan"], text_cache=True)
    assert torch.equal(found, encoded(directories["wan"]))


def test_the_disk_is_bounded(directories, cache, monkeypatch):
    model = load(directories["wan"], text_cache=True)
    model.encode_texts(["a red star"])
    old = files(cache)
    for file in old:
        os.utime(file, (1, 1))
    load(directories["wan"], text_cache=True).encode_texts([""])  # is used again
    monkeypatch.setattr(text_files, "MOST", sum(file.stat().st_size for file in old))
    model.encode_texts(["a blue circle"])
    left = [file for file in old if file.exists()]
    assert len(left) == 1 and len(files(cache)) == 2


def test_where_files_are(cache, monkeypatch):
    assert text_files.folder() == cache / "texts"
    monkeypatch.delenv("VADER_NB_CACHE")
    home = text_files.huggingface_hub.constants.HF_HOME
    assert str(text_files.folder()).startswith(home)


def train(folder, left):
    """A process's part of a run; it leaves its adapter, and how many encoders it read."""
    count, encoder = [], texts.StoredEncoder.encoder
    texts.StoredEncoder.encoder = lambda self, device: count.append(1) or encoder(self, device)
    model = load(folder, text_cache=True)
    options = {"rank": 2, "sampling": SMALL, "steps": 2, "batch_size": 1, "progress": False}
    prompts = ["a red star", "a blue circle", "a red circle", "a star"]
    run = align(model, rewards.brightness(), prompts, output_dir=left / "run", **options)
    evaluate(model, None, rewards.brightness(), ["a star on white"], sampling=SMALL, progress=False)
    rank = torch.distributed.get_rank()
    torch.save([len(count), *(p.detach() for p in run.adapter.parameters())], left / f"{rank}.pt")


def test_of_several_processes_the_first_one_encodes(directories, tmp_path):
    launch(train, directories["wan"], tmp_path)
    (count, *first), (other, *second) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert (count, other) == (2, 0) and all(map(torch.equal, first, second))


# -------------------------------------------------------------------------------------- where it is on


def test_it_is_on_where_the_encoder_is_large(directories):
    with FakeMode() as fake:
        fake.truth = False
        for name in ("wan", "cogvideox", "ltx-video", "opensora"):
            assert models.from_config(name, text_cache=None).keeps_texts
        assert not models.from_config("modelscope", text_cache=None).keeps_texts
    assert not any(load(folder).keeps_texts for folder in directories.values())


def test_a_model_whose_encoder_stays_says_so(micro_directory):
    with pytest.raises(ValueError, match="text_cache=True: .* has no large text encoder"):
        load(micro_directory, text_cache=True)


@pytest.mark.parametrize("family", ["wan", "cogvideox", "ltx", "opensora"])
def test_the_planner_counts_the_encoder_with_the_texts_alone(directories, family, tmp_path):
    folder = shutil.copytree(directories[family], tmp_path / "large")
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text()) | {"d_ff": 1 << 16, "num_layers": 4}
    file.write_text(json.dumps(config))
    with FakeMode() as fake:
        fake.truth = False
        model = models.from_config(folder)
    size = sum(p.numel() * 4 for p in model.text_encoder.parameters())
    others = sum(p.numel() * 4 for network in model.modules() for p in network.parameters()) - size
    settings = {"num_inference_steps": 5, "dtype": "float32", **SIZES[family]}
    kept, away = (
        Step.of(folder, "brightness", settings | {"text_cache": stored}).simulate()
        for stored in (False, True)
    )
    for stage in ("weights", "roll-out", "decode", "replay", "optimizer"):
        assert kept[stage] - away[stage] == pytest.approx(size, rel=0.01)
    assert away["text"] > size and kept["text"] - away["text"] > 0.5 * others  # which have left


# -------------------------------------------------------------------------- the encoder itself, on request


@pytest.mark.parametrize("family", ["wan", "opensora"])
def test_a_pipeline_is_saved_whole_though_its_encoder_was_never_read(directories, family, tmp_path):
    model = load(directories[family], text_cache=True)
    saved = model.save_pretrained(tmp_path / "saved")
    sampling = Sampling(**SIZES[family])
    clips = [
        sample(load(folder), PROMPTS, sampling=sampling) for folder in (directories[family], saved)
    ]
    assert torch.equal(*clips)
    assert "StoredEncoder" not in (saved / "model_index.json").read_text()


def test_diffusers_pipeline_has_the_encoder(directories):
    pipeline = load(directories["wan"], text_cache=True).pipeline()
    assert isinstance(pipeline, diffusers.WanPipeline)
    sizes = {key: value for key, value in test_wan.SMALL.items() if key != "num_inference_steps"}
    options = {"num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent"}
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red star", **sizes, **options).frames.isfinite().all()


def test_an_adapter_is_merged(directories, tmp_path):
    model = load(directories["wan"], text_cache=True)
    adapter = lora.add(model, rank=2)
    assert load(adapter.merge(tmp_path / "merged")).text_encoder is not None


def test_the_shell_has_the_option(directories, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = [f"{key}={value}" for key, value in test_wan.SMALL.items()]
    main(["sample", "a red star", f"model={directories['wan']}", "text_cache=true", *sizes])
    assert len(files(cache)) == 2
