"""The command line: flags, presets, what is printed. Without it, call twosome.py from Python.

One gate stands at each border: `parse` for what is typed, `say` for what reaches the terminal,
`gate` for what goes wrong.
"""
import argparse
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import sys

import numpy as np
import torch

import envs
import ppo
import prompts
from engine import models, processes, runs, trainer, trie, worlds

HERE = os.path.dirname(os.path.realpath(__file__))  # the tables lie beside this file
EVALUATION_SEED = 1_000_000  # our choice: fixed, and far from the seeds that people train with
# Bad input: exit code 2. What else goes wrong is the machine's fault (1), or a bug (a traceback).
BAD_INPUT = (ppo.PPOError, envs.EnvError, prompts.PromptError, trie.ScoringError,
             models.ModelError, runs.RunError, worlds.WorldError, processes.ProcessError)
COLUMNS = tuple("update steps primitive_steps episodes return success episode_steps entropy"
                " policy_loss value_loss kl explained_variance skipped seconds cpu_seconds".split())

# -----------------------------------------------------------------------------
# Settings. The comment beside a field is the help text of its flag.


@dataclasses.dataclass
class Config(trainer.Config):
    """One run: what is learnt, by which model, and PPO's settings."""

    env: str = "overcooked"  # overcooked, virtualhome, or MODULE:CLASS
    task: str = ""  # its task (see below), which also finds env
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


# {group: {flag: {...}}} in the order of --help. For a setting, it holds the bounds and choices; for
# any other flag, argparse's arguments.
FLAGS = runs.read_json(os.path.join(HERE, "flags.json"))


def preset(name, env, task):
    """Return what a preset gives to a task, {field: value}: later rows of its table win.

    The tables and their sources are in presets.json; "hub" is another name of smollm2's. Raises
    EnvError for an unknown name.
    """
    presets = runs.read_json(os.path.join(HERE, "presets.json"))
    table = presets[envs.one_of("preset", "smollm2" if name == "hub" else name, presets)]
    return {**table["all"], **table.get(env, {}), **table.get(task, {})}


def check(config):
    """Return the Config. Raises PPOError or EnvError for a setting that cannot work."""
    rules = {name: rule for group in FLAGS.values() for name, rule in group.items()}
    for field in dataclasses.fields(config):
        name, value, rule = field.name, getattr(config, field.name), rules[field.name]
        least, most = rule.get("least", int(field.type is int)), rule.get("most", 10**9)
        if field.type is not str and not least <= value <= most:
            raise ppo.PPOError(f"{name} is {value!s:.20}; it must be between {least} and {most}")
        if "choices" in rule and value != field.default:
            envs.one_of(name, value, rule["choices"])
    config.validate()
    return config


