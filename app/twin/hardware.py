"""The machines that the twin can speak of, one record each, per rank: an Ascend die or a GPU.

Operator efficiencies are those published for each machine (arXiv 2506.12708 v3: MLA in Tables 7 and 8, INT8
GEMM in Table 9), so they are inputs of the twin and never fitted.
"""

from dataclasses import dataclass

from app.twin.errors import TwinError
from fabric.collectives import Library


@dataclass(frozen=True, slots=True)
class Hardware:
    """One rank. Rates are peaks per second; efficiencies are shares of the peak that operators reach.

    `prefill_exchange_cores`: of the cores, those that communication takes in prefill. `exchange_needs_cores`: whether
    decode's exchange does; where it does not, it hides behind the other microbatch's compute.
    """

    name: str
    ranks_per_device: int
    hbm_bytes: float
    hbm_bytes_per_s: float
    dense_16bit_flops: float
    dense_8bit_flops: float
    mla_compute_efficiency: float
    memory_efficiency: float
    gemm_efficiency: float
    num_cores: int
    prefill_exchange_cores: int
    exchange_needs_cores: bool
    nic_bytes_per_s: float
    exchange_library: Library
    source: str

    @property
    def has_ub(self) -> bool:
        """Whether ranks reach one another over Unified Bus; others have RoCE between their nodes."""
        return self.exchange_library == "cann"


ASCEND_910C = Hardware(
    name="ascend-910c",
    ranks_per_device=2,
    hbm_bytes=64e9,
    hbm_bytes_per_s=1.6e12,
    dense_16bit_flops=376e12,
    dense_8bit_flops=752e12,
    mla_compute_efficiency=0.654,
    memory_efficiency=0.841,
    gemm_efficiency=0.80,
    num_cores=24,
    prefill_exchange_cores=0,  # SDMA moves the bytes
    exchange_needs_cores=True,
    nic_bytes_per_s=25e9,
    exchange_library="cann",
    source="arXiv 2506.12708 v1 (FLOPS), v2 section 3.3 (memory, links), v3 Tables 7 to 9 (efficiencies)",
)
H800 = Hardware(
    name="h800",
    ranks_per_device=1,
    hbm_bytes=80e9,
    hbm_bytes_per_s=3.35e12,
    dense_16bit_flops=989e12,
    dense_8bit_flops=1979e12,
    mla_compute_efficiency=0.667,
    memory_efficiency=0.896,
    gemm_efficiency=0.80,
    num_cores=132,
    prefill_exchange_cores=24,
    exchange_needs_cores=False,
    nic_bytes_per_s=50e9,
    exchange_library="deepep",
    source="NVIDIA data sheet; arXiv 2506.12708 v3 Tables 6 to 8 and section 4.2.3 (132 SMs: prefill 108 + 24, decode "
    "132 + 0); GEMM efficiency taken over from Ascend",
)
H100 = Hardware(
    name="h100",
    ranks_per_device=1,
    hbm_bytes=80e9,
    hbm_bytes_per_s=3.35e12,
    dense_16bit_flops=989e12,
    dense_8bit_flops=1979e12,
    mla_compute_efficiency=0.667,
    memory_efficiency=0.896,
    gemm_efficiency=0.80,
    num_cores=132,
    prefill_exchange_cores=24,
    exchange_needs_cores=False,
    nic_bytes_per_s=50e9,
    exchange_library="deepep",
    source="NVIDIA data sheet; operators as on H800",
)

PROFILES = {hardware.name: hardware for hardware in (ASCEND_910C, H800, H100)}


def profile(name: str) -> Hardware:
    """The hardware of that name. Raises `TwinError` naming the known ones."""
    if name not in PROFILES:
        raise TwinError(f"hardware: {name!r} is unknown; known are {', '.join(sorted(PROFILES))}")
    return PROFILES[name]
