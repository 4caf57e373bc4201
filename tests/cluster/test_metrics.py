"""The table of metrics keeps to Prometheus' conventions, and meters keep to the table."""

from __future__ import annotations

import asyncio
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmesh.cluster import router_service
from kvmesh.cluster.config import build
from kvmesh.cluster.ingress.authenticate import Authenticator
from kvmesh.cluster.keys import known_keys, metered_tenants
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import QuotaExceededError
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.gpus import Gpus, GpuUse, local_gpu_memory
from kvmesh.cluster.telemetry.meters import EngineMeters, IngressMeters, Meters
from kvmesh.cluster.telemetry.table import BY_NAME, METRICS, RAY_LABELS, Kind, Metric
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.request import EndReason, SequenceDelta, SequenceUsage
from tests.cluster.machine import TENANT, Machine, SeenMeters, answer, machine
from tests.cluster.test_generation import PROMPT, make_request, read, resumed
from tests.repo.imports import ROOT

BASE_UNITS = {"seconds", "bytes", "ratio", "nats"}
MANY = 10_000


def test_each_metric_is_there_once() -> None:
    assert len(METRICS) == len(BY_NAME) > 30


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert re.fullmatch("kvmesh(_[a-z]+)+", metric.name)
    stem = metric.name.removesuffix("_total")
    assert (stem != metric.name) == (metric.kind is Kind.COUNTER)
    assert not stem.endswith(("_bucket", "_sum", "_count", "_created"))
    assert metric.unit in {"", *BASE_UNITS}
    named = {unit for unit in BASE_UNITS if stem.endswith(f"_{unit}")}
    assert named == ({metric.unit} - {""})
    # In OpenMetrics, a counter's family has its name without _total.
    assert stem == metric.name or stem not in BY_NAME
    assert metric.help and not metric.help.endswith(".")


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_labels_and_buckets(metric: Metric) -> None:
    for label in metric.label_names:
        assert re.fullmatch("[a-z_]+", label) and label not in {
            *RAY_LABELS,
            "le",
            "job",
            "instance",
        }
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert all(0 < low < high for low, high in pairwise(metric.buckets))
    if metric.name.startswith("kvmesh_request_") and "per_output" not in metric.name:
        assert metric.buckets[-1] == 1800, "half an hour is not the last bucket"


def test_every_metric_is_recorded_somewhere() -> None:
    source = (ROOT / "cluster/telemetry/meters.py").read_text()
    constants = {name for name, value in vars(table).items() if isinstance(value, Metric)}
    assert constants == set(re.findall(r"\btable\.([A-Z_]+)", source))


def test_totals_are_counted_by_what_they_gain() -> None:
    seen = SeenMeters()
    meters = Meters(seen, group="g")
    for total in (0, 3, 3, 10):
        meters.total(table.SEQUENCES, total, outcome="stop")
    meters.total(table.SEQUENCES, 5, outcome="length")
    assert seen.values == {table.SEQUENCES.name: {("g", "stop"): 10, ("g", "length"): 5}}


def test_gpus() -> None:
    seen = SeenMeters()
    EngineMeters(seen, "g").gpus([GpuUse(0.5, 6, 4), GpuUse(1.0, 9, 1), GpuUse(None, 7, 3)])
    assert set(seen.values[table.GPU_UTILIZATION.name]) == {("g", "0"), ("g", "1")}
    assert seen.of(table.GPU_MEMORY, "g", "2", "used") == 7
    assert seen.of(table.GPU_UTILIZATION, "g", "1") == 1.0
    assert seen.of(table.GPU_MEMORY, "g", "0", "free") == 4


@pytest.mark.parametrize("uuids", [[""], ["GPU-0000"]])
def test_without_nvml_there_are_no_gpus(uuids: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert Gpus(uuids).read() == []


def test_gpus_have_the_metrics_that_nvml_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import pynvml

    missing: set[str] = {"handle of unknown"}

    def handle_of(uuid: str) -> Any:
        return say(f"handle of {uuid}", f"handle of {uuid}")

    def say(what: str, value: Any) -> Any:
        if what in missing:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle_of)
    monkeypatch.setattr(
        pynvml,
        "nvmlDeviceGetUtilizationRates",
        lambda handle: say(f"rates by {handle}", SimpleNamespace(gpu=25)),
    )
    monkeypatch.setattr(
        pynvml,
        "nvmlDeviceGetMemoryInfo",
        lambda handle: say(f"memory by {handle}", SimpleNamespace(used=6, free=4)),
    )
    gpus = Gpus(["GPU-a", "unknown", "MIG-b", "MIG-b"])
    whole, memory = GpuUse(0.25, 6, 4), GpuUse(None, 6, 4)
    assert gpus.read() == [whole, GpuUse(), whole, whole]
    missing |= {"rates by handle of MIG-b", "memory by handle of GPU-a"}
    for _ in range(2):
        assert gpus.read() == [GpuUse(0.25), GpuUse(), memory, memory]
    assert len(caplog.records) == 3, "one warning for each"
    missing.clear()
    assert gpus.read() == [whole, GpuUse(), whole, whole]


