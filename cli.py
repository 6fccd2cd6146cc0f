"""Command line of batchtopk: it talks to people, batchtopk.py does the work.

    python cli.py train                      # a BatchTopK SAE on the embedded GPT-2, in about a minute
    python cli.py eval runs/tiny             # its metrics on held-out text
    python cli.py export runs/tiny           # a TorchScript encoder that depends on no batch

Results go to stdout, progress to stderr; --json prints one JSON object on stdout and nothing else there. A mistake ends
in one line and exit code 2 (usage) or 1 (anything else).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Callable, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import batchtopk as bt

app = typer.Typer(help="BatchTopK sparse autoencoders: train, evaluate, export.", no_args_is_help=True,
                  pretty_exceptions_show_locals=False, add_completion=False)
out, err = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Device = Annotated[str, typer.Option(help=bt.Config.__dataclass_fields__["device"].metadata["doc"] + ".")]
Run = Annotated[Path, typer.Argument(help="Folder of a run that `train` wrote, e.g. runs/tiny.", show_default=False)]


def one_line_errors(command: Callable) -> Callable:
    """Show a person's mistake as one line on stderr, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        quieten_libraries()
        try:
            command(*args, **kwargs)
        except (bt.InputError, bt.Unavailable, OSError) as error:
            text = f"error: {error}" + (f" ({why})" if (why := reason(error.__cause__)) else "")
            say(" ".join(text.split()), style="red")
            raise typer.Exit(2 if isinstance(error, bt.InputError) else 1) from None

    return wrapped


def quieten_libraries() -> None:
    """No banners, bars or advice from the libraries on the way to a result."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:  # it reads the environment when it is imported
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    for name in ("transformers", "datasets", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(text: str, style: str | None = None) -> None:
    """One line on stderr, as it is."""
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def config_options(command: Callable) -> Callable:
    """Give `command` an option for every field of Config, in place of its **options; those not typed stay None."""
    own = inspect.signature(command, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    types = {"int": int, "float": float, "str": str, "bool": bool}
    derived = {"d_model": "read off the model", "n_latents": "the preset's"}
    panels = {"d_model": "Dictionary", "tokens": "Training", "model": "Activations", "theta_rate": "θ and evaluation"}
    panel = ""
    for field in dataclasses.fields(bt.Config):
        rules, flag, panel = field.metadata, "--" + field.name.replace("_", "-"), panels.get(field.name, panel)
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if field.type == "bool" else flag, help=rules["doc"] + ".", rich_help_panel=panel,
            show_default=derived.get(field.name) or str(field.default) or "none",
            metavar="[" + "|".join(rules["choices"]) + "]" if "choices" in rules else None,
            min=rules.get("min"), max=rules.get("max"))
        annotation = Annotated[Optional[types[field.type]], option]
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
    preset: Annotated[str, typer.Option(help="Where defaults come from: " + ", ".join(bt.PRESETS) + ".")] = "tiny",
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
        cfg = bt.Config.preset(preset, **{"d_model": 1, **given})  # checked before the model is loaded
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
            result = bt.train_run(cfg, lm, folder, resume=resume is not None, on_step=bar.update)
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
    sae.checked_theta()
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
    """What a run shows on stderr: that it loads, then a bar; nothing is left of the first if it fails there.

    Ctrl-C asks for a stop between two steps, so that what is saved is consistent; a second one stops at once.
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
        if self.interrupted or self.task is None:  # asked twice, or nothing to save yet
            raise SystemExit(130)
        self.interrupted = True

    def update(self, trainer: bt.Trainer, stats: bt.StepStats) -> None:
        cfg = trainer.cfg
        if self.task is None:
            self.stop()
            self.task = self.progress.add_task("", total=cfg.tokens, rate="…", fvu="…", l0="…", dead="…")
            site = cfg.module or f"{cfg.site} of block {cfg.layer}"
            say(f"{cfg.n_latents} latents on {site} of {cfg.model}, {cfg.d_model} wide; {cfg.tokens:,} tokens, k = {cfg.k:g}, "
                f"on {trainer.device}")
            self.shown = self.progress
            self.shown.start()
        speed = self.progress.tasks[0].speed
        self.progress.update(self.task, completed=trainer.tokens_seen, rate=f"{speed:,.0f}" if speed else "…",
                             fvu=f"{stats.fvu:.3f}", l0=f"{stats.l0:.1f}", dead=f"{stats.dead / cfg.n_latents:.1%}")
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
    total, seen, quantiles = sum(histogram), 0, []
    wanted = [0.05, 0.5, 0.95]
    for count, tokens in enumerate(histogram):
        seen += tokens
        while len(quantiles) < 3 and seen >= wanted[len(quantiles)] * total:
            quantiles.append(count)
    low, middle, high = quantiles
    return (f"Active latents per token with θ: 5 % of tokens have {low} or fewer, half {middle} or fewer, 5 % {high} or "
            f"more, the most {len(histogram) - 1}; k = {k:g} is the mean aimed at.")


if __name__ == "__main__":
    app()
