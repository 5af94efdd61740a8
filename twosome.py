"""TWOSOME: an LLM acts in a world told in words, and PPO aligns it with that world.

    Tan et al., "True Knowledge Comes from Practice: Aligning LLMs with Embodied Environments via
    Reinforcement Learning", ICLR 2024, arXiv 2401.14151

    section  what                                           where
    4.1      the probability of an action, equation 2       tokenize, score_actions_naive
             the same, each distinct token once             score_actions (engine/trie.py)
    4.2      token and word normalisation, equations 3, 4   normalize
    4.3      actor and critic on one frozen LLM             Agent
             PPO with macro-actions                         ppo.py; the training loop is train,
                                                            and its Trainer is ppo.PPO for a run
    4.4      prompts                                        prompts.py
    5        Overcooked and VirtualHome                     envs.py

    python twosome.py --env overcooked                      learn the tomato salad
    python twosome.py --env overcooked --model smollm2      the same with a real LLM
    python twosome.py --eval runs/tomato-salad-seed1        evaluate a run
    python twosome.py --help

Read this file from top to bottom; sections 4.1 and 4.2 can be copied together with engine/trie.py
alone. engine/ makes the same results fast, safe and distributed. What can change a result there:
each task's settings (presets.json); the number format, LoRA's layers and the texts of the penalty
(models.py); and a step that is left out because its gradient is not finite (trainer.py).

Our deliberate differences: the phrase is scored together with the space before it; the critic's
last layer starts at zero; the LoRA weights are float32 whatever the base is in; a penalty holds the
policy to the base (Agent.drift). Those of the training are in ppo.py.
"""
import contextlib
import dataclasses
import functools
import operator
import os
import signal
import sys

if __name__ == "__main__":
    # Let Ctrl-C end the program at once, without a traceback, while it imports or loads; while it
    # trains, runs.Signals listens.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Let OpenMP's threads sleep while they wait. By default they spin, and two runs on two cores
    # then slow each other many times over. PyTorch reads this when imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.stat(".").st_nlink == 0:  # PyTorch's libraries do not load there
        sys.exit("twosome.py: the current folder was removed; change to another")

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import envs
import prompts as prompt_design
from engine import command, models, processes, runs, trie, watch, worlds
from engine.trainer import Trainer

# -----------------------------------------------------------------------------
# Section 4.1: the probability of an action is the joint probability of its phrase's tokens.
# Axes: B prompts, A admissible actions, T tokens of the longest phrase, S tokens of a sequence,
# V vocabulary, H hidden size.


