"""`python pipelines/export.py ...` is `ddil-ray export ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
