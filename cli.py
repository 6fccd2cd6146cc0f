#!/usr/bin/env python
"""Command line of batchtopk: it talks to people and keeps the folders of runs. The method is in batchtopk.py.

    python cli.py train             # a BatchTopK SAE on the embedded GPT-2, in about two minutes
    python cli.py --help            # the other commands: eval, export, latents, compare
    torchrun --nproc-per-node 2 cli.py train    # one SAE, its latents shared by two devices

Results go to stdout, progress to stderr. A mistake ends in one line and exit code 2 (usage) or 1.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import fields, replace
from datetime import timedelta
from importlib.metadata import version
from inspect import Parameter, Signature, signature
from pathlib import Path
from statistics import fmean as mean, stdev
from typing import Annotated, Literal, get_type_hints

# Threads that spin are a fifth faster on an idle machine, and 3 to 20 times slower beside one busy core
if hasattr(os, "getloadavg") and os.getloadavg()[0] > os.cpu_count() / 4:  # of the last minute
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it as it is imported
import torch
import torch.nn.functional as functional
import typer
from filelock import FileLock
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, track
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

import batchtopk as bt

RANK, SIZE = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
out, err = (Console(stderr=stderr, quiet=RANK > 0, markup=False, emoji=False, highlight=False)
            for stderr in (False, True))

# ---- Options, messages, errors ----

FIELDS = {field.name: field for field in fields(bt.RunConfig)[1:]}  # all but d_model
MAIN = ("n_latents", "k", "activation", "tokens", "passes", "batch_size", "lr", "seed", "device", "model",
        "layer", "site", "dataset")  # shown first
WORDS = {name: field.metadata["doc"] for name, field in FIELDS.items()} | {  # those that fit an option better
    "device": "where to compute: cpu, cuda, cuda:1 …; auto takes a GPU if there is one",
    "eval_tokens": "held-out tokens for θ, and as many others to evaluate",
    "init": "start b_dec at the data's mean, or at 0 with a smaller W_enc",
    "lr": FIELDS["lr"].metadata["doc"].replace("; 0:", "; auto:"),
    "prepend_bos": "put no begin token in front of contexts",
    "topk_start": "TopK's share of a run (paper: 0)",
    "skip_special": "read special tokens and first positions too: their norms are larger",
}
SETS = {"tiny": bt.PRESETS, "ours": bt.RECIPES}  # defaults, by the choice that applies unless another is made

def sentence(words, choices=(), default="", mark="default"):
    """The help of an option, which ends with what it accepts and its default in brackets."""
    start = words[0].upper() if words[0].isascii() else words[0]  # α stays small
    brackets = ["|".join(choices)] * bool(choices) + [f"{mark}: {default}"] * (default != "")
    return escape(f"{start}{words[1:]}." + f" [{'; '.join(brackets)}]" * bool(brackets))

def choice(values, words):
    """An option that takes one of these values, by default the first."""
    help = sentence(words, values, next(iter(values)))
    return Annotated[Literal[tuple(values)], Option(metavar="", show_default=False, help=help)]

def instead(name):
    """An option for a field of RunConfig, which replaces what a run's configuration says."""
    values = tuple(bt.choices_of(FIELDS[name]))
    kind = Literal[values] if values else get_type_hints(bt.RunConfig)[name]
    help = sentence(f"{WORDS[name]}; by default the run's", values)
    return Annotated[kind | None, Option(metavar="", help=help)]

Json = Annotated[bool, Option("--json", metavar="", help="Print one JSON object.")]
Dataset = Annotated[str | None, Option(metavar="", help=sentence(
    f"other text, all of it held out: {WORDS['dataset']}; by default the run's held-out text"))]
Device = Annotated[str, Option(metavar="", help=sentence(WORDS["device"]))]
Preset = choice(bt.PRESETS, "what to train on; it sets what is marked tiny")
RECIPE = "how to train; it sets what is marked ours"
Run = Annotated[Path, Argument(help="Folder that `train`, `sae.save` or SAELens wrote, e.g. runs/tiny.",
                               show_default=False)]

def config_options(command, lists=(), sets=SETS):
    """Replace a command's **options by an option per field of RunConfig; those in `lists` arrive as text."""
    parameters, types = list(signature(command).parameters.values())[:-1], get_type_hints(bt.RunConfig)
    for name in dict.fromkeys((*MAIN, *FIELDS)):
        if name == "seed" and lists:  # compare counts them
            continue
        field, flag, extra = FIELDS[name], "--" + name.replace("_", "-"), {"metavar": ""}
        accepted = tuple(bt.choices_of(field))
        kind = Literal[accepted] if accepted else types[name]
        marks = [mark for mark, table in sets.items() if any(name in values for values in table.values())]
        default = next((sets[mark][mark][name] for mark in marks if name in sets[mark][mark]), field.default)
        default = "auto" if name == "lr" else f"{default:g}" if isinstance(default, float) else default
        if kind is bool:  # what is on by default can only be turned off
            flag, default = f"--no-{flag[2:]}", "off" if marks else ""
            extra["callback"] = lambda given: False if given else None
        if name in lists:
            kind, extra = str, {"metavar": ",…"}
        elif name == "lr":
            extra["parser"] = learning_rate
        option = Option(flag, help=sentence(WORDS[name], accepted, default, ", ".join(marks) or "default"),
                        rich_help_panel=None if name in MAIN else "Advanced", **extra)
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None,
                                    annotation=Annotated[kind | None, option]))
    command.__signature__ = Signature(parameters)
    return command

def learning_rate(text):
    """Config.lr for what --lr says."""
    return 0.0 if text == "auto" else float(text)

def tell(text, console=out):
    """Print a text, wrapped at words in a terminal; `console.out` never wraps."""
    console.print(text, soft_wrap=not console.is_terminal)

def reason(error):
    """Why a model or data set could not be read, or what to do if it is gated."""
    said = f"{type(error).__name__}: {str(error).strip()}"
    while error is not None:
        if "Gated" in type(error).__name__:
            return "it is gated: accept its licence on its hub page, then log in with `hf auth login`"
        error = error.__cause__ or error.__context__
    return said.splitlines()[0]

