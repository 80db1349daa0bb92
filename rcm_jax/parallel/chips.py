"""Accelerators: what one chip can do at most."""

import re
from typing import NamedTuple


class Chip(NamedTuple):
    """What one chip can do at most; bytes, FLOP/s and bytes/s in one direction."""

    platform: str
    hbm: float
    flops: float  # bfloat16, dense
    bandwidth: float  # of HBM
    link: float  # to the chips beside it, all links together
    host: int = 0  # chips of a host, where hosts are joined by a slower network; 0: there is none
    network: float = 0.0  # of that, for each chip
    target: str = ""  # XLA's description, for GPUs
    kind: str = ""  # what JAX calls its device_kind, a regular expression


# TPUs: cloud.google.com/tpu/docs/{v5e,v5p,v6e}; interconnect there is counted in both directions, here in one. HBM is
# what the TPU compiler says is available. GPUs: NVIDIA's H100 and H200 SXM data sheets (dense bfloat16, NVLink 900 GB/s
# in both directions); 400 Gb/s of network for each GPU, as in a DGX; HBM as the driver reports it.
CHIPS = {
    "v5e": Chip("tpu", 15.75 * 2**30, 197e12, 0.82e12, 200e9, kind="TPU v5 ?(lite|e)"),
    "v5p": Chip("tpu", 95.74 * 2**30, 459e12, 2.765e12, 600e9, kind="TPU v5p?"),
    "v6e": Chip("tpu", 31.25 * 2**30, 918e12, 1.6e12, 400e9, kind="TPU v6 ?(lite|e)"),
    "h100": Chip("gpu", 84_978_434_048, 989e12, 3.35e12, 450e9, 8, 50e9, "h100_sxm.txtpb", "NVIDIA H100 80GB HBM3"),
    "h200": Chip("gpu", 150_000_000_000, 989e12, 4.8e12, 450e9, 8, 50e9, "h200_sxm.txtpb", "NVIDIA (H200|GH200).*"),
    "cpu": Chip("cpu", 16 * 2**30, 1e11, 2e10, 1e10),  # made up: to try the plan itself
}

# bfloat16, dense, of chips that no plan is made for: NVIDIA's data sheets, cloud.google.com/tpu/docs.
OTHER_PEAKS = {
    "NVIDIA A100.*": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA B200.*": 2250e12,
    "NVIDIA GB200.*": 2500e12,
    "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s in bfloat16 of one device of JAX, by its device_kind; None if that is not known."""
    peaks = {chip.kind: chip.flops for chip in CHIPS.values() if chip.kind} | OTHER_PEAKS
    return next((peak for kind, peak in peaks.items() if re.fullmatch(kind, device_kind)), None)
