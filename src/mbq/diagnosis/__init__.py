"""What went wrong in a quantized model, from measurements, and what to try."""

from mbq.diagnosis.pair import Loading
from mbq.diagnosis.rules import RULES, Finding
from mbq.diagnosis.run import Diagnosis, Options, diagnose

__all__ = ["RULES", "Diagnosis", "Finding", "Loading", "Options", "diagnose"]
