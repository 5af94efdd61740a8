"""Why a sparse world of one's own can stall: FrozenLake told badly, and what mends it.

    python twosome.py --env experiments/lakes.py:poor --steps 10240
    python twosome.py --env experiments/lakes.py:poor --env-args cost=0.01 --steps 10240

The goal alone pays, and the phrases do not say what lies where they lead. The untrained LLM prefers
one direction wherever it stands, and gets there more rarely than chance, which does in 1.4 % of the
episodes. examples/frozen_lake.py tells the same lake in phrases that name what lies there.
"""
import sys
from pathlib import Path

import gymnasium

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.worlds import World
from examples.frozen_lake import frozen_lake


class StepCost(gymnasium.RewardWrapper):
    """Every step costs a little, whatever it leads to."""

    def __init__(self, env, cost):
        super().__init__(env)
        self.cost = cost

    def reward(self, reward):
        """Return what is left of a reward."""
        return reward - self.cost


def poor(cost=0.0):
    """Return the lake told in phrases that name a direction alone, with a cost of each step."""
    lake = frozen_lake()

    def prompt(cell, info):
        return lake.prompt(cell, info)[0], ["move left", "move down", "move right", "move up"]

    return World(StepCost(lake.world, cost), prompt)
