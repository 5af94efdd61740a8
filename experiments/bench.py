"""Speed, measured side by side: the published way of TWOSOME against ours, in one run, in turn.

    python experiments/bench.py                   the first three below, on two free cores
    python experiments/bench.py --compare         every part and a whole PPO iteration, both ways
    python experiments/bench.py --profile         where the time of a default run goes
    python experiments/bench.py --processes       two processes against one
    python experiments/bench.py --model smollm2 --compare      the same with a real LLM
    python experiments/bench.py --shape 7b        --compare at LLaMA-7B's shape on a CUDA GPU

The published way is our own plain writing of it (class Published): one full sequence for each
action, those of a call as the rows of one padded batch; logits at every position and a float32
log-softmax over all of them; a pass of the whole LLM with the adapter off for the critic, in the
rollout and again in every minibatch; policy minibatches of 4, accumulated over 8; text tokenised
again each time; no result remembered or shared. It is kind where the paper leaves a choice: a
call's rows share one forward, and the critic's pass computes no logits. Both ways run in the same
ppo.PPO, from the same weights, on the same seeds and in the same number format; how far their
losses lie apart is written into the JSON file.

Axes: B prompts, A actions, S tokens, H hidden, V vocabulary, R rows.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import envs
import ppo
import twosome
from engine import command, models, processes, runs, trainer, watch
from experiments.measure import Clock, cost, machine, matmul_peak, timed

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
PUBLISHED_SIZES = trainer.Config(num_envs=4, rollout_steps=32, minibatch=32, epochs=1)
SHAPES = {  # random weights, made on the device; transformers' default LlamaConfig is LLaMA-7B's
    "7b": {},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1024}}


def load(shape="", model="pocket_lm", dtype="auto"):
    """Return an Agent of a model, or at a shape (a name in SHAPES, or sizes), on the best device.

    At a shape the tokenizer is the embedded model's: its ids fit any larger vocabulary, and it
    cuts a text into more tokens than LLaMA's own.
    """
    if not shape:
        return twosome.build(command.parse(["--model", model, "--dtype", dtype])[0])[0]
    torch.manual_seed(0)
    device = models.choose_device()
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.locate("pocket_lm"))
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**sizes),
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return twosome.Agent(made.eval().requires_grad_(False), tokenizer)


class Published(twosome.Agent):
    """The published way, on another agent's model, adapter and critic."""

    def __init__(self, agent):
        self.__dict__.update(agent.__dict__)
        self.samples = itertools.count()

    def describe(self, obs, info):
        """Make every sample an item of its own: nothing is shared."""
        return (*super().describe(obs, info), next(self.samples))

    def log_probs(self, items):
        """One row an action, R = the sum of the prompts' A; log-softmax over S x V of each row."""
        rows, starts = [], []
        for prompt, phrases, _ in items:  # past the memory: tokenised again
            ids, tails, _ = twosome.tokenize.__wrapped__(self.tokenizer, prompt, phrases)
            rows += [[*ids, *tail] for tail in tails]
            starts += [len(ids)] * len(tails)
        ids, mask = self.pad(rows)  # [R, S]
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        log_probs = logits.float().log_softmax(-1)  # [R, S, V]
        # Position i predicts token i + 1.
        tokens = log_probs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # [R, S - 1]
        columns = torch.arange(1, ids.shape[1], device=ids.device)
        action = columns >= torch.tensor(starts, device=ids.device)[:, None]
        joint = (tokens * (action & mask[:, 1:].bool())).sum(1)  # [R]
        policies = []
        parts = joint.split([len(phrases) for _, phrases, _ in items])
        for part, (_, phrases, _) in zip(parts, items, strict=True):
            words = [len(phrase.split()) for phrase in phrases]
            policies.append(twosome.normalize(part, None, words, "word"))
        return policies

    def values(self, items):
        """The whole LLM with the adapter off, for every item anew; then the MLP."""
        ids, mask = self.pad(twosome.encode(self.tokenizer, [prompt for prompt, *_ in items]))
        with torch.no_grad(), self.model.disable_adapter():
            hidden = models.text_model(self.model)(
                input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # [B, S, H]
        last = hidden[torch.arange(len(ids)), mask.sum(1) - 1]  # never [:, -1]: that is a pad
        return self.critic(last.float())[:, 0]

    def pad(self, rows):
        """Return ids and mask [R, S] of rows of token ids, padded on the right."""
        longest = max(map(len, rows))
        ids = [row + [0] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return (torch.tensor(ids, device=self.model.device),
                torch.tensor(mask, device=self.model.device))


# -----------------------------------------------------------------------------
# The published way against ours.


class Timed(trainer.Trainer):
    """A Trainer that keeps its last rollout, and what it cost."""

    def rollout(self):
        self.rollout_cost, self.last = cost(super().rollout, self.agent)
        return self.last


def fours(items):
    """Split into fours: a step of 4 environments, or a published micro-batch."""
    return [items[i:i + 4] for i in range(0, len(items), 4)]


class Pair:
    """Both ways on one agent: (ours, published) of each part that is timed."""

    def __init__(self, agent, task):
        self.agent, self.old = agent, Published(agent)
        self.task = task
        self.weights = agent.policy_parameters() + agent.value_parameters()
        self.start = [weight.detach().clone() for weight in self.weights]
        self.gaps = {}

    def trainers(self, config):
        """Make two trainers with the same settings, but for the published micro-batches of 4.

        There is no bound on the KL, so that no step is left out, and no penalty that holds the
        policy to its base, for the published scripts have none.
        """
        config = dataclasses.replace(config, target_kl=0.0, base_kl=0.0)
        made = []
        for way, parts in ((self.agent, config.gradient_accumulation),
                           (self.old, config.minibatch // 4)):
            settings = dataclasses.replace(config, gradient_accumulation=parts)
            made.append(Timed(lambda: envs.make("overcooked", task=self.task), way, settings, 1))
        return made

    def iterate(self, trainer, partner):
        """Run an iteration from the untrained weights, for only so do both meet the same states.

        Returns the costs of the whole, of its rollout and of its update.
        """
        with torch.no_grad():
            for weight, value in zip(self.weights, self.start, strict=True):
                weight.copy_(value)
        whole, trainer.metrics = cost(trainer.iterate, self.agent)
        if trainer.updates == partner.updates:  # both have done it: it must have come to the same
            for name in ("policy_loss", "value_loss", "entropy", "kl"):
                gap = abs(trainer.metrics[name] - partner.metrics[name])
                self.gaps[name] = max(gap, self.gaps.get(name, 0.0))
        return [whole, trainer.rollout_cost, whole - trainer.rollout_cost]

    def forward(self, way, batches):
        """Score batches of items without gradients."""
        self.agent.policy_changed()
        with torch.no_grad():
            for batch in batches:
                way.log_probs(batch)

    def backward(self, way, batches):
        """Score batches of items, and go back through the LLM."""
        for batch in batches:
            (torch.stack([row[0] for row in way.log_probs(batch)]).sum() / 32).backward()
        self.agent.model.zero_grad(set_to_none=True)

    def critic(self, way, met, forget=False):
        """Values of a rollout, and of its minibatches with the critic's gradient."""
        if forget and way is self.agent:
            self.agent.known.clear()
        with torch.no_grad():
            for batch in [met] if way is self.agent else fours(met):
                way.values(batch)
        for k in range(4):
            way.values(met[k::4]).sum().backward()
        self.agent.critic.zero_grad(set_to_none=True)

    def parts(self, default, prompts):
        """Return [(name, ours, published)]: functions of nothing, to be timed in turn.

        The parts named distinct take so many prompts, as a random walk meets them.
        """
        ours, old = self.agent, self.old
        both = self.trainers(PUBLISHED_SIZES)
        first, _ = self.trainers(PUBLISHED_SIZES)
        first.iterate()
        met = first.last.items  # T x N, time first, as an untrained policy comes upon them
        walk, _ = watch.random_walk(envs.make("overcooked", task=self.task), ours, 0.99)
        distinct = [*walk][:prompts]
        quarters = [met[k::4] for k in range(4)]
        # The published way takes items with a number of their own.
        alone, rolled = ([(*item, 0) for item in items] for items in (distinct, met))
        mine = self.trainers(default)
        sizes = (f"{default.num_envs} x {default.rollout_steps}, minibatch {default.minibatch},"
                 f" epochs {default.epochs}")
        return [
            (f"scoring {len(distinct)} distinct prompts",
             lambda: self.forward(ours, [distinct]), lambda: self.forward(old, fours(alone))),
            ("scoring the 128 of a rollout",
             lambda: self.forward(ours, fours(met)), lambda: self.forward(old, fours(rolled))),
            (f"with gradient, {len(distinct)} distinct prompts",
             lambda: self.backward(ours, [distinct]), lambda: self.backward(old, fours(alone))),
            ("with gradient, the 4 minibatches of a rollout",
             lambda: self.backward(ours, quarters), lambda: self.backward(old, fours(rolled))),
            ("critic, every prompt new",
             lambda: self.critic(ours, met, True), lambda: self.critic(old, rolled)),
            ("critic, prompts met before",
             lambda: self.critic(ours, met), lambda: self.critic(old, rolled)),
            ("PPO iteration, published sizes",
             lambda: self.iterate(*both), lambda: self.iterate(*both[::-1])),
            (f"PPO iteration, preset ({sizes})",
             lambda: self.iterate(*mine), lambda: self.iterate(*mine[::-1]))]


def rows_of(name, ways, agent, repeats, peak):
    """Time the ways of a part in turn, after one warm-up of each. Returns rows for the table."""
    memory = []
    for way in ways:
        if agent.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        way()
        on_gpu = agent.model.device.type == "cuda"
        memory.append(torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None)
    samples = []
    for _ in range(repeats):
        samples.append([])
        for way in ways:
            spent, inner = cost(way, agent)
            samples[-1].append(inner or [spent])
    costs = np.array(samples)  # [repeats, ways, columns, 3]
    rows = []
    for column, part in enumerate([name, "- its rollout", "- its update"][:costs.shape[2]]):
        seconds, tokens, flops = costs[:, :, column].transpose(2, 0, 1)  # each [repeats, ways]
        low, middle, high = np.quantile(seconds[:, -1] / seconds[:, 0], (0.25, 0.5, 0.75)).tolist()
        row = {"part": part, "repeats": repeats}
        if len(ways) > 1:
            row |= {"ratio": middle, "ratio_quartiles": [low, high]}
        for k, side in enumerate(("ours", "published")[:len(ways)]):
            row[side] = {"seconds": float(np.median(seconds[:, k])),
                         "tokens": int(np.median(tokens[:, k])), "memory_gb": memory[k],
                         "peak_share": float(np.median(flops[:, k] / seconds[:, k] / peak))}
        rows.append(row)
    return rows


HEADER = """| part | ours, ms | published, ms | times faster (quartiles) | tokens | matmul peak |
|---|---:|---:|---:|---:|---:|"""


def markdown(row):
    """Return a line of the table; tokens and shares of the peak are ours / published."""
    ours, published = row["ours"], row.get("published")
    if not published:
        return (f"| {row['part']} | {1e3 * ours['seconds']:.1f} | - | - | {ours['tokens']:,}"
                f" | {ours['peak_share']:.0%} |")
    low, high = row["ratio_quartiles"]
    return (f"| {row['part']} | {1e3 * ours['seconds']:.1f} | {1e3 * published['seconds']:.1f}"
            f" | {row['ratio']:.1f} ({low:.1f} to {high:.1f})"
            f" | {ours['tokens']:,} / {published['tokens']:,}"
            f" | {ours['peak_share']:.0%} / {published['peak_share']:.0%} |")


def compare(options):
    """Time every part both ways, print a row for each, write the table. Returns facts for JSON."""
    agent = load(options.shape, options.model, options.dtype)
    if options.threads:
        torch.set_num_threads(options.threads)
    peak = matmul_peak(agent.model.device, agent.model.dtype)
    flags = ["--preset", "hub"] if options.shape else ["--model", options.model]
    flags += options.flags.split()
    default = command.parse(["--task", options.task, *flags])[0]
    pair = Pair(agent, options.task)
    rows = []
    print(HEADER)
    for name, *ways in pair.parts(default, options.prompts):
        if options.part not in name:
            continue
        for row in rows_of(name, ways[:1 + (not options.ours)], agent, options.repeats, peak):
            rows.append(row)
            print(markdown(row), flush=True)
    if not rows:
        raise SystemExit(f"bench.py: no part has {options.part!r} in its name")
    with open(os.path.join(options.out, f"{options.name}.md"), "w") as file:
        file.write("\n".join([HEADER, *map(markdown, rows)]) + "\n")
    base = agent.model.get_base_model()
    return {"task": options.task, "flags": options.flags, "threads": torch.get_num_threads(),
            "dtype": str(base.dtype), "parameters": base.num_parameters(),
            "matmul_peak_gflops": peak / 1e9,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "largest_difference_of_metrics": pair.gaps, "rows": rows}


# -----------------------------------------------------------------------------
# Where the time goes.


@contextlib.contextmanager
def watching():
    """Yield a Clock over everything that trains: the model's passes, and what is around them."""
    clock = Clock()
    # Every pass of an LLM goes through PreTrainedModel's call, the backbone's inside the whole's.
    clock.watch(transformers.PreTrainedModel, "__call__", "model forward")
    clock.watch(torch.Tensor, "backward",
                lambda stack: "critic update" if "critic update" in stack else "model backward")
    for owner, name, label in (
            (twosome.Agent, "log_probs", "scoring around the model"),
            (twosome.Agent, "values", "critic MLP"),
            (twosome.Agent, "describe", "rendering"),
            (ppo, "act", "environments"), (ppo, "sample", "sampling"),
            (ppo.PPO, "rollout", "rollout, the rest"),
            (ppo.PPO, "critic_step", "critic update"),
            (ppo.PPO, "policy_gradient", "policy loss"), (ppo.PPO, "step", "optimisers"),
            (ppo.PPO, "update", "update, the rest"),
            (trainer.Trainer, "add_up", "adding up gradients"),
            (trainer, "gather", "exchange with the other processes"),
            (ppo, "evaluate", "evaluations, the rest"),
            (ppo.PPO, "iterate", "iteration, the rest"),
            (twosome, "build", "loading the model"),
            (runs.Run, "checkpoint", "checkpoints"), (runs.Run, "log", "metrics.csv")):
        clock.watch(owner, name, label)
    try:
        yield clock
    finally:
        clock.stop()


def profile(options):
    """Run twosome.py as a newcomer does, in a folder that is thrown away, under the clock."""
    steps = ["--steps", str(options.steps)] if options.steps else []
    with tempfile.TemporaryDirectory() as folder, watching() as clock:
        start = time.perf_counter()
        code = twosome.main(["--model", options.model, "--task", options.task,
                             "--out", os.path.join(folder, "run"), *steps])
        whole = time.perf_counter() - start
    if code:
        raise SystemExit(code)
    ordered = sorted(clock.spent.items(), key=lambda pair: -pair[1])
    shares = {label: spent / whole for label, spent in ordered}
    for label, share in shares.items():
        print(f"{share:7.1%}  {whole * share:7.1f} s  {label}")
    inside = shares["model forward"] + shares["model backward"]
    print(f"{inside:7.1%} of {whole:.0f} s inside the model's forward and backward passes")
    return {"task": options.task, "seconds": whole, "shares": shares, "inside_the_model": inside}


# -----------------------------------------------------------------------------
# Several processes.


def several(options):
    """Steps a second in one process on one core and in two on two, in turn; and where time goes."""
    facts = {}
    for task, iterations in (("tomato-salad", 6), ("tomato-lettuce-salad", 2)):
        if options.part not in task:
            continue
        pairs, parts = [], {1: [], 2: []}
        for _ in range(options.repeats):
            pairs.append([])
            for count in (1, 2):
                call = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc_per_node", str(count), os.path.abspath(__file__),
                        "--worker", str(iterations), "--task", task, "--model", options.model]
                done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"})
                said = json.loads(done.stdout.splitlines()[-1])
                pairs[-1].append(said["steps_per_second"])
                parts[count].append(said["milliseconds"])
        ratios = [two / one for one, two in pairs]
        print(f"{task}: two processes on two cores take {np.median(ratios):.2f} times the steps a"
              f" second of one on one ({min(ratios):.2f} to {max(ratios):.2f})")
        medians = {}
        for count, found in parts.items():
            medians[count] = {label: float(np.median([each.get(label, 0.0) for each in found]))
                              for label in found[0]}
        for label in sorted(medians[2], key=medians[2].get, reverse=True):
            print(f"{medians[1].get(label, 0.0):8.1f} {medians[2][label]:8.1f}  ms an iteration in"
                  f" one process and in the first of two: {label}")
        facts[task] = {"steps_per_second": pairs, "ratio": float(np.median(ratios)),
                       "ratios": ratios, "milliseconds_of_one": medians[1],
                       "milliseconds_of_the_first_of_two": medians[2]}
    return facts


def worker(options):
    """Be one of `several`'s processes: train so many iterations after a first, and say the pace."""
    rank = processes.join()
    config = command.parse(["--task", options.task, "--model", options.model,
                            "--device", "cpu"])[0]
    agent, make_env = twosome.build(config)
    learner = trainer.Trainer(make_env, agent, config, config.seed)
    learner.iterate()
    with watching() as clock:
        seconds = [timed(learner.iterate, agent.model.device)[0] for _ in range(options.worker)]
    spent = {label: 1e3 * each / options.worker for label, each in clock.spent.items()}
    pace = config.num_envs * config.rollout_steps / np.median(seconds)
    if rank == 0:
        print(json.dumps({"steps_per_second": pace, "milliseconds": spent}))
    processes.leave()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--compare", action="store_true", help="the published way against ours")
    parser.add_argument("--profile", action="store_true", help="where a default run's time goes")
    parser.add_argument("--processes", action="store_true", help="two processes against one")
    parser.add_argument("--shape", default="", choices=("", *SHAPES),
                        help="compare at this shape, with random weights")
    parser.add_argument("--model", default="pocket_lm", help="as twosome.py's --model")
    parser.add_argument("--dtype", default="auto", help="as twosome.py's --dtype")
    parser.add_argument("--task", default="tomato-salad", help="a task of Overcooked")
    parser.add_argument("--ours", action="store_true", help="of --compare: our way alone")
    parser.add_argument("--flags", default="", help="of --compare: more flags of twosome.py, as"
                        " --flags='--num-envs 16'")
    parser.add_argument("--prompts", type=int, default=32, help="of --compare: how many the"
                        " parts named distinct take")
    parser.add_argument("--part", default="", help="of --compare and"
                        " --processes: parts, or tasks, whose name has this")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each part")
    parser.add_argument("--steps", type=int, default=0, help="of --profile; 0: the preset's")
    parser.add_argument("--threads", type=int, default=0, help="of --compare; 0: as twosome.py")
    parser.add_argument("--out", default=RESULTS, help="folder of the results")
    parser.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return worker(options)
    os.makedirs(options.out, exist_ok=True)
    work = {"compare": compare, "profile": profile, "processes": several}
    chosen = [kind for kind in work if getattr(options, kind)]
    usual = "" if options.model == "pocket_lm" else f"-{os.path.basename(options.model)}"
    usual += "" if options.dtype == "auto" else f"-{options.dtype}"
    usual += f"-{options.task}" if options.task != "tomato-salad" else ""
    usual += "".join(f"-{word}" for word in options.part.split()) + "-ours" * options.ours
    for kind in chosen or (["compare"] if options.shape else list(work)):
        options.name = kind + usual + (f"-{options.shape}" if options.shape else "")
        before = machine()
        facts = work[kind](options)
        with open(os.path.join(options.out, f"{options.name}.json"), "w") as file:
            json.dump({"machine": before, "load_after": machine()["load"], **facts}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
