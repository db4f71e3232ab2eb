"""Forecasts for declared machines, with constants fitted to other rows, meet what others published."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TABLE, MODELS = ROOT.parent / "shared" / "published.csv", ROOT / "ciuic_runtime" / "models" / "known"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published", ROOT / "benchmarks" / "published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


published: Any = load()

HEAD = (
    "id,model,precision,engine,placement,cpu,cpu_memory_gbps,cpu_bandwidth_kind,gpus,batch,context_tokens,"
    "prefill_tokens_per_s,decode_tokens_per_s,source\n"
)
ROWS = (
    'a,deepseek-v2-lite,IQ4_NL,x,"experts on cpu, rest on gpu",Ryzen 9 7950X,64,measured,RTX 4080,1,128,1000,50,\n'
    "b,deepseek-v2-lite,Q8_0 (16 GB),y,cpu,EPYC 9374F,400,nominal,,4,512,,30,\n"
    'c,deepseek-v3,FP8,z,"8 x gpu, TP8",,,,8 x H200,16,1024,,1000,\n'
    'd,deepseek-v4-flash,Q2 (81 GB),z,"experts on cpu, rest on gpu",EPYC 9374F,461,nominal,RTX 5090,1,8192,300,20,\n'
    'e,deepseek-v2-lite,"bf16 (31.4 GB, 24 GiB RAM, disk 2.5-3.4 GB/s)",z,cpu,2 cores Zen 5,88,measured,,1,0,,1,\n'
)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    table = tmp_path_factory.mktemp("published") / "rows.csv"
    table.write_text(HEAD + ROWS)
    figures: list[Any] = published.read_figures(table, MODELS)
    return figures


@pytest.fixture(scope="module")
def forecasts() -> list[Any]:
    if not TABLE.exists():
        pytest.skip(f"the table of published speeds is not part of the checkout ({TABLE} is missing)")
    found: list[Any] = published.leave_one_out(
        published.Fit(published.read_figures(TABLE, MODELS)), lambda figure: figure.row.id
    )
    return found


def test_half_of_the_forecasts_are_within_a_factor_of_1_3(forecasts: list[Any]) -> None:
    assert published.median_error(forecasts) <= 1.3
    assert published.median_error(forecasts, "decode") <= 1.3
    assert published.median_error(forecasts, "prefill") <= 1.3


def test_four_fifths_lie_in_their_range(forecasts: list[Any]) -> None:
    assert published.coverage(forecasts) >= 0.8
    assert published.rows_covered(forecasts) >= 0.8
    assert statistics.median(f.factor for f in forecasts) < 2.5


def test_the_fit_sums_what_the_cost_model_says(made_up: list[Any]) -> None:
    assert {f.name for f in made_up} == {f"{r} decode" for r in "abcde"} | {"a prefill", "d prefill"}
    for figure in made_up:
        for constants in (published.Constants(0.6, 0.1, 2e-5), published.Constants(0.9, 0.02, 5e-6)):
            forecast = figure.forecast(constants)
            assert forecast == pytest.approx(figure.published * math.exp(figure.log_error(constants)), rel=1e-12)


def test_weights_have_the_rows_size(made_up: list[Any]) -> None:
    def nbytes(row: Any) -> float:
        return sum(t.decode.bytes_fixed + t.decode.bytes_per_expert * t.num_experts for t in row.graph)

    by_id = {f.row.id: f.row for f in made_up}
    assert nbytes(by_id["b"]) == pytest.approx(16e9, rel=0.03)  # the embedding is not read
    assert nbytes(by_id["d"]) == pytest.approx(81e9, rel=0.02)
    assert nbytes(by_id["c"]) == pytest.approx(671e9, rel=0.02)


def test_a_row_is_forecast_without_its_own_figures(made_up: list[Any]) -> None:
    fit = published.Fit(made_up)
    found = {f.figure.name: f for f in published.leave_one_out(fit, lambda figure: figure.row.id)}
    kept = published.Fit([f for f in made_up if f.row.id != "a"])
    constants, errors = kept.without(lambda figure: False)
    assert found["a decode"].constants == found["a prefill"].constants == constants
    assert found["a decode"].factor == math.exp(max(map(abs, errors)))  # of so few, 90 % is the largest


def test_conformal_quantile() -> None:
    errors = [float(e) for e in range(1, 20)]
    assert published.conformal_quantile(errors, 0.9) == 18.0
    assert published.conformal_quantile(errors, 0.5) == 10.0
    assert published.conformal_quantile([2.0, 1.0], 0.9) == 2.0
