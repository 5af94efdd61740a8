"""PPO with macro-actions: how TWOSOME learns (section 4.3), for any agent in any text world.

    [1] Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347
    [2] Schulman et al. 2016, Generalized Advantage Estimation, arXiv 1506.02438
    [3] Sutton, Precup, Singh 1999, Between MDPs and semi-MDPs

Read it from top to bottom. One iteration of training is, in this order,

    PPO.iterate              anneal, then
      PPO.rollout            T steps in N environments: describe, log_probs, sample, act
      Episodes.add           follow the return of each episode
      gae                    advantages and returns; an action of tau steps discounts by gamma^tau
      PPO.update             epochs of minibatches, and for each of them
        PPO.critic_step      value_loss, then PPO.step
        PPO.hold             the KL to the policy's own beginning, if asked for
        PPO.policy_gradient  policy_loss, entropy, approximate_kl
        PPO.step             the optimiser's step

Axes: T steps of a rollout, N environments, B samples of a minibatch, A admissible actions.

This file imports nothing of the project and knows no language model. An agent is any object with

    describe(obs, info) -> item          what to remember of an observation
    log_probs(items) -> list of [A]      log pi over the admissible actions of each item, float32
    values(items) -> [B]                 V of each item, float32; gradients to the critic alone
    policy_parameters(), value_parameters()
    policy_changed()                     called before a rollout and after a step of the policy
    drift(turn) -> scalar                for Config.base_kl alone: the KL from the policy's
                                         beginning, in nats, with gradients. It is measured on some
                                         texts, which `turn` selects

Our deliberate differences from the published code: a time limit is a truncation, not an end; the
advantages are normalised over the whole rollout, with a floor under their deviation; policy and
critic have gradient norms of their own; the bound on the KL is checked before a step, not after it;
gamma is the same inside a macro-action and after it; a rollout whose advantages are all zero leaves
the policy alone, entropy bonus included; a penalty can hold the policy to its beginning.
"""
import dataclasses

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

# -----------------------------------------------------------------------------
# Equations. Pure functions of tensors: copy them one by one.


def gae(rewards, values, next_values, discounts, terminated, ended, gae_lambda):
    """Generalised advantage estimation over macro-actions: [2] equation 16, discounts as in [3].

        delta_t = r_t + gamma^tau V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma^tau lambda A_{t+1}

    All tensors are [T, N]. `rewards` are already discounted inside a macro-action. `discounts`
    hold gamma^tau. `terminated` means that the task is over: there is no future to add.
    `ended` means terminated or cut by the time limit: nothing flows back from the next episode.
    Returns the advantages and the returns, both [T, N].
    """
    deltas = rewards + discounts * next_values * terminated.logical_not() - values
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        running = deltas[t] + discounts[t] * gae_lambda * ended[t].logical_not() * running
        advantages[t] = running
    return advantages, advantages + values


def normalize_advantages(advantages, floor=0.02):
    """Zero mean and unit variance over the whole rollout, with a floor under the deviation.

    The floor and its size are our choice. Before the first reward, the advantages of a critic with
    random weights are noise; scaled up to unit variance, it drives the policy to a single action.
    """
    deviation = advantages.std(unbiased=False).clamp_min(floor)
    return (advantages - advantages.mean()) / deviation


def policy_loss(new, old, advantages, clip):
    """The clipped surrogate of [1], equation 7, negated so that smaller is better. All [B] -> [B].

    `new` and `old` are log pi of the action taken, now and when it was taken.
    """
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio * advantages, clipped * advantages)


def value_loss(new, old, returns, clip):
    """Half the squared error, clipped around the old value (published scripts). All [B] -> [B]."""
    clipped = old + (new - old).clamp(-clip, clip)
    return 0.5 * torch.max((new - returns) ** 2, (clipped - returns) ** 2)


def entropy(log_probs):
    """H(pi) = - sum_a pi(a) log pi(a), in nats. [..., A] -> [...]."""
    return -(log_probs.exp() * log_probs).sum(-1)


