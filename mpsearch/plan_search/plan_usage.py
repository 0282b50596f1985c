"""What a plan uses of every resource, by a table."""

from dataclasses import replace

import numpy as np

from mpsearch.core.plan import Plan
from mpsearch.core.problem import usage_of
from mpsearch.core.table import CostTable


def with_usage(plan: Plan, table: CostTable) -> Plan:
    """A plan with its use of every resource of a table."""
    options = np.array([table.precisions.index(plan[layer.name]) for layer in table.layers])
    usage = usage_of(table, options)
    del usage["sensitivity"]
    return replace(plan, usage=usage)
