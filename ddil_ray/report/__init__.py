"""Pages and pictures that show a run: one self-contained HTML file, and sample grids."""

from ddil_ray.report.charts import line_chart
from ddil_ray.report.images import save_grid
from ddil_ray.report.page import Figure, Table, write_page
from ddil_ray.report.shift import shift_parts

__all__ = ["Figure", "Table", "line_chart", "save_grid", "shift_parts", "write_page"]
