"""What the benchmarks measure with: seconds, tokens, FLOPs, the machine's matmul peak, a clock."""
import os
import platform
import time

import numpy as np
import torch
import transformers

from engine import models


def timed(work, device):
    """Return (wall seconds of work(), what it returned), the device's queue emptied around it."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def matmul_peak(device, dtype):
    """Return the FLOP/s of the best square matrix product: the most that any model gets here."""
    best = 0.0
    for n in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        torch.mm(a, b)
        seconds = min(timed(lambda a=a, b=b: torch.mm(a, b), device)[0] for _ in range(20))
        best = max(best, 2 * n**3 / seconds)
    return best


class Count:
    """Counts, while it is entered, what goes through an agent's LLM: tokens, calls, FLOPs.

    A token costs 2 FLOPs a weight of the layers, a row of logits 2 H V, and attention 4 H L for
    each position that may be seen: in a tree its ancestors alone, although the kernel computes
    the rest as well and throws it away. Backwards, frozen weights need the gradient of their
    input alone, which is as much again; attention needs it twice. Pads count as tokens.
    """

    def __init__(self, agent):
        self.model = agent.model.get_base_model()
        config = agent.model.config.get_text_config()
        self.layer_weights = sum(weight.numel() for name, weight in self.model.named_parameters()
                                 if ".layers." in name and weight.dim() == 2)
        self.attention = 4 * config.hidden_size * config.num_hidden_layers
        self.row = 2 * config.hidden_size * config.vocab_size

    def __enter__(self):
        self.tokens = self.calls = self.flops = 0
        body, head = self.model.get_decoder(), self.model.get_output_embeddings()
        self.hooks = [body.register_forward_pre_hook(self.body, with_kwargs=True),
                      head.register_forward_pre_hook(self.head)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def body(self, module, args, options):
        """Count a pass through the layers."""
        B, S = options["input_ids"].shape
        mask, grad = options.get("attention_mask"), torch.is_grad_enabled()
        pairs = B * S * (S + 1) // 2
        if mask is not None and mask.dim() == 4:
            pairs = (mask == 0).sum()  # a tensor: a GPU need not wait for it
        layers = 2 * self.layer_weights * B * S
        self.calls += 1
        self.tokens += B * S
        self.flops = self.flops + (1 + grad) * layers + (1 + 2 * grad) * self.attention * pairs

    def head(self, module, args):
        """Count a pass through the vocabulary projection."""
        rows = args[0].shape[:-1].numel()
        self.flops += (1 + torch.is_grad_enabled()) * self.row * rows


def cost(work, agent):
    """Return (np.array([seconds, tokens, FLOPs]) of work(), what it returned)."""
    with Count(agent) as count:
        seconds, result = timed(work, agent.model.device)
    return np.array([seconds, count.tokens, float(count.flops)]), result


class Clock:
    """Splits a run's time: what is inside a watched function and in no other watched one."""

    def __init__(self):
        self.spent, self.stack, self.undo = {}, ["rest"], []
        self.last = time.perf_counter()

    def switch(self):
        """Account the time since the last switch to what was running."""
        now = time.perf_counter()
        self.spent[self.stack[-1]] = self.spent.get(self.stack[-1], 0.0) + now - self.last
        self.last = now

    def watch(self, owner, name, label):
        """Account the calls of owner.name to label: a str, or a function of the labels around."""
        inner = getattr(owner, name)

        def watched(*args, **options):
            self.switch()
            self.stack.append(label(self.stack) if callable(label) else label)
            try:
                return inner(*args, **options)
            finally:
                self.switch()
                self.stack.pop()

        self.undo.append((owner, name, inner))
        setattr(owner, name, watched)

    def stop(self):
        """Put the functions back."""
        self.switch()
        for owner, name, inner in reversed(self.undo):
            setattr(owner, name, inner)


def machine():
    """Return what the figures depend on, and how busy the machine is."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "bfloat16": models.NATIVE,  # it decides the speed of SmolLM2 on a CPU
            "load": round(os.getloadavg()[0], 2), "torch": torch.__version__,
            "transformers": transformers.__version__}
