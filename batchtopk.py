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
import functools
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
from torch.optim.adam import adam


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
    activation: str = _option("batchtopk", "batchtopk keeps the k·B largest of a batch, topk the k largest of each token, jumprelu "
                              "what exceeds a threshold learnt for each latent", choices=("batchtopk", "topk", "jumprelu"))
    bandwidth: float = _option(0.03, "jumprelu: width of the window around a threshold in which entries move it, in units of the "
                               "inputs' root mean squared norm (paper: 0.001; see README)", min=1e-9)
    jump_start: float = _option(0.3, "jumprelu: share of the run that selects as batchtopk does, whose threshold all latents' "
                                "thresholds follow until then", min=0, max=1)
    l0_coef: float = _option(0.0, "jumprelu: weight of the L0 penalty, in units of the inputs' variance; 0 adapts it until L0 is k", min=0)
    normalize: str = _option("scale", "scale: one scalar for all inputs, folded into the weights; token: each token to "
                             "mean 0 and standard deviation 1, as the authors' code does", choices=("scale", "token", "none"))
    b_dec_init: str = _option("mean", "where b_dec starts: at the mean of the first batch, or at zero (paper)", choices=("mean", "zero"))
    encoder_init: float = _option(1.0, "norm of the encoder's rows at the start, in those of the decoder's", min=0)
    # Training
    tokens: int = _option(1_000_000, "length of the run in tokens", min=1)
    batch_size: int = _option(1024, "B, tokens in a batch; a smaller one gives more steps at equal tokens", min=1)
    lr: float = _option(0.0, "peak learning rate of Adam; 0 takes 3e-3 · (1e6 / tokens)^0.3, at most 5e-3, because long runs "
                        "want lower ones (paper: 3e-4)", min=0)
    beta1: float = _option(0.5, "Adam's decay of the mean gradient (paper: 0.9)", min=0, max=1)
    beta2: float = _option(0.9, "Adam's decay of the mean squared gradient (paper: 0.99)", min=0, max=1)
    warmup: float = _option(0.02, "share of the run in which the learning rate rises to its peak", min=0, max=1)
    decay: float = _option(0.3, "share of the run in which the learning rate falls to zero", min=0, max=1)
    aux_k: int = _option(512, "dead latents per token that reconstruct the residual (paper)", min=0)
    aux_coef: float = _option(1 / 32, "α, weight of the auxiliary loss (paper)", min=0)
    dead_tokens: int = _option(20_480, "a latent silent for so many tokens is dead (authors: 5 batches of 4096)", min=1)
    step: str = _option("sparse", "sparse: only the encoder product is dense; plain: the same step by autograd, to "
                        "compare", choices=("sparse", "plain"))
    encoder_dtype: str = _option("auto", "precision in which the sparse step looks for candidates, of which float32 keeps the "
                                 "largest; auto is bfloat16 where the hardware multiplies it", choices=("auto", "float32", "bfloat16"))
    kernels: str = _option("torch", "what runs the sparse step: PyTorch's operators, or Triton kernels (on a GPU, or interpreted; "
                           "opt-in until they have been run on a GPU)", choices=("torch", "triton"))
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
    text_shuffle: int = _option(8192, "contexts that are read and shuffled at a time, before the model runs on "
                                    "them: a few long documents can fill the buffer", min=1)
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
                finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                if not finite or not low <= value <= high:
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
        if max(self.beta1, self.beta2) >= 1:
            raise InputError(f"beta1 is {self.beta1}, beta2 {self.beta2}; give numbers below 1")
        if self.kernels == "triton" and self.step == "plain":
            raise InputError('kernels is "triton", but the plain step has none; use step="sparse"')
        if self.warmup + self.decay > 1:
            raise InputError(f"warmup + decay is {self.warmup + self.decay:g}; shares of one run, so at most 1")

    def n_kept(self, rows: int) -> int:
        """N, the entries kept among `rows` tokens."""
        return int(self.k * rows)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate: as given, or by the length of the run (README, "Training choices")."""
        return self.lr or min(5e-3, 3e-3 * (1e6 / self.tokens) ** 0.3)

    @classmethod
    def preset(cls, name: str, recipe: str = "ours", **overrides: Any) -> Config:
        """A named setting (see PRESETS), trained by a recipe (see RECIPES), with some fields replaced; d_model is among them."""
        for kind, chosen, known in (("preset", name, PRESETS), ("recipe", recipe, RECIPES)):
            if chosen not in known:
                raise InputError(f"{kind} {chosen!r} is unknown; choose one of: {', '.join(known)}")
        return cls(**{**PRESETS[name], **RECIPES[recipe], **overrides})

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
    "tiny": dict(n_latents=4096),
    "gpt2-small": dict(model="openai-community/gpt2", dataset="Skylion007/openwebtext", layer=8, n_latents=24576,
                       batch_size=4096, tokens=1_000_000_000, buffer_tokens=1_048_576, dead_tokens=1_000_000),
    "gemma-2-2b": dict(model="google/gemma-2-2b", dataset="Skylion007/openwebtext", layer=12, n_latents=16384,
                       batch_size=4096, tokens=1_000_000_000, buffer_tokens=524_288, dead_tokens=1_000_000),
}

RECIPES: dict[str, dict[str, Any]] = {  # what a preset says of training is replaced by a recipe
    "ours": {},
    "paper": dict(normalize="token", b_dec_init="zero", batch_size=4096, lr=3e-4, beta1=0.9, beta2=0.99, warmup=0.0, decay=0.0,
                  aux_coef=1 / 32, dead_tokens=20_480, encoder_init=0.354),  # the authors' kaiming_uniform: √(2D/F), at F = 16 D
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
    values, n = flat.detach(), min(n, len(flat))
    last = values.topk(n, sorted=False).values.min() if n else values.new_tensor(math.inf)
    kept = values > last
    ties = (values == last).nonzero().squeeze(1)
    kept[ties[: n - int(kept.sum())]] = True
    return torch.where(kept & (values > 0), flat, 0.0).view_as(z)


def largest(values: Tensor, n: int) -> Tensor:
    """Indices [n], ascending, of the n largest of values [M], float32, negative ones taken as 0; of equal ones the first.

    One integer key says both: positive floats are ordered as their bits are, and below them stands the place.
    """
    place = torch.arange(len(values) - 1, -1, -1, device=values.device)
    key = (values.float().relu().view(torch.int32).long() << 32) | place
    return key.topk(n, sorted=False).indices.sort().values


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
    With activation="jumprelu" also log_threshold [F], float32: its latents fire above exp of that, and there is no θ.
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
        self.W_enc = nn.Parameter(config.encoder_init * rows)
        self.W_dec = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(config.d_model))
        if config.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.zeros(config.n_latents))
        self.register_buffer("theta", torch.tensor(math.nan))
        self.register_buffer("tokens_since_fired", torch.zeros(config.n_latents, dtype=torch.int64))

    def _apply(self, fn: Callable, recurse: bool = True) -> SAE:
        theta, log_threshold = self.theta, getattr(self, "log_threshold", None)
        exact = log_threshold.detach().clone() if log_threshold is not None else None
        super()._apply(fn, recurse)
        self.theta = theta.to(self.W_dec.device)  # in bfloat16 a θ of 1.80 moves by 0.3 %, and L0 with it
        if exact is not None:
            self.log_threshold.data = exact.to(self.W_dec.device)
        return self

    def pre_activations(self, x: Tensor) -> Tensor:
        """What every latent reads in x, before selection: (x - b_dec) W_encᵀ + b_enc.  [B, D] -> [B, F], signed."""
        return functional.linear(x - self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x: Tensor, selection: str = "theta") -> Tensor:
        """Activations to latents.

        Args:
            x: [..., D] in the model's units; any leading dimensions, any float dtype.
            selection: "theta", the inference form Z · 1[Z > θ], in which each row depends on itself alone; or "batch",
                BatchTopK over all rows of x, as in training. With activation="topk" both keep each row's k largest, with
                "jumprelu" both keep what exceeds its latent's threshold.
        Returns: f [..., F], non-negative, in the dtype of the weights.
        Raises: InputError for another width or selection; Unavailable if θ was never estimated.
        """
        z = self.pre_activations(self.standardize(self.checked_rows(x, selection))[0])
        if self.config.activation == "topk" or selection == "batch" and self.config.activation == "batchtopk":
            f = self.select(z)
        else:
            f = z.masked_fill_(z.float() <= self.threshold(), 0.0)  # compared in float32, whatever the weights are
        return f.view(*x.shape[:-1], f.shape[-1])

    @torch.no_grad()
    def encode_sparse(self, x: Tensor, selection: str = "theta") -> tuple[Tensor, Tensor]:
        """encode's active entries alone, without ever holding F numbers for each row. Arguments and errors as for encode.

        Returns indices [2, n] int64, (row, latent) of each active entry by row, then latent, the leading dimensions of x
        flattened to rows; and values [n] float32: what torch.sparse_coo_tensor(indices, values, (rows, F)) takes.
        """
        rows = self.standardize(self.checked_rows(x, selection))[0].float()
        size = len(rows) if selection == "batch" else 4096
        parts = [encode_rows(self, part, selection) for part in rows.split(max(1, size))]
        row = torch.cat([part.row + i * size for i, part in enumerate(parts)])
        return torch.stack([row, torch.cat([p.latent for p in parts])]), torch.cat([p.value for p in parts])

    def checked_rows(self, x: Tensor, selection: str) -> Tensor:
        """x [..., D] as rows [B, D] in the dtype of the weights; InputError for another width or selection."""
        if x.shape[-1:] != self.b_dec.shape or not x.is_floating_point():
            raise InputError(f"x is {x.dtype} of shape {list(x.shape)}; give floats of shape [..., {len(self.b_dec)}]")
        if selection not in ("theta", "batch"):
            raise InputError(f"selection is {selection!r}; choose theta or batch")
        return x.reshape(-1, x.shape[-1]).to(self.W_enc.dtype)

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

    def threshold(self) -> Tensor:
        """What an entry must exceed at inference: θ [], or each latent's own threshold [F] with activation="jumprelu"."""
        return self.log_threshold.exp() if self.config.activation == "jumprelu" else self.checked_theta()

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


