"""What a GPU's own reports mean: who is to be restarted, what is to be kept off it, what a person must do.

Xid numbers and what to do about them are NVIDIA's (its catalogue of Xid errors); an unknown one is only reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from rotator.core.values import GpuId


class GpuAct(StrEnum):
    REPORT = "report"
    PROBE = "probe"  # engines there may have lost their context: ask them
    RESTART = "restart"  # engines there are killed and come back
    CORDON = "cordon"  # engines there are killed, and nothing comes back before a person has been there


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """What a GPU reports of itself. ``xids`` came since the last look; counts that it does not tell are None.
    ``lost`` is why it cannot be reached at all, '' where it can."""

    id: GpuId
    lost: str = ""
    xids: tuple[int, ...] = ()
    ecc_uncorrected: int | None = None  # since the driver was loaded
    remap_failed: bool = False
    remap_pending: bool = False
    reset_required: str = ""


@dataclass(frozen=True, slots=True)
class GpuFinding:
    kind: str  # of the incident: gpu_lost, gpu_firmware, gpu_xid, gpu_ecc
    act: GpuAct
    reason: str
    advice: str = ""


_RESET = "drain the GPU, then `nvidia-smi --gpu-reset -i {gpu}`; if that fails, reboot; then uncordon it"
_REBOOT = (
    "power-cycle the machine (a reset seldom suffices); if it comes again, have board, riser and power checked; "
    "then uncordon it"
)
_REPLACE = "reset it; if it comes again, have the GPU replaced; then uncordon it"
_NVLINK = "check the links (`nvidia-smi nvlink -e`) and reset the GPUs; then uncordon it"
_UNKNOWN = ("not in our table", GpuAct.REPORT, "look it up in NVIDIA's list of Xid errors", "gpu_xid")
_FIRMWARE = (
    "the GPU's firmware does not answer: reset it or reboot; if it comes again, update the driver or set "
    "NVreg_EnableGpuFirmware=0 where the GPU allows; then uncordon it"
)

# Xid -> (what it is, what the service does, what a person must do, the incident's kind)
XIDS: Mapping[int, tuple[str, GpuAct, str, str]] = {
    13: ("a kernel faulted", GpuAct.PROBE, "", "gpu_xid"),
    31: ("a kernel touched memory that is not mapped", GpuAct.PROBE, "", "gpu_xid"),
    43: ("a context was reset", GpuAct.PROBE, "", "gpu_xid"),
    45: ("a context was cleaned up", GpuAct.REPORT, "", "gpu_xid"),
    48: ("an uncorrectable memory error", GpuAct.CORDON, _RESET, "gpu_ecc"),
    61: ("an internal microcontroller stopped", GpuAct.CORDON, _RESET, "gpu_firmware"),
    62: ("an internal microcontroller halted", GpuAct.CORDON, _RESET, "gpu_firmware"),
    63: ("a row of memory will be remapped", GpuAct.REPORT, "reset the GPU at the next quiet hour", "gpu_ecc"),
    64: ("a row of memory could not be remapped", GpuAct.CORDON, _REPLACE, "gpu_ecc"),
    69: ("a graphics engine fault", GpuAct.PROBE, "", "gpu_xid"),
    74: ("an NVLink error", GpuAct.CORDON, _NVLINK, "gpu_xid"),
    79: ("it fell off the bus", GpuAct.CORDON, _REBOOT, "gpu_lost"),
    92: ("many single-bit memory errors", GpuAct.REPORT, "reset the GPU at the next quiet hour", "gpu_ecc"),
    94: ("a contained memory error", GpuAct.RESTART, "reset the GPU at the next quiet hour", "gpu_ecc"),
    95: ("an uncontained memory error", GpuAct.CORDON, _RESET, "gpu_ecc"),
    109: ("a context switch timed out", GpuAct.PROBE, "", "gpu_xid"),
    110: ("a security fault", GpuAct.CORDON, _RESET, "gpu_xid"),
    119: ("its firmware (GSP) did not answer", GpuAct.CORDON, _FIRMWARE, "gpu_firmware"),
    120: ("its firmware (GSP) failed", GpuAct.CORDON, _FIRMWARE, "gpu_firmware"),
    140: ("an unrecovered memory error", GpuAct.CORDON, _RESET, "gpu_ecc"),
    143: ("it failed to initialize", GpuAct.CORDON, _REBOOT, "gpu_firmware"),
}


def findings(before: GpuHealth | None, now: GpuHealth, gpu: str) -> tuple[GpuFinding, ...]:
    """What is new since ``before``, the worst first. ``gpu`` is how people name it (index, <node>/<index>)."""
    found = [*_lost(before, now, gpu), *(_xid(number, gpu) for number in now.xids), *_memory(before, now, gpu)]
    order = (GpuAct.CORDON, GpuAct.RESTART, GpuAct.PROBE, GpuAct.REPORT)
    return tuple(sorted(found, key=lambda f: order.index(f.act)))


def _lost(before: GpuHealth | None, now: GpuHealth, gpu: str) -> list[GpuFinding]:
    found = []
    if now.lost and not (before and before.lost):
        found.append(GpuFinding("gpu_lost", GpuAct.CORDON, f"GPU {gpu} is lost: {now.lost}", _REBOOT))
    if now.reset_required and not (before and before.reset_required):
        reason = f"GPU {gpu} needs a reset: {now.reset_required}"
        found.append(GpuFinding("gpu_firmware", GpuAct.CORDON, reason, _RESET.format(gpu=_index(gpu))))
    return found


def _xid(number: int, gpu: str) -> GpuFinding:
    what, act, advice, kind = XIDS.get(number, _UNKNOWN)
    return GpuFinding(kind, act, f"GPU {gpu} reports Xid {number}: {what}", advice.format(gpu=_index(gpu)))


def _memory(before: GpuHealth | None, now: GpuHealth, gpu: str) -> list[GpuFinding]:
    found = []
    if now.remap_failed and not (before and before.remap_failed):
        reason = f"GPU {gpu} has memory that could not be remapped"
        found.append(GpuFinding("gpu_ecc", GpuAct.CORDON, reason, _REPLACE))
    old = before.ecc_uncorrected if before else None
    if old is not None and now.ecc_uncorrected is not None and now.ecc_uncorrected > old:
        reason = f"GPU {gpu} counts {now.ecc_uncorrected - old} more uncorrectable memory errors"
        advice = f"reset the GPU at the next quiet hour: `nvidia-smi --gpu-reset -i {_index(gpu)}`"
        found.append(GpuFinding("gpu_ecc", GpuAct.RESTART, reason, advice))
    return found


def _index(gpu: str) -> str:
    """As the tools of its own machine name it."""
    return gpu.rpartition("/")[2]
