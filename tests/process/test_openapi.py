"""The OpenAPI document is true of real processes: a few cases of ``make fuzz``."""

from tests.bench.targets import figures_of

NUM_CASES = 200


def test_answers_are_as_documented() -> None:
    figures = figures_of("fuzz", variables={"CASES": NUM_CASES})
    assert (figures["faults"], figures["crashes"]) == (0, 0)
    assert NUM_CASES <= figures["cases"] < 2 * NUM_CASES
    assert {"200", "400", "404"} <= figures["statuses"].keys()
