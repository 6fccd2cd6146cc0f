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

    sae = train(Config(d_model=512, n_latents=4096, k=32), batches)      # any iterable of shuffled tensors
    f = sae.encode(x)                                                    # [..., 512] -> [..., 4096]

Part one is the method. With step="plain" it needs of part two only the helpers at its start, to save and load
section 12, and SAE.processes, which is one unless torchrun is used. Part two is what makes it fast and
practical: the sparse step (the default), rival methods, activations of a language model, evaluation, export.
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
    normalize: str = option("scale", "scale: biases' learning rates times x's deviation")  # or as in part two
    max_norm: float = option(4, "leave out tokens whose norm is over this multiple of the median; 0: none")
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
    step: str = option("sparse", "sparse is fast, plain is autograd; equal but for rounding")  # of STEPS
    encoder_dtype: str = option("auto", "precision of the sparse encoder product; auto: bfloat16 if fast")
    eval_tokens: int = option(65_536, "held-out tokens for θ (in train: at most); as many to evaluate", low=1)
    seed: int = option(0, "seed of weights and shuffling", high=2**63 - 1)
    device: str = option("auto", "cpu, cuda, cuda:1 …; auto takes a GPU if there is one")

    def __post_init__(self):
        check_config(self)  # also what must fit together, as beta1² < beta2 < 1

    def n_kept(self, n_tokens: int) -> int:
        """How many entries are kept of a batch: k for each of its tokens, rounded down, but at least 1."""
        return max(1, int(self.k * n_tokens + 1e-6))  # 0.29 · 100 is 28.999… in binary

# ---- 2. Selection: BatchTopK and TopK ------------------------

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
    """A BatchTopK sparse autoencoder. Part two has other kinds of SAE, which replace some of its methods."""
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
        self.found = Found()  # what training found out about its data, as the limit of their norms

    @own_precision
    def pre_activations(self, x: Tensor) -> Tensor:
        """Z = (x - b_dec) W_encᵀ + b_enc: [B, D] -> [B, F], in float32 whatever dtype the weights have."""
        return functional.linear(x.float() - self.b_dec.float(), self.W_enc.float(), self.b_enc.float())

    def get_theta(self) -> Tensor:
        """θ, which an entry must exceed at inference. Unavailable if it was never estimated."""
        check(not self.theta.isnan(), 'θ was never estimated; calibrate, or select by "batch"', Unavailable)
        return self.theta

    def selection_for(self, asked: str) -> str:
        """How this kind of SAE selects where "theta", "batch" or "topk" is asked for: here just that."""
        return check_choice("selection", asked, ("theta", "batch", "topk"))

    def training_selection(self, tokens_seen: int) -> str:
        """How a step selects after so many tokens: "topk" at the start of a run, then "batch"."""
        return "topk" if tokens_seen < self.config.topk_start * self.config.tokens else "batch"

    def select(self, z: Tensor, selection: str) -> Tensor:
        """Zero all of Z [B, F] but the active entries. selection: as for encode."""
        if selection == "topk":
            return row_topk(z, row_k(self.config))
        if selection == "batch":
            return batch_topk(z, self.config.n_kept(len(z)))
        return z.masked_fill(z <= self.get_theta(), 0.0)  # not where(z > θ, z, 0): NaN stays in sight

    def as_rows(self, x: Tensor) -> Tensor:
        """Activations x [..., D] as tokens [B, D] in the weights' dtype, on their device, and normalised."""
        check_activations(x, len(self.b_dec))
        return normalized(self.config, x.reshape(-1, x.shape[-1]).to(self.W_enc))

    def encode(self, x: Tensor, selection: str = "theta") -> Tensor:
        """Activations x [..., D], of any float dtype, to latents f [..., F]. selection: "batch", of all rows,
        or "topk", in each, as in training; or "theta", Z · 1[Z > θ], where rows do not depend on each other.
        InputError for another D, dtype or selection; Unavailable where θ is needed and not estimated."""
        f = self.select(self.pre_activations(self.as_rows(x)), self.selection_for(selection))
        return f.to(self.W_enc.dtype).view(*x.shape[:-1], f.shape[-1])

    def encode_sparse(self, x: Tensor, selection: str = "theta") -> tuple[Tensor, Tensor]:
        """What encode keeps: (row, latent) [2, m] int64, ascending, x being rows [B, D]; values [m]."""
        return active_entries(self, x, self.selection_for(selection))

    @own_precision
    def decode(self, f: Tensor) -> Tensor:
        """X̂ = f W_dec + b_dec: latents [..., F] to reconstructions [..., D]."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor, selection: str = "theta") -> Tensor:
        """The reconstruction of x [..., D], in its units. Arguments and errors are those of encode."""
        return restored(self.config, self.decode(self.encode(x, selection)), x)

    def is_dead(self) -> Tensor:
        """Which latents [F] have been silent for config.dead_tokens tokens or more."""
        return self.tokens_since_fired >= self.config.dead_tokens

    def seen(self, x: Tensor) -> Tensor:
        """Whether tokens x [..., D] are of a size that training kept: bool [...]. See Config.max_norm."""
        return x.float().norm(dim=-1) <= (self.found.norm_limit or math.inf)

    def loss(self, x: Tensor, selection: str = "batch") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(L, mse, L_aux, f) of as_rows' x [B, D]: mse = mean ‖X - X̂‖², L = mse + α · L_aux (paper, 3)."""
        f = self.select(self.pre_activations(x), self.selection_for(selection))
        residual = x - self.decode(f)
        mse = residual.square().sum(1).mean()
        aux = auxiliary_loss(self, x, residual.detach())
        return mse + self.config.aux_coef * aux, mse, aux, f

    def learn_thresholds_(self, trainer: Trainer, stats: StepStats):
        """θ = E[threshold of a batch] (paper, equation 4), a running average; `train` ends with calibrate."""
        if stats.l0:
            trainer.last_threshold = stats.threshold
            rate = running_rate(THETA_RATE, trainer.steps)  # 1 at first, when θ is NaN and would stay so
            self.theta.nan_to_num_(stats.threshold).mul_(1 - rate).add_(rate * stats.threshold)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> float:
        """Set θ to the mean threshold of held-out batches, the smallest entry kept of each, and return it.
        For each token alone, θ keeps about k entries on average. batches: any iterable of tensors [n, D], cut
        into batches of B; a smaller rest and tokens that are too large (Config.max_norm) are left out.
        InputError if no entry is positive."""
        batches = batches_for(self, batches)
        minima = [(len(x), smallest(self, self.encode_sparse(x, "batch")[1])) for x in batches]  # ∞: none
        thresholds = [least for n, least in minima if n == minima[0][0] and least < math.inf]
        theta = check_theta(sum(thresholds) / max(1, len(thresholds)))  # 0 if there is none
        self.theta.fill_(theta)
        return theta

    def step_entries(self, centred: Tensor, hint, dtype: torch.dtype, selection: str) -> StepEntries:
        """The entries that the sparse step keeps of x - b_dec = centred. hint, dtype: see find_entries."""
        return kept_entries(self, centred, hint, dtype, selection)

    def save(self, folder: str | os.PathLike):
        """Write config.json and sae.safetensors into a folder, each whole or not at all."""
        save_sae(self, folder)

    @staticmethod
    def load(folder: str | os.PathLike, device: str = "cpu") -> SAE:
        """What save or SAELens wrote; its weights take no gradients. Unavailable; InputError if damaged."""
        return load_sae(folder, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SAE:
        """What to() and half() call. Thresholds stay in float32: bfloat16 would move θ by up to 0.4 %."""
        return in_float32(self, super()._apply, fn, recurse)

# ---- 4. Loss -------------------------------------------------

AUX_SHARE = 1 / 192  # ours, for speed: L_aux computes at most this share of Z, but always one token

def auxiliary_loss(sae: SAE, x: Tensor, residual: Tensor) -> Tensor:
    """L_aux (Gao et al. 2024; paper, section 3): dead latents reconstruct what the live ones left over.

        e = X - X̂,  ê = (the k_aux largest Z of the dead latents, per token) W_dec,  L_aux = mean ‖e - ê‖²

    for x and a detached residual e [B, D]: live latents get no gradient, b_dec does. No ReLU, unlike the
    authors: a latent with negative Z on all tokens would get none. If many are dead only the first tokens are
    used (x is taken to be shuffled).
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

def batch_threshold(f: Tensor, selection: str) -> float:
    """The smallest positive entry of f [B, F], ∞ if there is none; for "topk" the mean of the rows'."""
    groups = f if selection == "topk" else f.reshape(1, -1)
    least = groups.masked_fill(groups <= 0, math.inf).amin(1)
    return float(least[least < math.inf].mean().nan_to_num(math.inf))  # NaN: the mean of none

THETA_RATE = 0.01  # weight of a new batch in the running average, SAE.learn_thresholds_

def running_rate(rate, n):
    """Weight of the n-th value (n a number or a tensor) in a bias-corrected average: 1, falling to `rate`."""
    return rate / (1 - (1 - rate) ** n)

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
    """Trains one SAE step by step. normalize="scale" makes that independent of the size of x: Adam's steps
    have the size of the learning rate, whatever the loss. Weights have no unit (f has that of x), but biases
    have that of x, so their learning rate is multiplied by x_std, its deviation per coordinate."""
    @torch.inference_mode(False)  # tensors that are made in it cannot be changed later
    def __init__(self, cfg: Config, sae: SAE | None = None):  # by default a new one
        self.cfg, self.device = cfg, resolve_device(cfg.device)
        self.sae = sae_for(cfg, sae).to(self.device).requires_grad_()
        self.tokens_seen, self.steps = 0, 0  # steps: of the present selection, for θ's average
        self.x_std = self.variance = 0.0  # deviation per coordinate; variance summed over D; 0: not known yet
        self.last_threshold = 0.0  # of the last batch: the sparse step's search begins near it
        self.n_fired = torch.zeros_like(self.sae.tokens_since_fired)  # on how many tokens, of all seen
        self.adam = {name: adam_state(p.data) for name, p in self.sae.named_parameters()}
        self.cache = Cache()  # what the sparse step remembers; nothing is lost without it

    @torch.no_grad()
    def initialize_(self, x: Tensor):
        """Set x_std, variance and, if it is 0, b_dec from x [n, D]. If nobody did, the first step does it."""
        x = self.sae.as_rows(x)
        variance = float((x - x.mean(0)).square().sum(1).mean())
        check_trainable(variance, x, self.cfg)
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
        selection = self.sae.training_selection(self.tokens_seen)
        stats = STEPS[self.cfg.step](self, self.sae.as_rows(x), selection)
        self.tokens_seen += len(x)
        self.steps += 1
        self.sae.learn_thresholds_(self, stats)
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
    def update_rows_(self, name: str, g: Tensor, rows: Tensor | slice = slice(None)):
        """Lazy Adam (paper: Adam): step the rows of a parameter that got a gradient, g [r, …], and no others.
        On all rows it would shrink a rare latent's moments to nothing between two tokens that it fires on."""
        stored = [getattr(self.sae, name).data, *self.adam[name]]  # W, mean, square, count
        taken = [t[rows] for t in stored]  # copies, put back below (for a slice views: no harm)
        self.adam_(name, g, *taken)
        for old, new in zip(stored, taken):
            old[rows] = new

    def adam_rates(self, name: str) -> tuple[float, float]:
        """Its factor on the learning rate, and ε in its gradient's unit: x² for weights, x for biases."""
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

def plain_step(trainer: Trainer, x: Tensor, selection: str) -> StepStats:
    """One step on x [B, D], as SAE.as_rows gives it."""
    sae = trainer.sae
    total, mse, aux, f = sae.loss(x, selection)
    check_finite(mse.item(), trainer.tokens_seen)  # before anything is changed
    names, parameters = zip(*sae.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(total * loss_scale(trainer.x_std), parameters)))
    learning = gradients["W_dec"].any(1).nonzero().squeeze(1)  # others: neither active nor in L_aux
    for name, g in gradients.items():
        rows = learning if name in ("W_enc", "W_dec", "b_enc") else slice(None)
        trainer.update_rows_(name, g[rows], rows)
    active = f > 0
    sae.tokens_since_fired.add_(len(x)).masked_fill_(active.any(0), 0)
    trainer.n_fired += active.sum(0)
    return StepStats(total.item(), mse.item(), aux.item(), mse.item() / trainer.variance,
                     int(active.sum()) / len(x), int(sae.is_dead().sum()),
                     batch_threshold(f.detach(), selection), trainer.learning_rate())

