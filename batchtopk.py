"""BatchTopK sparse autoencoders (Bussmann, Leask & Nanda 2024, arXiv 2412.06410), whole and in one file.

A sparse autoencoder writes an activation x of a language model as a sum of few directions out of many:

    Z = ReLU((X - b_dec) W_encᵀ + b_enc)     pre-activations of all latents, for a batch of tokens
    f = BatchTopK(Z)                         keep the k·B largest entries of the whole matrix, zero the rest
    X̂ = f W_dec + b_dec                      reconstruction: each active latent adds its decoder row
    L = mean ‖X - X̂‖² + α · L_aux            L_aux gives latents that stopped firing a gradient
    f = Z · 1[Z > θ]                         inference: θ, the expected smallest kept entry, stands in for the batch

TopK SAEs keep k latents for every token; here tokens that need more get more, at the same average.

Dimension key, used throughout:  B tokens in a batch   D width of the model   F latents   N = int(k·B) kept entries.
Both weight matrices are [F, D]: latent j reads along W_enc[j] and writes along W_dec[j].

Read from top to bottom: configuration, selection, the SAE, its loss, θ, the training step, activations of a language
model, the trainer, evaluation, export. Importing needs torch alone and touches no device, network or random state.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import queue
import sysconfig
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


class InputError(ValueError):
    """A value that cannot work: the message names it, what is accepted, and what to do next."""


class Unavailable(RuntimeError):
    """Something asked for is not here (a file, a run, a device, a model): the message says what to do next."""


# ---------------------------------------------------------------------------------------------------------------------
# 2. Configuration: the only home of every default
# ---------------------------------------------------------------------------------------------------------------------


def _option(default: Any, doc: str, **rules: Any) -> Any:
    """A field of Config: its default, the reason for it, and what is accepted (choices, min, max)."""
    return dataclasses.field(default=default, metadata={"doc": doc, **rules})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Command-line options, their help and README tables are made from these fields."""

    # Dictionary
    d_model: int = _option(dataclasses.MISSING, "D, width of the activations; train reads it off the model", min=1)
    n_latents: int = _option(dataclasses.MISSING, "F, number of latents", min=1)
    k: float = _option(32, "average active latents per token: N = int(k·B) entries of a batch are kept", min=0)
    activation: str = _option("batchtopk", "batchtopk keeps the k·B largest of a batch, topk the k largest of each token",
                              choices=("batchtopk", "topk"))
    normalize: str = _option("scale", "scale: one scalar for all inputs, folded into the weights; token: each token to "
                             "mean 0 and standard deviation 1, as the authors' code does", choices=("scale", "token", "none"))
    # Training
    tokens: int = _option(1_000_000, "length of the run in tokens", min=1)
    batch_size: int = _option(1024, "B, tokens in a batch; a smaller one gives more steps at equal tokens", min=1)
    lr: float = _option(2e-3, "peak learning rate of Adam; lower it for long runs (paper: 3e-4 at 1e9 tokens)", min=0)
    beta1: float = _option(0.9, "Adam's decay of the mean gradient (paper)", min=0, max=1)
    beta2: float = _option(0.99, "Adam's decay of the mean squared gradient (paper)", min=0, max=1)
    warmup: float = _option(0.02, "share of the run in which the learning rate rises to its peak", min=0, max=1)
    decay: float = _option(0.3, "share of the run in which the learning rate falls to zero", min=0, max=1)
    aux_k: int = _option(512, "dead latents per token that reconstruct the residual (paper)", min=0)
    aux_coef: float = _option(1 / 32, "α, weight of the auxiliary loss (paper)", min=0)
    dead_tokens: int = _option(20_480, "a latent silent for so many tokens is dead (authors: 5 batches of 4096)", min=1)
    step: str = _option("sparse", "sparse: only the encoder product is dense; plain: the same step by autograd, to "
                        "compare", choices=("sparse", "plain"))
    checkpoint_minutes: float = _option(10, "how often a run saves the state it can be resumed from", min=0)
    seed: int = _option(0, "seed of the weights and of the shuffling; a CPU run is bit-reproducible", min=0)
    device: str = _option("auto", "cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    # Activations
    model: str = _option("tiny-gpt2", "causal language model: a hub name, a local folder, or the embedded tiny-gpt2")
    layer: int = _option(1, "block of the model that is read", min=0)
    site: str = _option("resid_pre", "what is read there: the residual stream before or after the block, or what its MLP "
                        "or attention adds to it", choices=("resid_pre", "resid_post", "mlp_out", "attn_out"))
    module: str = _option("", "read the output of this module instead, by its path, e.g. transformer.h.2.mlp.c_fc")
    model_dtype: str = _option("auto", "the model's precision; auto is bfloat16 on a GPU, float32 elsewhere",
                               choices=("auto", "float32", "bfloat16"))
    dataset: str = _option("stdlib", "text: a hub data set, a .txt, .jsonl or .parquet file, or stdlib (the source of "
                           "Python's standard library)")
    dataset_config: str = _option("", "configuration of a hub data set that has several")
    text_column: str = _option("text", "column that holds the text")
    context: int = _option(128, "tokens in a context; documents are packed, never padded (paper: 128)", min=2)
    skip_special: bool = _option(True, "leave out the first position of each context and special tokens, whose norm is "
                                 "many times the rest")
    model_batch: int = _option(32, "contexts in one forward pass of the model", min=1)
    buffer_tokens: int = _option(65_536, "activations in the shuffle buffer, refilled by halves", min=2)
    # θ and evaluation
    theta_rate: float = _option(0.01, "rate of θ's running estimate during training", min=1e-6, max=1)
    calibration_tokens: int = _option(65_536, "held-out tokens on which θ is calibrated at the end", min=1)
    eval_tokens: int = _option(65_536, "held-out tokens of the evaluation", min=1)
    ce_tokens: int = _option(16_384, "of these, tokens run through the whole model for cross-entropy", min=1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, rules = getattr(self, field.name), field.metadata
            if (choices := rules.get("choices")) and value not in choices:
                raise InputError(f"{field.name} is {value!r}; choose one of: {', '.join(choices)}")
            if field.type in ("int", "float"):
                kind = "a whole number" if field.type == "int" else "a number"
                low, high = rules.get("min", -math.inf), rules.get("max", math.inf)
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                    raise InputError(f"{field.name} is {value!r}; give {kind} from {low} to {high}")
                if field.type == "int":
                    if value != int(value):
                        raise InputError(f"{field.name} is {value!r}; give {kind}")
                    object.__setattr__(self, field.name, int(value))  # 1e6 is a whole number too
        if self.k > self.n_latents:
            raise InputError(f"k is {self.k:g}, more than the {self.n_latents} latents; give at most as many")
        if self.n_kept(self.batch_size) < 1:
            raise InputError(f"k = {self.k:g} keeps no entry in a batch of {self.batch_size}; raise one of them")
        if self.activation == "topk" and self.k != int(self.k):
            raise InputError(f"k is {self.k}; topk takes a whole number of latents per token, batchtopk any number")
        if self.warmup + self.decay > 1:
            raise InputError(f"warmup + decay is {self.warmup + self.decay:g}; shares of one run, so at most 1")

    def n_kept(self, rows: int) -> int:
        """N, the entries kept among `rows` tokens."""
        return int(self.k * rows)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Config:
        """A named setting (see PRESETS) with some fields replaced; d_model is among the overrides."""
        if name not in PRESETS:
            raise InputError(f"preset {name!r} is unknown; choose one of: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of to_json. InputError where the text was not written by it."""
        try:
            values = json.loads(text)
            if values.pop("format") != "batchtopk":
                raise KeyError("format")
            return cls(**values)
        except (KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"config.json was not written by batchtopk ({type(error).__name__}: {error})") from error

    def to_json(self) -> str:
        return json.dumps({"format": "batchtopk", **dataclasses.asdict(self)}, indent=2)


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(n_latents=4096, lr=3e-3),
    "gpt2-small": dict(model="openai-community/gpt2", dataset="Skylion007/openwebtext", layer=8, n_latents=24576,
                       batch_size=4096, tokens=1_000_000_000, lr=3e-4, buffer_tokens=1_048_576, dead_tokens=1_000_000),
    "gemma-2-2b": dict(model="google/gemma-2-2b", dataset="Skylion007/openwebtext", layer=12, n_latents=16384,
                       batch_size=4096, tokens=1_000_000_000, lr=3e-4, buffer_tokens=524_288, dead_tokens=1_000_000),
}


def resolve_device(name: str) -> torch.device:
    """The device a Config asks for; Unavailable if this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Unavailable(f"device {name!r} is not available here; use --device cpu, or auto") from error
    return device


# ---------------------------------------------------------------------------------------------------------------------
# 3. Selection: what BatchTopK keeps
# ---------------------------------------------------------------------------------------------------------------------


def batch_topk(z: Tensor, n: int) -> Tensor:
    """BatchTopK (paper, section 3): keep the n largest positive entries of the whole of `z`, zero the rest.

    The definition, dense in and dense out. The kept set is held constant and the gradient flows through its values; no
    "differentiable approximation of top-k" is involved. Of entries tied for the last place the first in row-major order
    are kept, so the result is unique. Entries ≤ 0 are never kept: fewer than n remain where fewer are positive.

        >>> batch_topk(torch.tensor([[5., 1., 0.], [4., 3., -2.]]), 3)
        tensor([[5., 0., 0.],
                [4., 3., 0.]])

    Args: z, float tensor of any shape; n, how many entries to keep (all positive ones if n exceeds their number).
    Returns: a tensor like z. Raises InputError for a negative n.
    """
    if n < 0:
        raise InputError(f"n is {n}; give the number of entries to keep, 0 or more")
    flat = z.flatten()
    return torch.where(largest(flat.detach(), n), flat, 0.0).view_as(z)


def largest(values: Tensor, n: int, position: Tensor | None = None) -> Tensor:
    """Mask [M] of the n largest positive entries of values [M]; ties for the last place go to the lowest position.

    position [M], int, tells where each entry stands in row-major order; by default they come in that order.
    """
    n = min(n, len(values))
    last = values.topk(n, sorted=False).values.min() if n else values.new_tensor(math.inf)
    kept = values > last
    ties = (values == last).nonzero().squeeze(1)
    missing = n - int(kept.sum())  # the device waits here
    if position is not None and missing < len(ties):
        ties = ties[position[ties].argsort()]
    kept[ties[:missing]] = True
    return kept & (values > 0)


def row_topk(z: Tensor, k: int) -> Tensor:
    """TopK (Gao et al. 2024): the k largest positive entries of each row of z [..., F], the others zero."""
    values, latent = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, latent, values.relu())


# ---------------------------------------------------------------------------------------------------------------------
# 4. The sparse autoencoder
# ---------------------------------------------------------------------------------------------------------------------


class SAE(nn.Module):
    """A BatchTopK sparse autoencoder. It takes and returns activations in the model's own units.

    Parameters (float32): W_enc, W_dec [F, D], the rows of W_dec of unit norm; b_enc [F]; b_dec [D].
    Buffers, moved by training alone: theta [], the inference threshold in units of the pre-activations, NaN until it
    has been estimated, float32 whatever the dtype of the weights; tokens_since_fired [F], int64.

    A new SAE has random unit decoder rows, drawn from config.seed without touching the global random state, the encoder
    their copy, and zero biases; the Trainer moves b_dec to the mean of the data before its first step.
    """

    W_enc: Tensor
    theta: Tensor
    tokens_since_fired: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        rows = functional.normalize(torch.randn(config.n_latents, config.d_model, generator=generator), dim=1)
        self.W_enc = nn.Parameter(rows.clone())
        self.W_dec = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(config.d_model))
        self.register_buffer("theta", torch.tensor(math.nan))
        self.register_buffer("tokens_since_fired", torch.zeros(config.n_latents, dtype=torch.int64))

    def _apply(self, fn: Callable, recurse: bool = True) -> SAE:
        theta = self.theta
        super()._apply(fn, recurse)
        self.theta = theta.to(self.W_dec.device)  # in bfloat16 a θ of 1.80 moves by 0.3 %, and L0 with it
        return self

    def pre_activations(self, x: Tensor) -> Tensor:
        """What every latent reads in x, before selection: (x - b_dec) W_encᵀ + b_enc.  [B, D] -> [B, F], signed."""
        return functional.linear(x - self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x: Tensor, selection: str = "theta") -> Tensor:
        """Activations to latents.

        Args:
            x: [..., D] in the model's units; any leading dimensions, any float dtype.
            selection: "theta", the inference form Z · 1[Z > θ], in which each row depends on itself alone; or "batch",
                BatchTopK over all rows of x, as in training. With activation="topk" both keep each row's k largest.
        Returns: f [..., F], non-negative, in the dtype of the weights.
        Raises: InputError for another width or selection; Unavailable if θ was never estimated.
        """
        if x.shape[-1:] != self.b_dec.shape or not x.is_floating_point():
            raise InputError(f"x is {x.dtype} of shape {list(x.shape)}; give floats of shape [..., {len(self.b_dec)}]")
        if selection not in ("theta", "batch"):
            raise InputError(f"selection is {selection!r}; choose theta or batch")
        rows = self.standardize(x.reshape(-1, x.shape[-1]).to(self.W_enc.dtype))[0]
        z = self.pre_activations(rows)
        if selection == "batch" or self.config.activation == "topk":
            f = self.select(z)
        else:
            f = torch.where(z.float() > self.checked_theta(), z, 0.0)  # compared in float32, whatever the weights are
        return f.view(*x.shape[:-1], -1)

    def select(self, z: Tensor) -> Tensor:
        """What training keeps of the pre-activations z [B, F] of a batch."""
        if self.config.activation == "topk":
            return row_topk(z, int(self.config.k))
        return batch_topk(z, self.config.n_kept(len(z)))

    def decode(self, f: Tensor) -> Tensor:
        """Latents [..., F] to reconstructions f W_dec + b_dec [..., D], in the model's units.

        With normalize="token" the scale of a token is not in f: the result is in standardised units, which forward
        undoes because it has seen x.
        """
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor, selection: str = "theta") -> Tensor:
        """The reconstruction of x [..., D], in the model's units. Arguments and errors as for encode."""
        return self.restore(self.decode(self.encode(x, selection)), x)

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """(x', mean, std) with x = x'·std + mean: per token with normalize="token", else x itself."""
        if self.config.normalize != "token":
            return x, 0.0, 1.0
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5  # as in the authors' code
        return (x - mean) / std, mean, std

    def restore(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """A decoded reconstruction x̂ [..., D] in the units of x [..., D]: undoes standardize."""
        _, mean, std = self.standardize(x.to(self.W_enc.dtype))
        return x_hat * std + mean

    def checked_theta(self) -> Tensor:
        """θ, or Unavailable if it was never estimated: silence here would mean that nothing or everything fires."""
        if self.theta.isnan():
            raise Unavailable("θ of this SAE was never estimated; train it, call batchtopk.calibrate, or encode with "
                              'selection="batch"')
        return self.theta

    def save(self, folder: str | os.PathLike) -> None:
        """Write config.json and sae.safetensors into `folder`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "sae.safetensors", self.state_dict())
        write_atomically(folder / "config.json", self.config.to_json().encode())

    @classmethod
    def load(cls, folder: str | os.PathLike, device: str = "cpu") -> SAE:
        """Read what save wrote. Unavailable if there is nothing, InputError if it is something else."""
        folder = Path(folder)
        for name in ("config.json", "sae.safetensors"):
            if not (folder / name).is_file():
                raise Unavailable(f"{str(folder)!r} is not a run: it has no {name}; give a folder that `train` wrote")
        sae = cls(Config.from_json((folder / "config.json").read_text(encoding="utf-8")))
        try:
            sae.load_state_dict(load_tensors(folder / "sae.safetensors")[0])
        except RuntimeError as error:
            raise InputError(f"{str(folder / 'sae.safetensors')!r} does not match its config.json: {error}") from error
        return sae.to(device)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it: readers see the old or the new, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically."""
    from safetensors.torch import save

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(on_cpu, metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; InputError if it is damaged or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} is not a whole safetensors file ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# 5. Loss
# ---------------------------------------------------------------------------------------------------------------------


def auxiliary_loss(x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
                   k: int) -> Tensor:
    """L_aux (Gao et al. 2024; paper, section 3): dead latents reconstruct what the others left over.

    Each token's k largest pre-activations among the n dead latents, signed: after a ReLU a latent whose pre-activations
    are all negative would never get a gradient. b_dec is not added, because the residual is already free of it.

    Args: x [B, D]; residual x - x̂ [B, D], detached, so that no live latent is pulled; the dead latents' own rows W_enc
        [n, D], b_enc [n], W_dec [n, D]; b_dec [D].
    Returns: [] mean over tokens of ‖residual - ê‖².
    """
    z = functional.linear(x - b_dec, W_enc, b_enc)
    values, latent = z.topk(min(k, len(b_enc)), dim=1)
    f = torch.zeros_like(z).scatter(1, latent, values)
    return (residual - f @ W_dec).square().sum(1).mean()


def count_dead_(sae: SAE, fired: Tensor, n_tokens: int) -> Tensor:
    """Enter a batch of n_tokens, in which `fired` [F] bool latents were active, in tokens_since_fired.

    Returns the indices [n] of the latents that are dead now: silent for config.dead_tokens tokens or more.
    """
    sae.tokens_since_fired.add_(n_tokens).masked_fill_(fired, 0)
    return (sae.tokens_since_fired >= sae.config.dead_tokens).nonzero().squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# 6. θ: one number that stands in for the batch
# ---------------------------------------------------------------------------------------------------------------------


def update_theta_(sae: SAE, threshold: float, n_updates: int) -> None:
    """Running estimate of θ = E[smallest positive kept entry of a batch] (paper, equation 4).

    An exponential average with its bias correction in the rate: the first batch is taken whole, the second with weight
    1/(2 - r), and so on down to r, which equals dividing a plain average that started from 0 by 1 - (1 - r)^n. Without
    it θ is 36 % short after 100 steps at r = 0.01, and a θ that is short lets too many latents fire.

    Args: threshold, the smallest kept entry of the n_updates-th batch that kept any.
    """
    rate = sae.config.theta_rate / (1 - (1 - sae.config.theta_rate) ** n_updates)
    sae.theta.copy_(threshold if n_updates == 1 else sae.theta + rate * (threshold - sae.theta))


@torch.no_grad()
def calibrate(sae: SAE, batches: Iterable[Tensor]) -> float:
    """Set θ to the mean, over batches of config.batch_size tokens, of the smallest entry that BatchTopK keeps.

    Args: batches, held-out activations [n, D] of any n, in the model's units.
    Returns: θ. Raises InputError if no batch keeps a positive entry, and then leaves θ as it was.
    """
    thresholds, bar = [], None
    for x in rebatch(batches, sae.config.batch_size, sae.W_dec.device):
        kept = encode_rows(sae, sae.standardize(x)[0], bar=bar)
        bar = kept.bar
        thresholds += [float(kept.value.min())] if len(kept.value) else []
    if not thresholds:
        raise InputError("θ cannot be calibrated: no batch held a positive pre-activation; give held-out activations")
    sae.theta.fill_(sum(thresholds) / len(thresholds))
    return float(sae.theta)


def rebatch(chunks: Iterable[Tensor], size: int, device: torch.device) -> Iterator[Tensor]:
    """Float32 batches [size, D] from tensors [..., D] of any leading size, in order; the last one may be smaller."""
    pending, n_pending = [], 0
    for chunk in [chunks] if isinstance(chunks, Tensor) else chunks:
        pending.append(chunk.reshape(-1, chunk.shape[-1]).to(device, torch.float32))
        n_pending += len(pending[-1])
        if n_pending >= size:
            *whole, rest = (pending[0] if len(pending) == 1 else torch.cat(pending)).split(size)
            yield from whole
            pending, n_pending = [rest], len(rest)
            if n_pending == size:
                yield rest
                pending, n_pending = [], 0
    if n_pending:
        yield torch.cat(pending)


# ---------------------------------------------------------------------------------------------------------------------
# 7. The training step: plain, and sparse beside it
# ---------------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one evaluation of the loss says, beside the gradients it leaves in the parameters' .grad."""

    mse: Tensor  # [] mean over tokens of ‖x - x̂‖²
    aux: Tensor  # [] mean over tokens of ‖e - ê‖², e the residual; 0 without dead latents
    n_kept: int  # entries kept, N or fewer
    n_dead: int  # latents dead after this batch
    threshold: float  # smallest kept entry, NaN if none was positive
    walks: int  # passes over the encoder: 1 unless the candidates fell short


def plain_gradients(sae: SAE, x: Tensor) -> Step:
    """The loss and its gradients by autograd, straight from the definitions: the twin of sparse_gradients.

    Args: x [B, D], standardised if the SAE does that. Leaves the gradients in .grad and enters the batch in
    tokens_since_fired.
    """
    f = sae.select(sae.pre_activations(x))
    residual = x - sae.decode(f)
    mse = residual.square().sum(1).mean()
    dead = count_dead_(sae, (f > 0).any(0), len(x))
    aux = torch.zeros_like(mse)
    if len(dead) and sae.config.aux_k:
        rows = sae.W_enc[dead], sae.b_enc[dead], sae.W_dec[dead], sae.b_dec
        aux = auxiliary_loss(x, residual.detach(), *rows, sae.config.aux_k)
    sae.zero_grad()
    (mse + sae.config.aux_coef * aux).backward()
    kept = f.detach()[f > 0]
    threshold = float(kept.min()) if len(kept) else math.nan
    return Step(mse.detach(), aux.detach(), len(kept), len(dead), threshold, walks=1)


class Kept(NamedTuple):
    """The active entries of a batch, by row, then latent: a CSR matrix but for its row starts. The rest touches only these."""

    row: Tensor  # [N] int64
    latent: Tensor  # [N] int64
    value: Tensor  # [N] positive
    bar: float  # where to put the bar for the next batch
    walks: int  # passes over the encoder


@torch.no_grad()
def encode_rows(sae: SAE, x: Tensor, selection: str = "batch", bar: float | None = None) -> Kept:
    """SAE.encode without ever holding a [B, F] tensor: the same entries, exactly, of standardised x [B, D].

    The encoder product is walked in chunks of latents, and of each chunk only entries above a bar are collected. With
    selection "theta" the bar is θ. For BatchTopK it is a fraction of the last batch's threshold (None: estimated from a
    sample of rows), and the N largest are taken from what lies above it. If that is fewer than N the bar was too high: it
    is lowered, at last to 0, and the walk repeated. For TopK each row's k largest so far are carried along.
    """
    n, walks = sae.config.n_kept(len(x)), 1
    if sae.config.activation == "topk":
        row, latent, value = _row_largest(sae, x, int(sae.config.k))
    elif selection == "theta":
        row, latent, value = _above(sae, x, float(sae.checked_theta()))
    else:
        bar = _first_bar(sae, x) if bar is None else bar
        while len((found := _above(sae, x, bar))[0]) < n and bar > 0:
            bar, walks = 0.7 * bar if walks < 4 else 0.0, walks + 1
        row, latent, value = found
        kept = largest(value, n, position=row * len(sae.b_enc) + latent)
        row, latent, value = row[kept], latent[kept], value[kept]
    order = row.argsort(stable=True)
    return Kept(row[order], latent[order], value[order], 0.95 * float(value.min()) if len(value) else 0.0, walks)


def decode_rows(sae: SAE, kept: Kept, row_starts: Tensor) -> Tensor:
    """SAE.decode of kept entries, X̂ = f W_dec + b_dec [B, D]; row_starts [B], where each row's entries begin."""
    return sum_rows(sae.W_dec, kept.latent, kept.value, row_starts) + sae.b_dec


def sum_rows(rows: Tensor, which: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Σ_i weights_i rows[which_i] over ragged groups of i, which begin at starts [G]: [G, D]; rows [R, D]."""
    return functional.embedding_bag(which, rows, starts, mode="sum", per_sample_weights=weights)


def starts_of(counts: Tensor) -> Tensor:
    """Where each group begins, from the groups' sizes."""
    return counts.cumsum(0) - counts


def _first_bar(sae: SAE, x: Tensor) -> float:
    """A bar somewhat under the threshold that 64 rows of x would have alone; 0 if they keep nothing."""
    sample = sae.pre_activations(x[:: max(1, len(x) // 64)])
    n = max(1, sae.config.n_kept(len(sample)))
    return 0.8 * max(0.0, float(sample.flatten().topk(n).values[-1]))


CHUNK_ENTRIES = 1 << 20  # pre-activations held at a time: 4 MiB stay in a CPU's cache between product and comparison


def _above(sae: SAE, x: Tensor, bar: float) -> tuple[Tensor, Tensor, Tensor]:
    """(row, latent, value) of all pre-activations above bar, by latent, then row."""
    centred, (n_rows, n_latents) = (x - sae.b_dec).T, (len(x), len(sae.b_enc))
    chunk = max(1, CHUNK_ENTRIES // n_rows)
    scratch = x.new_empty(min(chunk, n_latents), n_rows)
    indices, values = [], []
    for start in range(0, n_latents, chunk):
        part = slice(start, min(start + chunk, n_latents))
        z = torch.mm(sae.W_enc[part], centred, out=scratch[: part.stop - start]).add_(sae.b_enc[part, None]).view(-1)
        index = (z > bar).nonzero().squeeze(1)
        values.append(z[index])
        indices.append(index.add_(start * n_rows))
    index = torch.cat(indices)
    latent = index // n_rows
    return index - latent * n_rows, latent, torch.cat(values)


def _row_largest(sae: SAE, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, latent, value) of the k largest positive pre-activations of each row, by latent, then row."""
    centred, chunk = x - sae.b_dec, max(4 * k, CHUNK_ENTRIES // len(x))
    value, latent = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for start in range(0, len(sae.b_enc), chunk):
        part = slice(start, start + chunk)
        z = functional.linear(centred, sae.W_enc[part], sae.b_enc[part])
        numbers = torch.arange(start, start + z.shape[1], device=x.device).expand(len(x), -1)
        value, place = torch.cat([value, z], dim=1).topk(min(k, latent.shape[1] + z.shape[1]), dim=1)
        latent = torch.cat([latent, numbers], dim=1).gather(1, place)
    row, column = (value > 0).nonzero(as_tuple=True)
    row, latent, value = row, latent[row, column], value[row, column]
    order = latent.argsort(stable=True)
    return row[order], latent[order], value[order]


@torch.no_grad()
def sparse_gradients(sae: SAE, x: Tensor, bar: float | None) -> tuple[Step, float]:
    """plain_gradients with only the encoder product dense: the rest touches the N kept entries. Also returns the next bar.

    A kept entry i has row r_i, latent l_i, value v_i. embedding_bag sums weighted rows of a matrix by ragged groups: by
    row it decodes, by latent it forms both weight gradients. sampled_addmm computes a product at the kept places alone.
    """
    kept = encode_rows(sae, x, bar=bar)
    n_rows, row_starts = len(x), starts_of(torch.bincount(kept.row, minlength=len(x)))
    latent_counts = torch.bincount(kept.latent, minlength=len(sae.b_enc))
    latent_starts, by_latent = starts_of(latent_counts), kept.latent.argsort(stable=True)
    row, latent, value = kept.row[by_latent], kept.latent[by_latent], kept.value[by_latent]
    x_hat = decode_rows(sae, kept, row_starts)
    residual, centred = x - x_hat, x - sae.b_dec
    mse = residual.square().sum(1).mean()
    g = residual * (-2 / n_rows)  # ∂mse/∂X̂
    d_value = sampled_product(g, sae.W_dec, row_starts, kept.latent)[by_latent]  # ∂mse/∂v_i = g[r_i] · W_dec[l_i]
    sae.W_dec.grad = sum_rows(g, row, value, latent_starts)  # fᵀ g
    sae.W_enc.grad = sum_rows(centred, row, d_value, latent_starts)  # (∂mse/∂f)ᵀ (X - b_dec)
    sae.b_enc.grad = torch.zeros_like(sae.b_enc).index_add_(0, latent, d_value)  # Σ over tokens of ∂mse/∂f
    sae.b_dec.grad = g.sum(0) - sae.b_enc.grad @ sae.W_enc  # decoder's share, encoder's share: a vector times a matrix

    dead, aux = count_dead_(sae, latent_counts > 0, n_rows), torch.zeros_like(mse)
    if len(dead) and sae.config.aux_k:
        with torch.enable_grad():
            rows = [t.detach().requires_grad_() for t in (sae.W_enc[dead], sae.b_enc[dead], sae.W_dec[dead], sae.b_dec)]
            aux = auxiliary_loss(x, residual, *rows, sae.config.aux_k)
            d_W_enc, d_b_enc, d_W_dec, d_b_dec = torch.autograd.grad(sae.config.aux_coef * aux, rows)
        sae.W_enc.grad[dead], sae.b_enc.grad[dead], sae.W_dec.grad[dead] = d_W_enc, d_b_enc, d_W_dec  # were 0: silent
        sae.b_dec.grad += d_b_dec
    threshold = float(kept.value.min()) if len(kept.value) else math.nan
    return Step(mse, aux.detach(), len(kept.value), len(dead), threshold, kept.walks), kept.bar


def sampled_product(a: Tensor, b: Tensor, row_starts: Tensor, column: Tensor) -> Tensor:
    """a bᵀ at N places alone, sorted by row: [N] of a[r_i] · b[column_i]; a [B, D], b [F, D], row_starts [B]."""
    ends, zeros = torch.cat([row_starts, row_starts.new_tensor([len(column)])]), a.new_zeros(len(column))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        places = torch.sparse_csr_tensor(ends, column, zeros, (len(a), len(b)), check_invariants=False)
    return torch.sparse.sampled_addmm(places, a, b.T, beta=0.0).values()


# ---------------------------------------------------------------------------------------------------------------------
# 8. Activations of a language model
# ---------------------------------------------------------------------------------------------------------------------

TINY_GPT2 = Path(__file__).resolve().parent / "tests" / "assets" / "tiny-gpt2"  # the embedded default model


class LanguageModel:
    """A causal language model and the site in it that the SAE reads: activations out, reconstructions in.

    Attributes: model, tokenizer (Hugging Face objects); d_model, width of the site; device.
    Raises InputError for a layer, site or module path the model does not have, Unavailable if it cannot be loaded.
    """

    def __init__(self, model: str, layer: int = Config.layer, site: str = Config.site, module: str = Config.module, *,
                 dtype: str = Config.model_dtype, device: str = Config.device,
                 skip_special: bool = Config.skip_special) -> None:
        self.name, self.device, self.skip_special = model, resolve_device(device), skip_special
        bfloat16 = dtype == "bfloat16" or dtype == "auto" and self.device.type == "cuda"
        self.model, self.tokenizer = _load_model(model, torch.bfloat16 if bfloat16 else torch.float32)
        self.model.to(self.device).eval().requires_grad_(False)
        special = [i for i in self.tokenizer.all_special_ids if i is not None]
        self._special = torch.tensor(special, dtype=torch.int64, device=self.device)
        self._module, self._reads_input = find_site(self.model, layer, site, module, model)
        self.d_model = self.activations(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]

    @classmethod
    def from_config(cls, cfg: Config) -> LanguageModel:
        return cls(cfg.model, cfg.layer, cfg.site, cfg.module, dtype=cfg.model_dtype, device=cfg.device,
                   skip_special=cfg.skip_special)

    def is_kept(self, ids: Tensor) -> Tensor:
        """Which positions of ids [n, T] the SAE reads: bool [n, T]. Not the first, not special tokens, by default."""
        if not self.skip_special:
            return torch.ones_like(ids, dtype=torch.bool)
        kept = ~torch.isin(ids, self._special)
        kept[:, 0] = False
        return kept

    @torch.no_grad()
    def activations(self, ids: Tensor) -> Tensor:
        """Activations [n, T, D] at the site for ids [n, T]. The forward pass stops there: later blocks never run."""
        found = []

        def take(h: Tensor) -> Tensor:
            found.append(h)
            raise _SiteReached

        with self._hooked(take), contextlib.suppress(_SiteReached):
            self.model(ids.to(self.device), use_cache=False)
        if not found:
            raise InputError(f"the module at this site of {self.name!r} is not run in a forward pass; choose another")
        return found[0]

    @torch.no_grad()
    def logits(self, ids: Tensor, edit: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits [n, T, V] for ids [n, T]; `edit`, if given, maps the kept activations [m, D] to their replacements."""
        ids = ids.to(self.device)
        kept = self.is_kept(ids)

        def splice(h: Tensor) -> Tensor:
            h = h.clone()
            h[kept] = edit(h[kept]).to(h.dtype)
            return h

        with self._hooked(splice) if edit else contextlib.nullcontext():
            return self.model(ids, use_cache=False).logits

    @contextlib.contextmanager
    def _hooked(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Pass the site's tensor through `change` while the context is open."""

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        if self._reads_input:
            handle = self._module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self._module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


class _SiteReached(Exception):
    """Ends a forward pass at the hook."""


def find_site(model: nn.Module, layer: int, site: str, module: str, name: str) -> tuple[nn.Module, bool]:
    """(module, whether its input is read rather than its output) for a site of a causal model, or an explicit path.

    resid_pre is the input of a block (the paper's site), resid_post its output. mlp_out and attn_out are what is added
    to the residual stream: where a norm follows the MLP or attention inside the block (Gemma 2), that norm's output.
    """
    if module:
        try:
            return model.get_submodule(module), False
        except AttributeError:
            head, leaf = module.rpartition(".")[::2]
            parent = dict(model.named_modules()).get(head, model)
            known = ", ".join(n for n, _ in parent.named_children())
            raise InputError(f"{name!r} has no module {module!r}; {head or 'its top level'!r} holds: {known}") from None
    blocks = next((m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)
                   and n.rpartition(".")[2] in ("h", "layers", "blocks") and len(m)), None)
    if blocks is None:
        raise InputError(f"no list of blocks was found in {name!r}; name the module to read with --module")
    if layer >= len(blocks):
        raise InputError(f"layer is {layer}; {name!r} has blocks 0 to {len(blocks) - 1}")
    block = blocks[layer]
    if site in ("resid_pre", "resid_post"):
        return block, site == "resid_pre"
    after_norm = hasattr(block, "post_feedforward_layernorm")
    candidates = {"mlp_out": ["post_feedforward_layernorm"] * after_norm + ["mlp", "feed_forward"],
                  "attn_out": ["post_attention_layernorm"] * after_norm + ["attn", "self_attn", "attention"]}[site]
    for child in candidates:
        if hasattr(block, child):
            return getattr(block, child), False
    raise InputError(f"blocks of {name!r} have no {site}; name the module to read with --module, one of: "
                     + ", ".join(n for n, _ in block.named_children()))


def _load_model(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A causal model and its tokenizer; a local folder never asks the hub. Unavailable if that fails."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = TINY_GPT2 if name == "tiny-gpt2" else Path(name)
    source, local = (str(path), True) if path.is_dir() else (name, False)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local)
        return model, AutoTokenizer.from_pretrained(source, local_files_only=local)
    except Exception as error:
        raise Unavailable(f"model {name!r} could not be loaded; give an existing hub name or local folder") from error


def stdlib_documents(split: str) -> Iterator[str]:
    """The source files of the running Python's standard library, "train" or "held-out", in the order of a hash of their
    paths: an arbitrary order and a 10 % split that are the same for every machine and every Python version."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [(hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(), path) for path in root.rglob("*.py")
             if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)]
    for digest, path in sorted(names):
        if (digest[0] < 26) == (split == "held-out"):
            yield path.read_text(encoding="utf-8", errors="replace")


def documents(cfg: Config, split: str) -> Iterator[str]:
    """The non-empty texts of cfg.dataset, "train" or "held-out", once through. Every 20th document is held out."""
    if cfg.dataset == "stdlib":
        texts = stdlib_documents(split)
    else:
        rows = enumerate(_load_dataset(cfg))
        texts = (_text_of(row, cfg) for i, row in rows if (i % 20 == 19) == (split == "held-out"))
    yield from (text for text in texts if text.strip())


def _text_of(row: dict[str, Any], cfg: Config) -> str:
    text = row.get(cfg.text_column)
    if not isinstance(text, str):
        raise InputError(f"text_column is {cfg.text_column!r}; the columns of {cfg.dataset!r} are: {', '.join(row)}")
    return text


def _load_dataset(cfg: Config) -> Iterable[dict[str, Any]]:
    """Rows of a local file or of the training split of a hub data set, streamed."""
    path = Path(cfg.dataset)
    kinds = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
    if path.suffix in kinds:
        if not path.is_file() or not path.stat().st_size:
            problem = "is empty" if path.is_file() else "does not exist"
            raise Unavailable(f"dataset {cfg.dataset!r} {problem}; give a file with text, a hub data set or stdlib")
        options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
        arguments, options = (kinds[path.suffix],), {"data_files": str(path), **options}
    else:
        arguments, options = (cfg.dataset, cfg.dataset_config or None), {}
    from datasets import load_dataset

    try:
        try:
            return load_dataset(*arguments, split="train", streaming=True, **options)
        except RuntimeError as error:  # the repository holds a loading script; the hub keeps a parquet copy beside it
            if "script" not in str(error):
                raise
            return load_dataset(*arguments, split="train", streaming=True, revision="refs/convert/parquet")
    except Exception as error:
        raise Unavailable(f"dataset {cfg.dataset!r} could not be loaded; give an existing one, or stdlib") from error


class Contexts:
    """Documents packed into blocks of contexts [model_batch, context] of token ids, tokenised in a background thread.

    Each document is preceded by the tokenizer's begin token (its end token if it has none); nothing is padded. With
    endless=True the documents repeat; otherwise the last block may hold fewer contexts.
    `state` is the position after the last block taken: {"documents": how many were read, "rest": ids not yet used}.
    """

    def __init__(self, cfg: Config, tokenizer: Any, split: str, endless: bool = False,
                 state: dict[str, Any] | None = None) -> None:
        self.cfg, self.tokenizer, self.split, self.endless = cfg, tokenizer, split, endless
        self.state = state or {"documents": 0, "rest": torch.empty(0, dtype=torch.int64)}

    def __iter__(self) -> Iterator[Tensor]:
        for block, self.state in prefetch(self._blocks(), depth=8):
            yield block

    def _texts(self) -> Iterator[str]:
        skip = self.state["documents"]
        while True:
            n = 0
            for n, text in enumerate(documents(self.cfg, self.split), 1):
                if skip:
                    skip -= 1
                else:
                    yield text
            if n == 0:
                raise InputError(f"dataset {self.cfg.dataset!r} holds no {self.split} text; give at least 20 documents with "
                                 f"text in column {self.cfg.text_column!r}: every 20th is held out")
            if not self.endless:
                return

    def _blocks(self) -> Iterator[tuple[Tensor, dict]]:
        import numpy  # not torch.cat: in a second thread it starts a second pool of threads, which halved training speed

        cfg, rest, n_documents = self.cfg, self.state["rest"].numpy(), self.state["documents"]
        begin = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        size, texts = cfg.model_batch * cfg.context, self._texts()
        while group := list(itertools.islice(texts, 64)):
            rows = self.tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]
            rest = numpy.concatenate([rest, *([begin, *row] for row in rows)])
            n_documents += len(group)
            while len(rest) >= size:
                block, rest = torch.from_numpy(rest[:size]).view(-1, cfg.context), rest[size:]
                yield block, {"documents": n_documents, "rest": torch.from_numpy(rest)}
        if n := len(rest) // cfg.context:
            block, rest = torch.from_numpy(rest[: n * cfg.context]).view(n, -1), rest[n * cfg.context :]
            yield block, {"documents": n_documents, "rest": torch.from_numpy(rest)}


def prefetch(items: Iterable, depth: int) -> Iterator:
    """The same items, made up to `depth` ahead by a background thread, which ends with the iterator or the main thread."""
    ready: queue.Queue = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(item: Any) -> bool:
        while not stop.is_set() and threading.main_thread().is_alive():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:  # handed to the consumer, who raises it
            put((end, error))

    # Not a daemon: Python kills those at exit inside whatever native code they run, which aborts the whole process.
    threading.Thread(target=produce, name="prefetch").start()
    try:
        while (item := ready.get())[0] is not end:
            yield item[0]
        if item[1]:
            raise item[1]
    finally:
        stop.set()


class ActivationStream:
    """Shuffled training activations, without end: iterate for batches [batch_size, D] on the device.

    One buffer on the device. Half of its rows, chosen at random, are served; then the model fills them anew and all is
    shuffled again, so each activation waits among the rest for two refills on average.
    """

    def __init__(self, cfg: Config, lm: LanguageModel) -> None:
        half = math.ceil(cfg.buffer_tokens / (2 * cfg.batch_size)) * cfg.batch_size
        self.cfg, self.lm = cfg, lm
        self.contexts = Contexts(cfg, lm.tokenizer, "train", endless=True)
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.buffer = torch.empty(2 * half, lm.d_model, device=lm.device, dtype=lm.model.dtype)
        self.order = torch.arange(2 * half)  # of which the first half is to be served, the cursor says up to where
        self.cursor: int | None = None  # None: nothing has been filled yet
        self.spill = torch.empty(0, lm.d_model, device=lm.device, dtype=lm.model.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        blocks, half = iter(self.contexts), len(self.buffer) // 2
        while True:
            if self.cursor is None or self.cursor >= half:
                self._fill(blocks, self.order if self.cursor is None else self.order[:half])
                self.order, self.cursor = torch.randperm(len(self.buffer), generator=self.generator), 0
            rows = self.order[self.cursor : self.cursor + self.cfg.batch_size].to(self.buffer.device)
            self.cursor += self.cfg.batch_size
            yield self.buffer[rows]

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream stands: continuing from it gives the batches that would have followed."""
        position = torch.tensor([-1 if self.cursor is None else self.cursor, self.contexts.state["documents"]])
        return {"buffer": self.buffer, "order": self.order, "spill": self.spill, "position": position,
                "rest": self.contexts.state["rest"], "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        cursor, n_documents = state["position"].tolist()
        self.cursor = None if cursor < 0 else cursor
        self.contexts.state = {"documents": n_documents, "rest": state["rest"]}
        self.buffer, self.spill = state["buffer"].to(self.lm.device), state["spill"].to(self.lm.device)
        self.order = state["order"]
        self.generator.set_state(state["generator"])

    def _fill(self, blocks: Iterator[Tensor], rows: Tensor) -> None:
        rows, filled = rows.to(self.buffer.device), 0
        while filled < len(rows):
            if not len(self.spill):
                ids = next(blocks).to(self.lm.device)
                self.spill = self.lm.activations(ids)[self.lm.is_kept(ids)]
            now = rows[filled : filled + len(self.spill)]
            self.buffer[now] = self.spill[: len(now)]
            self.spill = self.spill[len(now) :]
            filled += len(now)


def held_out_contexts(cfg: Config, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Held-out contexts [n, T] to calibrate θ on and to evaluate on: disjoint, drawn at random from the same documents."""
    wanted = [math.ceil(tokens / (cfg.context - 1)) for tokens in (cfg.calibration_tokens, cfg.eval_tokens)]
    blocks, total = [], 0
    for block in Contexts(cfg, tokenizer, "held-out"):
        blocks.append(block)
        total += len(block)
        if total >= sum(wanted):
            break
    if total < 2:
        raise InputError(f"dataset {cfg.dataset!r} holds out fewer than 2 contexts of {cfg.context} tokens; give more text")
    contexts = torch.cat(blocks)[torch.randperm(total, generator=torch.Generator().manual_seed(0))]
    n = min(wanted[0], total * wanted[0] // sum(wanted)) or 1
    return contexts[:n], contexts[n : sum(wanted)]


def shuffled_activations(lm: LanguageModel, contexts: Tensor, model_batch: int) -> Tensor:
    """The kept activations [n, D], float32, of contexts [N, T], in a random order that is always the same.

    Shuffled because what BatchTopK keeps depends on the batch: in training a batch mixes tokens of many contexts.
    """
    x = torch.cat([lm.activations(ids)[lm.is_kept(ids)] for ids in contexts.to(lm.device).split(model_batch)]).float()
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)]


# ---------------------------------------------------------------------------------------------------------------------
# 9. Training
# ---------------------------------------------------------------------------------------------------------------------


class StepStats(NamedTuple):
    """What Trainer.step reports, about the batch it was given, in the units of the SAE's inputs."""

    loss: float  # mse + α·aux
    mse: float  # mean over tokens of ‖x - x̂‖²
    aux: float  # mean over tokens of ‖e - ê‖², e the residual; 0 without dead latents
    fvu: float  # mse over the variance of the first batches: 1 is predicting the mean
    l0: float  # mean active latents per token
    dead: int  # latents silent for config.dead_tokens tokens or more
    threshold: float  # smallest kept entry, NaN if none was positive; θ is its expectation
    lr: float
    walks: int  # passes over the encoder product: 1 unless the candidates fell short of N


class Trainer:
    """Trains one SAE step by step: project the decoder's gradient, Adam, renormalise the decoder's rows.

    normalize="scale" trains as if the inputs were s·x, with mean squared norm D around their mean, yet never scales
    anything: a ReLU dictionary is homogeneous, so training on s·x equals training on x with biases, θ and the biases'
    learning rate divided by s. The weights are in the model's units at all times and there is nothing to fold.

    Attributes: sae; tokens_seen; steps; rewalks, steps whose candidates fell short and were walked again.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.device = cfg, resolve_device(cfg.device)
        self.sae = SAE(cfg).to(self.device)
        self.tokens_seen = self.steps = self.rewalks = self.theta_updates = 0
        self.bar: float | None = None  # where candidate selection starts, from the last batch
        self.scale: float | None = None  # s, set from the first batch together with b_dec
        sae, betas = self.sae, (cfg.beta1, cfg.beta2)
        groups = [{"params": [sae.W_enc, sae.W_dec]}, {"params": [sae.b_enc, sae.b_dec]}]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, betas=betas, fused=True)

    @torch.no_grad()
    def initialize_(self, x: Tensor) -> None:
        """Start b_dec at the mean of x [n, D] and set the scale s; step does it with its first batch if nobody did."""
        x = self.sae.standardize(x.to(self.device, torch.float32))[0]
        self.sae.b_dec.copy_(x.mean(0))
        self.variance = float((x - self.sae.b_dec).square().sum(1).mean()) or 1.0
        self.scale = math.sqrt(x.shape[1] / self.variance) if self.cfg.normalize == "scale" else 1.0

    def learning_rate(self) -> float:
        """Of the next step: linear warm-up, constant, linear decay to zero, by tokens."""
        cfg, left = self.cfg, self.cfg.tokens - self.tokens_seen
        rise = (self.tokens_seen + cfg.batch_size) / max(cfg.warmup * cfg.tokens, 1)
        return cfg.lr * max(0.0, min(1.0, rise, left / max(cfg.decay * cfg.tokens, 1)))

    def step(self, x: Tensor) -> StepStats:
        """One training step on x [B, D], in the model's units. InputError for another shape or non-finite values."""
        if x.ndim != 2 or x.shape[1] != self.cfg.d_model or not len(x) or not x.is_floating_point():
            raise InputError(f"x is {x.dtype} of shape {list(x.shape)}; give floats of shape [B, {self.cfg.d_model}]")
        if self.scale is None:
            self.initialize_(x)
        sae = self.sae
        x = sae.standardize(x.to(self.device, torch.float32))[0]
        if self.cfg.step == "plain":
            result = plain_gradients(sae, x)
        else:
            result, self.bar = sparse_gradients(sae, x, self.bar)
        if not math.isfinite(mse := float(result.mse)):
            raise InputError(f"the loss is {mse} at token {self.tokens_seen}: x is not finite, or lr is too high")
        lr = self._update_parameters_()
        self.tokens_seen += len(x)
        self.steps += 1
        self.rewalks += result.walks > 1
        if result.n_kept:
            self.theta_updates += 1
            update_theta_(sae, result.threshold, self.theta_updates)
        aux = float(result.aux)
        return StepStats(mse + self.cfg.aux_coef * aux, mse, aux, mse / self.variance, result.n_kept / len(x),
                         result.n_dead, result.threshold, lr, result.walks)

    @torch.no_grad()
    def _update_parameters_(self) -> float:
        """Project, Adam, renormalise; returns the learning rate."""
        W_dec, lr = self.sae.W_dec, self.learning_rate()
        along = (W_dec.grad * W_dec).sum(1, keepdim=True)
        W_dec.grad.addcmul_(W_dec, along, value=-1)  # growing along itself would only be undone by the renormalisation
        weights, biases = self.optimizer.param_groups  # Adam divides gradients by their size: of it only ε has units
        weights.update(lr=lr, eps=1e-8 / self.scale**2)
        biases.update(lr=lr / self.scale, eps=1e-8 / self.scale)
        self.optimizer.step()
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return lr

    def save(self, path: str | os.PathLike, stream: ActivationStream | None = None) -> None:
        """Everything a resumed run needs to be the run, in one safetensors file, whole or not at all."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        names = {parameter: name for name, parameter in self.sae.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            tensors |= {f"adam.{names[parameter]}.{key}": value for key, value in moments.items()}
        counters = ("tokens_seen", "steps", "rewalks", "theta_updates", "bar", "scale", "variance")
        scalars = {name: getattr(self, name) for name in counters}
        if stream is not None:
            tensors |= {f"stream.{name}": tensor for name, tensor in stream.state_dict().items()}
        save_tensors(Path(path), tensors, {"trainer": json.dumps(scalars)})

    def load(self, path: str | os.PathLike, stream: ActivationStream | None = None) -> None:
        """Continue from what save wrote. Unavailable if there is no such file."""
        if not Path(path).is_file():
            raise Unavailable(f"{str(path)!r} does not exist: this run left no state to continue from")
        tensors, metadata = load_tensors(Path(path))
        parts: dict[str, dict[str, Tensor]] = {"sae": {}, "adam": {}, "stream": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        for name, value in json.loads(metadata["trainer"]).items():
            setattr(self, name, value)
        self.sae.load_state_dict(parts["sae"])
        for name, tensor in parts["adam"].items():
            parameter, _, key = name.partition(".")
            tensor = tensor if key == "step" else tensor.to(self.device)
            self.optimizer.state[getattr(self.sae, parameter)][key] = tensor
        if stream is not None:
            if not parts["stream"]:
                raise Unavailable(f"{str(path)!r} belongs to a run that is finished; there is nothing to resume")
            stream.load_state_dict(parts["stream"])


def train(cfg: Config, batches: Iterable[Tensor], held_out: Iterable[Tensor] | None = None, *,
          trainer: Trainer | None = None, on_step: Callable[[Trainer, StepStats], None] | None = None) -> SAE:
    """Train an SAE on cfg.tokens tokens and calibrate its θ.

    Args:
        batches: any iterable of float tensors [n, D] of any n, in the model's units. One that can be iterated again (a
            list) is, until cfg.tokens tokens have been seen.
        held_out: the same, for calibrating θ. Without it the first batches, up to 5 % of cfg.tokens and at most
            cfg.calibration_tokens, are set aside for that and never trained on.
        trainer: one to continue with, new by default.
        on_step: called after every step.
    Returns: the SAE. Raises InputError if `batches` ends early, or for values no SAE can be trained on.
    """
    trainer = trainer or Trainer(cfg)
    stream = rebatch(_repeat(batches), cfg.batch_size, trainer.device)
    if held_out is None:
        n = max(1, min(cfg.calibration_tokens, cfg.tokens // 20) // cfg.batch_size)
        held_out = list(itertools.islice(stream, n))
        if held_out and trainer.scale is None:
            trainer.initialize_(torch.cat(held_out))
    while trainer.tokens_seen < cfg.tokens:
        if (x := next(stream, None)) is None:
            raise InputError(f"the batches ended after {trainer.tokens_seen} of {cfg.tokens} tokens; give more, or a list, "
                             "which can be repeated, or lower tokens")
        stats = trainer.step(x[: cfg.tokens - trainer.tokens_seen])
        if on_step:
            on_step(trainer, stats)
    calibrate(trainer.sae, held_out)
    return trainer.sae


def _repeat(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches, again and again if the iterable allows it; ends where a pass yields nothing."""
    while True:
        n = 0
        for n, batch in enumerate(batches, 1):
            yield batch
        if n == 0:
            return


def train_run(cfg: Config, lm: LanguageModel, folder: str | os.PathLike, *, resume: bool = False,
              on_step: Callable[[Trainer, StepStats], None] | None = None) -> dict[str, Any]:
    """A whole run on a language model, into `folder`: train, calibrate on held-out text, save, evaluate.

    Leaves config.json, sae.safetensors, metrics.jsonl (some 100 records of training, 10 with held-out metrics) and
    state.safetensors, which resume=True continues from; it is written every cfg.checkpoint_minutes and when on_step
    raises KeyboardInterrupt. Returns what evaluate_run returns.
    Raises Unavailable if the folder is in use or, with resume, holds nothing to resume.
    """
    folder, started = Path(folder), time.perf_counter()
    state, metrics = folder / "state.safetensors", folder / "metrics.jsonl"
    check_run_folder(folder, resume)
    trainer, stream, records = Trainer(cfg), ActivationStream(cfg, lm), []
    if resume:
        trainer.load(state, stream)
        records = metrics.read_text().splitlines()
        records = [line for line in records if json.loads(line)["tokens"] <= trainer.tokens_seen]
    calibration, evaluation = held_out_contexts(cfg, lm.tokenizer)
    held_out = shuffled_activations(lm, calibration, cfg.model_batch)
    probe = shuffled_activations(lm, evaluation[: max(1, 8192 // cfg.context)], cfg.model_batch)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", cfg.to_json().encode())
    write_atomically(metrics, "".join(line + "\n" for line in records).encode())
    percent, saved = trainer.tokens_seen * 100 // cfg.tokens, time.monotonic()

    def after_step(trainer: Trainer, stats: StepStats) -> None:
        nonlocal percent, saved
        before, percent = percent, trainer.tokens_seen * 100 // cfg.tokens
        if percent > before:
            record = {"tokens": trainer.tokens_seen, **stats._asdict()}
            if percent // 10 > before // 10:
                record["held_out"] = to_json_values(evaluate(trainer.sae, [probe]))
            with open(metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if time.monotonic() - saved > 60 * cfg.checkpoint_minutes:
            trainer.save(state, stream)
            saved = time.monotonic()
        if on_step:
            on_step(trainer, stats)

    try:
        sae = train(cfg, stream, [held_out], trainer=trainer, on_step=after_step)
    except KeyboardInterrupt:
        trainer.save(state, stream)
        raise
    trainer.save(state)
    sae.save(folder)
    return evaluate_run(sae, lm, folder, evaluation, started)


def check_run_folder(folder: Path, resume: bool = False) -> None:
    """Unavailable if a new run's folder is in use, or a resumed one's holds no state."""
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Unavailable(f"run {str(folder)!r} exists; choose another name, or continue it with --resume")
    if resume and not (folder / "state.safetensors").is_file():
        raise Unavailable(f"{str(folder)!r} holds no state.safetensors; give the folder of an interrupted run")


# ---------------------------------------------------------------------------------------------------------------------
# 10. Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(sae: SAE, batches: Iterable[Tensor], lm: LanguageModel | None = None,
             contexts: Tensor | None = None) -> dict[str, Any]:
    """Metrics on held-out activations, for both selections side by side. Moves nothing in the SAE.

    Args:
        batches: float tensors [n, D] of any n, in the model's units; regrouped to config.batch_size rows, over which
            the selection "batch" chooses.
        lm, contexts: token ids [n, T]; if given, cross-entropy with the reconstruction spliced into the model as well.
    Returns: {"tokens": how many, "batch": metrics, "theta": metrics}, the metrics being
        l0: mean active latents per token          l0_histogram: [c] tokens with c active latents, c = 0, 1, 2 …
        mse: mean over tokens of ‖x - x̂‖²          fvu: Σ‖x - x̂‖² / Σ‖x - x̄‖², x̄ the mean of all tokens, in float64
        explained_variance: 1 - fvu                nmse: fvu with each token standardised, x̄ its own mean (the paper's)
        frac_alive: share of latents that fired    feature_density: [F] share of tokens on which each latent fired
        and with lm, in nats per predicted token, ce_clean: the model untouched; ce_sae: reconstruction spliced in;
        ce_zero, ce_mean: zeros, the mean activation instead; ce_degradation = ce_sae - ce_clean, positive is worse;
        ce_recovered = (ce_zero - ce_sae) / (ce_zero - ce_clean); kl: divergence of the spliced model's prediction from
        the clean one's.
    Raises: Unavailable if θ was never estimated; InputError if batches are empty.
    """
    sae = sae if sae.W_dec.dtype == torch.float32 else copy.deepcopy(sae).float()  # its weights, in float32 arithmetic
    n, total, squares, own_variance, origin = 0, 0.0, 0.0, 0.0, None
    sums = {s: {"error": 0.0, "own_error": 0.0, "fired": 0.0, "active": []} for s in ("batch", "theta")}
    for x in rebatch(batches, sae.config.batch_size, sae.W_dec.device):
        origin = x[:1].double() if origin is None else origin  # sums around some token: digits for a variance far from 0
        shifted, variance = x.double() - origin, x.double().var(1)
        n, total, squares = n + len(x), total + shifted.sum(0), squares + shifted.square().sum()
        own_variance += float((variance > 0).sum()) * (x.shape[1] - 1)
        for selection, s in sums.items():
            x_hat, kept, counts = reconstruct_rows(sae, x, selection)
            error = (x - x_hat).double().square().sum(1)
            s["error"] += float(error.sum())
            s["own_error"] += float((error / variance).nan_to_num(0.0, 0.0, 0.0).sum())
            s["fired"] = s["fired"] + torch.bincount(kept.latent, minlength=len(sae.b_enc)).double()
            s["active"].append(counts)
    if n == 0:
        raise InputError("there is nothing to evaluate: the batches hold no activations")
    total_variance = float(squares - total.square().sum() / n)
    result: dict[str, Any] = {"tokens": n}
    for selection, s in sums.items():
        active, fvu = torch.cat(s["active"]), s["error"] / total_variance if total_variance > 0 else math.nan
        result[selection] = {
            "fvu": fvu, "explained_variance": 1 - fvu, "mse": s["error"] / n, "nmse": s["own_error"] / own_variance,
            "l0": float(active.double().mean()), "frac_alive": float((s["fired"] > 0).double().mean()),
            "l0_histogram": torch.bincount(active).tolist(), "feature_density": (s["fired"] / n).float(),
        }
    if lm is not None:
        for selection, losses in splice_losses(sae, lm, contexts, (origin[0] + total / n).float()).items():
            result[selection] |= losses
    return result


def reconstruct_rows(sae: SAE, x: Tensor, selection: str) -> tuple[Tensor, Kept, Tensor]:
    """(x̂, its active entries, their number per row) of x [B, D], as SAE.forward gives it, from the active entries alone."""
    kept = encode_rows(sae, sae.standardize(x)[0], selection)
    counts = torch.bincount(kept.row, minlength=len(x))
    return sae.restore(decode_rows(sae, kept, starts_of(counts)), x), kept, counts


@torch.no_grad()
def splice_losses(sae: SAE, lm: LanguageModel, contexts: Tensor, mean: Tensor) -> dict[str, dict[str, float]]:
    """The cross-entropy metrics of evaluate for both selections, over contexts [n, T]; mean [D] is the mean activation.

    Only the positions the SAE reads are replaced. As many contexts at a time as make about one batch, over which the
    selection "batch" chooses.
    """
    edits = {"ce_zero": torch.zeros_like, "ce_mean": lambda h: mean.to(h).expand_as(h)}
    edits |= {selection: lambda h, s=selection: reconstruct_rows(sae, h.float(), s)[0] for selection in ("batch", "theta")}
    sums, n = dict.fromkeys(["ce_clean", *edits, "kl_batch", "kl_theta"], 0.0), 0
    for ids in contexts.to(lm.device).split(max(1, sae.config.batch_size // contexts.shape[1])):
        targets, clean = ids[:, 1:].flatten(), lm.logits(ids)[:, :-1].flatten(0, 1).float().log_softmax(-1)
        sums["ce_clean"] += float(functional.nll_loss(clean, targets, reduction="sum"))
        n += len(targets)
        for name, edit in edits.items():
            log_p = lm.logits(ids, edit)[:, :-1].flatten(0, 1).float().log_softmax(-1)
            sums[name] += float(functional.nll_loss(log_p, targets, reduction="sum"))
            if name in ("batch", "theta"):
                sums[f"kl_{name}"] += float(functional.kl_div(log_p, clean, reduction="sum", log_target=True))
    per_token = {name: value / n for name, value in sums.items()}
    clean, zero = per_token["ce_clean"], per_token["ce_zero"]
    return {selection: {
        "ce_clean": clean, "ce_sae": per_token[selection], "ce_zero": zero, "ce_mean": per_token["ce_mean"],
        "ce_degradation": per_token[selection] - clean, "kl": per_token[f"kl_{selection}"],
        "ce_recovered": (zero - per_token[selection]) / (zero - clean) if zero != clean else math.nan,
    } for selection in ("batch", "theta")}


def evaluate_run(sae: SAE, lm: LanguageModel, folder: str | os.PathLike, contexts: Tensor | None = None,
                 started: float | None = None) -> dict[str, Any]:
    """Evaluate the SAE of a run on held-out text of its own data set: JSON-ready.

    Returns {"run", "tokens" trained on, "seconds", "k", "theta_value", "eval_tokens", "batch": …, "theta": …}, the last
    two as in evaluate, less the per-latent densities.
    """
    cfg, started = sae.config, started or time.perf_counter()
    contexts = held_out_contexts(cfg, lm.tokenizer)[1] if contexts is None else contexts
    x = shuffled_activations(lm, contexts, cfg.model_batch)
    metrics = to_json_values(evaluate(sae, [x], lm, contexts[: math.ceil(cfg.ce_tokens / cfg.context)]))
    return {"run": str(folder), "tokens": cfg.tokens, "seconds": round(time.perf_counter() - started, 2), "k": cfg.k,
            "theta_value": float(sae.theta), "eval_tokens": metrics.pop("tokens"), **metrics}


def to_json_values(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without their tensors (the densities of single latents)."""
    return {name: to_json_values(value) if isinstance(value, dict) else value
            for name, value in metrics.items() if not isinstance(value, Tensor)}


# ---------------------------------------------------------------------------------------------------------------------
# 11. Export
# ---------------------------------------------------------------------------------------------------------------------


class ExportedSAE(nn.Module):
    """The inference form of an SAE, written for TorchScript: JumpReLU with one threshold, f = z · 1[z > θ].

    Nothing here depends on the batch, and the file it is saved to needs torch alone. x may have any leading dimensions
    and any float dtype; the result is float32.
    """

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            self.register_buffer(name, getattr(sae, name).detach().float().cpu().clone())
        self.k = int(sae.config.k) if sae.config.activation == "topk" else 0
        self.register_buffer("theta", (sae.theta if self.k else sae.checked_theta()).detach().cpu().clone())
        self.per_token: bool = sae.config.normalize == "token"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to latents f [..., F]."""
        z = functional.linear(self.standardize(x)[0] - self.b_dec, self.W_enc, self.b_enc)
        if self.k:  # an SAE trained with activation="topk": each row's k largest
            values, latent = z.topk(self.k, dim=-1)
            return torch.zeros_like(z).scatter(-1, latent, values.relu())
        return torch.where(z > self.theta, z, torch.zeros_like(z))

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.to(self.W_enc.dtype)
        mean, std = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        if self.per_token:
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
        return (x - mean) / std, mean, std

    @torch.jit.export
    def decode(self, f: Tensor) -> Tensor:
        """Latents f [..., F] to reconstructions [..., D]; for normalize="token" in standardised units."""
        return f @ self.W_dec + self.b_dec

    @torch.jit.export
    def reconstruct(self, x: Tensor) -> Tensor:
        """x [..., D] to its reconstruction [..., D], in the units of x."""
        _, mean, std = self.standardize(x)
        return self.decode(self.forward(x)) * std + mean

    @torch.jit.export
    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The active latents alone. x [..., D], its leading dimensions flattened to rows 0, 1, 2 …

        Returns indices [2, nnz] int64, (row, latent) of each active entry by row, then latent, and values [nnz]: what
        torch.sparse_coo_tensor(indices, values, (rows, F)) takes. Rows may hold different numbers of entries, or none.
        """
        rows = x.reshape(-1, x.shape[-1])
        indices = [torch.empty(2, 0, dtype=torch.int64, device=x.device)]
        values = [torch.empty(0, dtype=self.W_enc.dtype, device=x.device)]
        for start in range(0, rows.shape[0], 1024):  # bounds memory: 1024 rows of F at a time
            f = self.forward(rows[start : start + 1024])
            index = f.nonzero()
            values.append(f[index[:, 0], index[:, 1]])
            index[:, 0] += start
            indices.append(index.t())
        return torch.cat(indices, 1), torch.cat(values)


@torch.no_grad()
def export(sae: SAE, path: str | os.PathLike) -> float:
    """Write the inference form as a TorchScript file that loads with torch.jit.load and knows nothing of batches.

    Its forward(x) gives f; decode(f), reconstruct(x) and encode_sparse(x) are ExportedSAE's. The configuration lies in
    the file's extra files as config.json.

    Before it is put in place the file is loaded again and compared with the SAE, on rows that activate it.
    Returns: the largest absolute difference found between f of the file and sae.encode; 0 is usual.
    Raises: Unavailable if θ was never estimated; RuntimeError if the reloaded file gives something else.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    config = {"config.json": sae.config.to_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    sae = copy.deepcopy(sae).float().cpu()
    try:
        with warnings.catch_warnings():  # TorchScript is frozen, hence stable; torch warns about it at every call
            warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
            torch.jit.script(ExportedSAE(sae)).save(str(temporary), _extra_files=config)
            found = {"config.json": ""}
            loaded = torch.jit.load(str(temporary), _extra_files=found)
        generator, size = torch.Generator().manual_seed(0), float(sae.theta.nan_to_num(1.0))
        chosen = torch.randint(len(sae.W_dec), (256, 8), generator=generator)
        noise = torch.randn(256, len(sae.b_dec), generator=generator)
        x = sae.b_dec + 4 * size * sae.W_dec[chosen].sum(1) + size * noise
        f, expected, ((row, latent), value) = loaded(x), sae.encode(x), loaded.encode_sparse(x)
        difference = float((f - expected).abs().max())
        same = difference <= 1e-4 * float(expected.max()) and torch.equal(value, f[row, latent])
        same &= torch.allclose(loaded.reconstruct(x), sae(x), atol=1e-4 * float(x.abs().max()))
        if not same or json.loads(found["config.json"]) != json.loads(config["config.json"]):
            raise RuntimeError(f"the exported file differs from the SAE by {difference} on 256 rows; it was not kept")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return difference
