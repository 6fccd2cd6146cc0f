"""BatchTopK sparse autoencoders (Bussmann, Leask & Nanda 2024, arXiv 2412.06410), whole and in one file.

A sparse autoencoder (SAE) writes an activation x of a language model as a sum of few directions out of many.
With B tokens in a batch, width D of x, F latents, and k active latents per token on average:

    Z = (X - b_dec) W_encᵀ + b_enc           pre-activations [B, F]; X is [B, D], W_enc and W_dec [F, D]
    f = BatchTopK(Z)                         keep the k·B largest positive entries of Z, zero the rest
    X̂ = f W_dec + b_dec                      reconstruction: each active latent adds its decoder row
    L = mean ‖X - X̂‖² + α · L_aux            mean over tokens; L_aux is for latents that no longer fire
    f = Z · 1[Z > θ]                         inference: one number θ > 0 stands in for the batch

TopK SAEs keep k latents for every token. Here tokens that need more get more, at the same average. Rows of
W_dec have norm 1, so dropping an active entry z moves its token's reconstruction by the distance z: keeping
the k·B largest entries costs least. A run begins as TopK, which finds directions better (Config.topk_start).

    sae = train(Config(d_model=512, n_latents=4096, k=32), batches)      # any iterable of tensors [n, 512]
    f = sae.encode(x)                                                    # [..., 512] -> [..., 4096]

Part one is the method. With step="plain" it needs of part two only the checks and helpers at its start, and
`processes`, which does nothing where there is one. Part two is what makes it fast and practical: the sparse
step (the default), rival methods, activations of a language model, evaluation, export, several processes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import threading
import warnings
import weakref
import zipfile
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor, nn

def own_precision(function):
    """Switch torch.autocast off in a function: bfloat16 would change which entries are the largest."""
    return torch.autocast("cpu", enabled=False)(torch.autocast("cuda", enabled=False)(function))

def with_gradients(step):
    """Have a step compute gradients, in its own precision, whatever modes of torch are on outside."""
    @functools.wraps(step)
    @own_precision
    def run(self, x):
        with torch.inference_mode(False), torch.enable_grad():
            return step(self, x.clone() if x.is_inference() else x)  # autograd can save the clone

    return run

class InputError(ValueError):
    """A value that cannot work; the message names it and says what is accepted."""

class Unavailable(LookupError):
    """A file, run, device or model that is not here; the message says what to do next."""

def check(fine, message: str, kind=InputError):
    """Raise an error that says what to do, unless all is fine."""
    if not fine:
        raise kind(message)

def option(default, doc, *choices, low=0, high=math.inf):
    """A field of Config: its default (MISSING: required), what it is, the values accepted, ends included."""
    return dataclasses.field(default=default, metadata=dict(doc=doc, choices=choices, low=low, high=high))

# ==================== Part one: the method ====================
# ---- 1. Configuration ----------------------------------------

@dataclass(frozen=True)
class Config:
    """What training depends on beside the data. InputError for a value that cannot work."""

    # (paper: 4096) is what the paper uses; (paper) or (authors): the default is the paper's or their code's
    d_model: int = option(dataclasses.MISSING, "D, width of the activations", low=1)
    n_latents: int = option(dataclasses.MISSING, "F, number of latents", low=1)
    k: float = option(32, "average number of active latents per token")
    activation: str = option("batchtopk", "kind of SAE: the function from Z to f")  # a key of SAES
    topk_start: float = option(0.6, "share of a run, from its start, that is TopK (paper: 0)", high=1)
    normalize: str = option("scale", "scale: fit the biases' learning rate to x")  # see Trainer, or part two
    init: str = option("data", "data: b_dec the mean; authors: 0, and a smaller W_enc", "data", "authors")
    tokens: int = option(1_000_000, "length of the run in tokens", low=2)
    batch_size: int = option(512, "B, tokens in a batch (paper: 4096)", low=1)
    lr: float = option(0.0, "peak learning rate (paper: 3e-4); 0: 3e-3 · (1e6 / tokens)^0.3, ≤ 5e-3")
    decoder_lr: float = option(2, "factor on lr for W_dec (paper: 1)")
    beta1: float = option(0.5, "Adam's decay of the mean gradient (paper: 0.9)", high=1)
    beta2: float = option(0.9, "Adam's decay of the mean squared gradient (paper: 0.99); < 1", high=1)
    warmup: float = option(0.02, "share of the run in which the learning rate rises", high=1)
    decay: float = option(0.6, "share of the run in which the learning rate falls to 0", high=1)
    aux_k: int = option(512, "dead latents per token in the auxiliary loss (paper)")
    aux_coef: float = option(1 / 32, "α, weight of the auxiliary loss (paper)")
    dead_tokens: int = option(20_480, "tokens of silence after which a latent is dead (authors)", low=1)
    step: str = option("sparse", "sparse is fast, plain is autograd; same results")  # a key of STEPS
    encoder_dtype: str = option("auto", "precision of the search; auto: bfloat16 if fast")
    eval_tokens: int = option(65_536, "held-out tokens for θ (bt.train: at most); as many to evaluate", low=1)
    seed: int = option(0, "seed of weights and shuffling", high=2**63 - 1)
    device: str = option("auto", "cpu, cuda, cuda:1 …; auto takes a GPU if there is one")

    def __post_init__(self):
        check_config(self)  # which knows the rest: activation, normalize, step; beta1² < beta2 < 1

    def n_kept(self, n_tokens: int) -> int:
        """How many entries are kept of a batch: k for each of its tokens, rounded down, but at least 1."""
        return max(1, int(self.k * n_tokens + 1e-6))  # 0.29 · 100 is 28.999… in binary

    @property
    def row_k(self) -> int:
        """How many entries each token keeps where training begins as TopK: a whole number."""
        return max(1, round(self.k))

# ---- 2. Selection: TopK finds, BatchTopK spends --------------

def batch_topk(z: Tensor, n: int) -> Tensor:
    """BatchTopK (paper, section 3): zero all entries of z, of any shape, but the n largest positive ones.

    Gradients flow through the kept values alone. Which of equal entries are kept is unspecified.

        >>> batch_topk(torch.tensor([[5., 1., 0.], [4., 3., -2.]]), 3)
        tensor([[5., 0., 0.],
                [4., 3., 0.]])
    """
    check(n >= 0, f"n is {n}; give the number of entries to keep, 0 or more")
    flat = z.flatten()
    values, places = flat.topk(min(n, len(flat)), sorted=False)
    return torch.zeros_like(flat).scatter(0, places, values.relu()).view_as(z)  # relu: fewer may be positive

def row_topk(z: Tensor, k: int) -> Tensor:
    """TopK (Gao et al. 2024): zero all of z [..., F] but the k largest positive entries of each row."""
    values, latent = z.topk(min(k, z.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(z).scatter(-1, latent, values.relu())

# ---- 3. The sparse autoencoder -------------------------------

class SAE(nn.Module):
    """A BatchTopK sparse autoencoder. Part two adds encode_sparse, save, load, and other kinds of SAE."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = check_kind(config, self)  # InputError if it asks for another kind of SAE
        F, D, generator = config.n_latents, config.d_model, torch.Generator().manual_seed(config.seed)
        directions = functional.normalize(torch.randn(F, D, generator=generator, dtype=torch.float32), dim=1)
        norm = math.sqrt(2 * D / F) if config.init == "authors" else 1  # as kaiming_uniform_ on W_encᵀ [D, F]
        self.W_enc = nn.Parameter(norm * directions)  # [F, D], a copy: row j is what latent j reads
        self.W_dec = nn.Parameter(directions)  # [F, D]: row j, of norm 1, is what latent j writes
        self.b_enc = nn.Parameter(directions.new_zeros(F))
        self.b_dec = nn.Parameter(directions.new_zeros(D))  # init="data": training starts it at the mean of x
        self.register_buffer("theta", directions.new_tensor(math.nan))  # θ, kept in float32; NaN: none yet
        self.register_buffer("tokens_since_fired", torch.zeros(F, dtype=torch.int64))

    @own_precision
    def pre_activations(self, x: Tensor) -> Tensor:
        """Z = (x - b_dec) W_encᵀ + b_enc: [B, D] -> [B, F], in float32 whatever dtype the weights have."""
        return functional.linear(x.float() - self.b_dec.float(), self.W_enc.float(), self.b_enc.float())

    def get_theta(self) -> Tensor:
        """θ, which an entry must exceed at inference. Unavailable if it was never estimated."""
        check(not self.theta.isnan(), 'θ was never estimated; calibrate, or select by "batch"', Unavailable)
        return self.theta

    def select(self, z: Tensor, selection: str) -> Tensor:
        """Zero all of Z [B, F] but the active entries. selection: as for encode."""
        if selection == "topk":
            return row_topk(z, self.config.row_k)
        if selection == "batch":
            return batch_topk(z, self.config.n_kept(len(z)))
        return z.masked_fill(z.float() <= self.get_theta(), 0.0)  # not where(z > θ, z, 0): NaN stays in sight

    def as_rows(self, x: Tensor) -> Tensor:
        """Activations x [..., D] as tokens [B, D] in the weights' dtype, on their device."""
        check_activations(x, len(self.b_dec))
        return x.reshape(-1, x.shape[-1]).to(self.W_enc)

    def encode(self, x: Tensor, selection: str = "theta") -> Tensor:
        """Activations x [..., D], of any float dtype, to latents f [..., F].

        selection: "batch", BatchTopK over all rows of x, as in training; "topk", k of each row, as at its
        start; or "theta", the inference form Z · 1[Z > θ], in which each row depends on itself alone.
        Raises: InputError for another D, dtype or selection; Unavailable where θ is needed and not estimated.
        """
        check_choice("selection", selection, ("theta", "batch", "topk"))
        f = self.select(self.pre_activations(self.as_rows(x)), selection)
        return f.to(self.W_enc.dtype).view(*x.shape[:-1], f.shape[-1])

    @own_precision
    def decode(self, f: Tensor) -> Tensor:
        """X̂ = f W_dec + b_dec: latents [..., F] to reconstructions [..., D]."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor, selection: str = "theta") -> Tensor:
        """The reconstruction of x [..., D]. Arguments and errors are those of encode."""
        return self.decode(self.encode(x, selection))

    def is_dead(self) -> Tensor:
        """Which latents [F] have been silent for config.dead_tokens tokens or more."""
        return self.tokens_since_fired >= self.config.dead_tokens

    def training_selection(self, tokens_seen: int) -> str:
        """How a step selects after so many tokens: "topk" at the start of a run, then "batch"."""
        return "topk" if tokens_seen < self.config.topk_start * self.config.tokens else "batch"

SAES = {"batchtopk": SAE}  # by Config.activation; part two adds other kinds

# ---- 4. Loss -------------------------------------------------

@functools.singledispatch  # here and below: another kind of SAE can register its own
def loss(sae: SAE, x: Tensor, selection: str = "batch") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(L, mse, L_aux, f) for x [B, D]: mse = mean ‖X - X̂‖², L = mse + α · L_aux (paper, section 3)."""
    f = sae.select(sae.pre_activations(x), selection)
    residual = x - sae.decode(f)
    mse = residual.square().sum(1).mean()
    aux = auxiliary_loss(sae, x, residual.detach())
    return mse + sae.config.aux_coef * aux, mse, aux, f

AUX_SHARE = 1 / 192  # ours, for speed: L_aux computes at most this share of Z, but always one token

def auxiliary_loss(sae: SAE, x: Tensor, residual: Tensor) -> Tensor:
    """L_aux (Gao et al. 2024; paper, section 3): dead latents reconstruct what the live ones left over.

        e = X - X̂,  ê = (the k_aux largest Z of the dead latents, per token) W_dec,  L_aux = mean ‖e - ê‖²

    for x and a detached residual e [B, D]: live latents get no gradient, b_dec does. No ReLU, unlike the
    authors: with one, a latent with negative Z on all tokens would get none. If more than F / 192 latents are
    dead only the first tokens are used (x is taken to be shuffled).
    """
    cfg, dead = sae.config, sae.is_dead().nonzero().squeeze(1)
    if not len(dead) or not cfg.aux_k:
        return x.new_zeros(())
    n_rows = max(1, int(AUX_SHARE * len(x) * cfg.n_latents / len(dead)))
    z = functional.linear(x[:n_rows] - sae.b_dec, sae.W_enc[dead], sae.b_enc[dead])
    values, place = z.topk(min(cfg.aux_k, len(dead)), dim=1, sorted=False)
    e_hat = torch.zeros_like(z).scatter(1, place, values) @ sae.W_dec[dead]
    return (residual[:n_rows] - e_hat).square().sum(1).mean()

# ---- 5. θ: one number that stands in for the batch -----------

# The threshold of a batch is the smallest positive entry that BatchTopK keeps of it. θ is the mean of many of
# them. Used for each token alone, it keeps about k entries on average.

def batch_threshold(f: Tensor, selection: str) -> float:
    """The smallest positive entry of f [B, F], ∞ if there is none; after TopK the mean of its rows'."""
    groups = f if selection == "topk" else f.reshape(1, -1)
    least = groups.masked_fill(groups <= 0, math.inf).amin(1)
    return float(least[least < math.inf].mean().nan_to_num(math.inf))  # NaN: the mean of none

THETA_RATE = 0.01  # weight of a new batch in the running average

def running_rate(rate, n):
    """Weight of the n-th value (n a number or a tensor) in a bias-corrected average: 1, falling to `rate`."""
    return rate / (1 - (1 - rate) ** n)

def update_theta_(sae: SAE, threshold: float, n: int):
    """θ = E[threshold of a batch] (paper, equation 4) as a running average, after the n-th step of
    this selection. With it encode works during training; `train` ends with calibrate, which replaces it."""
    rate = running_rate(THETA_RATE, n)  # 1 at first, when θ is NaN and would stay so
    sae.theta.nan_to_num_(threshold).mul_(1 - rate).add_(rate * threshold)

@functools.singledispatch
@torch.no_grad()
def calibrate(sae: SAE, batches: Iterable[Tensor]) -> float:
    """Set θ to the mean threshold of batches of B held-out tokens, and return it.

    batches: any iterable of tensors [n, D] of any n; a rest that fills no batch is left out, if there are
    others. InputError if no batch has a positive entry.
    """
    batches = rebatch(batches, sae.config.batch_size, sae.W_dec.device)
    found = [(len(x), smallest(sae, active_entries(sae, x, "batch")[1])) for x in batches]  # ∞: none positive
    thresholds = [threshold for n, threshold in found if n == found[0][0] and threshold != math.inf]
    theta = check_theta(sum(thresholds) / max(1, len(thresholds)))  # 0 if there is none
    sae.theta.fill_(theta)
    return theta

# ---- 6. Training ---------------------------------------------

class StepStats(NamedTuple):
    """What Trainer.step reports about its batch."""
    loss: float
    mse: float  # mean over tokens of ‖x - x̂‖², summed over D
    aux: float
    fvu: float  # fraction of variance unexplained: mse / Trainer.variance; predicting the mean gives 1
    l0: float  # mean active latents per token
    dead: int  # number of dead latents
    threshold: float  # smallest kept entry (TopK: the rows' mean), ∞ if none was positive; θ is its mean
    lr: float

