"""Train with Rep-MTL in Lightning.

pip install lightning
python examples/lightning_module.py
"""

import torch
from lightning import Trainer, seed_everything
from scenes import Scenes, encoder, heads, loss_functions
from torch.utils.data import DataLoader

from repmtl_kernels import RepMTL
from repmtl_kernels.integrations.lightning import RepMTLModule


class SceneModule(RepMTLModule):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


seed_everything(0)
module = SceneModule(encoder(), heads(), loss_functions(), RepMTL(lambda_tsr=0.01, lambda_csa=0.01))
# CSA contrasts the samples of a batch, so the last batch must not have a single one.
training = DataLoader(Scenes(), batch_size=32, shuffle=True, drop_last=True)
validation = DataLoader(Scenes(64, seed=1), batch_size=32)
trainer = Trainer(max_epochs=4, logger=False, enable_checkpointing=False, log_every_n_steps=1)
trainer.fit(module, training, validation)
for name, value in trainer.callback_metrics.items():
    print(f"{name}: {value:.4f}")
