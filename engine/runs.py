"""A run's folder: settings, metrics, checkpoints, resume and signals.

Without this file a run would learn the same, but whatever stops it would cost all of it.

    RUN/config.json              the settings and the number of this format, written once
    RUN/metrics.csv              one row an update, appended
    RUN/baseline.json            the random policy's return and the best possible one
    RUN/curve.png, summary.json  the curves so far, and the evaluation at the end
    RUN/evaluation.json          what --eval measured
    RUN/events.out.tfevents.0    tensorboard's log, where that is installed; appended
    RUN/lock                     held by the one process that writes
    RUN/checkpoint-UPDATE/       the last two are kept; each holds
        adapter_config.json, adapter_model.safetensors    the adapter, in peft's own format
        critic.safetensors       the critic's weights
        optimizers.safetensors   the moments of both optimisers
        state.json               counters, environments, generators, seconds so far, versions, and
                                 the fingerprint of the frozen base model
        run_config.json, metrics.csv    the settings, and the rows up to here
        SHA256SUMS               checksums of all of these, for `sha256sum -c SHA256SUMS` as well

    python twosome.py --resume RUN                        go on from the newest checkpoint
    python twosome.py --resume RUN --from checkpoint-40   go on from this one; newer ones are
                                                          renamed to checkpoint-N.abandoned,
                                                          and summary.json likewise

Whole or not at all: every file but metrics.csv and tensorboard's log, and every checkpoint, is
written under a temporary name and renamed, so a kill at any moment leaves the old one or the new
one. A resume puts back the checkpoint's copy of metrics.csv and computes again what came after it:
bit for bit the same on a CPU, with the same versions and the same number of threads.

A checkpoint defends against a torn disk, a kill and a stranger's code, not against a stranger's
numbers under right checksums. Only JSON and safetensors are read, never a pickle; links and pipes
are refused; no path found in a file is followed.

This module imports nothing of the project. It asks of an agent: model (a peft model), critic (a
torch module), policy_parameters() and policy_changed(); of a trainer: policy_optimizer,
value_optimizer, updates, rank, state_dict() and load_state_dict(). The global generators of Python,
NumPy and torch are not kept: nothing here draws from them. An environment that draws random numbers
keeps its generator in its own state_dict(). With several processes all call checkpoint, and the
first one writes.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal

import filelock
import peft
import safetensors.torch
import torch
import transformers as hf

FORMAT = 3  # of a run's folder; the first one had no number
PLAIN = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # opens no link and no pipe
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d{0,8})")


class RunError(ValueError):
    """A run's folder cannot be used. One line says what is wrong and what would be right."""


# -----------------------------------------------------------------------------
# Words for people.

def quote(path):
    """Return a path as it can be pasted into a shell and behind a flag, whatever it holds."""
    return shlex.quote(os.path.join(".", path) if path.startswith("-") else path)


def again(folder, env=""):
    """Return the command that goes on with a run. A world of one's own is named again."""
    return f"python twosome.py --resume {quote(folder)}" + f" --env {quote(env)}" * (":" in env)


def tell(text):
    """Write a line to standard error. Where nobody reads it any more, go on without."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


# -----------------------------------------------------------------------------
# Files: read with suspicion, written whole or not at all.

def check_name(folder):
    """Return the folder's name if a run can have it. Raises RunError."""
    parts = re.split(r"[/\\]", folder.rstrip("/"))
    if ".." in parts or not folder.isprintable() or CHECKPOINT.fullmatch(parts[-1]) or not folder:
        raise RunError(f"{folder[:60]!r} cannot name a run: no .., no odd characters or checkpoint")
    return folder


def free_name(parent, name):
    """Return the first of parent/name, parent/name-2, parent/name-3 that is not there yet."""
    paths = (os.path.join(parent, f"{name}-{n}" if n > 1 else name) for n in range(1, 10 ** 9))
    return next(path for path in paths if not os.path.lexists(path))


