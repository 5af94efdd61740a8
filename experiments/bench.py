"""Speed, measured side by side: the published way of TWOSOME (arXiv 2401.14151) against ours, in one run, in turn.

  python experiments/bench.py                   # every part and a whole PPO iteration, both ways -> results/bench.md, .json
  python experiments/bench.py --profile         # where the time of a default run goes            -> results/profile.json
  python experiments/bench.py --cost-model      # how an iteration's cost grows (cost_model.py)   -> results/cost_model.png, .json
  python experiments/bench.py --processes       # two processes against one                       -> results/processes.json
  python experiments/bench.py --shape 7b        # LLaMA-7B's shape in bfloat16, on a CUDA GPU      -> results/bench-7b.md, .json

The published way is our own plain writing of it (class Published): one full sequence an action, those of a call's prompts as
the rows of one padded batch; logits at every position and a float32 log-softmax over all of them; a pass of the whole LLM with
the adapter off for the critic, in the rollout and again in every value minibatch; policy minibatches of 4 accumulated over 8;
text tokenised again each time; no prompt's result remembered or shared. It is kind where the paper leaves a choice: a call's
rows share one forward, the critic's pass computes no logits and keeps no gradients. Both ways run in the same ppo.PPO, from the
same weights, on the same seeds; that both end an iteration with the same losses is checked and written into the JSON file.

Axes: B prompts, A actions, S tokens of a sequence, H hidden, V vocabulary, L layers, R rows.
"""
import argparse
import contextlib
import csv
import dataclasses
import json
import os
import platform
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
import scoring  # noqa: E402
import twosome  # noqa: E402

RESULTS = os.path.join(ROOT, "experiments", "results")
PUBLISHED_SIZES = ppo.Config(num_envs=4, rollout_steps=32, minibatch=32, epochs=1)
SHAPES = {  # random weights, made on the device; "" loads --model instead
    "7b": dict(),  # transformers' default LlamaConfig is LLaMA-7B's
    "tiny": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=1024),
}


class Published(twosome.Agent):
    """The published way, on another agent's model, adapter and critic: see the module's docstring."""

    def __init__(self, agent):
        self.__dict__.update(agent.__dict__)

    def log_probs(self, items):
        """One row an action, R = the sum of the prompts' A; logits of all positions, log-softmax over S x V of every row."""
        rows, starts = [], []
        for prompt, phrases in items:
            ids, tails = scoring.tokenize.__wrapped__(self.tokenizer, prompt, phrases)  # past the memory: tokenised again
            rows += [[*ids, *tail] for tail in tails]
            starts += [len(ids)] * len(tails)
        ids, mask = self.pad(rows)  # [R, S]
        log_probs = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)  # [R, S, V]
        tokens = log_probs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # [R, S - 1]: position i predicts token i + 1
        columns, start = torch.arange(1, ids.shape[1], device=ids.device), torch.tensor(starts, device=ids.device)[:, None]
        joint = (tokens * ((columns >= start) & mask[:, 1:].bool())).sum(1).split([len(phrases) for _, phrases in items])
        return [scoring.normalize(row, None, [len(phrase.split()) for phrase in phrases], "word") for row, (_, phrases) in zip(joint, items)]

    def values(self, items):
        """The whole LLM with the adapter off, for every item anew; then the MLP."""
        ids, mask = self.pad(scoring.encode(self.tokenizer, [prompt for prompt, _ in items]))
        with torch.no_grad(), self.model.disable_adapter():
            hidden = self.model.get_base_model().base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # [B, S, H]
        return self.critic(hidden[torch.arange(len(ids)), mask.sum(1) - 1].float())[:, 0]

    def pad(self, rows):
        longest = max(map(len, rows))
        return (torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.device),
                torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.model.device))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def load(shape="", model="pocket_lm"):
    """An Agent at a shape (a name in SHAPES, or sizes) with random weights, bfloat16 on a GPU; or with the model of that name or path."""
    torch.manual_seed(0)
    device = models.choose_device()
    path = os.path.join(ROOT, model) if model == "pocket_lm" else model
    if not shape:
        return twosome.Agent(*models.load(path, device=str(device)))
    # The tokenizer is the embedded model's: its ids fit any larger vocabulary, and it cuts a text in more tokens than LLaMA's own.
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**(SHAPES[shape] if isinstance(shape, str) else shape)), dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return twosome.Agent(made.eval().requires_grad_(False), tokenizer)


