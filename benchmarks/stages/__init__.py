"""What a Fast Forward stage costs, and what it finds, alone and on several ranks.

`bench`: our executors beside what one would otherwise run; `cases`, `models`, `providers`, `rounds`,
`profile`, `agreement` and `table` are its parts. `ranks`: its time by the number of processes;
`search_on_ranks`: several τ at once. `search_noise`: each search on measured curves. `resampled`: other
examples in each stage.
"""
