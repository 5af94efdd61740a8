"""Speed, measured side by side: the published way of TWOSOME (arXiv 2401.14151) against ours, in one run, in turn.

  python experiments/bench.py                   # the first three, about six minutes on two cores; tables and JSON in results/
  python experiments/bench.py --compare         # every part and a whole PPO iteration, both ways
  python experiments/bench.py --profile         # where the time of a default run goes
  python experiments/bench.py --processes       # two processes against one
  python experiments/bench.py --cost-model      # how an iteration's cost grows, and with what (cost_model.py)
  python experiments/bench.py --shape 7b        # --compare at LLaMA-7B's shape in bfloat16, on a CUDA GPU

The published way is our own plain writing of it (class Published): one full sequence an action, those of a call's prompts as
the rows of one padded batch; logits at every position and a float32 log-softmax over all of them; a pass of the whole LLM with
the adapter off for the critic, in the rollout and again in every value minibatch; policy minibatches of 4 accumulated over 8;
text tokenised again each time; no prompt's result remembered or shared. It is kind where the paper leaves a choice: a call's
rows share one forward, the critic's pass computes no logits and keeps no gradients. Both ways run in the same ppo.PPO, from the
same weights, on the same seeds; how far the losses that both end an iteration with lie apart is written into the JSON file.

Axes: B prompts, A actions, S tokens of a sequence, H hidden, V vocabulary, L layers, R rows.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import envs  # noqa: E402
import models  # noqa: E402
import ppo  # noqa: E402
import runs  # noqa: E402
import scoring  # noqa: E402
import twosome  # noqa: E402
from measure import Clock, Count, cost, machine, matmul_peak, timed  # noqa: E402

RESULTS = os.path.join(ROOT, "experiments", "results")
PUBLISHED_SIZES = ppo.Config(num_envs=4, rollout_steps=32, minibatch=32, epochs=1)
SHAPES = {"7b": {}}  # random weights, made on the device. transformers' default LlamaConfig is LLaMA-7B's
SHAPES["tiny"] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=1024)


def load(shape="", model="pocket_lm"):
    """An Agent at a shape (a name in SHAPES, or sizes) with random weights, bfloat16 on a GPU; or of a model, as twosome.py builds it."""
    if not shape:
        return twosome.build(twosome.arguments(["--model", model])[0])[0]
    torch.manual_seed(0)
    device = models.choose_device()
    # The tokenizer is the embedded model's: its ids fit any larger vocabulary, and it cuts a text in more tokens than LLaMA's own.
    tokenizer = transformers.AutoTokenizer.from_pretrained(twosome.model_path(model))
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**(SHAPES[shape] if isinstance(shape, str) else shape)), dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return twosome.Agent(made.eval().requires_grad_(False), tokenizer)


class Published(twosome.Agent):
    """The published way, on another agent's model, adapter and critic: see the module's docstring."""

    def __init__(self, agent):
        self.__dict__.update(agent.__dict__)
        self.samples = itertools.count()

    def encode(self, obs, info):
        """Every sample is an item of its own: ppo.PPO computes equal items once."""
        return (*super().encode(obs, info), next(self.samples))

    def log_probs(self, items):
        """One row an action, R = the sum of the prompts' A; logits of all positions, log-softmax over S x V of every row."""
        rows, starts = [], []
        for prompt, phrases, *_ in items:
            ids, tails = scoring.tokenize.__wrapped__(self.tokenizer, prompt, phrases)  # past the memory: tokenised again
            rows += [[*ids, *tail] for tail in tails]
            starts += [len(ids)] * len(tails)
        ids, mask = self.pad(rows)  # [R, S]
        log_probs = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)  # [R, S, V]
        tokens = log_probs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # [R, S - 1]: position i predicts token i + 1
        columns, start = torch.arange(1, ids.shape[1], device=ids.device), torch.tensor(starts, device=ids.device)[:, None]
        joint = (tokens * ((columns >= start) & mask[:, 1:].bool())).sum(1).split([len(phrases) for _, phrases, *_ in items])
        return [scoring.normalize(row, None, [len(phrase.split()) for phrase in phrases], "word") for row, (_, phrases, *_) in zip(joint, items)]

    def values(self, items):
        """The whole LLM with the adapter off, for every item anew; then the MLP."""
        ids, mask = self.pad(scoring.encode(self.tokenizer, [prompt for prompt, *_ in items]))
        with torch.no_grad(), self.model.disable_adapter():
            hidden = self.model.get_base_model().base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # [B, S, H]
        return self.critic(hidden[torch.arange(len(ids)), mask.sum(1) - 1].float())[:, 0]

    def pad(self, rows):
        longest = max(map(len, rows))
        return (torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.device),
                torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.model.device))


