"""Networks. Ours by name, imported when they are asked for; every other name is one of torchvision's."""

NETWORKS = {  # name: the class, as module:class
    "cnn": "distrib.models.cnn:CNN",
    "airbench": "distrib.models.airbench:Airbench",
}
