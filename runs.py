"""A run's folder: settings, metrics, checkpoints that cannot be half written, resume, signals, the learning curve.

  RUN/config.json                settings, written once
  RUN/metrics.csv                one row an update
  RUN/checkpoint-UPDATE/         the last two are kept; each holds
      adapter_config.json, adapter_model.safetensors   the adapter, in peft's own format
      critic.safetensors, features.safetensors         the critic and its remembered inputs
      optimizers.safetensors                           both optimisers' moments
      state.json                                       counters, environments, random states, versions, the base model's fingerprint
      run_config.json, metrics.csv                     config.json and metrics.csv as they were then
      SHA256SUMS                                       checksums of all of these; `sha256sum -c SHA256SUMS` reads it too

  python twosome.py --resume RUN                       go on from the newest checkpoint
  python twosome.py --resume RUN --from checkpoint-40  go on from this one; newer ones are renamed to checkpoint-N.abandoned

Whole or not at all: every file and every checkpoint is written under a temporary name and renamed, so a kill at any moment
leaves the old one or the new one. Rows written after the last checkpoint are cut by a resume and computed again: bit for bit
the same on a CPU with the same versions and number of threads.

Nothing unsafe: only JSON and safetensors are read, no pickle; links, pipes and files beyond a size limit are refused; no path
found in a file is followed. One name is: config.json's "model", which is what the run was trained with. Models are loaded
from safetensors without remote code, and a checkpoint refuses a base model whose fingerprint differs, so the worst that a
stranger's run can do is to be refused.

This module imports nothing of the project. An agent is any object with policy_parameters() and value_parameters() as in
ppo.py, and save(folder) -> JSON-able dict, load(folder, that dict), for which write_tensors and read_tensors are here; a
trainer has policy_optimizer, value_optimizer, updates, state_dict() and load_state_dict(). Randomness of an environment's own
belongs in its state_dict(). Several processes: all call trainer.state_dict(), so all call checkpoint; rank 0 alone writes.
"""
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import stat
import sys
import threading

import numpy as np
import safetensors
import safetensors.torch
import torch

try:
    import fcntl
except ImportError:  # no POSIX: runs work, but nothing refuses a second process in the same folder
    fcntl = None

MAX_BYTES = 2 ** 32  # a larger file in a run folder is not ours
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d{0,8})")
# What loading a stranger's well-formed but senseless values makes Python, NumPy and torch raise.
SENSELESS = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError, AssertionError)


class RunError(ValueError):
    """A run folder cannot be used; the message is one line that says why and what would be right."""


# ---------------------------------------------------------------------------------------------------------------------
# Files: read with suspicion, write whole or not at all

def check_name(folder):
    """The folder as given, if it is a plain name: nothing that climbs out with "..", that a terminal or a file system refuses."""
    if not folder or not folder.isprintable() or any(len(part.encode(errors="replace")) > 200 for part in folder.split(os.sep)):
        raise RunError(f"{folder[:60]!r} is no name for a run's folder; use printable characters, at most 200 bytes a part")
    if ".." in folder.replace("\\", "/").split("/"):
        raise RunError(f"{folder!r} climbs out with ..; name the run's folder itself")
    return folder


def free_name(parent, name):
    """The first of parent/name, parent/name-2, parent/name-3 ... that is not there yet."""
    paths = (os.path.join(parent, name if n == 1 else f"{name}-{n}") for n in range(1, 10 ** 9))
    return next(path for path in paths if not os.path.lexists(path))


