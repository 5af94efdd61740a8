"""The paper's claims, measured: one command for every run, one for every table and picture.

    python experiments/claims.py                          everything, or what is left of it
    python experiments/claims.py --only learning          one part of it: see GROUPS
    python experiments/claims.py --only learning --models smollm2 --tasks tomato-salad --seeds 1 2
    python experiments/claims.py --list                   the jobs, their estimated CPU hours
    python experiments/claims.py --report                 tables and pictures, from what is stored
    python experiments/claims.py --quick                  short runs in runs/quick, for a look

The measurement is a table of jobs. A job has a name, a kind (a function in KINDS) and arguments,
and runs in a process of its own on one core. When it has finished, it leaves one small file,
experiments/results/runs/NAME.json; a job whose file exists is skipped, so a campaign that was
stopped goes on where it was, on another machine as well. The runs themselves lie in runs/claims;
where one is missing that a job looks at (transfer, reworded, retention, ability), it is trained
anew.

A job of kind learn is the README's own command, `python twosome.py --env E --task T ...`. All
settings were chosen on seeds above 100; the seeds reported here are 1 to 5.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import envs

# torch and the rooms that need it are imported inside the functions that run in a job's process:
# the campaign and the report stay small, and a run's peak memory is its own.

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "experiments", "results")
FORMAT = 2  # of a job's file
TASKS = {"tomato-salad": "overcooked", "tomato-lettuce-salad": "overcooked",
         "food-preparation": "virtualhome", "entertainment": "virtualhome"}  # the paper's four
EVERY = {task: env for env, tasks in envs.TASKS.items() for task in tasks}
SHORT = ("tomato-salad", "food-preparation")  # the two that are learnt within a minute
MODELS = ("pocket_lm", "smollm2")
CURVE = ("update", "steps", "primitive_steps", "episodes", "return", "success", "entropy", "kl",
         "cpu_seconds")


class ClaimsError(ValueError):
    """Something cannot be measured or told. One line says what was wrong, what would be right."""


# -----------------------------------------------------------------------------
# The table of jobs.


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement. `minutes` is what it takes of one core, estimated, for the time left."""

    name: str
    kind: str  # a key of KINDS
    arguments: dict
    minutes: float


# CPU minutes of a run and of an evaluation of one task, by model: rough, from first runs.
LEARN = {"pocket_lm": {"tomato-salad": 0.4, "tomato-lettuce-salad": 4, "food-preparation": 0.5,
                       "entertainment": 3.2},
         "smollm2": {"tomato-salad": 6, "tomato-lettuce-salad": 32, "food-preparation": 6,
                     "entertainment": 45}}
PLAY = {"pocket_lm": 0.04, "smollm2": 0.4}


def learn_job(options, model, norm, task, seed, variant="", change="", **flags):
    """Return the job of one run of the README's command.

    A variant has further flags, or a change of the code: a key of baselines.VARIANTS.
    """
    arguments = {"env": TASKS[task], "task": task, "model": model, "norm": norm, "seed": seed}
    minutes = LEARN[model][task]
    if options.quick:
        arguments["steps"], minutes = options.steps, minutes / 8
    arguments["episodes"] = options.episodes or 100
    if variant:
        arguments |= {"variant": variant, "change": change, "flags": flags}
    name = f"learn-{model}-{norm}-{task}-{seed}" + (f"-{variant}" if variant else "")
    return Job(name, "learn", arguments, minutes)


def untrained_job(options, model, norm, task, variant=""):
    """Return the job that plays the prompted LLM as it comes, or under another wording."""
    episodes = options.episodes or {"pocket_lm": 1000, "smollm2": 400}[model]
    arguments = {"env": EVERY[task], "task": task, "model": model, "norm": norm,
                 "episodes": episodes} | ({"variant": variant} if variant else {})
    name = f"untrained-{model}-{norm}-{task}" + (f"-{variant}" if variant else "")
    return Job(name, "untrained", arguments, 2 * PLAY[model])


def random_job(options):
    """Return the job that chooses uniformly among the admissible actions, on every task."""
    return Job("random", "random", {"episodes": options.episodes or 1000}, 1.0)


def vector_job(options, form, task, seed, name="", minutes=3.0, **more):
    """Return the job of PPO without an LLM in a form: published, equal or tuned."""
    arguments = {"env": TASKS[task], "task": task, "form": form, "seed": seed,
                 "episodes": options.episodes or 100,
                 **({"settings": TUNED[task]} if form == "tuned" else {}), **more}
    if options.quick:
        arguments["settings"], minutes = {**arguments.get("settings", {}), "steps": 4096}, 0.1
    return Job(f"ppo-{name or form}-{task}-{seed}", "ppo", arguments, minutes)


def of_task(options, kind, model, task, minutes, **more):
    """Return a job on the untrained LLM and one task."""
    arguments = {"env": TASKS[task], "task": task, "model": model,
                 "episodes": options.episodes or 400, **more}
    name = "-".join([kind, model, *([more["norm"]] if "norm" in more else []), task])
    return Job(name, kind, arguments, minutes)


def of_run(kind, learned, minutes, **more):
    """Return a job on the agent of a learn_job."""
    names = ("model", "task", "seed", "variant")
    parts = [str(learned.arguments[name]) for name in names if name in learned.arguments]
    arguments = {**learned.arguments, "run": learned.name, **more}
    return Job("-".join([kind, *parts]), kind, arguments, minutes)


def transfer_job(learned):
    """Return the job that plays the tasks that an agent never saw."""
    return of_run("transfer", learned, len(EVERY) * PLAY[learned.arguments["model"]])


def retention_job(options, learned):
    """Return the job that asks what an agent's LLM keeps of itself."""
    minutes = {"pocket_lm": 1, "smollm2": 8}[learned.arguments["model"]]
    return of_run("retention", learned, minutes, **({"tokens": 4000} if options.quick else {}))


# PPO's settings in its tuned form, where they differ from the published ones.
TUNED = {task: {"num_envs": 8, "rollout_steps": 32, "minibatch": 64, "rate": 1e-3}
         for task in TASKS}
STEPS = {"overcooked": 120_000, "virtualhome": 200_000}  # of one run of the search for them


# Each part of the measurement is a function that returns its jobs.


def learning_jobs(options):
    """Word normalisation; beside it the untrained LLM and chance, on every task."""
    found = [random_job(options)]  # first, because 90 % of the way is told from it
    found += [learn_job(options, model, "word", task, seed) for model in options.models
              for seed in options.seeds for task in options.tasks]
    return found + [untrained_job(options, model, "word", task) for model in options.models
                    for task in (options.tasks if options.quick else EVERY)]


def transfer_jobs(options):
    """Every trained agent on every task that it never saw."""
    return [transfer_job(learn_job(options, model, "word", task, seed)) for model, seed, task
            in itertools.product(options.models, options.seeds, options.tasks)]


def normalisation_jobs(options):
    """The other two normalisations, learning and untrained, and the reasons of the difference."""
    found = []
    for model, task in itertools.product(options.models, options.tasks):
        found.append(of_task(options, "prior", model, task, 6 * PLAY[model], prompts=400))
        for norm in ("token", "sum"):
            if model == "pocket_lm" or task in SHORT:
                found += [learn_job(options, model, norm, task, seed) for seed in options.seeds]
        if model == "pocket_lm":
            found += [learn_job(options, model, "sum", task, seed, "warm", "warm")
                      for seed in options.seeds]
    return found + [untrained_job(options, model, norm, task) for model in options.models
                    for norm in ("token", "sum")
                    for task in (EVERY if model == "pocket_lm" and not options.quick
                                 else options.tasks)]


def baseline_jobs(options):
    """PPO without an LLM in three forms, and TWOSOME from random weights."""
    found = [vector_job(options, form, task, seed) for form in ("published", "equal", "tuned")
             for task in options.tasks for seed in options.seeds]
    # Nothing holds random weights to where they began.
    return found + [learn_job(options, "pocket_lm", "word", task, seed, "random-weights",
                              **{"preset": "pocket", "base-kl": 0})
                    for task in options.tasks for seed in options.seeds]


def tuning_jobs(options):
    """The search for the tuned form of PPO, on seeds that are not reported."""
    found = []

    def search(task, label, **settings):
        """Add the runs of one setting."""
        settings["steps"] = STEPS[TASKS[task]]
        found.extend(vector_job(options, "tuned", task, seed, f"tuning-{label}", 1,
                                settings=settings) for seed in (101, 102))

    for task, rate, rollout_steps in itertools.product(
            options.tasks, (3e-4, 1e-3, 3e-3), (16, 32, 128)):
        search(task, f"{rate:g}-8x{rollout_steps}", num_envs=8, rollout_steps=rollout_steps,
               minibatch=2 * rollout_steps, rate=rate)
    for task, change in itertools.product(options.tasks, (
            {"epochs": 2}, {"epochs": 8}, {"entropy": 0.0}, {"entropy": 0.03})):
        [(name, value)] = change.items()
        search(task, f"{name}-{value}", **TUNED[task], **change)
    return found


