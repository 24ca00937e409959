"""A learning rate that nobody chose, beside Adam tuned by a sweep under the same schedule.

    python -m benchmarks.learning_rate --plan alignment           hours on one core
    python -m benchmarks.learning_rate --plan alignment --list    what has not run yet
    python -m benchmarks.learning_rate --plan alignment --out FILE.json      the runs as one result

`workloads`: what trains on what; `methods`: PEFT's, and at which rates PEFT trains them. `contenders`: what
chooses the rate. `bench`: one run. `plan`: which runs, and what a sweep does next. `record`: the committed
result. `table`: what it says; `peft_table`: what that of PEFT's methods says. A line is written per finished
run, and what is there is not run again.
"""
