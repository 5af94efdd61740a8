"""TWOSOME: an LLM acts in a text-described world, and PPO aligns it with that world.

Paper: Tan et al., "True Knowledge Comes from Practice: Aligning LLMs with Embodied Environments via Reinforcement
Learning", ICLR 2024 (arXiv 2401.14151). Each concept is one module that can be copied alone:

  paper                                              here
  4.1  an action's probability from its phrase       scoring.py: score_actions_naive (the definition), score_actions (fast)
  4.2  action prompt normalisation                   scoring.py: normalize
  4.3  actor (LoRA) and critic on one frozen LLM     Agent; PPO itself in ppo.py
  4.4  prompt design                                 prompts.py
  5    Overcooked and the VirtualHome-style home     envs.py

  python twosome.py --env overcooked                               # learn the tomato salad, about a minute on two cores
  python twosome.py --env overcooked --task tomato-lettuce-salad
  python twosome.py --help                                         # every setting, with its default
"""
import argparse
import contextlib
import dataclasses
import functools
import os
import random
import sys
import time

import numpy as np
import peft
import torch

import envs
import models
import ppo
import prompts as prompting
import runs
from scoring import NORMALIZATIONS, ScoringError, build_tree, encode, plain, score_actions, token_report, tokenize

# ---------------------------------------------------------------------------------------------------------------------
# Section 4.3: actor and critic on one frozen LLM

def describe(info):
    """The text of an observation: (prompt, admissible phrases), hashable, from an environment's info.

    Anyone's environment works if info carries "prompt" (str) and "actions" (the admissible actions' phrases, list[str]); with
    "admissible" as well, phrase k stands for action info["admissible"][k], else for action k. Our two environments carry their
    named "state" instead, and prompts.py renders it.
    """
    if "prompt" in info:
        return info["prompt"], tuple(info["actions"])
    prompt, phrases = prompting.render(info["state"])
    return prompt, tuple(phrases[k] for k in info["admissible"]) or tuple(phrases)


