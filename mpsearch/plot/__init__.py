"""Pictures, drawn without a display and without global state: each function returns a matplotlib `Figure`.

The methods `CostTable.plot`, `Plan.plot`, `Front.plot` and `SearchResult.plot` draw and save in one call. Colours are told apart by
the colour-blind, layers are named up to 40 and put together by block of their names beyond, quantities have their units on the axes.
"""

from mpsearch.plot.agreement import agreement_figure as agreement_figure
from mpsearch.plot.agreement import cells_figure as cells_figure
from mpsearch.plot.bits import plan_figure as plan_figure
from mpsearch.plot.figure import BLACK as BLACK
from mpsearch.plot.figure import BLUE as BLUE
from mpsearch.plot.figure import GREEN as GREEN
from mpsearch.plot.figure import GREY as GREY
from mpsearch.plot.figure import ORANGE as ORANGE
from mpsearch.plot.figure import PINK as PINK
from mpsearch.plot.figure import RED as RED
from mpsearch.plot.figure import SKY as SKY
from mpsearch.plot.figure import check_ending as check_ending
from mpsearch.plot.figure import save as save
from mpsearch.plot.figure import written as written
from mpsearch.plot.pareto import Measured as Measured
from mpsearch.plot.pareto import front_figure as front_figure
from mpsearch.plot.pareto import fronts_figure as fronts_figure
from mpsearch.plot.pareto import measured_front_figure as measured_front_figure
from mpsearch.plot.prediction import prediction_figure as prediction_figure
from mpsearch.plot.sensitivity import sensitivity_figure as sensitivity_figure
from mpsearch.plot.usage import usage_figure as usage_figure
