"""The READMEs are true of this commit: files, functions, flags, output, snippets and figures."""
import importlib
import os
import re
import shlex

import pytest
import torch

import twosome
from engine import command, models, runs

ROOT = os.path.dirname(os.path.abspath(twosome.__file__))
EXPERIMENTS = os.path.join("experiments", "README.md")
BOTH = ("README.md", EXPERIMENTS)
OF_A_RUN = {"config.json", "baseline.json", "metrics.csv", "curve.png", "summary.json"}
SHORT = "--steps 256 --num-envs 2 --rollout-steps 32 --episodes 4".split()
NAME = "runs/tomato-salad-seed1"  # the run of the README's first command


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def snippets():
    """Return the Python code of the README: what stands between ```python and ```."""
    return re.findall(r"^```python\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)


def commands(name):
    """Return the command lines of a README, without their comments, as a shell reads them."""
    lines = re.findall(r"^    (.+)$|^((?:python|torchrun|accelerate|pip) .+)$|`(python [^`]+)`",
                       read(name), re.MULTILINE)
    words = [shlex.split("".join(parts), comments=True) for parts in lines
             if re.match(r"(python|torchrun|accelerate) ", "".join(parts))]
    return [each for each in words if any(word.endswith(".py") for word in each)]


def skeleton(text):
    """Return the set of a text's lines with every number and run of spaces made alike."""
    lines = [re.sub(r"[\d.,]*\d", "#", " ".join(line.split())) for line in text.splitlines()]
    return {line for line in lines if line}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the README's first command has run, but for fewer steps."""
    before, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(tmp_path_factory.mktemp("readme"))
    assert twosome.main(["--env", "overcooked", *SHORT]) == 0
    assert os.listdir("runs") == [os.path.basename(NAME)]
    yield os.getcwd()
    os.chdir(before)
    torch.set_num_threads(threads)


# -----------------------------------------------------------------------------
# What is named is there.


@pytest.mark.parametrize("name", BOTH)
def test_every_file_named_exists(name):
    text = read(name)
    paths = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", text))
    paths |= set(re.findall(r"`([\w./-]+\.(?:py|md|json|png|svg|csv|txt|gif|toml))`", text))
    own_code = set(re.findall(r"[Ss]ave it as\s+`([\w.]+)`", text))
    folders = ("", "engine", "experiments", "experiments/results", os.path.dirname(name))
    assert len(paths) > 5
    for path in paths - OF_A_RUN - own_code:
        assert any(os.path.exists(os.path.join(ROOT, folder, path)) for folder in folders), path


def test_every_room_and_every_part_of_the_basement_is_named():
    text = read("README.md")
    for folder in ("", "engine"):
        for name in os.listdir(os.path.join(ROOT, folder)):
            if name.endswith(".py") and name != "__init__.py":
                assert f"`{name}`" in text, name


def test_the_table_from_section_to_function_names_what_is_there():
    rows = re.findall(r"^\| ([45].*) \| `(\w+)\.py`: (.*) \|$", read("README.md"), re.MULTILINE)
    assert {row[0][:3].strip(", ") for row in rows} >= {"4.1", "4.2", "4.3", "4.4", "5"}
    assert {module for _, module, _ in rows} == {"twosome", "prompts", "ppo", "envs"}
    for _, module, names in rows:
        for name in re.findall(r"`([\w.]+)`", names):
            found = importlib.import_module(module)
            for part in name.split("."):
                assert hasattr(found, part), f"{module}.{name}"
                found = getattr(found, part)


@pytest.mark.parametrize("name", BOTH)
def test_every_command_named_is_one(name):
    """Those of twosome.py are parsed; of any other script the flags must stand in its text."""
    found = commands(name)
    assert found
    for words in found:
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, flags = words[at], words[at + 1:]
        assert os.path.exists(os.path.join(ROOT, script)), script
        if script == "twosome.py":
            command.parser().parse_args([flag for flag in flags if flag not in ("[...]", "...")])
            continue
        for flag in flags:
            if flag.startswith("--"):
                assert f'"{flag.split("=")[0]}"' in read(script), (script, flag)


@pytest.mark.parametrize("name", BOTH)
def test_every_flag_named_is_one(name):
    known = set(re.findall(r"--[a-z][a-z-]*", command.parser().format_help()))
    for path in os.listdir(os.path.join(ROOT, "experiments")):
        if path.endswith(".py"):
            source = read(os.path.join("experiments", path))
            known |= set(re.findall(r"\"(--[a-z][a-z-]*)\"", source))
    # torchrun's, tensorboard's, pip's and the harness's.
    elsewhere = {"--nproc-per-node", "--num-processes", "--logdir", "--no-deps", "--model_args"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", re.sub(r"<!--|-->", "", read(name))))
    assert named <= known | elsewhere, named - known - elsewhere


def test_what_is_installed_is_listed():
    for name in re.findall(r"pip install -r (\S+)", read("README.md")):
        assert os.path.exists(os.path.join(ROOT, name)), name


# -----------------------------------------------------------------------------
# What is shown happens.


def test_the_first_command_prints_what_the_readme_shows(made, capfd):
    text = read("README.md")
    shown = re.search(r"It prints\n\n(.*?)\n\n(?=\S)", text, re.DOTALL)[1]
    assert "<!--" not in shown
    assert twosome.main(["--env", "overcooked", *SHORT, "--out", NAME + "-again"]) == 0
    printed = capfd.readouterr().out.replace(NAME + "-again", NAME)
    assert len(skeleton(shown)) >= 5
    # A line may be told shorter, but never otherwise.
    for line in skeleton(shown):
        assert any(line in whole for whole in skeleton(printed)), line


def test_the_files_that_a_run_leaves_are_the_ones_that_are_named(made):
    names = set(os.listdir(NAME))
    assert OF_A_RUN <= names
    for name in OF_A_RUN:
        assert f"`{name}`" in read("README.md")


@pytest.mark.parametrize("number", range(len(snippets())))
def test_the_snippets_run_as_they_are_written(made, number, capsys):
    code = snippets()[number]
    assert ";" not in code and len(code.splitlines()) <= 24
    space = {"__name__": "snippet"}
    exec(compile(code, f"README, snippet {number + 1}", "exec"), space)
    assert "print(" not in code or capsys.readouterr().out


def test_there_are_snippets_for_scores_for_a_run_and_for_a_world():
    code = "\n".join(snippets())
    for word in ("score_actions(", "twosome.load(", "def reset(", "def step("):
        assert word in code
    assert "set_seed(" in read("README.md")


def test_the_world_of_ones_own_trains_by_the_command_that_stands_there(made):
    name, kind = re.search(r"--env (\w+\.py):(\w+)", read("README.md")).groups()
    code = next(code for code in snippets() if f"class {kind}" in code)
    with open(name, "w", encoding="utf-8") as file:
        file.write(code)
    flags = "--steps 256 --num-envs 4 --rollout-steps 16 --minibatch 32 --episodes 4".split()
    assert twosome.main(["--env", f"{name}:{kind}", *flags, "--out", "own"]) == 0
    assert runs.read_json("own/summary.json")["env"] == f"{name}:{kind}"
    # And from Python: what stands there is a world for ppo.py as it is.
    world = twosome.load("own", env=f"{name}:{kind}")[1]()
    _, info = world.reset(seed=0)
    prompt, phrases = twosome.observation_text(info)
    assert prompt and len(phrases) > 1


def test_a_checkpoint_is_an_ordinary_adapter(made):
    """The README's line, with this run and its base in the place of BASE and RUN."""
    import peft
    import transformers
    line = re.search(r"^    (PeftModel\.from_pretrained.*)$", read("README.md"), re.MULTILINE)[1]
    line = line.replace("BASE", models.locate("pocket_lm"))
    line = re.sub(r"RUN/checkpoint-\d+", runs.find(NAME), line)
    model = eval(line, vars(peft) | {"AutoModelForCausalLM": transformers.AutoModelForCausalLM})
    agent, _ = twosome.load(NAME)
    text = "You see a tomato. Your next step is to"
    ids = torch.tensor([agent.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, agent.model(input_ids=ids).logits)


# -----------------------------------------------------------------------------
# Figures come from a file.


@pytest.mark.parametrize("name", BOTH)
def test_the_tables_are_the_measured_ones(name):
    """What stands between the markers of a table is what experiments/claims.py wrote."""
    blocks = re.findall(r"<!-- (\w+) ([\w-]+) -->\n(.*?)<!-- end -->", read(name), re.DOTALL)
    assert blocks
    for group, key, block in blocks:
        written = read(os.path.join("experiments", "results", f"{group}.md"))
        title = f"## {group}: {key}\n\n"
        assert title in written, title
        assert block.strip() == written.split(title)[1].split("\n\n")[0].strip(), (group, key)
    assert not re.search(r"<!-- output -->|TODO|XXX", read(name))
