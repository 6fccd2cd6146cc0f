"""Are the latents right? SAEs on worlds whose directions are known, and on real classification tasks.

    python tests/dictionary.py                                    # a small world, two minutes
    python tests/dictionary.py --world large                      # 2,048 features, 1 M tokens
    python tests/dictionary.py --world planted --seeds 3          # the notebook's 96 directions
    python tests/dictionary.py --shares 0 0.3 0.6 0.8             # of topk_start
    python tests/dictionary.py --world large --peer               # in the generator of sae-lens, beside it
    python tests/dictionary.py --real runs/a runs/b               # runs of cli.py train, where sae-probes is

The error says nothing of this: merged directions can reconstruct well. Results go to stdout.
"""

import argparse
import csv
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag, normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import batchtopk as bt  # noqa: E402

# ---- Worlds with known directions ----------------------------

class World:
    """x = offset + Σ over the active features of size · direction. Of a seed, everything is fixed.

    How often features are active falls by Zipf's law. The most frequent ones form trees, roots first: a child
    is active only where its parent is, and no sibling. Beyond that a Gaussian of low rank says which are
    active together (a copula). The law is that of SynthSAEBench (arXiv 2602.14687), in sae_lens.synthetic.
    """

    def __init__(self, n_features=2048, d_model=256, trees=16, depth=3, children=4, most=0.4, least=1e-3,
                 rank=25, correlation=0.1, offset=5.0, seed=0):
        generator = torch.Generator().manual_seed(1000 + seed)  # not seed: an SAE would begin with them
        self.directions = normalize(torch.randn(n_features, d_model, generator=generator), dim=1)
        self.offset = offset * normalize(torch.randn(d_model, generator=generator), dim=0)
        levels = [trees * children**i for i in range(depth + 1)]
        self.children, n_free = children, n_features - sum(levels)
        self.starts = list(itertools.accumulate(levels, initial=n_free))  # features of no tree come first
        zipf = torch.arange(1, n_features + 1) ** -0.5
        zipf = least + (most - least) * (zipf - zipf[-1]) / (1 - zipf[-1])
        self.rate = zipf.roll(n_free)  # how often each is active, but where a parent is too rare for it
        given = self.rate.clone()  # … where its parent is, before one sibling is drawn
        for before, first, last in self.tree_levels():
            share = self.rate[first:last].view(-1, children) / self.rate[before:first, None]
            given[first:last] = (share * (1 + share.sum(1, keepdim=True) - share)).clamp(max=1).flatten()
        self.bar = math.sqrt(2) * torch.erfinv(1 - 2 * given)
        factor = correlation * torch.randn(n_features, rank, generator=generator)
        shared = factor.square().sum(1)
        self.factor = factor * (shared.clamp(max=0.99) / shared).sqrt()[:, None]
        self.own = (1 - shared.clamp(max=0.99)).sqrt()  # deviation of what each feature has for itself

    def tree_levels(self):
        """For each level below the roots: where the level before it starts, where it does, where it ends."""
        return zip(self.starts, self.starts[1:], self.starts[2:])

    def sample(self, n, seed):
        """x [n, D], and which features are active in it, bool [n, features]."""
        generator, roots_end = torch.Generator().manual_seed(seed), self.starts[1]
        shared = torch.randn(n, self.factor.shape[1], generator=generator)
        own = torch.randn(n, roots_end, generator=generator).mul_(self.own[:roots_end])
        row, feature = (own.addmm_(shared, self.factor[:roots_end].T) > self.bar[:roots_end]).nonzero().T
        found = [(row, feature)]
        for before, first, last in self.tree_levels():
            row, parent = row[feature >= before], feature[feature >= before]
            child = first + (parent - before)[:, None] * self.children + torch.arange(self.children)
            own = self.own[child] * torch.randn(child.shape, generator=generator)
            above = (self.factor[child] @ shared[row][:, :, None]).squeeze(2) + own > self.bar[child]
            best, place = (above * torch.rand(child.shape, generator=generator)).max(1)  # one of those above
            row, feature = row[best > 0], child.gather(1, place[:, None]).squeeze(1)[best > 0]
            found.append((row, feature))
        row, feature = map(torch.cat, zip(*found))
        size = (2 + 0.5 * torch.randn(len(row), generator=generator)).relu()
        active = torch.zeros(n, len(self.directions), dtype=torch.bool)
        active[row, feature] = True
        row, order = row.sort(stable=True)
        starts = torch.searchsorted(row, torch.arange(n))
        x = embedding_bag(feature[order], self.directions, starts, mode="sum", per_sample_weights=size[order])
        return x + self.offset, active

    def stream(self, n):
        """Batches of n without end."""
        return (self.sample(n, i)[0] for i in itertools.count())

