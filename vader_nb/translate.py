"""Other tools' arguments in our words: VADER's three scripts, VideoX-Fun's reward LoRA, TRL's removed AlignProp.

Each table says, argument by argument, what it is called here; None means that nothing corresponds, with the reason.
What depends on several arguments at once (the reward, the steps that learn) is put together by a function below.
Sources: VADER at adaf2ef, VideoX-Fun at 804a425 (scripts/*/train_reward_lora.py), TRL 0.23 (AlignPropConfig).
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class To:
    """Our name for an argument, or None; and what a user should know about the difference."""

    ours: str | None
    note: str = ""


REWARD, STEPS = "(reward)", "(strategy)"  # put together from several arguments

VADER = {
    # launch and loop
    "gradient_accumulation_steps": To(
        "gradient_accumulation_steps", "VADER's ModelScope script counts it twice"
    ),
    "train_batch_size": To("batch_size"),
    "batch_size": To("batch_size"),
    "max_train_steps": To("steps", "VADER goes on for one more step in every epoch that is left"),
    "num_train_epochs": To(
        None, "there are no epochs, as there is no dataset: steps says how long"
    ),
    "learning_rate": To("learning_rate"),
    "lr": To("learning_rate"),
    "lr_scheduler": To("lr_scheduler"),
    "lr_warmup_steps": To("lr_warmup_steps"),
    "adam_weight_decay": To("weight_decay"),
    "max_grad_norm": To("max_grad_norm"),
    "use_8bit_adam": To("use_8bit_adam"),
    "use_AdamW8bit": To("use_8bit_adam"),
    "mixed_precision": To("mixed_precision"),
    "seed": To("seed", "VideoCrafter's and Open-Sora's scripts seed from the clock anyway"),
    "lora_rank": To("rank", "its scale is 8 / rank, ours 1: add alpha=8 for the same"),
    # model and sampling
    "pretrained_model_path": To("model"),
    "num_inference_steps": To("num_inference_steps"),
    "ddim_steps": To("num_inference_steps"),
    "num_sampling_steps": To("num_inference_steps"),
    "guidance_scale": To("guidance_scale"),
    "unconditional_guidance_scale": To("guidance_scale"),
    "cfg_scale": To("guidance_scale"),
    "num_frames": To("num_frames"),
    "frames": To("num_frames"),
    "height": To("height"),
    "width": To("width"),
    # reward, steps, frames, prompts
    "reward_fn": To(REWARD),
    "hps_version": To(REWARD),
    "target_object": To(REWARD),
    "detector_model": To(REWARD),
    "compression_model_path": To(REWARD),
    "backprop_mode": To(STEPS),
    "decode_frame": To("frames"),
    "prompt_fn": To("prompts", "our own sentences of the same kind"),
    "prompt_path": To("prompts"),
    "nouns_file": To("nouns_file"),
    "activities_file": To("activities_file"),
    # what is kept
    "output_dir": To("output_dir"),
    "project_dir": To("output_dir"),
    "checkpointing_steps": To("checkpoint_every", "VADER counts micro-batches too"),
    "validation_steps": To("validation_steps"),
    "use_wandb": To("log_with"),
    "logger_type": To("log_with"),
    "wandb_entity": To(None, "set the environment variable WANDB_ENTITY"),
    # evaluation
    "only_val": To(None, "`vader-nb evaluate` does nothing else"),
    "inference_only": To(None, "`vader-nb evaluate` does nothing else"),
    "num_only_val_itrs": To("clips"),
    "num_val_runs": To("clips"),
    "val_batch_size": To("eval_batch_size"),
    "lora_path": To("adapter"),
    "lora_ckpt_path": To("adapter"),
    # what is done here anyway, or not at all
    "gradient_checkpointing": To(None, "always on a GPU"),
    "grad_checkpoint": To(None, "always on a GPU"),
    "cpu_step_cutoff": To(None, "no activations are kept for steps outside of the window"),
    "ddim_eta": To(None, "the model's scheduler decides; in Python: Sampling(eta=1.0)"),
    "decode_og": To(None, "strategy=refl scores the clean video predicted at a step"),
    "use_text_lora": To(
        None, "VADER's text encoder adapter gets no gradient; only the denoiser learns here"
    ),
    "use_unet_lora": To(None, "always"),
    "scale_lr": To(None, "VADER computes it and drops it"),
    "scheduler_type": To(None, "the model's own, DPM++ for modelscope as in VADER"),
    "debug": To(None, "set the environment variable VADER_NB_DEBUG=1"),
    "is_sample_preview": To(None, "the report has clips"),
    "adam_beta1": To(None, "its optimizer is AdamW with torch's other settings"),
    "adam_beta2": To(None, "its optimizer is AdamW with torch's other settings"),
    "adam_epsilon": To(None, "its optimizer is AdamW with torch's other settings"),
    "lora_unet_dropout": To(None, "the adapter has no dropout, no bias, and one kind"),
    "lora_text_dropout": To(None, "the adapter has no dropout, no bias, and one kind"),
    "lora_bias": To(None, "the adapter has no dropout, no bias, and one kind"),
    "lora_version": To(None, "the adapter has no dropout, no bias, and one kind"),
    "unet_lora_modules": To(None, "only the denoiser's attention learns"),
    "text_encoder_lora_modules": To(None, "only the denoiser's attention learns"),
    "trainable_modules": To(None, "only the denoiser's attention learns"),
    "trainable_text_modules": To(None, "only the denoiser's attention learns"),
    "train_text_encoder": To(None, "only the denoiser's attention learns"),
    "extra_unet_params": To(None, "only the denoiser's attention learns"),
    "extra_text_encoder_params": To(None, "only the denoiser's attention learns"),
    "load_videodataset": To(
        None, "there is no data set: training makes its clips of prompts alone"
    ),
    "dataset_types": To(None, "there is no data set: training makes its clips of prompts alone"),
    "extend_dataset": To(None, "there is no data set: training makes its clips of prompts alone"),
    "cache_latents": To(None, "there is no data set: training makes its clips of prompts alone"),
    "cached_latent_dir": To(
        None, "there is no data set: training makes its clips of prompts alone"
    ),
    "n_sample_frames": To(None, "there is no data set: training makes its clips of prompts alone"),
    "sample_start_idx": To(None, "there is no data set: training makes its clips of prompts alone"),
    "frame_step": To(None, "there is no data set: training makes its clips of prompts alone"),
    "use_bucketing": To(None, "there is no data set: training makes its clips of prompts alone"),
    "single_video_path": To(
        None, "there is no data set: training makes its clips of prompts alone"
    ),
    "single_video_prompt": To(
        None, "there is no data set: training makes its clips of prompts alone"
    ),
    "single_img_prompt": To(
        None, "there is no data set: training makes its clips of prompts alone"
    ),
    "fallback_prompt": To(None, "there is no data set: training makes its clips of prompts alone"),
    "json_path": To(None, "there is no data set: training makes its clips of prompts alone"),
    "image_dir": To(None, "there is no data set: training makes its clips of prompts alone"),
    "path": To(None, "there is no data set: training makes its clips of prompts alone"),
    "offset_noise_strength": To(None, "nothing is noised for training"),
    "use_offset_noise": To(None, "nothing is noised for training"),
    "rescale_schedule": To(None, "nothing is noised for training"),
    "save_lora_for_webui": To(None, "an adapter is one safetensors file"),
    "only_lora_for_webui": To(None, "an adapter is one safetensors file"),
    "save_pretrained_model": To(None, "an adapter is one safetensors file"),
    "enable_xformers_memory_efficient_attention": To(None, "torch's fused attention"),
    "enable_torch_2_attn": To(None, "torch's fused attention"),
    "text_encoder_gradient_checkpointing": To(None, "nothing of the text encoder learns"),
    "mode": To(None, "VideoCrafter's model is not offered here"),
    "ckpt_path": To(None, "VideoCrafter's model is not offered here"),
    "config": To(None, "VideoCrafter's model is not offered here"),
    "cond_input": To(None, "VideoCrafter's model is not offered here"),
    "unconditional_guidance_scale_temporal": To(None, "VideoCrafter's model is not offered here"),
    "fps": To(None, "the model's own"),
    "savefps": To(None, "the model's own"),
    "sample_preview": To(None, "the report has clips"),
    "prompt": To(None, "prompts=… is a set or a file; one prompt: `vader-nb sample`"),
    "n_samples": To(None, "seeds_per_prompt in an evaluation"),
    "num_sample": To(None, "seeds_per_prompt in an evaluation"),
    "condition_frame_length": To(None, "Open-Sora's model is not offered here"),
    "reference_path": To(None, "Open-Sora's model is not offered here"),
    "mask_strategy": To(None, "Open-Sora's model is not offered here"),
    "aes": To(None, "Open-Sora's model is not offered here"),
    "flow": To(None, "Open-Sora's model is not offered here"),
    "camera_motion": To(None, "Open-Sora's model is not offered here"),
    "loop": To(None, "Open-Sora's model is not offered here"),
    "llm_refine": To(None, "Open-Sora's model is not offered here"),
    "prompt_generator": To(None, "Open-Sora's model is not offered here"),
    "frame_interval": To(None, "Open-Sora's model is not offered here"),
    "flash_attn": To(None, "Open-Sora's model is not offered here"),
    "layernorm_kernel": To(None, "Open-Sora's model is not offered here"),
    "data_path": To(None, "Open-Sora's model is not offered here"),
    "resolution": To(None, "give height and width in pixels"),
    "aspect_ratio": To(None, "give height and width in pixels"),
    "image_size": To(None, "give height and width in pixels"),
    "dtype": To(None, "float16 on a GPU; in Python: load(dtype=…)"),
    "save_dir": To(None, "the report names its files"),
    "sample_name": To(None, "the report names its files"),
    "start_index": To(None, "the report names its files"),
    "end_index": To(None, "the report names its files"),
    "prompt_as_path": To(None, "the report names its files"),
    "save_fps": To(None, "the report names its files"),
    "watermark": To(None, "the report names its files"),
    "outputs": To(None, "the report names its files"),
    "verbose": To(None, "the report names its files"),
    "load": To(None, "resume=… goes on with a run"),
    "start_from_scratch": To(None, "resume=… goes on with a run"),
    "wandb": To("log_with"),
    "warmup_steps": To("lr_warmup_steps"),
    "prompt_fn_kwargs": To(None, "nouns_file and activities_file, or a file as prompts"),
}

VIDEOX = {
    "pretrained_model_name_or_path": To(
        "model", "Wan and CogVideoX are not offered here: choose modelscope"
    ),
    "train_batch_size": To("batch_size"),
    "max_train_steps": To("steps"),
    "num_train_epochs": To(None, "steps says how long"),
    "gradient_accumulation_steps": To("gradient_accumulation_steps"),
    "learning_rate": To("learning_rate"),
    "lr_scheduler": To("lr_scheduler"),
    "lr_warmup_steps": To("lr_warmup_steps"),
    "adam_weight_decay": To("weight_decay"),
    "max_grad_norm": To("max_grad_norm"),
    "use_8bit_adam": To("use_8bit_adam"),
    "use_came": To(None, "AdamW only"),
    "adam_epsilon": To(None, "1e-8"),
    "seed": To("seed"),
    "rank": To("rank"),
    "network_alpha": To("alpha"),
    "mixed_precision": To("mixed_precision"),
    "train_sample_height": To("height"),
    "train_sample_width": To("width"),
    "video_length": To("num_frames"),
    "num_inference_steps": To("num_inference_steps"),
    "guidance_scale": To("guidance_scale"),
    "eta": To(None, "in Python: Sampling(eta=…)"),
    "prompt_path": To("prompts"),
    "validation_prompt_path": To("held_out"),
    "validation_steps": To("validation_steps"),
    "validation_batch_size": To("eval_batch_size"),
    "reward_fn": To(REWARD),
    "reward_fn_kwargs": To(REWARD),
    "backprop": To(None, "always"),
    "backprop_strategy": To(STEPS),
    "backprop_num_steps": To(STEPS),
    "backprop_random_start_step": To(STEPS),
    "backprop_random_end_step": To(STEPS),
    "backprop_step_list": To(STEPS),
    "stop_latent_model_input_gradient": To(STEPS),
    "num_decoded_latents": To(
        "frames", "it decodes the first so many latents; here frames are named one by one"
    ),
    "num_sampled_frames": To("frames", "evenly spread frames; here random ones"),
    "gradient_checkpointing": To(None, "always on a GPU"),
    "vae_gradient_checkpointing": To(
        None, "frames are decoded a few at a time, with exact gradients"
    ),
    "low_vram": To(None, "see `vader-nb memory` for what to change"),
    "allow_tf32": To(None, "in Python: torch.set_float32_matmul_precision('high')"),
    "output_dir": To("output_dir"),
    "checkpointing_steps": To("checkpoint_every"),
    "checkpoints_total_limit": To("checkpoints_total_limit"),
    "resume_from_checkpoint": To("resume"),
    "report_to": To("log_with"),
    "tracker_project_name": To(None, "the run's name"),
    "train_text_encoder": To(None, "only the denoiser learns"),
    "use_deepspeed": To(None, "accelerate launch --config_file … says so"),
}

TRL = {
    "seed": To("seed"),
    "run_name": To("name"),
    "log_with": To("log_with"),
    "num_epochs": To("steps", "an epoch of AlignProp is one optimizer step"),
    "save_freq": To("checkpoint_every"),
    "num_checkpoint_limit": To("checkpoints_total_limit"),
    "mixed_precision": To("mixed_precision"),
    "resume_from": To("resume"),
    "sample_num_steps": To("num_inference_steps"),
    "sample_guidance_scale": To("guidance_scale"),
    "sample_eta": To(None, "in Python: Sampling(eta=…)"),
    "train_batch_size": To("batch_size"),
    "train_use_8bit_adam": To("use_8bit_adam"),
    "train_learning_rate": To("learning_rate"),
    "train_adam_weight_decay": To("weight_decay"),
    "train_gradient_accumulation_steps": To("gradient_accumulation_steps"),
    "train_max_grad_norm": To("max_grad_norm"),
    "truncated_backprop_rand": To(STEPS),
    "truncated_backprop_timestep": To(STEPS),
    "truncated_rand_backprop_minmax": To(STEPS),
    "negative_prompts": To(None, "guidance is against the empty prompt"),
    "allow_tf32": To(None, "in Python: torch.set_float32_matmul_precision('high')"),
    "log_image_freq": To(None, "the report has clips"),
    "logdir": To("output_dir"),
    "push_to_hub": To(
        None, "the adapter is one safetensors file: upload it with the hub's own tool"
    ),
}

NAMES = {"vader": VADER, "videox_fun": VIDEOX, "trl": TRL}

# Values that are written in another way here: our name -> theirs -> ours.
VALUES: dict[str, dict] = {
    "frames": {"-1": "random:1", "fml": "ends", "alt": "nth:2"},
    "log_with": {
        "True": "wandb",
        "true": "wandb",
        "False": None,
        "false": None,
        "all": "tensorboard",
    },
    "model": {
        "damo-vilab/text-to-video-ms-1.7b": "modelscope",
        "ali-vilab/text-to-video-ms-1.7b": "modelscope",
    },
    "adapter": {"": None},
    "resume": {"": "false"},
}

VADER_REWARDS = {
    # Its loss is 0.1 |aesthetic - 10| and |1 - hps|: the gradients of these.
    "aesthetic": "0.1 * aesthetic().towards(10)",
    "pick_score": "pickscore",
    "rainy": "rainy('rainy_reward.pt')",  # its file in VADER's assets
    "snowy": "snowy('snowy_reward.pt')",
}
VIDEOX_REWARDS = {
    "AestheticReward": "aesthetic",
    "HPSReward": "hps",
    "PickScoreReward": "pickscore",
}


def vader_reward(given: dict) -> tuple[dict, list[str]]:
    name, version = str(given.get("reward_fn", "aesthetic")), str(given.get("hps_version", "v2.1"))
    hps = "hps" if version == "v2.1" else f"hps({version!r})"
    if name in ("hps", "aesthetic_hps"):
        return {"reward": hps if name == "hps" else "aesthetic_hps"}, []
    if name == "objectDetection":
        return {"reward": f"object_removal({str(given.get('target_object', 'book'))!r})"}, []
    if name in ("compression", "compression_score"):
        return {
            "reward": f"compression({str(given.get('compression_model_path', 'compression_reward.pt'))!r})"
        }, []
    if name == "actpred":  # VADER's runs with decode_frame=alt only
        return {"reward": "action"} | ({} if "decode_frame" in given else {"frames": "nth:2"}), []
    if name not in VADER_REWARDS:  # an expression of ours
        return {"reward": name}, []
    return {"reward": VADER_REWARDS[name]}, []


def to_ours(name: str) -> str | None:
    return VADER[name].ours if name in VADER else name


def vader_steps(given: dict) -> tuple[dict, list[str]]:
    counts = [
        value
        for name, value in given.items()
        if to_ours(name) == "num_inference_steps" and value is not None
    ]
    mode, steps = (
        str(given["backprop_mode"]),
        int(counts[-1] if counts else 25),
    )  # of two names, the later one's
    if mode == "specific":  # from step index 15 on, whatever the number of steps
        return {"strategy": "last", "K": max(1, steps - 15)}, [
            f"backprop_mode=specific: the last {steps - 15} steps"
        ]
    names = {"last": {"strategy": "last", "K": 1}, "rand": {"strategy": "random", "K": None}}
    if mode not in names:
        raise ValueError(f"unknown backprop_mode {mode!r}: VADER knows last, rand and specific")
    return names[mode], []


def videox_reward(given: dict) -> tuple[dict, list[str]]:
    name = str(given.get("reward_fn", "aesthetic_loss_fn"))
    options = json.loads(given.get("reward_fn_kwargs") or "{}")
    if name == "HPSReward" and options.get("version", "v2.1") != "v2.1":
        return {"reward": f"hps({options['version']!r})"}, []
    if name not in VIDEOX_REWARDS:
        return {}, [f"reward_fn={name} is not offered here; see: vader-nb rewards"]
    return {"reward": VIDEOX_REWARDS[name]}, []


def videox_steps(given: dict) -> tuple[dict, list[str]]:
    how, count = (
        str(given.get("backprop_strategy", "last")),
        int(given.get("backprop_num_steps", 5)),
    )
    if given.get("backprop_step_list"):
        return {}, [
            "backprop_step_list: one step is strategy=step K=i, counted from the end; lists are not offered"
        ]
    if how in ("last", "tail"):
        ours = {"strategy": "last", "K": 1 if how == "last" else count}
        skip = ["stop_latent_model_input_gradient with it: see strategy=drtune"]
        return ours, skip if given.get("stop_latent_model_input_gradient") else []
    note = f"backprop_strategy={how}: as DRTune's evenly spread steps; the path between them skips the denoiser, which "
    return {"strategy": "drtune", "K": count}, [note + "is stop_latent_model_input_gradient"]


def trl_steps(given: dict) -> tuple[dict, list[str]]:
    steps = int(given.get("sample_num_steps", 50))
    if str(given.get("truncated_backprop_rand", "True")).lower() == "true":
        low = numbers(given.get("truncated_rand_backprop_minmax", "0 50"))[0]
        note = "truncated_backprop_rand: K is drawn once a clip here; TRL draws anew at every step"
        return {"strategy": "random", "K": max(1, steps - low)}, [note]
    at = int(given.get("truncated_backprop_timestep", 49))
    if at >= steps:
        return {"strategy": "last", "K": 1}, [
            f"truncated_backprop_timestep={at} of {steps} steps leaves no gradient"
        ]
    return {"strategy": "last", "K": steps - at}, []


def numbers(value) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", str(value))]


TOGETHER: dict[tuple[str, str], Callable[[dict], tuple[dict, list[str]]]] = {
    ("vader", REWARD): vader_reward,
    ("vader", STEPS): vader_steps,
    ("videox_fun", REWARD): videox_reward,
    ("videox_fun", STEPS): videox_steps,
    ("trl", STEPS): trl_steps,
}


OTHERS = (
    {"ckpt_path", "mode", "savefps", "unconditional_guidance_scale_temporal"},
    {"resolution", "aspect_ratio"},
)
FAMILIES = dict(zip(("VideoCrafter's", "Open-Sora's"), OTHERS))


def unmet(ours: dict, given: dict) -> Iterator[str]:
    """What a translated script cannot do here; values that mean nothing here are taken out. (On a command line they are
    errors.)"""
    from .prompts import SETS

    if not re.fullmatch(r"\d*|None", str(ours.get("num_frames", ""))):
        yield f"num_frames={ours.pop('num_frames')}: a duration, left out; give a number of frames: num_frames=16"
    name = ours.get("prompts")
    if (
        name
        and name not in SETS
        and Path(name).name == name
        and not Path(name).suffix
        and not Path(name).is_file()
    ):
        del ours["prompts"]
        yield f"no prompts are named {name!r} here, left out; give prompts=FILE, or a set: {', '.join(SETS)}"
    for whose, marks in FAMILIES.items():
        if marks & given.keys():
            yield (
                f"WARNING: the script is {whose}, another family of models, which is not offered here; no model is set: "
                f"add model=modelscope or model=zeroscope, and look again at height, width, num_frames and learning_rate"
            )


def translate(
    source: str, given: dict, known: set[str] | None = None, everything: dict | None = None
) -> tuple[dict, list[str]]:
    """Another tool's arguments (name -> value) as ours, and what a user should know. `known`: our names that make sense
    here; others are left out, and said. `everything`: these and what is set beside them, in either's names, which may matter."""
    table, ours, notes, groups = NAMES[source], {}, [], set()
    for name, value in given.items():
        if name not in table:
            notes.append(f"{name}={value}: unknown, left out")
            continue
        to = table[name]
        if to.ours in (REWARD, STEPS):
            groups.add(to.ours)
            continue
        if to.ours is None:
            notes.append(f"{name}: left out; {to.note}")
            continue
        ours[to.ours] = VALUES.get(to.ours, {}).get(str(value), value)
        if to.note:
            notes.append(f"{name} is {to.ours} here; {to.note}")
    for group in sorted(groups):
        more, told = TOGETHER[source, group](everything or given)
        ours, notes = ours | more, notes + told
    if "clips" in ours:  # iterations of so many clips
        ours["clips"] = int(ours["clips"]) * int(given.get("val_batch_size", 1))
    if str(given.get("use_wandb", "")).lower() == "false":
        ours["log_with"] = None
    if known is not None:
        for name in sorted(ours.keys() - known):
            notes.append(f"{name}={ours.pop(name)}: not of this command, left out")
    return ours, notes


