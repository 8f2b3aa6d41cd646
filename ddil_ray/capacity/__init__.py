"""The capacity model: how many actors a trainer needs, and what a run would deliver.

| module | answers |
| --- | --- |
| `accelerators` | how fast do networks run on an accelerator? |
| `counting` | how many floating-point operations are a forward pass and an update? |
| `costs` | how long is a block of states, its labels, an update? |
| `pipeline` | with so many actors and buffers, when does each step end? |
| `sizing` | how many actors does each role need, and how are GPUs best split? |
| `baselines` | what would the same GPUs deliver without a pipeline? |
| `plan` | all of it for one run |

docs/plan.md has the equations.
"""
