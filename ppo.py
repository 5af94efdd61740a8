"""PPO with macro-actions, for any agent: rollout, semi-Markov GAE, losses, update.

Paper: Tan et al., "True Knowledge Comes from Practice", ICLR 2024 (arXiv 2401.14151), section 4.3 and its appendix.
  [1] Schulman et al. 2017, Proximal Policy Optimization Algorithms (arXiv 1707.06347): equations 7 and 9
  [2] Schulman et al. 2016, Generalized Advantage Estimation (arXiv 1506.02438): equation 16
  [3] Sutton, Precup, Singh 1999, Between MDPs and semi-MDPs: an action of tau steps discounts by gamma ** tau

Where to find what
  equations       gae, normalize_advantages, policy_loss, value_loss, entropy, approximate_kl: pure functions of tensors
  training loop   PPO.iterate: anneal, rollout, bootstrap and GAE, update of policy and critic

This module knows no language model. An agent is any object with these methods (twosome.Agent is one, the MLP in
tests/test_ppo.py another):
  encode(obs, info) -> item          what the rollout buffer keeps of an observation, of numbers, strings and tuples: equal items are computed once
  log_probs(items) -> list[Tensor]   log pi over each item's admissible actions, with gradients where they are enabled; without, items
                                     are asked for ahead of their time, for an agent to remember until policy_changed()
  values(items) -> Tensor [B]        V(s), with gradients to the critic alone
  policy_parameters(), value_parameters() -> list[Parameter]     two disjoint lists
  policy_changed()                   called after each step of the policy's optimiser and before each rollout: forget remembered scores
  known(items), learn(known)         of several processes only: what it remembers of these items; remember what another did
An environment is Gymnasium-shaped; its info may carry "admissible" (action indices), "duration" (primitive steps of the
last action, 1 where absent) and "success" (where an episode ended).

Deliberate differences from the published code: a time limit is a truncation and bootstraps from V(final observation);
advantages are normalised over the whole batch, never per micro-batch; the standard deviation has a floor; actor and critic
have gradient norms of their own; the entropy bonus rests while there is no reward; the KL bound is checked before the step it
would forbid, not after.
"""
import bisect
import collections
import contextlib
import dataclasses
import itertools
import math
import warnings

import numpy as np
import torch
import torch.distributed as dist


# ---------------------------------------------------------------------------------------------------------------------
# Equations. T steps, N environments, B samples, A actions.

def gae(rewards, values, next_values, discounts, terminated, ended, gae_lambda):
    """Generalised advantage estimation over macro-actions ([2] eq. 16 with [3]'s gamma ** tau in gamma's place).

    All arguments but the last are tensors of shape [T, N]: rewards (already discounted inside a macro-action); V(s_t);
    V(s_{t+1}) of the observation the action led to, before any reset; discounts gamma ** tau; terminated (no future);
    ended (terminated or truncated: nothing flows back across). Returns advantages and returns, [T, N] each.
    """
    alive = 1.0 - terminated.float()
    deltas = rewards + discounts * next_values * alive - values  # delta = r + gamma^tau V(s') - V(s)
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        running = deltas[t] + discounts[t] * gae_lambda * (1.0 - ended[t].float()) * running
        advantages[t] = running
    return advantages, advantages + values


def normalize_advantages(advantages, floor=0.02):
    """Zero mean and unit variance over the WHOLE batch, with a floor under the standard deviation (our choice).

    Before the first reward, the advantages are a fresh critic's noise; scaled up to unit variance it drives the policy to
    one action. The floor keeps noise that is small in units of return small in the update.
    """
    return (advantages - advantages.mean()) / advantages.std(unbiased=False).clamp_min(floor)


