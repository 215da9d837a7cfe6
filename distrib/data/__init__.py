"""Data: from images on a disk to batches on the device. Data sets by name, imported on first use."""

SOURCES = {  # name: the function that loads it, as module:function
    "digits": "distrib.data.datasets:digits",
    "mnist": "distrib.data.datasets:mnist",
    "fashion_mnist": "distrib.data.datasets:fashion_mnist",
    "cifar10": "distrib.data.datasets:cifar10",
    "cifar100": "distrib.data.datasets:cifar100",
    "folder": "distrib.data.datasets:folder",
    "csv": "distrib.data.datasets:table",
}
