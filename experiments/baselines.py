"""What TWOSOME is measured against: PPO without an LLM, SayCan-style, chance, and itself changed.

    python experiments/claims.py                               runs all of it: see there
    python experiments/baselines.py head-random --env overcooked    twosome.py, with one change

    Random       chooses uniformly among the admissible actions
    Vector       PPO without an LLM: two networks on the observation's numbers, for ppo.PPO
    SayCan       the LLM's score of a phrase times an affordance, for ppo.evaluate
    prior        what the three normalisations make of the untrained LLM
    VARIANTS     TWOSOME with one thing changed: wordings, and what a reader would ablate. Each is
                 a subclass or a function put in the place of ours, and never a flag of twosome.py.

How the paper built its SayCan baseline is not known. Ahn et al. (SayCan, arXiv 2204.01691)
multiply the LLM's probability of a skill's text by the skill's value function; our three
affordances are named in Afforded.
"""
import copy
import dataclasses
import functools
import itertools
import math
import os
import re
import sys
import time

import numpy as np
import torch
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import envs
import ppo
import twosome
from engine import command, trainer, trie

# -----------------------------------------------------------------------------
# Chance.


class Random:
    """The uniformly random policy over the admissible actions. An item is their number."""

    def __init__(self, actions):
        self.actions = actions

    def describe(self, obs, info):
        return len(info["admissible"]) or self.actions  # none advised: choose among all

    def log_probs(self, items):
        return [torch.full((count,), -math.log(count)) for count in items]


# -----------------------------------------------------------------------------
# PPO without an LLM.


def layers(inputs, outputs, gain):
    """Return an MLP inputs-64-64-outputs with tanh, orthogonal weights (published scripts)."""
    made = torch.nn.Sequential(torch.nn.Linear(inputs, 64), torch.nn.Tanh(),
                               torch.nn.Linear(64, 64), torch.nn.Tanh(),
                               torch.nn.Linear(64, outputs))
    for layer, scale in ((made[0], 2**0.5), (made[2], 2**0.5), (made[4], gain)):
        torch.nn.init.orthogonal_(layer.weight, scale)
        torch.nn.init.zeros_(layer.bias)
    return made


class Vector:
    """Actor and critic on the vector observation. An item is (features, admissible actions)."""

    def __init__(self, env):
        features = len(env.feature_names)
        self.actions = len(env.action_names)
        self.actor = layers(features, self.actions, 0.01)
        self.critic = layers(features, 1, 1.0)

    def describe(self, obs, info):
        return tuple(obs.tolist()), tuple(info["admissible"]) or tuple(range(self.actions))

    def log_probs(self, items):
        """Return log pi of each item. All share one softmax, because one for each is slower."""
        logits = self.actor(torch.tensor([features for features, _ in items]))  # [B, actions]
        counts = [len(admissible) for _, admissible in items]
        # Where the admissible actions stand in the logits; S is their number over all items.
        rows = np.repeat(np.arange(len(items)), counts)  # [S]
        actions = np.concatenate([admissible for _, admissible in items])  # [S]
        masked = torch.full_like(logits, -math.inf)  # 0 in probability
        masked[rows, actions] = logits[rows, actions]
        return masked.log_softmax(-1)[rows, actions].split(counts)

    def values(self, items):
        return self.critic(torch.tensor([features for features, _ in items]))[:, 0]

    def policy_parameters(self):
        return list(self.actor.parameters())

    def value_parameters(self):
        return list(self.critic.parameters())

    def policy_changed(self):
        """Forget nothing: nothing is remembered."""


class Twin:
    """A world that answers with one reward, and keeps in `told` what another would have been."""

    def __init__(self, told, counted):
        self.world, self.other, self.told = told, counted, []

    def reset(self, seed=None):
        self.other.reset(seed=seed)
        return self.world.reset(seed=seed)

    def step(self, action):
        self.told.append(self.other.step(action)[1])
        return self.world.step(action)


class OurEpisodes(ppo.Episodes):
    """The episodes under our reward, whatever the reward is that is learnt from."""

    def __init__(self, twins, gamma):
        super().__init__(len(twins), gamma)
        self.twins = twins

    def add(self, rollout):
        told = torch.tensor([twin.told for twin in self.twins]).T  # [T, N]
        for twin in self.twins:
            twin.told.clear()
        super().add(dataclasses.replace(rollout, rewards=told))


