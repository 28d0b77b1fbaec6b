"""Fused losses for Rep-MTL: representation-level task saliency for multi-task learning."""

from importlib.metadata import PackageNotFoundError, version

import repmtl_kernels._losses.operators  # noqa: F401  (registers the operators)
from repmtl_kernels import reference
from repmtl_kernels._heads.buffers import checkpoint_contexts
from repmtl_kernels._heads.preflight import SecondDerivativeError
from repmtl_kernels._heads.second_order import convert_second_order, second_order
from repmtl_kernels._monitor.grouping import Grouping, group_tasks
from repmtl_kernels._monitor.monitor import SaliencyMonitor
from repmtl_kernels._monitor.plots import plot_affinity, plot_history, plot_saliency
from repmtl_kernels._monitor.report import write_report
from repmtl_kernels._monitor.summary import SaliencyHistory, SaliencySummary
from repmtl_kernels._monitor.writers import to_tensorboard, to_wandb
from repmtl_kernels._training.levels import Levels
from repmtl_kernels.affinity import saliency_affinity
from repmtl_kernels.backends import available_backends, backend_report
from repmtl_kernels.criterion import RepMTL, task_saliencies
from repmtl_kernels.functional import RepMTLLosses, csa_loss, rep_mtl_loss, tsr_loss
from repmtl_kernels.log_losses import LogLosses
from repmtl_kernels.modules import CSALoss, RepMTLLoss, TSRLoss

try:
    __version__ = version("repmtl-kernels")
except PackageNotFoundError:  # a source tree that is on the path but not installed
    __version__ = "0+uninstalled"

__all__ = [
    "CSALoss",
    "Grouping",
    "Levels",
    "LogLosses",
    "RepMTL",
    "RepMTLLoss",
    "RepMTLLosses",
    "SaliencyHistory",
    "SaliencyMonitor",
    "SaliencySummary",
    "SecondDerivativeError",
    "TSRLoss",
    "available_backends",
    "backend_report",
    "checkpoint_contexts",
    "convert_second_order",
    "csa_loss",
    "group_tasks",
    "plot_affinity",
    "plot_history",
    "plot_saliency",
    "reference",
    "rep_mtl_loss",
    "saliency_affinity",
    "second_order",
    "task_saliencies",
    "to_tensorboard",
    "to_wandb",
    "tsr_loss",
    "write_report",
]
