"""The command line: flags, presets, what is printed. Without it, call twosome.py from Python.

One gate stands at each border: `parse` for what is typed, `say` for what reaches the terminal,
`Gate` for what goes wrong.
"""
import argparse
import dataclasses
import difflib
import inspect
import json
import os
import re
import shlex
import sys

import numpy as np
import torch

import envs
import ppo
import prompts
from engine import models, processes, runs, trainer, trie, worlds

EVALUATION_SEED = 1_000_000  # fixed, and far from every training seed
# Bad input: exit code 2. What else goes wrong is the machine's fault (1), or a bug (a traceback).
BAD_INPUT = (ppo.PPOError, envs.EnvError, prompts.PromptError, trie.ScoringError,
             models.ModelError, runs.RunError, worlds.WorldError, processes.ProcessError)
COLUMNS = ("update", "steps", "primitive_steps", "episodes", "return", "success", "episode_steps",
           "entropy", "policy_loss", "value_loss", "kl", "explained_variance", "skipped",
           "seconds", "cpu_seconds")

# -----------------------------------------------------------------------------
# Settings. The comment beside a field is the help text of its flag.


@dataclasses.dataclass
class Config(trainer.Config):
    """One run: what is learnt, by which model, and PPO's settings."""

    env: str = "overcooked"  # overcooked, virtualhome, or MODULE:CLASS
    task: str = ""  # its task; empty: its first one
    env_args: str = ""  # options of the world: key=value,key=value
    model: str = "pocket_lm"  # pocket_lm, smollm2, folder, hub name, .gguf
    norm: str = "word"  # normalisation (section 4.2): word, token, sum
    seed: int = 1  # seed of everything random
    out: str = ""  # folder of the run; empty: a new one in runs/
    episodes: int = 100  # episodes of each evaluation
    lora_rank: int = 8  # r, rank of the LoRA matrices
    lora_alpha: int = 16  # LoRA's scale is alpha / r
    lora_targets: str = ""  # layers to adapt, or all-linear; empty: q and v
    dtype: str = "auto"  # frozen weights: float32, bfloat16, float16
    device: str = "auto"  # cuda, mps or cpu
    load_in: str = ""  # 8bit or 4bit, with bitsandbytes; empty: neither
    checkpoint_every: int = 5  # updates between two checkpoints


GROUPS = {"what to learn": "env task env_args steps seed out episodes",
          "the model": "model norm lora_rank lora_alpha lora_targets dtype device load_in",
          "PPO": "num_envs rollout_steps epochs minibatch gradient_accumulation policy_lr critic_lr"
                 " gamma gae_lambda clip entropy value_coefficient max_grad_norm target_kl",
          "running": "checkpoint_every"}
LIMITS = {"num_envs": 4096, "episodes": 10**4, "lora_rank": 4096, "seed": 2**32 - 1, "gamma": 1,
          "gae_lambda": 1}  # any other number ends at a billion
CHOICES = {"norm": ("word", "token", "sum", "none"), "load_in": ("", "8bit", "4bit"),
           "dtype": ("auto", "float32", "bfloat16", "float16")}

PRESETS_OF = {"pocket_lm": "pocket"}  # any other model: smollm2


def preset(name, env, task):
    """Return what a preset gives to a task, {field: value}: later rows of its table win.

    The tables and their sources are in presets.json; "hub" is another name of smollm2's.
    """
    with open(os.path.join(os.path.dirname(__file__), "presets.json"), encoding="utf-8") as file:
        presets = json.load(file)
    table = presets[known("preset", "smollm2" if name == "hub" else name, presets)]
    return {**table["all"], **table.get(env, {}), **table.get(task, {})}


