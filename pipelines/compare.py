"""`python pipelines/compare.py ...` is `ddil-ray compare ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
