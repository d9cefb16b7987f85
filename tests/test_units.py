import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import UsageError
from autotune.units import format_bytes, format_duration, format_rate, parse_bytes, parse_duration


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("6GiB", 6 * 2**30), ("800MB", 800 * 10**6), ("1.5 gib", 3 * 2**29), ("512M", 2**29), ("17", 17), ("2k", 2048)],
)
def test_sizes_are_parsed_with_binary_and_decimal_units(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "6 bananas", "-1GiB", "0", "1e9", "6GiB extra", "nan"])
def test_a_bad_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="memory size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "duration_s"), [("90s", 90), ("5m", 300), ("1h30m", 5400), ("45", 45), ("0.5h", 1800), ("2 min", 120)]
)
def test_durations_are_parsed(text: str, duration_s: float) -> None:
    assert parse_duration(text) == duration_s


@pytest.mark.parametrize("text", ["", "m", "5 bananas", "0s", "-5m", "5m later", "1h-3m"])
def test_a_bad_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="duration"):
        parse_duration(text)


@given(st.integers(min_value=1, max_value=2**50))
def test_a_formatted_size_reads_back_within_its_three_figures(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes).replace(",", "")) == pytest.approx(size_bytes, rel=0.006)


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0.42, "0.42 s"), (8.34, "8.3 s"), (59.7, "1m00s"), (250, "4m10s"), (3599.9, "1h00m"), (3900, "1h05m")],
)
def test_durations_are_printed_for_people(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


def test_rates_are_printed_with_the_figures_that_mean_something() -> None:
    assert [format_rate(rate) for rate in (0.523, 5.31, 31.94, 1240.4)] == ["0.52", "5.3", "31.9", "1,240"]
