"""Pictures, drawn without a display and without global state: each function returns a matplotlib `Figure`.

The methods `CostTable.plot`, `Plan.plot`, `Front.plot` and `SearchResult.plot` draw and save in one call. Colours are told apart by
the colour-blind, layers are named up to 40 and put together by block of their names beyond, quantities have their units on the axes.
"""

from mpsearch.core.front import Measured as Measured
from mpsearch.display.figures.agreement import agreement_figure as agreement_figure
from mpsearch.display.figures.agreement import cells_figure as cells_figure
from mpsearch.display.figures.bits import plan_figure as plan_figure
from mpsearch.display.figures.figure import BLACK as BLACK
from mpsearch.display.figures.figure import BLUE as BLUE
from mpsearch.display.figures.figure import GREEN as GREEN
from mpsearch.display.figures.figure import GREY as GREY
from mpsearch.display.figures.figure import ORANGE as ORANGE
from mpsearch.display.figures.figure import PINK as PINK
from mpsearch.display.figures.figure import RED as RED
from mpsearch.display.figures.figure import SKY as SKY
from mpsearch.display.figures.figure import check_ending as check_ending
from mpsearch.display.figures.figure import save as save
from mpsearch.display.figures.figure import written as written
from mpsearch.display.figures.pareto import front_figure as front_figure
from mpsearch.display.figures.pareto import fronts_figure as fronts_figure
from mpsearch.display.figures.pareto import measured_front_figure as measured_front_figure
from mpsearch.display.figures.prediction import prediction_figure as prediction_figure
from mpsearch.display.figures.sensitivity import sensitivity_figure as sensitivity_figure
from mpsearch.display.figures.usage import usage_figure as usage_figure
