"""The shapes that are measured: saliencies of the networks that multi-task papers use."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """T saliencies of shape ``(B, C, H, W)``; ``cpu_batch`` is the batch that a CPU can do."""

    name: str
    tasks: int
    batch: int
    channels: int
    height: int
    width: int
    cpu_batch: int
    network: str

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def elements(self) -> int:
        """The numbers of all T saliencies together."""
        return self.tasks * self.batch * self.channels * self.positions

    def scaled(self, device_type: str) -> Shape:
        """This shape with the batch that fits ``device_type``: the matrices keep their size."""
        return replace(self, batch=self.cpu_batch) if device_type == "cpu" else self


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("office49", 4, 64, 512, 7, 7, 32, "ResNet-18, Office"),
        Shape("office1", 4, 64, 512, 1, 1, 64, "ResNet-18 after pooling, Office"),
        Shape("vit196", 3, 32, 768, 14, 14, 4, "ViT-B/16 at 224 x 224"),
        Shape("vit1024", 3, 32, 768, 32, 32, 2, "ViT-B/16 at 512 x 512"),
        Shape("cityscapes", 2, 64, 2048, 16, 32, 4, "ResNet-50 at stride 8, Cityscapes"),
        Shape("nyuv2", 3, 8, 2048, 36, 48, 2, "ResNet-50 at stride 8, NYUv2"),
    )
}