def timed(work, device):
    """(wall seconds of work(), what it returned), the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def matmul_peak(device, dtype):
    """FLOP/s of the best square matrix product: the most that this machine gives any model."""
    best = 0
    for n in (4096, 8192, 16384) if device.type == "cuda" else (256, 512, 1024, 1536):
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        a @ b
        best = max(best, 2 * n ** 3 / min(timed(lambda: a @ b, device)[0] for _ in range(20)))
    return best


class Count:
    """Counts, while it is entered, what goes through an agent's LLM: tokens computed (pads too), calls, FLOPs.

    A token costs 2 FLOPs a weight of the L layers, a logit row 2 H V, and attention 4 H L for each earlier position of its
    sequence. Backwards, frozen weights need the gradient of their input alone: as much again; attention needs it twice.
    """

    def __init__(self, agent):
        self.model, config = agent.model.get_base_model(), agent.model.config.get_text_config()
        self.layer_weights = sum(p.numel() for name, p in self.model.named_parameters() if ".layers." in name and p.dim() == 2)
        self.attention = 4 * config.hidden_size * config.num_hidden_layers
        self.row = 2 * config.hidden_size * config.vocab_size

    def __enter__(self):
        self.tokens = self.calls = self.flops = 0
        self.hooks = [self.model.get_input_embeddings().register_forward_pre_hook(self.body),
                      self.model.get_output_embeddings().register_forward_pre_hook(self.head)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def body(self, module, args):
        (B, S), grad = args[0].shape, torch.is_grad_enabled()
        self.calls, self.tokens = self.calls + 1, self.tokens + B * S
        self.flops += (2 if grad else 1) * 2 * self.layer_weights * B * S + (3 if grad else 1) * self.attention * B * S * (S + 1) // 2

    def head(self, module, args):
        self.flops += (2 if torch.is_grad_enabled() else 1) * self.row * args[0].shape[:-1].numel()


def cost(work, agent):
    """(np.array([seconds, tokens, FLOPs]) of work(), what it returned). Counting takes two calls of Python a forward."""
    with Count(agent) as count:
        seconds, result = timed(work, agent.model.device)
    return np.array([seconds, count.tokens, count.flops]), result


class Clock:
    """Splits the time of a run by what is running: time inside a watched function that no other watched one accounts for."""

    def __init__(self):
        self.spent, self.stack, self.last, self.undo = {}, ["rest"], time.perf_counter(), []

    def switch(self):
        now = time.perf_counter()
        self.spent[self.stack[-1]] = self.spent.get(self.stack[-1], 0.0) + now - self.last
        self.last = now

    def watch(self, owner, name, label):
        """Account calls of owner.name to `label`, a str or a function of the labels of the watched calls around it."""
        inner = getattr(owner, name)

        def timed(*args, **options):
            self.switch()
            self.stack.append(label(self.stack) if callable(label) else label)
            try:
                return inner(*args, **options)
            finally:
                self.switch()
                self.stack.pop()
        self.undo.append((owner, name, inner))
        setattr(owner, name, timed)

    def stop(self):
        self.switch()
        for owner, name, inner in reversed(self.undo):
            setattr(owner, name, inner)


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
            (ppo.PPO, "update_critic", "critic update"), (ppo.PPO, "update_policy", "policy update, the rest"), (ppo.PPO, "step", "optimisers"),
            (ppo, "evaluate", "final evaluation, the rest"), (ppo.PPO, "iterate", "iteration, the rest"), (twosome, "build", "loading the model")):
        clock.watch(owner, name, label)
    try:
        yield clock
    finally:
        clock.stop()


# ---------------------------------------------------------------------------------------------------------------------
# The published way against ours

class Timed(ppo.PPO):
    """A PPO that keeps its last rollout, and what it cost."""

    def rollout(self):
        self.rollout_cost, self.last = cost(super().rollout, self.agent)
        return self.last


def compare(agent, task, repeats, defaults=True):
    """Time every part both ways, in turn, and print a row for each. Returns JSON-able facts."""
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
    if defaults:
        config = twosome.arguments(["--env", "overcooked", "--task", task])[0]
        mine = trainers(config)
        parts.append((f"PPO iteration, defaults ({config.num_envs} x {config.rollout_steps}, minibatch {config.minibatch}, epochs {config.epochs})",
                      lambda: iterate(*mine), lambda: iterate(*mine[::-1])))
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
    return {"task": task, "parameters": sum(p.numel() for p in agent.model.get_base_model().parameters()), "dtype": str(agent.model.dtype),
            "matmul_peak_gflops": peak / 1e9, "largest_difference_of_metrics": gaps, "rows": rows}


HEADER = """| part | ours, ms | published, ms | times faster (quartiles) | tokens ours / published | matmul peak reached ours / published |
|---|---:|---:|---:|---:|---:|"""


def markdown(row):
    """A line of the table."""
    ours, published = row["ours"], row["published"]
    tokens, share, memory = ([form.format(side[key]) for side in (ours, published)] for key, form in (
        ("tokens", "{:,}"), ("peak_share", "{:.0%}"), ("memory_gb", "{:.0f} GB" if ours["memory_gb"] else "")))
    return (f"| {row['part']} | {1e3 * ours['seconds']:.1f} | {1e3 * published['seconds']:.1f} | {row['ratio']:.1f}"
            f" ({row['ratio_quartiles'][0]:.1f} to {row['ratio_quartiles'][1]:.1f}) | {' / '.join(tokens)} | {' / '.join(share)} |"
            + (f" {' / '.join(memory)} |" if ours["memory_gb"] else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Where the time goes

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
    """Steps a second of one process on one core and of two on two, in turn, by twosome.py itself."""
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats):
            for count in (1, 2):
                out = os.path.join(folder, f"{turn}-{count}")
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), os.path.join(ROOT, "twosome.py"),
                           "--model", options.model, "--task", options.task, "--steps", str(options.steps or 5120), "--device", "cpu", "--out", out]
                subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
                with open(os.path.join(out, "metrics.csv"), newline="") as file:
                    speeds = [float(row["steps_per_second"]) for row in csv.DictReader(file)]
                rates.append({"processes": count, "steps_per_second": float(np.median(speeds))})
                print(rates[-1], flush=True)
    ratios = [two["steps_per_second"] / one["steps_per_second"] for one, two in zip(rates[::2], rates[1::2])]
    print(f"two processes on two cores: {np.median(ratios):.2f} times the steps a second of one on one ({min(ratios):.2f} to {max(ratios):.2f})")
    return {"rates": rates, "ratio": float(np.median(ratios)), "ratios": ratios}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Speed: the published way against ours.", allow_abbrev=False)
    parser.add_argument("--model", default="pocket_lm", help="the model measured, as twosome.py's --model")
    parser.add_argument("--task", default="tomato-salad", help="a task of Overcooked")
    parser.add_argument("--shape", default="", choices=("", *SHAPES), help="random weights of this shape instead of --model")
    parser.add_argument("--repeats", type=int, default=5, help="times that each part is measured")
    parser.add_argument("--steps", type=int, default=0, help="environment steps of --profile (the default run's) and of --processes (5120)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: its own choice")
    parser.add_argument("--profile", action="store_true", help="where the time of a default run goes")
    parser.add_argument("--cost-model", action="store_true", help="what an iteration's cost grows with")
    parser.add_argument("--processes", action="store_true", help="two processes against one")
    parser.add_argument("--out", default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads) if options.threads else None
    os.makedirs(options.out, exist_ok=True)
    kind = next((name for name in ("profile", "cost_model", "processes") if getattr(options, name)), "bench" + (f"-{options.shape}" if options.shape else ""))
    facts = {"command": " ".join(["python experiments/bench.py", *(sys.argv[1:] if argv is None else argv)]), **machine()}
    if kind == "cost_model":
        import cost_model
        facts.update(cost_model.measure(options))
    elif kind in ("profile", "processes"):
        facts.update({"profile": profile, "processes": processes}[kind](options))
    else:
        print(HEADER)
        facts.update(compare(load(options.shape, options.model), options.task, options.repeats, defaults=not options.shape))
        with open(os.path.join(options.out, f"{kind}.md"), "w") as file:
            file.write("\n".join([HEADER, *map(markdown, facts["rows"])]) + "\n")
    facts["load_after"] = round(os.getloadavg()[0], 2)
    with open(os.path.join(options.out, f"{kind}.json"), "w") as file:
        json.dump(facts, file, indent=1)
    return 0


def machine():
    """What the figures depend on, and how busy the machine was as they were taken."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2),
            "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    sys.exit(main())
