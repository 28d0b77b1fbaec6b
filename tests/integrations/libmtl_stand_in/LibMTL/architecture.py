"""Hard parameter sharing."""

from torch import nn


class HPS(nn.Module):
    """With ``rep_grad``, decoders get detached copies, and ``rep`` has what was copied."""

    def __init__(self, task_name, encoder_class, decoders, rep_grad, multi_input, device, **kwargs):
        super().__init__()
        self.task_name, self.task_num = task_name, len(task_name)
        self.rep_grad, self.multi_input, self.device = rep_grad, multi_input, device
        self.encoder, self.decoders = encoder_class(), decoders
        if rep_grad:
            self.rep, self.rep_tasks = {}, {}

    def forward(self, inputs, task_name=None):
        z = self.encoder(inputs)
        out = {}
        for i, task in enumerate(self.task_name):
            if task_name in (None, task):
                # Attention architectures have a representation for each task.
                own = z[i] if isinstance(z, list) else z
                if self.rep_grad:
                    self._keep(own, task, shared=not (isinstance(z, list) or self.multi_input))
                    own = self.rep_tasks[task]
                out[task] = self.decoders[task](own)
        return out

    def _keep(self, representation, task, shared):
        if shared:
            self.rep = representation
        else:
            self.rep[task] = representation
        self.rep_tasks[task] = representation.detach().clone()
        self.rep_tasks[task].requires_grad = True