def encode(tokenizer, texts):
    """Return the token ids of each text, behind the tokenizer's own opening tokens (BOS).

    A text is only text: "</s>" in it is four characters and no control token. A closing token
    (EOS) is left out, because the phrase goes on where the prompt stops. Raises trie.ScoringError
    if the tokenizer makes a control token of a text all the same.
    """
    opening = tokenizer("")["input_ids"]
    if opening and opening[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        opening = opening[:-1]
    rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for text, row in zip(texts, rows, strict=True):
        if control.intersection(row):
            raise trie.ScoringError(f"{text[:60]!r} holds a control token of this tokenizer")
    return [opening + row for row in rows]


# Our choice: remember 16,384 prompts, so that one which is met again is not cut again.
@functools.lru_cache(maxsize=16_384)
def tokenize(tokenizer, prompt, phrases):
    """Cut a prompt and its phrases (a tuple) into tokens: (prompt_ids, tails, seams).

    Encode prompt + " " + phrase as one text, as the LLM would meet it, and cut it where the
    prompt's own tokens end: the space belongs to the phrase's first token. tails[k] holds the
    ids of phrase k behind prompt_ids. Some tokenizers merge a phrase with the prompt's end. Then
    the cut moves left for all phrases, so that all have one common past, and seams[k] counts the
    tokens of tails[k] that are still the prompt's own; it is 0 otherwise. Raises trie.ScoringError.
    """
    check_text(prompt, phrases)
    # Encode whole texts, never a phrase by itself: how a tokenizer cuts a word depends on what
    # stands before it, and some put an opening token before every text.
    alone, *joint = encode(tokenizer, [prompt, *(f"{prompt} {phrase}" for phrase in phrases)])
    kept = [common_length(alone, ids) for ids in joint]
    cut = min(kept)
    tails = tuple(tuple(ids[cut:]) for ids in joint)
    seams = tuple(length - cut for length in kept)
    if not cut:
        raise trie.ScoringError(f"the prompt {prompt[:60]!r} leaves no token to condition on")
    for k, tail in enumerate(tails):
        if len(tail) == seams[k]:
            raise trie.ScoringError(f"the phrase {phrases[k]!r} has no token of its own")
        if tail in tails[:k]:
            raise trie.ScoringError(f"the phrases {phrases[tails.index(tail)]!r} and {phrases[k]!r}"
                                    " have the same tokens; actions need other phrases")
    return tuple(alone[:cut]), tails, seams


def check_text(prompt, phrases):
    """Raise ScoringError for a prompt or phrases that no tokenizer should see."""
    if not phrases:
        raise trie.ScoringError("there are no actions to score; give at least one phrase")
    for text in (prompt, *phrases):
        if not isinstance(text, str):
            raise trie.ScoringError(f"{text!r:.60} is no text; prompts and phrases are of type str")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise trie.ScoringError(f"{text[:60]!r} holds half a surrogate pair, no character")
    if prompt != prompt.rstrip():
        raise trie.ScoringError(f"the prompt ends in {prompt[-1:]!r}; the one space between prompt"
                                " and phrase belongs to the phrase and is put there")
    for phrase in phrases:
        if not phrase or phrase != phrase.strip():
            raise trie.ScoringError(f"the phrase {phrase!r:.60} is empty or has a stray space")


def common_length(a, b):
    """Return the number of tokens with which both sequences begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def score_actions_naive(model, tokenizer, prompts, phrases, normalization="word"):
    """The definition, equation 2: log P(a_k | d) = sum_i log P_LM(w_i | d, w_1 ... w_{i-1}).

    The LLM reads one full sequence for each action. `model` and `tokenizer` are a causal LM's;
    `prompts` is list[str] [B]; `phrases` is list[list[str]], the admissible actions of each.
    Returns a list [B] of log pi [A] in nats, float32. Raises trie.ScoringError.
    """
    policies = []
    for prompt, actions in zip(prompts, phrases, strict=True):
        prompt_ids, tails, seams = tokenize(tokenizer, prompt, tuple(actions))
        rows = []
        for tail in tails:
            ids = torch.tensor([prompt_ids + tail], device=model.device)  # [1, S]
            logits = model(input_ids=ids, use_cache=False).logits[0]  # [S, V]
            # The logits at position i predict the token at position i + 1.
            over_vocabulary = logits[len(prompt_ids) - 1:-1].float().log_softmax(-1)  # [T, V]
            rows.append(over_vocabulary.gather(1, ids[0, len(prompt_ids):, None])[:, 0])  # [T]
        log_probs = pad_sequence(rows, batch_first=True)  # [A, T]
        policies.append(policy(log_probs, tails, seams, actions, normalization))
    return policies


def score_actions(model, tokenizer, prompts, phrases, normalization="word"):
    """What runs: the values and gradients of score_actions_naive, each distinct token once.

    Prompts and phrases become one trie of tokens, which the LLM reads under a mask that shows a
    token its own past alone (engine/trie.py). Arguments and result are those of the definition;
    `prompts` may hold equal ones. Raises trie.ScoringError, and FloatingPointError for scores that
    are not finite.
    """
    if isinstance(prompts, str) or any(isinstance(actions, str) for actions in phrases):
        raise trie.ScoringError("prompts is a list of texts and phrases a list of lists of texts"
                                "; one of them is a bare text here")
    if len(prompts) != len(phrases):
        raise trie.ScoringError(f"there are {len(prompts)} prompts and {len(phrases)} lists of"
                                " phrases; give one for each prompt")
    cut = [tokenize(tokenizer, prompt, tuple(actions))
           for prompt, actions in zip(prompts, phrases, strict=True)]
    scores = trie.token_log_probs(model, [(prompt_ids, tails) for prompt_ids, tails, _ in cut])
    return [policy(log_probs, tails, seams, actions, normalization)
            for log_probs, (_, tails, seams), actions in zip(scores, cut, phrases, strict=True)]


# -----------------------------------------------------------------------------
# Section 4.2: action prompt normalisation.

NORMALIZATIONS = ("sum", "token", "word")  # the paper proposes the last two


def policy(token_log_probs, tails, seams, phrases, normalization):
    """Return log pi [A] from the log-probability of each phrase's tokens [A, T], 0 behind its end.

    Nearly always all `seams` are 0: equation 2 is the sum of a row, and normalize divides it.
    But where a phrase merged with the prompt's end, the tails of the others begin with some
    tokens of the prompt; `seams` counts them. They belong to the score, because only what
    follows the same tokens can be compared. They are no part of any phrase's length: otherwise
    the odds of two actions would depend on a third.
    """
    joint = token_log_probs.sum(-1)  # [A] log P(a_k | d), equation 2
    seam = torch.zeros_like(joint)
    if any(seams):
        seam = torch.stack([row[:n].sum() for row, n in zip(token_log_probs, seams, strict=True)])
        joint = joint - seam
    tokens = [len(tail) - length for tail, length in zip(tails, seams, strict=True)]
    words = [len(phrase.split()) for phrase in phrases]
    return normalize(joint, tokens, words, normalization, seam)


def normalize(joint, token_counts, word_counts, normalization="word", seam=0.0):
    """Return log pi(a_k | d), float32 [A], from the joint log-probabilities log P(a_k | d) [A].

        token, equation 3:  pi(a_k | d) = softmax over k of  log P(a_k | d) / N_k
        word, equation 4:   pi(a_k | d) = softmax over k of  log P(a_k | d) / W_k

    N_k counts the phrase's tokens and W_k its words. "sum" (or "none") divides by 1. Word
    normalisation is the paper's choice: it does not favour short phrases, and it does not reward
    a word for being cut into many tokens, most of which are near certain. `seam` is the part of
    the score that is divided by no length (see policy); it is nearly always 0.
    """
    lengths = {"sum": 1, "none": 1, "token": token_counts, "word": word_counts}
    if normalization not in lengths:
        raise trie.ScoringError(f"unknown normalisation {normalization!r}; use sum, token, word")
    logits = joint / joint.new_tensor(lengths[normalization])
    return (logits + seam).log_softmax(-1)


# -----------------------------------------------------------------------------
# Section 4.3: actor and critic on one frozen LLM.
#
#   actor    pi(a_k | d), section 4.2, by the LLM with its LoRA adapter on
#   critic   V(d) = MLP(h), h the hidden state of the prompt's last token, adapter off
#
# PPO's policy loss trains the LoRA weights, its value loss trains the MLP; the LLM never changes.


def observation_text(info):
    """Return the text of an observation: (prompt, phrases of the admissible actions).

    Our own environments carry their named state, which prompts.py renders (section 4.4): it gives
    a phrase for each action, of which the admissible ones are taken here. Anyone else's carry
    info["prompt"] and info["actions"], the phrases of the admissible actions alone; a prompt wins
    over a state. With info["admissible"] as well, phrase k stands for the action
    info["admissible"][k], otherwise for the action k. Raises ScoringError.
    """
    if "prompt" not in info and "state" in info:
        prompt, phrases = prompt_design.render(info["state"])
        # An empty mask means that every action may be chosen (envs.py).
        return prompt, tuple(phrases[k] for k in info.get("admissible") or range(len(phrases)))
    for name in ("prompt", "actions"):
        if name not in info:
            raise trie.ScoringError(f'the environment\'s info lacks "{name}"; give info["prompt"],'
                                    ' a text, and info["actions"], a list of phrases')
    actions, admissible = info["actions"], info.get("admissible")
    if isinstance(actions, (str, bytes)) or not hasattr(actions, "__iter__"):
        raise trie.ScoringError(f'info["actions"] is {actions!r:.60}; give a list of texts')
    actions = tuple(actions)
    check_text(info["prompt"], actions)
    if admissible is not None and operator.length_hint(admissible, -1) not in (0, len(actions)):
        raise trie.ScoringError(f'info["actions"] has {len(actions)} phrases; info["admissible"] is'
                                f" {admissible!r:.60}; each phrase needs an action")
    return info["prompt"], actions


def remember(memory, keys, work, size=sys.maxsize):
    """Return the memory's value of each key; work gives those of new keys, `size` at a time."""
    new = [key for key in dict.fromkeys(keys) if key not in memory]
    for n in range(0, len(new), size):
        part = new[n:n + size]
        memory.update(zip(part, work(part), strict=True))
    return [memory[key] for key in keys]


class Agent:
    """Actor: frozen LLM + LoRA. Critic: the same frozen LLM, adapter off, and an MLP on top.

    model, tokenizer: a causal LM and its tokenizer (models.load); normalization: section 4.2.
    LoRA of rank 8, alpha 16, no dropout, on the q and v projections: published scripts. An Agent
    has the methods that ppo.py asks for; an item is (prompt, phrases).
    """

    # Our choice: how many prompts' features are remembered at most.
    FEATURES = 16_384

    def __init__(self, model, tokenizer, normalization="word", lora_rank=8, lora_alpha=16,
                 lora_targets=""):
        """Put a fresh adapter and a fresh critic on the model, which must not carry one yet."""
        self.model = models.add_lora(model, lora_rank, lora_alpha, lora_targets)
        self.tokenizer = tokenizer
        self.normalization = normalization
        self.scores = {}  # item -> log pi, while the policy stands still
        # The base never changes, so a prompt's feature stays right for good: an update of the
        # critic is an update of a small MLP, without a pass through the LLM.
        self.known = {}  # prompt -> its feature, what the critic reads of it
        # H -> 1024 -> 512 -> 1, ReLU, no biases: published scripts. Ask the model itself for H,
        # because configurations name it differently.
        self.critic = torch.nn.Sequential(
            torch.nn.Linear(self.last_hidden(["a"]).numel(), 1024, bias=False), torch.nn.ReLU(),
            torch.nn.Linear(1024, 512, bias=False), torch.nn.ReLU(),
            torch.nn.Linear(512, 1, bias=False)).to(self.model.device)
        # Our choice: the last layer starts at zero. A random value is noise in the first
        # advantages, and under a sparse reward there is nothing but noise.
        torch.nn.init.zeros_(self.critic[-1].weight)
        # The base writes these texts when `drift` first asks for them.
        self.own_texts = functools.cache(functools.partial(models.own_texts, self.model, tokenizer))

    def describe(self, obs, info):
        """Return the item of an observation: its prompt and the phrases of its actions."""
        return observation_text(info)

    def log_probs(self, items):
        """Return log pi(. | d) over each item's phrases: a list of float32 [A].

        Without gradients, remember the scores for as long as the policy stands still.
        """
        if torch.is_grad_enabled():
            return self.score(items)
        return remember(self.scores, items, self.score)

    def score(self, items):
        """Score the items with the adapter as it is: a list of float32 [A]."""
        prompts, phrases = zip(*items, strict=True)
        return score_actions(self.model, self.tokenizer, prompts, phrases, self.normalization)

    def policy_changed(self):
        """Forget the remembered scores."""
        self.scores.clear()

    @contextlib.contextmanager
    def untrained(self):
        """Within it, the adapter is off: the policy is the prompted LLM's own."""
        self.policy_changed()
        with self.model.disable_adapter(), contextlib.ExitStack() as stack:
            stack.callback(self.policy_changed)  # after an error, too
            yield self

    @torch.no_grad()
    def last_hidden(self, prompts):
        """Return what the critic reads of each prompt: float32 [B, H], on the CPU.

        It is the hidden state of the prompt's last token, after the final norm, with the adapter
        off. The zeros behind shorter prompts change nothing: no token sees a later one.
        """
        rows = [torch.tensor(ids) for ids in encode(self.tokenizer, prompts)]
        ids = pad_sequence(rows, batch_first=True).to(self.model.device)
        with self.model.disable_adapter():
            out = models.text_model(self.model)(input_ids=ids, use_cache=False)
        lasts = [len(row) - 1 for row in rows]  # -1 may be padding
        return out.last_hidden_state[range(len(rows)), lasts].float().cpu()

    def features(self, prompts):
        """Return last_hidden of each prompt: float32 [B, H]. Remember it; forget the oldest.

        On a CPU, or with several processes, each prompt goes through the LLM alone. So the bits
        depend neither on what else is in a batch nor on which process read it. One process on a
        GPU reads 64 at once, which takes no longer. The memory lies on the CPU, for a process
        cannot read another one's GPU.
        """
        size = 1 if self.model.device.type == "cpu" or processes.place()[1] > 1 else 64
        rows = torch.stack(remember(self.known, prompts, self.last_hidden, size))
        while len(self.known) > self.FEATURES:
            self.known.pop(next(iter(self.known)))
        return rows.to(self.model.device)

    def values(self, items):
        """Return V(d) of each item: float32 [B]. Gradients reach the MLP alone."""
        return self.critic(self.features([prompt for prompt, _ in items]))[:, 0]

    def drift(self, turn):
        """Return KL(base || policy) in nats a token, over two of 128 texts that the base wrote.

        Our choice: it keeps what the LLM knows where the reward is silent. The base's own texts
        need no data, and they are where it is at home. A turn takes the next two of them.
        """
        pairs = self.own_texts()  # [64, 2, S]
        pair = pairs[turn % len(pairs)]
        with torch.no_grad(), self.model.disable_adapter():
            base = self.model(input_ids=pair, use_cache=False).logits.float().log_softmax(-1)
        here = self.model(input_ids=pair, use_cache=False).logits.float().log_softmax(-1)
        return (base.exp() * (base - here)).sum() / pair.numel()  # a mean over [2, S]

    def tree(self, item):
        """Return the trie of one item's tokens, from which its cost can be told."""
        return trie.build_tree([tokenize(self.tokenizer, *item)[:2]])

    def policy_parameters(self):
        """Return the LoRA weights: the base is frozen."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def value_parameters(self):
        """Return the weights of the critic's MLP."""
        return list(self.critic.parameters())


# -----------------------------------------------------------------------------
# Training (section 4.3).


def make_world(config):
    """Return the maker of the environments that a command.Config names.

    "overcooked" and "virtualhome" are ours; MODULE:CLASS is anyone's (engine/worlds.py), which
    is not told gamma: if its actions last several steps, give it the same one in --env-args.
    """
    if config.env not in envs.TASKS:
        return worlds.make_world(config.env, worlds.read_arguments(config.env_args))
    given = worlds.read_arguments(config.env_args, ("name", "task", "gamma"))
    return functools.partial(envs.make, config.env, config.task, gamma=config.gamma, **given)


def build(config):
    """Return (agent, make_env) of a command.Config, with everything seeded.

    Seed before the agent is made: LoRA and the critic draw their first weights then.
    """
    make_env = make_world(config)
    # A wrong name is found here, before a model is loaded.
    make_env()
    transformers.set_seed(config.seed)
    model, tokenizer = models.load(config.model, config.dtype, config.device, config.load_in)
    # Our choice: one thread for a small model. More gain nothing, and would change the last bits.
    if model.num_parameters() < models.LARGE and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    agent = Agent(model, tokenizer, config.norm, config.lora_rank, config.lora_alpha,
                  config.lora_targets)
    return agent, make_env


def load(folder, which="last", env=""):
    """Return (agent, make_env) of a run's checkpoint. A world of your own is named again in env."""
    given = {"env": env} if env else {}
    agent, make_env = build(command.config_of(folder, given))
    runs.load_agent(folder, agent, which)
    return agent, make_env


def train(config, run, agent, make_env, which="last"):
    """Train in a run's folder, from where it stands to the end. Returns the exit code.

    What a run leaves there is told in engine/runs.py, and what it prints in engine/watch.py.
    """
    trainer = Trainer(make_env, agent, config, config.seed)
    if run.resumed:
        run.restore(agent, trainer, which)
    report = watch.Report(config, run, trainer, make_env)
    with runs.Signals(quiet=trainer.rank > 0) as signals:
        report.begin(agent)
        with report:
            # A signal may reach one process alone, but all must stop at the same update.
            stop = max(processes.gather(signals.exit_code))
            while not stop and trainer.updates < trainer.total_updates:
                # Rollout and update: ppo.PPO.
                report.log(trainer.iterate())
                stop = max(processes.gather(signals.exit_code))
                done = trainer.updates == trainer.total_updates
                if trainer.updates % config.checkpoint_every == 0 or done or stop:
                    report.checkpoint(agent)
        processes.leave()
        return report.stopped(stop) if stop else report.finish(agent)


def evaluation(config, options, agent):
    """Play episodes of each task: the untrained LLM, and a run's agent if one is given.

    Returns the exit code. A task that the agent was not trained on tells how far it generalises.
    """
    results = {}
    for env, task in options.tasks or [(config.env, config.task)]:
        # A run's own task is discounted as in its training. One that --task names is discounted as
        # in every preset, unless --gamma is given.
        usual = command.preset("pocket", env, task) if options.tasks else {}
        gamma = usual.get("gamma", config.gamma) if options.gamma is None else options.gamma
        played = dataclasses.replace(config, env=env, task=task, gamma=gamma)
        make_env = make_world(played)
        with agent.untrained():
            measured = {"untrained": command.measure(make_env, agent, played, options.greedy)}
        if options.folder:
            measured["trained"] = command.measure(make_env, agent, played, options.greedy)
        for name, result in measured.items():
            command.say(command.evaluation_line(f"{task}, {name}", result, make_env().best_return))
        results[f"{env}/{task}"] = measured
    command.write_evaluation(options, results)
    return 0


# -----------------------------------------------------------------------------
# The command.


def token_table(agent, prompt, phrases):
    """Return a row for each phrase: (phrase, log P, pi by each normalisation, its tokens)."""
    prompt_ids, tails, seams = tokenize(agent.tokenizer, prompt, tuple(phrases))
    with torch.no_grad():
        log_probs, = trie.token_log_probs(agent.model, [(prompt_ids, tails)])
        policies = [policy(log_probs, tails, seams, phrases, name) for name in NORMALIZATIONS]
    return [(phrase, log_probs[k].sum().item(), [log_pi[k].exp().item() for log_pi in policies],
             agent.tokenizer.convert_ids_to_tokens(list(tails[k])))
            for k, phrase in enumerate(phrases)]


def dispatch(argv, gate):
    """Do what the command line asks for. Returns the exit code."""
    rank = processes.join()
    config, options = command.parse(argv)
    processes.agree(config)
    if options.compare:
        return 0 if rank else watch.compare(options.compare, config.out)
    if rank and (options.tokens or options.eval is not None or options.watch is not None):
        return 0  # one process is enough
    if options.resume is not None:
        gate.run = None if rank else runs.Run(options.resume)
    agent, make_env = build(config)  # bad input leaves no folder
    if options.tokens:
        return command.show_tokens(token_table(agent, options.prompt, options.tokens), options)
    if options.folder:
        runs.load_agent(options.folder, agent)
    if options.eval is not None:
        return evaluation(config, options, agent)
    if options.watch is not None:
        # Give the terminal back first.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return watch.show(config, options, agent, make_env)
    # Only the first process makes the folder and holds its lock; the others follow it.
    if not gate.run and not rank:
        gate.run = runs.Run.create(*command.new_run(config, agent))
    folder, resumed = processes.gather(gate.run and (gate.run.folder, gate.run.resumed))[0]
    run = gate.run or runs.Follower(folder, resumed)
    return train(config, run, agent, make_env, options.which)


def main(argv=None):
    """Run the command: exit code 0, 1 (the machine failed), 2 (bad input) or 128 + a signal."""
    with command.gate() as gate:
        gate.code = dispatch(argv, gate)
    return gate.code


if __name__ == "__main__":
    sys.exit(main())