# Published scripts: 4 x 128 steps, 4 minibatches, 4 epochs, no bound on the KL, gamma 0.99 in the
# home as well, the whole kitchen in view, and 0.1 a chop. The rest is ppo.py's in every form: an
# Adam and a gradient norm for policy and critic each, advantages normalised over the whole rollout,
# and a time limit that is no end.
PUBLISHED = {"num_envs": 4, "rollout_steps": 128, "epochs": 4, "minibatch": 128, "entropy": 0.01,
             "target_kl": 0.0}
RATES = {"tomato-salad": 1e-4, "tomato-lettuce-salad": 5e-4, "food-preparation": 1e-3,
         "entertainment": 1e-3}
STEPS = {"tomato-salad": 500_000, "tomato-lettuce-salad": 500_000, "food-preparation": 50_000,
         "entertainment": 200_000}
PRIVILEGES = {"overcooked": {"view": 10, "chop_reward": 0.1}, "virtualhome": {"gamma": 0.99}}


def vector_settings(form, env, task, given=()):
    """Return (PPO's settings, options of the world) of a form: published, equal or tuned.

    `given` has what differs from the published settings: all that makes the tuned form.
    """
    settings = {**PUBLISHED, "rate": RATES[task], **dict(given)}
    rate = settings.pop("rate")
    options = dict(PRIVILEGES[env]) if form == "published" else {}
    usual = envs.make(env, task=task).gamma
    size = settings["num_envs"] * settings["rollout_steps"]
    steps = settings.pop("steps", STEPS[task]) // size * size
    config = ppo.Config(steps=steps, policy_lr=rate, critic_lr=rate,
                        gamma=options.get("gamma", usual), **settings)
    return config, options


def vector(job):
    """Train PPO without an LLM. Returns (agent, facts for a job's file)."""
    env, task, mask = job["env"], job["task"], job.get("mask", True)
    config, told = vector_settings(job["form"], env, task, job.get("settings", {}))
    masked = {} if mask else {"mask": False}
    counted = {**masked, **({"view": told["view"]} if "view" in told else {})}
    make = functools.partial(envs.make, env, task=task)
    transformers.set_seed(job["seed"])
    torch.set_num_threads(1)
    foreign = "chop_reward" in told  # it learns from another reward than ours

    def world():
        """Return a world to learn in. A second one, for our reward, is played where it must be."""
        learnt_in = make(**told, **masked)
        return Twin(learnt_in, make(**counted)) if foreign else learnt_in

    learner = ppo.PPO(world, Vector(make()), config, job["seed"])
    gamma = make().gamma
    learner.episodes = (OurEpisodes(learner.envs, gamma) if foreign
                        else ppo.Episodes(config.num_envs, gamma))

    def measured():
        """Play the policy as it stands, under our reward."""
        return command.summarize(ppo.evaluate(functools.partial(make, **counted), learner.agent,
                                              job["episodes"], command.EVALUATION_SEED, gamma))

    def spent():
        """Return the seconds since the beginning, by the clock and of the CPU."""
        now = time.perf_counter(), time.process_time()
        return {"seconds": now[0] - start[0], "cpu_seconds": now[1] - start[1]}

    start = time.perf_counter(), time.process_time()
    first = measured()
    rows = [{"update": 0, "steps": 0, "primitive_steps": 0, "episodes": job["episodes"],
             "return": first["return"], "success": first["success"], "entropy": np.nan,
             "kl": np.nan, "seconds": 0.0, "cpu_seconds": 0.0}]
    for _ in range(learner.total_updates):
        rows.append({**learner.iterate(), **spent()})
    end = {**measured(), "best": make().best_return, "steps": rows[-1]["steps"],
           "primitive_steps": rows[-1]["primitive_steps"],
           "cpu_seconds": rows[-1]["cpu_seconds"]}
    # Keep points that lie some 2.5 % apart: where 90 % was reached is known no better than that.
    kept = np.unique(np.geomspace(1, len(rows), 300).astype(int)) - 1
    return learner.agent, {
        "settings": {**dataclasses.asdict(config), "world": {**told, **masked}}, "summary": end,
        "curve": {name: [float(rows[k][name]) for k in kept] for name in rows[0]}}


