"""Command line of batchtopk: it talks to people, batchtopk.py does the work.

    python cli.py train                      # a BatchTopK SAE on the embedded GPT-2, in about a minute
    python cli.py eval runs/tiny             # its metrics on held-out text
    python cli.py export runs/tiny           # a TorchScript encoder that depends on no batch
    python cli.py latents runs/tiny          # what single latents respond to and write
    python cli.py compare                    # BatchTopK, TopK and JumpReLU on the same activations, three seeds
    python cli.py bench                      # how fast a training step is on this machine, and why

Results go to stdout, progress to stderr; --json prints one JSON object on stdout and nothing else there. A mistake ends
in one line and exit code 2 (usage) or 1 (anything else).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import logging
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from html import escape
from pathlib import Path
from typing import Annotated, Any, Callable, Iterable, Optional

import torch
import torch.nn.functional as functional
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.optim.adam import adam
from torch.profiler import ProfilerActivity, profile

import batchtopk as bt

app = typer.Typer(help="BatchTopK sparse autoencoders: train, evaluate, export, compare, measure.", no_args_is_help=True,
                  pretty_exceptions_show_locals=False, add_completion=False)
out, err = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Device = Annotated[str, typer.Option(help=bt.Config.__dataclass_fields__["device"].metadata["doc"] + ".")]
Preset = Annotated[str, typer.Option(help="Where defaults come from: " + ", ".join(bt.PRESETS) + ".")]
Run = Annotated[Path, typer.Argument(help="Folder of a run that `train` wrote, e.g. runs/tiny.", show_default=False)]


def one_line_errors(command: Callable) -> Callable:
    """Show a person's mistake as one line on stderr, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        quieten_libraries()
        try:
            command(*args, **kwargs)
        except (bt.InputError, bt.Unavailable, OSError) as error:
            why = reason(error.__cause__) if isinstance(error, bt.Unavailable) else ""
            text = f"error: {error}" + (f" ({why})" if why else "")
            say(" ".join(text.split()), style="red")
            raise typer.Exit(2 if isinstance(error, bt.InputError) else 1) from None

    return wrapped


def quieten_libraries() -> None:
    """No banners, bars or advice from the libraries on the way to a result."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler
    if "transformers" in sys.modules:  # it reads the environment when it is imported
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    for name in ("transformers", "datasets", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(text: str, style: str | None = None) -> None:
    """One line on stderr, as it is."""
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def config_options(command: Callable, lists: Iterable[str] = (), but: Iterable[str] = ()) -> Callable:
    """Give `command` an option for every other field of Config in place of its **options; those not typed stay None.
    Those in `lists` take several values, by commas, and arrive as text."""
    own = inspect.signature(command, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    types = {"int": int, "float": float, "str": str, "bool": bool}
    derived = {"d_model": "read off the model", "n_latents": "the preset's"}
    panels = {"d_model": "Dictionary", "normalize": "Dictionary", "tokens": "Training", "model": "Activations", "theta_rate": "θ and evaluation"}
    panel = ""
    for field in dataclasses.fields(bt.Config):
        if field.name in but:
            continue
        rules, flag, panel = field.metadata, "--" + field.name.replace("_", "-"), panels.get(field.name, panel)
        several, choices = field.name in lists, "|".join(rules.get("choices", ()))
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if field.type == "bool" else flag, help=rules["doc"] + ".", rich_help_panel=panel,
            show_default=derived.get(field.name) or (choices.replace("|", ",") if several and field.name == "activation" else str(field.default)) or "none",
            metavar=f"[{choices}],…" if several and choices else f"{field.type.upper()},…" if several else f"[{choices}]" if choices else None,
            **({} if several else dict(min=rules.get("min"), max=rules.get("max"))))
        annotation = Annotated[Optional[str if several else types[field.type]], option]
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None,
                                            annotation=annotation))

    @functools.wraps(command)
    def wrapped(**kwargs: Any) -> None:
        command(**kwargs)

    wrapped.__signature__ = inspect.Signature(parameters)
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapped.__wrapped__  # typer would follow it to the signature without the options
    return wrapped


@app.command(epilog="Example: python cli.py train --k 16 --n-latents 8192 --name wide")
@config_options
@one_line_errors
def train(
    *,
    preset: Preset = "tiny",
    recipe: Annotated[str, typer.Option(help="How it is trained, unless an option says otherwise: " + ", ".join(bt.RECIPES) + ".")] = "ours",
    name: Annotated[Optional[str], typer.Option(help="Name of the run's folder.",
                                                show_default="the preset's, numbered")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of all runs.")] = Path("runs"),
    expansion: Annotated[Optional[float], typer.Option(help="Have so many latents times the width of the model.",
                                                       show_default="none")] = None,
    resume: Annotated[Optional[Path], typer.Option(help="Continue this interrupted run, as it was configured.",
                                                   show_default="none")] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train an SAE on a language model's activations, calibrate θ, evaluate on held-out text."""
    given = {name: value for name, value in options.items() if value is not None}
    if resume is not None:
        if given or name or expansion:
            raise bt.InputError("--resume continues a run as it was configured; leave out the other options")
        bt.check_run_folder(resume, resume=True)
        folder, cfg = resume, bt.Config.from_json((resume / "config.json").read_text(encoding="utf-8"))
    else:
        if expansion is not None and "n_latents" in given:
            raise bt.InputError("--expansion and --n-latents both set the number of latents; give one of them")
        cfg = bt.Config.preset(preset, recipe, **{"d_model": 1, **given})  # checked before the model is loaded
        folder = out_folder / name if name else free_folder(out_folder, preset)
        bt.check_run_folder(folder)
    bt.resolve_device(cfg.device)
    with TrainingBar() as bar:
        lm = bt.LanguageModel.from_config(cfg)
        if ("d_model" in given or resume) and cfg.d_model != lm.d_model:
            raise bt.InputError(f"d_model is {cfg.d_model}, but {cfg.model!r} is {lm.d_model} wide there; leave it out")
        n_latents = round(expansion * lm.d_model) if expansion else cfg.n_latents
        cfg = dataclasses.replace(cfg, d_model=lm.d_model, n_latents=n_latents)
        try:
            result = bt.train_run(cfg, lm, folder, resume=resume is not None, on_step=lambda trainer, stats: bar.update(cfg, trainer.tokens_seen, [stats]))
        except KeyboardInterrupt:
            bar.stop()
            say(f"stopped and saved; continue with: python cli.py train --resume {folder}")
            raise typer.Exit(130) from None
    show(result, cfg, as_json)
    if not as_json:
        out.print(f"\nSaved in [bold]{folder}[/]. Next: python cli.py export {folder}", highlight=False)


