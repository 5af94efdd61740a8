"""What a PPO iteration costs, and what makes it grow: measured along six axes, beside a prediction from token and FLOP counts.

  python experiments/bench.py --cost-model

The model: a rollout computes ahead what the last one met more than once, then at each step that meets another prompt that is new
to it one call more; the critic computes the distinct prompts once; each minibatch computes its own distinct prompts, forward and
backward, in calls of up to scoring.NODES x TREES tokens. A call costs a constant and its FLOPs over a rate. Constant and rate are measured on 1
and on 32 prompts, and one number more, the seconds of everything that is not the model, on one iteration at the base point. Nothing is fitted to the curves.

Not for every world: here prompts are met at random; how many of your world's are distinct is for you to count.
"""
import copy
import dataclasses
import os

import numpy as np
import torch

import ppo
import scoring
import twosome
from bench import load
from measure import Count, timed

BASE = ppo.Config(num_envs=4, rollout_steps=32, minibatch=32, epochs=1, target_kl=0.0)
WORDS = ("tomato bowl board knife kitchen table oven sofa milk chips salad onion lettuce counter plate cup door room bread cheese apple "
         "water towel lamp chair shelf drawer window basket jar pan pot").split()


class Drill:
    """A world of so many prompts, met at random, each with phrases of its own; an episode never ends."""

    def __init__(self, actions=5, phrase=4, prompt=20, distinct=16, seed=0):
        rng = np.random.default_rng(seed)
        words = lambda n: " ".join(rng.choice(WORDS, n))
        self.infos = [{"prompt": f"{k} {words(prompt - 1)}", "actions": [f"{first} {words(phrase - 1)}".strip() for first in rng.permutation(WORDS)[:actions]]}
                      for k in range(distinct)]

    def reset(self, seed=None):
        self.rng = np.random.default_rng(seed)
        return None, self.infos[self.rng.integers(len(self.infos))]

    def step(self, action):
        return None, 0.0, False, False, self.infos[self.rng.integers(len(self.infos))]


def packed_flops(agent, items):
    """FLOPs of one forward of an item alone, and of the critic's over its prompt: means over items, by Count's formula."""
    count, trees = Count(agent), [scoring.build_tree([scoring.tokenize(agent.tokenizer, *item)]) for item in items]
    flops = lambda S, pairs, parents: 2 * count.layer_weights * S + count.attention * pairs + count.row * parents
    prompts = [len(tree.items[0][0]) for tree in trees]
    return np.mean([(flops(len(tree.ids), tree.visible.sum().item(), len(tree.parents)), flops(S, S * (S + 1) / 2, 0)) for tree, S in zip(trees, prompts)], axis=0)


def rates_of(agent, items):
    """Seconds a call and forward FLOPs a second, without and with gradient, from 1 and from 32 prompts: {grad: (seconds, rate)}."""
    def call(items, grad):
        def work():
            agent.policy_changed()
            with torch.set_grad_enabled(grad):
                total = torch.cat(agent.log_probs(items)).sum()
            total.backward() if grad else None
        return min(timed(work, agent.model.device)[0] for _ in range(7))

    rates, flops, calls = {}, packed_flops(agent, items)[0], calls_of(agent, items[:32], 32)
    for grad in (False, True):
        one, many = call(items[:1], grad), call(items[:32], grad)  # one = constant + flops / rate; many = calls * constant + 32 * flops / rate
        constant = max((32 * one - many) / (32 - calls), 0.0)
        rates[grad] = constant, flops / (one - constant)
    return rates


def calls_of(agent, items, count):
    """Calls in which so many prompts like these are scored."""
    return np.ceil(count * np.mean([len(scoring.build_tree([scoring.tokenize(agent.tokenizer, *item)]).ids) for item in items]) / (scoring.NODES * scoring.TREES))


