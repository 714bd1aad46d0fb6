"""MLflow: what a run's journal holds is brought there, in order, each record once. The one part that imports mlflow.

Delivery may be late: a store that is down or locked costs a run a few seconds and a warning, and what is left over is
brought there by a later call, by :func:`sync`, or by any later run of the same folder. Each record is such that sending
it twice changes nothing (MLflow drops a metric of equal name, time, step and value), so a process that dies between
sending and taking note of it does no harm.
"""

from bnre_exp.tracking.runlog import RunLog, end_run, open_run, sync, undelivered
from bnre_exp.tracking.stores import absolute_uri, read_runs

__all__ = ["RunLog", "absolute_uri", "end_run", "open_run", "read_runs", "sync", "undelivered"]