def read_bytes(path):
    """Return a file's bytes. A link, a pipe, a folder, a missing or huge file is a RunError."""
    if os.path.islink(path) or not os.path.isfile(path) or os.path.getsize(path) > 2 ** 32:
        raise RunError(f"{os.path.basename(path)[:60]!r} is missing, a link or no file")
    with open(path, "rb") as file:
        return file.read()


def read_json(path):
    """Return the JSON object in a file as a dict. Raises RunError for anything else."""
    text = read_bytes(path)
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise RunError(f"{os.path.basename(path)!r} holds no JSON object")


def to_json(value, indent=2):
    """Return JSON bytes; arrays, tensors and their scalars become lists and numbers."""
    return json.dumps(value, default=lambda other: other.tolist(), indent=indent).encode() + b"\n"


def fill(kind, values):
    """Return a dataclass of this kind, filled from JSON values.

    Every field must be there, none beside them, each of its type. Raises RunError.
    """
    types = {field.name: field.type.__name__ for field in dataclasses.fields(kind)}
    for name in sorted({*types, *values}):
        found, right = type(values.get(name)).__name__, types.get(name, "left out")
        if found != right and (found, right) != ("int", "float"):
            raise RunError(f"config.json: {name[:30]!r} is {found}, not {right}; restore its copy")
    return kind(**values)


def write_bytes(path, data):
    """Write a file whole or not at all. A link of this name is replaced and not followed."""
    hidden = os.path.join(os.path.dirname(path), f".tmp-{os.path.basename(path)}")
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise RunError(f"{path} cannot be written: it is a folder, or its folder is not there")
    with open(os.open(hidden, PLAIN | os.O_TRUNC, 0o666), "wb") as file:
        file.write(data)
    os.replace(hidden, path)


def write(path, content):
    """Write bytes, or anything else as JSON, in which NaN and infinity become null."""
    if not isinstance(content, bytes):
        content = to_json(json.loads(to_json(content), parse_constant=lambda text: None))
    write_bytes(path, content)


def sync(path):
    """Have a file or a folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# -----------------------------------------------------------------------------
# What a checkpoint is made of.

def moments(trainer):
    """Return what both optimisers remember: {"policy.0.exp_avg": tensor and so on}."""
    both = {"policy": trainer.policy_optimizer, "value": trainer.value_optimizer}
    return {f"{kind}.{index}.{key}": tensor for kind, optimizer in both.items()
            for index, state in optimizer.state_dict()["state"].items()
            for key, tensor in state.items()}


def load_moments(kind, optimizer, tensors):
    """Give one optimiser ("policy" or "value") what moments() took from it."""
    state = {}
    for owner, index, key in (name.split(".") for name in tensors):
        if owner == kind:
            state.setdefault(int(index), {})[key] = tensors[f"{owner}.{index}.{key}"]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def read_tensors(path, like):
    """Return a safetensors file's tensors. RunError unless names and shapes are as in `like`."""
    tensors = safetensors.torch.load(read_bytes(path))
    if {key: a.shape for key, a in tensors.items()} != {key: b.shape for key, b in like.items()}:
        raise RunError(f"{path} does not fit this agent: it has tensors of other names or shapes")
    return tensors


