"""The environment variables that Ray and Ray Serve read when they start.

Serve reads its choice of proxy and its ports from variables that must be set on
every node before Ray starts: `kvmesh config --variables` prints a node's.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.haproxy_program import haproxy_program, node_program
from kvmesh.cluster.ports import Port, PortBlock

MARGIN_BYTES = 1 << 20
HEALTH_CHECK_MS = 3000  # of Ray's nodes
# A node drains for this much longer than its processes, so that others may start before they end.
NODE_DRAIN_MARGIN_S = 45

# HAProxy instead of Serve's Python proxy: it is faster and forwards cancellations.
SERVE_VARIABLES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Which would keep a thousand log lines in memory until it writes them.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "2",
    "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": "1000",
    "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": "1000",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE": "1",
    # How long streams may continue after the proxy has reloaded its configuration.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    "RAY_SERVE_PORT_QUARANTINE_S": "60",
    # By default Serve kills a proxy that takes 5 seconds to start, as on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # HAProxy is replaced within seconds of its death: after three failed checks in a row.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A replica that hangs cannot end by itself.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # Calls over HTTP come to our front before Serve reads their bodies: see http_front.py.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "kvmesh.cluster.http_front.middlewares",
    # No need to wait: the client resumes its stream on another replica.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}


# A slightly too large request reaches the ingress, which explains the error; gRPC refuses larger
# ones at their first bytes.
SIZE_VARIABLES = ("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH")
# How long `ray start --block` drains its node at SIGTERM, at most, before it ends it.
DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
# What Serve runs as HAProxy.
HAPROXY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"


def serve_variables(config: ClusterConfig) -> dict[str, str]:
    """The variables that are the same on every node of a cluster that runs `config`."""
    size = str(config.ingress.max_request_bytes + MARGIN_BYTES)
    drain_s = math.ceil(config.timeouts.drain_s) + NODE_DRAIN_MARGIN_S
    return {
        **SERVE_VARIABLES,
        **dict.fromkeys(SIZE_VARIABLES, size),
        DRAIN_VARIABLE: str(drain_s),
    }


def node_variables(config: ClusterConfig) -> dict[str, str]:
    """The variables that must be set on this node of such a cluster."""
    return {**serve_variables(config), HAPROXY_VARIABLE: str(node_program())}


def local_variables(config: ClusterConfig, directory: Path, ports: PortBlock) -> dict[str, str]:
    """`serve_variables`, and those that separate local clusters from one another.

    directory: an empty directory of this cluster, for the proxy's sockets and files
    """
    program = haproxy_program(directory / "haproxy", config.ingress.host)
    return {
        **serve_variables(config),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        # Ray then listens on loopback only, where it would otherwise on every interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # How long Ray waits for its GCS to start: 30 seconds by default.
        "RAY_gcs_server_port_wait_time_s": str(math.ceil(config.timeouts.start_s)),
        # Without Ray's GCS its processes exit after this time: requests may end before.
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(math.ceil(config.timeouts.drain_s) + 60),
        # Without its raylet a node is dead after this many checks, and its processes are ended.
        "RAY_health_check_period_ms": str(HEALTH_CHECK_MS),
        "RAY_health_check_failure_threshold": str(
            math.ceil((config.timeouts.drain_s + 60) * 1000 / HEALTH_CHECK_MS)
        ),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.http_replicas[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.http_replicas[-1]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.grpc_replicas[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.grpc_replicas[-1]),
        HAPROXY_VARIABLE: str(program),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[Port.PROXY_STATS]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[Port.PROXY_METRICS]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[Port.FALLBACK_HTTP]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports[Port.FALLBACK_GRPC]),
        "PYTHONPATH": _python_path(),
    }


def _python_path() -> str:
    """PYTHONPATH with the location of this package, so that Ray's workers can import it."""
    location = str(Path(__file__).absolute().parents[2])
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.pathsep.join([location, *(part for part in others if part != location)])