@pytest.mark.parametrize(
    ("visible", "sizes"),
    [
        (None, [10, 20, 30]),
        ("", []),
        ("1", [20]),
        ("2, 0", [30, 10]),
        ("GPU-bb,GPU-a", [20, 10]),
        ("MIG-1,0", [5, 10]),
        # CUDA stops at what it does not know, and at what could be several.
        ("0,7,1", [10]),
        ("-1,0", []),
        ("0,GPU-c,1", [10]),
        ("0,GPU-,1", [10]),
        ("0,MIG-2,1", [10]),
        ("0,,1", [10]),
        ("none", []),
    ],
)
def test_gpus_that_cuda_does_not_show_are_not_counted(
    visible: str | None, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pynvml

    uuids, slices = ["GPU-aa", "GPU-bb", "GPU-bc"], {"MIG-1": 5}

    def of_slice(uuid: str) -> str:
        if uuid not in slices:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def memory(handle: int | str) -> SimpleNamespace:
        return SimpleNamespace(total=slices[handle] if handle in slices else 10 + 10 * int(handle))

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: uuids[handle])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", of_slice)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert local_gpu_memory(environ) == sizes


def test_tenants_have_no_metrics_unless_they_are_asked_for() -> None:
    silent, spoken = SeenMeters(), SeenMeters()
    for seen, tenants in ((silent, ()), (spoken, ("a",))):
        meters = IngressMeters(seen, tenants)
        for tenant in ("a", "b", "c", None):
            meters.call("Generate", "ok", tenant)
    assert table.TENANT_REQUESTS.name not in silent.values
    assert spoken.values[table.TENANT_REQUESTS.name] == {("a", "ok"): 1, ("other", "ok"): 2}


def test_the_number_of_tenants_is_bounded(tmp_path: Path) -> None:
    keys = [{"tenant": name, "sha256": f"{number:064x}"} for number, name in enumerate("abca")]
    auth = build({"auth": {"keys": keys}}).auth
    assert metered_tenants(auth, 0) == ()
    assert metered_tenants(auth, 2) == ("a", "b")
    assert metered_tenants(auth, 9) == ("a", "b", "c")
    for name in ("d", "e.admin"):
        (tmp_path / name).write_text("a-key-of-" + name)
        (tmp_path / name).chmod(0o600)
    both = build({"auth": {"keys": keys, "key_directory": str(tmp_path)}}).auth
    assert metered_tenants(both, 4) == ("a", "b", "c", "d")
    assert metered_tenants(both, 9)[-1] == "e"
    nobodys = build({"auth": {"mode": "none"}}).auth
    caller = Authenticator(known_keys(nobodys)).authenticate([])
    assert metered_tenants(nobodys, 9) == (caller.tenant,)


async def generate(built: Machine, max_tokens: int, request_id: str = "") -> pb.Usage:
    request = pb.GenerateRequest(
        request_id=request_id,
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=PROMPT)),
        sampling_params=pb.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
    )
    events = [event async for event in built.ingress.generate_stream(request, TENANT)]
    return events[-1].usage


async def test_a_request_is_measured_from_end_to_end() -> None:
    async with machine() as built:
        built.allow(MANY)
        usage = await generate(built, 6)
        engine, seen = built.engines["g0"], built.meters
        account = engine.leader.account
        await built.at_rest()
        await engine._account._measure()
        built.router._measured_s -= router_service.MEASURE_PERIOD_S
        built.router.tick()
    for metric in (
        table.REQUEST_QUEUE,
        table.REQUEST_DURATION,
        table.FIRST_TOKEN,
        table.OUTPUT_TOKEN,
    ):
        assert seen.of(metric, "g0") == 1, metric.name
    assert seen.of(table.TENANT_TOKENS, TENANT, "prompt") == len(PROMPT)
    assert seen.of(table.TENANT_TOKENS, TENANT, "completion") == usage.completion_tokens == 6
    of = engine.meters.of
    assert of(table.PROMPT_TOKENS, "g0") == len(PROMPT)
    assert of(table.COMPLETION_TOKENS, "g0") == 6
    # Each token but the last one is computed: prompts in chunks, others one in a step.
    assert of(table.COMPUTED_TOKENS, "g0", "prefill") == len(PROMPT)
    assert of(table.COMPUTED_TOKENS, "g0", "decode") == of(table.INTER_TOKEN, "g0") == 5
    steps = account.loads.steps_total
    assert of(table.STEP, "g0", "host") == of(table.STEP, "g0", "device") == steps
    assert of(table.SEQUENCES, "g0", "length") == 1
    assert of(table.SEQUENCE_PREFILL, "g0") == of(table.SEQUENCE_QUEUE, "g0") == 1
    assert of(table.LIVE_SEQUENCES, "g0", "running") == of(table.PREFILL_LEFT, "g0") == 0
    assert of(table.STEP_AGE, "g0") == 0
    router = built.router.meters.of
    assert router(table.DECISION) == 1
    assert router(table.LEASE_EVENTS, "granted") == router(table.LEASE_EVENTS, "released") == 1
    assert router(table.GROUP_UP, "g0") == 1
    assert router(table.TENANT_BYTES, TENANT) == router(table.LEDGER, "g0", "leased") == 0
    capacity = account.info.capacity_bytes
    assert router(table.LEDGER, "g0", "free") == capacity


