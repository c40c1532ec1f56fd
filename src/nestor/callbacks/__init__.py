"""Callbacks: observers of a run."""

from nestor.callbacks.agreement import Agreement
from nestor.callbacks.best_weights import BestWeights
from nestor.callbacks.checkpoint import Checkpoint
from nestor.callbacks.csv_log import CSVLog
from nestor.callbacks.early_stopping import EarlyStopping
from nestor.callbacks.json_lines import JSONLines
from nestor.callbacks.learning_rate import LearningRate
from nestor.callbacks.logger import Logger
from nestor.callbacks.memory import Memory
from nestor.callbacks.mlflow import MLflow
from nestor.callbacks.progress import Progress
from nestor.callbacks.tensorboard import TensorBoard
from nestor.callbacks.throughput import Throughput
from nestor.callbacks.wandb import WandB
from nestor.training.callback import Callback
from nestor.training.run import Run

__all__ = [
    "Agreement",
    "BestWeights",
    "CSVLog",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "JSONLines",
    "LearningRate",
    "Logger",
    "MLflow",
    "Memory",
    "Progress",
    "Run",
    "TensorBoard",
    "Throughput",
    "WandB",
]
