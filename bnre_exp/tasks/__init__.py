"""What a network is for. Configurations name the tasks here: ``bnre_exp.tasks.Classification``."""

from bnre_exp.tasks.classification import Classification
from bnre_exp.tasks.detection import Detection
from bnre_exp.tasks.keypoints import Keypoints
from bnre_exp.tasks.regression import Regression
from bnre_exp.tasks.segmentation import Segmentation
from bnre_exp.tasks.task import Evaluation, Headline, Meter, Task
from bnre_exp.tasks.ultralytics import Ultralytics

__all__ = [
    "Classification",
    "Detection",
    "Evaluation",
    "Headline",
    "Keypoints",
    "Meter",
    "Regression",
    "Segmentation",
    "Task",
    "Ultralytics",
]
