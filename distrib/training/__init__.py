"""What a step does, an evaluation, and when each is due. Objectives by name, imported when they are asked for."""

OBJECTIVES = {  # name: the function that makes it from a config, as module:function
    "cross_entropy": "distrib.training.objective:cross_entropy",
}