@app.command("eval", epilog="Example: python cli.py eval runs/tiny --json")
@one_line_errors
def evaluate(run: Run, device: Device = bt.Config.device, as_json: Json = False) -> None:
    """Evaluate a run on held-out text: batch selection and θ side by side."""
    device = str(bt.resolve_device(device))
    sae = bt.SAE.load(run, device=device)
    sae.threshold()  # an unset θ is an error before the model is loaded
    with err.status(f"evaluating {run} on held-out text"):
        lm = bt.LanguageModel.from_config(dataclasses.replace(sae.config, device=device))
        result = bt.evaluate_run(sae, lm, run)
    show(result, sae.config, as_json)


@app.command(epilog="Example: python cli.py export runs/tiny --out encoder.pt")
@one_line_errors
def export(
    run: Run,
    out_file: Annotated[Optional[Path], typer.Option("--out", help="File to write.", show_default="RUN/encoder.pt")] = None,
    as_json: Json = False,
) -> None:
    """Write the encoder as TorchScript in JumpReLU form: each token on its own, torch alone to run it."""
    path = out_file or run / "encoder.pt"
    difference = bt.export(bt.SAE.load(run), path)
    if as_json:
        print(json.dumps({"run": str(run), "file": str(path), "bytes": path.stat().st_size,
                          "largest_difference": difference}))
    else:
        out.print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB). Loaded again and compared with the SAE on 256 "
                  f"rows: largest difference {difference:g}.", highlight=False, soft_wrap=True)


@app.command(epilog="Example: python cli.py latents runs/tiny 17 412 --html latents.html")
@one_line_errors
def latents(
    run: Run,
    numbers: Annotated[Optional[list[int]], typer.Argument(
        metavar="[LATENT …]", help="Numbers of latents. Without any, --count of those that fired on --top tokens or more, at equal steps "
        "of rank in density from the densest to the rarest: dull ones are among them.", show_default=False)] = None,
    top: Annotated[int, typer.Option(help="Contexts in which a latent is most active.", min=1)] = 10,
    count: Annotated[int, typer.Option(help="How many latents to choose where none is named.", min=1)] = 12,
    html: Annotated[Optional[Path], typer.Option(help="Write one self-contained page, with search and sort.", show_default="none")] = None,
    device: Device = bt.Config.device,
    as_json: Json = False,
) -> None:
    """Show what single latents respond to and what they write, on held-out text."""
    device = str(bt.resolve_device(device))
    sae = bt.SAE.load(run, device=device)
    sae.threshold()
    if html and not html.parent.is_dir():
        raise bt.Unavailable(f"folder {str(html.parent)!r} does not exist; create it, or choose another file")
    with err.status(f"reading held-out text with {run}"):
        lm = bt.LanguageModel.from_config(dataclasses.replace(sae.config, device=device))
        contexts = bt.held_out_contexts(sae.config, lm.tokenizer)[1]
        described = bt.describe_latents(sae, lm, contexts, numbers, count=count, top=top)
    n_tokens = int(lm.is_kept(contexts.to(lm.device)).sum())
    about = (f"{len(described)} of {sae.config.n_latents} latents of {run} on {n_tokens:,} held-out tokens, {sae.config.site} of block "
             f"{sae.config.layer} of {sae.config.model}")
    if html:
        html.write_text(latents_page(about, described), encoding="utf-8")
    if as_json:
        print(json.dumps({"run": str(run), "tokens": n_tokens, "latents": described}))
        return
    if html:
        out.print(f"Wrote {html} ({html.stat().st_size / 1e3:.0f} kB): {about}.", highlight=False, soft_wrap=True)
        return
    out.print(about, highlight=False, soft_wrap=True)
    for latent in described:
        show_latent(latent)


def show_latent(latent: dict[str, Any]) -> None:
    """One latent: what it fires on, in colour by activation, the strongest token underlined; what it writes."""
    out.print(f"\n[bold]latent {latent['latent']}[/]  density {latent['density']:.3%}, max {latent['max']:.3g}, mean {latent['mean']:.3g}", highlight=False)
    for name in ("promotes", "suppresses"):
        if latent[name]:
            out.print(Text(f"{name:<11}" + "  ".join(f"{short(token)} {effect:+.2f}" for token, effect in latent[name])), no_wrap=True, overflow="ellipsis")
    out.print(Text(f"{'neighbours':<11}" + "  ".join(f"{number} ({cosine:.2f})" for number, cosine in latent["neighbours"])), no_wrap=True)
    for title, examples in (("most active", latent["top"]), ("less active", latent["lower"])):
        if examples:
            out.print(Text(title, style="dim"))
        for example in examples:
            line = Text(f"{example['value']:>8.3g}  ")
            for i, (token, activation) in enumerate(zip(example["tokens"], example["activations"])):
                strength = activation / latent["max"] if latent["max"] else 0.0
                style = f"black on rgb({round(255 - 200 * strength)},{round(255 - 110 * strength)},255)" if activation else ""
                line.append(visible(token), style=style + (" bold underline" if i == example["peak"] else ""))
            out.print(line, no_wrap=True, overflow="ellipsis")


