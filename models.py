"""Loading any Hugging Face causal LM, or saying in one line why not; where LoRA goes in it; what training it will take.

Nothing here runs code or unpickles data that came with a model: weights are read from safetensors alone, and
trust_remote_code stays off. Imports nothing of the project.
"""
import contextlib
import importlib.util
import os
import socket
import urllib.parse
import urllib.request
import warnings

import peft
import safetensors
import torch
import transformers
from transformers.utils.hub import constants as hub

# Section 4.3 and published scripts: LoRA on the q and v projections. Where an architecture fuses them, the fused projection
# (our choice). The first row with a member in the model is taken.
LORA_TARGETS = (("q_proj", "v_proj"), ("qkv_proj",), ("c_attn",), ("query_key_value",), ("Wqkv",))
DTYPES = ("auto", "float32", "bfloat16", "float16")  # "auto": as the weights were stored


class ModelError(ValueError):
    """A model cannot be used; the message is one line that says why and what would be right."""


@contextlib.contextmanager
def quiet():
    """Without the progress bars, load reports and warnings of transformers and peft: what matters is raised as a ModelError."""
    log, level, bars = transformers.utils.logging, transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def choose_device(name="auto"):
    """"auto" is the first of cuda, mps and cpu that is there. Returns a torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise ModelError(f"device {name!r} is not available here; use --device auto or cpu") from None


# ---------------------------------------------------------------------------------------------------------------------
# Loading

def hub_is_reachable():
    """Whether the hub's name resolves: huggingface_hub itself retries for half a minute before it says that it does not."""
    if hub.HF_HUB_OFFLINE or urllib.request.getproxies():  # behind a proxy, names resolve elsewhere
        return not hub.HF_HUB_OFFLINE
    try:
        return bool(socket.getaddrinfo(urllib.parse.urlparse(hub.ENDPOINT).hostname, 443))
    except OSError:
        return False


def check_folder(folder):
    """Refuse a folder that cannot hold a model this project would load."""
    files = os.listdir(folder)
    if "config.json" not in files:
        raise ModelError(f"{folder!r} holds no config.json; give the folder that save_pretrained wrote")
    if not any(file.endswith(".safetensors") for file in files):
        if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
            raise ModelError(f"{folder!r} holds its weights as a pickle, which may run code when read; convert them to safetensors"
                             " where you trust them: from_pretrained(folder).save_pretrained(folder)")
        raise ModelError(f"{folder!r} holds no weights; model.safetensors is missing")


def load(name, dtype="auto", device="auto", load_in=None):
    """A causal LM in evaluation mode with frozen weights, and its tokenizer, from a folder or the hub. Raises ModelError.

    dtype is one of DTYPES; load_in None, "8bit" or "4bit" (bitsandbytes).
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    device = choose_device(device)
    options = {"local_files_only": os.path.isdir(name) or not hub_is_reachable(), "trust_remote_code": False}
    if os.path.isdir(name):
        check_folder(name)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(name, **options)
            if config.is_encoder_decoder:
                raise ModelError(f"{name!r} is an encoder-decoder ({config.model_type}); TWOSOME needs a causal LM")
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True,
                output_loading_info=True, **quantization(load_in, device), **options)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, safetensors.SafetensorError) as error:
        raise ModelError(f"no causal LM could be loaded from {name!r}: {reason(name, error, options)}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{name!r} lacks {len(missing)} of the weights of a {type(model).__name__} ({missing[0]}, ...); is it a causal LM?")
    model = (model if load_in else model.to(device)).eval().requires_grad_(False)
    check(name, model, tokenizer)
    return model, tokenizer


def quantization(load_in, device):
    """Keyword arguments of from_pretrained for 8 or 4 bit weights."""
    if not load_in:
        return {}
    if load_in not in ("8bit", "4bit"):
        raise ModelError(f"unknown --load-in {load_in!r}; choose 8bit or 4bit, or leave it empty")
    if not importlib.util.find_spec("bitsandbytes"):
        raise ModelError(f"--load-in {load_in} needs bitsandbytes, which is not installed: pip install bitsandbytes, or leave --load-in empty")
    return {"quantization_config": transformers.BitsAndBytesConfig(**{f"load_in_{load_in}": True}), "device_map": {"": device}}


def reason(name, error, options):
    """One line out of a loading error."""
    text = " ".join(str(error).split())
    if isinstance(error, safetensors.SafetensorError):
        return f"its weights are damaged ({text}); fetch them again"
    if "trust_remote_code" in text:
        return "it asks to run code of its own, which is never done here; choose a model that transformers itself implements"
    if not os.path.isdir(name) and options["local_files_only"]:
        return "there is no such folder, the local cache has no such model, and the hub is not reachable"
    if "model.safetensors" in text:
        return "it has no weights in safetensors, and pickles are not read; convert them where you trust them"
    if "backend tokenizer" in text:
        return "its tokenizer is missing, or cannot be read without sentencepiece or tiktoken"
    if "Unrecognized configuration class" in text:
        return "transformers has no causal LM of this architecture"
    return text[:240] or type(error).__name__


@torch.no_grad()
def check(name, model, tokenizer):
    """Refuse a pair that would score nonsense: ids without embedding, attention to the future, numbers that are not finite."""
    vocabulary, rows = tokenizer.get_vocab(), model.get_input_embeddings().weight.shape[0]
    if not tokenizer("take the bowl")["input_ids"]:
        raise ModelError(f"{name!r} has no tokenizer; save one there: tokenizer.save_pretrained(folder)")
    if max(vocabulary.values()) >= rows:
        raise ModelError(f"the tokenizer of {name!r} has ids up to {max(vocabulary.values())}, but the embedding only {rows} rows;"
                         " they belong to different models, or model.resize_token_embeddings was forgotten")
    ids = torch.arange(2, 10, device=model.device)[None].repeat(2, 1) % rows
    ids[1, -1] = 1  # a causal LM's logits before the last token do not feel it
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if not torch.isfinite(logits).all():
        raise ModelError(f"{name!r} gives logits that are not finite; its weights are damaged, or --dtype is too narrow for them")
    if (logits[0] - logits[1]).abs().max() > 0.02 * logits.abs().max():
        raise ModelError(f"{name!r} ({model.config.model_type}) lets tokens see the ones after them: an encoder, not a causal LM")


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

def lora_targets(model, targets=None):
    """The names of the layers LoRA adapts: `targets`, a comma-separated str or "all-linear", or this architecture's default."""
    leaves = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2}
    if targets == "all-linear":
        return targets
    if targets:
        wanted = [name.strip() for name in targets.split(",") if name.strip()]
        missing = [name for name in wanted if name not in leaves]
        if missing or not wanted:
            raise ModelError(f"LoRA targets {', '.join(missing) or repr(targets)} match no layer; this model has {', '.join(sorted(leaves))}")
        return wanted
    for row in LORA_TARGETS:
        if leaves & set(row):
            return sorted(leaves & set(row))
    raise ModelError(f"no query or value projection was recognised; name layers with --lora-targets, out of {', '.join(sorted(leaves))}")


