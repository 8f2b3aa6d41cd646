"""`python pipelines/distill.py ...` is `ddil-ray distill ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
