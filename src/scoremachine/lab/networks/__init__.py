"""Trained networks: small reference ones, others' behind the same interface, and their training."""

from __future__ import annotations

from scoremachine.lab.networks.architectures import ARCHITECTURES
from scoremachine.lab.networks.network import Network
from scoremachine.lab.networks.training import Training, train

__all__ = ["ARCHITECTURES", "Network", "Training", "train"]
