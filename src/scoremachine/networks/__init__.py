"""Trained networks: small reference ones, others' behind the same interface, and their training."""

from __future__ import annotations

from scoremachine.networks.architectures import ARCHITECTURES
from scoremachine.networks.network import Network
from scoremachine.networks.training import Training, train

__all__ = ["ARCHITECTURES", "Network", "Training", "train"]
