"""The price of a GPU-second by the names that drivers report."""

from __future__ import annotations

import pytest

from coldsnap.cost import prices
from coldsnap.errors import SettingsError
from coldsnap.settings import Settings


@pytest.mark.parametrize(
    ("gpu", "usd"),
    [
        ("NVIDIA GeForce RTX 4090", 0.00031),
        ("NVIDIA GeForce RTX 3090", 0.00019),
        ("NVIDIA L4", 0.00019),
        ("NVIDIA L40", 0.00053),
        ("NVIDIA L40S", 0.00053),
        ("NVIDIA A40", 0.00034),
        ("NVIDIA RTX A6000", 0.00034),
        ("NVIDIA RTX 6000 Ada Generation", 0.00053),
        ("NVIDIA RTX 4000 Ada Generation", 0.00016),
        ("NVIDIA RTX A4000", 0.00016),
        ("NVIDIA RTX 2000 Ada Generation", 0.00016),
        ("NVIDIA RTX A5000", 0.00019),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 0.00111),
        ("NVIDIA A100-SXM4-80GB", 0.00076),
        ("NVIDIA A100 80GB PCIe", 0.00076),
        ("NVIDIA H100 80GB HBM3", 0.00116),
        ("NVIDIA H200", 0.00155),
        ("NVIDIA B200", 0.00240),
    ],
)
def test_known_gpus(gpu: str, usd: float) -> None:
    price = prices.of(gpu)
    assert price.per_second == usd
    assert price.usd(1000.0) == pytest.approx(usd * 1000)
    assert prices.DATE in price.origin


@pytest.mark.parametrize(
    "gpu",
    [
        "cpu",
        "NVIDIA GH200 480GB",
        "NVIDIA L40X",
        "NVIDIA A10",
        "NVIDIA A1000",
        "NVIDIA GeForce RTX 5090",
        "NVIDIA H100 80GB HBM3 MIG 1g.24gb",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 1g.24gb",
    ],
)
def test_an_unknown_gpu_has_seconds_but_no_dollars_and_says_so(gpu: str) -> None:
    price = prices.of(gpu)
    assert price.per_second is None
    assert price.usd(1000.0) is None
    assert gpu in price.origin
    assert "GPU_PRICE_PER_SECOND" in price.origin


def test_the_setting_comes_before_the_table() -> None:
    settings = Settings.read({"GPU_PRICE_PER_SECOND": "0.0005"})
    assert prices.of("NVIDIA H200", settings.gpu_price_per_second).per_second == 0.0005
    assert prices.of("cpu", 0.0).usd(10.0) == 0.0


@pytest.mark.parametrize("value", ["cheap", "nan", "inf", "-1", "0,0005"])
def test_a_price_that_is_no_number_ends_the_boot(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^GPU_PRICE_PER_SECOND: .*found '?"):
        Settings.read({"GPU_PRICE_PER_SECOND": value})