# -----------------------------------------------------------------------------
# Parsing.


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a PPOError of one line."""

    def error(self, message):
        """Name the nearest flag where one was mistyped."""
        flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = flag and difflib.get_close_matches(flag[1], self._option_string_actions, 1, 0.67)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists every flag"
        raise ppo.PPOError(message[:200] + hint)


def parser():
    """Return the parser of the command line."""
    sources = "".join(map(inspect.getsource, (ppo.Config, trainer.Config, Config)))
    texts = dict(re.findall(r"^    (\w+): \w+ = .*  # (.*)$", sources, re.MULTILINE))
    made = Parser(usage="python twosome.py [FLAGS]", allow_abbrev=False, add_help=False,
                  description="TWOSOME: align an LLM with an embodied world through PPO.",
                  epilog="In brackets: the default. A preset sets its own for each task. Tasks: "
                         + ", ".join(task for _, task in tasks_named(task="all", several=True)),
                  formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 25, 80))
    made.register("type", "float", float)  # as flags.json calls it
    for title, flags in FLAGS.items():
        group = made.add_argument_group(title)
        for name, options in flags.items():
            if name in texts:  # a setting
                default = getattr(Config, name)
                text = texts[name] + (f" ({default})" if default != "" else "")
                options = {"type": type(default), "metavar": "X", "help": text}
            group.add_argument(f"--{name.replace('_', '-')}", **options)
    group.add_argument("-h", "--help", action="help", help="show this page")
    return made


def parse(argv):
    """Return (Config, options) of a command line. Raises PPOError, RunError or EnvError."""
    options = parser().parse_args(argv)
    typed = {name: value for name, value in vars(options).items() if value is not None}
    if [] in typed.values():  # what argparse makes of --seed=--
        raise ppo.PPOError("a flag has no value; write --flag value")
    modes = [name for name in ("resume", "eval", "watch", "compare", "tokens") if name in typed]
    if len(modes) > 1:
        raise ppo.PPOError(f"--{modes[0]} and --{modes[1]} are different commands; give one")
    for flag, *to in (("from", "resume"), ("prompt", "tokens"), ("delay", "watch"),
                      ("gif", "watch"), ("greedy", "eval", "watch"), ("task", "eval", "watch", "")):
        if flag in typed and not {*(modes or [""])} & {*to}:  # "" stands for training
            raise ppo.PPOError(f"--{flag} goes with --{' or --'.join(filter(None, to))}")
    if not 0 <= typed.get("delay", 0) <= 60:
        raise ppo.PPOError(f"delay is {options.delay}; it must be between 0 and 60 seconds")
    options.which, options.prompt = typed.get("from", "last"), typed.get("prompt", prompts.CUE)
    options.folder, options.tasks = options.eval or options.watch or "", []
    given = {name: typed[name] for name in typed if name == "preset" or hasattr(Config, name)}
    if options.resume:
        return config_of(options.resume, given, resumed=True), options
    if not options.folder or {"env", "task"} & {*given}:
        options.tasks = tasks_named(given.get("env"), given.get("task"), "eval" in modes)
        given["env"], given["task"] = options.tasks[0]
        # A run's options are of its own world: another task has its own, or none.
        given |= {} if ":" in given["env"] else {"env_args": typed.get("env_args", "")}
    return (config_of(options.folder, given) if options.folder else new_config(given)), options


def tasks_named(env=None, task=None, several=False):
    """Return what --env and --task mean: [(env, task)], or several where "all" may be asked for.

    A task finds its environment, and an environment its first task.
    """
    if env and (":" in env or env.endswith(".py")):
        return [(env, task or re.split(r"[:/.]", env)[-1])]
    owners = {each: name for name, tasks in envs.TASKS.items() for each in tasks}
    if task == "all" and several:
        return [(name, each) for each, name in owners.items() if env in (None, name)]
    env = env or (owners[envs.one_of("task", task, owners)] if task else "overcooked")
    return [(env, envs.make(env, task=task or None).task)]


def new_config(given):
    """Return the Config of a run that begins, or of the untrained LLM. env and task are given."""
    model = given.get("model", "pocket_lm")
    usual = "pocket" if model == "pocket_lm" else "smollm2"
    table = preset(given.pop("preset", usual), given["env"], given["task"])
    if model not in ("pocket_lm", "smollm2"):
        given["model"] = models.locate(model)  # a run must find it again from another folder
    config = Config(**{**table, **given})
    # A preset's minibatch is at most a rollout, so that --num-envs may be small.
    rollout = config.num_envs * config.rollout_steps
    config.minibatch = given.get("minibatch", min(config.minibatch, rollout))
    return check(config)


def config_of(folder, given, resumed=False):
    """Return the Config of a run. It keeps its own settings, but for where it is played.

    A run's folder never causes code to be imported: a world of one's own is named again.
    """
    config = runs.fill(Config, runs.read_config(folder))
    named = os.path.basename(given.get("env", "")) == os.path.basename(config.env)
    free = ("device",) if resumed else ("device", "env", "task", "episodes", "env_args", "out")
    other = [name for name in given if name not in free and not (name == "env" and named)]
    if other:
        raise ppo.PPOError(f"a run keeps its own settings; leave out --{', --'.join(other)}")
    if ":" in config.env and "env" not in given:
        raise ppo.PPOError(f"a run imports no code; add --env {runs.quote(config.env)}")
    return check(dataclasses.replace(config, **given))


def new_run(config, agent):
    """Return (folder, settings) of a new run: with the number format that was taken."""
    taken = config.dtype if config.load_in else str(agent.model.dtype)[6:]
    folder = config.out or runs.free_name("runs", f"{title(config, '-')}-seed{config.seed}")
    return folder, {**dataclasses.asdict(config), "dtype": taken}


def title(config, joint=", "):
    """Return what names a run: its task, and model and normalisation where they are not usual."""
    parts = [config.task, os.path.basename(config.model), config.norm]
    return joint.join(re.sub(r"\W+", "-", x) for x in parts if x not in ("pocket_lm", "word"))


# -----------------------------------------------------------------------------
# Printing.


def escape(text):
    """Return a text in which no character is left that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def clean(text, most=500):
    """Return one line that no terminal obeys: without control characters, and cut."""
    text = escape(" ".join(str(text).split()))
    return text if len(text) <= most else text[:most - 4] + " ..."