def policy_loss(new_log_probs, old_log_probs, advantages, clip):
    """The clipped surrogate ([1] eq. 7), negated: minimise. All [B]; returns [B], so that a caller can average parts."""
    ratio = (new_log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(new_values, old_values, returns, clip):
    """Half the clipped squared error ([1] eq. 9's value term, clipped as in the published scripts). All [B]; returns [B]."""
    clipped = old_values + (new_values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((new_values - returns) ** 2, (clipped - returns) ** 2)


def entropy(log_probs):
    """-sum pi log pi of each state's admissible actions, in nats. log_probs [..., A], normalised. Returns [...]."""
    return -(log_probs.exp() * log_probs).sum(-1)


def approximate_kl(new_log_probs, old_log_probs):
    """KL(old || new) from samples of old: mean of (r - 1) - log r, which is never negative. [B], [B] -> scalar."""
    log_ratio = new_log_probs - old_log_probs
    return (log_ratio.exp() - 1 - log_ratio).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Settings

class ConfigError(ValueError):
    """A setting is impossible; the message is one line that says what would be right."""


def option(default, help):
    """A dataclass field whose metadata is the command line's help text."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Config:
    """What PPO needs to know. The defaults suit the embedded LLM; twosome.py holds the presets and their sources."""
    steps: int = option(12_800, "environment steps (macro-actions) in all, over all environments; rounded down to whole rollouts")
    num_envs: int = option(8, "environments stepped side by side")
    rollout_steps: int = option(32, "steps an environment takes between two updates")
    epochs: int = option(2, "passes over a rollout an update makes")
    minibatch: int = option(64, "samples of one optimiser step, of policy and critic alike")
    gradient_accumulation: int = option(1, "parts that a policy minibatch's distinct items are computed in; the result is the same, memory falls")
    policy_lr: float = option(2e-3, "learning rate of the LoRA weights, annealed linearly to 0")
    critic_lr: float = option(1e-3, "learning rate of the critic's MLP, annealed linearly to 0")
    gamma: float = option(0.99, "discount per primitive step; an action of tau steps discounts by gamma ** tau")
    gae_lambda: float = option(0.95, "lambda of generalised advantage estimation")
    clip: float = option(0.2, "clipping range of the probability ratio and of the value")
    entropy: float = option(0.005, "coefficient of the entropy bonus, left out after a rollout without any reward")
    value_coefficient: float = option(0.5, "coefficient of the value loss")
    max_grad_norm: float = option(0.5, "bound on the gradient's norm, for policy and critic apart")
    target_kl: float = option(0.02, "an update's policy steps stop before one whose KL exceeds 1.5 times this; 0: never")

    def validate(self):
        """Raise ConfigError, in one line, for a setting that cannot work."""
        for name in ("steps", "num_envs", "rollout_steps", "epochs", "minibatch", "gradient_accumulation"):
            if not 1 <= getattr(self, name) <= 10 ** 9:
                raise ConfigError(f"{name} is {str(getattr(self, name))[:20]}; it must lie between 1 and a billion")
        for name in ("policy_lr", "critic_lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a positive number")
        for name in ("entropy", "value_coefficient", "target_kl", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or a positive number")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        batch, divisor = self.num_envs * self.rollout_steps, lambda whole, wish: next(d for d in range(min(whole, wish), 0, -1) if whole % d == 0)
        if self.num_envs % (world := processes()[1]):
            unit = math.lcm(world, self.minibatch // math.gcd(self.minibatch, self.rollout_steps))
            raise ConfigError(f"{self.num_envs} environments cannot be split over {world} processes; use a multiple, such as"
                              f" --num-envs {-(-self.num_envs // unit) * unit}")
        if batch > 10 ** 6:
            raise ConfigError(f"a rollout of num_envs x rollout_steps = {batch} samples is beyond a million; lower --num-envs or --rollout-steps")
        if batch % self.minibatch:
            raise ConfigError(f"a rollout has num_envs x rollout_steps = {self.num_envs} x {self.rollout_steps} = {batch} samples,"
                              f" which minibatches of {self.minibatch} do not divide; try --minibatch {divisor(batch, self.minibatch)}")
        if self.minibatch % self.gradient_accumulation:
            raise ConfigError(f"gradient_accumulation {self.gradient_accumulation} does not divide the minibatch of {self.minibatch};"
                              f" try --gradient-accumulation {divisor(self.minibatch, self.gradient_accumulation)}")
        if self.steps < batch:
            raise ConfigError(f"steps is {self.steps}, less than one rollout of {batch}; raise --steps, or lower --num-envs or --rollout-steps")


# ---------------------------------------------------------------------------------------------------------------------
# Acting

def sample(log_probs, rng):
    """Draw an index from log-probabilities [A] with one uniform number, so that a generator's use never depends on A."""
    cumulative = list(itertools.accumulate(map(math.exp, log_probs)))  # of a handful of floats: NumPy's calls would cost more
    return min(bisect.bisect_right(cumulative, rng.random() * cumulative[-1]), len(cumulative) - 1)


def act(env, info, choice):
    """Step `env` with the choice-th of its admissible actions; all are, where its info names none."""
    admissible = info.get("admissible")
    return env.step(admissible[choice] if admissible else choice)


def processes():
    """(rank, size) of torch.distributed's processes; (0, 1) where there is one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class ProcessLost(RuntimeError):
    """Another process has ended, so this one cannot go on."""


@contextlib.contextmanager
def together():
    """Around what needs every process: what fails there is a ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f"another process has ended, so process {processes()[0]} ends too ({str(error).splitlines()[0][:100]})") from error


def gather(value):
    """Every process's value (any object), in the order of their ranks."""
    values = [value] * processes()[1]
    if len(values) > 1:
        with together():
            dist.all_gather_object(values, value)
    return values


def add_up(tensors):
    """Begin to add up these tensors over all processes; returns finish(), which waits for the sums and puts them into the tensors.

    They travel in one message, for it is their number that costs, and what else there is to do can be done meanwhile.
    """
    if processes()[1] == 1:
        return lambda: None
    flat = torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors])
    with together():
        message = dist.all_reduce(flat, async_op=True)

    def finish():
        with together():
            message.wait()
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))
    return finish