def saycan_jobs(options):
    """SayCan-style, with three affordances, on the LLM's score with and without division."""
    return [of_task(options, "saycan", model, task, 2 + 4 * PLAY[model], norm=norm,
                    judge=vector_job(options, "tuned", task, 1).arguments)
            for model in options.models for task in options.tasks for norm in ("word", "sum")]


def mask_jobs(options):
    """Both home tasks without the published mask of the actions: TWOSOME, and PPO."""
    tasks = [task for task in options.tasks if TASKS[task] == "virtualhome"]
    found = [learn_job(options, "pocket_lm", "word", task, seed, "no-mask",
                       **{"env-args": "mask=False"}) for task in tasks for seed in options.seeds]
    return found + [vector_job(options, form, task, seed, f"{form}-no-mask", mask=False)
                    for form in ("equal", "tuned") for task in tasks for seed in options.seeds]


PRINCIPLES = ("no-cue", "no-articles", "not-named", "one-phrase", "one-verb")
REWORDINGS = ("other-words-1", "other-words-2", "other-words-3")


def prompt_jobs(options):
    """Each principle broken, untrained and learning; uneven phrases; other wordings."""
    short = [task for task in options.tasks if task in SHORT]
    seeds = options.seeds[:3]
    found = [untrained_job(options, model, "word", task, variant)
             for variant in (*PRINCIPLES, *REWORDINGS)
             for model in options.models for task in options.tasks]
    if "smollm2" in options.models:  # pocket_lm has no chat template
        found += [untrained_job(options, "smollm2", "word", task, "chat") for task in options.tasks]
    found += [learn_job(options, "pocket_lm", "word", task, seed, variant, variant)
              for variant in PRINCIPLES for task in short for seed in seeds]
    for norm in ("word", "token", "sum"):
        found += [untrained_job(options, model, norm, task, "uneven")
                  for model in options.models for task in options.tasks]
        found += [learn_job(options, "pocket_lm", norm, task, seed, "uneven", "uneven")
                  for task in short for seed in seeds]
    for model, task, seed in itertools.product(options.models, options.tasks, seeds):
        learned = learn_job(options, model, "word", task, seed)
        found.append(of_run("reworded", learned, 4 * PLAY[model]))
    return found


ABLATIONS = {  # label: (change, flags)
    "as it is": ("", {}),
    "rank-1": ("", {"lora-rank": 1, "lora-alpha": 2}),
    "rank-32": ("", {"lora-rank": 32, "lora-alpha": 64}),
    "all-linear": ("", {"lora-targets": "all-linear"}),
    "critic-adapted": ("critic-adapted", {}), "head-random": ("head-random", {}),
    "no-floor": ("no-floor", {}), "entropy-0": ("", {"entropy": 0}),
    "full-finetune-1e-3": ("full-finetune", {"policy-lr": 1e-3, "base-kl": 0}),
    "full-finetune-1e-4": ("full-finetune", {"policy-lr": 1e-4, "base-kl": 0}),
    "head-alone": ("head-alone", {"base-kl": 0}),
    "not-held": ("", {"base-kl": 0}),
    "envs-64": ("", {"num-envs": 64, "minibatch": 512}),
}


def ablation_jobs(options):
    """What a reader would ablate: short runs with pocket_lm; the number format with SmolLM2."""
    tasks = [task for task in options.tasks if task in SHORT]
    found = [learn_job(options, "pocket_lm", "word", task, seed, label, change, **flags)
             for label, (change, flags) in ABLATIONS.items() if label != "as it is"
             for task in tasks for seed in options.seeds[:3]]
    if "smollm2" in options.models:
        found += [learn_job(options, "smollm2", "word", task, seed, "float32", dtype="float32")
                  for task in tasks for seed in options.seeds[:1]]
    return found


def retention_jobs(options):
    """What the LLM keeps of itself: agents of two tasks at least, three seeds each."""
    return [retention_job(options, learn_job(options, model, "word", task, seed)) for model, task,
            seed in itertools.product(options.models, options.tasks, options.seeds[:3])]


def holding_jobs(options):
    """Agents that are not held to the base: what they do elsewhere, and what their LLM keeps."""
    found = []
    tasks = [task for task in options.tasks if task in SHORT]
    for task, seed in itertools.product(tasks, options.seeds[:3]):
        learned = learn_job(options, "pocket_lm", "word", task, seed, "not-held", **{"base-kl": 0})
        found += [learned, transfer_job(learned), retention_job(options, learned)]
    return found


LAKES = {  # label: a world, its options, steps, and a change of the code
    "named": ("examples/frozen_lake.py:frozen_lake", "", 7680, ""),
    "poor": ("experiments/lakes.py:poor", "", 10240, ""),
    "poor-cost": ("experiments/lakes.py:poor", "cost=0.01", 10240, ""),
    "poor-entropy-always": ("experiments/lakes.py:poor", "", 10240, "entropy-always")}
QUEST = "examples/textworld_quest.py:Quest"
QUEST_GAME = 18  # its default, which is learned
QUEST_FLAGS = {"num-envs": 16, "gamma": 0.9, "policy-lr": 0.002, "base-kl": 1, "entropy": 0.003,
               "gradient-accumulation": 4}  # as the example has them


def world_jobs(options):
    """Worlds that are not ours: FrozenLake in four ways, ten seeds each, and a quest."""
    found = []
    seeds = options.seeds if options.quick else range(1, 11)
    for (label, (env, given, steps, change)), seed in itertools.product(LAKES.items(), seeds):
        arguments = {"env": env, "model": "pocket_lm", "norm": "word", "seed": seed,
                     "steps": options.steps if options.quick else steps,
                     "episodes": options.episodes or 100, "flags": {"env-args": given},
                     **({"change": change} if change else {})}
        if "pocket_lm" in options.models:
            found.append(Job(f"lake-{label}-{seed}", "learn", arguments, 0.7))
    if "smollm2" in options.models:
        arguments = {"env": QUEST, "model": "smollm2", "norm": "word", "seed": 1,
                     "steps": options.steps if options.quick else 15360,
                     "episodes": options.episodes or 20, "flags": QUEST_FLAGS}
        found.append(Job("quest-1", "quest", arguments, 30))
    return found


def ability_jobs(options):
    """BIG-bench asked of the real LLM: agents of two tasks, three seeds each."""
    found = []
    for task, seed in itertools.product(SHORT, options.seeds[:3]):
        if "smollm2" in options.models and task in options.tasks:
            learned = learn_job(options, "smollm2", "word", task, seed)
            found.append(of_run("ability", learned, 12))
    return found


GROUPS = {"learning": learning_jobs, "transfer": transfer_jobs,
          "normalisation": normalisation_jobs,
          "baselines": baseline_jobs, "saycan": saycan_jobs, "mask": mask_jobs,
          "retention": retention_jobs, "holding": holding_jobs, "ability": ability_jobs,
          "worlds": world_jobs, "prompts": prompt_jobs, "ablations": ablation_jobs,
          "tuning": tuning_jobs}


def table_of_jobs(options):
    """Return the jobs of the groups chosen, each once: first the runs, which others look at."""
    found = [job for name in options.only for job in GROUPS[name](options)]
    return sorted({job.name: job for job in found}.values(), key=lambda job: job.kind != "learn")


# -----------------------------------------------------------------------------
# What a job's process does. Each function returns a dict for the job's file.


def learn(job, folder):
    """Train by the README's command, or go on with it."""
    facts = trained(job, folder)
    facts["settings"] = read_json(os.path.join(folder, "config.json"))
    for name in ("out", "model", "env"):  # paths of this machine; the job names model and env
        facts["settings"].pop(name)
    facts["summary"] = read_json(os.path.join(folder, "summary.json")) | {"env": job["env"]}
    facts["curve"] = read_curve(os.path.join(folder, "metrics.csv"))
    return facts


def transfer(job, folder):
    """Play the tasks that a trained agent never saw, with draws of each seed's own."""
    import twosome
    agent, _ = twosome.load(run_of(job, folder))
    return {"transfer": {task: play(agent, env, task, job["episodes"], job["seed"])
                         for task, env in EVERY.items() if task != job["task"]}}


def trained(job, folder):
    """See to it that the run in a folder is finished. Returns {"peak_mib": its peak memory}."""
    kept = os.path.join(folder, "claims.json")
    facts = read_json(kept) if os.path.exists(kept) else {"peak_mib": 0}
    check(job, folder)
    if os.path.exists(os.path.join(folder, "summary.json")):
        return {"peak_mib": facts["peak_mib"]}
    child = subprocess.Popen([sys.executable, *command_of(job, folder)])
    # A process that is asked to end passes it on, so that the run writes its checkpoint.
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    code = child.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # This process has had no other child yet. Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    facts["peak_mib"] = max(facts["peak_mib"], round(peak))
    if os.path.isdir(folder):
        write_json(kept, facts)
    if code:
        sys.exit(code)
    return {"peak_mib": facts["peak_mib"]}


