"""Kill a training run with SIGKILL at random moments, resume it, and compare it with one that was never interrupted.

  python experiments/kill_campaign.py                              # 60 kills of `python twosome.py --env overcooked`, about 20 minutes
  python experiments/kill_campaign.py --kills 300 --fork           # children of one process that has imported everything: quicker

A run is killed one to six times before it may finish: at any moment after its start, within a chosen update, while a
checkpoint is being written, or right after the resume that follows a kill. After each kill metrics.csv must be whole; at the
end metrics.csv (without its two columns of times) and every file of the last checkpoint must be bit for bit those of the
uninterrupted run. tests/test_runs.py runs a short form. Results: experiments/results/kill_campaign.json and .md.
"""
import argparse
import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
TIMES = ("seconds", "steps_per_second")
# One thread: the number of threads may change last bits, and this machine may be shared.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Command:
    """`python twosome.py ARGV` in a fresh interpreter. start() -> a handle with pid, poll(), wait() and output()."""

    def start(self, argv, limit=None):
        """Start it. limit: RLIMIT_FSIZE in bytes, a stand-in for a full disk."""
        output = tempfile.TemporaryFile("w+")
        before = (lambda: limit_files(limit)) if limit else None
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, "twosome.py"), *argv], cwd=ROOT, env=ENVIRONMENT,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=before)
        process.output = lambda: (output.seek(0), output.read())[1]
        return process

    def close(self):
        """Nothing to end."""


class Fork:
    """The same through fork: a server imports twosome once, and every run is a process of its own that need not."""

    def __init__(self):
        self.server = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--serve"], cwd=ROOT, env=ENVIRONMENT,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask()

    def ask(self, **request):
        """Send a request and read the answer; without one, only read."""
        if request:
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, argv, limit=None):
        """As Command.start."""
        return Forked(self, argv, limit)

    def close(self):
        """End the server."""
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