# -----------------------------------------------------------------------------
# SayCan-style: what the LLM says, times what can be done.


class Afforded:
    """A world whose info["affordance"] holds one number for each admissible action.

    admissible    1: the mask of the world, which is all that TWOSOME gets
    possible      1 if the action would change the world, else 0: exact preconditions
    value         what the action would lead to, r + gamma^tau V(s'), as a share of the best
                  possible return; V was learnt by PPO without an LLM

    The last two look one step ahead in the simulator itself, which TWOSOME cannot.
    """

    LEAST = 1e-3  # of a value: a share of zero or below would forbid an action for good

    def __init__(self, world, kind, judge=None):
        self.world, self.kind, self.judge = world, kind, judge
        self.scratch = envs.make(world.name, task=world.task)

    def reset(self, seed=None):
        obs, info = self.world.reset(seed=seed)
        return obs, self.told(info)

    def step(self, action):
        obs, reward, done, cut, info = self.world.step(action)
        return obs, reward, done, cut, info if done or cut else self.told(info)

    def told(self, info):
        """Return info with the affordances in it."""
        every = info["admissible"] or range(len(self.world.action_names))
        return {**info, "affordance": [self.affordance(action) for action in every]}

    def affordance(self, action):
        """Return the affordance of one action."""
        if self.kind == "admissible":
            return 1.0
        before = self.world.state_dict()
        self.scratch.load_state_dict(before)
        obs, reward, done, _, info = self.scratch.step(action)
        if self.kind == "possible":
            return float(done or self.scratch.state_dict()["world"] != before["world"])
        with torch.no_grad():
            future = 0.0 if done else self.judge.values([self.judge.describe(obs, info)]).item()
        worth = reward + self.world.gamma ** info["duration"] * future
        return min(max(worth / self.world.best_return, self.LEAST), 1.0)


class SayCan:
    """The untrained LLM's score of each phrase times its affordance. An item has both."""

    def __init__(self, agent):
        self.agent = agent

    def describe(self, obs, info):
        affordance = info["affordance"]
        # Where nothing can be done, every action is as good as any other.
        return (*self.agent.describe(obs, info), tuple(affordance) if any(affordance)
                else (1.0,) * len(affordance))

    def log_probs(self, items):
        scores = self.agent.log_probs([item[:2] for item in items])
        return [(score.cpu() + torch.tensor(item[2]).log()).log_softmax(-1)
                for score, item in zip(scores, items, strict=True)]


def saycan(job):
    """Play SayCan-style with each affordance, sampled and greedy. Returns facts."""
    make = functools.partial(envs.make, job["env"], task=job["task"])
    judge, _ = vector(job["judge"])
    flags = [f"--{name}={job[name]}" for name in ("env", "task", "model")]
    agent, _ = twosome.build(command.parse(flags)[0])
    results = {}
    with agent.untrained():
        for norm, kind in itertools.product(("word", "sum"), ("admissible", "possible", "value")):
            agent.normalization = norm
            agent.policy_changed()

            def world(kind=kind):
                return Afforded(make(), kind, judge)
            # Both worlds are deterministic, so one greedy episode tells all of them.
            for how, episodes in (("sampled", job["episodes"]), ("greedy", 1)):
                results[f"{norm}, {kind}, {how}"] = command.summarize(ppo.evaluate(
                    world, SayCan(agent), episodes, command.EVALUATION_SEED, make().gamma,
                    greedy=how == "greedy"))
    return {"results": results}


# -----------------------------------------------------------------------------
# Why normalisation: what the three make of the untrained LLM.


class Tempered:
    """An agent's policy at another temperature: pi^(1/T), normalised again."""

    def __init__(self, agent, temperature):
        self.agent, self.temperature = agent, temperature
        self.describe = agent.describe

    def log_probs(self, items):
        return [(row / self.temperature).log_softmax(-1) for row in self.agent.log_probs(items)]


def mean_entropy(rows, temperature=1.0):
    """Return the mean entropy in nats of some policies (log pi) at a temperature."""
    return float(np.mean([ppo.entropy((row / temperature).log_softmax(-1)).item()
                          for row in rows]))


def matching(rows, entropy):
    """Return the temperature at which the policies have this mean entropy, by bisection."""
    low, high = 1e-2, 1e2
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if mean_entropy(rows, middle) > entropy else (middle, high)
    return (low * high) ** 0.5


