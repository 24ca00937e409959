"""What Fast Forward saves on the way to Adam's own test loss: the paper's protocol, and a trainer's.

`plan`: which rounds, in which order. `rounds`: running them. `record`: the result file. `table`, `figures`
and `plots`: what it says. `sft`: TRL's `SFTTrainer` with and without the callback.
"""