def guess(given: dict) -> str:
    """The tool whose names these are."""
    counts = {source: sum(name in table for name in given) for source, table in NAMES.items()}
    return max(counts, key=counts.get)


def read(path: str | Path) -> dict:
    """Arguments of a YAML file (sections are flattened), or of the shell script or command that starts a tool."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        from .config import yaml_of

        return dict(leaves(yaml_of(path)))
    if path.suffix == ".py":
        raise ValueError(
            f"{path} is Python, which is not run here; write its settings as key=value lines in a .sh file"
        )
    variables = dict(
        re.findall(r"^\s*(?:export\s+)?(\w+)=(['\"]?[^\s'\"]*['\"]?)\s*$", text, re.MULTILINE)
    )
    text = re.sub(
        r"\$\{?(\w+)\}?",
        lambda m: variables.get(m[1], m[0]).strip("'\""),
        text.replace("\\\n", " "),
    )
    text = re.sub(
        r"^\s*#.*$", "", text, flags=re.MULTILINE
    )  # a comment may hold one quotation mark
    words = [
        word
        for line in text.splitlines()
        if "launch" in line or "python" in line
        for word in shlex.split(line, comments=True)
    ]
    found = {}
    for word, following in zip(words, [*words[1:], "--"]):
        name, given, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if given and name.isidentifier():
            found[name] = value
        elif word.startswith("--"):
            found[name] = "True" if following.startswith("--") else following
    if not found:
        raise ValueError(
            f"no arguments found in {path}: give a YAML file, or the script with its launch command"
        )
    return found


def leaves(tree: dict):
    """(name, value) of all that is not a section. VADER's are train_data, validation_data, …; the last one wins."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value)
        elif value is not None:
            yield name, value


