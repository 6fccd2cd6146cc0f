"""The exported file: the SAE's θ form, on its own, in TorchScript."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import batchtopk as bt

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
LOAD_WITH_TORCH_ALONE = """
import sys, torch, json
extra = {"config.json": ""}
m = torch.jit.load(sys.argv[1], _extra_files=extra)
x = torch.load(sys.argv[2])
(indices, values), f = m.encode_sparse(x), m(x)
x_hat, decoded = m.reconstruct(x), m.decode(f)
torch.save({"f": f, "x_hat": x_hat, "decoded": decoded, "indices": indices, "values": values}, sys.argv[3])
assert "batchtopk" not in sys.modules and "transformers" not in sys.modules
print(json.loads(extra["config.json"])["k"])
"""

@pytest.fixture(params=["scale", "token"])
def sae(request, planted):
    cfg = bt.Config(d_model=48, n_latents=128, k=4, batch_size=64, tokens=5_000, device="cpu")
    return bt.train(dataclasses.replace(cfg, normalize=request.param), planted.stream(64))

def test_the_file_equals_the_sae_in_a_process_that_has_torch_alone(sae, planted, tmp_path):
    assert bt.export(sae, tmp_path / "encoder.pt") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.pt"]
    x = planted.batch(30, 50).view(5, 3, 2, 48)
    torch.save(x, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("encoder.pt", "x.pt", "out.pt")]
    command = [sys.executable, "-I", "-W", "ignore", "-c", LOAD_WITH_TORCH_ALONE, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and float(done.stdout) == 4, done.stderr
    found, f = torch.load(tmp_path / "out.pt"), sae.encode(x).detach()
    torch.testing.assert_close(found["f"], f, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found["x_hat"], sae(x).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["decoded"], sae.decode(f).detach(), atol=1e-5, rtol=1e-5)
    sparse = torch.sparse_coo_tensor(found["indices"], found["values"], (30, 128), check_invariants=True)
    assert torch.equal(sparse.to_dense(), found["f"].view(30, 128))
    assert f.count_nonzero(dim=-1).unique().numel() > 1, "rows should differ in length"
    assert torch.equal(found["indices"], found["f"].view(30, 128).nonzero().T), "by row, then latent"

def test_a_row_does_not_depend_on_its_batch(sae, planted, tmp_path):
    bt.export(sae, tmp_path / "encoder.pt")
    exported, x = torch.jit.load(tmp_path / "encoder.pt"), planted.batch(40, 51)
    torch.testing.assert_close(torch.stack([exported(row) for row in x]), exported(x), atol=1e-5, rtol=1e-5)

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

def test_a_topk_sae_exports_its_own_form(planted, tmp_path):
    cfg = bt.Config(d_model=48, n_latents=128, k=4, batch_size=64, tokens=5_000, activation="topk")
    sae = bt.train(cfg, planted.stream(64))
    assert bt.export(sae, tmp_path / "encoder.pt") == 0
    exported, x = torch.jit.load(tmp_path / "encoder.pt"), planted.batch(30, 52)
    assert torch.equal(exported(x), sae.encode(x)) and ((exported(x) > 0).sum(1) <= 4).all()

def test_bfloat16_inputs_and_saes_export_in_float32(sae, tmp_path):
    bt.export(sae.bfloat16(), tmp_path / "encoder.pt")
    extra = {"config.json": ""}
    exported = torch.jit.load(tmp_path / "encoder.pt", _extra_files=extra)
    assert exported(torch.randn(3, 48).bfloat16()).dtype == torch.float32
    assert bt.Config(**json.loads(extra["config.json"])) == sae.config

def test_a_file_that_differs_is_refused_and_leaves_what_was_there(sae, tmp_path, monkeypatch):
    (tmp_path / "encoder.pt").write_text("mine")
    monkeypatch.setattr(bt.SAE, "encode", lambda self, x, selection="theta": torch.ones(len(x), 128))
    with pytest.raises(RuntimeError, match="differs from the SAE"):
        bt.export(sae, tmp_path / "encoder.pt")
    assert (tmp_path / "encoder.pt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