# By Config.activation and Config.step. Part two adds other kinds, and the sparse step, which is the default
SAES, STEPS = {"batchtopk": SAE}, {"plain": plain_step}

def train(cfg: Config, batches: Iterable[Tensor], on_step=lambda tokens, stats: False) -> SAE:
    """Train an SAE on cfg.tokens tokens and calibrate its θ on held-out ones.

    batches: any iterable of float tensors [n, D] of any n, shuffled. First some tokens are set aside for
    b_dec, x_std, the limit of max_norm and θ: 5 % of cfg.tokens (of a list, if it is shorter), at most
    cfg.eval_tokens, at least a batch. A generator has to give cfg.tokens after these that are not too large;
    a list starts again when it ends, without them.
    on_step(tokens seen, [StepStats]) is called after each step; True ends training. InputError if the batches
    end early, or if nothing can be learnt from them.
    """
    trainer = Trainer(cfg)
    held_out, others = set_aside(cfg, batches, trainer.device)
    limit = find_limit_(trainer.sae, check_given(held_out, 0, cfg.tokens))
    trainer.initialize_(torch.cat([*leave_out(held_out, limit)]))
    stream = rebatch(others(limit), cfg.batch_size, trainer.device)
    while trainer.tokens_seen < cfg.tokens:
        x = check_given(next(stream, None), trainer.tokens_seen, cfg.tokens)
        stats = trainer.step(x[: cfg.tokens - trainer.tokens_seen])
        if on_step(trainer.tokens_seen, [stats]):
            break
    trainer.sae.calibrate(held_out)
    return trainer.sae

# ==================== Part two: fast and practical ====================
# ---- What both parts use: checks, devices, batches -----------

def check_choice(name, value, accepted):
    """The value; InputError unless it is one of those accepted."""
    check(value in tuple(accepted), f"{name} is {value!r}; choose one of: {', '.join(accepted)}")
    return value

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

def choices_of(field: dataclasses.Field) -> Iterable[str]:
    """The values that a field of text accepts; none means any."""
    tables = {"activation": SAES, "normalize": ("scale", "token"), "step": STEPS, "encoder_dtype": DTYPES}
    return tables.get(field.name, field.metadata["choices"])

def check_config(cfg: Config):
    """InputError for a value that a field does not accept, or values that do not fit together. Numbers become
    int or float: 1e6 and NumPy's, too."""
    for field in dataclasses.fields(cfg):
        name, value, rules = field.name, getattr(cfg, field.name), field.metadata
        if getattr(value, "ndim", None) == 0:  # a number of NumPy's or torch's
            value = value.item()
            object.__setattr__(cfg, name, value)
        if choices_of(field):
            check_choice(name, value, choices_of(field))
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
    """The power of two by which a step multiplies the loss before its gradients are taken, and ε with it.

    It is 1 for usual activations. float32 cannot hold the squares of gradients of very small or large ones.
    """
    return 4.0 ** (-16 * int(math.log2(x_std) / 16))

def check_trainable(variance: float, x: Tensor, cfg: Config):
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

def check_finite(mse: float, tokens_seen: int):
    """InputError unless a step's error is a number."""
    check(math.isfinite(mse), f"loss {mse} at token {tokens_seen}: x is not finite, or lr is too high")

def check_kind(cfg: Config, sae: SAE) -> Config:
    """cfg, if it is one for SAEs of this class."""
    kind = next(kind for kind in type(sae).__mro__ if kind in SAES.values())  # the user's own: its base's
    check(kind is SAES[cfg.activation], f"{type(sae).__name__} does not fit activation {cfg.activation}; "
          "make_sae(config) gives the right class")
    return cfg

@torch.inference_mode(False)  # weights made in inference mode could not be trained
def make_sae(cfg: Config) -> SAE:
    """A new SAE of the class for cfg."""
    return SAES[cfg.activation](cfg)

def sae_for(cfg: Config, sae: SAE | None) -> SAE:
    """The SAE, which gets this configuration, or a new one. InputError if it is of another kind or size."""
    if sae is None:
        return make_sae(cfg)
    fits = (sae.config.n_latents, sae.config.d_model) == (cfg.n_latents, cfg.d_model)
    check(fits, f"the SAE has {sae.config.n_latents} latents of width {sae.config.d_model}; give these")
    sae.config = check_kind(cfg, sae)
    return sae