def known(kind, name, names):
    """Return the name if it is one of the names. Raises PPOError, with the nearest right one."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, [*names], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ppo.PPOError(f"unknown {kind} {name[:60]!r}{hint}; choose one of "
                       + ", ".join(filter(None, names)))


def check(config):
    """Return the Config. Raises PPOError for a setting that cannot work."""
    for field in dataclasses.fields(config):
        value, most = getattr(config, field.name), LIMITS.get(field.name, 10**9)
        least = 1 if field.type is int and field.name != "seed" else 0
        if field.type is not str and not least <= value <= most:
            raise ppo.PPOError(f"{field.name} is {str(value)[:20]}; it must lie between {least}"
                               f" and {most}")
    for name, choices in CHOICES.items():
        known(name, getattr(config, name), choices)
    config.validate()
    return config


# -----------------------------------------------------------------------------
# Parsing.


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a PPOError of one line."""

    def error(self, message):
        """Name the nearest flag where one was mistyped."""
        flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(flag[1], self._option_string_actions, 1) if flag else None
        hint = f"; did you mean {near[0]}?" if near else "; --help lists every flag"
        raise ppo.PPOError(message[:200] + hint)


def parser():
    """Return the parser of the command line."""
    texts = "".join(inspect.getsource(kind) for kind in (ppo.Config, trainer.Config, Config))
    texts = dict(re.findall(r"^    (\w+): \w+ = .*  # (.*)$", texts, re.MULTILINE))
    made = Parser(usage="python twosome.py [FLAGS]", allow_abbrev=False, add_help=False,
                  description="TWOSOME: align an LLM with an embodied world through PPO.",
                  epilog="In brackets: the default. A preset sets its own for each task.",
                  formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 25, 80))
    types = {field.name: field for field in dataclasses.fields(Config)}
    groups = {title: made.add_argument_group(title) for title in (*GROUPS, "looking")}
    for title, names in GROUPS.items():
        for name in names.split():
            default = f" ({types[name].default})" if types[name].default != "" else ""
            groups[title].add_argument("--" + name.replace("_", "-"), type=types[name].type,
                                       metavar="X", help=texts[name] + default)
    learning, running, looking = (groups[title].add_argument for title in [*groups][2:])
    learning("--preset", metavar="X", help="pocket, smollm2, hub or paper (the model's own)")
    running("--resume", metavar="RUN", help="go on with an interrupted run")
    running("--from", metavar="X", help="the checkpoint to go on from (the last)")
    running("-h", "--help", action="help", help="show this page")
    run = {"metavar": "RUN", "nargs": "?", "const": ""}
    looking("--eval", **run, help="measure on --task (or all); no RUN: the untrained LLM")
    looking("--watch", **run, help="play an episode in the terminal; likewise")
    looking("--greedy", action="store_true", default=None, help="in both: no chance (sample)")
    looking("--delay", type=float, metavar="X", help="seconds from step to step (a key steps)")
    looking("--gif", metavar="FILE", help="with --watch: draw the episode into a file")
    looking("--compare", metavar="RUN", nargs="+", help="overlay runs in --out (compare.png)")
    looking("--tokens", metavar="TEXT", nargs="+", help="show how phrases score")
    looking("--prompt", metavar="X", help="the text before them (Your next step is to)")
    return made


def parse(argv):
    """Return (Config, options) of a command line. Raises PPOError, RunError or EnvError."""
    options = parser().parse_args(argv)
    fields = [field.name for field in dataclasses.fields(Config)]
    given = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    modes = [name for name in ("resume", "eval", "watch", "compare", "tokens")
             if getattr(options, name) is not None]
    if len(modes) > 1:
        raise ppo.PPOError(f"--{modes[0]} and --{modes[1]} are different commands; give one")
    for flag, *needs in (("from", "resume"), ("prompt", "tokens"), ("delay", "watch"),
                         ("gif", "watch"), ("greedy", "eval", "watch")):
        if getattr(options, flag) is not None and not {*modes} & {*needs}:
            raise ppo.PPOError(f"--{flag} goes with --{' or --'.join(needs)}; give both")
    if not 0 <= (options.delay or 0) <= 60:
        raise ppo.PPOError(f"delay is {options.delay}; it must lie between 0 and 60 seconds")
    options.which = getattr(options, "from") or "last"
    if options.prompt is None:
        options.prompt = "Your next step is to"
    options.watching = options.watch is not None
    options.folder = options.eval or options.watch or ""
    folder = options.resume or options.folder
    options.tasks = tasks_named(given) if options.eval is not None else []
    if folder:
        if options.preset:
            raise ppo.PPOError("a run keeps its own settings; leave out --preset")
        return config_of(folder, given, bool(options.resume)), options
    return new_config(given, options), options


