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
stopped goes on where it was, on another machine as well. The folders in runs/ can be thrown away.

A job of kind learn is the README's own command, `python twosome.py --env E --task T ...`, and then
100 episodes on each of the tasks it was not trained on. All settings were chosen on seeds above
100; the seeds reported here are 1 to 5.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import json
import os
import resource
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
FORMAT = 1  # of a job's file
TASKS = {"tomato-salad": "overcooked", "tomato-lettuce-salad": "overcooked",
         "food-preparation": "virtualhome", "entertainment": "virtualhome"}  # the paper's four
EVERY = {task: env for env, tasks in envs.TASKS.items() for task in tasks}
MODELS = ("pocket_lm", "smollm2")
CURVE = ("update", "steps", "primitive_steps", "return", "success", "entropy", "kl", "cpu_seconds")


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
LEARN = {"pocket_lm": {"tomato-salad": 0.6, "tomato-lettuce-salad": 5, "food-preparation": 0.6,
                       "entertainment": 5},
         "smollm2": {"tomato-salad": 5, "tomato-lettuce-salad": 35, "food-preparation": 4,
                     "entertainment": 18}}
PLAY = {"pocket_lm": 0.2, "smollm2": 1.5}


def learn_job(options, model, norm, task, seed):
    """Return the job of one run of the README's command."""
    arguments = {"env": TASKS[task], "task": task, "model": model, "norm": norm, "seed": seed}
    minutes = LEARN[model][task] + len(EVERY) * PLAY[model]
    if options.quick:
        arguments["steps"], minutes = 2048, minutes / 4
    arguments["episodes"] = options.episodes or 100
    return Job(f"learn-{model}-{norm}-{task}-{seed}", "learn", arguments, minutes)


def untrained_job(options, model, norm, task):
    """Return the job that plays the prompted LLM as it comes."""
    episodes = options.episodes or {"pocket_lm": 1000, "smollm2": 400}[model]
    arguments = {"env": EVERY[task], "task": task, "model": model, "norm": norm,
                 "episodes": episodes}
    return Job(f"untrained-{model}-{norm}-{task}", "untrained", arguments, 2 * PLAY[model])


def random_job(options):
    """Return the job that chooses uniformly among the admissible actions, on every task."""
    return Job("random", "random", {"episodes": options.episodes or 1000}, 1.0)


def learning_jobs(options):
    """Return the runs of word normalisation, and beside them the untrained LLM and chance."""
    found = [learn_job(options, model, "word", task, seed) for model in options.models
             for seed in options.seeds for task in options.tasks]
    found += [untrained_job(options, model, "word", task) for model in options.models
              for task in (options.tasks if options.quick else EVERY)]
    return [*found, random_job(options)]


GROUPS = {"learning": learning_jobs}


def table_of_jobs(options):
    """Return the jobs of the groups chosen, each once."""
    found = [job for name in options.only for job in GROUPS[name](options)]
    return list({job.name: job for job in found}.values())


# -----------------------------------------------------------------------------
# What a job's process does. Each function returns a dict for the job's file.


def learn(job, folder):
    """Train by the README's command, or go on with it; then play the tasks it never saw."""
    kept = os.path.join(folder, "claims.json")  # what was measured before an interruption
    facts = read_json(kept) if os.path.exists(kept) else {"peak_mib": 0.0, "transfer": {}}
    if not os.path.exists(os.path.join(folder, "summary.json")):
        train(job, folder, facts)
    facts["settings"] = read_json(os.path.join(folder, "config.json"))
    facts["settings"].pop("out")  # a folder of this machine
    facts["summary"] = read_json(os.path.join(folder, "summary.json"))
    facts["curve"] = read_curve(os.path.join(folder, "metrics.csv"))
    import twosome
    agent, _ = twosome.load(folder)
    for task, env in EVERY.items():
        if task not in (job["task"], *facts["transfer"]):
            facts["transfer"][task] = play(agent, env, task, job["episodes"])
            write_json(kept, facts)
    return facts


def train(job, folder, facts):
    """Run twosome.py in a process of its own. Its peak memory goes into `facts`."""
    flags = ["--resume", folder]
    if not os.path.exists(os.path.join(folder, "config.json")):
        flags = [f"--{name}={job[name]}" for name in job] + ["--out", folder]
    command = [sys.executable, os.path.join(ROOT, "twosome.py"), *flags]
    child = subprocess.Popen(command)
    # A process that is asked to end passes it on, so that the run writes its checkpoint.
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    code = child.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # This process has had no other child yet. Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    facts["peak_mib"] = max(facts["peak_mib"], round(peak))
    if os.path.isdir(folder):
        write_json(os.path.join(folder, "claims.json"), facts)
    if code:
        sys.exit(code)


def read_curve(path):
    """Return {column: values} of a run's metrics.csv."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in CURVE}


def play(agent, env, task, episodes):
    """Return means and intervals of an agent's episodes on a task, at the world's own gamma."""
    import functools

    import ppo
    from engine import command
    make_env = functools.partial(envs.make, env, task=task)
    result = ppo.evaluate(make_env, agent, episodes, command.EVALUATION_SEED, make_env().gamma)
    return command.summarize(result)


def untrained(job, folder):
    """Play the prompted LLM as it comes."""
    import twosome
    from engine import command
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


KINDS = {"learn": learn, "untrained": untrained, "random": random}


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


def parse(argv):
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS),
                        help="measure these parts alone")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="jobs side by side, one core each")
    parser.add_argument("--list", action="store_true", help="show the jobs and run none")
    parser.add_argument("--report", action="store_true", help="make tables and pictures, run none")
    parser.add_argument("--quick", action="store_true", help="short runs, in runs/quick")
    parser.add_argument("--out", help="folder of the results (experiments/results)")
    for flag, kind in (("--work", str), ("--job", str), ("--episodes", int)):
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.episodes = options.seeds[:1], options.episodes or 20
    name = "quick" if options.quick else "claims"
    options.work = os.path.abspath(options.work or os.path.join(ROOT, "runs", name))
    usual = os.path.join(options.work, "results") if options.quick else RESULTS
    options.out = os.path.abspath(options.out or usual)
    return options


def main(argv=None):
    """Run the command: exit code 0, 1 (a job failed), 2 (bad input) or 130 (stopped)."""
    options = parse(argv)
    try:
        if options.job:
            return work(options.job, options)
        return listing(options) if options.list else campaign(options)
    except ClaimsError as error:
        print(f"claims.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
