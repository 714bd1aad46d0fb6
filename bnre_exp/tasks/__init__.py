"""What a network is for. Configurations name the tasks here: ``bnre_exp.tasks.Classification``."""

from bnre_exp.tasks.classification import Classification
from bnre_exp.tasks.regression import Regression
from bnre_exp.tasks.segmentation import Segmentation
from bnre_exp.tasks.task import Evaluation, Headline, Meter, Task

__all__ = ["Classification", "Evaluation", "Headline", "Meter", "Regression", "Segmentation", "Task"]
