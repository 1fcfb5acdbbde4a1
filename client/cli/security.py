"""`cxlmq security init|add|list|remove`: a CA, certificates and tokens for a cluster."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click

from broker.errors import CxlmqError
from client.cli import common
from client.cli.common import common_options, print_json, say, settings

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_DAYS = click.option("--days", type=click.IntRange(1), default=365, show_default=True,
                     help="How long certificates are valid.")
_TOPICS: dict[str, Any] = {"multiple": True, "metavar": "TOPIC"}


@click.group()
def security() -> None:
    """Certificates, tokens and rights for clusters with security."""


@security.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="A name or address by which clients on other "
              "machines reach the brokers; may be repeated. localhost and 127.0.0.1 are in any case.")
@_DAYS
@common_options
def init(folder: Path, hosts: tuple[str, ...], days: int) -> None:
    """Make a CA of one's own, the brokers' certificate, and a principal "admin" who may do everything.

    The folder is for the brokers, and for whoever owns the cluster. Others get a folder by `cxlmq security add`.

    \b
    Examples:
      cxlmq security init ~/lab-security --host lab.example.org
      cxlmq cluster up -d --security ~/lab-security --listen-host 0.0.0.0
      CXLMQ_SECURITY=~/lab-security cxlmq topic create frames
    """
    from broker.security import Principal, new_token, token_hash, write_principals

    if folder.exists() and any(folder.iterdir()):
        raise CxlmqError(f"{folder} is not empty: name a new folder, or remove the old one first")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    _openssl(folder, "req", "-x509", *_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=cxlmq CA",
             "-days", str(10 * days))
    names = [f"{'IP' if _is_address(host) else 'DNS'}:{host}" for host in ("localhost", "127.0.0.1", "::1", *hosts)]
    _certify(folder, folder, "broker", days,
             f"subjectAltName={','.join(names)}\nextendedKeyUsage=serverAuth,clientAuth")
    principals = []
    for name in ("broker", "admin"):
        _write_private(folder / f"{name}.token", token := new_token())
        principals.append(Principal(name, ("*",), ("*",), ("*",), token_hash(token)))
    write_principals(folder / "principals.toml", principals)
    _write_security(folder, "broker", "broker", principals="principals.toml")
    _report({"folder": str(folder)}, f"{folder} is ready: `cxlmq cluster up --security {folder}`, and the same option "
                                     "or CXLMQ_SECURITY for every other command")


@security.command()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.argument("name")
@click.option("--publish", help="May publish to this topic; * stands for anything.", **_TOPICS)
@click.option("--subscribe", help="May read this topic.", **_TOPICS)
@click.option("--admin", help="May create and delete this topic, and reset groups of it.",
              **_TOPICS)
@_DAYS
@common_options
def add(folder: Path, name: str, publish: tuple[str, ...], subscribe: tuple[str, ...], admin: tuple[str, ...],
        days: int) -> None:
    """Make somebody known: a folder with certificate and token to hand over, and the rights that are given.

    Running brokers take note within a second. Adding a name again gives it a new token and just the rights named now.

    \b
    Example:
      cxlmq security add ~/lab-security camera --publish 'frames.*'
      CXLMQ_SECURITY=~/lab-security/clients/camera cxlmq produce frames.front
    """
    from broker.config import check_topic_name
    from broker.security import Principal, new_token, read_principals, token_hash, write_principals

    check_topic_name(name)
    if name == "broker":
        raise CxlmqError("broker is the principal of the brokers themselves: choose another name")
    client = folder / "clients" / name
    client.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "clients").chmod(0o700)
    shutil.copyfile(folder / "ca.pem", client / "ca.pem")
    _certify(folder, client, name, days, "extendedKeyUsage=clientAuth")
    _write_private(client / f"{name}.token", token := new_token())
    _write_security(client, name, name)
    principals = read_principals(folder / "principals.toml")
    principals[name] = Principal(name, publish, subscribe, admin, token_hash(token))
    write_principals(folder / "principals.toml", principals.values())
    _report({"name": name, "folder": str(client)}, f"{name} is known; hand over {client}")


@security.command("list")
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@common_options
def list_(folder: Path) -> None:
    """List who is known, and with which rights."""
    from broker.security import RIGHTS, read_principals

    found = [{"name": each.name, **{right: list(getattr(each, right)) for right in RIGHTS}}
             for each in read_principals(folder / "principals.toml").values()]
    if settings().as_json:
        print_json(found)
    else:
        common.console().print(common.make_table("", ("name", *RIGHTS), (
            [each["name"], *(" ".join(each[right]) for right in RIGHTS)] for each in found)))


@security.command()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.argument("name")
@common_options
def remove(folder: Path, name: str) -> None:
    """Take all rights and the token from somebody. Streams that are open go on until they end."""
    from broker.security import read_principals, write_principals

    principals = read_principals(folder / "principals.toml")
    if principals.pop(name, None) is None:
        raise CxlmqError(f"{folder} knows no {name}: `cxlmq security list {folder}` shows who is known")
    write_principals(folder / "principals.toml", principals.values())
    shutil.rmtree(folder / "clients" / name, ignore_errors=True)
    _report({"removed": name}, f"{name} is known no longer")


def _report(values: dict[str, str], text: str) -> None:
    """As it is done, in JSON; for people it is a remark."""
    if settings().as_json:
        common.report(values, text)
    else:
        say(text)


def _is_address(host: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _write_private(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text + "\n")


def _write_security(folder: Path, certificate: str, token: str, **more: str) -> None:
    paths = {"ca": "ca.pem", "certificate": f"{certificate}.pem", "key": f"{certificate}.key",
             "token": f"{token}.token", **more}
    lines = ["[security]", *(f'{key} = "{path}"' for key, path in paths.items()), ""]
    (folder / "security.toml").write_text("\n".join(lines))


def _certify(ca: Path, folder: Path, name: str, days: int, extensions: str) -> None:
    """A key and a certificate of this name, signed by the CA."""
    authority = ca.absolute()
    extension_file = folder / f".{name}.ext"
    try:
        extension_file.write_text(extensions + "\n")
        _openssl(folder, "req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", str(days),
                 "-CA", str(authority / "ca.pem"), "-CAkey", str(authority / "ca.key"),
                 "-set_serial", f"0x{os.urandom(16).hex()}", "-extfile", extension_file.name)
    finally:
        extension_file.unlink(missing_ok=True)
        (folder / f"{name}.csr").unlink(missing_ok=True)


def _openssl(folder: Path, *arguments: str) -> None:
    """Run openssl there; what it writes is private. It is on every machine that has TLS: no library of ours for it."""
    try:
        done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, umask=0o077,
                              check=False)
    except FileNotFoundError:
        raise CxlmqError("there is no openssl on this machine: install it, or make the files that "
                         "security.toml names by other means") from None
    if done.returncode:
        raise CxlmqError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