def slope(values, lengths):
    """Return (nats a unit of length, R^2) of log P against length, within each prompt."""
    x, y = (np.concatenate([np.asarray(part, float) - np.mean(part) for part in parts])
            for parts in (lengths, values))
    if not x.any():
        return None, None
    return float(x @ y / (x @ x)), float((x @ y) ** 2 / (x @ x) / (y @ y))


def prior(job):
    """Measure the untrained policy under the three normalisations. Returns facts."""
    flags = [f"--{name}={job[name]}" for name in ("env", "task", "model")]
    agent, make_env = twosome.build(command.parse(flags)[0])

    def play(policy):
        return command.summarize(ppo.evaluate(make_env, policy, job["episodes"],
                                              command.EVALUATION_SEED, make_env().gamma))

    with agent.untrained():
        play(agent)  # under word normalisation; the prompts that it meets are measured
        items = list(agent.scores)[:job["prompts"]]
        cut = [twosome.tokenize(agent.tokenizer, *item) for item in items]
        with torch.no_grad():
            scores = trie.token_log_probs(agent.model, [parts[:2] for parts in cut])
        policies = {name: [twosome.policy(log_probs, tails, seams, phrases, name) for
                           log_probs, (_, tails, seams), (_, phrases) in zip(
                               scores, cut, items, strict=True)]
                    for name in twosome.NORMALIZATIONS}
        entropies = {name: mean_entropy(rows) for name, rows in policies.items()}
        results = {}
        for name, rows in policies.items():
            agent.normalization = name
            agent.policy_changed()
            results[name] = play(agent)
            # The same policy, as flat or as sharp as each of the other two are.
            for other in {*policies} - {name}:
                temperature = matching(rows, entropies[other])
                results[f"{name} at the entropy of {other}"] = {
                    **play(Tempered(agent, temperature)), "temperature": temperature}
    return {"entropies": entropies, "results": results, **lengths_of(items, cut, scores),
            "state": {"prompt": items[0][0], "phrases": list(items[0][1]),
                      **{name: rows[0].exp().tolist() for name, rows in policies.items()}}}


def lengths_of(items, cut, scores):
    """Return how log P depends on a phrase's length, over all prompts, and for each phrase."""
    joint = [log_probs.sum(-1).tolist() for log_probs in scores]
    tokens = [[len(tail) for tail in tails] for _, tails, _ in cut]
    words = [[len(phrase.split()) for phrase in phrases] for _, phrases in items]
    table = {}
    for (_, phrases), *columns in zip(items, joint, tokens, words, strict=True):
        for phrase, *row in zip(phrases, *columns, strict=True):
            table.setdefault(phrase, []).append(row)
    means = {phrase: np.mean(rows, axis=0).tolist() for phrase, rows in table.items()}
    return {"prompts": len(items), "nats_a_token": slope(joint, tokens),
            "nats_a_word": slope(joint, words), "phrases": means}


# -----------------------------------------------------------------------------
# Other wordings. Each is a function (info, prompt, phrases) -> (prompt, phrases), put behind
# twosome.observation_text in the process that runs it.


def reword(change):
    """Have every observation told by `change` from now on."""
    usual = twosome.observation_text
    twosome.observation_text = functools.wraps(usual)(lambda info: change(info, *usual(info)))


def substituted(text, pairs):
    """Return the text with each (old, new) replaced, whole words alone."""
    for old, new in pairs:
        text = re.sub(rf"\b{re.escape(old)}(?!\w)", new, text)
    return text


def no_cue(info, prompt, phrases):
    """Break principle 1: the prompt ends on no cue for the next step."""
    return prompt.removesuffix(" Your next step is to"), phrases


def no_articles(info, prompt, phrases):
    """Break principle 2: no noun of a phrase keeps its article."""
    return prompt, tuple(re.sub(r"\b(the|an?) ", "", phrase) for phrase in phrases)


# What is worth using is named in the observation as well, but by other words than in the phrases.
ALIASES = (("tomato", "first ingredient"), ("lettuce", "second ingredient"),
           ("onion", "third ingredient"), ("bowl", "dish"), ("first board", "upper surface"),
           ("second board", "lower surface"), ("serving counter", "hatch"),
           ("pancake", "breakfast"), ("microwave", "device"), ("chips", "snack"),
           ("milk", "drink"), ("TV", "screen"), ("sofa", "seat"), ("coffee table", "stand"),
           ("living room", "room for guests"), ("kitchen", "room for cooking"))


