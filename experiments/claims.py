"""The paper's claims, measured: one command for every run, one for every table and picture.

    python experiments/claims.py                          all but tuning and quiet, or what is left
    python experiments/claims.py --only learning          one part of it: see jobs.GROUPS
    python experiments/claims.py --only learning --models smollm2 --tasks tomato-salad --seeds 1 2
    python experiments/claims.py --list                   the jobs, their estimated CPU hours
    python experiments/claims.py --report                 tables and pictures, from what is stored
    python experiments/claims.py --quick                  short runs, for a look in ten minutes

The measurement is a table of jobs (jobs.py). A job has a name, a kind (a function in KINDS) and
arguments, and runs in a process of its own on one core. When it has finished, it leaves one small
file (records.py), which the report (tables.py, report.py) reads:
experiments/results/runs/NAME.json; a job whose file exists is skipped, so a campaign that was
stopped goes on where it was, on another machine as well. The runs themselves lie in runs/claims;
a job that looks at one (transfer, reworded, retention, ability) trains it anew if it is missing.

A job of kind learn is the README's own command, `python twosome.py --env E --task T ...`. How the
settings were chosen is told in jobs.py; the seeds reported here are 1 to 5, of FrozenLake 1 to 10.
"""
import argparse
import collections
import concurrent.futures
import csv
import dataclasses
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import envs
from experiments import jobs, records
from experiments.jobs import EVERY, GROUPS, MODELS, SHORT, TASKS, table_of_jobs

# torch and the rooms that need it are imported inside the functions that run in a job's process:
# the campaign and the report stay small, and a run's peak memory is its own.

CURVE = ("update", "steps", "primitive_steps", "episodes", "return", "success", "entropy", "kl",
         "seconds", "cpu_seconds")

# -----------------------------------------------------------------------------
# What a job's process does. Each function returns a dict for the job's file.


def learn(job, folder):
    """Train by the README's command, or go on with it."""
    facts = trained(job, folder)
    facts["settings"] = records.read_json(os.path.join(folder, "config.json"))
    for name in ("out", "model", "env"):  # paths of this machine; the job names model and env
        facts["settings"].pop(name)
    named = {name: job[name] for name in ("model", "env")}
    facts["summary"] = records.read_json(os.path.join(folder, "summary.json")) | named
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
    facts = records.read_json(kept) if os.path.exists(kept) else {"peak_mib": 0}
    check(job, folder)
    if os.path.exists(os.path.join(folder, "summary.json")):
        return facts
    child = subprocess.Popen([sys.executable, *command_of(job, folder)])
    # A process that is asked to end passes it on, so that the run writes its checkpoint.
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    code = child.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # This process has had no other child yet. Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    facts["peak_mib"] = max(facts["peak_mib"], round(peak))
    if os.path.isdir(folder):
        records.write_json(kept, facts)
    if code:
        sys.exit(code)
    return facts


def check(job, folder):
    """Raise ClaimsError if a folder holds a run of other settings than the job would begin."""
    path = os.path.join(folder, "config.json")
    if os.path.exists(path) and (other := differing(job, records.read_json(path))):
        raise records.ClaimsError(f"{folder} was trained with another {', '.join(other)};"
                                  " delete it to have it measured again")


def differing(job, settings):
    """Return the names of a run's settings that are not those which its job would begin with."""
    from engine import command
    asked = vars(command.parse([f"--{name}={value}" for name, value in flags_of(job).items()])[0])
    # Paths may differ, and what "auto" became is told by the machine.
    return [name for name in asked if name not in ("out", "env", "model", "dtype", "device")
            and settings.get(name) != asked[name]]


def command_of(job, folder):
    """Return the command that begins a run or goes on with it: a script and its flags."""
    change = job.get("change", "")
    script = ["experiments/baselines.py", change] if change else ["twosome.py"]
    script = [os.path.join(records.ROOT, script[0]), *script[1:]]
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
    return os.path.join(records.ROOT, job["env"]) if ":" in job["env"] else job["env"]


