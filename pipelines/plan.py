"""`python pipelines/plan.py ...` is `ddil-ray plan ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
