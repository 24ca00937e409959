"""A learning rate that nobody chose, beside Adam tuned by a sweep under the same schedule.

    python -m benchmarks.learning_rate --plan alignment           hours on one core
    python -m benchmarks.learning_rate --plan alignment --list    what has not run yet
    python -m benchmarks.learning_rate --plan alignment --out FILE.json      the runs as one result

`workloads`: what trains on what; `methods`: PEFT's, and at which rates PEFT trains them. `contenders`: what
chooses the rate. `bench`: one run. `plan`: which runs, and what a sweep does next. `record`: the committed
result. `table`, `shares`, `peft_table`: what it says; `profile`: what it looks like. A line is written per
finished run, and what is there is not run again. The plan `workloads` (`calibration`, then `evaluation`) goes
on from its result on another machine:

    python -m benchmarks.learning_rate --plan workloads --resume benchmarks/results/rate_workloads_DATE.json
"""
