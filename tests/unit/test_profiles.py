"""Profiles say what is published, compose paths, and name what nobody has published."""

import pytest

from client.coherence import profile_report, profile_text
from sim.cxl.profiles import PARAMETERS, ProfileError, load_profile, profile_names


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_is_complete_and_has_a_source(name: str) -> None:
    profile = load_profile(name)
    assert all(getattr(profile, each) >= 0 for each in PARAMETERS)
    assert profile.sources[0]
    assert set(profile.assumed) <= set(PARAMETERS) - {"load_ns"}
    assert ("assumed" in profile.label()) == bool(profile.assumed)


def test_latencies_of_a_path_add_and_its_smallest_bandwidth_wins() -> None:
    device, path = load_profile("cxl-direct"), load_profile("cxl-direct+link-x8+switch")
    assert path.load_ns == device.load_ns + 300
    assert path.read_gb_s == 28 < device.read_gb_s


def test_given_parameters_are_not_assumed() -> None:
    assert "fence_ns" in load_profile("cxl-direct").assumed
    profile = load_profile("cxl-direct,fence_ns=400")
    assert (profile.fence_ns, profile.given) == (400, ("fence_ns",))
    assert "fence_ns" not in profile.assumed


@pytest.mark.parametrize("text", ["", "nothing", "cxl-direct+", "cxl-direct,fence_ns", "cxl-direct,speed=3",
                                  "cxl-direct,read_gb_s=0", "assumed"])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ProfileError):
        load_profile(text)


def test_a_report_says_what_is_assumed_and_what_delays_take_here() -> None:
    report = profile_report("cxl-direct")
    assert report is not None
    assert "fence_ns" in report["assumed"]
    assert {"load_ns", "peer_load_ns", "flush_ns", "fence_ns"} == report["delays"].keys()
    assert all(each["takes_ns"] > 0 for each in report["delays"].values())
    text = profile_text(report) or ""
    assert "assumed: " in text
    assert "load 300 takes" in text
    assert profile_report("") is None
    assert profile_text(None) is None