def approximate_kl(new, old):
    """KL(old || new) in nats, estimated from samples of old by (r - 1) - log r. [B], [B] -> [B].

    Its mean is without bias, and no sample is negative.
    """
    log_ratio = new - old
    return log_ratio.exp() - 1 - log_ratio


# -----------------------------------------------------------------------------
# Settings. The comment beside a field is the help text of its flag.


class PPOError(ValueError):
    """A setting or a call is impossible. The message is one line and says what would be right."""


@dataclasses.dataclass
class Config:
    """What PPO needs to know. Presets set their own; their sources are in engine/presets.json.

    Published scripts: rollout_steps, gamma (of Overcooked), gae_lambda, clip, max_grad_norm and
    target_kl. The other defaults are our choice, tuned for the embedded LLM.
    """

    steps: int = 12_800  # macro-actions in all, over all environments
    num_envs: int = 8  # N, environments side by side
    rollout_steps: int = 32  # T, steps of each between two updates
    epochs: int = 2  # passes over a rollout
    minibatch: int = 64  # B, samples of one step of the policy
    critic_minibatch: int = 4096  # samples of the critic's, at most
    policy_lr: float = 2e-3  # rate of the LoRA weights, annealed to 0
    critic_lr: float = 1e-3  # rate of the critic, annealed to 0
    gamma: float = 0.99  # discount of one primitive step
    gae_lambda: float = 0.95  # lambda of the advantage estimation
    clip: float = 0.2  # epsilon: range of the ratio and of the value
    entropy: float = 0.005  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # bound on the norm of each gradient
    target_kl: float = 0.02  # no step beyond 1.5 times this KL; 0: no bound
    base_kl: float = 0.0  # weight of the KL to the base; 0: no penalty

    def validate(self):
        """Raise PPOError for sizes that do not fit each other."""
        samples = self.num_envs * self.rollout_steps
        if (min(samples, self.minibatch, self.critic_minibatch, self.epochs) < 1
                or samples % self.minibatch):
            raise PPOError(f"sizes are > 0; minibatch divides num_envs x rollout_steps = {samples}")
        if self.steps < samples:
            raise PPOError(f"steps is {self.steps}, less than one rollout of {samples} samples")


# -----------------------------------------------------------------------------
# Acting.


def begin(make_env, count, seed):
    """Make `count` environments and begin an episode in each: (envs, generators, [(obs, info)]).

    Each has a generator of its own: what is drawn for one never depends on the others. The factor
    of the seed (our choice) keeps two runs apart that have up to 10,007 environments.
    """
    envs = [make_env() for _ in range(count)]
    rngs = [np.random.default_rng([seed, n]) for n in range(count)]
    return envs, rngs, [env.reset(seed=seed * 10_007 + n) for n, env in enumerate(envs)]


def sample(log_probs, rng):
    """Draw an action from log pi [A] with one uniform number from the NumPy generator `rng`."""
    cumulative = log_probs.double().exp().cumsum(0)
    if not torch.isfinite(cumulative[-1]):
        raise FloatingPointError("the policy's log-probabilities are not finite")
    draw = rng.random() * cumulative[-1]
    return min(int((cumulative <= draw).sum()), len(log_probs) - 1)


def act(env, info, choice):
    """Take the choice-th admissible action. Where info names none, every action is admissible."""
    admissible = info.get("admissible")
    return env.step(choice if admissible is None or not len(admissible) else admissible[choice])


# -----------------------------------------------------------------------------
# Training.


@dataclasses.dataclass
class Rollout:
    """What T steps in N environments leave behind: T * N items, and tensors [T, N]."""

    items: list  # time first, environments second
    choices: torch.Tensor  # index of the action taken, among the admissible ones
    log_probs: torch.Tensor  # log pi of that action when it was taken
    entropies: torch.Tensor  # H(pi) when it was taken
    values: torch.Tensor  # V(s_t)
    next_values: torch.Tensor  # V(s_{t+1})
    rewards: torch.Tensor
    durations: torch.Tensor  # tau, in primitive steps
    terminated: torch.Tensor
    ended: torch.Tensor  # terminated, or cut by the time limit
    successes: torch.Tensor  # where an episode ended: whether it was solved


