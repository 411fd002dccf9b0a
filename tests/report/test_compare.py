"""Devices side by side: the same numbers as each dossier's, and no ratio between unlike runs."""

import io

import pytest
from rich.console import Console

from report.compare import compare, show
from report.errors import UsageError
from report.tables import c_throughput

CONFIGS = ("fp32_true", "amp_bf16", "bf16_pure")


def device(plant, name, factor=1.0, **row):
    return plant(
        ("gpt2_clm",),
        CONFIGS,
        change=lambda case, config, seed: (
            {"speed": factor * {"amp_bf16": 2.0, "bf16_pure": 3.0}.get(config, 1.0), "device": name} | row
        ),
        name=name,
    )


@pytest.fixture
def pair(plant):
    return device(plant, "first"), device(plant, "second", 4.0, peak_allocated_bytes=5 * 10**9)


def test_rows_are_each_devices_own_figures(pair):
    data = compare(pair).data.set_index(["device", "dtype_config"])
    own = c_throughput.table(pair[1]).data.set_index("dtype_config")
    for config in CONFIGS:
        assert data.loc[("second", config), "relative"] == pytest.approx(own.loc[config, "relative"])
        assert data.loc[("second", config), "over_first"] == pytest.approx(4.0, rel=0.01)
        assert data.loc[("first", config), "over_first"] == 1.0
    assert data.loc[("second", "amp_bf16"), "peak_bytes"] == 5 * 10**9 and data.loc[("second", "amp_bf16"), "mfu"] > 0


def test_cost_is_price_by_time(pair):
    data = compare(pair, [1.0, 2.0]).data.set_index(["device", "dtype_config"])
    assert data.loc[("first", "fp32_true"), "cost_per_million_samples"] == pytest.approx(1e6 / 100 / 3600, rel=0.01)
    assert data.loc[("second", "fp32_true"), "cost_per_million_samples"] == pytest.approx(2e6 / 400 / 3600, rel=0.01)
    assert compare(pair).data["cost_per_million_samples"].isna().all()


def test_unlike_settings_are_not_compared_and_said(plant):
    other = device(plant, "second", 4.0, seq_len=128)
    comparison = compare([device(plant, "first"), other])
    assert comparison.data[comparison.data["device"] == "second"]["over_first"].isna().all()
    assert any("seq_len 128 against 64" in note for note in comparison.notes)


def test_stability_that_differs_between_devices_is_named(plant):
    fragile = plant(
        ("gpt2_clm",),
        CONFIGS,
        change=lambda case, config, seed: {"device": "second"} | ({"diverges_at": 9} if config == "bf16_pure" else {}),
        name="second",
    )
    comparison = compare([device(plant, "first"), fragile])
    assert comparison.differences == ("gpt2_clm, bf16_pure: first completed, second diverged (NaN @ 9)",)


@pytest.mark.parametrize(
    ("count", "prices", "says"),
    [(1, None, "two results folders or more"), (2, [1.0], "1 price for 2"), (3, None, "two folders hold runs of first")],
)
def test_wrong_use_is_refused_in_one_sentence(pair, count, prices, says):
    with pytest.raises(UsageError, match=says):
        compare((*pair, pair[0])[:count], prices)


def test_the_table_fits_eighty_columns(plant):
    long = device(plant, "nvidia-a100-sxm4-80gb")
    output = io.StringIO()
    show(compare([device(plant, "first"), long], [1.0, 2.0]), Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines) and any("nvidia-a100-sxm4-80gb" in line and "3.00x" in line for line in lines)
    assert not any("…" in line for line in lines)
