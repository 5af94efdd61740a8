"""The trainer that runs. Without it: one process, no checkpoint, and one bad number ends a run.

`Trainer` is ppo.PPO with a few methods overridden:

    rollout            gather the rollouts of several processes into one
    log_probs          score a share of what the environments of all processes show
    hold               let the first process alone hold the policy to its beginning
    policy_gradient    take a share of a minibatch, in parts, and add up the gradients
    step               leave out a step whose gradient is not finite, and count it
    state_dict, load_state_dict    what a checkpoint needs for a bit-for-bit continuation

With one process and gradient_accumulation 1 it computes exactly what ppo.PPO computes, if the agent
scores equal items once, as twosome.Agent does. Several processes step a share of the environments
each. They also score a share of the distinct items each, in acting and in every minibatch. So an
item must be a value, as a tuple of texts is: it can be hashed and pickled, and its copy is equal to
it and has the same repr. If an agent has a dict `known` of what its critic has read, as
twosome.Agent does, processes exchange what is new in it. The first one alone holds the policy to
its beginning. All do the rest alike, the critic's steps included, because sending the gradient of
a small MLP takes longer than computing it.
"""
import dataclasses
import sys

import numpy as np
import torch
import torch.distributed as dist

import ppo
from engine.processes import gather, place, together


@dataclasses.dataclass
class Config(ppo.Config):
    """PPO's settings, and in how many parts a minibatch of the policy is computed."""

    gradient_accumulation: int = 1  # parts of a policy minibatch: less memory, same result

    def validate(self):
        """Raise PPOError for sizes that fit neither each other nor the processes."""
        super().validate()
        if self.num_envs % place()[1]:
            raise ppo.PPOError(f"num_envs must be a multiple of the {place()[1]} processes")


