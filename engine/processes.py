"""Several processes. Without them, one process computes the same, only slower.

torchrun and accelerate launch start them. Each steps a share of the environments and scores a share
of the prompts, in acting and in every minibatch (engine/trainer.py); the first one alone holds the
policy to its base, writes, evaluates and prints.
"""
import contextlib
import datetime
import os
import sys
import threading

import torch
import torch.distributed as dist

# Our choice: seconds that processes wait for each other at the start. If the first one never
# listens, PyTorch tries twice to reach it, so the others wait about twice as long.
RENDEZVOUS = 60
PATIENCE = datetime.timedelta(hours=6)  # the longest wait later: the first process evaluates alone


class ProcessError(ValueError):
    """The processes were started wrongly. The message is one line."""


class ProcessLost(RuntimeError):
    """Another process has ended or never began, so this one cannot go on."""


def place():
    """Return (rank, number of processes): (0, 1) where there is only one."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


@contextlib.contextmanager
def together():
    """Turn the failure of what needs every process into a ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f"another process has ended ({error!s:.100})") from error


def join():
    """Meet the other processes under torchrun or accelerate launch. Returns this one's rank.

    Gradients travel by nccl between GPUs and by gloo between CPUs.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1" or dist.is_initialized():
        return place()[0]
    rank, port, local = map(os.environ.get, ("RANK", "MASTER_PORT", "LOCAL_RANK"), ("", "", "0"))
    numbers = all(text.isdecimal() for text in (world, rank, port, local))
    if not numbers or int(rank) >= int(world) or not os.environ.get("MASTER_ADDR"):
        raise ProcessError("WORLD_SIZE is set, but not as torchrun does; use torchrun, or unset it")
    if int(local) < torch.cuda.device_count():
        torch.cuda.set_device(int(local))
    wait = f"up to {RENDEZVOUS} s for {world} processes at {os.environ['MASTER_ADDR']}"
    waiting = threading.Timer(10, print, ["waiting", wait], {"file": sys.stderr, "flush": True})
    waiting.start()
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=RENDEZVOUS))
        dist.distributed_c10d._set_pg_timeout(PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ProcessLost(f"the processes did not meet: waited {wait}") from error
    finally:
        waiting.cancel()
    return place()[0]


def gather(value):
    """Return the value of every process (any object), in the order of their ranks."""
    values = [value] * place()[1]
    if len(values) > 1:
        with together():
            dist.all_gather_object(values, value)
    return values


def leave():
    """Leave the others together: one that ended early could cut off the first one's message."""
    gather(None)
    abandon()


def abandon():
    """Leave without waiting for the others; a process that ends without leaving may abort."""
    if place()[1] > 1:
        dist.destroy_process_group()


def agree(settings):
    """Raise ProcessError unless every process was started with the same settings."""
    if any(other != settings for other in gather(settings)):
        raise ProcessError("the processes were started with different flags; give all the same")
