"""The command line: what people see, and that their mistakes end in one line."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import batchtopk as bt
import cli
from conftest import SMALL

ROOT = Path(cli.__file__).parent
OPTIONS = [text for name, value in SMALL.items() for text in ("--" + name.replace("_", "-"), str(value))]
METRICS = {"fvu", "nmse", "mse", "l0", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "ce_degradation", "ce_recovered", "frac_alive", "kl"}


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run: (folder, what `train --json` printed)."""
    folder = tmp_path_factory.mktemp("runs")
    result = invoke("train", "--out", folder, "--name", "small", *OPTIONS, "--json")
    assert result.exit_code == 0, result.output
    return folder / "small", json.loads(result.stdout)


def test_train_prints_one_json_object_and_leaves_the_run(run):
    folder, printed = run
    assert {"run", "tokens", "seconds", "k", "theta_value", "batch", "theta"} <= set(printed)
    assert printed["run"] == str(folder) and printed["tokens"] == SMALL["tokens"] and printed["k"] == SMALL["k"]
    for selection in ("batch", "theta"):
        assert METRICS <= set(printed[selection]) and 0 < printed[selection]["fvu"] < 1
    assert printed["batch"]["l0"] == pytest.approx(SMALL["k"], rel=1e-3)
    assert {"config.json", "sae.safetensors", "state.safetensors", "metrics.jsonl"} == {p.name for p in folder.iterdir()}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) > 10 and records[-1]["tokens"] == SMALL["tokens"] and records[-1]["held_out"]["theta"]["fvu"] < 1
    assert str(ROOT) not in (folder / "config.json").read_text(), "a run should not know where it was made"


def test_eval_repeats_what_train_measured(run):
    folder, printed = run
    again = json.loads(invoke("eval", folder, "--json", "--device", "cpu").stdout)
    for selection in ("batch", "theta"):
        assert again[selection]["l0_histogram"] == printed[selection]["l0_histogram"]
        assert {m: again[selection][m] for m in METRICS} == pytest.approx({m: printed[selection][m] for m in METRICS})
    table = invoke("eval", folder, "--device", "cpu")
    assert table.exit_code == 0 and f"{printed['theta']['fvu']:.4f}" in table.stdout and "Active latents per token" in table.stdout


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_export_writes_what_the_sae_computes(run, tmp_path):
    folder, _ = run
    printed = json.loads(invoke("export", folder, "--out", tmp_path / "encoder.pt", "--json").stdout)
    assert printed["largest_difference"] == 0 and printed["bytes"] == (tmp_path / "encoder.pt").stat().st_size
    x = torch.randn(5, 256) * 20
    torch.testing.assert_close(torch.jit.load(tmp_path / "encoder.pt")(x), bt.SAE.load(folder).encode(x))
    assert "Loaded again and compared" in invoke("export", folder, "--out", tmp_path / "encoder.pt").stdout


def test_every_field_of_config_is_an_option_with_its_default():
    text = re.sub(r"[\s│]+", " ", invoke("train", "--help").stdout)
    for field in dataclasses.fields(bt.Config):
        assert "--" + field.name.replace("_", "-")[:20] in text, field.name
    assert "average active latents per token" in text and "[default: (32)]" in text


def test_an_expansion_sets_the_latents(tmp_path):
    options = [o for name, o in zip(OPTIONS[::2], OPTIONS[1::2]) if name != "--n-latents" for o in (name, o)]
    result = invoke("train", "--out", tmp_path, *options, "--tokens", 512, "--expansion", 0.5, "--json")
    assert json.loads(result.stdout)["run"] == str(tmp_path / "tiny") and bt.SAE.load(tmp_path / "tiny").config.n_latents == 128


@pytest.mark.parametrize("arguments, code, said", [
    (["train", "--preset", "huge"], 2, "'huge'.*tiny, gpt2-small, gemma-2-2b"),
    (["train", "--layer", 9], 2, "layer is 9.*0 to 3"),
    (["train", "--site", "resid"], 2, "'resid'.*resid_pre"),
    (["train", "--module", "transformer.x"], 2, "'transformer.x'.*wte"),
    (["train", "--k", 5000], 2, "5000.*4096 latents"),
    (["train", "--d-model", 7], 2, "d_model is 7.*256"),
    (["train", "--expansion", 2, "--n-latents", 64], 2, "one of them"),
    (["train", "--dataset", "nowhere.jsonl"], 1, "nowhere.jsonl.*does not exist"),
    (["train", "--model", "/nowhere/model"], 1, "'/nowhere/model' could not be loaded"),
    (["eval", "nowhere"], 1, "'nowhere' is not a run"),
    (["export", "nowhere"], 1, "'nowhere' is not a run"),
    (["train", "--resume", "nowhere"], 1, "'nowhere' holds no state"),
    (["train", "--resume", "nowhere", "--k", "3"], 2, "leave out"),
])
def test_a_mistake_ends_in_one_line_that_names_it(arguments, code, said, tmp_path):
    result = invoke(*arguments, *(["--out", tmp_path] if arguments[0] == "train" else []))
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == code, result.output
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(said, lines[0]), result.stderr
    assert result.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must not be there")