class Agent:
    """Actor: frozen LLM + LoRA. Critic: the same LLM with the adapter off, then an MLP on the prompt's last hidden state.

    model, tokenizer: a causal LM and its tokenizer (models.load); normalization: section 4.2. LoRA rank 8, alpha 16, dropout 0 on
    the q and v projections: published scripts. It has the methods ppo.py asks of an agent; an item is (prompt, phrases).
    """
    FEATURE_BYTES = 64 * 2 ** 20  # our choice: bound on the remembered features; what was asked for longest ago goes first

    def __init__(self, model, tokenizer, normalization="word", lora_rank=8, lora_alpha=16, lora_targets=None):
        self.model = models.add_lora(model, lora_rank, lora_alpha, lora_targets)
        self.tokenizer, self.normalization = tokenizer, normalization
        self._scores, self._features = {}, {}  # item -> log pi, while the policy stands; prompt -> [H], for good
        hidden = self._hidden(["a"]).shape[1]  # asked of the model itself: some project the embedding to another width
        # Hidden -> 1024 -> 512 -> 1, ReLU, no biases: published scripts. The last layer starts at zero (our choice): a random
        # value is noise in the first advantages, and under a sparse reward noise is all there is.
        self.critic = torch.nn.Sequential(
            torch.nn.Linear(hidden, 1024, bias=False), torch.nn.ReLU(), torch.nn.Linear(1024, 512, bias=False), torch.nn.ReLU(),
            torch.nn.Linear(512, 1, bias=False)).to(model.device)
        torch.nn.init.zeros_(self.critic[-1].weight)

    def encode(self, obs, info):
        """What the rollout buffer keeps of an observation: its text. Its tokens are remembered by `tokenize`."""
        return describe(info)

    def log_probs(self, items):
        """log pi(. | d) over each item's phrases, a list of float32 [A]. Without gradients, scores are remembered while the policy stands."""
        if torch.is_grad_enabled():
            return score_actions(self.model, self.tokenizer, *zip(*items), self.normalization)
        new = [item for item in dict.fromkeys(items) if item not in self._scores]
        if new:
            self._scores.update(zip(new, score_actions(self.model, self.tokenizer, *zip(*new), self.normalization)))
        return [self._scores[item] for item in items]

    def policy_changed(self):
        """Forget the remembered scores: the adapter has changed."""
        self._scores.clear()

    @contextlib.contextmanager
    def untrained(self):
        """Within it, the policy is the prompted LLM's own: the adapter is off."""
        self.policy_changed()
        with self.model.disable_adapter():
            yield self
        self.policy_changed()

    @torch.no_grad()
    def _hidden(self, texts):
        """Final hidden state, after the final norm, of the LAST REAL TOKEN of each text, adapter off: float32 [B, H]."""
        ids = encode(self.tokenizer, list(texts))
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self.model.device)
        with self.model.disable_adapter():
            hidden = plain(self.model).base_model(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(ids)), mask.sum(1) - 1].float()  # never [:, -1]: that would be a pad

    def features(self, texts):
        """The critic's input for each prompt, [B, H] float32; computed once a distinct prompt, for the base never changes."""
        new = [text for text in dict.fromkeys(texts) if text not in self._features]
        for part in (new[start:start + 64] for start in range(0, len(new), 64)):  # our choice; a whole rollout's at once could fill the memory
            self._features.update(zip(part, self._hidden(part)))
        for text in dict.fromkeys(texts):
            self._features[text] = self._features.pop(text)  # to the end, so that several processes forget alike
        result = torch.stack([self._features[text] for text in texts])
        while len(self._features) * result[0].nbytes > self.FEATURE_BYTES:
            self._features.pop(next(iter(self._features)))
        return result

    def values(self, items):
        """V(d) of each item, float32 [B]; gradients reach the MLP alone."""
        place = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in items))}  # equal prompts, equal values
        return self.critic(self.features(list(place)))[[place[prompt] for prompt, _ in items], 0]

    def known(self, items):
        """What is remembered of these items, for other processes: {item: (feature [H], log pi [A])}, NumPy arrays, of items that have both."""
        return {item: (self._features[item[0]].cpu().numpy(), self._scores[item].cpu().numpy())
                for item in items if item in self._scores and item[0] in self._features}

    def learn(self, known):
        """Remember what some process knows of items."""
        for item, pair in known.items():
            self._features.pop(item[0], None)
            self._features[item[0]], self._scores[item] = (torch.from_numpy(array).to(self.model.device) for array in pair)

    def preflight(self, items, samples=32):
        """What training on these items will take, `samples` a backward pass: (dict, printable text); see models.preflight."""
        trees = [build_tree([tokenize(self.tokenizer, *item)]) for item in dict.fromkeys(items)]
        return models.preflight(self.model, trees, samples, [self.critic])

    def policy_parameters(self):
        """The LoRA weights, and nothing else: the base is frozen."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def value_parameters(self):
        """The critic's MLP."""
        return list(self.critic.parameters())

    def save(self, folder):
        """Write adapter (in peft's format), critic and remembered features into a checkpoint's folder; returns state.json's share."""
        # Written here, not by peft's save_pretrained: that asks a model hub about the vocabulary, and a full disk is no OSError there.
        self.model.peft_config["default"].save_pretrained(folder)
        runs.write_tensors(os.path.join(folder, "adapter_model.safetensors"), self._adapter())
        runs.write_tensors(os.path.join(folder, "critic.safetensors"), self.critic.state_dict())
        # The features could be computed again, but their last bits depend on which prompts were computed together.
        runs.write_tensors(os.path.join(folder, "features.safetensors"), {"features": self._remembered()})
        return {"base": self._fingerprint, "prompts": list(self._features)}

    def load(self, folder, saved):
        """Continue from what save() wrote into `folder` and returned; raises runs.RunError where that was another agent's."""
        if saved["base"] != self._fingerprint:
            raise runs.RunError("it was trained on another base model, or on another version of it")
        own, theirs = self.model.peft_config["default"], runs.read_json(os.path.join(folder, "adapter_config.json"))
        if (own.r, own.lora_alpha, set(own.target_modules)) != (theirs["r"], theirs["lora_alpha"], set(theirs["target_modules"])):
            raise runs.RunError("adapter_config.json describes another adapter than the run's settings")
        prompts = saved["prompts"]
        if not all(isinstance(prompt, str) for prompt in prompts) or len(set(prompts)) != len(prompts):
            raise runs.RunError("state.json's prompts are not a list of different texts")
        like = self._remembered().new_empty(len(prompts), self.critic[0].in_features)
        adapter = runs.read_tensors(os.path.join(folder, "adapter_model.safetensors"), self._adapter())
        critic = runs.read_tensors(os.path.join(folder, "critic.safetensors"), self.critic.state_dict())
        features = runs.read_tensors(os.path.join(folder, "features.safetensors"), {"features": like})["features"]
        peft.set_peft_model_state_dict(self.model, adapter)
        self.critic.load_state_dict(critic)
        self._features = dict(zip(prompts, features.to(self.model.device)))
        self.policy_changed()

    def _adapter(self):
        return peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)

    def _remembered(self):
        width = self.critic[0].in_features
        return torch.stack(list(self._features.values())) if self._features else torch.empty(0, width, device=self.model.device)

    @functools.cached_property
    def _fingerprint(self):
        """What the frozen base is known by: the adapter stands aside."""
        return runs.fingerprint((name, tensor) for name, tensor in self.model.named_parameters() if "lora_" not in name)


