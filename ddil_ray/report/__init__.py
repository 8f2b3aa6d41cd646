"""Pages and pictures that show a run: one self-contained HTML file, and sample grids."""

from ddil_ray.report.charts import Line, bar_chart, curve_chart, line_chart, point_chart, stacked_chart
from ddil_ray.report.images import grid_tiles, save_grid
from ddil_ray.report.page import Cell, Figure, Gallery, Note, Part, Strip, Table, write_page
from ddil_ray.report.shift import shift_parts

__all__ = [
    "Cell",
    "Figure",
    "Gallery",
    "Line",
    "Note",
    "Part",
    "Strip",
    "Table",
    "bar_chart",
    "curve_chart",
    "grid_tiles",
    "line_chart",
    "point_chart",
    "save_grid",
    "shift_parts",
    "stacked_chart",
    "write_page",
]
