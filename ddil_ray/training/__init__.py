"""Training without Ray: recipe (config to objects), producer (labelled states), learner (update), loop (what when)."""