def not_named(info, prompt, phrases):
    """Break principle 3: no preferred action's nouns stand in the observation."""
    return substituted(prompt, ALIASES), phrases


def one_phrase(info, prompt, phrases):
    """Break principle 4: an action has one phrase, whatever it does now."""
    state = info["state"]
    if state["environment"] == "overcooked":
        boards = {"board1": "go to the first board", "board2": "go to the second board"}
        every = [*(f"get the {food}" for food in state["foods"]), "get the bowl",
                 *(boards[board] for board in state["boards"]), "deliver the salad",
                 "chop the food"]
    else:
        every = [name.format_map(state["nouns"]) for name, *_ in envs.ACTIONS[state["task"]]]
    return prompt, tuple(every[k] for k in info["admissible"]) or tuple(every)


def one_verb(info, prompt, phrases):
    """Break our own rule: every walk has the same verb, as far as the phrases still differ."""
    walks = r"^(go to|visit|proceed to|enter|move to|head to|reach|approach|return to) "
    plain = [re.sub(walks, "walk to ", phrase) for phrase in phrases]
    return prompt, tuple(new if plain.count(new) == 1 else old
                         for old, new in zip(phrases, plain, strict=True))


def uneven(info, prompt, phrases):
    """Keep the meaning, but make every second action's phrase four words longer."""
    every = info["admissible"] or range(len(phrases))
    return prompt, tuple(f"go ahead now and {phrase}" if action % 2 else phrase
                         for action, phrase in zip(every, phrases, strict=True))


# Three other wordings that keep the principles: two of the prompt, one of the phrases as well.
OTHER_WORDS = {
    "other-words-1": ((("You want to", "Your aim is to"), ("You see", "You notice"),
                       ("You hold", "You carry"), ("You are", "You stand"),
                       ("Your next step is to", "Now you should")), ()),
    "other-words-2": ((("You want to", "The task is to"), ("You see", "In sight:"),
                       ("You hold", "In hand:"), ("You are", "You find yourself"),
                       ("Your next step is to", "The best thing to do next is to")), ()),
    "other-words-3": ((("You see", "You spot"), ("Your next step is to", "Next, you should")),
                      (("pick up", "lift"), ("grab", "get hold of"), ("put", "set"),
                       ("chop", "cut"), ("walk to", "step over to"), ("approach", "come up to"),
                       ("switch on", "turn on"), ("open", "pull open"), ("close", "shut"),
                       ("serve", "bring")))}


def other_words(name, info, prompt, phrases):
    """Say the same in other words, within the principles."""
    of_prompt, of_phrases = OTHER_WORDS[name]
    return (substituted(prompt, of_prompt),
            tuple(substituted(phrase, of_phrases) for phrase in phrases))


# -----------------------------------------------------------------------------
# What a reader would ablate.


class HeadRandom(twosome.Agent):
    """The critic's last layer begins as PyTorch draws it, and not at zero."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.critic[-1].reset_parameters()


@torch.no_grad()
def hidden_one_by_one(model, tokenizer, prompts):
    """Return the hidden states of the prompts' last tokens, the model as it is: as last_hidden."""
    decoder = twosome.models.text_model(model)
    rows = [torch.tensor([ids], device=model.device) for ids in twosome.encode(tokenizer, prompts)]
    states = [decoder(input_ids=row, use_cache=False)[0][0, -1] for row in rows]
    return torch.stack(states).float().cpu()


class CriticAdapted(twosome.Agent):
    """The critic reads the LLM with the adapter on, so its features change with the policy."""

    def last_hidden(self, prompts):
        return hidden_one_by_one(self.model, self.tokenizer, prompts)

    def policy_changed(self):
        super().policy_changed()
        self.known.clear()


class FullFinetune(twosome.Agent):
    """Every weight of the LLM learns (one of GLAM's ways). The critic reads a frozen copy."""

    def __init__(self, model, *args, **options):
        self.frozen = copy.deepcopy(model)
        super().__init__(model, *args, **options)
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(self.learns(name))

    def learns(self, name):
        """Whether a weight of the peft model learns."""
        return "lora_" not in name

    def last_hidden(self, prompts):
        return hidden_one_by_one(self.frozen, self.tokenizer, prompts)