# ---- Measures ------------------------------------------------

HELD_OUT = range(1_000_000, 1_000_025)  # seeds of the held-out batches

@torch.no_grad()
def measure(sae, world, seeds=None, n=4096):
    """How well an SAE's latents are the world's features. Definitions are those of sae_lens.synthetic.

    mcc         mean |cosine| of decoder rows and directions, matched one to one so that it is largest
    f1          mean over latents of F1, active or not, as a detector of the feature with the largest |cosine|
    unique      number of features that are such a feature, per latent
    found       number of directions with a decoder row of cosine above 0.95
    fvu, l0     on held-out tokens, with θ
    dead        latents that fire on none of them
    """
    cosine = normalize(world.directions, dim=1) @ normalize(sae.W_dec, dim=1).T  # [features, F]
    matched = cosine.abs()[match(cosine.abs())]
    nearest, count = cosine.abs().argmax(0), torch.zeros(3, len(sae.W_dec), dtype=torch.int64)
    error, square, total = 0.0, 0.0, 0.0
    seeds = seeds or HELD_OUT
    for seed in seeds:
        x, active = world.sample(n, seed)
        f = sae.encode(x)
        fires, present = f != 0, active[:, nearest]
        count += torch.stack([(fires & present).sum(0), fires.sum(0), present.sum(0)])
        error += float((x - sae.decode(f)).double().square().sum())
        square, total = square + float(x.double().square().sum()), total + x.double().sum(0)
    both, fired, present = count
    variance = square - float(total.square().sum()) / (n * len(seeds))
    return {"mcc": float(matched.mean()), "f1": float((2 * both / (fired + present).clamp(min=1)).mean()),
            "unique": len(nearest.unique()) / len(nearest), "found": int((cosine.amax(1) > 0.95).sum()),
            "fvu": error / variance, "l0": int(fired.sum()) / (n * len(seeds)),
            "dead": int((fired == 0).sum())}

MATCHING = "optimal matching" if importlib.util.find_spec("scipy") else "greedy matching, for want of scipy"

def match(similarity):
    """Rows and columns of a one-to-one matching with the largest sum; a greedy one where scipy is missing."""
    if not importlib.util.find_spec("scipy"):
        return greedy_match(similarity)
    from scipy.optimize import linear_sum_assignment
    return tuple(map(torch.from_numpy, linear_sum_assignment(similarity.numpy(), maximize=True)))

def greedy_match(similarity):
    """Match the most similar pair, then the most similar of the rest …: mutual maxima, many at a time."""
    left, found = similarity.clone(), []  # those that are matched become -1
    while (left >= 0).any():
        best, column = left.max(1)
        mutual = (best >= 0) & (left.argmax(0)[column] == torch.arange(len(left)))
        row, column = mutual.nonzero().squeeze(1), column[mutual]
        left[row], left[:, column] = -1, -1
        found.append((row, column))
    return tuple(map(torch.cat, zip(*found)))

# ---- Methods on a world --------------------------------------

WORLDS = {  # the world, and what is trained on it
    "small": (dict(n_features=1024, d_model=128, trees=8, least=2e-3, rank=16),
              dict(n_latents=1024, k=7, tokens=300_000)),
    "large": (dict(), dict(n_latents=2048, k=10, tokens=1_000_000)),
    "planted": (dict(), dict(n_latents=128, k=4, tokens=300_000, batch_size=256)),
    "peer": (dict(), dict(n_latents=2048, k=10, tokens=1_000_000)),
}

def make_world(name, seed):
    """A world that has directions, sample and stream."""
    if name == "planted":
        from conftest import Planted
        return Planted()
    return (PeerWorld if name == "peer" else World)(**WORLDS[name][0], seed=seed)

def methods(shares=()):
    """{method: what it changes in a Config}; the shares are topk_start's."""
    names = {0: "BatchTopK alone", bt.Config.topk_start: "default"}
    ours = {names.get(share, f"topk_start {share:g}"): dict(topk_start=share) for share in shares or names}
    return ours | {"TopK": dict(activation="topk"), "JumpReLU": dict(activation="jumprelu")}

