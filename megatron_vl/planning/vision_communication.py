"""What the ranks of a replica tell each other about images, by `parallel.vision_placement`."""

from dataclasses import dataclass

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.model_check import tokens_per_image
from megatron_vl.planning.communication import Volume, pipeline_link, ring_seconds, tensor_link
from megatron_vl.planning.parameters import tower_widths, unit_parameters
from megatron_vl.planning.passes import PART, encoder_units
from megatron_vl.planning.topology import Topology

GRADIENT_BYTES = 4
TOWER_PARTS = {"siglip": ("siglip",), "sam": ("sam", "sam_downsample")}


@dataclass(frozen=True, kw_only=True)
class VisionMessages:
    """`trained`: parts of config.train.PARTS."""

    model: ModelConfig
    trained: frozenset[str]
    topology: Topology
    cluster: ClusterConfig
    element_bytes: int

    @property
    def trained_towers(self) -> list[str]:
        """Those of which a part trains, high resolution first."""
        return [name for name in tower_widths(self.model) if not self.trained.isdisjoint(TOWER_PARTS[name])]

    def gather_adapted_seconds(self, num_images: float) -> float:
        """*split*: the adaptor's output over the tensor-parallel ranks; its gradients go back alike."""
        width = self.model.language.hidden_size
        return self._over_tensor(num_images * self._feature_bytes(width))

    def gather_features_seconds(self, num_images: float) -> float:
        """*spread*: the towers' features to every rank of the first stage, first along the pipeline, then over the
        tensor-parallel ranks."""
        return self._to_first_stage(num_images, list(tower_widths(self.model)))

    def return_gradients_seconds(self, num_images: float) -> float:
        """*spread*: the gradients of trained towers' features to the ranks that encoded them, and those of their
        parameters to the first stage."""
        if not self.trained_towers:
            return 0.0
        scattered = self._along_pipeline(num_images / self.topology.tensor_size, self.trained_towers)
        return scattered + self._pipeline_seconds(self._trained_parameters * GRADIENT_BYTES)

    def send_towers_seconds(self) -> float:
        """*spread*: what the last step made of trained towers, to the stages that hold copies."""
        return self._pipeline_seconds(self._trained_parameters * self.element_bytes)

    @property
    def _trained_parameters(self) -> int:
        counts = unit_parameters(self.model)
        units = encoder_units(self.model)
        return sum(count * counts[name] for name, count in units.items() if PART[name] in self.trained)

    def _to_first_stage(self, num_images: float, names: list[str]) -> float:
        column = self._along_pipeline(num_images / self.topology.tensor_size, names)
        return column + self._over_tensor(num_images * self._features(names))

    def _along_pipeline(self, num_images: float, names: list[str]) -> float:
        """What the first stage of a column takes from, or gives to, the others."""
        pipeline = self.topology.pipeline_size
        return self._pipeline_seconds(num_images * self._features(names) * (pipeline - 1) / pipeline)

    def _pipeline_seconds(self, num_bytes: float) -> float:
        if self.topology.pipeline_size == 1 or not num_bytes:
            return 0.0
        link = pipeline_link(self.cluster, self.topology)
        return num_bytes / link.bytes_per_second + link.latency_seconds

    def _over_tensor(self, num_bytes: float) -> float:
        size = self.topology.tensor_size
        volume = Volume(num_bytes=num_bytes, num_rounds=1 if num_bytes else 0)
        return ring_seconds(volume, tensor_link(self.cluster, size), size)

    def _features(self, names: list[str]) -> float:
        """Bytes of an image's features, of the towers named."""
        widths = tower_widths(self.model)
        return sum(self._feature_bytes(widths[name]) for name in names)

    def _feature_bytes(self, width: int) -> float:
        return tokens_per_image(self.model) * width * self.element_bytes
