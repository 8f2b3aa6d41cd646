"""`python pipelines/scale.py ...` is `ddil-ray scale ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["scale", *sys.argv[1:]])
