"""What one sees of a run: its report, its curves and its episodes. Nothing here changes a run."""
import csv
import io
import os
import sys
import time

import numpy as np

import ppo
from engine import models, processes, runs
from engine.command import COLUMNS, bar, evaluation_line, measure, say, title

# -----------------------------------------------------------------------------
# The report of a run.


class Report:
    """What a run prints and writes while it trains, by its first process alone."""

    def __init__(self, config, run, learner, make_env):
        """Take what is reported on; `learner` is the Trainer."""
        self.config, self.run, self.trainer, self.make_env = config, run, learner, make_env
        self.best = getattr(make_env(), "best_return", None)
        self.first = learner.rank == 0
        self.clocks = time.perf_counter(), time.process_time()

    def spend(self):
        """Add the seconds since the last call to the run's, which a resume goes on counting."""
        now = time.perf_counter(), time.process_time()
        self.run.seconds += now[0] - self.clocks[0]
        self.run.cpu_seconds += now[1] - self.clocks[1]
        self.clocks = now

    def begin(self, agent):
        """Say what will be learnt, and log row 0: the untrained policy, measured."""
        if not self.first:
            return
        config = self.config
        say(f"{config.env}: {title(config)}, {config.norm} normalisation, seed {config.seed}"
            f" -> {self.run.folder}")
        trees = [agent.tree(item) for item in dict.fromkeys(some_items(self.make_env(), agent))]
        samples = config.minibatch // config.gradient_accumulation
        say(models.preflight(agent.model, trees, samples, [agent.critic])[1])
        if not self.trainer.updates:
            untrained = measure(self.make_env, agent, config)
            self.log({"update": 0, "steps": 0, **untrained})
            say(f"untrained  return {untrained['return']:.3f}, success {untrained['success']:.0%}")

    def __enter__(self):
        """Open the progress bar."""
        steps = self.config.num_envs * self.config.rollout_steps
        self.bar = bar(self.trainer.total_updates * steps, "step", initial=self.trainer.steps,
                       disable=not self.first)
        return self

    def __exit__(self, *error):
        """Close the progress bar."""
        self.bar.close()

    def log(self, metrics):
        """Write a row of metrics.csv and move the progress bar."""
        self.spend()
        row = {**dict.fromkeys(COLUMNS, float("nan")), **metrics,
               "seconds": round(self.run.seconds, 2), "cpu_seconds": round(self.run.cpu_seconds, 2)}
        self.run.log({name: row[name] for name in COLUMNS})
        if row["update"]:
            best = f" of {self.best:.3f}" if self.best is not None else ""
            self.bar.set_postfix_str(
                f"update {row['update']}, return {row['return']:.3f}{best}, success"
                f" {row['success']:.0%}, entropy {row['entropy']:.2f}", refresh=False)
            self.bar.update(self.trainer.steps - self.bar.n)

    def checkpoint(self, agent):
        """Write a checkpoint, and draw the curve as far as it goes."""
        self.spend()
        self.run.checkpoint(agent, self.trainer)
        if self.first:
            draw_curve(self.run.folder)

    def stopped(self, code):
        """Say how to go on after a signal. Returns the exit code."""
        processes.leave()
        if self.first:
            say(f"stopped after update {self.trainer.updates} of {self.trainer.total_updates};"
                f" go on with: {runs.again(self.run.folder)}")
        return code

    def finish(self, agent):
        """Evaluate the trained agent, and leave the files of a finished run. Returns 0."""
        folder, config = self.run.folder, self.config
        if not self.first:
            return 0
        if os.path.exists(self.run.path("summary.json")):
            say(f"{folder} is finished: nothing is left to do")
        else:
            result = measure(self.make_env, agent, config)
            self.spend()
            self.run.write("summary.json", {
                "env": config.env, "task": config.task, "model": config.model, "norm": config.norm,
                "seed": config.seed, "steps": self.trainer.steps, **result, "best": self.best,
                "primitive_steps": self.trainer.episodes.primitive_steps,
                "seconds": self.run.seconds, "cpu_seconds": self.run.cpu_seconds})
            say(evaluation_line("trained", result, self.best))
        draw_curve(folder)
        quoted = runs.quote(folder)
        say(f"{quoted}: metrics.csv, curve.png, summary.json, checkpoint-*\n"
            f"next: python twosome.py --watch {quoted}\n"
            f"      python twosome.py --eval {quoted} --task all")
        return 0


def some_items(env, agent, steps=200):
    """Return the items that a random walk meets: what training will take is told from these."""
    rng = np.random.default_rng(0)
    obs, info = env.reset(seed=0)
    items = []
    for _ in range(steps):
        items.append(agent.describe(obs, info))
        obs, _, done, cut, info = ppo.act(env, info, int(rng.integers(len(items[-1][1]))))
        if done or cut:
            obs, info = env.reset()
    return items


# -----------------------------------------------------------------------------
# Curves.


def draw_curve(folder):
    """Draw a run's metrics.csv into its curve.png. A picture that fails never fails the run."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window system is touched
        with open(os.path.join(folder, "metrics.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        steps = [float(row["steps"]) for row in rows]
        for name in ("return", "success"):
            axes.plot(steps, [float(row[name]) for row in rows], label=name)
        axes.set(xlabel="macro-actions", title=os.path.basename(os.path.abspath(folder)))
        axes.legend()
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150)
        runs.write_bytes(os.path.join(folder, ".tmp-curve.png"), data.getvalue())
        os.replace(os.path.join(folder, ".tmp-curve.png"), os.path.join(folder, "curve.png"))
    except Exception as error:
        print(f"no curve.png: {error}", file=sys.stderr)