def check(job, folder):
    """Raise ClaimsError if a folder holds a run of other settings than the job would begin."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return
    from engine import command
    stored = read_json(path)
    asked = vars(command.parse([f"--{name}={value}" for name, value in flags_of(job).items()])[0])
    # Paths may differ, and what "auto" became is told by the machine.
    for name in {*asked} - {"out", "env", "model", "dtype", "device"}:
        if stored.get(name) != asked[name]:
            raise ClaimsError(f"{folder} was trained with {name} {stored.get(name)!r:.40}, not"
                              f" {asked[name]!r:.40}; delete it to have it measured again")


def command_of(job, folder):
    """Return the command that begins a run or goes on with it: a script and its flags."""
    change = job.get("change", "")
    script = ["experiments/baselines.py", change] if change else ["twosome.py"]
    script = [os.path.join(ROOT, script[0]), *script[1:]]
    if change in ("full-finetune", "head-alone"):
        # A checkpoint keeps an adapter alone, which these do not train: begin again.
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(os.path.join(folder, "config.json")):
        # A run's folder alone never causes code to be imported: name a foreign world again.
        world = ["--env", world_of(job)] if ":" in job["env"] else []
        return [*script, "--resume", folder, *world]
    flags = flags_of(job)
    if job.get("variant") == "random-weights":
        from experiments import baselines
        flags["model"] = f"{folder}-model"
        baselines.random_weights(job["model"], job["seed"], flags["model"])
    return [*script, *(f"--{name}={value}" for name, value in flags.items()), "--out", folder]


def flags_of(job):
    """Return {flag: value} of the command that begins a job's run."""
    names = ("env", "task", "model", "norm", "seed", "steps", "episodes")
    flags = {name: job[name] for name in names if name in job} | job.get("flags", {})
    return {**flags, "env": world_of(job)}


def world_of(job):
    """Return --env of a job: a world of ours, or the file of another one."""
    return os.path.join(ROOT, job["env"]) if ":" in job["env"] else job["env"]


def read_curve(path):
    """Return {column: values} of a run's metrics.csv."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in CURVE}


def play(agent, env, task, episodes, seed=0):
    """Return means and intervals of an agent's episodes on a task, at the world's own gamma."""
    import functools

    import ppo
    from engine import command
    make_env = functools.partial(envs.make, env, task=task)
    result = ppo.evaluate(make_env, agent, episodes, command.EVALUATION_SEED + seed,
                          make_env().gamma)
    return command.summarize(result)


def untrained(job, folder):
    """Play the prompted LLM as it comes, under our wording or another."""
    import twosome
    from engine import command
    from experiments import baselines
    baselines.vary(job.get("variant", ""))
    flags = [f"--{name}={job[name]}" for name in ("env", "task", "model", "norm")]
    config, _ = command.parse(flags)
    agent, _ = twosome.build(config)
    with agent.untrained():
        result = play(agent, job["env"], job["task"], job["episodes"])
    return {"result": result}


def random(job, folder):
    """Choose uniformly among the admissible actions of every task."""
    from experiments import baselines
    results = {}
    for task, env in EVERY.items():
        agent = baselines.Random(len(envs.make(env, task=task).action_names))
        results[task] = play(agent, env, task, job["episodes"])
    return {"results": results}


def ppo_alone(job, folder):
    """Train PPO without an LLM."""
    from experiments import baselines
    return baselines.vector(job)[1]


def saycan(job, folder):
    """Play SayCan-style."""
    from experiments import baselines
    judge = os.path.join(os.path.dirname(folder), f"judge-{job['task']}.safetensors")
    return baselines.saycan(job, judge)


def prior(job, folder):
    """Look at the untrained policy under the three normalisations."""
    from experiments import baselines
    return baselines.prior(job)


def run_of(job, folder):
    """Return the folder of the trained agent that a job looks at: trained now if it is missing."""
    run = os.path.join(os.path.dirname(folder), job["run"])
    trained(job, run)
    return run


def reworded(job, folder):
    """Play a trained agent under other wordings."""
    from experiments import baselines
    return baselines.reworded(job, run_of(job, folder))


def retention(job, folder):
    """Measure what a trained agent's LLM keeps of itself."""
    from experiments import retention as keeping
    return keeping.measure(run_of(job, folder), job.get("tokens"))


def quest(job, folder):
    """Learn one game of TextWorld, then play it and ten others, untrained and trained.

    In these games the return is not discounted: it is the share of the best score at the end.
    """
    facts = learn(job, folder)
    import twosome
    from engine import command, worlds
    env = world_of(job)
    agent, _ = twosome.load(folder, env=env)
    config = dataclasses.replace(command.config_of(folder, {"env": env}), gamma=1.0)
    facts["games"] = {}
    for seed in (QUEST_GAME, *range(1, 11)):
        make_env = worlds.make_world(env, {"seed": seed})
        with agent.untrained():
            untrained = command.measure(make_env, agent, config)
        facts["games"][seed] = {"untrained": untrained,
                                "trained": command.measure(make_env, agent, config)}
    return facts


def ability(job, folder):
    """Ask a trained agent's LLM the questions of BIG-bench."""
    from experiments import ability as asking
    asking.harness()  # what is missing shows before a run is trained
    tasks = asking.read_tasks(asking.ARCHIVE)
    return asking.measure(run_of(job, folder), tasks)


KINDS = {"learn": learn, "transfer": transfer, "untrained": untrained, "random": random,
         "ppo": ppo_alone, "saycan": saycan, "prior": prior, "reworded": reworded,
         "retention": retention, "ability": ability, "quest": quest}


def work(text, options):
    """Be a job's process: do the job (JSON), and leave its file."""
    job = json.loads(text)
    os.makedirs(options.work, exist_ok=True)
    facts = KINDS[job["kind"]](job["arguments"], os.path.join(options.work, job["name"]))
    from experiments.measure import machine
    spent = resource.getrusage(resource.RUSAGE_SELF)
    write_json(record_path(options, job["name"]), {
        "format": FORMAT, **job, "machine": machine(),
        "own_cpu_seconds": round(spent.ru_utime + spent.ru_stime, 1), **facts})


# -----------------------------------------------------------------------------
# Files: whole or not at all, and read with suspicion.


def record_path(options, name):
    """Return the path of a job's file."""
    return os.path.join(options.out, "runs", f"{name}.json")


def write_json(path, value):
    """Write JSON, one line a key, under a temporary name first: a kill leaves the old file."""
    lines = (f"{json.dumps(key)}: {json.dumps(shortened(item))}" for key, item in value.items())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "w") as file:
        file.write("{" + ",\n".join(lines) + "}\n")
    os.replace(f"{path}.tmp", path)


def shortened(value):
    """Return JSON values with five digits a number; whole ones stay, and NaN becomes None."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [shortened(item) for item in value]
    if not isinstance(value, (float, np.floating)):
        return value
    if not np.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.5g}")


def read_json(path):
    """Return a JSON object. Raises ClaimsError for anything else."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(path, encoding="utf-8") as file:
            if isinstance(value := json.load(file), dict):
                return value
    raise ClaimsError(f"{path} is torn or no JSON object; delete it to have it measured again")


def read_record(path, job=None):
    """Return a job's file. Raises ClaimsError for one that is torn, foreign or of another job."""
    record = read_json(path)
    name = os.path.basename(path)[:-len(".json")]
    if record.get("format") != FORMAT or record.get("name") != name:
        raise ClaimsError(f"{path} is of another version or foreign (format"
                          f" {record.get('format')!r:.20}, name {record.get('name')!r:.60});"
                          " delete it to have it measured again")
    if job and record["arguments"] != job.arguments:
        raise ClaimsError(f"{path} was measured with other arguments than now; delete it to have"
                          " it measured again")
    return record


def records(options):
    """Return every stored record, in the order of their names."""
    folder = os.path.join(options.out, "runs")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [read_record(os.path.join(folder, name)) for name in names if name.endswith(".json")]


# -----------------------------------------------------------------------------
# The campaign.


