"""The pages that are generated from what the package says of itself: `python notebooks/pages.py`."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from vader_nb import Race, models, recipes, rewards, translate, zoo
from vader_nb.evaluation import BASE
from vader_nb.tables import Table

ARGUMENTS = """\
# Other tools' arguments, and what they are called here

`vader-nb align` and `evaluate` read VADER's names as they are; `vader-nb translate-config FILE`
turns a configuration or launch script of any of these tools into ours and reports what differs.
This page is generated from `vader_nb/configs/foreign/*.yaml`.
"""


def arguments_page() -> str:
    lines = [ARGUMENTS]
    for table in map(translate.tool, translate.SOURCES):
        lines += [f"## {table.title}", "", "| argument | here | |", "|---|---|---|"]
        for name, setting in table.names.items():
            lines.append(f"| `{name}` | `{setting}` | {table.notes.get(name, '')} |")
        for reason, names in table.left_out.items():
            lines.append(f"| `{'`, `'.join(names)}` | none | {reason} |")
        lines.append("")
    return "\n".join(lines)


RECIPES = """\
# Recipes

Configurations by model and GPU. `vader-nb align config=NAME` runs one, and `key=value` after it changes a setting;
`vader-nb recipes NAME` prints it, and `vader-nb recipes` this table.

- Memory is the simulated peak of one GPU in a step, weights included, in the types in which `align` loads them:
  `vader-nb memory config=NAME gpu_memory="GPU"` shows it by stage, with the same settings. For the embedded models it is what
  their tensors take on a CPU: `vader-nb memory config=NAME dtype=float32 gradient_checkpointing=false`.
- Denoiser calls are forward passes for one optimizer step, over all GPUs, each for one clip and one branch of the guidance.
- Learning rates, ranks and steps are those of the cited runs, and left out where none were published: then the package's
  defaults apply, which were found on the embedded models.
- "Run here" means on this code, at that commit, by `make recipes`; †: a reward that was not trained on; in brackets the 95%
  interval of the difference over prompts.

This page is generated from `vader_nb/configs`.
"""
ON_A_CLUSTER = """\
## On a cluster

