"""What several tests share: tiny random models of the architectures of the README, tokenizers.

The weights are drawn wide (standard deviation 0.25), so that attention is far from uniform and a
wrong mask shows at once.
"""
import tokenizers
import torch
import transformers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = 3 * [
    "You see a tomato on the counter and an empty bowl. Next, you should pick up the tomato",
    "take the bowl and put it down",
    "chop",
    "cut the lettuce on the board",
    "serve the dish, then serve nothing",
    "walk to the kitchen. open the microwave",
]
PROMPTS = [
    "You see a tomato.",
    "You see a tomato on the counter, an empty bowl and the lettuce on the board. Next, you should",
    "walk to the kitchen. You should open the microwave, then take the bowl and put it down. Next",
]
PHRASES = [
    ["pick up the tomato", "pick up the bowl", "chop"],
    ["take the tomato", "take the bowl", "serve nothing", "cut the lettuce"],
    ["serve the dish", "serve"],
]

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 48}
LLAMA = SIZE | {"num_key_value_heads": 2}
GEMMA = LLAMA | {
    "num_hidden_layers": 4, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4}
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
       "attention_types": [[["global", "local"], 1]]}
# name: (configuration, its settings, the path that score_actions takes)
ARCHITECTURES = {
    "llama": (hf.LlamaConfig, LLAMA, "tree"),
    "qwen2": (hf.Qwen2Config, LLAMA, "tree"),
    "qwen2-window": (hf.Qwen2Config, LLAMA | WINDOW, "tree"),
    "qwen3": (hf.Qwen3Config, LLAMA | {"head_dim": 8}, "tree"),
    "mistral": (hf.MistralConfig, LLAMA | {"sliding_window": None}, "tree"),
    "mistral-window": (hf.MistralConfig, LLAMA | {"sliding_window": 8}, "tree"),
    "gemma2": (hf.Gemma2Config, GEMMA, "tree"),
    "gemma3": (hf.Gemma3TextConfig, GEMMA, "tree"),
    "phi3": (hf.Phi3Config, LLAMA | {"pad_token_id": 0}, "tree"),
    "phi3-window": (hf.Phi3Config, LLAMA | {"sliding_window": 8, "pad_token_id": 0}, "tree"),
    "gpt2": (hf.GPT2Config, GPT, "tree"),
    "gpt-neox": (hf.GPTNeoXConfig, SIZE, "tree"),
    "opt": (hf.OPTConfig, SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 24}, "tree"),
    "falcon": (hf.FalconConfig, SIZE | {"alibi": False, "new_decoder_architecture": False}, "tree"),
    "falcon-alibi": (hf.FalconConfig, SIZE | {"alibi": True}, "rows"),
    "bloom": (hf.BloomConfig, {"hidden_size": 32, "n_layer": 3, "n_head": 4}, "rows"),
    "gptj": (hf.GPTJConfig, GPT | {"rotary_dim": 4}, "tree"),
    # The self-check finds this one: its window counts columns, and its configuration hides it.
    "gpt-neo": (hf.GPTNeoConfig, NEO, "rows"),
}
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout",
            "dropout")


def model(name, vocabulary=300, attention="sdpa", **options):
    """Return a tiny random causal LM of this architecture, in float32 and evaluation mode."""
    kind, settings, _ = ARCHITECTURES[name]
    shared = {"vocab_size": vocabulary, "max_position_embeddings": 256, "bos_token_id": 1,
              "eos_token_id": 2}
    config = kind(**shared | settings | options)
    for dropout in DROPOUTS:
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    torch.manual_seed(0)
    made = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def _wrap(core, trainer, padding_side="right", **special):
    core.train_from_iterator(TEXT, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, padding_side=padding_side, **special)


def byte_bpe(padding_side="right", **special):
    """GPT-2's kind: byte-level BPE, no BOS, no pad; the space belongs to the word after it."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    return _wrap(core, trainer, padding_side, **special)


def metaspace_bpe(padding_side="left"):
    """Llama 2's kind: BPE on U+2581 for the space, one put before the text, BOS in front."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    return _wrap(core, trainer, padding_side, bos_token="<s>", eos_token="</s>",
                 unk_token="<unk>", pad_token="</s>")


def unigram():
    """T5's kind: Unigram on Metaspace pieces, with a closing token that must not end a prompt."""
    core = tokenizers.Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<pad>", "</s>"], unk_token="<unk>",
        show_progress=False)
    made = _wrap(core, trainer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)])
    return made


def merging():
    """BPE without pre-tokenisation: tokens reach across words, and across prompt and phrase."""
    core = tokenizers.Tokenizer(models.BPE())
    return _wrap(core, trainers.BpeTrainer(vocab_size=120, show_progress=False), pad_token="a")


TOKENIZERS = {
    "byte-bpe": byte_bpe, "metaspace-bpe": metaspace_bpe, "unigram": unigram, "merging": merging}
