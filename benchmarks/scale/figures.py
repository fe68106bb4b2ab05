"""Which figures there are, in the order of the table."""

from benchmarks.scale import (
    commands,
    due_at_once,
    freeze_overhead,
    hung,
    idle,
    load,
    one_due,
    run_log,
    runs_per_second,
)
from benchmarks.scale.setting import Figure

FIGURES = {
    module.NAME: Figure(module.NAME, module.ABOUT, module.measure)
    for module in (
        due_at_once,
        one_due,
        runs_per_second,
        run_log,
        load,
        idle,
        hung,
        commands,
        freeze_overhead,
    )
}
