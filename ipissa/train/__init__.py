"""Make adapters: two words and a model in, one file out."""

from ipissa.train.card import write_card
from ipissa.train.config import TrainConfig
from ipissa.train.result import TrainResult
from ipissa.train.trainer import train

__all__ = ["TrainConfig", "TrainResult", "train", "write_card"]