class Campaign:
    """Jobs side by side, one core each, under a progress bar that counts estimated minutes."""

    def __init__(self, options):
        self.options = options
        self.running, self.failed, self.stopped = {}, [], False

    def run(self, jobs):
        """Run the jobs. Returns the exit code."""
        from tqdm import tqdm
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        form = "{l_bar}{bar}| {elapsed} spent, {remaining} left{postfix}"
        total = sum(job.minutes for job in jobs)
        with (concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool,
              tqdm(total=total, bar_format=form, dynamic_ncols=True) as shown):
            futures = {pool.submit(self.one, job): job for job in jobs}
            try:
                for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    future.result()
                    shown.update(futures[future].minutes)
                    shown.set_postfix_str(f"{count} of {len(jobs)}, {futures[future].name}")
            except KeyboardInterrupt:
                self.stop(pool)
        for line in self.failed:
            print(line, file=sys.stderr)
        return 130 if self.stopped else int(bool(self.failed))

    def one(self, job):
        """Run one job in a process of its own."""
        text = json.dumps({key: getattr(job, key) for key in ("name", "kind", "arguments")})
        command = [sys.executable, os.path.abspath(__file__), "--job", text,
                   "--out", self.options.out, "--work", self.options.work]
        path = os.path.join(self.options.work, f"{job.name}.log")
        with open(path, "ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                     env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.running[job.name] = child
        code = child.wait()
        del self.running[job.name]
        if code and not self.stopped:
            with open(path, "rb") as log:
                last = log.read()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
            self.failed.append(f"{job.name}: exit code {code}; {' '.join(last)[:200]} ({path})")

    def stop(self, pool):
        """Have the running jobs write their checkpoints and end, and begin no other."""
        self.stopped = True
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not cut this short
            signal.signal(number, signal.SIG_IGN)
        pool.shutdown(wait=False, cancel_futures=True)
        for child in list(self.running.values()):
            child.terminate()
        print("stopped; the same command goes on where it was", file=sys.stderr)


def campaign(options):
    """Run the jobs that have no file yet. Returns the exit code."""
    left = []
    for job in table_of_jobs(options):
        path = record_path(options, job.name)
        if os.path.exists(path):
            read_record(path, job)
        else:
            left.append(job)
    os.makedirs(options.work, exist_ok=True)
    return Campaign(options).run(left) if left else 0


def listing(options):
    """Print the jobs with their estimated CPU hours, and which are done. Returns 0."""
    total = {}
    for job in table_of_jobs(options):
        done = os.path.exists(record_path(options, job.name))
        total[done] = total.get(done, 0.0) + job.minutes / 60
        print(f"{'done' if done else 'left':4}  {job.minutes / 60:6.2f} h  {job.name}")
    print(f"{total.get(True, 0):.1f} hours of one core are done, {total.get(False, 0):.1f} left")
    return 0


# -----------------------------------------------------------------------------
# Statistics.

# Student's t: the 97.5 % quantile for 1 to 30 degrees of freedom; beyond, the normal one and the
# first term of its expansion, (z^3 + z) / 4 divided by the degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
         2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
         2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t_quantile(freedom):
    """Return the 97.5 % quantile of Student's t; NaN without a degree of freedom."""
    if freedom < 1:
        return float("nan")
    return T_975[freedom - 1] if freedom <= len(T_975) else 1.96 + 2.372 / freedom


def across(values, axis=0):
    """Return (mean, half width of its 95 % interval) of some seeds; NaN for a single one."""
    values = np.asarray(values, dtype=float)
    count = values.shape[axis]
    if count < 2:
        return values.mean(axis), np.full_like(values.mean(axis), np.nan)
    spread = values.std(axis, ddof=1) / count**0.5
    return values.mean(axis), t_quantile(count - 1) * spread


# Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice,
# arXiv 2108.13264: the next three. A sample is one array of seeds for each task.


def interquartile_mean(sample):
    """Return the mean of the middle half of all scores, over seeds and tasks together."""
    scores = np.sort(np.concatenate(sample))
    cut = len(scores) // 4
    return scores[cut:len(scores) - cut].mean()


def probability_of_improvement(sample, other):
    """Return the chance that a seed of `sample` beats one of `other`, averaged over tasks."""
    chances = []
    for mine, theirs in zip(sample, other, strict=True):
        gaps = np.subtract.outer(mine, theirs)
        chances.append((gaps > 0).mean() + (gaps == 0).mean() / 2)
    return np.mean(chances)


def bootstrap(measure, *samples, count=2000):
    """Return the 95 % interval of measure(*samples): seeds drawn again within each task."""
    rng = np.random.default_rng(0)
    found = [measure(*([rng.choice(seeds, len(seeds)) for seeds in sample] for sample in samples))
             for _ in range(count)]
    return np.quantile(found, (0.025, 0.975))


# -----------------------------------------------------------------------------
# What the tables are made of, from the stored files alone.


def select(found, kind, **arguments):
    """Return the records of a kind with these arguments; None stands for one that is absent."""
    chosen = [record for record in found if record["kind"] == kind
              and all(record["arguments"].get(name) == value
                      for name, value in arguments.items())]
    return sorted(chosen, key=lambda record: record["arguments"].get("seed", 0))


def learned(found, model, task, norm="word", variant=None):
    """Return the records of TWOSOME's runs, in the order of their seeds."""
    return select(found, "learn", model=model, task=task, norm=norm, variant=variant)


def first_three(runs):
    """Return those of seeds 1 to 3, to stand beside what was measured on these alone."""
    return [run for run in runs if run["arguments"]["seed"] <= 3]


def methods(found, model, task):
    """Return {label: records} of all that learned a task: TWOSOME first, then its baselines."""
    lines = {f"TWOSOME, {norm}": learned(found, model, task, norm)
             for norm in ("word", "token", "sum")}
    lines["TWOSOME, random weights"] = learned(found, model, task, "word", "random-weights")
    for form in ("published", "equal", "tuned"):
        records = select(found, "ppo", task=task, form=form, mask=None)
        # Seeds above 100 belong to the search for the tuned form.
        lines[f"PPO, {form}"] = [run for run in records if run["arguments"]["seed"] < 100]
    return {label: runs for label, runs in lines.items() if runs}


def untrained_result(found, model, task, norm="word", variant=None):
    """Return the evaluation of the untrained LLM, or None."""
    records = select(found, "untrained", model=model, task=task, norm=norm, variant=variant)
    return records[0]["result"] if records else None


def random_result(found, task):
    """Return the evaluation of chance, or None."""
    records = select(found, "random")
    return records[0]["results"][task] if records else None


def best_return(task):
    """Return the best possible return of a task."""
    return envs.make(EVERY[task], task=task).best_return


def scaled(found, task, values):
    """Return returns on a scale on which chance is 0 and the best possible is 1."""
    chance = random_result(found, task)["return"]
    return (np.asarray(values) - chance) / (best_return(task) - chance)


def returns(runs):
    """Return the return of each run after training."""
    return [run["summary"]["return"] for run in runs]


def points(run, *axes):
    """Return arrays of a run's returns, and along `axes`, where a hundred episodes have ended.

    A point is the mean of the last hundred. Of fewer it would be chance: a first episode that
    happens to be perfect is not 90 % of the way. The first point is the untrained policy, measured.
    """
    columns = run["curve"]
    rows = [k for k, count in enumerate(columns["episodes"]) if k == 0 or count >= 100]
    return [np.array([columns[name][k] or 0.0 for k in rows]) for name in ("return", *axes)]


def reached(found, task, run, share=0.9):
    """Return (primitive steps, CPU seconds, whether) until a run was 90 % of the way there.

    The way goes from chance to the best possible return. What never got there counts with all
    its steps, which is too kind to it.
    """
    values, steps, seconds = points(run, "primitive_steps", "cpu_seconds")
    there = scaled(found, task, values) >= share
    first = there.argmax() if there.any() else -1
    return steps[first], seconds[first], bool(there.any())


def curve(runs, axis):
    """Return (x, mean, half width) of the runs' returns along "steps" or "primitive_steps"."""
    lines = [points(run, axis) for run in runs]
    x = np.linspace(0, min(steps[-1] for _, steps in lines), 200)
    return x, *across([np.interp(x, steps, values) for values, steps in lines])


def at_steps(runs, steps):
    """Return each run's return after so many primitive steps, or at its end if that is before."""
    return [np.interp(steps, *points(run, "primitive_steps")[::-1]) for run in runs]


# Cells.


def given(value, form=".3f"):
    """Return a number as a text, or a dash where there is none."""
    return "-" if value is None or not np.isfinite(value) else format(value, form)


def plus_minus(values, form=".3f"):
    """Return "mean ± half width", the mean alone of a single seed, or a dash."""
    if not len(values):
        return "-"
    mean, half = across(values)
    return format(mean, form) + (f" ± {half:{form}}" if np.isfinite(half) else "")


def span(values, form=",.0f"):
    """Return "least to most"."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def played(result):
    """Return the return and the success rate of an evaluation; a dash where there is none."""
    return f"{result['return']:.3f} ({result['success']:.1%})" if result else "-"


def interval(low, high, form=".2f"):
    """Return "(low to high)"."""
    return f"({low:{form}} to {high:{form}})"


# -----------------------------------------------------------------------------
# The tables. Each function returns the header and the rows of one LLM's table, all of texts.


def learning_table(found, model):
    """What was learned on each task, every seed by itself."""
    header = ["task", "steps", "primitive steps", "return of each seed", "mean ± 95 %",
              "best possible", "success", "untrained LLM", "random", "CPU seconds", "peak MiB"]
    rows = []
    for task in TASKS:
        if runs := learned(found, model, task):
            ends = [run["summary"] for run in runs]
            values = returns(runs)
            rows.append([
                task, f"{ends[0]['steps']:,}", span([end["primitive_steps"] for end in ends]),
                ", ".join(f"{value:.4f}" for value in values), plus_minus(values, ".4f"),
                given(ends[0]["best"], ".4f"), f"{np.mean([end['success'] for end in ends]):.1%}",
                played(untrained_result(found, model, task)), played(random_result(found, task)),
                span([end["cpu_seconds"] for end in ends]),
                span([run["peak_mib"] for run in runs])])
    return header, rows


def transfer_table(found, model):
    """How the agents of each task do on all others, untrained for them: return, and success."""
    header = ["played", *(f"trained on {task}" for task in TASKS), "untrained LLM", "random"]
    rows = [[task, *(mean_played(results_on(found, model, source, task)) for source in TASKS),
             played(untrained_result(found, model, task)), played(random_result(found, task))]
            for task in EVERY]
    return header, rows if any(learned(found, model, task) for task in TASKS) else []


def results_on(found, model, source, task):
    """Return what the agents of a task did there, or on another one, which they never saw."""
    if source == task:
        return [run["summary"] for run in learned(found, model, task)]
    return [record["transfer"][task] for record in
            select(found, "transfer", model=model, task=source, variant=None)]


def mean_played(results):
    """Return a cell: the mean return of some seeds, with its interval, and their success."""
    if not results:
        return "-"
    success = np.mean([result["success"] for result in results])
    return f"{plus_minus([result['return'] for result in results])} ({success:.0%})"


def efficiency_table(found, model):
    """Primitive steps and CPU seconds until 90 % of the way, and how many times ours others took.

    A seed that never got there counts with all its steps, so its ratio is a lower bound.
    """
    header = ["task", "method", "got there", "primitive steps to 90 %", "CPU seconds to 90 %",
              "times the steps of TWOSOME, word", "times its CPU seconds", "return at the end"]
    rows = []
    for task in TASKS if random_result(found, "cheese") else ():
        lines = methods(found, model, task)
        for label, runs in lines.items():
            _, seconds, there = ways(found, task, runs)
            bound = "" if there.all() else "≥ "
            rows.append([task, label, f"{there.sum()} of {len(runs)}",
                         steps_cell(found, task, runs), bound + f"{seconds.mean():,.0f}",
                         *ratio_cells(found, task, lines, label), plus_minus(returns(runs))])
    return header, rows


def ways(found, task, runs):
    """Return arrays [runs]: primitive steps to 90 %, CPU seconds to it, whether it was reached."""
    return [np.array(column) for column in
            zip(*(reached(found, task, run) for run in runs), strict=True)]


def steps_cell(found, task, runs):
    """Return a cell: the mean primitive steps to 90 %, or a dash."""
    if not runs or not random_result(found, task):
        return "-"
    steps, _, there = ways(found, task, runs)
    return ("" if there.all() else "≥ ") + f"{steps.mean():,.0f}"


def ratio(theirs, ours):
    """Return (ratio of the means, its 95 % interval) of what seeds of two methods took."""
    def measure(theirs, ours):
        return np.mean(theirs) / max(np.mean(ours), 1)

    return measure([theirs], [ours]), bootstrap(measure, [theirs], [ours])


def ratio_cells(found, task, lines, label):
    """Return two cells: how many times the steps and the CPU seconds of TWOSOME, word."""
    if label == "TWOSOME, word" or "TWOSOME, word" not in lines:
        return ["1" if label == "TWOSOME, word" else "-"] * 2
    theirs, ours = (ways(found, task, lines[name]) for name in (label, "TWOSOME, word"))
    if not ours[2].all():  # neither a lower bound nor an upper one
        return ["-", "-"]
    cells = []
    for mine, their in zip(ours[:2], theirs[:2], strict=True):
        middle, ends = ratio(their, mine)
        cells.append(("" if theirs[2].all() else "≥ ") + f"{middle:.2f} {interval(*ends)}")
    return cells


def aggregate_table(found, model):
    """The four tasks together: chance is 0, the best possible 1; intervals from the bootstrap."""
    header = ["method", "runs", "interquartile mean at the end", "after TWOSOME's steps",
              "chance that TWOSOME, word is better then"]
    lines = {}
    for task in TASKS if random_result(found, "cheese") else ():
        for label, runs in methods(found, model, task).items():
            lines.setdefault(label, {})[task] = runs
    ours = lines.get("TWOSOME, word", {})
    budgets = {task: np.mean([run["summary"]["primitive_steps"] for run in runs])
               for task, runs in ours.items()}
    rows = []
    for label, tasks in lines.items():
        if [*tasks] != [*TASKS] or [*ours] != [*TASKS]:
            continue  # a mean over other tasks would compare with nothing
        ends = [scaled(found, task, returns(runs)) for task, runs in tasks.items()]
        then = [scaled(found, task, at_steps(runs, budgets[task])) for task, runs in tasks.items()]
        mine = [scaled(found, task, at_steps(ours[task], budgets[task])) for task in TASKS]
        cells = [f"{measure(*samples):.3f} {interval(*bootstrap(measure, *samples), '.3f')}"
                 for measure, samples in ((interquartile_mean, [ends]),
                                          (interquartile_mean, [then]),
                                          (probability_of_improvement, [mine, then]))]
        cells[2] = "-" if label == "TWOSOME, word" else cells[2]
        rows.append([label, str(sum(map(len, tasks.values()))), *cells])
    return header, rows


def saycan_table(found, model):
    """SayCan-style: the untrained LLM's score times an affordance; sampled, and greedy."""
    kinds = [f"{kind}, {how}" for kind in ("admissible", "possible", "value")
             for how in ("sampled", "greedy")]
    rows = []
    for task, norm in itertools.product(TASKS, ("word", "sum")):
        for record in select(found, "saycan", model=model, task=task, norm=norm):
            rows.append([task, norm, *(played(record["results"][kind]) for kind in kinds)])
    return ["task", "LLM's score", *kinds], rows


NORMS = ("word", "token", "sum")


def norms_table(found, model):
    """The three normalisations, and sum at the temperature of word: untrained, and learned."""
    rows = []
    for task, (norm, variant) in itertools.product(EVERY, (*((norm, None) for norm in NORMS),
                                                           ("sum", "warm"))):
        runs = learned(found, model, task, norm, variant)
        bare = untrained_result(found, model, task, norm, variant)
        if bare or runs:
            label = f"{norm}, {variant}" if variant else norm
            rows.append([task, label, played(bare), steps_cell(found, task, runs),
                         plus_minus(returns(runs), ".4f"), entropies(runs)])
    return ["task", "normalisation", "untrained LLM", "steps to 90 %", "return after learning",
            "entropy, first to last update"], rows


def entropies(runs):
    """Return the mean entropy of the runs' first and last update, as a cell."""
    if not runs:
        return "-"
    first, last = (np.mean([run["curve"]["entropy"][at] for run in runs]) for at in (1, -1))
    return f"{first:.3f} to {last:.3f}"


def temperature_table(found, model):
    """The untrained LLM: is "sum" only sharper? Each made as flat or sharp as the others are."""
    header = ["task", "normalisation", "entropy", "return",
              *(f"return at the entropy of {norm}" for norm in NORMS)]
    rows = []
    for task in TASKS:
        for record in select(found, "prior", model=model, task=task):
            for norm in NORMS:
                results = record["results"]
                rows.append([task, norm, f"{record['entropies'][norm]:.3f}",
                             played(results[norm]),
                             *(played(results.get(f"{norm} at the entropy of {other}"))
                               for other in NORMS)])
    return header, rows


def lengths_table(found, model):
    """How log P of a phrase depends on its length, within a prompt; lengths of the phrases."""
    header = ["task", "prompts", "phrases", "tokens of a phrase", "words of a phrase",
              "nats a token (R²)", "nats a word (R²)"]
    rows = []
    for task in TASKS:
        for record in select(found, "prior", model=model, task=task):
            _, tokens, words = np.array(list(record["phrases"].values())).T
            rows.append([task, str(record["prompts"]), str(len(tokens)), spread(tokens),
                         spread(words), *(f"{given(record[name][0], '.2f')}"
                                          f" ({given(record[name][1], '.2f')})"
                                          for name in ("nats_a_token", "nats_a_word"))])
    return header, rows


def spread(values):
    """Return "mean, least to most"."""
    return f"{np.mean(values):.1f}, {span(values, '.0f')}"


def principles_table(found, model):
    """Each principle broken by itself: the untrained LLM, and what is learned all the same."""
    header = ["wording", *(f"{task}, untrained" for task in TASKS),
              *(f"{task}, learned" for task in SHORT)]
    rows = []
    for variant in (None, *PRINCIPLES, "chat"):
        bare = [played(untrained_result(found, model, task, variant=variant)) for task in TASKS]
        after = [plus_minus(returns(first_three(learned(found, model, task, "word", variant))))
                 for task in SHORT]
        if any(cell != "-" for cell in (*bare, *after)):
            rows.append([variant or "as it is", *bare, *after])
    return header, rows if len(rows) > 1 else []


def uneven_table(found, model):
    """Every second action told in four more words of no meaning, under each normalisation."""
    rows = []
    for task, norm in itertools.product(TASKS, NORMS):
        bare = [untrained_result(found, model, task, norm, variant) for variant in (None, "uneven")]
        after = [plus_minus(returns(first_three(learned(found, model, task, norm, variant))))
                 for variant in (None, "uneven")]
        if bare[1]:
            rows.append([task, norm, *map(played, bare), *after])
    return ["task", "normalisation", "untrained, as it is", "untrained, uneven",
            "learned, as it is", "learned, uneven"], rows


def rewording_table(found, model):
    """A trained agent, and the untrained LLM, under other wordings within the principles."""
    rows = []
    for task in TASKS:
        records = select(found, "reworded", model=model, task=task)
        for wording in records[0]["results"] if records else ():
            variant = None if wording == "its own" else wording
            rows.append([task, wording,
                         mean_played([record["results"][wording] for record in records]),
                         played(untrained_result(found, model, task, variant=variant))])
    return ["task", "wording", "trained agent", "untrained LLM"], rows


def mask_table(found, model):
    """The home without the published mask of its actions."""
    rows = []
    for task in TASKS:
        lines = {"TWOSOME, word": [learned(found, model, task, "word", variant)
                                   for variant in (None, "no-mask")]}
        for form in ("equal", "tuned"):
            lines[f"PPO, {form}"] = [select(found, "ppo", task=task, form=form, mask=mask)
                                     for mask in (None, False)]
        for label, (masked, free) in lines.items():
            masked = [run for run in masked if run["arguments"]["seed"] < 100]
            if free:
                success = np.mean([run["summary"]["success"] for run in free])
                rows.append([task, label, plus_minus(returns(masked)), plus_minus(returns(free)),
                             f"{success:.0%}"])
    return ["task", "method", "return with the mask", "without it", "success without it"], rows


def retention_table(found, model):
    """What the LLM keeps of itself: perplexity and KL to the base, mean and interval over seeds."""
    rows = []
    for task, text in itertools.product(TASKS, ("real", "own")):
        sides = [record[text] for record in
                 select(found, "retention", model=model, task=task, variant=None) if text in record]
        if sides:
            rows.append([task, {"real": "real English", "own": "its own kind"}[text],
                         f"{sides[0]['tokens']:,}", f"{sides[0]['perplexity']['base']:,.2f}",
                         *(plus_minus([side[name]["change_percent"] for side in sides], ".2f")
                           for name in ("trained", "merged")),
                         plus_minus([side["trained"]["kl"] for side in sides], ".4f")])
    return ["trained on", "text", "tokens", "perplexity of the base", "trained: change in %",
            "merged: change in %", "KL, nats a token"], rows


def holding_table(found, model):
    """What holding the policy to its base gives: elsewhere, and to the LLM. Seeds 1 to 3."""
    rows = []
    # The base's kind of text: real English, and for pocket_lm lines of a home.
    text = {"pocket_lm": "own", "smollm2": "real"}[model]
    for task, variant in itertools.product(SHORT, (None, "not-held")):
        runs, elsewhere, keeping = (
            first_three(select(found, kind, model=model, task=task, norm="word", variant=variant))
            for kind in ("learn", "transfer", "retention"))
        kept = [record[text]["trained"] for record in keeping]
        if elsewhere and kept:
            before = [untrained_result(found, model, other) for other in EVERY if other != task]
            cells = [task, variant or "held", plus_minus(returns(runs), ".4f")]
            for name in ("return", "success"):
                after = [np.mean([result[name] for result in record["transfer"].values()])
                         for record in elsewhere]
                known = np.mean([result[name] for result in before])
                cells.append(f"{plus_minus(after)} ({known:.3f})")
            rows.append(cells + [plus_minus([side["change_percent"] for side in kept], ".2f"),
                                 plus_minus([side["kl"] for side in kept], ".4f")])
    return ["trained on", "policy", "return", "return on the 14 unseen tasks (untrained LLM)",
            "success there (untrained LLM)", "perplexity: change in %", "KL, nats a token"], rows


def worlds_table(found, model):
    """FrozenLake in four ways, and the game that was learned."""
    rows = []
    told = {label: [record for record in select(found, "learn", model=model)
                    if record["name"].rpartition("-")[0] == f"lake-{label}"] for label in LAKES}
    told["quest"] = select(found, "quest", model=model)
    for label, runs in told.items():
        if runs:
            ends = [run["summary"]["success"] for run in runs]
            rows.append([label, f"{runs[0]['curve']['success'][0]:.1%}",
                         f"{sum(end >= 0.9 for end in ends)} of {len(runs)}",
                         ", ".join(f"{end:.0%}" for end in ends), plus_minus(returns(runs)),
                         span([run["summary"]["cpu_seconds"] for run in runs])])
    return ["world", "untrained success", "seeds at 90 %", "success of each seed", "return",
            "CPU seconds"], rows


def quest_table(found, model):
    """The game that was learned, and ten others: share of the best score, and of quests solved."""
    rows = []
    for record in select(found, "quest", model=model):
        others = {side: [games[side] for seed, games in record["games"].items()
                         if seed != str(QUEST_GAME)] for side in ("untrained", "trained")}
        for seed, games in record["games"].items():
            rows.append([f"game {seed}", *(f"{result['return']:.3f} ({result['success']:.0%})"
                                           for result in games.values())])
        rows.append(["mean of those never played",
                     *(f"{np.mean([result['return'] for result in results]):.3f}"
                       f" ({np.mean([result['success'] for result in results]):.0%})"
                       for results in others.values())])
    return ["score (solved)", "untrained LLM", f"trained on game {QUEST_GAME}"], rows


def right(text):
    """Return 1 for each right answer and 0 for each wrong one: [questions], of a str."""
    return np.array([int(letter) for letter in text])


def judged_tasks(records):
    """Return {task of BIG-bench: whether the base itself does better there than chance}."""
    counts = {}
    for task, facts in records[0]["ability"].items() if records else ():
        base = right(facts["base"])
        spread = 1.96 * (facts["chance"] * (1 - facts["chance"]) / len(base)) ** 0.5
        counts[task] = base.mean() > facts["chance"] + spread
    return counts


def kept(records, tasks, side):
    """Return (mean, half width) in points: how many more answers are right than the base's.

    It is averaged over tasks. What the seeds gained on a question is averaged first, for they
    answer the same questions.
    """
    means, variances = [], []
    for task in tasks:
        facts = [record["ability"][task] for record in records]
        gains = np.mean([right(each[side]) - right(each["base"]) for each in facts], axis=0)
        means.append(100 * gains.mean())
        variances.append(100**2 * gains.var(ddof=1) / len(gains))
    return np.mean(means), 1.96 * np.sum(variances) ** 0.5 / len(tasks)


def ability_table(found, model):
    """What the LLM can still do: BIG-bench's questions, answered by the base and by agents."""
    groups = {task: select(found, "ability", model=model, task=task) for task in TASKS}
    groups = {task: records for task, records in groups.items() if records}
    sides = ("trained", "merged")
    header = ["task", "questions", "chance", "base", "counts"]
    header += [f"{task}, {side}: points" for task in groups for side in sides]
    if not groups:
        return header, []

    def gains(tasks):
        return ["{:+.2f} ± {:.2f}".format(*kept(records, tasks, side))
                for records in groups.values() for side in sides]

    [first, *_] = groups.values()
    counts = judged_tasks(first)
    rows = []
    for task, facts in first[0]["ability"].items():
        base = right(facts["base"])
        rows.append([task, f"{len(base)}", f"{facts['chance']:.1%}", f"{base.mean():.1%}",
                     "yes" if counts[task] else "no", *gains([task])])
    if counted := [task for task in counts if counts[task]]:
        rows.append(["mean of those that count", "", "", "", "", *gains(counted)])
    return header, rows


def ablations_table(found, model):
    """What a reader would ablate: one thing changed at a time."""
    known = {record["arguments"].get("variant") for record in found} & {*ABLATIONS, "float32"}
    header = ["change"]
    for task in SHORT:
        header += [f"{task}: return", "steps to 90 %", "CPU seconds"]
    rows = []
    for variant in (None, *sorted(known)):
        cells = []
        for task in SHORT if random_result(found, "cheese") else ():
            runs = first_three(learned(found, model, task, "word", variant))
            cells += [plus_minus(returns(runs), ".4f"), steps_cell(found, task, runs),
                      span([run["summary"]["cpu_seconds"] for run in runs]) if runs else "-"]
        if any(cell != "-" for cell in cells):
            rows.append([variant or "as it is", *cells])
    return header, rows if len(rows) > 1 else []


def tuning_table(found, model):
    """The search for the tuned form of PPO, on seeds above 100; it has no LLM."""
    header = ["setting", *(f"{task}: {what}" for task in TASKS
                           for what in ("steps to 90 %", "return at the end"))]
    runs = [run for run in select(found, "ppo", form="tuned") if run["arguments"]["seed"] > 100]
    rows = {}
    for run in runs if model == MODELS[0] and random_result(found, "cheese") else ():
        task = run["arguments"]["task"]
        setting = run["name"].removeprefix("ppo-tuning-").split(f"-{task}-")[0]
        rows.setdefault(setting, {}).setdefault(task, []).append(run)
    return header, [[setting, *(cell for task in TASKS for cell in (
        given(ways(found, task, tasks[task])[0].mean() if task in tasks else None, ",.0f"),
        plus_minus(returns(tasks.get(task, [])))))]
        for setting, tasks in rows.items()]


# -----------------------------------------------------------------------------
# The claims, judged by the same records. The paper's figures are not quoted: they are LLaMA-7B's.


def count_of(judged):
    """Return (measured, verdict) of a list of (what, whether it holds).

    None stands for what the intervals leave open; it counts as not shown.
    """
    if not judged:
        return "-", "not measured"
    judged = [(what, holds if holds is None else bool(holds)) for what, holds in judged]
    held = sum(holds is True for _, holds in judged)
    lists = [(word, [what for what, holds in judged if holds is value])
             for word, value in (("not", False), ("open", None))]
    text = f"{held} of {len(judged)}"
    text += "".join(f"; {word} {', '.join(names)}" for word, names in lists if names)
    verdict = "no" if lists[0][1] else "open" if lists[1][1] else "yes"
    return text, verdict


def above(low, high, bound=0):
    """Return whether an interval lies above a bound; None if the bound is in it."""
    return bool(low > bound) if low > bound or high < bound else None


def difference(mine, theirs):
    """Return the 95 % interval of a difference of two means; each is (mean, half width)."""
    middle, half = mine[0] - theirs[0], np.hypot(mine[1], theirs[1])
    return middle - half, middle + half


def evaluated(result):
    """Return (mean, half width) of the return of one evaluation, over its episodes."""
    low, high = result["return_interval"]
    return result["return"], (high - low) / 2


def efficient(found, model):
    """Judge TWOSOME, word, against each baseline without privileged knowledge, task by task.

    While a baseline that learns is not measured, the verdict is only how it stands so far.
    """
    judged, met, missing = [], set(), set()
    for task in TASKS if random_result(found, "cheese") else ():
        lines = methods(found, model, task)
        if "TWOSOME, word" not in lines:
            continue
        ours = ways(found, task, lines["TWOSOME, word"])
        rivals = {"PPO, equal", "PPO, tuned"}
        rivals |= {"TWOSOME, random weights"} if model == "pocket_lm" else set()
        met |= rivals & {*lines}
        missing |= rivals - {*lines}
        for label in rivals & {*lines}:
            ends = ratio(ways(found, task, lines[label])[0], ours[0])[1]
            judged.append((f"{task} against {label}", ours[2].all() and above(*ends, 1)))
        plays = {"the untrained LLM": untrained_result(found, model, task)}
        for record in select(found, "saycan", model=model, task=task):
            for how in ("sampled", "greedy"):
                label = f"SayCan-style ({record['arguments']['norm']}, admissible, {how})"
                plays[label] = record["results"][f"admissible, {how}"]
        # Who does not learn is either there from the first step on, or never.
        judged += [(f"{task} against {label}", scaled(found, task, result["return"]) < 0.9)
                   for label, result in plays.items() if result]
    if not met:  # that the untrained LLM never gets there is no news
        return "-", "not measured"
    text, verdict = count_of(sorted(judged, key=lambda pair: pair[0]))
    if judged and missing:
        text += f"; not measured everywhere: {', '.join(sorted(missing))}"
        verdict = f"{verdict}, so far"
    return text, verdict


def better_normalised(found, model):
    """Judge word against sum: the untrained return, and the steps to 90 % of the way."""
    judged = []
    for task in TASKS:
        word, plain = (untrained_result(found, model, task, norm) for norm in ("word", "sum"))
        if word and plain:
            gap = difference(evaluated(word), evaluated(plain))
            judged.append((f"{task}, untrained", above(*gap)))
        word, plain = (learned(found, model, task, norm) for norm in ("word", "sum"))
        if word and plain:
            word, plain = (ways(found, task, runs) for runs in (word, plain))
            ends = ratio(plain[0], word[0])[1]
            judged.append((f"{task}, steps", word[2].all() and above(*ends, 1)))
    return count_of(judged)


def beats_untrained(found, model):
    """Judge the trained agents against the untrained LLM on the tasks they learned."""
    judged = []
    for task in TASKS:
        runs, bare = learned(found, model, task), untrained_result(found, model, task)
        if runs and bare:
            judged.append((task, min(returns(runs)) > bare["return_interval"][1]))
    return count_of(judged)


def generalises(found, model):
    """Judge each task's agents on every task they never saw: better than the untrained LLM?"""
    judged = []
    for source, task in itertools.product(TASKS, EVERY):
        bare = untrained_result(found, model, task)
        results = results_on(found, model, source, task)
        if len(results) > 1 and bare and source != task:
            mine = across([result["return"] for result in results])
            judged.append((f"{source} on {task}", above(*difference(mine, evaluated(bare)))))
    return count_of(judged)


def keeps(found, model):
    """Judge what the LLM keeps: perplexity within 2 % of the base on what it was made to read.

    That is real English, and for pocket_lm lines of a home: other English it never could read.
    """
    text = {"pocket_lm": "own", "smollm2": "real"}[model]
    judged = [(f"{record['arguments']['task']} seed {record['arguments']['seed']}",
               abs(record[text]["trained"]["change_percent"]) <= 2)
              for record in select(found, "retention", model=model, variant=None)]
    return count_of(judged)


def answers(found, model):
    """Judge answers: at most two points lost on average, no task's loss beyond its interval."""
    judged = []
    for task, side in itertools.product(TASKS, ("trained", "merged")):
        records = select(found, "ability", model=model, task=task)
        tasks = [name for name, counted in judged_tasks(records).items() if counted]
        for name in tasks:
            mean, half = kept(records, [name], side)
            judged.append((f"{task}, {side}, on {name}", mean + half >= 0))
        if tasks:
            judged.append((f"{task}, {side}, on average", kept(records, tasks, side)[0] >= -2))
    return count_of(judged)


def unmasked(found, model):
    """Judge learning without the home's mask: 90 % of the way at the end."""
    if model != "pocket_lm":
        return "-", "not asked"
    judged = []
    for task in TASKS if random_result(found, "cheese") else ():
        runs = learned(found, model, task, "word", "no-mask")
        if runs:
            judged.append((task, scaled(found, task, np.mean(returns(runs))) >= 0.9))
    return count_of(judged)


CLAIMS = {  # the claim, and how it is judged: (words of the paper's abstract, where to look, judge)
    "TWOSOME takes fewer steps to 90 % than every baseline without privileged knowledge":
        ("significantly better sample efficiency and performance", "figure 5", efficient),
    "finetuning by PPO beats the prompted LLM":
        ("significantly better sample efficiency and performance", "figure 5", beats_untrained),
    "word normalisation is better than none":
        ("enhance the stability and robustness of the policies", "figure 5", better_normalised),
    "on unseen tasks a trained agent is better than the untrained LLM":
        ("superior generalization ability to unseen tasks", "figure 6", generalises),
    "the LLM's perplexity stays within 2 %":
        ("no significant loss of the LLMs' original ability", "table 1", keeps),
    "the LLM answers BIG-bench as before":
        ("no significant loss of the LLMs' original ability", "table 1", answers),
    "both home tasks are learned without their action mask":
        ("", "our question", unmasked),
}


def claims_table(found, model):
    """Each claim, what was measured, and whether it holds."""
    return ["claim", "the paper", "holds in", "holds"], [
        [claim, f"“{words}” ({where})" if words else where, *judge(found, model)]
        for claim, (words, where, judge) in CLAIMS.items()]


def verdicts(tables):
    """The claims_table rows of the LLMs side by side, without the list of where one fails."""
    rows = []
    for judged in zip(*tables, strict=True):
        row = judged[0][:2]
        for _, _, measured, holds in judged:
            count = measured.partition(";")[0]
            row.append(holds if count == "-" else f"{holds}: {count}")
        rows.append(row)
    return ["claim", "the paper", *MODELS], rows


TABLES = {"learning": learning_table, "transfer": transfer_table, "efficiency": efficiency_table,
          "aggregate": aggregate_table, "saycan": saycan_table, "norms": norms_table,
          "temperature": temperature_table, "lengths": lengths_table,
          "principles": principles_table, "uneven": uneven_table, "rewording": rewording_table,
          "mask": mask_table, "retention": retention_table, "holding": holding_table,
          "ability": ability_table, "worlds": worlds_table, "quest": quest_table,
          "ablations": ablations_table, "tuning": tuning_table, "claims": claims_table}


# -----------------------------------------------------------------------------
# The report.


def markdown(header, rows):
    """Return a table in Markdown."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)) + "\n"


def report(options):
    """Write tables and pictures, and put the tables into both READMEs. Returns 0."""
    found = records(options)
    if not found:
        raise ClaimsError(f"nothing is stored in {options.out}/runs yet; leave out --report")
    blocks, made = {}, {}
    for group, make in TABLES.items():
        text = ""
        for model in MODELS:
            header, rows = made[group, model] = make(found, model)
            blocks[f"{group} {model}"] = markdown(header, rows)
            text += f"## {group}: {model}\n\n{markdown(header, rows)}\n"
            write_csv(options, f"{group}-{model}", [header, *rows])
        write_text(os.path.join(options.out, f"{group}.md"), text)
    judged = [made["claims", model][1] for model in MODELS]
    blocks["verdicts both"] = markdown(*verdicts(judged))
    write_text(os.path.join(options.out, "verdicts.md"),
               f"## verdicts: both\n\n{blocks['verdicts both']}\n")
    write_csv(options, "learning", list_of_runs(found))
    draw(options, found)
    draw_prior(options, found)
    for path in options.readmes:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                text = file.read()
            write_text(path, filled_in(text, blocks))
    return 0


def list_of_runs(found):
    """Return the rows of learning.csv: every run that learned, one a row."""
    names = ("model", "norm", "variant", "form", "mask", "task", "seed")
    ends = ("steps", "primitive_steps", "return", "success", "best", "cpu_seconds")
    rows = [["name", "kind", *names, *ends, "peak_mib"]]
    for record in found:
        if "curve" in record:
            rows.append([record["name"], record["kind"],
                         *(record["arguments"].get(name, "") for name in names),
                         *(record["summary"][name] for name in ends), record.get("peak_mib", "")])
    return rows


def filled_in(text, blocks):
    """Return a README with each `<!-- group model -->` ... `<!-- end -->` holding its table."""
    def block(match):
        inner = blocks.get(match[1])
        return match[0] if inner is None else f"<!-- {match[1]} -->\n{inner}<!-- end -->"

    return re.sub(r"<!-- (\w+ [\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def write_text(path, text):
    """Write a text, whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def write_csv(options, name, rows):
    """Write a table as comma-separated values; leave no file where only its header is known."""
    path, text = os.path.join(options.out, f"{name}.csv"), io.StringIO()
    if len(rows) > 1:
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(path, text.getvalue())
    elif os.path.exists(path):
        os.remove(path)


# -----------------------------------------------------------------------------
# Pictures.


def picture(options, name, figure):
    """Write a figure as PNG and SVG. Without a date, the same results give the same files."""
    from matplotlib import rc_context
    with rc_context({"svg.hashsalt": "twosome"}):
        figure.savefig(os.path.join(options.out, f"{name}.png"), dpi=110)
        figure.savefig(os.path.join(options.out, f"{name}.svg"), metadata={"Date": None})


def draw(options, found):
    """Draw return while learning: a row an LLM, a panel a task; by primitive steps, and actions."""
    from matplotlib.figure import Figure
    models = [model for model in MODELS if any(learned(found, model, task) for task in TASKS)]
    for axis, name, label in (("primitive_steps", "learning", "primitive steps"),
                              ("steps", "learning-actions", "macro-actions")):
        if not models:
            continue
        figure = Figure(figsize=(12, 2.6 * len(models) + 0.6), layout="constrained")
        panels = figure.subplots(len(models), len(TASKS), squeeze=False)
        handles = {}
        for row, model in zip(panels, models, strict=True):
            row[0].set_ylabel(f"{model}: return")
            for panel, task in zip(row, TASKS, strict=True):
                draw_task(panel, found, model, task, axis)
                panel.set(title=task, xlabel=label)
                lines, texts = panel.get_legend_handles_labels()
                handles |= dict(zip(texts, lines, strict=True))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=5,
                      frameon=False)
        picture(options, name, figure)


