"""Paired runs and what they say: grids, statistics, and the report that `ablate` and `compare` share. Knows no Ray.

| module | is |
| --- | --- |
| `grid` | an `AblationConfig` as a list of checked runs |
| `measure` | one run of the grid, trained and measured in this process |
| `outcome` | what a run leaves, as files and in memory |
| `folders` | the same of finished run folders of `ddil-ray distill` |
| `statistics` | paired differences, intervals, the test of two laws of t |
| `summary` | outcomes to report.json: every number that the page shows |
| `page`, `report` | report.json to charts, tables and files |
"""