def read_curve(path):
    """Return {column: values} of a run's metrics.csv."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in CURVE}


def play(agent, env, task, episodes, seed=0):
    """Return means and intervals of an agent's episodes on a task, at the world's own gamma."""
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
    return baselines.saycan(job)


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
    for seed in (jobs.QUEST_GAME, *range(1, 11)):
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
    if run := job["arguments"].get("run"):
        # Note what the agent that was looked at does in its own task. Its run may have been trained
        # anew on another machine, where last bits differ: its return need not be that of the
        # record of learning. Its CPU seconds tell the two trainings apart.
        end = records.read_json(os.path.join(options.work, run, "summary.json"))
        facts["agent"] = {name: end[name] for name in ("return", "success", "cpu_seconds")}
    from experiments.measure import machine
    spent = resource.getrusage(resource.RUSAGE_SELF)
    records.write_json(records.record_path(options, job["name"]), {
        "format": records.FORMAT, **job, "machine": machine(),
        "own_cpu_seconds": round(spent.ru_utime + spent.ru_stime, 1), **facts})


# -----------------------------------------------------------------------------
# The campaign.


class Campaign:
    """Jobs side by side, one core each, under a progress bar that counts estimated minutes."""

    def __init__(self, options):
        self.options = options
        self.running, self.failed, self.stopped = {}, [], False
        self.locks = collections.defaultdict(threading.Lock)  # {name of a run: lock}

    def run(self, left):
        """Run the jobs that are left. Returns the exit code."""
        from tqdm import tqdm
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        form = "{l_bar}{bar}| {elapsed} spent, {remaining} left{postfix}"
        total = sum(job.minutes for job in left)
        with (concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool,
              tqdm(total=total, bar_format=form, dynamic_ncols=True) as shown):
            futures = {pool.submit(self.one, job): job for job in left}
            try:
                for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    future.result()
                    # Rounding must not take the sum beyond the total.
                    shown.update(min(futures[future].minutes, total - shown.n))
                    shown.set_postfix_str(f"{count} of {len(left)}, {futures[future].name}")
            except KeyboardInterrupt:
                self.stop(pool)
        for line in self.failed:
            print(line, file=sys.stderr)
        return 130 if self.stopped else int(bool(self.failed))

    def one(self, job):
        """Run one job, but never two at once that train or look at the same run."""
        with self.locks[job.arguments.get("run", job.name)]:
            if not self.stopped:
                self.process(job)

    def process(self, job):
        """Run one job in a process of its own."""
        text = json.dumps({key: getattr(job, key) for key in ("name", "kind", "arguments")})
        command = [sys.executable, os.path.abspath(__file__), "--job", text,
                   "--out", self.options.out, "--work", self.options.work]
        path = os.path.join(self.options.work, f"{job.name}.log")
        with open(path, "ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                     env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.running[job.name] = child
        if self.stopped:  # stop() may have looked before this one was there
            child.terminate()
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
        path = records.record_path(options, job.name)
        if os.path.exists(path):
            records.read_record(path, job)
        else:
            left.append(job)
    os.makedirs(options.work, exist_ok=True)
    return Campaign(options).run(left) if left else 0


def listing(options):
    """Print the jobs with their estimated CPU hours, and which are done. Returns 0."""
    total = {}
    for job in table_of_jobs(options):
        done = os.path.exists(records.record_path(options, job.name))
        total[done] = total.get(done, 0.0) + job.minutes / 60
        print(f"{'done' if done else 'left':4}  {job.minutes / 60:6.2f} h  {job.name}")
    print(f"{total.get(True, 0):.1f} hours of one core are done, {total.get(False, 0):.1f} left")
    return 0


# -----------------------------------------------------------------------------
# The command.


def parse(argv):
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    quick = "--quick" in (sys.argv[1:] if argv is None else argv)
    left_out = jobs.NOT_QUICK if quick else jobs.ON_REQUEST
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="measure these parts alone",
                        default=[name for name in GROUPS if name not in left_out])
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
    for flag, value in (("--episodes", 0), ("--steps", 1024)):
        parser.add_argument(flag, type=int, default=value, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if "quiet" in options.only:
        options.jobs = 1  # the clock is read, so no other job may run beside one
    if options.quick:
        options.seeds, options.episodes = options.seeds[:1], options.episodes or 20
    name = "quick" if options.quick else "claims"
    options.work = os.path.abspath(options.work or os.path.join(records.ROOT, "runs", name))
    usual = os.path.join(options.work, "results") if options.quick else records.RESULTS
    options.out = os.path.abspath(options.out or usual)
    # Only what was measured in earnest goes into a README.
    options.readmes = [os.path.join(records.ROOT, folder, "README.md")
                       for folder in ("", "experiments") if options.out == records.RESULTS]
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
            from experiments import report
            return report.write(options)
        return listing(options) if options.list else campaign(options)
    except records.ClaimsError as error:
        print(f"claims.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