def quieten_libraries():
    """No banners, bars or advice from the libraries; warnings in one line."""
    warnings.showwarning = lambda message, *where: err.out(f"warning: {message}")
    warnings.filterwarnings("ignore", message=".*torch.jit.*")  # deprecated, but what users asked for
    for library in ("HF_HUB", "TRANSFORMERS", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")

class Commands(typer.core.TyperGroup):
    """Shows a person's mistake in any command as one line on stderr, without a traceback."""

    def main(self, *arguments, **settings):
        with contextlib.suppress(AttributeError):  # a notebook's
            sys.stdout.reconfigure(errors="replace")  # what its encoding lacks, as θ in Latin-1
        return super().main(*arguments, **settings)

    def invoke(self, context):
        quieten_libraries()
        try:
            super().invoke(context)
        except (bt.InputError, bt.Unavailable, OSError, MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                error = bt.InputError("out of memory; lower --n-latents, --batch-size, --buffer-tokens, "
                                      "--eval-tokens or --model-batch")
            elif isinstance(error, RuntimeError):
                raise
            why = isinstance(error, bt.Unavailable) and error.__cause__
            parts = [f"{error} ({reason(why)})" if why else str(error), *getattr(error, "__notes__", ())]
            who = f"process {RANK}: " if RANK else ""
            time.sleep(3 if RANK else 0)  # the first says it for all, and torchrun ends the others
            err.quiet = False
            err.out(" ".join(map(str.strip, f"{who}error: {'; '.join(parts)}".splitlines())))
            raise typer.Exit(2 if isinstance(error, bt.InputError) else 1) from None

def out_of_memory(error):
    """Whether memory could not be had, of the machine or of a GPU: PyTorch has no class for the former."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)

def show_version(wanted):
    """Say which batchtopk.py this is, by its digest, and which libraries it uses."""
    if wanted:
        digest = hashlib.sha256(Path(bt.__file__).read_bytes()).hexdigest()[:12]
        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "typer"))
        tell(f"batchtopk.py {digest}, {libraries}, Python {platform.python_version()}")
        raise typer.Exit

@app.callback()
def options_of_all(_: Annotated[bool, Option("--version", help="Show which version this is and exit.",
                                             callback=show_version, is_eager=True)] = False):
    """BatchTopK sparse autoencoders: train, evaluate, export, compare."""

# ---- train, eval, export ----

@app.command(epilog="Example: python cli.py train --k 16 --n-latents 8192 --name wide")
@config_options
def train(
    preset: Preset = "tiny",
    recipe: choice(bt.RECIPES, RECIPE) = "ours",
    name: Annotated[str | None, Option(metavar="", help="Name of the run; by default the preset's.")] = None,
    out_folder: Annotated[Path, Option("--out", metavar="", help="Folder of all runs.")] = Path("runs"),
    resume: Annotated[Path | None, Option(metavar="", help="Run to continue; takes --device.")] = None,
    as_json: Json = False,
    expansion: Annotated[float | None, Option(metavar="", help="Latents, as a multiple of D.")] = None,
    **options,
):
    """Train an SAE on a language model's activations, calibrate θ, evaluate on held-out text."""
    given = {field: value for field, value in options.items() if value is not None}
    if resume and (given.keys() - {"device"} or name or expansion is not None):
        raise bt.InputError("--resume continues a run as it was configured; leave out all but --device")
    if name is not None and (name in ("", "..") or Path(name).name != name):
        raise bt.InputError(f"name is {name!r}; give the name of one folder (--out says where it is)")
    if expansion is not None and "n_latents" in given:
        raise bt.InputError("--expansion and --n-latents set the same; give one of them")
    cfg = (replace(bt.RunConfig.load(resume), **given) if resume
           else bt.RunConfig.preset(preset, recipe, **given))
    group = bt.Processes.join(cfg.device)
    several, folder = group.size > 1, resume or out_folder / (name or preset)
    if not (resume or name or several):  # several would choose different ones
        folder = free_folder(out_folder, preset)
    start = f"torchrun --nproc-per-node {group.size}" if several else "python"
    again = f"{start} cli.py train --resume {shlex.quote(str(folder))}"
    finished = bool(resume) and is_finished([folder])
    [result] = train_with_bar({"": cfg}, folder, again, bool(resume), expansion, group)
    show_metrics(result, as_json)
    if several:
        torch.distributed.destroy_process_group()
    if not as_json:
        said = "Was finished; it lies" if finished else "Saved"
        tell(f"\n{said} in {folder}. Next: python cli.py export {shlex.quote(str(folder))}")

def is_finished(runs):
    """Whether these folders hold evaluated runs."""
    return all((run / "evaluation.json").is_file() for run in runs)

class Bar:
    """Progress on stderr, in a terminal a bar, elsewhere a line a minute: from the first step to the last
    that of training, otherwise of what is read or measured."""

    def __init__(self, total=0, passes=1, tokens=0):
        self.progress = Progress(TaskProgressColumn(), BarColumn(10), "{task.description}", console=err,
                                 transient=True, disable=not err.is_terminal)
        self.task = self.progress.add_task("loading the model and text", total=None)
        self.total, self.passes, self.tokens, self.training = total, passes, tokens, False
        self.last = self.told = time.monotonic()
        self.timed = {}  # by kind of work: how much is done, and of how many tokens the seconds are known

    def seconds_each(self, kind, done, total):
        """So much of a kind of work is done. Returns what a token of it takes in seconds; NaN: not known."""
        now = time.monotonic()
        before, tokens, seconds = self.timed.get(kind, (done, 0, self.last - now))  # the first warms up: 0 s
        tokens, seconds = tokens + done - before, seconds + now - self.last
        self.timed[kind], self.last = (done % total, tokens, seconds), now
        return seconds / tokens if tokens else math.nan

    def show(self, text, each, done, total, left):
        """Show how much is done, how fast that is if a token takes `each` seconds, and the seconds left."""
        text += f"  {1 / each:,.0f} tokens/s" if each > 0 else ""
        text += f"  {timedelta(seconds=round(left))} left" if left >= 0 else ""  # NaN: not known yet
        self.progress.update(self.task, description=text, completed=done, total=total)
        if not err.is_terminal and self.last > self.told + 60:
            self.told = self.last
            err.out(f"{done / total:.0%}  {text}")

    def left(self):
        """The seconds of training that are left, of reading and of steps."""
        return self.unread * self.reading + (self.total - self.tokens) * self.stepping

    def read(self, n, wanted):
        """So many of the tokens that a buffer wants, or of the held-out ones, were read."""
        n = min(n, wanted)
        self.reading = self.seconds_each("reading", n, wanted)
        self.unread = max(0, (self.total - self.tokens) / self.passes - n)
        own = n, wanted, (wanted - n) * self.reading
        place = (self.tokens, self.total, self.left()) if self.training else own
        self.show(f"reading {n:,} of {wanted:,} tokens", self.reading, *place)

    def step(self, tokens, stats):
        """So many tokens were trained on; stats: each SAE's StepStats."""
        self.tokens, self.training = tokens, tokens < self.total
        self.stepping = self.seconds_each("steps", tokens, self.total)
        now = bt.StepStats(*map(mean, zip(*stats)))
        text = f"fvu {now.fvu:.3f}  L0 {now.l0:.1f}  dead {now.dead:,.0f}"
        self.show(text, self.stepping, tokens, self.total, self.left())

    def cross_entropy(self, done, total):
        """It was measured on so many contexts."""
        left = (total - done) * self.seconds_each("contexts", done, total)
        self.show(f"cross-entropy: {done} of {total} contexts", 0, done, total, left)

class Stop:
    """While it is open, Ctrl-C and SIGTERM are a SystemExit, or if it is `patient` only set `number`, which
    what is in it looks at; a second one is a SystemExit."""
    number, patient = 0, False

    def __enter__(self):
        self.before = [(each, signal.signal(each, self.hear)) for each in (signal.SIGINT, signal.SIGTERM)]

    def __exit__(self, *_):
        for handler in self.before:
            signal.signal(*handler)

    def hear(self, number, frame):
        twice, self.number = self.number and SIZE == 1, number  # torchrun sends two
        if twice or not self.patient:
            raise SystemExit(128 + number)
        if RANK == 0:
            os.write(2, b"stopping after this step\n")  # a print in the middle of another would repeat it

def train_with_bar(configs, folder, again, resume, expansion=None, group=bt.Processes()):
    """Load the language model and train SAEs on it, unless that is done; the command `again` continues it."""
    runs = [folder / name for name in configs]
    if resume and is_finished(runs) and not saved_states(folder):
        return [read_evaluation(run) for run in runs]
    if RANK == 0:
        check_run_folder(folder, resume)
    [cfg, *_], stop = configs.values(), Stop()
    bar = Bar(cfg.tokens, cfg.passes, max((tokens for _, tokens in saved_states(folder)), default=0))

    def on_step(tokens, stats):
        stop.patient = tokens < cfg.tokens
        if not bar.training:  # the first
            what = f"{len(configs)} SAEs" if len(configs) > 1 else f"{cfg.n_latents} latents, k = {cfg.k:g},"
            site = cfg.module or f"{cfg.site} of block {cfg.layer}"
            tell(f"{what} on {site} of {cfg.model}; {cfg.tokens:,} tokens on {lm.device}{left_out(lm)}", err)
        bar.step(tokens, stats)
        return stop.number > 0

    try:
        with stop:
            with contextlib.suppress(SystemExit), bar.progress:
                lm = bt.LanguageModel.from_config(cfg)
                lm.processes = group
                sizes = {} if expansion is None else {"n_latents": round(expansion * lm.d_model)}
                configs = {name: replace(c, d_model=lm.d_model, **sizes) for name, c in configs.items()}
                [cfg, *_] = configs.values()
                results = train_runs(configs, lm, folder, resume, on_step, bar.cross_entropy,
                                     lambda *n: bar.read(*n) or stop.number > 0)
                if results is not None:
                    return results
            said = "saved" if saved_states(folder) else "stopped"
            err.out(f"{said}; continue with: {again}" if any(folder.glob("**/config.json")) else said)
            raise SystemExit(128 + stop.number)
    except Exception as error:
        if any(n == SIZE for n, _ in saved_states(folder)):
            error.add_note(f"the run is saved; continue with: {again}")
        raise
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing came of it

def left_out(lm):
    """What a new run leaves out because of its norm, as the end of a sentence."""
    if not lm.left_out:
        return ""
    limit, tokens, variance = lm.left_out
    if not tokens:
        return f"; no token is left out: none has a norm over {limit:.4g}"
    return (f"; {tokens:.2%} of the tokens are left out, with {variance:.1%} of the variance: their norms "
            f"are over {limit:.4g}")

NUMBERS = "tokens", "k", "theta_value", "eval_tokens", "left_out", "dead", "rare", "step_seconds"

def read_evaluation(run):
    """What train_runs found of a run, which may have been moved since."""
    path = run / "evaluation.json"
    with bt.explained(f"{str(path)!r} is damaged or of another version; `eval` measures the run again"):
        result = json.loads(path.read_text())
        both = [result[selection][name] or 0 for selection in ("batch", "theta") for name in MEANINGS]
        numbers = [result[name] for name in NUMBERS] + [result.get("agreement", 0)] + both
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise TypeError("not a number")
        l0_quantiles(result["theta"]["l0_histogram"])
        return result | {"run": str(run)}

def free_folder(parent, name):
    """Make parent/name, or the first of parent/name-2, name-3 … that does not exist."""
    for i in itertools.count(1):
        folder = parent / (f"{name}-{i}" if i > 1 else name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder

@app.command("eval", epilog="Example: python cli.py eval runs/tiny --json")
def evaluate(
    run: Run,
    ce_contexts: Annotated[int | None, Option(
        metavar="", help=f"{sentence(WORDS['ce_contexts'])} By default the run's.", min=1)] = None,
    dataset: Dataset = None,
    text_column: instead("text_column") = None,
    model: instead("model") = None,
    layer: instead("layer") = None,
    site: instead("site") = None,
    device: Device = bt.RunConfig.device,
    as_json: Json = False,
):
    """Evaluate a run on held-out text: batch selection and θ side by side."""
    bar = Bar()
    with bar.progress:
        sae, lm = load(run, device, dataset, model=model, layer=layer, site=site)
        sae.config = replace(sae.config, ce_contexts=ce_contexts or sae.config.ce_contexts)
        ids = text_to_read(sae.config, lm, dataset, text_column)
        held_out = ids, bt.shuffled_activations(sae.config, lm, ids, bar.read)
        [result] = evaluate_runs({run: sae}, lm, held_out, bar.cross_entropy, densities=as_json)
    show_metrics(result, as_json)

def load(run, device, dataset=None, **site):
    """The SAE of a run and the language model it reads, on a device.

    site: model, layer and site, which replace the run's if they are given. Other SAEs may have none.
    """
    device, site = str(bt.resolve_device(device)), {name: v for name, v in site.items() if v is not None}
    sae = bt.SAE.load(run, device=device)
    sae.get_theta()  # an unset one fails before the model is loaded
    named = isinstance(sae.config, bt.RunConfig)
    if not (named or len(site) == 3):
        raise bt.InputError(f"{str(run)!r} was saved from Python or by SAELens and does not name a model "
                            "and a site that are known here; give --model, --layer and --site")
    if not (dataset or named and (run / "sae.safetensors").is_file()):
        tell(f"{run} was saved from Python or by SAELens; the text is {bt.RunConfig.dataset}", err)
    if "layer" in site or "site" in site:
        site["module"] = ""  # which would be read in their place
    sae.config = bt.RunConfig(**vars(sae.config) | site)
    lm = bt.LanguageModel.from_config(replace(sae.config, device=device), sae.found)
    if lm.d_model != sae.config.d_model:
        raise bt.InputError(f"{str(run)!r} reads activations of width {sae.config.d_model}; those of "
                            f"{sae.config.model!r} have {lm.d_model} at this site")
    return sae, lm

def text_to_read(cfg, lm, dataset=None, text_column=None):
    """Token ids [n, T] of the run's held-out text, or of all of another data set: about eval_tokens."""
    cfg = replace(cfg, text_column=text_column or cfg.text_column)
    if dataset is None or Path(dataset).resolve() == Path(cfg.dataset).resolve():
        return bt.held_out_contexts(cfg, lm.tokenizer)[1]
    cfg, n = replace(cfg, dataset=dataset, dataset_config=""), math.ceil(cfg.eval_tokens / (cfg.context - 1))
    return torch.cat(bt.held_out_contexts(cfg, lm.tokenizer, "all"))[:n]

MEANINGS = {
    "fvu": "fraction of variance unexplained", "nmse": "the same with each token standardised (the paper's)",
    "mse": "mean squared distance to the reconstruction", "l0": "mean active latents per token",
    "frac_alive": "share of latents that fired on these held-out tokens",
    "ce_clean": "cross-entropy of the model, nats per token",
    "ce_sae": "… reconstruction spliced in", "ce_zero": "… zeros instead",
    "ce_mean": "… the mean activation instead", "ce_degradation": "ce_sae - ce_clean",
    "ce_recovered": "1 is the untouched model, 0 is zeros", "kl": "from the untouched model",
    "frac_unread": "share of positions that the SAE does not read: untouched in all of these",
}

def show_metrics(result, as_json):
    """An evaluation as a table, or as JSON."""
    if as_json:
        return out.out(json.dumps(result))
    trained = f"{result['tokens']:,} tokens of training, " if result["tokens"] else ""
    tell("{run}: {}{eval_tokens:,} held out, beside {left_out:.2%} left out for their norm".format(
        trained, **result))
    table = Table("metric", "batch", f"θ = {result['theta_value']:.4g}", "meaning")
    for name, meaning in MEANINGS.items():
        both = (result[selection][name] for selection in ("batch", "theta"))
        table.add_row(name, *("no number" if x is None else f"{x:9.4f}" for x in both), meaning)
    out.print(table)
    low, middle, high = l0_quantiles(result["theta"]["l0_histogram"])
    tell(f"Active latents per token with θ: 5 % have at most {low}, half at most {middle}, 5 % over {high}.")
    if "rare" in result:
        tell("At the end of training {dead:.1%} of the latents were dead, silent for --dead-tokens; "
             "{rare:.1%} fired on fewer than {} of the last {:,} tokens.".format(*rarity(result), **result))

def l0_quantiles(histogram):
    """The counts that 5, 50 and 95 % of the tokens do not exceed; histogram[c] tokens have count c."""
    below = list(itertools.accumulate(histogram))
    return [next(c for c, n in enumerate(below) if n >= share * below[-1]) for share in (0.05, 0.5, 0.95)]

@app.command(epilog="Example: python cli.py export runs/tiny --format saelens --out my-sae")
def export(
    run: Run,
    out_path: Annotated[Path | None, Option("--out", metavar="", help="Path; by default in the run.")] = None,
    format: choice(bt.FORMATS, "what to write") = "torchscript",
    dtype: choice(("float32", "float16"), "precision of the weights of a TorchScript file") = "float32",
    force: Annotated[bool, Option("--force", metavar="", help="Replace what lies there.")] = False,
    as_json: Json = False,
):
    """Write the encoder for other programs: TorchScript, SAELens or dictionary_learning."""
    sae, path = bt.SAE.load(run), out_path or run / ("encoder.pt" if format == "torchscript" else format)
    with err.status("comparing with the SAE"):
        x = held_out_activations(sae)
        found = bt.export(sae, path, x, format=format, dtype=dtype, overwrite=force)
    if as_json:
        print(json.dumps({"run": str(run), "path": str(path), "k": sae.config.k, **found}))
        return
    made_up = "made-up activations (its model or text is not at hand, so L0 need not be k)"
    what = made_up if x is None else "held-out tokens"
    tell(f"Wrote {path}. On {found['tokens']:,} {what} the SAE has {found['l0']:.2f} active "
         f"latents per token; k is {sae.config.k:g}.")
    if format == "torchscript":
        active = found["l0"] * found["tokens"]
        tell("The file, loaded again, has {exported_l0:.2f}; {flipped} of {active:,.0f} active entries "
             "differ, the others by at most {largest_difference:.2g}.".format(active=active, **found))

def held_out_activations(sae: bt.SAE) -> torch.Tensor | None:
    """Activations [n, D] of held-out text, or None if the SAE's model or text is not known or not at hand."""
    cfg = sae.config
    if not isinstance(cfg, bt.RunConfig):
        return None
    with contextlib.suppress(bt.Unavailable, bt.InputError):
        lm = bt.LanguageModel.from_config(cfg, sae.found)
        if lm.d_model == cfg.d_model:
            contexts = bt.held_out_contexts(cfg, lm.tokenizer)[1]
            few = contexts[:: max(1, len(contexts) // 64)]
            return bt.shuffled_activations(cfg, lm, few)

# ---- Runs: SAEs trained side by side, what they write, how they continue ----

SHARED = "d_model", "tokens", "eval_tokens", "max_norm", "device"  # what SAEs trained together share
OWN = tuple(field.name for field in fields(bt.Config) if field.name not in SHARED)

def train_runs(configs, lm, folder, resume=False, on_step=None, on_context=None, on_read=None):
    """Train SAEs on the same activations, from one pass over the model; calibrate, save and evaluate each.

    An SAE leaves config.json, sae.safetensors, metrics.jsonl (100 records, 10 with held-out metrics) and
    evaluation.json in folder/name; the name "" means `folder` itself. Until all is done state-*.safetensors
    hold what resume=True continues from, on a CPU bit for bit.
    Args: configs, {name: RunConfig}, which may differ in the fields of OWN; on_step, called after each of the
        largest batches with the tokens seen and a list of each SAE's StepStats; on_context, see
        evaluate_runs; on_read, the same for tokens as the model reads them. If on_step, or on_read as a
        buffer is filled, returns True, the run is saved and ends.
    Returns: None if it was ended so, else evaluate_runs' results, and of each "step_seconds", "dead" (share
        of latents at the end), "rare" (see is_rare) and, if others differ in their seed alone, "agreement".
    Raises: InputError if they cannot share a stream or the disk has no room; Unavailable for a folder in use
        or a run that is finished; OSError for a file that cannot be written.
    """
    folder, cfg = Path(folder), check_shared(configs)
    check_run_folder(folder, resume)
    with locked(folder):
        check_room(configs, folder)
        calibration_ids, evaluation_ids = bt.held_out_contexts(cfg, lm.tokenizer)
        warn_of_nonsense(lm, evaluation_ids[:4].to(lm.device))
        begun = [folder / name for name in configs if (folder / name / "config.json").is_file()]
        found = bt.load_config(begun[0])[1] if begun else bt.Found()
        pass_contexts = found.pass_contexts or bt.pass_contexts(cfg, lm)
        cfg = replace(cfg, model_batch=pass_contexts)
        lm.norm_limit, lm.left_out = found.norm_limit, None
        calibration = bt.shuffled_activations(cfg, lm, calibration_ids, on_read)
        if cfg.max_norm and not lm.norm_limit and len(calibration):  # these are the first of a new run
            lm.left_out = bt.outliers(calibration, cfg.max_norm)
            lm.norm_limit = lm.left_out.norm_limit
            calibration = calibration[calibration.norm(dim=1) <= lm.norm_limit]
        found = bt.Found(lm.norm_limit, bool(bt.begin_token(lm.tokenizer)), pass_contexts)
        evaluation = bt.shuffled_activations(cfg, lm, evaluation_ids, on_read)
        if not len(calibration) or not len(evaluation):
            raise bt.InputError("no held-out token is read: too little text, only special tokens, or a limit "
                                "on norms that leaves out all")
        if min(len(calibration), len(evaluation)) < 0.9 * cfg.eval_tokens:  # norms left out are far fewer
            warnings.warn(f"held-out text gives {len(calibration):,} tokens for θ, {len(evaluation):,} to "
                          f"evaluate, not {cfg.eval_tokens:,}")
        trainers = {name: bt.Trainer(own, lm.processes.keep_share_(bt.make_sae(own)))
                    for name, own in configs.items()}
        for trainer in trainers.values():
            trainer.sae.found = found
        seconds = dict.fromkeys(trainers, 0.0)  # in each SAE's own steps
        if not train_trainers(trainers, seconds, cfg, lm, folder, evaluation[:4096], on_step, on_read):
            return None
        for name, trainer in trainers.items():
            trainer.sae.calibrate([calibration])
            trainer.sae.save(folder / name)
        saes = {folder / name: trainer.sae for name, trainer in trainers.items()}
        results = evaluate_runs(saes, lm, (evaluation_ids, evaluation), on_context)
        agreements = seeds_agreement(trainers)
        for (name, trainer), result in zip(trainers.items(), results):
            dead, rare = (trainer.sae.processes.total(int(which.sum())) / trainer.cfg.n_latents
                          for which in (trainer.sae.is_dead(), is_rare(trainer)))
            result |= {"step_seconds": seconds[name], "dead": dead, "rare": rare}
            if name in agreements:
                result["agreement"] = agreements[name]
            write(folder / name / "evaluation.json", json.dumps(result))
        if RANK == 0:
            for state in state_files(folder):
                state.unlink()
    return results

def warn_of_nonsense(lm, ids):
    """Warn if the model knows nothing of the text: then the tokenizer, or weights, are not this model's."""
    [[loss, _]] = (bt.edited_losses(lm, ids, None, ()) / ids[:, 1:].numel()).tolist()
    if loss > math.log(lm.n_rows):
        warnings.warn(f"the model predicts the text worse than chance ({loss:.1f} nats per token): do model, "
                      "tokenizer and text belong together?")

COUNTED, RARE = 1_000_000, 100_000  # tokens

def uncounted(cfg):
    """After how many tokens counting for "rare" begins: the last COUNTED are counted, in whole batches."""
    return max(0, cfg.tokens - COUNTED) // cfg.batch_size * cfg.batch_size

def is_rare(trainer):
    """Which latents [F] fired on fewer than one in RARE of the tokens that are counted."""
    return trainer.n_fired < (trainer.cfg.tokens - uncounted(trainer.cfg)) / RARE

def rarity(result):
    """(n, of): rare latents of a run fired on fewer than n of so many tokens."""
    counted = min(result["tokens"], COUNTED)
    return math.ceil(counted / RARE), counted

SAME, COSINES = 0.9, 1 << 24  # the cosine that two latents must exceed; how many are held at a time

def seeds_agreement(trainers):
    """{name: mean agreement of all pairs of seeds}, without rare latents, for SAEs that others share all but
    the seed with."""
    groups, found = {}, {}
    for name, trainer in trainers.items():
        groups.setdefault(replace(trainer.cfg, seed=0), []).append(name)
    for names in groups.values():
        used = (trainers[name].sae.W_dec[~is_rare(trainers[name])] for name in names)
        shares = [agreement(a, b) for a, b in itertools.combinations(used, 2)]
        found |= {name: mean(shares) for name in names if shares}
    return found

@torch.no_grad()
def agreement(a, b):
    """Share of the latents of two dictionaries [n, D] and [m, D] (the mean of both) that both have.

    Two are the same if each is the other's nearest, at a cosine above SAME.
    """
    if not len(a) or not len(b):
        return 0.0
    a, b = (torch.nn.functional.normalize(d.float(), dim=1) for d in (a, b))
    (cosine, there), (_, back) = nearest(a, b), nearest(b, a)
    mutual = back[there] == torch.arange(len(a), device=a.device)
    n_same = int((mutual & (cosine > SAME)).sum())
    return mean([n_same / len(a), n_same / len(b)])

def nearest(a, b):
    """The largest product of each row of a [n, D] with a row of b [m, D], and which row that is: [n] each."""
    parts = [(part @ b.T).max(1) for part in a.split(max(1, COSINES // len(b)))]
    return tuple(map(torch.cat, zip(*parts)))

def clock(device):
    """The time in seconds, read when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

def train_trainers(trainers, seconds, cfg, lm, folder, probe, on_step, on_read):
    """The training of train_runs, from its start or last saved state to a saved state; whether to its end."""
    tokens, at, records = load_state_(folder, trainers, seconds)
    for name, trainer in trainers.items():
        write(folder / name / "config.json", bt.config_json(trainer.cfg, trainer.sae.found))
    saved, every, total = time.monotonic(), cfg.checkpoint_tokens or cfg.tokens, lm.processes.total
    now = functools.partial(clock, lm.device) if len(trainers) > 1 else time.perf_counter  # waits take time

    def any_stops(*read):
        return total(bool(on_read and on_read(*read)))

    with contextlib.closing(bt.activation_batches(cfg, lm, at, any_stops)) as batches:
        while tokens < cfg.tokens:
            try:
                x, after = next(batches, (None, None))
            except (bt.InputError, bt.Unavailable):
                if SIZE == 1:  # several may have failed at different tokens
                    save_state(folder, trainers, seconds, at, records)
                raise
            if x is None:  # stopped while it was read
                save_state(folder, trainers, seconds, at, records)
                return False
            x, stats = x.float(), []
            for name, trainer in trainers.items():
                started = now()
                for part in x.split(trainer.cfg.batch_size):
                    last = trainer.step(part)
                    if trainer.tokens_seen <= uncounted(trainer.cfg):
                        trainer.n_fired.zero_()
                stats.append(last)
                seconds[name] += now() - started
            before, tokens, at = tokens, tokens + len(x), after
            if passed(cfg.tokens / 100, before, tokens):
                tenth = passed(cfg.tokens / 10, before, tokens)
                record(folder, trainers, tokens, stats, probe if tenth else None, records)
            stopped = bool(on_step and on_step(tokens, stats))
            stopped = total(stopped)  # in any process
            late = time.monotonic() - saved > 60 * cfg.checkpoint_minutes
            due = stopped or late or tokens == cfg.tokens or passed(every, before, tokens)
            if total(bool(due)):
                saved = time.monotonic()
                save_state(folder, trainers, seconds, at, records)
            if stopped:
                return False
    return True

def passed(every, before, now):
    """Whether a multiple of `every` tokens lies after `before`, up to `now`."""
    return now // every > before // every

def record(folder, trainers, tokens, stats, probe, records):
    """Add to each SAE's metrics its last step's, and those on a probe of held-out activations if given."""
    for (name, trainer), last in zip(trainers.items(), stats):
        metrics = {"tokens": tokens, **to_json_values(last._asdict())}
        if probe is not None:
            metrics["held_out"] = to_json_values(bt.evaluate(trainer.sae, [probe]))
        records[name].append(metrics)
        write(folder / name / "metrics.jsonl", "".join(json.dumps(each) + "\n" for each in records[name]))

def write(path, text):
    """Write a text file of a run, once for all processes."""
    if RANK == 0:
        bt.write_atomically(path, text.encode())

def state_text(trainers):
    """What a saved state belongs to: each run's fields as older versions wrote them; their states go on here.

    It may go on on another device, and be older than some fields.
    """
    texts = []
    for name, trainer in trainers.items():
        cfg, found = trainer.cfg, trainer.sae.found
        names, values = [field.name for field in fields(cfg) if field.name != "max_norm"], vars(cfg).copy()
        values["device"] = "auto"
        if isinstance(cfg, bt.RunConfig):  # in which what was found stood beside what was asked
            values |= {"prepend_bos": bt.begins(trainer.sae), "norm_limit": found.norm_limit,
                       "model_batch": found.pass_contexts}
            place = names.index("model_batch")
            names[place:place] = "max_norm", "norm_limit"
        said = ", ".join(f"{each}={values[each]!r}" for each in names)
        texts.append(f"{name!r}: {type(cfg).__name__}({said})")
    text = f"{{{', '.join(texts)}}}"
    for name, value in (("topk_start", 0.0), ("decoder_lr", 2)):  # what states of before them mean
        text = text.replace(f", {name}={value}", "")
    return text

def save_state(folder, trainers, seconds, at, records):
    """Save what a resumed run needs, each process its share; older states go when this one is whole."""
    text = json.dumps([at, seconds, records]).encode()
    tensors = {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    for name, trainer in trainers.items():
        tensors |= {f"{name}/{key}": t for key, t in bt.trainer_state(trainer).items()}
    tokens, failed = trainer.tokens_seen, False
    path = state_path(folder, tokens)
    try:
        bt.save_tensors(path, tensors, state_text(trainers))
    except OSError as error:
        failed = True
        warnings.warn(f"{error}; what is saved is older than token {tokens}")
    if not trainer.sae.processes.total(failed):
        for old in set(state_files(folder)) - set(state_files(folder, tokens)):
            old.unlink(missing_ok=True)  # another process may have been faster
    elif SIZE > 1:
        path.unlink(missing_ok=True)  # a part is worth nothing

def load_state_(folder, trainers, seconds):
    """Continue from the last saved state, if there is one. Returns tokens, Position and metric records."""
    states = saved_states(folder)
    if not states:
        return 0, bt.Position(), {name: [] for name in trainers}
    n, tokens = states[-1]
    if n != SIZE:
        raise bt.Unavailable(f"{str(folder)!r} was saved by {n} processes; continue it with as many")
    saved = bt.load_tensors(state_path(folder, tokens), state_text(trainers))
    with bt.explained(f"the state in {str(folder)!r} was written by another version of batchtopk"):
        for name, trainer in trainers.items():
            bt.restore_trainer_(trainer, {key: saved[f"{name}/{key}"] for key in bt.trainer_state(trainer)})
        at, spent, records = json.loads(saved["json"].numpy().tobytes())
    seconds.update(spent)
    return tokens, bt.Position(*at), records

def state_path(folder, tokens):
    """Where this process saves its share of the state after so many tokens."""
    return folder / f"state-{tokens}-{RANK}-of-{SIZE}.safetensors"

def state_files(folder, tokens="*"):
    """The saved states of all processes."""
    return folder.glob(f"state-{tokens}-*-of-*.safetensors")

def saved_states(folder):
    """What a run can be continued from: (number of processes, tokens) of each state that is whole."""
    parts = [path.stem.split("-") for path in state_files(folder)]
    states = [(int(size), int(tokens)) for _, tokens, _, _, size in parts]
    return sorted(state for state in set(states) if states.count(state) == state[0])

def check_shared(configs):
    """The configuration of the stream: the largest batch's. InputError if they cannot share one."""
    first, largest = next(iter(configs.values())), max(configs.values(), key=lambda cfg: cfg.batch_size)
    for name, cfg in configs.items():
        wrong = [key for key, value in vars(cfg).items() if key not in OWN and value != getattr(first, key)]
        if largest.batch_size % cfg.batch_size or wrong:
            why = ", ".join(wrong) or "batch_size, which does not divide the largest"
            raise bt.InputError(f"{name} cannot be trained beside the others, because of its {why}")
    return replace(largest, seed=first.seed)

LOCK = "in-use.lock"

def check_run_folder(folder, resume=False):
    """Unavailable if a new run's folder is in use, or a resumed run is finished."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    used = folder.is_file() or any(path.suffix != ".tmp" and path.name != LOCK for path in files)
    if used and not resume:
        raise bt.Unavailable(f"run {str(folder)!r} exists; choose another name, or continue it with --resume")
    finished = any(folder.glob("**/evaluation.json")) or (folder / "sae.safetensors").is_file()
    if resume and finished and not saved_states(folder):
        raise bt.Unavailable(f"run {str(folder)!r} is finished; there is nothing to resume")

@contextlib.contextmanager
def locked(folder):
    """Make a folder and hold it for this run alone, as long as its process 0 lives."""
    folder.mkdir(parents=True, exist_ok=True)
    if RANK > 0:
        yield
        return
    lock = FileLock(folder / LOCK, timeout=0)
    with bt.explained(f"another process is writing to {str(folder)!r}", bt.Unavailable):
        lock.acquire()
    try:
        for leftover in folder.rglob("*." + "[0-9a-f]" * 8 + ".tmp"):
            leftover.unlink()
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes it when it is released
            os.unlink(folder / LOCK)
        lock.release()

def check_room(configs, folder):
    """InputError if the disk has no room for two saved states."""
    state = sum(24 * cfg.n_latents * cfg.d_model for cfg in configs.values())  # weights and two moments
    free = shutil.disk_usage(folder).free
    if 2 * state > free:
        wanted, there = math.ceil(2 * state / 1e6) / 1000, free // 10**6 / 1000  # never the same number
        raise bt.InputError(f"the run wants {wanted:,} GB of disk; there are {there:,}")

def evaluate_runs(saes, lm, held_out=None, on_context=None, densities=False):
    """JSON-ready: evaluate {folder: SAE}, all of one model and text, on its held-out text.

    Args: held_out, token ids [n, T] and their activations [m, D], if they are at hand; on_context, called as
        cross-entropy is measured with the number of contexts that are done and are to be done; densities,
        whether to keep "feature_density", a number for each latent.
    """
    cfg, started = next(iter(saes.values())).config, time.perf_counter()
    if held_out is None:
        ids = bt.held_out_contexts(cfg, lm.tokenizer)[1]
        held_out = ids, bt.shuffled_activations(cfg, lm, ids)
    ids, x = held_out
    few = ids[:: math.ceil(len(ids) / cfg.ce_contexts)]
    losses = bt.splice_losses(list(saes.values()), lm, few, x.double().mean(0).float(), on_context)
    left_out, results = 1 - len(x) / int(lm.is_kept(ids).sum()), []
    for (folder, sae), spliced in zip(saes.items(), losses):
        metrics = to_json_values(bt.evaluate(sae, [x]), densities)
        for selection in ("batch", "theta"):
            metrics[selection] |= to_json_values(spliced[selection])
        theta = float(sae.processes.gather(sae.get_theta().detach()).mean())
        trained = sae.config.tokens if (Path(folder) / "metrics.jsonl").is_file() else None  # from Python
        results.append({"run": str(folder), "tokens": trained, "k": sae.config.k, "theta_value": theta,
                        "eval_tokens": metrics.pop("tokens"), **metrics, "left_out": left_out})
    seconds = round(time.perf_counter() - started, 2)
    return [{**result, "seconds": seconds} for result in results]

def to_json_values(metrics, densities=False):
    """Metrics, without the densities of single latents if so asked, and None for what is no finite number."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found[name] = to_json_values(value, densities)
        elif isinstance(value, float) and not math.isfinite(value):
            found[name] = None
        elif not isinstance(value, torch.Tensor):
            found[name] = value
        elif densities:
            found[name] = value.tolist()
    return found

# ---- latents ----

@app.command(epilog="Example: python cli.py latents runs/tiny 17 412 --html latents.html")
def latents(
    run: Run,
    numbers: Annotated[list[int] | None, Argument(
        metavar="latent", help="Their numbers; by default a choice from dense to rare.")] = None,
    find: Annotated[str | None, Option(metavar="", help="Choose those most active on these words.")] = None,
    text: Annotated[str | None, Option(
        metavar="", help="A text (or file, or - for stdin): show what is active on its tokens.")] = None,
    top: Annotated[int, Option(metavar="", help="How many contexts to show of each.", min=1)] = 10,
    count: Annotated[int, Option(metavar="", help="How many latents to choose.", min=1)] = 12,
    html: Annotated[Path | None, Option(metavar="", help="Write a self-contained page with search.")] = None,
    dataset: Dataset = None,
    text_column: instead("text_column") = None,
    model: instead("model") = None,
    layer: instead("layer") = None,
    site: instead("site") = None,
    device: Device = bt.RunConfig.device,
    as_json: Json = False,
):
    """Show what single latents respond to and what they write, on held-out text."""
    if html:
        bt.check_replaceable(html, overwrite=True)
    if sum(given is not None for given in (numbers, find, text)) > 1 or (html and text is not None):
        raise bt.InputError("give latents, --find or --text; --html goes with the first two")
    with err.status("loading the model and text"):
        sae, lm = load(run, device, dataset, model=model, layer=layer, site=site)
        contexts = text_to_read(sae.config, lm, dataset, text_column)
    if text is not None:
        found = {"run": str(run), **describe_text(sae, lm, contexts, read_text(text))}
        return print(json.dumps(found)) if as_json else show_text(found)
    found = describe_latents(sae, lm, contexts, numbers, count, top, find)
    shown, silent, rare = len(found["latents"]), found["never_fired"], found["rarely_fired"]
    about = f"{shown} of {len(sae.b_enc):,} latents of {run} on {found['tokens']:,} held-out tokens"
    if find is not None and not shown:
        about += f": none has {LEAST_SHARE:.0%} of its activation on tokens that are, as words, {find!r}"
    elif silent or rare:
        about += f"; of the others {silent:,} never fired there, {rare:,} on fewer than {top}"
    about += "."
    if html:
        bt.write_atomically(html, latents_page(about, found["latents"], contexts, lm.tokenizer).encode())
    if as_json:
        print(json.dumps({"run": str(run), **found}))
    elif html:
        tell(f"Wrote {html} ({html.stat().st_size / 1e6:.1f} MB): {about}")
    else:
        tell(about)
        for latent in found["latents"]:
            show_latent(latent, find)

def watched(items, words):
    """The items, with a bar that says what is done with them."""
    return track(items, words, console=err, transient=True, disable=not err.is_terminal)

def read_entries(sae, lm, ids):
    """Which tokens of ids [n, T] the SAE reads, bool [n, T], and its active entries there: latents, places in
    the flattened ids, values."""
    x, read = lm.kept_activations(ids)
    (row, latent), value = (t.cpu() for t in sae.encode_sparse(x.to(sae.W_dec.device), "theta"))
    return read.cpu(), latent, read.cpu().flatten().nonzero()[:, 0][row], value

LEAST_SHARE = 0.01  # of a latent's activation that falls on a word, for the word to count

@torch.no_grad()
def read_activity(sae, lm, contexts):
    """Where all latents are active on contexts [n, T] of token ids, in one pass.

    Returns how many tokens are read; of each latent {place in the flattened contexts: activation} and {word:
    share of all its activation that falls on it}, both from the largest down.
    """
    n_tokens, few, parts = 0, bt.pass_contexts(sae.config, lm), []
    for i, ids in enumerate(watched(contexts.split(few), "reading held-out text")):
        read, latent, place, value = read_entries(sae, lm, ids)
        parts.append((latent, place + i * few * ids.shape[1], value))
        n_tokens += int(read.sum())
    latent, place, value = map(torch.cat, zip(*parts))
    order = value.argsort(descending=True)
    order = order[latent[order].argsort(stable=True)]
    sizes = latent.bincount(minlength=len(sae.b_enc)).tolist()
    places, values = (t[order].split(sizes) for t in (place, value))
    active = [dict(zip(i.tolist(), v.tolist())) for i, v in zip(places, values)]
    words = {i: as_word(token_text(lm.tokenizer, i)) for i in contexts.unique().tolist()}
    words, shares = [words[i] for i in contexts.flatten().tolist()], []
    for f in active:
        sums, total = Counter(), sum(f.values())
        for place, value in f.items():
            sums[words[place]] += value
        parts = ((word, part / total) for word, part in sums.most_common())
        shares.append({word: share for word, share in parts if share >= LEAST_SHARE})
    return n_tokens, active, shares

def as_word(token):
    """What a search compares: small letters, without blanks and punctuation around them if there are any."""
    return re.sub(r"^[\W_]+|[\W_]+$", "", token.lower()) or token.strip() or token

def find_latents(shares, phrase):
    """{latent: share of its activation on the words of a phrase}, from the largest down, but first the latent
    whose number it is."""
    words = {as_word(word) for word in phrase.split()}
    found = {j: sum(own.get(word, 0.0) for word in words) for j, own in enumerate(shares)}
    ranked = sorted(found, key=lambda j: (str(j) != phrase.strip(), -found[j]))
    return {j: found[j] for j in ranked if found[j] or str(j) == phrase.strip()}

def describe_latents(sae, lm, contexts, latents=None, count=12, top=10, find=None):
    """What single latents respond to and what they write, on contexts [n, T] of token ids; JSON-ready.

    Without `latents`, the first `count` that find_latents finds, if asked to `find`, else from the densest to
    the rarest `count` of those that fired on `top` tokens or more; of all that fired, if these are too few.
    "top" are contexts in which a latent is most active, "lower" others, around quartiles of its activations;
    "fires_on": words, and the shares of the latent's activation on them.
    """
    F, T = len(sae.b_enc), contexts.shape[1]
    text = functools.cache(functools.partial(token_text, lm.tokenizer))
    if wrong := [j for j in latents or () if not 0 <= j < F]:
        raise bt.InputError(f"latent {wrong[0]} does not exist; give numbers from 0 to {F - 1}")
    n_tokens, active, shares = read_activity(sae, lm, contexts)
    ids, fired = contexts.flatten().tolist(), [len(f) for f in active]
    found = find_latents(shares, find) if find else {}
    if latents is None and find:
        latents = list(found)[:count]
    elif latents is None:
        least = top if sum(n >= top for n in fired) >= count else 1
        ranked = sorted((j for j in range(F) if fired[j] >= least), key=lambda j: -fired[j])
        steps = torch.linspace(0, len(ranked) - 1, min(count, len(ranked)))
        latents = [ranked[i] for i in steps.round().long().tolist()]
    unit = functional.normalize(sae.W_dec.float(), dim=1)

    def context(j, place):
        t = place % T
        begin = max(0, min(t - 15, T - 24))
        start, places = place - t + begin, range(place - t + begin, place - t + min(begin + 24, T))
        return {"tokens": [text(ids[i]) for i in places], "start": start, "peak": place - start,
                "activations": [round(active[j].get(i, 0.0), 4) for i in places], "value": active[j][place]}

    described, effects_of = [], logit_effects(sae, lm, latents)
    for j, effects, (nearest, _) in zip(watched(list(latents), "describing latents"), effects_of,
                                        extremes(unit[latents], unit, 6)):
        f = active[j]
        most, lower = ([context(j, place) for place in places] for places in example_places(list(f), T, top))
        described.append({
            "latent": j, "density": fired[j] / n_tokens, "max": max(f.values(), default=0.0),
            "mean": sum(f.values()) / max(1, fired[j]),
            **({"share": round(found[j], 4)} if j in found else {}),
            "fires_on": [[word, round(share, 4)] for word, share in shares[j].items()],
            "top": most, "lower": lower, **effects,
            "neighbours": [[i, round(cosine, 4)] for i, cosine in nearest if i != j][:5]})
    others = [fired[j] for j in {*range(F)} - {*latents}]
    return {"tokens": n_tokens, "rarely_fired": sum(0 < n < top for n in others),
            "never_fired": others.count(0), "latents": described}

def example_places(places, T, top):
    """Of a latent's places, from the strongest down: those that lead in the `top` first contexts, and around
    quartiles of the rest two each."""
    leads = {}
    for place in places:
        leads.setdefault(place // T, place)
    most = dict(list(leads.items())[:top])
    rest = [place for place in places if place // T not in most]
    lower = dict.fromkeys(place for quarter in (1, 2, 3) for place in rest[quarter * len(rest) // 4 :][:2])
    return list(most.values()), list(lower)

def read_text(text):
    """What --text says: a text, the path of a file or - for stdin."""
    if text != "-" and not os.path.isfile(text):
        return text
    with contextlib.nullcontext(sys.stdin) if text == "-" else bt.open_text(text) as file:
        return file.read()

TEXT_CONTEXTS = 128  # are read at most to describe what a text's latents mostly fire on: more would take long

@torch.no_grad()
def describe_text(sae, lm, contexts, text):
    """What is active on each token of a text, read in contexts of its own as in training; JSON-ready.

    Densities, and words that latents mostly fire on, are those on some of contexts [n, T] of token ids.
    """
    few = contexts[:: math.ceil(len(contexts) / TEXT_CONTEXTS)]
    n_tokens, active, shares = read_activity(sae, lm, few)
    begin = bt.begin_token(lm.tokenizer) if sae.config.prepend_bos else []
    [ids], size, tokens = bt.tokenise(lm.tokenizer, iter([text])), sae.config.context - len(begin), []
    if not ids:
        raise bt.InputError("the text is empty")

    def latent(value, j):
        word, share = next(iter(shares[j].items()), ("", 0.0))
        return {"latent": j, "value": value, "density": len(active[j]) / n_tokens,
                "word": word, "share": round(share, 4)}

    for part in torch.tensor(ids).split(size):
        part = torch.cat([torch.tensor(begin, dtype=torch.int64), part])
        [read], *entries = read_entries(sae, lm, part[None])
        active_on = [[] for _ in part]
        for j, place, value in zip(*map(torch.Tensor.tolist, entries)):
            active_on[place].append((value, j))
        for token, is_read, entries in zip(part.tolist(), read.tolist(), active_on):
            entries.sort(reverse=True)
            rarest = sorted(entries, key=lambda entry: len(active[entry[1]]))[:1]
            shown = dict.fromkeys([*entries[:5], *rarest])
            tokens.append({"token": token_text(lm.tokenizer, token), "read": is_read, "active": len(entries),
                           "latents": [latent(*entry) | {"rarest": entry in rarest} for entry in shown]})
    return {"tokens": n_tokens, "text": tokens}

def logit_effects(sae, lm, latents):
    """Of each latent: the tokens whose logits its direction raises and lowers most by itself.

    The final norm's weights are folded into the output embeddings, its division by a size is not. Nothing is
    said where that norm is not found, or a module is read whose output need not be added to the stream.
    """
    W_U, said = lm.model.get_output_embeddings().weight.detach(), {"promotes": [], "suppresses": []}
    folded = None if sae.config.module or W_U.shape[1] != sae.W_dec.shape[1] else final_norm(lm)
    if folded is None:
        yield from (said for _ in latents)
        return
    weights, takes_mean = folded
    directions = sae.W_dec[latents].to(lm.device).float()
    directions = (directions - takes_mean * directions.mean(1, keepdim=True)) * weights
    means = (directions @ W_U.float().mean(0)).tolist()
    for mean_effect, ends in zip(means, extremes(directions, W_U.float(), 8)):
        yield {name: [[token_text(lm.tokenizer, i), round(effect - mean_effect, 4)] for i, effect in pairs]
               for name, pairs in zip(said, ends)}

@torch.no_grad()
def final_norm(lm):
    """The weights [D] of the model's final norm, and whether it takes the mean away; None if it has none.

    Names and forms differ between families. So 64 tokens decide: on them the output embeddings' input is
    weights · (h - mean) / size + bias, h being the last block's output, if there is such a norm.
    """
    n_tokens, norms = min(len(lm.tokenizer), lm.n_rows), (functional.rms_norm, functional.layer_norm)
    ids, probe, read, fits = torch.linspace(1, n_tokens - 1, 64).long().view(4, 16), copy.copy(lm), [], []
    with contextlib.suppress(AttributeError, bt.InputError):  # no such blocks
        last = lm.model.config.get_text_config().num_hidden_layers - 1
        block, head = bt.find_site(lm.model, last, "resid_post", "")[0], lm.model.get_output_embeddings()
        for probe.module, probe.reads_input in ((block, False), (head, True)):
            read.append(probe.activations(ids).flatten(0, 1).cpu().double())
    if len(read) < 2 or torch.equal(*read):
        return None
    h, y = read
    for takes_mean, norm in enumerate(norms):
        unit, wanted = norm(h, h.shape[1:]), y - y.mean(0)
        unit = unit - unit.mean(0)
        weights = (unit * wanted).sum(0) / unit.square().sum(0)
        fits.append((float((weights * unit - wanted).norm() / wanted.norm()), takes_mean, weights))
    error, takes_mean, weights = min(fits)
    return (weights.float().to(lm.device), takes_mean) if error < 0.01 else None  # bfloat16 errs by 0.003

def extremes(a, b, n):
    """For each row of a [m, D]: the n largest products with rows of b [k, D] and the n smallest, as pairs
    of a row of b and the product."""
    for part in a.split(max(1, COSINES // len(b))):
        product = part @ b.T
        ends = [product.topk(min(n, len(b)), largest=largest) for largest in (True, False)]
        pairs = [zip(top.indices.tolist(), top.values.tolist()) for top in ends]
        yield from ([list(zip(*row)) for row in rows] for rows in zip(*pairs))

def token_text(tokenizer, token):
    """A token as it stands in text. Some decoders strip a blank from what comes first: so it comes twice."""
    once, twice = (tokenizer.decode(n * [token], clean_up_tokenization_spaces=False) for n in (1, 2))
    return twice[len(once):]

def short(token):
    """A token in one line, without control characters; long runs of blanks are counted."""
    marks = {"\n": "↵", "\t": "→"}
    visible = "".join(marks.get(c, c if c.isprintable() else "·") for c in token)
    return re.sub(" {3,}", lambda run: f"␣×{len(run[0])}", visible)

def show_latent(latent, phrase=None):
    """One latent in the terminal."""
    tell("\nlatent {latent}  density {density:.3%}, max {max:.3g}, mean {mean:.3g}".format(**latent)
         + (f", {latent['share']:.0%} of its activation on {phrase!r}" if phrase else ""))
    pairs = {"fires on": [f"{short(word)} {share:.0%}" for word, share in latent["fires_on"][:8]]}
    pairs |= {name: [f"{short(token)} {effect:+.2f}" for token, effect in latent[name]]
              for name in ("promotes", "suppresses")}
    pairs["neighbours"] = [f"{j} ({cosine:.2f})" for j, cosine in latent["neighbours"]]
    lines = [Text(f"{name:<11}" + "  ".join(parts)) for name, parts in pairs.items() if parts]
    for title, contexts in (("most active", latent["top"]), ("less active", latent["lower"])):
        lines += [Text(title, style="dim")] if contexts else []
        lines += [context_line(context, latent["max"]) for context in contexts]
    out.print(Text("\n").join(lines), no_wrap=True, overflow="ellipsis")

def show_text(found):
    """A line for each token of a text: how many latents are active, the rarest and the strongest of them."""
    tell("How many latents of {run} are active on each token; the rarest (*), then the strongest, each with "
         "its activation and the word it mostly fires on, in {tokens:,} held-out tokens.\n".format(**found))
    for token in found["text"]:
        line = Text(short(token["token"]))
        line.truncate(14, overflow="ellipsis")
        line.align("right", 14)
        line.append(f"{token['active']:>5}  " if token["read"] else "       not read", style="dim")
        for latent in sorted(token["latents"], key=lambda latent: not latent["rarest"]):
            line.append(f"{'*' * latent['rarest']}{latent['latent']}", style="bold")
            line.append(f" {latent['value']:.3g} ").append(f"{short(latent['word'])}  ", style="cyan")
        out.print(line, no_wrap=True, overflow="ellipsis")

def context_line(context, strongest):
    """A context, begun late enough that its peak, between « », fits the terminal."""
    words, peak, first = [short(token) for token in context["tokens"]], context["peak"], 0
    words[peak] = f"«{words[peak]}»"
    while first < peak and Text("".join(words[first : peak + 1])).cell_len > 0.75 * out.width - 10:
        first += 1
    line, styles = Text(f"{context['value']:>8.3g}  "), ("cyan", "bold cyan", "bold reverse cyan")
    for word, activation in list(zip(words, context["activations"]))[first:]:
        line.append(word, style=styles[min(2, int(3 * activation / strongest))] if activation > 0 else "")
    return line

def latents_page(about, described, contexts, tokenizer):
    """One page that needs nothing else: a script in it shows the JSON beside it.

    It holds the text once, as numbers of tokens, and of a context its start, length and peak, and where the
    latent is active in it, and how much. Three digits of a number are enough to see.
    """
    ids, places = contexts.unique(return_inverse=True)

    def packed(context):
        active = [(i, a) for i, a in enumerate(context["activations"]) if a > 0]
        return [context["start"], len(context["tokens"]), context["peak"], *itertools.chain(*active)]

    described = [latent | {name: list(map(packed, latent[name])) for name in ("top", "lower")}
                 for latent in described]
    data = {"about": about, "tokens": [token_text(tokenizer, i) for i in ids.tolist()],
            "text": places.flatten().tolist(), "latents": described}
    data = json.loads(json.dumps(data), parse_float=lambda number: float(f"{float(number):.3g}"))
    text = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")
    page = (Path(__file__).parent / "tests/assets/latents.html").read_text(encoding="utf-8")
    return page.replace("DATA", text)

# ---- compare ----

ALL = {"activation": ",".join(bt.SAES)}
STUDIES = {  # what --study varies, unless an option says otherwise
    "methods": ALL, "k": ALL | {"k": "16,32,64"}, "latents": ALL | {"n_latents": "1024,2048,4096,8192"},
    "batch": {"activation": "batchtopk", "batch_size": "64,256,1024,4096,8192"},
    "lr": {"activation": "batchtopk", "lr": "0.0003,0.001,0.002,0.003,0.005,0.01"},
    "recipe": {"activation": "batchtopk", "recipe": "ours,paper"},
    "training": {"activation": "batchtopk", "change": "none,lr=0.0015,lr=0.006,batch_size=256,batch_size=1024"
                 ",decoder_lr=1,beta1=0.9,beta1=0,beta2=0.99,warmup=0.1,decay=0,decay=0.3,topk_start=0"
                 ",topk_start=0.3,init=authors,normalize=token,aux_coef=0,dead_tokens=100000"},
}

@app.command(epilog="Example: python cli.py compare --activation batchtopk,topk --k 16,32,64 --seeds 1")
@functools.partial(config_options, lists=OWN, sets={"methods": STUDIES, **SETS})
def compare(
    preset: Preset = "tiny",
    study: choice(STUDIES, "what to vary; it sets what is marked methods") = "methods",
    recipe: Annotated[str | None, Option(metavar=",…", help=sentence(
        f"{RECIPE}; all read the tokens of the first", bt.RECIPES, "ours"))] = None,
    change: Annotated[str | None, Option(metavar=",…", help="Changes to try, as beta1=0,decay=0.")] = None,
    seeds: Annotated[int, Option(metavar="", help="How many seeds of each, from 0.", min=1)] = 3,
    out_folder: Annotated[Path, Option("--out", metavar="", help="Their folder.")] = Path("runs/compare"),
    as_json: Json = False,
    **options,
):
    """Train several SAEs on the same activations and compare them on held-out text.

    Options marked ,… take several values, separated by commas. The same command continues what was
    interrupted.
    """
    options |= {"recipe": recipe, "change": change}
    figure = out_folder / "comparison.png"
    bt.check_replaceable(figure, overwrite=True)
    given = {name: value for name, value in options.items() if value is not None}
    lists = dict(STUDIES[study])
    lists |= {name: given.pop(name) for name in (*OWN, "recipe", "change") if name in given}
    values = {name: list(dict.fromkeys(map(str.strip, text.split(",")))) for name, text in lists.items()}
    names = [name for name in values if name == "activation" or len(values[name]) > 1]
    values["seed"] = list(map(str, range(seeds)))
    settings = [dict(zip(values, setting)) for setting in itertools.product(*values.values())]
    first, *others = values.get("recipe", ["ours"])
    if others:  # all read the same tokens, those of the first recipe
        cfg = bt.RunConfig.preset(preset, first)
        changed = {name for recipe in bt.RECIPES.values() for name in recipe}
        given = {name: getattr(cfg, name) for name in changed - {*OWN}} | given
    configs, groups = {}, {}
    for setting in settings:
        varied = [f"{name}={setting[name]}" for name in (*names[1:], "seed")]
        configs["-".join([setting["activation"], *varied])] = setting_config(preset, setting, given)
    results = comparison_results(configs, out_folder)
    for setting, result in zip(settings, results):
        groups.setdefault(tuple(setting[name] for name in names), []).append(result)
    draw_comparison(names, groups, figure)
    if as_json:
        print(json.dumps({"folder": str(out_folder), "results": results, "figure": str(figure)}))
    else:
        show_comparison(names, groups)
        tell(f"Every number: {out_folder}/*/evaluation.json. Figure: {figure}.")

def setting_config(preset, setting, given):
    """The configuration of one setting: {name: text} of fields, and perhaps of a recipe and a change."""
    texts, values = dict(setting), dict(given)
    recipe, change = texts.pop("recipe", "ours"), texts.pop("change", "none")
    if change != "none":
        name, _, texts[name] = change.partition("=")
        bt.check_choice("field to change", name, OWN)
    for name, text in texts.items():
        values[name] = text
        with contextlib.suppress(ValueError):
            values[name] = learning_rate(text) if name == "lr" else float(text)
    return bt.RunConfig.preset(preset, recipe, **values)

def comparison_results(configs, folder):
    """Train and evaluate all configurations, continue that, or read what was found."""
    check_shared(configs)
    begun = {path.parent.name: bt.RunConfig.load(path.parent) for path in folder.glob("*/config.json")}
    for name, cfg in begun.items():
        asked = configs.get(name)
        if asked is None or replace(cfg, d_model=asked.d_model, device=asked.device) != asked:
            raise bt.InputError(f"{str(folder)!r} was begun with other configurations; choose another folder")
    results = train_with_bar(configs, folder, "the same command", bool(begun))
    return [{"name": name, **result, "config": vars(bt.RunConfig.load(folder / name))}
            for name, result in zip(configs, results)]

def mean_and_spread(group, metric, selection="theta"):
    """Mean and standard deviation of a metric over seeds; 0 for one."""
    values = [result[selection][metric] for result in group]
    return mean(values), stdev(values) if len(values) > 1 else 0.0

COLUMNS = (("theta", "fvu", "{:.4f} ±{:.4f}"), ("batch", "fvu", "{:.4f}"), ("theta", "l0", "{:.2f}"),
           ("theta", "ce_degradation", "{:.3f} ±{:.3f}"))

def show_comparison(names, groups):
    """A row for each setting: mean ± standard deviation over the results of its seeds."""
    shares = {"dead": "{:.1%}", "rare": "{:.1%}"}
    if all("agreement" in result for group in groups.values() for result in group):
        shares["agreement"] = "{:.0%}"
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in (*names, "fvu, θ", "batch", "L0", "ce", *(name[:5] for name in shares), "s"):
        table.add_column(name, justify="left" if name in names else "right", no_wrap=True)
    for key, group in groups.items():
        cells = list(key)
        for selection, metric, form in COLUMNS:
            form = form if len(group) > 1 else form.split(" ±")[0]
            cells.append(form.format(*mean_and_spread(group, metric, selection)))
        for name, form in (shares | {"step_seconds": "{:.0f}"}).items():
            cells.append(form.format(mean(result[name] for result in group)))
        table.add_row(*cells)
    Console(width=200, quiet=RANK > 0).print(table)  # a narrow terminal wraps lines, but no number is cut
    [first, *more] = next(iter(groups.values()))
    seeds = f"Mean ± standard deviation over {len(more) + 1} seeds" if more else "One seed"
    agree = "agree: share of the others that two seeds both have; " if "agreement" in shares else ""
    tell("{}; {tokens:,} tokens of training, {eval_tokens:,} held out, beside {left_out:.2%} left out for "
         "their norm. L0, ce: with θ, ce: loss added, nats per token; dead: silent for --dead-tokens at the "
         "end; rare: fired on fewer than {} of the last {:,} tokens; {}s: seconds in the SAE's own steps."
         .format(seeds, *rarity(first), agree, **first))

STYLES = {"batchtopk": ("#08519c", "o", "-", "BatchTopK"), "topk": ("#e08214", "s", "--", "TopK"),
          "jumprelu": ("#737373", "^", ":", "JumpReLU")}

def draw_comparison(names, groups, path):
    """Error against each number that was varied, and active latents per token."""
    from matplotlib.figure import Figure
    varied = [name for name in ("k", "n_latents", "batch_size", "lr") if name in names
              and all(key[names.index(name)] != "auto" for key in groups)]
    panels = list(itertools.product(varied, ("fvu", "ce_degradation")))
    figure = Figure(figsize=(5 * len(panels) + 6, 4), layout="constrained")
    *errors, last = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    settings = [(dict(zip(names, key)) | {"k": f"{group[0]['k']:g}"}, group) for key, group in groups.items()]
    for panel, axes in zip(panels, errors):
        draw_error(axes, settings, *panel)
    draw_active_latents(last, settings)
    for axes in figure.axes:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)

def legend(setting):
    """A setting in words."""
    numbers = (f"{name} = {value}" for name, value in setting.items() if name != "activation")
    return ", ".join([STYLES[setting["activation"]][3], *numbers])

def draw_error(axes, settings, against, metric):
    """A metric against a field of RunConfig, a line for each combination of the others."""
    lines = {}
    for setting, group in settings:
        said = legend({name: value for name, value in setting.items() if name != against})
        point = (float(setting[against]), *mean_and_spread(group, metric))
        lines.setdefault((setting["activation"], said), []).append(point)
    for (method, said), points in lines.items():
        color, marker, line, _ = STYLES[method]
        x, y, spread = zip(*sorted(points))
        axes.errorbar(x, y, yerr=spread, color=color, marker=marker, linestyle=line, markerfacecolor="none",
                      capsize=3, label=said)
    ticks = sorted({float(setting[against]) for setting, _ in settings})
    axes.set(xscale="log", xlabel=FIELDS[against].metadata["doc"].partition(";")[0], ylabel=MEANINGS[metric])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()

def draw_active_latents(axes, settings):
    """Active latents per token, for each method at the first setting whose k is nearest to the default."""
    nearest_last = sorted(reversed(settings), key=lambda each: -abs(each[1][0]["k"] - bt.RunConfig.k))
    for setting, [result, *_] in {each[0]["activation"]: each for each in nearest_last}.values():
        color, _, line, _ = STYLES[setting["activation"]]
        histogram = result["theta"]["l0_histogram"]
        low, _, high = l0_quantiles(histogram)
        style = {"color": color, "linestyle": line, "label": f"{legend(setting)}: 90 % have {low} to {high}"}
        if low == high:  # a spike that would flatten the others
            axes.axvline(low, **style)
        else:
            axes.plot([100 * tokens / sum(histogram) for tokens in histogram], **style)
    axes.set(ylim=(0, None), xlabel="active latents on a token", ylabel="% of held-out tokens")

if __name__ == "__main__":
    app()
