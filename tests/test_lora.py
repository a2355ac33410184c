"""Adapters: bit-exact fusing, files that others can read, and files that must be refused."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from vader_nb import lora
from vader_nb.sampling import Sampling, roll_out, sample

from .test_gradient import PROMPTS, SEEDS, adapted


def weights(model):
    return {
        name: p.detach().clone()
        for name, p in model.denoiser.named_parameters()
        if "lora_" not in name
    }


def test_a_fresh_adapter_changes_nothing(micro):
    before = sample(micro, PROMPTS, seeds=SEEDS)
    adapter = lora.add(micro, rank=4)
    assert torch.equal(sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter), before)
    assert all(p.requires_grad for p in adapter.parameters())
    assert len(adapter.parameters()) == 2 * len(adapter.layers) > 0


def test_same_seed_same_adapter_and_no_trace_in_the_global_generator(micro):
    state = torch.get_rng_state()
    adapter = lora.add(micro, rank=2, seed=5)
    first = [p.clone() for p in adapter.parameters()]
    assert torch.equal(torch.get_rng_state(), state)
    adapter.remove()
    assert all(
        torch.equal(a, b) for a, b in zip(first, lora.add(micro, rank=2, seed=5).parameters())
    )


def test_fused_is_the_adapter_and_leaves_the_base_bit_exact(micro):
    adapter, before = adapted(micro), weights(micro)
    apart = roll_out(micro, PROMPTS, SEEDS, Sampling().resolve(micro)).latents
    together = roll_out(micro, PROMPTS, SEEDS, Sampling().resolve(micro), adapter=adapter).latents
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)
    after = weights(micro)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RuntimeError), adapter.fused():
        raise RuntimeError("in the middle")
    assert all(torch.equal(before[name], value) for name, value in weights(micro).items())
    again = roll_out(micro, PROMPTS, SEEDS, Sampling().resolve(micro)).latents
    assert torch.equal(again, apart)


def test_half_precision_base_is_restored_bit_exactly(micro_directory):
    from vader_nb import load

    model = load(micro_directory, dtype=torch.bfloat16)
    adapter = adapted(model)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    before = weights(model)
    for _ in range(5):
        with adapter.fused():
            pass
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_scale_goes_from_the_base_through_the_adapter_and_beyond(micro):
    adapter = adapted(micro)
    full = sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter)
    base = sample(micro, PROMPTS, seeds=SEEDS)
    with adapter.disabled():
        disabled = micro.decode(roll_out(micro, PROMPTS, SEEDS, Sampling().resolve(micro)).latents)
    assert torch.equal(disabled, base)
    adapter.scale = 0.0
    torch.testing.assert_close(
        sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter), base, rtol=1e-12, atol=1e-12
    )
    distances = []
    for scale in (0.25, 0.5, 1.0, 1.5):
        adapter.scale = scale
        distances.append(
            (sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter) - base).norm().item()
        )
    assert distances == sorted(distances)
    adapter.scale = 1.0
    assert torch.equal(sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter), full)
    with pytest.raises(ValueError, match="-0.1"):
        adapter.scale = -0.1


def test_a_file_comes_back_equal_with_its_story(micro, tmp_path):
    adapter = adapted(micro)
    expected = sample(micro, PROMPTS, seeds=SEEDS, adapter=adapter)
    path = adapter.save(tmp_path / "adapter.safetensors", reward="hps + 0.02 × aesthetic", steps=40)
    state, metadata = lora.read(path)
    assert metadata["reward"] == "hps + 0.02 × aesthetic"
    assert (metadata["rank"], metadata["alpha"], metadata["steps"]) == ("2", "2", "40")
    assert json.loads(metadata["targets"]) == list(micro.targets["unet"])
    adapter.remove()
    again = lora.load(micro, path)
    assert again.state_dict().keys() == state.keys()
    assert torch.equal(sample(micro, PROMPTS, seeds=SEEDS, adapter=again), expected)
    assert list(tmp_path.iterdir()) == [path]  # nothing half written is left


def test_the_keys_are_the_ones_diffusers_writes(micro, tmp_path):
    """Saved by diffusers' own pipeline class from peft's own state dict: the same names and values."""
    from diffusers.pipelines.deprecated.text_to_video_synthesis import TextToVideoSDPipeline
    from peft import get_peft_model_state_dict

    adapter = adapted(micro)
    adapter.save(tmp_path / "ours.safetensors")
    state = get_peft_model_state_dict(micro.denoiser)
    TextToVideoSDPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    theirs, ours = (
        load_file(tmp_path / "pytorch_lora_weights.safetensors"),
        load_file(tmp_path / "ours.safetensors"),
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    # and theirs can be loaded here
    adapter.remove()
    assert lora.load(micro, tmp_path / "pytorch_lora_weights.safetensors").rank == 2


def test_removing_gives_the_base_back(micro):
    names = list(dict(micro.denoiser.named_parameters()))
    before = sample(micro, PROMPTS, seeds=SEEDS)
    adapted(micro).remove()
    assert list(dict(micro.denoiser.named_parameters())) == names
    assert torch.equal(sample(micro, PROMPTS, seeds=SEEDS), before)


def test_no_matching_layer_is_an_error_that_lists_what_there_is(micro):
    with pytest.raises(ValueError, match="no layer of .* is named to_qq.*to_k"):
        lora.add(micro, targets=("to_qq",))
    with pytest.raises(ValueError, match="rank"):
        lora.add(micro, rank=0)
    lora.add(micro)
    with pytest.raises(ValueError, match="carries an adapter already"):
        lora.add(micro)


class Bomb:
    def __reduce__(self):
        raise AssertionError("the pickle was opened")


@pytest.mark.parametrize(
    "kind",
    ["zip", "pickle", "truncated", "empty", "no lora", "foreign", "shape", "missing", "absent"],
)
def test_files_that_are_refused(micro, tmp_path, kind):
    adapter = adapted(micro)
    path = adapter.save(tmp_path / "adapter.safetensors")
    adapter.remove()
    state, whole = load_file(path), path.read_bytes()
    name = next(iter(state))
    if kind == "zip":
        torch.save(state, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "truncated":
        path.write_bytes(whole[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no lora":
        save_file({"weight": torch.zeros(2)}, path)
    elif kind == "foreign":
        save_file({key.replace("attn1", "attn9"): value for key, value in state.items()}, path)
    elif kind == "shape":
        save_file(state | {name: torch.zeros(2, 3)}, path)
    elif kind == "missing":
        save_file({key: value for key, value in state.items() if key != name}, path)
    else:
        path.unlink()
    message = {
        "zip": "pickle",
        "pickle": "pickle",
        "truncated": "not a complete",
        "empty": "not a complete",
        "no lora": "no LoRA tensors",
        "foreign": "does not fit",
        "shape": "shape|rank",
        "missing": "missing|unknown",
        "absent": "no adapter file",
    }[kind]
    before = weights(micro)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lora.load(micro, path)
    assert not any(
        "lora" in n for n, _ in micro.denoiser.named_parameters()
    )  # and the model is as it was
    assert all(torch.equal(before[n], v) for n, v in weights(micro).items())


# ------------------------------------------------------------------------- several adapters, and parts of the chain


@pytest.fixture
def two_files(micro, tmp_path):
    """Adapters of different rank and alpha."""
    files = []
    for rank, alpha in ((2, 4.0), (3, 3.0)):
        adapter = lora.add(micro, rank, alpha, seed=rank)
        torch.manual_seed(rank)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        files.append(adapter.save(tmp_path / f"{rank}.safetensors"))
        adapter.remove()
    return files


def delta(model, path, scale):
    adapter = lora.load(model, path, scale)
    found = {
        name: layer.get_delta_weight(lora.NAME).detach().clone()
        for name, layer in adapter.layers.items()
    }
    adapter.remove()
    return found


def test_a_combination_is_the_weighted_sum_of_what_its_adapters_do(micro, two_files):
    first, second = (delta(micro, path, scale) for path, scale in zip(two_files, (0.7, 1.2)))
    adapter = lora.combine(micro, dict(zip(two_files, (0.7, 1.2))))
    assert adapter.rank == 5
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(
            layer.get_delta_weight(lora.NAME).detach(), first[name] + second[name]
        )


def test_a_combination_of_one_is_that_adapter_at_its_scale(micro, two_files, tmp_path):
    expected = delta(micro, two_files[0], 0.5)
    adapter = lora.combine(micro, {two_files[0]: 0.5})
    adapter.save(tmp_path / "kept.safetensors")
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.get_delta_weight(lora.NAME).detach(), expected[name])
    adapter.remove()
    again = delta(micro, tmp_path / "kept.safetensors", 1.0)
    for name in expected:
        torch.testing.assert_close(again[name], expected[name])


def test_a_combination_of_adapters_for_different_layers_acts_on_all_of_them(
    micro, tmp_path, two_files
):
    adapter = lora.add(micro, 1, targets=("to_out.0",))
    for parameter in adapter.parameters():
        torch.nn.init.ones_(parameter)
    other = adapter.save(tmp_path / "other.safetensors")
    adapter.remove()
    both = lora.combine(micro, {two_files[0]: 1.0, other: 1.0})
    assert all(layer.get_delta_weight(lora.NAME).any() for layer in both.layers.values())


def test_a_combination_names_what_it_cannot_combine(micro, two_files):
    with pytest.raises(ValueError, match="nothing to combine"):
        lora.combine(micro, {})
    with pytest.raises(ValueError, match=r"2\.safetensors: an adapter's weight .* got -1"):
        lora.combine(micro, {two_files[0]: -1})
    lora.add(micro).remove()  # nothing was left behind


def test_an_adapter_used_for_a_while_leaves_the_models_own_in_place(micro, two_files):
    mine = lora.load(micro, two_files[0])
    with lora.use_adapter(micro, None):
        other = lora.combine(micro, {two_files[1]: 1.0})
    layers = lora._layers(micro)
    with lora.use_adapter(micro, other) as active:
        assert active is other and other.attached and not mine.attached
    assert lora._layers(micro) == layers and mine.attached
    with pytest.raises(RuntimeError), lora.use_adapter(micro, two_files[1]):
        raise RuntimeError("in the middle")
    assert lora._layers(micro) == layers and mine.attached


def test_sample_takes_exactly_the_adapter_it_is_given(micro, two_files):
    """None is the base model, whatever is on it; a path or weights need nothing on it."""
    base = sample(micro, "a cat")
    from_file = sample(micro, "a cat", adapter=two_files[0])
    mixed = sample(micro, "a cat", adapter={two_files[0]: 0.7, two_files[1]: 0.3})
    mine = lora.load(micro, two_files[0])
    assert torch.equal(sample(micro, "a cat", adapter=mine), from_file)
    assert torch.equal(sample(micro, "a cat", adapter=str(two_files[0])), from_file)
    assert torch.equal(sample(micro, "a cat"), base)
    assert mine.attached
    assert len({tuple(x.flatten().tolist()) for x in (base, from_file, mixed)}) == 3, (
        "three different clips"
    )


def test_an_adapter_of_another_model_or_a_removed_one_is_an_error(
    micro, micro_directory, two_files
):
    from vader_nb import load

    other = load(micro_directory, dtype=torch.float64)
    with pytest.raises(ValueError, match="belongs to another"):
        sample(micro, "a cat", adapter=lora.load(other, two_files[0]))
    removed = lora.load(micro, two_files[0])
    removed.remove()
    with pytest.raises(ValueError, match="was removed"):
        sample(micro, "a cat", adapter=removed)


@pytest.mark.parametrize("start, end, acts", [(0, 1, 5), (0, 0.4, 2), (0.6, 1, 2), (0.2, 0.6, 2)])
def test_an_adapter_acts_in_its_part_of_the_chain_only(micro, two_files, start, end, acts):
    """Whether each step is the adapter's or the base model's is read off its own output."""
    adapter, seen = lora.load(micro, two_files[0], scale=0.8), []
    predict = micro.predict

    def spied(latents, t, inputs):
        """The base weights hold the sum while fused, so compare with a copy from before."""
        output = predict(latents, t, inputs)
        seen.append(not torch.equal(output, untouched.predict(latents, t, inputs)))
        return output

    with lora.use_adapter(micro, None):
        untouched = copy.deepcopy(micro)
    micro.predict = spied
    clip = sample(micro, "a cat", adapter=adapter, adapter_start=start, adapter_end=end)
    assert seen == [start * 5 <= i and i + 1 <= end * 5 for i in range(5)]
    assert seen.count(True) == acts
    assert adapter.scale == 0.8 and adapter.attached
    del micro.predict
    assert torch.equal(clip, sample(micro, "a cat", adapter=adapter)) == (acts == 5)


def test_an_adapter_that_acts_backwards_is_an_error(micro, two_files):
    with pytest.raises(ValueError, match=r"got 0\.5 to 0\.2"):
        sample(micro, "a cat", adapter=two_files[0], adapter_start=0.5, adapter_end=0.2)