def train(world, settings, seed, **changes):
    """An SAE of ours, trained on a world."""
    cfg = bt.Config(d_model=world.directions.shape[1], seed=seed, device="cpu", **settings)
    return bt.train(dataclasses.replace(cfg, **changes), world.stream(4096))

def compare(name, seeds, shares, peer):
    """{method: measures for each seed}, with the seconds that training took."""
    results, settings = {}, WORLDS[name][1]
    runs = {method: (train, changes) for method, changes in methods(shares).items()}
    if peer:
        runs |= {f"sae-lens, lr {lr:g}": (train_peer, dict(lr=lr)) for lr in (3e-4, 3e-3)}
    for seed in range(seeds):
        world = make_world(name, seed)
        for method, (fit, changes) in runs.items():
            say(f"{method}, seed {seed}")
            started = time.perf_counter()
            sae = fit(world, settings, seed, **changes)
            seconds = time.perf_counter() - started
            results.setdefault(method, []).append(measure(sae, world) | {"seconds": seconds})
            if name == "peer":
                results.setdefault(f"{method}, measured by sae-lens", []).append(world.measure(sae))
    say("")
    return results

def show(results, title):
    """A row for each method, the mean over its seeds; of `found` the least and the most."""
    print(f"{title}; {MATCHING}\n\n{'':<36} {'MCC':>6} {'F1':>6} {'unique':>6} {'found':>9} {'FVU':>6} "
          f"{'L0':>6} {'dead':>5} {'s':>5}")
    for method, rows in results.items():
        mean = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        found = sorted({f(row["found"] for row in rows) for f in (min, max)}) if "found" in mean else []
        print(f"{method:<36} {mean['mcc']:>6.3f} {mean['f1']:>6.3f} {mean['unique']:>6.3f} "
              f"{'-'.join(map(str, found)):>9} {mean['fvu']:>6.4f} {mean['l0']:>6.2f} {mean['dead']:>5.0f} "
              f"{mean.get('seconds', math.nan):>5.0f}".replace("nan", "   "))

def say(text):
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

# ---- sae-lens: its world, its measures, its trainer ----------

class PeerWorld(World):
    """The large world's law, drawn by sae_lens.synthetic."""

    def __init__(self, seed):
        from sae_lens import synthetic as s
        law = s.SyntheticModelConfig(
            num_features=2048, hidden_dim=256, bias=5.0, mean_firing_magnitudes=2.0,
            std_firing_magnitudes=0.5,
            firing_probability=s.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=1e-3),
            hierarchy=s.HierarchyConfig(total_root_nodes=16, branching_factor=4, max_depth=3,
                                        mutually_exclusive_portion=1.0, compensate_probabilities=True),
            correlation=s.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            seed=1000 + seed)  # not seed: an SAE would begin with its directions
        self.model = s.SyntheticModel(law)
        self.directions = self.model.feature_dict.feature_vectors.detach()

    @torch.no_grad()
    def sample(self, n, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            f = self.model.activation_generator.sample(n)
        return self.model.feature_dict(f), f > 0

    def measure(self, sae):
        """What sae-lens says of an SAE: ours has the names it needs."""
        from sae_lens.synthetic import eval_sae_on_synthetic_data
        with torch.random.fork_rng():
            torch.manual_seed(HELD_OUT[0])
            found = eval_sae_on_synthetic_data(sae, self.model.feature_dict, self.model.activation_generator,
                                               num_samples=102_400, batch_size=4096)
        return {"mcc": found.mcc, "f1": found.classification.f1_score, "unique": found.uniqueness,
                "fvu": 1 - found.explained_variance, "l0": found.sae_l0, "dead": found.dead_latents}

def train_peer(world, settings, seed, lr):
    """sae-lens's BatchTopK SAE, trained on a world by its own trainer with its defaults but lr."""
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.synthetic import train_toy_sae
    source, seeds = torch.nn.Identity(), itertools.count()
    source.feature_vectors = world.directions  # for their device
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        sizes = dict(d_in=world.directions.shape[1], d_sae=settings["n_latents"], k=settings["k"])
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes))
        train_toy_sae(sae, source, lambda n: world.sample(n, next(seeds))[0], settings["tokens"], lr=lr)
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)

# ---- Real tasks ----------------------------------------------

class Task(NamedTuple):
    """Texts of two classes: the activations after their last tokens, and which are of the second class."""
    name: str
    x: torch.Tensor  # [n, D]
    label: torch.Tensor  # bool [n]