def predict(agent, items, config, rates, rest=0.0):
    """Seconds of one iteration where every prompt's features are new: calls, FLOPs, and `rest` seconds an environment step."""
    K, N, T = len(items), config.num_envs, config.rollout_steps
    distinct = lambda samples: K * (1 - (1 - 1 / K) ** samples)  # expected number of distinct prompts among so many
    ahead = 1 - (1 - 1 / K) ** (N * T) - N * T / K * (1 - 1 / K) ** (N * T - 1)  # the share of prompts that the last rollout met more than once
    new = lambda samples: (1 - ahead) * (1 - 1 / K) ** samples  # the chance that the next prompt is neither among those nor among so many before it
    calls = calls_of(agent, items, K * ahead) + sum(1 - (1 - new(N * t)) ** N for t in range(T))  # ahead, and at each step with something new
    phrases, critic = packed_flops(agent, items)
    (call, rate), (call_grad, rate_grad) = rates[False], rates[True]
    rollout = (calls + 1) * call + (K * (1 - new(N * T)) * phrases + distinct(N * T) * critic) / rate
    each = distinct(config.minibatch)
    update = N * T / config.minibatch * (calls_of(agent, items, each) * call_grad + each * phrases / rate_grad)
    return rollout + update + rest * N * T


def measure(options):
    """Measure iterations along six axes, and predict them from token and FLOP counts and rates measured at the base point."""
    axes = {"actions": (2, 4, 8, 16), "words a phrase": (1, 2, 4, 8), "words a prompt": (5, 10, 20, 40, 80), "prompts in the world": (4, 16, 64, 256),
            "environments": (2, 4, 8), "hidden size": (64, 128, 256)}
    agent = load("", options.model)
    world = lambda **changes: Drill(**{"actions": 4, "phrase": 4, "prompt": 20, "distinct": 16, **changes})
    items_of = lambda world: [twosome.describe(info) for info in world.infos]
    keyword = {"actions": "actions", "words a phrase": "phrase", "words a prompt": "prompt", "prompts in the world": "distinct"}

    def iteration(agent, world, config):
        trainer = ppo.PPO(lambda: copy.copy(world), agent, config)

        def iterate():
            agent._features.clear()
            trainer.iterate()
        iterate()  # before it, nothing has been met
        return float(np.median([timed(iterate, agent.model.device)[0] for _ in range(3)]))

    rates = rates_of(agent, items_of(world(distinct=32)))
    rest = (iteration(agent, world(), BASE) - predict(agent, items_of(world()), BASE, rates)) / (BASE.num_envs * BASE.rollout_steps)
    curves = {}
    for axis, values in axes.items():
        curves[axis] = []
        for value in values:
            here = world(**{keyword[axis]: value} if axis in keyword else {})
            config = dataclasses.replace(BASE, num_envs=value) if axis == "environments" else BASE
            model, own = agent, rates
            if axis == "hidden size":  # how near a model comes to the peak depends on its size: its own rates, of one call
                model = load(dict(hidden_size=value, intermediate_size=3 * value, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                                  vocab_size=1024, max_position_embeddings=1024), options.model)
                own = rates_of(model, items_of(world(distinct=32)))
            curves[axis].append({"value": value, "measured": iteration(model, here, config), "predicted": predict(model, items_of(here), config, own, rest)})
            print(f"{axis:22}{value:6}  measured {curves[axis][-1]['measured']:7.3f} s, predicted {curves[axis][-1]['predicted']:7.3f} s", flush=True)
    plot(curves, os.path.join(options.out, "cost_model.png"))
    return {"rates": {("with" if grad else "without") + " gradient": dict(zip(("seconds_a_call", "forward_flops_a_second"), pair)) for grad, pair in rates.items()},
            "rest_seconds_a_step": rest, "curves": curves}


def plot(curves, path):
    """The measured and the predicted seconds of an iteration, one panel an axis."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(2, 3, figsize=(9, 5), sharey=True, layout="constrained")
    for (axis, points), panel in zip(curves.items(), panels.flat):
        values = [point["value"] for point in points]
        panel.plot(values, [point["predicted"] for point in points], "--", color="tab:gray", label="predicted")
        panel.plot(values, [point["measured"] for point in points], "o-", label="measured")
        panel.set(xlabel=axis, xscale="log", yscale="log", xticks=values, xticklabels=values, yticks=(0.3, 1, 3), yticklabels=(0.3, 1, 3))
        panel.minorticks_off()
    panels[0, 0].legend(frameon=False)
    figure.supylabel("seconds of one PPO iteration")
    figure.savefig(path, dpi=80)