# ---------------------------------------------------------------------------------------------------------------------
# Settings. A preset gives each field its value; a flag on the command line wins over the preset.

@dataclasses.dataclass
class Config(ppo.Config):
    """One run: what is learnt, by which model, with which PPO settings (ppo.Config's fields are flags as well)."""
    env: str = ppo.option("overcooked", "environment: overcooked or virtualhome")
    task: str = ppo.option("", "task of the environment; empty: its first (tomato-salad, food-preparation)")
    norm: str = ppo.option("word", "action prompt normalisation, section 4.2: sum, token or word")
    model: str = ppo.option("pocket_lm", "a folder or hub name of any causal LM; pocket_lm is the one in this repository")
    seed: int = ppo.option(1, "seed of everything random")
    out: str = ppo.option("", "folder of the run; empty: the next free runs/TASK-seedN")
    lora_rank: int = ppo.option(8, "rank of the LoRA matrices")
    lora_alpha: int = ppo.option(16, "LoRA's scale is alpha / rank")
    lora_targets: str = ppo.option("", "comma-separated layers to adapt, or all-linear; empty: the q and v projections")
    dtype: str = ppo.option("auto", "number format of the frozen weights: auto, float32, bfloat16 or float16")
    device: str = ppo.option("auto", "auto, cuda, mps or cpu")
    load_in: str = ppo.option("", "8bit or 4bit: quantise the frozen weights through bitsandbytes; empty: not")
    checkpoint_every: int = ppo.option(5, "updates between two checkpoints")

    def validate(self):
        """Raise ppo.ConfigError, in one line, for a setting that cannot work."""
        super().validate()
        for name, choices in (("norm", NORMALIZATIONS), ("dtype", models.DTYPES), ("load_in", ("", "8bit", "4bit"))):
            if getattr(self, name) not in choices:
                raise ppo.ConfigError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(filter(None, choices))}")
        for name, low, high in (("lora_rank", 1, 4096), ("lora_alpha", 1, 10 ** 6), ("checkpoint_every", 1, 10 ** 9), ("seed", 0, 2 ** 32 - 1)):
            if not low <= getattr(self, name) <= high:
                raise ppo.ConfigError(f"{name} is {str(getattr(self, name))[:20]}; it must lie between {low} and {high}")


