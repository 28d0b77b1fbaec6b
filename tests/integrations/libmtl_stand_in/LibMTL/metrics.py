"""Accuracy."""


class AccMetric:
    def __init__(self):
        self.reinit()

    def update_fun(self, pred, gt):
        self.right += (pred.argmax(-1) == gt).sum().item()
        self.count += len(gt)

    def score_fun(self):
        return [self.right / self.count]

    def reinit(self):
        self.right, self.count = 0, 0
