"""Shared by all tests: the module on the path, planted data, the embedded language model, small settings."""

import itertools
import json
import os
import signal
import sys
import sysconfig
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin starve other tests

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import batchtopk as bt  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin without one
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when transformers is imported

TEXT = tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8")  # read faster than all the library
for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:16]:
    text = path.read_text(encoding="utf-8")
    TEXT.writelines(json.dumps({"text": text[i : i + 1000]}) + "\n" for i in range(0, len(text), 1000))
TEXT.flush()

# Small enough for seconds, otherwise the defaults of the tiny preset.
SMALL = dict(n_latents=256, k=8, tokens=4_000, batch_size=256, buffer_tokens=2048, model_batch=8,
             eval_tokens=2048, dead_tokens=2048, device="cpu", dataset=TEXT.name)

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless asked for with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"

LOADED = {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": ()}  # what from_pretrained tells

@pytest.fixture(scope="session")
def lm():
    """The embedded GPT-2, read before block 2."""
    return bt.LanguageModel("tiny-gpt2", 2, "resid_pre", device="cpu")

class Planted:
    """Data that a dictionary explains: x = mean + Σ of a few unit directions with positive coefficients."""

    def __init__(self, d_model=48, n_directions=96, active=4, seed=0):
        generator = torch.Generator().manual_seed(7 + seed)  # with 0 the SAE of seed 0 would begin with them
        directions = torch.randn(n_directions, d_model, generator=generator)
        self.directions = torch.nn.functional.normalize(directions, dim=1)
        self.active, self.mean = active, torch.randn(d_model, generator=generator)

    def sample(self, n, seed):
        """x [n, D], and which directions are active in it, bool [n, directions]."""
        generator = torch.Generator().manual_seed(1000 + seed)
        chosen = torch.rand(n, len(self.directions), generator=generator) < self.active / len(self.directions)
        size = 1 + torch.rand(n, len(self.directions), generator=generator)
        return (chosen * size) @ self.directions + self.mean, chosen

    def batch(self, n, seed):
        return self.sample(n, seed)[0]

    def stream(self, n):
        """Batches of n without end."""
        return (self.batch(n, i) for i in itertools.count())

@pytest.fixture(scope="session")
def planted():
    return Planted()

@pytest.fixture(scope="session")
def planted_sae(planted):
    """Trained once on planted data; tests must not change it."""
    cfg = bt.Config(d_model=48, n_latents=128, k=4, batch_size=256, tokens=80_000, lr=3e-3, device="cpu")
    return bt.train(cfg, planted.stream(256))

class Largest(TorchDispatchMode):
    """While it is open, `entries` is the size of the largest dense tensor that any operation has made."""
    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.entries = max(self.entries, t.numel())
        return result

def same_tensors(a, b):
    """Whether two state dicts hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)