class PPO:
    """Train an agent in N environments; each call of `iterate` is one rollout and one update.

    `make_env()` returns a fresh environment with Gymnasium's reset and step. Its info may carry
    "admissible" (action indices), "duration" (primitive steps of the last action; 1 if absent)
    and "success" (at the end of an episode). The reward of an action that lasts several steps
    comes discounted already, from the action's own start.
    """

    def __init__(self, make_env, agent, config, seed=0):
        """Make the environments, generators and optimisers, and begin the first episodes."""
        config.validate()
        self.agent = agent
        self.config = config
        self.envs, self.rngs, self.now = begin(make_env, config.num_envs, seed)
        # A key that begin() gives to no environment: theirs are [seed, n].
        self.shuffle = np.random.default_rng([seed, config.num_envs, 1])
        # Two optimisers, because policy and critic have their own rates, which iterate sets. eps
        # 1e-5: published scripts. The fused form does the same in a third of the time.
        self.policy_optimizer = torch.optim.Adam(agent.policy_parameters(), eps=1e-5, fused=True)
        self.value_optimizer = torch.optim.Adam(agent.value_parameters(), eps=1e-5, fused=True)
        self.updates = 0
        self.total_updates = config.steps // (config.num_envs * config.rollout_steps)
        self.episodes = Episodes(config.num_envs, config.gamma)

    def iterate(self):
        """Run one iteration and return its metrics, a dict of numbers."""
        config = self.config
        if self.updates >= self.total_updates:
            raise PPOError("training is over: all updates are done; raise steps to go further")
        # 1. Anneal both learning rates linearly to zero (published scripts).
        left = 1.0 - self.updates / self.total_updates
        self.policy_optimizer.param_groups[0]["lr"] = config.policy_lr * left
        self.value_optimizer.param_groups[0]["lr"] = config.critic_lr * left

        # 2. Act in the environments with the policy as it stands. Forget remembered scores even
        # if the last update took no step: a resumed run begins with an empty memory, and both
        # must do the same work.
        self.agent.policy_changed()
        rollout = self.rollout()
        self.episodes.add(rollout)

        # 3. Estimate advantages; a macro-action of tau steps discounts by gamma^tau [3].
        # A time limit is a truncation, not an end: the published scripts treat it as an end.
        advantages, returns = gae(rollout.rewards, rollout.values, rollout.next_values,
                                  config.gamma ** rollout.durations, rollout.terminated,
                                  rollout.ended, config.gae_lambda)
        unexplained = (returns - rollout.values).var() / returns.var().clamp_min(1e-8)

        # 4. Improve the critic and the policy.
        metrics = self.update(rollout, normalize_advantages(advantages), returns)
        self.updates += 1
        return {"update": self.updates, "steps": self.updates * len(rollout.items),
                **self.episodes.means(), "entropy": rollout.entropies.mean().item(), **metrics,
                "explained_variance": 1 - unexplained.item()}

    @torch.no_grad()
    def rollout(self):
        """Take T actions in each of the N environments. Returns a Rollout."""
        T, N = self.config.rollout_steps, len(self.envs)
        items, finals = [], {}
        choices = torch.zeros(T, N, dtype=torch.long)
        log_probs, entropies, rewards, durations, successes = torch.zeros(5, T, N)
        terminated, ended = torch.zeros(2, T, N, dtype=torch.bool)
        for t in range(T):
            now = [self.agent.describe(*told) for told in self.now]
            items += now
            for n, log_pi in enumerate(self.log_probs(now)):  # [A]
                choice = sample(log_pi, self.rngs[n])
                obs, reward, done, cut, info = act(self.envs[n], self.now[n][1], choice)
                choices[t, n] = choice
                log_probs[t, n] = log_pi[choice]
                entropies[t, n] = entropy(log_pi)
                rewards[t, n] = reward
                durations[t, n] = info.get("duration", 1)
                terminated[t, n] = done
                ended[t, n] = done or cut
                # A world that does not tell its success counts as solved if its episode ends, or
                # is cut, on a reward.
                successes[t, n] = (done or cut) and info.get("success", reward > 0)
                # A time limit cuts an episode that still had a future. Keep its last
                # observation: its value stands for that future.
                if cut and not done:
                    finals[t, n] = self.agent.describe(obs, info)
                self.now[n] = self.envs[n].reset() if done or cut else (obs, info)

        # The critic chooses no action, so ask for all values at once. V(s_{t+1}) stands one row
        # below V(s_t); after the last row, it is the value of where the environments stand now.
        after = [self.agent.describe(*told) for told in self.now]
        values = self.agent.values(items + after).cpu().view(T + 1, N)
        next_values = values[1:].clone()
        for (t, n), item in finals.items():
            next_values[t, n] = self.agent.values([item]).item()
        return Rollout(items, choices, log_probs, entropies, values[:T], next_values,
                       rewards, durations, terminated, ended, successes)

    def log_probs(self, items):
        """Return log pi [A] of each item, to act by. A subclass may share this work."""
        return self.agent.log_probs(items)

    def update(self, rollout, advantages, returns):
        """Improve critic and policy on one rollout. Returns the means of what was measured.

        `advantages` are normalised [T, N].
        """
        rows = []
        # While every reward has been zero, so is every advantage, if the critic's last layer
        # started at zero (twosome.Agent). There is nothing to learn yet: leave the policy alone.
        # This includes the entropy bonus (our choice), which alone would wear down what the LLM
        # knows already.
        improving = advantages.any()

        # `turn` tells hold which texts to take. It begins at the number of updates, so that every
        # rollout begins at other texts, and a resumed run at those that a whole one would take.
        for turn, batch in enumerate(self.minibatches(len(rollout.items)), self.updates):
            # The critic may split a minibatch into several steps. They are cheap in TWOSOME, whose
            # agent remembers what the LLM makes of a prompt.
            for part in batch.split(self.config.critic_minibatch):
                rows.append(self.critic_step(rollout, returns, part))
            if not improving:
                continue
            self.hold(turn)
            measured = self.policy_gradient(rollout, advantages, batch)
            rows.append(measured)

            # Check a step before it is taken, not after it: one bad step can end all learning.
            # Then only the critic goes on with this rollout. The margin of 1.5 is our choice,
            # because the estimate is noisy.
            improving = not 0 < 1.5 * self.config.target_kl < measured["kl"]
            if improving:
                self.step(self.policy_optimizer)
                self.agent.policy_changed()
        # Clear the gradient of a step that was not taken.
        self.policy_optimizer.zero_grad()
        return means(rows, ("policy_loss", "value_loss", "kl"))

    def critic_step(self, rollout, returns, batch):
        """Take one step of the critic. The agent lets its gradients reach the critic alone."""
        values = self.agent.values([rollout.items[i] for i in batch]).cpu()  # [B]
        old_values = rollout.values.take(batch)
        loss = value_loss(values, old_values, returns.take(batch), self.config.clip).mean()
        (0.5 * loss).backward()  # 0.5: the value loss's weight in the published scripts
        self.step(self.value_optimizer)
        return {"value_loss": loss.item()}

    def hold(self, turn):
        """Add the gradient that holds the policy to its beginning (our choice)."""
        if self.config.base_kl:
            (self.config.base_kl * self.agent.drift(turn)).backward()

    def policy_gradient(self, rollout, advantages, batch):
        """Add the gradients of the clipped surrogate and of the entropy bonus to the weights'.

        Returns the policy loss and the KL (nats), summed over `batch`, divided by the size of a
        minibatch. A subclass may call this with parts of one, to save memory: then gradients and
        measures of the parts add up to those of the whole.
        """
        size = self.config.minibatch
        # Pad with -1e9, which is 0 in probability. The losses are a few numbers: use the CPU.
        log_pi = self.agent.log_probs([rollout.items[i] for i in batch])
        log_pi = pad_sequence(log_pi, batch_first=True, padding_value=-1e9).cpu()  # [B, A]
        choices = rollout.choices.take(batch)
        new = log_pi.gather(1, choices[:, None])[:, 0]  # [B]
        old = rollout.log_probs.take(batch)  # [B]
        loss = policy_loss(new, old, advantages.take(batch), self.config.clip).sum() / size
        bonus = entropy(log_pi).sum() / size
        (loss - self.config.entropy * bonus).backward()
        kl = approximate_kl(new, old).sum() / size
        return {"policy_loss": loss.item(), "kl": kl.item()}

    def minibatches(self, size):
        """Yield index tensors [B] into flattened [T, N]. Each sample comes once an epoch."""
        for _ in range(self.config.epochs):
            permutation = torch.from_numpy(self.shuffle.permutation(size))
            yield from permutation.split(self.config.minibatch)

    def step(self, optimizer):
        """Clip the gradient of one optimiser by its own norm, take a step, and clear it."""
        parameters = optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def means(rows, names):
    """Return {name: mean over the rows (dicts) that have it}; NaN for what no row has."""
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: float(np.mean(columns[name] or np.nan)) for name in names}


