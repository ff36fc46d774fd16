from keepwarm.bench.ledger_report import Round, Samples, flat_medians, ratios


def test_the_rate_with_many_callers_is_held_against_the_target() -> None:
    samples = Samples([Round(100, 0.2), Round(100, 0.1), Round(100, 0.05)], [Round(10, 0.02)], [1.0, 3.0, 2.0])
    assert flat_medians(samples) == {
        "many.turns_per_s": 1000.0,
        "one.turns_per_s": 500.0,
        "one.turn_ms": 2.0,
        "disk.write_ms": 2.0,
    }
    [one] = ratios(samples, 200)
    assert (one.value, one.reached) == (1000.0, True)
    samples.many = [Round(99, 0.1)]
    assert ratios(samples, 200)[0].reached is False
