"""Loading, LoRA, adapters in peft's own format, the preflight, and every refusal in one line."""
import json
import shutil

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers

import models
import ppo
import tiny
import scoring
import twosome

torch.set_num_threads(1)
ITEMS = [(prompt, tuple(phrases)) for prompt, phrases in zip(tiny.PROMPTS, tiny.PHRASES)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer, as save_pretrained writes it; not to be written to."""
    folder = tmp_path_factory.mktemp("llama")
    with models.quiet():
        tiny.model("llama").save_pretrained(folder)
        tiny.byte_bpe().save_pretrained(folder)
    return folder


def test_load_gives_a_frozen_model_without_a_word(saved, capfd, recwarn):
    model, tokenizer = models.load(str(saved), device="cpu")
    assert not model.training and not any(p.requires_grad for p in model.parameters()) and model.dtype == torch.float32
    assert capfd.readouterr() == ("", "") and not recwarn
    for ours, theirs in zip(model.parameters(), tiny.model("llama").parameters()):
        assert torch.equal(ours, theirs)
    assert transformers.utils.logging.is_progress_bar_enabled()  # as it was


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_half_precision_base_float32_adapter(name, dtype, recwarn):
    agent = twosome.Agent(tiny.model(name).to(getattr(torch, dtype)), tiny.byte_bpe())
    assert {p.dtype for p in agent.policy_parameters()} == {torch.float32} and {p.dtype for p in agent.value_parameters()} == {torch.float32}
    fast, naive = (torch.cat(score(agent.model, agent.tokenizer, *zip(*ITEMS), "token")) for score in (scoring.score_actions, scoring.score_actions_naive))
    assert fast.dtype == torch.float32 and (fast - naive).abs().max() < 0.25
    assert not [warning for warning in recwarn if "row a phrase" in str(warning.message)]  # half precision is no reason to fall back
    sum(row[0] for row in agent.log_probs(ITEMS)).backward()
    agent.values(ITEMS).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in agent.policy_parameters() + agent.value_parameters())


FUSED = {"phi3": ["qkv_proj"], "phi3-window": ["qkv_proj"], "gpt2": ["c_attn"], "gpt-neox": ["query_key_value"], "falcon": ["query_key_value"],
         "falcon-alibi": ["query_key_value"], "bloom": ["query_key_value"]}


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_lora_goes_to_the_query_and_value_projections(name, recwarn):
    model = tiny.model(name, attention="eager")
    targets = FUSED.get(name, ["q_proj", "v_proj"])
    assert models.lora_targets(model) == targets
    adapted = models.add_lora(model)
    trained = {parameter for parameter, value in adapted.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * len(targets) * model.config.num_hidden_layers and all("lora_" in name for name in trained)
    assert not recwarn


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_the_saved_adapter_is_pefts_own(name, tmp_path):
    base, saved, with_adapter = tmp_path / "base", tmp_path / "adapter", tmp_path / "peft"
    replaced_by(lambda: tiny.model(name))(base)
    tiny.byte_bpe().save_pretrained(base)
    agent = twosome.Agent(*models.load(str(base), device="cpu"))
    prior = agent.log_probs(ITEMS)
    for parameter_name, parameter in agent.model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    agent.policy_changed()
    scores = agent.log_probs(ITEMS)
    saved.mkdir()
    agent.save(saved)  # as a checkpoint holds it, and as peft itself would write it
    agent.model.save_pretrained(with_adapter)
    for folder in (saved, with_adapter):
        with models.quiet():
            loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
        assert all(torch.equal(a, b) for a, b in zip(scores, scoring.score_actions(loaded, agent.tokenizer, *zip(*ITEMS))))
    merged = scoring.score_actions(loaded.merge_and_unload(), agent.tokenizer, *zip(*ITEMS))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(scores, merged))
    assert not torch.allclose(scores[0], prior[0], atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

def refused(match, call, *arguments, **options):
    with pytest.raises(models.ModelError, match=match) as told:
        call(*arguments, **options)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def without(name):
    return lambda folder: (folder / name).unlink()


def truncated(share):
    return lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:share])


def config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **changes}))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def weights(change):
    def spoil(folder):
        state = safetensors_torch.load_file(folder / "model.safetensors")
        change(state)
        safetensors_torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    from safetensors import torch as safetensors_torch
    return spoil


def larger_tokenizer(folder):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(400)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


def replaced_by(made):
    def replace(folder):
        with models.quiet():
            made().save_pretrained(folder)
    return replace


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.5))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


FOLDERS = {
    "no config": ("no config.json", without("config.json")),
    "config that is no JSON": ("no causal LM could be loaded", lambda folder: (folder / "config.json").write_text("{")),
    "no weights": ("holds no weights", without("model.safetensors")),
    "a pickle": ("convert them to safetensors", pickled),
    "half the weights": ("damaged", truncated(-1000)),
    "no bytes": ("damaged", truncated(0)),
    "one weight missing": ("lacks 1 of the weights", weights(lambda state: state.pop("model.layers.0.mlp.up_proj.weight"))),
    "shapes of another model": ("no causal LM could be loaded", config(intermediate_size=50)),
    "not finite": ("not finite", weights(lambda state: state["model.norm.weight"].fill_(float("nan")))),
    "no tokenizer": ("tokenizer", lambda folder: [path.unlink() for path in folder.glob("tok*")]),
    "larger tokenizer": ("ids up to 399, but the embedding only 300", larger_tokenizer),
    "remote code": ("run code of its own", config(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})),
    "unknown architecture": ("mine", config(model_type="mine")),
    "encoder-decoder": ("encoder-decoder", replaced_by(t5)),
    "encoder": ("an encoder, not a causal LM", replaced_by(bert)),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(case, saved, tmp_path, capfd):
    match, spoil = FOLDERS[case]
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    spoil(folder)
    capfd.readouterr()
    refused(match, models.load, str(folder), device="cpu")
    assert capfd.readouterr() == ("", "")


def test_other_refusals(saved, monkeypatch):
    monkeypatch.setattr(models, "hub_is_reachable", lambda: False)
    refused("no such folder", models.load, "nobody/no-such-model")
    refused("no such folder", models.load, "./no/such/folder/at all")
    refused("auto, float32, bfloat16, float16", models.load, str(saved), dtype="float8")
    refused("8bit or 4bit", models.load, str(saved), load_in="2bit")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    refused("pip install bitsandbytes", models.load, str(saved), load_in="4bit")
    refused("not available here", models.choose_device, "tpu9")
    refused("match no layer; this model has", models.lora_targets, tiny.model("llama"), "q_proj,query")
    refused("match no layer", models.lora_targets, tiny.model("llama"), " , ")


# ---------------------------------------------------------------------------------------------------------------------
# Before training, and when memory runs out

def test_preflight_counts():
    agent = twosome.Agent(tiny.model("llama"), tiny.byte_bpe())
    report, text = agent.preflight(ITEMS, samples=8)
    trees = [scoring.build_tree([scoring.tokenize(agent.tokenizer, *item)]) for item in ITEMS]
    assert report["trainable"] == sum(p.numel() for p in agent.policy_parameters() + agent.value_parameters())
    assert report["parameters"] == sum(p.numel() for p in [*agent.model.parameters(), *agent.critic.parameters()])
    assert (report["prompt_tokens"], report["packed"]) == (max(len(tree.items[0][0]) for tree in trees), max(len(tree.ids) for tree in trees))
    assert report["phrase_tokens"] == max(len(tail) for tree in trees for tail in tree.items[0][1])
    more, _ = agent.preflight(ITEMS, samples=16)
    assert more["memory_bytes"] > report["memory_bytes"] > 4 * report["parameters"]
    assert f"{report['parameters']:,}" in text and text.count("\n") < 6


def test_token_report_shows_tokens_words_and_log_probabilities():
    model, tokenizer = tiny.model("llama"), tiny.byte_bpe()
    text = scoring.token_report(model, tokenizer, ["take the bowl", "chop"], "You should")
    joint, = scoring.joint_log_probs(model, tokenizer, ["You should"], [["take the bowl", "chop"]])
    line = next(line for line in text.splitlines() if "take the bowl" in line)
    score, per_token, per_word, tokens, words = (float(number) for number in line.split()[:5])
    assert (score, tokens, words) == (pytest.approx(joint[0].item(), abs=1e-3), len(scoring.tokenize(tokenizer, "You should", ("take the bowl",))[1][0]), 3)
    assert (per_token, per_word) == (pytest.approx(score / tokens, abs=1e-3), pytest.approx(score / words, abs=1e-3))


class Small:
    """An agent of one linear layer whose memory runs out at every second call with more than `room` items."""
    def __init__(self, room):
        self.weight, self.value = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)), torch.nn.Parameter(torch.zeros(1))
        self.room, self.calls = room, []

    def encode(self, obs, info):
        return tuple(obs)

    def log_probs(self, items):
        self.calls += [len(items)] * torch.is_grad_enabled()
        if torch.is_grad_enabled() and len(items) > self.room and self.calls.count(len(items)) % 2 == 0:  # with a part's gradient taken already
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB") if self.room > 1 else RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return list((torch.tensor(items, dtype=torch.float32) @ self.weight).log_softmax(-1))

    def values(self, items):
        return self.value.repeat(len(items))

    def policy_parameters(self):
        return [self.weight]

    def value_parameters(self):
        return [self.value]

    def policy_changed(self):
        pass


class Lottery:
    """Observations are numbers drawn anew; action 1 pays."""
    def reset(self, seed=None):
        self.rng = np.random.default_rng(seed)
        return self.rng.normal(size=2), {}

    def step(self, action):
        return self.rng.normal(size=2), float(action == 1), False, False, {}


@pytest.mark.parametrize("room", [8, 3, 1])
def test_a_minibatch_that_does_not_fit_is_split_with_the_same_result(room):
    def trained(room):
        trainer = ppo.PPO(Lottery, Small(room), ppo.Config(steps=32, num_envs=2, rollout_steps=8, minibatch=8, target_kl=0.0, policy_lr=0.1), seed=3)
        return trainer, trainer.iterate()

    whole, expected = trained(99)
    if room >= 8:
        split, metrics = trained(room)
    else:
        with pytest.warns(UserWarning, match="does not fit into memory"):
            split, metrics = trained(room)
    assert max(split.agent.calls[-2:]) <= room and split.parts == {8: 1, 3: 4, 1: 8}[room]
    assert torch.allclose(split.agent.weight, whole.agent.weight, atol=1e-6)
    assert metrics["policy_loss"] == pytest.approx(expected["policy_loss"], abs=1e-5)


def test_memory_that_no_split_cures_is_an_error():
    trainer = ppo.PPO(Lottery, Small(0), ppo.Config(steps=32, num_envs=2, rollout_steps=8, minibatch=8), seed=3)
    with pytest.raises(RuntimeError, match="allocate memory"), pytest.warns(UserWarning):
        trainer.iterate()


def test_a_model_whose_weights_are_elsewhere_is_refused():
    with pytest.raises(models.ModelError, match="load it whole"):
        models.add_lora(tiny.model("llama").to("meta"))