class HeadAlone(FullFinetune):
    """Only the vocabulary projection learns, untied from the embeddings (GLAM's other way)."""

    def __init__(self, model, *args, **options):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        super().__init__(model, *args, **options)

    def learns(self, name):
        return name.endswith("lm_head.weight")


class Chat(twosome.Agent):
    """The prompt is told as a user's message in the model's chat template; the phrase answers."""

    def score(self, items):
        policies = []
        for prompt, phrases in items:
            opening = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True,
                return_dict=True)["input_ids"]
            tails = tuple(map(tuple, twosome.encode(self.tokenizer, list(phrases))))
            tokens, = trie.token_log_probs(self.model, [(tuple(opening), tails)])
            seams = (0,) * len(tails)
            policies.append(twosome.policy(tokens, tails, seams, phrases, self.normalization))
        return policies


class Warm(twosome.Agent):
    """log P of every phrase is divided by one number, the mean of the phrases' words.

    So it is as warm as under word normalisation, but blind to each phrase's own length.
    """

    def score(self, items):
        words = [np.mean([len(phrase.split()) for phrase in phrases]) for _, phrases in items]
        return [(log_pi / mean).log_softmax(-1)
                for log_pi, mean in zip(super().score(items), words, strict=True)]


class AlwaysEntropy(trainer.Trainer):
    """The entropy bonus does not rest while no reward has been seen."""

    def update(self, rollout, advantages, returns):
        if not advantages.any():
            advantages = advantages + 1e-30
        return super().update(rollout, advantages, returns)


def replaced(owner, name, value):
    """Return a function that puts a value in the place of ours."""
    return functools.partial(setattr, owner, name, value)


VARIANTS = {
    # the four principles broken, one at a time, and our own rule
    "no-cue": functools.partial(reword, no_cue),
    "no-articles": functools.partial(reword, no_articles),
    "not-named": functools.partial(reword, not_named),
    "one-phrase": functools.partial(reword, one_phrase),
    "one-verb": functools.partial(reword, one_verb),
    # phrases of very different lengths
    "uneven": functools.partial(reword, uneven),
    **{name: functools.partial(reword, functools.partial(other_words, name))
       for name in OTHER_WORDS},
    "head-random": replaced(twosome, "Agent", HeadRandom),
    "critic-adapted": replaced(twosome, "Agent", CriticAdapted),
    "full-finetune": replaced(twosome, "Agent", FullFinetune),
    "head-alone": replaced(twosome, "Agent", HeadAlone),
    "chat": replaced(twosome, "Agent", Chat),
    "warm": replaced(twosome, "Agent", Warm),
    "entropy-always": replaced(twosome, "Trainer", AlwaysEntropy),
    "no-floor": replaced(ppo, "normalize_advantages",
                         functools.partial(ppo.normalize_advantages, floor=1e-8)),
}


def vary(name):
    """Change TWOSOME in this process, from now on; "" changes nothing."""
    if name:
        VARIANTS[name]()


def reworded(job, folder):
    """Play a trained agent under its own wording and under others."""
    agent, make_env = twosome.load(folder)
    usual, results = twosome.observation_text, {}

    for name in ("", *OTHER_WORDS):
        twosome.observation_text = usual
        vary(name)
        results[name or "its own"] = command.summarize(ppo.evaluate(
            make_env, agent, job["episodes"], command.EVALUATION_SEED + job["seed"],
            make_env().gamma))
    twosome.observation_text = usual
    return {"results": results}


def random_weights(name, seed, folder):
    """Leave a model of the same shape and tokenizer in a folder, with weights drawn anew."""
    model, tokenizer = twosome.models.load(name, "float32", "cpu")
    torch.manual_seed(seed)
    type(model)(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv=None):
    """Run twosome.py with the variant that the first argument names."""
    name, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in VARIANTS:
        choices = ", ".join(VARIANTS)
        print(f"unknown variant {name[:60]!r}; choose one of {choices}", file=sys.stderr)
        return 2
    vary(name)
    return twosome.main(flags)


if __name__ == "__main__":
    sys.exit(main())
