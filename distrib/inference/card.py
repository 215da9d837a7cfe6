"""The model card of an exported network: what it is, what it was trained on, how good it is, and how to use it."""

from pathlib import PurePath
from typing import Any

from distrib.command_line import dotted
from distrib.inference.classifier import Classifier

ROWS = 30  # of the table of classes

PICTURE = """\
# a photo of 8 bits: more have to be scaled before
picture = PIL.ImageOps.exif_transpose(PIL.Image.open(photo)).convert('RGBA')
white = PIL.Image.new('RGBA', picture.size, 'white')
images = numpy.array(PIL.Image.alpha_composite(white, picture).convert('RGB'))[None]
"""
USAGES = {  # by suffix, of the file FILE
    ".safetensors": """\
import distrib

classifier = distrib.load(FILE)
logits = classifier.logits(classifier.pixels(photo)[None])
""",
    ".pt2": f"""\
import numpy, PIL.Image, PIL.ImageOps, torch

model = torch.export.load(FILE).module()
{PICTURE}logits = model(torch.from_numpy(images))
""",
    ".onnx": f"""\
import json, numpy, onnxruntime, PIL.Image, PIL.ImageOps

session = onnxruntime.InferenceSession(FILE)
classes = json.loads(session.get_modelmeta().custom_metadata_map['classes'])
{PICTURE}[logits] = session.run(['logits'], {{'images': images}})
""",
}


def facts_of(classifier: Classifier) -> dict[str, Any]:
    """What an artifact says of itself, in words that need no distrib."""
    spec, manifest = classifier.spec, classifier.manifest
    mean, std = (manifest["image"][name] for name in ("mean", "std"))
    return {
        "classes": list(classifier.classes),
        "input": "images: uint8 (n, height, width, 3), red, green, blue, 8 bits, upright, on white, of any size",
        "output": f"logits: float32 (n, {len(classifier.classes)}), in the order of the classes",
        "preprocessing": {
            "inside": True,
            "height": spec.height,
            "width": spec.width,
            "fit": spec.fit,
            "center_crop": spec.center_crop if spec.fit == "crop" else None,
            "filter": spec.filter,
            "mean": mean,
            "std": std,
            "channels": classifier.shape[0],
        },
        "network": classifier.config.model.name,
        "step": manifest["step"],
    }


def card(classifier: Classifier, name: str, comparison: str) -> str:
    """The text of a model card, in Markdown. `name` is that of the file, `comparison` how it did on the validation images."""
    manifest, facts = classifier.manifest, facts_of(classifier)
    data, pixels = manifest["data"], facts["preprocessing"]
    rows = {
        "network": f"{facts['network']}, {sum(each.numel() for each in classifier.network.parameters()):,} weights",
        "started from": classifier.config.model.weights or "random weights",
        "trained on": f"{classifier.config.data.name}: {data['train']:,} images of {len(data['classes'])} classes",
        "data": f"SHA-256 {data['sha256']}",
        "training": f"step {manifest['step']:,}, {manifest['ranks']} ranks, precision {manifest['chosen']['precision']}",
        "score": f"{manifest['score']:.4f} on {data['val']:,} validation images" if manifest["score"] is not None else "none",
        "this file": comparison,
        "input": facts["input"],
        "output": facts["output"],
        "pixels": f"{pixels['height']}x{pixels['width']}, fit {pixels['fit']}, filter {pixels['filter']}, "
        f"mean {pixels['mean']}, std {pixels['std']}: inside the file",
        "versions": ", ".join(f"{package} {each}" for package, each in manifest["versions"].items()),
        "commit": manifest["commit"] or "unknown",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    shown = "\n".join(f"- {each}" for each in classifier.classes[:ROWS])
    more = f"\n- and {len(classifier.classes) - ROWS} more" if len(classifier.classes) > ROWS else ""
    usage = USAGES[PurePath(name).suffix].replace("FILE", repr(name))
    config = "\n".join(f"{key}={value}" for key, value in dotted(manifest["config"]))
    return (
        f"# {name}\n\nAn image classifier, trained with distrib.\n\n| | |\n|---|---|\n{table}\n\n"
        f"## Use\n\n```python\n{usage}```\n\n## Classes\n\n{shown}{more}\n\n## Config of the run\n\n```\n{config}\n```\n"
    )
