"""What benchmarks reckon with: pure parts only. Nothing here measures time."""

from collections import Counter

import pytest

from counted import counted
from l1_hit import RECORDED, SQLITE, grown
from targets import Row, Spread, shown, table_of
from ticker import PAUSE_SECONDS, record_tick
from wrk import NotMeasured, parse

SAID = """\
Running 2s test @ http://127.0.0.1:8700/verify
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.53ms    1.71ms  21.39ms   87.60%
    Req/Sec    12.91k     2.28k   16.52k    65.00%
  Latency Distribution
     50%  812.00us
     75%    1.55ms
     90%    3.91ms
     99%    8.12ms
  25694 requests in 2.00s, 6.47MB read
Requests/sec:  12842.61
Transfer/sec:      3.23MB
"""


class TestWrk:
    def test_latencies_are_microseconds_whatever_their_unit(self) -> None:
        """wrk writes us, ms, s and m, as they fit."""
        load = parse(SAID)
        assert (load.p50_us, load.p99_us) == pytest.approx((812, 8_120))
        assert parse(SAID.replace("8.12ms", "1.50s")).p99_us == 1_500_000

    def test_answers_are_counted(self) -> None:
        """All of them, and those of a second."""
        load = parse(SAID, processor_seconds=0.4)
        assert (load.answers, load.per_second, load.processor_seconds) == (25_694, 12_842.61, 0.4)

    @pytest.mark.parametrize(
        "wrong",
        [
            SAID.replace("Requests/sec", "  Non-2xx or 3xx responses: 1\nRequests/sec"),
            SAID.replace(
                "Requests/sec",
                "  Socket errors: connect 0, read 3, write 0, timeout 0\nRequests/sec",
            ),
            SAID.replace("25694 requests", "0 requests"),
            "",
        ],
        ids=["not 200", "socket errors", "no answer", "nothing said"],
    )
    def test_only_answers_that_are_200_are_a_measurement(self, wrong: str) -> None:
        """A server that refuses is fast: its rate means nothing."""
        with pytest.raises(NotMeasured):
            parse(wrong)


class TestRatios:
    def test_a_ratio_is_taken_round_by_round(self) -> None:
        """A slow machine slows both of a round: the ratio of medians would be 1 here."""
        ratio = Spread.ratio([50, 100, 200], [100, 200, 100])
        assert ratio == Spread(0.5, 0.5, 2.0)

    def test_rounds_that_do_not_pair_are_refused(self) -> None:
        """One that was not measured must not shift the others."""
        with pytest.raises(ValueError, match="zip"):
            Spread.ratio([1.0], [1.0, 2.0])

    @pytest.mark.parametrize(
        ("row", "is_met"),
        [
            (Row("", Spread.of([0.95]), "", ">=", 0.95), True),
            (Row("", Spread.of([0.94]), "", ">=", 0.95), False),
            (Row("", Spread.of([5.0]), "ms", "<", 5), False),
            (Row("", Spread.of([2.0]), "", "<=", 2), True),
            (Row("", Spread.of([1]), "calls", "=", 0), False),
            (Row("", Spread.of([1])), None),
        ],
    )
    def test_a_median_meets_its_target_or_misses_it(self, row: Row, is_met: bool | None) -> None:
        """As the target says; without one nothing is said."""
        assert row.is_met is is_met

    def test_a_table_has_a_line_for_each_row(self) -> None:
        """Figures have as many digits as mean something."""
        table = table_of("", [Row("a", Spread(1234.5, 1000, 2000), "requests/s")])
        assert table.row_count == 1
        assert [shown(value) for value in (1234.5, 12.34, 0.956)] == ["1,234", "12.3", "0.96"]


def test_a_hit_that_costs_a_fifth_more_is_found() -> None:
    """The guard that CI runs lets noise pass, and nothing that doubles a part of the hit."""
    assert grown(RECORDED) == []
    assert grown({**RECORDED, SQLITE: RECORDED[SQLITE] * 1.1}) == []
    assert grown({**RECORDED, SQLITE: RECORDED[SQLITE] * 1.25}) == [SQLITE]


def test_a_stall_of_a_loop_is_charged_to_every_tick_of_it() -> None:
    """A loop that stands still for 20 ms is late twenty times, and then on time again."""
    lateness: list[float] = []
    due = record_tick(lateness, 0.0, 0.0)
    due = record_tick(lateness, due, 20.5 * PAUSE_SECONDS)
    record_tick(lateness, due, due)
    expected = [0.0, *((late + 0.5) * PAUSE_SECONDS for late in range(19, -1, -1)), 0.0]
    assert lateness == pytest.approx(expected)


class Oracle:
    """A target with an asynchronous and a synchronous method."""

    name = "Delphi"

    async def reverse(self, question: str) -> str:
        return question[::-1]

    def know(self) -> int:
        return 42


@pytest.mark.anyio
async def test_calls_are_counted_and_handed_on() -> None:
    """Awaited calls are counted; synchronous ones are not."""
    calls = Counter[str]()
    oracle = counted(Oracle(), calls)
    assert (await oracle.reverse("ab"), oracle.know(), oracle.name) == ("ba", 42, "Delphi")
    assert calls == {"reverse": 1}
