"""From images with captions or classes, or prompts alone, to prepared data (`ddil_ray.data.prepared`); needs no Ray.

| module | |
| --- | --- |
| `sources`, `rows` | what there is, in any format: shards, and rows with a condition each |
| `folders`, `parquets`, `tars` | the formats |
| `buckets` | sizes, and cutting images to them |
| `job` | settings, checked, with what they say of teacher and source |
| `stages` | the work, by requests |
| `store` | files that are whole or not there |
| `run` | which requests, in which order |

`ddil_ray.runtime.prepare` has the requests done by Ray.
"""

from ddil_ray.prepare.job import Job, new_job
from ddil_ray.prepare.run import Execute, Summary, begin, fill, summary

__all__ = ["Execute", "Job", "Summary", "begin", "fill", "new_job", "summary"]