`vader-nb recipes slurm` prints this script. When a job's time is up, training stops after the current
step; the job is requeued and continues from there.
"""


CURVES = """\
![The reward in training, of each step's clips (gray) and its mean over eight steps (blue), for the embedded models](images/recipes.png)

Each step has different prompts, some harder than others. The scatter hides any gain: see the difference on
held-out prompts, in the table."""


def recipes_page() -> str:
    lines = [RECIPES, recipes.table().markdown(), "", CURVES, ""]
    for name in recipes.CARDS:
        lines += [f"## {name}", "", "```yaml", recipes.text(name).rstrip(), "```", ""]
    return "\n".join(
        [*lines, ON_A_CLUSTER, "```bash", recipes.text(recipes.SLURM).rstrip(), "```", ""]
    )


MODELS = """\
# Models

`vader_nb.load(NAME)`, or `model=NAME` in a shell. A directory of any of these pipelines loads, too; for another id on the Hub,
`hf download ID --local-dir FOLDER` makes one.
`vader-nb models` prints this table with advice on K and on decoding. This page is generated (`make notebooks`).

{table}

*Training, GiB* is the simulated peak of one training step with HPSv2.1, one clip, K = 1, weights in the types that a GPU gets,
text encoders over 1e9 parameters unloaded; *offloaded*: with `model_cpu_offload=true sequential_guidance=true`, and for causal
decoders `decoder_states=cpu` (`python -m tests.benchmarks.models`). *Tested*: at full size each model was built on tensors that have shapes but no
values (parameters and memory are counted); at reduced width it was run with random weights. **The published weights have
not been run here.**

Cards of the embedded ones: [tiny](../vader_nb/zoo/weights/tiny/README.md),
[tiny-wan](../vader_nb/zoo/weights/tiny-wan/README.md), [tiny-i2v](../vader_nb/zoo/weights/tiny-i2v/README.md), and
[three adapters](../vader_nb/zoo/weights/tiny-adapters/README.md) for `tiny`. Not in yet: LTX-2.

## What K does: a UNet and a transformer, noise and flow

Both embedded text-to-video models with the same prompts, seeds and reward (hps + 0.02 × aesthetic), 40 training steps
each by its recipe (`tiny`: four clips, one random frame of each; `tiny-wan`: eight clips, all frames), on one CPU thread:

| model | K | gain | cosine | step, CPU s | reward, held-out prompts | per CPU minute |
|---|---|---|---|---|---|---|
| `tiny`: UNet, v, DDIM | 1 | 0.33 | 0.89 | 1.95 | +0.044 [+0.010, +0.093] | +0.034 |
| `tiny`: UNet, v, DDIM | 2 | 0.33 | 0.92 | 2.39 | +0.043 [+0.008, +0.091] | +0.027 |
| `tiny`: UNet, v, DDIM | 5 | 0.33 | 0.99 | 3.67 | +0.042 [+0.007, +0.090] | +0.017 |
| `tiny`: UNet, v, DDIM | 10 | 0.33 | 1.00 | 5.60 | +0.044 [+0.008, +0.091] | +0.012 |
| `tiny-wan`: transformer, flow, Euler | 1 | 0.43 | 0.80 | 4.37 | +0.044 [+0.007, +0.142] | +0.015 |
| `tiny-wan`: transformer, flow, Euler | 2 | 0.43 | 0.91 | 4.22 | +0.050 [+0.011, +0.156] | +0.018 |
| `tiny-wan`: transformer, flow, Euler | 5 | 0.43 | 1.00 | 4.39 | +0.052 [+0.011, +0.143] | +0.018 |

*Gain*: how far the final latents move with the last denoiser output, by the schedule alone. *Cosine*: of the gradient of `Last(K)` to that
through all steps. *Reward, held-out prompts*: what training adds to the trained reward on 48 of them, with its 95% interval. In the UNet the gradient of one step
points where the one through all ten does (0.89), reaches the same reward, and costs a third: VADER's setting. In the transformer,
which takes five steps and is cheap compared with its decoder, the exact gradient costs as much as that of one step. No K beats
another here by more than its interval. (`python -m tests.benchmarks.truncation 1`; run before `tiny-wan`'s decoder became faster: its steps now take some three quarters of these seconds.)

## Models that continue an image

They take a `Prompt` with an image, and make their own clips longer:

```python
i2v = vader_nb.load("tiny-i2v")
text = "a red star growing on a black background"
image = vader_nb.sample(vader_nb.load("tiny"), text)[0, 0]
long = vader_nb.extend(i2v, image, times=3, prompts=text)  # 22 frames
reward = vader_nb.rewards.hps("tiny")
vader_nb.align(i2v, reward, "tiny", extend=3, segments="2,3", output_dir="runs/long")
```

## One of your own

[Add a model](add_a_model.md) in under a hundred lines; `vader_nb.testing.check_model` compares its gradients with autograd's.
"""


def models_page() -> str:
    return MODELS.format(table=models.table().markdown())


REWARDS = """\
# Rewards

`rewards.hps()` in Python, `reward=hps` in a shell. `hps("tiny")`, `aesthetic("tiny")` and `action("tiny")` are embedded; in a shell
the plain names mean these for an embedded model. Without a checkpoint a reward loads what its authors published, from the Hub, from your `HF_HOME` when offline, or from a path that you give.
`vader-nb rewards` prints this table with memory and usual scores. This page is generated (`make notebooks`).

{table}

Each network is tested against the library that defines it (open_clip, transformers, torchvision, HPSv2's own package; for ImageReward
a plain reimplementation of its network) on checkpoints with the real layout and random weights. **The published weights have
not been run here.**

Frames are scored a few at a time and the networks' blocks are checkpointed: sixteen frames through HPS's ViT-H add 0.16 GB to its
1.97 GB of float16 weights, where plain autograd adds 3.5 GB (`python -m tests.benchmarks.reward_memory`: exact shapes
without numbers).

The `hpsv2` package is not needed: its score is computed through open_clip. As an extra it exists for comparisons only
(`pip install -e '.[hpsv2]'`); the released package lacks a file and pins old versions.

## They mix

They can be added (`hps() + 0.1 * aesthetic()`), aimed (`.towards(10)`), capped (`.capped(2)`), measured in standard deviations
(`.normalized(mean, std)`), and checked for conflict (`rewards.conflict`).

## Any differentiable function of frames is one

```python
def blueness(frames, prompts):  # (B, F, 3, H, W) in [0, 1] -> (B,)
    return (frames[:, :, 2] - frames[:, :, 0]).mean(dim=(1, 2, 3))


vader_nb.check(blueness)  # is it fit to train on?
```

In a shell it is `reward=my_rewards.py:blueness`.

## Judges without a gradient

They are for `evaluate`, and for training without the reward's gradient (`estimator=grpo`): real JPEG and H.264 bytes, a vision-language model's "yes" (`rewards.vlm_yes`), or your own server
(`reward=http://localhost:8000/score`). When one goes away during `evaluate`,
only its column is lost; a run that trains on it stops with an error.
"""


def rewards_page() -> str:
    return REWARDS.format(table=rewards.table().markdown())


RACES = """\
# Races

Methods with and without the gradient of a reward: the same model, prompts, seeds, adapters and optimizer, equal budgets, of denoiser
calls unless seconds are named. Each is set up as its paper or its authors' code says, where they do (the configurations in `vader_nb/configs/races` cite the source),
with its own learning rates, but scaled to the budget: five denoising steps; for DDPO and GRPO 32 clips per step (DDPO's authors: 256), for DPO 16, which are
4 pairs (its authors: 2,048), for VADER 4, on the flow model 8. DPO is *online*: it
prefers the best of four clips to the worst, where its paper has pairs chosen by people. Trained on hps + 0.02 × aesthetic unless a section says otherwise; all numbers are for held-out prompts.

- *reward queries*: clips scored in training; *denoiser calls*: latents through the denoiser, once for each branch of the guidance;
  *seconds*: of one CPU thread, without evaluations; they compare within a race only, since not all ran on the same machine.
- *reward*, *held-out reward* (the log-probability that the embedded action network gives to the motion in the prompt; 0 is best): where a contestant ended; in parentheses,
  the lowest and the highest seed. The base has 0.9915 and -0.1292 on the first race's prompts.
- *oracle accuracy*: the share of clips whose color and shape are right; *diversity*: of the clips of one prompt; *motion*: how much
  consecutive frames differ. (On the flow model its axes are narrow: most span 1 to 4% of it.)
- *judges*: the held-out reward (the action judge) and the *oracles*, plain code that reads color, shape and motion off the frames.
- Pictures show the chosen rates only. In the upper panels the band goes from the lowest to the highest seed (left out with more than six contestants), and dotted lines
  are the base (gray) and contestants without training. In the lower panels each path begins at the base, the star.

The lines behind all of it come with the package: `vader_nb.Race(vader_nb.zoo.races()["full"])`. Numbers that are in no table (single seeds, earlier
evaluations, `reach`) were computed from the same lines. This page is generated.
"""
RATES = """\
One seed, which may be a lucky one: no verdict. But at 3e-4 VADER's gain is 2.6 times the next best, and with each at its own best
rate 1.5 times. VADER passed DDPO's best final reward (1.0201, after 896 queries) after some 190 (at 3e-3; interval 81 to 365): 4.8 times
fewer, and 9 times fewer seconds. And VADER's best rate by the trained reward is the one of its rates at which the action network is lowest and
the oracle finds 6% of the motions wrong; on one seed, neither can be told from no loss. At 1e-2, DDPO loses reward; DPO (-0.024 [-0.056, 0.003]) and
GRPO (-0.001 [-0.022, 0.025]) cannot be told from the base. VADER was not tried there.

What became of the two best rates of each, on three new seeds, is above.
"""
FULL = """\
Three new seeds for each method's two best rates from below. The chosen rates, against the base, with 95% intervals over prompts:

{ends}

- **Queries.** VADER passed DDPO's final reward after 40 queries (interval 27 to 70) instead of 896: 23 times fewer (13 to 33; the 40 is
  interpolated, the first measurement is at 56), with 34 times fewer
  denoiser calls and 40 times fewer seconds. GRPO needed 835 queries and DPO 1,143, neither told apart from DDPO.
- **What they bought.** After 56 queries and 18 seconds, VADER had the right color and shape in 99.6% of clips, more than any other trained
  contestant's mean at any time. DPO had 98.8% after 192 queries, and DDPO and GRPO at their end (the differences of 0.008 have intervals that contain
  zero). Then VADER's reward wavers and rises, and accuracy ends at 95% (0.05 below what it was after 56 queries [-0.02, 0.28]). Between 856 and 1,336 queries
  the action judge falls in two of three seeds, by 0.80 and 0.67 (mean of three 0.49 [0.15, 1.00], over prompts); 4, 25 and 9% of the motions end wrong. At
  1e-3 all motions stayed right (accuracy ends at 96%), and the judge's loss of 0.02 [-0.03, 0.12] cannot be told from zero. The others' mean rewards were
  still rising; at their chosen rates no judge shows a clear loss, and motion fell a little, as for best of 8.
- **So here the reward's gradient reached the goal sooner, and overshot within the budget.** The rule for choosing a rate, the trained reward, chose the one
  that hacked it in two of three seeds. Stop by a reward that is not trained on (`validation_steps`, `held_out_reward`, `early_stopping`).
- **Seeds.** On one seed, 3e-3 was DDPO's best rate. On three it is 1e-3 (by less than three seeds can tell), and at 3e-3 the seeds end anywhere between no gain
  and +0.026. Rates are chosen on the very seeds and prompts of this table, which flatters all of them a little.
- **Without training**, reward guidance has the highest reward of all, and every color and shape right, for five reward gradients per clip. (Its strength
  was tuned on this model; its judge, -0.05 [-0.39, 0.05], cannot be told from the base's.) Best of 8, for eight queries per clip, has about the reward of
  DDPO, GRPO and DPO after training (differences of 0.002 to 0.003, intervals of about 0.015 to both sides).
"""
FULL_WAN = """\
The same on the flow model, with all frames, at three rates. The chosen ones, against the base:

{ends}

- **DDPO and GRPO gain nothing here that can be told from zero** (and GRPO loses a little of the held-out reward, 0.007 [0.001, 0.017]). 28 steps of 32 clips are few for them (their authors take hundreds, of larger batches), though on the diffusion
  model they were enough. And a flow draws no noise by itself: they train with noise that is added at each step (an SDE), and are judged without it (the ODE). So it says little that VADER passed DDPO's final reward
  after 121 queries (interval 0 to 299).
- **DPO learns, per query as fast as VADER at its chosen rate.** It needs neither noise nor a gradient of the reward. Its mean reward first reached its final value after 416 queries
  (interval 197 to 896), VADER's after 459 (160 to 824). In seconds it was faster, 90 (42 to 196) against 318 (113 to 568): VADER goes back through a decoder that takes
  nearly all of its time. Its budget of denoiser calls lasted for four and a half times DPO's seconds.
- **VADER goes farther.** It ends 0.028 above DPO [0.0003, 0.073], with every color right (0.075 more than the base [0.017, 0.157]). No method mends the shapes, which are wrong in a
  third of the clips. And VADER's clips of one prompt become alike: diversity falls by 0.085 [0.006, 0.180].
- **At 3e-3 it is faster, and overshoots again.** It reaches DPO's end after 228 queries (76 to 353). After 336 queries the reward has risen by 0.058 [0.016, 0.116], more than DPO's at its end (by 0.019 [0.001, 0.044]), and accuracy is 0.11 above
  DPO's [0.01, 0.24]; but the held-out reward is already 0.16 below the base's [0.01, 0.37]. From there the reward stays where it is, the held-out reward falls by another
  0.72 [0.31, 1.32], and accuracy by 0.31 [0.19, 0.44].
- **At 1e-2 nobody ends above the base, or above a lower rate.** VADER has gained 0.048 [0.003, 0.108] after 336 queries. By then more colors are right than before, but far fewer
  shapes (accuracy, which wants both, -0.20 [-0.32, -0.07]), and it ends 0.11 below the base [0.05, 0.17]. DDPO ends 0.16 below it [0.11, 0.21] and DPO 0.20 [0.13, 0.28]. GRPO gains nothing (-0.006 [-0.042, 0.041]) and loses accuracy (-0.11 [-0.20, -0.02]).
- **Without training**, best of 8 has the highest reward, not told apart from VADER's (0.011 above it [-0.003, 0.030]), and no judge shows a loss. Guidance gains 0.047 [0.032, 0.071], at
  the strength that was tuned on the other model.
- **On both models,** then, of the methods that train, the reward's gradient climbs highest and, at 3e-3, goes on into what the judges call worse. At 1e-3 no judge shows a clear loss on
  either. How many times faster it is depends on the model, the rival and the rate: 23 times fewer queries than DDPO on the diffusion model at 3e-3 (9 times at 1e-3, 97 [39, 163]); on the
  flow, as many as DPO at 1e-3, and half as many at 3e-3, where their intervals overlap.
"""
REUSE_WAN = """\
The same on the flow model, where a step scores all frames of eight clips, and trains through a decoder that works frame by frame.

{ends}

Here the roll-out takes a twentieth of a step's time, so reuse saves almost nothing: in 60 seconds n = 1, 2 and 4 make 15 or 16 updates (a step of n = 8 takes 30 seconds;
its last one began before the 60 were over). No difference between
n = 1 and the others is clear, neither in the reward (n = 4: +0.001 [-0.021, +0.032]) nor in the held-out reward (-0.058 [-0.374, +0.035]), and the gain of
n = 1 over the base is all but clear [-0.0001, 0.018]. With this, n stays 1. (Run before the decoder became faster: 60 seconds now hold some 20 updates, here and in the next race on this model.)
"""
STRATEGIES = """\
Which steps learn, and along which path the gradient reaches them, each close to its paper (ReFL draws one of the last two steps of five, its paper
one of the last quarter; LeapAlign is without its paper's weights of pairs). Every contestant has 60 seconds, one learning rate for
all (their gradients differ in length, which AdamW divides out; no rate was tuned), and one random frame of four clips in each update. Differences are from K = 1:

{ends}

- **Nobody is far ahead.** All gain over the base, and all reach 99 to 100% of colors and shapes. ReFL ends 0.006 above K = 1 [0.001, 0.013], DRTune
  and LeapAlign 0.004 (intervals from 0.0002 on); of eight comparisons one may be luck.
- **All five steps cost too much here:** 21 updates instead of K = 1's 51, and 0.008 less reward [0.002, 0.021]. K = 2 is a little behind, too.
- **More reward, less motion:** in the last panel the contestants lie on one line, whichever steps they train. No judge tells them apart.
"""
STRATEGIES_WAN = """\
The same on the flow model, with all frames of eight clips. There the decoder costs so much more than the denoiser that all strategies make about as many
updates in 60 seconds (13 to 16; DRaFT-LV, which scores each clip twice, 8). Differences are from K = 1:

{ends}

- **Here K = 1 ends lowest, but for DRaFT-LV.** K = 2, K = 5, LeapAlign and Direct-Align end 0.009 to 0.015 higher, and each one's worst seed is above K = 1's best.
  But the intervals over 48 prompts all contain zero: one and the same prompt makes 62 to 72% of the lead of K = 2, K = 5 and LeapAlign, and 96% of Direct-Align's.
- **No judge tells them apart:** oracle accuracy 0.62 to 0.64, and the held-out reward's intervals contain zero.
- So K = 1, VADER's setting for long chains in big UNets, is not a law: where the decoder dominates, more steps cost little, and are worth trying.
"""
NEAR = """\
A reckless run, on purpose: the aesthetic reward alone at a learning rate of 1e-2 ruins the clips within a minute. Each contestant adds one thing that might hold it
back. (Early stopping is in the picture, too: the points of a path are what one would keep by stopping there.)

{ends}

- **The distance to the base does it.** With `base_penalty=10` (in units of the reward) the reward rises by 0.073 [0.010, 0.132], about as much as with nothing (0.083 [-0.152, 0.301]), and no
  judge finds a clear loss (accuracy -0.02 [-0.10, 0.07], held-out reward +0.03 [-0.09, 0.36]); nor do motion, +0.001 [-0.0001, 0.002], and diversity, +0.03 [-0.04, 0.15], clearly change. With
  nothing, four of ten clips have the wrong color or shape (base: 6%), and what looks like more motion and diversity is broken clips. The penalty costs a quarter of
  the updates, for the base's denoiser calls. At 1 it is too weak.
- **Weight decay, a moving average and a cap do not,** at the one strength that was tried of each (the cap is about the base's mean: a clip above it gives no gradient, but those below still push the adapter; the
  table shows the reward without its cap). Their mean rewards end higher than with nothing, their
  accuracy 0.30 to 0.50 below the base's.
- **A slower run** (a third of the rate) loses less, but gains no reward. **A second reward** that reads the prompt (`50 * hps + aesthetic`) costs no
  clear accuracy, and gains no clear aesthetic.
- Seeds differ widely: accuracy ends at 0.15, 0.65 and 0.98 with nothing, and at 0.75, 1.00 and 1.00 with the penalty. The intervals are over prompts.
"""
NEAR_WAN = """\
The same on the flow model, with all frames of eight clips, where the reckless run is faster still.

{ends}

- **With nothing, no clip is right at the end,** and the aesthetic network gives them twice the base's score. The moving average ends there, too,
  weight decay at 2.8 times the base's score, and with the cap no clip is right either.
- **The penalty of 10 holds again:** reward +0.16 [0.04, 0.48], the action judge and motion as the base's, but accuracy falls by 0.10 [0.002, 0.21]. (In the lower pictures it lies at the
  bottom, since the reward of the others reaches 18.) At 1 it slows the fall, as a lower rate does.
- **Stopping early holds, too.** With nothing, after 4 of 32 steps, the reward is 0.24 higher [0.07, 0.46], accuracy 0.10 lower [0.02, 0.19], and the judge
  sees no loss: nowhere is the penalty's end clearly better. The penalty keeps you there by itself; stopping needs someone who looks in time.
- On both models, then: a penalty on the distance, or an early stop by a judge that is not trained on. Nothing else that was tried held.
"""
VARIANCE = """\
## Where a gradient's noise comes from

One clip's gradient depends on what was drawn for it: prompt, seed, the scored frame, and what the strategy draws (steps, noise). The share of each in the variance,
within those before it; left `tiny`, right `tiny-wan`; five steps, an adapter with random weights, 12 prompts × 2 seeds × 2 frames × 2 draws
(`python -m tests.benchmarks.variance tiny`). These are rough: a share of nothing comes out as low as -29%.

| strategy | prompt | seed | frame | strategy's draws | clips | prompt | seed | frame | strategy's draws | clips |
|---|---|---|---|---|---|---|---|---|---|---|
| `Last(1)` | 11% | -10% | 99% | 0% | more than 11 | 2% | 10% | 88% | 0% | more than 165 |
| `Last(3)` | 11% | -9% | 98% | 0% | more than 11 | 0% | -12% | 112% | 0% | more than 180 |
| `DRaFTLV(1)` | 3% | -29% | 72% | 55% | more than 42 | 2% | 18% | 11% | 69% | more than 77 |
| `ReFL(0.4)` | 30% | -3% | 29% | 44% | more than 23 | 4% | 0% | 80% | 16% | more than 145 |
| `DRTune(2)` | 46% | 1% | 42% | 11% | more than 20 | 2% | 12% | 77% | 10% | more than 108 |
| `DirectAlign(1)` | 38% | -1% | 17% | 46% | more than 16 | 1% | -1% | 5% | 95% | more than 183 |
| `LeapAlign` | 42% | -8% | 62% | 4% | more than 41 | 0% | 29% | 54% | 18% | more than 154 |

- **With K = 1, the frame is most of it:** some nine tenths of the variance lie between two frames of the same clip. So score more frames before you sample more clips:
  where frames are decoded one by one, another frame costs less than another clip.
- **Random strategies add their own.** Their steps or noise are 4 to 69% of the variance, and 95% for Direct-Align on the flow.
- ***Clips***: the batch size at which the mean gradient is as long as its noise. Only a lower bound is known, since in every row that gradient's squared length is within two standard errors
  of zero.
  So the gradient of four or eight clips is mostly noise; AdamW's memory and many steps average it.
"""
REUSE = """\
One roll-out serves n updates (`rollout_reuse`), each with the current adapter and other frames. Every contestant has 60 seconds; n = 1 is the default.

{ends}

n = 4 reaches the final reward of n = 1 after 27 seconds instead of 61 (interval 11 to 59), and n = 2 after 31 (15 to never). At
equal seconds the differences of n = 4 from n = 1 are not clear: the reward +0.005 [-0.001, +0.012], the held-out reward -0.017 [-0.086, +0.010], and motion -0.0005 [-0.001, +0.0001]. (Motion falls
clearly with n = 2, -0.0005 [-0.0008, -0.0002], and with n = 8, -0.0003 [-0.0006, -0.0001].)
So reuse may save time, and gains nothing that a judge notices. A default would have to win on the held-out reward, on both embedded models: n stays 1.
"""


class Section(NamedTuple):
    """Of the page of races: heading, arguments of `vader-nb race`, what the contestants spend, what was found, and
    whose end the others' are compared with."""

    heading: str
    arguments: str
    x: str
    found: str
    against: str = BASE


FLOW = "model=tiny-wan guidance_scale=1 frames=all batch_size=8"
SECTIONS = {  # by the names of the published races
    "full": Section("The race, on the diffusion model", "races/full", "reward_queries", FULL),
    "full-wan": Section(
        "The race, on the flow model", "races/full-wan", "reward_queries", FULL_WAN
    ),
    "reuse": Section("One roll-out, several updates", "races/reuse", "seconds", REUSE),
    "reuse-wan": Section(
        "One roll-out, several updates: the flow model",
        f"races/reuse {FLOW}",
        "seconds",
        REUSE_WAN,
    ),
    "strategies": Section(
        "Which steps learn", "races/strategies", "seconds", STRATEGIES, against="K = 1"
    ),
    "strategies-wan": Section(
        "Which steps learn: the flow model",
        f"races/strategies {FLOW}",
        "seconds",
        STRATEGIES_WAN,
        against="K = 1",
    ),
    "near": Section("Staying near the base", "races/near", "reward_queries", NEAR),
    "near-wan": Section(
        "Staying near the base: the flow model", f"races/near {FLOW}", "reward_queries", NEAR_WAN
    ),
    "rates": Section("How the learning rates were found", "races/rates", "reward_queries", RATES),
}
SHOWN = (
    "contestant",
    "learning rate",
    "reward queries",
    "seconds",
)  # of a race's table, and all metrics


def race_figure(race: Race, x: str) -> Figure:
    """The reward and what it buys over what was spent, and the reward against what is not trained on."""
    several = "diversity" in race.best()["base"].ends[0]["scores"]  # clips of each prompt
    curves = ["reward", "oracle accuracy"]
    others = ["held-out reward", *["diversity"] * several, "motion"]
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    rows = [[name for name in row for _ in range(6 // len(row))] for row in (curves, others)]
    panels = figure.subplot_mosaic(rows)
    trained = [runs.spent(x) for runs in race.best().values() if runs.rate]
    wide = max(spent[-1] for spent in trained) > 12 * min(spent[0] for spent in trained)
    for name in curves:
        race.plot(x, name, log=wide and x != "seconds", axes=panels[name])
    race.pareto(others, y="reward", axes=[panels[name] for name in others])
    shown = panels["motion"].get_legend_handles_labels()
    for panel in panels.values():
        if panel.get_legend():
            panel.get_legend().remove()
    figure.legend(*shown, loc="outside lower center", ncols=4, frameon=False)
    return figure


def ends(race: Race, against: str) -> str:
    """Where the contestants ended, without the columns that few would read, and the seeds' ranges."""
    table = race.table(against)
    metrics = table.headings[table.headings.index("reward") :]
    rows = [dict(zip(table.headings, row)) for row in table.rows]
    headings = [*SHOWN, *metrics]
    shown = [[row[name].split(";")[0] for name in headings] for row in rows]
    return Table(headings, shown, headings).markdown()


def races_page() -> str:
    lines = [RACES]
    for name, (heading, arguments, _, found, against) in SECTIONS.items():
        race = Race(zoo.races()[name])
        lines += [f"## {heading}", "", f"`vader-nb race {arguments}`", ""]
        if any(len(rates) > 1 for rates in race.runs().values()):
            lines += [race.rates().markdown(), ""]
        lines += [
            f"![{heading}](images/race_{name}.png)",
            "",
            found.format(ends=ends(race, against)),
        ]
    return "\n".join([*lines, VARIANCE])


PAGES = {
    "races.md": races_page,
    "arguments.md": arguments_page,
    "models.md": models_page,
    "recipes.md": recipes_page,
    "rewards.md": rewards_page,
}


def write(folder: Path) -> None:
    for name, page in PAGES.items():
        (folder / name).write_text(page())


def draw(folder: Path) -> None:
    """The figures of the races."""
    for name, section in SECTIONS.items():
        figure = race_figure(Race(zoo.races()[name]), section.x)
        figure.savefig(folder / f"race_{name}.png", dpi=100)


if __name__ == "__main__":
    write(Path(__file__).parent)
    draw(Path(__file__).with_name("images"))
