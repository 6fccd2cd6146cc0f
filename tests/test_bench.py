"""The benchmark: it measures every part, and its tables are never cut."""

import json

import pytest
import torch

import bench

SHAPE = "--d-model 16 --n-latents 64 --batch-size 32 --k 4 --repeat 2 --device cpu".split()

def test_bench_measures_every_part_and_draws_what_each_saves(tmp_path, capsys):
    bench.main([*SHAPE, "--json", "--figure", str(tmp_path / "deep" / "savings.png")])
    result = json.loads(capsys.readouterr().out)
    assert [result[name] for name in ("d_model", "n_latents", "batch_size", "k")] == [16, 64, 32, 4]
    assert {bench.PRODUCT, bench.STEP, bench.PLAIN, bench.TOPK, bench.DEAD} <= set(result["seconds"])
    assert all(0 < low <= middle <= high for low, middle, high in result["seconds"].values())
    assert len(result["phases"]) == 5
    assert all(sides["dense"] > 0 <= sides["sparse"] for sides in result["phases"].values())
    product, step = (result["seconds"][name][1] for name in (bench.PRODUCT, bench.STEP))
    assert result["float32"]["step/product"] == pytest.approx(step / product)
    assert result["matrix_bytes"] == 4 * 32 * 64 and all(peak > 0 for peak in result["peak_bytes"].values())
    assert (tmp_path / "deep" / "savings.png").read_bytes().startswith(b"\x89PNG")

def test_bench_measures_several_shapes_in_one_table(capsys):
    arguments = "--shapes 16x64x32 8x48x16 --k 4 --repeat 2 --device cpu".split()
    bench.main(arguments)
    table = capsys.readouterr().out
    bench.main([*arguments, "--json"])
    results = json.loads(capsys.readouterr().out)
    assert [r["shape"] for r in results] == ["16x64x32", "8x48x16"]
    assert max(map(len, table.splitlines())) <= 110
    for r in results:
        assert {"step", "step, 1 % dead", "dense step, autocast"} <= {*r["ms"]} == {*r["mib"]}
        assert min(r["ms"].values()) > 0 and len(r["by_operation"]) == 15
        for name in r["ms"]:
            assert f"\n{name:<24}" in table

@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_bench_times_an_exported_encoder(capsys):
    bench.main([*SHAPE, "--export"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert [row[0] for row in rows] == ["1", "32"] and all(float(n) > 0 for row in rows for n in row[2:])
    assert 2 < float(rows[1][1]) < 8, "about k latents are active"

def test_the_tables_fit_eighty_columns_with_large_numbers_and_every_row(capsys):
    """Bug here once: a row for bfloat16 has a longer name, which left "437…" of "4375"."""
    names = [f"{name}, {dtype}" for name in ("encoder product", "step") for dtype in ("float32", "bfloat16")]
    times = dict.fromkeys([*names, bench.PLAIN, bench.TOPK, bench.DEAD], [12.3, 23.4, 34.5])
    ratios = {"flops": 1e14, "step/product": 12.34, "step/floor": 12.34, "plain/step": 123.4}
    result = {"device": "AMD EPYC 9654 96-Core Processor", "torch": "2.13.0+cu130", "threads": 192, "k": 128,
              "d_model": 12288, "n_latents": 1 << 20, "batch_size": 65_536, "repeat": 100, "float32": ratios,
              "seconds": times | {bench.DENSE: [2e-3] * 3}, "matrix_bytes": 1 << 36, "bfloat16": ratios,
              "phases": {"weight gradients and update": {"dense": 123.4, "sparse": 1e-3}},
              "peak_bytes": dict.fromkeys(times, 123_456 << 20), "copy_bytes_per_second": 4e12}
    bench.show_measurements(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines), max(lines, key=len)
    for name in times:
        row, = (line for line in lines if line.startswith(name.replace(", float32", "") + "  "))
        assert row.split()[-6:] == ["23400", "12300-34500", "1.00", "2,801", "123456", "188%"]

def test_peak_memory_is_what_a_call_held_at_once():
    before = torch.ones(1 << 20)

    def hold():
        torch.ones(1 << 24)  # 64 MiB, freed before the next
        kept = torch.ones(1 << 25)
        return kept, before + 1  # 128 and 4 MiB at once
    assert bench.peak_memory(hold, torch.device("cpu")) == pytest.approx(132 << 20, rel=1e-5)
