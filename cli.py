"""Command line of batchtopk: it talks to people, batchtopk.py does the work.

    python cli.py train             # a BatchTopK SAE on the embedded GPT-2, in about two minutes
    python cli.py --help            # the other commands: eval, export, latents, compare
    torchrun --nproc-per-node 2 cli.py train    # one SAE, its latents shared by two devices

Results go to stdout, progress to stderr. A mistake ends in one line and exit code 2 (usage) or 1.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import time
import warnings
from dataclasses import fields, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, get_type_hints

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

import batchtopk as bt

RANK = int(os.environ.get("RANK", 0))  # under torchrun only the first process speaks
out, err = (Console(stderr=stderr, quiet=RANK > 0, markup=False, emoji=False, highlight=False)
            for stderr in (False, True))

# ---- Options, messages, errors ----

FIELDS = {field.name: field for field in fields(bt.RunConfig)[1:]}  # all but d_model
MAIN = ("n_latents", "k", "activation", "tokens", "batch_size", "lr", "seed", "device", "model", "layer",
        "site", "dataset")  # shown first
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]
Device = Annotated[str, Option(help=FIELDS["device"].metadata["doc"] + ".")]
Preset = Annotated[str, Option(help="Where defaults come from: " + ", ".join(bt.PRESETS) + ".")]
Run = Annotated[Path, Argument(help="Folder that `train` wrote, e.g. runs/tiny.", show_default=False)]

def config_options(command, lists=()):
    """Replace a command's **options by an option per field of RunConfig; those in `lists` arrive as text."""
    parameters, types = list(signature(command).parameters.values())[:-1], get_type_hints(bt.RunConfig)
    for name in dict.fromkeys((*MAIN, *FIELDS)):
        if name == "seed" and lists:  # compare counts them
            continue
        field, kind, flag, extra = FIELDS[name], types[name], "--" + name.replace("_", "-"), {}
        doc, choices = field.metadata["doc"], bt.choices(field)
        if not all(choice in doc for choice in choices):
            doc += f" ({', '.join(choices)})"
        default = "the preset's" if name == "n_latents" else field.default
        shown = f" [default: {default}]" if default != "" else ""
        if kind is bool:  # what is on by default can only be turned off
            flag, doc, shown = f"--no-{flag[2:]}", f"do not {doc}", ""
            extra = {"callback": lambda given: False if given else None}
        if name in lists:
            kind, extra = str, {"metavar": f"<{kind.__name__}>,…"}
        option = Option(flag, help=escape(f"{doc}.{shown}"),
                        rich_help_panel=None if name in MAIN else "Advanced", **extra)
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None,
                                    annotation=Annotated[kind | None, option]))
    command.__signature__ = Signature(parameters)
    return command

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

    def invoke(self, context):
        quieten_libraries()
        try:
            super().invoke(context)
        except (bt.InputError, bt.Unavailable, OSError) as error:
            why = isinstance(error, bt.Unavailable) and error.__cause__
            parts = [f"{error} ({reason(why)})" if why else str(error), *getattr(error, "__notes__", ())]
            who = f"process {RANK}: " if RANK else ""
            time.sleep(3 if RANK else 0)  # the first says it for all, and torchrun ends the others
            err.quiet = False
            err.out(" ".join(f"{who}error: {'; '.join(parts)}".split()))
            raise typer.Exit(2 if isinstance(error, bt.InputError) else 1) from None

app = typer.Typer(cls=Commands, help="BatchTopK sparse autoencoders: train, evaluate, export, compare.",
                  no_args_is_help=True, pretty_exceptions_show_locals=False, add_completion=False)

# ---- train, eval, export ----