def say(text):
    """Print lines. A reader that goes away does not end the training."""
    try:
        print("\n".join(map(escape, text.split("\n"))), flush=True)
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
    return {"return": mean, "return_interval": [mean - half, mean + half], "success": rate,
            "success_interval": [low, high], "episodes": n, "episode_steps": result["steps"].mean()}


def measure(make_env, agent, config, greedy=False):
    """Play config.episodes episodes under a progress bar. Returns summarize's facts, and how."""
    with bar(config.episodes, "episode", leave=False, disable=None) as shown:
        return {"greedy": bool(greedy), **summarize(ppo.evaluate(
            make_env, agent, config.episodes, EVALUATION_SEED, config.gamma, greedy,
            report=lambda count: shown.update(count - shown.n)))}


def evaluation_line(name, result, best=None):
    """Return one line of an evaluation's table."""
    (low, high), (bottom, top) = result["return_interval"], result["success_interval"]
    known_best = f"{best:.4f}" if best is not None else "unknown"
    return (f"{name:37} return {result['return']:7.4f} ({low:.4f} to {high:.4f}; best {known_best})"
            f"  success {result['success']:6.1%} ({bottom:.1%} to {top:.1%})")


def show_tokens(rows, options):
    """Print the rows of twosome.token_table. Returns 0."""
    say(f"after {options.prompt!r}\n    log P   pi: sum   token    word  phrase: its tokens")
    for phrase, joint, chances, pieces in rows:
        shares = "".join(f"{chance:8.3f}" for chance in chances)
        say(f"{joint:9.3f}  {shares}  {phrase}: {' | '.join(pieces)}")
    return 0


@contextlib.contextmanager
def gate():
    """Turn whatever goes wrong in the command into one line and an exit code.

    Yields what holds the exit code and the run, which the command fills in.
    """
    held = argparse.Namespace(run=None, code=0)
    try:
        yield held
    except BaseException as error:
        text, held.code = explained(error)
        who = f"process {processes.place()[0]}: " if processes.place()[0] else ""
        hint = f"; {held.run.hint()}" if held.run and held.code != 2 else ""
        runs.tell(clean(f"twosome.py: {who}{text}{hint}"))
        if trace := getattr(error, "traceback", ""):  # of somebody's own world: it is their code
            runs.tell("\n".join(escape(line)[:500] for line in trace.rstrip().split("\n")))
    finally:
        if held.run:
            held.run.close()
        processes.abandon()


def explained(error):
    """Return (text, exit code) of an exception. A bug is raised again and keeps its traceback."""
    if isinstance(error, BAD_INPUT):
        return str(error), 2
    # PyTorch has no class of errors for a CPU that runs out of memory; its message tells.
    if "allocate memory" in str(error) or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "memory ran out; raise --gradient-accumulation, or try --dtype bfloat16", 1
    if isinstance(error, (OSError, FloatingPointError, processes.ProcessLost)):
        return str(error), 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    raise error


def write_evaluation(options, results):
    """Write an evaluation as JSON: into the run's folder, or the file that --out names.

    A run's file keeps what was measured before on other tasks.
    """
    if path := options.out or options.folder and os.path.join(options.folder, "evaluation.json"):
        earlier = {} if options.out or not os.path.exists(path) else runs.read_json(path)
        runs.write(path, earlier | results)
        say(f"-> {path}")