def test_a_gpu_that_is_not_there_is_an_error():
    result = invoke("train", "--device", "cuda")
    assert result.exit_code == 1 and re.search("'cuda' is not available.*--device cpu", result.stderr)


def test_a_run_name_in_use_is_refused_and_left_alone(run):
    folder, _ = run
    before = {p: p.read_bytes() for p in folder.iterdir()}
    result = invoke("train", "--out", folder.parent, "--name", folder.name, *OPTIONS)
    assert result.exit_code == 1 and "exists" in result.stderr and before == {p: p.read_bytes() for p in folder.iterdir()}
    assert cli.free_folder(folder.parent, folder.name).name == "small-2"


def test_an_sae_whose_theta_was_never_estimated_is_refused(tmp_path):
    bt.SAE(bt.Config(d_model=256, n_latents=64, k=4)).save(tmp_path)
    for command in ("eval", "export"):
        result = invoke(command, tmp_path)
        assert result.exit_code == 1 and "never estimated" in result.stderr and len(list(tmp_path.iterdir())) == 2


class GatedRepoError(OSError):
    """Named like the hub's own."""


class LocalEntryNotFoundError(OSError):
    """Named like the hub's own."""


@pytest.mark.parametrize("cause, said", [(GatedRepoError("403"), "hf auth login"), (LocalEntryNotFoundError("offline"), "cannot be reached")])
def test_what_the_hub_refuses_is_explained(monkeypatch, cause, said, tmp_path):
    import transformers

    def refuse(*_, **__):
        raise OSError("a long story\nof many lines") from cause

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    result = invoke("train", "--preset", "gemma-2-2b", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 1 and said in result.stderr and "google/gemma-2-2b" in result.stderr and result.stderr.count("\n") == 1


def test_an_interrupted_run_is_saved_and_continues_to_the_same_end(run, tmp_path, lm, monkeypatch):
    folder, printed = run
    update = cli.TrainingBar.update

    def interrupt_after(self, cfg, tokens, stats):
        self.interrupted = tokens == 11 * SMALL["batch_size"]
        update(self, cfg, tokens, stats)

    monkeypatch.setattr(cli.TrainingBar, "update", interrupt_after)
    result = invoke("train", "--out", tmp_path, "--name", "small", *OPTIONS)
    assert result.exit_code == 130 and f"--resume {tmp_path / 'small'}" in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "small" / "sae.safetensors").exists()
    monkeypatch.undo()
    result = invoke("train", "--resume", tmp_path / "small", "--json")
    assert json.loads(result.stdout)["theta"] == printed["theta"]
    for name in ("sae.safetensors", "metrics.jsonl", "config.json"):
        assert (tmp_path / "small" / name).read_bytes() == (folder / name).read_bytes(), name
    assert "is finished" in invoke("train", "--resume", tmp_path / "small").stderr


def test_a_real_process_stops_at_ctrl_c_with_a_run_that_can_be_continued(tmp_path):
    options = [o if o != str(SMALL["tokens"]) else "50_000_000" for o in OPTIONS]
    process = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), "train", "--out", str(tmp_path), *options], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "256 latents" in process.stderr.readline()  # shown when the first step is done
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == "" and "stopped and saved" in stderr and "Traceback" not in stderr, stderr
    assert (tmp_path / "tiny" / "state.safetensors").exists()


def test_a_real_process_prints_json_alone_on_stdout_and_needs_no_network(run):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), "eval", str(run[0]), "--json", "--device", "cpu"], capture_output=True,
                          text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert json.loads(done.stdout)["theta"]["fvu"] == pytest.approx(run[1]["theta"]["fvu"], rel=1e-4)


def test_importing_the_module_pulls_in_neither_transformers_nor_datasets():
    code = "import sys, batchtopk; bad = {'transformers', 'datasets', 'typer', 'rich', 'safetensors'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SHAPE = ["--d-model", "16", "--n-latents", "64", "--batch-size", "32", "--k", "4", "--repeat", "2", "--device", "cpu"]


