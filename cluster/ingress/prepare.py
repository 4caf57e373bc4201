"""From a request on the wire to one that can be placed."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.errors import ResumeMismatchError
from kvmesh.cluster.ingress import served, validate
from kvmesh.cluster.ingress.answers.plan import NO_PLAN, AnswerPlan
from kvmesh.cluster.ingress.answers.planner import AnswerPlanner
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.model_checks import check_pin, check_tokens, fit_context
from kvmesh.cluster.ingress.prompts import Prompts
from kvmesh.cluster.ingress.quality import accepted_formats
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.served import Served
from kvmesh.cluster.routing.accepted_formats import ANY_FORMAT, AcceptedFormats
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.model.generation_defaults import DefaultSampling
from kvmesh.workers.request import TokenIds
from kvmesh.workers.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that the model can serve, and its prompt as tokens.

    tenant: as authentication found it
    params: the request's, with a max_tokens that the context holds
    page_hashes: of the prompt's full pages, as the engines' prefix caches know them
    accepts: KV formats of groups
    plan: of the answer
    """

    spec: validate.GenerationSpec
    tenant: str
    prompt_ids: TokenIds
    params: SamplingParams
    page_hashes: tuple[bytes, ...] = ()
    accepts: AcceptedFormats = ANY_FORMAT
    plan: AnswerPlan = NO_PLAN

    @property
    def key(self) -> str:
        """Its id among those of all tenants."""
        return f"{self.tenant}/{self.spec.request_id}"


class Preparation:
    """Of the requests of an ingress process, whose parts these are."""

    def __init__(
        self,
        served: Served,
        prompts: Prompts,
        planner: AnswerPlanner,
        codec: TextCodec,
        limits: validate.Limits,
        *,
        defaults: DefaultSampling,
    ) -> None:
        self._served = served
        self._prompts = prompts
        self._planner = planner
        self._codec = codec
        self._limits = limits
        self._defaults = defaults

    async def prepare(self, request: pb.GenerateRequest, tenant: str) -> PreparedRequest:
        """Raises the errors of ingress/error_table.py."""
        status = self._served.status_for(request.model)
        accepts = accepted_formats(request)
        status = served.accepting(status, accepts)
        info = served.any_info(status)
        self._prompts.check_length(request.prompt, status)
        spec = validate.generation_spec(request, self._limits, self._defaults)
        if spec.resume is not None:
            if not request.sampling_params.HasField("seed"):
                refuse("sampling_params.seed", "must be set to the seed that `started` reported")
            if spec.resume.model_revision != info.model_revision:
                raise ResumeMismatchError(
                    f"the stream started on model revision {spec.resume.model_revision!r}, but "
                    f"the cluster now serves {info.model_revision!r}"
                )
        ids = await self._prompts.encode(spec.prompt, tenant, status)
        codec = self._codec
        check_tokens(spec, ids, info.vocab_size, codec.unused_token_ids, codec.placeholder_tokens)
        output = spec.params.max_tokens if spec.max_tokens_given else spec.params.min_tokens
        longest = served.longest_context(status, len(ids) + max(output, 1))
        if len(ids) >= longest:
            raise served.context_exceeded(len(ids), status)
        check_pin(spec, ids, status)
        params = fit_context(spec, len(ids), longest)
        plan = await self._planner.plan(spec.answer, ids, tenant)
        hashes: tuple[bytes, ...] = ()
        if params.prompt_logprobs is None:  # otherwise nothing cached would be used
            hashes = await self._prompts.page_hashes(ids, tenant, spec.cache_salt, info)
        return PreparedRequest(
            spec=spec,
            tenant=tenant,
            prompt_ids=ids,
            params=params,
            page_hashes=hashes,
            accepts=accepts,
            plan=plan,
        )