class Trainer:
    """Trains one SAE step by step.

    normalize="scale" makes training independent of the size of x, without scaling x. Adam's steps have the
    size of the learning rate, whatever the loss. That suits weights, which have no unit (f has that of x);
    biases have the unit of x, so their learning rate is multiplied by x_std, its deviation per coordinate.
    """

    @torch.inference_mode(False)  # what is made in it could not be changed by steps
    def __init__(self, cfg: Config):
        self.cfg, self.device = cfg, resolve_device(cfg.device)
        self.sae = make_sae(cfg, self.device)
        self.tokens_seen, self.steps = 0, 0  # steps since the present way of selection began
        self.x_std = self.variance = 0.0  # deviation per coordinate; variance summed over D; 0: not known yet
        self.last_threshold = 0.0  # of the last batch: the sparse step's search begins near it
        self.n_fired = torch.zeros_like(self.sae.tokens_since_fired)  # on how many tokens, of all seen
        self.adam = {s: adam_state(p.data) for s, p in self.sae.named_parameters()}  # mean, square, count

    @torch.no_grad()
    def initialize_(self, x: Tensor):
        """Set x_std, variance and, if it is 0, b_dec from x [n, D]. If nobody did, the first step does it."""
        x = self.sae.as_rows(x)
        variance = float((x - x.mean(0)).square().sum(1).mean())
        check_variance(variance, x, self.cfg)
        if self.cfg.init == "data" and not self.sae.b_dec.any():  # one that was loaded stays
            self.sae.b_dec.copy_(x.mean(0))
        self.variance = variance or 1.0  # one token has none
        self.x_std = math.sqrt(self.variance / x.shape[1]) if self.cfg.normalize == "scale" else 1.0

    @with_gradients
    def step(self, x: Tensor) -> StepStats:
        """One training step on x [B, D]. InputError for another shape, or if x or the mse is not finite."""
        check(x.ndim == 2 and len(x), f"x has the shape {list(x.shape)}; give [B, {self.cfg.d_model}]")
        if not self.x_std:
            self.initialize_(x)
        lr, take_step = self.learning_rate(), STEPS[self.cfg.step]  # before tokens_seen grows
        selection = self.sae.training_selection(self.tokens_seen)
        total, mse, aux, l0, dead, threshold = take_step(self, self.sae.as_rows(x))
        self.tokens_seen += len(x)
        self.steps += 1
        stats = StepStats(total, mse, aux, mse / self.variance, l0, dead, threshold, lr)
        learn_thresholds_(self.sae, self, stats)  # for BatchTopK: θ
        if self.sae.training_selection(self.tokens_seen) != selection:  # thresholds will be others
            self.steps, self.last_threshold = 0, 0.0
        return stats

    def learning_rate(self) -> float:
        """The next step's: linear warm-up, constant, linear decay to zero, by tokens."""
        cfg, left = self.cfg, self.cfg.tokens - self.tokens_seen
        peak = cfg.lr or min(5e-3, 3e-3 * (1e6 / cfg.tokens) ** 0.3)  # long runs want lower ones
        rise = (self.tokens_seen + cfg.batch_size) / max(cfg.warmup * cfg.tokens, 1)  # not 0 at first
        return peak * max(0.0, min(1.0, rise, left / max(cfg.decay * cfg.tokens, 1)))

    @torch.no_grad()
    def update_(self, name: str, g: Tensor, rows: Tensor | slice = slice(None)):
        """Lazy Adam (paper: Adam): step the rows of a parameter that got a gradient, g [r, …], and no others.

        Adam on all rows would shrink a rare latent's moments to nothing between two tokens that it fires on.
        """
        stored = [getattr(self.sae, name).data, *self.adam[name]]  # W, mean, square, count
        taken = [t[rows] for t in stored]  # copies, put back below (for a slice views: no harm)
        self.adam_(name, g, *taken)
        for old, new in zip(stored, taken):
            old[rows] = new

    def adam_rates(self, name: str) -> tuple[float, float]:
        """Its multiple of the learning rate, and ε in its gradient's unit: x² (the loss's), for biases x."""
        unit = self.x_std if name in ("b_enc", "b_dec") else 1.0
        factor = self.cfg.decoder_lr if name == "W_dec" else 1
        return factor * unit, 1e-8 * self.x_std**2 / unit * loss_scale(self.x_std)

    def adam_(self, name: str, g: Tensor, W: Tensor, mean: Tensor, square: Tensor, count: Tensor):
        """Adam (Kingma & Ba 2015), in place, on rows [r, …]. count [r, 1] or [r]: of their gradients."""
        factor, epsilon = self.adam_rates(name)
        if name == "W_dec":  # rows keep norm 1, so their gradient's part along the row is dropped
            g = g.addcmul(W, (g * W).sum(1, keepdim=True), value=-1)
        count.add_(1)
        mean.lerp_(g, running_rate(1 - self.cfg.beta1, count))  # with Adam's bias correction in the rate
        square.lerp_(g * g, running_rate(1 - self.cfg.beta2, count))
        W.addcdiv_(mean, square.sqrt().add_(epsilon), value=-self.learning_rate() * factor)
        if name == "W_dec":
            W.div_(W.norm(dim=1, keepdim=True))

def plain_step(trainer: Trainer, x: Tensor) -> tuple:
    """One step on x [B, D], as SAE.as_rows gives it. Returns loss, mse, aux, l0, dead, threshold."""
    sae, selection = trainer.sae, trainer.sae.training_selection(trainer.tokens_seen)
    total, mse, aux, f = loss(sae, x, selection)
    check_finite(mse.item(), trainer.tokens_seen)  # before anything is changed
    names, parameters = zip(*sae.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(total * loss_scale(trainer.x_std), parameters)))
    learning = gradients["W_dec"].any(1).nonzero().squeeze(1)  # others: 0, not active, nor in L_aux
    for name, g in gradients.items():
        rows = learning if name in ("W_enc", "W_dec", "b_enc") else slice(None)
        trainer.update_(name, g[rows], rows)
    active = f > 0
    sae.tokens_since_fired.add_(len(x)).masked_fill_(active.any(0), 0)
    trainer.n_fired += active.sum(0)
    l0, dead = int(active.sum()) / len(x), int(sae.is_dead().sum())
    return total.item(), mse.item(), aux.item(), l0, dead, batch_threshold(f.detach(), selection)

STEPS = {"plain": plain_step}  # by Config.step; part two adds "sparse", the default

@functools.singledispatch
def learn_thresholds_(sae: SAE, trainer: Trainer, stats: StepStats):
    """What a step learns without a gradient: here θ, unless nothing was positive."""
    if stats.l0:
        trainer.last_threshold = stats.threshold
        update_theta_(sae, stats.threshold, trainer.steps)