def read_bytes(path, limit=MAX_BYTES):
    """A regular file's bytes. A link, a pipe (it would block), a device or a monster is a RunError; a missing file too."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError):
        raise RunError(f"{os.path.basename(path)} is " + ("a link, which is not followed" if os.path.islink(path) else "missing or cannot be read")) from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        os.close(handle)
        raise RunError(f"{os.path.basename(path)} is not a file of a run's kind or size")
    with open(handle, "rb") as file:
        return file.read()


def read_json(path):
    """A JSON object from a file, as a dict; NaN, infinities and everything malformed are a RunError."""
    def refuse(text):
        raise ValueError(f"{text[:20]} is no finite number")

    def number(text):
        return float(text) if math.isfinite(float(text)) else refuse(text)

    try:
        value = json.loads(read_bytes(path, 2 ** 26), parse_constant=refuse, parse_float=number)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{os.path.basename(path)} is not JSON: {str(error).splitlines()[0][:100]}") from None
    if not isinstance(value, dict):
        raise RunError(f"{os.path.basename(path)} holds no JSON object")
    return value


def to_json(value, **options):
    """JSON bytes; NumPy's and torch's scalars and arrays become numbers and lists. NaN is a ValueError: JSON has none."""
    return json.dumps(value, allow_nan=False, default=lambda other: other.tolist(), **options).encode()


def fill(kind, values):
    """A dataclass from JSON values: every field there, none beside them, each of its type. Raises RunError."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    for names, problem in ((values.keys() - types, "does not know"), (types.keys() - values, "lacks")):
        if names:
            raise RunError(f"config.json {problem} {', '.join(sorted(name[:30] for name in names)[:5])!r}: it is damaged or of another version")
    for name, value in values.items():
        if type(value) is not types[name] and not (types[name] is float and type(value) is int and abs(value) < 2 ** 53):
            raise RunError(f"config.json's {name} is {str(value)[:40]!r}; it must be of type {types[name].__name__}")
    return kind(**{name: types[name](value) for name, value in values.items()})


def sync(path):
    """Have a file or folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path, data):
    """Create a file; what is there under this name is replaced, never followed."""
    if os.path.lexists(path):
        os.unlink(path)
    with open(path, "xb") as file:
        file.write(data)


def write_tensors(path, tensors):
    """Write a dict of tensors as safetensors. NaN or infinity is an ArithmeticError: what cannot be continued is not kept."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArithmeticError(f"{name} is not finite, so no checkpoint is made of it")
    # Through bytes: safetensors' own save_file reports a full disk as an error that is no OSError.
    write_bytes(path, safetensors.torch.save(tensors, {"format": "pt"}))


def read_tensors(path, like, groups=False):
    """Read safetensors into a dict and compare with `like`, a dict of tensors: the same names, shapes and types, all finite.

    With groups, all names before one first dot may be absent together (an optimiser has no moments before its first step).
    """
    name, group = os.path.basename(path), lambda key: key.split(".")[0]
    try:
        tensors = safetensors.torch.load(read_bytes(path))
    except safetensors.SafetensorError as error:
        raise RunError(f"{name} is not safetensors: {str(error).splitlines()[0][:100]}") from None
    if groups:
        present = {group(key) for key in tensors}
        like = {key: tensor for key, tensor in like.items() if group(key) in present}
    if tensors.keys() != like.keys():
        odd = sorted(tensors.keys() ^ like.keys())[0]
        raise RunError(f"{name} {'lacks' if odd in like else 'has a foreign tensor'} {odd[:100]!r}")
    for key, tensor in tensors.items():
        if tensor.shape != like[key].shape or tensor.dtype != like[key].dtype:
            raise RunError(f"{name}: {key} is {list(tensor.shape)} {tensor.dtype}, not {list(like[key].shape)} {like[key].dtype}")
        if not torch.isfinite(tensor).all():
            raise RunError(f"{name}: {key} is not finite")
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint is made of, beside the agent's own files