# One colour a method, in every panel.
COLOURS = {"TWOSOME, word": "C0", "TWOSOME, token": "C1", "TWOSOME, sum": "C2",
           "TWOSOME, random weights": "C3", "PPO, published": "C4", "PPO, equal": "C5",
           "PPO, tuned": "C6", "untrained LLM": "C0", "SayCan-style": "C8", "random": "grey"}


def draw_task(panel, found, model, task, axis):
    """Draw the curves of a task with their intervals, the best possible return and chance.

    The panel ends where three times TWOSOME's steps are over: PPO goes on far beyond.
    """
    ends, best, chance = [], best_return(task), random_result(found, task)
    lowest = chance["return"] if chance else best
    for label, runs in methods(found, model, task).items():
        x, mean, half = curve(runs, axis)
        lowest = min(lowest, *mean)
        panel.plot(x, mean, label=label, linewidth=1.2, color=COLOURS[label])
        panel.fill_between(x, mean - half, mean + half, color=COLOURS[label], alpha=0.2,
                           linewidth=0)
        ends += [x[-1]] if label.startswith("TWOSOME") else []
    panel.set_xlim(0, 3 * max(ends) if ends else None)
    margin = 0.08 * (best - lowest) or 1.0
    panel.set_ylim(lowest - margin, best + margin)  # the interval of two seeds may be huge
    panel.locator_params(axis="x", nbins=4)
    panel.axhline(best, color="black", linewidth=0.8, linestyle="--", label="best possible")
    # Who does not learn is a line; of SayCan-style, the best with TWOSOME's own mask.
    flat = {"untrained LLM": untrained_result(found, model, task), "random": chance}
    flat["SayCan-style"] = max(
        (result for record in select(found, "saycan", model=model, task=task)
         for kind, result in record["results"].items() if kind.startswith("admissible")),
        key=lambda result: result["return"], default=None)
    for label, result in flat.items():
        if result:
            panel.axhline(result["return"], color=COLOURS[label], linewidth=0.8, linestyle=":",
                          label=label)