class Penalty(NamedTuple):
    """What activation="jumprelu" (Rajamanoharan et al. 2024) adds to the loss: coef · mean active latents per token.

    A threshold gets a gradient from entries within width/2 of it: JumpReLU is taken to fall by θ/width there as θ rises,
    and the count of active latents by 1/width (equations 11 and 12, rectangular kernel).
    """

    coef: float  # λ, in squared units of the inputs
    width: float  # ε, in units of the inputs


class JumpReLU(torch.autograd.Function):
    """(f, active) = (z · 1[z > θ], 1[z > θ]) for z [B, F], θ [F], with the gradients that Penalty tells of."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        active = (z > theta).to(z.dtype)
        return z * active, active

    @staticmethod
    def backward(ctx: Any, d_f: Tensor, d_active: Tensor) -> tuple[Tensor, Tensor, None]:
        z, theta = ctx.saved_tensors
        near = (z - theta).abs() < ctx.width / 2
        return d_f * (z > theta), -(near * (theta * d_f + d_active)).sum(0) / ctx.width, None


AUX_SHARE = 1 / 24  # of the encoder product's B·F entries may be dead latents' in an auxiliary loss: 6 products of that size


def auxiliary_loss(x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
                   cfg: Config) -> Tensor:
    """L_aux (Gao et al. 2024; paper, section 3): dead latents reconstruct what the others left over.

    Each token's aux_k largest pre-activations among the n dead latents, signed: after a ReLU a latent whose pre-activations
    are all negative would never get a gradient. b_dec is not added, because the residual is already free of it.

    Its cost is bounded: where many are dead the mean is taken over the first tokens of the batch alone, which are as
    random as any, so that its six matrix products are at most a quarter of the encoder product's arithmetic.

    Args: x [B, D]; residual x - x̂ [B, D], detached, so that no live latent is pulled; the dead latents' own rows W_enc
        [n, D], b_enc [n], W_dec [n, D]; b_dec [D].
    Returns: [] mean over tokens of ‖residual - ê‖².
    """
    n_rows = min(len(x), max(1, int(AUX_SHARE * len(x) * cfg.n_latents / len(b_enc))))
    z = functional.linear(x[:n_rows] - b_dec, W_enc, b_enc)
    f = z
    if len(b_enc) > cfg.aux_k:
        values, latent = z.topk(cfg.aux_k, dim=1)
        f = torch.zeros_like(z).scatter(1, latent, values)
    return (residual[:n_rows] - f @ W_dec).square().sum(1).mean()


def is_dead(sae: SAE, silent: Tensor) -> Tensor:
    """Which latents [F] count as dead after so many tokens [F] of silence."""
    return silent >= sae.config.dead_tokens


def silence(sae: SAE, fired: Tensor, n_tokens: int) -> Tensor:
    """For how many tokens each latent has been silent [F] after n_tokens more, in which `fired` [F] bool were active."""
    return (sae.tokens_since_fired + n_tokens).masked_fill(fired, 0)


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

    With activation="jumprelu" entries are measured in their latents' thresholds, and all of those are multiplied by the
    mean instead: L0 becomes k, so that methods are compared at equal L0, and what the thresholds are to each other stays.
    Args: batches, held-out activations [n, D] of any n, in the model's units.
    Returns: θ, or the factor. Raises InputError if no batch keeps a positive entry, and then leaves all as it was.
    """
    smallest, jumprelu = [], sae.config.activation == "jumprelu"
    for x in rebatch(batches, sae.config.batch_size, sae.W_dec.device):
        x = sae.standardize(x)[0]
        if jumprelu:
            thresholds = sae.threshold()
            _, latent, value, _ = walk(sae, x - sae.b_dec, 0.5 * thresholds[:, None])
            value = value / thresholds[latent]
            value = value[largest(value, min(sae.config.n_kept(len(x)), len(value)))]
        else:
            value = encode_rows(sae, x).value
        smallest += [float(value.min())] if len(value) else []
    if not smallest:
        raise InputError("θ cannot be calibrated: no batch held a positive pre-activation; give held-out activations")
    mean = sum(smallest) / len(smallest)
    if jumprelu:
        sae.log_threshold.add_(math.log(mean))
    else:
        sae.theta.fill_(mean)
    return mean


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
    """What one evaluation of the loss on a batch says, beside its gradients."""

    mse: float  # mean over tokens of ‖x - x̂‖²
    aux: float  # mean over tokens of ‖e - ê‖², e the residual; 0 without dead latents
    n_kept: int  # entries kept, N or fewer
    n_dead: int  # latents dead after this batch
    threshold: float  # smallest kept entry, NaN if none was positive
    bar: float  # where the next batch's candidates begin: see first_bar
    n_found: int  # candidates, the entries above this batch's bar
    walks: int  # passes over the encoder: 1 unless the candidates fell short, or on a GPU had no room


class Gradients(NamedTuple):
    """Of the loss, by parameter. The weights' come by rows, so that on a CPU they never all exist at once."""

    b_enc: Tensor  # [F]
    b_dec: Tensor  # [D]
    rows: Callable[[slice], tuple[Tensor, Tensor]]  # of W_enc[part] and of W_dec[part], for a slice of the latents
    tokens_since_fired: Tensor  # [F] no gradient, but what the buffer of that name is to become if the step is taken
    log_threshold: Tensor | None = None  # [F], with activation="jumprelu"


def plain_gradients(sae: SAE, x: Tensor, penalty: Penalty | None = None) -> tuple[Step, Gradients]:
    """The loss and its gradients by autograd, straight from the definitions: the twin of sparse_gradients.

    Args: x [B, D], standardised if the SAE does that; penalty, for activation="jumprelu". Nothing in the SAE is changed.
    """
    parameters, sparsity = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec], 0.0
    if penalty:
        parameters.append(sae.log_threshold)
        f, active = JumpReLU.apply(sae.pre_activations(x), sae.log_threshold.exp(), penalty.width)
        sparsity = penalty.coef * active.sum(1).mean()
    else:
        f = sae.select(sae.pre_activations(x))
    residual = x - sae.decode(f)
    mse, aux = residual.square().sum(1).mean(), x.new_zeros(())
    dead = is_dead(sae, sae.tokens_since_fired).nonzero().squeeze(1)
    if len(dead) and sae.config.aux_k:
        rows = sae.W_enc[dead], sae.b_enc[dead], sae.W_dec[dead], sae.b_dec
        aux = auxiliary_loss(x, residual.detach(), *rows, sae.config)
    loss = mse + sae.config.aux_coef * aux + sparsity
    d_W_enc, d_b_enc, d_W_dec, d_b_dec, *d_log_threshold = torch.autograd.grad(loss, parameters)
    kept = f.detach()[f > 0]
    silent, threshold = silence(sae, (f > 0).any(0), len(x)), float(kept.min()) if len(kept) else math.nan
    step = Step(mse.item(), aux.item(), len(kept), int(is_dead(sae, silent).sum()), threshold, bar=0.0, n_found=f.numel(), walks=1)
    return step, Gradients(d_b_enc, d_b_dec, lambda part: (d_W_enc[part], d_W_dec[part]), silent, *d_log_threshold)


