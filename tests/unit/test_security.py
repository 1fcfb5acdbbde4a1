"""Security files, principals and rights: what is refused, that secrets are compared and kept as they should be."""

from pathlib import Path

import pytest

from broker.config import load_config
from broker.errors import ClearTextRefused, ConfigError, NotAllowed, Unauthenticated
from broker.security import (
    EVERYBODY,
    TOKEN_KEY,
    Guard,
    Principal,
    Security,
    new_token,
    read_principals,
    token_hash,
    write_principals,
)

TOKEN = new_token()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A security folder with two principals."""
    for name in ("ca.pem", "broker.pem"):
        (tmp_path / name).write_text("x")
    for name, text in (("broker.key", "x"), ("broker.token", TOKEN + "\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    write_principals(tmp_path / "principals.toml", [
        Principal("broker", ("*",), ("*",), ("*",), token_hash(TOKEN)),
        Principal("camera", ("frames.*",), (), (), token_hash("secret"))])
    (tmp_path / "security.toml").write_text(
        '[security]\nca = "ca.pem"\ncertificate = "broker.pem"\nkey = "broker.key"\n'
        'principals = "principals.toml"\ntoken = "broker.token"\n')
    return tmp_path


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return ((TOKEN_KEY, f"Bearer {token}"),)


def test_a_token_names_its_principal(folder: Path) -> None:
    guard = Guard(folder)
    guard.check()
    assert guard.caller(bearer("secret")).name == "camera"
    assert guard.caller(guard.own_metadata()).name == "broker"
    assert guard.caller((("other", b"1"), *bearer("secret"))).name == "camera"


@pytest.mark.parametrize("metadata", [
    None, (), (("x", "y"),), bearer(""), bearer("secre"), bearer("secret "), bearer("Secret"), ((TOKEN_KEY, "secret"),),
    ((TOKEN_KEY, b"Bearer secret"),), bearer("secret") + bearer("secret"), bearer(token_hash("secret")),
], ids=repr)
def test_nobody_else_gets_in(folder: Path, metadata: tuple[tuple[str, str], ...] | None) -> None:
    with pytest.raises(Unauthenticated) as raised:
        Guard(folder).caller(metadata)
    assert "secret" not in raised.value.message, "a token is never told"
    assert "secret" not in str(raised.value.details)


def test_without_security_everybody_may_do_everything() -> None:
    assert Guard(None).caller(None) is EVERYBODY
    EVERYBODY.require(("admin",), "anything")


def test_rights_cover_the_topics_they_name() -> None:
    camera = Principal("camera", publish=("frames.*", "log"), subscribe=("*",))
    assert [camera.may("publish", topic) for topic in ("frames.a", "frames.", "frames", "log", "log2", "Frames.a")] == [
        True, True, False, True, False, False]
    camera.require(("admin", "subscribe"), "anything")
    with pytest.raises(NotAllowed) as raised:
        camera.require(("admin",), "frames.a")
    assert (raised.value.principal, raised.value.right, raised.value.topic) == ("camera", "admin", "frames.a")


def test_what_a_principal_shows_of_itself_is_no_secret() -> None:
    assert token_hash("secret") not in repr(Principal("a", token_sha256=token_hash("secret")))


def test_a_changed_file_counts_and_a_broken_one_lets_nobody_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.security.RELOAD_SECONDS", 0.0)
    guard = Guard(folder)
    assert guard.caller(bearer("secret")).publish == ("frames.*",)
    write_principals(folder / "principals.toml", [Principal("camera", ("all",), (), (), token_hash("secret"))])
    assert guard.caller(bearer("secret")).publish == ("all",)
    (folder / "principals.toml").write_text("[camera")
    with pytest.raises(Unauthenticated):
        guard.caller(bearer("secret"))
    with pytest.raises(ConfigError):
        guard.check()


def test_principals_come_back_as_they_were_written(folder: Path) -> None:
    written = read_principals(folder / "principals.toml")
    assert (folder / "principals.toml").stat().st_mode & 0o777 == 0o600
    assert "secret" not in (folder / "principals.toml").read_text()
    write_principals(folder / "again.toml", written.values())
    assert read_principals(folder / "again.toml") == written


@pytest.mark.parametrize("text", [
    "camera = 1", "[camera]", '[camera]\ntoken_sha256 = "abc"', f'[camera]\ntoken_sha256 = "{"A" * 64}"',
    f'[camera]\ntoken_sha256 = "{"a" * 64}"\nwrite = ["x"]', f'[camera]\ntoken_sha256 = "{"a" * 64}"\npublish = "x"',
    f'[camera]\ntoken_sha256 = "{"a" * 64}"\npublish = [1]', "\xff",
])
def test_a_wrong_principals_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "principals.toml").write_text(text)
    with pytest.raises(ConfigError):
        read_principals(tmp_path / "principals.toml")


@pytest.mark.parametrize("name", ["broker.key", "broker.token", "principals.toml"])
def test_a_secret_that_others_can_read_is_refused(folder: Path, name: str) -> None:
    (folder / name).chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Security.load(folder)


@pytest.mark.parametrize("text", ["", "[security]", '[security]\nca = "ca.pem"', '[security]\nca = "x"\ntoken = "t"',
                                  '[security]\nca="ca.pem"\ncertificate="broker.pem"\nkey="broker.key"\nmode="x"',
                                  '[security]\nca="ca.pem"\ncertificate="broker.pem"\nkey="gone"', "[sec"])
def test_a_wrong_security_file_is_refused(folder: Path, text: str) -> None:
    (folder / "security.toml").write_text(text)
    with pytest.raises(ConfigError):
        Security.load(folder)


def test_a_broker_needs_principals_and_a_token_of_its_own(folder: Path) -> None:
    whole = (folder / "security.toml").read_text()
    (folder / "security.toml").write_text(whole.replace('principals = "principals.toml"\n', ""))
    with pytest.raises(ConfigError, match="names principals"):
        Guard(folder)
    (folder / "security.toml").write_text(whole.replace('token = "broker.token"\n', ""))
    with pytest.raises(ConfigError, match="call one another"):
        Guard(folder).check()


@pytest.mark.parametrize(("host", "fine"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
    ("::", False), ("192.168.1.1", False), ("somewhere.example", False),
])
def test_clear_text_beyond_this_machine_has_to_be_asked_for(host: str, fine: bool, folder: Path) -> None:
    if fine:
        load_config(environment={}, listen_host=host)
    else:
        with pytest.raises(ClearTextRefused, match="security init"):
            load_config(environment={}, listen_host=host)
    assert load_config(environment={}, listen_host=host, security=folder).security == str(folder)
    assert load_config(environment={}, listen_host=host, insecure_clear_text="true").insecure_clear_text


def test_security_as_a_table_of_the_configuration_or_by_the_environment(folder: Path) -> None:
    file = folder / "cluster.toml"
    file.write_text((folder / "security.toml").read_text() + "[cluster]\nbrokers = 2\n")
    config = load_config(file, environment={})
    assert (config.brokers, config.security) == (2, str(file))
    assert Security.load(file) == Security.load(folder)
    assert load_config(environment={"CXLMQ_SECURITY": str(folder)}).security == str(folder)
    assert TOKEN not in config.to_json()
    with pytest.raises(ConfigError, match="true or false"):
        load_config(environment={}, insecure_clear_text="maybe")