def out_of_memory(error):
    """Whether a RuntimeError says so: torch.OutOfMemoryError is one; CPU and mps have none of their own."""
    return "out of memory" in str(error) or "t allocate memory" in str(error)


class NonFiniteError(ArithmeticError):
    """The policy or the critic produced a NaN or an infinity."""


@dataclasses.dataclass
class Rollout:
    """What one rollout leaves: the list of T x N encoded observations, time first, and tensors [T, N]."""
    items: list
    choices: torch.Tensor      # index of the action taken among the item's admissible ones
    log_probs: torch.Tensor    # log pi of it, when it was taken
    values: torch.Tensor       # V(s_t)
    next_values: torch.Tensor  # V(s_{t+1}), of the final observation where a time limit cut the episode
    rewards: torch.Tensor      # already discounted inside a macro-action
    durations: torch.Tensor    # tau, primitive steps
    terminated: torch.Tensor   # the task ended the episode
    ended: torch.Tensor        # the task or the time limit did
    successes: torch.Tensor    # where ended: did it succeed

    @classmethod
    def join(cls, parts):
        """One rollout from those of several processes, environments side by side in the order of the ranks."""
        tensors = {field.name: torch.cat([getattr(part, field.name) for part in parts], dim=1) for field in dataclasses.fields(cls)[1:]}
        T = len(parts[0].values)
        rows = [[part.items[t * part.values.shape[1]:(t + 1) * part.values.shape[1]] for part in parts] for t in range(T)]
        return cls([item for row in rows for part in row for item in part], **tensors)


