"""What the benchmarks measure with: seconds, tokens, FLOPs, the machine's matmul peak, and a clock that splits a run's time."""
import os
import platform
import time

import numpy as np
import torch
import transformers


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

    A token costs 2 FLOPs a weight of the L layers, a logit row 2 H V, and attention 4 H L for each position that it may see: in a
    tree, its ancestors alone (the kernel computes, and throws away, the rest). Backwards, frozen weights need the gradient of their input alone: as much again; attention needs it twice.
    """

    def __init__(self, agent):
        self.model, config = agent.model.get_base_model(), agent.model.config.get_text_config()
        self.layer_weights = sum(p.numel() for name, p in self.model.named_parameters() if ".layers." in name and p.dim() == 2)
        self.attention = 4 * config.hidden_size * config.num_hidden_layers
        self.row = 2 * config.hidden_size * config.vocab_size

    def __enter__(self):
        self.tokens = self.calls = self.flops = 0
        self.hooks = [self.model.base_model.register_forward_pre_hook(self.body, with_kwargs=True),
                      self.model.get_output_embeddings().register_forward_pre_hook(self.head)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def body(self, module, args, options):
        (B, S), mask, grad = options["input_ids"].shape, options.get("attention_mask"), torch.is_grad_enabled()
        pairs = (mask == 0).sum() if mask is not None and mask.dim() == 4 else B * S * (S + 1) // 2  # a tensor: a GPU need not wait for it
        self.calls, self.tokens = self.calls + 1, self.tokens + B * S
        self.flops = self.flops + (2 if grad else 1) * 2 * self.layer_weights * B * S + (3 if grad else 1) * self.attention * pairs

    def head(self, module, args):
        self.flops += (2 if torch.is_grad_enabled() else 1) * self.row * args[0].shape[:-1].numel()


def cost(work, agent):
    """(np.array([seconds, tokens, FLOPs]) of work(), what it returned). Counting takes two calls of Python a forward."""
    with Count(agent) as count:
        seconds, result = timed(work, agent.model.device)
    return np.array([seconds, count.tokens, float(count.flops)]), result


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


def machine():
    """What the figures depend on, and how busy the machine is."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2),
            "torch": torch.__version__, "transformers": transformers.__version__}
