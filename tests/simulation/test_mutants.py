"""Every planted bug is seen by the simulation, and what is not planted is not seen: else nothing that it says counts."""

from pathlib import Path

import pytest

from broker.planted import Planted, planted_now
from sim.cluster.diagram import explain
from sim.cluster.mutants import BY_NAME, MUTANTS, RULED_OUT, planted_bugs_markdown
from sim.cluster.run import hunt, run_checked, run_scenario
from sim.cluster.scenario import draw
from sim.cluster.shrink import shrink

PAGE = Path(__file__).parents[2] / "memory-bank/planted_bugs.md"
VISIBILITY = set(range(1, 14))


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_the_simulation_sees_it(name: str) -> None:
    found = hunt(BY_NAME[name], seeds=100)
    assert found is not None, f"{name}: {BY_NAME[name].what}"
    assert found.verdict == "violation", found.text


CALM = frozenset({"net"})


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS if mutant.checker])
def test_the_checker_names_it(name: str) -> None:
    mutant = BY_NAME[name]
    assert any(run_checked(draw(seed, steps=6_000, kinds=CALM, mutant=name).smaller(**dict(mutant.shape)))
               for seed in range(12)), f"{name}: {mutant.what}"


@pytest.mark.parametrize(("name", "kind", "line", "writer", "readers"), [
    ("wrong-line-flushed", "wrong_flush", "OrderEntry.commit", "sequencer", {"sequencer", "delivery"}),
    ("frontier-stale", "no_invalidate", "TopicOrderLine.committed_", "sequencer", {"delivery"}),
    ("header-not-flushed", "published", "BatchHeader.complete", "delegation", {"delegation"}),
    ("header-not-flushed", "unflushed", "BatchHeader.complete", "delegation", {"sequencer"}),
])
def test_it_says_which_line_who_wrote_it_and_who_read_it(
        name: str, kind: str, line: str, writer: str, readers: set[str]) -> None:
    mutant = BY_NAME[name]
    found = next(found for seed in range(12) if (found := run_checked(
        draw(seed, steps=6_000, kinds=CALM, mutant=name).smaller(**dict(mutant.shape)))))
    mine = [each for each in found if each["kind"] == kind]
    assert mine
    assert all(each["line"].startswith(line) and each["writer"]["role"] == writer for each in mine), mine
    assert {each["reader"]["role"] for each in mine} >= readers
    assert all(each[side]["place"] for each in mine for side in ("writer", "reader"))


def test_a_breach_under_the_checker_comes_with_what_the_checker_found() -> None:
    verdict = run_scenario(draw(0, steps=6_000, kinds=CALM, mutant="wrong-line-flushed", memory="checked"))
    assert (verdict.verdict, verdict.invariant) == ("violation", "T")
    assert "coherence: the wrong line was flushed" in verdict.text
    again = run_scenario(draw(0, steps=6_000, kinds=CALM, mutant="wrong-line-flushed", memory="checked"))
    assert (again.trace_hash, again.steps) == (verdict.trace_hash, verdict.steps)


@pytest.mark.parametrize("seed", range(12))
def test_the_checker_finds_nothing_in_the_product(seed: int) -> None:
    assert run_checked(draw(seed, steps=6_000, kinds=CALM | {"stall", "evict"})) == []


def test_every_class_is_planted_or_ruled_out() -> None:
    planted = {mutant.number for mutant in MUTANTS}
    assert planted | set(RULED_OUT) == set(range(1, 32))
    assert planted >= VISIBILITY
    assert not planted & set(RULED_OUT)


def test_every_switch_is_a_mutant() -> None:
    assert {mutant.switch for mutant in MUTANTS if mutant.switch} == set(Planted) - {Planted.PLANT_NOTHING}


def test_a_run_leaves_no_bug_behind() -> None:
    run_scenario(draw(0, steps=500, mutant="gap-skipped"))
    assert planted_now() == Planted.PLANT_NOTHING


def test_the_page_of_planted_bugs_is_current() -> None:
    assert PAGE.read_text() == planted_bugs_markdown(), (
        f"{PAGE.name} is stale: run `cxlmq sim --mutants --output memory-bank/planted_bugs.md`")


def test_a_failing_run_is_made_smaller_and_still_fails_to_the_byte() -> None:
    scenario = draw(1, steps=6_000, mutant="entry-not-flushed")
    verdict = run_scenario(scenario)
    smallest, found = shrink(scenario, verdict)
    assert found.invariant == verdict.invariant == "T"
    assert (len(smallest.faults), smallest.publishers * smallest.batches) < (
        len(scenario.faults), scenario.publishers * scenario.batches)
    picture, again = explain(smallest)
    assert again.trace_hash == found.trace_hash
    assert "delegation" in picture
    assert "host 0" in picture