class Episodes:
    """Returns and successes of the last hundred episodes (our choice), in the order they began.

    An episode counts once all that began before it have ended (our choice). The first ones, which
    begin together, count once all of them have ended. Otherwise the first points of a curve would
    hold only the episodes that end early, and these are mostly successes.
    """

    def __init__(self, num_envs, gamma):
        """Begin one episode in each environment."""
        self.gamma = gamma
        # Number of the episode that runs in each environment; 0 for all that begin here.
        self.began = np.zeros(num_envs)
        # Its return so far, discounted for each primitive step, and its primitive steps so far.
        self.returns, self.lengths = np.zeros((2, num_envs))
        self.ended = []  # rows of number, return, success, primitive steps
        self.count = self.primitive_steps = 0

    def add(self, rollout):
        """Take in a rollout."""
        for t, ended in enumerate(rollout.ended.numpy()):
            self.returns += self.gamma ** self.lengths * rollout.rewards[t].numpy()
            self.lengths += rollout.durations[t].numpy()
            for n in np.flatnonzero(ended):
                success = rollout.successes[t, n].item()
                self.ended.append((self.began[n], self.returns[n], success, self.lengths[n]))
                self.began[n] = self.began.max() + 1
                self.count += 1
            self.returns[ended] = self.lengths[ended] = 0.0
        self.primitive_steps += int(rollout.durations.sum())

    def means(self):
        """Return counts and means, and forget older episodes; NaN before the first have ended."""
        first = self.began.min()  # the oldest one that still goes on
        whole = [row for row in self.ended if row[0] < first]
        counted = sorted(whole, key=lambda row: row[0])[-100:]
        self.ended = counted + [row for row in self.ended if row[0] >= first]
        _, value, success, length = np.mean(counted or [[np.nan] * 4], axis=0)
        return {"primitive_steps": self.primitive_steps, "episodes": self.count,
                "return": value, "success": success, "episode_steps": length}


