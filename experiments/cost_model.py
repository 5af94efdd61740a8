"""What a PPO iteration costs and what makes it grow: measured, beside a prediction from counts.

    python experiments/cost_model.py        about five minutes on a free core

The model: a rollout makes one call at each step that meets a prompt which is new to it; the
critic reads each distinct prompt once; each minibatch computes its own distinct prompts, forward
and backward, in calls of up to trie.NODES x trie.TREES tokens (on a CPU). A call costs a constant,
and its FLOPs over a rate. Constant and rate are measured on 1 and on 32 prompts; one number more,
the seconds of everything that is not the model, on one iteration at the base point. Nothing is
fitted to the curves. Not for every world: here prompts are met at random.
"""
import argparse
import copy
import dataclasses
import json
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from engine import trainer, trie
from experiments.bench import RESULTS, load
from experiments.measure import Count, machine, timed

BASE = trainer.Config(num_envs=4, rollout_steps=32, minibatch=32, epochs=1, target_kl=0.0)
WORDS = (
    "tomato bowl board knife kitchen table oven sofa milk chips salad onion lettuce counter plate"
    " cup door room bread cheese apple water towel lamp chair shelf drawer window basket jar pan"
    " pot").split()
AXES = {"actions": (2, 4, 8, 16), "phrase": (1, 2, 4, 8), "prompt": (5, 10, 20, 40, 80),
        "distinct": (4, 16, 64, 256), "environments": (2, 4, 8), "hidden size": (64, 128, 256)}
LABELS = {"phrase": "words of a phrase", "prompt": "words of a prompt",
          "distinct": "prompts of the world"}


class Drill:
    """A world of so many prompts, met at random, each with phrases of its own; without an end."""

    def __init__(self, actions=4, phrase=4, prompt=20, distinct=16, seed=0):
        rng = np.random.default_rng(seed)
        self.infos = []
        for k in range(distinct):
            firsts = rng.permutation(WORDS)[:actions]
            phrases = [" ".join([first, *rng.choice(WORDS, phrase - 1)]) for first in firsts]
            text = " ".join([str(k), *rng.choice(WORDS, prompt - 1)])
            self.infos.append({"prompt": text, "actions": phrases})

    def reset(self, seed=None):
        self.rng = np.random.default_rng(seed)
        return None, self.infos[self.rng.integers(len(self.infos))]

    def step(self, action):
        # A reward that varies: without one, a rollout teaches nothing and is left out.
        reward = float(self.rng.random() < 0.5)
        return None, reward, False, False, self.infos[self.rng.integers(len(self.infos))]


def items_of(agent, world):
    """Return the items of a world's prompts."""
    return [agent.describe(None, info) for info in world.infos]


def packed_flops(agent, items):
    """Return mean FLOPs of one item's forward alone, and of the critic's over its prompt."""
    count = Count(agent)
    found = []
    for tree in map(agent.tree, items):
        S, pairs = len(tree.ids), tree.visible.sum().item()
        scoring = 2 * count.layer_weights * S + count.attention * pairs
        prompt = len(tree.items[0][0])
        critic = 2 * count.layer_weights * prompt + count.attention * prompt * (prompt + 1) / 2
        found.append((scoring + count.row * len(tree.parents), critic))
    return np.mean(found, axis=0)


def calls_of(agent, items, count):
    """Return the calls in which so many prompts like these are scored."""
    nodes = np.mean([len(agent.tree(item).ids) for item in items])
    return np.ceil(count * nodes / (trie.NODES * trie.TREES))


def rates_of(agent, items):
    """Return {with gradient: (seconds a call, FLOP/s of the forward)}, from 1 and 32 prompts."""
    def call(some, grad):
        def work():
            agent.policy_changed()
            with torch.set_grad_enabled(grad):
                total = torch.cat(agent.log_probs(some)).sum()
            if grad:
                total.backward()

        return min(timed(work, agent.model.device)[0] for _ in range(7))

    rates, flops = {}, packed_flops(agent, items)[0]
    calls = calls_of(agent, items[:32], 32)
    for grad in (False, True):
        # one = constant + flops / rate; many = calls * constant + 32 * flops / rate
        one, many = call(items[:1], grad), call(items[:32], grad)
        constant = max((32 * one - many) / (32 - calls), 0.0)
        rates[grad] = constant, flops / (one - constant)
    return rates


