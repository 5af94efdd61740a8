"""Learn the four tasks with seeds 1 to 5 and measure what the README says of learning; its figures of speed come from bench.py.

  python experiments/reproduce.py                       # everything; about half an hour on two cores
  python experiments/reproduce.py --seeds 1 --tasks tomato-salad --out /tmp/one
  python experiments/reproduce.py --report              # train nothing: evaluate the finished runs again and write the tables

Each run is the README's own command, `python twosome.py --env ... --task ... --seed ...`, in a process of its own on one core;
runs that are finished are kept, so a stopped campaign goes on where it was. Leaves learning.json, .md and .png in --out.
The settings were chosen on seeds above 100, never on 1 to 5.
"""
import argparse
import concurrent.futures
import functools
import json
import os
import subprocess
import sys

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import envs  # noqa: E402
import ppo  # noqa: E402
import runs  # noqa: E402
import twosome  # noqa: E402

TASKS = {"tomato-salad": "overcooked", "tomato-lettuce-salad": "overcooked", "food-preparation": "virtualhome", "entertainment": "virtualhome"}
UNSEEN = ("cheese", "hamburger", "apple-pie", "pizza", "washing-plate", "laundry")
RESULTS = os.path.join(ROOT, "experiments", "results")


def run_folder(task, seed):
    return os.path.join(ROOT, "runs", "reproduce", f"{task}-seed{seed}")


def learn(task, seed):
    """The README's command, unless its run is finished. Returns its exit code."""
    folder = run_folder(task, seed)
    if os.path.exists(os.path.join(folder, "summary.json")):
        return 0
    flags = ["--resume", folder] if os.path.exists(os.path.join(folder, "config.json")) else ["--env", TASKS[task], "--task", task, "--seed", str(seed), "--out", folder]
    command = [sys.executable, os.path.join(ROOT, "twosome.py"), *flags]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


class Random:
    """The uniformly random policy over the admissible actions, as an agent for ppo.evaluate."""

    def encode(self, obs, info):
        return len(twosome.describe(info)[1])

    def log_probs(self, items):
        return [torch.full((count,), -np.log(count)) for count in items]


@functools.cache
def prior(task, episodes=1000):
    """The untrained LLM and the random policy on a task: {"untrained": summary, "random": summary}."""
    config, *_ = twosome.arguments(["--env", TASKS.get(task, "virtualhome"), "--task", task])
    agent, make_env = twosome.build(config)
    play = lambda policy: twosome.summarize(ppo.evaluate(make_env, policy, episodes, twosome.EVALUATION_SEED, config.gamma))
    return {"untrained": play(agent), "random": play(Random())}


def transfer(source, seed, tasks, episodes=100):
    """A trained agent on tasks it never saw: {task: summary}."""
    folder = run_folder(source, seed)
    config = runs.fill(twosome.Config, runs.read_config(folder))
    agent, _ = twosome.build(config)
    runs.load(folder, agent)
    return {task: twosome.summarize(ppo.evaluate(lambda: envs.make("virtualhome", task=task, gamma=config.gamma), agent, episodes,
                                                 twosome.EVALUATION_SEED, config.gamma)) for task in tasks}


