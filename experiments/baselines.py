"""What TWOSOME is measured against: other agents for ppo.PPO and ppo.evaluate."""
import math

import torch


class Random:
    """The uniformly random policy over the admissible actions. An item is their number."""

    def __init__(self, actions):
        self.actions = actions

    def describe(self, obs, info):
        return len(info["admissible"]) or self.actions  # none advised: choose among all

    def log_probs(self, items):
        return [torch.full((count,), -math.log(count)) for count in items]
