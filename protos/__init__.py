"""The wire contract: `kvmesh/*/*.proto` and the stubs generated from it.

    from kvmesh.protos import admin, admin_grpc, pb, pb_grpc

The stubs are imported as `kvmesh.v1` and `kvmesh.v1alpha`, after the files' conventional paths.
`generate.py` generates them; `generate.py --check` checks that they are current.
"""

from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.v1 import kvmesh_pb2_grpc as pb_grpc
from kvmesh.v1alpha import admin_pb2 as admin
from kvmesh.v1alpha import admin_pb2_grpc as admin_grpc

__all__ = ["admin", "admin_grpc", "pb", "pb_grpc"]
