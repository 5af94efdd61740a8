"""Kill a training run with SIGKILL at random moments, resume it, and compare what comes out.

    python experiments/kill_campaign.py                 # 60 kills of a run on the tomato salad
    python experiments/kill_campaign.py --kills 300

A run is killed one to six times before it may finish: at any moment after its start, within a
chosen update, while a checkpoint is being written, or soon after the resume that follows a kill. At
the end its metrics.csv (without the columns of times), its summary and every file of its last
checkpoint must be those of a run that was never killed, bit for bit. Every run is a process of its
own, forked from a server that has imported everything, so that no kill is spent on imports.

tests/test_runs.py runs a short form. Results: experiments/results/kill_campaign.json and .md.
"""
import argparse
import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TIMES = ("seconds", "cpu_seconds")
RUN = ["--env", "overcooked", "--num-envs", "4", "--rollout-steps", "16", "--minibatch", "32",
       "--steps", "1280", "--checkpoint-every", "3", "--episodes", "10"]
PRELOAD = ["twosome", "tqdm", "matplotlib.figure", "transformers.models.llama.modeling_llama"]


def main_of(argv, output, limit):
    """Be `python twosome.py ARGV`: what a forked process does."""
    for number, target in ((0, os.devnull), (1, output), (2, output)):
        os.dup2(os.open(target, os.O_RDWR | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, wherever this one was started
    if limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    import torch
    import tqdm

    import twosome
    tqdm.tqdm.set_lock(threading.RLock())  # its own outlives a kill, with a warning at the end
    torch.set_num_threads(1)  # the number of threads may change last bits
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as twosome.py does when it is started
    sys.exit(twosome.main(argv))


class Process:
    """`python twosome.py ARGV` as a process of its own, without the seconds that imports take.

    limit: the size in bytes that no file it writes may exceed, a stand-in for a full disk.
    """

    def __init__(self, argv, limit=None, target=main_of, more=()):
        handle, self.file = tempfile.mkstemp()
        os.close(handle)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        arguments = argv, self.file, limit, *more
        self.process = context.Process(target=target, args=arguments, daemon=True)
        self.process.start()

    def ended(self):
        """Whether it is over."""
        return self.process.exitcode is not None

    def wait(self):
        """Wait for the end. Returns the exit code, negative for a signal."""
        self.process.join()
        return self.process.exitcode

    def signal(self, number):
        """Send a signal, unless it is over."""
        if not self.ended():
            os.kill(self.process.pid, number)

    def output(self):
        """What it has printed so far."""
        with open(self.file, errors="replace") as file:
            return file.read()

    def until(self, condition):
        """Wait until the condition holds or the process is over."""
        while not condition() and not self.ended():
            time.sleep(0.003)


def rows(folder):
    """The whole rows of a metrics.csv so far, as dicts; [] where there is none."""
    try:
        with open(os.path.join(folder, "metrics.csv")) as file:
            lines = file.read().split("\n")[:-1]  # the last one is empty, or not yet whole
    except FileNotFoundError:
        return []
    return list(csv.DictReader(lines))


def timeless(values):
    """A dict without its times."""
    return {name: value for name, value in values.items() if name not in TIMES}


def trace(folder):
    """What of a finished run must not depend on its interruptions: {name: content}."""
    names = [name for name in os.listdir(folder) if name.startswith("checkpoint-")]
    last = max(names, key=lambda name: int(name[11:]))
    found = {"checkpoint": last, "metrics": [timeless(row) for row in rows(folder)]}
    for name in os.listdir(os.path.join(folder, last)):
        with open(os.path.join(folder, last, name), "rb") as file:
            found[name] = file.read()
    found["state.json"] = timeless(json.loads(found["state.json"]))
    with open(os.path.join(folder, "summary.json")) as file:
        found["summary"] = timeless(json.load(file))
    # These hold times, the folder's name, and the sums of both.
    for name in ("metrics.csv", "run_config.json", "SHA256SUMS"):
        del found[name]
    return found


def kill(process, folder, moment, rng, updates, length):
    """Kill a process at a random moment of a kind. Returns whether it was still alive."""
    def saving():
        return os.path.isdir(os.path.join(folder, ".tmp-checkpoint"))

    if moment == "any":
        time.sleep(rng.uniform(0, length))
    elif moment == "resume":
        time.sleep(rng.uniform(0, 0.3 * length))
    elif moment == "update":
        target = rng.randint(len(rows(folder)), updates)
        process.until(lambda: len(rows(folder)) >= target)
        time.sleep(rng.uniform(0, 1.5 * length / updates))
    else:
        for _ in range(rng.randint(1, 3)):
            process.until(lambda: not saving())
            process.until(saving)
        time.sleep(rng.choice((0, rng.uniform(0, 0.03))))
    process.signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def moments(rng):
    """The kinds of moments at which one run is killed: one to six of them."""
    planned = [rng.choice(("any", "update", "update", "save", "save"))]
    while rng.random() < 0.75 and len(planned) < 6:
        planned.append(rng.choice(("resume", "update", "save")))
    return planned


def start(argv, folder):
    """Begin a run in a folder, or go on with it where it has begun."""
    begun = os.path.exists(os.path.join(folder, "config.json"))
    return Process(["--resume", folder] if begun else [*argv, "--out", folder])


def campaign(argv, kills, seed, parent, say=print):
    """Kill until `kills` kills have met a living process. Returns the figures, a dict."""
    rng = random.Random(seed)
    whole = os.path.join(parent, "whole")
    Process(["--help"]).wait()  # what the server imports first is no part of a run's length
    began = time.perf_counter()
    process = start(argv, whole)
    assert process.wait() == 0, process.output()
    length, wanted, updates = time.perf_counter() - began, trace(whole), len(rows(whole))
    figures = {"command": "python twosome.py " + " ".join(argv), "runs": 0, "kills": 0,
               "any": 0, "update": 0, "save": 0, "resume": 0,
               "left_half_written": 0, "lost": 0, "differing": 0, "tracebacks": 0}
    while figures["kills"] < kills:
        folder = os.path.join(parent, f"killed{figures['runs']}")
        figures["runs"] += 1
        planned, outputs = moments(rng), []
        for moment in planned:
            process = start(argv, folder)
            hit = kill(process, folder, moment, rng, updates, length)
            outputs.append(process.output())
            figures["kills"] += hit
            figures[moment] += hit
            figures["left_half_written"] += os.path.isdir(os.path.join(folder, ".tmp-checkpoint"))
        process = start(argv, folder)
        lost = process.wait() != 0
        outputs.append(process.output())
        found = {} if lost else trace(folder)
        odd = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        figures["lost"] += lost
        figures["differing"] += bool(odd) and not lost
        figures["tracebacks"] += sum("Traceback" in output for output in outputs)
        if odd:
            say(f"{folder}: {odd} differ after {planned}: {outputs[-1][-500:]}")
        else:
            shutil.rmtree(folder)
        say(f"{figures['kills']} kills in {figures['runs']} runs: {figures['lost']} lost, "
            f"{figures['differing']} differing")
    return {**figures, "seconds": round(time.perf_counter() - began, 1)}


def bad(figures):
    """How many things went wrong in a campaign."""
    return figures["lost"] + figures["differing"] + figures["tracebacks"]


def main():
    """Run the campaign and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="that meet a living process (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--out", default=os.path.join(ROOT, "experiments/results/kill_campaign"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        figures = campaign(RUN, options.kills, options.seed, parent)
    with open(f"{options.out}.json", "w") as file:
        json.dump(figures, file, indent=2)
    with open(f"{options.out}.md", "w") as file:
        lines = [f"| {name.replace('_', ' ')} | {value} |\n" for name, value in figures.items()]
        file.write("# Killed and resumed\n\n| figure | value |\n|---|---|\n" + "".join(lines))
    print(json.dumps(figures, indent=2))
    return int(bad(figures) > 0)


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    sys.exit(main())
