"""placeholder"""

from protocol.rounds.lineage import Chain
from protocol.rounds.machine import RoundMachine, RoundStatistics
from protocol.rounds.member import Standing
from protocol.rounds.settings import KeyNotary, Notary, RoundRules, RoundSize, RoundTimers, Settings

__all__ = [
    "Chain",
    "KeyNotary",
    "Notary",
    "RoundMachine",
    "RoundRules",
    "RoundSize",
    "RoundStatistics",
    "RoundTimers",
    "Settings",
]