class Forked:
    """A run that the server has forked; subprocess.Popen's few methods."""

    def __init__(self, fork, argv, limit):
        handle, self.file = tempfile.mkstemp()
        os.close(handle)
        self.fork, self.returncode = fork, None
        self.pid = fork.ask(argv=list(argv), output=self.file, limit=limit)

    def poll(self):
        """The exit code, negative for a signal, or None."""
        if self.returncode is None:
            self.returncode = self.fork.ask(poll=self.pid)
        return self.returncode

    def wait(self):
        """Wait for the end."""
        while self.poll() is None:
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        """Signal it, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def output(self):
        """What it printed."""
        with open(self.file, errors="replace") as file:
            return file.read()


def limit_files(size):
    """Let no file of this process grow beyond size bytes."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def serve():
    """The fork server: a JSON request a line on standard input, an answer a line on standard output."""
    import matplotlib.figure  # noqa: F401  these two so that no child has to
    import torch
    import tqdm  # noqa: F401
    import twosome
    torch.set_num_threads(1)
    twosome.build(twosome.Config())  # a first model loaded imports most of transformers
    children = {}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if children.get(pid) is None and pid in children:
                done, status = os.waitpid(pid, os.WNOHANG)
                children[pid] = os.waitstatus_to_exitcode(status) if done else None
            print(json.dumps(children.get(pid)), flush=True)
            continue
        pid = os.fork()
        if not pid:
            target = os.open(request["output"], os.O_WRONLY | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(target, 1)
            os.dup2(target, 2)
            if request["limit"]:
                limit_files(request["limit"])
            code = 1
            try:
                code = twosome.main(request["argv"])
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children[pid] = None
        print(json.dumps(pid), flush=True)


def rows(folder):
    """metrics.csv as a list of dicts, checked to be whole: full lines, full rows, updates 1, 2, 3 ... [] where it is not there."""
    try:
        with open(os.path.join(folder, "metrics.csv")) as file:
            text = file.read()
    except FileNotFoundError:
        return []
    table = list(csv.reader(io.StringIO(text)))
    assert not text or text.endswith("\n"), "metrics.csv ends in half a line"
    assert all(len(row) == len(table[0]) for row in table), "metrics.csv has a row of another length"
    found = [dict(zip(table[0], row)) for row in table[1:]]
    assert [int(row["update"]) for row in found] == list(range(1, len(found) + 1)), "metrics.csv lacks a row or has one twice"
    return found


def trace(folder):
    """All of a finished run that must not depend on its interruptions: {name: bytes or values}."""
    last = max((name for name in os.listdir(folder) if name.startswith("checkpoint-") and name[11:].isdigit()), key=lambda name: int(name[11:]))
    content = {"metrics": [{name: value for name, value in row.items() if name not in TIMES} for row in rows(folder)], "checkpoint": last}
    for name in os.listdir(os.path.join(folder, last)):
        with open(os.path.join(folder, last, name), "rb") as file:
            content[name] = file.read()
    adapter = json.loads(content["adapter_config.json"])
    content["adapter_config.json"] = {**adapter, "target_modules": sorted(adapter["target_modules"])}  # a set: its order is the hash's
    for name in ("metrics.csv", "run_config.json", "SHA256SUMS"):  # times, the folder's name, and the sums of both
        del content[name]
    with open(os.path.join(folder, "summary.json")) as file:
        content["summary"] = {name: value for name, value in json.load(file).items() if name not in ("seconds", "resumed")}
    return content


def wait_for(condition, process):
    """Wait until the condition holds or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.003)


def kill_at(process, folder, mode, rng, updates, length):
    """Kill the process at a random moment of a kind. Returns whether it was still alive."""
    saving = lambda: any(name.startswith(".tmp-") and name != ".tmp-metrics.csv" for name in os.listdir(folder)) if os.path.isdir(folder) else False
    count = lambda: len(rows(folder))
    if mode == "any":
        time.sleep(rng.uniform(0, length))
    elif mode == "update":
        target = rng.randint(count(), updates)
        wait_for(lambda: count() >= target, process)
        time.sleep(rng.uniform(0, 1.5 * length / updates))
    elif mode == "save":
        skip = rng.randint(0, 2)
        for _ in range(skip + 1):
            wait_for(lambda: not saving(), process)
            wait_for(saving, process)
        time.sleep(rng.choice((0, rng.uniform(0, 0.03))))
    alive = process.poll() is None
    if alive:
        process.send_signal(signal.SIGKILL)
    process.wait()
    return alive and process.returncode == -signal.SIGKILL


def campaign(runner, argv, kills, seed, parent, say=print, keep=lambda figures: None):
    """Kill until `kills` kills have met a living process. Returns the figures, a dict; keep(figures) is called after each run."""
    rng = random.Random(seed)
    whole = os.path.join(parent, "whole")
    began = time.perf_counter()
    process = runner.start([*argv, "--out", whole])
    assert process.wait() == 0, process.output()
    length, wanted, updates = time.perf_counter() - began, trace(whole), len(rows(whole))
    figures = {"command": "python twosome.py " + " ".join(argv), "runs": 0, "kills": 0, "kills_by_moment": {"any": 0, "update": 0, "save": 0, "resume": 0},
               "left_half_written": 0, "lost": 0, "differing": 0, "torn_metrics": 0, "tracebacks": 0, "seconds": 0.0}
    while figures["kills"] < kills:
        folder = os.path.join(parent, f"killed{figures['runs']}")
        figures["runs"] += 1
        planned = [rng.choice(("any", "update", "update", "save", "save"))]
        while rng.random() < 0.75 and len(planned) < 6:
            planned.append(rng.choice(("resume", "update", "save")))
        outputs, problem = [], None
        for mode in [*planned, None]:
            started = os.path.lexists(os.path.join(folder, "config.json"))
            process = runner.start(["--resume", folder] if started else [*argv, "--out", folder])
            if mode is None:
                code = process.wait()
                outputs.append(process.output())
                if code:
                    problem = "lost"
                continue
            # "resume" is a kill soon after the one before: what a resume itself writes must be safe as well
            span = length if mode == "any" else 0.3 * length
            hit = kill_at(process, folder, "any" if mode == "resume" else mode, rng, updates, span if mode in ("any", "resume") else length)
            outputs.append(process.output())
            figures["kills"] += hit
            figures["kills_by_moment"][mode] += hit
            if os.path.isdir(folder):
                figures["left_half_written"] += any(name.startswith(".tmp-checkpoint") for name in os.listdir(folder))
                try:
                    rows(folder)
                except AssertionError as error:
                    figures["torn_metrics"] += 1
                    say(f"{folder}: {error}")
        found = {} if problem else trace(folder)
        odd = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        if found and odd:
            problem = "differing"
        if problem:
            figures[problem] += 1
            say(f"{folder}: {problem} in {odd} after {planned}: {outputs[-1][-500:]}")
        else:
            shutil.rmtree(folder)
        figures["tracebacks"] += sum("Traceback" in output for output in outputs)
        say(f"{figures['kills']} kills in {figures['runs']} runs: {figures['lost']} lost, {figures['differing']} differing")
        figures["seconds"] = round(time.perf_counter() - began, 1)
        keep(figures)
    return figures


def keep(figures, base):
    """Write the figures so far to base.json and base.md."""
    os.makedirs(os.path.dirname(base), exist_ok=True)
    with open(f"{base}.json", "w") as file:
        json.dump(figures, file, indent=2)
    with open(f"{base}.md", "w") as file:
        file.write(f"# Killed and resumed: `{figures['command']}`\n\n| figure | value |\n|---|---|\n")
        for key, value in figures.items():
            file.write(f"| {key.replace('_', ' ')} | {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value} |\n")


def main():
    """Run the campaign and write its results."""
    parser = argparse.ArgumentParser(description="kill and resume `python twosome.py --env overcooked`")
    parser.add_argument("--kills", type=int, default=60, help="kills that must meet a living process (60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (0)")
    parser.add_argument("--fork", action="store_true", help="fork runs from one process that has imported everything")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    runner = Fork() if options.fork else Command()
    argv = ["--env", "overcooked", "--num-envs", "4", "--rollout-steps", "16", "--minibatch", "32", "--steps", "1280", "--checkpoint-every", "3"]
    base = os.path.join(ROOT, "experiments", "results", "kill_campaign_fork" if options.fork else "kill_campaign")
    with tempfile.TemporaryDirectory() as parent:
        figures = campaign(runner, argv, options.kills, options.seed, parent, keep=lambda figures: keep(figures, base))
    runner.close()
    print(json.dumps(figures, indent=2))
    return int(figures["lost"] + figures["differing"] + figures["torn_metrics"] + figures["tracebacks"] > 0)


if __name__ == "__main__":
    sys.exit(main())