def test_latencies_are_those_of_the_usage() -> None:
    recorded: dict[str, float] = {}

    def factory(metric: Metric) -> SimpleNamespace:
        return SimpleNamespace(record=lambda value, _: recorded.setdefault(metric.name, value))

    usage = pb.Usage(
        group="g0", queue_s=0.5, time_to_first_token_s=2.0, total_s=5.0, completion_tokens=12
    )
    IngressMeters(factory).finished(usage, TENANT, 4)
    assert recorded == {
        table.REQUEST_QUEUE.name: 0.5,
        table.FIRST_TOKEN.name: 2.0,
        table.OUTPUT_TOKEN.name: 1.0,
        table.REQUEST_DURATION.name: 5.0,
    }
    recorded.clear()
    IngressMeters(factory).finished(pb.Usage(group="g0", completion_tokens=0), TENANT, 0)
    assert table.OUTPUT_TOKEN.name not in recorded


def test_who_ends_without_a_token_has_waited_as_well() -> None:
    """Else the queue looks shortest when requests time out in it."""
    recorded: dict[str, float] = {}

    def factory(metric: Metric) -> SimpleNamespace:
        return SimpleNamespace(record=lambda value, _: recorded.setdefault(metric.name, value))

    usage = SequenceUsage(9, 0, 0, 0, 0, 0, 0, 30.0, None, 30.0, 0)
    delta = SequenceDelta("r", (), finish_reason=EndReason.DEADLINE, usage=usage)
    EngineMeters(factory, "g0").deltas([delta])
    assert recorded == {table.SEQUENCE_QUEUE.name: 30.0}


@pytest.mark.parametrize(("received", "n"), [(0, 1), (0, 3), (60, 1)])
async def test_the_time_per_token_is_that_of_one_choice_as_it_was_generated(
    monkeypatch: pytest.MonkeyPatch, received: int, n: int
) -> None:
    """Choices are generated at the same time, and a resumed stream only what was missing."""
    recorded: dict[str, float] = {}

    def factory(metric: Metric) -> SimpleNamespace:
        return SimpleNamespace(record=lambda value, _: recorded.setdefault(metric.name, value))

    async with machine() as built:
        monkeypatch.setattr(built.ingress, "_meters", IngressMeters(factory))
        built.allow(MANY)
        request = make_request(70, n=n)
        if received:
            request = resumed(request, {0: (answer(PROMPT, received), received)})
        usage = (await read(built.stream(request), {0: received})).usage
        assert usage is not None and usage.completion_tokens == n * 70
        decode_s = usage.total_s - usage.time_to_first_token_s
        each_s = recorded[table.OUTPUT_TOKEN.name]
        assert each_s == pytest.approx(decode_s / (70 - received - 1))


async def test_refusals_are_counted_with_their_bytes() -> None:
    config = RouterConfig(tenants={TENANT: TenantPolicy(quota_bytes=1)})
    async with machine(config=config) as built:
        with pytest.raises(QuotaExceededError) as caught:
            await generate(built, 4)
        seen = built.router.meters
    assert seen.of(table.REFUSALS, "quota") == 1
    assert seen.of(table.REFUSED_BYTES, "quota") == caught.value.needed_bytes > 0


async def test_waiting_and_prefill_are_seen_while_they_last() -> None:
    async with machine() as built:
        engine = built.engines["g0"]
        running = asyncio.ensure_future(generate(built, 4))
        await built.until(lambda: engine.leader.step_age_s > 0)
        loads = engine.leader.account.loads
        await engine._account._measure()
        age_s = engine.meters.of(table.STEP_AGE, "g0")
        built.allow(MANY)
        await running
    assert age_s is not None and age_s > 0, "the executor holds the step"
    assert loads.steps_total == 0


async def test_failovers_name_the_group_that_was_lost() -> None:
    async with machine(groups=2) as built:
        running = asyncio.ensure_future(generate(built, 4))
        await built.until(lambda: any(engine.submitted for engine in built.engines.values()))
        (lost,) = [name for name, engine in built.engines.items() if engine.submitted]
        built.engines[lost].cut()
        built.allow(MANY)
        usage = await running
    assert usage.failovers == 1 and usage.group != lost
    assert built.meters.of(table.FAILOVERS, lost, "suspect") == 1
    assert built.meters.of(table.QUARANTINES, usage.group) == 1


def test_whether_keys_are_current_is_recorded_again_and_again() -> None:
    seen = SeenMeters()
    meters = IngressMeters(seen)
    meters.state(0, connected=True)
    assert seen.of(table.KEYS_CURRENT) == 1
    meters.keys(current=False)
    meters.state(0, connected=True)
    assert seen.of(table.KEYS_CURRENT) == 0
