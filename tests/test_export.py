"""The exported file: the SAE's θ form, on its own, in TorchScript."""

import copy
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import batchtopk as bt
from conftest import same_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
ROOT = Path(__file__).resolve().parent.parent
LOAD_WITH_TORCH_ALONE = """
import sys, torch, json
x = torch.load("x.pt")
for name in ("scale", "token"):
    extra = {"config.json": ""}
    m = torch.jit.load(name + "/encoder.pt", _extra_files=extra)
    (indices, values), f = m.encode_sparse(x), m(x)
    torch.save([f, m.reconstruct(x), m.decode(f), indices, values], name + ".pt")
    print(json.loads(extra["config.json"])["k"])
assert "batchtopk" not in sys.modules and "transformers" not in sys.modules
"""

@functools.cache
def trained_once(planted, **changes):
    cfg = bt.Config(d_model=48, n_latents=128, k=4, batch_size=64, tokens=5_000, device="cpu")
    return bt.train(dataclasses.replace(cfg, **changes), planted.stream(64))

def trained(planted, normalize="scale", activation="batchtopk"):
    """An SAE that a test may change."""
    return copy.deepcopy(trained_once(planted, normalize=normalize, activation=activation))

def load(sae, folder, **options):
    bt.export(sae, folder / "encoder.pt", **options)
    return torch.jit.load(folder / "encoder.pt")

@pytest.fixture(params=["scale", "token"])
def sae(request, planted):
    return trained(planted, normalize=request.param)