def fingerprint(named_tensors):
    """A SHA-256 of tensors' names, shapes, types and bits, which go in as a few samples and an exact sum: one quick pass anywhere."""
    digest, integers = hashlib.sha256(), {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in named_tensors:
        bits = tensor.detach().contiguous().view(-1).view(integers[tensor.element_size()])
        few = [*bits[::max(1, len(bits) // 64)].tolist(), bits.sum(dtype=torch.int64).item()]  # integers: no order of summation matters
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {few}".encode())
    return digest.hexdigest()


def optimizer_tensors(trainer):
    """Both Adams' moments and step counts by name, and what each should look like: {name: tensor}, {name: tensor}."""
    found, like = {}, {}
    for kind, optimizer in (("policy", trainer.policy_optimizer), ("value", trainer.value_optimizer)):
        for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                like[f"{kind}.{index}.{key}"] = torch.zeros(()) if key == "step" else parameter
            found.update({f"{kind}.{index}.{key}": value for key, value in optimizer.state[parameter].items()} if parameter in optimizer.state else {})
    return found, like


def load_optimizers(trainer, tensors):
    """Give both optimisers the moments that optimizer_tensors took."""
    for kind, optimizer in (("policy", trainer.policy_optimizer), ("value", trainer.value_optimizer)):
        state = {}
        for name, tensor in tensors.items():
            owner, index, key = name.split(".")
            if owner == kind:
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states():
    """The states of the global generators of Python, NumPy and torch's CPU, JSON-able. A trainer's own are in its state_dict()."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": bytes(torch.get_rng_state().tolist()).hex()}


def set_random_states(states):
    """Continue the global generators from random_states(), once through JSON."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(states["torch"])), dtype=torch.uint8))
    if type(gauss) not in (type(None), float) or to_json(random_states()) != to_json(states):  # setstate takes more than it should
        raise ValueError("not the states of random generators")


def surroundings():
    """What the last bits of a result may depend on."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
            **{name: sys.modules[name].__version__ for name in ("transformers", "peft") if name in sys.modules}}


def sums(folder):
    """The text of SHA256SUMS for a checkpoint's folder as it stands."""
    names = sorted(name for name in os.listdir(folder) if name != "SHA256SUMS")
    for name in names:
        if not re.fullmatch(r"\w{1,60}\.(json|csv|safetensors)", name, re.ASCII):
            raise RunError(f"{ascii(name[:60])} does not belong there")
    return "".join(f"{hashlib.sha256(read_bytes(os.path.join(folder, name))).hexdigest()}  {name}\n" for name in names)


def verify(folder):
    """Raise RunError, saying what is wrong, unless a checkpoint's folder holds exactly the files and bytes of its SHA256SUMS."""
    if os.path.islink(folder) or not os.path.isdir(folder):
        raise RunError("it is not there" if not os.path.lexists(folder) else "it is no folder")
    written = read_bytes(os.path.join(folder, "SHA256SUMS"), 2 ** 20)
    try:
        found = sums(folder)
    except OSError as error:
        raise RunError(f"it cannot be read: {error}") from None
    if written != found.encode(errors="replace"):
        lines = lambda text: dict(line.split("  ", 1)[::-1] for line in text.splitlines() if "  " in line)
        written, found = lines(written.decode(errors="replace")), lines(found)
        wrong = sorted(name for name in written.keys() | found if written.get(name) != found.get(name)) or ["SHA256SUMS"]
        name = wrong[0] if len(wrong[0]) < 60 and wrong[0].isprintable() else ascii(wrong[0][:60])
        problem = "is missing" if name not in found else "does not belong there" if name not in written else "does not match its checksum"
        raise RunError("SHA256SUMS is damaged" if name == "SHA256SUMS" else f"{name} {problem}")


def checkpoints(folder):
    """The checkpoints of a run's folder, oldest first; what lies there under another name is none."""
    return sorted((name for name in os.listdir(folder) if CHECKPOINT.fullmatch(name)), key=lambda name: int(name.split("-")[1]))


def find(folder, which="last"):
    """The path of an intact checkpoint: the newest, or `which` ("checkpoint-40" or "40"). None if the run has none yet."""
    names = checkpoints(folder)
    wanted = names[-1] if which == "last" and names else which if which.startswith("checkpoint-") else f"checkpoint-{which}"
    if which == "last" and not names:
        return None
    if not CHECKPOINT.fullmatch(wanted):
        raise RunError(f"{which[:60]!r} is no checkpoint's name; {folder} has {', '.join(names) or 'none'}")
    path = os.path.join(folder, wanted)
    try:
        verify(path)
    except RunError as error:
        raise damaged(path, error) from None
    return path


def damaged(path, error):
    """A RunError that names a checkpoint and what is wrong with it, and offers the newest one before it that is intact."""
    folder, name = os.path.split(path)
    before = [other for other in checkpoints(folder) if int(other.split("-")[1]) < int(name.split("-")[1])]
    for other in reversed(before):
        try:
            verify(os.path.join(folder, other))
        except RunError:
            continue
        return RunError(f"{path} cannot be used: {error}; {other} before it is intact: --resume {folder} --from {other}")
    return RunError(f"{path} cannot be used: {error}; no intact checkpoint is before it; --resume begins again once {' and '.join([*before, name])} {'are' if before else 'is'} removed")


@contextlib.contextmanager
def explained(path):
    """Turn whatever is wrong with a checkpoint's content into the RunError that names it and offers the one before."""
    try:
        yield
    except RunError as error:
        raise damaged(path, error) from None
    except SENSELESS as error:  # well-formed and with right checksums, but not what a run writes
        reason = (str(error).splitlines() or [""])[0][:100]
        raise damaged(path, f"it holds values that make no sense ({type(error).__name__}: {reason})") from None


def load_agent(path, agent):
    """Load a verified checkpoint's agent; returns state.json's dict. To be called within explained(path)."""
    if read_bytes(os.path.join(path, "run_config.json")) != read_bytes(os.path.join(os.path.dirname(path), "config.json")):
        raise RunError("it was not written with the run's config.json (its run_config.json differs)")
    state = read_json(os.path.join(path, "state.json"))
    agent.load(path, state["agent"])
    return state


def load(folder, agent, which="last"):
    """Load the agent of a run's newest (or named) checkpoint for evaluation, without a lock. Returns the checkpoint's path."""
    read_config(folder)
    path = find(folder, which)
    if path is None:
        raise RunError(f"{folder} has no checkpoint yet; go on with: --resume {folder}")
    with explained(path):
        load_agent(path, agent)
    return path


def read_config(folder):
    """A run's settings, the dict in its config.json; RunError if the folder holds no run. For evaluation: no lock."""
    if not os.path.isdir(check_name(folder)):
        raise RunError(f"there is no run in {folder}: no such folder")
    if not os.path.lexists(os.path.join(folder, "config.json")):
        copies = [name for name in checkpoints(folder) if os.path.isfile(os.path.join(folder, name, "run_config.json"))]
        raise RunError(f"there is no run in {folder}: config.json is missing" + (f"; {copies[-1]}/run_config.json is a copy" if copies else ""))
    try:
        return read_json(os.path.join(folder, "config.json"))
    except RunError as error:
        raise RunError(f"{folder}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The run

class Run:
    """A run's folder, held by this process alone until close() or its end, however it ends.

    folder: as named by the user; config: the settings, a dict; resumed: opened, not created.
    """

    def __init__(self, folder, resumed):
        """Lock the folder, which exists. Use Run.create or Run.open."""
        self.folder, self.resumed, self.table = folder, resumed, b""
        self.lock = os.open(self.path("lock"), os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when the process dies
        except BlockingIOError:
            self.close()
            raise RunError(f"another process is at work in {folder}; wait for its end or name another folder") from None

    @classmethod
    def create(cls, folder, config):
        """A new run in a folder that is new or empty. Writes config.json."""
        try:
            os.makedirs(check_name(folder), exist_ok=True)
        except FileExistsError:
            raise RunError(f"{folder} is a file; name a folder") from None
        except OSError as error:
            raise RunError(f"{folder} cannot be made ({error.strerror}); name another --out") from None
        # A start that was killed before its config.json leaves a lock and temporary names, and no more.
        if any(name != "lock" and not name.startswith(".tmp-") for name in os.listdir(folder)):
            held = os.path.lexists(os.path.join(folder, "config.json"))
            raise RunError(f"{folder} " + (f"holds a run already; go on with: --resume {folder}; or name another --out" if held else
                                           "is not empty; a run needs a folder of its own"))
        run = cls(folder, resumed=False)
        try:
            if os.path.lexists(run.path("config.json")):  # another process was faster
                raise RunError(f"{folder} holds a run already; name another folder")
            run.sweep()
            run.write("config.json", config)
            run.config = read_config(folder)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, folder):
        """A run that is there, to go on with it."""
        config = read_config(folder)
        run = cls(folder, resumed=True)
        run.config = config
        run.sweep()
        return run

    def path(self, *names):
        """A path inside the run's folder."""
        return os.path.join(self.folder, *names)

    def sweep(self):
        """Remove what a kill left under temporary names; links are removed, not followed."""
        for name in os.listdir(self.folder):
            if name.startswith(".tmp-"):
                self.remove(name)

    def remove(self, name):
        """Remove a checkpoint: first its name, so that a kill in between leaves no checkpoint that lacks files."""
        hidden = self.path(f".tmp-removed-{name}" if not name.startswith(".tmp-") else name)
        os.rename(self.path(name), hidden)
        shutil.rmtree(hidden) if os.path.isdir(hidden) and not os.path.islink(hidden) else os.unlink(hidden)

    def write(self, name, content):
        """Write a file of the run: bytes, text, or anything else as JSON, in which NaN and infinities become null."""
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise RunError(f"{name!r} is no file name")
        def plain(value):
            value = value.tolist() if hasattr(value, "tolist") else value
            if isinstance(value, dict):
                return {key: plain(part) for key, part in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(part) for part in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value
        if not isinstance(content, bytes):
            content = content.encode() if isinstance(content, str) else to_json(plain(content), indent=2) + b"\n"
        write_bytes(self.path(f".tmp-{name}"), content)
        os.replace(self.path(f".tmp-{name}"), self.path(name))

    def log(self, metrics):
        """Add a row to metrics.csv; the first call writes the header.

        The file is written anew and renamed: an appended row could be torn by a kill where it crosses a page of the disk.
        """
        if self.table and not os.path.exists(self.path("metrics.csv")):
            raise FileNotFoundError(f"{self.path('metrics.csv')} was removed during the run")
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        if not self.table:
            rows.writerow(metrics)
        elif list(metrics) != self.table.split(b"\n", 1)[0].decode().split(","):
            raise RunError(f"{self.path('metrics.csv')} has other columns; it is of another version")
        rows.writerow([value.item() if hasattr(value, "item") else value for value in metrics.values()])
        self.table += text.getvalue().encode()
        self.write("metrics.csv", self.table)

    def checkpoint(self, agent, trainer):
        """Write checkpoint-<updates> whole or not at all, and keep the last two."""
        state, rank = trainer.state_dict(), getattr(trainer, "rank", 0)  # collective: every process takes part
        if rank:
            return
        if not os.path.isfile(self.path("config.json")):
            raise FileNotFoundError(f"{self.path('config.json')} was removed during the run")
        name = f"checkpoint-{trainer.updates}"
        hidden = self.path(f".tmp-{name}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.mkdir(hidden)
        saved = agent.save(hidden)
        write_tensors(os.path.join(hidden, "optimizers.safetensors"), optimizer_tensors(trainer)[0])
        try:
            state = to_json({"trainer": state, "agent": saved, "random": random_states(), "surroundings": surroundings()})
        except ValueError as error:
            raise ArithmeticError(f"the training's state is not finite ({error}), so no checkpoint is made of it") from None
        write_bytes(os.path.join(hidden, "state.json"), state)
        write_bytes(os.path.join(hidden, "metrics.csv"), self.table)
        write_bytes(os.path.join(hidden, "run_config.json"), read_bytes(self.path("config.json")))
        write_bytes(os.path.join(hidden, "SHA256SUMS"), sums(hidden).encode())
        for file in os.listdir(hidden):
            sync(os.path.join(hidden, file))
        sync(hidden)
        if os.path.lexists(self.path(name)):  # left by a run that went on from an older one
            self.remove(name)
        os.rename(hidden, self.path(name))
        sync(self.folder)
        for old in checkpoints(self.folder)[:-2]:
            self.remove(old)

    def restore(self, agent, trainer, which="last"):
        """Load a checkpoint into agent and trainer, cut metrics.csv back to it, and return its update, 0 if there is none yet.

        A damaged checkpoint is a RunError that names it and what is wrong, and offers the one before it.
        """
        path = find(self.folder, which)
        if path is None:  # killed before the first: nothing is lost but what a new beginning computes again
            print(f"{self.folder} has no checkpoint yet: beginning again", file=sys.stderr)
            return 0
        with explained(path):
            state = load_agent(path, agent)
            file = os.path.join(path, "optimizers.safetensors")
            load_optimizers(trainer, read_tensors(file, optimizer_tensors(trainer)[1], groups=True))
            trainer.load_state_dict(state["trainer"])
            if trainer.updates != int(path.rsplit("-", 1)[1]):
                raise RunError(f"it is of update {trainer.updates}")
            set_random_states(state["random"])
            table = read_bytes(os.path.join(path, "metrics.csv"))
            if table.count(b"\n") != (trainer.updates + 1 if trainer.updates else 0):
                raise RunError(f"its metrics.csv has not {trainer.updates} rows")
            changed = [f"{name} {then} is now {now}" for name, now in surroundings().items() if (then := state["surroundings"].get(name)) != now]
        if changed:
            print(f"note: {', '.join(changed)}; the last bits of the results may differ from an uninterrupted run's", file=sys.stderr)
        for name in checkpoints(self.folder):
            if int(name.split("-")[1]) > trainer.updates:  # another future than the one that now begins
                shutil.rmtree(self.path(f"{name}.abandoned"), ignore_errors=True)
                os.rename(self.path(name), self.path(f"{name}.abandoned"))
        self.table = table
        self.write("metrics.csv", table)
        return trainer.updates

    def hint(self):
        """How to go on after a failure, in a few words."""
        names = checkpoints(self.folder) if os.path.isdir(self.folder) else []
        return f"the last good checkpoint is {names[-1]}; go on with: python twosome.py --resume {self.folder}" if names else "no checkpoint was written yet"

    def close(self):
        """Let go of the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


class Follower(Run):
    """A run's folder as every process but the first sees it: it reads, writes nothing and holds no lock."""

    def __init__(self, folder, resumed):
        self.folder, self.resumed, self.table, self.lock = folder, resumed, b"", None

    def write(self, name, content):
        """Nothing: the first process writes."""

    def log(self, metrics):
        """Nothing."""


class Signals:
    """Within it, the first SIGINT or SIGTERM sets .exit_code (130, 143), which is 0 before; the second ends the process at once.

    Ending at once is safe: whatever was being written is still under its temporary name.
    """

    def __init__(self, quiet=False):
        self.exit_code, self.before, self.quiet = 0, {}, quiet  # quiet: of several processes one speaks

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number, frame):
        """What the system calls at a signal."""
        if self.exit_code:
            os.write(2, b"\nstopped at once; what is on the disk is whole\n")
            os._exit(128 + number)
        self.exit_code = 128 + number
        self.quiet or os.write(2, b"\nfinishing this update, then a checkpoint; again to stop at once\n")

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# The learning curve

def plot(folder, best=None):
    """Draw metrics.csv's return and success over the steps into curve.png; a line on standard error where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no window system is touched
    except ImportError:
        print("no curve.png: matplotlib is not installed", file=sys.stderr)
        return
    with open(os.path.join(folder, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    column = lambda name: [float(row[name]) for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(column("steps"), column("return"), label="return, mean of the last 100 episodes")
    axes.plot(column("steps"), column("success"), label="success, the same", alpha=0.5)
    if best is not None:
        axes.axhline(best, color="black", linewidth=0.8, linestyle="--", label=f"best possible return, {best:.4f}")
    axes.set(xlabel="environment steps (macro-actions)", title=os.path.basename(os.path.abspath(folder)))
    axes.legend(loc="lower right", fontsize="small")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    write_bytes(os.path.join(folder, ".tmp-curve.png"), data.getvalue())
    os.replace(os.path.join(folder, ".tmp-curve.png"), os.path.join(folder, "curve.png"))
