"""Names of metrics: vLLM's where the meaning is vLLM's, and a dashboard that asks for nothing that is not there."""

import json
import re
from pathlib import Path

import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine.metrics import WorkerMetrics
from tests.app.conftest import Gateway

ROOT = Path(__file__).parents[2]
VLLM = {
    "gauge": "num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc "
    "cache_config_info",
    "counter": "prompt_tokens prompt_tokens_by_source generation_tokens prompt_tokens_cached "
    "prefix_cache_queries prefix_cache_hits external_prefix_cache_queries external_prefix_cache_hits "
    "num_preemptions request_success admission_rejections spec_decode_num_drafts "
    "spec_decode_num_draft_tokens spec_decode_num_accepted_tokens",
    "histogram": "time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds "
    "e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds "
    "request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens request_generation_tokens "
    "request_params_n request_params_max_tokens iteration_tokens_total",
}
"""What vLLM exports under these types, as far as it means something here."""
LOW_S = 0.005
"""A bound that a small model's latencies need, and that lies below most of vLLM's lowest."""


async def exposed(gateway: Gateway) -> dict[str, str]:
    """The text of /metrics by Prometheus job."""
    worker = generate_latest(WorkerMetrics("m", "both-0").registry).decode()
    return {"gateway": (await gateway.http.get("/metrics")).text, "worker": worker}


async def test_names_of_vllm_have_its_types_and_finer_low_buckets(gateway: Gateway) -> None:
    types = {name: kind for kind, names in VLLM.items() for name in names.split()}
    for job, text in (await exposed(gateway)).items():
        families = list(text_string_to_metric_families(text))
        assert families
        for family in families:
            assert re.match(r"vllm:|cloudmatrix_", family.name), (job, family.name)
            if family.name.startswith("vllm:"):
                assert types.get(family.name.removeprefix("vllm:")) == family.type, (job, family.name)
            bounds = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
            if bounds and family.name.endswith("_seconds"):
                assert min(bounds) <= LOW_S, (job, family.name)


async def test_the_dashboard_asks_for_what_is_exported(gateway: Gateway) -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/cloudmatrix.json").read_text())
    names = {
        job: {
            name
            for family in text_string_to_metric_families(text)
            for name in (
                [f"{family.name}_bucket", f"{family.name}_sum", f"{family.name}_count"]
                if family.type == "histogram"
                else [f"{family.name}_total" if family.type == "counter" else family.name]
            )
        }
        for job, text in (await exposed(gateway)).items()
    }
    jobs = {
        job["job_name"]
        for job in yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    }
    assert jobs == set(names)
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(asked) > 30
    for expression in asked:
        found = re.findall(r"((?:vllm:|cloudmatrix_)\w+)\{job=\"(\w+)\"", expression)
        assert len(found) == len(re.findall(r"vllm:|cloudmatrix_", expression)), expression
        for name, job in found:
            assert name in names[job], (job, name)


def test_compose_starts_what_the_dashboard_needs() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounted = [volume for name in ("prometheus", "grafana") for volume in services[name]["volumes"]]
    for volume in mounted:
        assert (ROOT / volume.split(":")[0]).exists(), volume
    jobs = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    scraped = {name: sd["port"] for job in jobs for sd in job["dns_sd_configs"] for name in sd["names"]}
    assert scraped == {"gateway": 8000, "prefill": 8001, "decode": 8001}
    for name in ("prefill", "decode"):
        command = services[name]["command"]
        assert command[command.index("--port") + 1] == "8001"