class Trainer(ppo.PPO):
    """An agent in training, as ppo.PPO describes it."""

    MAX_SKIPPED = 5  # our choice: steps left out in a row after which training ends

    def __init__(self, make_env, agent, config, seed=0):
        """Keep this process's share of the environments."""
        self.rank, self.world = place()
        super().__init__(make_env, agent, config, seed)
        self.share = slice(self.rank, None, self.world)  # of the environments, and of other lists
        self.envs, self.rngs, self.now = (x[self.share] for x in (self.envs, self.rngs, self.now))
        self.skipped, self.in_a_row = 0, {"policy": 0, "critic": 0}

    def iterate(self):
        """Run one iteration. Its metrics count the steps that were left out, too."""
        return {**super().iterate(), "skipped": self.skipped}

    def rollout(self):
        """Act, and join the rollouts of all processes, environments side by side."""
        # The policy has moved since the last rollout; what the critic has read stays right.
        self.scores, known = {}, getattr(self.agent, "known", {}) if self.world > 1 else {}
        before, mine = {*known}, super().rollout()
        self.log_probs([])  # the others may still act
        # Each process has read what its own environments show; the update asks for all of it.
        known.update(sum(gather([pair for pair in known.items() if pair[0] not in before]), []))
        items, *columns = zip(*(vars(part).values() for part in gather(mine)), strict=True)
        items = [item for group in zip(*items, strict=True) for item in group]
        joined = ppo.Rollout(items, *(torch.stack(column, 2).flatten(1) for column in columns))
        for name in ("rewards", "values", "next_values"):
            if not torch.isfinite(getattr(joined, name)).all():
                raise FloatingPointError(f"the {name} of a rollout are not finite")
        return joined

    def log_probs(self, items):
        """Score what the environments of all processes show, a new item in one process alone.

        A process asks the others only if its own show something new, and waits until they ask, too.
        One that has done all its steps has no items: it scores until none asks any more.
        """
        new = True
        while new and (not items or any(item not in self.scores for item in items)):
            # Not a set, whose order differs between processes.
            new = [*dict.fromkeys(x for x in sum(gather(items), []) if x not in self.scores)]
            share = new[self.share]
            # Scores travel through the CPU, because a process cannot read another one's GPU.
            own = [log_pi.cpu() for log_pi in (share and self.agent.log_probs(share))]
            # Share what the critic reads, too, in another order: who scores less reads more.
            for item in new[self.world - 1 - self.rank::self.world] * (self.world > 1):
                self.agent.values([item])
            self.scores.update(sum(gather([*zip(share, own, strict=True)]), []))
        return [self.scores[item] for item in items]

    def hold(self, turn):
        """Let the first process alone hold the policy; `parts` gives it fewer items."""
        if self.rank == 0:
            super().hold(turn)

    def policy_gradient(self, rollout, advantages, batch):
        """Compute this process's share of a minibatch in parts, and add up over all processes."""
        measured = {"policy_loss": 0.0, "kl": 0.0}
        try:
            for part in self.parts(rollout, batch):
                for name, value in super().policy_gradient(rollout, advantages, part).items():
                    measured[name] += value
        except FloatingPointError:
            # The agent refused such numbers itself. Let the sum tell it to every process: then
            # all of them leave out this step.
            first = self.agent.policy_parameters()[0]
            first.grad = torch.full_like(first, torch.nan)
            measured = dict.fromkeys(measured, float("nan"))
        return self.add_up(measured) if self.world > 1 else measured

    def parts(self, rollout, batch):
        """Split a minibatch into index tensors. Return those of this process.

        Samples of equal items stay together, because the scorer computes an item once. Items are
        sorted, because those that begin alike share what they begin with.
        """
        count = -(-self.config.gradient_accumulation // self.world)  # parts of each process
        # Our choice: the texts of hold count as 8 items. They come first, in the first process.
        held = [None] * 8 if self.config.base_kl and self.world > 1 else []
        items = held + sorted(dict.fromkeys(rollout.items[i] for i in batch), key=repr)
        part = {item: n * self.world * count // len(items) for n, item in enumerate(items)}
        mine = range(self.rank * count, (self.rank + 1) * count)
        split = [[i for i in batch.tolist() if part[rollout.items[i]] == n] for n in mine]
        return [torch.tensor(samples) for samples in split if samples]

    def add_up(self, measured):
        """Add up gradients and measures over all processes, in one message. Returns the sums."""
        weights = self.agent.policy_parameters()
        # A process whose share was empty has no gradients yet. The backward pass of this zero makes
        # them zeros, and leaves all others as they are.
        sum(0 * weight.sum() for weight in weights).backward()
        grads = [weight.grad for weight in weights]
        sums = grads[0].new_tensor(list(measured.values()))
        message = torch.nn.utils.parameters_to_vector([*grads, sums])
        with together():
            dist.all_reduce(message)
        torch.nn.utils.vector_to_parameters(message, [*grads, sums])
        return dict(zip(measured, sums.tolist(), strict=True))

    def step(self, optimizer):
        """Take the step, unless the gradient is not finite: then leave it out and count it."""
        name = "policy" if optimizer is self.policy_optimizer else "critic"
        grads = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        finite = torch.nn.utils.get_total_norm(g for g in grads if g is not None).isfinite()
        self.in_a_row[name] = 0 if finite else self.in_a_row[name] + 1
        if finite:
            return super().step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        if self.in_a_row[name] >= self.MAX_SKIPPED:
            raise FloatingPointError(f"{self.MAX_SKIPPED} gradients of the {name} in a row were"
                                     " not finite; none was applied; lower its learning rate")

    def state_dict(self):
        """Return everything but tensors that a checkpoint needs, as JSON values.

        Every process must call it. An environment without a state_dict() is kept as None.
        """
        worlds = [env.state_dict() if hasattr(env, "state_dict") else None for env in self.envs]
        mine = [*zip(worlds, (rng.bit_generator.state for rng in self.rngs), strict=True)]
        episodes = {name: np.asarray(value).tolist() for name, value in vars(self.episodes).items()}
        return {"updates": self.updates, "skipped": self.skipped, "in_a_row": dict(self.in_a_row),
                "episodes": episodes, "environments": [*sum(zip(*gather(mine), strict=True), ())],
                "shuffle": self.shuffle.bit_generator.state}

    def load_state_dict(self, state):
        """Continue where state_dict() left off, with any number of processes."""
        self.updates, self.skipped = state["updates"], state["skipped"]
        self.in_a_row = dict(state["in_a_row"])
        for name, value in state["episodes"].items():
            array = isinstance(getattr(self.episodes, name), np.ndarray)
            setattr(self.episodes, name, np.array(value) if array else value)
        self.shuffle.bit_generator.state = state["shuffle"]
        for n, (world, rng) in enumerate(state["environments"][self.share]):
            self.rngs[n].bit_generator.state = rng
            if world is not None:
                self.envs[n].load_state_dict(world)
                self.now[n] = self.envs[n].observe()
        if any(world is None for world, _ in state["environments"]):
            print("note: this world keeps no state, so its episodes begin anew", file=sys.stderr)
            self.episodes.returns[:] = self.episodes.lengths[:] = 0.0
