"""What a weight move and an alignment cost, on the CPU and on a GPU, beside what one would otherwise use.

`sets`: the tensors. `step` and `align`: the ways to do it. `rounds`: all ways in turn on the CPU. `step_gpu`:
in every mode of a GPU. `align_in_training`: the share of a training step. `machine_code`: what the kernels
compile to. `sanitize`: every kernel once.
"""