def loss(sae: SAE, x: Tensor, selection: str = "batch") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SAE.loss as a function."""
    return sae.loss(x, selection)

def calibrate(sae: SAE, batches: Iterable[Tensor]) -> float:
    """SAE.calibrate as a function."""
    return sae.calibrate(batches)

@dataclass(frozen=True)
class Found:
    """What a run finds out, and its SAE keeps: the block "found" of config.json."""

    norm_limit: float = 0.0  # tokens of a larger norm were left out; 0: none
    begin_token: bool = True  # whether the tokenizer has one
    pass_contexts: int = 0  # how many contexts the model read at a time; 0: not known

class Cache(dict):
    """What may be forgotten. It holds for one trainer alone: a copy of a trainer begins with an empty one."""

    def __reduce__(self):
        return Cache, ()

def row_k(cfg: Config) -> int:
    """How many entries each token keeps by "topk": a whole number."""
    return max(1, round(cfg.k))

@own_precision
@torch.no_grad()
def active_entries(sae: SAE, x: Tensor, selection: str) -> tuple[Tensor, Tensor]:
    """SAE.encode_sparse. There is no matrix [B, F] unless config.step is "plain"."""
    if sae.config.step == "sparse":
        return sparse_encoding(sae, x, selection)
    f = sae.select(sae.pre_activations(sae.as_rows(x)), selection)
    return f.nonzero().T, f[f != 0].float()

def standardize(x, per_token: bool):
    """(x', mean, std) with x = x'·std + mean: tokens standardised as in the authors' code, or x itself."""
    if not per_token:
        return x, torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
    return (x - mean) / std, mean, std

def normalized(cfg: Config, x: Tensor) -> Tensor:
    """What an SAE reads of activations x [..., D]: for normalize="token" each token standardised."""
    return standardize(x, cfg.normalize == "token")[0]

def restored(cfg: Config, x_hat: Tensor, x: Tensor) -> Tensor:
    """What SAE.decode gives, x_hat [..., D], in the units of x [..., D]."""
    if cfg.normalize == "scale":
        return x_hat
    _, mean, std = standardize(x.to(x_hat), True)
    return x_hat * std + mean

def in_float32(sae: SAE, convert: Callable, fn: Callable[[Tensor], Tensor], recurse: bool) -> SAE:
    """SAE._apply: convert(fn, recurse), which may round; thresholds get their values back, on its device."""
    exact = {name: t for name, t in sae.state_dict().items() if name in ("theta", "log_threshold")}
    convert(fn, recurse)
    for name, t in exact.items():
        getattr(sae, name).data = t.to(sae.W_dec.device)
    return sae

def adam_state(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of a parameter the mean, the mean square and the number of its gradients: zeros at first.

    [F, D], [F, D] and [F, 1] for a matrix; for a vector each entry is a row.
    """
    return torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p[:, :1] if p.ndim == 2 else p)

def smallest(sae: SAE, values: Tensor) -> float:
    """The smallest of the values, of all processes that share the SAE (section 13); ∞ if there is none."""
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

def leave_out(chunks: Iterable[Tensor], norm_limit: float) -> Iterator[Tensor]:
    """Tensors [..., D] as tokens [n, D], without those whose norm exceeds a limit that is not 0."""
    for chunk in [chunks] if isinstance(chunks, Tensor) else chunks:
        x = chunk.reshape(-1, chunk.shape[-1])
        if norm_limit:
            x = x[~(x.float().norm(dim=1) > norm_limit)]  # a NaN stays, so that it is noticed
        if len(x):
            yield x

def batches_for(sae: SAE, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches [B, D] on the SAE's device, of the tokens that are not too large for it."""
    batches = leave_out(batches, sae.found.norm_limit)
    return rebatch(batches, sae.config.batch_size, sae.W_dec.device)

def set_aside(cfg: Config, batches: Iterable[Tensor], device: torch.device):
    """Held-out batches for train, and a function of a norm limit that gives all other tokens.

    A list that is shorter than the run gives 5 % of its own tokens. When it starts again these are left out;
    if there are no others they are trained on, too, with a warning.
    """
    n_tokens, batches = cfg.tokens, [batches] if isinstance(batches, Tensor) else batches
    if isinstance(batches, (list, tuple)):
        n_tokens = min(n_tokens, sum(x.numel() // cfg.d_model for x in batches))
    n = max(1, min(cfg.eval_tokens, n_tokens // 20) // cfg.batch_size)
    first = rebatch(batches, cfg.batch_size, device)
    held_out, one_more = list(itertools.islice(first, n)), list(itertools.islice(first, 1))

    def from_the_start():
        if not one_more:
            warnings.warn(f"the batches hold {sum(map(len, held_out)):,} tokens: θ is calibrated on tokens "
                          "that are trained on")
        return itertools.islice(rebatch(batches, cfg.batch_size, device), n if one_more else 0, None)

    def others(norm_limit):  # which is applied to each pass: one that gives nothing is the last
        yield from leave_out(itertools.chain(one_more, first), norm_limit)
        yield from repeat(lambda: leave_out(from_the_start(), norm_limit))

    return held_out, others

class LeftOut(NamedTuple):
    """What a limit on norms leaves out of activations."""
    norm_limit: float
    tokens: float  # share of the tokens
    variance: float  # share of the variance of all

def outliers(x: Tensor, max_norm: float) -> LeftOut:
    """The limit of norms for a run whose first activations are x [n, D]: max_norm times their median norm.

    In many models a few tokens, mostly near the beginning, have norms a hundred times as large as the others'
    (Sun et al. 2024, "Massive activations"). They would take a batch's latents for themselves.
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

def find_limit_(sae: SAE, batches: list[Tensor]) -> float:
    """Find the limit of max_norm from a run's first batches, say what it leaves out; the SAE keeps it."""
    x = torch.cat(batches)
    check_activations(x, sae.config.d_model)
    check_tokens(x, "x is", "")
    if sae.config.max_norm:
        limit, tokens, variance = outliers(x, sae.config.max_norm)
        sae.found = dataclasses.replace(sae.found, norm_limit=limit)
        if tokens:
            warnings.warn(f"tokens whose norm is over {limit:.4g} are left out, {tokens:.2%} of the first, "
                          f"with {variance:.1%} of the variance; max_norm says so")
    return sae.found.norm_limit

# ---- 7. The same step, sparse --------------------------------

# Only the encoder product has to be dense. What follows the search touches the N = k·B kept entries alone, a
# thousandth of B·F.
# Four operations do the work: find_entries, dots, sum_rows and update_latents_.

CHUNK_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 26}  # pre-activations held at a time; 16 MiB fit a CPU's cache
UPDATE_ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 26}  # entries of a weight matrix updated at a time
# By how much bfloat16 errs, measured, for rows of W_enc of norms near 1: a share of the product, and one of
# ‖x‖ / √D (where a batch selects, of the root mean square of its norms)
BFLOAT16_ERROR, BFLOAT16_NOISE = 0.006, 0.02
HINT = 0.95  # the search starts at this share of the last step's threshold

class Entries(NamedTuple):
    """Entries of Z or f, [m] each, by latent, then row."""
    latent: Tensor
    row: Tensor  # which token
    value: Tensor

class StepEntries(NamedTuple):
    """What a training step keeps, and what a kind of SAE adds to the loss."""
    entries: Entries
    right: Tensor | None = None  # 1.0 if try_largest found all that it should, else 0.0; None: not tried
    l0_coef: float = 0.0  # the loss has this times l0
    own_gradients: Callable[[Tensor, float], dict[str, Tensor]] = lambda g, scale: {}  # of its own parameters

class StepKind(NamedTuple):
    """What decides, beside the shape of x, which operations a step is made of."""
    selection: str
    n_dead: int  # dead latents of this process; with kernels rounded up to a power of two, so that kinds are
    n_dead_of_all: int  # few: L_aux then has room for so many, and takes as few tokens as for so many
    scale: float  # loss_scale

class StepNumbers(NamedTuple):
    """What a step tells the host, before anything is changed."""
    mse: float
    aux: float
    threshold: float
    n_dead: float  # how many latents of this process will be dead
    right: float  # StepEntries.right

class Gradients(NamedTuple):
    """What a step computes before it changes anything. All gradients are times loss_scale."""
    kept: StepEntries
    centred: Tensor  # x - b_dec
    g: Tensor  # ∂mse/∂X̂ [B, D]
    d_value: Tensor  # ∂mse/∂f of each entry
    d_b_enc: Tensor
    d_b_dec: Tensor
    d_aux: AuxGradient
    starts: Tensor  # group_starts of the entries' latents
    silent: Tensor  # tokens_since_fired after this step
    numbers: Tensor  # StepNumbers

@torch.no_grad()
def sparse_step(trainer: Trainer, x: Tensor, selection: str) -> StepStats:
    """plain_step from the kept entries alone. Under torchrun each process has its own latents."""
    sae, cfg, kind = trainer.sae, trainer.cfg, step_kind(trainer, selection)
    for hint in (HINT * trainer.last_threshold, 0.0):  # the second, without recording, if try_largest failed
        step = find_recording(trainer, x, hint, kind) or DirectStep(trainer, kind)
        numbers, n_entries, l0_coef = step.compute(x, hint)
        of_all = [StepNumbers(*each) for each in sae.processes.gather(numbers).tolist()]  # a GPU's one wait
        check_finite(of_all[0].mse, trainer.tokens_seen)  # before anything is changed
        if of_all[0].right:
            break
    lr = trainer.learning_rate()
    step.change_(lr)
    own, n_dead = of_all[sae.processes.rank], int(sum(each.n_dead for each in of_all))
    remember_dead_(trainer, int(own.n_dead), n_dead)
    l0 = sae.processes.total(n_entries) / len(x)
    total = own.mse + cfg.aux_coef * own.aux + l0_coef * l0
    threshold = min(each.threshold for each in of_all)
    return StepStats(total, own.mse, own.aux, own.mse / trainer.variance, l0, n_dead, threshold, lr)

STEPS["sparse"] = sparse_step

class DirectStep:
    """A step whose operations are launched one by one. RecordedStep has the same methods."""

    def __init__(self, trainer: Trainer, kind: StepKind):
        self.trainer, self.kind = trainer, kind

    def compute(self, x, hint):
        """StepNumbers as a tensor, how many entries are kept, and the coefficient of l0 in the loss."""
        self.new = step_gradients(self.trainer.sae, x, hint, self.kind)
        return self.new.numbers, len(self.new.kept.entries.value), self.new.kept.l0_coef

    def change_(self, lr: float):
        """Change weights, biases and counters."""
        apply_(self.trainer, self.new, lr, self.kind.scale)

def step_kind(trainer, selection) -> StepKind:
    """The kind of the next step."""
    n_dead, n_dead_of_all = count_dead(trainer)
    if n_dead and has_kernels(trainer.sae.tokens_since_fired) and trainer.sae.processes.size == 1:
        n_dead = n_dead_of_all = 1 << (n_dead - 1).bit_length()
    return StepKind(selection, n_dead, n_dead_of_all, loss_scale(trainer.x_std))

def count_dead(trainer) -> tuple[int, int]:
    """How many latents are dead: of this process, and of all.

    Both are known from the step before, so that the host need not wait, if nobody has changed the counters
    since (which must not be done through .data).
    """
    silent = trainer.sae.tokens_since_fired
    counters, version, counts = trainer.cache.get("dead", (None, 0, None))
    if counters is silent and version == silent._version:
        return counts
    n_dead = int(trainer.sae.is_dead().sum())
    return n_dead, int(trainer.sae.processes.total(n_dead))

def remember_dead_(trainer, *counts):
    """Keep what count_dead is to give before the next step."""
    silent = trainer.sae.tokens_since_fired
    trainer.cache["dead"] = silent, silent._version, counts

def step_gradients(sae, x, hint, kind: StepKind) -> Gradients:
    """Loss and gradients of x [B, D]. hint: as for find_entries, or a tensor in a recording."""
    dtype, centred = choose_dtype(sae.config.encoder_dtype, x.device), (x - sae.b_dec).contiguous()
    kept = sae.step_entries(centred, hint, dtype, kind.selection)
    latent, row, value = kept.entries
    row_sorted, order = row.int().sort(stable=True)
    x_hat = sum_rows(sae.W_dec, latent[order], value[order], group_starts(row_sorted, len(x)))
    residual = centred - sae.processes.sum_(x_hat)  # X - X̂: f W_dec summed over entries
    del x_hat, row_sorted, order
    mse = residual.square().sum(1).mean()
    aux, d_aux = auxiliary_gradient(sae, centred, residual, kind)
    # Backward
    g = residual.mul_(-2 / len(x) * kind.scale)  # ∂mse/∂X̂
    d_value = dots(sae.W_dec, g, latent, row)  # ∂mse/∂f = g W_decᵀ
    starts = group_starts(latent, len(sae.b_enc))
    d_b_enc = sum_rows(torch.ones_like(g[:, :1]), row, d_value, starts).view(-1)
    d_b_enc.index_add_(0, d_aux.dead.clamp(max=len(d_b_enc) - 1), d_aux.b_enc)
    d_b_dec = g.sum(0) - sae.processes.sum_(sae.W_enc.T.mv(d_b_enc))  # also L_aux's: it sees b_dec through Z
    # Counters
    silent = (sae.tokens_since_fired + len(x)).masked_fill_(starts.diff() > 0, 0)
    threshold = entries_threshold(sae, kept.entries, len(x), kind.selection)
    n_dead = (silent >= sae.config.dead_tokens).sum(dtype=torch.float32)
    right = torch.ones_like(mse) if kept.right is None else kept.right
    numbers = torch.stack([*StepNumbers(mse, aux, threshold, n_dead, right)])
    return Gradients(kept, centred, g, d_value, d_b_enc, d_b_dec, d_aux, starts, silent, numbers)

def entries_threshold(sae, entries, n_rows, selection):
    """batch_threshold of the entries; for BatchTopK the smallest of this process's alone."""
    if selection != "topk":
        return entries.value.min() if len(entries.value) else entries.value.new_full((), math.inf)
    least = entries.value.new_full((n_rows,), math.inf)
    least = sae.processes.gather(least.scatter_reduce_(0, entries.row, entries.value, "amin")).amin(0)
    none = ~(least < math.inf)
    return (least.masked_fill(none, 0).sum() / (~none).sum()).nan_to_num(math.inf)

def apply_(trainer, new: Gradients, lr, scale):
    """Change weights, biases, counters. lr: a number or a tensor, for kernels; operators ask the trainer."""
    if has_kernels(new.g) and not torch.is_tensor(lr):
        lr = torch.full_like(new.numbers[0], lr)
    own = new.kept.own_gradients(new.g, scale)  # of W_dec as it was
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

def kept_entries(sae, centred, hint, dtype, selection) -> StepEntries:
    """SAE.step_entries."""
    n, per_row = n_selected(sae.config, len(centred), selection), selection == "topk"
    if can_try(sae, centred, hint):
        return try_largest(sae, centred, hint, n, dtype, per_row)
    return StepEntries(find_entries(sae, centred, hint, n, dtype, per_row))

def n_selected(cfg, n_rows, selection) -> int:
    """How many entries are kept: for "topk" of each row."""
    return row_k(cfg) if selection == "topk" else cfg.n_kept(n_rows)

# Operation 1: find entries

@torch.no_grad()
def find_entries(sae, centred, hint, n, dtype=torch.float32, per_row=False) -> Entries:
    """The n largest positive pre-activations of a batch (of each row, if per_row).

    Args: centred, x - b_dec [B, D]; hint, a number where the search begins, which changes nothing in the
        result: if fewer than n exceed it, all is repeated (per_row: not used).
        dtype, of the product. In bfloat16 it only nominates entries: their values are computed again in
        float32, and decide. One could only be missed by an error beyond BFLOAT16_ERROR and BFLOAT16_NOISE.
    """
    for start in (0.0,) if per_row else (hint, 0.0):
        index, value = largest_above(sae, centred, start, n, dtype, per_row)
        if not start or sae.processes.total(len(value)) >= n:
            break
    index, value = sae.processes.largest(index, value, n, len(centred) if per_row else 0)
    return Entries(index // len(centred), index % len(centred), value)

@torch.no_grad()
def entries_above(sae, centred, threshold, dtype=torch.float32) -> Entries:
    """All pre-activations that exceed a threshold: a number, or one for each latent [F]. A NaN counts as
    above, so that it is seen. dtype: see find_entries."""
    threshold = torch.as_tensor(threshold, dtype=torch.float32, device=centred.device).expand(len(sae.b_enc))
    product = Product(sae, centred, dtype, False)
    found = [product.above_(part, z, threshold[part]) for part, z in product.chunks(1)]
    index, value = map(torch.cat, zip(*found))
    if dtype != torch.float32:
        index, value = decided(sae, centred, index, threshold)
    return Entries(index // len(centred), index % len(centred), value)

def largest_above(sae, centred, hint, n, dtype, per_row):
    """The n largest entries above `hint`, or all if they are fewer: index (latent · B + row) and value,
    ascending.

    When more than twice what is wanted is held, only what can be among the n largest stays, and later entries
    must exceed these. So one pass is exact if `hint` is not above the true threshold. With per_row all this
    is done for each row; its threshold begins as the n-th largest of its first 16 n entries.
    """
    n_rows, wanted = len(centred), n * len(centred) if per_row else n
    hint = torch.as_tensor(hint, dtype=torch.float32, device=centred.device).expand(len(sae.b_enc))
    product, threshold, row_threshold = Product(sae, centred, dtype, per_row), hint, None
    index, value = centred.new_empty(0, dtype=torch.int64), centred.new_empty(0)
    rising = not (per_row or hint[0])  # half of all exceed 0: begin with few, so that it rises
    for part, z in product.chunks(4, first=1 + 2 * n // n_rows if rising else None):
        if per_row and not part.start:
            row_threshold = product.row_level(z[: 16 * n], n)
        new = product.above_(part, z, threshold[part], row_threshold)
        index, value = torch.cat([index, new[0]]), torch.cat([value, new[1]])
        if part.stop == len(sae.b_enc) or len(value) > 2 * wanted:
            best, raised = n_largest(index % n_rows, value, product.error(index, value), n, row_threshold)
            index, value = index[best], value[best]
            threshold, row_threshold = (hint, raised) if per_row else (raised.expand(len(hint)), None)
    if dtype != torch.float32:
        index, value = decided(sae, centred, index, hint)
        best, _ = n_largest(index % n_rows, value, None, n, row_threshold)
        index, value = index[best], value[best]
    return index, value

def decided(sae, centred, index, threshold):
    """Of candidates (latent · B + row) those whose pre-activation in float32 exceeds their latent's
    threshold, and these values."""
    latent, row = index // len(centred), index % len(centred)
    value = dots(sae.W_enc.float(), centred, latent, row) + sae.b_enc.float()[latent]
    above = (~(value <= threshold[latent])).nonzero().squeeze(1)  # a mask would wait twice
    return index[above], value[above]

class Product:
    """Z = W_enc columns + rest in a dtype, some latents at a time: columns [D, B], rest [F].

    The errors of bfloat16 grow with ‖x‖, even where the product is small, as where all x share a large part
    that W_enc ignores. So the mean of the batch is left out of the product, and multiplied in float32. What
    error is left besides BFLOAT16_ERROR is `noise`: a number or, with per_row, each row's [B].
    """

    def __init__(self, sae, centred, dtype, per_row):
        self.W_enc, self.dtype = sae.W_enc, dtype
        if dtype == torch.float32:
            self.columns, self.rest = centred.T, sae.b_enc.float()
            self.noise = centred.new_zeros(len(centred) if per_row else ())
            return
        mean = centred.mean(0).nan_to_num(0.0, 0.0, 0.0)  # a token that is not finite spoils no others
        columns = torch.sub(centred, mean, out=torch.empty_like(centred, dtype=dtype))
        size = torch.linalg.vector_norm(columns, dim=1 if per_row else None, dtype=torch.float32)
        noise = BFLOAT16_NOISE / math.sqrt(columns.numel() / size.numel())
        self.noise = size.nan_to_num_(0.0, 0.0, 0.0).mul_(noise)
        self.columns, self.rest = columns.T, torch.addmv(sae.b_enc.float(), sae.W_enc.float(), mean)

    def chunks(self, parts, first=None):
        """(which latents, their product [r, B]) in so many chunks or more, each in the memory of the last.
        The first is of `first` latents if given; then sizes double."""
        (n_latents, _), (_, n_rows) = self.W_enc.shape, self.columns.shape
        most = max(1, min(-(-n_latents // parts), CHUNK_ENTRIES[self.columns.device.type] // n_rows))
        scratch = torch.empty(most, n_rows, dtype=self.dtype, device=self.columns.device)
        start, size = 0, min(most, first or most)
        while start < n_latents:
            part = slice(start, min(start + size, n_latents))
            W = self.W_enc[part].to(self.dtype)
            yield part, torch.mm(W, self.columns, out=scratch[: len(W)])
            start, size = part.stop, min(2 * size, most)

    def least(self, threshold, rest, noise):
        """What a product must exceed so that its pre-activation may exceed the threshold."""
        least = threshold - rest
        if self.dtype == torch.float32:
            return least
        return least.sub(least.abs(), alpha=BFLOAT16_ERROR).sub_(noise)

    def above_(self, part, z, threshold, row_threshold=None):
        """The entries of a chunk z [r, B] that may exceed their latent's threshold [r], or their row's [B]
        where the former are 0: index (latent · B + row), and value by the product. It may change z."""
        rest, noise, n_rows, least = self.rest[part], self.noise, z.shape[1], None
        if row_threshold is not None:
            least, noise = self.least(row_threshold, 0.0, noise).to(z.dtype), 0.0
            z.sub_(least)
        found = flat_above(z, self.least(threshold, rest, noise))
        value = z.view(-1)[found] + rest[found // n_rows]
        return found + part.start * n_rows, value if least is None else value + least[found % n_rows]

    def error(self, index, value):
        """By how much the values of entries (latent · B + row) may be wrong; None for float32."""
        if self.dtype == torch.float32:
            return None
        n_rows = self.columns.shape[1]
        noise = self.noise[index % n_rows] if self.noise.ndim else self.noise
        return BFLOAT16_ERROR * (value - self.rest[index // n_rows]).abs() + noise

    def row_level(self, z, n):
        """A threshold for each row [B] that at least n of its first entries, z [r, B], exceed; or 0."""
        if len(z) < n:
            return torch.zeros_like(z[0], dtype=torch.float32)
        least = z if self.dtype == torch.float32 else torch.sub(z, z.abs(), alpha=BFLOAT16_ERROR)
        least = ((least + self.rest[: len(z), None]) - self.noise).T.contiguous()
        if least.device.type == "cpu":  # NumPy's is faster
            least.numpy().partition(-n, axis=1)  # in place
            nth = least[:, -n]
        else:
            nth = least.topk(n, sorted=False).values.amin(1)
        return 0.999 * nth.clamp_min(0).nan_to_num()  # float32 rounds, too

def n_largest(row, value, error, n, row_threshold):
    """Which entries can be among the n largest (of their row, if rows have thresholds), ascending, where a
    value may be wrong by the error; and what others must exceed: the n-th largest, or each row's."""
    low = value if error is None else value - error
    if row_threshold is None:
        best = low.topk(min(n, len(low)), sorted=False).indices
        raised = nth = low[best].nan_to_num(math.inf).min() if len(best) else low.new_zeros(())
    else:
        place = row_places(row, len(row_threshold), max(n, int(row.bincount(minlength=1).max())))
        values = functional.pad(low, [0, 1], value=-math.inf)[place]
        if values.device.type == "cpu":  # NumPy's is faster
            best = torch.from_numpy(values.numpy().argpartition(-n, axis=1)[:, -n:])
        else:
            best = values.topk(n, sorted=False).indices
        raised = torch.fmax(row_threshold, values.gather(1, best).amin(1))
        best, nth = place.gather(1, best).flatten(), raised[row]
    if error is None:
        stays = torch.zeros(len(value) + 1, dtype=torch.bool, device=value.device)
        stays = stays.index_fill_(0, best, True)[:-1]
    else:
        stays = ~(value + error < nth)
    return stays.nonzero().squeeze(1), raised

def row_places(row, n_rows: int, width: int):
    """[n_rows, width]: the places in `row` [m] at which each number stands, ascending, filled up with m."""
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
    """Trainer.update_rows_ of W_enc, W_dec and b_enc for the latents that got a gradient."""
    D, d_aux = new.g.shape[1], new.d_aux
    if has_kernels(new.g) and D <= WIDEST:
        return launch_update_latents_(trainer, new, lr)
    learning = (new.starts.diff() > 0).index_fill_(0, d_aux.dead[d_aux.W_dec.any(1)], True)
    size = UPDATE_ENTRIES[new.g.device.type] // D + 1  # gradients and rows are used while in the cache
    for first in range(0, len(learning), size):
        update_block_(trainer, new, first, learning[first : first + size])

def update_block_(trainer, new, first, learning):
    """update_latents_ of consecutive latents from `first` on; those that are `learning` got a gradient.

    If most of them learn it is faster to step all without copies, and to give the others their rows back.
    """
    stop, most = first + len(learning), 2 * learning.sum() > len(learning)
    latents = torch.arange(first, stop, device=learning.device)
    latents = latents if most else latents[learning]
    resting = (~learning).nonzero().squeeze(1)
    for name, g in latent_gradients(new, latents, stop):
        if most:
            block = [t[first:stop] for t in (getattr(trainer.sae, name).data, *trainer.adam[name])]  # views
            before = [t.index_select(0, resting) for t in block]
            trainer.adam_(name, g, *block)
            for rows, old in zip(block, before):
                rows.index_copy_(0, resting, old)
        else:
            trainer.update_rows_(name, g, latents)
        del g  # before the next is made

def latent_gradients(new, latents, stop):
    """(name of a parameter, gradient of its rows) for ascending latents [r] below `stop`, one at a time, so
    that one alone is held. Latents that are left out between them have no entries.

    The gradients are sums over a latent's entries: of W_dec fᵀ g, of W_enc (∂mse/∂Z)ᵀ (X - b_dec).
    """
    starts = new.starts[torch.cat([latents, latents.new_tensor([stop])])]
    mine = slice(int(starts[0]), int(starts[-1]))
    row, value, d_value = (t[mine] for t in (new.kept.entries.row, new.kept.entries.value, new.d_value))
    starts, d_aux = starts - mine.start, new.d_aux
    dead = torch.isin(d_aux.dead, latents)
    place = torch.searchsorted(latents, d_aux.dead[dead])  # of the dead among the latents
    yield "W_dec", sum_rows(new.g, row, value, starts).index_add_(0, place, d_aux.W_dec[dead])
    yield "W_enc", sum_rows(new.centred, row, d_value, starts).index_add_(0, place, d_aux.W_enc[dead])
    yield "b_enc", new.d_b_enc[latents]

# The auxiliary loss, dense over the dead latents

class AuxGradient(NamedTuple):
    """Gradient of α · L_aux for the dead latents; rows of W_dec are 0 for those outside the k_aux largest."""
    dead: Tensor  # [m], ascending; F where there are fewer, whose gradients are 0
    W_enc: Tensor  # [m, D]
    b_enc: Tensor  # [m]
    W_dec: Tensor  # [m, D]

def auxiliary_gradient(sae, centred, residual, kind: StepKind) -> tuple[Tensor, AuxGradient]:
    """auxiliary_loss and its gradient. There may be fewer dead latents than kind.n_dead says, not more."""
    cfg, m, none, n_latents = sae.config, kind.n_dead, sae.W_enc[:0], len(sae.b_enc)
    if not kind.n_dead_of_all or not cfg.aux_k:
        return residual.new_zeros(()), AuxGradient(none[:, 0].long(), none, none[:, 0], none)
    dead = sae.is_dead().nonzero_static(size=m, fill_value=n_latents).squeeze(1)
    exists, at = dead < n_latents, dead.clamp(max=n_latents - 1)
    W_enc, W_dec, b_enc = sae.W_enc[at], sae.W_dec[at], sae.b_enc[at]
    n_rows = max(1, int(AUX_SHARE * len(centred) * cfg.n_latents / kind.n_dead_of_all))
    k, centred = min(math.ceil(cfg.aux_k / sae.processes.size), m), centred[:n_rows]
    f = torch.addmm(b_enc, centred, W_enc.T)
    kept = exists.to(f.dtype).expand_as(f)
    if k < m:
        best = f.masked_fill(~exists, -math.inf).topk(k, dim=1, sorted=False).indices
        kept = torch.zeros_like(f).scatter_(1, best, 1.0).mul_(kept)
    f.mul_(kept)
    residual = residual[:n_rows] - sae.processes.sum_(f @ W_dec)
    aux = residual.square().sum(1).mean()
    g = residual.mul_(-2 * cfg.aux_coef / len(centred) * kind.scale)  # α · ∂L_aux/∂ê
    d_z = (g @ W_dec.T).mul_(kept)
    return aux, AuxGradient(dead, d_z.T @ centred, d_z.sum(0), f.T @ g)

# Encoding

def sparse_encoding(sae, x, selection):
    """SAE.encode_sparse without a matrix [B, F]; it computes in float32."""
    rows, hint = sae.as_rows(x), HINT * float(sae.theta.nan_to_num(0.0))
    size = 4096 if selection == "theta" else max(1, len(rows))  # with θ rows are independent: some at a time
    indices, values = [rows.new_empty(2, 0, dtype=torch.int64)], [rows.new_empty(0, dtype=torch.float32)]
    for start in range(0, len(rows), size):
        centred = (rows[start : start + size].float() - sae.b_dec.float()).contiguous()
        if selection == "theta":
            latent, row, value = entries_above(sae, centred, sae.get_theta())
        else:
            n = n_selected(sae.config, len(centred), selection)
            latent, row, value = find_entries(sae, centred, hint, n, per_row=selection == "topk")
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
# stays on the GPU. No atomic additions of floats: sums always have the same order. The docstrings give the
# operator that a kernel replaces. TRITON_INTERPRET=1 runs them on a CPU, for tests.

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
            why = "it cannot be imported" if triton is None else f"{error!r}".splitlines()[0]
            warnings.warn(f"Triton does not work on {device} ({why}): steps take several times as long")
    return kernels_work[device]

@torch.inference_mode(False)
@torch.no_grad()
def try_kernels(device):
    """RuntimeError unless small steps are those of operators. One latent always fires, four are dead."""
    cfg = Config(d_model=160, n_latents=32, k=3, batch_size=80, device=str(device))
    x = torch.randn(80, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)
    trainer = Trainer(cfg)
    trainer.initialize_(x)
    trainer.sae.b_enc[:5] = torch.tensor([8.0, -20, -20, -20, -20])
    trainer.sae.tokens_since_fired[1:5] = 10**7

    def take(works, hint, *kind):
        kernels_work[device] = works
        try:
            step = DirectStep(trainer, StepKind(*kind, loss_scale(trainer.x_std)))
            return trial_step(step, x, hint, trainer.learning_rate())
        finally:
            del kernels_work[device]

    first = take(False, 0.0, "topk", 0, 0)  # there are moments now, too
    hint = 0.7 * float(StepNumbers(*first).threshold)
    for case in ((hint, "topk", 4, 4), (hint, "batch", 0, 0), (0.0, "batch", 4, 4)):
        check_same(trainer, lambda: take(True, *case), lambda: take(False, *case))

def trial_step(step, x, hint, lr) -> Tensor:
    """Take a DirectStep or RecordedStep; returns its numbers."""
    numbers, *_ = step.compute(x, hint)
    step.change_(lr)
    return numbers

def check_same(trainer, *ways):
    """RuntimeError unless two ways to take a step (they return its numbers) do the same. All is put back.

    Of a matrix about 64 rows are compared. 3 % may be rounding: Adam's first steps are signs of gradients.
    """
    state = {name: (t, t.clone()) for name, t in trainer_state(trainer).items() if t.ndim}
    found = []
    for way in ways:
        try:
            changes = StepNumbers(*way())._asdict()
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
    tensors = (t for t in (out, *arguments, *options.values()) if isinstance(t, Tensor))
    assert all(t.is_contiguous() for t in tensors), "kernels read rows as they lie"
    with torch.cuda.device_of(out):
        kernel[grid](out, *arguments, **options)
    return out

# Operation 1: find entries

@kernel
def is_above(z, least, row_least, l, r, B, ROWS: tl.constexpr):
    """~(z[l, r] <= least[l]), with ROWS least[l] + row_least[r]: so a NaN is above, too."""
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

@torch.no_grad()
def try_largest(sae, centred, hint, n, dtype, per_row=False) -> StepEntries:
    """find_entries without a wait, and whether the result is right.

    It is if n exceed the hint (per_row: in each row n exceed its level), and if not more were found than
    CANDIDATES times as many as are kept, which it can hold.
    """
    n_rows, row_least = len(centred), None
    n_kept, product = n * n_rows if per_row else n, Product(sae, centred, dtype, per_row)
    rest, noise = product.rest, product.noise
    least = product.least(0.0 if per_row else hint, rest, 0.0 if per_row else noise)
    places = torch.zeros(2, CANDIDATES * n_kept, dtype=torch.int64, device=centred.device)
    found = torch.zeros(1, dtype=torch.int64, device=centred.device)
    if per_row:
        counts = torch.zeros(LEVELS, n_rows, dtype=torch.int32, device=centred.device)
        lowest = torch.zeros_like(rest[:1]).add_(hint / 256)
    for part, z in product.chunks(1):
        if per_row:
            level = raise_row_level_(counts, z, rest[part], noise, lowest, n)
            row_least = product.least(level, 0.0, noise)
        found = collect(z, least[part], places, found, part.start, row_least)
    latent, row = places
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
    entries = Entries(latent[best], row[best], value[best])
    right &= (entries.value > (level[entries.row] if per_row else hint)).all()
    return StepEntries(entries, right.float())

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
def update_kernel(W_enc, mean_enc, square_enc, count_enc, factor_enc, epsilon_enc,
                  W_dec, mean_dec, square_dec, count_dec, factor_dec, epsilon_dec,
                  W_b, mean_b, square_b, count_b, factor_b, epsilon_b, lr, log_beta1, log_beta2,
                  row, value, d_value, starts, runs, g, c, d_b_enc, aux_place, aux_enc, aux_dec, D,
                  AUX: tl.constexpr, RUN: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """The whole update of latent l, whose entries are starts[l] ≤ e < starts[l + 1]. Arguments are named."""
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
        adam_at(W_enc, mean_enc, square_enc, count_enc, l * D + d, i, d < D, d_enc, lr, factor_enc,
                epsilon_enc, log_beta1, log_beta2, False)
        adam_at(W_dec, mean_dec, square_dec, count_dec, l * D + d, i, d < D, d_dec, lr, factor_dec,
                epsilon_dec, log_beta1, log_beta2, True)
        adam_at(W_b, mean_b, square_b, count_b, i, i, i >= 0, tl.load(d_b_enc + i), lr, factor_b, epsilon_b,
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

def launch_update_latents_(trainer, new, lr):
    """update_latents_, all of a latent in one visit of its rows."""
    g, d_aux, starts, (latent, row, value) = new.g, new.d_aux, new.starts, new.kept.entries
    D, m, given = g.shape[1], len(d_aux.dead), dict(row=row, value=value, d_value=new.d_value)
    shape = dict(D=D, RUN=RUN, E=2, BLOCK=triton.next_power_of_2(D))
    runs = g.new_empty(len(row) // RUN, 2, D)
    if len(runs):
        launch(runs_kernel, (len(runs),), runs, latent=latent, **given, g=g, c=new.centred, **shape)
    place = starts  # without AUX it is not read
    if m:
        place = torch.full((len(starts),), -1, device=g.device)
        place[d_aux.dead] = torch.arange(m, device=g.device)
    state = {}
    for end, name in dict(enc="W_enc", dec="W_dec", b="b_enc").items():
        values = getattr(trainer.sae, name).data, *trainer.adam[name], *trainer.adam_rates(name)
        parts = "W", "mean", "square", "count", "factor", "epsilon"
        state |= {f"{part}_{end}": value for part, value in zip(parts, values)}
    log_beta1, log_beta2 = log_betas(trainer.cfg)
    launch(update_kernel, (len(starts) - 1,), state.pop("W_enc"), **state, lr=lr, log_beta1=log_beta1,
           log_beta2=log_beta2, **given, starts=starts, runs=runs, g=g, c=new.centred, d_b_enc=new.d_b_enc,
           aux_place=place, aux_enc=d_aux.W_enc, aux_dec=d_aux.W_dec, AUX=m > 0, **shape)

# Two CUDA graphs: step_gradients, and after the host has read its numbers apply_

class RecordedStep:
    """DirectStep's launches before the host's wait, and those after it, each repeated as one.

    There are about a hundred, and each takes the host longer than the device. A graph reads and writes the
    tensors that it was recorded with; settings like TF32 stay as they were.
    """

    def __init__(self, trainer, x, kind: StepKind, pool):
        self.x, self.counters = torch.empty_like(x), trainer.sae.tokens_since_fired
        self.hint, self.lr = x.new_zeros(()), x.new_zeros(())
        self.before, self.after = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options = dict(stream=recording_stream(x.device), capture_error_mode="thread_local")
        torch._C._cuda_clearCublasWorkspaces()  # or matrix products share memory that is another trainer's
        with torch.cuda.graph(self.before, pool, **options):
            new = step_gradients(trainer.sae, self.x, self.hint, kind)
        with torch.cuda.graph(self.after, self.before.pool(), **options):
            apply_(trainer, new, self.lr, kind.scale)
        torch._C._cuda_clearCublasWorkspaces()
        # what the host reads; other memory is shared with other recordings: none of them runs between the two
        self.numbers, self.n_entries = new.numbers, len(new.kept.entries.value)

    def compute(self, x, hint):
        self.x.copy_(x)
        self.hint.fill_(hint)
        self.before.replay()
        return self.numbers, self.n_entries, 0.0

    def change_(self, lr):
        self.lr.fill_(lr)
        self.after.replay()
        torch.autograd.graph.increment_version(self.counters)  # for count_dead

recording_stream = functools.cache(torch.cuda.Stream)  # torch.cuda.graph's own may lie on another device
unrecorded = set()  # devices on which a recording failed

def record(trainer, x, hint, kind, pool) -> RecordedStep | None:
    """A recording that does what its launches do one by one; else None, and there are none on this device."""
    lr = trainer.learning_rate()
    try:
        with torch.cuda.stream(torch.cuda.current_stream(x.device)):  # restored if recording breaks off
            step = RecordedStep(trainer, x, kind, pool)
        check_same(trainer, lambda: trial_step(step, x, hint, lr),
                   lambda: trial_step(DirectStep(trainer, kind), x, hint, lr))
        return step
    except Exception as error:  # out of memory, for one
        unrecorded.add(x.device)
        why = f"{error.__context__ or error!r}".splitlines()[0]
        warnings.warn(f"CUDA graphs do not work on {x.device} ({why}): steps take longer")

MOST_KINDS = 32  # how many kinds of steps are recorded for one trainer

def find_recording(trainer, x, hint, kind: StepKind) -> RecordedStep | None:
    """The recording of steps of this kind and shape, or None.

    It is made when they come for the second time: the first compiles the kernels, which cannot be done while
    recording.
    """
    if x.device in unrecorded:
        trainer.cache.pop("recordings", None)  # which frees memory
        return None
    jumps, wide = trainer.cfg.activation == "jumprelu", x.shape[1] > WIDEST
    if not x.is_cuda or jumps or wide or not can_try(trainer.sae, x, hint):
        return None
    recordings, key = recordings_of(trainer), (kind, x.shape, x.dtype)
    if key not in recordings:
        if len(recordings) < MOST_KINDS:
            recordings[key] = None  # it came once
    elif recordings[key] is None:
        pool = next((step.before.pool() for step in recordings.values() if step), None)
        recordings[key] = record(trainer, x, hint, kind, pool)
    return recordings.get(key)

def recordings_of(trainer) -> dict:
    """What was recorded for a trainer, by kind. Graphs hold tensors and rates, and go if these change."""
    sae, adam = trainer.sae, itertools.chain(*trainer.adam.values())
    tensors = itertools.chain(sae.parameters(), sae.buffers(), adam, [trainer.n_fired])
    bound = trainer.cfg, trainer.x_std, tuple(t.data_ptr() for t in tensors)
    if trainer.cache.get("recordings", (None,))[0] != bound:
        trainer.cache["recordings"] = bound, {}
    return trainer.cache["recordings"][1]

# ---- 9. Rivals: TopK, JumpReLU -------------------------------

class TopKSAE(SAE):
    """Keeps k latents of each token, in training and at inference."""

    def selection_for(self, asked):
        super().selection_for(asked)  # which checks it
        return "topk"

    def training_selection(self, tokens_seen):
        return "topk"

JUMP_START = 0.3  # share of the run at which JumpReLU, until then BatchTopK, begins to learn its thresholds,
JUMP_AFTER = 0.1  # but at least this share after topk_start
WINDOW = 0.03  # width ε of the window around θ, in units of √variance (their paper: 0.001)
L0_RATE = 0.1  # how fast the penalty's weight λ follows L0 / k, per step

class JumpReLUSAE(SAE):
    """JumpReLU (Rajamanoharan et al. 2024): each latent has its own θ_j = exp(log_threshold_j), learnt by
    gradient, and the loss has a penalty λ · L0. `theta` stays NaN."""

    def __init__(self, config):
        super().__init__(config)
        self.log_threshold = nn.Parameter(torch.zeros_like(self.b_enc))
        # λ and the kernel's width ε, 0 at the start of a run. No buffer: it stays on the host, where a step
        # need not wait for it, and is not saved with the SAE
        self.penalty = torch.zeros(2, dtype=torch.float64)

    def get_theta(self):
        return self.log_threshold.exp()

    def selection_for(self, asked):
        super().selection_for(asked)
        return "theta"

    def loss(self, x, selection="batch"):
        """SAE.loss with the penalty λ · L0. While λ is 0, as after loading, f is select(z, selection)."""
        coef, width = self.penalty.tolist()
        z, sparsity = self.pre_activations(x), 0 * self.log_threshold.sum()  # autograd needs a gradient
        if coef:
            f, n_active = jumprelu(z, self.get_theta(), width)
            sparsity = coef * n_active / len(x)
        else:
            f = self.select(z, selection)
        residual = x - self.decode(f)
        mse = residual.square().sum(1).mean()
        aux = auxiliary_loss(self, x, residual.detach())
        return mse + self.config.aux_coef * aux + sparsity, mse, aux, f

    def step_entries(self, centred, hint, dtype, selection):
        """The entries above θ. Those within ε/2 of it move the thresholds, by own_gradients."""
        coef, width = self.penalty.tolist()
        if not coef:
            zero = torch.zeros_like(self.log_threshold)
            kept = super().step_entries(centred, hint, dtype, selection)
            return kept._replace(own_gradients=lambda g, scale: {"log_threshold": zero})
        lowest = (self.get_theta() - 0.51 * width).clamp_min(0)  # 0.51: some room for rounding
        latent, row, z = entries_above(self, centred, lowest, dtype)

        def own_gradients(g, scale):
            with torch.enable_grad():
                f, n_active = jumprelu(z, self.get_theta()[latent], width)
            slopes = dots(self.W_dec, g, latent, row), torch.full_like(n_active, scale * coef / len(centred))
            [d] = torch.autograd.grad([f, n_active], [self.log_threshold], slopes)
            return {"log_threshold": d}

        active = (~(z <= self.get_theta()[latent])).nonzero().squeeze(1)
        entries = Entries(latent[active], row[active], z[active])
        return StepEntries(entries, None, coef, own_gradients)

    def learn_thresholds_(self, trainer, stats):
        """Adapt λ, so that L0 becomes k; until it begins set all thresholds to that of the batch."""
        cfg = trainer.cfg
        if self.penalty[0]:
            self.penalty[0] *= (max(stats.l0, 1 / cfg.batch_size) / cfg.k) ** L0_RATE
        elif stats.l0:
            trainer.last_threshold = stats.threshold
            self.log_threshold.data.fill_(math.log(stats.threshold))
            if trainer.tokens_seen >= max(JUMP_START, cfg.topk_start + JUMP_AFTER) * cfg.tokens:
                self.penalty[0] = stats.threshold**2 / 2  # an entry z takes about z² from the error
                self.penalty[1] = WINDOW * math.sqrt(trainer.variance)

    @torch.no_grad()
    def calibrate(self, batches):
        """Multiply all thresholds by one factor, so that L0 becomes k and methods are compared at equal L0.

        It is the θ of a BatchTopK SAE whose Z are divided by the thresholds.
        """
        cfg, theta = dataclasses.replace(self.config, activation="batchtopk"), self.get_theta()
        scaled = self.processes.keep_share_(make_sae(cfg)).to(self.W_dec.device)
        scaled.found = self.found
        scaled.W_enc.copy_(self.W_enc / theta[:, None])
        scaled.b_enc.copy_(self.b_enc / theta)
        scaled.b_dec.copy_(self.b_dec)
        factor = scaled.calibrate(batches)
        self.log_threshold.add_(math.log(factor))
        return factor

def jumprelu(z, theta, width):
    """f of z, and how many entries are active; both with a straight-through gradient for θ.

    Where |z - θ| < ε/2, f falls by θ/ε and the number by 1/ε as θ rises (their equations 11 and 12).
    """
    active, near = (z > theta).to(z.dtype), ((z - theta).abs() < width / 2) & (z > 0)
    rise = near * (theta - theta.detach()) / width  # zeros that carry a gradient
    return z * active - theta.detach() * rise, (active - rise).sum()

SAES |= {"topk": TopKSAE, "jumprelu": JumpReLUSAE}

# ---- 10. Activations of a language model ---------------------

TINY_GPT2 = Path(__file__).resolve().parent / "tests" / "assets" / "tiny-gpt2"  # the embedded default model

@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Config, and what a run on a language model depends on. The command line's options are these fields."""

    d_model: int = option(0, "D, width of the activations; 0: the model's")
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
    model_batch: int = option(0, "contexts in one forward pass of the model; 0: 4096 tokens, 32,768 on a GPU")
    buffer_tokens: int = option(0, "activations shuffled at a time; 0: a quarter of the text's, ≤ 131,072")
    passes: int = option(1, "how often each activation is used: the model reads tokens / passes", low=1)
    ce_contexts: int = option(128, "held-out contexts on which cross-entropy is measured, at most", low=1)
    checkpoint_minutes: float = option(10, "time between saved states, from which a run can be resumed")
    checkpoint_tokens: int = option(0, "tokens between saved states; 0: the time alone decides")

    @property
    def buffer_size(self) -> int:
        """How many activations are shuffled at a time: a quarter, so that to stop and go on costs little."""
        return max(self.batch_size, self.buffer_tokens or min(131_072, self.tokens // self.passes // 4))

    @classmethod
    def preset(cls, name: str, recipe: str = "ours", **overrides) -> RunConfig:
        """One of PRESETS, trained by one of RECIPES, with some fields replaced."""
        check_choice("preset", name, PRESETS)
        check_choice("recipe", recipe, RECIPES)
        return cls(**PRESETS[name] | RECIPES[recipe] | overrides)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> RunConfig:
        """The configuration of a run. InputError for an SAE saved from Python, which names no model."""
        cfg, *_ = load_config(Path(folder))
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
        self.processes = Processes()  # those that share its contexts
        dtype = "float32" if dtype == "auto" and self.device.type == "cpu" else dtype
        dtype, source = choose_dtype(dtype, self.device), str(TINY_GPT2) if model == "tiny-gpt2" else model
        local = os.path.isdir(source)  # then the hub is never asked
        with explained(f"model {model!r} could not be loaded; give a hub name or local folder as --model",
                       Unavailable):
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
    def from_config(cls, cfg: RunConfig, found: Found = Found()) -> LanguageModel:
        lm = cls(cfg.model, cfg.layer, cfg.site, cfg.module, dtype=cfg.model_dtype, device=cfg.device,
                 skip_special=cfg.skip_special, norm_limit=found.norm_limit)
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
        """Where the SAE reads activations h [n, T, D] of ids [n, T]: bool, is_kept up to norm_limit."""
        kept = self.is_kept(ids)
        if self.norm_limit:
            kept &= ~(h.float().norm(dim=-1) > self.norm_limit)  # a NaN is read, so that it is noticed
        return kept

    def kept_activations(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 activations [m, D] that the SAE reads of ids [n, T], and where they are, bool [n, T].

        Several processes share the contexts.
        """
        h = torch.zeros(*ids.shape, self.d_model, dtype=torch.float32, device=self.device)
        size, rank = self.processes.size, self.processes.rank
        mine, place = (t.tensor_split(size)[rank] for t in (ids, h))
        if len(mine):
            place.copy_(self.activations(mine))
        read = self.is_read(ids, self.processes.sum_(h))
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

def texts_of(cfg, split):
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

def training_contexts(cfg, tokenizer, at=Position()):
    """Training text without end: contexts [T] of token ids, each with the Position after it."""
    n, left = min(TEXT_SHUFFLE, -(-cfg.tokens // cfg.context)), threading.Event()
    lengths, first, packed = [], at.documents, 0  # lengths: how many documents all the text has, once known

    def again_and_again():
        while not lengths or lengths[0]:
            length = 0
            for length, text in enumerate(texts_of(cfg, "train"), 1):
                yield text
            lengths.append(length)

    texts = itertools.islice(again_and_again(), at.documents, None)
    texts = tokenise(tokenizer, itertools.takewhile(lambda text: not left.is_set(), texts))
    with ThreadPoolExecutor(1) as thread:
        pack_next = functools.partial(thread.submit, pack, cfg, tokenizer, texts, n)
        ahead = pack_next()
        try:
            while True:
                chunk, n_documents = ahead.result()
                packed, end = packed + len(chunk), at.documents + n_documents
                if lengths and at.documents <= lengths[0] < end:  # it began again
                    warn_of_repetition(cfg, lengths[0] * packed / (end - first))
                ahead = pack_next()
                chunk = chunk[random_order(len(chunk), cfg.seed, at.documents)]
                for used in range(at.contexts, len(chunk)):
                    yield chunk[used], Position(at.documents, used + 1)
                at = Position(end)
        finally:
            left.set()  # else the thread would finish its chunk before a process can end

def warn_of_repetition(cfg, n_contexts):
    """Warn if a run reads more than its text, of about so many contexts, has."""
    n_tokens = n_contexts * (cfg.context - 1)
    times = cfg.tokens / cfg.passes / n_tokens
    if times > 1:
        warnings.warn(f"the training text has about {n_tokens:,.0f} tokens and is read {times:.1f} times")

def random_order(n, *seeds):
    """The numbers below n in a random order that depends on all these whole numbers."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))

PASS_TOKENS = {"cpu": 4096, "cuda": 32_768}  # with fewer a GPU waits for launches: GPT-2 is 3 times slower

def pass_contexts(cfg, lm) -> int:
    """How many contexts the model reads at a time."""
    return cfg.model_batch or max(1, PASS_TOKENS[lm.device.type] // cfg.context)

def activation_batches(cfg, lm, at=Position(), on_read=None):
    """Training activations, cfg.tokens in all: batches [batch_size, D], each with the Position after it.

    The model fills a buffer with the next tokens of the text. Then its rows are served in a random order,
    `passes` times, each time in another one. Position: where in the text the present buffer begins, and how
    many of its batches were used. To resume, the same buffer is read again, and those are passed over. For
    batch_size 64, buffer_tokens 200 and contexts of which 127 tokens are read:

        Position(0, 0, 0, 0)    the start: two contexts are read, which give 254 rows
        Position(0, 0, 1, 0)    after the first of three batches; the 62 rows left over will not be used
        Position(0, 0, 2, 0)    after the second; here the run is stopped
        Position(0, 0, 2, 0)    resumed, with this as `at`: the same contexts are read, the same order drawn
        Position(0, 0, 3, 0)    after the third batch, the first that is served now
        Position(0, 2, 1, 192)  after the first of the next buffer, which begins at the third context

    on_read(n, wanted) is called as a buffer is filled, with how many tokens it has and will have; if it
    returns True the batches end.
    """
    stream, next_buffer = training_contexts(cfg, lm.tokenizer, at), at
    buffer = torch.empty(min(cfg.buffer_size, cfg.tokens) + cfg.context, lm.d_model, dtype=lm.model.dtype,
                         device=lm.device)
    while next_buffer.tokens < cfg.tokens:
        begin, left = next_buffer, cfg.tokens - next_buffer.tokens
        n, wanted = 0, min(cfg.buffer_size, math.ceil(left / cfg.passes))  # no more than steps will use
        while n < wanted:
            few = min(pass_contexts(cfg, lm), math.ceil((wanted - n) / cfg.context))
            ids, positions = zip(*itertools.islice(stream, few))
            x, _ = lm.kept_activations(torch.stack(ids))
            buffer[n : n + len(x)] = x
            n += len(x)
            if on_read and on_read(n, wanted):
                return
        seeds = cfg.seed, begin.documents, begin.contexts
        rows = torch.cat([random_order(n, *seeds, *range(again)) for again in range(cfg.passes)])[:left]
        if len(rows) < left:  # other buffers follow
            rows = rows[: len(rows) - len(rows) % cfg.batch_size]
        for used, some in enumerate(rows.to(lm.device).split(cfg.batch_size), 1):
            if used > begin.batches:  # else it was used before the run was resumed
                yield buffer[some], begin._replace(batches=used)
        next_buffer = positions[-1]._replace(tokens=begin.tokens + len(rows))

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
    for i, document in enumerate(tokenise(tokenizer, texts_of(cfg, split))):
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

def shuffled_activations(cfg, lm, ids, on_read=None):
    """The activations [m, D] that the SAE reads of ids [n, T], in a random order that is always the same.

    on_read is called after each pass of the model with the number of tokens that it has read and will read.
    """
    parts, n = [], 0
    for part in ids.split(pass_contexts(cfg, lm)):
        parts.append(lm.kept_activations(part)[0])
        n += part.numel()
        if on_read:
            on_read(n, ids.numel())
    x = torch.cat(parts)
    return x[random_order(len(x), 0).to(x.device)]

# ---- 11. Evaluation ------------------------------------------

@torch.no_grad()
def evaluate(sae: SAE, batches: Iterable[Tensor], lm: LanguageModel | None = None,
             contexts: Tensor | None = None) -> dict:
    """Metrics on held-out activations [n, D], for both selections. Changes nothing in the SAE.

    Returns {"tokens": how many, "left_out": share of the given tokens that were too large (Config.max_norm),
    "batch": metrics, "theta": metrics}, the metrics being
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
    total, n_given, found = 0.0, 0, {"batch": [], "theta": []}

    def given():
        nonlocal n_given
        for x in leave_out(batches, 0):
            n_given += len(x)
            yield x

    for x in batches_for(sae, given()):
        exact = x.double()
        total, square, std = total + exact.sum(0), exact.square().sum(1), exact.std(1)
        for selection, parts in found.items():
            x_hat, active, fired = reconstruct(sae, x, selection)
            error = (exact - x_hat).square().sum(1)
            parts.append((error, square, std, active, fired))
    check(found["batch"], "there is nothing to evaluate: the batches hold no activations")
    n_tokens = sum(len(error) for error, *_ in found["batch"])
    result = {"tokens": n_tokens, "left_out": 1 - n_tokens / n_given}
    mean = total / n_tokens
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
    fired = torch.bincount(latent, minlength=len(sae.b_enc))
    return restored(sae.config, x_hat + sae.b_dec, x), active, fired

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
        self.norm_limit: float = sae.found.norm_limit or math.inf

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
    data = scripted.save_to_buffer(_extra_files={"config.json": config_json(sae.config, sae.found)})
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

def public_name(model: str) -> str:
    """The hub name of a model in a local folder, if its config.json knows one; else `model` itself."""
    from huggingface_hub.utils import validate_repo_id
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        name = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))["_name_or_path"]
        validate_repo_id(name)  # a path does not pass
        return name or model
    return model

def saelens_files(sae, *_):
    """SAELens's layout, version 6: cfg.json and sae_weights.safetensors."""
    from safetensors.torch import save
    cfg, topk = sae.config, sae.config.activation == "topk"
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors |= {} if topk else {"threshold": sae.get_theta().expand(cfg.n_latents)}
    metadata = dict(sae_lens_version="6.0.0", training_architecture=cfg.activation,
                    training_architecture_details={"k": cfg.k}, model_from_pretrained_kwargs={})
    if isinstance(cfg, RunConfig):  # a Config does not say what the SAE reads
        metadata |= dict(model_name=public_name(cfg.model), hf_hook_name=cfg.module or None,
                         model_class_name="AutoModelForCausalLM" if cfg.module else "HookedTransformer",
                         hook_name=cfg.module or f"blocks.{cfg.layer}.hook_{cfg.site}",
                         context_size=cfg.context, prepend_bos=begins(sae), dataset_path=cfg.dataset,
                         seqpos_slice=[1, None] if cfg.skip_special else [None],
                         exclude_special_tokens=cfg.skip_special, norm_limit=sae.found.norm_limit or None)
    described = dict({"architecture": "topk", "k": int(cfg.k)} if topk else {"architecture": "jumprelu"},
                     d_in=cfg.d_model, d_sae=cfg.n_latents, dtype="float32", device="cpu",
                     apply_b_dec_to_input=True, reshape_activations="none", metadata=metadata,
                     normalize_activations="layer_norm" if cfg.normalize == "token" else "none")
    weights = save({name: t.detach().contiguous() for name, t in tensors.items()})
    return {"cfg.json": json.dumps(described, indent=2).encode(), "sae_weights.safetensors": weights}, {}

SAELENS = {"architecture": ("jumprelu", "topk"), "normalize_activations": ("none", "layer_norm", None, False),
           "reshape_activations": ("none", None), "hook_head_index": (None,),
           "finetuning_scaling_factor": (None, False)}  # what can be read; missing: the first

def load_saelens(folder: Path) -> SAE:
    """An SAE in SAELens's layout: the same latents are active, and the reconstructions are the same.

    Latents are theirs times the norm of their decoder rows, which becomes 1. Where TopK selects without
    these norms, rows keep them: others could be the largest. A threshold of 0, as TopK's, becomes 1e-30.
    JumpReLU that says that it was trained as BatchTopK, with k, and that has one θ becomes BatchTopK again.
    """
    from safetensors.torch import load_file
    with explained(f"{str(folder)!r} is damaged, or is not in the layout of SAELens"):
        said = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        more = said.get("metadata") or {}  # not in older files
        said = {"architecture": "standard"} | (more.get("training_architecture_details") or {}) | more | said
        if said.get("activation_fn", said.get("activation_fn_str")) == "topk":  # in older files
            said |= {"architecture": "topk", **said["activation_fn_kwargs"]}
        for name, readable in SAELENS.items():
            value = said.get(name, readable[0])
            check(value in readable, f"{str(folder)!r} is an SAE of SAELens with {name} {value!r}; what can "
                  f"be read: {', '.join(map(str, readable))}")
        topk = said["architecture"] == "topk"
        t = {name: w.float() for name, w in load_file(folder / "sae_weights.safetensors").items()}
        W_enc, b_enc, W_dec, norm = t["W_enc"].T, t["b_enc"], t["W_dec"], t["W_dec"].norm(dim=1)
        keeps = topk and not said.get("rescale_acts_by_decoder_norm")
        norm = norm.masked_fill(keeps | ((norm - 1).abs() < 1e-5), 1)  # 1 but for rounding stays, too
        if not said.get("apply_b_dec_to_input", True):  # their z is x W_encᵀ + b_enc
            b_enc = b_enc + W_enc @ t["b_dec"]
        own = {"W_enc": norm[:, None] * W_enc, "b_enc": norm * b_enc, "b_dec": t["b_dec"],
               "W_dec": W_dec / norm.clamp(min=1e-30)[:, None]}
        theta = (torch.zeros(1) if topk else norm * t["threshold"]).clamp(min=1e-30)
        if said.get("training_architecture") == "batchtopk" and "k" in said and theta.unique().numel() == 1:
            said["architecture"] = "batchtopk"
        own |= {"log_threshold": theta.log()} if said["architecture"] == "jumprelu" else {"theta": theta[0]}
        cfg = saelens_config(said, *W_dec.shape)
        sae = make_sae(cfg)
        sae.load_state_dict(sae.state_dict() | own)
        sae.found = Found(norm_limit=said.get("norm_limit") or 0.0)
    return sae

def saelens_config(said: dict, n_latents: int, d_model: int) -> Config:
    """Its configuration for what cfg.json said: a RunConfig if that is a model, and a site as here.

    k of JumpReLU, by which nothing is selected, is that of its training if the file tells it, else 1.
    """
    kind, hook, model = said["architecture"], str(said.get("hook_name")), said.get("model_name")
    normalize = "token" if said.get("normalize_activations") == "layer_norm" else "scale"
    own = dict(d_model=d_model, n_latents=n_latents, k=said.get("k", None if kind == "topk" else 1),
               activation=kind, normalize=normalize)
    block, layer, site = [*hook.split(".", 2), "", ""][:3]
    at = {"module": hook} if hook == said.get("hf_hook_name") else {}
    if block == "blocks" and layer.isdecimal() and site[5:] in ("resid_pre", "resid_post", *PARTS):
        at = {"layer": int(layer), "site": site[5:]}  # without hook_
    if not (model and at):
        return Config(**own)
    names = {"context": "context_size", "prepend_bos": "prepend_bos"}
    at |= {field: said[name] for field, name in names.items() if said.get(name) is not None}
    return RunConfig(**own, **at, model=PRESETS.get(model, {}).get("model", model))

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
        trainer |= dict(layer=cfg.layer, lm_name=public_name(cfg.model),
                        submodule_name=cfg.module or cfg.site)
        described["buffer"] = dict(ctx_len=cfg.context, prepend_bos=begins(sae), remove_bos=cfg.skip_special,
                                   norm_limit=sae.found.norm_limit or None)
    return {"config.json": json.dumps(described, indent=2).encode(), "ae.pt": file.getvalue()}, {}

def begins(sae) -> bool:
    """Whether the contexts that an SAE was trained on began with a begin token."""
    return sae.config.prepend_bos and sae.found.begin_token

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
                       ((sae.W_dec.norm(dim=1) - 1).abs().max() < 0.01 or sae.config.activation == "topk",
                        "decoder rows without norm 1"),  # load_saelens can give TopK such rows
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

TRAINER_NUMBERS = "tokens_seen", "steps", "x_std", "variance", "last_threshold"

def trainer_state(trainer: Trainer) -> dict[str, Tensor]:
    """All that steps change, by name: copies of the trainer's numbers, and its tensors themselves."""
    sae = trainer.sae
    state = {name: torch.tensor(getattr(trainer, name), dtype=torch.float64) for name in TRAINER_NUMBERS}
    state["n_fired"] = trainer.n_fired
    state |= {name: t.detach() for name, t in (*sae.named_parameters(), *sae.named_buffers())}
    if isinstance(sae, JumpReLUSAE):
        state["penalty"] = sae.penalty
    for name, moments in trainer.adam.items():
        state |= {f"{name}.{part}": t for part, t in zip(("mean", "square", "count"), moments)}
    return state

def restore_trainer_(trainer: Trainer, saved: dict[str, Tensor]):
    """Give a trainer what trainer_state gave of another."""
    for name, t in trainer_state(trainer).items():
        if name in TRAINER_NUMBERS:
            setattr(trainer, name, type(getattr(trainer, name))(saved[name]))
        else:
            t.copy_(saved[name])

# Saving, loading, precision: what methods of SAE do

def config_json(cfg: Config, found: Found = Found()) -> str:
    """The text of config.json: what was asked, and in a block what the run found."""
    return json.dumps(dataclasses.asdict(cfg) | {"found": dataclasses.asdict(found)}, indent=2)

def save_sae(sae: SAE, folder: str | os.PathLike):
    """SAE.save."""
    text, folder = config_json(sae.config, sae.found), Path(folder)
    tensors = sae.processes.all_latents(sae.state_dict())
    if sae.processes.rank == 0:
        save_tensors(folder / "sae.safetensors", tensors, text)
        write_atomically(folder / "config.json", text.encode())

@torch.inference_mode(False)
def load_sae(folder: str | os.PathLike, device: str = "cpu") -> SAE:
    """SAE.load. Folders of SAELens can be read, too: see load_saelens."""
    path = Path(folder) / "sae.safetensors"
    if path.with_name("sae_weights.safetensors").is_file() and not path.is_file():
        return load_saelens(Path(folder)).requires_grad_(False).to(device)
    cfg, found, text = load_config(Path(folder))
    said = f"{str(folder)!r} is unfinished; continue it with `train --resume {str(folder)!r}`"
    check(path.is_file(), said, Unavailable)
    tensors = load_tensors(path, text)
    sae = make_sae(cfg)
    sae.load_state_dict(tensors)
    sae.found = found
    return sae.requires_grad_(False).to(device)

def load_config(folder: Path) -> tuple[Config, Found, str]:
    """The configuration of a saved SAE, what its run found, and the file's text, which the checksum includes.

    Unavailable if there is none, InputError if it is damaged or older.
    """
    path = folder / "config.json"
    check(path.is_file(), f"{str(folder)!r} holds no run", Unavailable)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        found = values.pop("found", {})
        if "norm_limit" in values:  # of before there was such a block
            found = {"norm_limit": values.pop("norm_limit"), "pass_contexts": values.pop("model_batch", 0)}
        kind = RunConfig if "model" in values else Config
        known = {field.name for field in dataclasses.fields(kind)}
        before = {name: value for name, value in BEFORE.items() if name in known}
        return kind(**before | values), Found(**found), text
    except Exception as error:
        raise InputError(f"{str(path)!r} was not written by this version of batchtopk: {error}") from None

# ---- 13. Several processes: torchrun -------------------------

# Every process trains its share of the latents on all tokens of the batch. Weights, gradients and moments are
# never sent, only activations, the largest values and reconstructions. In the auxiliary loss each process
# takes its share of k_aux from its own dead latents.

@dataclass(frozen=True)
class Processes:
    """Those that share an SAE's latents. One alone has all: sum_ returns its tensor, gather [1, …]."""
    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str) -> Processes:
        """Under torchrun, join the others: NCCL on GPUs, one for each, otherwise gloo."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        if not dist.is_initialized():
            cuda = device == "cuda" or device == "auto" and torch.cuda.is_available()
            local = int(os.environ["LOCAL_RANK"])
            if device not in ("auto", "cpu", "cuda") or cuda and local >= torch.cuda.device_count():
                raise InputError(f"device is {device!r}; several processes need cpu, or cuda and a GPU each")
            if cuda:
                torch.cuda.set_device(local)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

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
        """The sum of the processes' tensors, in place."""
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

SAE.processes = Processes()  # of a whole SAE; keep_share_ gives a share its own
