"""Run JAX's coordination service in its own process, so that it outlives process 0.

Processes that lose the service abort at once with native traces. Here they have time to end in
order. This file runs by its path: `python coordinator.py ADDRESS PROCESSES HEARTBEAT_SECONDS`.
"""

import os
import signal
import socket
import sys
import time

# Seconds until the service ends, by the last word of process 0 on standard input; "" = it died, and
# the others need time to notice.
LINGER_SECONDS = {"done": 0.0, "stop": 10.0, "": 50.0}
PORT_SECONDS = 70.0  # an earlier service on the same port may still linger


def wait_for_port(port: int) -> None:
    """Wait until no other process has the port: the service itself would share it."""
    end = time.monotonic() + PORT_SECONDS
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return probe.bind(("", port))
            except OSError:
                if time.monotonic() > end:
                    raise
        time.sleep(0.5)


def serve_coordination(address: str, processes: int, heartbeat: int) -> None:
    """Serve until standard input closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # for process 0, not for this one
        signal.signal(number, signal.SIG_IGN)
    try:
        wait_for_port(int(address.rsplit(":", 1)[1]))
    except OSError as error:
        print(f"port of {address}: {error.strerror}", flush=True)
        return
    from jaxlib import _jax

    service = _jax.get_distributed_runtime_service(
        address, processes, heartbeat_timeout=heartbeat, shutdown_timeout=60
    )
    print("ready", flush=True)
    words = sys.stdin.read().split()
    time.sleep(LINGER_SECONDS[words[-1] if words else ""])
    del service
    os._exit(0)


if __name__ == "__main__":
    serve_coordination(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