def short(token: str) -> str:
    """A token as a word in a list: long runs of blanks are counted."""
    return re.sub(" {3,}", lambda run: f"␣×{len(run[0])}", visible(token))


def visible(token: str) -> str:
    """A token in one line, without control characters."""
    return "".join("↵" if c == "\n" else "→" if c == "\t" else c if c.isprintable() else "·" for c in token)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>Latents</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; color: #1a1a1a; background: #fff }
h1 { font-size: 1.3rem; margin: 0 } h2 { font-size: 1.05rem; margin: 0 }
.tools { position: sticky; top: 0; background: #fff; padding: .6rem 0; display: flex; gap: .6rem; flex-wrap: wrap; align-items: center; border-bottom: 1px solid #ccc }
.tools input { flex: 1 1 12rem; min-width: 0 } .tools input, .tools select { font: inherit; padding: .3rem .5rem }
article { border-bottom: 1px solid #ddd; padding: 1rem 0 } .facts, .words, h3 { color: #555; font-size: .85rem; margin: .2rem 0; font-weight: normal }
.words code, .context { font-family: ui-monospace, monospace; font-size: .8rem } .words code { background: #eee; border-radius: 3px; padding: 0 .25rem; white-space: break-spaces; overflow-wrap: anywhere }
.context { display: flex; gap: .6rem; padding: .15rem 0; border-top: 1px dotted #ddd }
.context b { flex: 0 0 3.5rem; text-align: right; font-weight: normal; color: #555 } .context p { margin: 0; overflow-wrap: anywhere; white-space: break-spaces }
[hidden] { display: none }
</style>
</head>
<body>
<h1>Latents</h1>
<p class="facts">ABOUT. A token is darker the more the latent is active on it; the underlined one gives the number on the left.</p>
<div class="tools"><input id="search" type="search" placeholder="search tokens or a latent's number" aria-label="search">
<select id="sort" aria-label="sort by"><option value="rank">as chosen</option><option value="density">densest first</option><option value="-density">rarest first</option>
<option value="max">strongest first</option><option value="-number">by number</option></select><span id="shown" class="facts"></span></div>
<main>
ARTICLES
</main>
<script>
const main = document.querySelector("main"), all = [...main.children], search = document.getElementById("search"), sort = document.getElementById("sort");
all.forEach((a, i) => a.dataset.rank = -i);
function update() {
  const wanted = search.value.toLowerCase(), key = sort.value.replace("-", ""), sign = sort.value.startsWith("-") ? -1 : 1;
  let n = 0;
  for (const a of all) { a.hidden = !a.textContent.toLowerCase().includes(wanted); n += !a.hidden; }
  main.append(...all.sort((a, b) => sign * (b.dataset[key] - a.dataset[key])));
  document.getElementById("shown").textContent = n + " of " + all.length;
}
search.addEventListener("input", update); sort.addEventListener("change", update); update();
</script>
</body>
</html>
"""


def latents_page(about: str, described: list[dict[str, Any]]) -> str:
    """One page that needs nothing else."""
    articles = "\n".join(latent_article(latent) for latent in described)
    return PAGE.replace("ABOUT", escape(about)).replace("ARTICLES", articles or "<p>No latent fired often enough.</p>")


def latent_article(latent: dict[str, Any]) -> str:
    """One latent as HTML. Tokens are text that anyone may have written, so everything is escaped."""
    parts = [f'<article data-number="{latent["latent"]}" data-density="{latent["density"]:.9f}" data-max="{latent["max"]:.6f}">',
             f'<h2>latent {latent["latent"]}</h2>',
             f'<p class="facts">density {latent["density"]:.3%} · max {latent["max"]:.3g} · mean {latent["mean"]:.3g}</p>']
    for name in ("promotes", "suppresses"):
        words = " ".join(f"<code>{escape(short(token))}</code> {effect:+.2f}" for token, effect in latent[name])
        parts.append(f'<p class="words">{name} {words}</p>' if words else "")
    parts.append('<p class="words">neighbours ' + ", ".join(f"{number} ({cosine:.2f})" for number, cosine in latent["neighbours"]) + "</p>")
    for title, examples in (("most active", latent["top"]), ("less active: around the 75th, 50th and 25th percentile", latent["lower"])):
        parts.append(f"<h3>{title}</h3>" if examples else "")
        for example in examples:
            spans = []
            for i, (token, activation) in enumerate(zip(example["tokens"], example["activations"])):
                strength = activation / latent["max"] if latent["max"] else 0.0
                style = f"background:rgb({round(255 - 160 * strength)},{round(255 - 90 * strength)},255);color:#1a1a1a;" if activation else ""
                style += "font-weight:bold;text-decoration:underline" if i == example["peak"] else ""
                text = escape(visible(token))
                spans.append(f'<span style="{style}" title="{activation:.3g}">{text}</span>' if style else text)
            parts.append(f'<div class="context"><b>{example["value"]:.3g}</b><p>{"".join(spans)}</p></div>')
    return "\n".join(part for part in parts if part) + "\n</article>"


STUDIES = {  # what `compare --study` varies, unless an option says otherwise; values by commas
    "methods": {},
    "k": {"k": "16,32,64"},
    "latents": {"n_latents": "1024,2048,4096,8192"},
    "batch": {"activation": "batchtopk", "batch_size": "64,256,1024,4096,8192"},
    "lr": {"activation": "batchtopk", "lr": "0.0003,0.001,0.002,0.003,0.005,0.01"},
    "recipe": {"activation": "batchtopk", "recipe": "ours,paper"},
    "training": {"activation": "batchtopk", "change": "none,lr=0.0015,lr=0.006,batch_size=512,batch_size=2048,beta1=0.9,beta1=0,beta2=0.99,"
                 "warmup=0.1,decay=0,decay=0.6,b_dec_init=zero,encoder_init=0.5,normalize=token,aux_coef=0,dead_tokens=100000"},
}


@app.command(epilog="Example: python cli.py compare --activation batchtopk,topk --k 16,32,64 --seeds 1")
@functools.partial(config_options, lists=bt.OWN, but=("seed", "d_model"))
@one_line_errors
def compare(
    *,
    preset: Preset = "tiny",
    study: Annotated[str, typer.Option(help="What is varied, unless an option says otherwise: " + ", ".join(STUDIES) + ".")] = "methods",
    recipe: Annotated[str, typer.Option(help="Recipes, by commas: " + ", ".join(bt.RECIPES) + ".", show_default="ours")] = "",
    change: Annotated[str, typer.Option(help="Single changes FIELD=VALUE, by commas, each tried alone; none is one too.", show_default="none")] = "",
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, 2 … of each.", min=1)] = 3,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of the comparison; an interrupted one there continues.")] = Path("runs/compare"),
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train several SAEs on the same activations, from one pass over the model, and compare them on held-out text."""
    if study not in STUDIES:
        raise bt.InputError(f"study {study!r} is unknown; choose one of: {', '.join(STUDIES)}")
    given = {name: value for name, value in options.items() if value is not None}
    lists = {"activation": "batchtopk,topk,jumprelu", **STUDIES[study], **{name: given.pop(name) for name in bt.OWN if name in given}}
    lists |= {name: text for name, text in (("recipe", recipe), ("change", change)) if text}
    values = {name: [part.strip() for part in text.split(",")] for name, text in lists.items()}
    settings = [dict(zip(values, combination)) for combination in itertools.product(*values.values())]
    configs, varied = {}, [name for name in values if len(values[name]) > 1]
    for setting, seed in itertools.product(settings, range(seeds)):  # all are checked before the model is loaded
        overrides = {name: value for name, value in setting.items() if name not in ("recipe", "change")}
        if (pair := setting.get("change", "none")) != "none":
            overrides.update([pair.split("=", 1)] if "=" in pair else [(pair, "")])
        parsed = {name: parse_value(name, text) for name, text in overrides.items()}
        name = "-".join(setting[part] if part == "activation" else f"{part}={setting[part]}" for part in ("activation", *(v for v in varied if v != "activation")))
        configs[f"{name}-seed={seed}"] = bt.Config.preset(preset, setting.get("recipe", "ours"), **{"d_model": 1, **given, **parsed, "seed": seed})
    bt.check_together(configs)
    bt.resolve_device(next(iter(configs.values())).device)
    with TrainingBar() as bar:
        lm = bt.LanguageModel.from_config(next(iter(configs.values())))
        configs = {name: dataclasses.replace(cfg, d_model=lm.d_model) for name, cfg in configs.items()}
        try:
            results = bt.train_together(configs, lm, out_folder, on_step=bar.update)
        except KeyboardInterrupt:
            bar.stop()
            say(f"stopped and saved in {out_folder}; the same command continues")
            raise typer.Exit(130) from None
    groups = {tuple(setting[name] for name in values): results[i * seeds : (i + 1) * seeds] for i, setting in enumerate(settings)}
    varied = varied or ["activation"]
    figure = draw_comparison(list(values), varied, groups, out_folder / "comparison.png")
    if as_json:
        print(json.dumps({"folder": str(out_folder), "results": results, "figure": str(figure)}))
        return
    show_comparison(list(values), varied, groups)
    out.print(f"Every number: {out_folder / 'results.jsonl'}. Figure: {figure}.", highlight=False, soft_wrap=True)


def parse_value(name: str, text: str) -> Any:
    """The value of a field of Config in which SAEs that are trained together may differ."""
    if name not in bt.OWN:
        raise bt.InputError(f"{name!r} cannot be varied; choose one of: {', '.join(bt.OWN)}")
    kind = bt.Config.__dataclass_fields__[name].type
    try:
        return text if kind == "str" else float(text)
    except ValueError:
        raise bt.InputError(f"{name} is {text!r}; give numbers separated by commas") from None


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds, 0 for one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


Groups = dict[tuple, list[dict[str, Any]]]  # by setting, the results of its seeds


def show_comparison(names: list[str], varied: list[str], groups: Groups) -> None:
    """A row for each setting, mean ± standard deviation over its seeds."""
    table = Table(box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
    for name in (*varied, "fvu, θ", "batch", "L0", "ce, θ", "batch", "dead", "s"):
        heads = {"activation": "", "n_latents": "F", "batch_size": "B"}
        table.add_column(heads.get(name, name), justify="left" if name in varied else "right", no_wrap=True)
    for key, group in groups.items():
        cells = [value for name, value in zip(names, key) if name in varied]
        for side, metric, digits, spread in (("theta", "fvu", 4, True), ("batch", "fvu", 4, False), ("theta", "l0", 2, False),
                                             ("theta", "ce_degradation", 3, True), ("batch", "ce_degradation", 3, False)):
            middle, deviation = mean_and_spread([result[side][metric] for result in group])
            cells.append(f"{middle:.{digits}f}" + (f" ±{deviation:.{digits}f}" if spread and len(group) > 1 else ""))
        cells += [f"{mean_and_spread([result['dead'] for result in group])[0]:.1%}", f"{mean_and_spread([result['step_seconds'] for result in group])[0]:.0f}"]
        table.add_row(*cells)
    Console(width=max(out.width, 120)).print(table)  # rather wide than cut
    group = next(iter(groups.values()))
    seeds = f"Mean ± standard deviation over {len(group)} seeds" if len(group) > 1 else "One seed"
    out.print(f"{seeds}, on {group[0]['eval_tokens']:,} held-out tokens after {group[0]['tokens']:,} of "
              f"training; L0 with θ; ce: ce_degradation, nats per token; dead: at the end of training; s: seconds in the SAE's own steps.", highlight=False, soft_wrap=True)


STYLES = {"batchtopk": ("#08519c", "o", "-", "BatchTopK"), "topk": ("#e08214", "s", "--", "TopK"), "jumprelu": ("#737373", "^", ":", "JumpReLU")}
AXES = {"k": "L0, average active latents per token", "n_latents": "F, number of latents", "batch_size": "B, tokens in a batch",
        "lr": "peak learning rate"}


def draw_comparison(names: list[str], varied: list[str], groups: Groups, path: Path) -> Path:
    """The paper's figures, as far as the comparison holds them: error against what was varied, and active latents per token."""
    from matplotlib.figure import Figure

    against = [name for name in varied if name in AXES]
    panels = [(name, metric) for name in against for metric in ("fvu", "ce_degradation")] + ["active latents"]
    figure = Figure(figsize=(4.6 * len(panels) if against else 8, 3.9), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        if panel == "active latents":
            draw_active_latents(axes, names, groups)
        else:
            draw_error(axes, names, groups, *panel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path


def draw_error(axes: Any, names: list[str], groups: Groups, against: str, metric: str) -> None:
    """A metric against a field of Config, a line for each method and whatever else was varied, bars over the seeds."""
    lines: dict[tuple, dict[float, tuple]] = {}
    for key, group in groups.items():
        rest = tuple(value for name, value in zip(names, key) if name != against)
        x = value = float(key[names.index(against)])
        if against == "k":  # where L0 really is
            x = mean_and_spread([result["theta"]["l0"] for result in group])[0]
        lines.setdefault(rest, {})[value] = (x, *mean_and_spread([result["theta"][metric] for result in group]))
    for rest, points in lines.items():
        color, marker, line, title = STYLES[rest[0]]
        x, y, spread = zip(*points.values())
        axes.errorbar(x, y, yerr=spread, color=color, marker=marker, markersize=9 if marker == "^" else 6, markerfacecolor="none" if marker == "^" else color,
                      linestyle=line, capsize=3, label=" ".join([title, *(rest[1:] if len(lines) > 3 else ())]))
    ticks = sorted({value for points in lines.values() for value in points})
    titles = {rest: STYLES[rest[0]][3] for rest in lines}
    lowest = min((y, value) for points in lines.values() for value, (_, y, _) in points.items())[1]
    best = {}  # by value, the methods within the spread of the lowest
    for value in ticks:
        here = {titles[rest]: points[value][1:] for rest, points in lines.items() if value in points}
        bound = min(y + spread for y, spread in here.values())
        best[value] = " and ".join(title for title, (y, spread) in here.items() if y - spread <= bound)
    what = {"fvu": "Unexplained variance", "ce_degradation": "Loss added to the model"}[metric]
    if len(lines) == 1:
        finding = f"lowest at {lowest:g}"
    elif len(set(best.values())) == 1:
        finding = f"{best[lowest]} lowest throughout"
    else:
        finding = "lowest " + ", ".join(f"{name} at {', '.join(f'{v:g}' for v in ticks if best[v] == name)}" for name in dict.fromkeys(best.values()))
    axes.set(xscale="log", xlabel=AXES[against], ylabel={"fvu": "fraction of variance unexplained", "ce_degradation": "nats per token"}[metric])
    axes.set_title(f"{what}:\n{finding}", loc="left", fontsize=9)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def draw_active_latents(axes: Any, names: list[str], groups: Groups) -> None:
    """How many latents are active on a token, for each method, at the value of k nearest to the default."""
    methods, said = {}, []
    for key, group in sorted(groups.items(), key=lambda item: abs(item[1][0]["k"] - bt.Config.k)):
        methods.setdefault(key[names.index("activation")], group[0])
    for activation, result in methods.items():
        color, _, line, title = STYLES[activation]
        histogram = result["theta"]["l0_histogram"]
        low, _, high = l0_quantiles(histogram)
        share = [100 * tokens / sum(histogram) for tokens in histogram]
        if low == high:  # a spike that would flatten the others
            axes.axvline(low, color=color, linestyle=line, label=f"{title}, k = {result['k']:g}: all tokens")
        else:
            axes.plot(share, color=color, linestyle=line, label=f"{title}, k = {result['k']:g}")
        said.append(f"{title} {low}" if low == high else f"{title} {low} to {high}")
    axes.set(ylim=(0, None), xlabel="active latents on a token", ylabel="% of held-out tokens")
    axes.set_title("Active latents on nine tokens of ten:\n" + ", ".join(said), loc="left", fontsize=9)


@app.command(epilog="Example: python cli.py bench --d-model 768 --n-latents 6144 --batch-size 1024")
@one_line_errors
def bench(
    d_model: Annotated[int, typer.Option(help="D, width of the activations.", min=1)] = 768,
    n_latents: Annotated[int, typer.Option(help="F, number of latents.", min=1)] = 24576,
    batch_size: Annotated[int, typer.Option(help="B, tokens in a batch.", min=1)] = 4096,
    k: Annotated[float, typer.Option(help="Average active latents per token.", min=0)] = bt.Config.k,
    device: Device = bt.Config.device,
    repeat: Annotated[int, typer.Option(help="How often each is measured, all in turn.", min=2)] = 5,
    figure: Annotated[Optional[Path], typer.Option(help="Draw what each idea saves into this PNG.", show_default="none")] = None,
    as_json: Json = False,
) -> None:
    """Time the training step beside the encoder product alone and the plain step, on synthetic sparse activations."""
    cfg = bt.Config(d_model=d_model, n_latents=n_latents, batch_size=batch_size, k=k, tokens=10**12, dead_tokens=10**12,
                    device=str(bt.resolve_device(device)), encoder_dtype="float32")
    with err.status("measuring") as status:
        result = measure(cfg, repeat, lambda what: status.update(f"measuring: {what}"))
    if figure:
        draw_savings(result, figure)
    if as_json:
        print(json.dumps(result))
    else:
        show_measurements(result)


def measure(cfg: bt.Config, repeat: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """What bench prints: seconds as [lower quartile, median, upper quartile], bytes, ratios of medians.

    The floor is the encoder product and, at the bandwidth of a large copy, 48·F·D bytes (both weights and their two
    moments, read and written) and 16·N·D (a row for each kept entry in decoding, its gradient and both weight gradients).
    """
    device, n, generator = torch.device(cfg.device), cfg.n_kept(cfg.batch_size), torch.Generator().manual_seed(0)
    directions = functional.normalize(torch.randn(4096, cfg.d_model, generator=generator), dim=1)
    batches = []
    for _ in range(3):  # each token is a sum of about 40 of 4096 directions
        size = torch.rand(cfg.batch_size, 4096, generator=generator)
        batches.append(((torch.rand(size.shape, generator=generator) < 40 / 4096) * size @ directions).to(device))
    kinds = {"step, float32": {}, "TopK step, float32": dict(activation="topk"), "step, 5 % dead": {}, "plain step, float32": dict(step="plain")}
    if bt.multiplies_bfloat16(device):
        kinds["step, bfloat16"] = dict(encoder_dtype="bfloat16")
    if device.type == "cuda":
        kinds |= {f"step, {dtype}, triton": dict(kernels="triton", encoder_dtype=dtype) for dtype in ("float32", "bfloat16")}
    if cfg.k != int(cfg.k):
        del kinds["TopK step, float32"]
    trainers = {name: bt.Trainer(dataclasses.replace(cfg, **changes)) for name, changes in kinds.items()}
    dying = trainers["step, 5 % dead"].sae
    dying.tokens_since_fired[::20] = cfg.dead_tokens
    dying.b_enc.data[::20] = -100.0  # so that they do not fire again
    endless = itertools.cycle(batches)
    runs: dict[str, Callable[[], Any]] = {name: lambda t=trainer: t.step(next(endless)) for name, trainer in trainers.items()}
    memory = {}
    for name, run in runs.items():
        progress(f"memory, {name}")
        run()  # so that the first moments and the bar are there
        memory[name] = peak_memory(run, device)
    one, z = trainers["step, float32"], torch.empty(cfg.batch_size, cfg.n_latents, device=device)
    W_enc, copies = one.sae.W_enc.detach(), [torch.ones(1 << 26, device=device) for _ in range(2)]
    runs["encoder product, float32"] = lambda: torch.mm(batches[0], W_enc.T, out=z)
    runs["copy"] = lambda: copies[0].copy_(copies[1])
    if bt.multiplies_bfloat16(device):
        half, factors = z.bfloat16(), (batches[0].bfloat16(), W_enc.bfloat16().T)
        runs["encoder product, bfloat16"] = lambda: torch.mm(*factors, out=half)
    pairs = phases(one, batches[0], z)
    runs |= {(side, name): run for name, pair in pairs.items() for side, run in zip(("dense", "sparse"), pair)}
    samples: dict[Any, list[float]] = {name: [] for name in runs}
    for i in range(repeat):
        for name, run in runs.items():
            progress(f"{' '.join(name) if isinstance(name, tuple) else name}, {i + 1} of {repeat}")
            if name != "plain step, float32" and not (isinstance(name, tuple) and name[0] == "dense"):
                run()  # once before it counts: dense matrices have swept the caches
            samples[name].append(seconds(run, device))
    quartiles = {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in samples.items()}
    bandwidth = 2 * copies[0].nbytes / quartiles.pop("copy")[1]
    bytes_moved = 48 * cfg.n_latents * cfg.d_model + 16 * n * cfg.d_model
    result: dict[str, Any] = {
        "device": device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads(), "repeat": repeat,
        "d_model": cfg.d_model, "n_latents": cfg.n_latents, "batch_size": cfg.batch_size, "k": cfg.k,
        "seconds": {name: q for name, q in quartiles.items() if isinstance(name, str)},
        "phases": {name: {side: quartiles[side, name] for side in ("dense", "sparse")} for name in pairs},
        "peak_bytes": memory, "matrix_bytes": z.nbytes, "copy_bytes_per_second": bandwidth,
        "rewalks": sum(trainer.rewalks for trainer in trainers.values())}
    for dtype in ("float32", "bfloat16"):
        if f"step, {dtype}" in kinds:
            product = result["seconds"][f"encoder product, {dtype}"][1]
            step, plain = (result["seconds"][name][1] for name in (f"step, {dtype}", "plain step, float32"))
            floor = product + bytes_moved / bandwidth
            result[dtype] = {"flops": 2 * z.numel() * cfg.d_model / product, "floor_seconds": floor, "step/product": step / product,
                             "step/floor": step / floor, "plain/step": plain / step}
    return result


@torch.no_grad()
def phases(trainer: bt.Trainer, x: torch.Tensor, z: torch.Tensor) -> dict[str, tuple[Callable, Callable]]:
    """The parts of a step on x [B, D] as they are in a dense step and as they are in ours; z [B, F] is scratch."""
    sae, bar, n = trainer.sae, trainer.last.bar, trainer.cfg.n_kept(len(x))
    W_enc, b_enc, W_dec = sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach()
    centred, f = x - sae.b_dec, sae.encode(x, "batch")
    kept = bt.encode_rows(sae, x)
    _, _, value, _ = bt.walk(sae, centred, bar)
    g = (bt.decode_rows(W_dec, kept, len(x)) - centred) * (2 / len(x))
    gradients = bt.backward(sae, x, centred, kept, torch.empty(0, dtype=torch.int64, device=x.device))[2]
    first, second = torch.zeros_like(W_dec), torch.zeros_like(W_dec)

    def dense_update() -> None:
        for W, gradient in ((W_enc, f.T @ centred), (W_dec, f.T @ g)):
            if W is W_dec:
                gradient.addcmul_(W, (gradient * W).sum(1, keepdim=True), value=-1)
            adam([W], [gradient], [first], [second], [], [torch.zeros((), device=x.device)], fused=True, amsgrad=False, beta1=0.9,
                 beta2=0.99, lr=0.0, weight_decay=0.0, eps=1e-8, maximize=False)
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    pairs = {
        "pre-activations": (lambda: torch.addmm(b_enc, centred, W_enc.T, out=z).relu_(), lambda: bt.walk(sae, centred, bar)),
        "selection": (lambda: z.view(-1).topk(n), lambda: bt.largest(value, n)),
        "decoding": (lambda: f @ W_dec, lambda: bt.decode_rows(W_dec, kept, len(x))),
        "gradient of kept values": (lambda: g @ W_dec.T, lambda: bt.sampled_product(g, W_dec, kept.row, kept.latent)),
        "gradient of b_dec": (lambda: (f @ W_enc).sum(0), lambda: b_enc @ W_enc),
        "weight gradients and update": (dense_update, lambda: trainer.update_parameters_(gradients, 0.0)),
    }
    return {name: (torch.no_grad()(dense), torch.no_grad()(sparse)) for name, (dense, sparse) in pairs.items()}


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, on the device too."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that PyTorch has allocated at the peak of a call, beside those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder, "trace.json")))
        trace = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in trace if event.get("name") == "[memory]")
    return max(itertools.accumulate(amount for _, amount in changes), default=0)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show_measurements(result: dict[str, Any]) -> None:
    """What bench measured, as two tables and a line."""
    product = result["seconds"]["encoder product, float32"][1]
    out.print(f"D {result['d_model']}, F {result['n_latents']}, B {result['batch_size']}, k {result['k']:g}; {result['device']}, "
              f"{result['threads']} threads, torch {result['torch']}; {result['repeat']} measurements in turn", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE)
    for name in ("", "ms", "quartiles", "× product", "tokens/s", "MiB", "of BF"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, (low, middle, high) in sorted(result["seconds"].items(), key=lambda item: item[1][1]):
        peak = result["peak_bytes"].get(name)
        memory = (f"{peak / 2**20:.0f}", f"{peak / result['matrix_bytes']:.0%}") if peak is not None else ("", "")
        table.add_row(name.replace(", float32", ""), f"{1e3 * middle:.{1 if middle < 1 else 0}f}",
                      f"{1e3 * low:.0f}-{1e3 * high:.0f}", f"{middle / product:.2f}",
                      f"{result['batch_size'] / middle:,.0f}", *memory)
    out.print(table)
    out.print("float32 unless said. MiB: allocated at the peak beside weights and moments; of BF: of one matrix B × F.\n\nParts of a step as "
              "they are with dense matrices and as they are here, ms:", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE)
    for name in ("", "dense", "here", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    for name, sides in result["phases"].items():
        dense, sparse = (sides[side][1] for side in ("dense", "sparse"))
        table.add_row(name, f"{1e3 * dense:.1f}", f"{1e3 * sparse:.1f}", f"{dense / sparse:.1f}")
    out.print(table)
    for dtype in ("float32", "bfloat16"):
        if r := result.get(dtype):
            out.print(f"{dtype}: the step takes {r['step/product']:.2f} × the encoder product ({r['flops'] / 1e9:,.0f} GFLOP/s), {r['step/floor']:.2f} "
                      f"× the floor of product and memory traffic (copies run at {result['copy_bytes_per_second'] / 1e9:.1f} GB/s); the plain "
                      f"step takes {r['plain/step']:.1f} × as long.", highlight=False, soft_wrap=True)


def draw_savings(result: dict[str, Any], path: Path) -> None:
    """A waterfall from the plain step to ours: what each idea saves."""
    from matplotlib.figure import Figure

    ideas = {"selection": "top-k of candidates,\nnot of B·F entries", "decoding": "decode kept\nentries alone",
             "gradient of kept values": "gradient at kept\nentries alone", "gradient of b_dec": "b_dec: a vector\ntimes a matrix",
             "weight gradients and update": "sums of rows for\nboth weights,\nupdated in cache"}
    step, plain = (result["seconds"][name][1] for name in ("step, float32", "plain step, float32"))
    saved = {label: result["phases"][name]["dense"][1] - result["phases"][name]["sparse"][1] for name, label in ideas.items()}
    saved["no B × F tensors\nfor autograd"] = plain - step - sum(saved.values())
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes, height = figure.subplots(), plain
    axes.bar(0, plain, color="#4c4c4c")
    axes.annotate(f"{plain:.2f} s", (0, plain), ha="center", va="bottom")
    for i, amount in enumerate(saved.values(), 1):
        axes.bar(i, amount, bottom=height - amount, color="#7fb2d9")
        axes.annotate(f"-{amount:.2f}", (i, height), ha="center", va="bottom")
        height -= amount
    axes.bar(len(saved) + 1, step, color="#08519c")
    axes.annotate(f"{step:.2f} s", (len(saved) + 1, step), ha="center", va="bottom")
    product = result["seconds"]["encoder product, float32"][1]
    axes.axhline(product, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"encoder product alone: {product:.2f} s", (0.5, product), va="bottom")
    axes.set_xticks(range(len(saved) + 2), ["plain step\n(autograd)", *saved, "sparse step"], fontsize=8)
    axes.set_ylabel("seconds a step, float32")
    axes.set_title(f"Only the encoder product has to be dense: {plain / step:.0f} × faster at D {result['d_model']}, F {result['n_latents']}, "
                   f"B {result['batch_size']}, k {result['k']:g}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def reason(error: BaseException | None) -> str:
    """Why a model or data set could not be loaded and what to do next, in one line; empty without a cause."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    kinds = {base.__name__ for cause in causes for base in type(cause).__mro__}
    if "GatedRepoError" in kinds or any("gated" in str(cause) for cause in causes):
        return "it is gated: accept its licence on its hub page, then log in with `hf auth login`"
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError", "TimeoutException",
                "MaxRetryError"}:
        return "it is not on this machine and the hub cannot be reached: check the network"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return "the hub has no such name, or it is private"
    return f"{type(causes[0]).__name__}: {str(causes[0]).strip()}".splitlines()[0] if causes else ""


def free_folder(parent: Path, name: str) -> Path:
    """parent/name, or the first of parent/name-2, name-3 … that is not in use."""
    tries = (parent / (name if i == 1 else f"{name}-{i}") for i in range(1, 1_000_000))
    return next(folder for folder in tries if not folder.exists())


class TrainingBar:
    """What training shows on stderr: that it loads, then a bar; nothing is left of the first if it fails there.

    Ctrl-C asks for a stop between two steps, so that what is saved is consistent; a second one, or one when no step follows,
    stops at once.
    """

    def __init__(self) -> None:
        self.interrupted, self.shown = False, err.status("loading the model and held-out text")
        columns = [TextColumn(text) for text in ("{task.fields[rate]} tokens/s", "fvu {task.fields[fvu]}",
                                                 "L0 {task.fields[l0]}", "dead {task.fields[dead]}")]
        self.progress = Progress(TextColumn("{task.percentage:>3.0f}%"), BarColumn(20), *columns, TimeRemainingColumn(),
                                 console=err)
        self.task = None

    def __enter__(self) -> TrainingBar:
        self.shown.start()
        self.previous = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()
        signal.signal(signal.SIGINT, self.previous)

    def stop(self) -> None:
        self.shown.stop()

    def interrupt(self, *signal_and_frame: Any) -> None:
        if self.interrupted or self.task is None or self.progress.finished:  # asked twice, nothing to save yet or anew
            raise SystemExit(130)
        self.interrupted = True

    def update(self, cfg: bt.Config, tokens: int, stats: list[bt.StepStats]) -> None:
        """Show where training stands after so many tokens: one SAE's numbers, or the range of several SAEs'."""
        if self.task is None:
            self.stop()
            self.task = self.progress.add_task("", total=cfg.tokens, rate="…", fvu="…", l0="…", dead="…")
            site = cfg.module or f"{cfg.site} of block {cfg.layer}"
            what = f"{cfg.n_latents} latents, k = {cfg.k:g}," if len(stats) == 1 else f"{len(stats)} SAEs"
            say(f"{what} on {site} of {cfg.model}, {cfg.d_model} wide; {cfg.tokens:,} tokens on {bt.resolve_device(cfg.device)}")
            self.shown = self.progress
            self.shown.start()

        def span(values: list[float], form: str) -> str:
            low, high = format(min(values), form), format(max(values), form)
            return low if low == high else f"{low}-{high}"

        speed = self.progress.tasks[0].speed
        self.progress.update(self.task, completed=tokens, rate=f"{speed:,.0f}" if speed else "…", fvu=span([s.fvu for s in stats], ".3f"),
                             l0=span([s.l0 for s in stats], ".1f"), dead=span([s.dead for s in stats], ","))
        if self.interrupted:
            raise KeyboardInterrupt


MEANINGS = {
    "fvu": "fraction of variance unexplained", "nmse": "the same after standardising each token (the paper's)",
    "mse": "mean squared distance to the reconstruction", "l0": "mean active latents per token",
    "frac_alive": "share of latents that fired", "ce_clean": "cross-entropy, model untouched (nats per token)",
    "ce_sae": "… reconstruction spliced in", "ce_zero": "… zeros instead", "ce_mean": "… the mean activation instead",
    "ce_degradation": "ce_sae - ce_clean", "ce_recovered": "1 is the untouched model, 0 is zeros", "kl": "from the untouched model",
}


def show(result: dict[str, Any], cfg: bt.Config, as_json: bool) -> None:
    """An evaluation as a table, or as JSON."""
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"{result['run']}: {result['tokens']:,} tokens of training, {result['eval_tokens']:,} held-out "
                        f"tokens, {result['seconds']:.0f} s", title_justify="left")
    table.add_column("metric")
    table.add_column("batch", justify="right")
    table.add_column(f"θ = {result['theta_value']:.4g}", justify="right")
    table.add_column("meaning", style="dim")
    for name, meaning in MEANINGS.items():
        table.add_row(name, *(f"{result[s][name]:.4f}" for s in ("batch", "theta")), meaning)
    out.print(table)
    out.print(l0_line(result["theta"]["l0_histogram"], cfg.k), highlight=False)


def l0_line(histogram: list[int], k: float) -> str:
    """The spread of active latents per token, in words."""
    low, middle, high = l0_quantiles(histogram)
    return (f"Active latents per token with θ: 5 % of tokens have {low} or fewer, half {middle} or fewer, 5 % {high} or "
            f"more, the most {len(histogram) - 1}; k = {k:g} is the mean aimed at.")


def l0_quantiles(histogram: list[int]) -> list[int]:
    """The counts that 5, 50 and 95 % of the tokens do not exceed; histogram[c] is the number of tokens with count c."""
    below, total = list(itertools.accumulate(histogram)), sum(histogram)
    return [next(count for count, tokens in enumerate(below) if tokens >= share * total) for share in (0.05, 0.5, 0.95)]


if __name__ == "__main__":
    app()