def test_bench_measures_every_part_and_draws_what_each_saves(tmp_path):
    result = json.loads(invoke("bench", *SHAPE, "--json", "--figure", tmp_path / "deep" / "savings.png").stdout)
    assert (result["d_model"], result["n_latents"], result["batch_size"], result["k"]) == (16, 64, 32, 4)
    assert {"encoder product, float32", "step, float32", "TopK step, float32", "plain step, float32"} <= set(result["seconds"])
    assert all(0 < low <= middle <= high for low, middle, high in result["seconds"].values())
    assert len(result["phases"]) == 6 and all(sides["dense"][1] > 0 < sides["sparse"][1] for sides in result["phases"].values())
    product, step = (result["seconds"][name][1] for name in ("encoder product, float32", "step, float32"))
    assert result["float32"]["step/product"] == pytest.approx(step / product) and result["matrix_bytes"] == 4 * 32 * 64
    assert (tmp_path / "deep" / "savings.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_bench_fit_eighty_columns():
    lines = [line for line in invoke("bench", *SHAPE).stdout.splitlines() if "  " in line.strip()]
    assert any("plain step" in line for line in lines) and not any("…" in line or len(line) > 80 for line in lines), lines


def test_peak_memory_is_what_a_call_held_at_once():
    before = torch.ones(1 << 20)

    def hold():
        torch.ones(1 << 24)  # 64 MiB, freed before the next
        kept = torch.ones(1 << 25)
        return kept, before + 1  # 128 and 4 MiB at once

    assert cli.peak_memory(hold, torch.device("cpu")) == pytest.approx(132 << 20, rel=1e-5)


COMPARISON = ["--activation", "batchtopk,topk", "--k", "4,8", "--seeds", "2"]
COMPARISON += [text for name, value in SMALL.items() if name != "k" for text in ("--" + name.replace("_", "-"), str(value))]


def test_compare_trains_all_settings_and_seeds_and_draws_them(tmp_path, monkeypatch):
    result = invoke("compare", "--out", tmp_path, *COMPARISON, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert len(printed["results"]) == 8 and {r["config"]["activation"] for r in printed["results"]} == {"batchtopk", "topk"}
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == printed["results"]
    assert {r["name"] for r in printed["results"]} == {f"{a}-k={k}-seed={seed}" for a in ("batchtopk", "topk") for k in (4, 8) for seed in (0, 1)}
    assert Path(printed["figure"]).read_bytes().startswith(b"\x89PNG")
    for r in printed["results"]:
        assert r["batch"]["l0"] == pytest.approx(r["k"], rel=1e-3) and bt.SAE.load(tmp_path / r["name"]).config.seed == r["config"]["seed"]
    monkeypatch.setattr(bt, "Trainer", None)  # what is finished is not trained again
    table = invoke("compare", "--out", tmp_path, *COMPARISON)
    assert table.exit_code == 0 and "±" in table.stdout and not any(len(line) > 80 for line in table.stdout.splitlines() if "topk  " in line)
    other = invoke("compare", "--out", tmp_path, *COMPARISON, "--beta1", "0.8")
    assert other.exit_code == 2 and "other configurations" in other.stderr


def test_recipes_and_single_changes_are_settings_too(tmp_path, monkeypatch):
    seen = {}

    def stop(configs, lm, folder, on_step):
        seen.update(configs)
        raise bt.Unavailable("seen enough")

    monkeypatch.setattr(bt, "train_together", stop)
    invoke("compare", "--out", tmp_path, "--study", "recipe", "--change", "none,lr=0.5", "--seeds", "1")
    assert list(seen) == [f"batchtopk-recipe={r}-change={c}-seed=0" for r in ("ours", "paper") for c in ("none", "lr=0.5")]
    ours, changed, paper, _ = seen.values()
    assert changed == dataclasses.replace(ours, lr=0.5) and (paper.lr, paper.batch_size, paper.normalize, paper.b_dec_init) == (3e-4, 4096, "token", "zero")
    assert paper.n_latents == ours.n_latents and paper.decay == paper.warmup == 0 and (paper.beta1, paper.beta2) == (0.9, 0.99)


@pytest.mark.parametrize("study", cli.STUDIES)
def test_every_study_is_one_of_configurations_that_can_share_a_stream(study, tmp_path, monkeypatch):
    def stop(configs, lm, folder, on_step):
        raise bt.Unavailable(f"{len(bt.check_together(configs) and configs)} SAEs")

    monkeypatch.setattr(bt, "train_together", stop)
    result = invoke("compare", "--out", tmp_path, "--study", study, "--seeds", "1")
    assert int(re.search(r"error: (\d+) SAEs", result.stderr)[1]) > 1


@pytest.mark.parametrize("arguments, said", [
    (["--k", "4;8"], "'4;8'"), (["--study", "all"], "'all'.*methods, k,"), (["--recipe", "ours,mine"], "'mine'.*ours, paper"),
    (["--change", "layer=2"], "'layer' cannot be varied"), (["--change", "lr"], "lr is ''"), (["--activation", "relu"], "'relu'"),
    (["--batch-size", "1000,1024"], "1000, does not divide 1024")])
def test_a_comparison_that_cannot_be_is_refused_in_a_line(arguments, said, tmp_path):
    result = invoke("compare", "--out", tmp_path, *arguments)
    assert result.exit_code == 2 and re.search(said, result.stderr) and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not list(tmp_path.iterdir())


def test_latents_shows_chosen_ones_and_writes_a_page_that_needs_nothing_else(run, tmp_path):
    folder, _ = run
    printed = json.loads(invoke("latents", folder, "--count", 5, "--top", 3, "--json", "--device", "cpu", "--html", tmp_path / "page.html").stdout)
    densities = [latent["density"] for latent in printed["latents"]]
    assert len(densities) == 5 and densities == sorted(densities, reverse=True) and densities[-1] * printed["tokens"] >= 3
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<article ") == 5 and not re.search(r"(src|href)=\"(?!data:)", page) and "default-src 'none'" in page
    text = invoke("latents", folder, 7, 3, "--device", "cpu").stdout
    assert text.index("latent 7 ") < text.index("latent 3 ") and "promotes" in text and "neighbours" in text
    assert not any(len(line) > 80 for line in text.splitlines()[1:]), text
    wrong = invoke("latents", folder, 256, "--device", "cpu")
    assert wrong.exit_code == 2 and "latent 256 does not exist; give numbers from 0 to 255" in wrong.stderr


def test_token_text_cannot_become_markup_or_leave_its_line():
    evil = '<script>alert("x")</script>&\x1b[31m\n'
    example = {"tokens": [evil, "[red]"], "activations": [1.0, 0.0], "peak": 0, "value": 1.0}
    latent = {"latent": 1, "density": 0.5, "max": 1.0, "mean": 1.0, "top": [example], "lower": [], "promotes": [[evil, 1.0]], "suppresses": [],
              "neighbours": []}
    page = cli.latents_page("<b>about</b>", [latent])
    assert page.count("<script>") == 1 and "\x1b" not in page and "<b>about" not in page
    assert page.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;·[31m↵") == 2
    with cli.out.capture() as captured:
        cli.show_latent(latent)
    assert "\x1b" not in captured.get() and "[red]" in captured.get() and captured.get().count(evil[:8]) == 2


def test_what_is_said_of_a_latent_is_so(run, lm):
    """Against the dense encoder: densities, largest activations, contexts shown once, activations of the tokens beside the peak."""
    folder, _ = run
    sae = bt.SAE.load(folder)
    lm = bt.LanguageModel.from_config(sae.config)
    contexts = bt.held_out_contexts(sae.config, lm.tokenizer)[1][:12]
    f = torch.zeros(*contexts.shape, 256)
    kept = lm.is_kept(contexts)
    f[kept] = sae.encode(lm.activations(contexts)[kept]).detach()
    for latent in bt.describe_latents(sae, lm, contexts, count=6, top=4):
        mine = f[..., latent["latent"]]
        assert latent["density"] == pytest.approx(float((mine > 0).sum() / kept.sum())) and latent["max"] == pytest.approx(float(mine.max()), rel=1e-5)
        best = mine.amax(1).sort(descending=True).values
        assert [e["value"] for e in latent["top"]] == pytest.approx(best[best > 0][:4].tolist(), rel=1e-5)
        for e in latent["top"] + latent["lower"]:
            text = [[lm.tokenizer.decode([i]) for i in context.tolist()] for context in contexts]
            places = [(c, t) for c in range(12) for t in range(len(text[c])) if text[c][t : t + 24] == e["tokens"]]
            found = [mine[c, t : t + 24].tolist() for c, t in places]
            assert any(activations == pytest.approx(e["activations"], abs=2e-4) for activations in found)
            assert e["activations"][e["peak"]] == pytest.approx(e["value"], abs=1e-4)
        assert all(e["value"] <= latent["top"][-1]["value"] + 1e-6 for e in latent["lower"])
        rows = torch.nn.functional.normalize(sae.W_dec, dim=1).detach()
        cosines = rows @ rows[latent["latent"]]
        assert latent["neighbours"][0][1] == pytest.approx(float(cosines.sort().values[-2]), abs=1e-4)
        effect = lm.model.get_output_embeddings().weight.detach() @ sae.W_dec[latent["latent"]].detach()
        effect -= effect.mean()
        for name, token in (("promotes", int(effect.argmax())), ("suppresses", int(effect.argmin()))):
            assert latent[name][0] == [lm.tokenizer.decode([token]), pytest.approx(float(effect[token]), abs=1e-4)]