LAUNCH = {
    "num_processes",
    "multi_gpu",
    "main_process_port",
    "config_file",
    "num_machines",
}  # accelerate's own


def as_yaml(path: str | Path, source: str | None = None) -> tuple[str, list[str]]:
    """The file in our words, as YAML, and what differs."""
    from omegaconf import OmegaConf

    from .config import Align

    given = {name: value for name, value in read(path).items() if name not in LAUNCH}
    source = source or guess(given)
    if source not in NAMES:
        raise ValueError(f"unknown source {source!r}; choose one of {', '.join(NAMES)}")
    ours, notes = translate(source, given, {f.name for f in fields(Align)})
    notes += unmet(ours, given) if source == "vader" else []
    typed = OmegaConf.merge(OmegaConf.structured(Align), ours)
    kept = {name: typed[name] for name in ours}
    return (
        f"# {source} arguments of {Path(path).name}, in vader_nb's words\n{OmegaConf.to_yaml(OmegaConf.create(kept))}",
        notes,
    )


TITLES = {
    "vader": "VADER (three scripts: ModelScope, VideoCrafter, Open-Sora)",
    "videox_fun": "VideoX-Fun, reward LoRA",
    "trl": "TRL, AlignProp (removed in 0.24)",
}


def markdown() -> str:
    """notebooks/arguments.md: all arguments of all tools, and what they are called here."""
    lines = ["# Other tools' arguments, in our words", ""]
    lines += [
        "`vader-nb align` and `evaluate` read VADER's names as they are; `vader-nb translate-config FILE` turns a"
    ]
    lines += [
        "configuration or launch script of any of these tools into ours and says what differs.",
        "",
    ]
    for source, table in NAMES.items():
        lines += [f"## {TITLES[source]}", "", "| argument | here | |", "|---|---|---|"]
        for name, to in table.items():
            ours = {REWARD: "`reward`", STEPS: "`strategy`, `K`"}.get(
                to.ours, f"`{to.ours}`" if to.ours else "none"
            )
            lines.append(f"| `{name}` | {ours} | {to.note} |")
        lines.append("")
    return "\n".join(lines)