N_EXAMPLES, MOST_TOKENS = 500, 40  # of a set; its median text has fewer
LATENT_PENALTY, DENSE_PENALTY = 1e-3, 0.1  # of logistic regressions

def read_rows(path):
    """The rows of a compressed .csv file, as dicts."""
    import pyarrow  # which comes with datasets
    with pyarrow.input_stream(str(path), compression="zstd") as file:
        return list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")))

def binary_sets(data, tokenizer, wanted):
    """(name, token ids of each text, labels) of sets of short texts, evenly spread over those that fit."""
    path, fitting, half = data / "probing_datasets_MASTER.csv.zst", [], N_EXAMPLES // 2
    bt.check(path.is_file(), f"{data} is not the folder `data` of sae-probes", bt.Unavailable)
    about = read_rows(path)
    for name in (row["Dataset save name"] for row in about if row["Data type"] == "Binary Classification"):
        rows, rng = read_rows(data / f"{name}.zst"), random.Random(0)
        classes = [[row["prompt"] for row in rows if row["target"] == target]
                   for target in sorted({row["target"] for row in rows})]
        if len(classes) == 2 and min(map(len, classes)) >= half:
            texts = [text[-1000:] for of_class in classes for text in rng.sample(of_class, half)]
            ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            if statistics.median(map(len, ids)) < MOST_TOKENS:
                fitting.append((Path(name).stem, ids, half * [False] + half * [True]))
    bt.check(fitting, f"{data} holds no sets that fit", bt.Unavailable)
    wanted = min(wanted or len(fitting), len(fitting))
    return [fitting[i * len(fitting) // wanted] for i in range(wanted)]

def last_activations(lm, ids, begin, longest=128, size=25):
    """Activations [n, D] at the last token of each text: padding behind it does not reach it."""
    texts, x = [begin + text[-longest:] for text in ids], torch.empty(len(ids), lm.d_model)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for some in (order[i : i + size] for i in range(0, len(order), size)):
        width = len(texts[some[-1]])
        h = lm.activations(torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in some]))
        x[some] = h[range(len(some)), [len(texts[i]) - 1 for i in some]].float().cpu()
    return x

def load_tasks(cfg, data, cache, wanted):
    """Tasks with what a run's language model makes of them, computed once for a site, and where they lie."""
    about = cfg.model, cfg.layer, cfg.site, cfg.module, cfg.model_dtype, cfg.prepend_bos, wanted, N_EXAMPLES
    path = cache / f"{Path(cfg.model).name}-{hashlib.sha256(repr(about).encode()).hexdigest()[:12]}.pt"
    if not path.is_file():
        lm, part = bt.LanguageModel.from_config(cfg), path.with_suffix(".part")
        begin = bt.begin_token(lm.tokenizer) if cfg.prepend_bos else []
        tasks = torch.load(part) if part.is_file() else []
        cache.mkdir(parents=True, exist_ok=True)
        for name, ids, labels in binary_sets(data, lm.tokenizer, wanted)[len(tasks) :]:
            say(f"{path.stem}: {name}")
            tasks.append((name, last_activations(lm, ids, begin), torch.tensor(labels)))
            torch.save(tasks, part)
        part.rename(path)
        say("")
    return path, [Task(*task) for task in torch.load(path)]

