"""Style that a program can check. Every message says what to do."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = (".py", ".pyx", ".pxd")
GENERATED = ("broker/proto/cxlmq_pb2.py", "broker/proto/cxlmq_pb2.pyi")

# Lower layers know nothing of higher ones.
LAYERS = ("sim/cxl", "broker", "client", "sim/cluster", "sim/chaos", "scripts", "tests")

# Who may use what. A new name here needs a reason as good as those that are there.
MAY_MAP_MEMORY = {
    "sim/cxl/region.py": "the one door's mapping, and named semaphores",
    "client/bench/harness.py": "the warm mapping that the gRPC baseline copies into, which is no region",
}
MAY_IMPORT_GRPC = {
    "broker/server.py": "the broker's adapter", "broker/publish_stream.py": "its publish streams", "broker/admin_service.py": "its Admin service",
    "broker/head_calls.py": "its calls to the head",
    "broker/calls.py": "what all its methods share", "broker/group_service.py": "its Groups service", "client/connection.py": "channels", "client/transport.py": "publish",
    "client/grpc_subscriber.py": "subscribe", "client/bench/grpc_limit.py": "the bare gRPC baseline",
    "client/admin.py": "admin calls", "sim/chaos/garbage.py": "nonsense for every method",
}
MAY_READ_ENVIRONMENT = {
    "broker/config.py": "the settings", "broker/grpc_options.py": "gRPC reads its experiments from there",
    "client/bench/harness.py": "hands it on to the processes of a baseline",
    "sim/chaos/disk.py": "preloads the faulty disk into brokers",
}
MAY_REACH_POINTERS = {
    "broker/log.pyx": "the broker's counters",
    "broker/order_lock.pyx": "the order lock, on its own",
    "broker/stages/sequencer.pyx": "the sequencer's counters, the order lock",
    "broker/stages/replication.pyx": "the broker's counters; payload goes to writev without a copy",
    "client/attached.pyx": "loans: an attached client fills its lease in place",
    "client/attached_reader.pyx": "views: an attached client reads payload in place",
    "sim/cluster/door.pyx": "a door before a door hands pointers on",
    "sim/cluster/witness.pyx": "looks at memory past all caches, and changes nothing",
}
MAY_SLEEP = {"client/turn.pyx": "threads of one process wait for each other, on memory of their own"}

FILE_LINES, TEST_LINES, FUNCTION_LINES, TRACKED_BYTES = 600, 800, 70, 1 << 20
LONG_FILES = {
    "broker/config.py": (650, "every setting, declared once"),
    "broker/log.pyx": (700, "slots, segments and shares of one log change under one lock"),
    "broker/segments.pyx": (630, "three strategies behind one interface"),
    "broker/stages/sequencer.pyx": (940, "one protocol, whose parts share every structure"),
    "broker/errors.py": (700, "every error of the product, in one list"),
    "client/attached.pyx": (820, "the attached publisher: one structure that packing, sessions and loans share"),
    "client/cluster.py": (640, "starting, watching and stopping processes is one story"),
}
LONG_FUNCTIONS: dict[str, str] = {}


@cache
def files() -> list[str]:
    """Everything that is or would be in git, as paths from the root."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    if listed.returncode == 0:
        return sorted(each for each in listed.stdout.splitlines() if (ROOT / each).is_file())
    skipped = {".venv", "build", ".git", "results"}
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*")
                  if path.is_file() and not skipped & set(path.relative_to(ROOT).parts))


def code() -> list[str]:
    return [each for each in files() if each.endswith(CODE) and each not in GENERATED]


def product() -> list[str]:
    return [each for each in code() if each.startswith(("sim/", "broker/", "client/", "scripts/"))]


@cache
def text_of(file: str) -> str:
    return (ROOT / file).read_text()


def without_strings(source: str) -> str:
    """Code without what is said in comments and docstrings."""
    return re.sub(r'""".*?"""|#[^\n]*', "", source, flags=re.S)


# ---- imports -------------------------------------------------------------------------------------------------------

_CYTHON_IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import\s+\(?([^()\n]*)|c?import\s+([\w., ]+))", re.M)


def _python_imports(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    typing_only = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If)
                   and ast.unparse(node.test).endswith("TYPE_CHECKING") for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


@cache
def imports(file: str) -> set[str]:
    """Dotted names that a file imports or cimports, wherever in it."""
    if file.endswith(".py"):
        return set(_python_imports(text_of(file)))
    found = set()
    for module, names, plain in _CYTHON_IMPORT.findall(without_strings(text_of(file))):
        if module:
            found |= {module} | {f"{module}.{name.split(' as ')[0].strip()}" for name in names.split(",")}
        else:
            found |= {name.split(" as ")[0].strip() for name in plain.split(",")}
    return found


@cache
def modules() -> dict[str, str]:
    """Dotted module name -> the module's stem path, for everything of ours."""
    return {str(Path(each).with_suffix("")).replace("/", "."): str(Path(each).with_suffix("")) for each in code()}