# ---------------------------------------------------------------------------------------------------------------------
# The published way against ours

class Timed(ppo.PPO):
    """A PPO that keeps its last rollout, and what it cost."""

    def rollout(self):
        self.rollout_cost, self.last = cost(super().rollout, self.agent)
        return self.last


def compare(options):
    """Time every part both ways, in turn; print a row for each and write the table. Returns JSON-able facts."""
    agent, task, repeats = load(options.shape, options.model), options.task, options.repeats
    torch.set_num_threads(options.threads) if options.threads else None
    device, old = agent.model.device, Published(agent)
    peak, make_env = matmul_peak(device, agent.model.dtype), lambda: envs.make("overcooked", task=task)
    weights = agent.policy_parameters() + agent.value_parameters()
    start, gaps = [weight.detach().clone() for weight in weights], {}
    fours = lambda items: [items[i:i + 4] for i in range(0, len(items), 4)]  # a step of 4 environments; a published micro-batch

    def trainers(config):
        """Two trainers with the same settings, but for the published micro-batches of 4; no KL bound, so that no step is left out."""
        config = dataclasses.replace(config, target_kl=0.0)
        return [Timed(make_env, way, dataclasses.replace(config, gradient_accumulation=parts), seed=1)
                for way, parts in ((agent, 1), (old, config.minibatch // 4))]

    def iterate(trainer, partner):
        """One iteration from the untrained weights, for only so do both ways meet the same states: its cost, its rollout's, its update's."""
        with torch.no_grad():
            for weight, value in zip(weights, start):
                weight.copy_(value)
        whole, trainer.metrics = cost(trainer.iterate, agent)
        if trainer.updates == partner.updates:  # both have done it: it must have come to the same
            gaps.update({name: max(abs(trainer.metrics[name] - partner.metrics[name]), gaps.get(name, 0.0)) for name in ("policy_loss", "value_loss", "entropy", "kl")})
        return [whole, trainer.rollout_cost, whole - trainer.rollout_cost]

    both = trainers(PUBLISHED_SIZES)
    iterate(*both), iterate(*both[::-1])  # warms both up, and meets the first prompts
    met = both[0].last.items  # T x N, time first, as an untrained policy comes upon them
    distinct = list(dict.fromkeys(met))[:32]
    minibatches = [met[i::4] for i in range(4)]

    def forward(way, batches):
        agent.policy_changed()
        with torch.no_grad():
            for batch in batches:
                way.log_probs(batch)

    def backward(way, batches):
        for batch in batches:
            (torch.stack([row[0] for row in way.log_probs(batch)]).sum() / 32).backward()
        agent.model.zero_grad(set_to_none=True)

    def critic(way, forget):
        agent._features.clear() if forget and way is agent else None
        with torch.no_grad():
            for batch in [met] if way is agent else fours(met):  # ours asks for values once a rollout
                way.values(batch)
        for batch in minibatches:
            way.values(batch).sum().backward()
        agent.critic.zero_grad(set_to_none=True)

    parts = [
        (f"scoring {len(distinct)} distinct prompts, 4 a call", lambda: forward(agent, fours(distinct)), lambda: forward(old, fours(distinct))),
        (f"scoring {len(distinct)} distinct prompts, ours in one call", lambda: forward(agent, [distinct]), lambda: forward(old, fours(distinct))),
        ("scoring the 128 of a rollout", lambda: forward(agent, fours(met)), lambda: forward(old, fours(met))),
        (f"with gradient, {len(distinct)} distinct prompts", lambda: backward(agent, [distinct]), lambda: backward(old, fours(distinct))),
        ("with gradient, the 4 minibatches of a rollout", lambda: backward(agent, minibatches), lambda: backward(old, fours(met))),
        ("critic, every prompt new", lambda: critic(agent, True), lambda: critic(old, True)),
        ("critic, prompts met before", lambda: critic(agent, False), lambda: critic(old, False)),
        ("PPO iteration, published sizes", lambda: iterate(*both), lambda: iterate(*both[::-1])),
    ]
    if not options.shape:
        config = twosome.arguments(["--env", "overcooked", "--task", task])[0]
        mine = trainers(config)
        parts.append((f"PPO iteration, defaults ({config.num_envs} x {config.rollout_steps}, minibatch {config.minibatch}, epochs {config.epochs})",
                      lambda: iterate(*mine), lambda: iterate(*mine[::-1])))
    print(HEADER)
    rows = []
    for name, *ways in parts:
        memory = []
        for way in ways:  # warms both up
            torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
            way()
            memory.append(torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None)
        costs = np.array([[(parts or [spent]) for spent, parts in (cost(way, agent) for way in ways)] for _ in range(repeats)])  # in turn
        for column, part in enumerate([name, "- its rollout", "- its update"][:costs.shape[2]]):
            seconds, tokens, flops = costs[:, :, column].transpose(2, 0, 1)  # each [repeats, ways]
            quartiles = np.quantile(seconds[:, 1] / seconds[:, 0], (0.25, 0.5, 0.75)).tolist()
            row = {"part": part, "ratio": quartiles[1], "ratio_quartiles": quartiles[::2], "repeats": repeats}
            for way, side in enumerate(("ours", "published")):
                row[side] = {"seconds": float(np.median(seconds[:, way])), "tokens": int(np.median(tokens[:, way])),
                             "peak_share": float(np.median(flops[:, way] / seconds[:, way] / peak)), "memory_gb": memory[way]}
            rows.append(row)
            print(markdown(row), flush=True)
    with open(os.path.join(options.out, f"compare{'-' * bool(options.shape)}{options.shape}.md"), "w") as file:
        file.write("\n".join([HEADER, *map(markdown, rows)]) + "\n")
    return {"task": task, "threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in agent.model.get_base_model().parameters()), "dtype": str(agent.model.dtype),
            "matmul_peak_gflops": peak / 1e9, "largest_difference_of_metrics": gaps, "rows": rows}


HEADER = """| part | ours, ms | published, ms | times faster (quartiles) | tokens ours / published | matmul peak reached | peak memory |
|---|---:|---:|---:|---:|---:|---:|"""


def markdown(row):
    """A line of the table."""
    ours, published = row["ours"], row["published"]
    tokens, share, memory = ([form.format(side[key]) for side in (ours, published)] for key, form in (
        ("tokens", "{:,}"), ("peak_share", "{:.0%}"), ("memory_gb", "{:.0f} GB" if ours["memory_gb"] else "-")))  # a GPU's alone
    return (f"| {row['part']} | {1e3 * ours['seconds']:.1f} | {1e3 * published['seconds']:.1f} | {row['ratio']:.1f}"
            f" ({row['ratio_quartiles'][0]:.1f} to {row['ratio_quartiles'][1]:.1f}) | {' / '.join(tokens)} | {' / '.join(share)} | {' / '.join(memory)} |")


# ---------------------------------------------------------------------------------------------------------------------
# Where the time goes

@contextlib.contextmanager
def watching():
    """A Clock over everything that trains: the model's passes, and what is left over around them."""
    clock = Clock()
    base = transformers.PreTrainedModel  # every pass of an LLM goes through its __call__, the backbone's inside the whole
    clock.watch(base, "__call__", "model forward")
    clock.watch(torch.Tensor, "backward", lambda stack: "critic update" if "critic update" in stack else "model backward")
    for owner, name, label in (
            (twosome.Agent, "log_probs", "scoring around the model"), (twosome.Agent, "values", "critic MLP"),
            (twosome.Agent, "encode", "rendering"), (ppo, "act", "environments"), (ppo, "sample", "sampling"), (ppo.PPO, "rollout", "rollout, the rest"),
            (ppo.PPO, "critic_step", "critic update"), (ppo.PPO, "policy_gradient", "policy loss"), (ppo.PPO, "step", "optimisers"),
            (ppo.PPO, "update", "update, the rest"), (ppo, "gather", "exchange between processes"),
            (ppo, "evaluate", "final evaluation, the rest"), (ppo.PPO, "iterate", "iteration, the rest"), (twosome, "build", "loading the model"),
            (runs.Run, "checkpoint", "checkpoints"), (runs.Run, "log", "metrics.csv")):
        clock.watch(owner, name, label)
    try:
        yield clock
    finally:
        clock.stop()


def profile(options):
    """Run `twosome.py` as a newcomer does, in a folder that is thrown away, under the clock."""
    with tempfile.TemporaryDirectory() as folder, watching() as clock:
        start = time.perf_counter()
        code = twosome.main(["--model", options.model, "--task", options.task, "--out", os.path.join(folder, "run")]
                            + (["--steps", str(options.steps)] if options.steps else []))
        whole = time.perf_counter() - start
    if code:
        raise SystemExit(code)
    shares = {label: spent / whole for label, spent in sorted(clock.spent.items(), key=lambda pair: -pair[1])}
    for label, share in shares.items():
        print(f"{share:7.1%}  {whole * share:7.1f} s  {label}")
    inside = shares["model forward"] + shares["model backward"]
    print(f"{inside:7.1%} of {whole:.0f} s inside the model's forward and backward passes")
    return {"task": options.task, "seconds": whole, "shares": shares, "inside_the_model": inside}


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

def processes(options):
    """Steps a second of PPO iterations in one process on one core and in two on two, in turn; and where the time of both goes."""
    facts = {}
    for task, iterations in (("tomato-salad", 6), ("tomato-lettuce-salad", 2)):  # the second is five times the work
        pairs, parts = [], {1: [], 2: []}
        for _ in range(options.repeats):
            pairs.append([])
            for count in (1, 2):
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), os.path.abspath(__file__),
                           "--worker", str(iterations), "--task", task, "--model", options.model]
                done = subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
                said = json.loads(done.stdout.splitlines()[-1])
                pairs[-1].append(said["steps_per_second"])
                parts[count].append(said["milliseconds"])
        ratios = [two / one for one, two in pairs]
        print(f"{task}: two processes on two cores take {np.median(ratios):.2f} times the steps a second of one on one ({min(ratios):.2f} to {max(ratios):.2f})")
        one, two = ({label: float(np.median([each.get(label, 0.0) for each in runs])) for label in runs[0]} for runs in parts.values())
        for label in sorted(two, key=two.get, reverse=True):  # waiting for the others' gradients is in "update, the rest"
            print(f"{one.get(label, 0.0):8.1f} {two[label]:8.1f}  ms an iteration in one process and in the first of two: {label}")
        facts[task] = {"steps_per_second": pairs, "ratio": float(np.median(ratios)), "ratios": ratios, "milliseconds_of_one": one, "milliseconds_of_the_first_of_two": two}
    return facts


def worker(options):
    """One of `processes`' processes: train so many iterations after a first; say the median of steps a second and where the time went."""
    twosome.join_processes()
    config = twosome.arguments(["--task", options.task, "--model", options.model, "--device", "cpu"])[0]
    agent, make_env = twosome.build(config)
    trainer = ppo.PPO(make_env, agent, config, config.seed)
    trainer.iterate()
    with watching() as clock:
        seconds = [timed(trainer.iterate, agent.model.device)[0] for _ in range(options.worker)]
    spent = {label: 1e3 * each / options.worker for label, each in clock.spent.items()}
    print(json.dumps({"steps_per_second": config.num_envs * config.rollout_steps / np.median(seconds), "milliseconds": spent}))  # the first's: the others are silent
    twosome.part()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--compare", action="store_true", help="the published way against ours")
    parser.add_argument("--profile", action="store_true", help="where the time of a default run goes")
    parser.add_argument("--processes", action="store_true", help="two processes against one")
    parser.add_argument("--cost-model", action="store_true", help="what an iteration's cost grows with")
    parser.add_argument("--shape", default="", choices=("", *SHAPES), help="compare at this shape, with random weights")
    parser.add_argument("--model", default="pocket_lm", help="the model measured, as twosome.py's --model")
    parser.add_argument("--task", default="tomato-salad", help="a task of Overcooked")
    parser.add_argument("--repeats", type=int, default=3, help="times that each part is measured")
    parser.add_argument("--steps", type=int, default=0, help="environment steps of --profile; 0: the default run's")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads when comparing; 0: as twosome.py chooses")
    parser.add_argument("--out", default=RESULTS, help="folder of the results")
    parser.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return worker(options)
    os.makedirs(options.out, exist_ok=True)
    chosen = [name for name in ("compare", "profile", "processes", "cost_model") if getattr(options, name)]
    for kind in chosen or (["compare"] if options.shape else ["compare", "profile", "processes"]):
        before = machine()
        if kind == "cost_model":
            import cost_model  # it imports this module
            facts = cost_model.measure(options)
        else:
            facts = {"compare": compare, "profile": profile, "processes": processes}[kind](options)
        name = kind + (f"-{options.shape}" if options.shape else "")
        with open(os.path.join(options.out, f"{name}.json"), "w") as file:
            json.dump({"machine": before, "load_after": machine()["load"], **facts}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