def halves(label, seed):
    """Which examples [n] are for training: half of each class."""
    order = torch.rand(len(label), generator=torch.Generator().manual_seed(seed))
    train = torch.zeros_like(label)
    for c in (label, ~label):
        of_class = c.nonzero().squeeze(1)
        train[of_class[order[of_class].argsort()[: len(of_class) // 2]]] = True
    return train

def logistic(x, label, penalty):
    """Weights w [D] of a logistic regression on x [n, D]: the least mean loss + penalty / 2 · ‖w‖²."""
    with torch.enable_grad():
        w = torch.zeros(x.shape[1] + 1, requires_grad=True)  # the last is the constant
        fit = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

        def loss():
            fit.zero_grad()
            logits = x @ w[:-1] + w[-1]
            total = binary_cross_entropy_with_logits(logits, label.float())
            total = total + penalty / 2 * w[:-1].square().sum()
            total.backward()
            return total

        fit.step(loss)
    return w.detach()[:-1]

def auc(score, label):
    """How often an example of the second class scores above one of the first; ties count half."""
    above = score[label][:, None] - score[~label]
    return float(((above > 0) + 0.5 * (above == 0)).mean())

def probe(x, label, train, penalty):
    """Test AUC of a logistic regression on x, fitted on the examples for training."""
    x = (x - x[train].mean(0)) / x[train].std(0).clamp(min=1e-6)
    return auc(x[~train] @ logistic(x[train], label[train], penalty), label[~train])

@torch.no_grad()
def probe_latents(sae, task, train, n):
    """Test AUC of the n latents whose class means differ most among the examples for training."""
    f = sae.encode(task.x)
    difference = f[train & task.label].mean(0) - f[train & ~task.label].mean(0)
    return probe(f[:, difference.abs().topk(n).indices], task.label, train, LATENT_PENALTY)

def real(runs, data, cache, wanted, seed=0, **changes):
    """{run: {task: {"1": test AUC of the best latent, "5": of five, "dense": of the activations}}}."""
    results, dense = {}, {}
    for run in runs:
        cfg = dataclasses.replace(bt.RunConfig.load(run), device="auto", **changes)
        sae, (path, tasks) = bt.SAE.load(run), load_tasks(cfg, data, cache, wanted)
        bt.check(tasks[0].x.shape[1] == cfg.d_model, f"{run} is not for activations of this model")
        for task in tasks:
            say(f"{run}: {task.name}")
            train = halves(task.label, seed)
            if (path, task.name) not in dense:
                dense[path, task.name] = probe(task.x, task.label, train, DENSE_PENALTY)
            found = {str(n): probe_latents(sae, task, train, n) for n in (1, 5)}
            results.setdefault(str(run), {})[task.name] = found | {"dense": dense[path, task.name]}
    say("")
    return results

def show_real(results, seconds):
    """A row for each run: mean test AUC over the tasks."""
    print(f"mean test AUC over real tasks, {N_EXAMPLES} examples each; {seconds:.0f} s\n\n"
          f"{'':<50} {'tasks':>5} {'1 latent':>9} {'5 latents':>9} {'dense':>6}")
    for run, tasks in results.items():
        one, five, dense = (statistics.mean(t[name] for t in tasks.values()) for name in ("1", "5", "dense"))
        print(f"{run:<50} {len(tasks):>5} {one:>9.3f} {five:>9.3f} {dense:>6.3f}")

def find_data():
    """Where the installed sae-probes keeps its data sets."""
    found = importlib.util.find_spec("sae_probes")
    bt.check(found, "sae-probes is not installed; pip install --no-deps sae-probes, or give --data",
             bt.Unavailable)
    return Path(found.origin).parent / "data"

def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=WORLDS, default="small",
                        help="peer: large, drawn and measured by sae-lens too (default: small)")
    parser.add_argument("--seeds", type=int, default=1, help="of worlds and SAEs (default: 1)")
    parser.add_argument("--shares", type=float, nargs="+", default=(),
                        help=f"values of topk_start (default: 0 {bt.Config.topk_start:g})")
    parser.add_argument("--peer", action="store_true", help="train sae-lens's BatchTopK SAE, too")
    parser.add_argument("--real", nargs="+", type=Path, metavar="RUN",
                        help="probe runs of cli.py train on real tasks instead")
    parser.add_argument("--data", type=Path, help="folder `data` of sae-probes (default: as installed)")
    parser.add_argument("--cache", type=Path, default=Path("runs", "tasks"),
                        help="folder in which activations are kept (default: runs/tasks)")
    parser.add_argument("--tasks", type=int, default=24, help="at most; 0: all that fit (default: 24)")
    for name, kind in (("model", str), ("layer", int), ("site", str)):
        parser.add_argument(f"--{name}", type=kind, help="instead of what the run's configuration says")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    a = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        if a.real:
            changes = {name: getattr(a, name) for name in ("model", "layer", "site")}
            changes = {name: value for name, value in changes.items() if value is not None}
            results = real(a.real, a.data or find_data(), a.cache, a.tasks, **changes)
        else:
            results = compare(a.world, a.seeds, a.shares, a.peer)
    except (bt.InputError, bt.Unavailable, ImportError) as error:
        parser.error(str(error))
    if a.json:
        print(json.dumps(results))
    elif a.real:
        show_real(results, time.perf_counter() - started)
    else:
        show(results, f"{a.world} world, {a.seeds} seed{'s' * (a.seeds > 1)}")

if __name__ == "__main__":
    main()
