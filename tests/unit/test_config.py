"""A wrong setting is refused before anything starts, by name, with its value and what is allowed."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import (
    ENVIRONMENT,
    GIB,
    KIB,
    MIB,
    ClusterConfig,
    TopicConfig,
    check_ack,
    layout_of,
    load_config,
    make_folder,
    parse_bytes,
    parse_duration,
    runtime_root,
)
from broker.errors import BadTopicName, BadTopicOptions, ConfigError, PermissionDenied, RegionTooSmall


def load(**overrides: Any) -> ClusterConfig:
    return load_config(environment={}, **overrides)


@pytest.mark.parametrize(("text", "nbytes"), [
    ("64KiB", 64 * KIB), ("1GiB", GIB), ("1.5 MiB", 3 * MIB // 2), ("1GB", 10**9), ("512mib", 512 * MIB), ("7", 7),
    ("4K", 4096), ("0", 0), (12345, 12345), (" 2 kb ", 2000), ("10B", 10),
])
def test_sizes_are_read_with_their_units(text: object, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", -1, "1TiBs", "1.5", 1.5, "0x10", None, True, "1 000", "nan"])
def test_a_size_that_means_nothing_is_refused(text: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text, "region_bytes")
    assert caught.value.setting == "region_bytes"
    assert repr(text) in str(caught.value)


@given(st.integers(0, 2**50), st.sampled_from([("KiB", KIB), ("MiB", MIB), ("KB", 1000), ("", 1)]))
def test_sizes_are_exact_at_any_size(number: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize(("text", "seconds"), [("200ms", 0.2), ("30s", 30), (1.5, 1.5), ("5us", 5e-6), ("2m", 120)])
def test_durations_are_read_with_their_units(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


def test_the_defaults_are_those_of_the_design() -> None:
    config = load()
    assert (config.brokers, config.region_bytes, config.message_bytes_max) == (4, GIB, 16 * MIB)
    assert (config.topic_count_max, config.ring_slot_count, config.order_entry_count) == (64, 1024, 16384)
    assert (config.segment_bytes, config.session_count_max, config.cursor_count_max) == (MIB, 1024, 256)
    assert (config.thread_plan, config.waiting, config.sequencer_lock) == ("fused", "balanced", "atomic")


def test_a_small_region_scales_its_tables_and_its_largest_message() -> None:
    config = load(region_bytes="64MiB")
    assert (config.topic_count_max, config.ring_slot_count, config.order_entry_count) == (16, 256, 4096)
    assert (config.segment_bytes, config.session_count_max, config.cursor_count_max) == (256 * KIB, 128, 64)
    assert config.message_bytes_max == 4 * MIB
    assert load(region_bytes="64MiB", message_bytes_max="1MiB").message_bytes_max == MIB


@pytest.mark.parametrize(("mebibytes", "topics"), [(1024, 10_000), (1024, 16_384), (256, 2000), (64, 600), (16, 100)])
@pytest.mark.parametrize("brokers", [1, 2, 4])
@pytest.mark.parametrize("pool", ["atomic", "partitioned", "leader"])
def test_many_topics_fit_with_a_segment_each_at_every_broker(mebibytes: int, topics: int, brokers: int, pool: str) -> None:
    config = load(region_bytes=mebibytes * MIB, topic_count_max=topics, brokers=brokers, pool=pool)
    numbers = layout_of(config).numbers
    assert numbers["segment_count"] >= topics * brokers * 5 // 4
    tables = mebibytes * MIB - numbers["segment_count"] * numbers["segment_bytes"]
    assert tables <= mebibytes * MIB * 2 // 5
    assert config.order_entry_count >= 32 and config.ring_slot_count >= 16


def test_what_is_set_is_not_chosen() -> None:
    config = load(topic_count_max=10_000, ring_slot_count=32, order_entry_count=16, segment_bytes="16KiB")
    assert (config.ring_slot_count, config.order_entry_count, config.segment_bytes) == (32, 16, 16 * KIB)


def test_more_topics_than_there_can_be_are_refused_with_the_limit() -> None:
    with pytest.raises(ConfigError, match="from 1 to 16384"):
        load(topic_count_max=20_000)


@pytest.mark.parametrize("mebibytes", [4, 16, 63, 64, 100, 255, 256, 511, 512, 1024, 4096])
@pytest.mark.parametrize("brokers", [1, 4, 8])
def test_what_is_chosen_fits_the_region(mebibytes: int, brokers: int) -> None:
    layout = layout_of(load(region_bytes=mebibytes * MIB, brokers=brokers))
    assert layout.numbers["region_bytes"] <= mebibytes * MIB
    assert layout.numbers["segment_count"] * layout.numbers["segment_bytes"] >= mebibytes * MIB // 4


@pytest.mark.parametrize(("setting", "value"), [
    ("brokers", 0), ("brokers", 65), ("brokers", "four"), ("brokers", True), ("brokers", 2.5),
    ("region_bytes", "1 pound"), ("region_bytes", 1), ("pool", "magic"), ("sequencer_lock", "spin"),
    ("scanners", 5), ("scanners", 0),
    ("thread_plan", ""), ("waiting", "eager"), ("memory", "none"), ("session_lease_seconds", 0),
    ("heartbeat_ms", 0), ("session_lease_seconds", "soon"), ("listen_port", 65536),
    ("listen_port", 65534), ("listen_host", ""),
    ("name", "../x"), ("name", ""), ("name", ".x"), ("name", "a" * 61), ("name", "a/b"), ("name", 7),
    ("segment_bytes", 5000), ("ring_slot_count", 1000), ("order_entry_count", 1 << 20), ("topic_count_max", -1),
    ("cursor_count_max", -1), ("message_bytes_max", "2GiB"), ("batch_bytes_max", 100), ("attach_slot_count", -1),
    ("runtime_directory", "/" + "x" * 100), ("data_directory", 3), ("no_such_setting", 1),
])
def test_a_wrong_value_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**{setting: value})
    assert caught.value.setting == setting
    assert setting in str(caught.value)
    assert "allowed is" in str(caught.value)


def test_an_order_index_has_room_for_all_scanners() -> None:
    # Each may be about to take a place: with fewer than two for each of them, none would ever be free.
    assert load(brokers=8, scanners=8, order_entry_count=16).order_entry_count == 16
    with pytest.raises(ConfigError, match="order_entry_count"):
        load(brokers=16, scanners=16, order_entry_count=16)


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text('brokers = 2\nwaiting = "saver"\n[cluster]\nname = "file"\nregion_bytes = "128MiB"\n')
    environment = {"CXLMQ_NAME": "shell", "CXLMQ_BROKERS": "3", "CXLMQ_CONFIG": str(path), "CXLMQ_WAITING": ""}
    config = load_config(environment=environment, brokers=5, region_bytes=None)
    assert (config.name, config.brokers, config.waiting, config.region_bytes) == ("shell", 5, "saver", 128 * MIB)


def test_a_wrong_environment_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="brokers"):
        load_config(environment={"CXLMQ_BROKERS": "many"})
    assert set(ENVIRONMENT.values()) <= {*ClusterConfig.__struct_fields__}


@pytest.mark.parametrize("content", ["brokers = ", "cluster = 3", "colour = 1", "[cluster]\nbrokers = 'x'"])
def test_a_wrong_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_config(path, environment={})
    with pytest.raises(ConfigError, match="nowhere"):
        load_config(tmp_path / "nowhere.toml", environment={})


def test_a_broker_gets_exactly_what_the_head_has() -> None:
    config = load(name="a", region_bytes="100MiB", brokers=3, data_directory=Path("/tmp/d"), session_lease_seconds="2m")
    assert ClusterConfig.from_json(config.to_json()) == config
    assert layout_of(ClusterConfig.from_json(config.to_json())).hash() == layout_of(config).hash()


@pytest.mark.parametrize("text", ["", "[]", '{"brokers": 0}', '{"colour": 1}', "{"])
def test_a_damaged_configuration_on_the_pipe_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        ClusterConfig.from_json(text)


def test_a_region_too_small_names_one_that_works() -> None:
    with pytest.raises(RegionTooSmall, match=r"at least (\d+) bytes") as caught:
        layout_of(load(region_bytes="8MiB", message_bytes_max="16MiB"))
    smallest = int(str(caught.value).split("at least ")[1].split()[0])
    numbers = load(region_bytes="8MiB", message_bytes_max="16MiB")
    numbers.region_bytes = smallest
    assert layout_of(numbers).numbers["region_bytes"] <= smallest


@given(st.integers(256 * MIB, 2 * GIB), st.integers(1, 9), st.sampled_from([256 * KIB, MIB, 4 * MIB, 8 * MIB]))
def test_a_layout_is_the_same_when_computed_from_its_own_size(region_bytes: int, brokers: int, segment: int) -> None:
    layout = layout_of(load(region_bytes=region_bytes, brokers=brokers, segment_bytes=segment))
    again = load(region_bytes=region_bytes, brokers=brokers, segment_bytes=segment)
    again.region_bytes = layout.numbers["region_bytes"]
    assert layout_of(again).hash() == layout.hash()


def test_the_runtime_directory_is_private(tmp_path: Path) -> None:
    config = load(name="n", runtime_directory=str(tmp_path / "root"))
    folder = make_folder(config)
    assert folder == tmp_path / "root" / "cxlmq-n"
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(PermissionDenied):
        make_folder(load(name="n", runtime_directory=str(tmp_path / "link")))
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionDenied):
        make_folder(load(name="n", runtime_directory=str(tmp_path / "file")))
    assert runtime_root({"CXLMQ_RUNTIME_DIRECTORY": "/a/b"}) == Path("/a/b")
    assert runtime_root({}).name.startswith("cxlmq-")


@pytest.mark.parametrize("name", ["a", "Orders.v1", "a_b-c", "_x", "-", "a" * 120, "0"])
def test_topic_names_that_are_allowed(name: str) -> None:
    assert TopicConfig(name=name).validate(4)[0].name == name


@pytest.mark.parametrize("name", ["", ".a", "__a", "a b", "a/b", "a" * 121, "ä", "a\n", "a\0", "..", 3])
def test_topic_names_that_are_refused(name: str) -> None:
    with pytest.raises(BadTopicName, match="use 1 to 120"):
        TopicConfig(name=name).validate(4)


@pytest.mark.parametrize(("options", "option"), [
    ({"order": 3}, "order"), ({"order": 6}, "order"), ({"order": -1}, "order"), ({"ack": 3}, "ack"),
    ({"ack": -1}, "ack"),
    ({"replication_factor": 0}, "replication_factor"), ({"replication_factor": 5}, "replication_factor"),
    ({"ack": 2}, "replication_factor"), ({"retention_bytes": -2}, "retention_bytes"),
    ({"retention_bytes": 1 << 62}, "retention_bytes"),
])
def test_topic_options_that_are_refused(options: dict[str, int], option: str) -> None:
    with pytest.raises(BadTopicOptions) as caught:
        TopicConfig(name="t", **options).validate(4)
    assert caught.value.option == option
    assert "allowed is" in str(caught.value)


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_order_levels_are_kept(order: int) -> None:
    topic, notes = TopicConfig(name="t", order=order, ack=2, replication_factor=2, retention_bytes=-1).validate(2)
    assert (topic.order, notes) == (order, [])


def test_order_four_is_an_alias_and_says_so() -> None:
    topic, notes = TopicConfig(name="t", order=4).validate(1)
    assert topic.order == 5
    assert len(notes) == 1
    assert "alias" in notes[0]


@pytest.mark.parametrize(("variable", "near"), [
    ("CXLMQ_BROKER", "CXLMQ_BROKERS"), ("CXLMQ_REGION_SIZE", ""), ("CXLMQ_NAMES", "CXLMQ_NAME"), ("CXLMQ_", ""),
    ("CXLMQ_brokers", ""), ("CXLMQ_ACK", ""),
])
def test_a_variable_that_nobody_reads_is_refused_with_those_that_are_read(variable: str, near: str) -> None:
    with pytest.raises(ConfigError, match="CXLMQ_BROKERS, ") as raised:
        load_config(environment={variable: "2"})
    assert raised.value.setting == variable
    assert f"is {near} meant?" in str(raised.value) if near else True
    for known in ENVIRONMENT:
        assert known in raised.value.allowed
    load_config(environment={"XCXLMQ_BROKER": "2", "CXLMQ_BOOTSTRAP_PYTHON": "python3", "CXLMQ_BROKER": ""})


def test_the_list_of_topic_options_that_are_allowed_is_true() -> None:
    for count, factor, text in ((1, 2, "1, with 1 broker"), (2, 3, "1 to the number of brokers (2)"),
                                (None, 65, "1 to the number of brokers (at most 64)")):
        with pytest.raises(BadTopicOptions) as raised:
            TopicConfig(name="t", replication_factor=factor).validate(count)
        assert text in str(raised.value)
    for count, text in ((1, "use ack 1"), (2, "2, with 2 brokers for ack 2"), (4, "2 to the number of brokers (4) for ack 2")):
        with pytest.raises(BadTopicOptions) as raised:
            TopicConfig(name="t", ack=2).validate(count)
        assert text in str(raised.value)
    with pytest.raises(BadTopicOptions, match="no replica") as raised:
        check_ack("t", 2, 1)
    assert raised.value.option == "ack"


def test_variables_that_the_scripts_read_are_known() -> None:
    scripts = Path(__file__).parents[2] / "scripts"
    named = {name for file in scripts.glob("*.sh") for name in re.findall(r"^#\s+(CXLMQ_\w+)\s", file.read_text(), re.M)}
    assert "CXLMQ_BOOTSTRAP_PYTHON" in named
    load_config(environment=dict.fromkeys(named - {*ENVIRONMENT, "CXLMQ_CONFIG"}, "x"))