def preset(name, env, task):
    """The values a preset gives to Config's fields for a task, a dict. Raises ppo.ConfigError for a name it does not know."""
    home = env == "virtualhome"
    if name == "pocket":  # our choice, tuned for pocket_lm on seeds 101 and up, never on the seeds reported
        steps = {"tomato-salad": 12_800, "food-preparation": 10_240}.get(task, 10_240 if home and task != "entertainment" else 30_720)
        return dict(steps=steps, num_envs=8, rollout_steps=32, epochs=2, minibatch=64, gradient_accumulation=1, policy_lr=2e-3,
                    critic_lr=1e-3, entropy=0.005, gamma=0.95 if home else 0.99)
    if name == "hub":  # our choice, reasoned and NOT measured: the published scripts' batches, at a LoRA rate usual for 1 to 8 billion parameters
        return dict(steps=50_000, num_envs=4, rollout_steps=32, epochs=1, minibatch=32, gradient_accumulation=8, policy_lr=1e-4,
                    critic_lr=1e-4, entropy=0.01, gamma=0.95 if home else 0.99)
    if name == "paper":  # published scripts, to the number, for the four published tasks; the others borrow (our choice). LoRA was in half precision there: in float32 these rates learn far slower
        steps = {"food-preparation": 50_000, "entertainment": 200_000}.get(task, 200_000) if home else 500_000
        return dict(steps=steps, num_envs=4, rollout_steps=32, epochs=1, minibatch=32, gradient_accumulation=8, clip=0.2, entropy=0.01,
                    policy_lr=1e-6 if home else 5e-7, critic_lr=5e-5 if home else 1e-5, gamma=0.95 if home else 0.99, gae_lambda=0.95,
                    value_coefficient=0.5, max_grad_norm=0.5, target_kl=0.02, norm="word", lora_rank=8, lora_alpha=16)
    raise ppo.ConfigError(f"unknown preset {name!r}; choose one of pocket, hub, paper")


# ---------------------------------------------------------------------------------------------------------------------
# The command line

EVALUATION_SEED = 1_000_000  # fixed, and far from every training seed
ERRORS = (ppo.ConfigError, envs.EnvError, models.ModelError, ScoringError, prompting.StateError, runs.RunError)  # bad input: exit code 2


def model_path(name):
    """The folder or hub name to load; pocket_lm lies beside this file, wherever the command is given."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), name) if name == "pocket_lm" else name


def build(config):
    """The agent and the environments' maker that a Config describes: (agent, make_env)."""
    make_env = lambda: envs.make(config.env, task=config.task or None, gamma=config.gamma)
    make_env()  # a wrong name is found before a model is loaded
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # nothing here draws from the first two; an environment of yours may
        seed(config.seed)
    model, tokenizer = models.load(model_path(config.model), config.dtype, config.device, config.load_in)
    if model.device.type == "cpu" and model.num_parameters() < 2e7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small matrices: a second thread gives little, and a run must not depend on the number of cores
    return Agent(model, tokenizer, config.norm, config.lora_rank, config.lora_alpha, config.lora_targets), make_env


def summarize(result):
    """Means and 95 % intervals of ppo.evaluate's arrays: normal for the return, Wilson's for the success rate."""
    n, z, mean, rate = len(result["returns"]), 1.96, result["returns"].mean(), result["successes"].mean()
    half = z * result["returns"].std(ddof=1) / n ** 0.5 if n > 1 else float("nan")
    centre, spread = rate + z * z / (2 * n), z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    wilson = [max((centre - spread) / (1 + z * z / n), 0.0), min((centre + spread) / (1 + z * z / n), 1.0)]  # rounding may leave [0, 1]
    return {"episodes": n, "return": mean, "return_interval": [mean - half, mean + half], "success": rate, "success_interval": wilson}


def some_states(env, agent, steps=200):
    """What a random walk of `steps` actions meets, encoded: the states that the preflight looks at."""
    rng, (obs, info), items = np.random.default_rng(0), env.reset(seed=0), []
    for _ in range(steps):
        items.append(agent.encode(obs, info))
        obs, _, done, cut, info = ppo.act(env, info, int(rng.integers(len(items[-1][1]))))
        if done or cut:
            obs, info = env.reset()
    return items


