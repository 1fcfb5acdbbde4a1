"""Paths mean what the user means, where he is; addresses to listen at are understood as people write them."""

import os
from pathlib import Path

import msgspec
import pytest

from broker.config import ClusterConfig, host_and_port, load_config, resolved, runtime_root
from broker.errors import ConfigError
from client.cluster import Cluster

PATHS = ("data_directory", "runtime_directory", "security")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user is in one folder, and at home in another."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def meant_here(given: str) -> str:
    """As a `Path` says it, which drops the "./" before what would be a home."""
    return os.path.abspath(given) if given.startswith("./~") else given


@pytest.mark.parametrize(("given", "meant"), [
    ("data", "here/data"), ("./data", "here/data"), ("../data", "data"), ("~", "home"), ("~/data", "home/data"),
    ("a/../b", "here/b"), ("./~/data", "here/~/data")])
@pytest.mark.parametrize("setting", PATHS)
def test_a_path_means_the_same_wherever_it_comes_from(here: Path, setting: str, given: str, meant: str) -> None:
    file = here / "here" / "cluster.toml"
    file.write_text(f"{setting} = {given!r}\n")
    variable = f"CXLMQ_{setting.upper()}"
    for config in (load_config(environment={}, **{setting: given}), load_config(environment={variable: given}),
                   load_config("cluster.toml", environment={}), load_config(environment={"CXLMQ_CONFIG": str(file)}),
                   ClusterConfig(**{setting: given}), load_config(environment={}, **{setting: Path(meant_here(given))}),
                   msgspec.structs.replace(ClusterConfig(), **{setting: given})):
        assert getattr(config, setting) == str(here / meant)
        os.chdir("/")                       # as brokers and supervisors do
        assert getattr(ClusterConfig.from_json(config.to_json()), setting) == str(here / meant)
        os.chdir(here / "here")
    if setting == "data_directory":
        assert config.replica_folder(1) == here / meant / "broker-1"
        assert Cluster(ClusterConfig(), recover=given).config.data_directory == str(here / meant)
    if setting == "runtime_directory":
        assert config.folder == here / meant / "cxlmq-default"
        assert runtime_root({variable: given}) == here / meant


def test_a_configuration_file_may_be_at_home(here: Path) -> None:
    (here / "home").mkdir()
    (here / "home" / "c.toml").write_text("brokers = 3\n")
    assert load_config("~/c.toml", environment={}).brokers == load_config(
        environment={"CXLMQ_CONFIG": "~/c.toml"}).brokers == 3


@pytest.mark.parametrize("given", ["~nobody-is-called-so/data", "a\0b"])
@pytest.mark.parametrize("setting", PATHS)
def test_a_path_that_means_nothing_is_refused(setting: str, given: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        load_config(environment={}, **{setting: given})
    with pytest.raises(ConfigError):
        resolved(given)


@pytest.mark.parametrize(("given", "meant", "address"), [
    ("::1", "::1", "[::1]:7"), ("[::1]", "::1", "[::1]:7"), ("0:0:0:0:0:0:0:1", "0:0:0:0:0:0:0:1", "[0:0:0:0:0:0:0:1]:7"),
    ("LOCALHOST", "localhost", "localhost:7"), ("localhost.", "localhost.", "localhost.:7"),
    ("LocalHost", "localhost", "localhost:7"), ("127.0.0.1", "127.0.0.1", "127.0.0.1:7"),
    ("127.8.9.1", "127.8.9.1", "127.8.9.1:7")])
def test_a_host_of_this_machine_is_understood(given: str, meant: str, address: str) -> None:
    config = load_config(environment={"CXLMQ_LISTEN_HOST": given})
    assert config.listen_host == meant
    assert host_and_port(config.listen_host, 7) == address
    assert ClusterConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("given", ["localhost:7000", "127.0.0.1:7000", "[::1]:7000", "::1::2", "[::1", "a b", "[localhost]:"])
def test_a_host_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="listen_host"):
        load_config(environment={}, listen_host=given)