def test_the_file_equals_the_sae_in_a_process_that_has_torch_alone(planted, tmp_path):
    saes = {name: trained(planted, name) for name in ("scale", "token")}
    x = planted.batch(30, 50).view(5, 3, 2, 48)
    torch.save(x, tmp_path / "x.pt")
    for name, sae in saes.items():
        assert bt.export(sae, tmp_path / name / "encoder.pt")["largest_difference"] == 0
        assert [p.name for p in (tmp_path / name).iterdir()] == ["encoder.pt"]
    command = [sys.executable, "-I", "-W", "ignore", "-c", LOAD_WITH_TORCH_ALONE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and [float(k) for k in done.stdout.split()] == [4, 4], done.stderr
    for name, sae in saes.items():
        found, x_hat, decoded, indices, values = torch.load(tmp_path / f"{name}.pt")
        f = sae.encode(x).detach()
        torch.testing.assert_close(found, f, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(x_hat, sae(x).detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoded, sae.decode(f).detach(), atol=1e-5, rtol=1e-5)
        sparse = torch.sparse_coo_tensor(indices, values, (30, 128), check_invariants=True)
        assert torch.equal(sparse.to_dense(), found.view(30, 128))
        assert f.count_nonzero(dim=-1).unique().numel() > 1, "rows should differ in length"
        assert torch.equal(indices, found.view(30, 128).nonzero().T), "by row, then latent"

@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu"])
def test_a_row_does_not_depend_on_its_batch(planted, activation, tmp_path):
    """To rounding: the processor adds up a product in another order for another number of rows."""
    sae, x = trained(planted, activation=activation), planted.batch(4096, 51)
    exported, expected = load(sae, tmp_path), sae.encode(x)
    assert torch.equal(exported(x), expected), "the same batch gives the same bits"
    for size in (*range(1, 12), 16, 31, 64, 100, 257, 512, 1000, 2048, 4095):
        f = torch.cat([exported(part) for part in x.split(size)])
        other = (f > 0) != (expected > 0)
        assert other.sum() <= 1 and (f - expected)[~other].abs().max() < 5e-6, size

def test_sparse_rows_may_be_empty_and_many(sae, tmp_path):
    with torch.no_grad():
        sae.theta.fill_(1e9)
    exported = torch.jit.script(bt.ExportedSAE(sae))
    indices, values = exported.encode_sparse(torch.randn(3000, 48))
    assert indices.shape == (2, 0) and values.shape == (0,)
    sae.theta.fill_(0.5)
    exported, x = torch.jit.script(bt.ExportedSAE(sae)), torch.randn(3000, 48)  # more rows than one piece
    (row, latent), values = exported.encode_sparse(x)
    assert torch.equal(exported(x)[row, latent], values) and row.max() > 2048
    assert len(values) == int((exported(x) > 0).sum())

def test_bfloat16_inputs_and_saes_export_in_float32(sae, tmp_path):
    bt.export(sae.bfloat16(), tmp_path / "encoder.pt")
    extra = {"config.json": ""}
    exported = torch.jit.load(tmp_path / "encoder.pt", _extra_files=extra)
    assert exported(torch.randn(3, 48).bfloat16()).dtype == torch.float32
    said = json.loads(extra["config.json"])
    assert bt.Found(**said.pop("found")) == sae.found and bt.Config(**said) == sae.config

@pytest.mark.parametrize("names", [("W_enc", "b_enc", "theta"), ("W_dec",), ("theta",)])
def test_a_file_that_differs_is_refused_and_leaves_what_was_there(names, sae, tmp_path, monkeypatch):
    """Values, reconstructions and which entries are active: each is compared."""
    class Other(bt.ExportedSAE):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            for name in names:
                setattr(self, name, 0.99 * getattr(self, name))

    (tmp_path / "encoder.pt").write_text("mine")
    monkeypatch.setattr(bt, "ExportedSAE", Other)
    with pytest.raises(RuntimeError, match="differs from the SAE"):
        bt.export(sae, tmp_path / "encoder.pt")
    assert (tmp_path / "encoder.pt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1

@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu"])
def test_nan_stays_visible_and_other_rows_are_left_alone(planted, activation, tmp_path):
    sae, x = trained(planted, activation=activation), planted.batch(6, 60)
    exported, expected = load(sae, tmp_path), sae.encode(x).detach()
    x[2, 5] = torch.nan
    good = torch.arange(6) != 2
    for encoder in (exported, sae, dataclasses.replace(sae.config, step="plain")):
        if isinstance(encoder, bt.Config):
            encoder, sae.config = sae, encoder
        (row, latent), value = encoder.encode_sparse(x)
        dense = exported(x) if encoder is exported else encoder.encode(x).detach()
        x_hat = exported.reconstruct(x) if encoder is exported else encoder(x).detach()
        assert dense[2].isnan().any() and value[row == 2].isnan().any() and x_hat[2].isnan().all()
        torch.testing.assert_close(dense[good], expected[good], atol=1e-6, rtol=1e-6)
        if activation == "topk":  # which k of a row of NaN are kept is left open
            latent[row == 2] = dense[2].isnan().nonzero().squeeze(1)
        assert torch.equal(dense[row, latent].isnan(), value.isnan()) and x_hat[good].isfinite().all()

def test_what_is_no_activation_is_refused_inside_the_file(sae, tmp_path):
    exported = load(sae, tmp_path)
    for x in (torch.ones(5, 1), torch.ones(5, 48, dtype=torch.int64), torch.tensor(1.0), torch.ones(49)):
        for method in (exported, exported.encode_sparse, exported.reconstruct)[: 3 if x.ndim else 1]:
            said = r"give floats \[\.\.\., 48\]" if x.is_floating_point() else "no floating-point numbers"
            with pytest.raises(Exception, match=said):
                method(x)

def test_what_decode_sparse_would_get_wrong_is_refused(sae, planted, tmp_path):
    """Bug here once: rows out of order, or too few of them, gave something else without an error."""
    exported = load(sae, tmp_path)
    (indices, values), n = exported.encode_sparse(planted.batch(30, 69)), 30
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    for i, v, rows, said in ((indices[:, order], values[order], n, "do not ascend"),
                             (indices, values, n - 1, "not below n_rows"),
                             (indices - 1, values, n, "not below n_rows")):
        with pytest.raises(Exception, match=said):
            exported.decode_sparse(i, v, rows)
    assert exported.decode_sparse(indices[:, :0], values[:0], 2).shape == (2, 48)

def test_autocast_is_refused_inside_the_file(sae, planted, tmp_path):
    exported, x = load(sae, tmp_path), planted.batch(3, 70)
    f = exported(x)
    with torch.autocast("cpu", torch.bfloat16):
        for use in (lambda: exported(x), lambda: exported.encode_sparse(x), lambda: exported.decode(f)):
            with pytest.raises(Exception, match="torch.autocast would"):
                use()

def test_the_file_knows_which_activations_are_of_a_size_it_was_trained_on(sae, planted, tmp_path):
    x, sae.found = planted.batch(6, 71).view(2, 3, 48), bt.Found()
    assert load(sae, tmp_path).seen(1e9 * x).all(), "no limit was found"
    limit = float(x[0, 0].norm())
    sae.config, sae.found = bt.RunConfig(**vars(sae.config)), bt.Found(norm_limit=limit)  # of a run on text
    x[1] *= 100
    x[1, 2] = torch.nan
    exported = load(sae, tmp_path)
    assert torch.equal(exported.seen(x), x.norm(dim=-1) <= limit) and exported.seen(x[0, 0])
    assert torch.equal(sae.seen(x), exported.seen(x))
    for format, file, place in (("saelens", "cfg.json", "metadata"),
                                ("dictionary-learning", "config.json", "buffer")):
        if sae.config.normalize == "scale":
            bt.export(sae, tmp_path / format, format=format)
            described = json.loads((tmp_path / format / file).read_text())[place]
            assert described["norm_limit"] == limit

def test_gradients_flow_through_every_method(sae, planted, tmp_path):
    """Bug here once: encode_sparse changed indices in place that its backward pass needed."""
    exported, weights = load(sae, tmp_path), torch.randn(2500, 48)
    gradients = []
    for reconstruct in (lambda x: exported.decode(exported(x)),
                        lambda x: exported.decode_sparse(*exported.encode_sparse(x), len(x))):
        x = planted.batch(2500, 61).requires_grad_()
        (reconstruct(x) * weights).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert gradients[0].abs().sum() > 0

def test_the_file_can_be_frozen_and_holds_no_path_nor_source(sae, planted, tmp_path):
    exported, x = load(sae, tmp_path), planted.batch(9, 62)
    assert torch.equal(torch.jit.freeze(exported)(x), exported(x))
    methods = {name for name in exported._c._method_names() if not name.startswith("_")}
    assert methods == {"forward", "seen", "encode_sparse", "decode", "decode_sparse", "reconstruct"}
    with zipfile.ZipFile(tmp_path / "encoder.pt") as file:
        held = b"".join(file.read(name) for name in file.namelist())
    assert str(ROOT).encode() not in held and b"The inference form" not in held

def test_half_precision_moves_no_threshold(sae, planted, tmp_path):
    exported, x = load(sae, tmp_path), planted.batch(3000, 63)
    found = bt.export(sae, tmp_path / "encoder.pt", x, dtype="float16")
    half, size = torch.jit.load(tmp_path / "encoder.pt"), (tmp_path / "encoder.pt").stat().st_size
    assert 0 < found["flipped"] < 0.01 * found["l0"] * 3000 and 0 < found["largest_difference"] < 0.05
    assert abs(found["exported_l0"] / found["l0"] - 1) < 0.002 and found["tokens"] == 3000
    for encoder in (half, exported.half()):
        assert torch.equal(encoder.theta, sae.theta) and encoder.W_enc.dtype == torch.float16
        assert encoder(x[:2]).dtype == torch.float32, "compared in float32"
        assert torch.equal(encoder(x), half(x))
        torch.testing.assert_close(encoder.reconstruct(x[:9]), sae(x[:9]).detach(), atol=0.02, rtol=0.02)
    assert size < 0.7 * 4 * sum(p.numel() for p in sae.parameters()) + 10_000

@pytest.mark.parametrize("damage, said", [
    (lambda sae: sae.W_enc[3].fill_(torch.nan), "not finite"), (lambda sae: sae.W_dec.zero_(), "norm 1"),
    (lambda sae: sae.W_dec[7].mul_(1.5), "norm 1"), (lambda sae: sae.theta.fill_(-5), "threshold of -5"),
    (lambda sae: sae.theta.fill_(torch.inf), "threshold of inf"),
    (lambda sae: sae.theta.fill_(1e30), "no latent is active"),
    (lambda sae: [t.zero_() for t in (sae.W_enc, sae.b_enc)], "no latent is active")])
def test_an_sae_that_cannot_come_from_training_is_refused(planted, damage, said, tmp_path):
    sae = trained(planted)
    with torch.no_grad():
        damage(sae)
    with pytest.raises(bt.InputError, match=said):
        bt.export(sae, tmp_path / "encoder.pt", planted.batch(50, 64))
    assert not list(tmp_path.iterdir())

def test_nothing_that_should_be_kept_is_replaced(planted, tmp_path):
    sae, run, other = trained(planted), tmp_path / "run", tmp_path / "mine.pt"
    sae.save(run)
    other.write_text("mine")
    (tmp_path / "mine.pt.tmp").write_text("mine too")
    (tmp_path / "link.pt").symlink_to(other)
    (tmp_path / "stopped").mkdir()  # a run of two processes
    for name in ("config.json", "state-512-0-of-2.safetensors"):
        (tmp_path / "stopped" / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path, format in [(tmp_path / "stopped", "dictionary-learning"),
                         (tmp_path / "stopped" / "state-512-0-of-2.safetensors", "torchscript"),
                         (run / "config.json", "torchscript"), (run / "sae.safetensors", "torchscript"),
                         (run, "torchscript"), (run, "dictionary-learning"),
                         (tmp_path / "link.pt", "torchscript"), (Path("/dev/null"), "torchscript")]:
        with pytest.raises(bt.InputError, match="not a regular file|file of a run"):
            bt.export(sae, path, format=format)
    with pytest.raises(bt.InputError, match="exists; give another path, or --force"):
        bt.export(sae, other, overwrite=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    bt.export(sae, other)
    assert torch.jit.load(other)(planted.batch(2, 65)).shape == (2, 128)
    assert (tmp_path / "mine.pt.tmp").read_text() == "mine too"

def test_a_full_disk_leaves_what_was_there(sae, tmp_path, monkeypatch):
    (tmp_path / "encoder.pt").write_text("mine")

    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left.*encoder.pt"):
        bt.export(sae, tmp_path / "encoder.pt")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("encoder.pt", "mine")]

MEMORY = """
import sys, torch
m, what, shape = torch.jit.load(sys.argv[1]), sys.argv[2], [int(n) for n in sys.argv[3:]]
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
with torch.no_grad():
    run, x = getattr(m, what), torch.randn(shape)
    run(x[:16])
    open("/proc/self/clear_refs", "w").write("5")  # start the peak again
    before = peak()
    run(x)
print(peak() - before)
"""

def test_where_torchscript_fails_the_error_says_what_works(tmp_path, monkeypatch):
    """As under Python 3.14 with some versions of torch."""
    def fail(module):
        raise RuntimeError("unsupported")
    monkeypatch.setattr(torch.jit, "script", fail)
    sae = bt.SAE(bt.Config(d_model=8, n_latents=16, k=2, device="cpu"))
    sae.theta.fill_(1.0)
    with pytest.raises(bt.Unavailable, match="TorchScript under Python .* other formats"):
        bt.export(sae, tmp_path / "encoder.pt")

@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("what, rows, d, n_latents, limit", [
    ("encode_sparse", 100_000, 64, 4096, 200), ("reconstruct", 4096, 256, 16384, 160)])
def test_memory_is_that_of_the_active_entries(what, rows, d, n_latents, limit, tmp_path):
    """100,000 rows once took 1.7 GB for 61 MB of entries; a matrix of 4096 × 16384 has 256 MiB.

    Bug later: memory depended on which row made a buffer double, 148 to 201 MB.
    """
    sae = bt.SAE(bt.Config(d_model=d, n_latents=n_latents, k=32, device="cpu"))
    z = sae.pre_activations(torch.randn(256, d, generator=torch.Generator().manual_seed(0))).detach()
    sae.theta.fill_(z.flatten().topk(32 * 256).values.min())
    bt.export(sae, tmp_path / "encoder.pt")
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, tmp_path / "encoder.pt", what, str(rows), str(d)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < limit, done

@pytest.mark.parametrize("module, hook", [("", "blocks.1.hook_resid_pre"), ("model.layers.3",) * 2])
def test_other_formats_say_what_a_run_has_read(module, hook, tmp_path):
    sae = bt.SAE(bt.RunConfig(d_model=8, n_latents=16, k=2, device="cpu", module=module))
    sae.found = bt.Found(norm_limit=3.0)
    sae.theta.fill_(1.0)
    for format in ("saelens", "dictionary-learning"):
        bt.export(sae, tmp_path / format, format=format)
    said = json.loads((tmp_path / "saelens/cfg.json").read_text())["metadata"]
    assert (said["hook_name"], said["prepend_bos"], said["seqpos_slice"]) == (hook, True, [1, None])
    assert said["model_class_name"] == ("AutoModelForCausalLM" if module else "HookedTransformer")
    read = json.loads((tmp_path / "dictionary-learning/config.json").read_text())["buffer"]
    assert read == {"ctx_len": 128, "prepend_bos": True, "remove_bos": True, "norm_limit": 3.0}

@pytest.mark.parametrize("text, named", [
    ('{"_name_or_path": "gpt2"}', "gpt2"), ('{"_name_or_path": "maker/small-1.0"}', "maker/small-1.0"),
    *((text, None) for text in ('{"_name_or_path": "/data/small"}', '{"_name_or_path": "./small"}', "[1]",
                                '{"_name_or_path": "a/b/c"}', '{"_name_or_path": ""}', "{", None,
                                '{"_name_or_path": null}', '{"_name_or_path": [7]}', '{"other": 1}'))])
def test_other_formats_name_a_model_in_a_local_folder_as_the_hub_does(text, named, tmp_path):
    """Bug here once: they held the path on the machine that trained, which had to be edited by hand."""
    model = tmp_path / "model"
    model.mkdir()
    if text:
        (model / "config.json").write_text(text)
    sae = bt.SAE(bt.RunConfig(d_model=8, n_latents=16, k=2, device="cpu", model=str(model)))
    sae.theta.fill_(1.0)
    for format, file, place, key in (("saelens", "cfg.json", "metadata", "model_name"),
                                     ("dictionary-learning", "config.json", "trainer", "lm_name")):
        bt.export(sae, tmp_path / format, format=format)
        said = json.loads((tmp_path / format / file).read_text())[place][key]
        assert said == (named or str(model))

@pytest.mark.parametrize("normalize, activation", [
    ("scale", "batchtopk"), ("token", "batchtopk"), ("scale", "jumprelu"), ("scale", "topk")])
def test_other_formats_hold_the_sae_or_are_refused(planted, normalize, activation, tmp_path):
    """Their layouts and formulas as ../shared/reference.md and the packages have them."""
    sae, x = trained(planted, normalize=normalize, activation=activation), planted.batch(200, 66)
    bt.export(sae, tmp_path / "saelens", format="saelens")
    cfg = json.loads((tmp_path / "saelens/cfg.json").read_text())
    t = safetensors.torch.load_file(tmp_path / "saelens/sae_weights.safetensors")
    assert t["W_enc"].shape == (48, 128) and cfg["d_in"] == 48
    assert not {"model_name", "hook_name", "prepend_bos"} & {*cfg["metadata"]}, "nobody said what was read"
    if normalize == "token":
        assert cfg["normalize_activations"] == "layer_norm"
        x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    z = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    threshold = t.get("threshold", z.topk(4).values[:, -1:] - 1e-6)
    assert cfg["architecture"] == ("topk" if activation == "topk" else "jumprelu") and cfg.get("k", 4) == 4
    expected = sae.encode(planted.batch(200, 66)).detach()
    torch.testing.assert_close(z.relu() * (z > threshold), expected, atol=1e-5, rtol=1e-5)
    if normalize == "token" or activation == "jumprelu":
        with pytest.raises(bt.InputError, match="use saelens"):
            bt.export(sae, tmp_path / "dictionary", format="dictionary-learning")
        return
    bt.export(sae, tmp_path / "dictionary", format="dictionary-learning")
    t = torch.load(tmp_path / "dictionary/ae.pt", weights_only=True)
    trainer = json.loads((tmp_path / "dictionary/config.json").read_text())["trainer"]
    assert trainer["dict_class"] == {"batchtopk": "BatchTopKSAE", "topk": "AutoEncoderTopK"}[activation]
    z = torch.nn.functional.linear(x - t["b_dec"], t["encoder.weight"], t["encoder.bias"])
    assert t["k"] == trainer["k"] == 4 and t["k"].dtype == torch.int32
    assert activation == "topk" or torch.equal(z * (z > t["threshold"]), expected)
    torch.testing.assert_close(expected @ t["decoder.weight"].T + t["b_dec"], sae.decode(expected).detach())

def write_saelens(folder, kind, dtype=torch.float32, **changes):
    """A random SAE as SAELens writes it, with decoder rows of many lengths and no special care for anything.

    Returns their encode and decode, by the formulas of their version 6.
    """
    generator = torch.Generator().manual_seed(3)
    cfg = {"architecture": kind, "d_in": 48, "d_sae": 64, "dtype": "float32", "apply_b_dec_to_input": True,
           "normalize_activations": "none", "reshape_activations": "none", "metadata": {},
           **({"k": 5, "rescale_acts_by_decoder_norm": True} if kind == "topk" else {}), **changes}
    shapes = {"W_enc": (48, 64), "b_enc": (64,), "W_dec": (64, 48), "b_dec": (48,), "threshold": (64,)}
    t = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    t["W_dec"] *= torch.linspace(0.001, 0.4, 64)[:, None]
    t["threshold"][::3] = 0  # the random ones are negative, too, which is as 0
    if kind == "topk":
        del t["threshold"]
    else:
        t["W_dec"][7] = 0
    t = {name: w.to(dtype) for name, w in t.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    safetensors.torch.save_file(t, folder / "sae_weights.safetensors")
    t = {name: w.float() for name, w in t.items()}
    norm, rescale = t["W_dec"].norm(dim=1), kind == "topk" and cfg["rescale_acts_by_decoder_norm"]
    per_token = cfg["normalize_activations"] == "layer_norm"

    def encode(x):
        if per_token:
            x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
        z = (x - t["b_dec"] * cfg["apply_b_dec_to_input"]) @ t["W_enc"] + t["b_enc"]
        if kind == "topk":
            best = (z * norm if rescale else z).topk(cfg["k"], dim=1)
            return torch.zeros_like(z).scatter(1, best.indices, best.values.relu())
        return z.relu() * (z > t["threshold"])

    def reconstruct(x):
        f = encode(x)
        x_hat = (f / norm if rescale else f) @ t["W_dec"] + t["b_dec"]
        return x_hat * x.std(1, keepdim=True) + x.mean(1, keepdim=True) if per_token else x_hat

    return encode, reconstruct, 1 if kind == "topk" else norm

@pytest.mark.parametrize("kind, dtype, changes", [
    ("jumprelu", torch.float32, {}), ("jumprelu", torch.bfloat16, {"apply_b_dec_to_input": False}),
    ("jumprelu", torch.float16, {"normalize_activations": "layer_norm"}), ("topk", torch.float32, {}),
    ("topk", torch.float32, {"rescale_acts_by_decoder_norm": False}),
    ("topk", torch.bfloat16, {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"})])
def test_an_sae_of_saelens_has_their_latents_and_reconstructions(kind, dtype, changes, planted, tmp_path):
    encode, reconstruct, norm = write_saelens(tmp_path, kind, dtype, **changes)
    sae, x = bt.SAE.load(tmp_path), planted.batch(500, 90)
    f, expected = sae.encode(x), encode(x) * norm
    assert torch.equal(f > 0, expected > 0) and 2 < f.count_nonzero() / 500 < 60
    torch.testing.assert_close(f, expected, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(sae(x), reconstruct(x), atol=5e-4, rtol=5e-4)
    (row, latent), value = sae.encode_sparse(x)
    assert torch.equal(torch.stack([row, latent]), f.nonzero().T)
    torch.testing.assert_close(value, f[row, latent], atol=1e-5, rtol=1e-5)
    if "rescale_acts_by_decoder_norm" not in changes:  # else others could be the k largest
        length = sae.W_dec.norm(dim=1)
        assert (length.sub(1).abs() < 1e-5).sum() == 64 - (kind == "jumprelu"), "but for the row that is 0"
    assert sae.config.k == (5 if kind == "topk" else 1) and not sae.W_enc.requires_grad
    found = bt.evaluate(sae, [x])
    assert found["theta"]["fvu"] == found["batch"]["fvu"]
    assert found["theta"]["l0"] == pytest.approx(int(f.count_nonzero()) / 500)
    with torch.no_grad():
        sae.b_dec += 1
    sae.save(tmp_path)  # what was saved last counts
    assert same_tensors(bt.SAE.load(tmp_path).state_dict(), sae.state_dict())

@pytest.mark.parametrize("changes, said", [
    *(({"architecture": kind}, f"architecture '{kind}'; what can be read: jumprelu, topk") for kind in (
        "standard", "gated", "batchtopk", "transcoder", "matryoshka_batchtopk")),
    ({"architecture": None}, "architecture None"), ({"hook_head_index": 0}, "hook_head_index 0"),
    ({"metadata": {"hook_head_index": 3}}, "hook_head_index 3; what can be read: None"),
    ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
    *(({"normalize_activations": name}, f"normalize_activations {name!r}; what can be read: none, layer_norm")
      for name in ("constant_norm_rescale", "expected_average_only_in", "covariance_whitening", True)),
    ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor True"),
    ({"architecture": "topk"}, "k is None"), ({"metadata": 3}, "damaged")])
def test_an_sae_of_saelens_that_cannot_be_read_is_refused_in_a_line_that_names_why(changes, said, tmp_path):
    write_saelens(tmp_path, "jumprelu", **changes)
    with pytest.raises(bt.InputError, match=said) as error:
        bt.SAE.load(tmp_path)
    assert "\n" not in str(error.value)

def test_older_files_of_saelens_hold_all_on_one_level(tmp_path, planted):
    """Before version 6 there was no metadata, and TopK was an activation function."""
    old = dict(hook_name="blocks.3.hook_mlp_out", hook_layer=3, model_name="gpt2-small", context_size=64,
               prepend_bos=False, hook_head_index=None, finetuning_scaling_factor=False, metadata=None,
               normalize_activations=False)
    write_saelens(tmp_path / "jump", "jumprelu", **old)
    read = bt.SAE.load(tmp_path / "jump").config
    found = (read.model, read.layer, read.site, read.context, read.prepend_bos, read.normalize)
    assert found == ("openai-community/gpt2", 3, "mlp_out", 64, False, "scale")
    encode, *_ = write_saelens(tmp_path / "top", "topk", **old, rescale_acts_by_decoder_norm=False)
    cfg = json.loads((tmp_path / "top/cfg.json").read_text())
    new = ("k", "rescale_acts_by_decoder_norm", "architecture", "reshape_activations")
    for name in new:
        del cfg[name]
    cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    (tmp_path / "top/cfg.json").write_text(json.dumps(cfg))
    sae, x = bt.SAE.load(tmp_path / "top"), planted.batch(50, 91)
    assert (sae.config.activation, sae.config.k) == ("topk", 5)
    torch.testing.assert_close(sae.encode(x), encode(x), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("hook, site", [
    ("blocks.0.hook_resid_pre", (0, "resid_pre")), ("blocks.11.hook_resid_post", (11, "resid_post")),
    ("blocks.5.hook_attn_out", (5, "attn_out")), ("model.layers.3", "model.layers.3"), (None, None),
    ("blocks.5.hook_resid_mid", None), ("blocks.5.attn.hook_z", None), ("blocks.x.hook_resid_pre", None),
    ("hook_embed", None), ("blocks.5.ln2.hook_normalized", None)])
def test_what_an_sae_of_saelens_reads_is_known_if_the_site_is(hook, site, tmp_path):
    said = {"hook_name": hook, "model_name": "maker/small", "norm_limit": 7.5, "context_size": None,
            "hf_hook_name": "model.layers.3" if hook else None}
    write_saelens(tmp_path, "jumprelu", metadata=said)
    sae = bt.SAE.load(tmp_path)
    cfg = sae.config
    assert isinstance(cfg, bt.RunConfig) == bool(site)
    if site:
        assert (cfg.module or (cfg.layer, cfg.site)) == site
        assert (cfg.model, sae.found.norm_limit, cfg.context) == ("maker/small", 7.5, 128)
    write_saelens(tmp_path, "jumprelu", metadata={"hook_name": hook})
    assert not isinstance(bt.SAE.load(tmp_path).config, bt.RunConfig), "no model is named"

@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "cfg.json").unlink(), lambda folder: (folder / "cfg.json").write_text("[3"),
    lambda folder: (folder / "cfg.json").write_text("[3]"),
    lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"\0" * 99),
    lambda folder: write_tensors(folder, lambda t: t.pop("b_enc")),
    lambda folder: write_tensors(folder, lambda t: t.update(W_enc=t["W_enc"].T.contiguous())),
    lambda folder: write_tensors(folder, lambda t: t.update(b_dec=t["b_dec"][1:]))])
def test_a_damaged_folder_of_saelens_is_named(damage, tmp_path):
    write_saelens(tmp_path, "jumprelu")
    damage(tmp_path)
    with pytest.raises(bt.InputError, match=re.escape(f"'{tmp_path}' is damaged, or is not in the layout")):
        bt.SAE.load(tmp_path)

def write_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / "sae_weights.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")

@pytest.mark.parametrize("normalize", ["scale", "token"])
@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu"])
def test_what_is_exported_to_saelens_comes_back_as_it_was(normalize, activation, planted, tmp_path):
    sae, x = trained(planted, normalize, activation), planted.batch(500, 92)
    bt.export(sae, tmp_path, format="saelens")
    back = bt.SAE.load(tmp_path)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(back, name), getattr(sae, name)), name
    for selection in ("theta", "batch"):
        assert torch.equal(back(x, selection), sae(x, selection))
    assert torch.equal(back.encode(x), sae.encode(x)) and type(back) is type(sae)
    assert (back.config.k, back.config.normalize) == (4, normalize)
    if activation == "batchtopk":
        assert torch.equal(back.theta, sae.theta)
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        del cfg["metadata"]["training_architecture_details"]  # no k, as in files of before
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        jump = bt.SAE.load(tmp_path)
        assert (jump.config.activation, jump.config.k) == ("jumprelu", 1)
        assert torch.equal(jump.encode(x), sae.encode(x))
    bt.export(back, tmp_path / "encoder.pt", x)
    assert torch.equal(torch.jit.load(tmp_path / "encoder.pt")(x), sae.encode(x))

PEERS = """
import sys, torch
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE
folder, x, found = sys.argv[1], torch.load(sys.argv[1] + "/x.pt"), {}
with torch.no_grad():
    for name in sys.argv[2].split():
        found[name, "saelens"] = SAE.load_from_disk(f"{folder}/{name}-saelens", device="cpu").encode(x)
        if name in ("batchtopk", "topk"):
            other = load_dictionary(f"{folder}/{name}-dictionary-learning", "cpu")[0]
            found[name, "dictionary-learning"] = other.encode(x)
torch.save(found, folder + "/found.pt")
"""

@pytest.mark.skipif("PEERS_PYTHON" not in os.environ, reason=(
    "python3 -m venv peers && "
    "peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 dictionary-learning==0.1.0 && "
    "peers/bin/pip uninstall -y torchvision && PEERS_PYTHON=peers/bin/python pytest tests/test_export.py"))
def test_the_real_packages_load_the_other_formats(planted, tmp_path):
    kinds = {"batchtopk": {}, "topk": {"activation": "topk"}, "jumprelu": {"activation": "jumprelu"},
             "token": {"normalize": "token"}}
    x, expected = planted.batch(2000, 67), {}
    torch.save(x, tmp_path / "x.pt")
    for name, changes in kinds.items():
        sae = trained(planted, **changes)
        for format in ("saelens", "dictionary-learning")[: 2 if name in ("batchtopk", "topk") else 1]:
            bt.export(sae, tmp_path / f"{name}-{format}", format=format)
            expected[name, format] = sae.encode(x).detach()
    command = [os.environ["PEERS_PYTHON"], "-W", "ignore", "-c", PEERS, str(tmp_path), " ".join(kinds)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == expected.keys()
    for name, f in found.items():
        torch.testing.assert_close(f, expected[name], atol=1e-5, rtol=1e-5)
        assert torch.equal(f > 0, expected[name] > 0), name

WRITE = """
import sys, torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, JumpReLUTrainingSAE
from sae_lens import JumpReLUTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
folder, x, found = sys.argv[1], torch.load(sys.argv[1] + "/x.pt"), {}
kinds = {"jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {}),
         "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 5}),
         "drifted": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": False}),
         "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 3.5})}
torch.manual_seed(0)
with torch.no_grad():
    for kind, (make, config, own) in kinds.items():
        for i, (b_dec, normalize, dtype) in enumerate(((True, "none", "float32"), (False, "none", "float32"),
                                                       (False, "layer_norm", "bfloat16"))):
            sae = make(config(48, 64, apply_b_dec_to_input=b_dec, normalize_activations=normalize,
                              dtype=dtype, **own))
            for p in sae.parameters():
                p.copy_(torch.randn_like(p))
            sae.W_dec *= torch.linspace(0.01, 0.4, 64)[:, None]
            if kind == "batchtopk":
                sae.topk_threshold.fill_(5)
            sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = "blocks.2.hook_mlp_out", "gpt2-small"
            path = f"{folder}/{kind}-{i}"
            sae.save_inference_model(path)
            sae = SAE.load_from_disk(path, device="cpu", dtype="float32")
            found[f"{kind}-{i}"] = sae.encode(x), sae(x), sae.W_dec
torch.save(found, folder + "/found.pt")
"""

@pytest.mark.skipif("PEERS_PYTHON" not in os.environ, reason="PEERS_PYTHON: a python that has sae-lens")
def test_what_the_real_saelens_saves_has_the_same_latents_here(planted, tmp_path):
    x = planted.batch(500, 93)
    torch.save(x, tmp_path / "x.pt")
    command = [os.environ["PEERS_PYTHON"], "-W", "ignore", "-c", WRITE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    for name, (f, x_hat, W_dec) in torch.load(tmp_path / "found.pt").items():
        sae, kind = bt.SAE.load(tmp_path / name), name.split("-")[0]
        found, norm = sae.encode(x), 1 if kind in ("topk", "drifted") else W_dec.norm(dim=1)
        assert torch.equal(found > 0, f > 0) and 2 < f.count_nonzero() / 500 < 60, name
        torch.testing.assert_close(found, f * norm, atol=5e-5, rtol=5e-5)
        torch.testing.assert_close(sae(x), x_hat, atol=5e-4, rtol=5e-4)
        cfg = sae.config
        assert (cfg.model, cfg.layer, cfg.site) == ("openai-community/gpt2", 2, "mlp_out")
        assert cfg.k == {"jumprelu": 1, "topk": 5, "drifted": 5, "batchtopk": 3.5}[kind]
        known = {"drifted": "topk", "batchtopk-2": "jumprelu"}  # bfloat16 rounds rows, so that θ would differ
        assert cfg.activation == known.get(name, known.get(kind, kind))

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_program_in_cpp_gives_the_same_bits(planted, tmp_path):
    torch_folder, x = Path(torch.__file__).parent, planted.batch(300, 68)
    include, lib = torch_folder / "include", torch_folder / "lib"
    command = ["g++", "-std=c++20", ROOT / "tests/embed/embed.cpp", "-o", tmp_path / "embed", f"-I{include}",
               f"-I{include}/torch/csrc/api/include", f"-L{lib}", f"-Wl,-rpath,{lib}",
               "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    exported = load(trained(planted), tmp_path)
    torch.save(x, tmp_path / "x.pt")
    files = [tmp_path / name for name in ("embed", "encoder.pt", "x.pt", "out.pt")]
    done = subprocess.run(files, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["k"] == 4, done.stderr
    f, indices, values = torch.load(tmp_path / "out.pt")
    expected = exported(x), *exported.encode_sparse(x)
    assert all(map(torch.equal, (f, indices, values), expected))