def fingerprint(model):
    """Return a SHA-256 of the frozen base: names, shapes, types, some bits and the sum of all.

    A sum of integers depends on no order, so every device and number of threads agree.
    """
    digest, integers = hashlib.sha256(), {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    for name, tensor in model.named_parameters():
        if "lora_" not in name:
            bits = tensor.detach().contiguous().view(-1).view(integers[tensor.element_size()])
            seen = bits[::max(1, len(bits) // 64)].tolist(), bits.sum(dtype=torch.int64).item()
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {seen}".encode())
    return digest.hexdigest()


def surroundings():
    """Return what the last bits of a result may depend on."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "hf": hf.__version__}


# -----------------------------------------------------------------------------
# Checkpoints on the disk.

def checkpoints(folder):
    """Return the names of a run's checkpoints, oldest first."""
    found = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(filter(CHECKPOINT.fullmatch, found), key=lambda name: int(name[11:]))


def sums(folder):
    """Return a checkpoint's SHA256SUMS for its files as they are now."""
    data = {name: read_bytes(os.path.join(folder, name)) for name in os.listdir(folder)}
    return "".join(f"{hashlib.sha256(data[name]).hexdigest()}  {name}\n"
                   for name in sorted({*data} - {"SHA256SUMS"}))


def verify(folder):
    """Raise RunError unless a checkpoint's files are exactly those of its SHA256SUMS."""
    if os.path.islink(folder):
        raise RunError("it is a link, which is not followed")
    found, written = sums(folder), read_bytes(os.path.join(folder, "SHA256SUMS")).decode("latin")
    if written != found:
        # A line is a checksum of 64 digits, two spaces and the name of a file.
        odd = [line[66:126] for line in {*written.splitlines()} ^ {*found.splitlines()}]
        raise RunError(f"{max(odd, default='') or 'SHA256SUMS'!r} does not match its checksum")


def find(folder, which="last"):
    """Return the path of the newest checkpoint, or of `which` ("checkpoint-40" or "40").

    Raises RunError where there is none, and for a damaged one, with the way out.
    """
    names = checkpoints(folder)
    chosen = names[-1:] if which == "last" else [n for n in names if which in (n, n[11:])]
    if not chosen:
        raise RunError(f"no checkpoint {which[:60]!r} in {folder}; it has {names or 'none yet'}")
    path, before = os.path.join(folder, *chosen), names[:names.index(*chosen)]
    try:
        verify(path)
    except RunError as error:
        way_out = f"{again(folder)} --from {before[-1]}" if before else f"rm -r {quote(path)}"
        raise RunError(f"{path} is damaged: {error}; go on without it: {way_out}") from None
    return path


def read_config(folder):
    """Return a run's settings, a dict. Raises RunError where the folder holds no run."""
    try:
        config = read_json(os.path.join(check_name(folder), "config.json"))
    except RunError as error:
        raise RunError(f"no run in {folder[:60]!r}: {error}{restoring(folder)}") from None
    if config.pop("format", None) != FORMAT:
        raise RunError(f"{folder} was written by an earlier version or is no run; begin a new one")
    return config


def restoring(folder):
    """Say how a checkpoint's copy of the settings becomes the run's config.json again."""
    paths = [os.path.join(folder, name, "run_config.json") for name in checkpoints(folder)[-1:]]
    config = quote(os.path.join(folder, "config.json"))
    return "".join(f"; restore it: cp {quote(path)} {config}" for path in paths)


def load_agent(folder, agent, which="last"):
    """Load the agent of a run's newest (or named) checkpoint, without a lock. Returns its path."""
    config, path = read_config(folder), find(folder, which)
    if read_json(os.path.join(path, "run_config.json")) != {"format": FORMAT, **config}:
        raise RunError(f"config.json was edited after {path} was written{restoring(folder)}")
    if read_json(os.path.join(path, "state.json"))["base"] != fingerprint(agent.model):
        raise RunError(f"{path} was trained on another base model; restore {config.get('model')!r}")
    adapter = peft.get_peft_model_state_dict(agent.model, save_embedding_layers=False)
    adapter = read_tensors(os.path.join(path, "adapter_model.safetensors"), adapter)
    critic = read_tensors(os.path.join(path, "critic.safetensors"), agent.critic.state_dict())
    peft.set_peft_model_state_dict(agent.model, adapter)
    agent.critic.load_state_dict(critic)
    agent.policy_changed()
    return path


# -----------------------------------------------------------------------------
# The run.

class Run:
    """A run's folder, held by this process alone until close() or its end, however it ends.

    folder: as the user named it; config: the settings, a dict; resumed: opened, not created;
    seconds, cpu_seconds: what its writing processes have spent so far. checkpoint() keeps them and
    restore() brings them back; the caller counts.
    """

    note = staticmethod(tell)

    def __init__(self, folder, resumed=True, config=None):
        """Go on with a run that is there. Run.create begins one. Raises RunError."""
        self.folder, self.resumed, self.kept = folder, resumed, checkpoints(folder)
        self.config = read_config(folder) if config is None else config
        self.seconds, self.cpu_seconds, self.table = 0.0, 0.0, b""  # table: metrics.csv
        self.hold()

    def hold(self):
        """Take the lock. The kernel gives it back when the process ends."""
        self.lock = filelock.FileLock(self.path("lock"))
        try:
            self.lock.acquire(blocking=False)
        except filelock.Timeout:
            raise RunError(f"another process is at work in {self.folder}; wait for it") from None

    @classmethod
    def create(cls, folder, config):
        """Begin a run in a folder that is new or empty. Raises RunError."""
        try:
            os.makedirs(check_name(folder), exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder} cannot be made: {error.strerror}; name another") from None
        # A start that was killed before its config.json leaves a lock and temporary names.
        names = [name for name in os.listdir(folder) if not re.match(r"lock$|\.tmp-", name)]
        if "config.json" in names:
            env = str(read_config(folder).get("env"))
            raise RunError(f"{folder} holds a run already; go on with: {again(folder, env)}")
        if names:
            raise RunError(f"{folder} must be new or empty")
        run = cls(folder, False, config)
        run.write("config.json", {"format": FORMAT, **config})
        return run

    def path(self, *names):
        """Return a path inside the run's folder."""
        return os.path.join(self.folder, *names)

    def write(self, name, content):
        """Write a file of the run, as the function write does."""
        write(self.path(name), content)

    def log(self, row):
        """Append a row to metrics.csv: {column: number}, the same columns in every row."""
        parts = [row.values()] if self.table else [row, row.values()]  # the header comes first
        line = "".join(f"{','.join(map(str, part))}\n" for part in parts).encode()
        with open(self.path("metrics.csv"), "ab") as file:
            file.write(line)
        self.table += line

    def checkpoint(self, agent, trainer):
        """Write checkpoint-UPDATES whole or not at all, unless it is there, and keep the last two.

        Raises FloatingPointError where a weight is not finite, OSError where the disk fails.
        """
        state = trainer.state_dict()  # every process takes part in this
        name, hidden = f"checkpoint-{trainer.updates}", self.path(".tmp-checkpoint")
        if trainer.rank or os.path.lexists(self.path(name)):
            return
        shutil.rmtree(hidden, ignore_errors=True)
        os.mkdir(hidden)
        critic, remembered = agent.critic.state_dict(), moments(trainer)
        tensors = [*agent.policy_parameters(), *critic.values(), *remembered.values()]
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise FloatingPointError("a weight is not finite, so no checkpoint is made of it")
        try:
            agent.model.save_pretrained(hidden, save_embedding_layers=False)
        except safetensors.SafetensorError as error:  # this is how it reports a full disk
            raise OSError(str(error)) from None
        os.unlink(os.path.join(hidden, "README.md"))  # peft's model card, an empty form
        state = {"trainer": state, "base": fingerprint(agent.model), "seconds": self.seconds,
                 "cpu_seconds": self.cpu_seconds, "surroundings": surroundings()}
        # The settings and the rows come from memory: the files may have been edited meanwhile.
        files = {"state.json": to_json(state), "metrics.csv": self.table,
                 "run_config.json": to_json({"format": FORMAT, **self.config}),
                 "critic.safetensors": safetensors.torch.save(critic),
                 "optimizers.safetensors": safetensors.torch.save(remembered)}
        for file, data in files.items():
            write_bytes(os.path.join(hidden, file), data)
        write_bytes(os.path.join(hidden, "SHA256SUMS"), sums(hidden).encode())
        for file in [*os.listdir(hidden), ""]:  # the last one is the folder itself
            sync(os.path.join(hidden, file))
        os.rename(hidden, self.path(name))
        sync(self.folder)
        self.kept = checkpoints(self.folder)
        for old in self.kept[:-2]:
            # Take its name first: a kill in between must leave no checkpoint that lacks files.
            shutil.rmtree(self.path(".tmp-removed"), ignore_errors=True)
            os.rename(self.path(old), self.path(".tmp-removed"))
            shutil.rmtree(self.path(".tmp-removed"), ignore_errors=True)

    def restore(self, agent, trainer, which="last"):
        """Load a checkpoint into agent and trainer, and metrics.csv as it was then.

        Returns its update. It is 0 if the run was killed before its first checkpoint: then start
        again from the beginning, and nothing else was lost. Raises RunError.
        """
        self.kept = checkpoints(self.folder)
        if which == "last" and not self.kept:
            self.note(f"{self.folder} has no checkpoint yet: beginning again")
            self.write("metrics.csv", b"")
            return 0
        path = load_agent(self.folder, agent, which)
        state = read_json(os.path.join(path, "state.json"))
        tensors = safetensors.torch.load(read_bytes(os.path.join(path, "optimizers.safetensors")))
        load_moments("policy", trainer.policy_optimizer, tensors)
        load_moments("value", trainer.value_optimizer, tensors)
        trainer.load_state_dict(state["trainer"])
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        if state["surroundings"] != surroundings():
            self.note(f"{state['surroundings']} is now {surroundings()}: last bits may differ")
        while self.kept[-1] != os.path.basename(path):  # the run will differ from these now
            for old in (self.path(self.kept.pop()), self.path("summary.json")):
                if os.path.lexists(old) and not trainer.rank:
                    os.rename(old, free_name(*os.path.split(f"{old}.abandoned")))
        self.table = read_bytes(os.path.join(path, "metrics.csv"))
        self.write("metrics.csv", self.table)
        return trainer.updates

    def hint(self):
        """Say how to go on after a failure."""
        last = f"the last checkpoint is {self.kept[-1]}" if self.kept else "no checkpoint yet"
        if os.path.lexists(self.path("config.json")):
            return f"{last}; go on with: {again(self.folder, self.config.get('env', ''))}"
        return f"{self.folder} was renamed or removed; {last}; go on with --resume NEW-NAME"

    def close(self):
        """Let go of the folder."""
        self.lock.release()


class Follower(Run):
    """The run's folder as every process but the first sees it: it reads, and writes nothing."""

    def nothing(self, *arguments):
        """Leave this to the first process."""

    hold = note = write = log = close = nothing


class Signals(contextlib.ExitStack):
    """From here to the end of a with statement, take over SIGINT, SIGTERM and SIGHUP.

    The first one is noted, and the second ends the process. exit_code is 0, and after a signal 130,
    143 or 129. Ending at once is safe: what was being written still has its temporary name.
    quiet: write nothing, because another process does.
    """

    def __init__(self, quiet=False):
        """Take the signals over; leaving the with statement gives them back."""
        super().__init__()
        self.exit_code, self.quiet = 0, quiet
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with contextlib.suppress(ValueError):  # Python allows handlers in the main thread alone
            for number in (signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP][nohup:]):
                self.callback(signal.signal, number, signal.signal(number, self.handle))

    def handle(self, number, frame):
        """Do what a signal asks for."""
        if self.exit_code:
            tell("\nstopped at once; what is on the disk is whole")
            os._exit(128 + number)
        self.exit_code = 128 + number
        if not self.quiet:
            tell("\nfinishing this update or evaluation; again to stop at once")
