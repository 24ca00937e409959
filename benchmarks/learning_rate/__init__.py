"""A learning rate that nobody chose, beside Adam tuned by a sweep under the same schedule.

    python -m benchmarks.learning_rate --plan alignment           hours on one core, see below
    python -m benchmarks.learning_rate --plan alignment --list    what has not run yet
    python -m benchmarks.learning_rate --plan alignment --out FILE.json      the runs as one result

`workloads`: what trains on what; `methods`: PEFT's, and at which rates PEFT trains them. `contenders`: what
chooses the rate. `bench`: one run. `plan`: which runs, and what a sweep does next. `record`: the committed
result. `table`, `shares`, `peft_table`: what it says; `profile`: what it looks like. A line is written per
finished run, and what is there is not run again. The plan `workloads` (`calibration`, then `evaluation`) goes
on from its result on another machine:

    python -m benchmarks.learning_rate --plan workloads --resume benchmarks/results/rate_workloads_DATE.json

`--again auto` leaves out the runs of one contender, which are then due: its rule has changed.

How long, on one core of an AMD EPYC, testing aside: `workloads` took 2.8 hours for 948 runs (100 steps take
6 s at batch 4, 16 s at batch 32, 67 s at batch 128), and has some 3 hours left, of which `--list` names the
runs; `smollm2` takes about 4 minutes a run at batch 8 (2 to 4 hours) and four times that at batch 32;
`alignment` about 2 hours, `peft` half an hour.
"""
