"""The wire contract: `kvmesh/v1/*.proto` and the stubs generated from it.

    from kvmesh.protos import pb, pb_grpc, pb_status

`generate.py` generates the stubs; `generate.py --check` checks that they are current.
"""

from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2_grpc as pb_grpc
from kvmesh.protos.kvmesh.v1 import status_pb2 as pb_status

__all__ = ["pb", "pb_grpc", "pb_status"]
