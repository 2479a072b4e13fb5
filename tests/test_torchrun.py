"""Training started by torchrun (FSDP2) and by Accelerate (DDP) on two nodes, with the lines of docs/multi-node.md.

Both are compared with SAM written out in one process."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from . import docs
from .by_hand import largest_difference, sam_by_hand

ROOT = Path(__file__).parent.parent
SIZES = ["--dtype", "float64"]
PAGE = docs.text("docs/multi-node.md")


class Node(NamedTuple):
    """Where an agent runs: what goes before its command, its address, its network interface."""

    prefix: list[str]
    address: str
    interface: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _namespaces() -> list[str] | None:
    """Two network namespaces joined by a cable; None where this process may not make them."""
    names = [f"fastpost-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "left", "netns", names[0], "type", "veth", "peer", "name", "right", "netns", names[1])
        for i, (name, end) in enumerate(zip(names, ("left", "right"), strict=True), start=1):
            _ip("-n", name, "addr", "add", f"10.213.0.{i}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError):
        _remove(names)
        return None
    return names


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two nodes with addresses of their own: network namespaces, or loopback addresses where those are not permitted."""
    try:
        names = _namespaces()
    except FileNotFoundError:
        names = None
    if names is None:
        yield [Node([], f"127.0.0.{i}", "lo") for i in (1, 2)]
        return
    ends = zip(names, ("left", "right"), strict=True)
    yield [Node(["ip", "netns", "exec", name], f"10.213.0.{i}", end) for i, (name, end) in enumerate(ends, start=1)]
    _remove(names)


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    """The weights that SAM by hand trains in one process, on whole micro-batches."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 256}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).double().eval()
    text = torch.tensor(list(inspect.getsource(argparse).encode()))[: 6 * 2 * 8 * 32]
    windows = text.view(6, 2, 8, 32)
    sam_by_hand(model, list(map(list, windows)), torch.optim.AdamW(model.parameters(), lr=3e-3), 0.01, clip=1.0)
    return model.state_dict()


def together(commands: list[list[str]], folder: Path) -> str:
    """Runs commands at the same time and returns what the first one printed; whatever happens, none is left."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    logs = [folder / f"{i}.log" for i in range(len(commands))]
    processes = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as output:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT))
    end = time.monotonic() + 150
    try:
        # Until one fails: the others would wait for it, for minutes.
        while None in (codes := [process.poll() for process in processes]) and not any(codes) and time.monotonic() < end:
            time.sleep(0.2)
    finally:
        for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):  # torchrun ends its workers at the first
            for process in processes:
                stop(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in processes:
                    process.wait(timeout=20)
    printed = [log.read_text() for log in logs]
    assert codes == [0] * len(codes), "\n".join(f"exit code {c}:\n{text}" for c, text in zip(codes, printed, strict=True))
    return printed[0]


def check(printed: str, path: Path, alone: dict[str, torch.Tensor]) -> None:
    losses = [float(loss) for loss in re.findall(r"step \d: loss ([\d.]+)", printed)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.3
    assert "gain 1.00" in printed
    weights = torch.load(path)
    worst = largest_difference((weights[name], w) for name, w in alone.items())
    # Not 0 either: that would be a process that trained alone.
    assert 0 < worst <= 1e-12


def command(page_line: str, node: Node, head: Node, port: int, path: Path, **variables: str) -> list[str]:
    """A line of the page, on a node."""
    line = page_line.replace(":29400", f":{port}")
    hosts = "true" if node == head else "false"
    given = {
        "HOSTS": hosts,
        "HEAD": head.address,
        "ADDRESS": node.address,
        "GLOO_SOCKET_IFNAME": node.interface,
        **variables,
    }
    script = " ".join(f"{k}={v}" for k, v in given.items())
    return [*node.prefix, "bash", "-c", f"export {script}; exec {line} {' '.join(SIZES)} --output {path}"]


def line_of_page(start: str) -> str:
    [line] = re.findall(rf"^{start} .*$", PAGE, re.MULTILINE)
    return str(line)


def test_torchrun_on_two_nodes(tmp_path: Path, nodes: list[Node], alone: dict[str, torch.Tensor]) -> None:
    port, line = free_port(), line_of_page("torchrun")
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    lines = [command(line, node, nodes[0], port, path) for node, path in zip(nodes, paths, strict=True)]
    printed = together(lines, tmp_path)
    [written] = [path for path in paths if path.exists()]  # by the first process; agents agree on which one that is
    if written == paths[0]:
        check(printed, written, alone)
    else:
        assert printed == ""


def test_accelerate_on_two_nodes(tmp_path: Path, nodes: list[Node], alone: dict[str, torch.Tensor]) -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = tmp_path / "cluster.yaml"
    config.write_text(block.replace("29500", str(free_port())))
    line = line_of_page("accelerate").replace("cluster.yaml", str(config))
    assert "export ACCELERATE_USE_CPU=true" in PAGE
    path = tmp_path / "weights.pt"
    commands = [
        command(line, node, nodes[0], 0, path, RANK_OF_MACHINE=str(i), ACCELERATE_USE_CPU="true")
        for i, node in enumerate(nodes)
    ]
    check(together(commands, tmp_path), path, alone)
