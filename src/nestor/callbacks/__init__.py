"""Callbacks: observers of a run.

Example:
    >>> import nestor.callbacks
    >>> watching = [nestor.callbacks.Progress("training"), nestor.callbacks.CSVLog("metrics.csv", every=10)]
"""

from nestor.callbacks.agreement import Agreement
from nestor.callbacks.best import BestWeights, EarlyStopping
from nestor.callbacks.checkpoint import Checkpoint
from nestor.callbacks.ema import EMA
from nestor.callbacks.log_files import CSVLog, JSONLines
from nestor.callbacks.logger import Logger
from nestor.callbacks.measuring import LearningRate, Memory, Throughput
from nestor.callbacks.progress import Progress
from nestor.callbacks.pruning import OptunaPruning
from nestor.callbacks.services import MLflow, TensorBoard, WandB
from nestor.callbacks.weights import SaveWeights
from nestor.training.callback import Callback
from nestor.training.run import Run

__all__ = ["EMA", "Agreement", "BestWeights", "CSVLog", "Callback", "Checkpoint", "EarlyStopping", "JSONLines"]
__all__ += ["LearningRate", "Logger", "MLflow", "Memory", "OptunaPruning", "Progress", "Run", "SaveWeights"]
__all__ += ["TensorBoard", "Throughput", "WandB"]
