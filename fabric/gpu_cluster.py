"""The machine to compare with: GPU nodes with NVLink inside and RoCE between them, one network card per GPU.

CPUs keep their DRAM behind PCIe; another node's DRAM is reached through a network card of that node.
"""

from dataclasses import dataclass

from fabric.planes import GB, ROCE_EFFICIENCY, ROCE_LATENCY, Figure
from fabric.topology import FabricError

NVLINK_H100 = Figure(450 * GB, "B/s", "NVLink 4, one way, NVIDIA H100 data sheet", "quoted")
NVLINK_H800 = Figure(200 * GB, "B/s", "NVLink cut to 400 GB/s both ways on H800", "quoted")
NIC = Figure(50 * GB, "B/s", "400 Gbps RoCE card per GPU (DeepEP's test machines)", "quoted")
NVLINK_EFFICIENCY = Figure(
    0.79, "", "DeepEP: 158 of 200 GB/s on NVLink (its README, normal kernels)", "derived"
)
NVLINK_LATENCY = Figure(1e-6, "s", "peer write through one NVSwitch, order of magnitude", "assumed")


@dataclass(frozen=True, slots=True)
class GPUCluster:
    """`num_gpus` GPUs in nodes of `gpus_per_node`. Raises `FabricError` unless that is whole nodes."""

    num_gpus: int = 384
    gpus_per_node: int = 8
    nvlink_bytes_per_s: float = NVLINK_H800.value
    nic_bytes_per_s: float = NIC.value

    def __post_init__(self) -> None:
        if self.num_gpus < 1 or self.gpus_per_node < 1 or self.num_gpus % self.gpus_per_node:
            raise FabricError(f"num_gpus: {self.num_gpus} is not whole nodes of {self.gpus_per_node} GPUs")

    @property
    def capacity(self) -> dict[str, float]:
        """Line rate of every link, in bytes per second; the RoCE network itself is non-blocking."""
        rates: dict[str, float] = {}
        for gpu in range(self.num_gpus):
            node = gpu // self.gpus_per_node
            for link in (f"gpu:{gpu}>nvlink:{node}", f"nvlink:{node}>gpu:{gpu}"):
                rates[link] = self.nvlink_bytes_per_s
            for link in (f"gpu:{gpu}>roce", f"roce>gpu:{gpu}"):
                rates[link] = self.nic_bytes_per_s
        return rates

    def route(self, src: int, dst: int) -> tuple[str, ...]:
        """The links from one GPU to another. Raises `FabricError` for GPUs that do not exist or are the same."""
        for name, gpu in (("src", src), ("dst", dst)):
            if not 0 <= gpu < self.num_gpus:
                raise FabricError(f"{name}: gpu:{gpu} is outside gpu:0 to gpu:{self.num_gpus - 1}")
        if src == dst:
            raise FabricError(f"src and dst are both gpu:{src}: nothing would cross the network")
        node = src // self.gpus_per_node
        middle = f"nvlink:{node}" if node == dst // self.gpus_per_node else "roce"
        return (f"gpu:{src}>{middle}", f"{middle}>gpu:{dst}")

    def transfer_time(self, src: int, dst: int, num_bytes: int) -> float:
        """Seconds for `num_bytes` between two GPUs on an idle cluster."""
        if "roce" in self.route(src, dst)[0]:
            return ROCE_LATENCY.value + num_bytes / (self.nic_bytes_per_s * ROCE_EFFICIENCY.value)
        return NVLINK_LATENCY.value + num_bytes / (self.nvlink_bytes_per_s * NVLINK_EFFICIENCY.value)