def add_lora(model, rank=8, alpha=16, targets=None):
    """The model with a fresh LoRA adapter, the only weights that train. They are float32, whatever the base is in."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ModelError("some of the model's weights are offloaded to disk, where neither scores nor gradients are right; load it whole")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=lora_targets(model, targets), task_type="CAUSAL_LM")
    with quiet():
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=True)  # float32 where the base is half
    return adapted.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Before training

def preflight(model, trees, samples=32, others=()):
    """What training will take. trees: some states' prompts, each in a tree of its own (scoring.build_tree); samples: what one
    backward pass holds; others: further modules that train (the critic). Returns (dict, text of a few lines).

    Memory is measured, not guessed: the longest tree is run once, and the tensors that autograd keeps for it are counted.
    """
    weights = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers())}
    trainable = [p for module in (model, *others) for p in module.parameters() if p.requires_grad]
    longest, kept = max(trees, key=lambda tree: len(tree.ids)), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(input_ids=longest.ids[None].to(model.device), use_cache=False, logits_to_keep=len(longest.parents)).logits
            logits.float().log_softmax(-1)
    except torch.OutOfMemoryError:
        raise ModelError("not even one prompt fits into memory; choose a smaller model, --dtype bfloat16 or --load-in 4bit") from None
    activations = sum(kept.values()) * samples
    state = sum(p.nbytes for p in trainable) * 3  # the gradient and Adam's two moments
    prompts, phrases = [len(tree.items[0][0]) for tree in trees], [len(tail) for tree in trees for tail in tree.items[0][1]]
    result = {"parameters": sum(p.numel() for p in model.parameters()) + sum(p.numel() for module in others for p in module.parameters()),
              "trainable": sum(p.numel() for p in trainable), "prompts": len(trees), "prompt_tokens": max(prompts),
              "phrase_tokens": max(phrases), "packed": len(longest.ids), "samples": samples,
              "memory_bytes": sum(weights.values()) + sum(p.nbytes for module in others for p in module.parameters()) + state + activations}
    text = (f"model      {type(getattr(model, 'get_base_model', lambda: model)()).__name__} on {model.device}, {str(model.dtype)[6:]}\n"
            f"parameters {result['parameters']:,}, of which {result['trainable']:,} train (LoRA and critic)\n"
            f"prompts    up to {result['prompt_tokens']} tokens over {len(trees)} states, phrases {min(phrases)} to {max(phrases)},"
            f" packed up to {result['packed']}\n"
            f"memory     about {result['memory_bytes'] / 2 ** 20:,.0f} MiB for {samples} samples at once (--gradient-accumulation divides them)")
    return result, text