def across(values):
    """Mean of a few seeds with its 95 % interval from Student's t: (mean, half width)."""
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 1.96)
    return np.mean(values), t * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def tables(result):
    """The figures as markdown."""
    lines = ["| task | steps | return of seeds " + ", ".join(map(str, result["seeds"])) + " | mean ± 95 % | best possible | success | untrained LLM | random | seconds, one core |",
             "|---|---|---|---|---|---|---|---|---|"]
    for task, row in result["tasks"].items():
        mean, half = across(row["returns"])
        lines.append(f"| {task} | {row['steps']:,} | {', '.join(f'{value:.4f}' for value in row['returns'])} | {mean:.4f} ± {half:.4f} | {row['best']:.4f} | "
                     f"{np.mean(row['successes']):.1%} | {row['untrained']['return']:.3f} ({row['untrained']['success']:.1%}) | "
                     f"{row['random']['return']:.3f} ({row['random']['success']:.1%}) | {min(row['seconds'], default=float('nan')):.0f} to {max(row['seconds'], default=float('nan')):.0f} |")
    for source, rows in result["transfer"].items():
        lines += ["", f"| the {source} agent, untrained for | success of each seed | mean return | untrained LLM: success | return |", "|---|---|---|---|---|"]
        for task, row in rows.items():
            lines.append(f"| {task} | {', '.join(f'{value:.0%}' for value in row['successes'])} | {np.mean(row['returns']):.3f} | "
                         f"{row['untrained']['success']:.1%} | {row['untrained']['return']:.3f} |")
    return "\n".join(lines) + "\n"


def picture(result, path):
    """Return while learning, one panel a task, one line a seed."""
    import csv

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, len(result["tasks"]), figsize=(3.2 * len(result["tasks"]), 2.8), constrained_layout=True, squeeze=False)
    for panel, (task, row) in zip(panels[0], result["tasks"].items()):
        for seed in result["seeds"]:
            with open(os.path.join(run_folder(task, seed), "metrics.csv"), newline="") as file:
                points = [(int(line["steps"]), float(line["return"] or "nan")) for line in csv.DictReader(file)]
            panel.plot(*zip(*points), linewidth=1)
        panel.axhline(row["best"], color="black", linewidth=0.8, linestyle="--")
        panel.axhline(row["random"]["return"], color="grey", linewidth=0.8, linestyle=":")
        panel.set(title=task, xlabel="environment steps")
    panels[0][0].set_ylabel("return of the last 100 episodes")
    figure.suptitle("dashed: best possible; dotted: random policy; one line a seed", fontsize=9)
    figure.savefig(path, dpi=110)


def main():
    from tqdm import tqdm
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--report", action="store_true", help="train nothing; evaluate the finished runs again and write the tables")
    parser.add_argument("--out", default=RESULTS, help="folder of the tables and the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [(task, seed) for task in options.tasks for seed in options.seeds]
    if not options.report:
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for (task, seed), code in zip(jobs, tqdm(pool.map(lambda job: learn(*job), jobs), total=len(jobs), unit="run")):
                if code:
                    sys.exit(f"{task}, seed {seed}: exit code {code}; run it alone to see why: python twosome.py --env {TASKS[task]} --task {task} --seed {seed}")
    result = {"seeds": options.seeds, "tasks": {}, "transfer": {}}
    for task in options.tasks:
        try:
            summaries = [runs.read_json(os.path.join(run_folder(task, seed), "summary.json")) for seed in options.seeds]
        except runs.RunError as error:
            sys.exit(f"{task}: a seed's run is not finished ({error}); leave out --report")
        result["tasks"][task] = {"steps": summaries[0]["steps"], "best": summaries[0]["best_return"], "returns": [s["return"] for s in summaries],
                                 "successes": [s["success"] for s in summaries], "seconds": [s["seconds"] for s in summaries if not s["resumed"]], **prior(task)}
    for source, tasks in (("food-preparation", UNSEEN + ("entertainment",)), ("entertainment", UNSEEN + ("food-preparation",))):
        if source in options.tasks:
            seen = [transfer(source, seed, tasks) for seed in options.seeds]
            result["transfer"][source] = {task: {"returns": [each[task]["return"] for each in seen], "successes": [each[task]["success"] for each in seen], **prior(task)}
                                          for task in tqdm(tasks, desc=source, unit="task")}
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, "learning.json"), "wb") as file:
        file.write(runs.to_json(result, indent=1))
    with open(os.path.join(options.out, "learning.md"), "w") as file:
        file.write(tables(result))
    picture(result, os.path.join(options.out, "learning.png"))
    print(tables(result))


if __name__ == "__main__":
    main()
