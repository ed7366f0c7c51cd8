"""Two nodes on one machine, DP 2 and PP 2 across them, the losses of one node.

The thorough profile launches DP 2 as a user does, by examples/launch.sh once on each node; otherwise the ranks are
forked into the nodes, which saves their imports.
The nodes are two network namespaces joined by a cable (a veth pair), so nothing but the network connects the two
agents and their ranks; that takes root and iproute2. Elsewhere the agents meet on two loopback addresses.
"""

import ctypes
import os
import shutil
import socket
import subprocess
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from tests.conftest import THOROUGH
from tests.launch.launching import CONFIG, TINY, losses, started, steps
from tests.ranks import Process, run_ranks

pytestmark = pytest.mark.process

STEPS = 8
CLONE_NEWNET = 0x40000000
LAYOUTS = {"DP 2": [], "PP 2": ["--pipeline-model-parallel-size", 2, "--num-layers", 2]}


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, text=True)


class Cable:
    """Two namespaces, one address each."""

    crosses = True

    def __init__(self, tag):
        self.names = [f"tidar{tag}n{i}" for i in range(2)]
        self.devices = [f"td{tag}v{i}" for i in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def connect(self):
        for name in self.names:
            ip("netns", "add", name)
        ends = zip(self.devices, self.names, strict=True)
        (a, b), (c, d) = ends
        ip("link", "add", a, "netns", b, "type", "veth", "peer", "name", c, "netns", d)
        for name, device, address in zip(self.names, self.devices, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cut(self):
        for name in self.names:  # the veth pair goes with them
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def on(self, node, command):
        return ["ip", "netns", "exec", self.names[node], *command]

    def entering(self, node):
        return partial(enter, self.names[node])

    def sent(self, node):
        """Bytes that have left a node."""
        counter = f"/sys/class/net/{self.devices[node]}/statistics/tx_bytes"
        done = subprocess.run(self.on(node, ["cat", counter]), check=True, capture_output=True, text=True)
        return int(done.stdout)


class Loopback:
    """The nodes share this machine's network; the meeting point is its second loopback address."""

    crosses = False
    devices = ("lo", "lo")
    addresses = ("127.0.0.2", "127.0.0.1")

    def on(self, node, command):
        return command

    def entering(self, node):
        return None


def enter(name):
    """Move this process into a network namespace."""
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def network():
    """Namespaces where this process may make them, else the loopback."""
    cable = Cable(os.getpid() % 10000)
    try:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise PermissionError
        cable.connect()
        nodes = cable
    except (PermissionError, subprocess.CalledProcessError):
        cable.cut()
        with socket.socket() as probe:
            try:
                probe.bind((Loopback.addresses[0], 0))
            except OSError:
                pytest.skip("TWO NODES ARE NOT TESTED: neither ip netns (as root) nor a second loopback address works")
        nodes = Loopback()
    try:
        yield nodes
    finally:
        if nodes is cable:
            cable.cut()


def free_port(address):
    with socket.socket() as each:
        each.bind((address, 0))
        return each.getsockname()[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_two_nodes_equal_those_of_one(shards, tmp_path, layout):
    flags = [*LAYOUTS[layout], "--config", CONFIG, *TINY, "--train-iters", STEPS, "--train-data", shards[0]]

    run_ranks(2, "tools/pretrain.py", *flags, "--save", tmp_path / "one")
    command = ["examples/launch.sh", *flags, "--save", tmp_path / "two"]
    with network() as nodes, ExitStack() as stack:
        port = 29555 if nodes.crosses else free_port(nodes.addresses[0])
        running = []
        for rank in range(2):
            log = tmp_path / f"two{rank}.log"
            variables = {"MASTER_ADDR": nodes.addresses[0], "MASTER_PORT": port}
            variables["GLOO_SOCKET_IFNAME"] = nodes.devices[rank]
            if THOROUGH and layout == "DP 2":
                variables |= {"NNODES": 2, "NODE_RANK": rank, "GPUS_PER_NODE": 1}
                running.append(stack.enter_context(started(nodes.on(rank, command), log, **variables)))
            else:
                variables |= {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
                program = ["tools/pretrain.py", *command[1:]]
                running.append(Process(program, log, variables=variables, prepare=nodes.entering(rank)))
                stack.callback(running[-1].kill)
        for rank, node in enumerate(running):
            assert node.wait(240) == 0, (tmp_path / f"two{rank}.log").read_text()[-6000:]
        if nodes.crosses:  # both ways at least the gradients, or the activations and their gradients, of each step
            crossed = [nodes.sent(node) for node in range(2)]
            assert min(crossed) > floor(layout), crossed
    assert [row["iteration"] for row in steps(tmp_path / "two")] == list(range(1, STEPS + 1))
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-6)


def floor(layout):
    """Bytes that each node must have sent, in float32, for a model of 128 channels and 64 clean and 64 mask tokens."""
    if layout == "PP 2":
        return STEPS * 4 * 128 * 128 * 4  # four micro-batches of 2S tokens x channels
    return STEPS * 600_000 * 4  # one gradient a parameter


@pytest.mark.parametrize(("given", "missing"), [({}, "MASTER_ADDR"), ({"MASTER_ADDR": "127.0.0.1"}, "NODE_RANK")])
def test_what_many_nodes_need_is_asked_for(tmp_path, given, missing):
    log = tmp_path / "log"
    with started(["examples/launch.sh"], log, NNODES=2, **given) as run:
        assert run.wait(20) != 0
    assert f"error: set {missing} to" in log.read_text()
