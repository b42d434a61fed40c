"""The sample of `make test` has some sets of each fast function, spread over its list, and fewer of slower ones."""

from __future__ import annotations

import durations
import pytest
import tiers


@pytest.mark.parametrize("sets", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("wanted", [0, 1, 3, 10])
def test_sets_are_spread_evenly(sets: int, wanted: int) -> None:
    places = sorted(tiers.sampled("tests/test_x.py::test_y", sets, wanted))
    assert len(places) == min(sets, wanted)
    gaps = {
        after - before
        for before, after in zip(places, [*places[1:], *(place + sets for place in places[:1])], strict=True)
    }
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_functions_begin_at_different_sets() -> None:
    samples = {tiers.sampled(f"tests/test_x.py::test_{number}", 12, 3) for number in range(40)}
    assert frozenset.union(*samples) == frozenset(range(12))


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(None, 25), (0.01, 50), (0.1, 5), (0.3, tiers.SETS), (0.5, 1), (2.9, 1), (3.0, 0)]
)
def test_the_slower_a_set_is_the_fewer_are_wanted(
    seconds: float | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durations, "RECORDED", {} if seconds is None else {"f": seconds})
    assert tiers.wanted_of("f") == wanted


def test_the_recorded_functions_are_there() -> None:
    assert [function for function in durations.RECORDED if not durations.is_there(function)] == []
