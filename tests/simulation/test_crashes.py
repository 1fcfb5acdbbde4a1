"""Pairs of crashes in one run: nothing breaks wherever they fall, and what is left out would have shown nothing else."""

from collections import Counter
from itertools import pairwise

import pytest

from sim.cluster.crashes import NOBODY, PLACES, POLICIES, Cut, Outcome, Plan, enumerate_crashes, points, run_plan
from sim.cluster.door import Operation
from sim.cluster.mutants import BY_NAME
from sim.cluster.run import hunt


def test_no_pair_of_crashes_breaks_an_invariant(request: pytest.FixtureRequest) -> None:
    pairs = request.config.getoption("--crash-pairs")
    struck: Counter[tuple[str, ...]] = Counter()
    for outcome in enumerate_crashes(pairs, seed=1):
        plan = outcome.plan
        assert outcome.broken is None, f"{plan}: {outcome.broken}"
        if plan.first is not None and plan.second is not None and outcome.cuts == 2:
            struck[plan.place, plan.first.policy, plan.second.policy] += 1
    assert set(struck) == {(place, first, second) for place in PLACES for first in POLICIES for second in POLICIES}
    assert sum(struck.values()) >= (pairs or 10_000) * 0.9


def found_by(outcomes: list[Outcome], twice: bool) -> list[Outcome]:
    return [each for each in outcomes if each.broken is not None and (each.plan.second is not None) == twice]


def test_what_one_crash_does_not_show_a_pair_does() -> None:
    outcomes = list(enumerate_crashes(40, mutant="half-bank"))
    assert not found_by(outcomes, twice=False)
    found = found_by(outcomes, twice=True)
    assert "takeover" in {each.plan.place for each in found}
    again = run_plan(found[0].plan, set(), "half-bank")
    assert str(again.broken) == str(found[0].broken)
    assert (again.trace_hash, again.steps) == (found[0].trace_hash, found[0].steps)
    assert run_plan(found[0].plan, set()).broken is None
    verdict = hunt(BY_NAME["half-bank"])
    assert verdict is not None
    assert "then the takeover at its operation" in verdict.text


@pytest.mark.parametrize(("name", "cuts"), [("entry-not-flushed", 0), ("old-head-acks", 1)])
def test_what_shows_without_a_second_crash_is_seen_without_it(name: str, cuts: int) -> None:
    found = next(each for each in enumerate_crashes(20, mutant=name) if each.broken is not None)
    assert found.cuts == cuts
    assert found.plan.second is None


def test_only_operations_count_that_leave_other_memory() -> None:
    trail = [(Operation.OP_LOAD, 8), (Operation.OP_STORE, 8), (Operation.OP_FLUSH, 8), (Operation.OP_FENCE, 0),
             (Operation.OP_STORE, 72), (Operation.OP_ATOMIC, 64), (Operation.OP_COPY_IN, 128), (Operation.OP_FULL_FENCE, 0)]
    assert points(trail, "kept", range(64, 128)) == [2, 5, 6, 7]
    assert points(trail, "lost", range(64, 128)) == [4, 5, 6, 8]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cut_that_is_left_out_leaves_what_the_next_one_leaves(policy: str) -> None:
    trail = run_plan(NOBODY, set()).trail
    kept = points(trail, policy, range(0))
    inner = [(number, after) for before, after in pairwise(kept) if 2 < after - before < 12
             for number in range(before + 1, after)]
    assert len(inner) > 10
    alike = 0
    for number, after in inner[:12]:
        seen: set[tuple[str | int, ...]] = set()
        assert not run_plan(Plan(Cut(after, policy)), seen).known
        alike += run_plan(Plan(Cut(number, policy)), seen).known
    assert alike == len(inner[:12])