def new_config(given, options):
    """Return the Config of a run that begins, or of the untrained LLM."""
    if options.tasks:
        given = {**given, "env": options.tasks[0][0], "task": options.tasks[0][1]}
    env, task = placed(given.get("env"), given.get("task"))
    name = options.preset or PRESETS_OF.get(given.get("model", "pocket_lm"), "smollm2")
    config = Config(**{**preset(name, env, task), **given, "env": env, "task": task})
    # A run must find its model again from another folder.
    if os.path.exists(config.model) and config.model not in ("pocket_lm", "smollm2"):
        config.model = os.path.abspath(config.model)
    return check(config)


def placed(env, task):
    """Return (env, task) in full: a task finds its environment, and an environment its first."""
    if env and ":" in env:
        return env, task or re.split(r"[:/.]", env)[-1]
    owners = [name for name, tasks in envs.TASKS.items() if task in tasks]
    env = env or (owners[0] if owners else "overcooked")
    if task and not owners:
        known("task", task, [each for tasks in envs.TASKS.values() for each in tasks])
    return env, envs.make(env, task=task or None).task


def tasks_named(given):
    """Return what --env and --task mean to an evaluation: [(env, task)]; empty: the run's own."""
    env, task = given.get("env"), given.get("task")
    if task == "all":
        return [(name, each) for name, tasks in envs.TASKS.items() for each in tasks
                if env in (None, name)]
    return [placed(env, task)] if env or task else []


def config_of(folder, given=None, resumed=False):
    """Return the Config of a run. It keeps its own settings, but for where it is played.

    A run's folder never causes code to be imported: a world of one's own is named again.
    """
    given = dict(given or {})
    config = runs.fill(Config, runs.read_config(folder))
    free = ("device",) if resumed else ("device", "env", "task", "episodes", "env_args", "out")
    named = given.get("env") == config.env
    other = [name for name in given if name not in free and not (name == "env" and named)]
    if other:
        raise ppo.PPOError(f"a run keeps its own settings; leave out --{', --'.join(other)}")
    if ":" in config.env and not named:
        raise ppo.PPOError(f"this run's world is code of your own; name it again: --env"
                           f" {shlex.quote(config.env)}")
    if given.get("task") and given["task"] != "all" and not named:
        given["env"], given["task"] = placed(given.get("env"), given["task"])
    elif given.get("task") == "all":
        given.pop("task")
    return check(dataclasses.replace(config, **given))


def new_run(config, agent):
    """Return (folder, settings) of a new run: with the number format that was taken."""
    taken = config.dtype if config.load_in else str(agent.model.dtype)[6:]
    settings = dataclasses.replace(config, dtype=taken)
    folder = config.out or runs.free_name("runs", f"{title(config, '-')}-seed{config.seed}")
    return folder, dataclasses.asdict(settings)


def title(config, joint=", "):
    """Return what names a run: its task, and model and normalisation where they are not usual."""
    model = re.sub(r"\W+", "-", os.path.basename(config.model))
    parts = [config.task, *([model] * (config.model != "pocket_lm")),
             *([config.norm] * (config.norm != "word"))]
    return joint.join(parts)


# -----------------------------------------------------------------------------
# Printing.


