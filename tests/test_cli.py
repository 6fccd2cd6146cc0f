"""The command line: what people see, and that their mistakes end in one line."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import batchtopk as bt
import cli
from conftest import SMALL

ROOT = Path(cli.__file__).parent
FILES = {"config.json", "sae.safetensors", "metrics.jsonl", "evaluation.json"}
METRICS = "fvu nmse mse l0 ce_clean ce_sae ce_zero ce_mean ce_degradation ce_recovered frac_alive kl".split()

def options(without=(), **changes):
    settings = {name: value for name, value in (SMALL | changes).items() if name not in without}
    return [str(part) for name, value in settings.items() for part in ("--" + name.replace("_", "-"), value)]

def invoke(*arguments, **settings):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], **settings)

def spawn(*arguments, **settings):
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)

WAITING = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise SystemExit(os.environ.get("OMP_WAIT_POLICY", "unset"))
sys.meta_path.insert(0, Finder())
os.getloadavg = lambda: (float(sys.argv[1]) * os.cpu_count(), 9, 9)
runpy.run_path("cli.py", run_name="__main__")
"""

@pytest.mark.parametrize("load, given, policy", [(0.1, {}, "unset"), (0.5, {}, "passive"),
                                                 (0.5, {"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_do_not_spin_beside_busy_cores_unless_the_user_says_so(load, given, policy):
    """torch reads it as it is imported. Bugs here once: beside one busy core a run took 3 times as long; then
    it never span, and a run on an idle machine took a fifth longer."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    command = [sys.executable, "-c", WAITING, str(load)]
    found = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    assert found.stderr.decode().strip() == policy

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run: (folder, what `train --json` printed)."""
    folder = tmp_path_factory.mktemp("runs")
    result = invoke("train", "--out", folder, "--name", "small", *options(), "--json")
    assert result.exit_code == 0, result.output
    return folder / "small", json.loads(result.stdout)

def test_train_prints_one_json_object_and_leaves_the_run(run):
    folder, printed = run
    assert {"seconds", "theta_value", "dead"} <= set(printed)
    assert (printed["run"], printed["tokens"], printed["k"]) == (str(folder), SMALL["tokens"], SMALL["k"])
    for selection in ("batch", "theta"):
        assert set(METRICS) <= set(printed[selection]) and 0 < printed[selection]["fvu"] < 1
    assert {p.name for p in folder.iterdir()} == FILES
    *_, last = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert last["tokens"] == SMALL["tokens"] and last["held_out"]["theta"]["fvu"] < 1
    assert str(ROOT) not in (folder / "config.json").read_text()

def test_eval_repeats_what_train_measured_and_needs_no_network(run):
    """As a real process, which prints JSON alone on stdout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    stdout, stderr = spawn("eval", run[0], "--json", "--device", "cpu", env=environment).communicate()
    assert stdout.count("\n") == 1, stderr
    few = json.loads(invoke("eval", run[0], "--json", "--ce-contexts", 3, "--device", "cpu").stdout)
    assert few["theta"]["fvu"] == run[1]["theta"]["fvu"] and few["theta"]["kl"] != run[1]["theta"]["kl"]
    for selection in ("batch", "theta"):
        found, expected = (result[selection] for result in (json.loads(stdout), run[1]))
        assert [found[m] for m in METRICS] == pytest.approx([expected[m] for m in METRICS], rel=1e-4)

def test_another_text_is_held_out_as_a_whole_and_the_runs_own_is_never_that_of_training(run, tmp_path):
    texts, command = [f"{i} is a number, {i * i} its square" * 3 for i in range(40)], [
        "--device", "cpu", "--ce-contexts", 1]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in texts))
    own, same, other = (json.loads(invoke("eval", run[0], *command, *more, "--json").stdout) for more in (
        [], ["--dataset", SMALL["dataset"]], ["--dataset", tmp_path / "a.jsonl", "--text-column", "words"]))
    assert [own[form] == same[form] for form in ("batch", "theta")] == [True, True]
    tokenizer = bt.LanguageModel("tiny-gpt2", device="cpu").tokenizer
    n = sum(len(tokenizer.encode(text)) for text in texts)
    assert n - 2 * 128 < other["eval_tokens"] + other["left_out"] * n <= n, "but for the rests of two halves"
    density = other["theta"]["feature_density"]
    assert len(density) == 256 and sum(density) == pytest.approx(other["theta"]["l0"], rel=1e-5)
    assert "feature_density" not in (run[0] / "evaluation.json").read_text()

@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_export_writes_what_the_sae_computes(run, tmp_path):
    path = tmp_path / "encoder.pt"
    printed = json.loads(invoke("export", run[0], "--out", path, "--json").stdout)
    assert printed["largest_difference"] == printed["flipped"] == 0
    assert printed["l0"] == printed["exported_l0"] == pytest.approx(run[1]["theta"]["l0"], rel=0.1)
    x = torch.randn(5, 256) * 20
    torch.testing.assert_close(torch.jit.load(path)(x), bt.SAE.load(run[0]).encode(x))
    refused = invoke("export", run[0], "--out", path)
    assert refused.exit_code == 2 and "exists; give another path, or --force" in refused.stderr
    half = invoke("export", run[0], "--out", path, "--dtype", "float16", "--force")
    said = r"Wrote .* has \d+\.\d\d; \d+ of [\d,]+ active entries differ"
    assert half.exit_code == 0 and re.search(said, half.stdout, re.S)
    for refused in (["--format", "onnx"], ["--format", "saelens", "--dtype", "float16"],
                    ["--out", run[0] / "config.json"]):
        assert invoke("export", run[0], *refused, "--force").exit_code == 2

def test_export_without_the_model_compares_on_made_up_activations_of_its_size(run, planted_sae, tmp_path):
    sae = bt.SAE.load(run[0])
    sae.config = dataclasses.replace(sae.config, model="/nowhere/model")
    sae.save(tmp_path / "run")
    planted_sae.save(tmp_path / "other")  # trained on activations of no language model
    for folder in ("run", "other"):
        done = invoke("export", tmp_path / folder, "--format", "saelens")
        assert done.exit_code == 0 and "made-up activations" in done.stdout, done.output
        assert (tmp_path / folder / "saelens" / "cfg.json").is_file()
        found = json.loads(invoke("export", tmp_path / folder, "--json").stdout)
        assert found["k"] / 2 < found["l0"] < 2 * found["k"] and found["tokens"] == 256

def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def test_an_sae_saved_from_python_is_measured_on_no_model_that_nobody_named(run, planted_sae, tmp_path,
                                                                            monkeypatch):
    """Bug here once: on the embedded model, silently where the widths agree; `--resume` trained it anew."""
    sae = bt.SAE.load(run[0])
    own = {field.name: getattr(sae.config, field.name) for field in dataclasses.fields(bt.Config)}
    sae.config, mine = bt.Config(**own | {"eval_tokens": 256}), tmp_path / "mine"
    monkeypatch.setattr(bt, "library_texts", lambda: [(True, Path(cli.__file__).read_text()[:9000])])
    sae.save(mine)
    before = files_of(mine)
    for command in (["eval", mine, "--dataset", SMALL["dataset"]],
                    ["latents", mine, "--model", "tiny-gpt2", "--layer", 1]):
        refused = invoke(*command, "--device", "cpu")
        said = "error: .*mine' was saved from Python.* give --model, --layer and --site\n"
        assert refused.exit_code == 2 and re.fullmatch(said, refused.stderr), refused.output
    exported = invoke("export", mine, "--out", tmp_path / "encoder.pt")
    assert exported.exit_code == 0 and "made-up activations" in exported.stdout
    resumed = invoke("train", "--resume", mine)
    assert resumed.exit_code == 2 and "saved from Python" in resumed.stderr
    assert before == files_of(mine)
    bt.SAE(bt.RunConfig(**vars(sae.config))).save(mine)  # that names a model, but is no run either
    before = files_of(mine)
    assert "nothing to resume" in invoke("train", "--resume", mine).stderr and before == files_of(mine)
    sae.save(mine)
    site = ["--model", "tiny-gpt2", "--layer", 1, "--site", "resid_pre", "--device", "cpu", "--json"]
    named = invoke("eval", mine, *site, "--ce-contexts", 1)
    assert "the text is stdlib" in named.stderr
    result = json.loads(named.stdout)
    assert 0 < result["theta"]["fvu"] < 1 and result["tokens"] is None, "nobody knows"
    assert "of training" not in invoke("eval", mine, *site[:-1], "--ce-contexts", 1).stdout
    assert len(json.loads(invoke("latents", mine, *site, "--count", 1).stdout)["latents"]) == 1
    planted_sae.save(tmp_path / "narrow")
    assert "width 48; those of 'tiny-gpt2' have 256" in invoke("eval", tmp_path / "narrow", *site).stderr

def test_an_sae_of_saelens_is_measured_and_browsed_where_its_file_says(run, tmp_path, monkeypatch):
    """The circle closes: a run's export has the run's numbers on the same text."""
    monkeypatch.setattr(bt, "library_texts", lambda: (
        (i % 20 == 19, json.loads(line)["text"]) for i, line in enumerate(open(SMALL["dataset"]))))
    folder, options = tmp_path / "saelens", ["--device", "cpu", "--json", "--ce-contexts", 1]
    sae = bt.SAE.load(run[0])
    sae.config = dataclasses.replace(sae.config, dataset="stdlib", eval_tokens=bt.Config.eval_tokens)
    sae.save(tmp_path / "own")
    assert invoke("export", run[0], "--format", "saelens", "--out", folder).exit_code == 0
    found, own = (invoke("eval", each, *options) for each in (folder, tmp_path / "own"))
    assert found.exit_code == 0 and "saved from Python or by SAELens; the text is stdlib" in found.stderr
    found, own = json.loads(found.stdout), json.loads(own.stdout)
    for name in ("eval_tokens", "left_out", "k"):
        assert found[name] == own[name]
    assert [found["theta"][m] for m in METRICS] == pytest.approx([own["theta"][m] for m in METRICS], rel=1e-4)
    one = invoke("latents", folder, 3, "--device", "cpu", "--json")
    assert json.loads(one.stdout)["latents"][0]["latent"] == 3
    assert "holds no run" in invoke("train", "--resume", folder).stderr
    cfg = json.loads((folder / "cfg.json").read_text())

    def say(**metadata):
        (folder / "cfg.json").write_text(json.dumps(cfg | {"metadata": cfg["metadata"] | metadata}))
        return invoke("eval", folder, *options)
    assert "could not be loaded; give a hub name or local folder as --model (" in say(model_name="/no").stderr
    said = r"error: .*saelens' was saved .* by SAELens .* give --model, --layer and --site\n"
    refused = say(hook_name="blocks.1.hook_resid_mid")
    assert refused.exit_code == 2 and re.fullmatch(said, refused.stderr), refused.output
    options += ["--model", "tiny-gpt2", "--layer", cfg["metadata"]["hook_name"].split(".")[1]]
    assert re.fullmatch(said, say(hook_name=None).stderr)
    assert json.loads(invoke("eval", folder, *options, "--site", "resid_pre").stdout)["eval_tokens"]

def test_a_model_layer_or_site_given_replaces_the_runs_own(run, tmp_path):
    config, seen = bt.RunConfig.load(run[0]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bt.LanguageModel, "from_config", lambda cfg, found: seen.append(cfg) or 1 / 0)
        for options in ([], ["--model", "moved/here"], ["--layer", 2], ["--site", "mlp_out"]):
            invoke("eval", run[0], *options, "--device", "cpu")
        sae = bt.SAE.load(run[0])
        sae.config = dataclasses.replace(config, module="transformer.h.1")
        sae.save(tmp_path)
        invoke("eval", tmp_path, "--layer", 2, "--device", "cpu")  # not ignored in favour of the module
    assert [(cfg.model, cfg.layer, cfg.site, cfg.module) for cfg in seen] == [
        ("tiny-gpt2", 1, "resid_pre", ""), ("moved/here", 1, "resid_pre", ""),
        ("tiny-gpt2", 2, "resid_pre", ""), ("tiny-gpt2", 1, "mlp_out", ""), ("tiny-gpt2", 2, "resid_pre", "")]

@pytest.mark.parametrize("command, left_out", [("train", {"d_model"}), ("compare", {"d_model", "seed"})])
def test_help_shows_every_field_of_config_with_its_default_and_the_important_ones_first(command, left_out):
    lines, option = invoke(command, "--help").stdout.splitlines(), r"│ --(?:no-)?([\w-]+)"
    [advanced] = [i for i, line in enumerate(lines) if "─ Advanced ─" in line]
    assert len(lines) < 160 and sum("╭─" in line for line in lines) == 2
    places = {match[1]: i for i, line in enumerate(lines) if (match := re.match(option, line))}
    for name in set(cli.FIELDS) - left_out:
        assert (places[name.replace("_", "-")] < advanced) == (name in cli.MAIN), name
    text = re.sub(r"[\s│]+", " ", "".join(lines))
    mark = {"train": "default", "compare": "methods"}[command]
    assert f"Average number of active latents per token. [{mark}: 32]" in text and "[default: (" not in text

def plain(command):
    """The help of a command as it stands in 80 columns, and as one line without borders."""
    text = invoke(command, "--help", terminal_width=80).stdout
    return text, re.sub(r"[\s│]+", " ", text)

@pytest.mark.parametrize("command", ["train", "eval", "export", "latents", "compare"])
def test_helps_are_sentences_that_begin_alike_without_doubled_brackets(command):
    for option in typer.main.get_command(cli.app).commands[command].params:
        assert re.fullmatch(r"[A-Zα].*[.\]]", option.help), option.help
    text, line = plain(command)
    assert not re.search(r"\[\[|\]\]|\] \[\w+:|By commas|[Dd]o not", line), line
    assert len(text.splitlines()) <= 100 or command == "compare", "two screens"

def test_help_marks_defaults_that_another_preset_recipe_or_study_changes():
    """Bug here once: gpt2-small was said to have batches of 512, and compare to train batchtopk alone."""
    for command, sets in (("train", cli.SETS), ("compare", {"methods": cli.STUDIES, **cli.SETS})):
        _, line = plain(command)
        for name in set(cli.FIELDS) - ({"seed"} if command == "compare" else set()):
            option = f"--(?:no-)?{name.replace('_', '-')}"
            [said] = re.findall(rf" {option} (.*?)(?= --\w| ╰)", line.partition(" Example:")[0])
            marks = [mark for mark, table in sets.items() if any(name in each for each in table.values())]
            assert not marks or f"{', '.join(marks)}: " in said and "default:" not in said, said
    assert "[tiny, ours: 512]" in plain("train")[1] and "[ours: auto]" in plain("train")[1]
    assert "methods: batchtopk,topk,jumprelu]" in plain("compare")[1]

@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_what_the_terminals_encoding_lacks_is_replaced(run, charset):
    """Bug here once: a UnicodeEncodeError for θ in a help, in a result and in a token."""
    for arguments in (["train", "--help"], ["train", "--resume", run[0]], ["latents", run[0], 3, 5]):
        said = CliRunner(charset=charset).invoke(cli.app, list(map(str, arguments)))
        assert said.exit_code == 0 and "?" in said.stdout, said.exception

@pytest.mark.parametrize("arguments, accepted", [
    (["train", "--preset"], bt.PRESETS), (["train", "--recipe"], bt.RECIPES),
    (["train", "--activation"], bt.SAES), (["train", "--site"], bt.choices_of(cli.FIELDS["site"])),
    (["compare", "--study"], cli.STUDIES), (["export", "runs/tiny", "--format"], bt.FORMATS),
    (["export", "runs/tiny", "--dtype"], ["float32", "float16"])])
def test_choices_are_shown_completed_and_refused_by_name(arguments, accepted):
    assert f"[{'|'.join(accepted)}; " in plain(arguments[0])[1]
    refused = invoke(*arguments, "huge")
    assert refused.exit_code == 2 and "Usage: " in refused.stderr
    assert all(f"'{name}'" in re.sub(r"[\s│]+", " ", refused.stderr) for name in ("huge", *accepted))
    typed = {"COMP_WORDS": " ".join(["cli.py", *arguments, ""]), "COMP_CWORD": str(len(arguments) + 1)}
    found = invoke(prog_name="cli.py", env={"_CLI.PY_COMPLETE": "complete_bash", **typed}).stdout
    assert found.split() == list(accepted)

def test_version_names_the_file_by_its_digest():
    digest = hashlib.sha256(Path(bt.__file__).read_bytes()).hexdigest()
    said = invoke("--version")
    assert said.exit_code == 0 and f"batchtopk.py {digest[:12]}, torch {version('torch')}" in said.stdout

def test_a_learning_rate_of_auto_is_that_of_a_config_that_names_none(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "train_with_bar", lambda configs, *_: seen.extend(configs.values()) or 1 / 0)
    for value in ("auto", "0", "0.01"):
        invoke("train", "--lr", value, "--name", "a")
    invoke("compare", "--activation", "topk", "--lr", "auto,0.01", "--seeds", 1)
    invoke("compare", "--activation", "topk", "--change", "lr=auto,lr=0.01", "--seeds", 1)
    assert [cfg.lr for cfg in seen] == [0, 0, 0.01, 0, 0.01, 0, 0.01]
    refused = invoke("train", "--lr", "fast")
    assert refused.exit_code == 2 and "'--lr'" in refused.stderr

def test_a_run_is_resumed_on_another_device_to_the_same_end(run, tmp_path, monkeypatch):
    interrupt_after(11, monkeypatch)
    invoke("train", "--out", tmp_path, "--name", "small", *options())
    monkeypatch.undo()
    command = ["train", "--resume", tmp_path / "small"]
    refused = invoke(*command, "--device", "cpu", "--k", 3)
    assert refused.exit_code == 2 and "leave out all but --device" in refused.stderr
    said = invoke(*command, "--device", "auto").stdout  # the CPU again, where there is no GPU
    assert "4,000 tokens of training" in said
    assert bt.SAE.load(tmp_path / "small").config.device == "auto"
    metrics = [(folder / "metrics.jsonl").read_bytes() for folder in (run[0], tmp_path / "small")]
    assert metrics[0] == metrics[1] or torch.cuda.is_available()

def test_options_reach_the_configuration(tmp_path):
    arguments = options(without=["n_latents"], tokens=512, context=64)
    invoke("train", "--out", tmp_path, *arguments, "--expansion", 0.5, "--no-skip-special")
    cfg = bt.SAE.load(tmp_path / "tiny").config
    assert (cfg.n_latents, cfg.tokens, cfg.context, cfg.skip_special) == (128, 512, 64, False)

@pytest.mark.parametrize("arguments, code, said", [
    (["train", "--device", "cuda:99"], 1, "'cuda:99' is not available.*--device cpu"),
    (["train", "--device", "meta"], 2, "'meta'; choose one of"), (["train", "--beta2", 0], 2, "beta2"),
    (["train", "--tokens", 1], 2, "tokens is 1; give a whole number from 2"),
    (["train", "--layer", 4], 2, "layer is 4; the model has the blocks 0 to 3"),
    (["train", "--module", "h.x"], 2, "no module 'h.x'; the nearest names are: transformer.h"),
    (["train", "--module", "transformer"], 2, "no tensor"), (["train", "--seed", 10**20], 2, "seed is"),
    (["train", "--expansion", 2, "--n-latents", 64], 2, "one of them"),
    *((["train", "--name", name, "--model", "nowhere"], 2, "one folder")
      for name in ("../../evil", "a/b", "", "..", "/tmp/evil")),
    *(([*command, "nowhere"], 1, "'nowhere' holds no run") for command in (
        ["eval"], ["export"], ["train", "--resume"])),
    *((["train", option, name], 1, name) for option, name in (
        ("--dataset", "nowhere.jsonl"), ("--model", "/nowhere/model"))),
    (["train", "--resume", "nowhere", "--k", "3"], 2, "leave out"),
    (["train", "--context", 4096], 2, "context is 4096; the model reads at most 128"),
    (["train", "--n-latents", 10**7, "--tokens", 2000], 2, "GB of disk")])
def test_a_mistake_ends_in_one_line_that_names_it(arguments, code, said, tmp_path):
    result = invoke(*arguments, *(["--out", tmp_path / "runs"] if arguments[0] == "train" else []))
    assert result.exit_code == code, result.output
    assert re.fullmatch(f"error: .*{said}.*\n", result.stderr), result.stderr
    assert result.stdout == "" and not list(tmp_path.glob("runs/*"))

def test_out_of_memory_is_one_line_that_says_what_to_lower(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nOf the allocated …")
    for trainer in (full, lambda *_: torch.empty(1 << 60)):
        monkeypatch.setattr(bt, "Trainer", trainer)
        result = invoke("train", "--out", tmp_path / "runs", *options())
        assert result.exit_code == 2
        assert re.fullmatch("error: out of memory; lower --n-latents, .*\n", result.stderr), result.stderr
        assert not list(tmp_path.glob("runs/*"))

def test_a_disk_without_room_is_said_in_numbers_that_differ(tmp_path, monkeypatch):
    """Bug here once: "wants 0.0 GB of disk; there are 0.0"."""
    wanted = 2 * 24 * 256 * 256
    for free in (0, wanted - 1):
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        stderr = invoke("train", "--out", tmp_path, *options()).stderr
        wants, there = re.search(r"wants ([\d.,]+) GB of disk; there are ([\d.,]+)\n", stderr).groups()
        assert wanted / 1e9 <= float(wants) < wanted / 1e9 + 0.001 and float(there) <= free / 1e9

def test_a_run_name_in_use_is_refused_and_left_alone(run):
    before = {p: p.read_bytes() for p in run[0].iterdir()}
    assert "exists" in invoke("train", "--out", run[0].parent, "--name", "small", *options()).stderr
    assert before == {p: p.read_bytes() for p in run[0].iterdir()}
    names = [cli.free_folder(run[0].parent, "small").name for _ in range(2)]
    assert names == ["small-2", "small-3"], "two processes that start together get two folders"

def test_a_damaged_evaluation_is_refused_in_a_line(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    path = tmp_path / "run" / "evaluation.json"
    good = json.loads(path.read_text())
    printed = json.loads(invoke("train", "--resume", tmp_path / "run", "--json").stdout)
    assert good == run[1] and printed == {**good, "run": str(tmp_path / "run")}, "a copy is where it is now"
    for bad in ("", "[", "[]", "{}", json.dumps({**good, "theta": {}}), json.dumps({**good, "k": "x"})):
        path.write_text(bad)
        result = invoke("train", "--resume", tmp_path / "run")
        assert result.exit_code == 2
        assert re.fullmatch("error: .*evaluation.json.*\n", result.stderr), result.stderr

def test_no_number_is_null_in_json_and_said_in_the_table(run, capsys):
    metrics = {**run[1], "theta": {**run[1]["theta"], "ce_recovered": math.nan}}
    result = {**metrics, **cli.to_json_values(metrics)}
    assert json.loads(json.dumps(result, allow_nan=False))["theta"]["ce_recovered"] is None
    cli.show_metrics(result, as_json=False)

def test_an_sae_whose_theta_was_never_estimated_is_refused(tmp_path):
    bt.SAE(bt.Config(d_model=256, n_latents=64, k=4)).save(tmp_path)
    for command in ("eval", "export", "latents"):
        result = invoke(command, tmp_path)
        assert result.exit_code == 1 and "never estimated" in result.stderr

@pytest.mark.parametrize("cause, said", [
    ("GatedRepoError", "hf auth login"), ("RepositoryNotFoundError", "OSError: a long story")])
def test_what_the_hub_refuses_is_explained(monkeypatch, cause, said, tmp_path):
    import transformers

    def refuse(*_, **__):
        raise OSError("a long story\nof many lines") from type(cause, (OSError,), {})()
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    result = invoke("train", "--preset", "gemma-2-2b", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 1 and re.fullmatch(f"error: .*google/gemma-2-2b.*{said}.*\n", result.stderr)

def interrupt_after(n_steps, monkeypatch):
    def interrupted(trainer, x, step=bt.Trainer.step, number=itertools.count(1)):
        if next(number) == n_steps:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, x)
    monkeypatch.setattr(bt.Trainer, "step", interrupted)

def test_an_interrupted_run_is_saved_and_continues_to_the_same_end(run, tmp_path, monkeypatch):
    folder, again = run[0], tmp_path / "[b]small[0]  two"  # brackets are no markup, two blanks are not one
    interrupt_after(11, monkeypatch)
    result = invoke("train", "--out", tmp_path, "--name", again.name, *options())
    said = f"saved; continue with: python cli.py train --resume '{again}'\n"
    assert result.exit_code == 130 and said in result.stderr and not (again / "sae.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    after_its_last_step = lambda *_: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(cli, "evaluate_runs", after_its_last_step)
    result = invoke("train", "--resume", again)
    assert result.exit_code == 130 and said in result.stderr and cli.saved_states(again)
    monkeypatch.undo()
    assert f"{again}: 4,000 tokens of training" in invoke("train", "--resume", again).stdout
    for name in ("config.json", "metrics.jsonl", "sae.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    finished = invoke("train", "--resume", again).stdout
    assert "Was finished; it lies in" in finished and "Saved" not in finished
    assert f"{again}. Next: python cli.py export '{again}'\n" in finished, "can be pasted"
    (again / "sae.safetensors").unlink()
    assert f"continue it with `train --resume '{again}'`\n" in invoke("eval", again).stderr

def test_a_run_that_is_interrupted_as_it_reads_stops_at_once_and_keeps_its_steps(tmp_path, monkeypatch):
    """Bug here once: it stopped when the buffer was full, minutes later, and had taken another step."""
    read, number = bt.LanguageModel.kept_activations, itertools.count(1)

    def interrupted(lm, ids):
        if next(number) == 10:  # before come 2 · 3 of held-out text, and 3 that filled the first buffer
            signal.raise_signal(signal.SIGINT)
        return read(lm, ids)
    monkeypatch.setattr(bt.LanguageModel, "kept_activations", interrupted)
    result = invoke("train", "--out", tmp_path, *options())
    assert result.exit_code == 130 and "saved; continue with: " in result.stderr, result.stderr
    assert next(number) == 11 and cli.saved_states(tmp_path / "tiny") == [(1, 2048)]

def test_the_second_signal_that_torchrun_sends_keeps_no_run_from_saying_that_it_is_saved(tmp_path, monkeypatch):
    say = cli.err.out
    monkeypatch.setattr(cli, "SIZE", 2)
    monkeypatch.setattr(cli, "saved_states", lambda folder: [(2, 768)] * any(folder.glob("state-*-0-of-2.*")))
    monkeypatch.setattr(cli.err, "out", lambda text: signal.raise_signal(signal.SIGINT) or say(text))
    interrupt_after(3, monkeypatch)
    result = invoke("train", "--out", tmp_path, *options())
    assert result.exit_code == 130 and "saved; continue with: " in result.stderr, result.stderr

@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_process_that_is_asked_to_stop_leaves_a_run_that_can_be_continued(tmp_path, number, code):
    process = spawn("train", "--out", tmp_path, *options(["dataset"], tokens=50_000_000), cwd=tmp_path)
    assert "256 latents" in process.stderr.readline()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    said = "stopping after this step\nsaved; continue.*\n"
    assert process.returncode == code and stdout == "" and re.fullmatch(said, stderr), stderr
    assert cli.saved_states(tmp_path / "tiny")

@pytest.mark.slow
def test_a_malformed_line_met_in_training_ends_in_one_line_and_the_run_is_saved(tmp_path):
    """It lies beyond the first chunk of text, which is packed before the first step."""
    rows = [json.dumps({"text": f"import module_{i}; " * 12}) for i in range(4000)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows)[:-10])
    settings = options(tokens=100_000, eval_tokens=150, dataset=tmp_path / "text.jsonl")
    stderr = spawn("train", "--out", tmp_path, *settings).communicate(timeout=120)[1]
    said = f"256 latents.*\nerror: .*text.jsonl.*; continue with: .* --resume {tmp_path / 'tiny'}\n"
    assert re.fullmatch(said, stderr), stderr
    assert cli.saved_states(tmp_path / "tiny")

def test_prose_wraps_at_words_in_a_terminal_and_stays_one_line_elsewhere():
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=40, force_terminal=terminal, highlight=False)
        cli.tell("resid_pre of block 1 " * 9, console)
        said = console.file.getvalue()
        assert said.split() == ["resid_pre", "of", "block", "1"] * 9 and (said.count("\n") > 1) == terminal

COMPARISON = ["compare", *options(without=["k"], tokens=1024, eval_tokens=256)]

def test_compare_trains_all_settings_and_seeds_and_draws_them(tmp_path, monkeypatch):
    command = [*COMPARISON, "--activation", "batchtopk,topk", "--k", "4,8", "--seeds", 2, "--out", tmp_path]
    result = invoke(*command, "--json")
    said = "8 SAEs on .*; 1,024 tokens on .*\n"
    assert re.fullmatch(said, result.stderr), result.stderr
    printed = json.loads(result.stdout)
    for r in printed["results"]:
        assert json.loads((tmp_path / r["name"] / "evaluation.json").read_text()).items() <= r.items()
    names = [f"{a}-k={k}-seed={seed}" for a in ("batchtopk", "topk") for k in (4, 8) for seed in (0, 1)]
    assert [r["name"] for r in printed["results"]] == names
    assert Path(printed["figure"]).read_bytes().startswith(b"\x89PNG")
    for r in printed["results"]:
        assert r["batch"]["l0"] == pytest.approx(r["config"]["k"], rel=1e-3)
        assert bt.SAE.load(tmp_path / r["name"]).config == bt.RunConfig(**r["config"])
    monkeypatch.setattr(bt, "LanguageModel", None)  # what is finished is only printed
    again = invoke(*command)
    table = again.stdout
    assert again.stderr == ""
    a, b = (r["theta"]["fvu"] for r in printed["results"][:2])
    assert f"batchtopk   4  {(a + b) / 2:.4f} ±{abs(a - b) / 2**0.5:.4f}" in table
    assert not any(len(line.rstrip()) > 80 for line in table.splitlines() if "±0." in line)
    for first, second in zip(printed["results"][::2], printed["results"][1::2]):
        saes = [bt.SAE.load(r["run"]) for r in (first, second)]
        a, b = (sae.W_dec[sae.tokens_since_fired < 1024].detach().double() for sae in saes)  # not rare ones
        cosines = a @ b.T
        same = (cosines == cosines.amax(0)) & (cosines == cosines.amax(1, True)) & (cosines > 0.9)
        share = (same.any(1).double().mean() + same.any(0).double().mean()) / 2
        assert first["agreement"] == second["agreement"] == pytest.approx(float(share), abs=1e-6)
        assert re.search(rf" {share:.0%}  +\d+ *$", table, re.M) and "agree" in table

def test_seeds_agree_where_their_latents_are_mutual_nearest_neighbours(monkeypatch):
    a, other = (torch.nn.functional.normalize(torch.randn(60, 32), dim=1) for _ in range(2))
    for entries in (1 << 24, 7 * 60):  # in one chunk, in several
        monkeypatch.setattr(cli, "COSINES", entries)
        order = torch.randperm(60)
        assert cli.agreement(a, a[order]) == 1, "a permuted copy"
        assert cli.agreement(a, torch.cat([a[:15], other[15:]])[order]) == pytest.approx(0.25)
        assert cli.agreement(a, -a) == cli.agreement(a, other) == 0, "an opposite direction is another"
        near, far = (a + size * other for size in (0.3, 0.9))
        assert cli.agreement(a, 5 * near) > 0.9 and cli.agreement(a, far) < 0.1, "by cosine, above 0.9"
        assert cli.agreement(a, a[:15]) == cli.agreement(a[:15], a) == pytest.approx((1 + 0.25) / 2)
        twice = torch.cat([a, near[:30]])  # two of these near one of those: one of them is its pair
        assert cli.agreement(a, twice) == pytest.approx((1 + 60 / 90) / 2)
        assert cli.agreement(a, a[:0]) == cli.agreement(a[:0], a) == 0

def test_agreement_is_that_of_seeds_without_their_rare_latents():
    cfg = bt.Config(d_model=32, n_latents=40, k=2, device="cpu")  # a million tokens: under 10 are rare
    changes = {"a": {}, "b": {"seed": 1}, "c": {"seed": 2}, "alone": {"k": 3}}
    trainers = {name: bt.Trainer(dataclasses.replace(cfg, **each)) for name, each in changes.items()}
    assert set(cli.seeds_agreement(trainers).values()) == {0}, "all are rare"
    a, b, c, _ = trainers.values()
    b.sae.W_dec.data[:20] = a.sae.W_dec[20:]
    for trainer, often in ((a, slice(20, 40)), (b, slice(0, 20)), (c, slice(0, 40))):
        trainer.n_fired[:], trainer.n_fired[often] = 9, 10
    assert cli.seeds_agreement(trainers) == dict.fromkeys("abc", 1 / 3), "1 of one pair, 0 of two"

def test_an_interrupted_comparison_continues_with_the_same_command(tmp_path, monkeypatch):
    command = [*COMPARISON, "--activation", "batchtopk,topk", "--k", 8, "--seeds", 1, "--out", tmp_path]
    interrupt_after(5, monkeypatch)
    result = invoke(*command)
    assert result.exit_code == 130 and "saved; continue with: the same command" in result.stderr
    assert "other configurations" in invoke(*command, "--lr", "1e-3").stderr
    monkeypatch.undo()
    results = json.loads(invoke(*command, "--json").stdout)["results"]
    assert [r["name"] for r in results] == ["batchtopk-seed=0", "topk-seed=0"]
    assert not any("agreement" in r for r in results) and "agree" not in invoke(*command).stdout

def clock_of(monkeypatch, seconds=0):
    """A clock for cli.py that goes on by so many seconds whenever it is read; [0] of it is the time."""
    clock = [0.0]

    def monotonic():
        clock[0] += seconds
        return clock[0]
    monkeypatch.setattr(cli, "time", types.SimpleNamespace(**{**vars(time), "monotonic": monotonic}))
    return clock

def test_the_time_that_is_left_is_that_of_reading_and_of_steps(monkeypatch):
    """Bugs here once: what was in the buffer was to be read once more, "about 15 min" of 6; a time left of
    13:22, 1:48 and 2:21 one after the other; "0 tokens/s"."""
    clock, bar = clock_of(monkeypatch), cli.Bar(8_000, passes=2)
    stats = [bt.StepStats(0, 0, 0, 0.5, 3, 0, 0, 0)]

    def then(seconds, tell, *done):
        clock[0] += seconds
        tell(*done)
        return bar.progress.tasks[0].description

    assert then(50, bar.read, 100, 900) == "reading 100 of 900 tokens", "the model was loaded in this time"
    assert then(10, bar.read, 200, 900) == "reading 200 of 900 tokens  10 tokens/s  0:01:10 left"
    then(70, bar.read, 905, 900)
    assert then(10, bar.read, 100, 1000) == "reading 100 of 1,000 tokens  10 tokens/s  0:01:30 left"
    then(90, bar.read, 1000, 1000)  # the buffer is full: 3,000 will be read later
    clock[0] += 60  # the first step warms up
    assert re.search("dead 0$", then(0, bar.step, 100, stats)), "neither a pace nor a time is known"
    assert then(1, bar.step, 200, stats).endswith("dead 0  100 tokens/s  0:06:18 left"), "300 + 78 s"
    assert then(18, bar.step, 2000, stats).endswith("  100 tokens/s  0:06:00 left")
    task = bar.progress.tasks[0]
    assert then(50, bar.read, 500, 1000) == "reading 500 of 1,000 tokens  10 tokens/s  0:05:10 left"
    assert (task.completed, task.total) == (2000, 8000), "the bar is that of training"
    assert then(1, bar.cross_entropy, 1, 9) == "cross-entropy: 1 of 9 contexts" and task.total == 9
    assert then(1, bar.cross_entropy, 2, 9) == "cross-entropy: 2 of 9 contexts  0:00:07 left"

def test_a_run_and_an_evaluation_say_how_much_they_have_read(tmp_path, monkeypatch):
    """Bug here once: "0 % loading the model and text", for 11 minutes. Elsewhere: a line a minute."""
    clock_of(monkeypatch, 61)
    few = options(tokens=2560, checkpoint_minutes=1e6, ce_contexts=16)
    stderr = invoke("train", "--out", tmp_path, *few).stderr
    assert stderr.index("reading 1,024 of 2,") < stderr.index("256 latents") < stderr.index("cross-entropy: ")
    for said in ("94%  reading 2,048 of 2,176 tokens  17 tokens/s  0:00:08 left",
                 "100%  reading 2,048 of 2,048 tokens  "):
        assert said in stderr, stderr
    assert re.search(r"\n80%  fvu 0\.\d+  L0 \d\.\d  dead .*  \d tokens/s  0:\d\d:\d\d left\n", stderr)
    stderr = invoke("eval", tmp_path / "tiny", "--device", "cpu").stderr
    assert stderr.index("reading 1,024 of 2,176 tokens") < stderr.index("cross-entropy: ")

def test_a_stop_is_heard_at_once_or_when_it_is_looked_for_and_the_second_at_once(monkeypatch):
    before, reached = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], []
    for number, patient, times in itertools.product((signal.SIGINT, signal.SIGTERM), (False, True), (1, 2)):
        stop = cli.Stop()
        with contextlib.suppress(SystemExit), stop:
            stop.patient = patient
            for _ in range(times):
                signal.raise_signal(number)
                reached.append((number, patient, times))
        assert stop.number == number
        assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert len(reached) == 4 and all(patient for _, patient, _ in reached), "after the first of one or two"
    with pytest.raises(KeyError), cli.Stop():
        raise KeyError

@pytest.mark.parametrize("tokens, said", [(40_000, "fewer than 1 of the last 40,000 tokens"),
                                          (150_000, "fewer than 2 of the last 150,000"),
                                          (10**9, "fewer than 10 of the last 1,000,000")])
def test_how_often_a_rare_latent_fired_is_said_in_whole_tokens_that_were_counted(run, capsys, tokens, said):
    """Bug here once: "fewer than one in 100,000", of a run of 40,000; "0.4 % dead" beside frac_alive 0.94."""
    cli.show_metrics(run[1] | {"tokens": tokens}, as_json=False)
    table = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert said in table and "dead, silent for --dead-tokens" in table
    assert cli.MEANINGS["frac_alive"] == "share of latents that fired on these held-out tokens"

def test_every_curve_of_a_comparison_says_its_setting(monkeypatch):
    """Bug here once: the last panel did not say its k, nor of which n_latents it was."""
    from matplotlib.figure import Figure
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))

    def panels(names, groups):
        theta = {"fvu": 0.1, "ce_degradation": 0.1, "l0_histogram": [1, 2, 3, 1]}
        groups = {key: [{"k": k, "theta": theta}] for key, k in groups.items()}
        cli.draw_comparison(names, groups, "")
        return [axes.get_legend_handles_labels()[1] for axes in drawn[-1].axes]
    *errors, last = panels(["activation", "k"], {("topk", "4"): 4, ("topk", "16"): 16, ("batchtopk", "4"): 4})
    assert errors == [["TopK", "BatchTopK"]] * 2, "k is below the curves"
    assert sorted(last) == ["BatchTopK, k = 4: 90 % have 0 to 3", "TopK, k = 16: 90 % have 0 to 3"]
    *errors, last = panels(["activation", "n_latents"], {("topk", "64"): 8, ("topk", "128"): 8})
    assert errors == [["TopK, k = 8"]] * 2 and last == ["TopK, n_latents = 64, k = 8: 90 % have 0 to 3"]

@pytest.mark.parametrize("study", cli.STUDIES)
def test_every_study_is_one_of_configurations_that_can_share_a_stream(study, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "comparison_results", lambda configs, folder: seen.update(configs) or 1 / 0)
    invoke("compare", "--study", study, "--seeds", 1)
    assert len(seen) == len({bt.config_json(cfg) for cfg in seen.values()}) > 1
    assert cli.check_shared(seen) in seen.values()
    if study == "recipe":
        ours, paper = (seen[f"batchtopk-recipe={name}-seed=0"] for name in ("ours", "paper"))
        recipe = {name: value for name, value in bt.RECIPES["paper"].items() if name in cli.OWN}
        assert paper == dataclasses.replace(ours, **recipe), "of the text they read the same"
        assert ours == bt.RunConfig.preset("tiny")
        seen.clear()
        invoke("compare", "--recipe", "paper,ours", "--activation", "batchtopk", "--seeds", 1)
        assert seen["batchtopk-recipe=paper-seed=0"] == bt.RunConfig.preset("tiny", "paper")
        assert seen["batchtopk-recipe=ours-seed=0"].max_norm == 0, "the first recipe's text"
        seen.clear()
        invoke("compare", "--recipe", "paper", "--activation", "topk", "--seeds", 1)
        assert [*seen.values()] == [bt.RunConfig.preset("tiny", "paper", activation="topk")]
    if study == "training":
        none, lr = (seen[f"batchtopk-change={change}-seed=0"] for change in ("none", "lr=0.006"))
        assert lr == dataclasses.replace(none, lr=0.006)

@pytest.mark.parametrize("arguments, said", [
    (["--k", "4;8"], "'4;8'"), 
    (["--recipe", "ours,mine"], "'mine'.*ours, paper"),
    (["--change", "layer=2"], "field to change is 'layer'.*k, activation,"), (["--change", "lr"], "lr is ''"),
    (["--activation", "relu"], "'relu'"), (["--batch-size", "1000,1024"], "1000.*batch_size")])
def test_a_comparison_that_cannot_be_is_refused_in_a_line(arguments, said, tmp_path):
    result = invoke("compare", "--out", tmp_path, *arguments)
    assert result.exit_code == 2 and re.fullmatch(f"error: .*{said}.*\n", result.stderr), result.stderr
    assert not list(tmp_path.iterdir())

def test_latents_shows_chosen_ones_and_writes_a_page_that_needs_nothing_else(run, tmp_path):
    command = ["latents", run[0], "--device", "cpu"]
    page = invoke(*command, "--count", 5, "--top", 3, "--json", "--html", tmp_path / "page.html")
    printed = json.loads(page.stdout)
    densities = [latent["density"] for latent in printed["latents"]]
    assert densities == sorted(densities, reverse=True) and len(densities) == 5
    assert densities[-1] * printed["tokens"] >= 3
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "default-src 'none'" in page
    assert sum(printed[name] for name in ("rarely_fired", "never_fired")) < 251
    everything = json.loads(invoke(*command, "--count", 256, "--top", 99, "--json").stdout)
    assert everything["rarely_fired"] == 0, "all that fired are shown, since fewer fired on 99 tokens"
    assert len(everything["latents"]) + everything["never_fired"] == 256
    text = invoke(*command, 7, 3).stdout
    assert text.index("latent 7 ") < text.index("latent 3 ")
    contexts = re.findall(r"^ +[\d.e+]+  .*", text, re.M)
    assert len(contexts) > 10 and all(len(line) <= 80 and re.search("«.+»", line) for line in contexts), text
    assert "latent 256 does not exist; give numbers from 0 to 255" in invoke(*command, 256).stderr

def test_no_output_replaces_a_file_of_a_run_or_what_is_no_file(run, tmp_path):
    """Bug here once: `latents RUN --html RUN/config.json` destroyed the run."""
    mine = shutil.copytree(run[0], tmp_path / "mine")
    for name in FILES:
        assert "file of a run" in invoke("latents", mine, 3, "--html", mine / name).stderr
    assert files_of(run[0]) == files_of(mine)
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "comparison.png").symlink_to(tmp_path / "elsewhere")
    for command in (["latents", mine, "--html", tmp_path / "link.html"],
                    ["latents", mine, "--html", tmp_path], ["compare", "--out", tmp_path]):
        refused = invoke(*command)
        assert refused.exit_code == 2 and "not a regular file" in refused.stderr, refused.output
    assert not (tmp_path / "elsewhere").exists()

EVIL = '</script><script>alert("x")</script>&\x1b[31m\n'
CONTEXT = {"tokens": [EVIL, "[red]", "weak"], "activations": [4.0, 0.0, 0.5], "start": 0, "peak": 0,
           "value": 4.0}
LATENT = {"latent": 1, "density": 0.5, "max": 4.0, "mean": 1.0, "promotes": [[EVIL, 1.0]], "suppresses": [],
          "fires_on": [[EVIL, 0.98765]], "lower": [], "neighbours": [], "top": [CONTEXT]}

def test_token_text_cannot_become_markup_or_leave_its_line():
    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: "".join(CONTEXT["tokens"][i] for i in ids))
    page = cli.latents_page("<b>about</b>", [LATENT], torch.tensor([[0, 1, 2, 1]]), tokenizer)
    assert page.count("</script>") == 2 and not any(bad in page for bad in ("\x1b", "<b>", "innerHTML"))
    data = json.loads(re.search('id="data">(.*)</script>', page)[1])
    assert data == {"about": "<b>about</b>", "tokens": CONTEXT["tokens"], "text": [0, 1, 2, 1],
                    "latents": [LATENT | {"fires_on": [[EVIL, 0.988]], "top": [[0, 3, 0, 0, 4.0, 2, 0.5]]}]}
    with cli.out.capture() as captured:
        cli.show_latent(LATENT)
    assert "\x1b" not in captured.get() and f"«{cli.short(EVIL)}»[red]" in captured.get()
    styles = {str(span.style) for span in cli.context_line(CONTEXT, 4.0).spans}
    assert styles == {"bold reverse cyan", "cyan"}, "weak activations are less conspicuous than strong ones"

@pytest.mark.parametrize("blank", ["▁", "Ġ"])
def test_a_token_is_shown_as_it_stands_in_text(blank):
    """Bug here once: Llama 2's tokenizer strips the first blank, and contexts were "comparisoninvolvingsNaN".
    Others tidy up, and take the blank before a full stop."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    texts = [" comparison", " involving", "s", " NaN", " .", " n't", "   ", "\n", "é", "<|end|>"]
    words = [text.replace(" ", blank) for text in texts]
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if blank == "Ġ":
        words[7:9], decoder = ["Ċ", "Ã©"], decoders.ByteLevel()
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    plain.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|end|>", clean_up_tokenization_spaces=True)
    assert [tokenizer.decode([i]) for i in range(len(texts))] != texts, "or this would test nothing"
    assert [cli.token_text(tokenizer, i) for i in range(len(texts))] == texts

def test_all_tokens_of_a_latent_are_shown_so(run, monkeypatch):
    sae, lm = cli.load(run[0], "cpu")
    monkeypatch.setattr(cli, "token_text", lambda tokenizer, token: f"<{token}>")
    [latent] = cli.describe_latents(sae, lm, torch.arange(4096).view(32, 128), count=1)["latents"]
    shown = [token for token, _ in latent["promotes"] + latent["suppresses"]]
    shown += [token for context in latent["top"] for token in context["tokens"]]
    assert all(re.fullmatch(r"<\d+>", token) for token in shown) and len(shown) > 40

def test_what_is_said_of_a_latent_is_so(run):
    """Against the dense encoder: densities, largest activations, contexts and the activations in them."""
    sae, lm = cli.load(run[0], "cpu")
    contexts = bt.held_out_contexts(sae.config, lm.tokenizer)[1][:12]
    f, kept = torch.zeros(*contexts.shape, 256), lm.is_kept(contexts)
    f[kept] = sae.encode(lm.activations(contexts)[kept]).detach()
    text = [[lm.tokenizer.decode([i]) for i in context.tolist()] for context in contexts]
    for latent in cli.describe_latents(sae, lm, contexts, count=6, top=4)["latents"]:
        mine = f[..., latent["latent"]]
        best = mine.amax(1).sort(descending=True).values
        expected = [float(x) for x in ((mine > 0).sum() / kept.sum(), best[0], mine[mine > 0].mean())]
        assert [latent[name] for name in ("density", "max", "mean")] == pytest.approx(expected, rel=1e-5)
        assert [e["value"] for e in latent["top"]] == pytest.approx(best[best > 0][:4].tolist(), rel=1e-5)
        for e in latent["top"] + latent["lower"]:
            c, t = divmod(e["start"], 128)
            assert text[c][t : t + 24] == e["tokens"]
            assert mine[c, t : t + 24].tolist() == pytest.approx(e["activations"], abs=2e-4)
            assert e["activations"][e["peak"]] == pytest.approx(e["value"], abs=1e-4)
        assert all(0 < e["value"] <= latent["top"][-1]["value"] + 1e-6 for e in latent["lower"])
        word = latent["fires_on"][0][0]
        on = torch.tensor([[cli.as_word(token) == word for token in context] for context in text])
        assert latent["fires_on"][0][1] == pytest.approx(float(mine[on].sum() / mine.sum()), abs=1e-4)
        assert [share for _, share in latent["fires_on"]] == sorted(
            (share for _, share in latent["fires_on"]), reverse=True) and latent["fires_on"][-1][1] >= 0.01
        row = sae.W_dec[latent["latent"]].detach()
        cosines = torch.cosine_similarity(sae.W_dec.detach(), row[None]).sort().values
        assert latent["neighbours"][0][1] == pytest.approx(float(cosines[-2]), abs=1e-4)
        direction = (row - row.mean()) * lm.model.transformer.ln_f.weight
        effect = lm.model.get_output_embeddings().weight.detach() @ direction
        effect -= effect.mean()
        for name, i in (("promotes", int(effect.argmax())), ("suppresses", int(effect.argmin()))):
            assert latent[name][0] == [lm.tokenizer.decode([i]), pytest.approx(float(effect[i]), abs=1e-4)]

def test_all_latents_take_as_many_operations_as_a_few(run):
    """Bug here once: each made a tensor of all contexts, so that 4,096 latents took six minutes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    (sae, lm), counts = cli.load(run[0], "cpu"), []
    contexts = bt.held_out_contexts(sae.config, lm.tokenizer)[1][:4]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[-1] += 1
            return function(*args, **(kwargs or {}))
    for n in (2, 200):
        counts.append(0)
        with Count():
            assert len(cli.describe_latents(sae, lm, contexts, list(range(n)))["latents"]) == n
    assert counts[0] == counts[1] > 0

def test_words_match_whole_whatever_stands_around_them():
    assert {cli.as_word(token) for token in (" June", "june", "JUNE,", '"June')} == {"june"}
    assert [cli.as_word(token) for token in ("junes", ' "', "\n\n", " ->")] == ["junes", '"', "\n\n", "->"]

SHARES = [{"june": 0.4, "may": 0.1}, {"may": 0.6}, {"junes": 1.0}, {"june": 0.9, "8": 0.02}, {"2": 0.5}]

@pytest.mark.parametrize("phrase, found", [
    ("June", {3: 0.9, 0: 0.4}), (" june  may", {3: 0.9, 1: 0.6, 0: 0.5}), ("jun", {}), ("8", {3: 0.02}),
    ("2", {2: 0.0, 4: 0.5})])
def test_a_concept_finds_latents_by_share_and_a_number_first_that_latent_also_on_the_page(phrase, found):
    """Bug here once: the page found words that contained a text, in the order of density."""
    assert cli.find_latents(SHARES, phrase) == pytest.approx(found)
    assert list(cli.find_latents(SHARES, phrase)) == list(found)
    if not shutil.which("node"):
        pytest.skip("the page's own search needs node")
    page = (ROOT / "tests/assets/latents.html").read_text()
    parts = [re.search(pattern, page, re.M | re.S)[0] for pattern in (
        "^const numbers.*?;$", "^const asWord.*?;$", "^function matching.*?^}$")]
    latents = [{"latent": j, "fires_on": list(own.items())} for j, own in enumerate(SHARES)]
    script = [f"const latents = {json.dumps(latents)};", *parts,
              f"console.log(JSON.stringify(matching({json.dumps(phrase.strip())}).map(each => each.latent)))"]
    ranked = subprocess.run(["node", "-e", "\n".join(script)], stdout=subprocess.PIPE).stdout
    assert json.loads(ranked) == list(found)

def test_latents_are_found_by_words_from_the_command_line(run):
    command = ["latents", run[0], "--device", "cpu", "--find"]
    found = json.loads(invoke(*command, "self", "--count", 3, "--json").stdout)["latents"]
    shares = [latent["share"] for latent in found]
    assert shares == sorted(shares, reverse=True) and shares[-1] > 0.01 and len(shares) == 3
    assert all(["self", latent["share"]] in latent["fires_on"] for latent in found)
    said = invoke(*command, "self", "--count", 1).stdout
    assert f"{shares[0]:.0%} of its activation on 'self'" in said and f"self {shares[0]:.0%}" in said
    nothing = invoke(*command, "elf").stdout
    assert nothing.startswith("0 of 256 latents") and ": none has 1% of its activation" in nothing and "others" not in nothing
    assert invoke(*command, "self", "--text", "a").exit_code == invoke(*command, "a", 3).exit_code == 2

def test_a_text_is_shown_token_by_token_as_the_dense_encoder_sees_it(run, tmp_path):
    sae, lm = cli.load(run[0], "cpu")
    text = "def june(self):\n    return" + " path" * 130  # more than a context
    command = ["latents", run[0], "--device", "cpu", "--text"]
    found = json.loads(invoke(*command, text, "--json").stdout)
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    begin, rows = lm.tokenizer.bos_token_id, found["text"]
    parts = [torch.tensor([[begin, *part]]) for part in (ids[:127], ids[127:])]
    f = torch.cat([sae.encode(lm.activations(part)[0]).detach() for part in parts])
    assert [row["token"] for row in rows] == [lm.tokenizer.decode([i]) for part in parts for i in part[0]]
    unread = [i for i, row in enumerate(rows) if not row["read"]]
    assert unread == [0, 128] and not any(rows[i]["latents"] for i in unread), "the begin tokens"
    everything = {latent["latent"]: latent for latent in cli.describe_latents(
        sae, lm, cli.text_to_read(sae.config, lm), range(256))["latents"]}
    for row, own in list(zip(rows, f))[1:128]:
        strongest, active = own.topk(5), own.nonzero()[:, 0].tolist()
        assert row["active"] == len(active)
        shown = [latent["latent"] for latent in row["latents"][:5]]
        assert shown == strongest.indices.tolist()[: len(active)]
        [rarest] = [latent for latent in row["latents"] if latent["rarest"]]
        assert rarest["density"] == min(everything[j]["density"] for j in active)
        for latent in row["latents"]:
            whole = everything[latent["latent"]]
            assert latent["value"] == pytest.approx(float(own[latent["latent"]]), rel=1e-4)
            assert [latent["word"], latent["share"]] == (whole["fires_on"] or [["", 0]])[0]
    (tmp_path / "a.txt").write_text(text)
    shown = invoke(*command, tmp_path / "a.txt").stdout
    assert shown == invoke(*command, "-", input=text).stdout
    lines = shown.splitlines()[2:]
    assert len(lines) == len(rows) and all(len(line) <= 80 for line in lines) and "not read" in lines[0]
    assert all(line.split()[1].isdecimal() and "*" in line for line in lines[1:3])
    assert "the text is empty" in invoke(*command, "").stderr
