"""Equal weighting."""

import numpy as np
from torch import nn


class EW(nn.Module):
    def init_param(self):
        pass

    def backward(self, losses, **kwargs):
        losses.sum().backward()
        return np.ones(self.task_num)