# -----------------------------------------------------------------------------
# Evaluation.


@torch.no_grad()
def evaluate(make_env, agent, episodes, seed, gamma, greedy=False, report=None):
    """Play episodes side by side with the policy as it stands; the agent does not learn.

    Actions are sampled, or with `greedy` the most probable one is taken. `report(count)` is told
    how many episodes have ended. Every episode has its own generator, so the result does not
    depend on which ends first. Returns {"returns": [episodes], discounted for each primitive
    step; "successes": [episodes]; "steps": [episodes], primitive steps}.
    """
    envs, rngs, now = begin(make_env, episodes, seed)
    returns, steps, successes = np.zeros((3, episodes))
    alive = list(range(episodes))
    while alive:
        policies = agent.log_probs([agent.describe(*now[n]) for n in alive])
        for n, log_pi in zip(list(alive), policies, strict=True):
            choice = sample(log_pi, rngs[n])  # if greedy too: it refuses what is not finite
            if greedy:
                choice = int(log_pi.argmax())
            obs, reward, done, cut, info = act(envs[n], now[n][1], choice)
            returns[n] += gamma ** steps[n] * reward
            steps[n] += info.get("duration", 1)
            now[n] = obs, info
            if done or cut:
                successes[n] = info.get("success", reward > 0)
                alive.remove(n)
        if report:
            report(episodes - len(alive))
    return {"returns": returns, "successes": successes, "steps": steps}