class Kept(NamedTuple):
    """The active entries of a batch, by row, then latent: a CSR matrix but for its row starts. The rest touches only these."""

    row: Tensor  # [N] int64
    latent: Tensor  # [N] int64
    value: Tensor  # [N] float32; 0 marks a place that stayed empty, for want of positive entries, and counts for nothing
    near: Tensor | None = None  # [N] bool, with activation="jumprelu": whether it moves its latent's threshold, active or not


@torch.no_grad()
def sparse_gradients(sae: SAE, x: Tensor, last: Step | None = None, penalty: Penalty | None = None) -> tuple[Step, Gradients]:
    """plain_gradients with only the encoder product dense: the rest touches the N kept entries. `last` is the step before.

        collect what lies above the bar (walk), keep the N largest of it (keep)
        reconstruct from those, form the gradients from those (backward)
        were they fewer than N, because the bar was too high? then again from a lower one, at last from 0

    On a GPU the host waits once: every shape is known beforehand, and whether the candidates sufficed is read with the
    other numbers, before anything in the SAE has changed.
    """
    cfg, n, dtype = sae.config, sae.config.n_kept(len(x)), product_dtype(sae.config, x.device)
    centred = x - sae.b_dec
    if last:
        bar, n_dead = last.bar, last.n_dead
    else:
        bar, n_dead = first_bar(sae, centred), int(is_dead(sae, sae.tokens_since_fired).sum())
    dead = is_dead(sae, sae.tokens_since_fired).nonzero_static(size=n_dead).squeeze(1)
    expected = 8 * sample_rank(int(cfg.k)) * len(x) if cfg.activation == "topk" else n  # candidates, at least
    room = max(2 * expected, int(1.5 * last.n_found) if last else 0) if runs_ahead(cfg, x.device) else None
    rounding = 1.01 if dtype == torch.bfloat16 and cfg.activation != "topk" else 0.0  # an allowance for entries rounded below the bar
    for walks in itertools.count(1):
        kept, found = keep(sae, centred, bar, dtype, room, penalty)
        mse, aux, gradients = backward(sae, x, centred, kept, dead, penalty)
        fired = torch.zeros_like(sae.b_enc).index_add_(0, kept.latent, kept.value) > 0
        silent, positive = silence(sae, fired, len(x)), kept.value > 0
        threshold = torch.where(positive, kept.value, math.inf).min() if len(positive) else mse.new_tensor(math.inf)
        numbers = mse, aux, positive.sum(), is_dead(sae, silent).sum(), threshold, found
        mse, aux, n_kept, n_dead, threshold, n_found = torch.stack([t.double() for t in numbers]).tolist()  # the host waits
        if room and n_found > room:
            room *= 4
        elif bar > 0 and not penalty and (n_kept < n or threshold < rounding * bar):
            bar = lower(bar, walks)
        else:
            break
    if cfg.activation != "topk" and not penalty and n:
        bar = 0.95 * threshold if n_kept == n else 0.0  # fewer than N were positive: look at all of them again
    step = Step(mse, aux, int(n_kept), int(n_dead), threshold if n_kept else math.nan, bar, int(n_found), walks)
    return step, gradients._replace(tokens_since_fired=silent)


def backward(sae: SAE, x: Tensor, centred: Tensor, kept: Kept, dead: Tensor,
             penalty: Penalty | None = None) -> tuple[Tensor, Tensor, Gradients]:
    """(mse, aux, their gradients) from x and x - b_dec [B, D], the entries kept and the dead latents [n], one formula a line.

    A kept entry i has row r_i, latent l_i, value v_i. sum_rows adds up weighted rows of a matrix by ragged groups: by row
    it decodes, by latent it forms both weight gradients. sampled_product computes a product at the kept places alone.
    """
    cfg, x_hat = sae.config, decode_rows(sae.W_dec, kept, len(x), sae.config.kernels)  # less b_dec, as is centred
    residual = torch.sub(centred, x_hat, out=x_hat)
    mse, aux, d_dead = residual.square().sum(1).mean(), x.new_zeros(()), None
    if len(dead) and cfg.aux_k:
        with torch.enable_grad():
            rows = [t.detach().requires_grad_() for t in (sae.W_enc[dead], sae.b_enc[dead], sae.W_dec[dead], sae.b_dec)]
            aux = auxiliary_loss(x, residual, *rows, cfg)
            d_W_enc, d_b_enc_dead, d_W_dec, d_b_dec_dead = torch.autograd.grad(cfg.aux_coef * aux, rows)
            d_dead = dead, d_W_enc, d_W_dec
    g = residual.mul_(-2 / len(x))  # ∂mse/∂X̂
    d_f = sampled_product(g, sae.W_dec, kept.row, kept.latent, cfg.kernels)  # ∂mse/∂f_i = g[r_i] · W_dec[l_i]
    d_value = d_f * (kept.value > 0)
    d_b_enc = torch.zeros_like(sae.b_enc).index_add_(0, kept.latent, d_value)  # Σ over tokens of ∂mse/∂f
    d_b_dec = g.sum(0) - d_b_enc @ sae.W_enc  # decoder's share, encoder's share: a vector times a matrix
    if d_dead:
        d_b_enc.index_add_(0, dead, d_b_enc_dead)
        d_b_dec += d_b_dec_dead
    order = kept.latent.argsort(stable=True)
    entries = Kept(kept.row[order], kept.latent[order], kept.value[order])
    weights = weight_gradients(sae, entries, d_value[order], g, centred, d_dead)
    if not penalty:
        return mse, aux.detach(), Gradients(d_b_enc, d_b_dec, weights, sae.tokens_since_fired)
    theta = sae.log_threshold.exp()
    falling = kept.near * (theta[kept.latent] * d_f + penalty.coef / len(x)) / penalty.width  # as in JumpReLU.backward
    d_log_threshold = -theta * torch.zeros_like(theta).index_add_(0, kept.latent, falling)
    return mse, aux.detach(), Gradients(d_b_enc, d_b_dec, weights, sae.tokens_since_fired, d_log_threshold)


def weight_gradients(sae: SAE, entries: Kept, d_value: Tensor, g: Tensor, centred: Tensor,
                     d_dead: tuple[Tensor, Tensor, Tensor] | None) -> Callable[[slice], tuple[Tensor, Tensor]]:
    """Gradients.rows from the entries by latent, ∂mse/∂v [N], g = ∂mse/∂X̂ and X - b_dec [B, D], and dead latents' rows."""

    def rows(part: slice) -> tuple[Tensor, Tensor]:
        i, n = within(entries.latent, part, len(sae.b_enc)), part.stop - part.start
        starts = group_starts(entries.latent[i] - part.start, n)
        if sae.config.kernels == "triton":
            d_W_enc, d_W_dec = triton_weight_gradients(g, centred, entries.row[i], entries.value[i], d_value[i], starts)
        else:
            d_W_dec = sum_rows(g, entries.row[i], entries.value[i], starts)  # fᵀ g
            d_W_enc = sum_rows(centred, entries.row[i], d_value[i], starts)  # (∂mse/∂f)ᵀ (X - b_dec)
        if d_dead:
            i = within(d_dead[0], part, len(sae.b_enc))
            d_W_enc.index_add_(0, d_dead[0][i] - part.start, d_dead[1][i])
            d_W_dec.index_add_(0, d_dead[0][i] - part.start, d_dead[2][i])
        return d_W_enc, d_W_dec

    return rows


def within(latents: Tensor, part: slice, n_latents: int) -> slice:
    """Where a slice of the latents lies in ascending latents [N]; asked for all of them the host does not wait."""
    if part.stop - part.start == n_latents:
        return slice(0, len(latents))
    return slice(*torch.searchsorted(latents, latents.new_tensor([part.start, part.stop])).tolist())


def group_starts(groups: Tensor, n: int) -> Tensor:
    """Where each of n groups begins in the ascending group numbers [N], and where the last one ends: [n + 1]."""
    return torch.searchsorted(groups, torch.arange(n + 1, device=groups.device))


def decode_rows(W_dec: Tensor, kept: Kept, n_rows: int, kernels: str = "torch") -> Tensor:
    """f W_dec [B, D] from the kept entries of f, without its zeros."""
    starts = group_starts(kept.row, n_rows)
    return (triton_decode if kernels == "triton" else sum_rows)(W_dec, kept.latent, kept.value, starts)


