"""A classifier as one graph, from decoded pictures of any size to logits, and the formats in which it is taken away."""

import json
import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distrib.config import OWN
from distrib.data.augment import mean_logits
from distrib.data.resize import center_resized
from distrib.errors import UserError
from distrib.inference.classifier import Classifier, load

Answers = Callable[[Tensor], Tensor]  # pictures, (n, height, width, 3) uint8, to logits, (n, classes)

OPSET = 18  # of ONNX
EXAMPLE = (2, 37, 53, 3)  # the shape of the pictures that the graph is traced with; other sizes work too
AXES = {0: "batch", 1: "height", 2: "width"}


class Graph(nn.Module):
    """Pictures, (n, height, width, 3) uint8, upright, to logits, (n, classes) float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network = deepcopy(classifier.network).cpu().float().to(memory_format=torch.contiguous_format)
        self.spec, self.views, self.channels = classifier.spec, classifier.config.tta, classifier.shape[0]
        for name, each in (("mean", classifier.normalize.mean), ("std", classifier.normalize.std)):
            self.register_buffer(name, each[: self.channels].detach().cpu().clone()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        pixels = center_resized(images, self.spec)
        if self.channels == 1:  # Classifier.with_channels
            red, green, blue = pixels.double().unbind(1)
            pixels = torch.floor((19595 * red + 38470 * green + 7471 * blue + (1 << 15)) / (1 << 16)).float()[:, None]
        return mean_logits(self.network, (pixels - self.mean) / self.std, self.views)


def traced(classifier: Classifier) -> Any:
    """The graph of a classifier, for any number and size of pictures. Raises UserError if its network cannot be traced."""
    example = torch.zeros(EXAMPLE, dtype=torch.uint8)
    shapes = {"images": {axis: torch.export.Dim(name) for axis, name in AXES.items()}}
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.export.export(Graph(classifier).eval(), (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises errors of many kinds
        words = str(error).strip().splitlines()[0][:200]
        raise UserError(f"torch.export cannot trace {classifier.config.model.name}: {words}; export .safetensors") from None


def write_pt2(classifier: Classifier, facts: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(traced(classifier), path, extra_files={"distrib.json": json.dumps(facts)})


def run_pt2(path: Path, classifier: Classifier) -> Answers:
    module: Answers = torch.export.load(path).module()
    return module


def write_onnx(classifier: Classifier, facts: dict[str, Any], path: Path) -> None:
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            traced(classifier), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"], verbose=False
        )
    assert program is not None
    model: Any = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param:
                dimension.dim_param = AXES[axis]
    texts = {name: each if isinstance(each, str) else json.dumps(each) for name, each in facts.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, path)


def run_onnx(path: Path, classifier: Classifier) -> Answers:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_safetensors(classifier: Classifier, facts: dict[str, Any], path: Path) -> None:
    tensors = {name: each.cpu().contiguous() for name, each in classifier.network.state_dict().items()}
    manifest = {name: each for name, each in classifier.manifest.items() if name not in ("files", "sha256")}
    save_file(tensors, path, {"format": "pt", "distrib": json.dumps(facts | {"manifest": manifest})})


def run_safetensors(path: Path, classifier: Classifier) -> Answers:
    own = classifier.config.model.name.startswith(OWN)
    return Graph(load(path, network=deepcopy(classifier.network) if own else None)).eval()


class Format(NamedTuple):
    """How an artifact of a classifier is written, what runs it, and the packages that this needs."""

    write: Callable[[Classifier, dict[str, Any], Path], None]
    run: Callable[[Path, Classifier], Answers]
    needs: tuple[str, ...] = ()


FORMATS = {
    ".safetensors": Format(write_safetensors, run_safetensors),
    ".pt2": Format(write_pt2, run_pt2),
    ".onnx": Format(write_onnx, run_onnx, ("onnx", "onnxscript", "onnxruntime")),
}