def train(config, run, agent, make_env, which="last", episodes=100):
    """Train in `run`'s folder from where it stands (its checkpoint `which`) to the end, evaluate, leave the files of a finished run."""
    from tqdm import tqdm
    start = time.perf_counter()
    trainer = ppo.PPO(make_env, agent, config, config.seed)
    for turn in (0, 1) if run.resumed else ():  # the first process puts newer checkpoints aside, then the others read
        if turn == min(trainer.rank, 1):
            run.restore(agent, trainer, which)
        ppo.gather(None)
    if trainer.updates == trainer.total_updates and os.path.exists(os.path.join(run.folder, "summary.json")):
        part()
        print(f"{run.folder} is finished: nothing is left to do; next: python twosome.py --eval {run.folder}")
        return 0
    print(f"{config.env}/{config.task}, {config.norm} normalisation, seed {config.seed}{f', {trainer.world} processes' if trainer.world > 1 else ''} -> {run.folder}")
    print(agent.preflight(some_states(make_env(), agent), config.minibatch // config.gradient_accumulation)[1])
    total = trainer.total_updates * config.num_envs * config.rollout_steps
    with tqdm(total=total, initial=trainer.steps, unit="step", dynamic_ncols=True, disable=trainer.rank > 0) as bar, runs.Signals(quiet=trainer.rank > 0) as signals:
        while trainer.updates < trainer.total_updates:
            before, began = trainer.steps, time.perf_counter()
            metrics = trainer.iterate()
            seconds = time.perf_counter() - began
            run.log({**metrics, "seconds": round(seconds, 3), "steps_per_second": round((trainer.steps - before) / seconds, 1)})
            bar.update(trainer.steps - before)
            if trainer.episodes:
                bar.set_postfix_str(f"return {metrics['return']:.3f}, success {metrics['success']:.0%}", refresh=False)
            stop = max(ppo.gather(signals.exit_code))  # a signal reaches several processes at different moments, or one alone: they stop together
            if trainer.updates % config.checkpoint_every == 0 or trainer.updates == trainer.total_updates or stop:
                run.checkpoint(agent, trainer)
            if stop:
                bar.close()
                part()
                print(f"stopped after update {trainer.updates} of {trainer.total_updates}; go on with: python twosome.py --resume {run.folder}")
                return stop
    part()
    if trainer.rank:
        return 0  # the first process evaluates and reports
    best = make_env().best_return
    result = summarize(ppo.evaluate(make_env, agent, episodes, EVALUATION_SEED, config.gamma))
    run.write("summary.json", {"env": config.env, "task": make_env().task, "model": config.model, "normalization": config.norm,
                               "seed": config.seed, "steps": trainer.steps, "training_episodes": trainer.episodes, **result,
                               "best_return": best, "resumed": run.resumed, "seconds": round(time.perf_counter() - start, 1)})
    low, high = result["return_interval"]
    print(f"final evaluation, {result['episodes']} episodes: return {result['return']:.4f} (95 % interval {low:.4f} to {high:.4f}"
          + (f"; best possible {best:.4f})" if best is not None else ")") + f", success {result['success']:.0%}, {time.perf_counter() - start:.0f} s in all")
    runs.plot(run.folder, best)
    print(f"{run.folder}: metrics.csv, curve.png, summary.json, checkpoint-*; next: python twosome.py --eval {run.folder}")
    return 0


def evaluate(folder, tasks, episodes, config):
    """Play episodes of tasks with the run's agent (folder) or, where folder is "", with the untrained LLM; print a table."""
    from tqdm import tqdm
    agent, _ = build(config)
    if folder:
        runs.load(folder, agent)
    print(f"{'task' if folder else 'task (untrained LLM)':38}{'episodes':>9}  {'return (95 % interval)':27}{'success (95 % interval)':26}" + (f"{'untrained return':>17}{'success':>9}" if folder else ""))
    for env, task in tqdm(tasks, unit="task", leave=False, disable=True if len(tasks) == 1 else None):
        gamma = config.gamma if env == config.env else preset("pocket", env, task)["gamma"]
        make_env = lambda: envs.make(env, task=task, gamma=gamma)
        play = lambda: summarize(ppo.evaluate(make_env, agent, episodes, EVALUATION_SEED, gamma))
        result = play()
        line = f"{env + '/' + task:38}{episodes:9}  " + "{:7.4f} ({:7.4f} to {:7.4f})  ".format(result["return"], *result["return_interval"])
        line += "{:6.1%} ({:6.1%} to {:6.1%})   ".format(result["success"], *result["success_interval"])
        if folder:
            with agent.untrained():
                prior = play()
            line += "{:17.4f}{:9.1%}".format(prior["return"], prior["success"])
        tqdm.write(line.rstrip())
    return 0


def tasks_named(env, task):
    """What --env and --task mean to an evaluation, [(env, task), ...]: empty for the run's own task; "all" is every task."""
    if task == "all":
        return [(name, each) for name in ([env] if env else envs.TASKS) for each in envs.TASKS[envs.make(name).name]]
    if not task:
        return [(env, envs.make(env).task)] if env else []
    owner = env or next((name for name, tasks in envs.TASKS.items() if task in tasks), None)
    if owner is None:
        raise ppo.ConfigError(f"unknown task {task!r}; choose all or one of {', '.join(each for tasks in envs.TASKS.values() for each in tasks)}")
    return [(owner, envs.make(owner, task=task).task)]


def arguments(argv):
    """Parse the command line: (Config, modes, fields given). A typo, a wrong type or an unknown choice is a ConfigError of one line."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ppo.ConfigError(message + "; python twosome.py --help lists every flag")

    parser = Parser(prog="twosome.py", allow_abbrev=False, description="TWOSOME: align an LLM with an embodied environment through PPO.",
                    epilog="In brackets: the default for pocket_lm on the tomato salad. Other tasks and presets set their own; a run's config.json holds what it used.")
    first = ("env", "task", "norm", "model", "steps", "seed", "out")
    for field in sorted(dataclasses.fields(Config), key=lambda field: field.name not in first):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=None,
                            help=f"{field.metadata['help']} ({field.default!r})".replace("%", "%%"))
    parser.add_argument("--preset", default=None, help="pocket (tuned for pocket_lm), hub (other models; reasoned, not measured) or paper (published numbers)")
    parser.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    parser.add_argument("--from", metavar="CHECKPOINT", default="last", help="with --resume: the checkpoint to go on from, such as checkpoint-40 (the newest)")
    parser.add_argument("--eval", metavar="RUN", nargs="?", const="", help="evaluate a finished run, or without RUN the untrained model, on --task (or all)")
    parser.add_argument("--tokens", metavar="PHRASE", nargs="+", help="show how --model splits phrases, and their log-probabilities; learn nothing")
    parser.add_argument("--episodes", type=int, default=100, help="episodes of each evaluation, the one after training too (100)")
    options = vars(parser.parse_args(argv))
    modes = {name: options.pop(name) for name in ("preset", "resume", "from", "eval", "tokens", "episodes")}
    given = {name: value for name, value in options.items() if value is not None}
    config = Config(**given)
    if modes["from"] != "last" and modes["resume"] is None:
        raise ppo.ConfigError("--from names a checkpoint of the run that --resume goes on with; give both")
    if sum(modes[name] is not None for name in ("resume", "eval", "tokens")) > 1:
        raise ppo.ConfigError("--resume, --eval and --tokens are different commands; give one of them")
    if modes["episodes"] < 1:
        raise ppo.ConfigError(f"episodes is {modes['episodes']}; it must be at least 1")
    if modes["eval"] is not None:
        modes["tasks"] = tasks_named(given.get("env"), given.get("task"))
        given = {name: value for name, value in given.items() if name not in ("env", "task")}
        config = Config(**given, env=modes["tasks"][0][0]) if modes["tasks"] else config
    task = given.get("task") or envs.make(config.env).task
    name = modes["preset"] or ("pocket" if config.model == "pocket_lm" else "hub")
    config = Config(**{**preset(name, config.env, task), **given, "env": config.env, "task": task})
    if not (modes["resume"] or modes["eval"]):  # a run has its own
        config.validate()
    return config, modes, given


def config_of(folder, given):
    """The Config of a run. It keeps its own settings, but for the device: a run may have come from another machine."""
    config = runs.fill(Config, runs.read_config(folder))
    other = [name for name in given if name != "device"]
    if other:
        raise ppo.ConfigError(f"a run keeps its own settings; leave out --{', --'.join(other).replace('_', '-')}")
    config = dataclasses.replace(config, **given)
    config.validate()
    return config


def join_processes():
    """Under torchrun or accelerate launch, meet the other processes: gradients travel by nccl between GPUs, by gloo between CPUs.
    Returns this process's rank; only the first (0) prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        if (local := int(os.environ.get("LOCAL_RANK", 0))) < torch.cuda.device_count():
            torch.cuda.set_device(local)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    rank = ppo.processes()[0]
    if rank:
        sys.stdout = open(os.devnull, "w")
    return rank


def part():
    """Leave the other processes. They wait for a last word of the first: one that ended earlier could cut off a message it still reads."""
    if ppo.processes()[1] > 1:
        with ppo.together():
            torch.distributed.broadcast(torch.zeros(1), src=0)
        torch.distributed.destroy_process_group()


def main(argv=None):
    """The command. Returns the exit code: 0, 1 (the machine failed), 2 (bad input), 130 or 143 (stopped by a signal)."""
    run, rank = None, join_processes()

    def line(error, hint):
        if run or not rank:  # bad input is the same for every process: the first one says it
            print("twosome.py: " + " ".join(str(error).split()) + (f"; {run.hint()}" if run and hint else ""), file=sys.stderr)

    try:
        config, modes, given = arguments(argv)
        if rank and (modes["tokens"] or modes["eval"] is not None):
            return 0  # one process is enough for these
        if modes["tokens"]:
            print(token_report(*models.load(model_path(config.model), config.dtype, config.device, config.load_in), modes["tokens"]))
            return 0
        if modes["eval"] is not None:
            if modes["eval"]:
                config = config_of(modes["eval"], given)
            return evaluate(modes["eval"], modes["tasks"] or [(config.env, config.task)], modes["episodes"], config)
        if modes["resume"] is not None:
            config = config_of(modes["resume"], given)
            run = None if rank else runs.Run.open(modes["resume"])
        agent, make_env = build(config)  # before a new folder is made: what cannot be built leaves none
        if not run and not rank:
            run = runs.Run.create(config.out or runs.free_name("runs", f"{config.task}-seed{config.seed}"), dataclasses.asdict(config))
        folder, resumed = ppo.gather(run and (run.folder, run.resumed))[0]
        run = run or runs.Follower(folder, resumed)
        return train(config, run, agent, make_env, modes["from"], modes["episodes"])
    except (OSError, ArithmeticError) as error:  # before ERRORS: a NonFiniteScores is both
        line(error, hint=True)
        return 1
    except ERRORS as error:
        line(error, hint=False)  # the message says all
        return 2
    except ppo.ProcessLost as error:
        line(error, hint=True)
        return 1
    except RuntimeError as error:
        if not ppo.out_of_memory(error):
            raise
        line(f"{str(error).splitlines()[0]}; use a smaller model, --dtype bfloat16 or --load-in 4bit", hint=True)
        return 1
    except KeyboardInterrupt:  # outside the training loop, which finishes its update first
        line("interrupted", hint=True)
        return 130
    finally:
        if run:
            run.close()
        if ppo.processes()[1] > 1:  # after an error: a process that leaves this to its end may abort
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
