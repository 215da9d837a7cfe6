"""Training: steps, evaluations and what they need. Objectives by name, imported on first use."""

OBJECTIVES = {  # name: the function that makes it from a config, as module:function
    "cross_entropy": "distrib.training.objective:cross_entropy",
}
