"""Answers by a cluster in this process, through the same translation as over HTTP."""

from __future__ import annotations

import msgspec

from kvmesh.cluster.batch.errors import BatchRunError
from kvmesh.cluster.batch.line_request import LineRequest
from kvmesh.cluster.batch.output_file import LineResponse
from kvmesh.cluster.offline.local_cluster import TENANT, EngineFailedError, LocalCluster
from kvmesh.cluster.openai.app import OpenAIRoutes
from kvmesh.cluster.openai.call import HttpCall
from kvmesh.cluster.reception import report
from kvmesh.cluster.version import package_version


class LocalAnswers:
    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        routes = OpenAIRoutes(cluster.ingress, package_version())
        self._operations = {
            "/v1/chat/completions": routes.chat,
            "/v1/completions": routes.complete,
            "/v1/responses": routes.respond,
        }

    async def answer(self, request: LineRequest) -> LineResponse:
        call = HttpCall(
            TENANT,
            request.id,
            {},
            lambda error: report(error, (), request.id, TENANT),
            request.body,
        )
        try:
            async with self._cluster.call(), call.opened:
                reply = await self._operations[request.url](call)
        except EngineFailedError as error:
            raise BatchRunError(str(error)) from error
        except Exception as error:
            reply = call.failed(error)
        if reply.status_code == 503:  # the engine is lost, which is no answer to the request
            raise BatchRunError("the engine has failed repeatedly; see the log")
        return LineResponse(reply.status_code, request.id, msgspec.Raw(bytes(reply.body)))