def predict(agent, items, config, rates, rest=0.0):
    """Return the seconds of an iteration; `rest` are those of a step outside the model."""
    K, N, T = len(items), config.num_envs, config.rollout_steps

    def distinct(samples):
        """Return the expected number of distinct prompts among so many."""
        return K * (1 - (1 - 1 / K) ** samples)

    def new(samples):
        """Return the chance that the next prompt is not among so many before it."""
        return (1 - 1 / K) ** samples

    calls = sum(1 - (1 - new(N * t)) ** N for t in range(T))  # a call where something is new
    phrases, critic = packed_flops(agent, items)
    (call, rate), (call_grad, rate_grad) = rates[False], rates[True]
    read = distinct(N * T + N)  # each prompt goes through the critic's LLM alone
    rollout = (calls + read) * call + (distinct(N * T) * phrases + read * critic) / rate
    each = distinct(config.minibatch)
    update = calls_of(agent, items, each) * call_grad + each * phrases / rate_grad
    return rollout + N * T / config.minibatch * update + rest * N * T


def iteration(agent, world, config):
    """Return the median seconds of an iteration in which every prompt's feature is new."""
    learner = trainer.Trainer(lambda: copy.copy(world), agent, config)

    def iterate():
        agent.known.clear()
        learner.iterate()

    iterate()
    return float(np.median([timed(iterate, agent.model.device)[0] for _ in range(3)]))


def measure(model):
    """Measure iterations along six axes, and predict them. Returns facts for JSON."""
    agent = load("", model)
    rates = rates_of(agent, items_of(agent, Drill(distinct=32)))
    base = predict(agent, items_of(agent, Drill()), BASE, rates)
    rest = (iteration(agent, Drill(), BASE) - base) / (BASE.num_envs * BASE.rollout_steps)
    curves = {}
    for axis, values in AXES.items():
        curves[axis] = []
        for value in values:
            world, own, here, config = Drill(), rates, agent, BASE
            if axis == "environments":
                config = dataclasses.replace(BASE, num_envs=value)
            elif axis == "hidden size":
                # How near a model comes to the peak depends on its size: measure its own rates.
                here = load({"hidden_size": value, "intermediate_size": 3 * value,
                             "num_hidden_layers": 4, "num_attention_heads": 4,
                             "num_key_value_heads": 4, "vocab_size": 1024,
                             "max_position_embeddings": 1024})
                own = rates_of(here, items_of(here, Drill(distinct=32)))
            else:
                world = Drill(**{axis: value})
            point = {"value": value, "measured": iteration(here, world, config),
                     "predicted": predict(here, items_of(here, world), config, own, rest)}
            curves[axis].append(point)
            print(f"{axis:14}{value:6}  measured {point['measured']:7.3f} s, predicted"
                  f" {point['predicted']:7.3f} s", flush=True)
    named = {"with gradient" if grad else "without": pair for grad, pair in rates.items()}
    return {"seconds_a_call_and_flops_a_second": named, "rest_seconds_a_step": rest,
            "curves": curves}


def plot(curves, path):
    """Draw measured and predicted seconds of an iteration, one panel an axis."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True)
    for (axis, points), panel in zip(curves.items(), panels.flat, strict=True):
        values = [point["value"] for point in points]
        for kind, style in (("predicted", "--"), ("measured", "o-")):
            panel.plot(values, [point[kind] for point in points], style, label=kind)
        panel.set(xlabel=LABELS.get(axis, axis), xscale="log", yscale="log", xticks=values,
                  xticklabels=values, yticks=(0.3, 1, 3), yticklabels=(0.3, 1, 3))
        panel.minorticks_off()
    panels[0, 0].legend(frameon=False)
    figure.supylabel("seconds of one PPO iteration")
    figure.savefig(path, dpi=80)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket_lm", help="as twosome.py's --model")
    parser.add_argument("--out", default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    facts = {"machine": machine(), **measure(options.model)}
    with open(os.path.join(options.out, "cost_model.json"), "w") as file:
        json.dump(facts, file, indent=1)
    plot(facts["curves"], os.path.join(options.out, "cost_model.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