def sum_rows(rows: Tensor, which: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Σ_i weights_i rows[which_i] over ragged groups of i: [G, D]; rows [R, D], which and weights [N], starts [G + 1]."""
    return functional.embedding_bag(which, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def sampled_product(a: Tensor, b: Tensor, row: Tensor, latent: Tensor, kernels: str = "torch") -> Tensor:
    """a bᵀ at N places alone, sorted by row: [N] of a[row_i] · b[latent_i]; a [B, D], b [F, D]."""
    starts = group_starts(row, len(a))
    if kernels == "triton":
        return triton_sampled_product(a, b, latent, starts)
    zeros = a.new_zeros(len(row))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(starts, latent, zeros, (len(a), len(b)), check_invariants=False)
    return torch.sparse.sampled_addmm(matrix, a, b.T, beta=0.0).values()


# Selection without a [B, F] tensor


@torch.no_grad()
def encode_rows(sae: SAE, x: Tensor, selection: str = "batch") -> Kept:
    """SAE.encode of standardised x [B, D] as its active entries alone, in float32: no [B, F] tensor ever exists."""
    centred = x - sae.b_dec
    if not len(x):
        return Kept(*(torch.empty(0, dtype=dtype, device=x.device) for dtype in (torch.int64, torch.int64, torch.float32)))
    if sae.config.activation == "jumprelu" or selection == "theta" and sae.config.activation == "batchtopk":
        theta = sae.threshold().expand(len(sae.b_enc))
        row, latent, value, _ = walk(sae, centred, 0.999 * theta[:, None])
        active = value > theta[latent]
        return Kept(row[active], latent[active], value[active])
    bar = first_bar(sae, centred)
    for walks in itertools.count(1):
        kept, _ = keep(sae, centred, bar)
        active = kept.value > 0
        if bar == 0 or int(active.sum()) == sae.config.n_kept(len(x)):
            return Kept(kept.row[active], kept.latent[active], kept.value[active])
        bar = lower(bar, walks)


def first_bar(sae: SAE, centred: Tensor) -> float:
    """Where the first candidates begin. For batchtopk a pre-activation, later 0.95 × the last threshold; for topk always 1,
    a factor of row_bars. Here, somewhat under the threshold that up to 64 rows of x - b_dec [B, D] would have alone; 0 if they keep nothing.
    """
    if sae.config.activation == "topk":
        return 1.0
    sample = functional.linear(centred[:: -(-len(centred) // 64)], sae.W_enc, sae.b_enc).detach()
    n = max(1, sae.config.n_kept(len(sample)))
    return 0.8 * max(0.0, float(sample.flatten().topk(n).values[-1]))


def lower(bar: float, walks: int) -> float:
    """The bar to try after `walks` tries from which the candidates fell short."""
    return 0.7 * bar if walks < 4 else 0.0


def keep(sae: SAE, centred: Tensor, bar: float, dtype: torch.dtype = torch.float32, room: int | None = None,
         penalty: Penalty | None = None) -> tuple[Kept, Tensor]:
    """The N largest entries of rows x - b_dec [B, D], or with topk the k largest of each row, out of those above the bar;
    and how many lie above it []. If the bar is not 0 and fewer than N of the values kept are positive, it was too high.
    With a penalty, all that exceeds its latent's threshold, and what is near it.
    """
    n, n_rows = sae.config.n_kept(len(centred)), len(centred)
    if penalty:
        theta = sae.log_threshold.exp()
        row, latent, value, found = walk(sae, centred, (theta - 0.51 * penalty.width).clamp_min(0.0)[:, None], dtype, room)
        near = ((value - theta[latent]).abs() < penalty.width / 2) & (value > 0)
        return Kept(row, latent, torch.where(value > theta[latent], value, 0.0), near), found
    if sae.config.activation != "topk":
        row, latent, value, found = walk(sae, centred, bar, dtype, room)
        i = largest(value, min(n, len(value)))
        return Kept(row[i], latent[i], value[i].relu()), found
    k = int(sae.config.k)
    row, latent, value, found = walk(sae, centred, bar * row_bars(sae, centred, k), dtype, room)
    i = row_largest(row, value, n_rows, k)  # an index one past the end is an empty place
    latent, value = functional.pad(latent, (0, 1)), functional.pad(value, (0, 1))
    row = torch.arange(n_rows, device=i.device).repeat_interleave(k, output_size=n)
    return Kept(row, latent[i], value[i].relu()), found


def row_bars(sae: SAE, centred: Tensor, k: int) -> Tensor:
    """For each row of x - b_dec [B, D] a bar [B] that its k largest pre-activations most likely exceed."""
    sample = functional.linear(centred, sae.W_enc[::8], sae.b_enc[::8])
    if sample_rank(k) > sample.shape[1]:
        return centred.new_zeros(len(centred))
    return sample.topk(sample_rank(k), dim=1).values[:, -1].relu()


def sample_rank(k: int) -> int:
    """The rank in a sample of every eighth entry that the k-th largest of all exceeds but once in 100,000 rows: k/8 of k
    are expected in the sample, and the rank is six standard deviations further down."""
    return math.ceil(k / 8 + 6 * math.sqrt(k * 7 / 64))


def row_largest(row: Tensor, value: Tensor, n_rows: int, k: int) -> Tensor:
    """Indices [n_rows·k], ascending in each row, of the k largest of each row's values; row [M] ascending, value [M].

    Of equal values the first; M, one past the end, for each place that a row with fewer values leaves.
    """
    starts, end = group_starts(row, n_rows), len(row)
    falling = (row << 32) | (0x7FFFFFFF - value.relu().view(torch.int32).long())  # by row, then from the largest down
    order = functional.pad(falling.argsort(stable=True), (0, 1), value=end)
    place = starts[:-1, None] + torch.arange(k, device=row.device)
    return torch.where(place < starts[1:, None], order[place.clamp(max=end)], end).sort(dim=1).values.flatten()


CHUNK_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 24}  # pre-activations held at a time: 16 MiB stay in a CPU's last cache


def walk(sae: SAE, centred: Tensor, bar: float | Tensor, dtype: torch.dtype = torch.float32,
         room: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pre-activations of rows x - b_dec [B, D] above a bar, found chunk by chunk of latents: the only dense product of a step.

    With dtype bfloat16 the product only nominates: values are computed again in float32, so that an entry is missed if
    rounding took it below the bar, never misjudged.

    Args: bar, a number or one for each row [B] or each latent [F, 1]; room, if given, how many entries are returned, whatever there is, so that
        the host need not wait to know: the places left over hold the value 0, and `found` tells if some had no room.
    Returns: row, latent [M] int64 and value [M], by row, then latent; found [], how many there are.
    """
    n_rows, n_latents, device = len(centred), len(sae.b_enc), centred.device
    columns, by_latent = operand(centred, dtype).T, isinstance(bar, Tensor) and bar.ndim == 2
    chunk = max(1, min(-(-n_latents // 4), CHUNK_ENTRIES["cpu" if device.type == "cpu" else "cuda"] // n_rows))
    scratch = torch.empty(chunk, n_rows, dtype=columns.dtype, device=device)
    indices, values, found = [], [], torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, n_latents, chunk):
        part = slice(start, min(start + chunk, n_latents))
        z = torch.mm(operand(sae.W_enc[part], dtype), columns, out=scratch[: part.stop - start])
        room_here = min(z.numel(), 4 * room * len(z) // n_latents + 256) if room else None
        index, n = compact(z, (bar[part] if by_latent else bar) - sae.b_enc[part, None], room_here, sae.config.kernels)
        value = z.view(-1)[index].float()
        values.append(value.masked_fill(index < 0, math.nan) if room else value)
        indices.append(index + start * n_rows)
        found += torch.where(n > room_here, n_rows * n_latents, n) if room else n
    index, value = torch.cat(indices), torch.cat(values)
    latent = index // n_rows
    position = (index - latent * n_rows) * n_latents + latent
    if room:
        position = position.masked_fill(value.isnan(), n_rows * n_latents)  # empty places: latent 0 of the last row, in the end
    position, order = position.sort()
    position, value = position[:room], value[order[:room]]
    latent, empty = position % n_latents, value.isnan()
    row = position // n_latents  # n_rows for an empty place, so that kernels pass it by; the others want a true row
    clamped = row.clamp(max=n_rows - 1)
    if dtype == torch.bfloat16:
        kernels = sae.config.kernels
        value = sampled_product(centred, sae.W_enc, row if kernels == "triton" else clamped, latent, kernels)
    return clamped, latent, (value + sae.b_enc[latent]).masked_fill(empty, 0.0), found


def runs_ahead(cfg: Config, device: torch.device) -> bool:
    """Whether the host issues work faster than it is done, so that shapes it would have to wait for are avoided."""
    return device.type == "cuda" or cfg.kernels == "triton"


def product_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """The precision of the encoder product in training."""
    wanted = cfg.encoder_dtype == "bfloat16" or cfg.encoder_dtype == "auto" and multiplies_bfloat16(device)
    return torch.bfloat16 if wanted else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it: GPUs from compute capability 8.0, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.11 does not tell, and is given float32
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor of the encoder product, rounded to dtype. Without instructions for bfloat16 it is rounded and then multiplied
    in float32: the same numbers but for the order of summation, 400 times faster than torch's bfloat16 product there."""
    if dtype == torch.float32:
        return t.float()
    return t.to(dtype) if multiplies_bfloat16(t.device) else t.to(dtype).float()


def compact(z: Tensor, above: Tensor, room: int | None, kernels: str) -> tuple[Tensor, Tensor | int]:
    """Flat indices [M] of the entries of z [C, B] that exceed `above`, which broadcasts to z; and how many there are.

    With room, M = room and -1 fills the places left over.
    """
    if kernels == "triton" and room is not None:
        return triton_compact(z, above.expand_as(z), room)
    mask = (z > above).view(-1)
    if room is not None:
        return mask.nonzero_static(size=room).squeeze(1), mask.sum()
    if len(mask) % 8:
        index = mask.nonzero().squeeze(1)
    else:  # look at eight at a time first: almost all are empty
        eights = mask.view(torch.int64).nonzero().squeeze(1)
        inside = mask.view(-1, 8)[eights].view(-1).nonzero().squeeze(1)
        index = eights[inside >> 3] * 8 + (inside & 7)
    return index, len(index)


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
    endless=True the documents repeat and text_shuffle of the contexts at a time are shuffled: ids are small, so they
    can be mixed far more widely than activations. Otherwise all is in order, and the last block may hold fewer contexts.
    `state` is the position after the last block taken: {"documents": how many were read before this chunk, "rest": ids
    not used by then, "chunk": its number, "served": contexts of it that were taken}.
    """

    def __init__(self, cfg: Config, tokenizer: Any, split: str, endless: bool = False,
                 state: dict[str, Any] | None = None) -> None:
        self.cfg, self.tokenizer, self.split, self.endless = cfg, tokenizer, split, endless
        self.state = state or {"documents": 0, "rest": torch.empty(0, dtype=torch.int64), "chunk": 0, "served": 0}

    def __iter__(self) -> Iterator[Tensor]:
        served = self.state["served"]
        for chunk, position in prefetch(self._chunks(), depth=1):
            for block in chunk[served:].split(self.cfg.model_batch):
                served += len(block)
                self.state = {**position, "served": served}
                yield block
            served = 0

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

    def _chunks(self) -> Iterator[tuple[Tensor, dict]]:
        import numpy  # not torch.cat: in a second thread it starts a second pool of threads, which halved training speed

        cfg, rest, n_documents, number = self.cfg, self.state["rest"].numpy(), self.state["documents"], self.state["chunk"]
        begin = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        n_blocks, texts = math.ceil(cfg.text_shuffle / cfg.model_batch) if self.endless else 1, self._texts()
        size, position = n_blocks * cfg.model_batch * cfg.context, self.state
        while group := list(itertools.islice(texts, 64)):
            rows = self.tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]
            rest = numpy.concatenate([rest, *([begin, *row] for row in rows)])
            n_documents += len(group)
            while len(rest) >= size:
                chunk, rest = rest[:size].reshape(-1, cfg.context), rest[size:]
                if self.endless:
                    chunk = numpy.random.default_rng([cfg.seed, number]).permutation(chunk)
                number += 1
                yield torch.from_numpy(chunk), position
                position = {"documents": n_documents, "rest": torch.from_numpy(rest), "chunk": number}
        if n := len(rest) // cfg.context:
            yield torch.from_numpy(rest[: n * cfg.context]).view(n, -1), position


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
        at = self.contexts.state
        position = torch.tensor([-1 if self.cursor is None else self.cursor, at["documents"], at["chunk"], at["served"]])
        return {"buffer": self.buffer, "order": self.order, "spill": self.spill, "position": position,
                "rest": at["rest"], "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        cursor, *at = state["position"].tolist()
        self.cursor = None if cursor < 0 else cursor
        self.contexts.state = {"rest": state["rest"], **dict(zip(("documents", "chunk", "served"), at))}
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

    loss: float  # mse + α·aux, with jumprelu + λ·l0
    mse: float  # mean over tokens of ‖x - x̂‖²
    aux: float  # mean over tokens of ‖e - ê‖², e the residual; 0 without dead latents
    fvu: float  # mse over the variance of the first batches: 1 is predicting the mean
    l0: float  # mean active latents per token
    dead: int  # latents silent for config.dead_tokens tokens or more
    threshold: float  # smallest kept entry, NaN if none was positive; θ is its expectation
    lr: float
    walks: int  # passes over the encoder product, see Step


L0_RATE = 0.1  # per step: how fast jumprelu's penalty follows L0 / k
UPDATE_ENTRIES = 1 << 20  # of a weight matrix, updated at a time on a CPU: 4 MiB each of it, its gradient and two moments


class Trainer:
    """Trains one SAE step by step: project the decoder's gradient, Adam, renormalise the decoder's rows.

    normalize="scale" trains as if the inputs were s·x, with mean squared norm D around their mean, yet never scales
    anything: a ReLU dictionary is homogeneous, so training on s·x equals training on x with biases, θ and the biases'
    learning rate divided by s. The weights are in the model's units at all times and there is nothing to fold.

    Attributes: sae; tokens_seen; steps; rewalks, steps that walked the encoder more than once.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.device = cfg, resolve_device(cfg.device)
        self.sae = SAE(cfg).to(self.device)
        if cfg.kernels == "triton" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # Triton launches on the current one
        self.tokens_seen = self.steps = self.rewalks = self.theta_updates = 0
        self.last: Step | None = None  # tells the next step where candidates begin and how many latents are dead
        self.l0_coef: float | None = None  # λ of jumprelu's penalty, in units of the inputs' variance
        self.scale: float | None = None  # s, set from the first batch together with b_dec
        self.variance: float | None = None  # of that batch around its mean
        self.moments = {f"{name}.{key}": torch.zeros_like(parameter, requires_grad=False)
                        for name, parameter in self.sae.named_parameters() for key in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def initialize_(self, x: Tensor) -> None:
        """Set b_dec's start and the scale s from x [n, D]; step does it with its first batch if nobody did."""
        x = self.sae.standardize(x.to(self.device, torch.float32))[0]
        variance = float((x - x.mean(0)).square().sum(1).mean())
        if not math.isfinite(variance):
            raise InputError("x is not finite; training cannot start from it")
        if self.cfg.b_dec_init == "mean":
            self.sae.b_dec.copy_(x.mean(0))
        self.variance = variance or 1.0
        self.scale = math.sqrt(x.shape[1] / self.variance) if self.cfg.normalize == "scale" else 1.0

    def learning_rate(self) -> float:
        """Of the next step: linear warm-up, constant, linear decay to zero, by tokens."""
        cfg, left = self.cfg, self.cfg.tokens - self.tokens_seen
        rise = (self.tokens_seen + cfg.batch_size) / max(cfg.warmup * cfg.tokens, 1)
        return cfg.peak_lr * max(0.0, min(1.0, rise, left / max(cfg.decay * cfg.tokens, 1)))

    def step(self, x: Tensor) -> StepStats:
        """One training step on x [B, D], in the model's units. InputError for another shape or non-finite values."""
        if x.ndim != 2 or x.shape[1] != self.cfg.d_model or not len(x) or not x.is_floating_point():
            raise InputError(f"x is {x.dtype} of shape {list(x.shape)}; give floats of shape [B, {self.cfg.d_model}]")
        if self.scale is None:
            self.initialize_(x)
        sae = self.sae
        x = sae.standardize(x.to(self.device, torch.float32))[0]
        penalty = self.penalty()
        if self.cfg.step == "plain":
            last, gradients = plain_gradients(sae, x, penalty)
        else:
            last, gradients = sparse_gradients(sae, x, self.last, penalty)
        if not math.isfinite(last.mse):
            raise InputError(f"the loss is {last.mse} at token {self.tokens_seen}: x is not finite, or lr is too high")
        sae.tokens_since_fired.copy_(gradients.tokens_since_fired)
        lr = self.learning_rate()
        self.update_parameters_(gradients, lr)
        self.last = last
        self.tokens_seen += len(x)
        self.steps += 1
        self.rewalks += last.walks > 1
        if penalty and not self.cfg.l0_coef:
            self.l0_coef *= (max(last.n_kept, 1) / len(x) / self.cfg.k) ** L0_RATE
        if self.cfg.activation == "jumprelu":
            if last.n_kept and not penalty:
                sae.log_threshold.data.fill_(math.log(last.threshold))
        elif last.n_kept:
            self.theta_updates += 1
            update_theta_(sae, last.threshold, self.theta_updates)
        sparsity = penalty.coef * last.n_kept / len(x) if penalty else 0.0
        return StepStats(last.mse + self.cfg.aux_coef * last.aux + sparsity, last.mse, last.aux, last.mse / self.variance,
                         last.n_kept / len(x), last.n_dead, last.threshold, lr, last.walks)

    def penalty(self) -> Penalty | None:
        """What the next step adds to the loss for activation="jumprelu"; None while it still selects as batchtopk does.

        Thresholds that all began near 0 would let half of all latents fire, and ones that began high would stay there while
        the pre-activations shrink, as they do at first: so they follow BatchTopK's threshold until config.jump_start.
        """
        cfg = self.cfg
        if cfg.activation != "jumprelu" or self.last is None or self.tokens_seen < cfg.jump_start * cfg.tokens:
            return None
        if self.l0_coef is None:
            theta = float(self.sae.log_threshold.detach()[0].exp())
            self.l0_coef = cfg.l0_coef or theta**2 / (2 * self.variance)  # a first guess: dropping an entry z costs about z²
        return Penalty(self.l0_coef * self.variance, cfg.bandwidth * math.sqrt(self.variance))

    @torch.no_grad()
    def update_parameters_(self, gradients: Gradients, lr: float) -> None:
        """Project the decoder's gradient, Adam, renormalise the decoder's rows.

        On a CPU so many rows at a time as stay in its caches from the gradient to the renormalisation: that halves the time.
        """
        sae, s, n_latents = self.sae, self.scale, self.cfg.n_latents
        rows = n_latents if runs_ahead(self.cfg, self.device) else max(1, UPDATE_ENTRIES // self.cfg.d_model)
        for start in range(0, n_latents, rows):
            part = slice(start, min(start + rows, n_latents))
            d_W_enc, d_W_dec = gradients.rows(part)
            if self.cfg.kernels == "triton":  # all rows at once, as runs_ahead says
                for name, gradient in (("W_enc", d_W_enc), ("W_dec", d_W_dec)):
                    moments = self.moments[name + ".exp_avg"], self.moments[name + ".exp_avg_sq"]
                    triton_adam_(getattr(sae, name), gradient, *moments, self.steps + 1, lr, (self.cfg.beta1, self.cfg.beta2),
                                 1e-8 / s**2, unit=name == "W_dec")
                continue
            W_dec = sae.W_dec[part]
            d_W_dec.addcmul_(W_dec, (d_W_dec * W_dec).sum(1, keepdim=True), value=-1)  # growth that the last line would undo
            self._adam_({"W_enc": d_W_enc, "W_dec": d_W_dec}, part, lr, 1e-8 / s**2)
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        self._adam_({"b_enc": gradients.b_enc, "b_dec": gradients.b_dec}, slice(None), lr / s, 1e-8 / s)
        if gradients.log_threshold is not None:
            self._adam_({"log_threshold": gradients.log_threshold}, slice(None), lr, 1e-8 / s**2)

    def _adam_(self, gradients: dict[str, Tensor], part: slice, lr: float, eps: float) -> None:
        """One step of Adam on rows of some parameters. It divides gradients by their size, so of their units ε alone knows."""
        parameters, first, second = zip(*((getattr(self.sae, name)[part], self.moments[name + ".exp_avg"][part],
                                           self.moments[name + ".exp_avg_sq"][part]) for name in gradients))
        steps = [torch.full((), float(self.steps), device=self.device) for _ in gradients]  # each is counted up in place
        adam(list(parameters), list(gradients.values()), list(first), list(second), [], steps, fused=True, amsgrad=False,
             beta1=self.cfg.beta1, beta2=self.cfg.beta2, lr=lr, weight_decay=0.0, eps=eps, maximize=False)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs to be the run: tensors and numbers."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        tensors |= {f"adam.{name}": moment for name, moment in self.moments.items()}
        counters = ("tokens_seen", "steps", "rewalks", "theta_updates", "last", "scale", "variance", "l0_coef")
        return tensors, {name: getattr(self, name) for name in counters}

    def set_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of state."""
        for name, value in numbers.items():
            setattr(self, name, Step(*value) if name == "last" and value else value)
        self.sae.load_state_dict(under(tensors, "sae."))
        self.moments = {name: tensor.to(self.device) for name, tensor in under(tensors, "adam.").items()}

    def save(self, path: str | os.PathLike, stream: ActivationStream | None = None) -> None:
        """Write the state, and the stream's, as one safetensors file, whole or not at all."""
        tensors, numbers = self.state()
        if stream is not None:
            tensors |= {f"stream.{name}": tensor for name, tensor in stream.state_dict().items()}
        save_tensors(Path(path), tensors, {"trainer": json.dumps(numbers)})

    def load(self, path: str | os.PathLike, stream: ActivationStream | None = None) -> None:
        """Continue from what save wrote. Unavailable if there is no such file."""
        if not Path(path).is_file():
            raise Unavailable(f"{str(path)!r} does not exist: this run left no state to continue from")
        tensors, metadata = load_tensors(Path(path))
        try:
            self.set_state(tensors, json.loads(metadata["trainer"]))
        except RuntimeError as error:
            raise InputError(f"{str(path)!r} is the state of another configuration: {error}") from error
        if stream is not None:
            if not (position := under(tensors, "stream.")):
                raise Unavailable(f"{str(path)!r} belongs to a run that is finished; there is nothing to resume")
            stream.load_state_dict(position)


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def train(cfg: Config, batches: Iterable[Tensor], held_out: Iterable[Tensor] | None = None, *,
          trainer: Trainer | None = None, on_step: Callable[[Trainer, StepStats], None] | None = None) -> SAE:
    """Train an SAE on cfg.tokens tokens and calibrate its θ.

    Args:
        batches: any iterable of float tensors [n, D] of any n, in the model's units. One that can be iterated again (a
            list) is, until cfg.tokens tokens have been seen.
        held_out: the same, for calibrating θ. Without it the first batches, 5 % of cfg.tokens but at least one batch and at
            most cfg.calibration_tokens, are set aside for that; only if `batches` are repeated are they trained on too.
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
    return evaluate_run(sae, lm, folder, (evaluation, shuffled_activations(lm, evaluation, cfg.model_batch)), started)


OWN = ("activation", "k", "n_latents", "bandwidth", "jump_start", "l0_coef", "normalize", "b_dec_init", "encoder_init", "batch_size", "lr",
       "beta1", "beta2", "warmup", "decay", "aux_k", "aux_coef", "dead_tokens", "step", "encoder_dtype", "kernels", "seed")


def train_together(configs: dict[str, Config], lm: LanguageModel, folder: str | os.PathLike, *,
                   on_step: Callable[[Config, int, list[StepStats]], None] | None = None) -> list[dict[str, Any]]:
    """Train several SAEs on the same activations, from one pass over the model, each into folder/name; evaluate them.

    They may differ in the fields named in OWN, which do not change what is read from the model.
    Called again with the same configurations it continues where it was stopped, or returns what it had found.
    Args:
        configs: by name; each batch size divides the largest.
        on_step: called with a configuration, the tokens seen and each SAE's last statistics, once for each of the largest
            batches; state is saved when it raises KeyboardInterrupt, and every checkpoint_minutes.
    Returns: evaluate_run's results, with "name", "step_seconds" spent in its training steps, and "config" added; they are
        also the lines of folder/results.jsonl.
    Raises: InputError for configurations that cannot share a stream or differ from those the folder was begun with.
    """
    folder, first, largest = Path(folder), next(iter(configs.values())), check_together(configs)
    described = {name: json.loads(cfg.to_json()) for name, cfg in configs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "configs.json").is_file() and json.loads((folder / "configs.json").read_text(encoding="utf-8")) != described:
        raise InputError(f"{str(folder)!r} was begun with other configurations; choose another folder")
    write_atomically(folder / "configs.json", json.dumps(described, indent=2).encode())
    state, results = folder / "state.safetensors", folder / "results.jsonl"
    if results.is_file():
        return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]

    stream = ActivationStream(dataclasses.replace(largest, seed=0), lm)
    trainers = {name: Trainer(cfg) for name, cfg in configs.items()}
    spent = dict.fromkeys(configs, 0.0)
    if state.is_file():
        tensors, metadata = load_tensors(state)
        numbers = json.loads(metadata["trainers"])
        for name, trainer in trainers.items():
            spent[name] = numbers[name].pop("step_seconds")
            trainer.set_state(under(tensors, f"{name}/"), numbers[name])
        stream.load_state_dict(under(tensors, "stream/"))

    def save() -> None:
        tensors, numbers = {f"stream/{key}": value for key, value in stream.state_dict().items()}, {}
        for name, trainer in trainers.items():
            parts, numbers[name] = trainer.state()
            tensors |= {f"{name}/{key}": value for key, value in parts.items()}
            numbers[name]["step_seconds"] = spent[name]
        save_tensors(state, tensors, {"trainers": json.dumps(numbers)})

    saved, batches = time.monotonic(), iter(stream)
    while (seen := next(iter(trainers.values())).tokens_seen) < first.tokens:
        x, stats = next(batches)[: first.tokens - seen].float(), {}
        for name, trainer in trainers.items():
            started = time.perf_counter()
            if trainer.scale is None:
                trainer.initialize_(x)
            for part in x.split(trainer.cfg.batch_size):
                stats[name] = trainer.step(part)
            spent[name] += time.perf_counter() - started
        try:
            if on_step:
                on_step(first, seen + len(x), list(stats.values()))
        except KeyboardInterrupt:
            save()
            raise
        if time.monotonic() - saved > 60 * first.checkpoint_minutes:
            save()
            saved = time.monotonic()
    save()  # what is evaluated below is not lost if that is stopped
    calibration, evaluation = held_out_contexts(first, lm.tokenizer)
    held_out, lines = shuffled_activations(lm, calibration, first.model_batch), []
    evaluation = evaluation, shuffled_activations(lm, evaluation, first.model_batch)
    for name, trainer in trainers.items():
        calibrate(trainer.sae, [held_out])
        trainer.sae.save(folder / name)
        result = evaluate_run(trainer.sae, lm, folder / name, evaluation)
        lines.append({"name": name, "step_seconds": round(spent[name], 2), "dead": trainer.last.n_dead / trainer.cfg.n_latents, **result,
                      "config": described[name]})
    write_atomically(results, "".join(json.dumps(line) + "\n" for line in lines).encode())
    state.unlink(missing_ok=True)
    return lines


def check_together(configs: dict[str, Config]) -> Config:
    """The configuration of the largest batch; InputError if they cannot share one stream of activations."""
    first, largest = next(iter(configs.values())), max(configs.values(), key=lambda cfg: cfg.batch_size)
    for name, cfg in configs.items():
        differing = [field for field, value in vars(cfg).items() if field not in OWN and value != getattr(first, field)]
        if differing or largest.batch_size % cfg.batch_size:
            raise InputError(f"{name} cannot be trained beside the others: " + (f"{', '.join(differing)} differs" if differing else
                             f"its batch_size, {cfg.batch_size}, does not divide {largest.batch_size}"))
    return largest


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
    return sae.restore(decode_rows(sae.W_dec, kept, len(x)) + sae.b_dec, x), kept, torch.bincount(kept.row, minlength=len(x))


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


def evaluate_run(sae: SAE, lm: LanguageModel, folder: str | os.PathLike, held_out: tuple[Tensor, Tensor] | None = None,
                 started: float | None = None) -> dict[str, Any]:
    """Evaluate the SAE of a run on held-out text of its own data set, or on (contexts, their shuffled_activations): JSON-ready.

    Returns {"run", "tokens" trained on, "seconds", "k", "theta_value" (the mean threshold of jumprelu), "eval_tokens",
    "batch": …, "theta": …}, the last two as in evaluate, less the per-latent densities.
    """
    cfg, started = sae.config, started or time.perf_counter()
    if held_out is None:
        contexts = held_out_contexts(cfg, lm.tokenizer)[1]
        held_out = contexts, shuffled_activations(lm, contexts, cfg.model_batch)
    contexts, x = held_out
    metrics = to_json_values(evaluate(sae, [x], lm, contexts[: math.ceil(cfg.ce_tokens / cfg.context)]))
    theta = sae.threshold().detach() if cfg.activation == "jumprelu" else sae.theta
    return {"run": str(folder), "tokens": cfg.tokens, "seconds": round(time.perf_counter() - started, 2), "k": cfg.k,
            "theta_value": float(theta.mean()), "eval_tokens": metrics.pop("tokens"), **metrics}


class Firings(NamedTuple):
    """Where latents fired in contexts [n, T] of token ids, by latent, then from the largest activation down."""

    contexts: Tensor  # [n, T] int64
    place: Tensor  # [N] int64, in the contexts flattened
    value: Tensor  # [N] float32
    starts: Tensor  # [F + 1] int64, where each latent begins
    n_tokens: int  # how many tokens were read, kept positions alone

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """(place, value) of one latent."""
        part = slice(int(self.starts[latent]), int(self.starts[latent + 1]))
        return self.place[part], self.value[part]


@torch.no_grad()
def find_firings(sae: SAE, lm: LanguageModel, contexts: Tensor) -> Firings:
    """All active entries of contexts [n, T], with θ."""
    x = torch.cat([lm.activations(ids)[lm.is_kept(ids)] for ids in contexts.to(lm.device).split(sae.config.model_batch)])
    (row, latent), value = (t.cpu() for t in sae.encode_sparse(x.to(sae.W_dec.device)))
    place = lm.is_kept(contexts.to(lm.device)).flatten().nonzero().squeeze(1).cpu()[row]
    order = value.argsort(descending=True, stable=True)
    order = order[latent[order].argsort(stable=True)]
    return Firings(contexts, place[order], value[order], group_starts(latent[order], len(sae.b_enc)), len(x))


def describe_latents(sae: SAE, lm: LanguageModel, contexts: Tensor, latents: Iterable[int] | None = None, *, count: int = 12,
                     top: int = 10) -> list[dict[str, Any]]:
    """What single latents respond to and what they write, on contexts [n, T] of token ids: JSON-ready.

    Args: latents, their numbers. By default `count` of those that fired on `top` tokens or more, at equal steps of rank in
        density from the densest to the rarest, so that dull ones are among them; top, how many contexts of each are shown.
    Returns for each latent {"latent", "density": share of tokens it fired on, "max", "mean": of its activations, "top": the
    contexts in which it fired most, "lower": two contexts each around the 75th, 50th and 25th percentile of its activations,
    "promotes", "suppresses": see logit_effects, "neighbours": [latent, cosine of the decoder rows]}; a context as in `example`.
    Raises InputError for numbers that are not latents.
    """
    n_latents, described = len(sae.b_enc), []
    if bad := [j for j in latents or () if not 0 <= j < n_latents]:
        raise InputError(f"latent {bad[0]} does not exist; give numbers from 0 to {n_latents - 1}")
    firings = find_firings(sae, lm, contexts)
    if latents is None:
        fired = firings.starts.diff()
        ranked = fired.argsort(descending=True, stable=True)[: int((fired >= top).sum())]
        latents = ranked[torch.linspace(0, max(0, len(ranked) - 1), min(count, len(ranked))).round().long()].tolist()
    for j in latents:
        place, value = firings.of(j)
        shown: set[int] = set()
        largest_first = unseen(place, range(len(place)), top, contexts.shape[1], shown)
        middles = [round((1 - share) * len(place)) for share in (0.75, 0.5, 0.25)]
        lower = [i for m in middles for i in unseen(place, range(m, min(m + 40, len(place))), 2, contexts.shape[1], shown)]
        cosines = functional.cosine_similarity(sae.W_dec.detach().float(), sae.W_dec[j].detach().float()[None])
        cosines[j] = -2  # not a neighbour of itself
        nearest = cosines.topk(min(5, n_latents - 1))
        described.append({
            "latent": int(j), "density": len(place) / firings.n_tokens, "max": float(value[0]) if len(value) else 0.0,
            "mean": float(value.mean()) if len(value) else 0.0, "top": [example(firings, lm.tokenizer, j, i) for i in largest_first],
            "lower": [example(firings, lm.tokenizer, j, i) for i in lower], **logit_effects(sae, lm, j),
            "neighbours": [[i, round(c, 4)] for i, c in zip(nearest.indices.tolist(), nearest.values.tolist())]})
    return described


def unseen(place: Tensor, ranks: Iterable[int], n: int, length: int, shown: set[int]) -> list[int]:
    """The first n of the ranks whose contexts, of `length` tokens, are not in `shown` yet; then they are."""
    picked: list[int] = []
    for i in ranks:
        if len(picked) == n:
            break
        if (context := int(place[i]) // length) not in shown:
            shown.add(context)
            picked.append(i)
    return picked


def example(firings: Firings, tokenizer: Any, latent: int, i: int) -> dict[str, Any]:
    """The latent's i-th largest activation in its context: {"tokens": texts of up to 24 tokens, "activations": the latent's on
    each, "peak": place among them of the token it stands for, "value"}."""
    place, value = firings.of(latent)
    length = firings.contexts.shape[1]
    context, t = divmod(int(place[i]), length)
    first = max(0, min(t - 15, length - 24))
    ids = firings.contexts[context, first : first + 24].tolist()
    beyond = place - (context * length + first)
    inside = (beyond >= 0) & (beyond < len(ids))
    activations = torch.zeros(len(ids)).index_copy_(0, beyond[inside], value[inside])
    return {"tokens": [tokenizer.decode([token]) for token in ids], "activations": [round(v, 4) for v in activations.tolist()],
            "peak": t - first, "value": float(value[i])}


@torch.no_grad()
def logit_effects(sae: SAE, lm: LanguageModel, latent: int, n: int = 8) -> dict[str, list]:
    """The n tokens whose logits a latent's decoder row raises and lowers most: {"promotes", "suppresses": [[token, effect] …]}.

    The direct path through the unembedding, less what all tokens gain, the final norm left out. Empty where the site does
    not write to the residual stream.
    """
    unembedding = lm.model.get_output_embeddings()
    if sae.config.module or unembedding is None or unembedding.weight.shape[1] != sae.W_dec.shape[1]:
        return {"promotes": [], "suppresses": []}
    logits = (unembedding.weight.float() @ sae.W_dec[latent].to(lm.device).float()).cpu()
    logits -= logits.mean()
    order = logits.argsort()
    return {name: [[lm.tokenizer.decode([token]), round(float(logits[token]), 4)] for token in best.tolist()]
            for name, best in (("promotes", order.flip(0)[:n]), ("suppresses", order[:n]))}


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
        self.register_buffer("theta", (sae.theta if self.k else sae.threshold()).detach().cpu().clone())
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


# ---------------------------------------------------------------------------------------------------------------------
# 12. GPU kernels, behind the functions of section 7: config.kernels = "triton"
# ---------------------------------------------------------------------------------------------------------------------
# One program per row of the result, so that no weight gradient is added atomically. D is the width, D2
# the next power of two, entries are as in Kept, starts as in group_starts. TRITON_INTERPRET=1 runs them on a CPU, slowly.

tl: Any = None  # triton.language, once a kernel is used: importing this module needs torch alone


@functools.cache
def _jit(kernel: Callable) -> Any:
    """The compiled kernel. Unavailable without Triton."""
    global tl
    try:
        import triton
    except ImportError as error:
        raise Unavailable('kernels="triton" needs the package triton; install it, or use kernels="torch"') from error
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable('kernels="triton" needs a GPU, or TRITON_INTERPRET=1 to be run slowly on a CPU; use kernels="torch"')
    tl = triton.language
    return triton.jit(kernel)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _compact_kernel(z, above, index, count, n, width, stride_row, stride_column, room, SIZE: tl.constexpr):
    """SIZE entries of z a program: those above go to the next free places of index, which one atomic addition reserves."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(z + place, mask=place < n, other=float("-inf")).to(tl.float32)
    bar = tl.load(above + (place // width) * stride_row + (place % width) * stride_column, mask=place < n, other=0.0)
    found = ((value > bar) & (place < n)).to(tl.int32)
    first = tl.atomic_add(count, tl.sum(found, axis=0))
    target = first + tl.cumsum(found, axis=0) - found
    tl.store(index + target, place, mask=(found > 0) & (target < room))


def triton_compact(z: Tensor, above: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """compact without waiting: (z > above).view(-1).nonzero_static(size=room), in any order, and (z > above).sum()."""
    index = torch.full((room,), -1, dtype=torch.int64, device=z.device)
    count = torch.zeros((), dtype=torch.int32, device=z.device)
    size = 1024
    _jit(_compact_kernel)[(-(-z.numel() // size),)](z, above, index, count, z.numel(), z.shape[1], above.stride(0),
                                                    above.stride(1), room, SIZE=size)
    return index, count


def _decode_kernel(W, latent, value, starts, out, D: tl.constexpr, D2: tl.constexpr):
    """out[r] = Σ_i value_i W[latent_i] over the entries of row r."""
    r, d = tl.program_id(0).to(tl.int64), tl.arange(0, D2)
    total = tl.zeros((D2,), tl.float32)
    i, end = tl.load(starts + r), tl.load(starts + r + 1)
    while i < end:
        total += tl.load(value + i) * tl.load(W + tl.load(latent + i) * D + d, mask=d < D, other=0.0)
        i += 1
    tl.store(out + r * D + d, total, mask=d < D)


def triton_decode(W: Tensor, latent: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """sum_rows(W, latent, value, starts)."""
    out = W.new_empty(len(starts) - 1, W.shape[1])
    _jit(_decode_kernel)[(len(out),)](W, latent, value, starts, out, D=W.shape[1], D2=_power_of_two(W.shape[1]))
    return out


def _sampled_product_kernel(a, b, latent, starts, out, D: tl.constexpr, D2: tl.constexpr):
    """out_i = a[r] · b[latent_i] for the entries of row r; a[r] is read once."""
    r, d = tl.program_id(0).to(tl.int64), tl.arange(0, D2)
    row = tl.load(a + r * D + d, mask=d < D, other=0.0)
    i, end = tl.load(starts + r), tl.load(starts + r + 1)
    while i < end:
        tl.store(out + i, tl.sum(row * tl.load(b + tl.load(latent + i) * D + d, mask=d < D, other=0.0), axis=0))
        i += 1


def triton_sampled_product(a: Tensor, b: Tensor, latent: Tensor, starts: Tensor) -> Tensor:
    """(a bᵀ)[row, latent] for entries sorted by row: sampled_product."""
    out = a.new_zeros(len(latent))
    _jit(_sampled_product_kernel)[(len(a),)](a, b, latent, starts, out, D=a.shape[1], D2=_power_of_two(a.shape[1]))
    return out


def _weight_gradients_kernel(g, centred, row, value, d_value, starts, d_W_enc, d_W_dec, D: tl.constexpr, D2: tl.constexpr):
    """Row j of both gradients, summed over the entries of latent j: one walk over them, no atomics."""
    j, d = tl.program_id(0).to(tl.int64), tl.arange(0, D2)
    encoder, decoder = tl.zeros((D2,), tl.float32), tl.zeros((D2,), tl.float32)
    i, end = tl.load(starts + j), tl.load(starts + j + 1)
    while i < end:
        r = tl.load(row + i) * D
        encoder += tl.load(d_value + i) * tl.load(centred + r + d, mask=d < D, other=0.0)
        decoder += tl.load(value + i) * tl.load(g + r + d, mask=d < D, other=0.0)
        i += 1
    tl.store(d_W_enc + j * D + d, encoder, mask=d < D)
    tl.store(d_W_dec + j * D + d, decoder, mask=d < D)


def triton_weight_gradients(g: Tensor, centred: Tensor, row: Tensor, value: Tensor, d_value: Tensor,
                            starts: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_rows(centred, row, d_value, starts), sum_rows(g, row, value, starts)) for entries sorted by latent."""
    d_W_enc, d_W_dec = (g.new_empty(len(starts) - 1, g.shape[1]) for _ in range(2))
    _jit(_weight_gradients_kernel)[(len(d_W_enc),)](g, centred, row, value, d_value, starts, d_W_enc, d_W_dec,
                                                    D=g.shape[1], D2=_power_of_two(g.shape[1]))
    return d_W_enc, d_W_dec


def _adam_kernel(W, gradient, first, second, lr, beta1, beta2, eps, correction1, correction2, UNIT: tl.constexpr,
                 D: tl.constexpr, D2: tl.constexpr):
    """Adam on row j; UNIT rows have the gradient along themselves removed before and unit norm restored after."""
    d = tl.arange(0, D2)
    at, inside = tl.program_id(0).to(tl.int64) * D + d, d < D
    w, g = tl.load(W + at, mask=inside, other=0.0), tl.load(gradient + at, mask=inside, other=0.0)
    if UNIT:
        g -= w * tl.sum(g * w, axis=0)
    m = beta1 * tl.load(first + at, mask=inside, other=0.0) + (1 - beta1) * g
    v = beta2 * tl.load(second + at, mask=inside, other=0.0) + (1 - beta2) * g * g
    w -= lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
    if UNIT:
        w /= tl.sqrt(tl.sum(w * w, axis=0))
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    tl.store(W + at, w, mask=inside)


def triton_adam_(W: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, lr: float, betas: tuple[float, float],
                 eps: float, unit: bool) -> None:
    """Step number `step` (from 1) of Adam on W [F, D], with unit=True between projecting the gradient and renormalising."""
    _jit(_adam_kernel)[(len(W),)](W, gradient, first, second, lr, *betas, eps, 1 - betas[0] ** step, 1 - betas[1] ** step,
                                  UNIT=unit, D=W.shape[1], D2=_power_of_two(W.shape[1]))
