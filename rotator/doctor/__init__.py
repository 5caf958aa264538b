"""``rotator doctor``: what is wrong with the machine, from the lowest layer up, each with evidence and what mends it.

``facts`` are values, ``judge_*`` turn them into findings and do no I/O, ``probe_*`` gather them, ``walk`` goes upwards.
"""

from rotator.doctor.findings import Finding, Repair, Severity
from rotator.doctor.layers import LAYERS, judge
from rotator.doctor.walk import Examination, examine

__all__ = ["LAYERS", "Examination", "Finding", "Repair", "Severity", "examine", "judge"]