def escape(text):
    """Return a text in which no character is left that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def clean(text, most=500):
    """Return one line that no terminal obeys: without control characters, and cut."""
    text = escape(" ".join(str(text).split()))
    return text if len(text) <= most else text[:most - 4] + " ..."


def say(text=""):
    """Print lines. A reader that goes away does not end the training."""
    try:
        for line in str(text).split("\n"):
            print(escape(line), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def bar(total, unit, **options):
    """Return a progress bar on standard error."""
    from tqdm import tqdm
    return tqdm(total=total, unit=unit, dynamic_ncols=True, **options)


def summarize(result):
    """Return means and 95 % intervals of ppo.evaluate's arrays.

    Normal for the return, Wilson's for the success rate.
    """
    n, mean, rate = len(result["returns"]), result["returns"].mean(), result["successes"].mean()
    z = 1.96
    half = z * result["returns"].std(ddof=1) / n**0.5 if n > 1 else float("nan")
    centre = rate + z * z / (2 * n)
    spread = z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    low, high = np.clip(np.array([centre - spread, centre + spread]) / (1 + z * z / n), 0, 1)
    return {"episodes": n, "return": mean, "return_interval": [mean - half, mean + half],
            "success": rate, "success_interval": [low, high],
            "episode_steps": result["steps"].mean()}


def measure(make_env, agent, config, greedy=False):
    """Play config.episodes episodes under a progress bar. Returns what summarize returns."""
    with bar(config.episodes, "episode", leave=False, disable=None) as shown:
        def report(count):
            shown.update(count - shown.n)
        return summarize(ppo.evaluate(make_env, agent, config.episodes, EVALUATION_SEED,
                                      config.gamma, greedy, report))


def evaluation_line(name, result, best=None):
    """Return one line of an evaluation's table."""
    low, high = result["return_interval"]
    bottom, top = result["success_interval"]
    known_best = f"{best:.4f}" if best is not None else "unknown"
    return (f"{name:26} return {result['return']:7.4f} ({low:.4f} to {high:.4f}; best {known_best})"
            f"  success {result['success']:6.1%} ({bottom:.1%} to {top:.1%})")


def show_tokens(rows, options):
    """Print the rows of twosome.token_table. Returns 0."""
    say(f"after {options.prompt!r}\n    log P   pi: sum   token    word  phrase: its tokens")
    for phrase, joint, chances, pieces in rows:
        shares = "".join(f"{chance:8.3f}" for chance in chances)
        say(f"{joint:9.3f}  {shares}  {phrase}: {' | '.join(pieces)}")
    return 0


class Gate:
    """Around the command: whatever goes wrong becomes one line and an exit code."""

    def __init__(self):
        """Nothing has gone wrong yet."""
        self.run, self.code, self.rank = None, 0, 0

    def __enter__(self):
        """Return the gate, whose `run` the command fills in."""
        return self

    def __exit__(self, kind, error, trace):
        """Say what was wrong. A bug keeps its traceback."""
        hint = f"; {self.run.hint()}" if self.run else ""
        if self.run:
            self.run.close()
        processes.abandon()
        text, code = explained(error)
        if code is None:
            return False
        if error is not None:
            self.code = code
            who = f"process {self.rank}: " if self.rank else ""
            runs.tell("twosome.py: " + who + clean(text + (hint if code != 2 else "")))
            if getattr(error, "traceback", ""):  # of somebody's own world: it is their code
                runs.tell("\n".join(map(escape, error.traceback.split("\n"))))
        return True


def explained(error):
    """Return (text, exit code) of an exception; code None for a bug, whose traceback is wanted."""
    full = isinstance(error, RuntimeError) and "allocate memory" in str(error)  # how a CPU says it
    if full or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return ("memory ran out; raise --gradient-accumulation, or take a smaller model or"
                " --dtype bfloat16"), 1
    if isinstance(error, BAD_INPUT):
        return str(error), 2
    if isinstance(error, (OSError, FloatingPointError, processes.ProcessLost)):
        return str(error), 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return "", (0 if error is None else None)


def write_evaluation(config, options, results):
    """Write an evaluation as JSON: into the run's folder, or the file that --out names."""
    path = os.path.join(options.folder, "evaluation.json") if options.folder else config.out
    if path:
        runs.write_bytes(f"{path}.tmp", runs.to_json(results, indent=2))
        os.replace(f"{path}.tmp", path)
        say(f"-> {path}")