def draw_prior(options, found):
    """Draw the untrained LLM's action probabilities in one state under the normalisations."""
    from matplotlib.figure import Figure
    shown = [record for record in select(found, "prior")
             if record["arguments"]["task"] in ("tomato-salad", "food-preparation")]
    if not shown:
        return
    figure = Figure(figsize=(4.6 * len(shown), 3.4), layout="constrained")
    for panel, record in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        state = record["state"]
        places = np.arange(len(state["phrases"]))
        for shift, norm in enumerate(NORMS):
            panel.barh(places + 0.27 * (shift - 1), state[norm], height=0.25, label=norm)
        panel.set(yticks=places, yticklabels=state["phrases"], xlim=(0, 1),
                  title=f"{record['arguments']['model']}, {record['arguments']['task']}")
        panel.invert_yaxis()
    panel.legend(frameon=False)
    picture(options, "normalisation", figure)


# -----------------------------------------------------------------------------
# The command.


def parse(argv):
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    quick = "--quick" in (sys.argv[1:] if argv is None else argv)
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="measure these parts alone",
                        default=[name for name in GROUPS if name != "tuning"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:1 + (not quick)])
    parser.add_argument("--tasks", nargs="+", choices=TASKS,
                        default=SHORT if quick else list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="jobs side by side, one core each")
    parser.add_argument("--list", action="store_true", help="show the jobs and run none")
    parser.add_argument("--report", action="store_true", help="make tables and pictures, run none")
    parser.add_argument("--quick", action="store_true", help="short runs, in runs/quick")
    parser.add_argument("--out", help="folder of the results (experiments/results)")
    parser.add_argument("--retention", metavar="RUN", help="measure what a run's LLM keeps")
    for flag in ("--work", "--job"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    for flag, value in (("--episodes", 0), ("--steps", 2048)):
        parser.add_argument(flag, type=int, default=value, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.episodes = options.seeds[:1], options.episodes or 20
    name = "quick" if options.quick else "claims"
    options.work = os.path.abspath(options.work or os.path.join(ROOT, "runs", name))
    usual = os.path.join(options.work, "results") if options.quick else RESULTS
    options.out = os.path.abspath(options.out or usual)
    # Only what was measured in earnest goes into a README.
    options.readmes = [os.path.join(ROOT, folder, "README.md") for folder in ("", "experiments")
                       if options.out == RESULTS]
    return options


def main(argv=None):
    """Run the command: exit code 0, 1 (a job failed), 2 (bad input) or 130 (stopped)."""
    options = parse(argv)
    try:
        if options.job:
            return work(options.job, options)
        if options.retention:
            from experiments import retention as keeping
            return keeping.main([options.retention])
        if options.report:
            return report(options)
        return listing(options) if options.list else campaign(options)
    except ClaimsError as error:
        print(f"claims.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