class PPO:
    """An agent in training: environments, optimisers, counters and random generators, all of which a checkpoint holds.

    make_env() -> a fresh environment; agent as the module's docstring says; config a Config; seed an integer.
    Under torch.distributed each process steps its share of the environments and computes its share of every minibatch's distinct
    items. All else, the permutations and the critic's steps included, each does alike (an MLP's gradient takes longer to send
    than to compute): the result is that of one process.
    """
    MAX_SKIPPED = 5  # our choice: non-finite updates in a row after which training stops instead of going on for nothing

    def __init__(self, make_env, agent, config, seed=0):
        config.validate()
        self.agent, self.config, (self.rank, self.world) = agent, config, processes()
        share = config.num_envs // self.world
        mine = range(self.rank * share, (self.rank + 1) * share)
        self.envs = [make_env() for _ in mine]
        # Each environment has a generator of its own: what one samples never depends on how many stand beside it.
        self.rngs = [np.random.default_rng([seed, index]) for index in mine]
        self.shuffle = np.random.default_rng([seed, config.num_envs, 1])
        # eps 1e-5: published scripts. AdamW without weight decay is Adam; one class serves both. Fused: one kernel, a third of the time.
        self.policy_optimizer = torch.optim.Adam(agent.policy_parameters(), lr=config.policy_lr, eps=1e-5, fused=True)
        self.value_optimizer = torch.optim.Adam(agent.value_parameters(), lr=config.critic_lr, eps=1e-5, fused=True)
        self.parts = config.gradient_accumulation  # more where memory runs out
        self.met = []  # the items that the last rollout met more than once
        self.steps = self.updates = self.episodes = self.skipped = 0
        self.skipped_in_a_row = [0, 0]  # policy and critic apart: the sound one must not hide the other
        self.recent = collections.deque(maxlen=100)  # (return, success, primitive steps) of the last 100 episodes (our choice)
        self.current = [env.reset(seed=seed * 10_007 + index) for index, env in zip(mine, self.envs)]
        self.running = [[0.0, 1.0, 0] for _ in range(config.num_envs)]  # return, discount and primitive steps so far

    @property
    def total_updates(self):
        """Updates in the whole run: the last partial rollout is not taken."""
        return self.config.steps // (self.config.num_envs * self.config.rollout_steps)

    def iterate(self):
        """One iteration: anneal, rollout, bootstrap and GAE, update of policy and critic. Returns the metrics, a dict."""
        # 1. Anneal both learning rates linearly to 0 (published scripts).
        left = 1.0 - self.updates / self.total_updates
        self.policy_optimizer.param_groups[0]["lr"] = self.config.policy_lr * left
        self.value_optimizer.param_groups[0]["lr"] = self.config.critic_lr * left
        # 2. Rollout: the policy stands still, so an agent may remember what it has scored.
        self.agent.policy_changed()  # also where no step was taken: a resumed run has nothing remembered either
        rollout = self.rollout()
        rollout = Rollout.join(self.exchange(rollout, rollout.items))
        self.count(rollout)
        self.met = [item for item, times in collections.Counter(rollout.items).items() if times > 1]
        # 3. Bootstrapping and GAE; normalised once, over the whole batch.
        advantages, returns = gae(rollout.rewards, rollout.values, rollout.next_values,
                                  self.config.gamma ** rollout.durations, rollout.terminated, rollout.ended, self.config.gae_lambda)
        explained = 1 - (returns - rollout.values).var(unbiased=False) / returns.var(unbiased=False).clamp_min(1e-8)
        advantages = normalize_advantages(advantages).flatten()
        # 4. Update.
        metrics = self.update(rollout, advantages, returns.flatten())
        self.updates += 1
        # 5. What happened.
        recent = np.array(self.recent, dtype=float).reshape(-1, 3)
        mean = recent.mean(0).tolist() if len(recent) else [float("nan")] * 3
        return {"update": self.updates, "steps": self.steps, "episodes": self.episodes, "return": mean[0], "success": mean[1],
                "episode_steps": mean[2], **metrics, "explained_variance": explained.item(), "learning_rate": self.config.policy_lr * left,
                "skipped": self.skipped}

    @torch.no_grad()
    def score_ahead(self, items):
        """Let the agent score items that will likely be asked for, all in one call; where memory runs out, step by step has to do."""
        try:
            self.agent.log_probs(items) if items else None
        except RuntimeError as error:
            if not out_of_memory(error):
                raise

    def share(self, items):
        """This process's share of a list of items: neighbours in the alphabet, for an agent may compute once what their texts begin with."""
        if self.world == 1:
            return items
        return sorted(items, key=repr)[self.rank * len(items) // self.world:(self.rank + 1) * len(items) // self.world]

    def exchange(self, value, items):
        """Every process's value, in the order of their ranks; with it travels what the agent remembers of items."""
        if self.world == 1:
            return [value]
        values, known = zip(*gather((value, self.agent.known(items))))
        for each in known:  # its own as well: where two have computed the same item, all keep the same bits
            self.agent.learn(each)
        return values

    @torch.no_grad()
    def rollout(self):
        """Take rollout_steps actions in each of this process's environments. Returns a Rollout."""
        T, N = self.config.rollout_steps, len(self.envs)
        if self.met:  # most of it will be met again: scored together, not a few at each step, and by several processes together, not by each
            mine = self.share(self.met)
            self.score_ahead(mine)
            self.exchange(None, mine)
        items, rows, finals = [], [], {}  # finals: (t, n) -> encoded final observation of an episode that the time limit cut
        now = [self.agent.encode(*pair) for pair in self.current]
        for t in range(T):
            items += now
            for n, (env, scores) in enumerate(zip(self.envs, self.agent.log_probs(now))):
                scores = scores.tolist()  # a few numbers, taken one by one: plain floats are faster than tensors of one element
                if not all(map(math.isfinite, scores)):
                    raise NonFiniteError("the policy's log-probabilities are not finite")
                choice = sample(scores, self.rngs[n])
                obs, reward, done, cut, info = act(env, self.current[n][1], choice)
                rows.append((choice, scores[choice], float(reward), float(info.get("duration", 1)), bool(done), bool(done or cut),
                             float((done or cut) and info.get("success", done))))
                if cut and not done:
                    finals[t, n] = self.agent.encode(obs, info)
                self.current[n] = env.reset() if done or cut else (obs, info)
            now = [self.agent.encode(*pair) for pair in self.current]
        choices, log_probs, rewards, durations, terminated, ended, successes = (torch.tensor(column).view(T, N) for column in zip(*rows))
        # The critic chooses no action, so all values are asked for at once. V(s_{t+1}): the next row's values; after the last row, of
        # where the environments stand; at a truncation, of the final observation (the next row already belongs to another
        # episode). At a termination it is never used.
        values, after, last = self.agent.values([*items, *now, *finals.values()]).float().cpu().split([T * N, N, len(finals)])
        values = values.view(T, N)
        next_values = torch.cat([values[1:], after[None]])
        if finals:
            next_values[tuple(zip(*finals))] = last
        if not (torch.isfinite(next_values).all() and torch.isfinite(values).all()):
            raise NonFiniteError("the critic's values are not finite")
        if not torch.isfinite(rewards).all():
            raise NonFiniteError("an environment gave a reward that is not finite")
        return Rollout(items, choices, log_probs, values, next_values, rewards, durations, terminated, ended, successes)

    def count(self, rollout):
        """Follow each environment's return, discounted from its episode's start per primitive step, and the steps taken."""
        rows = zip(*(getattr(rollout, name).tolist() for name in ("rewards", "durations", "ended", "successes")))
        for row in rows:
            for run, (reward, tau, ended, success) in zip(self.running, zip(*row)):
                run[0], run[1], run[2] = run[0] + run[1] * reward, run[1] * self.config.gamma ** tau, run[2] + tau
                if ended:
                    self.recent.append((run[0], success, run[2]))
                    self.episodes += 1
                    run[:] = [0.0, 1.0, 0.0]
        self.steps += rollout.values.numel()

    def update(self, rollout, advantages, returns):
        """Epochs of minibatches, of each a step of the policy and one of the critic, which have nothing but the samples in common.

        The policy's steps end before one whose KL, over the whole minibatch, exceeds the bound. Returns means over the steps, a dict.
        """
        parameters, stats, moving = self.agent.policy_parameters(), collections.defaultdict(list), True
        for batch in self.minibatches(len(rollout.items)):
            if moving:
                sums = None
                while sums is None:  # what does not fit into memory is done again in more parts, with the same result
                    sums = self.policy_gradient(rollout, advantages, batch)
                if self.world > 1:  # each process holds its share of the sums, and no gradient where it had no share
                    for parameter in parameters:
                        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                finish = add_up([*(parameter.grad for parameter in parameters), sums])
            self.critic_step(rollout, returns, batch, stats)  # meanwhile the policy's gradients travel between the processes
            if moving:
                finish()
                moving = self.policy_step(parameters, sums, stats)
        return {name: float(np.mean(stats[name])) if stats[name] else float("nan") for name in
                ("value_loss", "value_grad_norm", "policy_loss", "entropy", "kl", "clip_fraction", "policy_grad_norm")}

    def critic_step(self, rollout, returns, batch, stats):
        """Clipped value loss on the stored items; the agent's features do not change, so no LLM pass is in here."""
        new = self.agent.values([rollout.items[i] for i in batch]).float()
        old = rollout.values.flatten()[batch].to(new.device)
        loss = value_loss(new, old, returns[batch].to(new.device), self.config.clip).mean()
        (self.config.value_coefficient * loss).backward()
        stats["value_loss"].append(loss.item())
        stats["value_grad_norm"].append(self.step(self.value_optimizer, self.agent.value_parameters(), loss.item()))

    def policy_step(self, parameters, sums, stats):
        """Take the step that policy_gradient prepared, unless its KL exceeds the bound. Returns whether it was taken."""
        for name, value in zip(("kl", "entropy", "policy_loss", "clip_fraction"), sums.tolist()):
            stats[name].append(value)
        if self.config.target_kl and stats["kl"][-1] > 1.5 * self.config.target_kl:  # 1.5: our choice, the usual margin for a noisy estimate
            self.policy_optimizer.zero_grad(set_to_none=True)
            return False
        stats["policy_grad_norm"].append(self.step(self.policy_optimizer, parameters, sums.sum().item()))
        self.agent.policy_changed()
        return True

    def policy_gradient(self, rollout, advantages, batch):
        """Clipped surrogate minus entropy bonus: one minibatch's gradient, part by part. Returns KL, entropy, loss and clipped share: [4],
        this process's part of their means over the minibatch; None where memory ran out: self.parts has been doubled for another try."""
        config, old, choices, sums = self.config, rollout.log_probs.flatten(), rollout.choices.flatten(), torch.zeros(4)
        samples = collections.defaultdict(list)  # item -> which of the minibatch's samples it is: computed once for all of them
        for i in batch:
            samples[rollout.items[i]].append(i)
        mine = self.share(list(samples))
        # Our choice: no bonus for a rollout without any reward. Nothing opposes it there, and Adam, which makes full steps of however
        # small a gradient, would wear a prior down to chance before the first reward is met.
        bonus = config.entropy * bool(rollout.rewards.any())
        try:
            for start, end in itertools.pairwise(np.linspace(0, len(mine), self.parts + 1).astype(int)):
                if start == end:
                    continue
                items = mine[start:end]
                try:
                    scores = self.agent.log_probs(items)
                except ArithmeticError:  # an agent may refuse such logits itself; told through the sum, every process skips this step
                    sums += float("nan")
                    continue
                scores = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_value=-1e9)  # -1e9: 0 in probability
                scores = scores[[row for row, item in enumerate(items) for _ in samples[item]]]  # [B, A]
                part = [i for item in items for i in samples[item]]
                new, entropies = scores.gather(1, choices[part][:, None].to(scores.device))[:, 0], entropy(scores)
                before = old[part].to(new.device)
                losses = policy_loss(new, before, advantages[part].to(new.device), config.clip)
                ((losses - bonus * entropies).sum() / len(batch)).backward()
                with torch.no_grad():
                    clipped = ((new - before).exp() - 1).abs() > config.clip
                    sums += torch.stack([approximate_kl(new, before) * len(part), entropies.sum(), losses.sum(), clipped.sum()]).cpu() / len(batch)
            return sums
        except RuntimeError as error:
            if self.parts >= len(mine) or not out_of_memory(error):
                raise
        self.parts *= 2
        warnings.warn(f"a policy minibatch does not fit into memory; computing it in {self.parts} parts from here on, with the same result")
        self.policy_optimizer.zero_grad(set_to_none=True)
        return None

    def minibatches(self, size):
        """Index arrays of `minibatch` samples, every sample once an epoch, freshly shuffled."""
        for _ in range(self.config.epochs):
            yield from np.split(self.shuffle.permutation(size), size // self.config.minibatch)

    def step(self, optimizer, parameters, loss=0.0):
        """Clip this optimiser's gradients by their own norm and step; a non-finite gradient or loss is dropped and counted."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm).item()
        which = int(optimizer is self.value_optimizer)
        if np.isfinite(norm) and np.isfinite(loss):
            optimizer.step()
            self.skipped_in_a_row[which] = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row[which] += 1
            if self.skipped_in_a_row[which] >= self.MAX_SKIPPED:
                raise NonFiniteError(f"{self.MAX_SKIPPED} {('policy', 'critic')[which]} losses or gradients in a row were not finite;"
                                     " none was applied; lower the learning rate, or use a wider dtype")
        optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self):
        """Everything but tensors that a checkpoint needs for a bit-for-bit continuation, as JSON-able values."""
        parts = gather([(env.state_dict(), rng.bit_generator.state) for env, rng in zip(self.envs, self.rngs)])
        environments, generators = zip(*[pair for part in parts for pair in part])
        return {"steps": self.steps, "updates": self.updates, "episodes": self.episodes, "skipped": self.skipped,
                "skipped_in_a_row": list(self.skipped_in_a_row), "recent": [list(row) for row in self.recent],
                "running": [list(row) for row in self.running], "envs": list(environments), "rngs": list(generators),
                "shuffle": self.shuffle.bit_generator.state, "parts": self.parts, "met": self.met}

    def load_state_dict(self, state):
        """Continue where state_dict() left off, with any number of processes. Raises for what it never returns: ValueError, or what
        Python, the environment or the agent (which scores what was met) say of such a value.

        After an environment's load_state_dict(state), its observe() gives (obs, info) of that moment, unless the former does.
        """
        N, finite = self.config.num_envs, lambda row: len(row) == 3 and all(type(x) in (int, float) and np.isfinite(x) for x in row)
        counts = [state["steps"], state["updates"], state["episodes"], state["skipped"], state["parts"], *state["skipped_in_a_row"]]
        if not (all(type(count) is int and count >= 0 for count in counts) and len(counts) == 7 and state["parts"] and state["updates"] <= self.total_updates
                and state["steps"] == state["updates"] * N * self.config.rollout_steps and len(state["recent"]) <= self.recent.maxlen
                and isinstance(state["met"], list) and all(map(finite, state["recent"])) and all(map(finite, state["running"]))
                and len(state["running"]) == len(state["envs"]) == len(state["rngs"]) == N):
            raise ValueError("the counters, returns or environments are not those of this training")
        for name in ("steps", "updates", "episodes", "skipped", "parts"):
            setattr(self, name, state[name])
        self.skipped_in_a_row = list(state["skipped_in_a_row"])
        self.recent = collections.deque((tuple(row) for row in state["recent"]), maxlen=self.recent.maxlen)
        self.running = [list(row) for row in state["running"]]
        item = lambda value: tuple(map(item, value)) if isinstance(value, list) else value  # JSON has no tuples
        self.met = list(map(item, state["met"]))
        self.score_ahead(self.met)  # raises for what is no item
        mine = slice(self.rank * len(self.envs), (self.rank + 1) * len(self.envs))
        self.current = [env.load_state_dict(saved) or env.observe() for env, saved in zip(self.envs, state["envs"][mine], strict=True)]
        for rng, saved in zip([*self.rngs, self.shuffle], [*state["rngs"][mine], state["shuffle"]], strict=True):
            rng.bit_generator.state = saved


def evaluate(make_env, agent, episodes, seed, gamma):
    """Play `episodes` episodes side by side, one an environment, sampling from the policy; the agent does not learn.

    Returns {"returns": [episodes] discounted per primitive step by gamma, "successes": [episodes]}, numpy arrays. Each
    episode has a generator of its own, so that the result depends neither on the order nor on which episode ends first.
    """
    envs = [make_env() for _ in range(episodes)]
    rngs = [np.random.default_rng([seed, index]) for index in range(episodes)]
    current = [env.reset(seed=seed * 10_007 + index) for index, env in enumerate(envs)]
    returns, discounts, successes = np.zeros(episodes), np.ones(episodes), np.zeros(episodes)
    alive = list(range(episodes))
    while alive:
        with torch.no_grad():
            policy = agent.log_probs([agent.encode(*current[i]) for i in alive])
        over = set()
        for i, scores in zip(alive, policy):
            obs, reward, done, cut, info = act(envs[i], current[i][1], sample(scores.tolist(), rngs[i]))
            returns[i] += discounts[i] * reward
            discounts[i] *= gamma ** info.get("duration", 1)
            current[i] = (obs, info)
            if done or cut:
                successes[i] = info.get("success", done)
                over.add(i)
        alive = [i for i in alive if i not in over]
    return {"returns": returns, "successes": successes}