def layer_of(path: str) -> int | None:
    return next((number for number, layer in enumerate(LAYERS) if path.startswith(layer + "/")), None)


def test_lower_layers_know_nothing_of_higher_ones() -> None:
    wrong = []
    for file in code():
        own = layer_of(file)
        for name in imports(file):
            other = layer_of(name.replace(".", "/") + "/")
            if own is not None and other is not None and other > own:
                wrong.append(f"{file} imports {name}")
    assert not wrong, f"{wrong}: the order is {' < '.join(LAYERS)}; move what both need into the lower one"


def test_no_two_files_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for file in code():
        stem = str(Path(file).with_suffix(""))
        graph.setdefault(stem, set()).update(
            modules()[name] for name in imports(file) if name in modules() and modules()[name] != stem)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, (
            f"{' -> '.join((*path[path.index(module):], module))} is a cycle: move what both need into a third file")
        if module in done:
            return
        for other in sorted(graph.get(module, ())):
            visit(other, (*path, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_stages_do_not_know_each_other() -> None:
    # A stage may name what it is made from (Stage) and state it is given: the ack stage by receivers, OrderState by
    # the head's stages. It never calls another stage's step.
    for file in (each for each in product() if each.startswith("broker/stages/") and each.endswith(".pyx")):
        others = {name.split(".")[2] for name in imports(file) if re.match(r"broker\.stages\.\w+", name)}
        allowed = {"stage", Path(file).stem} | {
            "receiver": {"ack"}, "attach": {"ack"}, "reclaim": {"sequencer"}, "directory": {"sequencer"},
            "takeover": {"sequencer"},
        }.get(Path(file).stem, set())
        assert others <= allowed, f"{file} knows {others - allowed}: stages meet only in memory (DESIGN.md, decision 4)"


_A_STAGE_IS_MADE = re.compile(r"\b(?:BrokerLog|AckStage|AttachStage|Receiver|Delegation|Scanner|Release|Reclaim|Directory|"
                              r"Replication|Watch|OrderState|Takeover|PoolLeader)\(")


def test_a_broker_is_put_together_in_one_place() -> None:
    places = {"broker/assembly.py", "broker/stages/takeover.pyx"}          # a takeover makes what it fills
    wrong = {file for file in product() if file not in places
             and _A_STAGE_IS_MADE.search(re.sub(r"cdef class .*", "", without_strings(text_of(file))))}
    assert not wrong, f"{sorted(wrong)} make stages themselves: what runs a broker builds it by broker.assembly.Assembly"
    assert _A_STAGE_IS_MADE.search(text_of("broker/assembly.py"))


def importers(*names: str) -> list[str]:
    return [file for file in product() if any(each.split(".")[0] in names for each in imports(file))]


def test_only_the_door_maps_memory() -> None:
    wrong = sorted(set(importers("mmap", "posix_ipc")) - set(MAY_MAP_MEMORY))
    assert not wrong, f"{wrong} import mmap or posix_ipc: use sim.cxl.region"


def test_only_the_adapters_know_grpc() -> None:
    wrong = sorted(set(importers("grpc", "grpc_health", "grpc_reflection")) - set(MAY_IMPORT_GRPC))
    assert not wrong, f"{wrong} import grpc: put it behind an adapter, one of {sorted(MAY_IMPORT_GRPC)}"


def test_only_the_configuration_reads_the_environment() -> None:
    wrong = [file for file in product() if re.search(r"\benviron\b|\bgetenv\b", without_strings(text_of(file)))
             and file not in MAY_READ_ENVIRONMENT]
    assert not wrong, f"{wrong} read the environment: make it a setting in broker/config.py"


def test_commands_print_through_the_one_writer() -> None:
    wrong = [file for file in product() if (file.startswith("client/cli/") or re.fullmatch(r"sim/\w+/cli.py", file))
             and file != "client/cli/output.py" and re.search(r"\bclick\.echo\(|(?<![.\w])print\(|\bsys\.stdout\.write|os\.write\(1",
                                                              without_strings(text_of(file)))]
    assert not wrong, f"{wrong}: use client.cli.output (line, print_json, say) or common.report for what is done"


def test_nobody_goes_around_the_door() -> None:
    reaches = re.compile(r"\.(coherent_area|payload|payload_writable)\(\s*\w|memory\.base\b|from_buffer\(")
    wrong = [file for file in product() if not file.startswith("sim/cxl/") and file.endswith((".pyx", ".pxd"))
             and reaches.search(without_strings(text_of(file))) and file not in MAY_REACH_POINTERS]
    assert not wrong, f"{wrong} hold pointers into the region: use the methods of Memory, or say why in this test"


def test_native_code_uses_instructions_only_on_its_own_memory() -> None:
    # Fences, flushes and copies of the region are the door's; others may use atomics, for what threads of one process
    # share, and clocks.
    wrong = [file for file in product() if not file.startswith(("sim/cxl/", "client/bench/")) and re.search(
        r"\bcxl_(store_fence|flush_range|invalidate_range|write_line|read_line|copy_nontemporal|futex_\w+)\(",
        without_strings(text_of(file))) and file not in MAY_SLEEP]
    assert not wrong, f"{wrong} use the primitives directly: go through Memory"


# ---- sizes and paths -----------------------------------------------------------------------------------------------


def test_no_large_file_is_in_git() -> None:
    wrong = [file for file in files() if (ROOT / file).stat().st_size > TRACKED_BYTES]
    assert not wrong, f"{wrong} are over 1 MB: keep data out of git, generate it or ignore it"


def test_no_path_of_somebodys_machine() -> None:
    pattern = re.compile("(?<![\\w.])/(" + "wo" + "rk|ro" + "ot|home/\\w+)/")
    wrong = []
    for file in files():
        data = (ROOT / file).read_bytes()
        if b"\0" not in data:
            wrong += [f"{file}: {found[0]}" for found in pattern.finditer(data.decode(errors="replace"))]
    assert not wrong, f"{wrong}: use a path relative to the file, a setting, or a temporary folder"


def test_files_are_short_enough_to_read() -> None:
    for file in code():
        limit, _ = LONG_FILES.get(file, (TEST_LINES if file.startswith("tests/") else FILE_LINES, ""))
        lines = text_of(file).count("\n")
        assert lines <= limit, f"{file} has {lines} lines, allowed are {limit}: split it where it does two things"


def functions(file: str) -> Iterator[tuple[str, int]]:
    """(name, lines) of each function of a file."""
    if file.endswith(".py"):
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1
        return
    lines = text_of(file).splitlines()
    for number, line in enumerate(lines):
        match = re.match(r"( *)(?:async def|def|cpdef|cdef(?! class))\b[^(=]*?(\w+)\(", line)
        if match is None:
            continue
        indent, last = len(match[1]), number
        for later in range(number + 1, len(lines)):
            stripped = lines[later].strip()
            outside = len(lines[later]) - len(lines[later].lstrip()) <= indent
            if stripped and outside and not stripped.startswith((")", "#")):
                break
            if stripped:
                last = later
        yield match[2], last - number + 1


def test_functions_are_short_enough_to_read() -> None:
    wrong = [f"{file}: {name} has {lines} lines" for file in code() for name, lines in functions(file)
             if lines > FUNCTION_LINES and f"{file}:{name}" not in LONG_FUNCTIONS]
    assert not wrong, f"{wrong}, allowed are {FUNCTION_LINES}: name its parts and make them functions"


def test_what_this_test_allows_still_exists() -> None:
    for allowed in (MAY_MAP_MEMORY, MAY_IMPORT_GRPC, MAY_READ_ENVIRONMENT, MAY_REACH_POINTERS, LONG_FILES):
        gone = [file for file in allowed if not (ROOT / file).is_file()]
        assert not gone, f"{gone} are gone: strike them from tests/test_tidy.py"


def test_no_two_test_files_share_a_name() -> None:
    names = [Path(file).name for file in code() if Path(file).name.startswith("test_")]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"{twice}: pytest collects test files by their bare names, so give one of them another"


def test_tests_that_the_documents_name_exist() -> None:
    wanted = {(document, *named) for document in files() if document.startswith("memory-bank/") and document.endswith(".md")
              for named in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", text_of(document))}
    by_name = {Path(file).name: text_of(file) for file in code() if Path(file).name.startswith("test_")}
    gone = [f"{document}: {file}::{test}" for document, file, test in sorted(wanted)
            if file not in by_name or (test and f"def {test}(" not in by_name[file])]
    assert not gone, f"{gone}: name the test that there is"


def test_every_test_says_what_it_protects() -> None:
    wrong = [file for file in code() if Path(file).name.startswith("test_") and file.endswith(".py")
             and not ast.get_docstring(ast.parse(text_of(file)))]
    assert not wrong, f"{wrong} have no docstring: say in one sentence what must hold"


# ---- generated pages are current -----------------------------------------------------------------------------------


def test_the_page_of_data_structures_is_what_the_layout_says() -> None:
    from broker.config import ClusterConfig, layout_of
    from broker.layout_page import data_structures_markdown

    page = ROOT / "memory-bank/dataStructures.md"
    wanted = data_structures_markdown(layout_of(ClusterConfig()))
    assert (page.read_text() if page.is_file() else "") == wanted, (
        f"{page.name} is stale: run `cxlmq region layout --output memory-bank/dataStructures.md`")


def test_the_service_contract_in_python_is_what_the_proto_says(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed: pip install -e '.[dev]'")
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", ".", f"--python_out={tmp_path}",
                    f"--pyi_out={tmp_path}", "broker/proto/cxlmq.proto"], cwd=ROOT, check=True)
    for file in GENERATED:
        assert (tmp_path / file).read_text() == text_of(file), f"{file} is stale: run scripts/generate_proto.sh"
