"""How fast a training step is on this machine, and why: beside the encoder product alone and the plain step.

    python tests/bench.py                                              # GPT-2 Small's shape, about 5 minutes
    python tests/bench.py --shapes                                     # four shapes in one table, for a GPU
    python tests/bench.py --n-latents 6144 --batch-size 1024 --figure step.png
    python tests/bench.py --export                                     # an exported encoder instead
    python tests/bench.py --export runs/tiny/encoder.pt
    torchrun --nproc-per-node 2 tests/bench.py --shared                # one step of two processes

All is measured in turn, on synthetic activations. Results go to stdout, progress to stderr.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.optim.adam import adam
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import batchtopk as bt  # noqa: E402

PRODUCT, STEP, PLAIN = "encoder product, float32", "step, float32", "plain step, float32"
DENSE, TOPK, DEAD = "dense step, bfloat16", "TopK step, float32", "step, 5 % dead"

def measure(cfg, repeat):
    """Seconds as [lower quartile, median, upper quartile], bytes, and ratios of medians.

    The floor is the encoder product and, at the bandwidth of a large copy, 48·F·D bytes (both weights and
    their moments, read and written) and 16·N·D (a row for each kept entry in decoding and three gradients).
    """
    device, n = bt.resolve_device(cfg.device), cfg.n_kept(cfg.batch_size)
    batches = synthetic_batches(cfg, device)
    kinds = {STEP: {}, TOPK: dict(activation="topk"), DEAD: {}, PLAIN: dict(step="plain")}
    if cfg.k % 1:
        del kinds[TOPK]
    if bt.choose_dtype("auto", device) == torch.bfloat16:
        kinds["step, bfloat16"] = dict(encoder_dtype="bfloat16")
    trainers = {name: bt.Trainer(dataclasses.replace(cfg, **changes)) for name, changes in kinds.items()}
    dying, endless = trainers[DEAD].sae, itertools.cycle(batches)
    dying.tokens_since_fired[::20] = cfg.dead_tokens
    dying.b_enc.data[::20] = -100.0  # so that they do not fire again
    runs = {name: lambda t=trainer: t.step(next(endless)) for name, trainer in trainers.items()}
    if device.type == "cuda":
        runs[DENSE] = dense_step(bt.SAE(cfg).to(device), endless)
    memory = {}
    for name, run in runs.items():
        say(f"memory of {name}")
        run()  # so that there is a hint
        memory[name] = peak_memory(run, device)
    z, W_enc = torch.empty(cfg.batch_size, cfg.n_latents, device=device), trainers[STEP].sae.W_enc.detach()
    runs[PRODUCT] = lambda: torch.mm(batches[0], W_enc.T, out=z)
    copies = [torch.ones(1 << 26, device=device) for _ in range(2)]
    runs["copy"] = lambda: copies[0].copy_(copies[1])
    if "step, bfloat16" in kinds:
        half, factors = z.bfloat16(), (batches[0].bfloat16(), W_enc.bfloat16().T)
        runs["encoder product, bfloat16"] = lambda: torch.mm(*factors, out=half)
    pairs = phases(trainers[STEP], batches[0], z)
    for name, pair in pairs.items():
        runs |= {(side, name): run for side, run in zip(("dense", "sparse"), pair) if run}
    samples = {name: [] for name in runs}
    for i, (name, run) in itertools.product(range(repeat), runs.items()):
        say(f"{name if isinstance(name, str) else ' '.join(name)}, {i + 1} of {repeat}")
        if name != PLAIN and name[0] != "dense":
            run()  # once before it counts: dense matrices have swept the caches
        samples[name].append(seconds(run, device))
    say("")
    quartiles = {name: statistics.quantiles(t, n=4, method="inclusive") for name, t in samples.items()}
    bandwidth = 2 * copies[0].nbytes / quartiles.pop("copy")[1]
    sides = ("dense", "sparse")
    parts = {name: {side: quartiles.get((side, name), [0, 0])[1] for side in sides} for name in pairs}
    rest = quartiles[STEP][1] - sum(part["sparse"] for part in parts.values())
    parts["weight gradients and update"]["sparse"] = max(rest, 0.0)
    result = {"device": device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads(),
              "d_model": cfg.d_model, "n_latents": cfg.n_latents, "batch_size": cfg.batch_size, "k": cfg.k,
              "seconds": {name: q for name, q in quartiles.items() if isinstance(name, str)}, "phases": parts,
              "peak_bytes": memory, "matrix_bytes": z.nbytes, "copy_bytes_per_second": bandwidth,
              "repeat": repeat}
    for dtype in ("float32", "bfloat16"):
        if f"step, {dtype}" in kinds:
            product, step = (quartiles[f"{name}, {dtype}"][1] for name in ("encoder product", "step"))
            floor = product + (48 * cfg.n_latents + 16 * n) * cfg.d_model / bandwidth
            result[dtype] = {"flops": 2 * z.numel() * cfg.d_model / product, "floor_seconds": floor,
                             "step/product": step / product, "step/floor": step / floor,
                             "plain/step": quartiles[PLAIN][1] / step}
    return result

SHAPES = "768x24576x4096", "2304x16384x4096", "768x131072x4096", "256x4096x512"  # D x F x B

def measure_shape(cfg, repeat):
    """Milliseconds of one step of several kinds, each a mean over `repeat` queued ones, the best of three;
    MiB at the peak beside weights and moments; launches and waits; the device's milliseconds by operation."""
    device = bt.resolve_device(cfg.device)
    half = bt.choose_dtype("auto", device)
    endless = itertools.cycle(synthetic_batches(cfg, device))
    W_enc = bt.SAE(cfg).W_enc.detach().to(device, half)

    def step(n_dead=0, **changes):
        trainer = bt.Trainer(dataclasses.replace(cfg, **changes))
        for _ in range(8):  # so that there is a hint, and kernels are compiled
            trainer.step(next(endless))
        trainer.sae.b_enc.data[:n_dead] = -100.0  # so that they do not fire again
        trainer.sae.tokens_since_fired[:n_dead] = cfg.dead_tokens
        return lambda: trainer.step(next(endless))

    x, one_percent = next(endless).to(half), max(1, cfg.n_latents // 100)
    runs = {"step": lambda: step(encoder_dtype="auto"), "step, float32": step,
            "step, 1 % dead": lambda: step(one_percent, encoder_dtype="auto"),
            "step, TopK first": lambda: step(encoder_dtype="auto", topk_start=1.0),
            "step of TopK": lambda: step(encoder_dtype="auto", activation="topk"),
            "step of JumpReLU": lambda: step(encoder_dtype="auto", activation="jumprelu",
                                             tokens=20 * cfg.batch_size),  # its own thresholds after 6 steps
            "plain step, float32": lambda: step(step="plain"),
            "dense step, autocast": lambda: dense_step(bt.SAE(cfg).to(device), endless),
            "dense step, compiled": lambda: dense_step(bt.SAE(cfg).to(device), endless, torch.compile),
            "encoder product": lambda: lambda: x @ W_enc.T}
    if device.type == "cpu":
        del runs["dense step, compiled"]
    result = {"shape": f"{cfg.d_model}x{cfg.n_latents}x{cfg.batch_size}", "k": cfg.k, "ms": {}, "mib": {}}
    for name, make in runs.items():
        say(f"{result['shape']}: {name}")
        run = None  # what was before is freed
        run = make()
        for _ in range(3):
            run()
        times = [seconds(lambda: [run() for _ in range(repeat)], device) / repeat for _ in range(3)]
        result["ms"][name], result["mib"][name] = 1e3 * min(times), peak_memory(run, device) / 2**20
        if name == "step":
            result |= profiled(run, device)
    say("")
    return result

def profiled(run, device, steps=3):
    """Of a step: launches and waits, on a GPU, and milliseconds by operation, the 15 that take the most."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        seconds(lambda: [run() for _ in range(steps)], device)  # waits twice itself
    found = profiler.key_averages()
    time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found.sort(key=lambda event: -getattr(event, time))
    result = {"by_operation": {e.key[:60]: getattr(e, time) / 1e3 / steps for e in found[:15]}}
    if on_gpu:
        launches, waits = (sum(e.count for e in found if re.search(word, e.key))
                           for word in ("[lL]aunchKernel|GraphLaunch", "Synchronize"))
        result |= {"launches": launches / steps, "waits": (waits - 2) / steps}
    return result

def show_shapes(results, device):
    """One table with a column for each shape, then what each operation of a step takes."""
    print(f"{device_name(device)}, torch {torch.__version__}\n\n{'D x F x B':<24}"
          + "".join(f"{r['shape']:>18}" for r in results))
    for name in dict.fromkeys(name for r in results for name in r["ms"]):
        print(f"{name:<24}" + "".join(f"{r['ms'][name]:>10.2f} ms{r['mib'][name]:>5.0f}" for r in results))
    for name in ("launches", "waits"):
        if name in results[0]:
            print(f"{name:<24}" + "".join(f"{r[name]:>18.1f}" for r in results))
    print("\nThe second number of each: MiB at the peak beside weights and moments.")
    for r in results:
        print(f"\n{r['shape']}, ms by operation:")
        for name, t in r["by_operation"].items():
            print(f"{t:>9.3f}  {name}")

def synthetic_batches(cfg, device):
    """Three batches in which each token is a sum of about 40 of 4096 directions."""
    generator, batches = torch.Generator().manual_seed(0), []
    directions = torch.nn.functional.normalize(torch.randn(4096, cfg.d_model, generator=generator), dim=1)
    for _ in range(3):
        size, chosen = torch.rand(2, cfg.batch_size, 4096, generator=generator)
        batches.append(((chosen < 40 / 4096) * size @ directions).to(device))
    return batches

def measure_shared(cfg, repeat, group):
    """The step of all of torchrun's processes together: its time, the memory of one, and what is sent."""
    sent, all_reduce = [], torch.distributed.all_reduce
    device = bt.resolve_device(cfg.device)
    batches, trainer = itertools.cycle(synthetic_batches(cfg, device)), bt.Trainer(
        cfg, group.keep_share_(bt.make_sae(cfg)))

    def run():
        trainer.step(next(batches))

    run()
    held = sum(t.nbytes for t in bt.trainer_state(trainer).values())
    peak, times = peak_memory(run, device), [seconds(run, device) for _ in range(repeat)]

    def counted(t):
        sent.append(t.nbytes)
        all_reduce(t)

    torch.distributed.all_reduce = counted
    run()
    if group.rank == 0:
        print(f"D {cfg.d_model}, F {cfg.n_latents}, B {cfg.batch_size}, k {cfg.k:g}; {device_name(device)}\n"
              f"{group.size} processes of {torch.get_num_threads()} threads: "
              f"{statistics.median(times):.3f} s a step (median of {repeat}); "
              f"each holds {held / 2**20:.0f} MiB\n"
              f"and {peak / 2**20:.0f} beside them at the peak of a step")
        for size, count in sorted(collections.Counter(sent).items(), reverse=True):
            print(f"{count:>4} × all_reduce of {size:,} bytes")

@torch.no_grad()
def measure_export(path, cfg, repeat):
    """Medians of an exported encoder's methods, beside its linear layer; without a path of random weights."""
    if not path:
        sae, folder = bt.SAE(cfg), tempfile.TemporaryDirectory()
        path = Path(folder.name, "encoder.pt")
        sae.theta.fill_(1.0)
        bt.export(sae, path)
    device = bt.resolve_device(cfg.device)
    encoder = torch.jit.load(path, map_location=device)
    F, D = encoder.W_enc.shape
    direction = encoder.W_dec[torch.randint(F, (cfg.batch_size, 40), device=device)].sum(1)
    z = direction[:256] @ encoder.W_enc.T  # at the scale below about k exceed θ in each row
    scale = float(encoder.theta.nan_to_num(1.0).mean() / z.flatten().topk(int(len(z) * cfg.k)).values.min())
    lines = [f"D {D}, F {F}; {device_name(device)}, {torch.get_num_threads()} threads\n",
             f"{'rows':>6} {'L0':>6} {'linear, ms':>11} "
             f"{'forward':>9} {'encode_sparse':>14} {'reconstruct':>12}"]
    for rows in (1, cfg.batch_size):
        x = encoder.b_dec + scale * direction[:rows]
        runs = [lambda: torch.nn.functional.linear(x, encoder.W_enc, encoder.b_enc), lambda: encoder(x),
                lambda: encoder.encode_sparse(x), lambda: encoder.reconstruct(x)]
        samples = [[] for _ in runs]
        for i in range(4 + repeat if rows > 1 else 20 * repeat):
            for run, sample in zip(runs, samples):
                sample += [seconds(run, device)][i < 4 :]  # the first few compile
        linear, *others = map(statistics.median, samples)
        ratios = (f"{t / linear:>{width}.2f}" for t, width in zip(others, (9, 14, 12)))
        l0 = len(encoder.encode_sparse(x)[1]) / rows
        lines.append(f"{rows:>6} {l0:>6.1f} {1e3 * linear:>11.4g} {' '.join(ratios)}")
    print("\n".join(lines) + "\n\nmedians, in turn; the three methods as multiples of the linear layer")

def dense_step(sae, batches, compiled=lambda function: function):
    """What a GPU does well: the plain step in bfloat16, with PyTorch's fused Adam (without projection)."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    @compiled
    def loss(x):
        z = torch.nn.functional.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
        f = bt.batch_topk(z, sae.config.n_kept(len(x)))
        return (x - f @ sae.W_dec - sae.b_dec).square().sum(1).mean()

    def run():
        x = next(batches)
        with torch.autocast(sae.W_enc.device.type, torch.bfloat16):  # which the module's own steps ignore
            total = loss(x)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run

@torch.no_grad()
def phases(trainer, x, z):
    """{part of a step: (with dense matrices, as it is here)}; z [B, F] is scratch. The last is the rest."""
    sae, hint, n = trainer.sae, bt.HINT * trainer.last_threshold, trainer.cfg.n_kept(len(x))
    W_enc, b_enc, W_dec = sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach()
    ((row, latent), value), centred, f = sae.encode_sparse(x, "batch"), x - sae.b_dec, sae.encode(x, "batch")
    g, order = torch.randn_like(x), latent.argsort(stable=True)
    starts, moments = bt.group_starts(row, len(x)), [torch.zeros_like(W_dec) for _ in range(2)]

    def dense_update():
        for W, gradient in ((W_enc, f.T @ centred), (W_dec, f.T @ g)):
            if W is W_dec:
                gradient.addcmul_(W, (gradient * W).sum(1, keepdim=True), value=-1)
            adam([W], [gradient], *([m] for m in moments), [], [torch.zeros((), device=x.device)], fused=True,
                 amsgrad=False, beta1=0.9, beta2=0.99, lr=0.0, weight_decay=0.0, eps=1e-8, maximize=False)
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    pairs = {
        "search": (lambda: torch.addmm(b_enc, centred, W_enc.T, out=z).relu_().view(-1).topk(n),
                   lambda: bt.find_entries(sae, centred, hint, n)),
        "decoding": (lambda: f @ W_dec, lambda: bt.sum_rows(W_dec, latent, value, starts)),
        "gradient of kept values": (lambda: g @ W_dec.T,
                                    lambda: bt.dots(W_dec, g, latent[order], row[order])),
        "gradient of b_dec": (lambda: (f @ W_enc).sum(0), lambda: b_enc @ W_enc),
        "weight gradients and update": (dense_update, None),
    }
    return {name: [run and torch.no_grad()(run) for run in pair] for name, pair in pairs.items()}

def seconds(run, device):
    """How long a call takes, on the device too."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started

def peak_memory(run, device):
    """Bytes that PyTorch has allocated at the peak of a call, beside those before it; all of CUDA graphs'."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        graphs = (s["total_size"] for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] != (0, 0))
        return torch.cuda.max_memory_allocated(device) - before + sum(graphs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder, "trace.json")))
        trace = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in trace if e.get("name") == "[memory]")
    return max(itertools.accumulate(amount for _, amount in changes), default=0)

def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

def say(text):
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

def show_measurements(result):
    """What was measured, as two tables and a sentence for each precision. Nothing is ever cut."""
    product = result["seconds"][PRODUCT][1]
    print(f"D {result['d_model']}, F {result['n_latents']}, B {result['batch_size']}, k {result['k']:g}; "
          f"{result['repeat']} measurements in turn\n{result['device']}, {result['threads']} threads, "
          f"torch {result['torch']}\n")
    print(f"{'':<25} {'ms':>7} {'quartiles':>11} {'× product':>9} {'tokens/s':>10} {'MiB':>6} {'of BF':>5}")
    for name, (low, middle, high) in sorted(result["seconds"].items(), key=lambda item: item[1][1]):
        peak = result["peak_bytes"].get(name)
        memory = f"{peak / 2**20:>6.0f} {peak / result['matrix_bytes']:>5.0%}" if peak is not None else ""
        print(f"{name.replace(', float32', ''):<25} {1e3 * middle:>7.{1 if middle < 1 else 0}f} "
              f"{f'{1e3 * low:.0f}-{1e3 * high:.0f}':>11} {middle / product:>9.2f} "
              f"{result['batch_size'] / middle:>10,.0f} {memory}".rstrip())
    print("\nfloat32 unless said. MiB: allocated at the peak beside weights and moments.\n"
          "of BF: of one matrix B × F.\n\nParts of a step, ms:\n")
    print(f"{'':<30} {'dense':>9} {'here':>9} {'ratio':>9}")
    for name, sides in result["phases"].items():
        dense, sparse = sides["dense"], sides["sparse"]
        ratio = f"{dense / sparse:.1f}" if sparse else ""
        print(f"{name:<30} {1e3 * dense:>9.1f} {1e3 * sparse:>9.1f} {ratio:>9}".rstrip())
    for dtype in ("float32", "bfloat16"):
        if r := result.get(dtype):
            print(f"\n{dtype}: a step takes {r['step/product']:.2f} × the encoder product "
                  f"({r['flops'] / 1e9:,.0f} GFLOP/s) and\n{r['step/floor']:.2f} × the floor of product and "
                  f"memory traffic (copies: {result['copy_bytes_per_second'] / 1e9:.1f} GB/s);\n"
                  f"the plain step takes {r['plain/step']:.1f} × as long.")

def draw_savings(result, path):
    """A waterfall from the plain step to ours: what each idea saves."""
    from matplotlib.figure import Figure

    ideas = {"search": "search:\na running\nthreshold", "decoding": "decode kept\nentries only",
             "gradient of kept values": "gradient at\nkept entries\nonly",
             "gradient of b_dec": "b_dec: vector\ntimes matrix",
             "weight gradients and update": "weights: sums\nof rows, update\nin the cache"}
    step, plain, product = (result["seconds"][name][1] for name in (STEP, PLAIN, PRODUCT))
    parts = {ideas[name]: sides for name, sides in result["phases"].items()}
    saved = {label: sides["dense"] - sides["sparse"] for label, sides in parts.items()}
    saved["no B × F\ntensors for\nautograd"] = plain - step - sum(saved.values())
    figure, height = Figure(figsize=(11, 5.5), layout="constrained"), plain
    axes = figure.subplots()
    axes.bar([0, len(saved) + 1], [plain, step], color=["#4c4c4c", "#08519c"])
    for i, amount in enumerate(saved.values(), 1):
        axes.bar(i, amount, bottom=height - amount, color="#7fb2d9")
        top = max(height, height - amount)
        axes.annotate(f"{-amount:.2g}", (i, top), ha="center", va="bottom", fontsize=12)
        height -= amount
    for i, value in ((0, plain), (len(saved) + 1, step)):
        axes.annotate(f"{value:.2g} s", (i, value), ha="center", va="bottom", fontsize=13, fontweight="bold")
    axes.axhline(product, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"encoder product alone: {product:.2g} s", (0.5, product), va="bottom", fontsize=12)
    axes.set_xticks(range(len(saved) + 2), ["plain step\n(autograd)", *saved, "sparse\nstep"], fontsize=11)
    axes.set_ylabel("seconds a step, float32", fontsize=12)
    shape = f"D {result['d_model']}, F {result['n_latents']}, B {result['batch_size']}, k {result['k']:g}"
    title = f"Only the encoder product has to be dense: {plain / step:.0f} × faster\n{shape}"
    axes.set_title(title, loc="left", fontsize=16)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, kind, default, text in [
        ("d-model", int, 768, "D, width of the activations"), ("n-latents", int, 24576, "F, latents"),
        ("batch-size", int, 4096, "B, tokens in a batch"), ("k", float, 32, "active latents per token"),
        ("device", str, "auto", "cpu, cuda …"), ("repeat", int, 5, "how often each is measured, at least 2"),
        ("figure", Path, None, "draw what each idea saves into this PNG"),
    ]:
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--shapes", nargs="*", metavar="DxFxB",
                        help=f"one table for these; without any: {' '.join(SHAPES)}")
    parser.add_argument("--shared", action="store_true", help="time the step of torchrun's processes")
    parser.add_argument("--export", nargs="?", const="", metavar="FILE", help="time an exported encoder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    a = parser.parse_args(arguments)
    try:
        if a.shared:
            group = bt.Processes.join(a.device)  # which gives each process its GPU
        if a.export and not Path(a.export).is_file():
            raise bt.Unavailable(f"there is no file {a.export!r}; give one that `cli.py export` wrote")
        cfg = bt.Config(d_model=a.d_model, n_latents=a.n_latents, batch_size=a.batch_size, k=a.k,
                        device=str(bt.resolve_device(a.device)), encoder_dtype="float32", tokens=10**12,
                        dead_tokens=10**12, topk_start=0)
        if a.repeat < 2:
            raise bt.InputError(f"repeat is {a.repeat}; give 2 or more")
    except (bt.InputError, bt.Unavailable) as error:
        parser.error(str(error))
    if a.shapes is not None:
        shapes = [map(int, shape.split("x")) for shape in a.shapes or SHAPES]
        results = [measure_shape(dataclasses.replace(cfg, d_model=D, n_latents=F, batch_size=B), a.repeat)
                   for D, F, B in shapes]
        return print(json.dumps(results)) if a.json else show_shapes(results, bt.resolve_device(cfg.device))
    if a.export is not None:
        return measure_export(a.export, cfg, a.repeat)
    if a.shared:
        return measure_shared(cfg, a.repeat, group)
    result = measure(cfg, a.repeat)
    if a.figure:
        draw_savings(result, a.figure)
    print(json.dumps(result)) if a.json else show_measurements(result)

if __name__ == "__main__":
    main()