def train(cfg: Config, batches: Iterable[Tensor], on_step=lambda tokens, stats: False) -> SAE:
    """Train an SAE on cfg.tokens tokens and calibrate its θ on held-out ones.

    batches: any iterable of float tensors [n, D] of any n, shuffled. First some tokens are set aside for
    b_dec, x_std and θ: 5 % of cfg.tokens, at most cfg.eval_tokens, at least one batch. A generator has to
    give cfg.tokens after these; a list starts again when it ends, so then these are no longer held out.
    on_step(tokens seen, [StepStats]) is called after each step; True ends training.
    InputError if the batches end early, or if nothing can be learnt from them.
    """
    trainer = Trainer(cfg)
    stream = rebatch(repeat(lambda: filter(torch.numel, batches)), cfg.batch_size, trainer.device)
    n_held_out = max(1, min(cfg.eval_tokens, cfg.tokens // 20) // cfg.batch_size)
    held_out = list(itertools.islice(stream, n_held_out))
    trainer.initialize_(torch.cat(check_given(held_out, 0, cfg.tokens)))
    while trainer.tokens_seen < cfg.tokens:
        x = check_given(next(stream, None), trainer.tokens_seen, cfg.tokens)
        stats = trainer.step(x[: cfg.tokens - trainer.tokens_seen])
        if on_step(trainer.tokens_seen, [stats]):
            break
    calibrate(trainer.sae, held_out)
    return trainer.sae

# ==================== Part two: fast and practical ====================
# ---- What both parts use: checks, devices, batches -----------

def check_choice(name, value, choices):
    """InputError unless value is one of the choices."""
    check(value in tuple(choices), f"{name} is {value!r}; choose one of: {', '.join(choices)}")

@contextlib.contextmanager
def explained(message, kind=InputError):
    """Turn whatever fails inside into one error."""
    try:
        yield
    except (InputError, Unavailable):
        raise
    except Exception as error:
        raise kind(message) from error

DTYPES = "auto", "float32", "bfloat16"

def choices(field: dataclasses.Field) -> Iterable[str]:
    """The values that a field of text accepts; none means any."""
    tables = {"activation": SAES, "normalize": ("scale", "token"), "step": STEPS, "encoder_dtype": DTYPES}
    return tables.get(field.name, field.metadata["choices"])

def check_config(cfg: Config):
    """InputError for a value that a field does not accept, or values that do not fit together."""
    for field in dataclasses.fields(cfg):
        name, value, rules = field.name, getattr(cfg, field.name), field.metadata
        if getattr(value, "ndim", None) == 0:  # a number of NumPy's or torch's
            value = value.item()
            object.__setattr__(cfg, name, value)
        if choices(field):
            check_choice(name, value, choices(field))
        elif field.type in ("int", "float"):
            whole, low, high = field.type == "int", rules["low"], rules["high"]
            number = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
            kind = "whole number" if whole else "number"
            fits = number and not (whole and value % 1)
            check(fits, f"{name} is {value!r}; give a {kind} from {low} to {high}")
            object.__setattr__(cfg, name, int(value) if whole else value)  # 1e6 is a whole number too
        else:
            check(type(value).__name__ == field.type, f"{name} is {value!r}; give a {field.type}")
    check(cfg.k <= cfg.n_latents, f"k is {cfg.k:g}, more than the {cfg.n_latents} latents")
    check(cfg.k * cfg.batch_size >= 1, f"k = {cfg.k:g} keeps no entry of a batch of {cfg.batch_size}")
    check(cfg.activation != "topk" or cfg.k % 1 == 0, f"k is {cfg.k}; topk takes a whole number")
    check(cfg.beta1**2 < cfg.beta2 < 1, f"beta2 is {cfg.beta2}; give a number between beta1² and 1")
    check(cfg.warmup + cfg.decay <= 1, f"warmup + decay is {cfg.warmup + cfg.decay:g}; it must be at most 1")

def check_theta(theta: float) -> float:
    """θ; InputError unless it is positive and finite."""
    check(0 < theta < math.inf, "θ cannot be calibrated: no batch held a positive pre-activation, or a NaN")
    return theta

def check_given(batches, tokens_seen: int, tokens: int):
    """A batch or some batches; InputError if there are none, before all tokens were seen."""
    check(batches is not None and len(batches), f"the batches ended after {tokens_seen} of {tokens} tokens")
    return batches

SIZES = 1e-15, 1e15  # of activations whose squares float32 holds with all digits

def loss_scale(x_std: float) -> float:
    """The power of two that a step multiplies the loss by before its gradients are taken, and so ε.

    It is 1 for usual activations. float32 cannot hold the squares of gradients of very small or large ones.
    """
    return 4.0 ** (-16 * int(math.log2(x_std) / 16))

def check_variance(variance: float, x: Tensor, cfg: Config):
    """InputError if tokens x [n, D] are not finite, too small or large to be trained on, or all equal."""
    check_tokens(x, "x is", "")
    (low, high), size, square = SIZES, float(x.abs().max()), float(x.square().sum(1).mean())
    fits = not size or low <= size <= high
    check(fits, f"the largest activation is {size:.3g}; scale them, so that it is from {low:g} to {high:g}")
    small = cfg.normalize == "token" and size and square < x.shape[1] / 4
    check(not small, "activations are too small to be standardised; scale them, so that tokens have a "
          "standard deviation of 1e-4 or more")
    equal = len(x) > 1 and variance <= 1e-12 * square
    check(not equal, "all activations are equal: there is nothing to learn")

def check_activations(x: Tensor, d_model: int):
    """InputError unless x are activations [..., D]."""
    fits = x.shape[-1:] == (d_model,) and x.is_floating_point()
    check(fits, f"x is {x.dtype} of shape {list(x.shape)}; give floats [..., {d_model}]")

def check_tokens(x: Tensor, what: str, advice: str):
    """InputError unless all of x [n, D] is finite."""
    n = int((~x.isfinite()).any(1).sum())
    check(not n, f"{what} not finite on {n} of {len(x)} tokens{advice}")

def check_finite(loss: float, tokens_seen: int):
    """InputError unless a step's loss is a number."""
    check(math.isfinite(loss), f"loss {loss} at token {tokens_seen}: x is not finite, or lr is too high")

@torch.inference_mode(False)  # weights made in inference mode could not be trained
def make_sae(cfg: Config, device: torch.device = torch.device("cpu")) -> SAE:
    """A new SAE of the class for cfg; under torchrun it holds the latents of this process."""
    return processes.keep_share_(sae_class(cfg)(cfg)).to(device)

SAES_ON_STANDARDIZED = {}  # as SAES, for tokens that are standardised

def sae_class(cfg: Config) -> type[SAE]:
    """The class of SAEs for an activation and a normalisation."""
    kinds = SAES if cfg.normalize == "scale" else SAES_ON_STANDARDIZED
    return kinds[cfg.activation]

def check_kind(cfg: Config, sae: SAE) -> Config:
    """cfg, if it is one for SAEs of this class."""
    kinds = {*SAES.values(), *SAES_ON_STANDARDIZED.values()}
    kind = next(kind for kind in type(sae).__mro__ if kind in kinds)  # a subclass of the user's own is fine
    check(kind is sae_class(cfg), f"{type(sae).__name__} does not fit activation {cfg.activation} "
          f"with normalize {cfg.normalize}; make_sae(config) gives the right class")
    return cfg

@own_precision
@torch.no_grad()
def active_entries(sae: SAE, x: Tensor, selection: str = "theta") -> tuple[Tensor, Tensor]:
    """SAE.encode_sparse: the active entries of encode, for x as rows [B, D].

    Returns (row, latent) [2, m] int64, by row, then latent, and values [m] float32. Errors as for encode.
    There is no matrix [B, F] unless config.step is "plain".
    """
    check_choice("selection", selection, ("theta", "batch", "topk"))
    if sae.config.step == "sparse":
        return sparse_entries(sae, x, selection)
    f = sae.select(sae.pre_activations(sae.as_rows(x)), selection)
    return f.nonzero().T, f[f != 0].float()

SAE.encode_sparse = active_entries

def adam_state(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of a parameter the mean, the mean square and the number of its gradients: zeros at first.

    [F, D], [F, D] and [F, 1] for a matrix; for a vector each entry is a row.
    """
    return torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p[:, :1] if p.ndim == 2 else p)

def smallest(sae: SAE, values: Tensor) -> float:
    """The smallest of the values, in all processes that share the SAE; ∞ if there is none."""
    own = float(values.min()) if len(values) else math.inf
    return float(sae.processes.gather(torch.tensor(own, dtype=torch.float64)).min())

def resolve_device(name: str) -> torch.device:
    """The device a Config asks for. Unavailable if this machine lacks it, InputError if it cannot train."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    with explained(f"device {name!r} is not available here; use --device cpu, or auto", Unavailable):
        device = torch.empty(0, device=auto if name == "auto" else name).device
    check_choice("device", device.type, ("cpu", "cuda"))
    return device

def repeat(make):
    """The items of make(), made again and again until one gives nothing."""
    while (first := next(items := iter(make()), None)) is not None:
        yield first
        yield from items

def rebatch(chunks: Iterable[Tensor], size: int, device: torch.device) -> Iterator[Tensor]:
    """Float32 batches [size, D] of tensors [..., D], in order; the last may be smaller."""
    pending, n = [], 0
    for chunk in [chunks] if isinstance(chunks, Tensor) else chunks:
        pending.append(chunk.reshape(-1, chunk.shape[-1]).to(device, torch.float32))
        n += len(pending[-1])
        if n >= size:
            batches = torch.cat(pending).split(size)
            yield from batches[: n // size]
            pending, n = list(batches[n // size :]), n % size
    if n:
        yield torch.cat(pending)

# ---- 7. The same step, sparse --------------------------------

# Only the encoder product has to be dense. What follows the search touches the N = k·B kept entries alone, a
# thousandth of B·F.
# An entry has a latent, a row (its token) and a value. Four operations do the work: find_entries, dots,
# sum_rows and update_latents_.

CHUNK_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 26}  # pre-activations held at a time; 16 MiB fit a CPU's cache
UPDATE_ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 26}  # entries of a weight matrix updated at a time
# By how much bfloat16 may err: a share of the product, and of ‖x‖ / √D (rows of W_enc have norms near 1)
BFLOAT16_ERROR, BFLOAT16_NOISE = 0.006, 0.02
HINT = 0.95  # the search starts at this share of the last step's threshold

@torch.no_grad()
def sparse_step(trainer: Trainer, x: Tensor):
    """plain_step from the kept entries alone. Under torchrun each process has its own latents."""
    sae, cfg, n_dead, scale = trainer.sae, trainer.cfg, count_dead(trainer), loss_scale(trainer.x_std)
    selection = sae.training_selection(trainer.tokens_seen)
    for hint in (HINT * trainer.last_threshold, 0.0):  # the second after an attempt that failed
        recorded = find_recording(trainer, x, hint, n_dead, selection)
        new = (recorded.forward_backward(x, hint) if recorded
               else forward_backward(sae, x, hint, n_dead, scale, selection))
        numbers = sae.processes.gather(new.numbers).tolist()  # a GPU's one wait; nothing has changed yet
        check_finite(numbers[0][0], trainer.tokens_seen)
        if numbers[0][-1]:
            break
    if recorded:
        recorded.update_(trainer.learning_rate())
    else:
        update_(trainer, new, trainer.learning_rate())
    mse, aux, _, n_own_dead, _ = numbers[sae.processes.rank]
    _, _, thresholds, n_silent, _ = zip(*numbers)
    silent, n_dead = sae.tokens_since_fired, int(sum(n_silent))
    known_dead[trainer] = silent, silent._version, int(n_own_dead), n_dead
    l0 = sae.processes.total(len(new.entries.value)) / len(x)
    loss = mse + cfg.aux_coef * aux + new.entries.l0_coef * l0
    return loss, mse, aux, l0, n_dead, min(thresholds)

STEPS["sparse"] = sparse_step

class StepEntries(NamedTuple):
    """What a training step keeps, by latent, then row, and what a kind of SAE adds to the loss."""
    latent: Tensor
    row: Tensor
    value: Tensor
    right: Tensor | None = None  # whether try_largest found what it should, 0.0 or 1.0
    l0_coef: float = 0.0  # the loss has this times l0
    own_gradients: Callable[[Tensor, float], dict[str, Tensor]] = lambda g, scale: {}  # of its own parameters

class Gradients(NamedTuple):
    """What a step computes before it changes anything. All gradients are times loss_scale."""
    entries: StepEntries
    centred: Tensor  # x - b_dec
    g: Tensor  # ∂mse/∂X̂ [B, D]
    d_value: Tensor  # ∂mse/∂f of each entry
    d_b_enc: Tensor
    d_b_dec: Tensor
    d_aux: AuxGradient
    starts: Tensor  # group_starts of the entries' latents
    fired: Tensor
    silent: Tensor  # tokens_since_fired after this step
    numbers: Tensor  # mse, L_aux, threshold, how many latents will be dead, whether the entries are right

def forward_backward(sae, x, hint, n_dead, scale, selection) -> Gradients:
    """Loss and gradients of x [B, D]. hint: a number or a tensor, see find_entries; n_dead: count_dead's."""
    dtype, centred = choose_dtype(sae.config.encoder_dtype, x.device), (x - sae.b_dec).contiguous()
    entries = step_entries(sae, centred, hint, dtype, selection)
    latent, row, value, right, *_ = entries
    row_sorted, order = row.int().sort(stable=True)
    x_hat = sum_rows(sae.W_dec, latent[order], value[order], group_starts(row_sorted, len(x)))
    residual = centred - sae.processes.sum_(x_hat)  # X - X̂: f W_dec summed over entries
    del x_hat, row_sorted, order
    mse = residual.square().sum(1).mean()
    aux, d_aux = auxiliary_gradient(sae, centred, residual, *n_dead, scale)
    # Backward
    g = residual.mul_(-2 / len(x) * scale)  # ∂mse/∂X̂
    d_value = dots(sae.W_dec, g, latent, row)  # ∂mse/∂f = g W_decᵀ
    starts = group_starts(latent, len(sae.b_enc))
    d_b_enc = sum_rows(torch.ones_like(g[:, :1]), row, d_value, starts).view(-1)
    d_b_enc.index_add_(0, d_aux.dead.clamp(max=len(d_b_enc) - 1), d_aux.b_enc)
    d_b_dec = g.sum(0) - sae.processes.sum_(sae.W_enc.T.mv(d_b_enc))  # also L_aux's: it sees b_dec through Z
    # Counters
    fired = starts[1:] > starts[:-1]
    silent = (sae.tokens_since_fired + len(x)).masked_fill_(fired, 0)
    if selection == "topk":
        least = value.new_full((len(x),), math.inf).scatter_reduce_(0, row, value, "amin")
        least = sae.processes.gather(least).amin(0)
        none = ~(least < math.inf)
        threshold = (least.masked_fill(none, 0).sum() / (~none).sum()).nan_to_num(math.inf)
    else:
        threshold = value.min() if len(value) else torch.full_like(mse, math.inf)
    n_silent = (silent >= sae.config.dead_tokens).sum(dtype=torch.float32)
    right = torch.ones_like(mse) if right is None else right
    numbers = torch.stack([mse, aux, threshold, n_silent, right])
    return Gradients(entries, centred, g, d_value, d_b_enc, d_b_dec, d_aux, starts, fired, silent, numbers)

def update_(trainer, new: Gradients, lr):
    """Change weights, biases, counters. lr: a number or a tensor, for kernels; operators ask the trainer."""
    if has_kernels(new.g) and not torch.is_tensor(lr):
        lr = torch.full_like(new.numbers[0], lr)
    own = new.entries.own_gradients(new.g, loss_scale(trainer.x_std))  # of W_dec as it was
    update_latents_(trainer, new, lr)
    for name, g in {"b_dec": new.d_b_dec, **own}.items():
        state = [getattr(trainer.sae, name).data, *trainer.adam[name]]
        if has_kernels(g):
            rates = *trainer.adam_rates(name), *log_betas(trainer.cfg)
            launch(vector_kernel, (len(g),), *state, g, lr, *rates)
        else:
            trainer.adam_(name, g, *state)
    trainer.sae.tokens_since_fired.copy_(new.silent)
    trainer.n_fired += new.starts.diff()

@functools.singledispatch
def step_entries(sae, centred, hint, dtype, selection) -> StepEntries:
    """The entries that a training step keeps of x - b_dec = centred."""
    find = try_largest if can_try(sae, centred, hint) else find_entries
    n, per_row = n_selected(sae.config, len(centred), selection)
    return StepEntries(*find(sae, centred, hint, n, dtype, per_row))

def n_selected(cfg, n_rows, selection) -> tuple[int, bool]:
    """How many entries are kept of a batch, and whether it is that many of each row."""
    return (cfg.row_k, True) if selection == "topk" else (cfg.n_kept(n_rows), False)

@functools.singledispatch
def search(sae, centred, selection, hint):
    """latent, row and value of the active entries, by latent, then row. hint: see find_entries."""
    if selection == "theta":
        return find_entries(sae, centred, sae.get_theta())
    n, per_row = n_selected(sae.config, len(centred), selection)
    return find_entries(sae, centred, hint, n, per_row=per_row)

known_dead = weakref.WeakKeyDictionary()  # by trainer, beside it: a copy of it has other counters

def count_dead(trainer) -> tuple[int, int]:
    """How many dead latents this process has, and all together.

    They are known from the step before, if nobody has changed the counters (which must not be done through
    .data): the host need not wait. On a GPU they are rounded up to a power of two, so that steps are of few
    kinds. L_aux then has room for so many, and takes as few tokens as for so many.
    """
    silent = trainer.sae.tokens_since_fired
    counters, version, mine, total = known_dead.get(trainer, (None, 0, 0, 0))
    if counters is not silent or version != silent._version:
        mine = int(trainer.sae.is_dead().sum())
        total = int(trainer.sae.processes.total(mine))
    if mine and has_kernels(silent) and trainer.sae.processes.size == 1:
        mine = total = 1 << (mine - 1).bit_length()
    return mine, total

# Operation 1: find entries

@torch.no_grad()
def find_entries(sae, centred, hint, n=None, dtype=torch.float32, per_row=False):
    """The n largest positive pre-activations of a batch (of each row, if per_row), or all that exceed `hint`.

    Args: centred, x - b_dec [B, D]; hint, a number, or without n also one for each latent [F]. With n it is
        where the search begins and changes nothing in the result: if fewer than n exceed it, all is repeated
        (per_row: not used).
        dtype, of the product. In bfloat16 it only nominates entries: their values are computed again in
        float32, and decide.
    Returns: latent, row, value [m], by latent, then row.
    """
    for start in (0.0,) if per_row else (hint, 0.0):
        index, value = largest_entries(sae, centred, start, n, dtype, per_row)
        if n is None or not start or sae.processes.total(len(value)) >= n:
            break
    if n is not None:
        index, value = sae.processes.largest(index, value, n, len(centred) if per_row else 0)
    return index // len(centred), index % len(centred), value

def largest_entries(sae, centred, hint, n, dtype, per_row=False):
    """The n largest entries above `hint`, or all if they are fewer or n is None: index (latent · B + row) and
    value, ascending. A NaN counts as above, so that it is seen.

    When more than twice what is wanted is held, only what can be among the n largest stays, and later entries
    must exceed these. So one pass is exact if `hint` is not above the true threshold. With per_row all this
    is done for each row; its threshold begins as the n-th largest of its first 16 n entries.
    """
    n_rows, n_latents = len(centred), len(sae.b_enc)
    parts = 4 if n is not None else 1  # in which thresholds rise; each waits for its size
    most = max(1, min(-(-n_latents // parts), CHUNK_ENTRIES[centred.device.type] // n_rows))  # in each
    columns, rest, noise = split_product(sae, centred, dtype, per_row)
    scratch = torch.empty(most, n_rows, dtype=dtype, device=centred.device)
    hint = torch.as_tensor(hint, dtype=torch.float32, device=centred.device).expand(n_latents)
    thresholds, row_thresholds, wanted = hint, None, n * n_rows if per_row else n
    index, value = centred.new_empty(0, dtype=torch.int64), centred.new_empty(0)
    start, size = 0, most
    if n is not None and not (per_row or hint[0]):  # half of all exceed 0: begin with few, so that it rises
        size = min(most, 1 + 2 * n // n_rows)
    while start < n_latents:
        part = slice(start, min(start + size, n_latents))
        W = sae.W_enc[part].to(dtype)
        z = torch.mm(W, columns, out=scratch[: len(W)])
        if per_row and not start:
            row_thresholds = row_level(z[: 16 * n], rest, noise, n)
        new = chunk_entries(z, rest[part], noise, thresholds[part], row_thresholds)
        index, value = torch.cat([index, new[0] + start * n_rows]), torch.cat([value, new[1]])
        last = part.stop == n_latents
        if n is not None and (last or len(value) > 2 * wanted):
            noise_of = noise[index % n_rows] if per_row else noise
            error = product_error(value - rest[index // n_rows], noise_of, dtype)
            best, raised = n_largest(index % n_rows, value, error, n, row_thresholds)
            index, value = index[best], value[best]
            thresholds, row_thresholds = (hint, raised) if per_row else (raised.expand(n_latents), None)
        start, size = part.stop, min(2 * size, most)
    if dtype != torch.float32:  # then these are candidates, and float32 decides
        latent, row = index // n_rows, index % n_rows
        value = dots(sae.W_enc.float(), centred, latent, row) + sae.b_enc.float()[latent]
        above = (~(value <= hint[latent])).nonzero().squeeze(1)  # a mask would wait twice
        index, value = index[above], value[above]
        if n is not None:
            best, _ = n_largest(index % n_rows, value, None, n, row_thresholds)
            index, value = index[best], value[best]
    return index, value

def split_product(sae, centred, dtype, per_row):
    """Z = W_enc columns + rest: columns [D, B] in this dtype, rest [F], and the noise of the product: a
    number, or each row's [B].

    The errors of bfloat16 grow with ‖x‖, even where the product is small, as where all x share a large part
    that W_enc ignores. So the mean of the batch is left out of the product, and multiplied in float32.
    """
    if dtype == torch.float32:
        return centred.T, sae.b_enc.float(), centred.new_zeros(len(centred) if per_row else ())
    mean = centred.mean(0).nan_to_num(0.0, 0.0, 0.0)  # a token that is not finite spoils no others
    columns = torch.sub(centred, mean, out=torch.empty_like(centred, dtype=dtype))
    size = torch.linalg.vector_norm(columns, dim=1 if per_row else None, dtype=torch.float32)
    noise = size.nan_to_num_(0.0, 0.0, 0.0).mul_(BFLOAT16_NOISE / math.sqrt(columns.numel() / size.numel()))
    return columns.T, torch.addmv(sae.b_enc.float(), sae.W_enc.float(), mean), noise

def product_error(product, noise, dtype):
    """By how much a product of this dtype may be wrong; None for float32."""
    return None if dtype == torch.float32 else BFLOAT16_ERROR * product.abs() + noise

def product_threshold(threshold, rest, noise, dtype):
    """What a product of this dtype must exceed so that its pre-activation may exceed the threshold."""
    least = threshold - rest
    return least if dtype == torch.float32 else least.sub(least.abs(), alpha=BFLOAT16_ERROR).sub_(noise)

def row_level(z, rest, noise, n):
    """A threshold for each row [B] that n entries exceed, of which z [r, B] + rest are some; or 0."""
    if len(z) < n:
        return torch.zeros_like(z[0], dtype=torch.float32)
    least = z if z.dtype == torch.float32 else torch.sub(z, z.abs(), alpha=BFLOAT16_ERROR)
    least = ((least + rest[: len(z), None]) - noise).T.contiguous()
    if least.device.type == "cpu":  # NumPy's is faster
        least.numpy().partition(-n, axis=1)  # in place
        nth = least[:, -n]
    else:
        nth = least.topk(n, sorted=False).values.amin(1)
    return 0.999 * nth.clamp_min(0).nan_to_num()  # float32 rounds, too

def chunk_entries(z, rest, noise, thresholds, row_thresholds):
    """The entries z + rest [r, B] that may exceed their latent's threshold [r], or their row's [B]: index and
    value, as the product tells it."""
    if row_thresholds is not None:
        least, noise = product_threshold(row_thresholds, 0.0, noise, z.dtype).to(z.dtype), 0.0
        z.sub_(least)
    found = flat_above(z, product_threshold(thresholds, rest, noise, z.dtype))
    value = z.view(-1)[found] + rest[found // z.shape[1]]
    return found, value if row_thresholds is None else value + least[found % z.shape[1]]

def n_largest(row, value, error, n, row_thresholds):
    """Which entries can be among the n largest (of their row, if rows have thresholds), ascending, where a
    value may be wrong by the error; and what others must exceed: the n-th largest, or each row's."""
    low = value if error is None else value - error
    if row_thresholds is None:
        best = low.topk(min(n, len(low)), sorted=False).indices
        raised = nth = low[best].nan_to_num(math.inf).min() if len(best) else low.new_zeros(())
    else:
        place = row_places(row, len(row_thresholds), max(n, int(row.bincount(minlength=1).max())))
        values = functional.pad(low, [0, 1], value=-math.inf)[place]
        if values.device.type == "cpu":  # NumPy's is faster
            best = torch.from_numpy(values.numpy().argpartition(-n, axis=1)[:, -n:])
        else:
            best = values.topk(n, sorted=False).indices
        raised = torch.fmax(row_thresholds, values.gather(1, best).amin(1))
        best, nth = place.gather(1, best).flatten(), raised[row]
    if error is None:
        stays = torch.zeros(len(value) + 1, dtype=torch.bool, device=value.device)
        stays = stays.index_fill_(0, best, True)[:-1]
    else:
        stays = ~(value + error < nth)
    return stays.nonzero().squeeze(1), raised

def row_places(row, n_rows: int, width: int):
    """[n_rows, width]: at which places of `row` [m] each number stands, the first `width`; m for none."""
    m, (row_sorted, order) = len(row), row.int().sort(stable=True)
    starts = group_starts(row_sorted, n_rows)
    place = starts[:-1, None] + torch.arange(width, device=row.device)
    return functional.pad(order, [0, 1], value=m)[place.masked_fill(place >= starts[1:, None], m)]

def flat_above(z, least):
    """Where z [r, B] exceeds least [r] or is NaN: flat indices, ascending. On a GPU the host waits here."""
    if has_kernels(z):
        latent, row = collect(z, least)
        return latent * z.shape[1] + row
    mask = ~(z <= least[:, None])
    if mask.device.type == "cpu":  # NumPy's is faster
        return torch.from_numpy(mask.view(-1).numpy().nonzero()[0])
    return mask.view(-1).nonzero().squeeze(1)

# Operation 2: dot products at entries

def dots(a, b, i, j):
    """[m]: the products a[i_e] · b[j_e] of rows of a and b. i must ascend."""
    if has_kernels(a):
        return launch_dots(a, b, i, j)
    with warnings.catch_warnings(action="ignore"):  # sparse CSR tensors are in beta
        wanted = torch.sparse_csr_tensor(group_starts(i, len(a)), j, a.new_zeros(len(i)), (len(a), len(b)),
                                         check_invariants=False)
    return torch.sparse.sampled_addmm(wanted, a, b.T, beta=0.0).values()

# Operation 3: sums over groups

def group_starts(groups, n: int):
    """Where each of n groups starts in ascending group numbers [m], and where the last one ends: [n + 1]."""
    return torch.searchsorted(groups, torch.arange(n + 1, dtype=groups.dtype, device=groups.device))

def sum_rows(rows, which, weights, starts):
    """[G, D]: in row g the sum of weights_i · rows[which_i] over the group starts[g] ≤ i < starts[g + 1]."""
    if has_kernels(rows):
        return launch_sums(rows, which, weights, starts)
    return functional.embedding_bag(which, rows, starts, mode="sum", per_sample_weights=weights,
                                    include_last_offset=True)

# Operation 4: update rows

def update_latents_(trainer, new: Gradients, lr):
    """Trainer.update_ of W_enc, W_dec and b_enc for the latents that got a gradient.

    The gradients are sums over a latent's entries: of W_dec fᵀ g, of W_enc (∂mse/∂Z)ᵀ (X - b_dec).
    """
    g, d_aux, starts, row, value = new.g, new.d_aux, new.starts, new.entries.row, new.entries.value
    if has_kernels(g) and g.shape[1] <= WIDEST:
        return launch_update_(trainer, new, lr)
    # For a block of latents at a time, so that gradients and rows are used while they are in the cache
    learning = new.fired.index_fill(0, d_aux.dead[d_aux.W_dec.any(1)], True)
    size = UPDATE_ENTRIES[g.device.type] // g.shape[1] + 1
    for first in range(0, len(learning), size):
        part = slice(first, min(first + size, len(learning)))
        rows = first + learning[part].nonzero().squeeze(1)
        nearly_all = 2 * len(rows) > part.stop - first
        if nearly_all:  # then it is faster to step all of the block
            rows = torch.arange(first, part.stop, device=g.device)
        bounds = starts[torch.cat([rows, rows.new_tensor([part.stop])])]
        span = slice(int(bounds[0]), int(bounds[-1]))
        bounds = bounds - span.start

        def update_(name, d):
            if nearly_all:
                update_block_(trainer, name, d, part, ~learning[part])
            else:
                trainer.update_(name, d, rows)

        dead = torch.isin(d_aux.dead, rows)
        places = torch.searchsorted(rows, d_aux.dead[dead])
        d_W_dec = sum_rows(g, row[span], value[span], bounds)
        update_("W_dec", d_W_dec.index_add_(0, places, d_aux.W_dec[dead]))
        del d_W_dec
        d_W_enc = sum_rows(new.centred, row[span], new.d_value[span], bounds)
        update_("W_enc", d_W_enc.index_add_(0, places, d_aux.W_enc[dead]))
        update_("b_enc", new.d_b_enc[rows])

def update_block_(trainer, name, g, part, resting):
    """Trainer.update_ of consecutive rows without copies: all are stepped, the resting get theirs back."""
    block = [t[part] for t in (getattr(trainer.sae, name).data, *trainer.adam[name])]  # views
    resting = resting.nonzero().squeeze(1)
    before = [t.index_select(0, resting) for t in block]
    trainer.adam_(name, g, *block)
    for rows, old in zip(block, before):
        rows.index_copy_(0, resting, old)

# The auxiliary loss, dense over the dead latents

class AuxGradient(NamedTuple):
    """Gradient of α · L_aux for the dead latents; rows of W_dec are 0 for those outside the k_aux largest."""
    dead: Tensor  # [m], ascending; F where there are fewer, whose gradients are 0
    W_enc: Tensor  # [m, D]
    b_enc: Tensor  # [m]
    W_dec: Tensor  # [m, D]

def auxiliary_gradient(sae, centred, residual, m: int, n_dead: int, scale) -> tuple[Tensor, AuxGradient]:
    """auxiliary_loss and its gradient for m dead latents of this process, or fewer, and n_dead of all."""
    cfg, none, n_latents = sae.config, sae.W_enc[:0], len(sae.b_enc)
    if not n_dead or not cfg.aux_k:
        return residual.new_zeros(()), AuxGradient(none[:, 0].long(), none, none[:, 0], none)
    dead = sae.is_dead().nonzero_static(size=m, fill_value=n_latents).squeeze(1)
    exists, at = dead < n_latents, dead.clamp(max=n_latents - 1)
    W_enc, W_dec, b_enc = sae.W_enc[at], sae.W_dec[at], sae.b_enc[at]
    n_rows = max(1, int(AUX_SHARE * len(centred) * cfg.n_latents / n_dead))
    k, centred = min(math.ceil(cfg.aux_k / sae.processes.size), m), centred[:n_rows]
    f = torch.addmm(b_enc, centred, W_enc.T)
    kept = exists.to(f.dtype).expand_as(f)
    if k < m:
        best = f.masked_fill(~exists, -math.inf).topk(k, dim=1, sorted=False).indices
        kept = torch.zeros_like(f).scatter_(1, best, 1.0).mul_(kept)
    f.mul_(kept)
    residual = residual[:n_rows] - sae.processes.sum_(f @ W_dec)
    aux = residual.square().sum(1).mean()
    g = residual.mul_(-2 * cfg.aux_coef / len(centred) * scale)  # α · ∂L_aux/∂ê
    d_z = (g @ W_dec.T).mul_(kept)
    return aux, AuxGradient(dead, d_z.T @ centred, d_z.sum(0), f.T @ g)

def sparse_entries(sae, x, selection):
    """SAE.encode_sparse without a matrix [B, F]; it computes in float32."""
    rows, hint = sae.as_rows(x), HINT * float(sae.theta.nan_to_num(0.0))
    size = 4096 if selection == "theta" else max(1, len(rows))  # with θ rows are independent: some at a time
    indices, values = [rows.new_empty(2, 0, dtype=torch.int64)], [rows.new_empty(0, dtype=torch.float32)]
    for start in range(0, len(rows), size):
        centred = (rows[start : start + size].float() - sae.b_dec.float()).contiguous()
        latent, row, value = search(sae, centred, selection, hint)
        order = row.argsort(stable=True)
        indices.append(torch.stack([start + row[order], latent[order]]))
        values.append(value[order])
    return torch.cat(indices, dim=1), torch.cat(values)

def choose_dtype(name, device):
    """What one of DTYPES stands for; "auto" for bfloat16 if the hardware multiplies it."""
    if device.type == "cuda":
        auto = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        flags = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.11 cannot tell
        auto = flags.get("avx512_bf16") or flags.get("amx_bf16")
    return torch.bfloat16 if name == "bfloat16" or name == "auto" and auto else torch.float32

# ---- 8. The four operations as kernels for GPUs --------------

# A step of PyTorch's operators launches hundreds of kernels and waits for the device whenever a tensor's size
# depends on what was found. These Triton kernels need neither: sizes are fixed, and the number of entries
# stays on the GPU. No atomic additions: sums always have the same order. The docstrings give the operator
# that a kernel replaces. TRITON_INTERPRET=1 runs them on a CPU, for tests.

try:
    import triton
    import triton.language as tl
    # also for functions that kernels call; counts that differ in every call are no reason to compile again
    kernel = functools.partial(triton.jit, do_not_specialize=["l_first", "capacity", "n"])
except Exception:  # not installed, or not working: the operators do it
    triton, kernel = None, lambda function: function

CANDIDATES = 4  # try_largest holds at most this multiple of the entries that are kept
WIDEST = 4096  # the widest rows that one program of the update holds
RUN = 64  # entries of a latent per partial sum: one program for a dense latent would finish long after others

def has_kernels(t: Tensor) -> bool:
    """Whether operations on this tensor run as kernels."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (t.is_cuda or interpreted) and kernels_run(t.device)

kernels_work = {}  # by device, where they were tried

def kernels_run(device: torch.device) -> bool:
    """Whether kernels work on a device: tried once. Triton needs a C compiler, and not every GPU will do."""
    if device not in kernels_work:
        try:
            try_kernels(device)
            kernels_work[device] = True
        except Exception as error:
            kernels_work[device] = False
            why = "it is not installed" if triton is None else f"{error!r}".splitlines()[0]
            warnings.warn(f"Triton does not work on {device} ({why}): steps take several times as long")
    return kernels_work[device]

@torch.inference_mode(False)
@torch.no_grad()
def try_kernels(device):
    """RuntimeError unless small steps are those of operators. One latent always fires, four are dead."""
    cfg = Config(d_model=160, n_latents=32 * processes.size, k=3, batch_size=80, device=str(device))
    x = torch.randn(80, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)
    trainer = Trainer(cfg)
    trainer.initialize_(x)
    trainer.sae.processes = Processes()  # each of several tries alone
    trainer.sae.b_enc[:5] = torch.tensor([8.0, -20, -20, -20, -20])
    trainer.sae.tokens_since_fired[1:5] = 10**7

    def step(works, *case):
        kernels_work[device] = works
        try:
            return trial_step(trainer, x, *case)
        finally:
            del kernels_work[device]

    hint = 0.7 * float(step(False, 0.0, (0, 0), "topk")[2])  # of its threshold; there are moments now, too
    for case in ((hint, (4, 4), "topk"), (hint, (0, 0), "batch"), (0.0, (4, 4), "batch")):
        check_same(trainer, lambda: step(True, *case), lambda: step(False, *case))

def trial_step(trainer, x, hint, n_dead, selection) -> Tensor:
    """A step without a recording; returns its numbers."""
    new = forward_backward(trainer.sae, x, hint, n_dead, loss_scale(trainer.x_std), selection)
    update_(trainer, new, trainer.learning_rate())
    return new.numbers

def check_same(trainer, *ways):
    """RuntimeError unless two ways to take a step (they return its numbers) do the same. All is put back.

    Of a matrix about 64 rows are compared. 3 % may be rounding: Adam's first steps are signs of gradients.
    """
    state = {name: (t, t.clone()) for name, t in trainer_state(trainer).items() if t.ndim}
    found = []
    for way in ways:
        try:
            changes = dict(zip(("mse", "L_aux", "threshold", "dead", "search"), way()))
            changes |= {name: (t - old)[:: 1 + len(t) // 64] for name, (t, old) in state.items()}
            found.append({name: t.double().nan_to_num() for name, t in changes.items()})
        finally:
            for t, old in state.values():
                t.copy_(old)
    a, b = found
    wrong = [name for name in a if not (a[name] - b[name]).norm() <= 0.03 * b[name].norm()]
    check(not wrong, f"a trial step gives something else in {', '.join(wrong)}", RuntimeError)

def launch(kernel, grid, out, *arguments, **options):
    """Run a kernel with a program for each place of the grid, on the device of the tensor `out`."""
    tensors = (t for t in (out, *arguments) if isinstance(t, Tensor))
    assert all(t.is_contiguous() for t in tensors), "kernels read rows as they lie"
    with torch.cuda.device_of(out):
        kernel[grid](out, *arguments, **options)
    return out

# Operation 1: find entries

@kernel
def is_above(z, least, row_least, l, r, B, ROWS: tl.constexpr):
    """~(z[l, r] <= least[l]), with ROWS + row_least[r]: so a NaN is above, too."""
    bar = tl.load(least + l)
    if ROWS:
        bar += tl.load(row_least + r, mask=r < B, other=0.0)
    return (r < B) & ~(tl.load(z + l * B + r, mask=r < B, other=0.0).to(tl.float32) <= bar)

@kernel
def count_kernel(counts, z, least, row_least, B, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """counts = (~(z <= least[:, None] + row_least)).sum(1)"""
    l = tl.program_id(0).to(tl.int64)
    n = tl.zeros([BLOCK], tl.int32)
    for start in range(0, B, BLOCK):
        n += is_above(z, least, row_least, l, start + tl.arange(0, BLOCK), B, ROWS).to(tl.int32)
    tl.store(counts + l, tl.sum(n))

@kernel
def collect_kernel(latent, row, z, least, row_least, ends, n_before, l_first, B, capacity,
                   BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """latent, row = (~(z <= least[:, None] + row_least)).nonzero().T, written from n_before on, up to a
    capacity."""
    l = tl.program_id(0).to(tl.int64)
    start = tl.load(ends + l - 1, mask=l > 0, other=0)
    place = tl.load(n_before) + start
    if start < tl.load(ends + l):
        for first in range(0, B, BLOCK):
            r = first + tl.arange(0, BLOCK)
            above = is_above(z, least, row_least, l, r, B, ROWS)
            number = above.to(tl.int32)
            n = tl.sum(number)
            if n > 0:  # many blocks have none
                at = place + tl.cumsum(number, 0) - 1
                ok = above & (at < capacity)
                tl.store(latent + at, l_first + l + tl.zeros([BLOCK], tl.int64), mask=ok)
                tl.store(row + at, r.to(tl.int64), mask=ok)
                place += n

@kernel
def levels_kernel(counts, z, rest, noise, lowest, share, n, B,
                  L: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr):
    """counts[i, r] += how many entries of row r lie between level i and the next, of all those z[l, r]
    + rest[l] - share · |z[l, r]| - noise[r] that exceed the lowest. A float's upper bits tell its level."""
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * L
    for l in range(first, tl.minimum(first + L, n)):
        p = tl.load(z + l * B + r, mask=r < B, other=0.0).to(tl.float32)
        low = p + tl.load(rest + l) - share * tl.abs(p) - tl.load(noise + r, mask=r < B, other=0.0)
        steps = (low.to(tl.int32, bitcast=True) - tl.load(lowest).to(tl.int32, bitcast=True)) >> 20
        at = counts + tl.minimum(steps, N - 1) * B + r
        tl.atomic_add(at, 1, mask=(r < B) & (low > tl.load(lowest)))

LEVELS = 96  # thresholds for each row, 8 to an octave, from 1/256 of the hint to 16 times the hint

def raise_row_level_(counts, z, rest, noise, lowest, n):
    """A threshold for each row [B] that n or more of its entries exceed, those in counts [LEVELS, B] and in
    z [r, B] + rest; the lowest where there are fewer. It is at most 13 % below the n-th largest."""
    share = BFLOAT16_ERROR if z.dtype == torch.bfloat16 else 0.0
    grid = triton.cdiv(len(z), 64), triton.cdiv(z.shape[1], 256)
    launch(levels_kernel, grid, counts, z, rest, noise, lowest, share, *z.shape, L=64, BLOCK=256, N=LEVELS,
           num_warps=2)
    level = (counts.flip(0).cumsum(0) >= n).sum(0, dtype=torch.int32).sub_(1).clamp_(min=0)
    return 0.999 * ((level << 20) + lowest.view(torch.int32)).view(torch.float32)  # dots rounds otherwise

def collect(z, least, entries=None, n_before=None, first=0, row_least=None):
    """Latent and row [2, m] int64 of the entries of z [r, B] above least [r] (+ row_least [B]), in order.

    Without `entries` the host waits for m. Else they are written into entries [2, capacity] from place
    n_before [1] on, as far as they fit, for latents from `first` on; returns [1], how many there are by now.
    """
    n_latents, n_rows = z.shape
    counts = torch.empty(n_latents, dtype=torch.int32, device=z.device)
    rows = row_least is not None
    bars = (least, row_least if rows else least)
    launch(count_kernel, (n_latents,), counts, z, *bars, n_rows, BLOCK=2048, ROWS=rows)
    ends = counts.cumsum(0)  # int64
    wait = entries is None
    if wait:
        entries = [*torch.empty(2, int(ends[-1]), dtype=torch.int64, device=z.device)]
        n_before = torch.zeros_like(ends[:1])
    launch(collect_kernel, (n_latents,), *entries, z, *bars, ends, n_before, first, n_rows, len(entries[0]),
           BLOCK=1024, ROWS=rows)
    return entries if wait else n_before + ends[-1:]

def can_try(sae, centred, hint) -> bool:
    """Whether a step's search is try_largest: it needs kernels and a hint."""
    return has_kernels(centred) and sae.processes.size == 1 and (torch.is_tensor(hint) or hint > 0)

def try_largest(sae, centred, hint, n, dtype, per_row=False):
    """largest_entries without a wait: latent, row and value, and whether they are right, 0.0 or 1.0.

    They are if n exceed the hint (per_row: in each row n exceed its level), and if not more were found than
    CANDIDATES times as many as are kept, which it can hold.
    """
    n_rows, row_least = len(centred), None
    n_kept, size = n * n_rows if per_row else n, max(1, CHUNK_ENTRIES[centred.device.type] // n_rows)
    columns, rest, noise = split_product(sae, centred, dtype, per_row)
    least = product_threshold(0.0 if per_row else hint, rest, 0.0 if per_row else noise, dtype)
    entries = torch.zeros(2, CANDIDATES * n_kept, dtype=torch.int64, device=centred.device)
    found = torch.zeros(1, dtype=torch.int64, device=centred.device)
    if per_row:
        counts = torch.zeros(LEVELS, n_rows, dtype=torch.int32, device=centred.device)
        lowest = torch.zeros_like(rest[:1]).add_(hint / 256)
    for first in range(0, len(least), size):
        z = torch.mm(sae.W_enc[first : first + size].to(dtype), columns)
        if per_row:
            level = raise_row_level_(counts, z, rest[first : first + size], noise, lowest, n)
            row_least = product_threshold(level, 0.0, noise, dtype)
        found = collect(z, least[first:], entries, found, first, row_least)
        del z  # before the next is made
    latent, row = entries
    value = launch_dots(sae.W_enc, centred, latent, row, found).add_(sae.b_enc[latent]).relu_()
    right = found[0] <= len(value)
    if per_row:
        place = row_places(row, n_rows, CANDIDATES * n)
        candidates = functional.pad(value, [0, 1])[place]
        best = place.gather(1, candidates.topk(n, sorted=False).indices).flatten()
        right &= candidates.count_nonzero() == value.count_nonzero()  # none was left out for want of place
    else:
        best = value.topk(n, sorted=False).indices
    is_best = torch.zeros(len(value) + 1, dtype=torch.bool, device=centred.device).index_fill_(0, best, True)
    best = is_best[:-1].nonzero_static(size=n_kept).squeeze(1)  # in order
    latent, row, value = latent[best], row[best], value[best]
    right &= (value > (level[row] if per_row else hint)).all()
    return latent, row, value, right.float()

# Operation 2: dot products at entries

@kernel
def dots_kernel(out, a, b, i, j, n, n_found, D, E: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr):
    """out = (a[i] * b[j]).sum(1), of the first n_found entries; E of them in a program."""
    e = tl.program_id(0) * E + tl.arange(0, E)
    ok = e < n
    if not ALL:
        ok = ok & (e < tl.load(n_found))
    if tl.sum(ok.to(tl.int32)) > 0:
        at_a = tl.load(i + e, mask=ok, other=0)[:, None] * D
        at_b = tl.load(j + e, mask=ok, other=0)[:, None] * D
        total = tl.zeros([E], tl.float32)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)[None, :]
            inside = ok[:, None] & (d < D)
            left = tl.load(a + at_a + d, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(left * tl.load(b + at_b + d, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(out + e, total, mask=ok)

def launch_dots(a, b, i, j, n_found=None):
    """dots; with n_found [1] of the first n_found entries, -∞ for the others."""
    out = torch.full((len(i),), -math.inf, dtype=torch.float32, device=a.device)
    grid = (triton.cdiv(len(i), 8),)
    return launch(dots_kernel, grid, out, a, b, i, j, len(i), n_found, a.shape[1], E=8, BLOCK=128,
                  ALL=n_found is None, num_warps=2)

# Operation 3: sums over groups

@kernel
def sums_kernel(out, rows, which, weights, starts, D, E: tl.constexpr, BLOCK: tl.constexpr):
    """out[g] = (weights[s:t, None] * rows[which[s:t]]).sum(0) with s, t = starts[g], starts[g + 1]"""
    g, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(starts + g + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(starts + g), end, E):
        e = first + tl.arange(0, E)
        at = tl.load(which + e, mask=e < end, other=0)[:, None] * D + d[None, :]
        row = tl.load(rows + at, mask=(e < end)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tl.load(weights + e, mask=e < end, other=0.0)[:, None] * row, 0)
    tl.store(out + g * D + d, total, mask=d < D)

def launch_sums(rows, which, weights, starts):
    """sum_rows, in float32."""
    n_groups, D = len(starts) - 1, rows.shape[1]
    out = torch.empty(n_groups, D, dtype=torch.float32, device=rows.device)
    block = min(256, triton.next_power_of_2(D))
    return launch(sums_kernel, (n_groups, triton.cdiv(D, block)), out, rows, which, weights, starts, D,
                  E=max(1, 64 // block), BLOCK=block, num_warps=1)

# Operation 4: update rows

@kernel
def two_sums(g, c, row, value, d_value, first, end, D, E: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of a row of W_dec and of W_enc from the entries first ≤ e < end of its latent."""
    d = tl.arange(0, BLOCK)[None, :]
    d_dec, d_enc = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, E):
        e = start + tl.arange(0, E)
        ok = (e < end)[:, None] & (d < D)
        at = tl.load(row + e, mask=e < end, other=0)[:, None] * D + d
        f, d_f = tl.load(value + e, mask=e < end, other=0.0), tl.load(d_value + e, mask=e < end, other=0.0)
        d_dec += tl.sum(f[:, None] * tl.load(g + at, mask=ok, other=0.0), 0)
        d_enc += tl.sum(d_f[:, None] * tl.load(c + at, mask=ok, other=0.0), 0)
    return d_dec, d_enc

@kernel
def runs_kernel(runs, latent, row, value, d_value, g, c, D,
                RUN: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """two_sums of each RUN entries in runs [m // RUN, 2, D], if they all are one latent's."""
    first, d = tl.program_id(0).to(tl.int64) * RUN, tl.arange(0, BLOCK)
    if tl.load(latent + first) == tl.load(latent + first + RUN - 1):
        d_dec, d_enc = two_sums(g, c, row, value, d_value, first, first + RUN, D, E, BLOCK)
        at = first // RUN * 2 * D + d
        tl.store(runs + at, d_dec, mask=d < D)
        tl.store(runs + at + D, d_enc, mask=d < D)

@kernel
def adam_at(W, mean, square, count, at, i, ok, g, lr, factor, epsilon, log_beta1, log_beta2,
            UNIT: tl.constexpr):
    """Trainer.adam_ of W[at], with its gradients counted in count[i]; of a row that keeps norm 1 if UNIT."""
    w = tl.load(W + at, mask=ok, other=0.0)
    m, s = tl.load(mean + at, mask=ok, other=0.0), tl.load(square + at, mask=ok, other=0.0)
    if UNIT:
        g -= tl.sum(g * w) * w
    n = tl.load(count + i) + 1
    m += (g - m) * ((1 - tl.exp(log_beta1)) / (1 - tl.exp(n * log_beta1)))
    s += (g * g - s) * ((1 - tl.exp(log_beta2)) / (1 - tl.exp(n * log_beta2)))
    w -= tl.load(lr) * factor * m / (tl.sqrt(s) + epsilon)
    if UNIT:
        w /= tl.sqrt(tl.sum(w * w))
    tl.store(W + at, w, mask=ok)
    tl.store(mean + at, m, mask=ok)
    tl.store(square + at, s, mask=ok)
    tl.debug_barrier()  # all threads have read their count
    tl.store(count + i, n)

@kernel
def update_kernel(W_enc, mean_enc, square_enc, count_enc, W_dec, mean_dec, square_dec, count_dec,
                  b_enc, mean_b, square_b, count_b, row, value, d_value, starts, runs, g, c, d_b_enc,
                  aux_place, aux_enc, aux_dec, lr, factor, epsilon, factor_dec, epsilon_dec,
                  factor_b, epsilon_b, log_beta1, log_beta2, D,
                  AUX: tl.constexpr, RUN: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """The whole update of latent l: it has the entries starts[l] ≤ e < starts[l + 1]."""
    l, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    first, end = tl.load(starts + l), tl.load(starts + l + 1)
    first_run, end_run = (first + RUN - 1) // RUN, end // RUN  # the whole runs in between were summed before
    stop = tl.minimum(first_run * RUN, end)
    d_dec, d_enc = two_sums(g, c, row, value, d_value, first, stop, D, E, BLOCK)
    for whole in range(first_run, end_run):
        d_dec += tl.load(runs + 2 * whole * D + d, mask=d < D, other=0.0)
        d_enc += tl.load(runs + (2 * whole + 1) * D + d, mask=d < D, other=0.0)
    rest = tl.maximum(end_run * RUN, stop)
    more_dec, more_enc = two_sums(g, c, row, value, d_value, rest, end, D, E, BLOCK)
    d_dec, d_enc = d_dec + more_dec, d_enc + more_enc
    if AUX:
        place = tl.load(aux_place + l)
        ok = d < tl.where(place >= 0, D, 0)
        d_dec += tl.load(aux_dec + place * D + d, mask=ok, other=0.0)
        d_enc += tl.load(aux_enc + place * D + d, mask=ok, other=0.0)
    if tl.sum((d_dec != 0).to(tl.int32)) > 0:  # no gradient, no step
        i = l + tl.arange(0, 1)
        adam_at(W_enc, mean_enc, square_enc, count_enc, l * D + d, i, d < D, d_enc, lr, factor, epsilon,
                log_beta1, log_beta2, False)
        adam_at(W_dec, mean_dec, square_dec, count_dec, l * D + d, i, d < D, d_dec, lr, factor_dec,
                epsilon_dec, log_beta1, log_beta2, True)
        adam_at(b_enc, mean_b, square_b, count_b, i, i, i >= 0, tl.load(d_b_enc + i), lr, factor_b, epsilon_b,
                log_beta1, log_beta2, False)

@kernel
def vector_kernel(W, mean, square, count, g, lr, factor, epsilon, log_beta1, log_beta2):
    """Trainer.adam_ of one entry of a vector."""
    i = tl.program_id(0) + tl.arange(0, 1)
    adam_at(W, mean, square, count, i, i, i >= 0, tl.load(g + i), lr, factor, epsilon, log_beta1, log_beta2,
            False)

def log_betas(cfg):
    """log β₁ and log β₂: a kernel computes βⁿ as exp(n log β)."""
    return [math.log(beta) if beta else -math.inf for beta in (cfg.beta1, cfg.beta2)]

def launch_update_(trainer, new, lr):
    """update_latents_, all of a latent in one visit of its rows."""
    entries, g, d_aux, starts = new.entries, new.g, new.d_aux, new.starts
    sae, D, m, given = trainer.sae, g.shape[1], len(d_aux.dead), (entries.row, entries.value, new.d_value)
    shape = dict(RUN=RUN, E=2, BLOCK=triton.next_power_of_2(D))
    runs = g.new_empty(len(entries.row) // RUN, 2, D)
    if len(runs):
        launch(runs_kernel, (len(runs),), runs, entries.latent, *given, g, new.centred, D, **shape)
    place = starts  # without AUX it is not read
    if m:
        place = torch.full((len(starts),), -1, device=g.device)
        place[d_aux.dead] = torch.arange(m, device=g.device)
    enc, dec, b = ((getattr(sae, name).data, *trainer.adam[name]) for name in ("W_enc", "W_dec", "b_enc"))
    rates = (rate for name in ("W_enc", "W_dec", "b_enc") for rate in trainer.adam_rates(name))
    launch(update_kernel, (len(starts) - 1,), *enc, *dec, *b, *given, starts, runs, g, new.centred,
           new.d_b_enc, place, d_aux.W_enc, d_aux.W_dec, lr, *rates, *log_betas(trainer.cfg), D,
           AUX=m > 0, **shape)

# All that a step launches as two CUDA graphs

class RecordedStep:
    """The launches of a step of one kind, before the host's wait and after it, each repeated as one.

    There are about a hundred, and each takes the host longer than the device. A graph reads and writes the
    tensors that it was recorded with; settings like TF32 stay as they were.
    """

    def __init__(self, trainer, x, n_dead, selection, pool):
        self.x, self.counters = torch.empty_like(x), trainer.sae.tokens_since_fired
        self.hint, self.lr = x.new_zeros(()), x.new_zeros(())
        self.before, self.after = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options = dict(stream=recording_stream(x.device), capture_error_mode="thread_local")
        torch._C._cuda_clearCublasWorkspaces()  # or matrix products share memory that is another trainer's
        with torch.cuda.graph(self.before, pool, **options):
            scale = loss_scale(trainer.x_std)
            new = forward_backward(trainer.sae, self.x, self.hint, n_dead, scale, selection)
        with torch.cuda.graph(self.after, self.before.pool(), **options):
            update_(trainer, new, self.lr)
        torch._C._cuda_clearCublasWorkspaces()
        # what the host reads; the memory of all else serves other recordings too: none is run between the two
        self.result = Gradients(new.entries._replace(latent=None, row=None), *[None] * 9, new.numbers)

    def forward_backward(self, x, hint):
        self.x.copy_(x)
        self.hint.fill_(hint)
        self.before.replay()
        return self.result

    def update_(self, lr):
        self.lr.fill_(lr)
        self.after.replay()
        torch.autograd.graph.increment_version(self.counters)  # for count_dead

recording_stream = functools.cache(torch.cuda.Stream)  # torch.cuda.graph's own may lie on another device
unrecorded = set()  # devices on which a recording failed

def record(trainer, x, hint, n_dead, selection, pool) -> RecordedStep | None:
    """A recording that does what its launches do one by one; else None, and there are none on this device."""
    def replay():
        numbers = step.forward_backward(x, hint).numbers
        step.update_(trainer.learning_rate())
        return numbers

    try:
        with torch.cuda.stream(torch.cuda.current_stream(x.device)):  # also after a recording that broke off
            step = RecordedStep(trainer, x, n_dead, selection, pool)
        check_same(trainer, replay, lambda: trial_step(trainer, x, hint, n_dead, selection))
        return step
    except Exception as error:  # out of memory, for one
        unrecorded.add(x.device)
        recordings.clear()  # which frees memory
        why = f"{error.__context__ or error!r}".splitlines()[0]
        warnings.warn(f"CUDA graphs do not work on {x.device} ({why}): steps take longer")

MOST_KINDS = 32  # how many kinds of steps are recorded for one trainer
recordings = weakref.WeakKeyDictionary()  # by trainer, beside it: a copy of it has other tensors

def find_recording(trainer, x, hint, n_dead, selection) -> RecordedStep | None:
    """What was recorded for a step of this kind, if it comes at least for the second time.

    The first compiles the kernels, which cannot be done while recording.
    """
    sae, adam = trainer.sae, itertools.chain(*trainer.adam.values())
    fits = x.is_cuda and sae.config.activation != "jumprelu" and x.shape[1] <= WIDEST
    if not fits or x.device in unrecorded or not can_try(sae, x, hint):
        return None
    tensors = itertools.chain(sae.parameters(), sae.buffers(), adam, [trainer.n_fired])
    tensors = tuple(t.data_ptr() for t in tensors)
    bound, kind = (trainer.cfg, trainer.x_std, tensors), (x.shape, x.dtype, n_dead, selection)
    if trainer not in recordings or recordings[trainer][0] != bound:
        recordings[trainer] = bound, {}
    known = recordings[trainer][1]
    if kind in known and not known[kind]:
        pool = next((step.before.pool() for step in known.values() if step), None)
        known[kind] = record(trainer, x, hint, n_dead, selection, pool)
    elif len(known) < MOST_KINDS:
        known.setdefault(kind)
    return known.get(kind)

# ---- 9. Rivals: TopK, JumpReLU; standardised tokens ----------

class TopKSAE(SAE):
    """Keeps k latents of each token, in training and at inference."""

    def select(self, z, selection):
        return super().select(z, "topk")

    def training_selection(self, tokens_seen):
        return "topk"

@search.register(TopKSAE)
def topk_search(sae, centred, selection, hint):
    """The k largest positive entries of each row, whatever the selection."""
    return search.dispatch(SAE)(sae, centred, "topk", hint)

JUMP_START = 0.3  # share of the run in which JumpReLU selects as BatchTopK and all thresholds follow its θ;
JUMP_AFTER = 0.1  # after topk_start at least this share
WINDOW = 0.03  # width ε of the kernel, in units of the inputs' root mean squared norm (their paper: 0.001)
L0_RATE = 0.1  # how fast the penalty's weight λ follows L0 / k, per step

class JumpReLUSAE(SAE):
    """JumpReLU (Rajamanoharan et al. 2024): each latent has its own θ_j = exp(log_threshold_j), learnt by
    gradient, and the loss has a penalty λ · L0. `theta` stays NaN."""

    def __init__(self, config):
        super().__init__(config)
        self.log_threshold = nn.Parameter(torch.zeros_like(self.b_enc))
        # λ and the kernel's width ε, 0 at the start of a run: training's, so not saved with the SAE
        self.register_buffer("penalty", torch.zeros(2, dtype=torch.float64), persistent=False)

    def _apply(self, fn, recurse=True):
        penalty = self.penalty  # stays as it is, on the host: a step need not wait for it
        super()._apply(fn, recurse)
        self.penalty = penalty
        return self

    def get_theta(self):
        return self.log_threshold.exp()

    def select(self, z, selection):
        return super().select(z, "theta")

def jumprelu(z, theta, width):
    """f of z, and how many entries are active; both with a straight-through gradient for θ.

    Where |z - θ| < ε/2, f falls by θ/ε and the number by 1/ε as θ rises (their equations 11 and 12).
    """
    active, near = (z > theta).to(z.dtype), ((z - theta).abs() < width / 2) & (z > 0)
    rise = near * (theta - theta.detach()) / width  # zeros that carry a gradient
    return z * active - theta.detach() * rise, (active - rise).sum()

@loss.register(JumpReLUSAE)
def jumprelu_loss(sae, x, selection="batch"):
    """loss, with f as in a run of BatchTopK at first, and then with the penalty λ · L0."""
    coef, width = sae.penalty.tolist()
    z, sparsity = sae.pre_activations(x), 0 * sae.log_threshold.sum()  # a gradient of 0, for Adam's counts
    if coef:
        f, n_active = jumprelu(z, sae.get_theta(), width)
        sparsity = coef * n_active / len(x)
    else:
        f = SAE.select(sae, z, selection)
    residual = x - sae.decode(f)
    mse = residual.square().sum(1).mean()
    aux = auxiliary_loss(sae, x, residual.detach())
    return mse + sae.config.aux_coef * aux + sparsity, mse, aux, f

@search.register(JumpReLUSAE)
def jumprelu_search(sae, centred, selection, hint):
    """All entries above their latent's threshold, whatever the selection."""
    return find_entries(sae, centred, sae.get_theta())

@step_entries.register(JumpReLUSAE)
def jumprelu_entries(sae, centred, hint, dtype, selection):
    """The entries above θ and those near it, whose f is 0 and which move the thresholds."""
    coef, width = sae.penalty.tolist()
    if not coef:
        zero = torch.zeros_like(sae.log_threshold)
        entries = step_entries.dispatch(SAE)(sae, centred, hint, dtype, selection)
        return entries._replace(own_gradients=lambda g, scale: {"log_threshold": zero})
    lowest = (sae.get_theta() - 0.51 * width).clamp_min(0)
    latent, row, z = find_entries(sae, centred, lowest, None, dtype)

    def own_gradients(g, scale):
        with torch.enable_grad():
            f, n_active = jumprelu(z, sae.get_theta()[latent], width)
        slopes = dots(sae.W_dec, g, latent, row), torch.full_like(n_active, scale * coef / len(centred))
        [d] = torch.autograd.grad([f, n_active], [sae.log_threshold], slopes)
        return {"log_threshold": d}

    active = (~(z <= sae.get_theta()[latent])).nonzero().squeeze(1)
    return StepEntries(latent[active], row[active], z[active], None, coef, own_gradients)

@learn_thresholds_.register(JumpReLUSAE)
def adapt_penalty_(sae, trainer, stats):
    """Adapt λ, so that L0 becomes k; until it begins set all thresholds to that of the batch."""
    cfg = trainer.cfg
    if sae.penalty[0]:
        sae.penalty[0] *= (max(stats.l0, 1 / cfg.batch_size) / cfg.k) ** L0_RATE
    elif stats.l0:
        trainer.last_threshold = stats.threshold
        sae.log_threshold.data.fill_(math.log(stats.threshold))
        if trainer.tokens_seen >= max(JUMP_START, cfg.topk_start + JUMP_AFTER) * cfg.tokens:
            sae.penalty[0] = stats.threshold**2 / 2  # an entry z takes about z² from the error
            sae.penalty[1] = WINDOW * math.sqrt(trainer.variance)

@calibrate.register(JumpReLUSAE)
@torch.no_grad()
def calibrate_thresholds(sae, batches):
    """Multiply all thresholds by one factor, so that L0 becomes k and methods are compared at equal L0.

    It is the θ of a BatchTopK SAE whose Z are divided by the thresholds.
    """
    cfg, theta = dataclasses.replace(sae.config, activation="batchtopk"), sae.get_theta()
    scaled = sae.processes.keep_share_(sae_class(cfg)(cfg)).to(sae.W_dec.device)
    scaled.W_enc.copy_(sae.W_enc / theta[:, None])
    scaled.b_enc.copy_(sae.b_enc / theta)
    scaled.b_dec.copy_(sae.b_dec)
    factor = calibrate(scaled, batches)
    sae.log_threshold.add_(math.log(factor))
    return factor

SAES |= {"topk": TopKSAE, "jumprelu": JumpReLUSAE}

def standardize(x, per_token: bool):
    """(x', mean, std) with x = x'·std + mean: tokens standardised as in the authors' code, or x itself."""
    if not per_token:
        return x, torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
    return (x - mean) / std, mean, std

def restore(sae: SAE, x_hat: Tensor, x: Tensor) -> Tensor:
    """What SAE.decode gives, x_hat [..., D], in the units of x [..., D]."""
    _, mean, std = standardize(x.to(sae.W_enc), sae.config.normalize == "token")
    return x_hat * std + mean

class StandardizedTokens:
    """For normalize="token": an SAE that reads and writes standardised tokens. Only forward undoes it."""

    def as_rows(self, x):
        return standardize(super().as_rows(x), True)[0]

    def forward(self, x, selection="theta"):
        return restore(self, super().forward(x, selection), x)

class TokenSAE(StandardizedTokens, SAE):
    """BatchTopK on standardised tokens."""

class TokenTopKSAE(StandardizedTokens, TopKSAE):
    """TopK on standardised tokens."""

class TokenJumpReLUSAE(StandardizedTokens, JumpReLUSAE):
    """JumpReLU on standardised tokens."""

SAES_ON_STANDARDIZED |= {"batchtopk": TokenSAE, "topk": TokenTopKSAE, "jumprelu": TokenJumpReLUSAE}

# ---- 10. Activations of a language model ---------------------

TINY_GPT2 = Path(__file__).resolve().parent / "tests" / "assets" / "tiny-gpt2"  # the embedded default model

@dataclass(frozen=True)
class RunConfig(Config):
    """Config, and what a run on a language model depends on. The command line's options are these fields."""

    normalize: str = option("scale", "fit steps to the size of x, or standardise tokens")
    model: str = option("tiny-gpt2", "language model: a hub name, a local folder, or the embedded tiny-gpt2")
    layer: int = option(1, "block of the model that is read")
    site: str = option("resid_pre", "stream before or after the block, or what its MLP or attention adds",
                       "resid_pre", "resid_post", "mlp_out", "attn_out")
    module: str = option("", "module whose output is read instead, e.g. transformer.h.2.mlp.c_fc")
    model_dtype: str = option("auto", "the model's precision; auto: bfloat16 on GPUs", *DTYPES)
    dataset: str = option("stdlib", "a hub data set, a .txt, .md, .jsonl or .parquet file, or stdlib")
    dataset_config: str = option("", "configuration of a data set that has several")
    text_column: str = option("text", "column that holds the text")
    context: int = option(128, "tokens in a context; documents are packed, not padded (paper: 128)", low=2)
    prepend_bos: bool = option(True, "begin every context with the tokenizer's begin token, if it has one")
    skip_special: bool = option(True, "leave out special tokens and first positions: their norms are larger")
    max_norm: float = option(4, "leave out tokens whose norm is over this multiple of the median; 0: none")
    norm_limit: float = option(0.0, "the norm over which tokens are left out; 0: found by max_norm")
    model_batch: int = option(0, "contexts in one forward pass of the model; 0: 4096 tokens, 32,768 on a GPU")
    buffer_tokens: int = option(131_072, "activations shuffled at a time; several passes want more", low=1)
    passes: int = option(1, "how often each activation is used: the model reads tokens / passes", low=1)
    ce_contexts: int = option(128, "held-out contexts on which cross-entropy is measured, at most", low=1)
    checkpoint_minutes: float = option(10, "time between saved states, from which a run can be resumed")
    checkpoint_tokens: int = option(0, "tokens between saved states; 0: the time alone decides")

    @classmethod
    def preset(cls, name: str, recipe: str = "ours", **overrides) -> RunConfig:
        """One of PRESETS, trained by one of RECIPES, with some fields replaced; give at least d_model."""
        check_choice("preset", name, PRESETS)
        check_choice("recipe", recipe, RECIPES)
        return cls(**PRESETS[name] | RECIPES[recipe] | overrides)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> RunConfig:
        """The configuration of a run. InputError for an SAE saved from Python, which names no model."""
        cfg, _ = load_config(Path(folder))
        check(isinstance(cfg, cls), f"{str(folder)!r} holds no run: the SAE in it was saved from Python")
        return cfg

BEFORE = dict(prepend_bos=False, max_norm=0.0, topk_start=0.0)  # what files from before these fields mean
LARGE = dict(dataset="Skylion007/openwebtext", batch_size=4096, tokens=10**9, dead_tokens=10**6)
PRESETS = {
    "tiny": dict(n_latents=4096),
    "gpt2-small": dict(LARGE, model="openai-community/gpt2", layer=8, n_latents=24576, buffer_tokens=1 << 20),
    "gemma-2-2b": dict(LARGE, model="google/gemma-2-2b", layer=12, n_latents=16384, buffer_tokens=1 << 19),
}
RECIPES = {  # a recipe replaces what the preset says; the update of rows and L_aux stay as they are here
    "ours": {},
    "paper": dict(normalize="token", init="authors", batch_size=4096, lr=3e-4, decoder_lr=1, beta1=0.9,
                  beta2=0.99, warmup=0, decay=0, dead_tokens=20_480, topk_start=0, prepend_bos=False,
                  skip_special=False, max_norm=0),
}

class LanguageModel:
    """A causal language model and the site in it that the SAE reads."""

    def __init__(self, model: str, layer: int = RunConfig.layer, site: str = RunConfig.site,
                 module: str = "", *, dtype: str = "auto", device: str = "auto", skip_special: bool = True,
                 norm_limit: float = 0.0):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        self.device, self.skip_special = resolve_device(device), skip_special
        self.norm_limit, self.left_out = norm_limit, None  # a run sets both at its start
        dtype = "float32" if dtype == "auto" and self.device.type == "cpu" else dtype
        dtype, source = choose_dtype(dtype, self.device), str(TINY_GPT2) if model == "tiny-gpt2" else model
        local = os.path.isdir(source)  # then the hub is never asked
        with explained(f"model {model!r} could not be loaded; give a hub name or local folder", Unavailable):
            config = AutoConfig.from_pretrained(source, local_files_only=local)
            if getattr(config, "quantization_config", None):
                dtype = "auto"  # the checkpoint's: another would not fit the layers that are quantised
            self.model, loaded = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, local_files_only=local, output_loading_info=True,
                ignore_mismatched_sizes=True)  # refused below, by name
            self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        check_weights(model, loaded)
        check(len(self.tokenizer) > 1, f"the tokenizer of {model!r} has {len(self.tokenizer)} tokens")
        self.n_rows = self.model.get_input_embeddings().weight.shape[0]
        if self.device.type == "cuda":
            fuse_gelu_(self.model)
        added = getattr(self.tokenizer, "added_tokens_decoder", {})  # Llama 3 lists its own only here
        special = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.special = torch.tensor(sorted(special - {None}), dtype=torch.int64, device=self.device)
        self.module, self.reads_input = find_site(self.model, layer, site, module)
        with explained(f"model {model!r} cannot run on {self.device}; give another of them", Unavailable):
            self.model.to(self.device).eval().requires_grad_(False)
            if site in PARTS and not module:
                self.module = find_part(self, layer, site)
            self.d_model = self.activations(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]

    @classmethod
    def from_config(cls, cfg: RunConfig) -> LanguageModel:
        lm = cls(cfg.model, cfg.layer, cfg.site, cfg.module, dtype=cfg.model_dtype, device=cfg.device,
                 skip_special=cfg.skip_special, norm_limit=cfg.norm_limit)
        longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", cfg.context)
        check(cfg.context <= longest, f"context is {cfg.context}; the model reads at most {longest} tokens")
        return lm

    def is_kept(self, ids: Tensor) -> Tensor:
        """Which positions of ids [n, T] the SAE reads: bool [n, T], by default not first nor special ones."""
        kept = ~torch.isin(ids.to(self.device), self.special)
        kept[:, 0] = False
        return kept if self.skip_special else torch.ones_like(kept)

    def activations(self, ids: Tensor) -> Tensor:
        """Activations [n, T, D] at the site for ids [n, T]. The forward pass stops there."""
        def take(h):
            raise SiteReached(h)

        try:
            self.run(ids, take)
        except SiteReached as reached:
            h = reached.args[0]
            if isinstance(h, Tensor) and h.shape[:2] == ids.shape and h.ndim == 3:
                return h
        raise InputError("the module at this site returns no tensor [n, T, D]; choose another")

    def is_read(self, ids: Tensor, h: Tensor) -> Tensor:
        """Where the SAE reads activations h [n, T, D] of ids [n, T]: bool [n, T], is_kept up to norm_limit.

        In many models a few tokens, mostly near the beginning, have norms a hundred times as large as the
        others' (Sun et al. 2024, "Massive activations"). They would take a batch's latents for themselves.
        """
        kept = self.is_kept(ids)
        if self.norm_limit:
            kept &= ~(h.float().norm(dim=-1) > self.norm_limit)  # a NaN is read, so that it is noticed
        return kept

    def kept_activations(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 activations [m, D] that the SAE reads of ids [n, T], and where they are, bool [n, T].

        Several processes share the contexts.
        """
        h = torch.zeros(*ids.shape, self.d_model, dtype=torch.float32, device=self.device)
        mine, place = (t.tensor_split(processes.size)[processes.rank] for t in (ids, h))
        if len(mine):
            place.copy_(self.activations(mine))
        read = self.is_read(ids, processes.sum_(h))
        x = h[read]
        check_tokens(x, "the model's activations at this site are", "; try another --model-dtype, or site")
        return x, read

    def logits(self, ids: Tensor, edit: Callable[[Tensor], Tensor] | None = None,
               where: Tensor | None = None) -> Tensor:
        """Logits [n, T, V] for ids [n, T]. `edit`, if given, replaces the activations [m, D] at `where`.

        where, bool [n, T], is by default what the SAE reads; all other positions stay as they are.
        """
        def change(h):
            at = self.is_read(ids, h) if where is None else where
            return h.index_put((at,), edit(h[at]).to(h.dtype))

        return self.run(ids, change if edit else lambda h: h)

    @torch.no_grad()
    @own_precision
    def run(self, ids, change):
        """Logits, with the site's tensor passed through `change`."""
        def replace(h):
            if isinstance(h, (tuple, list)):  # of which the first entry is the stream
                return type(h)([replace(h[0]), *h[1:]])
            is_flat = isinstance(h, Tensor) and h.ndim == 2 and len(h) == ids.numel()  # OPT's MLP: [n · T, D]
            return change(h.view(*ids.shape, -1)).view_as(h) if is_flat else change(h)

        def before(module, args, given):
            if args:
                return replace(args), given
            return args, {**given, "hidden_states": replace(given.get("hidden_states"))}

        token = int(ids.max())
        if token >= self.n_rows:  # for example Gemma 3 1B's token for images
            raise InputError(f"token {token} ({self.tokenizer.decode([token])!r}) is in the text, but "
                             f"the embedding has {self.n_rows} rows; is it the model's own tokenizer?")
        with (self.module.register_forward_pre_hook(before, with_kwargs=True) if self.reads_input
              else self.module.register_forward_hook(lambda module, args, output: replace(output))):
            return self.model(ids.to(self.device), use_cache=False).logits

def check_weights(model, loaded):
    """InputError if a checkpoint lacks weights, which transformers then draws at random; `loaded` tells."""
    mismatched = [key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]]
    missing, unused = sorted([*loaded["missing_keys"], *mismatched]), sorted(loaded["unexpected_keys"])
    if missing:
        raise InputError(f"{len(missing)} weights of model {model!r} are missing or of another shape, first "
                         f"{missing[0]}; its files are damaged or do not belong to its config.json")
    if unused:
        warnings.warn(f"{len(unused)} tensors in the files of model {model!r} are unused, first {unused[0]}; "
                      "its config.json does not know them")

def fuse_gelu_(model):
    """GPT-2's GELU in one kernel instead of eight, which take a third of the model's time on a GPU."""
    from transformers.activations import NewGELUActivation
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))

class SiteReached(Exception):
    """Ends a forward pass at the hook and carries the activations out."""

PARTS = {  # names within a block of what may be added to the stream: in some families the output of a norm
    "attn_out": ("self_attn", "attn", "attention", "self_attention", "linear_attn", "self_attention.dense",
                 "post_attention_layernorm", "post_self_attn_layernorm", "post_norm1", "post_operator_norm"),
    "mlp_out": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2", "mlp.dense_4h_to_h", "ffn.down_proj",
                "post_feedforward_layernorm", "post_mlp_layernorm", "post_norm2", "post_ffn_norm"),
}

def find_site(model, layer, site, path):
    """The module of a path, else a block of the text model; and whether its input is read, not its output."""
    if path:
        modules = dict(model.named_modules())
        if path not in modules:
            near = ", ".join(difflib.get_close_matches(path, modules, cutoff=0))
            raise InputError(f"the model has no module {path!r}; the nearest names are: {near}")
        return modules[path], False
    for part in (model.get_decoder(), model):  # the former is no more than the head in ModernBERT
        lists = [module for name, module in part.named_modules() if isinstance(module, nn.ModuleList)
                 and name.rpartition(".")[2] in ("h", "layers", "blocks", "layer")]
        if lists:
            break
    check(len(lists) == 1, f"the model has {len(lists)} lists of blocks instead of one; give a module")
    check(0 <= layer < len(lists[0]), f"layer is {layer}; the model has the blocks 0 to {len(lists[0]) - 1}")
    return lists[0][layer], site == "resid_pre"

def find_part(lm, layer, site):
    """The module in the block lm.module whose output is what the block's attention or MLP adds to the stream.

    Families differ in names and norms, and some scale what they add. So 16 tokens decide: on each,
    resid_pre + attn_out + mlp_out = resid_post, but for rounding. Tokens on which rounding hides the part
    tell nothing; InputError if all do, or no modules fit.
    """
    block, n_tokens = lm.module, min(len(lm.tokenizer), lm.n_rows)
    ids = torch.linspace(1, n_tokens - 1, 16).long()[None]

    def read(module, reads_input=False):
        lm.module, lm.reads_input = module, reads_input
        return lm.activations(ids)[0].double()

    def outputs(names):
        for name in names:
            with contextlib.suppress(AttributeError, InputError):  # no such module, or not [n, T, D]
                module = block.get_submodule(name)
                yield module, read(module)

    before, after = read(block, True), read(block)
    best, least = None, 1e-3
    for pair in itertools.product(*[list(outputs(names)) for names in PARTS.values()]):
        (_, attn), (_, mlp) = pair
        module, part = pair[list(PARTS).index(site)]
        size = part.norm(dim=1)
        rounding = torch.finfo(lm.model.dtype).eps * sum(t.norm(dim=1) for t in (before, attn, mlp))
        error = ((before + attn + mlp - after).norm(dim=1) - rounding) / size
        error = error[rounding < size / 4]
        if len(error) and error.max() < least:
            best, least = module, error.max()
    check(best is not None, f"{site} of block {layer} is no module's output (resid_pre + attn_out + mlp_out "
          "= resid_post was tried on 16 tokens); choose another site, or a module")
    return best

def documents(cfg, split):
    """The texts of cfg.dataset for "train", "held-out" or "all", once through, without blank ones."""
    texts = library_texts() if cfg.dataset == "stdlib" else dataset_texts(cfg)
    wanted = {"train": (False,), "held-out": (True,), "all": (False, True)}[split]
    return (text for held_out, text in texts if held_out in wanted and text.strip())

def library_texts():
    """(held out?, text) of Python's own files, in an arbitrary order that is the same on every machine."""
    root = Path(os.__file__).parent
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    digests = {hashlib.sha256(name.encode()).digest(): name for name in names if "-packages/" not in name}
    for digest, name in sorted(digests.items()):
        yield digest[0] < 26, (root / name).read_text(encoding="utf-8", errors="replace")

TEXT_FILES = ".txt", ".md"
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

def dataset_texts(cfg):
    """(held out?, text) of a local file, or of a hub data set, streamed. Every 20th is held out."""
    suffix = Path(cfg.dataset).suffix.lower()
    if Path(cfg.dataset).is_file() and suffix not in (*TEXT_FILES, *TABLES):
        raise InputError(f"dataset {cfg.dataset!r} ends in {suffix!r}; files can end in: "
                         f"{', '.join((*TEXT_FILES, *TABLES))}")
    with explained(f"dataset {cfg.dataset!r} could not be read; give another, or stdlib", Unavailable):
        texts = file_texts(cfg.dataset) if suffix in TEXT_FILES else column_texts(cfg, suffix)
        for i, text in enumerate(texts):
            yield i % 20 == 19, text

@contextlib.contextmanager
def open_text(path):
    """Open a text file. InputError if it is not in UTF-8, which may be noticed when a part of it is read."""
    with open(path, "rb") as file:
        start = file.read(1024)
    wide = start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start  # "a" in UTF-16 is "a\0", or "\0a"
    check(not wide, f"{str(path)!r} is not in UTF-8 but in UTF-16, or is no text; convert it, for instance "
          "with: iconv -f utf-16 -t utf-8")
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not in UTF-8 ({error.reason} at byte {error.start}); convert it, "
                         "for instance with: iconv -f latin1 -t utf-8") from None

def file_texts(path):
    """The documents of a text file: what lies between lines of white space, or its lines if there is one."""
    with open_text(path) as file:
        parts = (blank for blank, _ in itertools.groupby(file, str.isspace) if not blank)
        by_line = len(list(itertools.islice(parts, 2))) < 2
        file.seek(0)
        for blank, lines in itertools.groupby(file, str.isspace):
            if not blank:
                texts = lines if by_line else ["".join(lines)]
                yield from (text.rstrip("\n") for text in texts)

def column_texts(cfg, suffix):
    """The texts in a column of a local table, or of a hub data set."""
    files = {"json": json_rows, "parquet": parquet_rows}
    rows = files[TABLES[suffix]] if Path(cfg.dataset).is_file() else hub_rows  # which reads names as patterns
    for i, row in enumerate(rows(cfg)):
        row = row if isinstance(row, dict) else {}
        text = row.get(cfg.text_column)
        if not isinstance(text, str):
            raise InputError(f"row {i} of {cfg.dataset!r} has no text in column {cfg.text_column!r}; its "
                             f"columns are: {', '.join(row)}")
        yield text.encode("utf-8", "replace").decode()  # JSON can hold halves of characters

def json_rows(cfg):
    """The rows of a file that has one in each line, or a list of them."""
    with open_text(cfg.dataset) as file:
        first = next((line for line in file if not line.isspace()), "")
        file.seek(0)
        lines = (json.loads(line) for line in file if not line.isspace())
        yield from json.load(file) if first.lstrip().startswith("[") else lines

def parquet_rows(cfg):
    """The rows of a .parquet file, of the column of text alone if it is there."""
    from pyarrow import OSFile, parquet  # which comes with datasets
    table = parquet.ParquetFile(OSFile(cfg.dataset))
    columns = [name for name in table.schema_arrow.names if name == cfg.text_column] or None
    for batch in table.iter_batches(1024, columns=columns):
        yield from batch.to_pylist()

def hub_rows(cfg):
    """The rows of a hub data set, or of what a URL or a pattern of file names stands for."""
    from datasets import load_dataset
    path = os.path.abspath(cfg.dataset)
    pattern = os.path.isdir(path) and any(sign in path for sign in ("*", "?", "[", "::"))
    check(not pattern, f"{path!r} is a folder, but would be read as a pattern; give one of its files")
    kind = TABLES.get(Path(cfg.dataset).suffix.lower())
    options = {"data_files": cfg.dataset} if kind else {"name": cfg.dataset_config or None}
    load = functools.partial(load_dataset, kind or cfg.dataset, split="train", streaming=True, **options)
    try:
        return load()
    except RuntimeError as error:  # it has a loading script; the hub keeps a parquet copy beside it
        if "script" not in str(error):
            raise
        return load(revision="refs/convert/parquet")

GROUP_CHARACTERS = 1 << 14, min(8, os.cpu_count() or 1) << 20  # tokenised at a time, at first and at most

def tokenise(tokenizer, texts):
    """The token ids of each text, without special tokens around it. A tokenizer's threads share a group."""
    most, limit = GROUP_CHARACTERS
    while group := list(itertools.islice(texts, 1)):
        size = len(group[0])
        while size < most and (text := next(texts, None)) is not None:
            group.append(text)
            size += len(text)
        yield from tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]
        most = min(2 * most, limit)

def begin_token(tokenizer) -> list[int]:
    """What a model sees before a text: its begin token, else its end token, else nothing."""
    return [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]

def pack(cfg, tokenizer, documents, n):
    """Documents as token ids [n or more, T], fewer at the end, and how many were used.

    Each document follows the begin token, if there is one, and so does each part of one that a context
    begins with: models are used with this token in front, and many malfunction without it. Nothing is
    padded; a rest is dropped.
    """
    begin, ids, n_documents = begin_token(tokenizer), array("q"), 0
    for document in documents:  # array: torch.cat here would start a second pool of threads, half the speed
        used, document = 0, begin + document
        while used < len(document):
            if used and cfg.prepend_bos and len(ids) % cfg.context == 0:
                ids.extend(begin)
            part = document[used : used + cfg.context - len(ids) % cfg.context]
            ids.extend(part)
            used += len(part)
        n_documents += 1
        if len(ids) >= n * cfg.context:
            break
    check(len(ids) >= min(n, 2) * cfg.context, f"dataset {cfg.dataset!r} has too little text: two contexts "
          f"of {cfg.context} tokens are not filled by its documents (in text files, what lies between lines "
          "of white space), or by those held out (every 20th); give more or longer ones")
    return torch.frombuffer(ids, dtype=torch.int64).unfold(0, cfg.context, cfg.context), n_documents

class Position(NamedTuple):
    """Where training stands in the text."""
    documents: int = 0  # read before the current chunk of contexts
    contexts: int = 0  # used of this chunk before the current buffer of activations
    batches: int = 0  # used of this buffer
    tokens: int = 0  # used before this buffer

TEXT_SHUFFLE = 8192  # contexts, because a few long documents could fill the buffer of activations

def contexts(cfg, tokenizer, at=Position()):
    """Training text without end: contexts [T] of token ids, each with the Position after it."""
    n, left = min(TEXT_SHUFFLE, -(-cfg.tokens // cfg.context)), threading.Event()
    texts = itertools.islice(repeat(lambda: documents(cfg, "train")), at.documents, None)
    texts = tokenise(tokenizer, itertools.takewhile(lambda text: not left.is_set(), texts))
    with ThreadPoolExecutor(1) as thread:
        pack_next = functools.partial(thread.submit, pack, cfg, tokenizer, texts, n)
        ahead = pack_next()
        try:
            while True:
                (chunk, n_documents), ahead = ahead.result(), pack_next()
                chunk = chunk[random_order(len(chunk), cfg.seed, at.documents)]
                for used in range(at.contexts, len(chunk)):
                    yield chunk[used], Position(at.documents, used + 1)
                at = Position(at.documents + n_documents)
        finally:
            left.set()  # else the thread would finish its chunk before a process can end

def random_order(n, *seeds):
    """The numbers below n in a random order that depends on all these whole numbers."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))

PASS_TOKENS = {"cpu": 4096, "cuda": 32_768}  # with fewer a GPU waits for launches: GPT-2 is 3 times slower

def pass_contexts(cfg, lm) -> int:
    """How many contexts the model reads at a time."""
    return cfg.model_batch or max(1, PASS_TOKENS[lm.device.type] // cfg.context)

def activation_batches(cfg, lm, at=Position()):
    """Training activations, cfg.tokens in all: batches [batch_size, D], each with the Position after it."""
    stream, most = contexts(cfg, lm.tokenizer, at), max(cfg.buffer_tokens, cfg.batch_size)
    size = min(most, cfg.tokens) + cfg.context
    buffer = torch.empty(size, lm.d_model, dtype=lm.model.dtype, device=lm.device)
    while at.tokens < cfg.tokens:  # fill the buffer, then serve its rows, each pass in a random order
        start, n, left = at, 0, cfg.tokens - at.tokens
        wanted = min(most, math.ceil(left / cfg.passes))  # no activation is computed that no step will use
        while n < wanted:
            few = min(pass_contexts(cfg, lm), math.ceil((wanted - n) / cfg.context))
            ids, positions = zip(*itertools.islice(stream, few))
            x, _ = lm.kept_activations(torch.stack(ids))
            buffer[n : n + len(x)] = x
            n, at = n + len(x), positions[-1]
        orders = [random_order(n, cfg.seed, *start[:2], *range(again)) for again in range(cfg.passes)]
        rows = torch.cat(orders)[:left].to(lm.device)
        used = left if len(rows) == left else len(rows) - len(rows) % cfg.batch_size
        for i, some in enumerate(rows[:used].split(cfg.batch_size)):
            if i >= start.batches:
                yield buffer[some], start._replace(batches=i + 1)
        at = at._replace(tokens=start.tokens + used)

HELD_OUT_SHARE = 0.02  # of the held-out tokens come from one document, if there are enough documents
READ_AHEAD = 1_000_000  # more tokens than are used are read at most, to find enough documents

def held_out_contexts(cfg, tokenizer, split="held-out"):
    """Token ids [n, T] of held-out text to calibrate θ on, and as many of other documents to evaluate on.

    No document gives more than its share, a passage from a random place in it: one long document would
    otherwise be most of the text.
    """
    n = math.ceil(cfg.eval_tokens / (cfg.context - 1))
    wanted, most = n * (cfg.context - 1), max(cfg.context - 1, int(HELD_OUT_SHARE * cfg.eval_tokens))
    found, enough, read = [], [0, 0], 0
    for i, document in enumerate(tokenise(tokenizer, documents(cfg, split))):
        found.append(document)
        enough[i % 2] += min(len(document), most)
        read += len(document)
        if min(enough) >= wanted or read > 2 * wanted + READ_AHEAD:
            break
    if len(found) == 1:
        [document] = found
        found = [document[: len(document) // 2], document[len(document) // 2 :]]
    halves = found[::2], found[1::2]
    return [pack(cfg, tokenizer, passages(half, most, wanted), n)[0][:n] for half in halves]

def passages(documents, most, wanted):
    """A passage of each document, of at most so many tokens, or of more if all are fewer than wanted."""
    left, share = wanted, 0
    for i, length in enumerate(sorted(map(len, documents))):
        share = math.ceil(left / (len(documents) - i))  # of those that are longer
        if share <= length:
            break
        left -= length
    most, place = max(most, share), random.Random(0)
    for document in documents:
        start = place.randrange(1 + max(0, len(document) - most))
        yield document[start : start + most]

def shuffled_activations(cfg, lm, ids):
    """The activations [m, D] that the SAE reads of ids [n, T], in a random order that is always the same."""
    x = torch.cat([lm.kept_activations(part)[0] for part in ids.split(pass_contexts(cfg, lm))])
    return x[random_order(len(x), 0).to(x.device)]

class LeftOut(NamedTuple):
    """What a limit on norms leaves out of activations."""
    norm_limit: float
    tokens: float  # share of the tokens
    variance: float  # share of the variance of all

def outliers(x: Tensor, max_norm: float) -> LeftOut:
    """The limit of norms for a run whose first activations are x [n, D]: max_norm times their median.

    Warns if, even so, under 1 % of the tokens that are kept hold over half of their variance.
    """
    norm = x.norm(dim=1)
    limit = max_norm * float(norm.median())
    distance = (x - x.mean(0)).square().sum(1).double()
    out = norm > limit
    kept = (x[~out] - x[~out].mean(0)).square().sum(1).double()
    largest = kept.topk(len(kept) // 100).values
    if largest.sum() > kept.sum() / 2:
        share = float(largest.sum() / kept.sum())
        warnings.warn(f"{share:.0%} of the variance is that of 1 % of the tokens; the SAE will mostly learn "
                      "these; a lower max_norm leaves them out")
    return LeftOut(limit, float(out.double().mean()), float(distance[out].sum() / distance.sum()))

# ---- 11. Evaluation ------------------------------------------

@torch.no_grad()
def evaluate(sae: SAE, batches: Iterable[Tensor], lm: LanguageModel | None = None,
             contexts: Tensor | None = None) -> dict:
    """Metrics on held-out activations [n, D], for both selections. Changes nothing in the SAE.

    Returns {"tokens": how many, "batch": metrics, "theta": metrics}, the metrics being
        l0, l0_histogram: mean active latents per token; [c] tokens with c active latents, c = 0, 1, 2 …
        mse, fvu: mean over tokens of ‖x - x̂‖²; Σ‖x - x̂‖² / Σ‖x - x̄‖², x̄ the mean of all tokens
        explained_variance, nmse: 1 - fvu; fvu of standardised tokens, x̄ their own means (the paper's)
        frac_alive, feature_density: share of latents that fired; [F] share of tokens on which each did
    and with token ids [n, T], in nats per token, ce_clean: the model as it is; ce_sae: reconstruction spliced
    in; ce_zero, ce_mean: zeros, the mean instead; ce_degradation = ce_sae - ce_clean; ce_recovered =
    (ce_zero - ce_sae) / (ce_zero - ce_clean); kl: divergence from the clean prediction. Positions that the
    SAE does not read keep their own activation in all of these; frac_unread is their share.
    Raises: Unavailable if θ was never estimated; InputError if batches are empty.
    """
    sae = sae if sae.W_dec.dtype == torch.float32 else copy.deepcopy(sae).float()
    total, found = 0.0, {"batch": [], "theta": []}
    for x in rebatch(batches, sae.config.batch_size, sae.W_dec.device):
        exact = x.double()
        total, square, std = total + exact.sum(0), exact.square().sum(1), exact.std(1)
        for selection, parts in found.items():
            x_hat, active, fired = reconstruct(sae, x, selection)
            error = (exact - x_hat).square().sum(1)
            parts.append((error, square, std, active, fired))
    check(found["batch"], "there is nothing to evaluate: the batches hold no activations")
    result = {"tokens": sum(len(error) for error, *_ in found["batch"])}
    mean = total / result["tokens"]
    [losses] = splice_losses([sae], lm, contexts, mean.float()) if lm else [{"batch": {}, "theta": {}}]
    for selection, parts in found.items():
        *parts, fired = zip(*parts)
        error, square, std, active = map(torch.cat, parts)  # [n] each
        unit = (std + 1e-5).square()  # for nmse, of standardised tokens: see standardize
        variance = float(square.mean() - mean.square().sum())
        fvu = float(error.mean()) / variance if variance > 0 else math.nan
        density = sae.processes.gather(sum(fired)).flatten().float() / len(error)
        result[selection] = {
            "fvu": fvu, "explained_variance": 1 - fvu, "mse": float(error.mean()),
            "nmse": float((error / unit).sum() / (std.square() / unit).sum() / (len(mean) - 1)),
            "l0": float(active.double().mean()), "l0_histogram": torch.bincount(active).tolist(),
            "frac_alive": float((density > 0).double().mean()), "feature_density": density,
            **losses[selection]}
    return result

def reconstruct(sae, x, selection):
    """SAE.forward of x [B, D] from active entries alone; how many each row [B] and own latent has."""
    (row, latent), value = sae.encode_sparse(x, selection)
    x_hat = sae.processes.sum_(sum_rows(sae.W_dec, latent, value, group_starts(row, len(x))))
    active = sae.processes.sum_(torch.bincount(row, minlength=len(x)))
    return restore(sae, x_hat + sae.b_dec, x), active, torch.bincount(latent, minlength=len(sae.b_enc))

@torch.no_grad()
def splice_losses(saes, lm, contexts, mean, on_context=None):
    """The cross-entropy metrics of evaluate, of each SAE, over contexts [n, T]; mean [D] of the activations.

    The SAEs read a batch at a time, the model a few contexts: a batch's logits would take many gigabytes.
    What does not depend on the SAE is computed once for all of them.
    """
    few = max(1, (1 << 25) // (contexts.shape[1] * lm.model.get_output_embeddings().weight.shape[0]))
    forms = [(sae, form) for sae in saes for form in ("batch", "theta")
             if form == "theta" or sae.config.activation == "batchtopk"]  # a rival's two are the same
    batch_size, edits = max(sae.config.batch_size for sae in saes), [torch.zeros_like, mean.expand_as]
    sums, n_read, n_done = 0.0, 0, 0
    for ids in contexts.to(lm.device).split(max(1, batch_size // contexts.shape[1])):
        x, read = lm.kept_activations(ids)
        n_read += len(x)
        parts, places = ids.split(few), read.split(few)
        sizes = [int(part.sum()) for part in read.sum(1).cpu().split(few)]
        x_hats = [reconstruct_all(sae, x, form).split(sizes) for sae, form in forms]
        for part, at, *spliced in zip(parts, places, *x_hats):
            spliced = [lambda h, x_hat=x_hat: x_hat for x_hat in spliced]
            sums = sums + edited_losses(lm, part, at, [*edits, *spliced])
            n_done += len(part)
            if on_context:
                on_context(n_done, len(contexts))
    (clean, _), (zero, _), (mean_ce, _), *spliced = (sums / (contexts.numel() - len(contexts))).tolist()
    losses = [{} for _ in saes]
    for (sae, form), (ce, kl) in zip(forms, spliced):
        losses[saes.index(sae)][form] = {
            "ce_clean": clean, "ce_sae": ce, "ce_zero": zero, "ce_mean": mean_ce, "kl": kl,
            "ce_degradation": ce - clean, "ce_recovered": (zero - ce) / (zero - clean or math.nan),
            "frac_unread": 1 - n_read / contexts.numel()}
    return [{form: found.get(form, found["theta"]) for form in ("batch", "theta")} for found in losses]

def reconstruct_all(sae, x, selection):
    """reconstruct of x [n, D] of any n, in equal parts of at most a batch."""
    parts = x.chunk(max(1, math.ceil(len(x) / sae.config.batch_size)))
    return torch.cat([reconstruct(sae, part, selection)[0] for part in parts])

def edited_losses(lm, ids, where, edits):
    """[1 + edits, 2] float64: cross-entropy and divergence from the clean prediction, summed over ids [n, T].

    First of the model as it is, then after each edit of the activations `where` the SAE reads them.
    """
    targets, found = ids[:, 1:].flatten(), []
    for edit in (None, *edits):
        log_p = lm.logits(ids, edit, where)[:, :-1].flatten(0, 1).float().log_softmax(-1)
        if edit is None:
            clean, entropy = log_p.exp(), -torch.linalg.vecdot(log_p.exp(), log_p)
        kl = -torch.linalg.vecdot(clean, log_p) - entropy
        loss = functional.nll_loss(log_p, targets, reduction="none")
        found.append(torch.stack([loss.double().sum(), kl.double().sum()]))
    return torch.stack(found)

# ---- 12. Export, saving, loading -----------------------------

class ExportedSAE(nn.Module):
    """The inference form of an SAE for TorchScript, f = z · 1[z > θ]: nothing here depends on the batch.

    x may have any leading dimensions and any float dtype. Results are float32, and NaN where x has NaN.
    """

    def __init__(self, sae: SAE, dtype: torch.dtype = torch.float32):
        super().__init__()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            self.register_buffer(name, getattr(sae, name).detach().to("cpu", dtype))
        self.theta = sae.get_theta().detach().cpu()  # no buffer, so that half() leaves it in float32
        self.k = int(sae.config.k) if sae.config.activation == "topk" else 0
        self.per_token: bool = sae.config.normalize == "token"
        self.norm_limit: float = getattr(sae.config, "norm_limit", 0) or math.inf

    def _encode(self, x):
        """z [..., F] and where it is inactive. A NaN is active, so that it can be seen."""
        assert x.is_floating_point(), "x holds no floating-point numbers"
        fits = x.dim() > 0 and x.shape[-1] == self.b_dec.shape[0]
        assert fits, f"x has the shape {x.shape}; give floats [..., {self.b_dec.shape[0]}]"
        x = standardize(x.float(), self.per_token)[0].to(self.W_enc.dtype)
        z = functional.linear(x - self.b_dec, self.W_enc, self.b_enc)
        assert z.dtype == self.W_enc.dtype, "torch.autocast would change which latents fire; turn it off"
        z = z.float()
        return z, row_topk(z, self.k) == 0 if self.k else z <= self.theta.to(z.device)

    def forward(self, x):
        """x [..., D] to latents f [..., F]."""
        z, inactive = self._encode(x)
        return z.masked_fill_(inactive, 0.0)

    @torch.jit.export
    def seen(self, x):
        """Whether x [..., D] is of a size that the SAE was trained on: bool [...]; NaN is not."""
        return x.float().norm(2, -1) <= self.norm_limit

    @torch.jit.export
    def encode_sparse(self, x):
        """The active entries alone, as from SAE.encode_sparse: indices [2, m] int64, values [m]."""
        F, m, rows = self.b_enc.shape[0], 0, x.reshape(-1, x.shape[-1])
        index = torch.empty(0, dtype=torch.int64, device=x.device)
        value = torch.empty(0, dtype=torch.float32, device=x.device)
        size = max(1, min(1024, (1 << 24) // F))
        for start in range(0, rows.shape[0], size):
            z, inactive = self._encode(rows[start : start + size])
            found = inactive.logical_not_().view(-1).nonzero()[:, 0]
            n = m + len(found)
            if n > len(value):  # room for all rows, at this rate: many small tensors would leave fragments
                room = max(n, int(1.1 * n * rows.shape[0] / (start + size)))
                index, value = [functional.pad(t, [0, room - len(t)]) for t in (index, value)]
            index[m:n], value[m:n], m = found + start * F, z.view(-1)[found], n
        return torch.stack([index[:m] // F, index[:m] % F]), value[:m].clone()

    @torch.jit.export
    def decode(self, f):
        """Latents f [..., F] to reconstructions [..., D]; for normalize="token" in standardised units."""
        x_hat = f.to(self.W_dec.dtype) @ self.W_dec
        assert x_hat.dtype == self.W_dec.dtype, "torch.autocast would round; turn it off"
        return (x_hat + self.b_dec).float()

    @torch.jit.export
    def decode_sparse(self, indices, values, n_rows: int):
        """The same from encode_sparse's result, whose rows ascend, to [n_rows, D]."""
        rows = indices[0]
        assert bool((rows[1:] >= rows[:-1]).all()), "the rows in indices[0] do not ascend"
        assert rows.numel() == 0 or 0 <= int(rows[0]) and int(rows[-1]) < n_rows, "a row is not below n_rows"
        starts, weights = group_starts(rows, n_rows), values.to(self.W_dec.dtype)
        x_hat = functional.embedding_bag(indices[1], self.W_dec, starts, mode="sum",
                                         per_sample_weights=weights, include_last_offset=True)
        return (x_hat + self.b_dec).float()

    @torch.jit.export
    def reconstruct(self, x):
        """x [..., D] to its reconstruction [..., D], in the units of x."""
        indices, values = self.encode_sparse(x)
        _, mean, std = standardize(x.float(), self.per_token)
        return self.decode_sparse(indices, values, x.numel() // x.shape[-1]).view(x.shape) * std + mean

def torchscript_files(sae, x, dtype):
    """ExportedSAE's archive, and how it differs from the SAE on x [n, D]. RuntimeError if by too much.

    flipped: entries active in one of the two alone; largest_difference: of the other entries.
    """
    file, pairs, version = io.BytesIO(), [], platform.python_version()
    with explained(f"torch {torch.__version__} makes no TorchScript under Python {version}; take Python 3.13 "
                   "or older, or one of the other formats", Unavailable):
        scripted = torch.jit.script(ExportedSAE(sae, dtype).eval())
    data = scripted.save_to_buffer(_extra_files={"config.json": config_json(sae.config)})
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for part in old.infolist():
            if not part.filename.endswith(".debug_pkl"):  # they hold the path and source of this file
                new.writestr(part, old.read(part))
    encoder = torch.jit.load(io.BytesIO(file.getvalue()))
    for part in x.split(256):
        both = torch.stack([sae.encode(part), encoder(part)])
        pairs.append(both[:, both.any(0)])
    f, found = torch.cat(pairs, 1)  # [m]: the entries that are active in either
    flips = (f == 0) | (found == 0)
    difference = (found - f).masked_fill(flips, 0.0)
    few = sae.encode(x[:256])
    decoded, expected = encoder.decode(few), sae.decode(few)
    tolerance = 1e-3 if dtype == torch.float32 else 0.05  # float16 flips entries close to θ
    if not (difference.norm() <= tolerance * f.norm() and flips.sum() <= 1 + tolerance * len(f)
            and (decoded - expected).norm() <= tolerance * expected.norm()):
        raise RuntimeError(f"the exported file differs from the SAE, by up to {difference.abs().max():g}")
    compared = {"flipped": int(flips.sum()), "largest_difference": float(difference.abs().max())}
    return {"": file.getvalue()}, {"exported_l0": int((found != 0).sum()) / len(x), **compared}

def saelens_files(sae, *_):
    """SAELens's layout, version 6: cfg.json and sae_weights.safetensors."""
    from safetensors.torch import save
    cfg, topk = sae.config, sae.config.activation == "topk"
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors |= {} if topk else {"threshold": sae.get_theta().expand(cfg.n_latents)}
    metadata = dict(sae_lens_version="6.0.0", training_architecture=cfg.activation,
                    model_from_pretrained_kwargs={})
    if isinstance(cfg, RunConfig):  # a Config does not say what the SAE reads
        metadata |= dict(model_name=cfg.model, hf_hook_name=cfg.module or None,
                         model_class_name="AutoModelForCausalLM" if cfg.module else "HookedTransformer",
                         hook_name=cfg.module or f"blocks.{cfg.layer}.hook_{cfg.site}",
                         context_size=cfg.context, prepend_bos=cfg.prepend_bos, dataset_path=cfg.dataset,
                         seqpos_slice=[1, None] if cfg.skip_special else [None],
                         exclude_special_tokens=cfg.skip_special, norm_limit=cfg.norm_limit or None)
    described = dict({"architecture": "topk", "k": int(cfg.k)} if topk else {"architecture": "jumprelu"},
                     d_in=cfg.d_model, d_sae=cfg.n_latents, dtype="float32", device="cpu",
                     apply_b_dec_to_input=True, reshape_activations="none", metadata=metadata,
                     normalize_activations="layer_norm" if cfg.normalize == "token" else "none")
    weights = save({name: t.detach().contiguous() for name, t in tensors.items()})
    return {"cfg.json": json.dumps(described, indent=2).encode(), "sae_weights.safetensors": weights}, {}

def dictionary_learning_files(sae, *_):
    """The layout of dictionary_learning: config.json and ae.pt."""
    cfg, topk = sae.config, sae.config.activation == "topk"
    fits = cfg.normalize == "scale" and cfg.activation != "jumprelu" and cfg.k % 1 == 0
    check(fits, "this format holds one θ, a whole k and no standardised tokens; use saelens")
    tensors = {"b_dec": sae.b_dec, "encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc,
               "decoder.weight": sae.W_dec.T, "k": torch.tensor(int(cfg.k), dtype=torch.int32),
               "threshold": torch.full_like(sae.theta, -1.0) if topk else sae.theta}
    file = io.BytesIO()
    torch.save({name: t.detach().contiguous() for name, t in tensors.items()}, file)
    trainer = dict(trainer_class="TopKTrainer" if topk else "BatchTopKTrainer", k=int(cfg.k),
                   dict_class="AutoEncoderTopK" if topk else "BatchTopKSAE", activation_dim=cfg.d_model,
                   dict_size=cfg.n_latents)
    described = {"trainer": trainer, "buffer": {}}
    if isinstance(cfg, RunConfig):
        trainer |= dict(layer=cfg.layer, lm_name=cfg.model, submodule_name=cfg.module or cfg.site)
        described["buffer"] = dict(ctx_len=cfg.context, prepend_bos=cfg.prepend_bos,
                                   remove_bos=cfg.skip_special, norm_limit=cfg.norm_limit or None)
    return {"config.json": json.dumps(described, indent=2).encode(), "ae.pt": file.getvalue()}, {}

FORMATS = {"torchscript": torchscript_files, "saelens": saelens_files,
           "dictionary-learning": dictionary_learning_files}

@torch.no_grad()
def export(sae: SAE, path: str | os.PathLike, x: Tensor | None = None, *, format: str = "torchscript",
           dtype: str = "float32", overwrite: bool = True) -> dict:
    """Write the inference form for other programs: a TorchScript file, or a folder that other packages load.

    A TorchScript file has ExportedSAE's methods and an extra file config.json, and is compared with the SAE.
    Args: x [n, D], activations to compare on, by default made up; format, one of FORMATS; dtype, float16 for
        half the size, in which only θ stays float32; overwrite, whether files that exist may be replaced.
    Returns: tokens and l0 of x; for TorchScript also what torchscript_files compares.
    Raises: Unavailable if θ was never estimated; InputError for an SAE that cannot come from training, one
        that the format cannot hold, or a path in use; RuntimeError if the file gives something else.
    """
    check_choice("format", format, FORMATS)
    others = ("float16",) if format == "torchscript" else ()  # other formats would round θ too
    check_choice("dtype", dtype, ("float32", *others))
    sae = copy.deepcopy(sae).float().cpu()
    theta = sae.get_theta()
    if x is None:  # sums of k decoder rows, each as long as an active entry is
        generator, size = torch.Generator().manual_seed(0), (256, math.ceil(sae.config.k))
        latents = torch.randint(len(sae.b_enc), size, generator=generator)
        x = sae.b_dec + 2 * theta.mean() * sae.W_dec[latents].sum(1)
    x = x.cpu()
    active = len(sae.encode_sparse(x)[1])
    for fine, what in [(all(t.isfinite().all() for t in sae.parameters()), "weights that are not finite"),
                       ((sae.W_dec.norm(dim=1) - 1).abs().max() < 0.01, "decoder rows without norm 1"),
                       (theta.isfinite().all() and theta.min() > 0, f"a threshold of {theta.min():g}")]:
        check(fine, f"the SAE has {what}; no training leaves that")
    check(active, "no latent is active on x: x, the SAE or its θ is wrong")
    with warnings.catch_warnings(action="ignore"):  # TorchScript is frozen, hence stable; torch warns of it
        files, compared = FORMATS[format](sae, x, getattr(torch, dtype))
    files = {Path(path, name): data for name, data in files.items()}
    for file in files:
        check_replaceable(file, overwrite)
    for file, data in files.items():
        write_atomically(file, data)
    return {"tokens": len(x), "l0": active / len(x), **compared}

def check_replaceable(path, overwrite):
    """InputError unless a file can be written here without destroying what should be kept."""
    regular = path.is_file() and not path.is_symlink()
    check(regular or not os.path.lexists(path), f"{str(path)!r} is not a regular file; give another path")
    run = [*path.parent.glob("sae.safetensors"), *path.parent.glob("state*.safetensors")]
    own = run and path.suffix in (".json", ".jsonl", ".safetensors")
    check(not own, f"{str(path)!r} could be a file of a run; give another path")
    check(overwrite or not path.exists(), f"{str(path)!r} exists; give another path, or --force")

# Files

def write_atomically(path, data):
    """Readers see the old file or the new one, whole. A failure is an OSError that names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None

def save_tensors(path, tensors, config):
    """Write a safetensors file with a checksum of the tensors and of the configuration's text."""
    from safetensors.torch import save
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, save(tensors, {"sha256": checksum(tensors, config)}))

def load_tensors(path, config):
    """Read such a file. InputError if anything in it, or its configuration, was changed."""
    from safetensors import safe_open
    with explained(f"{str(path)!r} is damaged, is of another version, or does not belong to its config.json"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            if file.metadata()["sha256"] != checksum(tensors, config):
                raise ValueError("checksum")
    return tensors

def checksum(tensors, config):
    """SHA-256 of a configuration's text and of tensors, with their names, dtypes and shapes."""
    digest = hashlib.sha256(config.encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

def trainer_state(trainer):
    """All that steps change: copies of the trainer's numbers, and its tensors themselves."""
    numbers, adam = {}, {}
    for name, value in vars(trainer).items():
        if name not in ("cfg", "device", "sae", "adam"):
            assert isinstance(value, (int, float, Tensor)), f"{name} is a {type(value)}: not saved"
            numbers[name] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    for name, state in trainer.adam.items():
        adam |= {f"{name}.{part}": t for part, t in zip(("mean", "square", "count"), state)}
    parameters, buffers = dict(trainer.sae.named_parameters()), dict(trainer.sae.named_buffers())
    return {**numbers, **{name: t.detach() for name, t in (parameters | buffers).items()}, **adam}

# Saving, loading, precision: methods that SAE gets here

def config_json(cfg: Config) -> str:
    """The text of config.json."""
    return json.dumps(dataclasses.asdict(cfg), indent=2)

def save_sae(sae: SAE, folder: str | os.PathLike):
    """Write config.json and sae.safetensors into `folder`, each whole or not at all."""
    text, tensors, folder = config_json(sae.config), sae.processes.all_latents(sae.state_dict()), Path(folder)
    if sae.processes.rank == 0:
        save_tensors(folder / "sae.safetensors", tensors, text)
        write_atomically(folder / "config.json", text.encode())

@torch.inference_mode(False)
def load_sae(folder: str | os.PathLike, device: str = "cpu") -> SAE:
    """Read what save_sae wrote. Unavailable if there is nothing, InputError if it is damaged."""
    (cfg, text), path = load_config(Path(folder)), Path(folder) / "sae.safetensors"
    said = f"{str(folder)!r} is unfinished; continue it with `train --resume {str(folder)!r}`"
    check(path.is_file(), said, Unavailable)
    tensors = load_tensors(path, text)
    sae = sae_class(cfg)(cfg)
    sae.load_state_dict(tensors)
    return sae.to(device)

def convert_(sae: SAE, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SAE:
    """What to() and half() call. Thresholds stay in float32: bfloat16 would move θ by up to 0.4 %."""
    exact = {name: t for name, t in sae.state_dict().items() if name in ("theta", "log_threshold")}
    nn.Module._apply(sae, fn, recurse)
    for name, t in exact.items():
        getattr(sae, name).data = t.to(sae.W_dec.device)
    return sae

SAE.save, SAE.load, SAE._apply = save_sae, staticmethod(load_sae), convert_

def load_config(folder: Path) -> tuple[Config, str]:
    """The configuration of a saved SAE, and its text, which the checksum of the SAE includes.

    Unavailable if there is none, InputError if it is damaged or older.
    """
    path = folder / "config.json"
    check(path.is_file(), f"{str(folder)!r} holds no run", Unavailable)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        kind = RunConfig if "model" in values else Config
        known = {field.name for field in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in BEFORE.items() if name in known} | values), text
    except Exception as error:
        raise InputError(f"{str(path)!r} was not written by this version of batchtopk: {error}") from None

# ---- 13. Several processes: torchrun -------------------------

# Every process trains its share of the latents on all tokens of the batch. Weights, gradients and moments are
# never sent, only activations, the largest values and reconstructions. In the auxiliary loss each process
# takes its share of k_aux from its own dead latents.

class Processes:
    """Those that share an SAE's latents. One alone has them all: what it sums or gathers is its own."""
    rank, size = 0, 1

    def join(self, device: str):
        """Under torchrun, join the others: NCCL on GPUs, one for each, otherwise gloo."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or self.size > 1:
            return
        cuda = device == "cuda" or device == "auto" and torch.cuda.is_available()
        local = int(os.environ["LOCAL_RANK"])
        if device not in ("auto", "cpu", "cuda") or cuda and local >= torch.cuda.device_count():
            raise InputError(f"device is {device!r}; several processes need cpu, or cuda and a GPU for each")
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def share(self, cfg: Config) -> slice:
        """The latents of this process."""
        if self.size > 1 and (cfg.n_latents % self.size or cfg.step == "plain"):
            raise InputError(f"{self.size} processes share n_latents = {cfg.n_latents} only if it is a "
                             f"multiple of {self.size}, and do not train with --step plain")
        n = cfg.n_latents // self.size
        return slice(self.rank * n, (self.rank + 1) * n)

    def keep_share_(self, sae: SAE) -> SAE:
        """Reduce a new SAE to the latents of this process."""
        if self.size > 1:
            share = self.share(sae.config)
            for name, t in sae.state_dict().items():
                if name not in ("b_dec", "theta"):
                    getattr(sae, name).data = t[share].clone()
            sae.processes = self
        return sae

    def sum_(self, t: Tensor) -> Tensor:
        """The sum of the processes' tensors, in place. Its gradient is that of the own part."""
        if self.size > 1:
            with explained("another process of this run has ended, or cannot be reached", Unavailable):
                dist.all_reduce(t.data)
        return t

    def gather(self, t: Tensor) -> Tensor:
        """[size, …]: the tensors of all processes, of one shape."""
        if self.size == 1:
            return t[None]
        places = t.new_zeros(self.size, *t.shape)
        places[self.rank] = t
        return self.sum_(places)

    def total(self, number) -> float:
        if self.size == 1:
            return float(number)
        return float(self.sum_(torch.tensor(number, dtype=torch.float64)))

    def largest(self, index, value, n: int, n_rows: int = 0):
        """This process's part of the n largest entries; each brings its own n largest, or fewer. With n_rows
        they are the n largest of each row."""
        if self.size == 1:
            return index, value
        if n_rows:
            place = row_places(index % n_rows, n_rows, n)
            values = self.gather(functional.pad(value, [0, 1])[place])  # [size, B, n]; 0 is padding
            values = values.transpose(0, 1).flatten(1)
            best = values.argsort(dim=1, descending=True, stable=True)[:, :n] - self.rank * n
            mine = place.gather(1, best.clamp(0, n - 1))[(best >= 0) & (best < n)]
            mine = mine[mine < len(value)].sort().values
            return index[mine], value[mine]
        values = self.gather(functional.pad(value, [0, n - len(value)])).flatten()  # 0 is padding
        best = values.argsort(descending=True, stable=True)[:n] - self.rank * n  # stable: the same for all
        mine = best[(best >= 0) & (best < len(value))].sort().values
        return index[mine], value[mine]

    def all_latents(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state_dict in process 0's memory with the latents of all; in the others with their own."""
        if self.size == 1:
            return state
        for name, mine in state.items():
            if name not in ("b_dec", "theta"):
                latents = self.gather(mine.cpu()).flatten(0, 1)
                state[name] = mine if self.rank else latents
        return state

SAE.processes = Processes()  # a whole SAE, as load gives it; keep_share_ sets that of a share
processes = Processes()  # those that torchrun started
