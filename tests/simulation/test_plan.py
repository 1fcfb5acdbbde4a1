"""The plan's model: known results of queues, the right bottleneck named, costs that were measured and not made up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import ConfigError
from client.cli.main import run
from sim.cluster.devices import costs_of, device_names, find_device, write_rate
from sim.cluster.door import Operation
from sim.cluster.plan import Costs, Station, curve, measure_costs, payload_of, predict, solve, window_of
from sim.cluster.plan_report import plot_curve
from sim.cluster.run import run_scenario
from sim.cluster.scenario import draw

STAGES = {"receiver": 400.0, "delegation": 100.0, "acks": 50.0, "release": 50.0, "scanner": 700.0, "reclaim": 10.0,
          "directory": 5.0, "watch": 5.0}
COSTS = Costs(STAGES, {128: 0.07, 1024: 0.05, 16384: 0.045})


def test_one_customer_waits_for_nobody() -> None:
    rate, response = solve([Station("a", 100), Station("b", 300)], 1, delay_ns=600)
    assert response == pytest.approx(1000)
    assert rate == pytest.approx(1e6)


def test_two_equal_stations_are_the_textbook_case() -> None:
    # Balanced closed network of m stations with n customers: X = n / (D (n + m - 1)).
    for customers in (1, 2, 5, 20):
        rate, _ = solve([Station("a", 100), Station("b", 100)], customers)
        assert rate == pytest.approx(customers / (100 * (customers + 1)) * 1e9)


@given(st.lists(st.floats(1, 10_000), min_size=1, max_size=5), st.integers(1, 200), st.floats(0, 10_000))
def test_laws_that_every_closed_network_obeys(demands: list[float], customers: int, delay: float) -> None:
    stations = [Station(str(number), nanoseconds) for number, nanoseconds in enumerate(demands)]
    rate, response = solve(stations, customers, delay)
    assert rate <= 1e9 / max(demands) * (1 + 1e-9)                  # the slowest station bounds it
    assert rate * response / 1e9 == pytest.approx(customers)        # Little
    assert response >= sum(demands) + delay - 1e-6


def test_hosts_add_up_until_the_device_saturates() -> None:
    device = find_device("cxl-switch-xconn")
    points = curve(COSTS, device, 1024, 1 << 20)
    fast = curve(COSTS, find_device("local-ddr5"), 1024, 1 << 20, hosts=(1, 2, 4))
    assert fast[0].gbps < fast[1].gbps < fast[2].gbps
    assert points[-1].bottleneck == "device"
    # Each byte is written and read, and many writers get less together than one.
    assert points[-1].gbps <= 1 / (1 / write_rate(device, 64) + 1 / device.read_gb_s)
    assert write_rate(device, 64) < write_rate(device, 1) == device.write_gb_s
    assert points[-1].latency_us > points[0].latency_us


def test_small_batches_end_at_the_sequencer() -> None:
    fast = find_device("local-ddr5")
    assert predict(COSTS, 64, 64, 4096, fast).bottleneck == "sequencer"


def test_cores_bound_what_one_machine_does() -> None:
    free = predict(COSTS, 8, 1024, 1 << 20)
    bound = predict(COSTS, 8, 1024, 1 << 20, cores=2)
    assert bound.gbps < free.gbps
    assert bound.bottleneck == "cores"


def test_memory_bounds_what_many_cores_do() -> None:
    found = curve(replace(COSTS, memory_gb_s=25.0), None, 1024, 1 << 20, hosts=(1, 8), cores=8)
    assert found[0].bottleneck == "publisher's core"
    assert found[1].bottleneck == "memory"
    assert found[1].gbps <= 25.0


def test_packing_between_two_sizes() -> None:
    assert COSTS.packing_ns_per_byte(1024) == pytest.approx(0.05)
    assert 0.05 < COSTS.packing_ns_per_byte(256) < 0.07
    assert COSTS.packing_ns_per_byte(1 << 20) == 0.045
    assert payload_of(1024, 1032 * 100) == 102_400
    assert window_of(1 << 30) == 2


def test_costs_are_measured() -> None:
    costs = measure_costs(sizes=(1024,), batch_bytes=1 << 16)
    assert set(STAGES) <= set(costs.per_batch)
    assert all(value >= 0 for value in costs.per_batch.values())
    assert costs.per_batch["scanner"] > 10
    assert costs.packing[128] > costs.packing[16384 if 16384 in costs.packing else 4096]    # a message costs something


def test_a_profile_slows_simulated_time_and_breaks_nothing() -> None:
    for name in device_names():
        costs, rate = costs_of(name)
        assert len(costs) == Operation.OP_COUNT
        assert rate > 0
        assert not run_scenario(draw(3, steps=3_000, profile=name)).failed
    with pytest.raises(ConfigError, match="cxl-direct"):
        find_device("unknown")


def test_the_command_and_its_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curve.png"
    assert run(["sim", "--plan", "--profile", "cxl-direct", "--no-compare", "--json", "--plot", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["hosts"] for point in found["points"]] == [1, 2, 4, 8, 16, 32, 64]
    assert found["assumed"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot_curve(str(picture), curve(COSTS, None, 1024, 1 << 20), None)