@app.command(epilog="Example: python cli.py train --k 16 --n-latents 8192 --name wide")
@config_options
def train(
    preset: Preset = "tiny",
    recipe: Annotated[str, Option(help="How to train: " + ", ".join(bt.RECIPES) + ".")] = "ours",
    name: Annotated[str | None, Option(help="Name of the run's folder; by default the preset's.")] = None,
    out_folder: Annotated[Path, Option("--out", help="Folder of all runs.")] = Path("runs"),
    resume: Annotated[Path | None, Option(help="Interrupted run to continue.")] = None,
    as_json: Json = False,
    expansion: Annotated[float | None, Option(help="Latents, as a multiple of D.")] = None,
    **options,
):
    """Train an SAE on a language model's activations, calibrate θ, evaluate on held-out text."""
    given = {field: value for field, value in options.items() if value is not None}
    if resume and (given or name or expansion is not None):
        raise bt.InputError("--resume continues a run as it was configured; leave out other options")
    if name is not None and (name in ("", "..") or Path(name).name != name):
        raise bt.InputError(f"name is {name!r}; give the name of one folder (--out says where it is)")
    if expansion is not None and "n_latents" in given:
        raise bt.InputError("--expansion and --n-latents set the same; give one of them")
    cfg = bt.RunConfig.load(resume) if resume else bt.RunConfig.preset(preset, recipe, d_model=1, **given)
    bt.processes.join(cfg.device)
    several, folder = bt.processes.size > 1, resume or out_folder / (name or preset)
    if not (resume or name or several):  # several would choose different ones
        folder = free_folder(out_folder, preset)
    start = f"torchrun --nproc-per-node {bt.processes.size}" if several else "python"
    again = f"{start} cli.py train --resume {folder}"
    [result] = train_with_bar({"": cfg}, folder, again, bool(resume), expansion)
    show_metrics(result, as_json)
    if several:
        torch.distributed.destroy_process_group()
    if not as_json:
        tell(f"\nSaved in {folder}. Next: python cli.py export {folder}")

def train_with_bar(configs, folder, again, resume, expansion=None):
    """Load the language model and train SAEs on it, unless that is done; the command `again` continues it.

    Ctrl-C or SIGTERM ends it after a step, so that the saved state is whole; a second one at once.
    """
    runs = [folder / name for name in configs]
    done = all((run / "evaluation.json").is_file() for run in runs)
    if resume and done and not bt.saved_states(folder):
        return [read_evaluation(run) for run in runs]
    if RANK == 0:
        bt.check_run_folder(folder, resume)
    [cfg, *_], stopped = configs.values(), 0
    progress = Progress("{task.percentage:.0f}%", BarColumn(10), TimeRemainingColumn(), "{task.description}",
                        console=err, transient=True, disable=not err.is_terminal)
    progress.add_task("loading the model and text", total=None)
    [task] = progress.tasks

    def stop(number, frame):
        nonlocal stopped
        twice, stopped = stopped and bt.processes.size == 1, number  # torchrun sends two
        if twice or task.total is None or task.finished:
            raise SystemExit
        if RANK == 0:
            os.write(2, b"stopping after this step\n")  # a print in the middle of another would repeat it

    def on_step(tokens, stats):
        begins = task.total is None
        now = bt.StepStats(*map(mean, zip(*stats)))
        shown = f"{task.speed or 0:,.0f} tokens/s  fvu {now.fvu:.3f}  L0 {now.l0:.1f}  dead {now.dead:,.0f}"
        progress.update(task.id, total=cfg.tokens, completed=tokens, description=shown)
        if begins:
            what = f"{len(configs)} SAEs" if len(configs) > 1 else f"{cfg.n_latents} latents, k = {cfg.k:g}"
            site = cfg.module or f"{cfg.site} of block {cfg.layer}"
            tell(f"{what}, on {site} of {cfg.model}; {cfg.tokens:,} tokens on {lm.device}", err)
        return bool(stopped)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with progress:
            lm = bt.LanguageModel.from_config(cfg)
            sizes = {} if expansion is None else {"n_latents": round(expansion * lm.d_model)}
            configs = {name: replace(c, d_model=lm.d_model, **sizes) for name, c in configs.items()}
            [cfg, *_] = configs.values()
            return bt.train_runs(configs, lm, folder, resume, on_step)
    except (KeyboardInterrupt, SystemExit):
        said = "saved" if bt.saved_states(folder) else "stopped"
        err.out(f"{said}; continue with: {again}" if any(folder.glob("**/config.json")) else said)
        raise typer.Exit(128 + stopped) from None
    except Exception as error:
        if any(n == bt.processes.size for n, _ in bt.saved_states(folder)):
            error.add_note(f"the run is saved; continue with: {again}")
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing came of it

