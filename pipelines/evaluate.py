"""`python pipelines/evaluate.py ...` is `ddil-ray evaluate ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
