"""What all tests share: property tests print how to replay a failure. Helpers: `tests.manual_cluster`."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("cxlmq", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cxlmq")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plant", metavar="NAME", help="run with this bug planted in the stages: see cxlmq sim --mutants")
    parser.addoption("--fuzz-seeds", metavar="FIRST:END", default="0:4", help="seeds of tests/end_to_end/test_fuzz_grpc.py")
    parser.addoption("--chaos", metavar="MINUTES:SEED", default="2:1", help="how long, and with which seed, "
                     "tests/end_to_end/test_chaos_run.py runs")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each seed of --fuzz-seeds."""
    if "fuzz_seed" in metafunc.fixturenames:
        first, _, end = metafunc.config.getoption("--fuzz-seeds").partition(":")
        metafunc.parametrize("fuzz_seed", range(int(first), int(end or int(first) + 1)))


@pytest.fixture(autouse=True, scope="session")
def planted_bug(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --plant, every test runs with that bug, to see which of them notices."""
    from sim.cluster.mutants import BY_NAME, switch_on

    name = request.config.getoption("--plant")
    switch_on(BY_NAME[name] if name else None)
    yield
    switch_on(None)