def read_evaluation(run):
    """What train_runs found of a run."""
    path = run / "evaluation.json"
    with bt.explained(f"{str(path)!r} is damaged; `eval` measures the run again"):
        result = json.loads(path.read_text())
        sum(result[name] for name in ("tokens", "k", "theta_value", "eval_tokens", "dead", "step_seconds"))
        sum(result[selection][name] or 0 for selection in ("batch", "theta") for name in MEANINGS)
        l0_quantiles(result["theta"]["l0_histogram"])
        return result  # all is there, and numbers

def free_folder(parent, name):
    """Make parent/name, or the first of parent/name-2, name-3 … that does not exist."""
    for i in itertools.count(1):
        folder = parent / (f"{name}-{i}" if i > 1 else name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder

@app.command("eval", epilog="Example: python cli.py eval runs/tiny --json")
def evaluate(run: Run, device: Device = bt.Config.device, as_json: Json = False):
    """Evaluate a run on held-out text: batch selection and θ side by side."""
    with err.status("evaluating"):
        result = bt.evaluate_run(*load(run, device), run)
    show_metrics(result, as_json)

def load(run, device):
    """The SAE of a run and the language model it reads, on a device."""
    device = str(bt.resolve_device(device))
    sae = bt.SAE.load(run, device=device)
    sae.get_theta()  # an unset one fails before the model is loaded
    sae.config = bt.RunConfig(**vars(sae.config))  # an SAE saved from Python names no model
    return sae, bt.LanguageModel.from_config(replace(sae.config, device=device))

MEANINGS = {
    "fvu": "fraction of variance unexplained", "nmse": "the same with each token standardised (the paper's)",
    "mse": "mean squared distance to the reconstruction", "l0": "mean active latents per token",
    "frac_alive": "share of latents that fired", "ce_clean": "cross-entropy of the model, nats per token",
    "ce_sae": "… reconstruction spliced in", "ce_zero": "… zeros instead",
    "ce_mean": "… the mean activation instead", "ce_degradation": "ce_sae - ce_clean",
    "ce_recovered": "1 is the untouched model, 0 is zeros", "kl": "from the untouched model",
}

def show_metrics(result, as_json):
    """An evaluation as a table, or as JSON."""
    if as_json:
        return out.out(json.dumps(result))
    tell("{run}: {tokens:,} tokens of training, {eval_tokens:,} held out".format(**result))
    table = Table("metric", "batch", f"θ = {result['theta_value']:.4g}", "meaning")
    for name, meaning in MEANINGS.items():
        both = (result[selection][name] for selection in ("batch", "theta"))
        table.add_row(name, *("no number" if x is None else f"{x:9.4f}" for x in both), meaning)
    out.print(table)
    low, middle, high = l0_quantiles(result["theta"]["l0_histogram"])
    tell(f"Active latents per token with θ: 5 % have at most {low}, half at most {middle}, 5 % over {high}.")

def l0_quantiles(histogram):
    """The counts that 5, 50 and 95 % of the tokens do not exceed; histogram[c] tokens have count c."""
    below = list(itertools.accumulate(histogram))
    return [next(c for c, n in enumerate(below) if n >= share * below[-1]) for share in (0.05, 0.5, 0.95)]

@app.command(epilog="Example: python cli.py export runs/tiny --format saelens --out my-sae")
def export(
    run: Run,
    out_path: Annotated[Path | None, Option("--out", help="Default: in RUN, named by the format.")] = None,
    format: Annotated[str, Option(help=", ".join(bt.FORMATS) + ".")] = "torchscript",
    dtype: Annotated[str, Option(help="float32, or float16 for half the size.")] = "float32",
    force: Annotated[bool, Option("--force", help="Replace what an earlier export wrote.")] = False,
    as_json: Json = False,
):
    """Write the encoder for other programs: TorchScript, SAELens or dictionary_learning."""
    sae, path = bt.SAE.load(run), out_path or run / ("encoder.pt" if format == "torchscript" else format)
    with err.status("comparing with the SAE"):
        x = held_out_activations(bt.RunConfig.load(run))
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

def held_out_activations(cfg: bt.RunConfig) -> torch.Tensor | None:
    """Activations [n, D] of held-out text, or None if the run's model or text is not at hand."""
    with contextlib.suppress(bt.Unavailable, bt.InputError):
        lm = bt.LanguageModel.from_config(cfg)
        if lm.d_model == cfg.d_model:
            contexts = bt.held_out_contexts(cfg, lm.tokenizer)[1]
            few = contexts[:: max(1, len(contexts) // 64)]
            return bt.shuffled_activations(lm, few, cfg.model_batch)

# ---- latents ----

@app.command(epilog="Example: python cli.py latents runs/tiny 17 412 --html latents.html")
def latents(
    run: Run,
    numbers: Annotated[list[int] | None, Argument(
        metavar="[LATENT …]", help="Their numbers; by default a choice from dense to rare.")] = None,
    top: Annotated[int, Option(help="How many contexts to show of each.", min=1)] = 10,
    count: Annotated[int, Option(help="How many latents to choose.", min=1)] = 12,
    html: Annotated[Path | None, Option(help="Write a self-contained page with search.")] = None,
    device: Device = bt.Config.device,
    as_json: Json = False,
):
    """Show what single latents respond to and what they write, on held-out text."""
    with err.status("reading held-out text"):
        sae, lm = load(run, device)
        contexts = bt.held_out_contexts(sae.config, lm.tokenizer)[1]
        described = describe_latents(sae, lm, contexts, numbers, count, top)
    n_tokens = int(lm.is_kept(contexts).sum())
    about = f"{len(described)} of {len(sae.b_enc)} latents of {run} on {n_tokens:,} held-out tokens."
    if html:
        html.write_text(latents_page(about, described), encoding="utf-8")
    if as_json:
        print(json.dumps({"run": str(run), "tokens": n_tokens, "latents": described}))
    elif html:
        tell(f"Wrote {html} ({html.stat().st_size / 1e3:.0f} kB): {about}")
    else:
        tell(about)
        for latent in described:
            show_latent(latent)

@torch.no_grad()
def describe_latents(sae, lm, contexts, latents=None, count=12, top=10):
    """What single latents respond to and what they write, on contexts [n, T] of token ids; JSON-ready.

    Without `latents`, `count` of those that fired on `top` tokens or more, from the densest to the rarest.
    "top" are contexts in which a latent is most active, "lower" others, around quartiles of its activations.
    """
    F, T = len(sae.b_enc), contexts.shape[1]
    if wrong := [j for j in latents or () if not 0 <= j < F]:
        raise bt.InputError(f"latent {wrong[0]} does not exist; give numbers from 0 to {F - 1}")
    x = torch.cat([lm.kept_activations(ids) for ids in contexts.split(sae.config.model_batch)])
    (row, latent), value = (t.cpu() for t in sae.encode_sparse(x.to(sae.W_dec.device), "theta"))
    position = lm.is_kept(contexts).flatten().nonzero()[:, 0].cpu()[row]
    fired = latent.bincount(minlength=F)
    if latents is None:
        ranked = fired.argsort(descending=True, stable=True)[: int((fired >= top).sum())]
        steps = torch.linspace(0, len(ranked) - 1, min(count, len(ranked)))
        latents = ranked[steps.round().long()].tolist()

    def context(i):
        n, t = divmod(i, T)
        first = max(0, min(t - 15, T - 24))
        ids, values = (both[n, first : first + 24].tolist() for both in (contexts, f))
        return {"tokens": [lm.tokenizer.decode([token]) for token in ids], "peak": t - first,
                "activations": [round(v, 4) for v in values], "value": float(f[n, t])}

    described = []
    for j in latents:
        f = torch.zeros(contexts.shape)  # of this latent on every token
        f.view(-1)[position[latent == j]] = value[latent == j].float()
        peaks, places = f.max(1)
        most = peaks.argsort(descending=True)[: min(top, int((peaks > 0).sum()))]
        rest = f.index_fill(0, most, 0).flatten()
        ranked = rest.argsort(descending=True)[: int((rest > 0).sum())].tolist()
        lower = dict.fromkeys(i for quarter in (1, 2, 3) for i in ranked[quarter * len(ranked) // 4 :][:2])
        cosines = torch.cosine_similarity(sae.W_dec.float(), sae.W_dec[j].float()[None])
        nearest = [i for i in cosines.argsort(descending=True).tolist() if i != j][:5]
        described.append({
            "latent": j, "density": int(fired[j]) / len(x), "max": float(peaks.max()),
            "mean": float(f.sum()) / max(1, int(fired[j])),
            "top": [context(i) for i in (most * T + places[most]).tolist()],
            "lower": [context(i) for i in lower], **logit_effects(sae, lm, j),
            "neighbours": [[i, round(float(cosines[i]), 4)] for i in nearest]})
    return described

def logit_effects(sae, lm, latent):
    """The largest direct effects on logits, without the final norm."""
    W_U = lm.model.get_output_embeddings().weight
    if sae.config.module or W_U.shape[1] != sae.W_dec.shape[1]:
        return {"promotes": [], "suppresses": []}
    logits = (W_U.float() @ sae.W_dec[latent].to(lm.device).float()).cpu()
    logits -= logits.mean()
    order = logits.argsort()
    return {name: [[lm.tokenizer.decode([i]), round(float(logits[i]), 4)] for i in tokens.tolist()]
            for name, tokens in (("promotes", order.flip(0)[:8]), ("suppresses", order[:8]))}

def short(token):
    """A token in one line, without control characters; long runs of blanks are counted."""
    marks = {"\n": "↵", "\t": "→"}
    visible = "".join(marks.get(c, c if c.isprintable() else "·") for c in token)
    return re.sub(" {3,}", lambda run: f"␣×{len(run[0])}", visible)

def show_latent(latent):
    """One latent in the terminal."""
    tell("\nlatent {latent}  density {density:.3%}, max {max:.3g}, mean {mean:.3g}".format(**latent))
    pairs = {name: [f"{short(token)} {effect:+.2f}" for token, effect in latent[name]]
             for name in ("promotes", "suppresses")}
    pairs["neighbours"] = [f"{j} ({cosine:.2f})" for j, cosine in latent["neighbours"]]
    lines = [Text(f"{name:<11}" + "  ".join(parts)) for name, parts in pairs.items() if parts]
    for title, contexts in (("most active", latent["top"]), ("less active", latent["lower"])):
        lines += [Text(title, style="dim")] if contexts else []
        lines += [context_line(context, latent["max"]) for context in contexts]
    out.print(Text("\n").join(lines), no_wrap=True, overflow="ellipsis")

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

def latents_page(about, described):
    """One page that needs nothing else: a script in it shows the JSON beside it."""
    data = json.dumps({"about": about, "latents": described}).replace("<", r"\u003c")
    page = (Path(__file__).parent / "tests/assets/latents.html").read_text(encoding="utf-8")
    return page.replace("DATA", data)

# ---- compare ----

STUDIES = {  # what --study varies, unless an option says otherwise
    "methods": {}, "k": {"k": "16,32,64"}, "latents": {"n_latents": "1024,2048,4096,8192"},
    "batch": {"activation": "batchtopk", "batch_size": "64,256,1024,4096,8192"},
    "lr": {"activation": "batchtopk", "lr": "0.0003,0.001,0.002,0.003,0.005,0.01"},
    "recipe": {"activation": "batchtopk", "recipe": "ours,paper"},
    "training": {"activation": "batchtopk", "change": "none,lr=0.0015,lr=0.006,batch_size=256,batch_size=1024"
                 ",beta1=0.9,beta1=0,beta2=0.99,warmup=0.1,decay=0,decay=0.6,init=authors,normalize=token"
                 ",aux_coef=0,dead_tokens=100000"},
}

@app.command(epilog="Example: python cli.py compare --activation batchtopk,topk --k 16,32,64 --seeds 1")
@functools.partial(config_options, lists=bt.OWN)
def compare(
    preset: Preset = "tiny",
    study: Annotated[str, Option(help="What to vary: " + ", ".join(STUDIES) + ".")] = "methods",
    recipe: Annotated[str | None, Option(help=f"By commas: {', '.join(bt.RECIPES)}.")] = None,
    change: Annotated[str | None, Option(help="FIELD=VALUE by commas, each tried alone.")] = None,
    seeds: Annotated[int, Option(help="How many seeds of each, from 0.", min=1)] = 3,
    out_folder: Annotated[Path, Option("--out", help="Where it is saved.")] = Path("runs/compare"),
    as_json: Json = False,
    **options,
):
    """Train several SAEs on the same activations and compare them on held-out text.

    Options marked ,… take several values. The same command continues what was interrupted.
    """
    bt.check_choice("study", study, STUDIES)
    options |= {"recipe": recipe, "change": change}
    given = {name: value for name, value in options.items() if value is not None}
    lists = {"activation": "batchtopk,topk,jumprelu", **STUDIES[study]}
    lists |= {name: given.pop(name) for name in (*bt.OWN, "recipe", "change") if name in given}
    values = {name: list(dict.fromkeys(map(str.strip, text.split(",")))) for name, text in lists.items()}
    names = [name for name in values if name == "activation" or len(values[name]) > 1]
    values["seed"] = list(map(str, range(seeds)))
    settings = [dict(zip(values, setting)) for setting in itertools.product(*values.values())]
    configs, groups = {}, {}
    for setting in settings:
        varied = [f"{name}={setting[name]}" for name in (*names[1:], "seed")]
        configs["-".join([setting["activation"], *varied])] = setting_config(preset, setting, given)
    results = comparison_results(configs, out_folder)
    for setting, result in zip(settings, results):
        groups.setdefault(tuple(setting[name] for name in names), []).append(result)
    figure = out_folder / "comparison.png"
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
        bt.check_choice("field to change", name, bt.OWN)
    for name, text in texts.items():
        values[name] = text
        with contextlib.suppress(ValueError):
            values[name] = float(text)
    return bt.RunConfig.preset(preset, recipe, d_model=1, **values)

def comparison_results(configs, folder):
    """Train and evaluate all configurations, continue that, or read what was found."""
    bt.check_shared(configs)
    begun = {path.parent.name: bt.RunConfig.load(path.parent) for path in folder.glob("*/config.json")}
    if any(replace(cfg, d_model=1) != configs.get(name) for name, cfg in begun.items()):
        raise bt.InputError(f"{str(folder)!r} was begun with other configurations; choose another folder")
    results = train_with_bar(configs, folder, "the same command", bool(begun))
    return [{"name": name, **result, "config": vars(bt.RunConfig.load(folder / name))}
            for name, result in zip(configs, results)]

def mean_and_spread(group, metric, selection="theta"):
    """Mean and standard deviation of a metric over seeds; 0 for one."""
    values = [result[selection][metric] for result in group]
    return mean(values), stdev(values) if len(values) > 1 else 0.0

COLUMNS = (("theta", "fvu", "{:.4f} ±{:.4f}"), ("batch", "fvu", "{:.4f}"), ("theta", "l0", "{:.2f}"),
           ("theta", "ce_degradation", "{:.3f} ±{:.3f}"), ("batch", "ce_degradation", "{:.3f}"))

def show_comparison(names, groups):
    """A row for each setting: mean ± standard deviation over the results of its seeds."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in (*names, "fvu, θ", "batch", "L0", "ce, θ", "batch", "dead", "s"):
        table.add_column(name, justify="left" if name in names else "right", no_wrap=True)
    for key, group in groups.items():
        cells = list(key)
        for selection, metric, form in COLUMNS:
            form = form if len(group) > 1 else form.split(" ±")[0]
            cells.append(form.format(*mean_and_spread(group, metric, selection)))
        dead, seconds = (mean(result[name] for result in group) for name in ("dead", "step_seconds"))
        table.add_row(*cells, f"{dead:.1%}", f"{seconds:.0f}")
    out.print(table, width=max(out.width, 120), crop=False)
    [first, *more] = next(iter(groups.values()))
    seeds = f"Mean ± standard deviation over {len(more) + 1} seeds" if more else "One seed"
    tell("{}; {tokens:,} tokens of training, {eval_tokens:,} held out. L0: with θ; ce: loss added, nats per "
         "token; dead: at the end; s: seconds in the SAE's own steps.".format(seeds, **first))

STYLES = {"batchtopk": ("#08519c", "o", "-", "BatchTopK"), "topk": ("#e08214", "s", "--", "TopK"),
          "jumprelu": ("#737373", "^", ":", "JumpReLU")}

def draw_comparison(names, groups, path):
    """Error against each number that was varied, and active latents per token."""
    from matplotlib.figure import Figure
    varied = [name for name in ("k", "n_latents", "batch_size", "lr") if name in names]
    panels = list(itertools.product(varied, ("fvu", "ce_degradation")))
    figure = Figure(figsize=(5 * len(panels) + 6, 4), layout="constrained")
    *errors, last = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for panel, axes in zip(panels, errors):
        draw_error(axes, names, groups, *panel)
    draw_active_latents(last, names, groups)
    for axes in figure.axes:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)

def draw_error(axes, names, groups, against, metric):
    """A metric against a field of RunConfig, a line for each combination of the others."""
    lines = {}
    for key, group in groups.items():
        rest = dict(zip(names, key))
        point = (float(rest.pop(against)), *mean_and_spread(group, metric))
        lines.setdefault(tuple(rest.values()), []).append(point)
    for (method, *others), points in lines.items():
        color, marker, line, title = STYLES[method]
        x, y, spread = zip(*sorted(points))
        axes.errorbar(x, y, yerr=spread, color=color, marker=marker, linestyle=line, markerfacecolor="none",
                      capsize=3, label=" ".join([title, *others]))
    ticks = sorted({float(key[names.index(against)]) for key in groups})
    axes.set(xscale="log", xlabel=FIELDS[against].metadata["doc"].partition(";")[0], ylabel=MEANINGS[metric])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()

def draw_active_latents(axes, names, groups):
    """Active latents per token, for each method at the k nearest to the default."""
    nearest_last = sorted(groups.items(), key=lambda item: -abs(item[1][0]["k"] - bt.Config.k))
    for method, result in {key[0]: group[0] for key, group in nearest_last}.items():
        color, _, line, title = STYLES[method]
        histogram = result["theta"]["l0_histogram"]
        low, _, high = l0_quantiles(histogram)
        style = {"color": color, "linestyle": line, "label": f"{title}: 90 % have {low} to {high}"}
        if low == high:  # a spike that would flatten the others
            axes.axvline(low, **style)
        else:
            axes.plot([100 * tokens / sum(histogram) for tokens in histogram], **style)
    axes.set(ylim=(0, None), xlabel="active latents on a token", ylabel="% of held-out tokens")

if __name__ == "__main__":
    app()
